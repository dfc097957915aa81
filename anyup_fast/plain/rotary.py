"""Rotary position embedding of an image's pixels, from one table for the rows and one for the columns."""

import torch


class Rotary:
    """Rotary embedding of the pixels of an image.

    Args:
        freqs: (2, D), angles per unit of row and of column.
        size: (H, W) of the image.
        dtype: of the tables.
    """

    def __init__(self, freqs, size, dtype):
        # An angle is a part of the row plus a part of the column: its cosine and sine follow from theirs.
        self.axes = [torch.linspace(0, 1, n, dtype=torch.float64, device=freqs.device) for n in size]
        angles = [axis[:, None] * part for axis, part in zip(self.axes, freqs.double(), strict=True)]
        self.rows, self.cols = ((angle.cos().to(dtype), angle.sin().to(dtype)) for angle in angles)

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
