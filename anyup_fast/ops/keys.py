"""`project_keys`: contract, checks, choice of back end and registration."""

from functools import partial

import torch
from torch import Tensor

from ..plain import keys as plain
from ..plain.norms import RMS_EPS
from ..plain.weights import KeyWeights
from .choice import attempt, chosen, on_triton, triton_precision, why_no_triton


def project_keys(from_image, from_features, weights, *, eps=RMS_EPS, dtype=None, backend="auto", kept=None):
    """Projected keys of both their sources.

    Args:
        from_image: (B, h, w, D) from `guidance`.
        from_features: (B, M, h, w) from `feature_unification`.
        weights: KeyWeights, any float dtype.
        eps: of the norm.
        dtype: of the result; None means that of `from_image`. What is computed is float32 at least.
        backend: "auto", "triton" or "torch".
        kept: `anyup_fast.kept.Kept` of the model with these weights, or None: what kernels make of them is made once.

    Returns:
        (B, h, w, D) in `dtype`.

    Raises:
        ValueError: shapes that do not fit. RuntimeError: a back end asked for by name that can't run.

    Source: AnyUp (arXiv 2510.12764), key encoder and aggregation.
    """
    batch, *size, dim = from_image.shape
    filters = len(weights.features[0].norm_in_weight)
    wanted = (batch, filters, *size), (dim, 2 * dim, 3, 3)
    if from_image.ndim != 4 or 0 in from_image.shape or (from_features.shape, weights.merge.shape) != wanted:
        shapes = [tuple(tensor.shape) for tensor in (from_image, from_features, weights.merge)]
        raise ValueError(f"from_image, from_features and weights do not fit together: {shapes}")
    about = from_image.device, from_image.dtype, from_features.dtype
    why_not = partial(_why_not, from_image=from_image, from_features=from_features)
    backend = chosen(kept, "project_keys", about, backend, why_not)
    dtype = from_image.dtype if dtype is None else dtype
    if kept is not None and on_triton(backend):
        return _computed(from_image, from_features, weights, eps, dtype, backend, kept)
    return project_keys_op(from_image, from_features, weights.flat(), eps, dtype, backend)


def _why_not(name, from_image, from_features):
    if name == "reference":
        return "this operator has none: its specification are the layers of AnyUp"
    if name == "torch":
        return None
    # Its products are of float32, whatever it is given.
    given = from_image.dtype, from_features.dtype, torch.float32
    if reason := why_no_triton("project_keys", from_image.device, *given):
        return reason
    from ..kernels.keys import why_not_keys

    return why_not_keys(from_image.shape[-1], from_features.shape[1])


@torch.library.custom_op("anyup_fast::project_keys", mutates_args=())
def project_keys_op(
    from_image: Tensor, from_features: Tensor, weights: list[Tensor], eps: float, dtype: torch.dtype, backend: str
) -> Tensor:
    """`anyup_fast.ops.project_keys` on a named back end, weights as `KeyWeights.flat()`, arguments unchecked."""
    return _computed(from_image, from_features, KeyWeights.from_flat(weights), eps, dtype, backend)


def _computed(from_image, from_features, weights, eps, dtype, backend, kept=None):
    def kernel():
        from ..kernels.keys import prepared, project_keys_fwd

        options = dict(eps=eps, dtype=dtype, precision=triton_precision(), ready=kept is not None)
        made = weights if kept is None else kept.of("keys, ready", lambda: prepared(weights))
        return project_keys_fwd(from_image, from_features, made, **options)

    def in_plain_pytorch():
        return plain.project_keys(from_image, from_features, weights, eps=eps).to(dtype)

    return attempt("project_keys", backend, from_image.device, kernel, in_plain_pytorch)


@project_keys_op.register_fake
def _(from_image, from_features, weights, eps, dtype, backend):
    return from_image.new_empty(from_image.shape, dtype=dtype)
