"""Pictures that are read by rows and never held."""

import numpy as np
import torch

from .ranges import IMAGENET_MEAN, IMAGENET_STD, scaled
from .scales import ROUNDING, Depth


def rows_of(picture, like):
    """Read a picture by rows, without holding it.

    Args:
        picture: (H, W, 3), with a shape and a dtype, giving rows as an array when sliced: a numpy memmap, a zarr
            array, ...; uint8, uint16 or floats in [0, 1].
        like: tensor of the dtype (at least float32) and on the device wanted.

    Returns:
        ((1, 3, H, W), read), where read(first, last) gives ImageNet-normalised rows (last - first, W, 3).

    Raises:
        ValueError: another shape or dtype; while reading, floats that are not finite or leave [0, 1].
    """
    shape, dtype = getattr(picture, "shape", None), getattr(picture, "dtype", None)
    if shape is None or dtype is None or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise ValueError(f"image: need (H, W, 3) with a shape and a dtype, got {type(picture).__name__} {shape}")
    dtype = np.dtype(dtype)
    if dtype not in (np.uint8, np.uint16) and dtype.kind != "f":
        raise ValueError(f"image: need uint8, uint16 or floats in [0, 1], got {dtype}; give value_range")
    full = float(np.iinfo(dtype).max) if dtype.kind == "u" else 1.0
    depth, seen = Depth(), 0  # of so many rows, until all have been read once
    wide = torch.promote_types(like.dtype, torch.float32)
    mean, std = (torch.tensor(values, dtype=wide, device=like.device) for values in (IMAGENET_MEAN, IMAGENET_STD))

    def read(first, last):
        nonlocal seen
        rows = np.asarray(picture[first:last])
        if dtype == np.uint16 and first == seen:
            depth.see(rows)
            seen = last
            if last == shape[0]:
                depth.judge()
        rows = torch.from_numpy(rows.astype(np.float64 if wide == torch.float64 else np.float32)).to(like.device, wide)
        if dtype.kind == "f" and not ((rows >= -ROUNDING) & (rows <= 1 + ROUNDING)).all():
            raise ValueError(
                f"image: rows {first} to {last} hold values that are not finite or leave [0, 1]; "
                "give value_range, the values of black and white"
            )
        return (rows / full - mean) / std

    return (1, 3, *shape[:2]), read


class Scaled:
    """A picture (H, W, 3) that gives rows when sliced, with black and white at `value_range`, as floats in [0, 1]."""

    def __init__(self, picture, value_range):
        self.picture, self.value_range = picture, value_range
        self.shape, self.dtype = getattr(picture, "shape", None), np.dtype(np.float32)

    def __getitem__(self, rows):
        values = torch.from_numpy(np.asarray(self.picture[rows]).astype(np.float32))
        return scaled(values, self.value_range, "image: a part of it").numpy()
