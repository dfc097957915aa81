"""`feature_unification`: contract, checks and choice of back end."""

import torch

from . import library, reference
from .choice import choose, why_no_triton


def feature_unification(features, basis, *, backend="auto"):
    """Channel-agnostic description of feature maps: any C to M channels.

    Every channel is convolved (zero padding) with the M filters and divided by the number of taps inside the map; the
    softmax and mean over the responses, with the published interleaving of channels and filters, are those of
    `anyup_fast.ops.reference.feature_unification`. Nothing of size M * C * h * w is formed, but by "reference".
    Differentiable once in features and basis on every back end; "reference" any number of times.

    Args:
        features: (B, C, h, w), any C >= 1, any float dtype; AnyUp gives them unit length over the channels.
        basis: (M, 1, k, k), k odd.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        (B, M, h, w), float32 (float64 for float64 features): 1/M plus a few parts in a hundred thousand, which 16-bit
        floats cannot hold.

    Raises:
        ValueError: shapes that do not fit. RuntimeError: a back end asked for by name that can't run.

    Source: AnyUp (arXiv 2510.12764), feature-agnostic layer.
    """
    if features.ndim != 4 or 0 in features.shape or not features.is_floating_point():
        raise ValueError(f"features: need floats (B, C, h, w), got {features.dtype} {tuple(features.shape)}")
    if basis.ndim != 4 or basis.shape[1] != 1 or basis.shape[2] != basis.shape[3] or basis.shape[2] % 2 == 0:
        raise ValueError(f"basis: need shape (M, 1, k, k) with k odd, got {tuple(basis.shape)}")
    backend = choose("feature_unification", backend, lambda name: _why_not(name, features, basis))
    if backend == "reference":
        return reference.feature_unification(features, basis)
    return library.feature_unification(features, basis, backend)


def _why_not(name, features, basis):
    if name in ("torch", "reference"):
        return None
    # Its products are of float32, whatever the features.
    if reason := why_no_triton(features.device, features.dtype, torch.float32):
        return reason
    from ..kernels.feature_unification import why_not_feature_unification

    return why_not_feature_unification(features.shape[1], len(basis), basis.shape[-1], features.dtype)
