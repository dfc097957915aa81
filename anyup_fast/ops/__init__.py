"""Public operators: contract and checks here, one file per back end beside this one."""

import torch

from . import reference, torch_backend
from .windows import neighborhood_bounds, window_bounds

__all__ = ["backends", "feature_unification", "neighborhood_bounds", "window_bounds", "windowed_attention"]

_WINDOWED_ATTENTION = {
    "torch": torch_backend.windowed_attention,
    "reference": reference.windowed_attention,
}


def windowed_attention(query, key, value, row_bounds, col_bounds, *, scale=None, head_mode="mean", backend="auto"):
    """Attention of every output pixel to its own rectangle of low-resolution keys.

    Equivalent to a softmax per head over the keys inside the window, the mean over the heads, and the weighted
    sum of `value` (`anyup_fast.ops.reference.windowed_attention`).

    Args:
        query: (B, H', W', heads, head_dim).
        key: (B, h, w, heads, head_dim).
        value: (B, h, w, C), any C; for `head_mode="split"` a multiple of heads.
        row_bounds: int32 (H', 2), half-open rows `[start, end)` of the low-resolution grid, none empty.
        col_bounds: int32 (W', 2), the same for columns.
        scale: factor on the logits; None means `head_dim ** -0.5`.
        head_mode: "mean" weighs every channel by the mean over the heads, "split" lets each head weigh its own
            C / heads channels.
        backend: "auto", "torch" (exact, memory flat in the number of pixels) or "reference" (the twin).

    Returns:
        (B, H', W', C) in the dtype of `value`; softmax and sums in float32 (float64 for float64 input).

    Raises:
        ValueError: shapes that do not fit together, an empty window, an unknown mode or back end.

    Source: AnyUp (arXiv 2510.12764), local window attention.
    """
    _check_windowed_attention(query, key, value, row_bounds, col_bounds, head_mode)
    if backend == "auto":
        backend = next(iter(_WINDOWED_ATTENTION))
    if backend not in _WINDOWED_ATTENTION:
        known = ", ".join(repr(name) for name in ("auto", *_WINDOWED_ATTENTION))
        raise ValueError(f"backend: no back end {backend!r}; use one of {known}")
    run = _WINDOWED_ATTENTION[backend]
    return run(query, key, value, row_bounds, col_bounds, scale=scale, head_mode=head_mode)


def backends(device):
    """Back ends of `windowed_attention` in the order in which "auto" tries them, for tensors on `device`.

    Returns:
        dict from name to None, or to the sentence that says why it can't run there.
    """
    torch.device(device)  # an unknown one raises here
    return dict.fromkeys(_WINDOWED_ATTENTION)


def feature_unification(features, basis):
    """Channel-agnostic description of `features` (B, C, h, w) by `basis` (M, 1, k, k): (B, M, h, w), float32.

    See `anyup_fast.ops.reference.feature_unification` for the formula and its interleaving.
    """
    return reference.feature_unification(features, basis)


def _check_windowed_attention(query, key, value, row_bounds, col_bounds, head_mode):
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.ndim != 5 or key.ndim != 5 or value.ndim != 4:
        raise ValueError(
            f"need query (B, H', W', heads, head_dim), key (B, h, w, heads, head_dim), value (B, h, w, C); got {shapes}"
        )
    if query.shape[0] != key.shape[0] or query.shape[3:] != key.shape[3:] or key.shape[:3] != value.shape[:3]:
        raise ValueError(f"query, key and value do not fit together: {shapes}")
    if 0 in (*query.shape, *key.shape, *value.shape):
        raise ValueError(f"no dimension may be 0: {shapes}")
    if head_mode not in ("mean", "split"):
        raise ValueError(f"head_mode must be 'mean' or 'split', got {head_mode!r}")
    if head_mode == "split" and value.shape[3] % query.shape[3]:
        raise ValueError(f"head_mode='split' needs C to be a multiple of the {query.shape[3]} heads: {shapes}")
    for name, bounds, n_query, n_key in (
        ("row_bounds", row_bounds, query.shape[1], key.shape[1]),
        ("col_bounds", col_bounds, query.shape[2], key.shape[2]),
    ):
        if tuple(bounds.shape) != (n_query, 2) or bounds.dtype.is_floating_point:
            raise ValueError(
                f"{name} must be integers of shape ({n_query}, 2), got {bounds.dtype} {tuple(bounds.shape)}"
            )
        # Reading bounds that live on an accelerator would stall its queue.
        if bounds.device.type == "cpu":
            start, end = bounds.unbind(1)
            if (start < 0).any() or (end > n_key).any() or (start >= end).any():
                raise ValueError(f"{name}: every window must satisfy 0 <= start < end <= {n_key}")
