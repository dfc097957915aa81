"""What surrounds the attention, fused: from the image to queries and keys, without recording gradients.

The network couples pixels only through the statistics of its normalisations, so it is computed as a sequence of passes
over the image, each of which also gathers the statistics that the next one needs. The plain layers of AnyUp are its
specification, and the path with gradients.
"""

import torch

from . import library
from .choice import choose, why_no_triton

RMS_EPS = torch.finfo(torch.float32).eps


def guidance(image, weights, output_size, key_size, *, dtype=torch.float32, backend="auto"):
    """Queries before their 3x3 convolution, and the image's part of the keys.

    Args:
        image: (B, channels, H, W), any float dtype.
        weights: GuidanceWeights, any float dtype.
        output_size: (H', W') of the queries; (0, 0) leaves them out.
        key_size: (h, w) of the keys.
        dtype: of what is stored for every pixel; statistics, coordinates and sums are float32 at least. In plain
            PyTorch 16-bit dtypes are computed, stored and returned as float32.
        backend: "auto", "triton" or "torch".

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
    backend = choose("guidance", backend, lambda name: _why_not_guidance(name, image, weights, dtype))
    return library.guidance(image, weights.flat(), *output_size, *key_size, dtype, backend)


def project_queries(query, conv, norm, weight, bias, *, eps=RMS_EPS, backend="auto"):
    """3x3 convolution (zero padding), RMSNorm and projection of the queries.

    Differentiable once in everything, on the "torch" back end, which keeps the query and what the convolution made of
    it.

    Args:
        query: (B, H', W', D) from `guidance`.
        conv: (D, D, 3, 3); norm: (D,), the norm's weight; weight: (D, D) and bias: (D,) of the projection.
        eps: of the norm.
        backend: "auto", "triton" or "torch".

    Returns:
        (B, H', W', D) in the dtype of `query`, on the "torch" back end at least float32.

    Raises:
        ValueError: shapes that do not fit. RuntimeError: a back end asked for by name that can't run.

    Source: AnyUp (arXiv 2510.12764), cross-attention.
    """
    dim = query.shape[-1]
    shapes = [tuple(tensor.shape) for tensor in (query, conv, norm, weight, bias)]
    if query.ndim != 4 or 0 in query.shape or shapes[1:] != [(dim, dim, 3, 3), (dim,), (dim, dim), (dim,)]:
        raise ValueError(f"query, conv, norm, weight and bias do not fit together: {shapes}")
    given = query, conv, norm, weight, bias
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    backend = choose("project_queries", backend, lambda name: _why_not_projection(name, query, recorded))
    if recorded:
        return library.convolve_and_project(*given, eps)[0]
    return library.project_queries(query, conv, norm, weight, bias, eps, backend)


def project_keys(from_image, from_features, weights, *, eps=RMS_EPS):
    """Projected keys of both their sources; in plain PyTorch, since they are few.

    Args:
        from_image: (B, h, w, D) from `guidance`.
        from_features: (B, M, h, w) from `feature_unification`.
        weights: KeyWeights.
        eps: of the norm.

    Returns:
        (B, h, w, D) in the dtype of `from_image`.

    Source: AnyUp (arXiv 2510.12764), key encoder and aggregation.
    """
    return library.project_keys(from_image, from_features, weights.flat(), eps)


def _why_not_guidance(name, image, weights, dtype):
    if name == "reference":
        return "this operator has none: its specification are the layers of AnyUp"
    if name == "torch":
        return None
    if reason := why_no_triton(image.device, dtype):
        return reason
    from ..kernels.guidance import why_not_guidance

    return why_not_guidance(image.shape[1], len(weights.image_conv), dtype)


def _why_not_projection(name, query, recorded):
    if name == "reference":
        return "this operator has none: its specification are the layers of AnyUp"
    if name == "torch":
        return None
    if reason := why_no_triton(query.device, query.dtype):
        return reason
    if recorded:
        return "records no gradients, which are asked for"
    from ..kernels.query_projection import why_not_query_projection

    return why_not_query_projection(query.shape[-1], query.dtype)
