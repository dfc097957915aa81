"""The scales that numbers of a picture are written in: which whole numbers are black and white. Needs no PyTorch."""

import numpy as np

from .logs import warn_caller

ROUNDING = 1e-4  # how far float pictures may leave their range and still be clipped without complaint

_DEPTHS = (8, 10, 12, 14)  # bits of what cameras write into 16


def whole_numbers(dtype, low, high, name, some):
    """Full scale of an integer picture without `value_range`: 255 or 65535.

    Args:
        dtype: its name, with "torch." before it that of a tensor. low, high: its extremes.
        some: callable that gives its values as a numpy array of integers.

    Raises:
        ValueError: the type does not say which values are black and white.
    """
    kind = dtype.removeprefix("torch.")
    if kind not in ("uint8", "uint16"):
        known = (
            "uint8 or float in [0, 1] (or uint16)" if dtype.startswith("torch.") else "uint8, uint16 or float in [0, 1]"
        )
        remedy = f" with values from {low} to {high}: write value_range={guess(low, high)} if these are black and white"
        if kind == "bool":
            remedy = ": a mask is no picture; write value_range=(0, 1) to have False black and True white"
        raise ValueError(f"{name} must be {known}, got {dtype}{remedy}")
    if kind == "uint8":
        if (low, high) == (0, 1):
            warn_caller(
                "source: the values are 0 and 1, both black among 255: write value_range=(0, 1) if it is a mask, "
                "value_range=(0, 255) if it is meant"
            )
        return 255
    depth = Depth()
    depth.see(some())
    depth.judge()
    return 65535


class Depth:
    """How many bits the values of a 16-bit picture fill, seen in parts."""

    def __init__(self):
        self.high, self.bits, self.scaled = 0, 0, True

    def see(self, values):
        """Take in an array of integers."""
        self.high = max(self.high, int(values.max()))
        self.bits |= int(np.bitwise_or.reduce(values, axis=None))
        self.scaled = self.scaled and not (values % 257).any()  # as 8 bits are scaled to 16

    def judge(self):
        """Warn where they fill but the lower bits, unless the steps between them are those of a scaled picture."""
        depth = next((bits for bits in _DEPTHS if self.high < 1 << bits), None)
        if depth is None or self.scaled or not self.bits & 3:
            return
        warn_caller(
            f"source: 16-bit values that fill {depth} bits from below, as cameras write them, are read as nearly "
            f"black: write value_range=(0, {(1 << depth) - 1}) if that is white, value_range=(0, 65535) if it is meant"
        )


def guess(low, high):
    """The value_range that values from `low` to `high` were most probably made for."""
    if low >= -1 - ROUNDING and high <= 1 + ROUNDING:
        return (0, 1) if low >= 0 else (-1, 1)
    if low < 0:
        return f"({low:g}, {high:g})"
    bits = next((bits for bits in (*_DEPTHS, 16) if high < 1 << bits), None)
    return f"(0, {high:g})" if bits is None else (0, (1 << bits) - 1)
