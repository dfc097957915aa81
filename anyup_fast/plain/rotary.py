"""Rotary position embedding of an image's pixels, from one table for the rows and one for the columns."""

from functools import lru_cache

import torch

from .width import wide_of

HALF = 4096  # two numbers of half a float32's bits have a product that is exact in float32


class Rotary:
    """Rotary embedding of the pixels of an image.

    Args:
        freqs: (2, D), angles per unit of row and of column.
        size: (H, W) of the image.
        dtype: of the tables.
    """

    def __init__(self, freqs, size, dtype):
        # An angle is a part of the row plus a part of the column: its cosine and sine follow from theirs.
        wide = wide_of(freqs.device, dtype)
        self.axes = [_places(n) if freqs.device.type == "cpu" else _axis(n, freqs.device, wide) for n in size]
        if wide == torch.float64:
            angles = [axis[:, None] * part for axis, part in zip(self.axes, freqs.double(), strict=True)]
            self.rows, self.cols = ((angle.cos().to(dtype), angle.sin().to(dtype)) for angle in angles)
        else:
            size = tuple(size)
            self.rows, self.cols = zip(*(part.split(size) for part in _turned(size, freqs.to(wide))), strict=True)

    def __call__(self, x, rows, cols, scratch=None):
        """Rotate `x` (..., D) at `rows`, `cols` (see `Guide.guide`); `scratch`: three tensors like it to use."""
        cos, sin, out = scratch or (torch.empty_like(x) for _ in range(3))
        self.angles(rows, cols, cos, sin)
        half = x.shape[-1] // 2
        torch.mul(x, cos, out=out)
        out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return out

    def angles(self, rows, cols, cos, sin):
        """Fill `cos` and `sin` (..., D) for the pixels at `rows`, `cols`."""
        row_cos, row_sin = (table[rows] for table in self.rows)
        col_cos, col_sin = (table[cols] for table in self.cols)
        if isinstance(rows, slice):
            row_cos, row_sin = row_cos[:, None], row_sin[:, None]
        torch.mul(row_cos, col_cos, out=cos).addcmul_(row_sin, col_sin, value=-1)
        torch.mul(row_sin, col_cos, out=sin).addcmul_(row_cos, col_sin)


def _places(n):
    return torch.linspace(0, 1, n, dtype=torch.float64, device="cpu")


@lru_cache(maxsize=64)
def _axis(n, device, dtype):
    with torch.inference_mode(False):  # they are kept, for training too
        return _places(n).to(device, dtype)


@lru_cache(maxsize=64)
def _parts(size, device):
    """Places of both axes, one after the other, as float32 (places, 1): leading bits, the rest; and whose they are."""
    with torch.inference_mode(False):
        axes = torch.cat([_places(n) for n in size])
        coarse = (axes * HALF).floor() / HALF
        whose = torch.arange(2).repeat_interleave(torch.tensor(size))
        return (*torch.stack((coarse, axes - coarse)).to(torch.float32).to(device)[..., None], whose.to(device))


def _turned(size, freqs):
    """Cosine and sine (H + W, D) of the products of the places of both axes and their float32 `freqs` (2, D).

    An angle in float32 is off by several times what its sine is. So both factors are cut in two: the product of the
    leading halves is exact, and the rest is small.
    """
    coarse, fine, whose = _parts(size, freqs.device)
    freqs = freqs.index_select(0, whose)
    leading = (freqs.view(torch.int32) & -HALF).view(torch.float32)
    angles = freqs.new_empty(2, *freqs.shape)
    torch.mul(coarse, leading, out=angles[0])
    torch.mul(coarse, freqs - leading, out=angles[1]).addcmul_(fine, freqs)
    (cos, cos_rest), (sin, sin_rest) = angles.cos(), angles.sin()
    return (cos * cos_rest).addcmul_(sin, sin_rest, value=-1), (sin * cos_rest).addcmul_(cos, sin_rest)
