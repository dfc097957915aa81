"""Former home of `release`, kept for who calls it; the buffers are those of `anyup_fast.cpu.pages`."""

from ..plain.memory import release

__all__ = ["release"]
