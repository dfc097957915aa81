"""Threads that work on what they are given, and that no exit of the program waits for."""

import queue
import threading
import time
from concurrent.futures import Future, wait

TICK = 0.1  # seconds between two looks at whether to stop


class Pool:
    """`count` daemon threads; `submit` gives a Future, as those of `concurrent.futures` do.

    Args:
        count: threads. start: called by each first.
    """

    def __init__(self, count, start=None):
        self._tasks = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, args=(start,), daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _work(self, start):
        if start is not None:
            start()
        while (task := self._tasks.get()) is not None:
            future, function, arguments = task
            try:
                answer = function(*arguments)
            except BaseException as error:  # whoever asks for the result is told
                future.set_exception(error)
            else:
                future.set_result(answer)
                del answer
            del task, future, arguments

    def submit(self, function, *arguments):
        """Have a thread call a function."""
        future = Future()
        self._tasks.put((future, function, arguments))
        return future

    def close(self):
        """Let the threads end when they have done what they were given; waits for nobody."""
        for _ in self._threads:
            self._tasks.put(None)


def result_of(future, stop=lambda: None, until=None):
    """Wait for a Future: whether it is done before `stop` says a number or the clock `until`."""
    while not future.done():
        if stop() or until is not None and time.monotonic() > until:
            return False
        wait([future], TICK)
    return True
