"""AnyUp as an nn.Module: the published parameter names, the published function."""

import torch
import torch.nn.functional as F
from torch import nn

from .cpu.crew import crew_size
from .cpu.pages import kept, nothing_kept
from .layers import (
    FeatureUnification,
    ReflectConv2d,
    RMSNorm,
    RotaryEmbedding,
    encoder,
    reflected,
    rms_norm,
    unit_channels,
    wide_dtype,
)
from .logs import log_once
from .ops import (
    Block,
    GuidanceWeights,
    KeyWeights,
    branches,
    guidance,
    neighborhood_bounds,
    pooled,
    pooled_block,
    project_keys,
    project_pixels,
    project_queries,
    res_block,
    window_bounds,
    windowed_attention,
)

SMALL_BUFFERS, FOR_WORKER = 24 << 20, 15 << 20  # bytes that pieces in work take, and each further worker's
_INTEGERS = int, torch.SymInt  # sizes in graphs with dynamic shapes stay symbols


WINDOW_RULES = {"ratio": window_bounds, "neighborhood": neighborhood_bounds}


class CrossAttention(nn.Module):
    """Windowed cross-attention whose values are the raw features: no value projection, no output projection.

    `attention` only holds `in_proj_*` (its first two thirds are used) and `out_proj` (unused) under the names of
    the published state dict.
    """

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm_q = RMSNorm(dim)
        self.norm_k = RMSNorm(dim)
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)

    def project(self, query, key):
        """Normalise and project (B, ..., dim) queries and keys to (B, ..., heads, head_dim)."""
        q = F.linear(self.norm_q(query), *self.in_projection(0))
        k = F.linear(self.norm_k(key), *self.in_projection(1))
        return q.unflatten(-1, (self.heads, -1)), k.unflatten(-1, (self.heads, -1))

    @property
    def heads(self):
        """Number of attention heads."""
        return self.attention.num_heads

    def in_projection(self, part):
        """Weight (dim, dim) and bias (dim,) of the projection of queries (part 0) or keys (part 1)."""
        return (tensor.chunk(3)[part] for tensor in (self.attention.in_proj_weight, self.attention.in_proj_bias))


class CrossDecode(nn.Module):
    """3x3 convolution of the queries (zero padding), then windowed cross-attention to the low-res features."""

    def __init__(self, dim, num_heads, window_ratio, window_rule="ratio", head_mode="mean"):
        super().__init__()
        if window_rule not in WINDOW_RULES:
            known = ", ".join(map(repr, WINDOW_RULES))
            raise ValueError(f"window_rule: there is no rule {window_rule!r}; use one of {known}")
        if head_mode not in ("mean", "split"):
            raise ValueError(f"head_mode: need 'mean' or 'split', got {head_mode!r}")
        self.window_ratio, self.window_rule, self.head_mode = window_ratio, window_rule, head_mode
        self.conv2d = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.cross_attn = CrossAttention(dim, num_heads)

    def forward(self, query, key, value, q_chunk_size=None):
        """query (B, dim, H', W'), key (B, dim, h, w), value (B, C, h, w) -> (B, C, H', W')."""
        return self.attend(*self.projected(query, key), value, q_chunk_size)

    def projected(self, query, key):
        """query (B, dim, H', W'), key (B, dim, h, w) -> (B, H', W', heads, d) and (B, h, w, heads, d)."""
        query = self.conv2d(query).permute(0, 2, 3, 1)
        return self.cross_attn.project(query, key.permute(0, 2, 3, 1))

    def projection(self, part):
        """(norm, weight, bias) of the projection of queries (part 0) or keys (part 1)."""
        attention = self.cross_attn
        return (attention.norm_q, attention.norm_k)[part].weight, *attention.in_projection(part)

    def attend(self, query, key, value, q_chunk_size=None, head_mode=None):
        """Projected query (B, H', W', heads, d), key (B, h, w, heads, d), value (B, C, h, w) -> (B, C, H', W')."""
        value = value.permute(0, 2, 3, 1)
        row_bounds, col_bounds = self.bounds(query.shape[1:3], key.shape[1:3])
        mode = head_mode or self.head_mode
        if q_chunk_size is None:
            return windowed_attention(query, key, value, row_bounds, col_bounds, head_mode=mode).permute(0, 3, 1, 2)
        bands = [
            windowed_attention(band, key, value, bounds, col_bounds, head_mode=mode)
            for band, bounds in zip(query.split(q_chunk_size, 1), row_bounds.split(q_chunk_size), strict=True)
        ]
        return torch.cat(bands, 1).permute(0, 3, 1, 2)

    def bounds(self, output_size, key_size):
        """Windows of the rows and of the columns, by the rule of this model (see `anyup_fast.ops.windows`)."""
        rule = WINDOW_RULES[self.window_rule]
        return tuple(rule(n, m, self.window_ratio) for n, m in zip(output_size, key_size, strict=True))


class AnyUp(nn.Module):
    """Upsamples the features of any vision encoder to any resolution, guided by the image.

    Args:
        input_dim: channels of the image.
        qk_dim: width of queries and keys; a multiple of 8 and of 4.
        kernel_size: of the first convolution on the image (reflect padding).
        kernel_size_lfu: of the filters of the feature-agnostic layer.
        window_ratio: half width of the attention window as a share of the picture; zero or less is global.
        num_heads: attention heads.
        init_gaussian_derivatives: start the feature-agnostic filters from Gaussian derivatives, not noise.
        lfu_dim: number of those filters; None means qk_dim.
        window_rule: "ratio", the windows that the published weights were trained with, or "neighborhood", those of the
            published variant on neighborhood attention (`use_natten=True`): a fixed number of cells, shifted at the
            borders (`anyup_fast.ops.neighborhood_bounds`).
        head_mode: "mean" weighs every channel by the mean over the heads; "split" lets each head weigh its own
            C / num_heads channels, C a multiple of the heads.

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
        lfu_dim=None,
        window_rule="ratio",
        head_mode="mean",
    ):
        super().__init__()
        lfu_dim = qk_dim if lfu_dim is None else lfu_dim
        first = ReflectConv2d(input_dim, qk_dim, kernel_size)
        unify = FeatureUnification(lfu_dim, kernel_size_lfu, init_gaussian_derivatives)
        merge = ReflectConv2d(2 * qk_dim, qk_dim, 3)
        self.input_dim = input_dim
        self.image_encoder = encoder(qk_dim, qk_dim, first)
        self.rope = RotaryEmbedding(qk_dim)
        self.query_encoder = encoder(qk_dim, qk_dim, nn.Conv2d(qk_dim, qk_dim, 1, bias=False))
        self.key_encoder = encoder(qk_dim, qk_dim, nn.Conv2d(qk_dim, qk_dim, 1, bias=False))
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
        from .checkpoints import load_checkpoint

        state_dict, config = load_checkpoint(weights)
        if window_rule is not None:
            config = {**config, "window_rule": window_rule}
        model = cls(**config)
        model.load_state_dict(state_dict)
        return model.to("cpu" if device is None else device).eval()

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

    def guidance_weights(self):
        """Weights of the image, query and key encoders, as `anyup_fast.ops.guidance` takes them."""
        image, query, key = map(_matrices, (self.image_encoder, self.query_encoder, self.key_encoder))
        return GuidanceWeights(*image, self.rope.freqs, *query, *key)

    def key_weights(self):
        """Weights of what makes keys of the pooled guide and the unified features, as `ops.project_keys` takes them."""
        _, *feature_blocks = self.key_features_encoder
        merge, *blocks = self.aggregation
        return KeyWeights(_blocks(feature_blocks), merge.weight, _blocks(blocks), *self.cross_decode.projection(1))

    def query_projection(self):
        """(conv, norm, weight, bias), as `anyup_fast.ops.project_queries` takes them."""
        return self.cross_decode.conv2d.weight, *self.cross_decode.projection(0)

    def unified(self, features):
        """Features of any number of channels as (B, lfu_dim, h, w), float32 at least."""
        return self.key_features_encoder[0](unit_channels(features))

    def queries(self, guide, output_size):
        """Queries (B, qk_dim, H', W') before the 3x3 convolution."""
        return _pooled_picture(self.query_encoder(guide), output_size)

    def keys(self, guide, features):
        """Keys (B, qk_dim, h, w) from the pooled guide and the features."""
        from_image = _pooled_picture(self.key_encoder(guide), features.shape[-2:])
        _, *blocks = self.key_features_encoder
        from_features = self.unified(features)
        dtype = from_image.dtype
        if dtype in (torch.float16, torch.bfloat16):
            # 1/M plus a few parts in a hundred thousand: the first normalisation must still see float32.
            from_features = _wide_block(blocks[0], from_features)
            blocks = blocks[1:]
        from_features = from_features.to(dtype)
        for block in blocks:
            from_features = block(from_features)
        return self.aggregation(torch.cat(_broadcast(from_image, from_features), 1))

    def forward(self, image, features, output_size=None, q_chunk_size=None, vis_attn=False, max_memory=None):
        """Upsample `features` to the resolution of `image`, or to `output_size`.

        Args:
            image: (B, input_dim, H, W), ImageNet-normalised, any float dtype.
            features: (B, C, h, w), any C >= 1, any float dtype. A single image serves all feature maps of a batch, a
                single feature map all images.
            output_size: (H', W'); None means (H, W).
            q_chunk_size: rows of output computed at a time; accepted for compatibility, memory is flat without it.
            vis_attn: also return where each output pixel looks, as an RGB picture (B, 3, H', W') in [0, 1]: red is
                the attention-weighted mean row, green the mean column, of the low-res cells (0 first, 1 last).
            max_memory: bytes that the call may take beyond its inputs, output included. Where the fused path takes more
                (`estimate_memory`), the image is passed over several times in place of being stored, and the output
                filled tile by tile: the same result, up to float rounding, for about three times the products.

        Returns:
            hr_features (B, C, H', W') in the dtype of `features`; with `vis_attn` the pair (hr_features, picture).

        Raises:
            ValueError: shapes, dtypes, devices or sizes that do not fit; the message says which. A `max_memory` that no
                plan can keep; the message gives the smallest that suffices.
        """
        output_size = self._check(image, features, output_size, q_chunk_size)
        reason = self.why_not_fused()
        recorded = self._records_gradients(image, features)
        if max_memory is not None:
            self._check_max_memory(max_memory, recorded)
        maps = features
        if vis_attn and self.head_mode == "mean":
            maps = torch.cat((features, cell_colours(features).to(features.dtype)), 1)
        if max_memory is not None and max_memory < self._memory(image, maps, output_size):
            with nothing_kept():
                out = self._frugal(image, features, maps, output_size, max_memory)
            return out.tensor_split((features.shape[1],), 1) if vis_attn else out
        if reason is None and not recorded:
            query, key, _ = self.guided(image, features, output_size)
        else:
            if reason is not None:
                log_once(f"AnyUp: the fused path is not taken: {reason}")
            query, key = self.encoded(image, features)
            if output_size != tuple(image.shape[-2:]):
                query = pooled(query, output_size)
        query = self.projected_queries(query)
        key = key.to(query.dtype)
        query, key, maps = _broadcast(query, key, maps)
        out = self.cross_decode.attend(query, key, maps, q_chunk_size)
        if vis_attn and self.head_mode == "split":
            colours = cell_colours(maps).to(maps.dtype)
            return out, self.cross_decode.attend(query, key, colours, q_chunk_size, head_mode="mean")
        return out.tensor_split((features.shape[1],), 1) if vis_attn else out

    def encoded(self, image, features):
        """What queries and keys are made of, with gradients.

        Args:
            image: (B, input_dim, H, W). features: (B, C, h, w), as `forward` takes them.

        Returns:
            query (B, H, W, qk_dim), to be pooled where the output has another size and given to `projected_queries`;
            projected key (B, h, w, heads, d). Both float32 at least on CPUs; a batch of one where the inputs are.
        """
        if self.why_not_fused():
            guide = self.guidance(image.to(self.image_encoder[0].weight.dtype, memory_format=torch.channels_last))
            key = self.keys(guide, features).permute(0, 2, 3, 1)
            norm, weight, bias = self.cross_decode.projection(1)
            key = F.linear(rms_norm(key.to(wide_dtype(key.dtype)), norm).to(key.dtype), weight, bias)
            return self.query_encoder(guide).permute(0, 2, 3, 1), self._split_heads(key)
        dtype = self._stored_dtype(image)
        wide = wide_dtype(dtype)
        weights, keys = self.guidance_weights(), self.key_weights()
        with torch.autocast(image.device.type, enabled=False):
            x = _through(project_pixels(image, weights.image_conv.to(dtype)), weights.image)
            query, from_image = branches(x, weights.freqs, weights.query_conv, weights.key_conv)
            query, from_image = _through(query, weights.query), _through(from_image, weights.key[:-1])
            from_image = pooled_block(from_image, weights.key[-1], features.shape[-2:])
            from_features = self.unified(features).permute(0, 2, 3, 1).to(wide)
            from_features = _through(from_features, keys.features)
            both = torch.cat(_broadcast(from_image, from_features), -1).permute(0, 3, 1, 2)
            key = F.conv2d(reflected(both, 1), keys.merge.to(wide)).permute(0, 2, 3, 1)
            key = rms_norm(_through(key, keys.blocks), keys.norm.to(wide))
            key = F.linear(key, keys.weight.to(wide), keys.bias.to(wide))
        return query, self._split_heads(key)

    def _stored_dtype(self, image):
        """Of what `encoded` holds for every pixel: as `guided`, but float32 at least on CPUs."""
        dtype = self._dtype(image)
        return dtype if image.device.type in ("cuda", "xpu") else wide_dtype(dtype)

    def _dtype(self, image):
        """The model's dtype, or that of autocast."""
        if torch.is_autocast_enabled(image.device.type):
            return torch.get_autocast_dtype(image.device.type)
        return self.image_encoder[0].weight.dtype

    def _records_gradients(self, *given):
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*given, *self._weights()))

    def _weights(self):
        """The parameters; in a replica of nn.DataParallel, which has none, the tensors in their place."""
        if not getattr(self, "_is_replica", False):
            return list(self.parameters())
        return [tensor for module in self.modules() for tensor in module._former_parameters.values()]

    def _check_max_memory(self, max_memory, recorded):
        if not _is_count(max_memory):
            raise ValueError(f"max_memory: need a positive number of bytes or None, got {max_memory!r}")
        reason = self._why_not_prepared()
        if recorded:
            reason = "gradients are recorded, whose layers keep their inputs; call it under torch.no_grad()"
        if reason is not None:
            raise ValueError(f"max_memory: cannot be kept: {reason}")

    def _why_not_prepared(self):
        """Why regions, points, heads and tiles can't be asked for on their own: one sentence, or None."""
        if self.head_mode == "split":
            return "each head weighs channels of its own (head_mode 'split'), which parts and heads don't cover"
        return self.why_not_fused()

    def prepare(self, image, features, state=None):
        """Prepare one image (or batch) and its features to be asked for regions, points, heads or tiles.

        Args:
            image: (B, input_dim, H, W), ImageNet-normalised; or a picture that need not fit in memory, anything
                (H, W, 3) that gives rows when sliced (a numpy memmap, a zarr array): uint8, uint16 or floats in
                [0, 1], normalised as it is read.
            features: (B, C, h, w), B = 1 for a picture that is read.
            state: of `Prepared.state`, of the same model, image and features: saves the passes over the image.

        Returns:
            anyup_fast.prepared.Prepared. What depends on the whole image is computed with the first answer.

        Raises:
            ValueError: as `forward`; a configuration that only the plain layers cover (see `why_not_fused`).
        """
        from .image import rows_of
        from .prepared import Prepared

        read = None
        if not isinstance(image, torch.Tensor):
            shape, read = rows_of(image, self.image_encoder[0].weight)
            image = torch.empty(shape, device="meta")
            if len(features) != 1:
                raise ValueError(f"features: a picture that is read needs one feature map, got {len(features)}")
        self._check(image if read is None else features.new_empty(1, self.input_dim, 1, 1), features, None, None)
        if reason := self._why_not_prepared():
            raise ValueError(f"this model cannot be prepared: {reason}")
        if read is None:
            image, features = _broadcast(image, features)
        return Prepared(self, image, features, read, state)

    def why_not_fused(self):
        """Why `forward` takes the plain layers and not the fused path: one sentence, or None if it takes the fused one.

        Where gradients are recorded the fused layers are those of `anyup_fast.ops.res_block` and `branches`.
        """
        size = self.image_encoder[0].kernel_size[0]
        if size != 1:
            return f"the first convolution on the image has kernel_size {size}, which couples pixels; it needs 1"
        return None

    def estimate_memory(self, image_shape, features_shape, output_size=None, dtype=torch.float32, device="cpu"):
        """Bytes that a call without gradients needs at its peak beyond its inputs, its output included.

        Args:
            image_shape: (B, input_dim, H, W).
            features_shape: (B, C, h, w).
            output_size: (H', W'); None means (H, W).
            dtype: of the model, the image and the features.
            device: a torch.device or its name; elsewhere than on CPUs 16-bit images stay 16-bit.

        Returns:
            int. From about a tenth of a gibibyte up within 15 % of what is measured; below, small buffers count. On
            CPUs under Linux up to 192 MiB of it stay with the process for the next call, for the system to take if it
            runs short (`anyup_fast.ops.pages`).

        Raises:
            ValueError: shapes or sizes that do not fit.
        """
        for name, shape in (("image_shape", image_shape), ("features_shape", features_shape)):
            if len(shape) != 4 or not all(_is_count(n) for n in shape):
                raise ValueError(f"{name}: need four positive whole numbers (B, C, H, W), got {tuple(shape)}")
        batch = max(image_shape[0], features_shape[0])
        if not {image_shape[0], features_shape[0]} <= {1, batch}:
            raise ValueError(f"image_shape and features_shape differ in batch size: {image_shape}, {features_shape}")
        height, width = checked_output_size(output_size, image_shape[2:])
        channels, h, w = features_shape[1:]
        dim = self.rope.freqs.shape[1]
        compute = dtype if torch.device(device).type in ("cuda", "xpu") else torch.promote_types(dtype, torch.float32)
        pixels = image_shape[2] * image_shape[3]
        image, query = (n * dim * compute.itemsize for n in (pixels, batch * height * width))
        keys = batch * h * w * dim * max(4, compute.itemsize)
        encoders = (2 if height * width == pixels else 3) * image + pixels * self.input_dim * (16 + compute.itemsize)
        output = batch * height * width * channels * dtype.itemsize
        same_size = height * width == pixels
        later = max(query, output) + keys + kept(image, 2 if same_size else 3, torch.device(device))
        beside_query = max(encoders, self._low_res_memory(features_shape, compute), later)
        workers = crew_size(torch.device(device))
        return query + beside_query + SMALL_BUFFERS + (workers - 1) * FOR_WORKER

    def _low_res_memory(self, features_shape, dtype):
        """Bytes at the peak of what is computed on the low-res grid: the unified features, then the keys."""
        batch, channels, h, w = features_shape
        wide = max(4, dtype.itemsize)
        keys = batch * h * w * self.rope.freqs.shape[1] * wide
        unit = batch * h * w * channels * wide
        return keys + max(unit + unit // batch, keys + 9 * keys // batch)

    def _memory(self, image, value, output_size):
        return self.estimate_memory(image.shape, value.shape, output_size, value.dtype, image.device)

    def _frugal(self, image, features, value, output_size, max_memory):
        """The output by the plan that needs the least memory."""
        from .prepared import Prepared

        out = value.numel() // value[0, 0].numel() * output_size[0] * output_size[1] * value.element_size()
        wide = torch.promote_types(self.rope.freqs.dtype, torch.float32)
        low_res = self._low_res_memory((1, *features.shape[1:]), wide)
        filled = None
        image, features, value = _broadcast(image, features, value)
        for b in range(len(image)):
            rows = image[b].permute(1, 2, 0)
            prepared = Prepared(
                self, image[b : b + 1], features[b : b + 1], lambda first, last, rows=rows: rows[first:last].to(wide)
            ).showing(value[b : b + 1])
            if filled is None:
                least = prepared.tile_memory((32, 32)) + out + low_res
                if least > max_memory:
                    raise ValueError(f"max_memory: {max_memory} bytes are too few, the least that suffices is {least}")
                filled = value.new_empty(len(image), *output_size, value.shape[1]).permute(0, 3, 1, 2)
            tiles = max_memory - out - low_res
            prepared.stream(output_size=output_size, out=filled[b : b + 1], max_memory=tiles)
        return filled

    def guided(self, image, features, output_size):
        """Everything but the attention, fused, without recording gradients.

        Returns:
            query (B, H', W', dim) for `projected_queries`, projected key (B, h, w, heads, d) and the norms of the
            guidance network (see `anyup_fast.ops.guidance`).
        """
        weights, dtype = self.guidance_weights(), self._dtype(image)
        query, from_image, norms = guidance(image, weights, output_size, features.shape[-2:], dtype=dtype)
        return query, self.projected_keys(from_image, features).to(query.dtype), norms

    def projected_keys(self, from_image, features):
        """Projected keys (B, h, w, heads, d) from the image's part (B, h, w, dim) and the features (B, C, h, w)."""
        from_features = self.unified(features)
        from_image, from_features = _broadcast(from_image, from_features)
        return self._split_heads(project_keys(from_image, from_features, self.key_weights()))

    def projected_queries(self, query):
        """Projected queries (B, H', W', heads, d) from those of `guided`, through the 3x3 convolution."""
        return self._split_heads(project_queries(query, *self.query_projection()))

    def _split_heads(self, x):
        return x.unflatten(-1, (self.cross_decode.cross_attn.heads, -1))

    def _check(self, image, features, output_size, q_chunk_size):
        weight = self.image_encoder[0].weight
        for name, tensor in (("image", image), ("features", features)):
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                raise ValueError(f"{name}: need a floating-point tensor, got {kind}")
            if tensor.ndim != 4:
                raise ValueError(f"{name}: need 4 dimensions (B, C, H, W), got shape {tuple(tensor.shape)}")
            if 0 in tensor.shape:
                raise ValueError(f"{name}: no dimension may be 0, got shape {tuple(tensor.shape)}")
            if tensor.device != weight.device:
                raise ValueError(
                    f"{name} is on {tensor.device}, the model on {weight.device}: move one of them with .to(...)"
                )
        if image.shape[1] != self.input_dim:
            raise ValueError(f"image: need {self.input_dim} channels, got shape {tuple(image.shape)}")
        if image.shape[0] != features.shape[0] and 1 not in (image.shape[0], features.shape[0]):
            raise ValueError(
                "image and features differ in batch size, and neither is single: "
                f"{tuple(image.shape)} and {tuple(features.shape)}"
            )
        if q_chunk_size is not None and not _is_count(q_chunk_size):
            raise ValueError(f"q_chunk_size: need a positive number of rows or None, got {q_chunk_size!r}")
        return checked_output_size(output_size, image.shape[-2:])


def checked_output_size(output_size, default):
    """`output_size` as a pair of positive ints, `default` where it is None; ValueError for anything else."""
    if output_size is None:
        return tuple(default)
    if not isinstance(output_size, (tuple, list, torch.Size)) or len(output_size) != 2:
        raise ValueError(f"output_size: need (height, width) or None, got {output_size!r}")
    if not all(_is_count(n) for n in output_size):
        raise ValueError(f"output_size: height and width must be positive whole numbers, got {output_size!r}")
    return tuple(n if isinstance(n, _INTEGERS) else int(n) for n in output_size)


def _through(x, blocks):
    """`x` (B, H, W, D) through ResBlocks, with gradients."""
    for block in blocks:
        x = res_block(x, block)
    return x


def _pooled_picture(x, size):
    """`adaptive_avg_pool2d` of (B, D, H, W)."""
    return pooled(x.permute(0, 2, 3, 1), size).permute(0, 3, 1, 2)


def _broadcast(*tensors):
    """The tensors with the batch size of the longest; a single element is repeated as a view."""
    batch = max(tensor.shape[0] for tensor in tensors)  # `len` would fix it in graphs with dynamic shapes
    return [tensor.expand(batch, *tensor.shape[1:]) for tensor in tensors]


def _is_count(n):
    if isinstance(n, _INTEGERS):
        return not isinstance(n, bool) and n > 0
    return hasattr(n, "__index__") and int(n) > 0


def _matrices(encoder):
    """Matrix of the first 1x1 convolution of an encoder, and its ResBlocks."""
    first, *blocks = encoder
    return first.weight.flatten(1), _blocks(blocks)


def _blocks(modules):
    """ResBlocks as tuples of matrices."""
    blocks = []
    for module in modules:
        norm_in, _, conv_in, norm_out, _, conv_out = module.block
        skip = None if isinstance(module.shortcut, nn.Identity) else module.shortcut.weight.flatten(1)
        matrices = conv_in.weight.flatten(1), norm_out.weight, norm_out.bias, conv_out.weight.flatten(1)
        blocks.append(Block(norm_in.weight, norm_in.bias, *matrices, skip))
    return tuple(blocks)


def _wide_block(block, x):
    """Run a ResBlock in float32 although its parameters are 16-bit."""
    wide = {name: parameter.float() for name, parameter in block.named_parameters()}
    with torch.autocast(x.device.type, enabled=False):
        return torch.func.functional_call(block, wide, (x,))


def cell_colours(features):
    """Colours (B, 3, h, w) of the low-res cells, by their place: red is the row, green the column."""
    batch, _, h, w = features.shape
    rows = torch.linspace(0, 1, h, device=features.device).view(1, 1, h, 1).expand(batch, 1, h, w)
    cols = torch.linspace(0, 1, w, device=features.device).view(1, 1, 1, w).expand(batch, 1, h, w)
    return torch.cat((rows, cols, 1 - torch.maximum(rows, cols)), 1)
