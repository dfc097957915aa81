"""The kernel of the query projection against the plain layers in float64: on a GPU, else in Triton's interpreter."""

import math

import attention_cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from anyup_fast.kernels import queries
from anyup_fast.kernels.queries import plan, why_not_query_projection
from anyup_fast.kernels.tiling import Device

from anyup_fast.layers import RMS_EPS, RMSNorm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = list(attention_cases.DTYPES.values())
# Largest difference over the largest |expected|; measured in the interpreter: 6e-7, 9e-3, 9e-4.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
H100 = Device("cuda", (9, 0), 232448, "H100")
DEVICES = [
    H100,
    Device("cuda", (8, 0), 166912, "A100"),
    Device("cuda", (8, 9), 101376, "RTX"),
    Device("cuda", (10, 0), 232448, "B200"),
    Device("hip", (9, 4), 65536, "MI300"),
]


pytestmark = pytest.mark.usefixtures("poisoned")


def make(seed, dtype, shape, dim, weight_dtype=torch.float32):
    """Query (B, *shape) with NaN around it, and the four weights."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    query = attention_cases._bordered(draw(*shape, dim).to(dtype), DEVICE)
    weights = draw(dim, dim, 3, 3) / (3 * dim**0.5), 1 + draw(dim) / 4, draw(dim, dim) / dim**0.5, draw(dim)
    return query, *(weight.to(DEVICE, weight_dtype) for weight in weights)


def plain(query, conv, norm, weight, bias):
    layer = RMSNorm(len(norm)).to(norm)
    layer.weight.data = norm
    x = F.conv2d(query.permute(0, 3, 1, 2), conv, padding=1).permute(0, 2, 3, 1)
    return F.linear(layer(x), weight, bias).detach()


def error_of(out, arguments):
    """Largest difference from the plain layers in float64 over the largest |expected|; infinite if not finite."""
    expected = plain(*(x.double().cpu() for x in arguments))
    if not torch.isfinite(out).all():
        return math.inf
    return ((out.double().cpu() - expected).abs().max() / expected.abs().max()).item()


def solve(arguments, module=queries, **options):
    out = module.project_queries_fwd(*arguments, eps=RMS_EPS, **options)
    assert out.dtype == arguments[0].dtype and out.shape == arguments[0].shape and out.is_contiguous()
    return out


def check(arguments, **options):
    error, limit = error_of(solve(arguments, **options), arguments), TOLERANCE[arguments[0].dtype]
    assert error <= limit, f"{arguments[0].dtype} {tuple(arguments[0].shape)}: error {error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "shape"), [(128, (2, 9, 17)), (32, (1, 17, 18)), (64, (3, 5, 4)), (16, (1, 6, 33))])
def test_against_float64(dim, shape, dtype):
    check(make(1, dtype, shape, dim))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 20), (2, 19, 1), (1, 2, 2)])
def test_images_of_a_pixel_or_two(shape):
    check(make(2, torch.float32, shape, 32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
def test_the_plan_of_every_device(device, dtype, monkeypatch):
    arguments = make(3, dtype, (1, 17, 18), 128)
    if DEVICE == "cpu":
        monkeypatch.setattr(Device, "of", lambda _: device)
    check(arguments)
    constants = plan(device, dtype, 128)
    assert constants["num_warps"] in (4, 8) and not 128 % constants["BLOCK_N"] and not 128 % constants["BLOCK_K"]


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float64], ids=str)
def test_weights_of_other_dtypes(weight_dtype):
    check(make(4, torch.float32, (1, 5, 6), 32, weight_dtype))


def test_any_strides():
    query, *weights = make(5, torch.float32, (2, 5, 7), 32)
    across = query.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert across.stride(-1) != 1
    for view in (across, query.transpose(1, 2), query[:, ::2, 1::3], query[:1].expand(3, -1, -1, -1), query.flip(1)):
        check((view, *weights))
    conv = weights[0].to(memory_format=torch.channels_last)
    check((query, conv, weights[1], weights[2].T.contiguous().T, weights[3].repeat_interleave(2)[::2]))


# The interpreter cuts bfloat16 off where a GPU rounds it.
@pytest.mark.parametrize("dtype", [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16], ids=str)
def test_rounding_is_no_worse_than_that_of_the_plain_layers(dtype):
    query, *weights = make(6, dtype, (1, 9, 10), 128, dtype)
    ours, theirs = solve((query, *weights)), plain(query.cpu(), *(w.cpu() for w in weights))
    assert error_of(ours, (query, *weights)) <= error_of(theirs, (query, *weights))


def test_a_convolution_beyond_the_range_of_float16():
    query, conv, *weights = make(7, torch.float16, (1, 6, 7), 32)
    query *= 2000
    assert F.conv2d(query.permute(0, 3, 1, 2).cpu().float(), 100 * conv.cpu()).abs().max() > 65504
    check((query, 100 * conv, *weights))
    check((query / 2000 / 1000, conv / 100, *weights))


@pytest.fixture
def halves(monkeypatch):
    """Plans as for a GPU that multiplies float32 in halves."""
    if DEVICE == "cpu":
        monkeypatch.setattr(Device, "of", lambda _: H100)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-3, 1e4, 1e18])
def test_halves_of_any_size(halves, size):
    query, conv, *weights = make(12, torch.float32, (1, 6, 7), 32)
    check((query * size, conv, *weights))
    if size < 1e18:
        check((query, conv * size, *weights))
    check((query, conv, weights[0] * size, weights[1], weights[2] * size))
    columns = torch.full((32,), 1.0)
    columns[::2] = size
    check((query, conv * columns[:, None, None, None], *weights))


def test_halves_beside_a_large_pixel(halves):
    query, *weights = make(13, torch.float32, (1, 8, 20), 32)
    query[:, 2, 3] *= 1e5
    out, right = solve((query, *weights)).double().cpu(), plain(*(x.double().cpu() for x in (query, *weights)))
    away = torch.ones(8, 20, dtype=torch.bool)
    away[1:4, 2:5] = False
    gap = (out - right).abs()[0, away].max() / right.abs().max()
    assert gap <= TOLERANCE[torch.float32], f"error {gap:.2e}"


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_halves_beside_what_is_not_finite(halves, value):
    query, *weights = make(14, torch.float32, (1, 8, 20), 32)
    right = solve((query, *weights))
    query[0, 2, 3, 5] = value
    out = solve((query, *weights))
    away = torch.ones(8, 20, dtype=torch.bool)
    away[1:4, 2:5] = False
    assert not torch.isfinite(out[0, ~away]).any()
    assert (out - right)[0, away].abs().max() <= TOLERANCE[torch.float32] * right.abs().max()


def test_the_epsilon_counts():
    query, *weights = make(8, torch.float32, (1, 4, 4), 32)
    query *= 1e-3
    check((query, *weights))
    loose = queries.project_queries_fwd(query, *weights, eps=1e-5)
    assert error_of(loose, (query, *weights)) > 0.1


def test_two_runs_are_equal_to_the_bit():
    arguments = make(9, torch.bfloat16, (2, 9, 17), 32)
    assert torch.equal(solve(arguments), solve(arguments))


def test_precision():
    arguments = make(10, torch.float32, (1, 3, 3), 16)
    for precision in ("tf32x3", "ieee"):
        check(arguments, precision=precision)
    with pytest.raises(ValueError, match="precision: need one of tf32x3, tf32, ieee, got 'fp8'"):
        solve(arguments, precision="fp8")
    asked = [plan(H100, torch.float32, 128, p) for p in (None, "tf32x3", "tf32", "ieee")]
    assert [constants["PRECISION"] for constants in asked[1:]] == ["tf32x3", "tf32", "ieee"]
    assert [constants["HALVES"] for constants in asked] == [True, False, False, False]
    assert not plan(H100, torch.bfloat16, 128)["HALVES"] and not plan(DEVICES[-1], torch.float32, 128)["HALVES"]
    assert (
        plan(H100, torch.bfloat16, 128, "tf32")["PRECISION"]
        == "ieee"
        == plan(DEVICES[-1], torch.float32, 128)["PRECISION"]
    )


def test_reasons():
    assert all(why_not_query_projection(dim, dtype) is None for dim in (16, 32, 64, 128) for dtype in DTYPES)
    assert why_not_query_projection(96, torch.float32) == "needs a qk_dim of 16, 32, 64 or 128, got 96"
    assert why_not_query_projection(128, torch.float64) == "needs float16, bfloat16 or float32, got float64"


# What stands in the source and what replaces it: each lets something from outside in, or out.
BROKEN = [
    ("(i + down >= 0) &", "(i + down >= -1) &"),
    ("(i + down < height)", "(i + down < height + 1)"),
    ("(j + right >= 0)", "(j + right >= -1)"),
    ("(j + right < width)", "(j + right < width + 1)"),
    ("mask_pix = ((i < height) & (j < width))[:, None]", "mask_pix = ((i < height) & (j < height))[:, None]"),
    ("tl.cast(right, tl.int64) * x_w", "tl.cast(right, tl.int64) * x_h"),
]


@pytest.mark.skipif(DEVICE != "cpu", reason="reads outside of what is there")
@pytest.mark.parametrize(("old", "new"), BROKEN)
def test_a_broken_mask_is_caught(old, new, broken):
    arguments = make(11, torch.float32, (1, 7, 9), 16)
    check(arguments)
    out = solve(arguments, broken(queries, old, new))
    assert not error_of(out, arguments) <= 100 * TOLERANCE[torch.float32]


@pytest.mark.slow("asks for 8 GiB of address space")
@pytest.mark.skipif(DEVICE != "cpu", reason="uses memory that is never touched")
def test_offsets_beyond_two_to_the_31():
    query, *weights = make(12, torch.bfloat16, (1, 4, 3), 16)
    far = torch.from_numpy(np.zeros(4 * 2**30, np.int16)).view(torch.bfloat16)
    wide = far.as_strided((1, 4, 3, 16), (64, 2**30, 16, 1)).copy_(query)
    check((wide, *weights))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_it_can_be_captured_in_a_graph_and_waits_for_nothing():
    arguments = make(13, torch.bfloat16, (1, 40, 50), 128)
    expected = solve(arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = solve(arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    assert torch.equal(out, expected)
