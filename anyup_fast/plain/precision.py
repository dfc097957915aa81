"""How precisely float32 is multiplied: the door to `cpu.products` for who does not compute."""

from contextlib import nullcontext

from ..cpu.products import choice, explained, requested, use_precision

__all__ = ["as_asked", "explained", "fast_in_bfloat16", "requested", "use_precision"]


def as_asked(precision):
    """`use_precision(precision)`, or nothing for None."""
    return nullcontext() if precision is None else use_precision(precision)


def fast_in_bfloat16():
    """Whether this processor multiplies bfloat16 faster than float32."""
    return choice().bfloat16 == "fast"
