"""Exact operators in plain PyTorch, for any device; memory stays flat in the number of pixels."""

import torch

from . import reference

TILE = 16


def windowed_attention(query, key, value, row_bounds, col_bounds, *, scale=None, head_mode="mean"):
    """`anyup_fast.ops.windowed_attention` tile by tile: each tile sees the rectangle its windows span."""
    row_bounds, col_bounds = row_bounds.cpu(), col_bounds.cpu()
    height, width = query.shape[1:3]
    bands = []
    for top in range(0, height, TILE):
        rows = row_bounds[top : top + TILE]
        r0, r1 = int(rows[:, 0].min()), int(rows[:, 1].max())
        tiles = []
        for left in range(0, width, TILE):
            cols = col_bounds[left : left + TILE]
            c0, c1 = int(cols[:, 0].min()), int(cols[:, 1].max())
            tiles.append(
                reference.windowed_attention(
                    query[:, top : top + TILE, left : left + TILE],
                    key[:, r0:r1, c0:c1],
                    value[:, r0:r1, c0:c1],
                    rows - r0,
                    cols - c0,
                    scale=scale,
                    head_mode=head_mode,
                )
            )
        bands.append(torch.cat(tiles, 2))
    return torch.cat(bands, 1)
