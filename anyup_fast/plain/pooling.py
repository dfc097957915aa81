"""`adaptive_avg_pool2d` of images that come in rectangles, forward and backward."""

from bisect import bisect_left, bisect_right
from functools import lru_cache

import torch
import torch.nn.functional as F

from .width import wide_of


class Bins:
    """Ranges of one axis that `adaptive_avg_pool2d` averages to `pooled` places; of these, those in the slice `part`.

    Attributes:
        starts, ends: lists of the half-open ranges.
        needed: slice of the axis that they cover.
    """

    def __init__(self, length, pooled, part):
        places = range(pooled)[part]
        self.starts = [i * length // pooled for i in places]
        self.ends = [-(-(i + 1) * length // pooled) for i in places]
        self.needed = slice(self.starts[0], self.ends[-1])

    def __len__(self):
        return len(self.starts)

    def inside(self, part):
        """Indices of the ranges that meet a slice of the axis, as a range, and where they start and end in it."""
        met = range(bisect_right(self.ends, part.start), bisect_left(self.starts, part.stop))
        return met, [
            (max(self.starts[i], part.start) - part.start, min(self.ends[i], part.stop) - part.start) for i in met
        ]


def pooled(x, size):
    """`adaptive_avg_pool2d` of (B, H, W, D) to (B, h, w, D), in the dtype of `x`; it can be differentiated.

    Elsewhere than on CPUs by means or by products with two matrices: PyTorch's own lacks sizes that do not divide on
    some devices, and on others a backward pass that gives the same numbers every time.
    """
    if x.device.type == "cpu":
        return F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)
    batch, height, width, channels = x.shape
    if height % size[0] == 0 and width % size[1] == 0:
        return x.unflatten(2, (size[1], -1)).unflatten(1, (size[0], -1)).mean((2, 4))
    rows, cols, wide = _both_shares(x, (height, width), size)
    lines = torch.bmm(rows.mT.expand(batch, -1, -1), wide.flatten(2)).view(-1, width, channels)
    return torch.bmm(cols.mT.expand(len(lines), -1, -1), lines).view(batch, *size, channels).to(x.dtype)


def pooled_part(x, rows, cols):
    """Averages (B, rows, cols, D) over the ranges of two `Bins` of the pixels (B, r, c, D) that these need."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    shares = [_shares(n, axis, wide, axis.needed.start) for n, axis in zip(x.shape[1:3], (rows, cols), strict=True)]
    lines = torch.bmm(shares[0].mT.expand(len(x), -1, -1), wide.flatten(2)).view(-1, *x.shape[2:])
    return torch.bmm(shares[1].mT.expand(len(lines), -1, -1), lines).view(len(x), len(rows), len(cols), -1).to(x.dtype)


def pooled_backward(grad, x):
    """Gradient (B, H, W, D) of `pooled` for `x`, of which only shape and dtype count, from that (B, h, w, D)."""
    if grad.device.type == "cpu":
        grad, x = (tensor.permute(0, 3, 1, 2) for tensor in (grad, x))
        return torch.ops.aten._adaptive_avg_pool2d_backward(grad, x).permute(0, 2, 3, 1)
    batch, height, width, channels = x.shape
    rows, cols, wide = _both_shares(grad, (height, width), grad.shape[1:3])
    lines = torch.bmm(cols.expand(batch * len(rows.T), -1, -1), wide.flatten(0, 1)).view(batch, len(rows.T), -1)
    return torch.bmm(rows.expand(batch, -1, -1), lines).view(x.shape).to(x.dtype)


def _both_shares(x, size, pooled_size):
    """`_shares` of rows and columns, and `x` in their dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return *(_shares(n, Bins(n, m, slice(None)), wide) for n, m in zip(size, pooled_size, strict=True)), wide


class Pool:
    """`adaptive_avg_pool2d` of an image that comes in rectangles, or of a part of the result.

    Args:
        rows, cols: Bins of both axes.
        channels: D. like: a tensor on the device and of the dtype to sum in.
    """

    FEW = 64  # ranges of columns whose sums are a matrix product

    def __init__(self, rows, cols, channels, like):
        self.rows, self.cols = rows, cols
        self.sums = like.new_zeros(len(rows), len(cols), channels)
        self._taken = None, None

    def add(self, x, rows, cols):
        """Take in the pixels `x` (rows, cols, D) of two slices of the image."""
        if self._taken[0] != cols:
            self._taken = cols, self._taker(cols)
        take, met = self._taken[1]
        for i, (top, bottom) in zip(*self.rows.inside(rows), strict=True):
            self.sums[i, met.start : met.stop] += take(x[top:bottom])

    def _taker(self, cols):
        """What sums (rows, cols, D) over the ranges that meet a slice of the columns, and which these are."""
        met, places = self.cols.inside(cols)
        left, right = torch.tensor(places, device=self.sums.device).unbind(1)
        if len(met) > self.FEW and wide_of(self.sums.device, self.sums.dtype) != torch.float64:
            place = left[:, None] + torch.arange(max(end - start for start, end in places), device=left.device)
            inside = (place < right[:, None]).to(self.sums.dtype)[..., None]
            place = place.clamp_(max=cols.stop - cols.start - 1)
            return lambda x: (x.sum(0, dtype=inside.dtype)[place] * inside).sum(1), met
        if len(met) <= self.FEW:
            place = torch.arange(cols.stop - cols.start, device=self.sums.device)
            inside = ((place >= left[:, None]) & (place < right[:, None])).to(self.sums.dtype)
            return lambda x: inside @ x.sum(0, dtype=inside.dtype), met

        def differences(x):
            line = F.pad(x.sum(0, dtype=torch.float64).cumsum(0), (0, 0, 1, 0))
            return (line[right] - line[left]).to(self.sums.dtype)

        return differences, met

    def mean(self):
        """(rows, cols, D)."""
        counts = (
            torch.tensor([b - a for a, b in zip(axis.starts, axis.ends, strict=True)], device=self.sums.device)
            for axis in (self.rows, self.cols)
        )
        rows, cols = counts
        return self.sums / (rows[:, None] * cols)[..., None]


def pooled_both(walk, x, hidden, norm, size):
    """Averages of `x` and of the activation of `hidden` (both H * W, D) over `size` cells: two of (h * w, D)."""
    axes = [Bins(n, m, slice(None)) for n, m in zip(walk.size, size, strict=True)]

    def add(desk, piece, pools):
        for source, pool in zip((x[piece.flat], desk.active(hidden, piece.flat, norm)), pools, strict=True):
            shape = piece.rows.stop - piece.rows.start, piece.cols.stop - piece.cols.start, x.shape[1]
            pool.add(source.view(shape), piece.rows, piece.cols)

    parts = walk.gathered(add, lambda: [Pool(*axes, x.shape[1], like=x) for _ in range(2)])
    for pools in parts[1:]:
        for pool, other in zip(parts[0], pools, strict=True):
            pool.sums += other.sums
    return [pool.mean().flatten(0, 1) for pool in parts[0]]


class Unpool:
    """The way back through `adaptive_avg_pool2d`: each pixel gets its part of the gradient (h, w, D) of the cells.

    Args:
        grad: (h, w, D). size: (H, W) of the image.
    """

    def __init__(self, grad, size):
        self._bins, cols = (Bins(n, m, slice(None)) for n, m in zip(size, grad.shape[:2], strict=True))
        self._shares = _shares(size[0], self._bins, grad)
        self._lines = torch.matmul(_shares(size[1], cols, grad), grad)  # (h, W, D)

    def __call__(self, piece, out):
        """Fill `out` (P, D) for the pixels of a piece; returns it."""
        met, _ = self._bins.inside(piece.rows)
        met = slice(met.start, met.stop)
        shares, lines = self._shares[piece.rows, met], self._lines[met, piece.cols]
        torch.mm(shares, lines.flatten(1), out=out.view(len(shares), -1))
        return out


def _shares(length, bins, like, first=0):
    """(length, pooled): the part that each place, from `first` on, has in the average of each range."""
    place = torch.arange(first, first + length, device=like.device)[:, None]
    starts, ends = _edges(tuple(bins.starts), tuple(bins.ends), like.device)
    return ((place >= starts) & (place < ends)).to(like.dtype) / (ends - starts)


@lru_cache(maxsize=64)
def _edges(starts, ends, device):
    """Starts and ends of ranges on a device, to which they are copied once."""
    with torch.inference_mode(False):  # they are kept, for training too
        return torch.tensor((starts, ends)).to(device)
