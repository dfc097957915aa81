"""Keys in plain PyTorch: what the image and the features say of each low-resolution cell, merged and projected."""

from functools import lru_cache

import torch
import torch.nn.functional as F

from ..cpu.convolution import Convolution
from ..cpu.crew import led
from .norms import NORM_EPS, rms_project
from .walks import Walk
from .weights import cast

GATHERED = 1 << 27  # numbers under the filters of some cells that are gathered at once, elsewhere than on CPUs


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
        rows, cols = (_reflected(n, 1, out.device) for n in (h, w))
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
    """The same for a whole batch at a time, in few operations: each costs an accelerator a launch."""
    batch, h, w, dim = from_image.shape
    first, second = weights.features
    x = from_features.flatten(2)
    x = x.clone() if first.skip is None else x
    # They are 1/M and very little more: what they have beyond it keeps its digits, and no norm knows the difference.
    x = _block(x, first, num_groups, x - 1 / x.shape[1])
    x = _block(x, second, num_groups)
    both = torch.cat((from_image.flatten(1, 2).mT, x), 1)
    merge, x = weights.merge.flatten(1), torch.empty_like(x)
    seen, most = _neighbours(h, w, weights.merge.shape[-1], x.device), max(1, GATHERED // (batch * merge.shape[1]))
    for first in range(0, h * w, most):
        some = slice(first, first + most)
        taps = both.index_select(2, seen[:, some].flatten()).view(batch, merge.shape[1], -1)
        torch.bmm(merge.expand(batch, -1, -1), taps, out=x[..., some])
    for block in weights.blocks:
        x = _block(x, block, num_groups)
    x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + eps)
    folded = weights.weight * weights.norm
    return torch.addmm(weights.bias, x.mT.reshape(-1, dim), folded.T).view(batch, h, w, dim)


def _block(x, block, num_groups, shifted=None):
    """A ResBlock on cells (B, D, P), in place where its width stays.

    `shifted` is what the first norm is given in place of `x`.
    """
    outer, inner = block[:2], block[3:5]
    hidden = _product(block.conv_in, _active(x if shifted is None else shifted, *outer, num_groups))
    out = x if block.skip is None else _product(block.skip, x)
    return out.baddbmm_(block.conv_out.expand(len(x), -1, -1), _active(hidden, *inner, num_groups))


def _product(weight, x):
    """`weight @ x` for every x of (B, D, P)."""
    return torch.bmm(weight.expand(len(x), -1, -1), x)


def _active(x, weight, bias, num_groups):
    """silu(norm(x)) of cells (B, D, P), which PyTorch's own norm takes in this order."""
    return F.silu(F.group_norm(x, num_groups, weight, bias, NORM_EPS), inplace=True)


@lru_cache(maxsize=32)
def _neighbours(h, w, k, device):
    """(k * k, h * w): the cells that each tap sees around each cell, reflected at the edges."""
    with torch.inference_mode(False):  # they are kept, for training too
        rows, cols = (_reflected(n, k // 2, "cpu").unfold(0, k, 1).T for n in (h, w))
        return (rows[:, None, :, None] * w + cols[None, :, None]).reshape(k * k, h * w).to(device)


def _reflected(n, more, device):
    """Places of an axis with some more on either side, reflected; an axis that is too short repeats its edge."""
    return (n - 1 - (n - 1 - torch.arange(-more, n + more, device=device).abs()).abs()).clamp(0, n - 1)
