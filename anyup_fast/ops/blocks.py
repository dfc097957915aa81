"""The layers of AnyUp at image resolution.

They have gradients by recomputation, and `pooled` a form that compilers take.
"""

import torch
import torch.nn.functional as F

from ..plain.guidance import Pool
from . import library


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
        return library.project_pixels(image, weight)
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
    return library.res_block(x, [tensor for tensor in block if tensor is not None], num_groups)[0]


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
    fewer = size[1] <= Pool.FEW and 2 * size[0] * size[1] <= x.shape[1] * x.shape[2]
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and wide and fewer and block.skip is None:
        return library.pooled_block(x, [tensor for tensor in block if tensor is not None], *size, num_groups)[0]
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
    return library.branches(x, freqs, query_conv, key_conv)


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
        return library.pooled(x, *size)
    return F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)
