"""Processes that decode: started afresh, not forked, spoken to through pipes, replaced when they die.

They share no memory with this process, run nothing of the program's own script, and end when this process does. A
picture at which one of them dies is given to another; where that dies too, the picture fails with the reason.
"""

import itertools
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from concurrent.futures import Future
from contextlib import suppress

import numpy as np
import torch

from .pool import result_of
from .reading import Picture, about_source
from .serving import LENGTH, READY, plugins

AHEAD = 2  # batches that every process prepares
TRIES = 2  # processes that a picture may cost

# What a process runs. The first line keeps a signal to all of a terminal, the second a module in the working folder,
# from what follows.
_PROGRAM = """\
import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN)
if sys.path[:1] == [""]: del sys.path[0]
import pickle; sys.path[:], modules = pickle.load(sys.stdin.buffer)
from anyup_fast.batch.serving import serve
serve(modules)
"""


class Decoders:
    """Reads batches of sources ahead of whoever takes them, with processes or (none) where they are taken.

    Args:
        count: processes, which begin to start at once; 0 reads in the thread that asks.

    Attributes:
        reader: the `Reader` that is used, to be set before anything is read.
    """

    def __init__(self, count):
        self.reader, self.count = None, count
        self.jobs, self.closed = queue.SimpleQueue(), threading.Event()
        # Threads that are new take the number of threads that was given last; this one has its own once it has asked.
        self.threads = torch.get_num_threads()
        self.processes = [_Decoder(self) for _ in range(count)]

    def close(self):
        """End all processes, whatever they are at."""
        self.closed.set()
        for _ in self.processes:
            self.jobs.put(None)
        for process in self.processes:
            process.stop()
        torch.set_num_threads(self.threads)

    def batches(self, batches, stop):
        """Yield ([Picture, ...], names) for each (sources, names), in order, until there is none or `stop` says so.

        Raises:
            RuntimeError: no process could be started.
        """
        batches = iter(batches)
        if not self.count:
            for sources, names in batches:
                yield [self.reader(source) for source in sources], names
            return
        coming = deque()
        while not stop():
            for sources, names in itertools.islice(batches, AHEAD * self.count + 1 - len(coming)):
                coming.append((Future(), names))
                self.jobs.put((coming[-1][0], sources))
            if not coming:
                return
            future, names = coming[0]
            if not result_of(future, stop):
                return
            coming.popleft()
            yield future.result(), names


class _Decoder:
    """One process, and the thread of this one that talks to it. Two batches are on their way: it never waits."""

    def __init__(self, decoders):
        self.decoders, self.process, self.ready, self.deaths = decoders, None, False, 0
        self.sent = deque()  # batches on their way: (future, sources, pictures that are there)
        self.tries = {}  # source -> processes that died at it
        self._start()
        threading.Thread(target=self._work, name="decoder", daemon=True).start()

    def stop(self):
        """End the process, whatever it is at."""
        self.process.kill()
        with suppress(subprocess.TimeoutExpired):  # it hangs in the system, and will go when that lets it
            self.process.wait(2)

    def _start(self):
        flags = ["-X", "utf8"] if sys.flags.utf8_mode else []
        apart = (
            {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {"start_new_session": True}
        )
        self.ready = False
        try:
            if not sys.executable:
                raise OSError("this Python can't tell where its program is")
            self.process = subprocess.Popen(
                [sys.executable, *flags, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **apart
            )
            _widen(self.process.stdout)
        except OSError as error:
            raise RuntimeError(_remedy(f"a process that decodes can't be started ({error})")) from error
        with suppress(BrokenPipeError):  # it has ended already, which reading from it tells
            self._send((sys.path, plugins()))

    def _work(self):
        torch.set_num_threads(1)  # of this thread
        try:
            while not self.decoders.closed.is_set():
                if len(self.sent) < 2 and self._take(wait=not self.sent):
                    continue
                if not self.sent:
                    return
                try:
                    self._receive()
                except (EOFError, OSError) as error:
                    self._bury(error)
        except Exception as error:
            if self.decoders.closed.is_set():  # the process was ended, nobody waits for it
                return
            for future, _, _ in self.sent:
                future.set_exception(error)
            while (job := self.decoders.jobs.get()) is not None:
                job[0].set_exception(error)

    def _take(self, wait):
        """Send another batch, if there is one; whether there was."""
        try:
            job = self.decoders.jobs.get(block=wait)
        except queue.Empty:
            return False
        if job is None:
            self.decoders.closed.set()
            return True
        future, sources = job
        self.sent.append((future, sources, []))
        try:
            self._send_sources(sources)
        except (EOFError, OSError) as error:
            self._bury(error)
        return True

    def _send_sources(self, sources):
        if not self.ready:
            self._read_ready()
        for source in sources:
            self._send(source)

    def _read_ready(self):
        if self.process.stdout.read(len(READY)) != READY:
            raise EOFError
        self.ready = True
        self._send(self.decoders.reader)

    def _receive(self):
        future, sources, pictures = self.sent[0]
        if len(pictures) < len(sources):
            pictures.append(self.decoders.reader.finish(_received(self.process.stdout)))
        if len(pictures) == len(sources):
            self.sent.popleft()
            self.deaths = 0
            future.set_result(pictures)

    def _bury(self, error):
        """The process has died: blame the picture it was at if it began to work, start another and send all again."""
        if self.decoders.closed.is_set():
            return
        self.process.kill()
        how = _ending(self.process.wait())
        at = next(((sources, pictures) for _, sources, pictures in self.sent if len(pictures) < len(sources)), None)
        if self.ready and at is not None:
            sources, pictures = at
            source = sources[len(pictures)]
            self.tries[source] = self.tries.get(source, 0) + 1
            if self.tries[source] >= TRIES:
                picture = Picture(source, about_source(source))
                picture.error = f"the process that decoded it {how}, and so did another that tried it again"
                pictures.append(picture)
        elif not self.ready:
            self.deaths += 1
            if self.deaths >= TRIES:
                raise RuntimeError(_remedy(f"a process that decodes {how} as soon as it started")) from error
        self._start()
        if self.decoders.closed.is_set():
            return self.stop()
        try:
            for _, sources, pictures in self.sent:
                self._send_sources(sources[len(pictures) :])
        except (EOFError, OSError) as again:
            self._bury(again)

    def _send(self, thing):
        self.process.stdin.write(pickle.dumps(thing))
        self.process.stdin.flush()


def _remedy(what):
    return f"workers: {what}; give --workers 0 (workers=0) to decode without processes"


def _ending(code):
    """How a process ended, from its exit code."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    because = " (the system does that when memory runs out)" if name == "SIGKILL" else ""
    return f"was ended by {name}{because}"


def _widen(pipe):
    """Let a pipe hold as much as the system grants, so that a picture takes few turns."""
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        return
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        with suppress(OSError):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 1 << 20)


def _received(stream):
    header = stream.read(LENGTH.size)
    if len(header) < LENGTH.size:
        raise EOFError
    content = stream.read(LENGTH.unpack(header)[0])
    picture, shape, dtype = pickle.loads(content)
    if shape is not None:
        array = np.empty(shape, dtype)
        view, done = memoryview(array.reshape(-1).view(np.uint8)), 0
        while done < len(view):
            count = stream.readinto(view[done:])
            if not count:
                raise EOFError
            done += count
        if picture.image is None:
            picture.image = torch.from_numpy(array)
        else:
            picture.image.array = array
    return picture
