"""Work on a CPU in pieces, each by one thread from its beginning to its end.

PyTorch cuts every operation into a share for each thread. The shares of one operation are not those of the next, so
that data wander between the cores' caches, and every operation waits for its slowest share; beside another busy program
that wait can be long. Here each thread has pieces of its own and does everything on them alone, which also leaves
products and copies of a few megabytes in its own cache.
"""

import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait

import torch

MOST = 16  # workers, for they take turns in the interpreter; where there are more threads, each worker has several

_lock = threading.Lock()
_pools = {}  # number of threads: executor
_inside = threading.local()


def crew_size(device):
    """How many pieces are worked on at once by the calling thread's leave: its `torch.get_num_threads()`, or one."""
    if device.type != "cpu" or getattr(_inside, "worker", False):
        return 1
    return min(MOST, torch.get_num_threads())


def share_out(work, items, desks, in_order=False):
    """Call `work(desk, item)` for every item.

    Args:
        work: must write to nothing that another desk writes to. Its gradients are not recorded.
        items: a list.
        desks: what each of at most `crew_size` workers has for itself.
        in_order: give each desk a run of neighbouring items, so that what it gathers is the same every time; else the
            next item goes to whoever is free.

    Raises:
        What the work raises first (by the order of the desks), once no worker is at it any more.
    """
    if len(desks) == 1:
        for item in items:
            work(desks[0], item)
        return
    edges = [len(items) * k // len(desks) for k in range(len(desks) + 1)]
    queue = deque(items)
    inference = torch.is_inference_mode_enabled()

    def run(desk, part):
        with torch.inference_mode(inference), torch.no_grad():
            for item in part:
                work(desk, item)

    pool = _pool(torch.get_num_threads())
    ranges = zip(edges[:-1], edges[1:], strict=True)
    parts = [items[first:last] if in_order else _taken(queue) for first, last in ranges]
    running = [pool.submit(run, desk, part) for desk, part in zip(desks, parts, strict=True)]
    wait(running)
    for future in running:
        future.result()


def _taken(queue):
    while queue:
        try:
            yield queue.popleft()
        except IndexError:  # somebody else has taken the last one
            return


def _pool(threads):
    with _lock:
        if threads not in _pools:
            workers = min(MOST, threads)
            pool = ThreadPoolExecutor(workers, "anyup_fast")
            met = threading.Barrier(workers)

            def start():
                _inside.worker = True
                torch.get_num_threads()  # a thread takes over the setting of others when it first asks: now, not later
                torch.set_num_threads(threads // workers)
                met.wait()

            try:
                starting = [pool.submit(start) for _ in range(workers)]
            except RuntimeError:  # no more threads to be had: let those go that wait for the others
                met.abort()
                raise
            for future in starting:
                future.result()
            # What a thread sets is also what threads started later begin with: leave that as it was.
            torch.set_num_threads(threads)
            _pools[threads] = pool
        return _pools[threads]


def _forget():
    global _lock
    _lock = threading.Lock()
    _pools.clear()
    _inside.worker = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)  # a forked process has none of the threads
