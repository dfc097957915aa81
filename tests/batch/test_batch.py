import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from datasets import broken_files, contents, encoded, fill, picture
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import anyup_fast
from anyup_fast import cli
from anyup_fast.batch import Settings, grouping, local, make_film, open_archive, outputs, run, runner, sources, stages
from anyup_fast.batch.manifest import Manifest
from anyup_fast.cpu import products
from anyup_fast.heads import read_head, save_head
from anyup_fast.stores import open_zarr

pytest.importorskip("transformers")
pytest.importorskip("filelock")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Encoder, weights and head, as arguments of run."""
    root = tmp_path_factory.mktemp("parts")
    generator = torch.Generator().manual_seed(5)
    head = {"weight": torch.randn(5, 32, generator=generator), "bias": torch.randn(5, generator=generator)}
    save_file(head, root / "head.safetensors")
    weights = tiny.checkpoint(root / "anyup.safetensors")
    return {
        "run": {"encoder": tiny.encoder_folder(root / "encoder"), "weights": weights, "size": 56, "workers": 0},
        "head": root / "head.safetensors",
    }


def expected(path, parts, **options):
    """Image, features and what AnyUp makes of them, computed one by one."""
    image = anyup_fast.load_image(path, 56, patch_multiple=14)
    features = anyup_fast.extract_features(image, parts["run"]["encoder"])
    prepared = anyup_fast.prepare(image[None], features[None], str(parts["run"]["weights"]))
    return image, features, prepared


def sources_of(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


@pytest.mark.parametrize(
    "format, dtype",
    [(f, d) for f in ("safetensors", "npy", "zarr") for d in ("float16", "float32", "int8")]
    + [("safetensors", "bfloat16")],
)
def test_features_in_every_format_and_dtype(tmp_path, parts, format, dtype):
    if format == "zarr":
        pytest.importorskip("zarr")
    data = fill(tmp_path / "in", 3)
    summary = run(data, tmp_path / "out", format=format, dtype=dtype, **parts["run"])
    assert (summary.done, summary.skipped, summary.failed, summary.complete) == (3, 0, {}, True)
    archive = anyup_fast.open(tmp_path / "out")
    assert archive.verify() == [] and len(archive) == 3
    for path in sources_of(data):
        _, _, prepared = expected(path, parts)
        hr = prepared.full()[0]
        found = archive[path.relative_to(data).as_posix()]
        assert found.output_size == hr.shape[1:]
        largest = hr.abs().amax((1, 2), keepdim=True)
        # measured: 4e-7, 5.3e-4, 3.9e-3 of the value; for int8 half a step, 1/254 of the channel's greatest
        allowed = {"float32": 2e-6 * largest, "float16": 1e-3 * largest, "bfloat16": 8e-3 * largest}
        bound = allowed.get(dtype, largest / 254 * 1.3)
        full = found.full()
        assert full.shape == hr.shape and full.dtype == (torch.float32 if dtype == "int8" else getattr(torch, dtype))
        assert ((full.float() - hr).abs() <= bound + 1e-6).all()
        assert torch.equal(found.region(3, 5, 20, 30), full[:, 3:23, 5:35])
        assert torch.equal(found.at([[0, 0], [55, 9]]), torch.stack((full[:, 0, 0], full[:, 55, 9])))


@pytest.mark.parametrize("format", ["safetensors", "npy", "png"])
def test_labels_of_a_head(tmp_path, parts, format):
    data = fill(tmp_path / "in", 3)
    run(data, tmp_path / "out", kind="labels", head=parts["head"], format=format, output_size=(30, 41), **parts["run"])
    archive = open_archive(tmp_path / "out")
    head = load_file(parts["head"])
    for path in sources_of(data):
        hr = expected(path, parts)[2].full((30, 41))[0]
        outputs_ = torch.einsum("kc,chw->khw", head["weight"], hr) + head["bias"][:, None, None]
        labels = archive[path.relative_to(data).as_posix()].full()
        assert labels.dtype == torch.uint8 and labels.shape == (30, 41)
        assert (labels == outputs_.argmax(0)).float().mean() > 0.995  # rounding decides where two outputs are equal
        assert len(labels.unique()) > 1


def test_outputs_of_a_head(tmp_path, parts):
    data = fill(tmp_path / "in", 2)
    head = torch.nn.Linear(32, 4)
    run(data, tmp_path / "out", kind="head", head=head, dtype="float32", output_size=40, **parts["run"])
    found = open_archive(tmp_path / "out")["000.png"].full()
    size = found.shape[1:]
    assert min(size) == 40
    hr = expected(data / "000.png", parts)[2].full(size)[0]
    torch.testing.assert_close(found, head(hr.permute(1, 2, 0)).permute(2, 0, 1).detach(), atol=1e-5, rtol=1e-5)


def test_pca_is_fitted_once_and_reused(tmp_path, parts):
    data = fill(tmp_path / "in", 5)
    run(data, tmp_path / "out", kind="pca", pca_sample=3, **parts["run"])
    fitted = (tmp_path / "out" / "pca.safetensors").read_bytes()
    colours = load_file(tmp_path / "out" / "pca.safetensors")
    hr = expected(data / "000.png", parts)[2].full()[0]
    coordinates = torch.einsum("kc,chw->hwk", colours["axes"], hr - colours["mean"][:, None, None])
    shares = ((coordinates - colours["low"]) / (colours["high"] - colours["low"])).clamp(0, 1)
    found = np.asarray(Image.open(tmp_path / "out" / "000.png.png")).astype(int)
    assert np.abs(found - (shares * 255).round().int().numpy()).max() <= 1
    assert found.std() > 5
    assert open_archive(tmp_path / "out")["000.png"].full().shape == (3, *hr.shape[1:])

    run(data / "000.png", tmp_path / "other", kind="pca", pca=tmp_path / "out" / "pca.safetensors", **parts["run"])
    assert (tmp_path / "other" / "pca.safetensors").read_bytes() == fitted
    assert contents(tmp_path / "other")["000.png.png"] == contents(tmp_path / "out")["000.png.png"]


def test_lowres_answers_for_pixels_later(tmp_path, parts):
    data = fill(tmp_path / "in", 2)
    (data / "exact.png").write_bytes(encoded(picture(7, (56, 56))))
    run(data, tmp_path / "out", kind="lowres", dtype="float32", **parts["run"])
    archive = anyup_fast.open(tmp_path / "out")
    for name in ("000.png", "exact.png"):
        image, _, prepared = expected(data / name, parts)
        found = archive[name]
        stored = load_file(tmp_path / "out" / f"{name}.safetensors")["image"]
        assert stored.dtype == (torch.uint8 if name == "exact.png" else torch.uint16)
        assert (stages.unpack_image(stored) - image).abs().max() <= (0 if name == "exact.png" else 4e-5)
        whole = prepared.full()
        tolerance = 2e-6 if name == "exact.png" else 1e-4
        scale = whole.abs().max()
        assert (found.region(3, 5, 20, 30) - whole[..., 3:23, 5:35]).abs().max() <= tolerance * scale
        assert (found.full() - whole).abs().max() <= tolerance * scale
    assert "norms" in archive["000.png"]._shared  # read, not computed


def test_lowres_needs_the_weights_it_was_made_with(tmp_path, parts):
    run(fill(tmp_path / "in", 1), tmp_path / "out", kind="lowres", **parts["run"])
    other = tiny.checkpoint(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(ValueError, match="weights: .* are not those"):
        open_archive(tmp_path / "out", weights=other)["000.png"]


def test_broken_pictures_are_recorded_and_skipped(tmp_path, parts, capsys):
    data = fill(tmp_path / "in", 3, broken=10)
    command = ["--quiet", "batch", str(data), str(tmp_path / "out"), "--size", "56", "--workers", "2"]
    command += ["--encoder", parts["run"]["encoder"], "--weights", str(parts["run"]["weights"])]
    assert cli.main(command) == 3
    archive = open_archive(tmp_path / "out")
    assert sorted(archive.failed) == sorted(broken_files()) and len(archive) == 3 and archive.verify() == []
    assert all(name in error for name, error in archive.failed.items())
    with pytest.raises(KeyError, match="it failed"):
        archive["cut.jpg"]
    with pytest.raises(KeyError, match="not in the manifest"):
        archive["none"]
    # Mended, they are made; nothing else is.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    for name in broken_files():
        (data / name).write_bytes(encoded(picture(3)))
    assert cli.main(command) == 0
    assert len(open_archive(tmp_path / "out")) == 13
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_second_run_does_what_is_left(tmp_path, parts):
    data = fill(tmp_path / "in", 4)
    first = run(data, tmp_path / "out", **parts["run"])
    reference = contents(tmp_path / "out")
    again = run(data, tmp_path / "out", **parts["run"])
    assert (first.done, again.done, again.skipped) == (4, 0, 4)
    (tmp_path / "out" / "000.png.safetensors").unlink()
    (data / "001.jpeg").touch()  # another time, the same content
    (data / "003.bmp").write_bytes(encoded(picture(44), "bmp"))
    third = run(data, tmp_path / "out", **parts["run"])
    assert (third.done, third.skipped) == (2, 2)
    changed = contents(tmp_path / "out")
    assert [name for name in reference if changed[name] != reference[name]] == ["003.bmp.safetensors"]
    assert run(data, tmp_path / "out", **parts["run"]).done == 0


def test_verify_makes_damaged_files_again(tmp_path, parts):
    data = fill(tmp_path / "in", 2)
    run(data, tmp_path / "out", **parts["run"])
    reference = contents(tmp_path / "out")
    file = tmp_path / "out" / "000.png.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert open_archive(tmp_path / "out").verify() == ["000.png"]
    assert run(data, tmp_path / "out", **parts["run"]).done == 0
    assert run(data, tmp_path / "out", verify=True, **parts["run"]).done == 1
    assert contents(tmp_path / "out") == reference


def test_other_settings_are_refused_and_overwritten(tmp_path, parts):
    data = fill(tmp_path / "in", 2)
    run(data, tmp_path / "out", **parts["run"])
    reference = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="made with format 'safetensors' .now 'npy'.*overwrite"):
        run(data, tmp_path / "out", format="npy", **parts["run"])
    assert contents(tmp_path / "out") == reference
    summary = run(data, tmp_path / "out", format="npy", overwrite=True, **parts["run"])
    assert summary.done == 2
    assert sorted(contents(tmp_path / "out")) == ["000.png.npy", "001.jpeg.npy"]
    with pytest.raises(ValueError, match="head_sha256"):
        run(data, tmp_path / "out", kind="labels", head=torch.zeros(3, 32), format="npy", **parts["run"])
    assert not (tmp_path / "out" / "head.safetensors").exists()


@pytest.mark.parametrize("format", ["safetensors", "png", "zarr", "npy"])
def test_names_of_classes_go_along(tmp_path, parts, caplog, format):
    if format == "zarr":
        pytest.importorskip("zarr")
    data, out, names = fill(tmp_path / "in", 1), tmp_path / "out", ("sky", "Wiese", "<b>")
    save_head(tmp_path / "named.safetensors", torch.randn(3, 32), classes=names, encoder="another")
    options = {"kind": "labels", "format": format, "output_size": 20, **parts["run"]}
    assert run(data, out, head=tmp_path / "named.safetensors", **options).done == 1
    assert (
        f"made for features of the encoder 'another' and is applied to those of '{options['encoder']}'" in caplog.text
    )
    archive = open_archive(out)
    assert archive.classes("000.png") == names
    assert read_head(out / "head.safetensors").classes == names
    file = out / f"000.png.{format}" if format != "zarr" else out / "store.zarr" / "000.png"
    if format == "safetensors":
        with safe_open(file, "pt") as opened:
            assert json.loads(opened.metadata()["classes"]) == list(names)
    if format == "png":
        assert json.loads(Image.open(file).text["classes"]) == list(names)
    if format == "zarr":
        assert open_zarr().open_array(store=str(file), mode="r").attrs["classes"] == list(names)
    assert archive["000.png"].full().shape[-2:] == archive["000.png"].output_size and archive.verify() == []
    # the same again, from the copy in the folder; and with other names, which are another setting
    assert run(data, out, **options).skipped == 1
    with pytest.raises(ValueError, match="made with classes .*'sky', 'Wiese'.* .now .*'a', 'b', 'c'"):
        run(data, out, classes=("a", "b", "c"), **options)
    with pytest.raises(ValueError, match="classes: need a different name for each of the 3 outputs"):
        run(data, out, classes=("a", "b"), **options)


@pytest.mark.parametrize(
    "kind, dtype", [("features", "float32"), ("features", "int8"), ("head", "float16"), ("pca", "")]
)
def test_what_is_computed_in_is_a_setting(tmp_path, parts, kind, dtype):
    data = fill(tmp_path / "in", 2)
    options = {"kind": kind, **({"dtype": dtype} if dtype else {}), **parts["run"]}
    options.update({"head": parts["head"]} if kind == "head" else {})
    run(data, tmp_path / "exact", **options)
    assert run(data, tmp_path / "narrow", compute_dtype="bfloat16", **options).done == 2
    exact, narrow = (contents(tmp_path / name) for name in ("exact", "narrow"))
    assert exact.keys() == narrow.keys() and any(exact[name] != narrow[name] for name in exact)
    if kind == "features" and dtype == "float32":
        for name in (n for n in exact if n.endswith(".safetensors")):
            near, far = (load_file(tmp_path / folder / name)["features"] for folder in ("exact", "narrow"))
            assert 0 < (near - far).norm() / near.norm() < 5e-3
        assert run(data, tmp_path / "exact", compute_dtype="float32", **options).done == 0
    with pytest.raises(ValueError, match="made with compute_dtype 'bfloat16' .now None.; overwrite"):
        run(data, tmp_path / "narrow", **options)


def test_features_beyond_what_is_computed_in_are_named(tmp_path, parts, monkeypatch):
    data, compute = fill(tmp_path / "in", 1), stages.Upsampler.features

    def large(self, images):
        images, features = compute(self, images)
        return images, features * 1e6

    monkeypatch.setattr(stages.Upsampler, "features", large)
    summary = run(data, tmp_path / "out", dtype="float32", compute_dtype="float16", **parts["run"])
    assert list(summary.failed.values()) == [
        "its features leave the range of float16, in which is computed; leave compute_dtype out"
    ]
    with pytest.raises(ValueError, match="compute_dtype: must be one of float32, bfloat16, float16, got 'int8'"):
        Settings(compute_dtype="int8")
    with pytest.raises(ValueError, match="compute_dtype: lowres is asked in float32 later"):
        Settings(kind="lowres", compute_dtype="bfloat16")


def test_precision_is_a_setting_and_products_stay_those_of_the_run(tmp_path, parts):
    data = fill(tmp_path / "in", 2)
    products.chosen_again("convolution=direct,bfloat16=fast")
    try:
        run(data, tmp_path / "exact", dtype="float32", **parts["run"])
        run(data, tmp_path / "narrow", dtype="float32", precision="medium", **parts["run"])
        exact, narrow = (contents(tmp_path / name) for name in ("exact", "narrow"))
        assert exact.keys() == narrow.keys() and all(exact[name] != narrow[name] for name in exact)
        with pytest.raises(ValueError, match="made with precision 'medium' .now None.; overwrite"):
            run(data, tmp_path / "narrow", dtype="float32", **parts["run"])
        for path in (tmp_path / "exact").glob("000*"):
            path.unlink()
        products.chosen_again("default")
        assert run(data, tmp_path / "exact", dtype="float32", **parts["run"]).done == 1
        assert products.choice().convolution == "direct"
        assert contents(tmp_path / "exact") == exact
    finally:
        products.chosen_again()


def test_one_run_at_a_time(tmp_path, parts):
    data = fill(tmp_path / "in", 1)
    (tmp_path / "out").mkdir()
    with runner._locked(tmp_path / "out"), pytest.raises(RuntimeError, match="another run"):
        run(data, tmp_path / "out", **parts["run"])
    assert run(data, tmp_path / "out", **parts["run"]).done == 1


@pytest.mark.parametrize("batch_size", [2, 3])
def test_batches_do_not_depend_on_what_is_done(tmp_path, parts, batch_size):
    data = fill(tmp_path / "in", 9, broken=4)
    given = {**parts["run"], "batch_size": batch_size, "dtype": "float32"}
    run(data, tmp_path / "out", **given)
    reference = contents(tmp_path / "out")
    assert len(reference) == 9
    for name in ("000.png.safetensors", "inner/005.png.safetensors"):
        (tmp_path / "out" / name).unlink()
    assert run(data, tmp_path / "out", **given).done == 2
    assert contents(tmp_path / "out") == reference
    found = sources.find_sources(data)
    batches = list(grouping.batches_of(found, {"000.png"}, batch_size, 14, Settings(size=56)))
    assert [names for _, names in batches] == [{"000.png"}] and len(batches[0][0]) == batch_size


def test_manifest_drops_an_unfinished_line_and_names_a_damaged_one(tmp_path):
    manifest = Manifest(tmp_path)
    manifest.begin({"kind": "features"})
    manifest.add({"name": "a", "status": "done"})
    with open(manifest.path, "ab") as file:
        file.write(b'{"name": "b", "sta')
    again = Manifest(tmp_path)
    assert list(again.records) == ["a"]
    again.add({"name": "c", "status": "done"})
    assert list(Manifest(tmp_path).records) == ["a", "c"]
    lines = manifest.path.read_bytes().splitlines(keepends=True)
    manifest.path.write_bytes(lines[0] + b"{]\n" + lines[2])
    with pytest.raises(ValueError, match="line 2 is damaged"):
        Manifest(tmp_path)


def command_of(data, out, parts, *more):
    command = ["--quiet", "batch", str(data), str(out), "--size", "56", "--workers", "1", *map(str, more)]
    return [*command, "--encoder", parts["run"]["encoder"], "--weights", str(parts["run"]["weights"])]


def started(command):
    """The command line in a process of its own."""
    program = [
        sys.executable,
        "-c",
        "import sys; from anyup_fast import cli; sys.exit(cli.main(sys.argv[1:]))",
        *command,
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(program, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_done(process, out, count):
    """Until so many pictures are recorded as done, or the process has ended."""
    manifest = out / "manifest.jsonl"
    while process.poll() is None and (not manifest.exists() or manifest.read_text().count("done") < count):
        time.sleep(0.02)


def test_a_killed_run_gives_the_same_files(tmp_path, parts):
    data = fill(tmp_path / "in", 16, broken=3)
    options = ("--kind", "labels", "--head", parts["head"], "--output-size", "300")
    assert cli.main(command_of(data, tmp_path / "whole", parts, *options)) == 3
    command = command_of(data, tmp_path / "out", parts, *options)
    process = started(command)
    wait_for_done(process, tmp_path / "out", 4)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL  # it was in the middle of it
    assert cli.main(command) == 3
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert open_archive(tmp_path / "out").verify() == []


@pytest.mark.parametrize(
    "number, code", [pytest.param("SIGINT", 130, marks=pytest.mark.slow("SIGTERM goes the same way")), ("SIGTERM", 143)]
)
def test_signals_finish_the_picture_in_flight(tmp_path, parts, number, code):
    data = fill(tmp_path / "in", 40)
    command = command_of(data, tmp_path / "out", parts, "--output-size", "500")
    process = started(command)
    wait_for_done(process, tmp_path / "out", 2)
    process.send_signal(getattr(signal, number))
    assert process.wait(60) == code
    archive = open_archive(tmp_path / "out")
    assert 2 <= len(archive) < 40 and archive.verify() == []
    made = {path.name for path in (tmp_path / "out").rglob("*.safetensors")}
    assert made == {Path(path).name for name in archive for path in archive.record(name)["files"]}  # all recorded
    assert not (tmp_path / "out" / ".partial").exists()


def test_a_full_disk_stops_the_run_and_corrupts_nothing(tmp_path, parts, monkeypatch):
    data = fill(tmp_path / "in", 4)
    assert cli.main(command_of(data, tmp_path / "whole", parts)) == 0
    fsync = os.fsync

    def full(number):  # what is larger than a line of the manifest finds no room
        if os.fstat(number).st_size > 10_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(number)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="can't be written .No space.*0 pictures were made, 4 are left: make room"):
        run(data, tmp_path / "out", **parts["run"])
    monkeypatch.undo()
    assert list((tmp_path / "out").rglob("*.safetensors")) == []
    assert cli.main(command_of(data, tmp_path / "out", parts)) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_full_disk_while_the_manifest_is_written(tmp_path, parts, monkeypatch):
    data = fill(tmp_path / "in", 4)
    add, calls = Manifest.add, []

    def full(self, record):
        calls.append(record)
        if len(calls) == 3:  # the settings, one picture, and then no room
            raise OSError(28, "No space left on device")
        add(self, record)

    monkeypatch.setattr(Manifest, "add", full)
    with pytest.raises(OSError, match="No space left"):
        run(data, tmp_path / "out", **parts["run"])
    monkeypatch.undo()
    archive = open_archive(tmp_path / "out")
    assert 1 <= len(archive) < 4 and archive.verify() == []
    assert run(data, tmp_path / "out", **parts["run"]).complete


def test_what_was_written_is_read_back(tmp_path, parts, monkeypatch):
    data = fill(tmp_path / "in", 1)
    fsync = os.fsync

    def failing(number):
        fsync(number)
        if "partial" in os.readlink(f"/proc/self/fd/{number}"):
            os.pwrite(number, b"?", 3)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to know the file behind a number")
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="does not hold what was written"):
        run(data, tmp_path / "out", **parts["run"])
    assert list((tmp_path / "out").rglob("*.safetensors")) == []


def test_video_frames(tmp_path, parts):
    pytest.importorskip("av")
    from anyup_fast.batch.video import frame_times, read_frame, write_film

    frames = [np.asarray(picture(0, (56, 70)).rotate(6 * index)) for index in range(30)]
    film = tmp_path / "clip.mp4"
    assert write_film(frames, film, 12.5) == 30
    times = frame_times(film)
    assert len(times) == 30
    order = [7, 8, 9, 2, 29, 0]
    for index in order:  # forwards, backwards and far ahead
        assert np.abs(read_frame(str(film), times[index]).astype(int) - frames[index]).mean() < 8
        others = np.abs(read_frame(str(film), times[index]).astype(int) - frames[(index + 5) % 30]).mean()
        assert others > 12
    summary = run(film, tmp_path / "out", kind="pca", **{**parts["run"], "workers": 1})
    assert summary.done == 30
    assert open_archive(tmp_path / "out").record("frame-00000007")["source"]["frame"] == 7
    assert make_film(film, tmp_path / "out", tmp_path / "pca.mp4") == 30
    made = read_frame(str(tmp_path / "pca.mp4"), frame_times(tmp_path / "pca.mp4")[3])
    shown = open_archive(tmp_path / "out")["frame-00000003"].full().permute(1, 2, 0).numpy()
    assert np.abs(made.astype(int) - shown).mean() < 12
    with pytest.raises(ValueError, match="film: the file must end in"):
        make_film(film, tmp_path / "out", tmp_path / "pca.gif")


def test_a_damaged_video_loses_its_damaged_frames_alone(tmp_path, parts):
    pytest.importorskip("av")
    from anyup_fast.batch.video import frame_times, write_film

    film = tmp_path / "clip.mp4"
    write_film([np.asarray(picture(0, (56, 70)).rotate(6 * index)) for index in range(20)], film, 10)
    content = bytearray(film.read_bytes())
    first, last = len(content) // 2, len(content) * 11 // 20
    content[first:last] = bytes(last - first)
    film.write_bytes(content)
    assert len(frame_times(film)) == 20
    summary = run(film, tmp_path / "out", **{**parts["run"], "workers": 1})
    archive = open_archive(tmp_path / "out")
    assert 0 < summary.done < 20 and summary.done + len(summary.failed) == 20
    assert archive.verify() == [] and len(archive) == summary.done
    assert all("time" in reason or "decoded" in reason for reason in summary.failed.values())
    again = run(film, tmp_path / "out", **{**parts["run"], "workers": 1})
    assert again.done == 0 and len(again.failed) == len(summary.failed)


def test_sources(tmp_path):
    data = fill(tmp_path / "in", 6)
    (data / "notes.md").write_text("x")
    names = [source.name for source in sources.find_sources(data)]
    assert names == ["000.png", "001.jpeg", "003.bmp", "004.tiff", "inner/002.webp", "inner/005.png"]
    assert [s.name for s in sources.find_sources(data, without=data / "inner")] == names[:4]
    assert [s.name for s in sources.find_sources(str(data / "**" / "*.png"))] == ["000.png", "inner/005.png"]
    assert [s.name for s in sources.find_sources(data / "001.jpeg")] == ["001.jpeg"]
    listing = tmp_path / "list.txt"
    listing.write_text(f"# some\nin/000.png\n\n{data / 'inner' / '002.webp'}\n../elsewhere.png\n")
    listed = sources.find_sources(listing)
    assert [s.name for s in listed[:2]] == ["in/000.png", "in/inner/002.webp"] and listed[2].name.endswith(
        "elsewhere.png"
    )
    listing.write_text("in/000.png\nin/../in/000.png\n")
    with pytest.raises(ValueError, match="lines 1 and 2"):
        sources.find_sources(listing)
    for nothing in (tmp_path / "none", tmp_path / "*.png", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError, match="input: "):
            sources.find_sources(nothing)


def test_sizes_are_read_from_headers(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "b.jpg", exif=turned)
    (tmp_path / "c.png").write_bytes(b"nothing")
    found = [sources.picture_size(source) for source in sources.find_sources(tmp_path)]
    assert found == [(30, 40), (40, 30), None]
    for name, size in (("a.png", (30, 40)), ("b.jpg", (40, 30))):
        assert tuple(anyup_fast.load_image(tmp_path / name).shape[1:]) == size


@pytest.mark.parametrize(
    "given, message",
    [
        ({"kind": "depth"}, "kind: must be one of features"),
        ({"format": "png"}, "format: png holds labels"),
        ({"kind": "lowres", "format": "npy"}, "format: lowres"),
        ({"kind": "lowres", "dtype": "int8"}, "dtype: lowres"),
        ({"format": "npy", "dtype": "bfloat16"}, "dtype: npy has no bfloat16"),
        ({"size": 0}, "size: must be None"),
        ({"output_size": (3, -1)}, "output_size: must be None"),
        ({"engine": "dask"}, "engine: must be one of local, ray"),
        ({"ray_address": "auto"}, "ray_address: goes with"),
        ({"workers": -1}, "workers: must be a whole number of at least 0"),
        ({"kind": "labels"}, "head: the kind 'labels' needs one"),
        ({"head": torch.zeros(2, 32)}, "head: goes with"),
        ({"pca": "x"}, "pca: goes with"),
    ],
)
def test_wrong_settings_are_named(tmp_path, parts, given, message):
    data = fill(tmp_path / "in", 1)
    with pytest.raises(ValueError, match=message):
        run(data, tmp_path / "out", **{**parts["run"], **given})
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_values_beyond_a_dtype_are_told(tmp_path, parts, monkeypatch):
    data = fill(tmp_path / "in", 2)
    features = stages.Upsampler.features

    def large(self, images):
        images, maps = features(self, images)
        return images, maps * 1e6

    monkeypatch.setattr(stages.Upsampler, "features", large)
    summary = run(data, tmp_path / "out", **parts["run"])
    assert summary.done == 0 and all("range of float16; use bfloat16" in error for error in summary.failed.values())


def test_threads_are_given_back(tmp_path, parts):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run(fill(tmp_path / "in", 2), tmp_path / "out", at_a_time=2, **parts["run"])
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_head_of_other_channels_is_told_before_the_work(tmp_path, parts):
    data = fill(tmp_path / "in", 6)
    with pytest.raises(ValueError, match="head: it takes 5 channels, the encoder .* gives 32"):
        run(data, tmp_path / "out", kind="labels", head=torch.zeros(3, 5), **{**parts["run"], "workers": 2})
    assert not (tmp_path / "out" / "head.safetensors").exists() and not Manifest(tmp_path / "out").records


def test_progress_and_manifest(tmp_path, parts):
    told = []

    class Bar:
        def __init__(self, count):
            told.append(count)

        def update(self, count):
            told.append("update")

        def set_postfix_str(self, text):
            assert "MB/s" in text

        def close(self):
            told.append("close")

    data = fill(tmp_path / "in", 3, broken=1)
    summary = run(data, tmp_path / "out", progress=Bar, **parts["run"])
    assert told == [4, "update", "update", "update", "update", "close"]
    assert {"read", "compute", "write"} <= set(summary.stages)
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert lines[0]["is"]["size"] == 56 and lines[0]["anyup_fast"] == anyup_fast.__version__
    done = next(line for line in lines if line.get("name") == "000.png")
    path = data / "000.png"
    assert done["source"]["sha256"] == sources.file_digest(path) and done["source"]["bytes"] == path.stat().st_size
    (file,) = done["files"].items()
    assert outputs.folder_digest(tmp_path / "out" / file[0]) == file[1]


@pytest.mark.slow("minutes; one kill runs by default")
@pytest.mark.parametrize("engine, kills", [("local", 10), ("ray", 4)])
def test_kills_at_random_moments(tmp_path, parts, engine, kills):
    if engine == "ray":
        pytest.importorskip("ray")
    data = fill(tmp_path / "in", 19 * kills, broken=10)
    options = ("--kind", "labels", "--head", parts["head"], "--output-size", "200", "--engine", engine)
    assert cli.main(command_of(data, tmp_path / "whole", parts, *options)) == 3
    command, manifest = command_of(data, tmp_path / "out", parts, *options), tmp_path / "out" / "manifest.jsonl"
    rng, ends = np.random.default_rng(0), []
    code = "import sys; from anyup_fast import cli; sys.exit(cli.main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    for _ in range(kills):
        before = len(manifest.read_text().splitlines()) if manifest.exists() else 0
        process = subprocess.Popen([sys.executable, "-c", code, *command], env=environment, stderr=subprocess.DEVNULL)
        goal = before + rng.integers(16)
        while process.poll() is None and (not manifest.exists() or manifest.read_text().count("\n") <= goal):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        ends.append(process.wait())
        time.sleep(1)  # what Ray has started ends with the process that started it
    assert ends.count(-signal.SIGKILL) >= kills / 2
    assert cli.main(command) == 3
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    archive = open_archive(tmp_path / "out")
    assert (len(archive), sorted(archive.failed), archive.verify()) == (19 * kills, sorted(broken_files()), [])


@pytest.mark.slow("220 pictures in two processes")
def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path, parts):
    pytest.importorskip("resource")
    peaks = []
    for count in (20, 200):
        data = fill(tmp_path / str(count), count)
        options = ("--kind", "labels", "--head", parts["head"], "--output-size", "200")
        program = (
            "import resource, sys; from anyup_fast import cli; code = cli.main(sys.argv[1:]); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
        )
        command = [sys.executable, "-c", program, *command_of(data, tmp_path / f"out{count}", parts, *options)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        peaks.append(int(result.stdout.split()[-1]))
    assert peaks[1] < 1.1 * peaks[0], peaks


def test_a_gpu_takes_as_many_pictures_as_half_of_its_memory_holds(monkeypatch):
    encoder, settings = SimpleNamespace(patch_size=14, dim=384), Settings(size=None)

    def several(size, gibibytes):
        memory = SimpleNamespace(total_memory=gibibytes << 30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
        return grouping.at_once(size, encoder, settings, "cuda")

    assert several((448, 448), 80) == grouping.GPU_BATCH
    counts = [several((1512, 2016), gibibytes) for gibibytes in (24, 141, 192)]
    assert counts[0] == 1 < counts[1] < counts[2] < grouping.GPU_BATCH
    assert several((3024, 4032), 8) == 1, "one is always tried"
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 48 << 30)
    assert 1 < grouping.at_once((1008, 1344), encoder, settings, "mps") <= grouping.GPU_BATCH


class Far:
    """A tensor on a CUDA device that isn't there."""

    device = torch.device("cuda", 0)

    def __init__(self, held, nbytes=0):
        self.held, self.nbytes, self.shape, self.dtype = held, nbytes, held.shape, held.dtype

    def contiguous(self):
        return self

    def cpu(self):
        return "copied while everybody waits"


def test_answers_of_a_cuda_device_go_into_pinned_memory_and_one_stream_is_waited_for(monkeypatch):
    asked, told = [], []

    class Host:
        def copy_(self, far, non_blocking):
            told.append((far, non_blocking))

    def empty(shape, *, dtype, pin_memory):
        asked.append((shape, dtype, pin_memory))
        return Host()

    monkeypatch.setattr(torch, "empty", empty)
    stream = SimpleNamespace(synchronize=lambda: told.append("waited"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    far = Far(torch.zeros(2, 3))
    assert isinstance(stages._on_host(far), Host)
    assert asked == [((2, 3), torch.float32, True)] and told == [(far, True), "waited"]
    assert stages._on_host(Far(torch.zeros(2), stages.PINNED + 1)) == "copied while everybody waits"
    here = torch.zeros(3, 2).T
    assert stages._on_host(here).is_contiguous() and len(told) == 2


def test_two_batches_are_in_work_on_a_cuda_device_each_on_its_stream(monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or len(made))
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: made.append(("set", stream, threading.get_ident())))
    options = dict(at_a_time=None, writers=1, decoders=None, encoder=None)
    engines = {kind: local.LocalEngine(Settings(), ".", kind, **options) for kind in ("cuda", "mps")}
    assert {kind: engine.at_a_time for kind, engine in engines.items()} == {"cuda": 2, "mps": 1}
    total = torch.get_num_threads()
    for kind, engine in engines.items():
        with local._sharing_threads(engine.at_a_time, kind) as start:
            threads = [threading.Thread(target=start) for _ in range(engine.at_a_time)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert torch.get_num_threads() == total
    sets = [one for one in made if isinstance(one, tuple)]
    assert made.count("cuda") == len({stream for _, stream, _ in sets}) == len(sets) == 2


def test_groups_are_cut_by_the_size_of_their_pictures(tmp_path):
    fill(tmp_path / "in", 9, sizes=((60, 76), (76, 60)), broken=1)
    found = sources.find_sources(str(tmp_path / "in"))
    asked = []

    def batch_size(size):
        asked.append(size)
        return 2 if size[0] < size[1] else 3

    names = {source.name for source in found}
    batches = list(grouping.batches_of(found, names, batch_size, 14, Settings(size=None)))
    assert set().union(*(wanted for _, wanted in batches)) == names
    assert len(asked) == 2 and sorted(len(batch) for batch, _ in batches) == [1, 1, 1, 2, 2, 3]
