"""Keys in plain PyTorch: what the image and the features say of each low-resolution cell, merged and projected."""

import torch

from ..cpu.convolution import Convolution
from ..cpu.crew import led
from .norms import rms_project
from .walks import Walk
from .weights import cast


@led
def project_keys(from_image, from_features, weights, *, eps, num_groups=8):
    """`anyup_fast.ops.project_keys`."""
    compute = torch.promote_types(from_image.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(from_image.device.type, enabled=False):
        weights = cast(weights, compute)
        batch, h, w, dim = from_image.shape
        out = from_image.new_empty(from_image.shape, dtype=compute)
        filters = from_features.shape[1]
        walk = Walk((h, w), max(2 * dim, filters), weights.merge, num_groups)
        convolve, folded = Convolution(weights.merge), (weights.weight * weights.norm).T.contiguous()
        rows, cols = (_reflected(n, out.device) for n in (h, w))
        hidden, x = (out.new_empty(h * w, dim) for _ in range(2))

        def picture(image, features, target):
            unified = features.to(compute).permute(1, 2, 0).reshape(-1, filters).clone()
            unified = walk.blocks(unified, hidden, walk.moments(unified), weights.features)
            both = torch.cat((image.to(compute), unified.view(h, w, dim)), -1)
            padded = both.index_select(0, rows).index_select(1, cols)

            def merge(desk, piece, moments):
                flat, r, c, number = piece
                convolve(padded, r, c, x[flat], desk, inside=True)
                moments.put(number, x[flat], desk.scratch(1, flat, dim))

            moments = walk.measured(merge, dim)
            key = walk.blocks(x, hidden, moments, weights.blocks)

            def project(desk, piece):
                rms_project(key[piece.flat], folded, weights.bias, eps, target.view(-1, dim)[piece.flat])

            walk.each(project)

        for tensors in zip(from_image, from_features, out, strict=True):
            picture(*tensors)
    return out.to(from_image.dtype)


def _reflected(n, device):
    """Places of an axis with one more on either side, reflected; an axis of one place repeats it."""
    return (n - 1 - (n - 1 - torch.arange(-1, n + 1, device=device).abs()).abs()).clamp(0, n - 1)
