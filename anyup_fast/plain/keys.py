"""Keys in plain PyTorch: what the image and the features say of each low-resolution cell, merged and projected."""

import torch
import torch.nn.functional as F

from ..cpu.convolution import Convolution
from ..cpu.crew import led
from .convolution import convolve
from .norms import NORM_EPS, rms_project
from .walks import Walk
from .weights import cast


@led
def project_keys(from_image, from_features, weights, *, eps, num_groups=8):
    """`anyup_fast.ops.project_keys`."""
    compute = torch.promote_types(from_image.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(from_image.device.type, enabled=False):
        weights = cast(weights, compute)
        if from_image.device.type != "cpu":
            return _together(from_image.to(compute), from_features.to(compute), weights, eps, num_groups).to(
                from_image.dtype
            )
        batch, h, w, dim = from_image.shape
        out = from_image.new_empty(from_image.shape, dtype=compute)
        filters = from_features.shape[1]
        walk = Walk((h, w), max(2 * dim, filters), weights.merge, num_groups)
        convolved, folded = Convolution(weights.merge), (weights.weight * weights.norm).T.contiguous()
        rows, cols = (_reflected(n, out.device) for n in (h, w))
        hidden, x = (out.new_empty(h * w, dim) for _ in range(2))

        def picture(image, features, target):
            unified = features.to(compute).permute(1, 2, 0).reshape(-1, filters).clone()
            unified = walk.blocks(unified, hidden, walk.moments(unified), weights.features)
            both = torch.cat((image.to(compute), unified.view(h, w, dim)), -1)
            padded = both.index_select(0, rows).index_select(1, cols)

            def merge(desk, piece, moments):
                flat, r, c, number = piece
                convolved(padded, r, c, x[flat], desk, inside=True)
                moments.put(number, x[flat], desk.scratch(1, flat, dim))

            moments = walk.measured(merge, dim)
            key = walk.blocks(x, hidden, moments, weights.blocks)

            def project(desk, piece):
                rms_project(key[piece.flat], folded, weights.bias, eps, target.view(-1, dim)[piece.flat])

            walk.each(project)

        for tensors in zip(from_image, from_features, out, strict=True):
            picture(*tensors)
    return out.to(from_image.dtype)


def _together(from_image, from_features, weights, eps, num_groups):
    """The same for a whole batch at a time, in few operations: an accelerator waits for each of them."""
    size = from_image.shape[1:3]
    x = from_features.permute(0, 2, 3, 1).flatten(1, 2)
    # They are 1/M and very little more: what they have beyond it keeps its digits, and no norm knows the difference.
    first, second = weights.features
    x = _block(x, first, num_groups, x - 1 / x.shape[-1])
    x = _block(x, second, num_groups)
    both = torch.cat((from_image, x.unflatten(1, size)), -1)
    rows, cols = (_reflected(n, x.device) for n in size)
    both = both.index_select(1, rows).index_select(2, cols).permute(0, 3, 1, 2)
    x = convolve(both, weights.merge).permute(0, 2, 3, 1).flatten(1, 2)
    for block in weights.blocks:
        x = _block(x, block, num_groups)
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return F.linear(x * scale * weights.norm, weights.weight, weights.bias).unflatten(1, size)


def _block(x, block, num_groups, shifted=None):
    """A ResBlock on cells (B, P, D); `shifted` is what the first norm is given in place of `x`."""
    hidden = (
        _active(x if shifted is None else shifted, block.norm_in_weight, block.norm_in_bias, num_groups)
        @ block.conv_in.T
    )
    hidden = _active(hidden, block.norm_out_weight, block.norm_out_bias, num_groups) @ block.conv_out.T
    return hidden + (x if block.skip is None else x @ block.skip.T)


def _active(x, weight, bias, num_groups):
    """silu(norm(x)): deviations from the mean are squared, not numbers that lie far from zero."""
    groups = x.unflatten(-1, (num_groups, -1))
    gap = groups - groups.mean((1, 3), keepdim=True)
    scale = torch.rsqrt(gap.square().mean((1, 3), keepdim=True) + NORM_EPS)
    return F.silu(torch.addcmul(bias, (gap * scale).flatten(2), weight), inplace=True)


def _reflected(n, device):
    """Places of an axis with one more on either side, reflected; an axis of one place repeats it."""
    return (n - 1 - (n - 1 - torch.arange(-1, n + 1, device=device).abs()).abs()).clamp(0, n - 1)
