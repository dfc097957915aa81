"""The engine on one machine: processes decode, threads of this one compute and write.

On a CPU several pictures are computed at a time, each by one thread: nobody waits for the slowest of a team, which
costs a fifth on an idle machine, and much more on one that decodes and writes besides. On a CUDA device two batches are
in work, each by a thread with a stream of its own: what one of them copies to the host, the other computes beside.
"""

import time
from collections import deque
from contextlib import contextmanager

import torch

from .pool import Pool, result_of
from .stages import Upsampler, Writer, lanes
from .stopping import GRACE

MOST_AT_A_TIME = 8  # batches that a CPU computes at a time, unless told otherwise


class LocalEngine:
    """Calling it with batches, a `Stop` and `done` gives `done` each picture as it is written.

    Args:
        decoders: open `Decoders`. encoder: that of the settings, on the device.

    Attributes:
        waits: what this process waited for -> seconds. abandoned: whether something is still being computed.
    """

    def __init__(self, settings, folder, device, at_a_time, writers, decoders, encoder):
        self.settings, self.folder, self.device, self.writers = settings, folder, device, writers
        if at_a_time is None:
            at_a_time = min(MOST_AT_A_TIME, torch.get_num_threads()) if device == "cpu" else lanes(device)
        self.at_a_time, self.decoders, self.encoder = at_a_time, decoders, encoder
        self.waits, self.abandoned = {}, False

    def __call__(self, batches, stop, done):
        upsampler = Upsampler(self.settings, self.folder, self.device, encoder=self.encoder)
        arriving = self.decoders.batches(batches, stop)
        with _sharing_threads(self.at_a_time, self.device) as start:
            work = _Work(self, upsampler, start, stop, done)
            try:
                with stop.held():
                    self._compute(work, arriving, self.at_a_time)
                    # What ran out of memory beside others is tried again, alone.
                    alone = [((source,), frozenset([source.name])) for source in work.alone]
                    work.alone = None
                    self._compute(work, self.decoders.batches(alone, stop), 0)
            except KeyboardInterrupt:  # asked twice
                work.until = 0
                raise
            finally:
                with stop.held():
                    self.abandoned = not work.finish()

    def _compute(self, work, arriving, ahead):
        """Compute batches, `ahead` of them besides the one that is waited for, until there is none or it is to stop."""
        while not work.stop():
            if len(work.computing) <= ahead:
                batch = self.timed("waiting for pictures", next, arriving, None)
                if batch is not None:
                    work.compute(*batch)
                    continue
            if not work.computing:
                return
            self.timed("waiting for answers", work.collect)

    def timed(self, what, function, *arguments):
        """Call a function, and note how long that took."""
        start = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            self.waits[what] = self.waits.get(what, 0.0) + time.perf_counter() - start


@contextmanager
def _sharing_threads(count, device):
    """Give each of `count` threads its share of PyTorch's threads, and on a CUDA device a stream of its own.

    Yields what each of them calls when it starts.
    """
    total = torch.get_num_threads()
    share = max(1, total // count)

    def start():
        torch.set_num_threads(share)
        if torch.device(device).type == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream(device))

    try:
        yield start
    finally:
        torch.set_num_threads(total)


class _Work:
    """Batches that are computed and pictures on their way to the disk, told to `done` in order.

    Attributes:
        computing: (Future of pictures, names) of batches. writing: Futures of pictures.
        alone: sources that ran out of memory, to be tried again; None while they are.
    """

    def __init__(self, engine, upsampler, start, stop, done):
        self.upsampler, self.stop, self.done = upsampler, stop, done
        self.computers, self.writers = Pool(engine.at_a_time, start), Pool(engine.writers)
        self.writer, self.limit = Writer(engine.settings, engine.folder), 2 * engine.writers
        self.several = engine.at_a_time > 1
        self.computing, self.writing, self.alone = deque(), deque(), []
        self.until = None  # when to wait no longer

    def compute(self, pictures, names):
        """Have a batch computed."""
        self.computing.append((self.computers.submit(self.upsampler, pictures), names))

    def collect(self, stop=None):
        """Wait for the oldest batch and have it written; whether it came before there was reason to stop."""
        stop = stop or self.stop
        future, names = self.computing[0]
        if not result_of(future, stop):
            return False
        self.computing.popleft()
        for picture in future.result():
            if picture.source.name not in names:
                continue
            if picture.cause == "memory" and self.several and self.alone is not None:
                self.alone.append(picture.source)
                continue
            self.writing.append(self.writers.submit(self.writer, picture))
        while self.writing and (len(self.writing) > self.limit or self.writing[0].done()):
            if not self._written(stop):
                return False
        return True

    def _written(self, stop):
        if not result_of(self.writing[0], stop):
            return False
        self.done(self.writing.popleft().result())
        return True

    def _is_late(self):
        """Whether a signal came, and what is in work has had its time."""
        if self.until is None and self.stop():
            self.until = time.monotonic() + GRACE
        return self.until is not None and time.monotonic() > self.until

    def finish(self):
        """Record what is in work, whatever ended the run; whether all of it came in time."""
        in_time, failure = True, None
        while in_time and (self.computing or self.writing):
            try:
                in_time = self.collect(self._is_late) if self.computing else self._written(self._is_late)
            except OSError as error:  # the next ones may fare better; the first is told
                failure = failure or error
        self.computers.close()
        self.writers.close()
        if failure is not None:
            raise failure
        return in_time
