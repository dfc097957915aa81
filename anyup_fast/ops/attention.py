"""`windowed_attention`: contract, checks, choice of back end, registration and gradients."""

import torch
from torch import Tensor

from ..plain import attention as plain
from ..plain import reference
from ..plain.width import has_float64
from .choice import BACKENDS, attempt, check_name, chosen, on_triton, requested, why_no_triton
from .windows import UNCAPTURED, is_made_for


def windowed_attention(
    query, key, value, row_bounds, col_bounds, *, scale=None, head_mode="mean", backend="auto", kept=None
):
    """Attention of every output pixel to its own rectangle of low-resolution keys.

    Equivalent to a softmax per head over the keys inside the window, the mean over the heads, and the weighted
    sum of `value` (`anyup_fast.plain.reference.windowed_attention`). Differentiable once in query, key and value on
    every back end; "reference" any number of times.

    Args:
        query: (B, H', W', heads, head_dim).
        key: (B, h, w, heads, head_dim), in the dtype of `query`.
        value: (B, h, w, C), any C; for `head_mode="split"` a multiple of heads.
        row_bounds: integers (H', 2), half-open rows `[start, end)` of the low-resolution grid, none empty.
        col_bounds: integers (W', 2), the same for columns. Keep both on the CPU: there they are checked.
        scale: factor on the logits; None means `head_dim ** -0.5`.
        head_mode: "mean" weighs every channel by the mean over the heads, "split" lets each head weigh its own
            C / heads channels.
        backend: "auto" (see `choose_backend`), "triton" (fused kernels on GPUs), "torch" (exact, any device, memory
            flat in the number of pixels) or "reference" (the twin).
        kept: `anyup_fast.kept.Kept` of a model where no gradient is asked for, or None.

    Returns:
        (B, H', W', C) in the dtype of `value`; softmax and sums in float32 (float64 for float64 input).

    Raises:
        ValueError: shapes or dtypes that do not fit together, an empty window, an unknown mode or back end.
        RuntimeError: a back end asked for by name that can't run here; the message says why.

    Source: AnyUp (arXiv 2510.12764), local window attention.
    """
    _check_windowed_attention(query, key, value, row_bounds, col_bounds, head_mode)
    backend = _choice(query, key, value, backend, kept)
    if backend == "reference":
        return reference.windowed_attention(query, key, value, row_bounds, col_bounds, scale=scale, head_mode=head_mode)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if kept is not None and on_triton(backend):
        return _computed(query, key, value, row_bounds, col_bounds, scale, head_mode, backend)
    return windowed_attention_op(query, key, value, row_bounds, col_bounds, scale, head_mode, backend)


def choose_backend(query, key, value, backend="auto"):
    """Name of the back end that `windowed_attention` takes: for "auto" the first without a reason against it.

    Each reason that turned one away is logged once, at level INFO.
    """
    return "triton" if on_triton(name := _choice(query, key, value, backend)) else name


def _choice(query, key, value, backend, kept=None):
    options = query.device, query.dtype, value.dtype, query.shape[-1]
    return chosen(kept, "windowed_attention", options, backend, lambda name: why_not(name, *options))


def backends(device):
    """Back ends of `windowed_attention` in the order in which "auto" tries them, for float32 tensors on `device`.

    Returns:
        dict from name to None, or to the sentence that says why it can't run there.
    """
    return {name: why_not(name, device) for name in BACKENDS}


def why_not(backend, device, dtype=torch.float32, value_dtype=None, head_dim=32):
    """Why `backend` can't run `windowed_attention` on `device`: one sentence, or None if it can.

    Args:
        backend: "triton", "torch" or "reference".
        device: a torch.device or its name.
        dtype: of query and key.
        value_dtype: of value; None means `dtype`.
        head_dim: width of one head.

    Raises:
        ValueError: no such back end.
    """
    device = torch.device(device)
    check_name(backend)
    if backend != "triton":
        return None
    if reason := why_no_triton("windowed_attention", device, dtype, dtype if value_dtype is None else value_dtype):
        return reason
    return f"needs heads of at most 128 numbers, got {head_dim}" if head_dim > 128 else None


def runs_plain(device, dtype=torch.float32, backend=None):
    """Whether plain PyTorch computes images of `dtype` on a torch.device: by name, or where it is what is taken.

    A GPU that is not in this machine is taken for one that has Triton. ValueError: neither "triton" nor "torch".
    """
    if backend is not None:
        if backend not in ("triton", "torch"):
            raise ValueError(f"backend: need 'triton', 'torch' or None, got {backend!r}")
        return backend == "torch"
    if requested() != "auto":
        return requested() != "triton"
    if device.type in ("cuda", "xpu") and not getattr(torch, device.type).is_available():
        return False
    return why_not("triton", device, dtype) is not None or not has_float64(device)


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
    if query.dtype != key.dtype or not query.is_floating_point() or not value.is_floating_point():
        raise ValueError(
            "query and key need one floating dtype, value may have another; "
            f"got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    if not query.device == key.device == value.device:
        raise ValueError(f"query, key and value lie on {query.device}, {key.device} and {value.device}: move them")
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
        # Reading bounds that live on an accelerator would stall its queue; a graph being traced has none to read; and
        # those of a rule are right for the sizes that they were made for.
        if torch.compiler.is_compiling() or is_made_for(bounds, n_query, n_key):
            continue
        if bounds.device.type == "cpu":
            start, end = bounds.unbind(1)
            if (start < 0).any() or (end > n_key).any() or (start >= end).any():
                raise ValueError(f"{name}: every window must satisfy 0 <= start < end <= {n_key}")


@torch.library.custom_op("anyup_fast::windowed_attention", mutates_args=(), **UNCAPTURED)
def windowed_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_bounds: Tensor,
    col_bounds: Tensor,
    scale: float,
    head_mode: str,
    backend: str,
) -> Tensor:
    """`anyup_fast.ops.windowed_attention` on a named back end ("triton" or "torch"), arguments unchecked."""
    return _computed(query, key, value, row_bounds, col_bounds, scale, head_mode, backend)


def _computed(query, key, value, row_bounds, col_bounds, scale, head_mode, backend):
    given, options = (query, key, value, row_bounds, col_bounds), {"scale": scale, "head_mode": head_mode}

    def kernel():
        from ..kernels.attention import windowed_attention_fwd

        return windowed_attention_fwd(*given, **options)

    return attempt(
        "windowed_attention", backend, query.device, kernel, lambda: plain.windowed_attention(*given, **options)
    )


@windowed_attention_op.register_fake
def _(query, key, value, row_bounds, col_bounds, scale, head_mode, backend):
    return value.new_empty(*query.shape[:3], value.shape[3])


@torch.library.custom_op("anyup_fast::windowed_attention_backward", mutates_args=(), **UNCAPTURED)
def windowed_attention_backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_bounds: Tensor,
    col_bounds: Tensor,
    scale: float,
    head_mode: str,
    for_value: bool,
    backend: str,
    for_query: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `windowed_attention` for query and key, and for value (empty if not asked for), on a back end."""
    tensors = grad, query, key, value, row_bounds, col_bounds

    def kernel():
        from ..kernels.attention_backward import windowed_attention_bwd

        options = {"scale": scale, "head_mode": head_mode, "for_query": for_query}
        *grads, of_value = windowed_attention_bwd(*tensors, **options)
        return *grads, of_value if for_value else value.new_empty(len(value), 0)

    def in_plain_pytorch():
        options = {"scale": scale, "head_mode": head_mode, "for_value": for_value, "for_query": for_query}
        return plain.windowed_attention_backward(*tensors, **options)

    return attempt("windowed_attention_backward", backend, query.device, kernel, in_plain_pytorch)


@windowed_attention_backward_op.register_fake
def _(grad, query, key, value, row_bounds, col_bounds, scale, head_mode, for_value, backend, for_query=True):
    asked = (query, for_query), (key, for_query), (value, for_value)
    return tuple(x.new_empty(x.shape if wanted else (x.shape[0], 0)) for x, wanted in asked)


def _save(ctx, inputs, output):
    *tensors, ctx.scale, ctx.head_mode, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    for_value, for_query = ctx.needs_input_grad[2], any(ctx.needs_input_grad[:2])
    *grads, of_value = windowed_attention_backward_op(
        grad, *ctx.saved_tensors, ctx.scale, ctx.head_mode, for_value, ctx.backend, for_query
    )
    grads = grads if for_query else (None, None)
    return *grads, of_value if for_value else None, None, None, None, None, None


windowed_attention_op.register_autograd(_backward, setup_context=_save)
