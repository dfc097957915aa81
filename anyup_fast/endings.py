"""The end of a process while other threads compute: they are brought to rest first.

Python ends a daemon thread where it next asks for the interpreter, by unwinding its stack, which C++ code answers by
aborting the process. So at exit whoever computes here is waited for, and sleeps from its next step on.
"""

import atexit
import os
import threading
import time
from contextlib import contextmanager

LONGEST = 10.0  # seconds to wait for a step
BETWEEN = 0.05  # seconds in which a thread between two steps comes to the next


class _Gate:
    def __init__(self):
        self.changed = threading.Condition()
        self.busy = 0  # threads at a step
        self.several = False  # threads besides the main one have computed
        self.last = None  # the thread that ends the process


_gate = _Gate()
_mine = threading.local()  # `depth`: of the steps that the thread is in


@contextmanager
def step(own=False):
    """What is computed in here is waited for at the end of the process; afterwards, and before, a thread may sleep.

    Args:
        own: by a thread of this package, which sleeps between its steps.
    """
    depth = getattr(_mine, "depth", 0)
    if depth and _closed():
        _count(-1)
        _sleep()
    if not depth:
        _enter(own)
    _mine.depth = depth + 1
    try:
        yield
    finally:
        _mine.depth = depth
        if not depth:
            _leave()


@contextmanager
def waiting():
    """Within a step: a wait for other threads, in which nothing is computed."""
    _count(-1)
    try:
        yield
    finally:
        _enter(own=True)


def _enter(own):
    with _gate.changed:
        if not _closed():
            _gate.busy += 1
            _gate.several |= not own and threading.current_thread() is not threading.main_thread()
            return
    _sleep()


def _leave():
    _count(-1)
    if _closed():
        _sleep()


def _count(change):
    with _gate.changed:
        _gate.busy += change
        _gate.changed.notify_all()


def _closed():
    return _gate.last is not None and _gate.last != threading.get_ident()


def _sleep():
    """For good: a lock that nobody releases never asks for the interpreter again."""
    never = threading.Lock()
    never.acquire()
    never.acquire()


def closing():
    """Whether the process ends: other threads than the one that ends it do nothing any more."""
    return _gate.last is not None


@atexit.register
def _close():
    with _gate.changed:
        _gate.last = threading.get_ident()
        several = _gate.several
    end = time.monotonic() + LONGEST
    quiet = 0
    while several and quiet < BETWEEN and time.monotonic() < end:
        time.sleep(0.005)
        with _gate.changed:
            quiet = 0 if _gate.busy > 0 else quiet + 0.005


def _forget():
    _gate.__init__()
    _mine.__dict__.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)  # the other threads are not there
