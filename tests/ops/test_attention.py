"""Windowed attention: the fast plain PyTorch path and its gradients against the twin in float64."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from anyup_fast import ops
from anyup_fast.ops import choice, neighborhood_bounds, reference, window_bounds
from anyup_fast.plain import attention as plain_attention

# Greatest difference over greatest value. Measured over the twelve cases: 4.3e-7, 3.2e-3, 3.9e-4.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
GRADIENT_TOLERANCE = 1e-5


def case(seed, dtype=torch.float32):
    """Random shapes and inputs that the seed names again: arguments and keywords of the operator."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    batch, heads, head_dim = (int(rng.choice(n)) for n in ((1, 2), (1, 2, 4), (4, 8, 32)))
    size, grid = ([int(n) for n in rng.integers(1, most, 2)] for most in (49, 18))
    split = bool(rng.random() < 0.3)
    channels = int(rng.integers(1, 40)) * (heads if split else 1)
    ratio = float(rng.choice([0.03, 0.1, 0.25, 0.7, 0.0]))
    rule = neighborhood_bounds if rng.random() < 0.2 else window_bounds
    shapes = (batch, *size, heads, head_dim), (batch, *grid, heads, head_dim), (batch, *grid, channels)
    tensors = []
    for shape in shapes:
        # A slice of a larger buffer whose border is NaN: strided, and a stranger's value read would show.
        border = torch.full([n + 2 for n in shape], torch.nan, dtype=dtype)
        inner = border[tuple(slice(1, n + 1) for n in shape)]
        inner.copy_(torch.randn(shape, generator=generator))
        tensors.append(inner)
    bounds = [rule(n, n_key, ratio) for n, n_key in zip(size, grid, strict=True)]
    return (*tensors, *bounds), {"head_mode": "split" if split else "mean"}


def twin(arguments, **keywords):
    *tensors, rows, cols = arguments
    return reference.windowed_attention(*(t.double() for t in tensors), rows, cols, **keywords)


def error(actual, expected):
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that an operator allocates and does not write shows as NaN."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: new_empty(self, *a, **k).fill_(torch.nan))


def check_sweep(seed):
    for dtype, tolerance in TOLERANCE.items():
        arguments, keywords = case(seed, dtype)
        output = ops.windowed_attention(*arguments, **keywords, backend="torch")
        assert output.dtype == dtype
        assert error(output, twin(arguments, **keywords)) < tolerance


@pytest.mark.parametrize("seed", range(12))
def test_the_torch_back_end_equals_the_twin(seed, poisoned):
    check_sweep(seed)


@pytest.mark.slow("300 more draws of the hundred above")
@pytest.mark.parametrize("seed", range(100, 400))
def test_the_torch_back_end_equals_the_twin_at_length(seed, poisoned):
    check_sweep(seed)


@pytest.mark.parametrize("seed", range(4))
def test_blocks_of_keys_give_the_same(seed, poisoned, monkeypatch):
    """Limits so small that every case takes the path of long windows."""
    monkeypatch.setattr(plain_attention, "BATCH", 512)
    monkeypatch.setattr(plain_attention, "LIMIT", 2048)
    taken = []
    blocked = plain_attention._blocked
    monkeypatch.setattr(plain_attention, "_blocked", lambda *a: (taken.append(1), blocked(*a)))
    arguments, keywords = case(seed)
    arguments = (*arguments[:3], *(b for b in (window_bounds(t, k, 0) for t, k in sizes(arguments))))
    output = ops.windowed_attention(*arguments, **keywords, backend="torch")
    assert error(output, twin(arguments, **keywords)) < TOLERANCE[torch.float32]
    keys = arguments[1].shape[1] * arguments[1].shape[2] * arguments[0].shape[3]
    assert taken or keys <= 512


def sizes(arguments):
    return zip(arguments[0].shape[1:3], arguments[1].shape[1:3], strict=True)


def test_a_wrong_window_is_caught():
    arguments, keywords = case(3)
    wider = [window_bounds(n, n_key, 0.9) for n, n_key in sizes(arguments)]
    output = ops.windowed_attention(*arguments[:3], *wider, **keywords, backend="torch")
    assert error(output, twin(arguments, **keywords)) > 100 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("seed", range(8))
def test_gradients_equal_those_of_the_twin(seed):
    arguments, keywords = case(seed)
    grads = []
    for run, dtype in ((ops.windowed_attention, torch.float32), (reference.windowed_attention, torch.float64)):
        leaves = [t.to(dtype).contiguous().requires_grad_() for t in arguments[:3]]
        output = run(*leaves, *arguments[3:], **keywords)
        slope = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        grads.append(torch.autograd.grad(output, leaves, slope.to(dtype)))
    for ours, expected in zip(*grads, strict=True):
        assert error(ours, expected) < GRADIENT_TOLERANCE or expected.abs().max() < 1e-12


@pytest.mark.parametrize("head_mode", ["mean", "split"])
def test_gradcheck(head_mode):
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 4, 3, 2, 3), (1, 3, 2, 2, 3), (1, 3, 2, 4)
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    bounds = window_bounds(4, 3, 0.2), window_bounds(3, 2, 0.2)
    assert torch.autograd.gradcheck(
        lambda *t: ops.windowed_attention(*t, *bounds, head_mode=head_mode, backend="torch"), leaves
    )


@pytest.mark.parametrize("rule", [window_bounds, neighborhood_bounds])
def test_bounds_first_made_in_inference_serve_training(rule):
    rule.cache_clear()
    with torch.inference_mode():
        rule(9, 4, 0.1), rule(7, 3, 0.1)
    query, key = torch.randn(1, 9, 7, 1, 4, requires_grad=True), torch.randn(1, 4, 3, 1, 4)
    ops.windowed_attention(query, key, torch.randn(1, 4, 3, 2), rule(9, 4, 0.1), rule(7, 3, 0.1)).sum().backward()
    assert torch.isfinite(query.grad).all()


def test_opcheck():
    arguments, _ = case(5)
    tensors = [t.contiguous().requires_grad_() for t in arguments[:3]]
    torch.library.opcheck(
        torch.ops.anyup_fast.windowed_attention.default, (*tensors, *arguments[3:], 0.5, "mean", "torch")
    )


class Largest(TorchDispatchMode):
    """Remembers the greatest number of elements of a tensor made inside."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_nothing_as_large_as_pixels_times_tokens_is_made(backend):
    size, grid = 128, 24
    query, key = torch.randn(1, size, size, 2, 8), torch.randn(1, grid, grid, 2, 8)
    bounds = window_bounds(size, grid, 0.1)
    with Largest() as largest:
        run = plain_attention.windowed_attention if backend == "torch" else reference.windowed_attention
        run(query, key, torch.randn(1, grid, grid, 4), bounds, bounds)
    assert (largest.elements < size**2 * grid**2 / 4) == (backend == "torch"), largest.elements


def test_two_runs_are_equal_to_the_bit():
    arguments, keywords = case(2)
    first, second = (ops.windowed_attention(*arguments, **keywords) for _ in range(2))
    assert torch.equal(first, second)


def test_back_ends_say_why_they_cannot_run():
    reasons = ops.backends("cpu")
    assert list(reasons) == ["triton", "torch", "reference"]
    assert reasons["torch"] is None and reasons["reference"] is None
    arguments, _ = case(1)
    assert ops.choose_backend(*arguments[:3]) == "torch"
    with pytest.raises(RuntimeError, match="'triton' can't run: "):
        ops.windowed_attention(*arguments, backend="triton")
    with pytest.raises(ValueError, match="no back end 'cudnn'; use one of 'auto', 'triton', 'torch', 'reference'"):
        ops.windowed_attention(*arguments, backend="cudnn")


def test_the_choice_is_logged_once_for_all_operators(caplog):
    arguments, _ = case(1)
    choice.log_once.cache_clear()
    with caplog.at_level("DEBUG", logger="anyup_fast"):
        for _ in range(3):
            ops.windowed_attention(*arguments)
            ops.feature_unification(torch.randn(1, 4, 3, 3), torch.randn(8, 1, 5, 5))
    told = [record.getMessage() for record in caplog.records if "not taken" in record.getMessage()]
    assert told == [f"'triton' not taken: {ops.why_not('triton', 'cpu')}"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v, r, c: (q[0], k, v, r, c), "need query"),
        (lambda q, k, v, r, c: (q, k[:, :, :, :1, :1], v, r, c), "do not fit together"),
        (lambda q, k, v, r, c: (q, k, v[..., :0], r, c), "no dimension may be 0"),
        (lambda q, k, v, r, c: (q, k.double(), v, r, c), "one floating dtype"),
        (lambda q, k, v, r, c: (q, k, v, r[:, :1], c), "row_bounds must be integers of shape"),
        (lambda q, k, v, r, c: (q, k, v, r, c * 0), "col_bounds: every window must satisfy 0 <= start < end"),
        (lambda q, k, v, r, c: (q, k, v, r + 100, c), "row_bounds: every window must satisfy"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments, _ = case(6)
    with pytest.raises(ValueError, match=message):
        ops.windowed_attention(*change(*arguments))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_benchmark(benchmark, backend):
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 56, 56, 4, 32), torch.randn(1, 8, 8, 4, 32), torch.randn(1, 8, 8, 96)
    bounds = window_bounds(56, 8, 0.1)
    output = benchmark(ops.windowed_attention, query, key, value, bounds, bounds, backend=backend)
    assert output.shape == (1, 56, 56, 96)
