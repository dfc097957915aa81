"""The fused forward against the plain layers, whose function it has to be, and what it promises beside that."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from tree import ROOT

from anyup_fast import AnyUp, ops
from anyup_fast.layers import unit_channels
from anyup_fast.ops import reference
from anyup_fast.ops.guidance import guidance_op
from anyup_fast.ops.keys import project_keys_op
from anyup_fast.ops.queries import project_queries_op
from anyup_fast.ops.unification import feature_unification_op
from anyup_fast.plain import guidance as plain_guidance
from anyup_fast.plain import unification as plain_unification
from anyup_fast.plain import walks

CHANNELS = [1, 3, 21, 100, 384, 768, 1024, 4096]
BENCHMARKS = ROOT / "benchmarks"


def peaky(seed=0, **config):
    """A small model with random weights far from their initial values, normalisations included."""
    torch.manual_seed(seed)
    model = AnyUp(**{"qk_dim": 32, **config}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(1.5)
    return model


def inputs(size=(21, 26), grid=(4, 5), channels=12, batch=1, offset=0.0):
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64) + offset
    return image, torch.randn(batch, channels, *grid, generator=generator, dtype=torch.float64)


def plain(model, image, features, output_size=None):
    """The plain layers one after the other."""
    guide = model.guidance(image)
    query = model.queries(guide, output_size or image.shape[-2:])
    return model.cross_decode(query, model.keys(guide, features), features)


def distance(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("channels", CHANNELS)
@torch.no_grad()
def test_any_number_of_channels(channels):
    model, given = peaky(lfu_dim=None), inputs(channels=channels)
    assert model.why_not_fused() is None
    assert distance(model(*given), plain(model, *given)) < 1e-12


@pytest.mark.parametrize(
    "size, grid, output",
    [
        ((21, 26), (1, 1), None),
        ((30, 1), (3, 1), None),
        ((1, 30), (1, 4), (1, 30)),
        ((1, 1), (1, 1), None),
        ((21, 26), (4, 5), (50, 61)),
        ((21, 26), (4, 5), (7, 9)),
        ((21, 26), (4, 5), (7, 90)),
        ((21, 26), (4, 5), (60, 5)),
        ((9, 10), (20, 24), None),
        ((9, 10), (9, 10), (9, 10)),
        ((16, 16), (2, 2), (8, 8)),
    ],
)
@torch.no_grad()
def test_any_sizes(size, grid, output):
    model, given = peaky(), inputs(size, grid, batch=2)
    assert distance(model(*given, output), plain(model, *given, output)) < 1e-12


@pytest.mark.parametrize(
    "config", [dict(qk_dim=64, num_heads=2), dict(lfu_dim=16), dict(window_ratio=-1), dict(kernel_size_lfu=3)]
)
@torch.no_grad()
def test_any_configuration(config):
    model, given = peaky(**config), inputs(batch=4)
    assert model.why_not_fused() is None
    assert distance(model(*given), plain(model, *given)) < 1e-12


@pytest.mark.parametrize("pixels", [1, 7, 26, 60])
@torch.no_grad()
def test_pieces_of_any_size(pixels, monkeypatch):
    model, given = peaky(), inputs()
    expected = plain(model, *given)
    monkeypatch.setattr(walks, "PIXELS", pixels)
    monkeypatch.setattr(plain_unification, "RESPONSES", pixels)
    assert distance(model(*given), expected) < 1e-12


@pytest.mark.parametrize("height, width, most", [(5, 7, 3), (5, 7, 7), (5, 7, 20), (5, 7, 100), (1, 1, 1), (4, 6, 6)])
def test_pieces_cover_every_pixel_once_in_order(height, width, most):
    seen = []
    for rows, cols in walks.pieces(height, width, most):
        places = [row * width + col for row in range(height)[rows] for col in range(width)[cols]]
        assert 0 < len(places) <= most
        seen += places
    assert seen == list(range(height * width))


@pytest.mark.parametrize("size", [(12, 12), (13, 17), (5, 40)])
@pytest.mark.parametrize("pooled", [(1, 1), (3, 4), (5, 5), (12, 17), (20, 50)])
@torch.no_grad()
def test_guidance_pools_like_adaptive_average_pooling(size, pooled):
    model, (image, _) = peaky(), inputs(size)
    query, key, _ = ops.guidance(image, model.guidance_weights(), pooled, pooled, dtype=torch.float64)
    guide = model.guidance(image)
    for actual, encoder in ((query, model.query_encoder), (key, model.key_encoder)):
        expected = F.adaptive_avg_pool2d(encoder(guide), pooled).permute(0, 2, 3, 1)
        assert actual.shape == expected.shape and distance(actual, expected) < 1e-12


@pytest.mark.parametrize("offset", [0.0, 30.0])
@torch.no_grad()
def test_float32_is_as_good_as_the_plain_layers(offset):
    exact, given = peaky(), inputs((70, 90), offset=offset)
    expected = plain(exact, *given)
    model = peaky().float()
    single = [tensor.float() for tensor in given]
    # Measured 5e-7 to 9e-6: the peaky weights multiply rounding errors; both paths alike.
    assert distance(model(*single), expected) < 2 * distance(plain(model, *single), expected) + 1e-6


@torch.no_grad()
def test_shipped_weights_in_every_precision():
    image, features = (tensor.float().double() for tensor in inputs((16, 16), (8, 8), 384))
    image = F.interpolate(image.float(), (112, 112), mode="bicubic").double()
    expected = plain(AnyUp.from_pretrained().double(), image, features)
    model = AnyUp.from_pretrained()
    assert distance(model(image.float(), features.float()), expected) < 3e-6
    for dtype, limit in ((torch.bfloat16, 5e-3), (torch.float16, 2e-3)):
        out = AnyUp.from_pretrained().to(dtype)(image.to(dtype), features.to(dtype))
        assert out.dtype == dtype and distance(out, expected) < limit
        out = model(image.to(dtype), features.float())
        assert out.dtype == torch.float32 and distance(out, expected) < limit
        out = model(image.float(), features.to(dtype))
        assert out.dtype == dtype and distance(out, expected) < limit
        with torch.autocast("cpu", dtype):
            out = model(image.float(), features.float())
        assert out.dtype == torch.float32 and distance(out, expected) < limit


@torch.no_grad()
def test_two_runs_are_equal_and_no_global_is_changed():
    def flags():
        backends = torch.backends
        return (
            torch.get_float32_matmul_precision(), backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32,
            backends.mkldnn.enabled, torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(), torch.get_rng_state().sum().item(),
        )  # fmt: skip

    model, given = peaky().float(), [tensor.float() for tensor in inputs((60, 70))]
    before = flags()
    assert torch.equal(model(*given), model(*given))
    assert flags() == before


@torch.no_grad()
def test_a_wide_first_convolution_takes_the_plain_layers_and_it_is_said():
    model, given = peaky(kernel_size=3), inputs()
    assert "kernel_size 3" in model.why_not_fused()
    assert distance(model(*given), plain(model, *given)) < 1e-14


class Largest(TorchDispatchMode):
    """Largest number of elements that any tensor has."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.usefixtures("one_thread")
@torch.no_grad()
def test_unification_never_forms_every_response():
    features, basis = torch.randn(1, 384, 24, 24), torch.randn(128, 1, 5, 5)
    with Largest() as seen:
        plain_unification.feature_unification(features, basis)
    assert seen.elements <= max(plain_unification.RESPONSES, 2 * features.numel())
    with Largest() as seen:
        reference.feature_unification(features, basis)
    assert seen.elements >= 128 * features.numel()


@pytest.mark.usefixtures("one_thread")
@torch.no_grad()
def test_guidance_holds_images_of_its_width_and_nothing_larger():
    model, image = peaky().float(), torch.randn(1, 3, 100, 130)
    weights = model.guidance_weights()
    with Largest() as seen:
        plain_guidance.guidance(image, weights, (100, 130), (7, 9), dtype=torch.float32)
    assert seen.elements == 100 * 130 * 32


@pytest.mark.parametrize("channels, filters, size", [(1, 128, 5), (3, 128, 5), (21, 32, 3), (256, 32, 5), (100, 8, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_feature_unification_is_its_twin(channels, filters, size, dtype):
    features = unit_channels(torch.randn(2, channels, 4, 7)).to(dtype)
    basis = torch.randn(filters, 1, size, size)
    out = ops.feature_unification(features, basis, backend="torch")
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert distance(out, reference.feature_unification(features.double(), basis.double())) < 1e-6


def test_operators_pass_the_checks_of_the_registry():
    model, (image, features) = peaky().float().requires_grad_(False), (t.float() for t in inputs((12, 10), (2, 3)))
    query = torch.randn(2, 6, 7, 32)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    for operator, arguments in (
        (guidance_op, (image, model.guidance_weights().flat(), 12, 10, 2, 3, torch.float32, "torch")),
        (guidance_op, (image.bfloat16(), model.guidance_weights().flat(), 5, 4, 2, 3, torch.bfloat16, "torch")),
        (
            project_keys_op,
            (query, torch.randn(2, 32, 6, 7), model.key_weights().flat(), 1e-7, torch.bfloat16, "torch"),
        ),
        (project_queries_op, (query, *model.query_projection(), 1e-7, "torch")),
        (feature_unification_op, (features, torch.randn(32, 1, 5, 5), "torch")),
    ):
        torch.library.opcheck(operator, arguments, test_utils=tests)


@torch.no_grad()
def test_compiling_the_model_changes_nothing():
    model, given = peaky(), inputs()
    compiled = torch.compile(model, backend="aot_eager")
    assert distance(compiled(*given), model(*given)) < 1e-12


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda w: ops.guidance(torch.randn(1, 4, 8, 8), w, (8, 8), (2, 2)), "image: need"),
        (lambda w: ops.guidance(torch.randn(1, 3, 8, 8), w, (0, 8), (2, 2)), "output_size: need"),
        (lambda w: ops.guidance(torch.randn(1, 3, 8, 8), w, (8, 8), (2,)), "key_size: need"),
        (lambda w: ops.guidance(torch.randn(1, 3, 8, 8), w, (8, 8), (2, 2), backend="cuda"), "no back end 'cuda'"),
        (lambda w: ops.feature_unification(torch.randn(2, 3, 4), torch.randn(8, 1, 5, 5)), "features: need"),
        (lambda w: ops.feature_unification(torch.randn(1, 2, 3, 4), torch.randn(8, 1, 4, 4)), "basis: need"),
        (
            lambda w: ops.project_queries(torch.randn(1, 4, 4, 8), *(torch.randn(8) for _ in range(4))),
            "do not fit together",
        ),
    ],
)
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(peaky().guidance_weights())


def test_a_back_end_that_cannot_run_says_why():
    model, (image, _) = peaky(), inputs()
    with pytest.raises(RuntimeError, match="needs a GPU"):
        ops.guidance(image.float(), model.guidance_weights(), (8, 8), (2, 2), backend="triton")
    with pytest.raises(RuntimeError, match="specification are the layers"):
        ops.guidance(image.float(), model.guidance_weights(), (8, 8), (2, 2), backend="reference")
    with pytest.raises(RuntimeError, match="needs a GPU"):
        ops.project_queries(torch.randn(1, 4, 4, 32), *model.query_projection(), backend="triton")


MEASURE = """
import sys, torch
sys.path.insert(0, {folder!r})
from attention import resident
from anyup_fast import AnyUp
torch.set_grad_enabled(False)
torch.set_num_threads({threads})
image_shape, features_shape, output_size = {arguments!r}
model = AnyUp.from_pretrained()
image, features = torch.randn(image_shape), torch.randn(features_shape)
model(image[:1, :, :32, :32], features[:1, :, :2, :2])
before = resident(reset=True)
out = model(image, features, output_size, max_memory={limit})
print(resident() - before, model.estimate_memory(image_shape, features_shape, output_size))
"""


def measured_memory(arguments, limit=None, threads=1):
    """Bytes that one call takes in a process of its own, and the estimate."""
    script = MEASURE.format(folder=str(BENCHMARKS), arguments=arguments, limit=limit, threads=threads)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return map(int, result.stdout.split())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure resident memory")
@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="benchmarks/ is not beside the tests")
@pytest.mark.parametrize(
    "threads, arguments",
    [
        (1, ((1, 3, 320, 320), (1, 384, 24, 24), None)),
        pytest.param(
            2, ((1, 3, 320, 320), (1, 384, 24, 24), None), marks=pytest.mark.slow("a process with large buffers")
        ),
        pytest.param(
            1, ((2, 3, 256, 256), (2, 21, 16, 16), None), marks=pytest.mark.slow("a process with large buffers")
        ),
        pytest.param(
            1, ((1, 3, 320, 320), (1, 384, 24, 24), (80, 80)), marks=pytest.mark.slow("a process with large buffers")
        ),
        pytest.param(
            2, ((1, 3, 320, 320), (1, 384, 24, 24), (80, 80)), marks=pytest.mark.slow("a process with large buffers")
        ),
        pytest.param(
            1, ((1, 3, 320, 320), (1, 1, 128, 128), None), marks=pytest.mark.slow("a process with large buffers")
        ),
        pytest.param(
            1, ((1, 3, 96, 96), (1, 4096, 64, 64), (64, 64)), marks=pytest.mark.slow("a process with large buffers")
        ),
    ],
)
def test_memory_is_what_was_estimated(threads, arguments):
    measured, estimated = measured_memory(arguments, threads=threads)
    # Measured 0.87 to 1.09 with one thread, 0.98 to 1.07 with two.
    assert 0.85 < estimated / measured < 1.15


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure resident memory")
@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="benchmarks/ is not beside the tests")
@pytest.mark.parametrize(
    "limit, arguments",
    [
        (110 << 20, ((1, 3, 224, 224), (1, 21, 14, 14), None)),
        # large tiles of several sizes
        pytest.param(
            300 << 20, ((1, 3, 700, 530), (1, 64, 40, 30), None), marks=pytest.mark.slow("a process with large buffers")
        ),
    ],
)
def test_a_call_stays_within_its_memory(limit, arguments):
    measured, estimated = measured_memory(arguments, limit)
    # Measured 37 and 193 MiB: the estimate of a tile allows for the largest heads and windows.
    assert measured <= limit < estimated


@pytest.mark.parametrize(
    "arguments, words",
    [
        (((1, 3, 10), (1, 8, 2, 2)), "image_shape: need"),
        (((1, 3, 10, 10), (1, 0, 2, 2)), "features_shape: need"),
        (((3, 3, 10, 10), (2, 8, 2, 2)), "differ in batch size"),
        (((1, 3, 10, 10), (1, 8, 2, 2), (3,)), "output_size: need"),
    ],
)
def test_memory_of_shapes_that_do_not_fit(arguments, words):
    with pytest.raises(ValueError, match=words):
        peaky().estimate_memory(*arguments)
