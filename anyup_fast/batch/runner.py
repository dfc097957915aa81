"""A run over a data set: what is to do, done by an engine, recorded, and told."""

import logging
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from .. import __version__
from ..encoders import load_encoder
from ..image import target_size
from ..model import AnyUp
from . import outputs
from .manifest import Manifest, settings_digest
from .preparation import describe
from .settings import Settings, output_size_of
from .sources import file_digest, find_sources, fingerprint, picture_size
from .stages import lanes

logger = logging.getLogger("anyup_fast")

ENGINES = ("local", "ray")
GPU_BATCH = 8  # pictures of one size that a GPU takes at once


@dataclass
class Summary:
    """What a run has done.

    Attributes:
        total: pictures of the input. done: made in this run. skipped: done before.
        failed: name -> why it could not be read or made, in this run.
        seconds: of the run. bytes: written. stages: what -> seconds, summed over processes and threads.
        signal: number of the signal that stopped it, or None.
    """

    total: int
    done: int = 0
    skipped: int = 0
    failed: dict = field(default_factory=dict)
    seconds: float = 0.0
    bytes: int = 0
    stages: dict = field(default_factory=dict)
    signal: int | None = None

    @property
    def complete(self):
        """Whether every picture of the input is done."""
        return self.done + self.skipped == self.total

    def lines(self):
        """The summary as sentences."""
        rate = f", {self.done / self.seconds:.2f} images/s, {self.bytes / self.seconds / 1e6:.1f} MB/s"
        yield f"{self.done} made{rate if self.done else ''}, {self.skipped} done before, of {self.total}"
        if self.stages:
            yield "seconds: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.stages.items())
        if self.failed:
            yield f"{len(self.failed)} failed:"
            yield from (f"  {name}: {error}" for name, error in self.failed.items())
        if self.signal is not None:
            left = self.total - self.done - self.skipped - len(self.failed)
            yield f"stopped by {signal.Signals(self.signal).name} with {left} to do; the same command goes on"


def run(
    input,
    output,
    *,
    head=None,
    pca=None,
    pca_sample=64,
    batch_size=None,
    workers=None,
    at_a_time=None,
    writers=2,
    device="auto",
    engine="local",
    ray_address=None,
    overwrite=False,
    verify=False,
    progress=None,
    **settings,
):
    """Features of every picture of a data set, upsampled, in files; interrupted, the same call goes on.

    Args:
        input: folder, glob, list of paths (.txt, .lst), video or picture (`anyup_fast.batch.sources.find_sources`).
        output: folder of the results, with a manifest (`anyup_fast.batch.manifest.Manifest`).
        head: for the kinds "head" and "labels", what `Prepared.head` takes, or a .safetensors file with weight (K, C)
            and perhaps bias (K,). A copy goes to the output.
        pca: for the kind "pca", the `pca.safetensors` of another run; None fits one to the low-res features of
            `pca_sample` pictures spread over the input.
        batch_size: pictures of one size computed together; None means 1 on CPUs; on GPUs up to 8,
            as many as half of the memory holds.
        workers: processes that decode; None means one less than there are CPUs, at most 4; 0 decodes in this one.
        at_a_time: batches that are computed at the same time; None means on CPUs one for each thread of PyTorch, at
            most 8, on a CUDA device 2, on other GPUs 1. Memory grows with it.
        writers: threads that write.
        device: "auto" (a GPU if there is one), "cpu", "cuda", ...
        engine: "local" or "ray" (Ray Data; `device` then says whether its actors ask for GPUs).
        ray_address: of a running Ray cluster whose machines all see input and output; None starts Ray on this machine.
        overwrite: replace what was made with other settings.
        verify: read what is done and compare it with its digest; what differs is made again.
        progress: called with the number of pictures to do, gives a bar with `update(n)`, `set_postfix_str(text)` and
            `close()`, as tqdm does.
        settings: `anyup_fast.batch.Settings`.

    Returns:
        Summary. Pictures that can't be read are in `failed`, and the run goes on. SIGINT and SIGTERM (in the main
        thread) finish what is being computed and return; a second SIGINT raises KeyboardInterrupt.

    Raises:
        ValueError: settings that are wrong, or other than those that the output was made with.
        FileNotFoundError: no input. RuntimeError: a package or weights are missing, or another run is writing there.
        OSError: the disk is full or fails. What is done stays done, and no file is left half written.
    """
    start = time.perf_counter()
    settings = Settings(**settings)
    if engine not in ENGINES:
        raise ValueError(f"engine: must be one of {', '.join(ENGINES)}, got {engine!r}")
    if ray_address is not None and engine != "ray":
        raise ValueError(f"ray_address: goes with engine='ray', got engine={engine!r}")
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("workers", workers, 0),
        ("at_a_time", at_a_time, 1),
        ("writers", writers, 1),
    ):
        if value is not None and (not isinstance(value, int) or value < least):
            raise ValueError(f"{name}: must be a whole number of at least {least}, got {value!r}")
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output: {str(folder)!r} is a file; name a folder")
    sources = find_sources(input, without=folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder), _signals() as stopped:
        outputs.clear_partial(folder)
        manifest = Manifest(folder)
        device = _device(device)
        described = describe(settings, folder, manifest, sources, head, pca, pca_sample, device, overwrite)
        digest = settings_digest(described)
        to_do = _to_do(sources, manifest, folder, digest, verify)
        summary = Summary(len(sources), skipped=len(sources) - len(to_do))
        if to_do:
            encoder = load_encoder(settings.encoder, weights=settings.encoder_weights)
            patch = encoder.patch_size
            if batch_size is None:
                batch_size = (
                    1 if device == "cpu" else partial(at_once, encoder=encoder, settings=settings, device=device)
                )
            batches = list(_batches(sources, {source.name for source in to_do}, batch_size, patch, settings))
            made = _make_engine(engine, settings, folder, device, patch, workers, at_a_time, writers, ray_address)
            weights = str(Path(settings.weights).resolve()) if Path(settings.weights).is_file() else settings.weights
            manifest.begin(described, weights=weights, anyup_fast=__version__)
            _work(made, batches, manifest, digest, folder, summary, progress, len(to_do), stopped)
        summary.signal = stopped()
        outputs.clear_partial(folder)
    summary.seconds = time.perf_counter() - start
    for line in summary.lines():
        logger.info("%s", line)
    return summary


def _work(engine, batches, manifest, digest, folder, summary, progress, count, stopped):
    bar, start = progress(count) if progress else None, time.perf_counter()

    def done(picture):
        name, before = picture.source.name, manifest.records.get(picture.source.name, {})
        manifest.add(picture.record(digest))
        if picture.error is None:
            summary.done += 1
            summary.bytes += sum(about["bytes"] for about in picture.files.values())
            for path in set(before.get("files", ())) - set(picture.files):
                outputs.remove(folder, path)
        else:
            summary.failed[name] = picture.error
            logger.warning("%s: %s", name, picture.error)
        for stage, seconds in picture.seconds.items():
            summary.stages[stage] = summary.stages.get(stage, 0.0) + seconds
        if bar is not None:
            rate = summary.bytes / (time.perf_counter() - start) / 1e6
            bar.set_postfix_str(f"{rate:.1f} MB/s" + (f", {len(summary.failed)} failed" if summary.failed else ""))
            bar.update(1)

    try:
        engine(batches, stopped, done)
    except OSError as error:
        left = count - summary.done - len(summary.failed)
        raise OSError(
            error.errno,
            f"output: {folder} can't be written ({error}); {summary.done} pictures were made, {left} are left: make "
            "room and run the same again, it goes on where this stopped",
        ) from error
    finally:
        if bar is not None:
            bar.close()
        summary.stages |= engine.waits


def _make_engine(engine, *arguments):
    if engine == "ray":
        from .distributed import RayEngine as Engine
    else:
        from .local import LocalEngine as Engine
    return Engine(*arguments)


def _device(name):
    import torch

    from ..checks import checked_device

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return str(checked_device(name))


@contextmanager
def _locked(folder):
    """Only one run at a time writes to a folder; the lock goes with the process that holds it."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RuntimeError(f"output: another run is writing to {folder}; wait for it, or name another") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _signals():
    """Catch SIGINT and SIGTERM for a while; gives a function that tells which came first, or None."""
    caught = []

    def note(number, _):
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)
        logger.warning("%s: finishing what is being computed ...", signal.Signals(number).name)

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: caught[0] if caught else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _to_do(sources, manifest, folder, digest, verify):
    """Sources whose files are not there, or not of these settings and this content."""
    states = {}
    return [s for s in sources if not _is_done(s, manifest, folder, digest, verify, states)]


def _is_done(source, manifest, folder, digest, verify, states):
    record = manifest.records.get(source.name)
    if record is None or record["status"] != "done" or record["settings"] != digest:
        return False
    for path, about in record["files"].items():
        if outputs.size_on_disk(folder / path) != about["bytes"]:
            return False
        if verify and outputs.folder_digest(folder / path)["sha256"] != about["sha256"]:
            logger.warning("%s: %s is not what was written; it is made again", source.name, path)
            return False
    if source.path not in states:
        states[source.path] = fingerprint(source.path)
    now, then = states[source.path], record["source"]
    if now is None:
        return True  # the source is gone, its files are not
    if all(now[key] == then.get(key) for key in now):
        return True
    if now["bytes"] != then.get("bytes") or "sha256" not in then or file_digest(source.path) != then["sha256"]:
        return False
    manifest.add({**record, "source": {**then, **now}})  # touched, not changed
    return True


def at_once(size, encoder, settings, device):
    """How many pictures (H, W) a GPU takes at once: what half of its memory holds, from 1 to `GPU_BATCH`.

    Where two such batches are in work at a time, both lie in that half.

    All of its memory counts, not what happens to be free, so that every run on such a device makes the same batches.
    """
    grid = [max(1, n // encoder.patch_size) for n in size]
    height, width = output_size_of(settings, size)
    with torch.device("meta"):
        model = AnyUp()
    one = model.estimate_memory((1, 3, *size), (1, encoder.dim, *grid), (height, width), device=device)
    one += height * width * encoder.dim * 4  # the answer in the dtype that is written, beside the one that is computed
    return max(1, min(GPU_BATCH, _memory_of(torch.device(device)) // (2 * lanes(device)) // one))


def _memory_of(device):
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return getattr(torch, device.type).get_device_properties(device).total_memory


def _batches(sources, wanted, batch_size, patch, settings):
    """Pictures that are computed together: (sources, names of those to be written).

    Args:
        batch_size: how many; or a function from the size (H, W) of the pictures to that.

    Which pictures share a batch depends on the sources alone, not on what is done: rounding may depend on the batch,
    and a run that was interrupted gives the same files as one that was not.
    """
    groups = {}
    if batch_size == 1 or isinstance(settings.size, tuple):
        groups[None] = sources
    else:
        with ThreadPoolExecutor(8) as pool:
            for index, (source, size) in enumerate(zip(sources, pool.map(picture_size, sources), strict=True)):
                key = ("unreadable", index) if size is None else target_size(size, settings.size, patch)
                groups.setdefault(key, []).append(source)
    for key, group in groups.items():
        several = batch_size
        if callable(batch_size):  # a picture that can't be read is a group of its own, of no size
            several = batch_size(settings.size if key is None else key) if len(group) > 1 else 1
        for first in range(0, len(group), several):
            batch = tuple(group[first : first + several])
            names = frozenset(source.name for source in batch) & wanted
            if names:
                yield batch, names
