"""AnyUp as an ONNX file of standard operators, for runtimes without PyTorch."""

from importlib.util import find_spec

import torch
from torch import nn

from .checks import checked_output_size
from .files import written_aside
from .layers import unit_channels
from .ops import reference, window_bounds

PACKAGES = "onnx", "onnxscript"
ANY = 2, 20, 26, 4, 5  # stand-ins for an open batch size, H, W, h and w while the graph is traced
OPSET = 18


def export_onnx(model, path, image_shape=(None,) * 4, features_shape=(None,) * 4, *, output_size=None):
    """Write `model` to `path` as an ONNX file with inputs `image` and `features` and the output `hr_features`.

    The graph holds operators of the ONNX standard only and computes what `model(image, features, output_size)` does
    without gradients, by the plain layers: the windows are evaluated in it, in float32 and in the order of
    `anyup_fast.ops.window_bounds`. Nothing in it is fused, and the whole attention is built: a run takes between three
    and four times its `4 * B * heads * H' * W' * h * w` bytes, for 224x224 pixels from 16x16 features and four heads
    0.7 GiB (measured, ONNX Runtime), for 448x448 from 32x32 by that measure 11 GiB. Writing takes up to a minute; with
    sizes that are fixed it takes less.

    Args:
        model: AnyUp in float32, any configuration, on the CPU.
        path: file to write.
        image_shape: (B, input_dim, H, W). None in a place leaves that size open: the file runs with any.
        features_shape: (B, C, h, w), in the same way; the batch size is that of the image.
        output_size: (H', W'), fixed in the file; None means the size of the image, open where that is.

    Raises:
        ImportError: a package is missing; the message names the extra that installs it.
        ValueError: a model that is not in float32 or not on the CPU; shapes or sizes that do not fit.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ImportError(f"ONNX export needs {' and '.join(missing)}: pip install 'anyup-fast[onnx]'")
    weight = model.image_encoder[0].weight
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise ValueError(f"model: need float32 on the CPU, got {weight.dtype} on {weight.device}: model.float().cpu()")
    image, features = _checked_shapes(model, image_shape, features_shape)
    if output_size is not None:
        output_size = checked_output_size(output_size, None)
    batch, height, width, h, w = ANY
    heads = model.cross_decode.cross_attn.heads
    stand_ins = (batch, model.input_dim, height, width), (batch, 2 * heads, h, w)
    shapes, sizes = [], {}
    for name, given, spare in zip(("image", "features"), (image, features), stand_ins, strict=True):
        shapes.append([other if n is None else n for n, other in zip(given, spare, strict=True)])
        sizes[name] = {axis: torch.export.Dim.DYNAMIC for axis, n in enumerate(given) if n is None}
    with torch.no_grad():
        program = torch.onnx.export(
            PlainForward(model, output_size).eval(),
            tuple(torch.randn(shape) for shape in shapes),
            dynamo=True,
            dynamic_shapes=sizes,
            opset_version=OPSET,
            input_names=["image", "features"],
            output_names=["hr_features"],
            verbose=False,
        )
    with written_aside(path) as aside:
        program.save(aside)


class PlainForward(nn.Module):
    """The function of an AnyUp in operators that ONNX has, none of which asks for its sizes while it is traced.

    Args:
        model: AnyUp; its parameters are shared.
        output_size: (H', W') or None for the size of the image.
    """

    def __init__(self, model, output_size=None):
        super().__init__()
        self.model, self.output_size = model, output_size

    def forward(self, image, features):
        model, decode = self.model, self.model.cross_decode
        guide = rotated(encoded(model.image_encoder, image), model.rope.freqs)
        query = encoded(model.query_encoder, guide)
        if self.output_size is not None:
            query = pooled(query, self.output_size)
        from_image = pooled(encoded(model.key_encoder, guide), features.shape[2:])
        unify, *blocks = model.key_features_encoder
        from_features = reference.feature_unification(unit_channels(features), unify.basis)
        for block in blocks:
            from_features = through(block, from_features)
        key = encoded(model.aggregation, torch.cat((from_image, from_features), 1))
        query, key = decode.projected(query, key)
        rule = RULES[decode.window_rule]
        bounds = (rule(query.shape[axis], key.shape[axis], decode.window_ratio) for axis in (1, 2))
        value = features.permute(0, 2, 3, 1)
        out = reference.windowed_attention(query, key, value, *bounds, head_mode=decode.head_mode)
        return out.permute(0, 3, 1, 2)


def encoded(encoder, x):
    """`encoder(x)`, with reflect padding by indices: right for every size, one pixel included."""
    first, *blocks = encoder
    pad = first.kernel_size[0] // 2
    x = nn.functional.conv2d(reflected(x, pad), first.weight)
    for block in blocks:
        x = through(block, x)
    return x


def through(block, x):
    """`block(x)` of a ResBlock."""
    norm_in, _, conv_in, norm_out, _, conv_out = block.block
    hidden = conv_in(nn.functional.silu(normalised(x, norm_in)))
    return conv_out(nn.functional.silu(normalised(hidden, norm_out))) + block.shortcut(x)


def normalised(x, norm):
    """GroupNorm by means of means: those that runtimes have lose 2e-4 of the result over 448x448 pixels."""
    groups = x.unflatten(1, (norm.num_groups, -1))
    centred = groups - groups.mean(4, keepdim=True).mean((2, 3), keepdim=True)
    variance = centred.square().mean(4, keepdim=True).mean((2, 3), keepdim=True)
    unit = (centred * (variance + norm.eps).rsqrt()).flatten(1, 2)
    return unit * norm.weight[:, None, None] + norm.bias[:, None, None]


def reflected(x, pad):
    """`anyup_fast.layers.reflected` for sizes that are known only when the graph runs."""
    if not pad:
        return x
    for axis in (2, 3):
        place = torch.arange(-pad, x.shape[axis] + pad)
        last = place[-1] - pad
        mirrored = last - (last - place.abs()).abs()
        x = x.index_select(axis, torch.where(last >= pad, mirrored, place).clamp(min=0).minimum(last))
    return x


def rotated(x, freqs):
    """`anyup_fast.layers.RotaryEmbedding` with its coordinates as quotients."""
    rows, cols = (torch.arange(n, dtype=x.dtype) for n in x.shape[2:])
    rows, cols = (place / place[-1].clamp(min=1) for place in (rows, cols))
    angle = freqs[0, :, None, None] * rows[:, None] + freqs[1, :, None, None] * cols
    first, second = x.chunk(2, 1)
    return x * angle.cos() + torch.cat((-second, first), 1) * angle.sin()


def pooled(x, size):
    """`adaptive_avg_pool2d` as products with a matrix for each axis."""
    rows, cols = (_averages(n, m, x.dtype) for n, m in zip(x.shape[2:], size, strict=True))
    return rows @ x @ cols.T


def _averages(length, pooled, dtype):
    """Matrix (pooled, length) that averages the places of each bin."""
    place, edge = torch.arange(length), torch.arange(pooled + 1)
    start = torch.div(edge[:-1] * length, pooled, rounding_mode="floor")
    end = torch.div(edge[1:] * length + pooled - 1, pooled, rounding_mode="floor")
    inside = (place >= start[:, None]) & (place < end[:, None])
    return inside.to(dtype) / (end - start)[:, None].to(dtype)


def neighborhood(n_query, n_key, ratio):
    """`anyup_fast.ops.neighborhood_bounds` for sizes that are known only when the graph runs."""
    query = torch.arange(n_query)
    n_query, n_key = query[-1] + 1, torch.arange(n_key)[-1] + 1
    if not 0 < ratio < 0.5:
        size = n_key
    else:
        size = (2 * ratio * n_key.double()).round().long().clamp(min=3)
        size = torch.minimum(size + 1 - size % 2, n_key)
    whole = torch.div(query, torch.div(n_query, n_key, rounding_mode="floor").clamp(min=1), rounding_mode="floor")
    centre = torch.div((2 * query + 1) * n_key, 2 * n_query, rounding_mode="floor")
    cell = torch.where(n_query >= n_key, torch.minimum(whole, n_key - 1), centre)
    start = torch.minimum((cell - torch.div(size, 2, rounding_mode="floor")).clamp(min=0), n_key - size)
    return torch.stack((start, start + size), 1)


RULES = {"ratio": window_bounds.__wrapped__, "neighborhood": neighborhood}


def _checked_shapes(model, image_shape, features_shape):
    """Both shapes as lists, the model's channels and the common batch size filled in."""
    shapes = []
    for name, shape in (("image_shape", image_shape), ("features_shape", features_shape)):
        if len(shape) != 4 or not all(n is None or (isinstance(n, int) and n > 0) for n in shape):
            raise ValueError(f"{name}: need four positive whole numbers or None each, got {tuple(shape)}")
        shapes.append(list(shape))
    image, features = shapes
    if image[1] not in (None, model.input_dim):
        raise ValueError(f"image_shape: need {model.input_dim} channels, got {tuple(image_shape)}")
    image[1] = model.input_dim
    batch = {image[0], features[0]} - {None}
    if len(batch) > 1:
        raise ValueError(f"image_shape and features_shape differ in batch size: {image_shape}, {features_shape}")
    image[0] = features[0] = batch.pop() if batch else None
    return image, features
