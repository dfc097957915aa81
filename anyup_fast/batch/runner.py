"""A run over a data set: what is to do, done by an engine, recorded, and told."""

import errno
import logging
import os
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

from .. import __version__
from ..encoders import Encoder, load_encoder
from ..plain.precision import ways
from . import outputs
from .decoding import Decoders
from .grouping import at_once, batches_of
from .manifest import Manifest, settings_digest
from .preparation import describe
from .reading import Reader
from .reasons import ROOM, shown
from .settings import Settings
from .sources import file_digest, fingerprint, survey
from .stopping import Stopped, stopping

logger = logging.getLogger("anyup_fast")

ENGINES = ("local", "ray")
OVERFLOWS = 3  # pictures whose values leave the dtype, before any fits, that end a run
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


@dataclass
class Summary:
    """What a run has done.

    Attributes:
        total: pictures of the input. done: made in this run. skipped: done before.
        failed: name -> why it could not be read or made, in this run.
        seconds: of the run. bytes: written. stages: what -> seconds, summed over processes and threads.
        signal: number of the signal that stopped it, or None. abandoned: whether what was in work when it came is
        still being computed, for nothing.
        left_out: (what, why) -> how many files of the input were not taken as pictures.
    """

    total: int
    done: int = 0
    skipped: int = 0
    failed: dict = field(default_factory=dict)
    seconds: float = 0.0
    bytes: int = 0
    stages: dict = field(default_factory=dict)
    signal: int | None = None
    abandoned: bool = False
    left_out: dict = field(default_factory=dict)

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
            yield from (shown(f"  {name}: {error}") for name, error in self.failed.items())
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
    pages=False,
    **settings,
):
    """Features of every picture of a data set, upsampled, in files; interrupted, the same call goes on.

    Args:
        input: folder, glob, list of paths (.txt, .lst), video or picture (`anyup_fast.batch.sources.find_sources`).
        output: folder of the results, with a manifest (`anyup_fast.batch.manifest.Manifest`).
        head: for the kinds "head" and "labels", what `Prepared.head` takes, or a .safetensors file with weight (K, C)
            and perhaps bias (K,). A copy goes to the output. Names of its classes (`anyup_fast.heads.Head`, or
            `classes` of the settings) go to the manifest and into the files that have a place for them.
        pca: for the kind "pca", the `pca.safetensors` of another run; None fits one to the low-res features of
            `pca_sample` pictures spread over the input.
        batch_size: pictures of one size computed together; None means 1 on CPUs; on GPUs up to 8,
            as many as half of the memory holds.
        workers: processes that decode; None means one less than there are CPUs, at most 4; 0 decodes in this one, which
            a picture that crashes its decoder then ends. They are fresh processes, spoken to through pipes: a script
            needs no main guard, and no shared memory is used.
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
        pages: make every page or frame of files with several, not the first alone.
        settings: `anyup_fast.batch.Settings`; in place of a name, `encoder` may be an encoder itself (`wrap_encoder`),
            which is moved to the device. The manifest knows it by its name and a digest of its weights; what a function
            does otherwise must stay the same for a run to be finished. Ray's machines load theirs by name.

    Returns:
        Summary. Pictures that can't be read, computed or written are in `failed`, and the run goes on. SIGINT and
        SIGTERM (in the main thread) finish what is being computed, if that takes no more than five seconds, and return;
        a second SIGINT raises KeyboardInterrupt.

    Raises:
        ValueError: settings that are wrong, or other than those that the output was made with; the values of the first
            three pictures all leave the range of the dtype.
        FileNotFoundError: no input. RuntimeError: a package or weights are missing, another run is writing there, no
            process that decodes can be started, or a GPU answers no more.
        OSError: the folder can't be written, the disk is full or fails. What is done stays done, and no file is left
            half written.
    """
    start = time.perf_counter()
    brought = settings.get("encoder")
    if isinstance(brought, Encoder):
        if settings.get("encoder_weights", "auto") != "auto" or engine == "ray":
            raise ValueError(
                f"encoder: {brought.name} is loaded; weights, and the engine 'ray', go with a name, such as "
                "'package.module:function'"
            )
        settings["encoder"] = brought.name
    else:
        brought = None
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
    folder = Path(output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output: {str(folder)!r} is a file; name a folder")
    sources, left_out = survey(input, folder, pages)
    for meant, line in left_out.lines():
        logger.log(logging.WARNING if meant else logging.INFO, "%s", shown(line))
    summary = Summary(len(sources), left_out=dict(left_out))
    with _locked(folder), stopping() as stop:
        try:
            with _explained(folder, "written"):
                outputs.clear_partial(folder)
                outputs.probe(folder)
            _run(
                settings, sources, folder, summary, head, pca, pca_sample, batch_size, workers, at_a_time, writers,
                _device(device), engine, ray_address, overwrite, verify, progress, stop, brought,
            )  # fmt: skip
        except Stopped:
            pass  # while nothing was in work
        summary.signal = stop()
        if not summary.abandoned:
            outputs.clear_partial(folder)
    summary.seconds = time.perf_counter() - start
    for line in summary.lines():
        logger.info("%s", line)
    return summary


def _run(
    settings, sources, folder, summary, head, pca, pca_sample, batch_size, workers, at_a_time, writers, device, engine,
    ray_address, overwrite, verify, progress, stop, brought,
):  # fmt: skip
    manifest = Manifest(folder)
    encoder_device = "cpu" if engine == "ray" else device

    @cache
    def encoder():
        if brought is not None:
            return brought.to(encoder_device)
        return load_encoder(settings.encoder, weights=settings.encoder_weights, device=encoder_device)

    count = min(4, max(1, (os.cpu_count() or 1) - 1)) if workers is None else workers
    opened = cache(lambda: Decoders(min(count, len(sources))))
    try:
        if engine == "local" and any(source.name not in manifest.records for source in sources):
            opened()  # they start while the encoder is loaded
        settings, described = describe(
            settings, folder, manifest, sources, head, pca, pca_sample, overwrite, encoder, opened, brought
        )
        digest = settings_digest(described)
        to_do = _to_do(sources, manifest, folder, digest, verify)
        summary.skipped = len(sources) - len(to_do)
        if not to_do:
            return
        decoders = opened() if engine == "local" else None
        if encoder().bands != 3:
            raise ValueError(
                f"encoder: {settings.encoder} takes {encoder().bands} bands, the pictures of a data set have three; "
                "extract_features takes images of more"
            )
        patch = encoder().patch_size
        if batch_size is None:
            batch_size = 1 if device == "cpu" else partial(at_once, encoder=encoder(), settings=settings, device=device)
        batches = list(batches_of(sources, {source.name for source in to_do}, batch_size, patch, settings))
        header = manifest.headers.get(digest, {})
        settings = replace(settings, products=header.get("products", ways()) if device == "cpu" else None)
        if engine == "ray":
            from .distributed import RayEngine

            made = RayEngine(
                settings, folder, device, Reader(settings, patch), workers, at_a_time, writers, ray_address
            )
        else:
            from .local import LocalEngine

            decoders.reader = Reader(settings, patch)
            made = LocalEngine(settings, folder, device, at_a_time, writers, decoders, encoder())
        weights = str(Path(settings.weights).resolve()) if Path(settings.weights).is_file() else settings.weights
        manifest.begin(described, weights=weights, anyup_fast=__version__, products=settings.products)
        _work(made, batches, manifest, digest, folder, summary, progress, len(to_do), stop)
    finally:
        if opened.cache_info().currsize:
            opened().close()


def _work(engine, batches, manifest, digest, folder, summary, progress, count, stop):
    bar, start = progress(count) if progress else None, time.perf_counter()

    def done(picture):
        name, before = picture.source.name, manifest.records.get(picture.source.name, {})
        if picture.cause in ("room", "disk"):
            raise OSError(errno.ENOSPC if picture.cause == "room" else errno.EIO, picture.error)
        if picture.cause == "device":
            raise RuntimeError(f"device: it answers no more ({picture.error}); run the same again, it goes on")
        manifest.add(picture.record(digest))
        for note in picture.notes:
            logger.warning("%s: %s", shown(name), note)
        if picture.error is None:
            summary.done += 1
            summary.bytes += sum(about["bytes"] for about in picture.files.values())
            for path in set(before.get("files", ())) - set(picture.files):
                outputs.remove(folder, path)
        else:
            summary.failed[name] = picture.error
            logger.warning("%s", shown(f"{name}: {picture.error}"))
            overflows.append(picture.cause == "range")
        for stage, seconds in picture.seconds.items():
            summary.stages[stage] = summary.stages.get(stage, 0.0) + seconds
        if bar is not None:
            rate = summary.bytes / (time.perf_counter() - start) / 1e6
            bar.set_postfix_str(f"{rate:.1f} MB/s" + (f", {len(summary.failed)} failed" if summary.failed else ""))
            bar.update(1)
        if picture.cause == "range" and not summary.done and sum(overflows) == OVERFLOWS and not stop():
            raise ValueError(
                f"dtype: of the first {len(overflows)} pictures none fits, the values of {OVERFLOWS} leave the range "
                "of the dtype; use bfloat16 or float32 (--dtype)"
            )

    overflows = []
    try:
        engine(batches, stop, done)
    except OSError as error:
        left = count - summary.done - len(summary.failed)
        told = error.strerror or str(error)
        told = told if told.startswith("output: ") else f"output: {folder} can't be written ({told})"
        remedy = "make room and run" if error.errno in ROOM else "mend that and run"
        raise OSError(
            error.errno,
            f"{told}; {summary.done} pictures were made, {left} are left: {remedy} the same again, it goes on where "
            "this stopped",
        ) from error
    finally:
        if bar is not None:
            bar.close()
        summary.stages |= engine.waits
        summary.abandoned = engine.abandoned


@contextmanager
def _explained(folder, what):
    """Say what an `OSError` of the folder itself means for the run, before there is any work."""
    try:
        yield
    except OSError as error:
        told = error.strerror or str(error)
        told = told if told.startswith("output: ") else f"output: {folder} can't be {what} ({told})"
        remedy = "make room" if error.errno in ROOM else "allow writing there, or name another folder"
        raise OSError(error.errno, f"{told}; {remedy}") from error


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

    with _explained(folder, "made"):
        folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RuntimeError(f"output: another run is writing to {folder}; wait for it, or name another") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            with _explained(folder, "written"):
                raise
        logger.warning("%s: this file system has no locks; see to it that no other run writes there", folder)
    try:
        yield
    finally:
        lock.release()


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
            logger.warning("%s", shown(f"{source.name}: {path} is not what was written; it is made again"))
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
