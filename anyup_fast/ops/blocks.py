"""The layers of AnyUp at image resolution, where gradients are recorded: contract, checks, registration and gradients.

They compute again in backward what is cheap to compute, and `pooled` has a form that compilers take.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..plain import blocks as plain
from ..plain import pooling
from ..plain.weights import Block


def project_pixels(image, weight):
    """The first convolution of the image, 1x1.

    Differentiable; once on CPUs.

    Args:
        image: (B, C, H, W), any float dtype. weight: (D, C).

    Returns:
        (B, H, W, D) in the dtype of `weight`.

    Raises:
        ValueError: shapes that do not fit together.

    Source: AnyUp (arXiv 2510.12764), image encoder.
    """
    if image.ndim != 4 or 0 in image.shape or weight.ndim != 2 or image.shape[1] != weight.shape[1]:
        raise ValueError(f"image and weight do not fit together: {tuple(image.shape)}, {tuple(weight.shape)}")
    if image.device.type == "cpu" and not torch.compiler.is_compiling():
        return project_pixels_op(image, weight)
    return F.linear(image.permute(0, 2, 3, 1).to(weight.dtype), weight)


def res_block(x, block, *, num_groups=8):
    """`skip(x) + conv_out(silu(norm_out(conv_in(silu(norm_in(x))))))`, all convolutions 1x1.

    Differentiable once in x and in the block's tensors. For backward it keeps x, the output of its
    first convolution and the statistics of its normalisations, and computes the rest again in pieces.

    Args:
        x: (B, H, W, in), any float dtype.
        block: Block, any float dtype; products are computed in the dtype of `x`.
        num_groups: of the normalisations, each over all pixels of an image.

    Returns:
        (B, H, W, out) in the dtype of `x`.

    Raises:
        ValueError: shapes that do not fit together.

    Source: AnyUp (arXiv 2510.12764), residual blocks of its encoders.
    """
    _check_block(x, block, num_groups)
    return res_block_op(x, [tensor for tensor in block if tensor is not None], num_groups)[0]


def _check_block(x, block, num_groups):
    n_out, n_in = block.conv_in.shape
    expected = [(n_in,), (n_in,), (n_out, n_in), (n_out,), (n_out,), (n_out, n_out)]
    shapes = [tuple(tensor.shape) for tensor in block[:6]]
    skip = (n_in,) if block.skip is None else tuple(block.skip.shape)
    fits = shapes == expected and skip == ((n_in,) if n_in == n_out and block.skip is None else (n_out, n_in))
    if x.ndim != 4 or 0 in x.shape or x.shape[3] != n_in or not fits or n_in % num_groups or n_out % num_groups:
        raise ValueError(
            f"x and block do not fit together with {num_groups} groups: {tuple(x.shape)}, {shapes}, skip {skip}"
        )


def pooled_block(x, block, size, *, num_groups=8):
    """`pooled(res_block(x, block), size)`, averaged in float32 at least.

    On CPUs its second convolution, which is linear, comes after the pooling.

    Differentiable once in x and in the block's tensors; backward keeps what that of `res_block` keeps.

    Args:
        x: (B, H, W, in), any float dtype.
        block: Block, any float dtype; products are computed in the dtype of `x`.
        size: (H', W').
        num_groups: of the normalisations, each over all pixels of an image.

    Returns:
        (B, H', W', out), float32 at least.

    Raises:
        ValueError: shapes that do not fit together.

    Source: AnyUp (arXiv 2510.12764), encoder of the keys.
    """
    _check_block(x, block, num_groups)
    wide = x.dtype in (torch.float32, torch.float64) and all(part is None or part.dtype == x.dtype for part in block)
    fewer = size[1] <= pooling.Pool.FEW and 2 * size[0] * size[1] <= x.shape[1] * x.shape[2]
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and wide and fewer and block.skip is None:
        return pooled_block_op(x, [tensor for tensor in block if tensor is not None], *size, num_groups)[0]
    return pooled(res_block(x, block, num_groups=num_groups).to(torch.promote_types(x.dtype, torch.float32)), size)


def branches(x, freqs, query_conv, key_conv):
    """Rotary embedding of the guide, and the first convolutions of the query and key branches on it.

    Differentiable once in everything; for backward it keeps x.

    Args:
        x: (B, H, W, D), any float dtype.
        freqs: (2, D), angles per unit of row and of column over `linspace(0, 1)` of both axes.
        query_conv, key_conv: (D, D).

    Returns:
        Two tensors (B, H, W, D) in the dtype of `x`.

    Raises:
        ValueError: shapes that do not fit together.

    Source: AnyUp (arXiv 2510.12764), positional encoding and encoders of queries and keys.
    """
    dim = x.shape[-1]
    shapes = [tuple(tensor.shape) for tensor in (x, freqs, query_conv, key_conv)]
    if x.ndim != 4 or 0 in x.shape or dim % 2 or shapes[1:] != [(2, dim), (dim, dim), (dim, dim)]:
        raise ValueError(f"x, freqs, query_conv and key_conv do not fit together: {shapes}")
    return branches_op(x, freqs, query_conv, key_conv)


def pooled(x, size):
    """`adaptive_avg_pool2d` with the channels last.

    In a graph that is traced it is an operator of its own, differentiable once: Inductor can't lower PyTorch's to sizes
    that stay symbols.

    Args:
        x: (B, H, W, D), any float dtype. size: (H', W').

    Returns:
        (B, H', W', D) in the dtype of `x`.
    """
    if torch.compiler.is_compiling():
        return pooled_op(x, *size)
    return pooling.pooled(x, size)


@torch.library.custom_op("anyup_fast::res_block", mutates_args=())
def res_block_op(x: Tensor, weights: list[Tensor], num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """`anyup_fast.ops.res_block`, weights as a list without None; with what backward needs besides the input."""
    return plain.res_block(x, Block(*weights), num_groups)


@res_block_op.register_fake
def _(x, weights, num_groups):
    statistics = x.new_empty(x.shape[0], 2, 2, num_groups, dtype=torch.promote_types(x.dtype, torch.float32))
    shape = *x.shape[:3], len(weights[5])
    return x.new_empty(shape), x.new_empty(shape), statistics


@torch.library.custom_op("anyup_fast::res_block_backward", mutates_args=())
def res_block_backward_op(
    grad: Tensor, x: Tensor, hidden: Tensor, statistics: Tensor, weights: list[Tensor]
) -> list[Tensor]:
    """Gradients of `res_block` for x and each weight."""
    grad_x, grads = plain.res_block_backward(grad, x, hidden, statistics, Block(*weights))
    return [grad_x, *grads]


@res_block_backward_op.register_fake
def _(grad, x, hidden, statistics, weights):
    return [tensor.new_empty(tensor.shape) for tensor in (x, *weights)]


def _save_block(ctx, inputs, output):
    x, weights, _ = inputs
    _, *kept = output
    ctx.save_for_backward(x, *kept, *weights)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _backward_block(ctx, grad, *_):
    x, hidden, statistics, *weights = ctx.saved_tensors
    if grad is None:
        return None, [None] * len(weights), None
    grad_x, *grads = res_block_backward_op(grad, x, hidden, statistics, weights)
    return grad_x, grads, None


res_block_op.register_autograd(_backward_block, setup_context=_save_block)


@torch.library.custom_op("anyup_fast::pooled_block", mutates_args=())
def pooled_block_op(
    x: Tensor, weights: list[Tensor], height: int, width: int, num_groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`anyup_fast.ops.pooled_block`, with what backward needs besides the input."""
    return plain.pooled_block(x, Block(*weights), (height, width), num_groups)


@pooled_block_op.register_fake
def _(x, weights, height, width, num_groups):
    small = x.shape[0], height, width, x.shape[3]
    return x.new_empty(small), x.new_empty(x.shape), x.new_empty(x.shape[0], 2, 2, num_groups), x.new_empty(small)


@torch.library.custom_op("anyup_fast::pooled_block_backward", mutates_args=())
def pooled_block_backward_op(
    grad: Tensor, x: Tensor, hidden: Tensor, statistics: Tensor, active: Tensor, weights: list[Tensor]
) -> list[Tensor]:
    """Gradients of `pooled_block` for x and its weights."""
    grad_x, grads = plain.pooled_block_backward(grad, x, hidden, statistics, active, Block(*weights))
    return [grad_x, *grads]


@pooled_block_backward_op.register_fake
def _(grad, x, hidden, statistics, active, weights):
    return [tensor.new_empty(tensor.shape) for tensor in (x, *weights)]


def _save_pooled_block(ctx, inputs, output):
    x, weights, *_ = inputs
    ctx.save_for_backward(x, *output[1:], *weights)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward_pooled_block(ctx, grad, *_):
    x, hidden, statistics, active, *weights = ctx.saved_tensors
    if grad is None:
        return None, [None] * len(weights), None, None, None
    grad_x, *grads = pooled_block_backward_op(grad, x, hidden, statistics, active, weights)
    return grad_x, grads, None, None, None


pooled_block_op.register_autograd(_backward_pooled_block, setup_context=_save_pooled_block)


@torch.library.custom_op("anyup_fast::project_pixels", mutates_args=())
def project_pixels_op(image: Tensor, weight: Tensor) -> Tensor:
    """`anyup_fast.ops.project_pixels`."""
    return plain.project_pixels(image, weight)


@project_pixels_op.register_fake
def _(image, weight):
    return weight.new_empty(image.shape[0], *image.shape[2:], weight.shape[0])


@torch.library.custom_op("anyup_fast::project_pixels_backward", mutates_args=())
def project_pixels_backward_op(grad: Tensor, image: Tensor, weight: Tensor, for_image: bool) -> tuple[Tensor, Tensor]:
    """Gradients of `project_pixels` for image (if asked for, else empty) and weight."""
    return plain.project_pixels_backward(grad, image, weight, for_image)


@project_pixels_backward_op.register_fake
def _(grad, image, weight, for_image):
    return image.new_empty(image.shape if for_image else 0), weight.new_empty(weight.shape)


def _save_pixels(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_pixels(ctx, grad):
    for_image = ctx.needs_input_grad[0]
    of_image, of_weight = project_pixels_backward_op(grad, *ctx.saved_tensors, for_image)
    return of_image if for_image else None, of_weight


project_pixels_op.register_autograd(_backward_pixels, setup_context=_save_pixels)


@torch.library.custom_op("anyup_fast::branches", mutates_args=())
def branches_op(x: Tensor, freqs: Tensor, query_conv: Tensor, key_conv: Tensor) -> tuple[Tensor, Tensor]:
    """`anyup_fast.ops.branches`, arguments unchecked."""
    return plain.branches(x, freqs, query_conv, key_conv)


@branches_op.register_fake
def _(x, freqs, query_conv, key_conv):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("anyup_fast::branches_backward", mutates_args=())
def branches_backward_op(
    grad_query: Tensor, grad_key: Tensor, x: Tensor, freqs: Tensor, query_conv: Tensor, key_conv: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `branches` for its tensors."""
    return plain.branches_backward(grad_query, grad_key, x, freqs, query_conv, key_conv)


@branches_backward_op.register_fake
def _(grad_query, grad_key, x, freqs, query_conv, key_conv):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, freqs, query_conv, key_conv))


def _save_branches(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_branches(ctx, grad_query, grad_key):
    return branches_backward_op(grad_query, grad_key, *ctx.saved_tensors)


branches_op.register_autograd(_backward_branches, setup_context=_save_branches)


@torch.library.custom_op("anyup_fast::pooled", mutates_args=())
def pooled_op(x: Tensor, height: int, width: int) -> Tensor:
    """`anyup_fast.ops.pooled` as a traced graph sees it."""
    return pooling.pooled(x, (height, width)).contiguous()


@pooled_op.register_fake
def _(x, height, width):
    return x.new_empty(x.shape[0], height, width, x.shape[3])


@torch.library.custom_op("anyup_fast::pooled_backward", mutates_args=())
def pooled_backward_op(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of `pooled` for x, of which only the shape counts."""
    return pooling.pooled_backward(grad, x).contiguous()


@pooled_backward_op.register_fake
def _(grad, x):
    return x.new_empty(x.shape)


def _save_pooled(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def _backward_pooled(ctx, grad):
    return pooled_backward_op(grad, *ctx.saved_tensors), None, None


pooled_op.register_autograd(_backward_pooled, setup_context=_save_pooled)
