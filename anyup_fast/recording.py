"""The forward of AnyUp that records gradients: layer by layer, or by the plain layers."""

import torch
import torch.nn.functional as F

from .layers import broadcast, reflected, rms_norm, stored_dtype, through, wide_dtype
from .ops import branches, pooled_block, project_pixels
from .plain.convolution import convolve


class Recording:
    """What `AnyUp` does where gradients are recorded; it finds the model's parts and weights in `self`."""

    def encoded(self, image, features):
        """What queries and keys are made of, with gradients.

        Args:
            image: (B, input_dim, H, W). features: (B, C, h, w), as `forward` takes them.

        Returns:
            query (B, H, W, qk_dim), to be pooled where the output has another size and given to `projected_queries`;
            projected key (B, h, w, heads, d). Both float32 at least on CPUs; a batch of one where the inputs are.
        """
        if self.why_not_fused():
            image = image.to(self.image_encoder[0].weight.dtype, memory_format=torch.channels_last)
            return self._encoded_plainly(self.guidance(image), features)
        dtype, weights = stored_dtype(self.image_encoder[0].weight, image.device), self.guidance_weights()
        with torch.autocast(image.device.type, enabled=False):
            x = through(project_pixels(image, weights.image_conv.to(dtype)), weights.image)
            query, from_image = branches(x, weights.freqs, weights.query_conv, weights.key_conv)
            return self._encoded_branches(query, from_image, features, weights)

    def _encoded_plainly(self, guide, features):
        """`encoded` by the plain layers, from the position-encoded guide."""
        key = self.keys(guide, features).permute(0, 2, 3, 1)
        norm, weight, bias = self.cross_decode.projection(1)
        key = F.linear(rms_norm(key.to(wide_dtype(key.dtype)), norm).to(key.dtype), weight, bias)
        return self.query_encoder(guide).permute(0, 2, 3, 1), self._split_heads(key)

    def _encoded_branches(self, query, from_image, features, weights):
        """The rest of `encoded`, from the first convolutions of queries and keys, both (B, H, W, qk_dim)."""
        wide, keys = wide_dtype(query.dtype), self.key_weights()
        query, from_image = through(query, weights.query), through(from_image, weights.key[:-1])
        from_image = pooled_block(from_image, weights.key[-1], features.shape[-2:])
        from_features = self.unified(features).permute(0, 2, 3, 1).to(wide)
        from_features = through(from_features, keys.features)
        both = torch.cat(broadcast(from_image, from_features), -1).permute(0, 3, 1, 2)
        key = convolve(reflected(both, 1), keys.merge.to(wide)).permute(0, 2, 3, 1)
        key = rms_norm(through(key, keys.blocks), keys.norm.to(wide))
        key = F.linear(key, keys.weight.to(wide), keys.bias.to(wide))
        return query, self._split_heads(key)
