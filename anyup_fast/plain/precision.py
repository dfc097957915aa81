"""How precisely float32 is multiplied: the door to `cpu.products` for who does not compute."""

from contextlib import nullcontext

from ..cpu.products import PRECISIONS, asked, choice, chosen_again, explained, requested, use_precision
from ..logs import log_once

__all__ = [
    "PRECISIONS",
    "as_asked",
    "asked",
    "explained",
    "fast_in_bfloat16",
    "requested",
    "settle",
    "use_precision",
    "ways",
]


def as_asked(precision):
    """`use_precision(precision)`, or nothing for None."""
    return nullcontext() if precision is None else use_precision(precision)


def ways():
    """How products are done on this CPU, as `ANYUP_FAST_PRODUCTS` takes it."""
    return str(choice())


def settle(wanted):
    """Do products as `ways` said in another process, from now on in this one; a way that is missing here is logged."""
    if wanted is not None and wanted != ways():
        try:
            chosen_again(wanted)
        except RuntimeError as error:
            log_once(f"products on this CPU are not those that the run was begun with ({wanted}): {error}")


def fast_in_bfloat16():
    """Whether this processor multiplies bfloat16 faster than float32."""
    return choice().bfloat16 == "fast"
