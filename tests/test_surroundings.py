"""Programs as people write them around a model: modes, frozen parts, processes, defaults of PyTorch, threads."""

import functools
import gc
import io
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import standins
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file
from tree import ROOT

import anyup_fast
from anyup_fast import AnyUp, api, cli
from anyup_fast.checkpoints import save_checkpoint
from anyup_fast.encoders import load_encoder
from anyup_fast.heads import load_head

PARTS = "image_encoder query_encoder key_encoder key_features_encoder aggregation cross_decode rope".split()
CONFIGS = [{}, {"kernel_size": 3}]  # the fused layers that record gradients, and the plain ones


def given(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 28, 35, generator=generator), torch.randn(2, 8, 4, 5, generator=generator)


def gradients(model, image, features, **options):
    """Those of the parameters, by name; of a frozen one None."""
    model.zero_grad()
    model(image, features, **options).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def started(script, *arguments, env=None):
    """A process that runs a script beside the tests' support, its output kept."""
    paths = [str(ROOT / "tests" / "support"), str(ROOT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **(env or {})}
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def output(process, timeout=120):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err
    return out, err


# ---- modes


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("which", ["image", "features", "both"])
def test_tensors_made_in_inference_mode_serve_training(config, which):
    model = tiny.model(**config)
    with torch.inference_mode():
        kept = given()
    plain = given()
    image = kept[0] if which != "features" else plain[0]
    features = kept[1] if which != "image" else plain[1]
    for options in ({}, {"output_size": (14, 20)}):
        expected = gradients(model, *plain, **options)
        for name, grad in gradients(model, image, features, **options).items():
            assert torch.equal(grad, expected[name]), name
    asks = plain[0].clone().requires_grad_()
    assert torch.autograd.grad(model(asks, features).sum(), asks)[0].any()
    encoded = model.guidance(plain[0]).detach()
    model.upsample(encoded, features, (28, 35)).sum().backward()


@pytest.mark.parametrize("kind", ["published", "natten"])
def test_accelerated_modules_train_on_tensors_made_in_inference_mode(kind):
    module = standins.build(kind)
    anyup_fast.accelerate(module)
    with torch.inference_mode():
        kept = given()
    expected = gradients(module, *given())
    assert all(torch.equal(grad, expected[name]) for name, grad in gradients(module, *kept).items())


def test_weights_loaded_in_inference_mode_serve_training(tmp_path):
    weights = tiny.checkpoint(tmp_path / "model.safetensors")
    image, features = given()
    with torch.inference_mode():
        loaded = AnyUp.from_pretrained(weights)
        anyup_fast.upsample_features_with_anyup(image, features, weights=weights)
    kept = api._model(weights, torch.device("cpu"))
    for model in (loaded, kept):
        assert gradients(model, image, features)["rope.freqs"].any()
        torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_an_encoder_loaded_in_inference_mode_passes_gradients_on(tmp_path):
    pytest.importorskip("transformers")
    name = tiny.encoder_folder(tmp_path)
    with torch.inference_mode():
        load_encoder(name)
    image = given()[0][..., :28].clone().requires_grad_()
    load_encoder(name)(image).sum().backward()
    assert image.grad.any()


# ---- frozen parts


@pytest.mark.parametrize("config", CONFIGS)
def test_a_frozen_model_passes_gradients_on(config):
    model, free = tiny.model(**config).requires_grad_(False), tiny.model(**config)
    for asking in ((True, True), (True, False), (False, True)):
        found = []
        for one in (model, free):
            pair = [tensor.requires_grad_(asks) for tensor, asks in zip(given(), asking, strict=True)]
            one(*pair).square().sum().backward()
            found.append([tensor.grad for tensor in pair if tensor.requires_grad])
        for grad, expected in zip(*found, strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert not model(*given()).requires_grad


@pytest.mark.parametrize("part", PARTS)
def test_parts_may_be_frozen_or_alone_be_trained(part):
    expected = gradients(tiny.model(), *given())
    for trained in (False, True):
        model = tiny.model().requires_grad_(not trained)
        getattr(model, part).requires_grad_(trained)
        for name, grad in gradients(model, *given()).items():
            if name.startswith(f"{part}.") != trained:
                assert grad is None, name
            else:
                torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-6, msg=name)


# ---- several processes

SEVERAL = """
    import os, sys
    import torch, torch.distributed as dist
    import anyup_fast, standins
    from torch.nn.parallel import DistributedDataParallel

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1], RANK=sys.argv[2], WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")

    def own(**config):
        torch.manual_seed(0)
        return anyup_fast.AnyUp(qk_dim=32, **config)

    def frozen():
        model = own()
        model.image_encoder.requires_grad_(False)
        return model

    def accelerated(kind):
        model = standins.build(kind)
        assert anyup_fast.accelerate(model).replaced
        return model

    kinds = {"own": own, "plain layers": lambda: own(kernel_size=3), "frozen": frozen}
    kinds |= {kind: lambda kind=kind: accelerated(kind) for kind in standins.CLASSES}
    for name, make in kinds.items():
        model = DistributedDataParallel(make())
        torch.manual_seed(dist.get_rank())
        mask = [None] if name == "falcon" else []
        for _ in range(3):  # what lacks a gradient is told in the second
            model(torch.randn(1, 3, 28, 28), torch.randn(1, 8, 4, 4), *mask).square().mean().backward()
        total = sum(p.grad.double().sum() for p in model.parameters() if p.grad is not None).reshape(1)
        both = [torch.empty_like(total) for _ in range(2)]
        dist.all_gather(both, total)
        assert torch.equal(*both) and total.abs() > 0, (name, both)
        print(name, flush=True)
    dist.destroy_process_group()
    os._exit(0)  # a thread of gloo aborts the ordinary end now and then, with plain layers alone as well
"""


def test_distributed_training_finds_a_gradient_for_every_parameter():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [started(SEVERAL, port, rank) for rank in range(2)]
    try:
        for rank in ranks:
            assert len(output(rank)[0].splitlines()) == 3 + len(standins.CLASSES)
    finally:
        for rank in ranks:
            rank.kill()


# ---- defaults of PyTorch

PICTURE = np.random.default_rng(0).integers(0, 256, (45, 61, 3), dtype=np.uint8)


def forget():
    """Empty what the package keeps, so that it is made under the defaults of now."""
    for kept in gc.get_objects():
        if type(kept) is functools._lru_cache_wrapper and kept.__module__.startswith("anyup_fast"):
            kept.cache_clear()


def everything(weights, encoder, folder):
    """Answers of the verbs and of the module, by what was asked."""
    image = anyup_fast.load_image(PICTURE)
    features = torch.from_numpy(np.random.default_rng(1).standard_normal((8, 5, 7)).astype(np.float32))
    head = torch.from_numpy(np.random.default_rng(2).standard_normal((3, 8)).astype(np.float32))
    prepared = anyup_fast.prepare(image, features, weights)
    up = functools.partial(anyup_fast.upsample_features_with_anyup, image, features, weights=weights)
    small = anyup_fast.load_image(PICTURE, (42, 56))
    model = AnyUp.from_pretrained(weights)
    model(image[None], features[None]).square().mean().backward()
    everywhere = AnyUp.from_pretrained(weights)
    everywhere.cross_decode.window_ratio = 0.0
    figure = anyup_fast.visualize_feature_comparison(image, features, up(), "pca")
    return {
        "picture": image,
        "camera": anyup_fast.load_image(PICTURE.astype(np.int16), 30, value_range=(0, 255)),
        "verb": up(),
        "float64": anyup_fast.upsample_features_with_anyup(image, features.double(), weights=weights),
        "another size": up((30, 71)),
        "reference": up(backend="reference"),
        "value_range": up(value_range="imagenet"),
        "region": prepared.region(3, 4, 20, 21),
        "points": prepared.at([[3, 4], [40, 1]]),
        "normalised points": prepared.at([[0.31, 0.42], [0.99, 0.1]], align="normalized"),
        "attention": prepared.attention(20, 20),
        "attention_map": prepared.attention_map(),
        "head": prepared.head(head).full(),
        "labels": prepared.head(head, argmax=True).full(),
        "stream": torch.from_numpy(np.load(prepared.stream(16, out=folder / "out.npy"))),
        "rows": anyup_fast.prepare(PICTURE, features, weights).region(2, 2, 9, 9),
        "global": everywhere(image[None], features[None]),
        "neighborhood": AnyUp.from_pretrained(weights, window_rule="neighborhood")(image[None], features[None]),
        "vis_attn": model(image[None], features[None], vis_attn=True)[1],
        "max_memory": torch.no_grad()(model)(image[None], features[None], max_memory=10**8),
        "gradients": torch.cat([parameter.grad.flatten() for parameter in model.parameters()]),
        "figure": torch.from_numpy(np.asarray(Image.open(io.BytesIO(figure._repr_png_()))).copy()),
        "encoder": anyup_fast.extract_features(small, encoder),
    }


@pytest.mark.parametrize(
    "default",
    [
        torch.float64,
        torch.bfloat16,
        "meta",
        pytest.param(torch.float16, marks=pytest.mark.slow("bfloat16 is narrow, too")),
    ],
)
def test_defaults_of_pytorch_change_nothing(tmp_path, monkeypatch, default):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    weights = tiny.checkpoint(tmp_path / "model.safetensors")
    encoder = tiny.encoder_folder(tmp_path / "encoder")
    forget()
    try:
        if default == "meta":
            torch.set_default_device(default)
        else:
            torch.set_default_dtype(default)
        got = everything(weights, encoder, tmp_path)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    monkeypatch.setattr("anyup_fast.encoders._loaded", {})
    forget()
    (tmp_path / "out.npy").unlink()
    for name, expected in everything(weights, encoder, tmp_path).items():
        assert got[name].dtype == expected.dtype and got[name].device == expected.device, name
        torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_lite0_s8"])
def test_defaults_of_pytorch_do_not_round_an_encoder(monkeypatch, name):
    image = anyup_fast.load_image(PICTURE, (32, 64))
    try:
        expected = load_encoder(name)(image[None])
    except RuntimeError as error:
        pytest.skip(str(error))
    monkeypatch.setattr("anyup_fast.encoders._loaded", {})
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = load_encoder(name)(image[None])
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, expected)


# ---- threads at the end of a process

AT_THE_END = """
    import sys, threading, time
    import torch, anyup_fast

    what, threads, after, daemon = sys.argv[1:]
    torch.set_num_threads(int(threads))
    image, features = torch.randn(3, 70, 70), torch.randn(16, 5, 5)
    model = anyup_fast.AnyUp(qk_dim=32)

    def verb():
        anyup_fast.upsample_features_with_anyup(image, features, weights=model)

    def training():
        model(image[None], features[None]).mean().backward()

    def parts():
        prepared = anyup_fast.prepare(image, features, weights=model)
        prepared.region(3, 3, 40, 40), prepared.at([[1, 2]])

    begun = []

    def compute(call, begun):
        for number in range(10**6 if daemon == "daemon" else 6):
            call()
            begun.set()
        print("done", call.__name__, flush=True)

    for name in what.split():
        begun.append(threading.Event())
        threading.Thread(target=compute, args=(locals()[name], begun[-1]), daemon=daemon == "daemon").start()
    for event in begun:
        event.wait()
    time.sleep(float(after))
    print("end", flush=True)
"""


def ended(what, threads, after, daemon="daemon"):
    process = started(AT_THE_END, what, threads, after, daemon, env={"OMP_NUM_THREADS": str(threads)})
    out, err = output(process)
    assert err == ""
    return out.split("\n")[:-1]


# Alone and at other moments: slow, in the sweep below.
@pytest.mark.parametrize("what, threads", [("parts verb training", 2)])
def test_a_process_ends_while_a_daemon_thread_computes(what, threads):
    assert ended(what, threads, 0.03) == ["end"]


@pytest.mark.slow("fifty processes")
@pytest.mark.parametrize("after", [0, 0.01, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("what", ["verb", "training", "parts", "verb verb", "parts training"])
def test_a_process_ends_at_any_moment(what, threads, after):
    assert ended(what, threads, after) == ["end"]


def test_threads_that_are_no_daemons_compute_to_their_end():
    assert sorted(ended("verb training parts", 2, 0, "stays")) == ["done parts", "done training", "done verb", "end"]


# ---- paths


def test_the_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    tiny.photograph(tmp_path / "photo.png", (42, 56))
    tiny.encoder_folder(tmp_path / "encoder")
    save_checkpoint("~/new/weights.safetensors", tiny.model().state_dict(), tiny.CONFIG)
    save_file({"weight": torch.randn(3, 32)}, tmp_path / "head.safetensors")
    image = anyup_fast.load_image("~/photo.png")
    assert torch.equal(image, anyup_fast.load_image(tmp_path / "photo.png"))
    assert torch.equal(image, anyup_fast.load_image(Path("~/photo.png")))
    features = anyup_fast.extract_features(image, "hf:~/encoder")
    model = AnyUp.from_pretrained("~/new/weights.safetensors")
    prepared = anyup_fast.prepare(image, features, "~/new/weights.safetensors").head(load_head("~/head.safetensors"))
    assert prepared.stream(32, out="~/new/logits.npy") == tmp_path / "new" / "logits.npy"
    expected = anyup_fast.prepare(image, features, model).head(load_head(tmp_path / "head.safetensors")).full()
    torch.testing.assert_close(torch.from_numpy(np.load("new/logits.npy")), expected, rtol=1e-4, atol=1e-4)
    anyup_fast.visualize_feature_comparison("~/photo.png", features, features, path="~/new/figure.png")
    command = ["upsample", "~/photo.png", "--encoder", "hf:~/encoder", "--weights", "~/new/weights.safetensors"]
    assert cli.main([*command, "--size", "28", "--device", "cpu", "--out", "~/new/out.safetensors"]) == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "weights.safetensors",
        "logits.npy",
        "figure.png",
        "out.safetensors",
    }
    assert not (tmp_path / "~").exists()
    with pytest.raises(FileNotFoundError, match="there is no file '~/absent.png'"):
        anyup_fast.load_image("~/absent.png")


# ---- places in a picture


def crossing(values):
    """Where values (N,) first pass the middle between both ends, as a fraction of an index."""
    middle = (values[0] + values[-1]) / 2
    after = int(((values > middle) != (values[0] > middle)).nonzero()[0])
    before, there = values[after - 1], values[after]
    return after - 1 + float((middle - before) / (there - before)) + 0.5  # from centres of pixels to edges


@pytest.mark.parametrize("height, width, edge", [(252, 336, 201), (301, 188, 95), (170, 391, 262)])
@pytest.mark.parametrize("way", ["stretched", "padded"])
def test_places_are_those_of_the_picture(height, width, edge, way):
    picture = np.full((height, width, 3), 30, np.uint8)
    picture[:, edge:] = 220
    if way == "stretched":
        image = anyup_fast.load_image(picture, size=112, patch_multiple=14)
        size = height, width
    else:
        image = anyup_fast.load_image(picture)
        beyond = -width % 14, -height % 14
        image = torch.nn.functional.pad(image, (0, beyond[0], 0, beyond[1]), mode="replicate")
        size = tuple(image.shape[1:])
    grid = image.shape[1] // 14, image.shape[2] // 14
    left = torch.nn.functional.adaptive_avg_pool2d((image[:1] < 0).float(), grid)
    prepared = anyup_fast.prepare(image, left)
    pixel = size[1] / image.shape[2]  # of the guide, in pixels of the picture
    row, near = height // 2, range(edge - 40, edge + 40)
    by_pixel = prepared.at([[row, col] for col in near], output_size=size)[0, :, 0]
    by_share = prepared.at([[(row + 0.5) / size[0], (col + 0.5) / size[1]] for col in near], align="normalized")
    whole = prepared.region(row, near[0], 1, len(near), output_size=size)[0, 0, 0]
    for values in (by_pixel, by_share[0, :, 0], whole):
        assert abs(near[0] + crossing(values) - edge) <= max(pixel, 1), way


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_a_picture_may_be_left_as_it_is_stored(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    Image.fromarray(PICTURE).save(path, exif=exif)
    stored = anyup_fast.load_image(np.asarray(Image.open(path)) if suffix == "jpg" else PICTURE)
    assert torch.equal(anyup_fast.load_image(path, upright=False), stored)
    assert torch.equal(anyup_fast.load_image(Image.open(path), upright=False), stored)
    upright = torch.rot90(stored, {3: 2, 4: 2, 5: 3, 6: 3, 7: 1, 8: 1}.get(orientation, 0), (1, 2))
    assert torch.equal(anyup_fast.load_image(path), upright.flip(2) if orientation in (2, 4, 5, 7) else upright)
