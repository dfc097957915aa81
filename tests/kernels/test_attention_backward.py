"""The backward kernels of the windowed attention against the twin's gradients in float64, each on its own.

Natively on a GPU, in Triton's interpreter elsewhere.
"""

import math
from dataclasses import replace

import attention_cases
import pytest
import torch
from anyup_fast.kernels import attention_backward as kernels
from anyup_fast.kernels.attention import _tile_table
from anyup_fast.kernels.attention_backward import Blocks, Plan
from anyup_fast.kernels.tiling import Device

from anyup_fast.ops import neighborhood_bounds, window_bounds
from anyup_fast.ops.attention import windowed_attention_backward_op, windowed_attention_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = list(attention_cases.DTYPES.values())
NAMES = attention_cases.GRADIENTS
H100 = Device("cuda", (9, 0), 232448, "H100")
A100 = Device("cuda", (8, 0), 166912, "A100")
MI300 = Device("hip", (9, 4), 65536, "MI300")
# Small enough for partial tiles and several blocks to occur in small problems.
BY_KEY = Blocks(4, 4, 16, 16, 4)


def small(window, block_k=16):
    return Plan(window, Blocks(4, 4, 64 if window else block_k, 16, 4), BY_KEY, BY_KEY)


@pytest.fixture(autouse=True)
def few_programs(poisoned, monkeypatch):
    """Few programs share what they work on, so that partial sums are added."""
    monkeypatch.setattr(kernels, "PROGRAMS", 8)


def keys_of(problem):
    """The most keys that a tile of 4x4 pixels spans."""
    tables = (_tile_table(bounds, 4) for bounds in (problem.row_bounds, problem.col_bounds))
    return math.prod((table[:, 1] - table[:, 0]).max().item() for table in tables)


def solve(problem, tiles, grad=None, module=kernels):
    there = problem.to(DEVICE)
    grad = problem.grad().to(DEVICE) if grad is None else grad
    return module.windowed_attention_bwd(
        grad, *there.tensors, scale=problem.scale, head_mode=problem.head_mode, tiles=tiles
    )


def check(problem, tiles, grad=None):
    gradients = solve(problem, tiles, grad)
    for gradient, of in zip(gradients, problem.tensors, strict=False):
        assert gradient.shape == of.shape and gradient.dtype == of.dtype and gradient.is_contiguous()
    faults = problem.gradient_faults(gradients, grad)
    assert not faults, f"{problem.text}, {tiles}: {faults}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [True, False], ids=["window", "blocks"])
@pytest.mark.parametrize("head_mode", ["mean", "split"])
def test_every_kernel_in_every_dtype(dtype, window, head_mode):
    problem = attention_cases.make(1, dtype, (5, 6), (5, 4), 20, heads=2, head_dim=12, ratio=0.2, head_mode=head_mode)
    check(problem, small(window))


@pytest.mark.parametrize("window", [True, False], ids=["window", "blocks"])
@pytest.mark.parametrize("head_mode", ["mean", "split"])
def test_values_alone_take_one_kernel(window, head_mode, monkeypatch):
    problem = attention_cases.make(1, torch.float32, (5, 6), (5, 4), 20, heads=2, ratio=0.2, head_mode=head_mode)
    for name in ("_query_window_kernel", "_query_blocks_kernel", "_key_kernel"):
        monkeypatch.setattr(kernels, name, None)
    there = problem.to(DEVICE)
    options = {"scale": problem.scale, "head_mode": head_mode, "tiles": small(window), "for_query": False}
    of_query, of_key, of_value = kernels.windowed_attention_bwd(problem.grad().to(DEVICE), *there.tensors, **options)
    assert of_query.shape == of_key.shape == (len(of_value), 0)
    monkeypatch.undo()
    whole = solve(problem, small(window))
    assert torch.allclose(of_value, whole[2], rtol=1e-5, atol=1e-6) and of_value.abs().max() > 0.1


@pytest.mark.parametrize("window", [True, False], ids=["window", "blocks"])
def test_a_batch_of_two_and_four_heads(window):
    check(attention_cases.make(2, torch.float32, (4, 5), (3, 3), 8, batch=2, ratio=0.2), small(window))


@pytest.mark.parametrize("rule", [window_bounds, neighborhood_bounds])
@pytest.mark.parametrize(
    ("size", "grid", "ratio"),
    [
        ((7, 9), (7, 9), 0.1),
        ((5, 5), (3, 11), 0.0),
        ((3, 2), (9, 10), 0.06),
        ((1, 9), (1, 9), 0.2),
        ((1, 1), (1, 1), 0.1),
    ],
    ids=["cells", "everything", "unseen keys", "one row", "one pixel"],
)
def test_windows(rule, size, grid, ratio):
    problem = attention_cases.make(3, torch.float32, size, grid, 5, heads=1, ratio=ratio, rule=rule)
    for window in (True, False) if keys_of(problem) <= 64 else (False,):
        check(problem, small(window))


def test_keys_that_nobody_sees_have_no_gradient():
    problem = attention_cases.make(4, torch.float32, (2, 2), (10, 10), 4, heads=1, ratio=0.06)
    _, grad_key, grad_value = solve(problem, small(False))
    seen = torch.zeros(10, 10, dtype=torch.bool)
    for r in problem.row_bounds:
        for c in problem.col_bounds:
            seen[r[0] : r[1], c[0] : c[1]] = True
    assert 0 < seen.sum() < 100
    for gradient in (grad_key, grad_value):
        lengths = gradient[0].flatten(2).abs().sum(-1).cpu()
        assert (lengths[~seen] == 0).all() and (lengths[seen] > 0).all()


@pytest.mark.parametrize("window", [True, False], ids=["window", "blocks"])
def test_bounds_need_not_be_monotone(window):
    problem = attention_cases.make(5, torch.float32, (7, 6), (8, 8), 8, heads=2)
    problem.row_bounds = torch.tensor([[0, 2], [6, 8], [1, 3], [0, 8], [4, 5], [2, 7], [0, 1]])
    problem.col_bounds = torch.tensor([[5, 8], [0, 1], [3, 6], [2, 3], [0, 8], [7, 8]])
    check(problem, small(window))


@pytest.mark.parametrize("scale", [-0.7, 0.0, 300.0])
def test_any_scale(scale):
    problem = attention_cases.make(6, torch.float32, (4, 5), (4, 5), 8, heads=2, ratio=0.3, scale=scale)
    for window in (True, False):
        gradients = solve(problem, small(window))
        if scale == 300.0:  # decided softmax: the slopes cancel to nothing, which no relative error describes
            assert all(torch.isfinite(g).all() for g in gradients)
            # a logit is known to a unit in its last place, a weight therefore to that share of itself
            logits = scale * torch.einsum("bhwnd,bijnd->bhwnij", problem.query, problem.key)
            room = torch.finfo(torch.float32).eps * logits.abs().max().item() * problem.grad().abs().max().item()
            expected = problem.gradients()
            assert room < 0.01 * expected[2].abs().max()
            assert torch.allclose(gradients[2].cpu().double(), expected[2], rtol=0, atol=room)
        else:
            assert not problem.gradient_faults(gradients)


def test_long_and_narrow_windows():
    check(attention_cases.make(7, torch.float32, (4, 3), (24, 2), 8, heads=2, ratio=0.0), small(True))


@pytest.mark.parametrize("width", [32, 8])
def test_more_heads_than_one_program_takes(width):
    check(attention_cases.make(8, torch.float32, (4, 5), (4, 3), 8, ratio=0.3), replace(small(False), width=width))


def test_mixed_dtypes():
    problem = attention_cases.make(9, torch.bfloat16, (4, 5), (4, 3), 8, heads=2)
    problem.value = attention_cases._bordered(problem.value.float())
    for window in (True, False):
        check(problem, small(window))


def test_gradients_beyond_the_range_of_float16():
    problem = attention_cases.make(10, torch.float16, (4, 4), (3, 3), 64, heads=1, ratio=0.3, scale=0.01)
    grad = (problem.grad() * 2000).half()
    problem.value = attention_cases._bordered((problem.value * 8).half())
    there = problem.to(DEVICE)
    slopes = grad.double().flatten(1, 2) @ problem.value.double().flatten(1, 2).mT
    assert slopes.abs().max() > 2 * torch.finfo(torch.float16).max
    for window in (True, False):
        gradients = kernels.windowed_attention_bwd(grad.to(DEVICE), *there.tensors, scale=0.01, tiles=small(window))
        assert not problem.gradient_faults(gradients, grad)


@pytest.mark.parametrize("make", ["transposed", "expanded", "wide"])
def test_gradients_of_any_strides_and_dtype(make):
    problem = attention_cases.make(11, torch.float32, (4, 5), (4, 3), 8, heads=2)
    grad = problem.grad()
    if make == "transposed":
        grad = grad.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    elif make == "expanded":
        grad = torch.ones((), dtype=grad.dtype).expand(grad.shape)
    else:
        grad = grad.double()
    check(problem, small(True), grad.to(DEVICE))


@pytest.mark.parametrize("window", [True, False], ids=["window", "blocks"])
def test_two_runs_are_equal_to_the_bit_and_programs_share_keys(window, monkeypatch):
    problem = attention_cases.make(12, torch.bfloat16, (6, 7), (3, 4), 12, heads=1, ratio=0.3)
    monkeypatch.setattr(kernels, "PROGRAMS", 24)
    parts = []
    added = kernels._added
    monkeypatch.setattr(kernels, "_added", lambda sums, dtype: parts.append(len(sums)) or added(sums, dtype))
    first, second = solve(problem, small(window)), solve(problem, small(window))
    assert min(parts) > 1, "the sums of several programs were added"
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not problem.gradient_faults(first)


@pytest.mark.parametrize("device", [H100, A100, MI300], ids=lambda d: d.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_plan_of_every_device(device, dtype, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(Device, "of", lambda _: device)
    check(attention_cases.make(13, dtype, (9, 10), (5, 4), 12, heads=2, ratio=0.15), None)


def test_plans():
    for device in (H100, A100, MI300):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            unknown = kernels.plan(device, dtype, None)
            assert not unknown.window and unknown == kernels.plan(device, dtype, lambda *_: (40, 40))
            some = kernels.plan(device, dtype, lambda *_: (8, 7))
            whole = (device, dtype) != (A100, torch.float32)
            assert some.window == whole and some.key == unknown.key
            assert not whole or some.query.block_k == 64
            assert kernels.plan(device, dtype, lambda *_: (2, 2)).query.block_k == 16


def test_plans_that_do_not_fit():
    problem = attention_cases.make(14, torch.float32, (3, 3), (2, 2), 4, heads=1)
    there = [x.to("meta") for x in (problem.grad(), *problem.tensors)]
    with pytest.raises(ValueError, match="tiles: one block for the whole window needs bounds on the CPU"):
        kernels.windowed_attention_bwd(*there, tiles=small(True))
    few = Plan(True, Blocks(4, 4, 16, 16, 4), BY_KEY, BY_KEY)
    with pytest.raises(ValueError, match="tiles: 16 keys do not hold the 5 x 4"):
        solve(attention_cases.make(14, torch.float32, (3, 3), (5, 4), 4, heads=1, ratio=0.0), few)


def test_ranges_hold_all_pixels_that_see_a_tile():
    for rule, n, keys, ratio in (
        (window_bounds, 30, 9, 0.1),
        (neighborhood_bounds, 24, 8, 0.2),
        (window_bounds, 3, 20, 0.05),
    ):
        bounds = rule(n, keys, ratio)
        for (start, end), first in zip(kernels._range_table(bounds, keys, 4).tolist(), range(0, keys, 4), strict=True):
            seen = [i for i, (a, b) in enumerate(bounds.tolist()) if a < first + 4 and b > first]
            assert list(range(start, end)) == seen, "contiguous, since the windows are monotone"


def test_the_operator_takes_the_kernels_and_passes_opcheck(monkeypatch):
    monkeypatch.setattr(kernels, "plan", lambda *_: small(True))
    problem = attention_cases.make(15, torch.float32, (3, 3), (3, 3), 4, heads=2).to(DEVICE)
    arguments = (problem.grad().to(DEVICE), *problem.tensors, 0.3, "mean", True, "triton")
    problem.scale = 0.3
    assert not problem.gradient_faults(windowed_attention_backward_op(*arguments))
    torch.library.opcheck(windowed_attention_backward_op, arguments)


def test_autograd_goes_to_the_kernels_of_the_back_end(monkeypatch):
    monkeypatch.setattr(kernels, "plan", lambda *_: small(True))
    asked = []
    bwd = kernels.windowed_attention_bwd
    monkeypatch.setattr(kernels, "windowed_attention_bwd", lambda *a, **k: asked.append(1) or bwd(*a, **k))
    problem = attention_cases.make(16, torch.float32, (3, 3), (3, 3), 4, heads=2).to(DEVICE)
    problem.scale = 0.3
    tensors = [x.detach().requires_grad_() for x in problem.tensors[:3]]
    for backend, times in (("torch", 0), ("triton", 1)):
        out = windowed_attention_op(*tensors, *problem.tensors[3:], 0.3, "mean", backend)
        gradients = torch.autograd.grad(out, tensors, problem.grad().to(DEVICE))
        assert len(asked) == times and not problem.gradient_faults(gradients)


def broken_problem():
    return attention_cases.make(17, torch.float32, (5, 6), (6, 6), 12, heads=2, ratio=0.2)


@pytest.mark.parametrize("window", [True, False], ids=["window", "blocks"])
def test_what_is_not_broken_passes(window):
    check(broken_problem(), small(window))


# Each removes one mask or term: (design, what stands in the source, what replaces it).
BROKEN = [
    (True, 's = tl.where(seen, s, float("-inf"))', 's = tl.where(mask_k[None, :], s, float("-inf"))'),
    (True, "e * (slope - delta[:, None])", "e * slope"),
    (True, "share = scale / HEADS", "share = scale"),
    (False, "sums = sums + (deltas[h] + tl.sum(tl.where(seen, e, 0.0) * slope, 1),)",
     "sums = sums + (deltas[h] + tl.sum(tl.where(mask_k[None, :], e, 0.0) * slope, 1),)"),
    (False, "e = tl.where(seen, e, 0.0) * (slope - deltas[h][:, None])", "e = e * (slope - deltas[h][:, None])"),
    (True, "e = tl.where(seen, e, 0.0) * (slope - delta[None, :])", "e = e * (slope - delta[None, :])"),
    (True, "acc = _dot(tl.where(seen, w, 0.0)", "acc = _dot(w"),
    (True, "mask_pix = (i < i1) & (j < j1)", "mask_pix = (i < i1) & (j < j1 + 1)"),
    (True, "steps = tl.cdiv(i1 - i0, BLOCK_H)", "steps = ((i1 - i0) // BLOCK_H)"),
    (True, "a_ptrs + c, mask=mask_a[:, None] & mask_c[None, :]", "a_ptrs + c, mask=mask_a[:, None]"),
]  # fmt: skip


@pytest.mark.skipif(DEVICE != "cpu", reason="reads outside of what is there")
@pytest.mark.parametrize(("window", "old", "new"), BROKEN)
def test_what_is_broken_is_caught(window, old, new, broken, monkeypatch):
    problem = broken_problem()
    module = broken(kernels, old, new)
    monkeypatch.setattr(module, "PROGRAMS", 8)
    assert problem.gradient_faults(solve(problem, small(window), module=module))


@pytest.mark.slow("minutes: 120 draws of what the tests above name")
@pytest.mark.parametrize("index", range(120))
def test_long_sweep(index):
    problem = attention_cases.draw(index, longest=9 if DEVICE == "cpu" else 60)
    check(problem, small(index % 2 == 0 and keys_of(problem) <= 64))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_it_can_be_captured_in_a_graph_and_waits_for_nothing():
    problem = attention_cases.make(18, torch.bfloat16, (40, 40), (12, 12), 32).to(DEVICE)
    arguments = problem.grad().to(DEVICE), *problem.tensors
    kernels.windowed_attention_bwd(*arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            gradients = kernels.windowed_attention_bwd(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    assert not problem.gradient_faults(gradients)


@pytest.mark.parametrize(("rows", "tile"), [(10, Blocks(16, 8, 128, 64, 8)), (15, Blocks(8, 8, 128, 64, 4))])
def test_windows_of_128_keys_take_twice_the_pixels_where_they_fit(rows, tile):
    """On Hopper four warps on 64 pixels spill; eight need 128 rows."""
    hopper = Device("cuda", (9, 0), 232448, "H100")
    assert kernels.plan(hopper, torch.bfloat16, lambda height, width: (rows if height == 16 else 9, 9)).query == tile
