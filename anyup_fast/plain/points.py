"""Single output pixels in plain PyTorch: the image pixels under them, and their attention."""

import torch


def most_under(image_size, output_size):
    """Most image pixels that an output pixel and its neighbours are pooled from."""
    rows, cols = (-(-3 * n // m) + 1 if n != m else 3 for n, m in zip(image_size, output_size, strict=True))
    return rows * cols


def neighbours(places, length, pooled, like):
    """The pixels of an axis under output places and their neighbours on either side.

    Returns:
        indices (N, p), int64, and the share of each pixel in each of the three (N, 3, p), none outside the output.
    """
    ranges = [
        [(i * length // pooled, -(-(i + 1) * length // pooled)) for i in (place - 1, place, place + 1)]
        for place in places
    ]
    firsts = [max(three[0][0], 0) for three in ranges]
    most = max(min(three[2][1], length) - first for three, first in zip(ranges, firsts, strict=True))
    starts, ends = torch.tensor(ranges, device="cpu").unbind(-1)
    positions = torch.tensor(firsts, device="cpu")[:, None, None] + torch.arange(most, device="cpu")
    indices = positions[:, 0].clamp(max=length - 1)
    inside = (positions >= starts[..., None]) & (positions < ends[..., None])
    outside = torch.tensor([[not 0 <= i < pooled for i in (p - 1, p, p + 1)] for p in places], device="cpu")
    share = (inside & ~outside[..., None]).to(like) / (ends - starts)[..., None].to(like)
    return indices.to(like.device), share


def weights_at(query, key, rows, cols):
    """Weights of queries (n, heads, d) over their windows (n, 2): (n, K), and the rows (n, p) and columns (n, q)."""
    (row_at, row_seen), (col_at, col_seen) = (_window(bounds, query.device) for bounds in (rows, cols))
    wide = torch.promote_types(query.dtype, torch.float32)
    near = key[row_at[:, :, None], col_at[:, None]].flatten(1, 2).to(wide)
    seen = (row_seen[:, :, None] & col_seen[:, None]).flatten(1)
    logits = torch.einsum("nhd,nkhd->nhk", query.to(wide), near) * query.shape[-1] ** -0.5
    return logits.masked_fill(~seen[:, None], float("-inf")).softmax(-1).mean(1), row_at, col_at


def _window(bounds, device):
    """Indices (n, p) of windows (n, 2), p the longest of them, and which belong to the window."""
    bounds = bounds.to(torch.int64)  # on the CPU: what is read off them waits for no device
    at = bounds[:, :1] + torch.arange(int(bounds.diff(dim=1).max()), device=bounds.device)
    return at.minimum(bounds[:, 1:] - 1).to(device), (at < bounds[:, 1:]).to(device)


def weighted(weights, rows, cols, value):
    """Weighted sums (n, C) of `value` (h, w, C)."""
    near = value[rows[:, :, None], cols[:, None]].flatten(1, 2).to(weights.dtype)
    return torch.einsum("nk,nkc->nc", weights, near).to(value.dtype)
