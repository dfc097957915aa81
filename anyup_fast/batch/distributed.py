"""The engine on several machines: the same stages on Ray Data.

Reading and writing are tasks, encoding and upsampling are actors that hold the models. Pictures travel between them as
pickled rows, a batch to a row; what comes back to this process, which alone writes the manifest, is their records.
Every machine has to see the input and the output under the same paths.
"""

import dataclasses
import hashlib
import logging
import os
import pickle
from contextlib import contextmanager
from pathlib import Path

import torch

from .outputs import PARTIAL
from .reading import Picture, about_source
from .serving import add_plugins, plugins
from .stages import Upsampler, Writer

BLOCKS = 2000  # blocks that Ray Data plans with, at most; a batch to each is finest
SHARE = 0.25  # of a CPU, for reading and for writing
TRIES = 2  # processes that a picture may cost, at each stage


class RayEngine:
    """As `LocalEngine`.

    Args:
        device: "cpu", or "cuda" for actors that ask for a GPU each. reader: a `Reader`.
        workers, writers: tasks that read, and that write, at a time; None leaves it to Ray.
        at_a_time: actors; None means one for each GPU, or for each CPU of the cluster.
        ray_address: of a running cluster; None starts Ray on this machine and stops it afterwards.
    """

    def __init__(self, settings, folder, device, reader, workers, at_a_time, writers, ray_address):
        self.settings, self.folder, self.device, self.reader = settings, os.path.abspath(folder), device, reader
        self.workers, self.at_a_time, self.writers = workers, at_a_time, writers
        self.address = ray_address
        self.waits, self.abandoned = {}, False

    def __call__(self, batches, stop, done):
        ray = _ray()
        started = not ray.is_initialized()
        if started:
            try:
                ray.init(self.address, include_dashboard=False, log_to_driver=False, configure_logging=False)
            except ConnectionError as error:
                raise RuntimeError(f"ray_address: no Ray cluster answers at {self.address!r} ({error})") from error
            stop.install()  # Ray has put handlers of its own in their place
        try:
            # What is computed when a signal comes is thrown away, and made again by the next run.
            for row in self._results(ray, batches).iter_rows():
                with stop.held():
                    for picture in pickle.loads(row["pictures"]):
                        done(picture)
                if stop():
                    break
        except ray.exceptions.RayError as error:
            raise RuntimeError(f"engine: Ray could not go on ({' '.join(str(error).split())[-400:]})") from error
        finally:
            if started:
                with stop.held():
                    ray.shutdown()

    def _results(self, ray, batches):
        from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy

        context = DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        context.execution_options.preserve_order = True
        on_gpu = self.device.startswith("cuda")
        resources = ray.cluster_resources()
        actors = self.at_a_time or max(1, int(resources.get("GPU" if on_gpu else "CPU", 1)))
        share = {"num_gpus": 1} if on_gpu else {"num_cpus": max(SHARE, 1 - 2 * SHARE)}
        rows = [{"batch": pickle.dumps((_absolute(sources), names))} for sources, names in batches]
        found = ray.data.from_items(rows, override_num_blocks=min(len(rows), BLOCKS))
        read = found.map(_Read(self.reader, self.folder), num_cpus=SHARE, compute=TaskPoolStrategy(self.workers))
        pool = ActorPoolStrategy(size=min(actors, len(rows)))
        given = (self.settings, self.folder, self.device)
        computed = read.map(_Computed, fn_constructor_args=given, compute=pool, **share)
        writer = _Written(Writer(self.settings, self.folder))
        return computed.map(writer, num_cpus=SHARE, compute=TaskPoolStrategy(self.writers))


def _absolute(sources):
    """The same sources for processes that work in other folders."""
    return [dataclasses.replace(source, path=os.path.abspath(source.path)) for source in sources]


def _ray():
    try:
        import ray
    except ModuleNotFoundError as error:
        raise RuntimeError("engine: 'ray' needs the package ray: pip install 'anyup-fast[ray]'") from error
    return ray


class _Tries:
    """How often something was begun and not ended, because its process died: kept in files, for others to see."""

    def __init__(self, folder):
        self.place = Path(folder) / PARTIAL / "tries"

    @contextmanager
    def of(self, stage, source):
        """Begin something; gives whether that has cost so many processes already that it should be left."""
        self.place.mkdir(parents=True, exist_ok=True)
        path = self.place / hashlib.sha256(repr((stage, source.name)).encode()).hexdigest()
        tries = len(path.read_bytes()) if path.exists() else 0
        if tries < TRIES:
            path.write_bytes(b"x" * (tries + 1))
        yield tries >= TRIES
        path.unlink(missing_ok=True)


def _died(picture, stage):
    how = "perhaps for want of memory, or because a library crashed"
    picture.error = f"the process that {stage} it died, and so did another that tried it again ({how})"
    picture.image = None
    return picture


class _Read:
    def __init__(self, reader, folder):
        self.reader, self.tries, self.plugins = reader, _Tries(folder), plugins()

    def __call__(self, row):
        add_plugins(self.plugins)
        sources, names = pickle.loads(row["batch"])
        return {"pictures": pickle.dumps([self._read(source) for source in sources]), "names": pickle.dumps(names)}

    def _read(self, source):
        with self.tries.of("decoded", source) as left:
            return _died(Picture(source, about_source(source)), "decoded") if left else self.reader(source)


class _Computed:
    def __init__(self, settings, folder, device):
        if device == "cpu":
            torch.set_num_threads(1)
        self.upsampler, self.tries = Upsampler(settings, folder, device), _Tries(folder)

    def __call__(self, row):
        names = pickle.loads(row["names"])
        pictures = self._compute(pickle.loads(row["pictures"]))
        return {"pictures": pickle.dumps([picture for picture in pictures if picture.source.name in names])}

    def _compute(self, pictures):
        with self.tries.of(f"computed {len(pictures)}", pictures[0].source) as left:
            if not left:
                return self.upsampler(pictures)
            if len(pictures) == 1:
                return [_died(pictures[0], "computed")]
        return [picture for one in pictures for picture in self._compute([one])]


class _Written:
    def __init__(self, writer):
        self.writer = writer

    def __call__(self, row):
        return {"pictures": pickle.dumps([self.writer(picture) for picture in pickle.loads(row["pictures"])])}
