"""Work on a CPU in pieces, each by one thread from its beginning to its end.

PyTorch cuts every operation into a share for each thread. The shares of one operation are not those of the next, so
that data wander between the cores' caches, and every operation waits for its slowest share; beside another busy program
that wait can be long. Here each thread has pieces of its own and does everything on them alone, which also leaves
products and copies of a few megabytes in its own cache. What lies between the pieces is done by one of these threads,
the leader: in the caller's thread every small operation would wake PyTorch's own team, which then spins beside us.
"""

import functools
import os
import threading
from collections import deque
from concurrent.futures import Future, wait
from itertools import accumulate
from queue import SimpleQueue

import torch

from ..endings import closing, step, waiting
from . import products

MOST = 16  # workers, for they take turns in the interpreter; where there are more threads, each worker has several

_lock = threading.Lock()
_crews = {}  # number of threads: _Crew
_inside = threading.local()  # of a crew's threads: `size`, what `crew_size` says; `crew` and `call` of the leader


def crew_size(device):
    """How many pieces are worked on at once by the calling thread's leave: its `torch.get_num_threads()`, or one."""
    if device.type != "cpu":
        return 1
    return getattr(_inside, "size", None) or (1 if closing() else min(MOST, torch.get_num_threads()))


def led(function):
    """Decorator: `function(tensor, ...)` is called in the leader's thread, if the tensor is on a CPU of many threads.

    Of the caller's settings, inference mode, whether gradients are recorded and the precision of products go with it.
    """

    @functools.wraps(function)
    def call(tensor, *args, **kwargs):
        if hasattr(_inside, "size"):
            return function(tensor, *args, **kwargs)
        with step():
            if crew_size(tensor.device) == 1:
                with products.asking(products.asked()):  # before it turns autocast off
                    return function(tensor, *args, **kwargs)
            return _crew(torch.get_num_threads()).lead(functools.partial(function, tensor, *args, **kwargs))

    return call


def share_out(work, items, desks, in_order=False, costs=None):
    """Call `work(desk, item)` for every item.

    Args:
        work: must write to nothing that another desk writes to. Its gradients are not recorded.
        items: a list.
        desks: what each of at most `crew_size` workers has for itself.
        in_order: give each desk a run of neighbouring items, so that what it gathers is the same every time; else the
            next item goes to whoever is free.
        costs: of the items, to make the runs of equal cost; else they have as many items.

    Raises:
        What the work raises first (by the order of the desks), once no worker is at it any more.
    """
    if len(desks) == 1:
        for item in items:
            work(desks[0], item)
    elif hasattr(_inside, "crew"):
        _inside.crew.share_out(work, items, desks, in_order, costs)
    else:
        with step():
            crew = _crew(torch.get_num_threads())
            crew.lead(functools.partial(crew.share_out, work, items, desks, in_order, costs))


class _Call:
    stopped = False  # the caller waits no longer


class _Pool:
    """Threads that take tasks as they come until the process ends, which its main thread may come to earlier."""

    def __init__(self, size):
        self._tasks, self._size = SimpleQueue(), 0
        try:
            for number in range(size):
                threading.Thread(target=self._work, name=f"anyup_fast_{number}", daemon=True).start()
                self._size += 1
        except RuntimeError:  # no more threads to be had
            self.dismiss()
            raise

    def submit(self, function, *arguments):
        future = Future()
        self._tasks.put((future, function, arguments))
        return future

    def dismiss(self):
        for _ in range(self._size):
            self._tasks.put(None)

    def _work(self):
        while (task := self._tasks.get()) is not None:
            future, function, arguments = task
            with step(own=True):
                try:
                    future.set_result(function(*arguments))
                except BaseException as error:
                    future.set_exception(error)
            del task, future, function, arguments  # not until the next one comes


class _Crew:
    """A leader and as many others as make `min(MOST, threads)`."""

    def __init__(self, threads):
        self.size = min(MOST, threads)
        self._leader = _Pool(1)
        try:
            self._others = _Pool(self.size - 1)
        except RuntimeError:
            self._leader.dismiss()
            raise
        met = threading.Barrier(self.size)

        def start(leads):
            _inside.size = self.size if leads else 1
            if leads:
                _inside.crew = self
            torch.get_num_threads()  # a thread takes over the setting of others when it first asks: now, not later
            torch.set_num_threads(threads // self.size)
            met.wait()

        starting = [self._leader.submit(start, True)]
        starting += [self._others.submit(start, False) for _ in range(self.size - 1)]
        for future in starting:
            future.result()
        # What a thread sets is also what threads started later begin with: leave that as it was.
        torch.set_num_threads(threads)

    def lead(self, function):
        """What `function` returns or raises in the leader's thread; an interrupted caller stops it at the next item."""
        inference, recorded, call = torch.is_inference_mode_enabled(), torch.is_grad_enabled(), _Call()
        asked = products.asked()

        def run():
            _inside.call = call
            with torch.inference_mode(inference), torch.set_grad_enabled(recorded), products.asking(asked):
                return function()

        future = self._leader.submit(run)
        try:
            with waiting():
                return future.result()
        finally:
            if not future.done():
                call.stopped = True
                wait([future])

    def share_out(self, work, items, desks, in_order, costs):
        """`share_out` from the leader's thread, who works along."""
        edges = _edges(costs or [1] * len(items), len(desks))
        queue, call = deque(items), _inside.call
        ranges = zip(edges[:-1], edges[1:], strict=True)
        parts = [items[first:last] if in_order else _taken(queue) for first, last in ranges]
        inference, asked = torch.is_inference_mode_enabled(), products.asked()

        def run(desk, part):
            with torch.inference_mode(inference), torch.no_grad(), products.asking(asked):
                for item in part:
                    if call.stopped:
                        raise InterruptedError("the caller was interrupted")
                    work(desk, item)

        running = [self._others.submit(run, desk, part) for desk, part in zip(desks[1:], parts[1:], strict=True)]
        _inside.size = 1
        try:
            run(desks[0], parts[0])
        finally:
            _inside.size = self.size
            with waiting():
                wait(running)
        for future in running:
            future.result()


def _edges(costs, runs):
    """Where to cut items into runs of about equal cost: `runs` + 1 indices."""
    before = [0, *accumulate(costs)]  # of the first items
    inner = [before[-1] * k / runs for k in range(1, runs)]
    return [0, *(min(range(len(before)), key=lambda i: abs(before[i] - cost)) for cost in inner), len(costs)]


def _taken(queue):
    while queue:
        try:
            yield queue.popleft()
        except IndexError:  # somebody else has taken the last one
            return


def _crew(threads):
    with _lock:
        if threads not in _crews:
            _crews[threads] = _Crew(threads)
        return _crews[threads]


def _forget():
    global _lock
    _lock = threading.Lock()
    _crews.clear()
    _inside.__dict__.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)  # a forked process has none of the threads
