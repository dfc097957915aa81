"""Devices without float64: every path runs there, with float32's accuracy, and rounds no float32 product to TF32."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from elsewhere import NAME, Elsewhere, There
from tree import ROOT

from anyup_fast import AnyUp, api, ops
from anyup_fast.layers import GroupNorm, reflected
from anyup_fast.ops.attention import runs_plain
from anyup_fast.plain import norms, pooling, walks, whole, width
from anyup_fast.plain.convolution import ONE_PRODUCT, convolve
from anyup_fast.plain.guidance import Colours
from anyup_fast.plain.rotary import Rotary

BENCHMARKS = ROOT / "benchmarks"
SIZE, GRID, OTHER, FINER = (60, 75), (5, 6), (23, 31), (70, 71)  # nothing divides
GRADIENTS = 5e-5  # Measured 9e-6, and 7e-6 on the CPU.
UNUSED = "out_proj"


def peaky(**config):
    """A small model with weights far from their initial values, normalisations included."""
    torch.manual_seed(0)
    model = AnyUp(**{"qk_dim": 32, **config}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def picture(size, offset=0.0, seed=0):
    """Noise of all scales with a mean that is not zero, as photographs have it: (1, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.full((1, 3, *size), float(offset))
    for octave in range(6):
        coarse = torch.randn(1, 3, 3 * 2**octave, 3 * 2**octave, generator=generator)
        image += F.interpolate(coarse, size, mode="bilinear") * 0.6**octave
    return image


def inputs(size=SIZE, channels=12, grid=GRID):
    generator = torch.Generator().manual_seed(1)
    return picture(size, 0.7), torch.randn(1, channels, *grid, generator=generator)


def there(*things):
    return [thing.to(NAME) for thing in things]


def distance(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def frugal(model, image, features):
    """The plan by tiles, whatever the call would take."""
    with pytest.raises(ValueError, match="least that suffices") as caught:
        model(image, features, max_memory=1 << 20)
    least = int(str(caught.value).split()[-1])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(AnyUp, "estimate_memory", lambda *arguments: least + 1)
        return model(image, features, max_memory=least)


def streamed(prepared):
    out = torch.empty(1, prepared.channels, *SIZE, dtype=prepared.maps.dtype)
    return prepared.stream(tile=40, out=out)


def read_by_rows(model, image, features):
    rows = np.random.default_rng(0).random((*SIZE, 3)).astype(np.float64)
    return model.prepare(rows, features).full()


def head(features, **options):
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(4))
    return features.head(weight.to(features.maps), **options)


PATHS = {
    "forward": lambda m, i, f: m(i, f),
    "forward to fewer pixels": lambda m, i, f: m(i, f, OTHER),
    "forward to more pixels": lambda m, i, f: m(i, f, FINER),
    "where it looks": lambda m, i, f: m(i, f, vis_attn=True)[1],
    "full": lambda m, i, f: m.prepare(i, f).full(),
    "full after the first time": lambda m, i, f: twice(m.prepare(i, f), None),
    "full of another size": lambda m, i, f: twice(m.prepare(i, f), OTHER),
    "full of many columns": lambda m, i, f: twice(m.prepare(i, f), FINER),
    "region": lambda m, i, f: m.prepare(i, f).region(7, 9, 30, 40),
    "points": lambda m, i, f: m.prepare(i, f).at([[0, 0], [59, 74], [20, 33]]),
    "points of another size": lambda m, i, f: m.prepare(i, f).at([[22, 30], [3, 4]], OTHER),
    "attention": lambda m, i, f: m.prepare(i, f).attention(11, 12),
    "head": lambda m, i, f: head(m.prepare(i, f)).full(),
    "stream": lambda m, i, f: streamed(m.prepare(i, f)),
    "rows": read_by_rows,
    "tiles": frugal,
    "plain layers": lambda m, i, f: m.cross_decode(m.queries(m.guidance(i), OTHER), m.keys(m.guidance(i), f), f),
}


def twice(prepared, size):
    prepared.full()
    return prepared.full(size)


@pytest.mark.parametrize("in_pieces", [False, True])
@pytest.mark.parametrize("path", PATHS)
@torch.no_grad()
def test_a_path_needs_no_float64_and_loses_nothing(path, in_pieces, monkeypatch):
    if in_pieces:  # as images are that are too large to be computed as a whole
        monkeypatch.setattr(whole, "PIXELS", 0)
    model, given = peaky(), inputs()
    expected = PATHS[path](peaky().double(), *(tensor.double() for tensor in given))
    near = distance(PATHS[path](model, *given), expected)
    with Elsewhere() as device:
        actual = PATHS[path](model.to(NAME), *there(*given)).cpu()
    assert sum(device.counts.values()) > 100
    assert not {"convolution", "_adaptive_avg_pool2d"} & set(device.counts)
    # Measured 8e-8 to 1.3e-6, on the CPU 9e-8 to 8e-7: these weights multiply rounding errors.
    assert distance(actual, expected) < 2 * near + 5e-7


@torch.no_grad()
def test_labels_need_no_float64():
    model, given = peaky(), inputs()
    expected = head(model.prepare(*given), argmax=True).full()
    with Elsewhere():
        actual = head(model.to(NAME).prepare(*there(*given)), argmax=True).full().cpu()
    assert (actual == expected).float().mean() > 0.999


def gradients(model, image, features, size):
    """Of a fixed sum of the output, by name, on the CPU."""
    image, features = (tensor.detach().requires_grad_() for tensor in (image, features))
    model.zero_grad()
    out = model(image, features, size)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    (out * weight).sum().backward()
    named = {name: parameter for name, parameter in model.named_parameters() if UNUSED not in name}
    return {name: tensor.grad.cpu() for name, tensor in {"image": image, "features": features, **named}.items()}


@pytest.mark.parametrize("config", [{}, dict(kernel_size=3)])
@pytest.mark.parametrize("size", [None, OTHER, (30, 25)])
def test_training_needs_no_float64_and_no_pooling_without_an_order(size, config):
    model, given = peaky(**config), inputs()
    expected = gradients(peaky(**config).double(), *(tensor.double() for tensor in given), size)
    with Elsewhere() as device:
        actual = gradients(model.to(NAME), *there(*given), size)
    assert not [name for name in device.counts if "conv" in name or "pool2d" in name or "pad2d" in name]
    floor = 1e-3 * max(grad.norm().item() for grad in expected.values())
    for name, grad in actual.items():
        wrong = (grad.double() - expected[name]).norm().item()
        assert wrong <= GRADIENTS * max(expected[name].norm().item(), floor), name


def test_an_optimizer_needs_no_float64():
    with Elsewhere():
        model, (image, features) = peaky().to(NAME), there(*inputs())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(image, features, OTHER).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


@torch.no_grad()
def test_the_device_refuses_what_it_has_not(monkeypatch):
    model, given = peaky(), inputs()
    with Elsewhere():
        ones, model = torch.ones(1, 2, 7, 7, device=NAME), model.to(NAME)
        assert isinstance(ones, There) and ones.device.type == NAME
        for refused in (
            lambda: ones.double(),
            lambda: torch.zeros(3, dtype=torch.float64, device=NAME),
            lambda: torch.zeros(3, dtype=torch.float64).to(NAME),
            lambda: torch.tensor([0.5], dtype=torch.float64, device=NAME),
        ):
            with pytest.raises(TypeError, match="no float64"):
                refused()
        with pytest.raises(RuntimeError, match="on the CPU"):
            ones + torch.ones(7)
        with pytest.raises(RuntimeError, match="must be divisible"):
            F.adaptive_avg_pool2d(ones, 3)
        monkeypatch.setattr(whole, "PIXELS", 0)
        monkeypatch.setattr(walks, "MANY_PIXELS", 1000)  # one piece needs no sums of pieces
        monkeypatch.setattr(norms, "wide_of", lambda *_: torch.float64)
        with pytest.raises(TypeError, match="no float64"):
            model(*there(*given))
    with Elsewhere(refuse=False) as device:
        model(*there(*given))
    assert sum(device.float64.values()) > 50


@pytest.mark.parametrize("side", [168, pytest.param(448, marks=pytest.mark.slow("a larger picture"))])
@torch.no_grad()
def test_shipped_weights_are_as_good_as_on_a_cpu(side):
    image, features = inputs((side, side), 48, (side // 14, side // 14))
    expected = AnyUp.from_pretrained().double()(image.double(), features.double())
    with Elsewhere():
        actual = AnyUp.from_pretrained().to(NAME)(*there(image, features)).cpu()
    assert distance(actual, expected) < 3e-6


@pytest.mark.parametrize("photo, name, start, step", [("astronaut224", "anyup_multi_backbone", (3, 5), 8)])
@torch.no_grad()
def test_published_features_of_a_photograph(photo, name, start, step):
    folder = os.environ.get("ANYUP_FAST_REFERENCE")
    if not folder:
        pytest.skip("needs the published checkpoints: name a folder with weights/ and golden/ in ANYUP_FAST_REFERENCE")
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(Path(folder, "golden", "published.safetensors"), "pt") as file:
        parts = "image", "features", f"{name}.output_stride{step}"
        image, features, expected = (file.get_tensor(f"{photo}.{part}") for part in parts)
    with Elsewhere():
        model = AnyUp.from_pretrained(Path(folder, "weights", f"{name}.pth")).to(NAME)
        actual = model(*there(image, features)).cpu()
    # Measured 1.3e-6, and 1.2e-6 on the CPU.
    assert distance(actual[..., start[0] :: step, start[1] :: step], expected) < 3e-6


@pytest.mark.parametrize("in_pieces", [False, True])
@pytest.mark.parametrize("side", [300, pytest.param(1500, marks=pytest.mark.slow("a larger picture"))])
@torch.no_grad()
def test_sums_over_many_pixels_far_from_zero(side, in_pieces, monkeypatch):
    monkeypatch.setattr(whole, "PIXELS", 0 if in_pieces else side * side)
    monkeypatch.setattr(walks, "MANY_PIXELS", min(walks.MANY_PIXELS, side * side // 7))
    image, key_size = picture((side, side), 2.5), (side // 50, side // 50)
    weights = peaky().guidance_weights()
    _, key, scales = ops.guidance(
        image.double(), peaky().double().guidance_weights(), (0, 0), key_size, dtype=torch.float64
    )
    near = ops.guidance(image, weights, (0, 0), key_size)
    with Elsewhere():
        far = ops.guidance(image.to(NAME), peaky().to(NAME).guidance_weights(), (0, 0), key_size)
        far = [tensor.cpu() for tensor in far]
    # Measured 1e-7 for the scales and 2e-7 for the keys, on both.
    assert distance(far[2], scales) < 2 * distance(near[2], scales) + 2e-7
    assert distance(far[1], key) < 2 * distance(near[1], key) + 5e-7
    assert distance(far[2], scales) < 3e-6


@pytest.mark.parametrize("counts", [[5000], [4096] * 40, [3000, 7, 500] * 100])
@torch.no_grad()
def test_moments_of_pieces(counts):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), 16, generator=generator) * torch.linspace(0.1, 2, 16) + torch.linspace(-40, 40, 16)
    weight, bias = torch.linspace(0.5, 2, 16), torch.linspace(-1, 1, 16)
    groups = x.double().unflatten(1, (4, 4))
    mean, variance = groups.mean((0, 2)), groups.var((0, 2), correction=0)
    with Elsewhere():
        moments = norms.Moments()
        for part in x.split(counts):
            moments.add(part.to(NAME))
        mean_there, inverse_there = moments.groups(4).cpu()
        scale, shift = moments.affine(*there(weight, bias), 4).cpu()
    assert distance(mean_there, mean) < 3e-7
    assert distance(inverse_there, (variance + norms.NORM_EPS).rsqrt()) < 3e-7
    expected = F.group_norm(x.double().T[None], 4, weight.double(), bias.double(), norms.NORM_EPS)[0].T
    assert distance(x.double() * scale.double() + shift.double(), expected) < 3e-6


@pytest.mark.parametrize("parts", [1, 7])
@torch.no_grad()
def test_colours_far_from_zero(parts):
    rgb = picture((300, 400), 30.0)[0].flatten(1).T.contiguous()
    conv = torch.randn(32, 3, generator=torch.Generator().manual_seed(1))
    conv[:16] -= conv[:16].mean(1, keepdim=True)  # these see no grey
    colours = Colours()
    with Elsewhere():
        for part in rgb.to(NAME).tensor_split(parts):
            colours.add(part)
        scale, shift = colours.affine(*there(conv, torch.ones(32), torch.zeros(32)), 8).cpu()
    x = rgb.double() @ conv.double().T
    expected = F.group_norm(x.T[None], 8)[0].T
    assert distance(x * scale.double() + shift.double(), expected) < 3e-6
    naive = x.float().square().mean(0) - x.float().mean(0).square()
    assert distance(naive, x.var(0, correction=0)) > 1e-5, "what the pixels are far from must matter"


@torch.no_grad()
def test_group_norm_over_many_pixels():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 448, 448, generator=generator).contiguous(memory_format=torch.channels_last) + 3
    norm = GroupNorm(4, 16)
    norm.weight.copy_(torch.linspace(0.5, 2, 16))
    expected = F.group_norm(x.double().contiguous(), 4, norm.weight.double(), norm.bias.double())
    with Elsewhere():
        actual = norm.to(NAME)(x.to(NAME)).cpu()
    assert distance(actual, expected) < 3e-7


@pytest.mark.parametrize("size", [(1, 5), (448, 300), (10000, 3)])
def test_tables_of_angles(size):
    freqs = 30 * torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    with Elsewhere():
        tables = Rotary(freqs.to(NAME), size, torch.float32)
        tables = [[table.cpu() for table in axis] for axis in (tables.rows, tables.cols)]
    for (cos, sin), n, part in zip(tables, size, freqs.double(), strict=True):
        angle = torch.linspace(0, 1, n, dtype=torch.float64)[:, None] * part
        # Measured 1.3e-7; the angle in float32 gives 3e-6.
        assert max((cos - angle.cos()).abs().max(), (sin - angle.sin()).abs().max()) < 2e-7
    angle = torch.linspace(0, 1, 448)[:, None] * freqs[0]
    assert (angle.cos() - angle.double().cos()).abs().max() < 1e-7, "PyTorch's cosine is not what is off"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(7, 9), (10, 5), (30, 40), (1, 1), (33, 90)])
def test_pooling_by_products(size, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 30, 40, 8, generator=generator).to(dtype)
    grad = torch.randn(2, *size, 8, generator=generator).to(dtype)
    exact = x.double().requires_grad_()
    expected = F.adaptive_avg_pool2d(exact.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)
    expected.backward(grad.double())
    with Elsewhere() as device:
        x, grad = there(x, grad)
        out = ops.pooled(x.requires_grad_(), size)
        out.backward(grad)
        other = pooling.pooled_backward(grad, x)
        found = out.detach().cpu(), x.grad.cpu(), other.cpu()
    assert not [name for name in device.counts if "adaptive" in name or "index" in name]
    tolerance = 3e-7 if dtype == torch.float32 else 5e-3
    for actual, wanted in zip(found, (expected.detach(), exact.grad, exact.grad), strict=True):
        assert actual.dtype == dtype and distance(actual, wanted) < tolerance


@pytest.mark.parametrize("channels, size", [(3, 3), (ONE_PRODUCT, 3), (16, 1), (1, 5)])
@pytest.mark.parametrize("padding", [0, 1])
def test_convolutions_by_products(channels, size, padding):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((2, channels, 6, 7), (4, channels, size, size)))
    wide = [tensor.double().requires_grad_() for tensor in (x, weight)]
    expected = F.conv2d(*wide, padding=padding)
    expected.square().sum().backward()
    with Elsewhere() as device:
        given = [tensor.requires_grad_() for tensor in there(x, weight)]
        actual = convolve(*given, padding)
        actual.square().sum().backward()
        found = [actual.detach().cpu(), *(tensor.grad.cpu() for tensor in given)]
    assert not [name for name in device.counts if "conv" in name]
    for one, other in zip(found, (expected.detach(), *(tensor.grad for tensor in wide)), strict=True):
        assert one.shape == other.shape and distance(one, other) < 2e-6


@pytest.mark.parametrize("size", [(5, 6), (2, 6), (5, 1), (3, 2)])
@pytest.mark.parametrize("pad", [1, 2])
def test_reflection_without_an_own_gradient(size, pad):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected = reflected(x, pad)
    expected.square().sum().backward()
    with Elsewhere() as device:
        given = x.detach().to(NAME).requires_grad_()
        actual = reflected(given, pad)
        actual.square().sum().backward()
        actual, grad = actual.detach().cpu(), given.grad.cpu()
    assert not [name for name in device.counts if "pad2d" in name]
    assert torch.equal(actual, expected.detach()) and distance(grad, x.grad) < 1e-6


@torch.no_grad()
def test_the_twin_of_the_unification_rounds_as_products_do():
    features, basis = torch.randn(1, 9, 6, 7), torch.randn(8, 1, 5, 5)
    expected = ops.feature_unification(features.double(), basis.double(), backend="reference")
    for backend in ("torch", "reference"):
        with Elsewhere():
            actual = ops.feature_unification(*there(features, basis), backend=backend).cpu()
        assert distance(actual, expected) < 1e-6


def test_triton_is_not_asked_for_float64_where_there_is_none(monkeypatch):
    image = SimpleNamespace(shape=(1, 3, 8, 8), device=torch.device("xpu"))
    module = sys.modules["anyup_fast.ops.guidance"]  # beside a function of its name
    monkeypatch.setattr(module, "why_no_triton", lambda *_: None)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda _: SimpleNamespace(has_fp64=False))
    reason = module._why_not_guidance("triton", image, AnyUp().guidance_weights(), torch.bfloat16)
    assert "needs float64" in reason


@torch.no_grad()
def test_float64_is_narrowed_before_it_goes_and_widened_at_home():
    model, (image, features) = peaky(), (tensor.double() for tensor in inputs())
    expected = model(image.float(), features.float())
    with Elsewhere():
        model = model.to(NAME)
        actual = api.upsample_features_with_anyup(image, features, weights=model, device=NAME)
        single = api.upsample_features_with_anyup(image.float(), features.float(), weights=model, device=NAME)
        prepared = api.prepare(image, features, weights=model, device=NAME).full()
        read = api.prepare(np.random.default_rng(0).random((*SIZE, 3)), features, weights=model, device=NAME)
        assert read.full().dtype == torch.float32
        assert single.device.type == prepared.device.type == NAME
        assert single.dtype == prepared.dtype == torch.float32
        near = prepared.cpu()
        with pytest.raises(ValueError, match="features: holds NaN"):
            api.upsample_features_with_anyup(image, features / 0, weights=model, device=NAME)
    assert actual.device.type == "cpu" and actual.dtype == torch.float64
    assert distance(actual, expected) < 1e-5 and distance(near, expected) < 1e-5


def test_who_has_float64(monkeypatch):
    assert width.has_float64(torch.device("cpu")) and width.has_float64(torch.device("cuda"))
    assert not width.has_float64(torch.device("mps"))
    for has in (False, True):
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda _, has=has: SimpleNamespace(has_fp64=has))
        assert width.has_float64(torch.device("xpu")) == has
    for device in ("cuda", "xpu", "mps"):
        assert width.wide_of(torch.device(device), torch.bfloat16) == torch.float32
        assert width.wide_of(torch.device(device), torch.float64) == torch.float64
    assert width.wide_of(torch.device("cpu")) == torch.float64


def test_estimates_ask_who_computes():
    model, shapes = AnyUp(), ((1, 3, 1024, 1024), (1, 384, 64, 64), None, torch.bfloat16, "cuda")
    fused, plain = (model.estimate_memory(*shapes, backend=name) for name in ("triton", "torch"))
    image = 1024 * 1024 * 128 * 2
    assert plain > fused + 2 * image
    assert model.estimate_memory(*shapes[:4], "mps") == plain
    assert runs_plain(torch.device("cpu")) and runs_plain(torch.device("cuda"), backend="torch")
    if not torch.cuda.is_available():
        assert model.estimate_memory(*shapes) == fused
    with pytest.raises(ValueError, match="backend: need 'triton', 'torch' or None, got 'reference'"):
        model.estimate_memory(*shapes, backend="reference")


MEASURE = """
import json, sys, torch
sys.path[:0] = {folders!r}
from attention import resident
from elsewhere import Elsewhere
from anyup_fast import AnyUp
torch.set_grad_enabled(False)
torch.set_num_threads(1)
with Elsewhere():
    model = AnyUp.from_pretrained().to("meta")
    image, features = torch.randn({image}).to("meta"), torch.randn({features}).to("meta")
    model(image[:, :, :32, :32], features[:, :, :2, :2])
    before = resident(reset=True)
    out = model(image, features)
    print(json.dumps([resident() - before, model.estimate_memory({image}, {features}, device="meta")]))
"""


@pytest.mark.slow("a process with large buffers")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure resident memory")
@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="benchmarks/ is not beside the tests")
def test_memory_elsewhere_is_no_more_than_estimated():
    folders = [str(BENCHMARKS), str(ROOT / "tests" / "support")]
    script = MEASURE.format(folders=folders, image=(1, 3, 448, 448), features=(1, 384, 32, 32))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    measured, estimated = json.loads(result.stdout)
    # Measured 665 MiB of 928: the output is all there, for a device, before the first of it is written.
    assert 0.65 * estimated < measured < 1.05 * estimated
