"""Large buffers on large pages of memory, some of which are kept for the next time."""

import contextlib
import math
import mmap
import os
import sys
import threading
import weakref

import torch

from ..logs import log_once


def _from_environment(name, default):
    given = os.environ.get(name, str(default))
    if not given.isdecimal():
        raise ValueError(f"{name}: need a whole number of bytes, 0 or more, got {given!r}; or leave it unset")
    return int(given)


LEAST = 4 << 20  # bytes of a buffer that is worth it
LARGE_PAGE = 2 << 20
KEPT = _from_environment("ANYUP_FAST_KEPT_BYTES", 192 << 20)  # at most, of what is in nobody's use
TRAINING = 4  # times as much may stay between the steps of a training

_lock = threading.RLock()  # a region may be given back by the garbage collector, wherever that strikes
_kept = []  # regions in nobody's use, the one longest so first
_used = {"now": 0, "most": 0}  # bytes of regions that training holds
_strict = 0  # calls at work that must stay within given bytes


def new_empty(like, shape, dtype=None, *, recorded=False):
    """`like.new_empty(shape, dtype=dtype)`, in memory that costs less to touch if it is large.

    A fresh image of 100 MB costs 25,000 interruptions on first use and the zeros that the system fills it with, a tenth
    of a forward pass on a CPU. So the system is asked for large pages, and up to `KEPT` bytes stay with the process
    when their tensors are gone, marked as free for the system to take should it run short. The environment variable
    ANYUP_FAST_KEPT_BYTES sets another limit. Only CPUs under Linux are concerned.

    What layers whose gradients are recorded allocate (`recorded`) comes back with every step of training: of it so much
    stays that it and what is in use are together no more than once were in use, and at most four times `KEPT`.
    """
    dtype = dtype or like.dtype
    size = math.prod(shape) * dtype.itemsize
    if like.device.type != "cpu" or size < LEAST or not _possible():
        return like.new_empty(shape, dtype=dtype)
    region = _taken(size) or _mapped(size)
    counted = len(region) if recorded else 0
    with _lock:
        _used["now"] += counted
        _used["most"] = max(_used["most"], _used["now"])
        _drop()
    view = memoryview(region)[_start(region) :][:size]
    weakref.finalize(view, _give_back, region, counted).atexit = False
    return torch.frombuffer(view, dtype=dtype).view(shape)


def kept(size, count, device):
    """Bytes that stay when `count` buffers of `size` bytes each are gone."""
    if device.type != "cpu" or size < LEAST or not _possible():
        return 0
    return min(count, KEPT // (size + LARGE_PAGE)) * size


def release():
    """Give what is kept back to the system, and forget how much training took."""
    with _lock:
        _used["most"] = _used["now"]
        _kept.clear()


@contextlib.contextmanager
def nothing_kept():
    """While this lasts nothing is kept, and what was is given back: for who must stay within given bytes."""
    global _strict
    with _lock:
        _strict += 1
        _drop()
    try:
        yield
    finally:
        with _lock:
            _strict -= 1


def _possible():
    return sys.platform.startswith("linux") and hasattr(mmap, "MADV_FREE")


def _taken(size):
    """The smallest region that is kept, large enough and not much larger, or None."""
    with _lock:
        fitting = [i for i, region in enumerate(_kept) if size <= len(region) - LARGE_PAGE <= size + size // 8]
        return _kept.pop(min(fitting, key=lambda i: len(_kept[i]))) if fitting else None


def _mapped(size):
    region = mmap.mmap(-1, size + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _advise(region, mmap.MADV_HUGEPAGE)
    return region


def _start(region):
    """Offset of the first large page."""
    address = torch.frombuffer(region, dtype=torch.uint8, count=1).data_ptr()
    return -address % LARGE_PAGE


def _advise(region, advice):
    try:
        region.madvise(advice)
    except OSError as error:  # it is advice: results are the same without
        log_once(f"memory: the system takes no advice on large buffers, which costs time: {error}")


def _give_back(region, counted):
    _advise(region, mmap.MADV_FREE)
    with _lock:
        _used["now"] -= counted
        _kept.append(region)
        _drop()


def _drop():
    limit = min(_used["most"] - _used["now"], TRAINING * KEPT)
    if not _used["now"]:
        limit = max(limit, KEPT)
    if _strict:
        limit = 0
    while sum(map(len, _kept)) > limit:
        _kept.pop(0)


def _forget():
    global _lock
    _lock = threading.RLock()  # another thread may have held it when the process was forked


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
