"""The engine on one machine: processes decode, threads of this one compute and write.

On a CPU several pictures are computed at a time, each by one thread: nobody waits for the slowest of a team, which
costs a fifth on an idle machine, and much more on one that decodes and writes besides. On a CUDA device two batches are
in work, each by a thread with a stream of its own: what one of them copies to the host, the other computes beside.
"""

import os
import signal
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch.utils.data import DataLoader, Dataset

from .stages import Reader, Upsampler, Writer, lanes

AHEAD = 2  # batches that every decoding process prepares
MOST_AT_A_TIME = 8  # batches that a CPU computes at a time, unless told otherwise


class _Batches(Dataset):
    """Batches of sources, read when they are asked for."""

    def __init__(self, batches, reader):
        self.batches, self.reader = batches, reader

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        sources, names = self.batches[index]
        return [self.reader(source) for source in sources], names


class LocalEngine:
    """Calling it with batches, `stopped` (tells when to stop) and `done` gives `done` each picture as it is written.

    Attributes:
        waits: what this process waited for -> seconds.
    """

    def __init__(self, settings, folder, device, patch, workers, at_a_time, writers, ray_address):
        self.settings, self.folder, self.device, self.writers = settings, folder, device, writers
        self.reader = Reader(settings, patch)
        self.workers = min(4, max(1, (os.cpu_count() or 1) - 1)) if workers is None else workers
        if at_a_time is None:
            at_a_time = min(MOST_AT_A_TIME, torch.get_num_threads()) if device == "cpu" else lanes(device)
        self.at_a_time = at_a_time
        self.waits = {}

    def __call__(self, batches, stopped, done):
        # The processes are made before threads and models are: where they are forked they inherit neither. On a GPU its
        # context is there already, which they make no use of.
        ahead = {"prefetch_factor": AHEAD, "worker_init_fn": _calm} if self.workers else {}
        loader = DataLoader(
            _Batches(batches, self.reader), batch_size=None, collate_fn=_as_it_is, num_workers=self.workers, **ahead
        )
        arriving = iter(loader)
        upsampler = Upsampler(self.settings, self.folder, self.device)
        with _sharing_threads(self.at_a_time, self.device) as start, ThreadPoolExecutor(self.writers) as writers:
            writing = _Writing(writers, Writer(self.settings, self.folder), 2 * self.writers, done)
            computing = deque()
            with ThreadPoolExecutor(self.at_a_time, initializer=start) as computers:
                try:
                    while not stopped():
                        if len(computing) <= self.at_a_time:
                            batch = self._timed("waiting for pictures", _next, arriving, stopped)
                            if batch is not None:
                                computing.append((computers.submit(upsampler, batch[0]), batch[1]))
                                continue
                        if not computing:
                            break
                        writing.add(*self._computed(computing))
                finally:
                    try:
                        while computing:  # what is in work is finished
                            writing.add(*self._computed(computing))
                    finally:
                        computing.clear()
                        writing.finish()

    def _computed(self, computing):
        """The pictures of the oldest batch, those that are to be written."""
        computed, names = computing.popleft()
        pictures = self._timed("waiting for answers", computed.result)
        return [picture for picture in pictures if picture.source.name in names]

    def _timed(self, what, function, *arguments):
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


class _Writing:
    """Pictures on their way to the disk, at most `limit` of them, told to `done` in order."""

    def __init__(self, pool, writer, limit, done):
        self.pool, self.writer, self.limit, self.done = pool, writer, limit, done
        self.pending = deque()

    def add(self, *pictures):
        for picture in pictures:
            self.pending.append(self.pool.submit(self.writer, picture))
        while self.pending and (len(self.pending) > self.limit or self.pending[0].done()):
            self.done(self.pending.popleft().result())

    def finish(self):
        """Wait for all of them, whatever ended the run; then raise the first failure."""
        failures = []
        while self.pending:
            try:
                self.done(self.pending.popleft().result())
            except OSError as error:
                failures.append(error)
        if failures:
            raise failures[0]


def _next(arriving, stopped):
    """The next batch; None at the end, or where a signal to all processes has ended those that decode."""
    try:
        return next(arriving, None)
    except RuntimeError:
        if stopped():
            return None
        raise


def _as_it_is(batch):
    return batch


def _calm(_):
    """A decoding process yields to computing, and leaves signals to the process that has it."""
    if hasattr(os, "nice"):
        os.nice(10)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
