"""The fused forward of AnyUp up to its attention, and the weights as the operators take them."""

from .kept import kept_of
from .layers import broadcast, computed_dtype, matrices, matrices_of, projected_plainly, records_gradients
from .ops import GuidanceWeights, KeyWeights, guidance, project_keys, project_queries
from .ops.choice import requested


class Fused:
    """What `AnyUp` does by its operators; it finds the model's parts and weights in `self`."""

    def guidance_weights(self):
        """Weights of the image, query and key encoders, as `anyup_fast.ops.guidance` takes them."""
        image, query, key = map(matrices, (self.image_encoder, self.query_encoder, self.key_encoder))
        return GuidanceWeights(*image, self.rope.freqs, *query, *key)

    def key_weights(self):
        """Weights of what makes keys of the pooled guide and the unified features, as `ops.project_keys` takes them."""
        _, *feature_blocks = self.key_features_encoder
        merge, *blocks = self.aggregation
        features, blocks = matrices_of(feature_blocks), matrices_of(blocks)
        return KeyWeights(features, merge.weight, blocks, *self.cross_decode.projection(1))

    def query_projection(self):
        """(conv, norm, weight, bias), as `anyup_fast.ops.project_queries` takes them."""
        return self.cross_decode.conv2d.weight, *self.cross_decode.projection(0)

    def guided(self, image, features, output_size, kept=None):
        """Everything but the attention, fused, without recording gradients.

        Returns:
            query (B, H', W', dim) for `projected_queries`, projected key (B, h, w, heads, d) and the norms of the
            guidance network (see `anyup_fast.ops.guidance`).
        """
        dtype = computed_dtype(self.image_encoder[0].weight, image.device)
        kept, weights = self._kept(image, kept, "guidance", self.guidance_weights)
        query, from_image, norms = guidance(
            image, weights, output_size, features.shape[-2:], dtype=dtype, kept=kept
        )  # fmt: skip
        return query, self.projected_keys(from_image, features, query.dtype, kept), norms

    def projected_keys(self, from_image, features, dtype=None, kept=None):
        """Projected keys (B, h, w, heads, d) from the image's part (B, h, w, dim) and the features (B, C, h, w).

        They are stored in `dtype`; None means that of the image's part.
        """
        kept, weights = self._kept(features, kept, "keys", self.key_weights)
        from_features = self.unified(features, kept)
        from_image, from_features = broadcast(from_image, from_features)
        return self._split_heads(project_keys(from_image, from_features, weights, dtype=dtype, kept=kept))

    def projected_queries(self, query, kept=None):
        """Projected queries (B, H', W', heads, d) from those of `guided`, through the 3x3 convolution."""
        if requested() == "reference":
            return self._split_heads(projected_plainly(query, *self.query_projection()))
        if records_gradients(self, query):
            return self._split_heads(project_queries(query, *self.query_projection()))
        kept, weights = self._kept(query, kept, "queries", self.query_projection)
        return self._split_heads(project_queries(query, *weights, kept=kept))

    def _kept(self, given, kept, name, make):
        """What is kept for this model, looked up where it is not given, and the weights of a name, made by `make`."""
        kept = kept_of(self, given) if kept is None else kept
        return kept, make() if kept is None else kept.of(name, make)

    def _split_heads(self, x):
        return x.view(*x.shape[:-1], self.cross_decode.cross_attn.heads, -1)
