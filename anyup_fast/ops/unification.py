"""`feature_unification`: contract, checks, choice of back end, registration and gradients."""

import torch
from torch import Tensor

from ..plain import reference
from ..plain import unification as plain
from .choice import attempt, chosen, on_triton, why_no_triton


def feature_unification(features, basis, *, backend="auto", kept=None):
    """Channel-agnostic description of feature maps: any C to M channels.

    Every channel is convolved (zero padding) with the M filters and divided by the number of taps inside the map; the
    softmax and mean over the responses, with the published interleaving of channels and filters, are those of
    `anyup_fast.plain.reference.feature_unification`. Nothing of size M * C * h * w is formed, but by "reference".
    Differentiable once in features and basis on every back end; "reference" any number of times.

    Args:
        features: (B, C, h, w), any C >= 1, any float dtype; AnyUp gives them unit length over the channels.
        basis: (M, 1, k, k), k odd.
        backend: "auto", "triton", "torch" or "reference".
        kept: `anyup_fast.kept.Kept` of the model with this basis where no gradient is asked for, or None.

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
    about = features.device, features.dtype, features.shape[1]
    backend = chosen(kept, "feature_unification", about, backend, lambda name: _why_not(name, features, basis))
    if backend == "reference":
        return reference.feature_unification(features, basis)
    if kept is not None and on_triton(backend):
        return _computed(features, kept.of("basis", basis.detach().float), backend)
    return feature_unification_op(features, basis, backend)


def _why_not(name, features, basis):
    if name in ("torch", "reference"):
        return None
    # Its products are of float32, whatever the features.
    if reason := why_no_triton("feature_unification", features.device, features.dtype, torch.float32):
        return reason
    from ..kernels.unification import why_not_feature_unification

    return why_not_feature_unification(features.shape[1], len(basis), basis.shape[-1], features.dtype)


def unit_channels(features, *, backend="auto", kept=None):
    """`features / max(|features|_2 over channels, 1e-12)`, where no gradient is asked for.

    Args:
        features: (B, C, h, w), any float dtype.
        backend: "auto", "triton", "torch" or "reference".
        kept: `anyup_fast.kept.Kept` of a model, or None.

    Returns:
        (B, C, h, w), float32 (float64 for float64 features), in any order in memory.

    Raises:
        RuntimeError: a back end asked for by name that can't run.
    """
    about = features.device, features.dtype
    backend = chosen(kept, "unit_channels", about, backend, lambda name: _why_no_unit(name, features))
    if backend == "reference":
        return torch.nn.functional.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)
    if kept is not None and on_triton(backend):
        return _of_unit_length(features, backend)
    return unit_channels_op(features, backend)


def _why_no_unit(name, features):
    return why_no_triton("unit_channels", features.device, features.dtype) if name == "triton" else None


@torch.library.custom_op("anyup_fast::unit_channels", mutates_args=())
def unit_channels_op(features: Tensor, backend: str) -> Tensor:
    """`anyup_fast.ops.unification.unit_channels` on a named back end.

    An operator for the sake of who computes it: in the caller's thread PyTorch's own team would be woken, and spin.
    """
    return _of_unit_length(features, backend)


def _of_unit_length(features, backend):
    def kernel():
        from ..kernels.keys import unit_channels_fwd

        return unit_channels_fwd(features)

    return attempt("unit_channels", backend, features.device, kernel, lambda: plain.unit_channels(features))


@unit_channels_op.register_fake
def _(features, backend):
    return features.new_empty(features.shape, dtype=torch.promote_types(features.dtype, torch.float32))


@torch.library.custom_op("anyup_fast::feature_unification", mutates_args=())
def feature_unification_op(features: Tensor, basis: Tensor, backend: str) -> Tensor:
    """`anyup_fast.ops.feature_unification` on a named back end, arguments unchecked."""
    return _computed(features, basis, backend)


def _computed(features, basis, backend):
    def kernel():
        from ..kernels.unification import feature_unification_fwd

        return feature_unification_fwd(features, basis)

    return attempt(
        "feature_unification", backend, features.device, kernel, lambda: plain.feature_unification(features, basis)
    )


@feature_unification_op.register_fake
def _(features, basis, backend):
    shape = features.shape[0], len(basis), *features.shape[2:]
    return features.new_empty(shape, dtype=torch.promote_types(features.dtype, torch.float32))


@torch.library.custom_op("anyup_fast::feature_unification_backward", mutates_args=())
def feature_unification_backward_op(
    grad: Tensor, features: Tensor, basis: Tensor, backend: str, for_features: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `feature_unification` for features (if asked for, else empty) and basis."""

    def kernel():
        from ..kernels.unification_backward import feature_unification_bwd

        of_features, of_basis = feature_unification_bwd(grad, features, basis)
        return of_features if for_features else features.new_empty(0), of_basis

    def in_plain_pytorch():
        of_features, of_basis = plain.feature_unification_backward(grad, features, basis, for_features)
        return of_features, of_basis.contiguous()

    return attempt("feature_unification_backward", backend, features.device, kernel, in_plain_pytorch)


@feature_unification_backward_op.register_fake
def _(grad, features, basis, backend, for_features):
    return features.new_empty(features.shape if for_features else 0), basis.new_empty(basis.shape)


def _save_unification(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward_unification(ctx, grad):
    for_features = ctx.needs_input_grad[0]
    of_features, of_basis = feature_unification_backward_op(grad, *ctx.saved_tensors, ctx.backend, for_features)
    return of_features if for_features else None, of_basis, None


feature_unification_op.register_autograd(_backward_unification, setup_context=_save_unification)
