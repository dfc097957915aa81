"""Faults of single pictures, by stage and kind: the rest is made, the manifest has the reason, nothing hangs."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import crashing
import numpy as np
import pytest
import tiny
import torch
from datasets import broken_files, encoded, picture
from PIL import Image
from tree import ROOT

from anyup_fast.batch import open_archive, outputs, run, stages
from anyup_fast.batch.manifest import Manifest

pytest.importorskip("transformers")
pytest.importorskip("filelock")

GOOD = ("a.png", "z.png")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    weights = tiny.checkpoint(root / "anyup.safetensors")
    return {"encoder": tiny.encoder_folder(root / "encoder"), "weights": weights, "size": 56}


@pytest.fixture(autouse=True)
def in_time():
    """No test may take longer than this, whatever it waits for."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def late(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(400)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def folder_of(place, seed=0):
    place.mkdir(parents=True)
    for index, name in enumerate(GOOD):
        (place / name).write_bytes(encoded(picture(seed + index)))
    return place


def check(out, summary, reasons, good=GOOD):
    """The good ones are made, and the others recorded with a reason each that matches."""
    assert sorted(summary.failed) == sorted(reasons)
    archive = open_archive(out)
    assert sorted(archive) == sorted(good) and archive.verify() == []
    assert archive.failed == summary.failed
    for name, reason in reasons.items():
        assert re.search(reason, archive.failed[name]), (name, archive.failed[name])
        assert "make room" not in archive.failed[name].lower()
    assert not (out / outputs.PARTIAL).exists()
    made = {p.relative_to(out).as_posix() for p in out.rglob("*.safetensors")}
    assert made == {path for name in archive for path in archive.record(name)["files"]}


def fifo(path):
    os.mkfifo(path)


UNREADABLE = {
    "empty.png": (lambda p: p.write_bytes(b""), "cannot identify|damaged"),
    "page.jpg": (lambda p: p.write_text("<html>404</html>"), "damaged or not a picture"),
    "cut.jpg": (lambda p: p.write_bytes(broken_files()["cut.jpg"]), "truncated"),
    "bomb.png": (lambda p: p.write_bytes(broken_files()["bomb.png"]), "max_pixels"),
    "link.jpg": (lambda p: p.symlink_to("nowhere.jpg"), "is a link to 'nowhere.jpg', which is not there"),
    "odd.crash": (lambda p: crashing.write(p, "odd"), "ZeroDivisionError: a decoder's own mistake"),
    "hungry.crash": (lambda p: crashing.write(p, "memory"), "needs more memory than there is"),
}


def test_what_can_not_be_read_fails_alone_and_is_tried_again(tmp_path, parts):
    data = folder_of(tmp_path / "in")
    for name, (make, _) in UNREADABLE.items():
        make(data / name)
    summary = run(data, tmp_path / "out", workers=0, **parts)
    check(tmp_path / "out", summary, {name: reason for name, (_, reason) in UNREADABLE.items()})
    for name in UNREADABLE:
        (data / name).unlink()
        (data / name).write_bytes(encoded(picture(5), "jpeg"))
    again = run(data, tmp_path / "out", workers=0, **parts)
    assert (again.done, again.skipped, again.failed) == (len(UNREADABLE), len(GOOD), {})


def test_a_list_of_what_is_no_file_fails_alone(tmp_path, parts):
    data = folder_of(tmp_path / "in")
    names = [*GOOD, "none.png", "zero\0byte.png", "n" * 300 + ".png"]
    if hasattr(os, "mkfifo"):
        fifo(data / "pipe.png")
        names.append("pipe.png")
    (data / "list.txt").write_text("\n".join(names))
    summary = run(data / "list.txt", tmp_path / "out", workers=0, **parts)
    told = {"pipe.png": "a pipe or a device", "none.png": "there is no file", "zero\0byte.png": "there is no file|null"}
    check(tmp_path / "out", summary, {name: told.get(name, "there is no file|too long") for name in names[2:]})


def dark(images):
    return torch.stack(list(images)).mean((1, 2, 3)) < -1


def refused(self, images):
    if dark(images).any():
        raise RuntimeError("this encoder takes no dark pictures")
    return FEATURES(self, images)


def allocating(self, images):
    if dark(images).any():
        torch.empty(1 << 60)
    return FEATURES(self, images)


def out_of_gpu(self, images):
    if dark(images).any():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...")
    return FEATURES(self, images)


def changed(values):
    def features(self, images):
        images, maps = FEATURES(self, images)
        return images, torch.where(dark(images)[:, None, None, None], values(maps), maps)

    return features


FEATURES = stages.Upsampler.features


COMPUTED = {
    "refused": (refused, "RuntimeError: this encoder takes no dark pictures"),
    "host memory": (allocating, "needs more memory than there is .it asked for"),
    "gpu memory": (out_of_gpu, "needs more memory than there is .it asked for 20.00 GiB"),
    "not finite": (changed(lambda maps: maps * float("nan")), "NaN or infinite values"),
    "range": (changed(lambda maps: maps.sign() * 7e4), "leave the range of float16; use bfloat16 or float32"),
}


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kind", COMPUTED)
def test_what_can_not_be_computed_fails_alone(tmp_path, parts, monkeypatch, kind, batch_size):
    data, (fault, reason) = folder_of(tmp_path / "in"), COMPUTED[kind]
    Image.new("RGB", (76, 60)).save(data / "b.png")
    monkeypatch.setattr(stages.Upsampler, "features", fault)
    given = {"workers": 0, "at_a_time": 2, "batch_size": batch_size, **parts}
    summary = run(data, tmp_path / "out", **given)
    check(tmp_path / "out", summary, {"b.png": reason})
    monkeypatch.undo()
    assert run(data, tmp_path / "out", **given).complete


def test_the_first_picture_may_leave_the_range_and_three_end_the_run(tmp_path, parts, monkeypatch, caplog):
    data = folder_of(tmp_path / "in")
    Image.new("RGB", (76, 60)).save(data / "0.png")
    monkeypatch.setattr(stages.Upsampler, "features", COMPUTED["range"][0])
    check(tmp_path / "out", run(data, tmp_path / "out", workers=0, **parts), {"0.png": "leave the range"})
    for index in range(6):
        Image.new("RGB", (76, 60)).save(data / f"00{index}.png")
    with pytest.raises(ValueError, match="dtype: of the first 3 pictures none fits.*use bfloat16 or float32"):
        run(data, tmp_path / "other", workers=0, **parts)
    assert not list((tmp_path / "other").rglob("*.safetensors"))
    assert run(data, tmp_path / "other", workers=0, dtype="bfloat16", **parts).complete


@pytest.mark.parametrize("error", ["CUDA error: an illegal memory access was encountered", "HIP error: unspecified"])
def test_a_gpu_that_answers_no_more_ends_the_run(tmp_path, parts, monkeypatch, error):
    def lost(self, images):
        raise RuntimeError(error)

    monkeypatch.setattr(stages.Upsampler, "features", lost)
    with pytest.raises(RuntimeError, match="device: it answers no more"):
        run(folder_of(tmp_path / "in"), tmp_path / "out", workers=0, **parts)
    assert not Manifest(tmp_path / "out").records


def occupied(out, monkeypatch):
    (out / "b.png.safetensors").mkdir(parents=True)
    (out / "b.png.safetensors" / "kept").touch()


def a_file_in_place_of_a_folder(out, monkeypatch):
    out.mkdir()
    (out / "b.png").touch()


def refusing(number):
    def prepare(out, monkeypatch):
        replace = os.replace

        def refuse(place, target):
            if "b.png" in str(target):
                raise OSError(number, os.strerror(number), str(target))
            replace(place, target)

        monkeypatch.setattr(os, "replace", refuse)

    return prepare


def encoding(out, monkeypatch):
    fsencode = os.fsencode

    def strict(name):
        if "b.png" in os.fspath(name):
            raise UnicodeEncodeError("ascii", name, 0, 1, "ordinal not in range(128)")
        return fsencode(name)

    monkeypatch.setattr(os, "fsencode", strict)


WRITTEN = {
    "a folder is there": ("b.png", occupied, "its name can't be written there|can't be written"),
    "a file is there": ("b.png/c.png", a_file_in_place_of_a_folder, "can't be written"),
    "not of this system": ("b.png", refusing(errno.EILSEQ), "its name can't be written there .*b.png"),
    "too long a path": ("b.png", refusing(errno.ENAMETOOLONG), "its name can't be written there"),
    "not allowed": ("b.png", refusing(errno.EACCES), "its file can't be written: .*Permission denied"),
    "an odd error": ("b.png", refusing(errno.EIO), "its file can't be written: .*b.png"),
    "not encodable": ("b.png", encoding, "its name can't be encoded"),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_can_not_be_written_fails_alone(tmp_path, parts, monkeypatch, kind):
    name, prepare, reason = WRITTEN[kind]
    data = folder_of(tmp_path / "in")
    (data / name).parent.mkdir(exist_ok=True)
    (data / name).write_bytes(encoded(picture(3)))
    prepare(tmp_path / "out", monkeypatch)
    summary = run(data, tmp_path / "out", workers=0, **parts)
    monkeypatch.undo()
    assert sorted(summary.failed) == [name] and re.search(reason, summary.failed[name]), summary.failed
    assert "room" not in summary.failed[name] and sorted(open_archive(tmp_path / "out")) == sorted(GOOD)


def test_a_file_that_is_too_large_is_no_full_disk(tmp_path, parts):
    resource = pytest.importorskip("resource")
    data = folder_of(tmp_path / "in")
    Image.fromarray(np.asarray(picture(3, (60, 700)))).save(data / "wide.png")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limit[1]))
    try:
        summary = run(data, tmp_path / "out", workers=0, **parts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    check(tmp_path / "out", summary, {"wide.png": "its file of [0-9,]+ bytes is larger than the file system"})


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_what_befalls_every_file_ends_the_run(tmp_path, parts, monkeypatch, number):
    data, fsync = folder_of(tmp_path / "in"), os.fsync
    begun = []

    def failing(descriptor):
        if begun or os.fstat(descriptor).st_size > 10_000:
            begun.append(descriptor)
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="output: .* can't be written .*2 are left: ") as caught:
        run(data, tmp_path / "out", workers=0, **parts)
    assert ("make room" in str(caught.value)) == (number != errno.EROFS)
    monkeypatch.undo()
    assert run(data, tmp_path / "out", workers=0, **parts).complete


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_can_not_be_written_is_told_before_the_work(tmp_path, parts, monkeypatch, number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(outputs, "_save_bytes", refuse)
    with pytest.raises(OSError, match="output: .*out can't be written .*; (allow|make room)") as caught:
        run(folder_of(tmp_path / "in"), tmp_path / "out", workers=0, **parts)
    assert ("make room" in str(caught.value)) == (number == errno.ENOSPC)


# Twice: the command tries again what failed, and its exit code says so.
SCRIPT = """\
import json, multiprocessing, sys
multiprocessing.set_start_method(sys.argv[3])
import crashing
from anyup_fast import cli
from anyup_fast.batch import run
given = json.loads(sys.argv[4])
summary = run(sys.argv[1], sys.argv[2], workers=2, **given)
print("SUMMARY", json.dumps([summary.done, summary.failed, {" ".join(k): n for k, n in summary.left_out.items()}]))
options = [word for name, value in given.items() for word in ("--" + name, str(value))]
sys.exit(cli.main(["--quiet", "batch", *sys.argv[1:3], "--workers", "2", *options]))
"""


def everything(data, deaths):
    """A folder with pictures that fail in every way that files alone can bring about; name -> reason."""
    folder_of(data)
    reasons = {name: reason for name, (_, reason) in UNREADABLE.items()}
    for name, (make, _) in UNREADABLE.items():
        make(data / name)
    for kind, told in deaths.items():
        crashing.write(data / f"{kind}.crash", kind)
        reasons[f"{kind}.crash"] = f"the process that decoded it .*{told}.*|decoded it died"
    good = [*GOOD, "n" * 247 + ".png"]
    if len(deaths) > 1:
        crashing.write(data / "once.crash", f"once {data.parent / 'died'}")
        good.append("once.crash")
    for name in ("._a.png", ".hidden.png", "photo.heic", "notes.txt"):
        (data / name).write_bytes(b"nothing")
    shutil.copy(data / "a.png", data / ("n" * 247 + ".png"))
    if sys.platform == "linux":
        shutil.copy(data / "a.png", os.fsencode(data) + b"/caf\xe9.png")
        good.append("caf\udce9.png")
    return reasons, good


DEATHS = {"segfault": "SIGSEGV", "killed": "SIGKILL .the system", "exit": "exit code 7"}


def in_little_shared_memory(command):
    """The command in a mount namespace of its own with 64 kB of shared memory, where that can be had."""
    place = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "sh"]
    can = shutil.which("unshare") and subprocess.run([*place, "true"], capture_output=True).returncode == 0
    return [*place, *command] if can else command


def scripted(tmp_path, parts, method, data, text=SCRIPT, **options):
    script = tmp_path / "unguarded.py"
    script.write_text(text)
    given = json.dumps({**parts, "weights": str(parts["weights"]), **options})
    command = [sys.executable, str(script), str(data), str(tmp_path / "out"), method, given]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])}
    return command, environment


@pytest.mark.parametrize(
    "engine, method",
    [
        ("local", "spawn"),
        pytest.param("local", "forkserver", marks=pytest.mark.slow("half a minute; spawn has the same faults")),
        pytest.param("local", "fork", marks=pytest.mark.slow("half a minute; spawn has the same faults")),
        pytest.param("ray", "spawn", marks=pytest.mark.slow("half a minute of Ray")),
    ],
)
def test_all_of_them_at_once(tmp_path, parts, engine, method):
    """In a script without a main guard, with next to no shared memory (Ray, which is made of it, has what there is)."""
    if engine == "ray":
        pytest.importorskip("ray")
    # each death costs two processes, and those time
    reasons, good = everything(tmp_path / "in", DEATHS if method != "spawn" else {"segfault": DEATHS["segfault"]})
    more = {"engine": "ray"} if engine == "ray" else {}
    command, environment = scripted(tmp_path, parts, method, tmp_path / "in", **more)
    if engine == "local":
        command = in_little_shared_memory(command)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 3, done.stderr
    (line,) = re.findall("^SUMMARY (.*)$", done.stdout, re.M)
    count, failed, left = json.loads(line)
    assert count == len(good) and sorted(failed) == sorted(reasons), done.stderr
    archive = open_archive(tmp_path / "out")
    assert sorted(archive) == sorted(good) and archive.verify() == [] and archive.failed == failed
    for name, reason in reasons.items():
        assert re.search(reason, failed[name]), (name, failed[name])
    (long,) = archive.record("n" * 247 + ".png")["files"]
    assert len(long) <= 255 and "~" in long
    assert left == {".heic pip install pillow-heif": 1, ".txt no picture": 1,
                    "hidden names that begin with a dot": 2}  # fmt: skip
    assert "Traceback" not in done.stderr or engine == "ray"


WAITING = "lambda *a, **k: print('NOW', flush=True) or time.sleep(99)"
SLOW_PLACES = {
    "loading the encoder": f"import anyup_fast.batch.runner as r\nr.load_encoder = {WAITING}",
    "computing": f"from anyup_fast.batch import stages\nstages.Upsampler.features = {WAITING}",
    "reading": "import crashing, threading\nthreading.Timer(6, lambda: print('NOW', flush=True)).start()",
}


@pytest.mark.parametrize(
    "place, number",
    [
        ("loading the encoder", signal.SIGINT),
        pytest.param(
            "computing", signal.SIGINT, marks=pytest.mark.slow("another process; the signal's way is the same")
        ),
        pytest.param(
            "computing", signal.SIGTERM, marks=pytest.mark.slow("another process; the signal's way is the same")
        ),
        pytest.param("reading", signal.SIGINT, marks=pytest.mark.slow("six seconds of waiting")),
    ],
)
def test_a_signal_ends_a_run_within_seconds(tmp_path, parts, place, number):
    data = folder_of(tmp_path / "in")
    crashing.write(data / "b.crash", "sleep")
    if place != "reading":
        (data / "b.crash").unlink()
    text = f"""import sys, time
{SLOW_PLACES[place]}
from anyup_fast import cli
given = ["--encoder", {parts["encoder"]!r}, "--weights", {str(parts["weights"])!r}, "--size", "56", "--workers", "1"]
sys.exit(cli.main(["batch", *sys.argv[1:3], *given]))"""
    command, environment = scripted(tmp_path, parts, "", data, text)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert any("NOW" in line for line in process.stdout)
    time.sleep(0.3)
    start = time.monotonic()
    process.send_signal(number)
    assert process.wait(100) == 128 + number
    assert time.monotonic() - start < 30  # five seconds are given; machines that run tests are slow
    process.stdout.close()
    assert not list(Path(tmp_path / "out").rglob("*.safetensors")) or place == "reading"


def test_no_process_can_be_started(tmp_path, parts, monkeypatch):
    data = folder_of(tmp_path / "in")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    with pytest.raises(RuntimeError, match="workers: a process that decodes can't be started .*give --workers 0"):
        run(data, tmp_path / "out", workers=2, **parts)
    (tmp_path / "none").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "none").chmod(0o755)
    with pytest.raises(RuntimeError, match="workers: a process that decodes ended with exit code 3 as soon as"):
        run(data, tmp_path / "out", workers=2, **parts)
    assert run(data, tmp_path / "out", workers=0, **parts).complete
