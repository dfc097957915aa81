"""The Triton kernels against the twin in float64: natively on a GPU, in Triton's interpreter elsewhere."""

import math
import random
from dataclasses import replace

import attention_cases
import pytest
import torch
from anyup_fast.kernels import attention, attention_backward, tiling
from anyup_fast.kernels.tiling import Tile
from torch.utils._python_dispatch import TorchDispatchMode

from anyup_fast.ops import window_bounds
from anyup_fast.ops.attention import windowed_attention_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DESIGNS = ("window", "two_pass", "heads", "stored", "halved")
DTYPES = list(attention_cases.DTYPES.values())
# What the interpreter is long at, and test_ptx.py executes as compiled in 16 bits.
SLOW_IN_16_BIT = [
    pytest.param(
        dtype, marks=() if dtype.itemsize == 4 else pytest.mark.slow("long in the interpreter; test_ptx.py has 16 bits")
    )
    for dtype in DTYPES
]


def solve(problem, tile, module=attention):
    there = problem.to(DEVICE)
    out = module.windowed_attention_fwd(*there.tensors, scale=problem.scale, head_mode=problem.head_mode, tile=tile)
    assert out.dtype == problem.value.dtype and out.is_contiguous()
    return out


def check(problem, tile):
    error = problem.error(solve(problem, tile))
    limit = attention_cases.TOLERANCE[
        max((problem.query.dtype, problem.value.dtype), key=attention_cases.TOLERANCE.get)
    ]
    assert error <= limit, f"{problem.text}, {tile}: error {error:.2e}"


def small_tile(problem, design, rng):
    """A tile of `design` that suits `problem`, so small that partial tiles and several blocks occur."""
    block_h, block_w = (4, 4) if DEVICE == "cpu" else (8, 8)
    channels = problem.value.shape[3]
    if problem.head_mode == "split":
        channels //= problem.query.shape[3]
    if design == "heads":
        return Tile("heads", block_h, block_w, 16, 2 ** max(4, math.ceil(math.log2(channels + 1))), 4)
    if design == "window":
        bounds = [attention._frozen(b) for b in (problem.row_bounds, problem.col_bounds)]
        keys = math.prod(attention._spans(*bounds, block_h, block_w))
        return Tile(
            "window",
            block_h,
            block_w,
            2 ** max(4, math.ceil(math.log2(keys))),
            rng.choice((16, 32)),
            rng.choice((1, 4)),
        )
    if design == "halved" and problem.head_mode == "mean":
        bounds = [attention._frozen(b) for b in (problem.row_bounds, problem.col_bounds)]
        rows, cols = attention._spans(*bounds, block_h, block_w)
        if max(rows, cols) <= 16:
            room = 2 ** max(6, math.ceil(math.log2(rows * 4 * math.ceil(cols / 4))))
            return Tile("halved", block_h, block_w, room, rng.choice((16, 32)), 4, mix_k=rng.choice((16, 64)))
    if design in ("stored", "halved") and problem.head_mode == "mean":
        return Tile(
            "stored", block_h, block_w, 16, rng.choice((16, 32)), 4, stats_block_k=16, mix_k=rng.choice((16, 64))
        )
    return Tile("two_pass", block_h, block_w, 16, rng.choice((16, 32)), 4, stats_block_k=16)


def sweep(index):
    rng = random.Random(index)
    problem = attention_cases.draw(index, longest=9 if DEVICE == "cpu" else 60)
    check(problem, small_tile(problem, DESIGNS[index % 5], rng))


pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("index", range(10))
def test_sweep(index):
    sweep(index)


@pytest.mark.slow("minutes: 390 more draws")
@pytest.mark.parametrize("index", range(10, 400))
def test_long_sweep(index):
    sweep(index)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("design", DESIGNS)
def test_every_design_in_every_dtype(design, dtype):
    problem = attention_cases.make(1, dtype, (9, 13), (7, 6), 20, batch=2, head_dim=32, ratio=0.15)
    check(problem, small_tile(problem, design, random.Random(0)))


@pytest.mark.parametrize("dtype", SLOW_IN_16_BIT, ids=str)
def test_every_candidate_tile(dtype):
    tiles = tiling.candidates(dtype)
    assert {t.design for t in tiles} == set(DESIGNS) - (set() if dtype == torch.float32 else {"halved"})
    for tile in tiles:
        channels = min(tile.block_c + 5, 40) if tile.design != "heads" else tile.block_c - 3
        problem = attention_cases.make(2, dtype, (9, 17), (6, 7), 4 * (channels // 4), head_dim=32)
        check(problem, tile)


@pytest.mark.parametrize("head_mode", ["mean", "split"])
@pytest.mark.parametrize("design", DESIGNS)
def test_head_modes(design, head_mode):
    problem = attention_cases.make(
        3, torch.float32, (5, 9), (6, 5), 36, heads=2, head_dim=12, ratio=0.2, head_mode=head_mode
    )
    check(problem, small_tile(problem, design, random.Random(0)))


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("design", ["two_pass", "heads"])
def test_fixed_offset_and_running_maximum_agree(design, safe, monkeypatch):
    offsets = dict.fromkeys(attention.SAFE_OFFSET, 12.0 if safe else -1.0)
    monkeypatch.setattr(attention, "SAFE_OFFSET", offsets)
    problem = attention_cases.make(4, torch.float32, (6, 7), (8, 9), 12, ratio=0.3)
    check(problem, small_tile(problem, design, random.Random(0)))


@pytest.mark.parametrize("design", DESIGNS)
def test_huge_logits_overflow_nothing(design):
    problem = attention_cases.make(5, torch.bfloat16, (6, 6), (6, 7), 8, ratio=0.3, scale=400.0)
    check(problem, small_tile(problem, design, random.Random(0)))


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_any_scale(scale):
    problem = attention_cases.make(6, torch.float32, (5, 6), (4, 5), 8, ratio=0.3, scale=scale)
    for design in DESIGNS:
        check(problem, small_tile(problem, design, random.Random(0)))


def test_long_and_narrow_windows():
    problem = attention_cases.make(7, torch.float32, (5, 4), (24, 2), 8, ratio=0.0)
    bounds = [attention._frozen(b) for b in (problem.row_bounds, problem.col_bounds)]
    assert attention._spans(*bounds, 4, 4) == (24, 2), "more rows than one bit each in half a word"
    check(problem, Tile("window", 4, 4, 64, 16, 4))


@pytest.mark.parametrize("design", DESIGNS)
def test_bounds_need_not_be_monotone(design):
    problem = attention_cases.make(8, torch.float32, (7, 6), (8, 8), 8)
    problem.row_bounds = torch.tensor([[0, 2], [6, 8], [1, 3], [0, 8], [4, 5], [2, 7], [0, 1]])
    problem.col_bounds = torch.tensor([[5, 8], [0, 1], [3, 6], [2, 3], [0, 8], [7, 8]])
    check(problem, small_tile(problem, design, random.Random(0)))


def test_mixed_dtypes():
    problem = attention_cases.make(9, torch.bfloat16, (5, 6), (4, 5), 8)
    problem.value = problem.value.float()
    for design in DESIGNS:
        check(problem, small_tile(problem, design, random.Random(0)))


def test_channels_last_inputs_and_values_with_strided_channels():
    problem = attention_cases.make(10, torch.float32, (5, 6), (4, 5), 8)
    problem.value = problem.value.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert problem.value.stride(-1) != 1
    out = attention.windowed_attention_fwd(
        *(x.to(DEVICE) for x in problem.tensors[:3]), *problem.tensors[3:], tile=Tile("window", 4, 4, 32, 16, 4)
    )
    assert problem.error(out) <= attention_cases.TOLERANCE[torch.float32]


@pytest.mark.parametrize("design", DESIGNS)
def test_two_runs_are_equal_to_the_bit(design):
    problem = attention_cases.make(11, torch.bfloat16, (9, 9), (6, 6), 12, ratio=0.2)
    tile = small_tile(problem, design, random.Random(0))
    assert torch.equal(solve(problem, tile), solve(problem, tile))


# Each removes one mask: (design, what stands in the source, what replaces it).
BROKEN = [
    (
        "window",
        "s = tl.where(_seen(row, col, mask_k, key_bits, pix_bits, r0, r1, c0, c1, PACKED), s,",
        "s = tl.where(mask_k[None, :], s,",
    ),
    ("window", "(n[None, :] < first) | (n[None, :] >= last)", "(n[None, :] < first) & (n[None, :] >= last)"),
    ("window", "mask=mask_k[:, None] & mask_c, other=0.0", "mask=mask_c, other=0.0"),
    ("two_pass", 'bias = tl.where(seen, -offset[:, None], float("-inf"))', "bias = -offset[:, None] + seen * 0.0"),
    ("two_pass", "w = tl.where(seen, w, 0.0)", "w = w * 1.0"),
    ("two_pass", "w = tl.where(seen & ((row >= r0) & (row < r1))[:, None], w, 0.0)", "w = tl.where(seen, w, 0.0)"),
    ("stored", "w = tl.where(in_row, w, 0.0)", "w = w * 1.0"),
    ("stored", 'tl.where(inside, lses[h], float("inf"))', "lses[h]"),
    ("halved", "(unseen >= tl.where(", "(unseen > tl.where("),
    ("halved", "row[:, None] % 16 == n", "row[:, None] % 8 == n"),
    ("halved", "own | ((there == 0)[:, None] & (n < 32))", "own & there[:, None]"),
    ("heads", 'x = tl.where(((row >= r0) & (row < r1))[:, None], x, float("-inf"))', "x = x * 1.0"),
    ("heads", 'bias = tl.where(seen, -offset[:, None], float("-inf"))', "bias = -offset[:, None] + seen * 0.0"),
    ("heads", "mask_value = (col < span_c1)[:, None] &", "mask_value = (col >= 0)[:, None] &"),
]


@pytest.mark.skipif(DEVICE != "cpu", reason="reads outside of what is there")
@pytest.mark.parametrize(("design", "old", "new"), BROKEN)
def test_a_broken_mask_is_caught(design, old, new, broken):
    problem = attention_cases.make(12, torch.float32, (7, 6), (9, 9), 8, ratio=0.2)
    tile, module = small_tile(problem, design, random.Random(0)), broken(attention, old, new)
    found = []
    for each in [replace(tile, warps=warps) for warps in (1, 4)]:  # with and without masks that a product makes
        check(problem, each)
        found.append(problem.error(solve(problem, each, module)) <= 100 * attention_cases.TOLERANCE[torch.float32])
    assert not all(found)


def test_the_operator_passes_opcheck():
    there = attention_cases.make(13, torch.float32, (5, 5), (3, 3), 4).to(DEVICE)
    tensors = [x.detach().clone().requires_grad_() for x in there.tensors[:3]]
    arguments = (*tensors, there.row_bounds, there.col_bounds, 0.3, "mean", "triton")
    torch.library.opcheck(windowed_attention_op, arguments)


@pytest.mark.parametrize("dtype", SLOW_IN_16_BIT, ids=str)
def test_weights_are_stored_slab_by_slab(dtype, monkeypatch):
    problem = attention_cases.make(14, dtype, (9, 13), (7, 6), 20, batch=2, head_dim=32, ratio=0.3)
    tile = small_tile(problem, "stored", random.Random(0))
    whole = solve(problem, tile)
    monkeypatch.setattr(attention, "SLAB", 5 * 16 * 64 * 4)
    assert torch.equal(solve(problem, tile), whole)
    check(problem, tile)


@pytest.mark.parametrize("design", ["stored", "halved"])
@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_float32_values_of_any_size_keep_their_digits(size, design):
    problem = attention_cases.make(15, torch.float32, (5, 9), (6, 5), 12, ratio=0.3)
    problem.value *= size * 10.0 ** torch.arange(-6.0, 6.0)
    tile = small_tile(problem, design, random.Random(0))
    out, twin = (solve(problem, t).double().cpu() for t in (tile, small_tile(problem, "two_pass", random.Random(0))))
    assert ((out - twin).abs().amax((0, 1, 2)) / twin.abs().amax((0, 1, 2))).max() <= 1e-6


@pytest.mark.parametrize(("queries", "keys"), [(1e-20, 1e20), (1e18, 1e-18), (1e-12, 1e-12), (30.0, 1.0)])
def test_float32_queries_and_keys_of_any_size_keep_their_digits(queries, keys):
    problem = attention_cases.make(17, torch.float32, (9, 13), (7, 6), 8, ratio=0.3, head_dim=32)
    problem.query *= queries
    problem.key *= keys * 10.0 ** torch.linspace(-4, 0, 32)
    assert small_tile(problem, "halved", random.Random(0)).design == "halved"
    check(problem, small_tile(problem, "halved", random.Random(0)))


def test_a_query_that_is_not_finite_spoils_no_other_pixel():
    problem = attention_cases.make(18, torch.float32, (9, 13), (7, 6), 8, ratio=0.3, head_dim=32)
    tile = small_tile(problem, "halved", random.Random(0))
    whole = solve(problem, tile)
    problem.query[0, 4, 5, 1, 3] = math.inf
    out = solve(problem, tile)
    assert not out[0, 4, 5].isfinite().any()
    out[0, 4, 5] = whole[0, 4, 5]
    assert torch.equal(out, whole)


@pytest.mark.parametrize("design", ["stored", "halved"])
def test_values_that_are_not_finite_stay_where_they_are_seen(design):
    problem = attention_cases.make(16, torch.float32, (12, 12), (12, 12), 12, ratio=0.1)
    tile = small_tile(problem, design, random.Random(0))
    whole = solve(problem, tile)
    problem.value[0, 0, 0, 3] = math.inf
    out = solve(problem, tile)
    assert not out[0, 0, 0, 3].isfinite()
    assert torch.allclose(out[0, 8:, 8:], whole[0, 8:, 8:], rtol=0, atol=1e-6)  # other tiles, whose keys begin at 6


class Sizes(TorchDispatchMode):
    """Collects how many numbers each tensor made inside holds."""

    def __init__(self):
        super().__init__()
        self.made = [0]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.made += [x.numel() for x in (result if isinstance(result, tuple) else (result,)) if torch.is_tensor(x)]
        return result


@pytest.mark.parametrize("design", DESIGNS)
def test_nothing_of_the_size_of_the_attention_is_made(design, monkeypatch):
    monkeypatch.setattr(attention, "SLAB", 1)  # one tile at a time
    problem = attention_cases.make(14, torch.float32, (18, 17), (16, 16), 4, heads=1, head_dim=32)
    tensors = [x.contiguous().to(DEVICE) for x in problem.tensors[:3]]
    tile = small_tile(problem, design, random.Random(0))
    with Sizes() as sizes:
        attention.windowed_attention_fwd(*tensors, *problem.tensors[3:], tile=tile)
    assert max(sizes.made) <= 9 * problem.key.numel() < 18 * 17 * 16 * 16, "bytes, where the interpreter copies"


def test_bounds_are_copied_to_the_device_once():
    attention._frozen_tables.tables.clear()
    problem = attention_cases.make(15, torch.float32, (6, 6), (4, 4), 4).to(DEVICE)
    for _ in range(3):
        attention.windowed_attention_fwd(*problem.tensors, tile=Tile("window", 4, 4, 16, 16, 4))
    assert len(attention._frozen_tables.tables) == 1, "rows and columns have the same windows here"


@pytest.mark.slow("asks for 5 GiB of address space")
def test_offsets_beyond_two_to_the_31():
    problem = attention_cases.make(16, torch.bfloat16, (3, 3), (5, 5), 8)
    far = torch.empty(5 * 2**29, dtype=torch.bfloat16, device=DEVICE)[: 4 * 2**29 + 64]
    value = far.as_strided((1, 5, 5, 8), (64, 2**29, 8, 1)).copy_(problem.value)
    for design in DESIGNS:
        tile = small_tile(problem, design, random.Random(0))
        there = problem.to(DEVICE)
        out = attention.windowed_attention_fwd(there.query, there.key, value, *problem.tensors[3:], tile=tile)
        assert problem.error(out) <= attention_cases.TOLERANCE[torch.bfloat16]


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_it_can_be_captured_in_a_graph_and_waits_for_nothing():
    problem = attention_cases.make(17, torch.bfloat16, (40, 40), (12, 12), 32).to(DEVICE)
    arguments = problem.tensors
    attention.windowed_attention_fwd(*arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attention.windowed_attention_fwd(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    assert problem.error(out) <= attention_cases.TOLERANCE[torch.bfloat16]


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_bounds_on_the_device_are_not_read_on_the_host():
    problem = attention_cases.make(18, torch.bfloat16, (40, 40), (12, 12), 32).to(DEVICE)
    bounds = [window_bounds(40, 12, 0.1).to(DEVICE) for _ in range(2)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = attention.windowed_attention_fwd(*problem.tensors[:3], *bounds)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert problem.error(out) <= attention_cases.TOLERANCE[torch.bfloat16]


def test_tables_stay_where_they_are_however_many_sizes_follow():
    """A captured graph reads them at the address that it was captured with."""
    device = torch.device(DEVICE)
    bounds = window_bounds(40, 9, 0.1).clone()
    first = attention._tables(bounds, 4, device), attention_backward._ranges(bounds, 9, 4, device)
    addresses = [table.data_ptr() for table in (*first[0][:2], first[1])]
    contents = [table.clone() for table in (*first[0][:2], first[1])]
    bounds_of_others = [window_bounds(41 + n, 9, 0.1) for n in range(300)]
    del first
    for other in bounds_of_others:
        attention._tables(other, 4, device)
        attention_backward._ranges(other, 9, 4, device)
    again = attention._tables(bounds, 4, device), attention_backward._ranges(bounds, 9, 4, device)
    assert [table.data_ptr() for table in (*again[0][:2], again[1])] == addresses
    bounds.zero_()
    assert all(torch.equal(*pair) for pair in zip((*again[0][:2], again[1]), contents, strict=True))
