"""Large buffers on large pages of memory."""

import ctypes
import sys
from functools import cache

LEAST = 4 << 20  # bytes of a buffer that is worth it
LARGE_PAGE = 2 << 20
MADV_HUGEPAGE = 14  # of <sys/mman.h> on Linux


def on_large_pages(x):
    """Ask the system to back a fresh tensor with large pages; returns the tensor.

    A fresh image of 100 MB otherwise costs 25,000 interruptions on first use, a tenth of a forward pass on a CPU. This
    is advice: where the system knows nothing of it, is told never to follow it (transparent_hugepage) or has no large
    page free, nothing happens. Only CPUs under Linux are concerned.
    """
    size = x.numel() * x.element_size()
    if x.device.type == "cpu" and size >= LEAST and (madvise := _madvise()) is not None:
        first, last = -(-x.data_ptr() // LARGE_PAGE), (x.data_ptr() + size) // LARGE_PAGE
        if first < last:
            madvise(first * LARGE_PAGE, (last - first) * LARGE_PAGE, MADV_HUGEPAGE)
    return x


@cache
def _madvise():
    if not sys.platform.startswith("linux"):
        return None
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is not None:
        madvise.argtypes, madvise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return madvise
