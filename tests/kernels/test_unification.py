"""The kernels of feature unification against the twin in float64: on a GPU, else in Triton's interpreter."""

import math

import pytest
import torch
import torch.nn.functional as F
from anyup_fast.kernels import unification
from anyup_fast.kernels.tiling import Device
from anyup_fast.kernels.unification import plan, why_not_feature_unification
from unification_cases import A100, DEVICE, DTYPES, H100, MI300, Sizes, make

from anyup_fast.ops import reference

# Largest difference over the largest |expected|; measured in the interpreter: 4e-7 for peaked results, 1e-7 for flat.
TOLERANCE = 8e-7


pytestmark = pytest.mark.usefixtures("poisoned")


def error_of(out, features, basis):
    """Largest difference from the twin in float64 over the largest |expected|; infinite where `out` is not finite."""
    expected = reference.feature_unification(features.double().cpu(), basis.double().cpu())
    if not torch.isfinite(out).all():
        return math.inf
    return ((out.double().cpu() - expected).abs().max() / expected.abs().max()).item()


def solve(features, basis, module=unification, **options):
    out = module.feature_unification_fwd(features, basis, **options)
    assert out.dtype == torch.float32 and out.is_contiguous()
    assert out.shape == (len(features), len(basis), *features.shape[2:])
    return out


def check(features, basis, **options):
    error = error_of(solve(features, basis, **options), features, basis)
    assert error <= TOLERANCE, f"{tuple(features.shape)}, {tuple(basis.shape)}: error {error:.2e}"


@pytest.mark.parametrize("channels", [1, 3, 21, 100, 128, 256, 384])
def test_channels_with_the_published_filters(channels):
    check(*make(channels, 128, 5, (1, 3, 4)))


@pytest.mark.parametrize("filters", [1, 8, 12, 64, 200, 256])
@pytest.mark.parametrize("multiple", [True, False], ids=["grouped", "any"])
def test_numbers_of_filters(filters, multiple):
    channels = 2 * filters if multiple else 21
    assert filters == 1 or plan(H100, channels, filters, 3)[0] == ("grouped" if multiple else "written")
    check(*make(channels, filters, 3, (1, 2, 2)))


@pytest.mark.parametrize("channels", [32, 20])
@pytest.mark.parametrize("size", [1, 3, 7, 9, 11])
def test_sizes_of_filters(size, channels):
    check(*make(channels, 16, size, (1, 3, 4)))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 9), (1, 8, 1), (3, 5, 2), (1, 7, 6)])
@pytest.mark.parametrize("channels", [16, 5])
def test_grids(channels, shape):
    check(*make(channels, 8, 5, shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [48, 20])
def test_dtypes(channels, dtype):
    features, basis = make(channels, 16, 3, (2, 2, 3), dtype)
    check(features, basis)
    check(features, basis.to(dtype))
    check(features, basis.double())


@pytest.mark.parametrize("channels", [16, 10])
def test_any_strides(channels):
    features, basis = make(channels, 8, 3, (2, 3, 4))
    last = features.contiguous(memory_format=torch.channels_last)
    views = (
        last,
        features.transpose(2, 3),
        features[:, :, ::2, 1::2],
        features.flip(1),
        features[:1].expand(2, -1, -1, -1),
    )
    for view in views:
        check(view, basis.transpose(2, 3))
    check(features.repeat_interleave(2, 1)[:, ::2], basis.flip(0))


def test_flat_results_keep_their_digits():
    features, basis = make(256, 64, 5, (1, 2, 3))
    basis /= 100
    twin = reference.feature_unification(features.double().cpu(), basis.double().cpu())
    assert 0 < (twin * 64 - 1).abs().max() < 1e-3
    assert error_of(solve(features, basis), features, basis) <= 1.3e-7


@pytest.mark.parametrize("channels", [32, 20])
def test_large_responses_overflow_nothing(channels):
    features, basis = make(channels, 16, 3, (1, 2, 3))
    out = solve(features * 3e4, basis)
    expected = reference.feature_unification(features.double().cpu() * 3e4, basis.double().cpu())
    assert (out.cpu() - expected).abs().max() <= 1e-3


@pytest.mark.parametrize("device", [H100, A100, MI300], ids=lambda d: d.name)
def test_the_plan_of_every_device(device, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(Device, "of", lambda _: device)
    check(*make(256, 128, 5, (1, 2, 2)))
    check(*make(10, 128, 5, (1, 2, 2)))


def test_plans():
    assert plan(H100, 384, 128, 5)[1]["BLOCK_F"] == 128 == 2 * plan(A100, 384, 128, 5)[1]["BLOCK_F"]
    chosen = [plan(MI300, c, m, k)[0] for c, m, k in ((384, 128, 7), (384, 128, 9), (512, 256, 7), (512, 256, 5))]
    assert chosen == ["grouped", "gathered", "gathered", "grouped"]
    chosen = [plan(H100, c, m, k)[0] for c, m, k in ((1000, 128, 5), (100, 128, 9), (16, 128, 5), (15, 128, 5))]
    assert chosen == ["written", "gathered", "written", "gathered"]
    assert plan(H100, 1000, 128, 5, written=False)[0] == "gathered"
    assert [plan(H100, 128, 128, 5, p)[1]["PRECISION"] for p in (None, "tf32", "ieee")] == ["tf32x3", "tf32", "ieee"]
    assert plan(MI300, 128, 128, 5, "tf32")[1]["PRECISION"] == "ieee"
    with pytest.raises(ValueError, match="precision: need one of tf32x3, tf32, ieee, got 'fp8'"):
        plan(H100, 100, 128, 5, "fp8")


@pytest.mark.parametrize("channels", [32, 20])
def test_two_runs_are_equal_to_the_bit(channels):
    arguments = make(channels, 16, 3, (2, 2, 3))
    assert torch.equal(solve(*arguments), solve(*arguments))


def test_the_published_interleaving_is_not_the_natural_one():
    features, basis = make(24, 8, 3, (1, 3, 3))
    responses = F.conv2d(features.cpu().reshape(24, 1, 3, 3), basis.cpu(), padding=1)
    taps = F.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3), padding=1)
    natural = (responses / taps).softmax(1).mean(0, keepdim=True)
    assert error_of(natural, features, basis) > 1e4 * TOLERANCE


def test_reasons():
    def reason(channels=384, filters=128, size=5, dtype=torch.float32):
        return why_not_feature_unification(channels, filters, size, dtype)

    assert all(reason(dtype=dtype) is None for dtype in DTYPES)
    assert reason(channels=1, filters=256, size=13) is None
    assert reason(filters=257) == "needs at most 256 filters, got 257"
    assert reason(dtype=torch.float64) == "needs float16, bfloat16 or float32, got float64"
    assert reason(2**24) == "needs fewer than 2**31 responses a pixel, got 16777216 channels and 128 filters"


@pytest.mark.parametrize("channels", [20, 100])
def test_programs_that_work_on_several_pixels(channels, monkeypatch):
    monkeypatch.setattr(unification, "ROOM", 3 * 4 * channels * 128)
    check(*make(channels, 128, 5, (2, 3, 3)))


@pytest.mark.parametrize("channels", [256, 100])
def test_nothing_of_the_size_of_the_responses_is_made(channels, monkeypatch):
    features, basis = make(channels, 64, 5, (1, 2, 3))
    features = features.contiguous()
    monkeypatch.setattr(unification, "ROOM", 1)  # for one pixel's
    with Sizes() as sizes:
        solve(features, basis)
    copied = 4 * max(features.numel(), basis.numel(), channels * 64 if channels % 64 else 0)  # bytes
    assert features.numel() <= max(sizes.made) <= copied < 64 * features.numel()


# What stands in the source, what replaces it, channels, filters.
BROKEN = [
    ("& (row >= r0) & (row < r1)", "", 16, 8),
    ("& (col >= c0) & (col < c1)", "", 16, 8),
    ("tl.where(mask_f, 1.0 / tl.sum(e, 1), 0.0)", "(1.0 / tl.sum(e, 1))", 24, 12),
    ("if FILTERS < BLOCK_M:", "if FILTERS < 0:", 24, 12),
    ("tl.where(mask_a[:, None], response * scale", "tl.where(mask_a[:, None] | True, response * scale", 10, 12),
    ("tl.where(mask_b, e / tl.sum(e, 0)[None, :], 0.0)", "e / tl.sum(e, 0)[None, :]", 5, 8),
    ("tl.minimum(i + HALF + 1, height)", "tl.minimum(i + HALF, height)", 5, 8),
]


@pytest.mark.skipif(DEVICE != "cpu", reason="reads outside of what is there")
@pytest.mark.parametrize(("old", "new", "channels", "filters"), BROKEN)
def test_a_broken_mask_is_caught(old, new, channels, filters, broken):
    arguments = make(channels, filters, 3, (1, 3, 4))
    check(*arguments)
    out = solve(*arguments, broken(unification, old, new))
    assert not error_of(out, *arguments) <= 100 * TOLERANCE


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("channels", [384, 100])
def test_it_can_be_captured_in_a_graph_and_waits_for_nothing(channels):
    arguments = make(channels, 128, 5, (1, 12, 13), torch.bfloat16)
    expected = solve(*arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = solve(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    assert torch.equal(out, expected)
