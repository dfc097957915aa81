"""Programs as people write them around a model: modes, frozen parts, processes, defaults of PyTorch, threads."""

import os
import socket
import subprocess
import sys
import textwrap

import pytest
import standins
import tiny
import torch
from tree import ROOT

import anyup_fast
from anyup_fast import AnyUp, api
from anyup_fast.encoders import load_encoder

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
        print(name)
    dist.destroy_process_group()
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
