"""`guidance`, from the image to queries and the image's part of the keys: contract, checks, choice, registration.

The network couples pixels only through the statistics of its normalisations, so it is computed as a sequence of passes
over the image, each of which also gathers the statistics that the next one needs. The plain layers of AnyUp are its
specification; where gradients are recorded its layers run one by one (`anyup_fast.ops.blocks`).
"""

import torch
from torch import Tensor

from ..plain import guidance as plain
from ..plain.weights import GuidanceWeights
from ..plain.width import has_float64
from .choice import attempt, chosen, on_triton, triton_precision, why_no_triton


def guidance(image, weights, output_size, key_size, *, dtype=torch.float32, backend="auto", kept=None):
    """Queries before their 3x3 convolution, and the image's part of the keys.

    Args:
        image: (B, channels, H, W), any float dtype.
        weights: GuidanceWeights, any float dtype.
        output_size: (H', W') of the queries; (0, 0) leaves them out.
        key_size: (h, w) of the keys.
        dtype: of what is stored for every pixel; statistics, coordinates and sums are float32 at least. In plain
            PyTorch 16-bit dtypes are computed, stored and returned as float32.
        backend: "auto", "triton" or "torch".
        kept: `anyup_fast.kept.Kept` of the model with these weights, or None: what kernels make of them is made once.

    Returns:
        query (B, H', W', D) in `dtype`; key (B, h, w, D) and norms (B, 12, 2, D) in float32 (float64 for float64).
        Pooling is that of `adaptive_avg_pool2d`, for every pair of sizes. Norms are scale and shift of the twelve
        normalisations, in the order in which image, query and key encoder have them: with them, any pixel can be
        computed for itself (`anyup_fast.plain.guidance.Guide`).

    Raises:
        ValueError: shapes that do not fit. RuntimeError: a back end asked for by name that can't run.

    Source: AnyUp (arXiv 2510.12764), image, query and key encoders.
    """
    if image.ndim != 4 or 0 in image.shape or image.shape[1] != weights.image_conv.shape[1]:
        need = f"(B, {weights.image_conv.shape[1]}, H, W) with pixels"
        raise ValueError(f"image: need {need}, got shape {tuple(image.shape)}")
    for name, size in (("output_size", output_size), ("key_size", key_size)):
        left_out = name == "output_size" and tuple(size) == (0, 0)
        if len(size) != 2 or (min(size) < 1 and not left_out):
            raise ValueError(f"{name}: need a positive height and width, got {tuple(size)}")
    about = image.device, image.shape[1], dtype
    backend = chosen(kept, "guidance", about, backend, lambda name: _why_not_guidance(name, image, weights, dtype))
    if kept is not None and on_triton(backend):
        return _computed(image, weights, tuple(output_size), tuple(key_size), dtype, backend, kept)
    return guidance_op(image, weights.flat(), *output_size, *key_size, dtype, backend)


def guided_queries(image, weights, norms, output_size, *, dtype, whole, place=(0, 0), kept=None):
    """Queries of a rectangle of an image whose normalisations are known, by Triton's kernels.

    Args:
        image: (B, channels, height, width), the rectangle; weights, dtype and kept as `guidance` takes them.
        norms: (B, 12, 2, D), that `guidance` gave for the whole image.
        output_size: (H', W') to which the rectangle is pooled; its own size leaves it as it is.
        whole: (H, W) of the image. place: row and column of the rectangle in it.

    Returns:
        (B, H', W', D) in `dtype`; None where the kernels are not taken: there `plain.guidance.Guide` computes pixels.
    """
    about = image.device, image.shape[1], dtype
    backend = chosen(kept, "guidance", about, "auto", lambda name: _why_not_guidance(name, image, weights, dtype))
    if not on_triton(backend):
        return None

    def kernel():
        from ..kernels.guidance import guided_queries_fwd

        options = dict(dtype=dtype, whole=whole, place=place, precision=triton_precision())
        return guided_queries_fwd(image, _ready(weights, dtype, kept), norms, output_size, **options)

    return attempt("guidance", backend, image.device, kernel, lambda: None)


def _ready(weights, dtype, kept):
    """What kernels make of the weights, where it is kept; else the weights."""
    from ..kernels.guidance import in_halves, prepared
    from ..kernels.tiling import Device

    if kept is None:
        return weights
    halves = in_halves(Device.of(weights.freqs.device), dtype, triton_precision())
    return kept.of(("guidance, ready", dtype, halves), lambda: prepared(weights, dtype, halves))


def _why_not_guidance(name, image, weights, dtype):
    if name == "reference":
        return "this operator has none: its specification are the layers of AnyUp"
    if name == "torch":
        return None
    if reason := why_no_triton("guidance", image.device, dtype):
        return reason
    if not has_float64(image.device):
        return "needs float64 for its statistics, which this device has not"
    from ..kernels.guidance import why_not_guidance

    return why_not_guidance(image.shape[1], len(weights.image_conv), dtype)


@torch.library.custom_op("anyup_fast::guidance", mutates_args=())
def guidance_op(
    image: Tensor,
    weights: list[Tensor],
    output_height: int,
    output_width: int,
    key_height: int,
    key_width: int,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`anyup_fast.ops.guidance` on a named back end, weights as `GuidanceWeights.flat()`, arguments unchecked."""
    sizes = (output_height, output_width), (key_height, key_width)
    return _computed(image, GuidanceWeights.from_flat(weights), *sizes, dtype, backend)


def _computed(image, weights, output_size, key_size, dtype, backend, kept=None):
    given = image, weights, output_size, key_size

    def kernel():
        from ..kernels.guidance import guidance_fwd

        options = dict(dtype=dtype, precision=triton_precision())
        return guidance_fwd(image, _ready(weights, dtype, kept), output_size, key_size, **options)

    def in_plain_pytorch():
        query, key, norms = plain.guidance(*given, dtype=dtype)
        if not on_triton(backend):
            return query, key, norms
        return query.to(dtype), key, norms.transpose(0, 1).contiguous().transpose(0, 1)

    return attempt("guidance", backend, image.device, kernel, in_plain_pytorch)


@guidance_op.register_fake
def _(image, weights, output_height, output_width, key_height, key_width, dtype, backend):
    wide = torch.promote_types(dtype, torch.float32)
    width = len(weights[0])
    query = image.new_empty(
        image.shape[0], output_height, output_width, width, dtype=dtype if on_triton(backend) else wide
    )
    key = image.new_empty(image.shape[0], key_height, key_width, width, dtype=wide)
    if on_triton(backend):
        return query, key, image.new_empty(plain.NORMS, image.shape[0], 2, width, dtype=wide).transpose(0, 1)
    return query, key, image.new_empty(image.shape[0], plain.NORMS, 2, width, dtype=wide)
