"""Registration with torch.library: the operators that graphs, fakes and autograd see, and the back ends under them."""

import torch
from torch import Tensor

from . import torch_backend


@torch.library.custom_op("anyup_fast::windowed_attention", mutates_args=())
def windowed_attention(
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
    if backend == "triton":
        from ..kernels.windowed_attention import windowed_attention_fwd as run
    else:
        run = torch_backend.windowed_attention
    return run(query, key, value, row_bounds, col_bounds, scale=scale, head_mode=head_mode)


@windowed_attention.register_fake
def _(query, key, value, row_bounds, col_bounds, scale, head_mode, backend):
    return value.new_empty(*query.shape[:3], value.shape[3])


@torch.library.custom_op("anyup_fast::windowed_attention_backward", mutates_args=())
def windowed_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_bounds: Tensor,
    col_bounds: Tensor,
    scale: float,
    head_mode: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `windowed_attention` for query, key and value, in plain PyTorch for every back end."""
    return torch_backend.windowed_attention_backward(
        grad, query, key, value, row_bounds, col_bounds, scale=scale, head_mode=head_mode
    )


@windowed_attention_backward.register_fake
def _(grad, query, key, value, row_bounds, col_bounds, scale, head_mode):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _save(ctx, inputs, output):
    *tensors, ctx.scale, ctx.head_mode, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    grads = windowed_attention_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.head_mode)
    return *grads, None, None, None, None, None


windowed_attention.register_autograd(_backward, setup_context=_save)
