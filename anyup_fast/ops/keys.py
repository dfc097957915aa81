"""`project_keys`: contract and registration; plain PyTorch on every device, since keys are few."""

import torch
from torch import Tensor

from ..plain import keys as plain
from ..plain.norms import RMS_EPS
from ..plain.weights import KeyWeights


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
    return project_keys_op(from_image, from_features, weights.flat(), eps)


@torch.library.custom_op("anyup_fast::project_keys", mutates_args=())
def project_keys_op(from_image: Tensor, from_features: Tensor, weights: list[Tensor], eps: float) -> Tensor:
    """`anyup_fast.ops.project_keys`, weights as `KeyWeights.flat()`."""
    return plain.project_keys(from_image, from_features, KeyWeights.from_flat(weights), eps=eps)


@project_keys_op.register_fake
def _(from_image, from_features, weights, eps):
    return from_image.new_empty(from_image.shape)
