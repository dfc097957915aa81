"""AnyUp as an nn.Module: the published parameter names, the published function."""

import warnings

import torch
import torch.nn.functional as F
from torch import nn

from .checks import (
    check_attention_options,
    check_shapes,
    checked_inputs,
    checked_output_size,
    checked_values,
    tell_of_lost_gradients,
)
from .decoder import CrossAttention, CrossDecode, chosen_rule
from .frugal import check_max_memory, filled_by_tiles
from .fused import Fused
from .kept import kept_of
from .layers import (
    Conv2d,
    FeatureUnification,
    ReflectConv2d,
    RotaryEmbedding,
    broadcast,
    cell_colours,
    encoder,
    pooled_picture,
    recordable,
    records_gradients,
    stored_dtype,
    unit_channels,
    wide_block,
)
from .logs import log_once
from .ops import pooled
from .ops.attention import runs_plain
from .ops.choice import requested, use_backend
from .plain.memory import forward_memory
from .prepared import Prepared
from .recording import Recording

__all__ = ["AnyUp", "CrossAttention", "CrossDecode"]  # the names under which pickles find them


class AnyUp(Fused, Recording, nn.Module):
    """Upsamples the features of any vision encoder to any resolution, guided by the image.

    Args:
        input_dim: channels of the image.
        qk_dim: width of queries and keys; a multiple of 8 and of 4.
        kernel_size: of the first convolution on the image (reflect padding).
        kernel_size_lfu: of the filters of the feature-agnostic layer.
        window_ratio: half width of the attention window as a share of the picture; zero or less is global.
        num_heads: attention heads.
        init_gaussian_derivatives: start the feature-agnostic filters from Gaussian derivatives, not noise.
        use_natten: as the published argument: another name of `window_rule="neighborhood"`. NATTEN is not needed.
        lfu_dim: number of the feature-agnostic filters; None means qk_dim.
        window_rule: "ratio", the windows that the published weights were trained with, or "neighborhood", those of the
            published variant on neighborhood attention: a fixed number of cells, shifted at the borders
            (`anyup_fast.ops.neighborhood_bounds`). None means "ratio", with `use_natten` "neighborhood".
        head_mode: "mean" weighs every channel by the mean over the heads; "split" lets each head weigh its own
            C / num_heads channels, C a multiple of the heads.
        name: a label that configurations of the published code carry; nothing is done with it, and a warning says so.

    Up to `lfu_dim` the order is the published one. Other keywords, which the published class swallows, are a TypeError.

    The parameters carry the names and shapes of the published checkpoints (73 tensors, 878,080 numbers at the
    defaults), so that their state dicts load strictly.

    Source: "AnyUp: Universal Feature Upsampling", arXiv 2510.12764.
    """

    def __init__(
        self,
        input_dim=3,
        qk_dim=128,
        kernel_size=1,
        kernel_size_lfu=5,
        window_ratio=0.1,
        num_heads=4,
        init_gaussian_derivatives=False,
        use_natten=False,
        lfu_dim=None,
        window_rule=None,
        head_mode="mean",
        *,
        name=None,
    ):
        super().__init__()
        window_rule = chosen_rule(window_rule, use_natten)
        if name is not None:
            warnings.warn(f"AnyUp: name={name!r} is taken as in the published code, and ignored", stacklevel=2)
        lfu_dim = qk_dim if lfu_dim is None else lfu_dim
        first = ReflectConv2d(input_dim, qk_dim, kernel_size)
        unify = FeatureUnification(lfu_dim, kernel_size_lfu, init_gaussian_derivatives)
        merge = ReflectConv2d(2 * qk_dim, qk_dim, 3)
        self.input_dim = input_dim
        self.image_encoder = encoder(qk_dim, qk_dim, first)
        self.rope = RotaryEmbedding(qk_dim)
        self.query_encoder = encoder(qk_dim, qk_dim, Conv2d(qk_dim, qk_dim, 1))
        self.key_encoder = encoder(qk_dim, qk_dim, Conv2d(qk_dim, qk_dim, 1))
        self.key_features_encoder = encoder(lfu_dim, qk_dim, unify)
        self.aggregation = encoder(qk_dim, qk_dim, merge)
        self.cross_decode = CrossDecode(qk_dim, num_heads, window_ratio, window_rule, head_mode)

    @classmethod
    def from_pretrained(cls, weights="embedded", *, device=None, window_rule=None):
        """AnyUp with trained weights, in eval mode.

        Args:
            weights: "embedded" (shipped with the package), "anyup_multi_backbone" or "anyup_paper" (published,
                downloaded once), or a path or URL of a checkpoint.
            device: where the model goes; None means the CPU.
            window_rule: "ratio" or "neighborhood" (see `AnyUp`); None means what the checkpoint says, or "ratio".

        Raises:
            ValueError, FileNotFoundError, RuntimeError: see `anyup_fast.checkpoints.load_checkpoint`.
        """
        from .checkpoints import pretrained

        return pretrained(cls, weights, device, window_rule)

    @property
    def qk_dim(self):
        """Width of queries and keys."""
        return self.image_encoder[0].weight.shape[0]

    @property
    def lfu_dim(self):
        """Number of filters of the feature-agnostic layer."""
        return self.key_features_encoder[0].basis.shape[0]

    @property
    def window_ratio(self):
        """Half width of the attention window as a share of the picture."""
        return self.cross_decode.window_ratio

    @property
    def head_mode(self):
        """How the heads share the channels: "mean" or "split"."""
        return self.cross_decode.head_mode

    def guidance(self, image):
        """Position-encoded guide (B, qk_dim, H, W) from which queries and keys are made."""
        return self.rope(self.image_encoder(image))

    def unified(self, features, kept=None):
        """Features of any number of channels as (B, lfu_dim, h, w), float32 at least."""
        return self.key_features_encoder[0](unit_channels(features, kept), kept)

    def queries(self, guide, output_size):
        """Queries (B, qk_dim, H', W') before the 3x3 convolution."""
        return pooled_picture(self.query_encoder(guide), output_size)

    def keys(self, guide, features):
        """Keys (B, qk_dim, h, w) from the pooled guide and the features."""
        from_image = pooled_picture(self.key_encoder(guide), features.shape[-2:])
        _, *blocks = self.key_features_encoder
        from_features = self.unified(features)
        dtype = from_image.dtype
        if dtype in (torch.float16, torch.bfloat16):
            # 1/M plus a few parts in a hundred thousand: the first normalisation must still see float32.
            from_features = wide_block(blocks[0], from_features)
            blocks = blocks[1:]
        from_features = from_features.to(dtype)
        for block in blocks:
            from_features = block(from_features)
        return self.aggregation(torch.cat(broadcast(from_image, from_features), 1))

    def forward(
        self,
        image,
        features,
        output_size=None,
        vis_attn=False,
        q_chunk_size=None,
        max_memory=None,
        backend=None,
        values=None,
    ):
        """Upsample `features` to the resolution of `image`, or to `output_size`.

        Args:
            image: (B, input_dim, H, W), ImageNet-normalised, any float dtype.
            features: (B, C, h, w), any C >= 1, any float dtype. A single image serves all feature maps of a batch, a
                single feature map all images.
            output_size: (H', W'); None means (H, W).
            vis_attn: also return where each output pixel looks, as an RGB picture (B, 3, H', W') in [0, 1]: red is
                the attention-weighted mean row, green the mean column, of the low-res cells (0 first, 1 last).
            q_chunk_size: rows of output computed at a time; accepted for compatibility, memory is flat without it.
            max_memory: bytes that the call may take beyond its inputs, output included. Where the fused path takes more
                (`estimate_memory`), the image is passed over several times in place of being stored, and the output
                filled tile by tile: the same result, up to float rounding, for about three times the products.
            backend: "triton", "torch" or "reference" (the plain layers) for every operator of the call, or "auto"; None
                means what `anyup_fast.ops.use_backend` or ANYUP_FAST_BACKEND says, else "auto".
            values: (B, V, h, w), any V, any float dtype: what is mixed in place of the features, which then only tell
                where to look. None means the features. Because the weights of a pixel sum to 1, a linear layer of the
                features may be taken before it is spread: `values=conv(features)` for a 1x1 convolution is the
                convolution of the output, at the cost of its own channels. Where nothing but `values` asks for
                gradients (`model.requires_grad_(False)`), nothing of the guidance is recorded.

        Returns:
            hr_features (B, C, H', W') in the dtype of `features`, or (B, V, H', W') in that of `values`; with
            `vis_attn` the pair (hr_features, picture).

        Raises:
            ValueError: shapes, dtypes, devices or sizes that do not fit; the message says which. A `max_memory` that no
                plan can keep; the message gives the smallest that suffices.
            RuntimeError: a back end asked for by name that can't run; the message says why.
        """
        if backend is not None:
            with use_backend(backend):
                return AnyUp.forward(
                    self, image, features, output_size, vis_attn, q_chunk_size, max_memory, values=values
                )
        check_attention_options(vis_attn, q_chunk_size)
        output_size = checked_inputs(image, features, output_size, *self._takes())
        values = checked_values(values, image, features, self._groups())
        reason = self.why_not_fused()
        recorded = records_gradients(self, image, features)
        mixing = recorded or torch.is_grad_enabled() and values.requires_grad
        if mixing:
            image, features, values = recordable(image, features, values)
        if max_memory is not None:
            check_max_memory(max_memory, mixing, self._why_not_prepared())
            maps = self._coloured(values, vis_attn)
            shapes = image.shape, features.shape, output_size
            if max_memory < self.estimate_memory(*shapes, maps.dtype, image.device, None, maps.shape):
                out = filled_by_tiles(self, image, features, maps, output_size, max_memory)
                return out.tensor_split((values.shape[1],), 1) if vis_attn else out
        kept = None
        if reason is None and not recorded:
            kept = kept_of(self, image)
            query, key, _ = self.guided(image, features, output_size, kept)
        else:
            if reason is not None:
                log_once(f"AnyUp: the fused path is not taken: {reason}")
            elif image.device.type != "cpu":
                log_once("AnyUp: gradients are recorded, which is slower and takes more memory than torch.no_grad()")
            query, key = self.encoded(image, features)
            if output_size != tuple(image.shape[-2:]):
                query = pooled(query, output_size)
        query = self.projected_queries(query, kept)
        return self._attended(query, key, values, vis_attn, q_chunk_size, None if mixing else kept)

    def upsample(self, enc_img, feats, out_size, vis_attn=False, q_chunk_size=None):
        """`forward` of an image that is encoded already: the published method, with its names.

        It saves encoding an image twice; `prepare` saves more. The layers are those that record gradients.

        Args:
            enc_img: (B, qk_dim, H, W), the position-encoded guide that `guidance` makes of an image.
            feats: (B, C, h, w), as the features of `forward`.
            out_size: (H', W'); None means (H, W).
            vis_attn, q_chunk_size: as in `forward`.

        Returns:
            As `forward`, and equal to it up to rounding.

        Raises:
            ValueError: as `forward`.
        """
        check_attention_options(vis_attn, q_chunk_size)
        takes = self.qk_dim, self._takes()[1]
        out_size = checked_inputs(enc_img, feats, out_size, *takes, names=("enc_img", "feats", "out_size"))
        enc_img, feats = recordable(enc_img, feats) if torch.is_grad_enabled() else (enc_img, feats)
        dtype, weights = stored_dtype(self.image_encoder[0].weight, enc_img.device), self.guidance_weights()
        if requested() == "reference":
            query, key = self._encoded_plainly(enc_img.to(weights.freqs.dtype), feats)
        else:
            with torch.autocast(enc_img.device.type, enabled=False):
                x = enc_img.permute(0, 2, 3, 1).to(dtype)
                query, from_image = (F.linear(x, conv.to(dtype)) for conv in (weights.query_conv, weights.key_conv))
                query, key = self._encoded_branches(query, from_image, feats, weights)
        if out_size != tuple(enc_img.shape[-2:]):
            query = pooled(query, out_size)
        query = self.projected_queries(query)
        return self._attended(query, key, feats, vis_attn, q_chunk_size)

    def _groups(self):
        """What the channels of the values must be a multiple of."""
        return self.cross_decode.cross_attn.heads if self.head_mode == "split" else 1

    def _coloured(self, values, vis_attn):
        """The maps that are upsampled: the values, and the colours of their cells where a picture is wanted."""
        if not vis_attn or self.head_mode == "split":
            return values
        return torch.cat((values, cell_colours(values).to(values.dtype)), 1)

    def _attended(self, query, key, values, vis_attn, q_chunk_size, kept=None):
        """What `forward` returns, from projected queries and keys; queries before that are gone when it is called."""
        key = key.to(query.dtype)
        query, key, maps = broadcast(query, key, self._coloured(values, vis_attn))
        out = self.cross_decode.attend(query, key, maps, q_chunk_size, kept=kept)
        if vis_attn and self.head_mode == "split":
            colours = cell_colours(maps).to(maps.dtype)
            return out, self.cross_decode.attend(query, key, colours, q_chunk_size, "mean", kept)
        return out.tensor_split((values.shape[1],), 1) if vis_attn else out

    def _why_not_prepared(self):
        """Why regions, points, heads and tiles can't be asked for on their own: one sentence, or None."""
        if self.head_mode == "split":
            return "each head weighs channels of its own (head_mode 'split'), which parts and heads don't cover"
        return self.why_not_fused()

    def prepare(self, image, features, state=None, backend=None, values=None):
        """Prepare one image (or batch) and its features to be asked for regions, points, heads or tiles.

        Args:
            image: (B, input_dim, H, W), ImageNet-normalised; or a picture that need not fit in memory, anything
                (H, W, 3) that gives rows when sliced (a numpy memmap, a zarr array): uint8, uint16 or floats in
                [0, 1], normalised as it is read.
            features: (B, C, h, w), B = 1 for a picture that is read.
            state: of `Prepared.state`, of the same model, image and features: saves the passes over the image.
            backend: of every answer, see `forward`; None means what is asked for now.
            values: (B, V, h, w), what is mixed in place of the features, see `forward`; heads are applied to it. Where
                it asks for gradients answers record them, at their own cost.

        Returns:
            anyup_fast.prepared.Prepared. What depends on the whole image is computed with the first answer.

        Raises:
            ValueError: as `forward`; a configuration that only the plain layers cover (see `why_not_fused`).
        """
        from .rows import rows_of

        given = {"image": image, "features": features}
        tell_of_lost_gradients("AnyUp.prepare", given, "to train through it, call the model itself")
        read = None
        if not isinstance(image, torch.Tensor):
            shape, read = rows_of(image, self.image_encoder[0].weight)
            image = torch.empty(shape, device="meta")
            if len(features) != 1:
                raise ValueError(f"features: a picture that is read needs one feature map, got {len(features)}")
        like = image if read is None else features.new_empty(1, self.input_dim, 1, 1)
        checked_inputs(like, features, None, *self._takes())
        if reason := self._why_not_prepared():
            raise ValueError(f"this model cannot be prepared: {reason}")
        mixed = checked_values(values, image, features, read=read is not None)
        if read is None:
            image, features, mixed = broadcast(image, features, mixed)
        prepared = Prepared(self, image, features, read, state, backend)
        return prepared if values is None else prepared.showing(mixed)

    def captured(
        self, image_shape, features_shape, output_size=None, dtype=None, features_dtype=None, values_shape=None
    ):
        """A forward of one shape as a CUDA graph, without gradients: the host launches once in place of forty times.

        Args:
            image_shape: (B, input_dim, H, W). features_shape: (B, C, h, w).
            output_size: (H', W'); None means (H, W).
            dtype: of the image; None means that of the model.
            features_dtype: of the features, the values and the output; None means `dtype`.
            values_shape: (B, V, h, w) of what is mixed in place of the features, see `forward`; None means these.

        Returns:
            anyup_fast.captured.Captured: called with image and features (and values) it gives what `forward` gives, in
            one and the same tensor every time. The model keeps the last eight for calls with equal arguments, each with
            its inputs, its output and all that lies between; a parameter that changes has it captured anew.

        Raises:
            ValueError: shapes or dtypes that do not fit. RuntimeError: no CUDA device, or another reason why this
                model's forward can't be captured; the message says which.
        """
        from .captured import captured

        return captured(self, image_shape, features_shape, output_size, dtype, features_dtype, values_shape)

    def why_not_fused(self):
        """Why `forward` takes the plain layers and not the fused path: one sentence, or None if it takes the fused one.

        Where gradients are recorded the fused layers are those of `anyup_fast.ops.res_block` and `branches`.
        """
        if requested() == "reference":
            return "the back end 'reference', the plain layers, is asked for"
        size = self.image_encoder[0].kernel_size[0]
        if size != 1:
            return f"the first convolution on the image has kernel_size {size}, which couples pixels; it needs 1"
        return None

    def estimate_memory(
        self,
        image_shape,
        features_shape,
        output_size=None,
        dtype=torch.float32,
        device="cpu",
        backend=None,
        values_shape=None,
    ):
        """Bytes that a call without gradients needs at its peak beyond its inputs, its output included.

        Args:
            image_shape: (B, input_dim, H, W).
            features_shape: (B, C, h, w).
            output_size: (H', W'); None means (H, W).
            dtype: of the model, the image and the features.
            device: a torch.device or its name.
            backend: "triton", whose 16-bit images stay 16-bit, or "torch", which makes them float32; None means the one
                that would run there, and Triton for a GPU that is not in this machine.
            values_shape: (B, V, h, w) of what is mixed in place of the features, see `forward`; None means these.

        Returns:
            int. From about a tenth of a gibibyte up within 15 % of what is measured; below, small buffers count. On
            CPUs under Linux up to 128 MiB of it stay with the process for the next call, for the system to take if it
            runs short (`anyup_fast.cpu.pages`).

        Raises:
            ValueError: shapes or sizes that do not fit, a back end that does not exist.
        """
        check_shapes(image_shape, features_shape, values_shape)
        output_size = checked_output_size(output_size, image_shape[2:])
        dim = self.rope.freqs.shape[1]
        device = torch.device(device)
        plain = runs_plain(device, dtype, backend)
        return forward_memory(image_shape, features_shape, output_size, dim, dtype, device, plain, values_shape)

    def _takes(self):
        """Channels of the image and the device, for `checked_inputs`."""
        return self.input_dim, self.image_encoder[0].weight.device
