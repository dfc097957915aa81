"""Large buffers on large pages of memory, some of which are kept for the next time."""

import collections
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
KEPT = _from_environment("ANYUP_FAST_KEPT_BYTES", 128 << 20)
MOST = 9  # times as much may be kept, where so much has been in use at once

_lock = threading.Lock()
_returned = collections.deque()  # (span, recorded) of tensors that are gone; the garbage collector strikes anywhere
_regions = []
_used = {"now": 0, "most": 0, "recorded": 0}  # bytes in use, the most at once, and those that training holds
_strict = 0  # calls at work that must stay within given bytes


def new_empty(like, shape, dtype=None, *, recorded=False):
    """`like.new_empty(shape, dtype=dtype)`, in memory that costs less to touch if it is large.

    A fresh image of 100 MB costs 25,000 interruptions on first use and the zeros that the system fills it with, a tenth
    of a forward pass on a CPU and a third on a virtual machine whose host takes freed memory back. So the system is
    asked for large pages, and memory stays with the process when its tensors are gone, marked as free for the system to
    take should it run short. A result as large as a former one comes where that one was, once nobody has it any more.

    What is kept and what is in use are together no more than once were in use plus `KEPT` bytes, and at most `MOST`
    times `KEPT` are kept; the environment variable ANYUP_FAST_KEPT_BYTES sets another `KEPT`. While training holds
    memory (`recorded`: by layers whose gradients are recorded) they are no more than once were in use. Only CPUs under
    Linux are concerned.
    """
    dtype = dtype or like.dtype
    size = math.prod(shape) * dtype.itemsize
    if like.device.type != "cpu" or size < LEAST or not _possible():
        return like.new_empty(shape, dtype=dtype)
    with _locked():
        span = _taken(-(-size // LARGE_PAGE) * LARGE_PAGE)
        _count(len(span), recorded)
    view = memoryview(span.region.memory)[span.start :][:size]
    weakref.finalize(view, _give_back, span, recorded).atexit = False
    return torch.frombuffer(view, dtype=dtype).view(shape)


def kept(size, count, device):
    """Bytes that stay when `count` buffers of `size` bytes each are gone and others are in use."""
    if device.type != "cpu" or size < LEAST or not _possible():
        return 0
    return min(count, KEPT // (-(-size // LARGE_PAGE) * LARGE_PAGE)) * size


def release():
    """Give what is kept back to the system, and forget how much was in use."""
    with _locked():
        _used["most"] = _used["now"]
        _drop(0)


@contextlib.contextmanager
def nothing_kept():
    """While this lasts nothing is kept, and what was is given back: for who must stay within given bytes."""
    global _strict
    with _locked():
        _strict += 1
    try:
        yield
    finally:
        with _locked():
            _strict -= 1


def bytes_kept():
    """Bytes that are in nobody's use and may still be the process's."""
    with _locked():
        return sum(len(span) for span in _hot())


class Room:
    """Buffers of one worker, by name: the same memory time and again."""

    def __init__(self):
        self._buffers = {}

    def buffer(self, name, shape, like, dtype=None):
        """A tensor of that shape, or so many numbers, in the dtype of `like` or another, until the name comes again."""
        numbers = shape if isinstance(shape, int) else math.prod(shape)
        dtype = dtype or like.dtype
        found = self._buffers.get((name, dtype))
        if found is None or found.numel() < numbers:
            found = self._buffers[name, dtype] = like.new_empty(numbers, dtype=dtype)
        return found[:numbers].view(shape)


class _Span:
    """Bytes [start, stop) of a region; whether they are free, and whether they may still be the process's."""

    def __init__(self, region, start, stop):
        self.region, self.start, self.stop = region, start, stop
        self.free = self.hot = False

    def __len__(self):
        return self.stop - self.start


class _Region:
    """Memory from the system, cut into spans that lie side by side."""

    def __init__(self, size):
        self.memory = mmap.mmap(-1, size + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _advise(self.memory, mmap.MADV_HUGEPAGE)
        start = -torch.frombuffer(self.memory, dtype=torch.uint8, count=1).data_ptr() % LARGE_PAGE
        self.spans = [_Span(self, start, start + size)]

    def cut(self, span, size):
        """The first bytes of a span as one of its own."""
        rest = _Span(self, span.start + size, span.stop)
        rest.free, rest.hot = span.free, span.hot
        span.stop = rest.start
        if len(rest):
            self.spans.insert(self.spans.index(span) + 1, rest)

    def merge(self, span):
        """Make one of a free span and its free neighbours, the last to be given to the system."""
        at = self.spans.index(span)
        for other in self.spans[at + 1 : at + 2] + self.spans[max(at - 1, 0) : at]:
            if other.free:
                span.start, span.stop = min(span.start, other.start), max(span.stop, other.stop)
                self.spans.remove(other)


def _possible():
    return sys.platform.startswith("linux") and hasattr(mmap, "MADV_FREE")


@contextlib.contextmanager
def _locked():
    with _lock:
        _take_back()
        yield
        _take_back()
        _drop()
    _settle()


def _settle():
    """Take back what came while another thread, or this one at a garbage collection, held the lock."""
    while _returned and _lock.acquire(blocking=False):
        try:
            _take_back()
            _drop()
        finally:
            _lock.release()


def _give_back(span, recorded):
    _returned.append((span, recorded))
    _settle()


def _take_back():
    while _returned:
        span, recorded = _returned.popleft()
        _advise(span.region.memory, mmap.MADV_FREE, span.start, len(span))
        _count(-len(span), recorded)
        span.free = span.hot = True
        span.region.merge(span)
        _regions.remove(span.region)
        _regions.append(span.region)  # the one that has been left alone longest is the first to go


def _count(size, recorded):
    _used["now"] += size
    _used["most"] = max(_used["most"], _used["now"])
    _used["recorded"] += size if recorded else 0


def _taken(size):
    """The smallest free span that is large enough, cut to size, or a new one."""
    fitting = [span for region in _regions for span in region.spans if span.free and len(span) >= size]
    if fitting:
        span = min(fitting, key=lambda span: (len(span), not span.hot))
        span.region.cut(span, size)
    else:
        _drop(coming=size)
        region = _Region(size)
        _regions.append(region)
        (span,) = region.spans
    span.free = span.hot = False
    return span


def _hot():
    return [span for region in _regions for span in region.spans if span.free and span.hot]


def _limit(coming=0):
    if _strict:
        return 0
    now = _used["now"] + coming
    room = max(_used["most"], now) - now + (0 if _used["recorded"] else KEPT)
    return min(room, MOST * KEPT)


def _drop(limit=None, coming=0):
    """Give spans to the system until no more than the limit is kept: whole regions where nothing of them is in use."""
    limit = _limit(coming) if limit is None else limit
    spans = _hot()
    excess = sum(map(len, spans)) - limit
    for span in spans:
        if excess <= 0:
            break
        excess -= len(span)
        span.hot = False
        if len(span.region.spans) == 1:
            _regions.remove(span.region)
            span.region.memory = None  # now, for regions and spans refer to each other
        else:
            _advise(span.region.memory, mmap.MADV_DONTNEED, span.start, len(span))


def _advise(memory, advice, *where):
    try:
        memory.madvise(advice, *where)
    except OSError as error:  # it is advice: results are the same without
        log_once(f"memory: the system takes no advice on large buffers, which costs time: {error}")


def _forget():
    global _lock
    _lock = threading.Lock()  # another thread may have held it when the process was forked


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
