"""What single PTX instructions compute that is no function of NumPy's: bits, integers, roundings."""

import numpy as np


def ftz(x):
    """Numbers too small for a normal float32 as zeros of their sign."""
    x = np.asarray(x)
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def int_divide(a, b):
    """Quotients rounded towards zero; 0 divides into all ones (unsigned) or 0, as nothing may depend on it."""
    with np.errstate(all="ignore"):
        quotient = np.abs(np.asarray(a).astype(np.int64)) // np.maximum(np.abs(np.asarray(b).astype(np.int64)), 1)
        if np.asarray(a).dtype.kind == "u":
            return np.where(b == 0, ~np.asarray(a).dtype.type(0), np.asarray(a) // np.where(b == 0, 1, b))
        return (quotient * np.sign(a) * np.sign(b)).astype(a.dtype)


def high_product(a, b):
    """Upper 64 bits of products of unsigned numbers of 64 bits."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half
    middle = a1 * b0 + (a0 * b0 >> half)
    return a1 * b1 + (middle >> half) + ((middle & low) + a0 * b1 >> half)


def shift_left(a, count):
    """Shifts by the width or more give 0."""
    size = np.asarray(a).dtype.itemsize * 8
    return np.where(count < size, np.left_shift(a, np.minimum(count, size - 1).astype(np.asarray(a).dtype)), 0)


def shift_right(a, count):
    """Arithmetic for signed numbers; shifts by the width or more keep the sign, or give 0."""
    a = np.asarray(a)
    size = a.dtype.itemsize * 8
    shifted = np.right_shift(a, np.minimum(count, size - 1).astype(a.dtype))
    return shifted if a.dtype.kind == "i" else np.where(count < size, shifted, 0)


def bit_field(a, start, length):
    """`length` bits from `start` on, with the sign of the topmost for signed numbers."""
    a = np.asarray(a)
    size = a.dtype.itemsize * 8
    up = max(0, size - start - length)
    if length == 0:
        return np.zeros_like(a)
    return (a << up) >> min(size - 1, size - length if up else start)


def permute_bytes(a, b, selector):
    """Four bytes picked out of eight, or their signs (prmt)."""
    both = np.asarray(a).astype(np.uint64) | np.asarray(b).astype(np.uint64) << np.uint64(32)
    out = np.uint64(0)
    for n in range(4):
        pick = (np.asarray(selector) >> (4 * n)).astype(np.uint64) & np.uint64(15)
        byte = both >> ((pick & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
        byte = np.where(pick & np.uint64(8), np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
        out = out | byte << np.uint64(8 * n)
    return out.astype(np.uint32)


def logic3(a, b, c, table):
    """Any function of three bits, by its table (lop3)."""
    out = np.zeros_like(a | b | c)
    for n in range(8):
        if table >> n & 1:
            out = out | ((a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c))
    return out


def funnel(low, high, count, left, wrap):
    """32 of the 64 bits of two words (shf)."""
    count = (count & 31 if wrap else np.minimum(count, 32)).astype(np.uint64)
    both = np.asarray(high).astype(np.uint64) << np.uint64(32) | np.asarray(low)
    return (both << count >> np.uint64(32) if left else both >> count).astype(np.uint32)


def round_bf16(x):
    """Float32 as bits of bfloat16, to the nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    out = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, out).astype(np.uint16)


def round_f16(x):
    """Floats as bits of float16, to the nearest even."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), np.asarray(x).astype(np.float16).view(np.uint16))


def round_tf32(x, away):
    """Bits of float32 with 10 bits of mantissa, to the nearest: even, or away from zero."""
    x = np.asarray(x)
    bits = x.view(np.uint32)
    rounded = bits + 0x1000 if away else bits + 0xFFF + (bits >> 13 & 1)
    return np.where(np.isfinite(x.view(np.float32)), rounded & 0xFFFFE000, bits)


def wide_bf16(x):
    """Bits of bfloat16 as float32."""
    return (np.asarray(x).astype(np.uint32) << 16).view(np.float32)


def to_integer(x, how, kind):
    """Floats as integers, rounded as `how` says, kept in range."""
    x = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[how](np.asarray(x, np.float64))
    limits = np.iinfo(kind)
    return np.clip(np.nan_to_num(x, nan=0.0), float(limits.min), float(limits.max)).astype(kind)


# What the generated code calls, by the names it uses.
FUNCTIONS = {
    **{
        name: getattr(np, name)
        for name in (
            *("copyto", "add", "subtract", "multiply", "divide", "negative", "absolute", "minimum", "maximum", "where"),
            *("fmin", "fmax", "bitwise_and", "bitwise_or", "bitwise_xor", "invert", "logical_and", "logical_or"),
            *("logical_xor", "logical_not", "less", "less_equal", "greater", "greater_equal", "equal", "not_equal"),
            *("isnan", "exp2", "log2", "sqrt", "sin", "cos", "longdouble"),
        )
    },
    "reciprocal": lambda x: np.float32(1) / x,
    "reciprocal_root": lambda x: np.float32(1) / np.sqrt(x),
    **{
        function.__name__: function
        for function in (
            *(ftz, int_divide, high_product, shift_left, shift_right, bit_field, permute_bytes, logic3, funnel),
            *(round_bf16, round_f16, round_tf32, wide_bf16, to_integer),
        )
    },
}
