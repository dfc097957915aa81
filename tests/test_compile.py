"""The model under torch.compile: one graph without breaks, few of them over many sizes, and the same numbers."""

import shutil

import pytest
import tiny
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._dynamo.utils import counters

from anyup_fast import ops
from anyup_fast.ops import windows

# (H, W), (h, w), channels, output size: none repeats another's.
SIZES = (
    ((28, 32), (7, 8), 16, None),
    ((30, 44), (5, 6), 12, (20, 21)),
    ((24, 25), (4, 9), 7, None),
    ((33, 20), (3, 3), 5, (36, 35)),
    ((16, 50), (6, 2), 8, (7, 9)),
    ((18, 17), (5, 5), 9, None),
    ((19, 40), (2, 8), 4, None),
    ((48, 26), (12, 10), 3, (31, 64)),
    ((37, 41), (5, 3), 21, None),
    ((22, 23), (20, 19), 6, (12, 13)),
)


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor's C++ needs g++")


@pytest.fixture(autouse=True)
def _forgotten():
    """Graphs and their counts begin and end with each test."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def inputs(size, grid, channels, batch=1):
    generator = torch.Generator().manual_seed(sum(size))
    image = torch.randn(batch, 3, *size, generator=generator)
    return image, torch.randn(batch, channels, *grid, generator=generator)


@torch.no_grad()
def test_ten_sizes_need_two_graphs_and_a_batch_two_more():
    model, counter = tiny.model(), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for batch, limit, sizes in ((1, 2, SIZES), (3, 4, SIZES[:5])):
        for size, grid, channels, output in sizes:
            given = inputs(size, grid, channels, batch)
            assert torch.equal(compiled(*given, output), model(*given, output))
        assert counter.frame_count <= limit, f"batch {batch}: with and without an output size one graph each"
    assert not counters["graph_break"]


def same(compiled, plain):
    """Equal up to rounding: a graph with gradients pools the keys after their last product, not before it."""
    torch.testing.assert_close(compiled, plain, rtol=0, atol=2e-6 * plain.abs().max().item())


@pytest.mark.parametrize(
    "grad, limit",
    [
        (False, 3),
        pytest.param(
            True, 4, marks=pytest.mark.slow("ten seconds of tracing; two sizes with gradients are traced below")
        ),
    ],
)
def test_squares_first_and_rectangles_later(grad, limit):
    """Sizes that are equal in the first call share a symbol, and cost a graph where they differ later."""
    model, counter = tiny.model(), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    squares = [((n, n), (n // 8, n // 8), channels, None) for n, channels in ((32, 8), (48, 12), (64, 8))]
    others = [((24, 32), (3, 4), 8, None), ((32, 24), (4, 3), 8, (32, 24)), ((32, 32), (4, 4), 8, (20, 20))]
    with torch.set_grad_enabled(grad):
        for size, grid, channels, output in squares + others:
            given = inputs(size, grid, channels)
            same(compiled(*given, output), model(*given, output))
    assert counter.frame_count <= limit
    assert not counters["graph_break"]


@pytest.mark.slow("six seconds of tracing; two sizes with gradients are traced below")
def test_ten_sizes_with_gradients():
    model, counter = tiny.model(), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for size, grid, channels, output in SIZES:
        given = inputs(size, grid, channels)
        same(compiled(*given, output), model(*given, output))
    assert counter.frame_count <= 3, "torch's convolution takes small and large inputs apart"
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    "config",
    [
        {},
        pytest.param(
            {"window_rule": "neighborhood", "head_mode": "split", "kernel_size": 3},
            marks=pytest.mark.slow("ten seconds of tracing"),
        ),
    ],
)
def test_gradients_through_the_compiled_model(config):
    model = tiny.model(**config)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    names, parameters = zip(*model.named_parameters(), strict=True)
    for size, grid in (((17, 20), (4, 5)), ((21, 18), (6, 3))):
        image, features = inputs(size, grid, 8)
        results = []
        for function in (compiled, model):
            given = features.clone().requires_grad_()
            out = function(image, given)
            gradients = torch.autograd.grad(out.square().sum(), (given, *parameters), allow_unused=True)
            results.append((out, *gradients))
        for name, actual, expected in zip(("output", "features", *names), *results, strict=True):
            assert (actual is None) == (expected is None), name
            if expected is not None:
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert not counters["graph_break"]


@torch.no_grad()
def test_autocast_vis_attn_and_chunks_leave_no_break():
    model, given = tiny.model(), inputs((20, 22), (4, 5), 8)

    def call(image, features):
        with torch.autocast("cpu", torch.bfloat16):
            return model(image, features, vis_attn=True, q_chunk_size=7)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    # A graph holds what autocast casts, not that it was on: the operators within multiply float32 exactly.
    with torch.no_grad():
        exact = model(*given, vis_attn=True)
        for actual, expected, narrow in zip(compiled(*given), exact, call(*given), strict=True):
            assert (actual - expected).norm() < 1e-5 * expected.norm()
            assert (actual - narrow).norm() < 2e-2 * narrow.norm()


@needs_compiler
@torch.no_grad()
def test_inductor_keeps_the_windows():
    # 720 rows from 64: in another order of operations, or in float64, the windows differ.
    model = tiny.model(window_ratio=0.1)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    given = inputs((720, 4), (64, 3), 8)
    actual, expected = (function(*given) for function in (compiled, model))
    assert (actual - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.slow("inductor's C++ is compiled for a minute")
@needs_compiler
@torch.no_grad()
def test_inductor_pools_to_sizes_that_stay_open():
    # Not fused with this first convolution: the plain layers, pooling among them, are inductor's.
    model = tiny.model(kernel_size=3)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for size, grid in (((17, 20), (4, 5)), ((21, 18), (6, 30))):
        given = inputs(size, grid, 8)
        actual, expected = (function(*given, (9, 25)) for function in (compiled, model))
        assert (actual - expected).norm() <= 1e-5 * expected.norm()


@needs_compiler
@pytest.mark.slow("inductor's C++ is compiled for minutes")
# Every pair of choices: each of these takes half a minute.
@pytest.mark.parametrize(
    "config, memory_format, dynamic",
    [
        ({}, torch.contiguous_format, True),
        ({}, torch.channels_last, False),
        ({"kernel_size": 3}, torch.contiguous_format, False),
        ({"kernel_size": 3}, torch.channels_last, True),
    ],
)
def test_inductor_gives_the_gradients(config, memory_format, dynamic):
    model = tiny.model(**config).to(memory_format=memory_format)
    parameters = [parameter for name, parameter in model.named_parameters() if "out_proj" not in name]
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    for size, grid in (((17, 20), (4, 5)), ((21, 18), (6, 3))):
        given = inputs(size, grid, 8)
        # Where it is dynamic, inductor can't sort the strides of views that are kept for backward.
        with torch._functorch.config.patch(recompute_views=dynamic):
            actual, expected = (
                torch.autograd.grad(function(*given).square().sum(), parameters) for function in (compiled, model)
            )
        floor = 1e-3 * max(grad.norm() for grad in expected)
        for grad, other in zip(actual, expected, strict=True):
            assert (grad - other).norm() <= 1e-4 * max(other.norm(), floor)


@pytest.mark.parametrize("name", ["window_bounds", "neighborhood_bounds"])
def test_window_rules_are_operators_of_their_own_in_graphs(name):
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=keep)
    def bounds(x, y):
        return getattr(ops, name)(x.shape[0], y.shape[0], 0.1)

    for n, m in ((720, 64), (1080, 80), (50, 7)):
        assert torch.equal(bounds(torch.empty(n), torch.empty(m)), getattr(ops, name)(n, m, 0.1))
    assert len(graphs) == 1 and f"anyup_fast.{name}" in graphs[0].code


def test_a_table_from_a_graph_is_the_callers_own():
    windows.window_bounds_op(9, 4, 0.1).zero_()
    assert torch.equal(windows.window_bounds(9, 4, 0.1), windows.window_bounds_op(9, 4, 0.1))
    assert windows.window_bounds(9, 4, 0.1).any()


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this PyTorch has no such tag")
@pytest.mark.parametrize("name", ["window_bounds", "neighborhood_bounds", "windowed_attention"])
def test_what_reads_tables_on_the_cpu_stays_outside_of_captured_parts(name):
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.anyup_fast, name).default.tags
    assert torch.Tag.cudagraph_unsafe not in torch.ops.anyup_fast.guidance.default.tags
