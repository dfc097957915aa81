"""More of the windowed attention in plain PyTorch: awkward shapes, small pieces, memory, refusals, speed."""

import attention_cases
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from anyup_fast import ops
from anyup_fast.ops import choice, reference, window_bounds, windowed_attention
from anyup_fast.ops.attention import windowed_attention_backward_op, windowed_attention_op
from anyup_fast.plain import attention as plain_attention


def solve(problem, **options):
    return windowed_attention(*problem.tensors, scale=problem.scale, head_mode=problem.head_mode, **options)


def check(problem, backend="torch"):
    error = problem.error(solve(problem, backend=backend))
    assert error <= attention_cases.TOLERANCE[problem.query.dtype], f"{problem.text}: error {error:.2e}"


@pytest.fixture
def poisoned(monkeypatch):
    """Every tensor that is allocated but not filled holds NaN."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poison(x):
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))


@pytest.mark.parametrize(
    "size, grid",
    [((63, 65), (16, 16)), ((1, 1), (5, 7)), ((1, 90), (3, 4)), ((33, 8), (40, 30)), ((20, 36), (1, 1))],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_torch_on_awkward_shapes(size, grid, dtype, poisoned):
    problem = attention_cases.make(7, dtype, size, grid, 5, batch=2)
    out = solve(problem, backend="torch")
    assert out.dtype == dtype and out.is_contiguous() and out.shape == (2, *size, 5)
    limit = 1e-13 if dtype == torch.float64 else attention_cases.TOLERANCE[dtype]
    assert problem.error(out) <= limit


@pytest.mark.parametrize("limit", [1 << 9, 1 << 12, 1 << 16])
@pytest.mark.parametrize("channels", [4, 76])
@pytest.mark.parametrize("head_mode", ["mean", "split"])
def test_torch_in_small_pieces_gives_the_same(limit, channels, head_mode, monkeypatch, poisoned):
    monkeypatch.setattr(plain_attention, "BATCH", limit // 4)
    monkeypatch.setattr(plain_attention, "LIMIT", limit)
    problem = attention_cases.make(3, torch.float32, (5, 9), (14, 11), channels, ratio=0.35, head_mode=head_mode)
    blocked = plain_attention._plan(problem.row_bounds, problem.col_bounds, 4, channels)[2]
    assert blocked == (limit < 1 << 16 or channels == 4), "both ways through are meant to be taken"
    check(problem)


def test_bounds_need_not_be_monotone():
    generator = torch.Generator().manual_seed(0)
    problem = attention_cases.make(5, torch.float32, (21, 17), (9, 8), 6)
    for name, n_key in (("row_bounds", 9), ("col_bounds", 8)):
        start = torch.randint(0, n_key, (len(getattr(problem, name)),), generator=generator)
        length = torch.randint(1, n_key + 1, start.shape, generator=generator)
        setattr(problem, name, torch.stack((start, (start + length).clamp(max=n_key)), 1).int())
    check(problem)


def gradients(problem, backend, seed=1):
    leaves = [x.detach().double().clone().requires_grad_() for x in (problem.query, problem.key, problem.value)]
    out = windowed_attention(
        *leaves,
        problem.row_bounds,
        problem.col_bounds,
        scale=problem.scale,
        head_mode=problem.head_mode,
        backend=backend,
    )
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=out.dtype))
    return [x.grad for x in leaves]


def test_gradients_of_a_wrong_window_differ():
    problem = attention_cases.make(0, torch.float32, (24, 24), (8, 8), 4)
    right = gradients(problem, "torch")
    problem.row_bounds = problem.row_bounds.clone()
    problem.row_bounds[12] = torch.tensor([0, 8])
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(right, gradients(problem, "torch"), strict=True))


def test_16_bit_gradients_keep_their_dtype():
    problem = attention_cases.make(0, torch.bfloat16, (9, 9), (4, 4), 4)
    leaves = [x.detach().clone().requires_grad_() for x in (problem.query, problem.key, problem.value)]
    windowed_attention(*leaves, problem.row_bounds, problem.col_bounds).sum().backward()
    assert {x.grad.dtype for x in leaves} == {torch.bfloat16}


def test_second_derivatives_are_refused_rather_than_wrong():
    problem = attention_cases.make(0, torch.float64, (5, 5), (3, 3), 4)
    query = problem.query.detach().clone().requires_grad_()
    out = windowed_attention(query, *problem.tensors[1:])
    (first,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


def test_autocast_does_not_lower_it():
    problem = attention_cases.make(4, torch.float32, (20, 20), (6, 6), 8)
    with torch.autocast("cpu", torch.bfloat16):
        check(problem)


def test_the_operator_passes_opcheck():
    problem = attention_cases.make(0, torch.float32, (9, 10), (4, 4), 4)
    tensors = [x.detach().clone().requires_grad_() for x in (problem.query, problem.key, problem.value)]
    bounds = problem.row_bounds, problem.col_bounds
    for mode in ("mean", "split"):
        torch.library.opcheck(windowed_attention_op, (*tensors, *bounds, 0.3, mode, "torch"))
    plain = [x.detach() for x in tensors]
    grad = torch.randn(1, 9, 10, 4)
    for for_value in (True, False):
        arguments = (grad, *plain, *bounds, 0.3, "mean", for_value, "torch")
        torch.library.opcheck(windowed_attention_backward_op, arguments)


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
        return out


def largest(size, grid, channels, backend, backward=False, batch=1):
    query = torch.randn(batch, *size, 2, 8, requires_grad=backward)
    key, value = torch.randn(batch, *grid, 2, 8), torch.randn(batch, *grid, channels)
    bounds = [window_bounds(n, m, 0.1) for n, m in zip(size, grid, strict=True)]
    with LargestTensor() as mode:
        if backend == "torch" and not backward:
            plain_attention.windowed_attention(query, key, value, *bounds)
        else:
            out = windowed_attention(query, key, value, *bounds, backend=backend)
            if backward:
                out.sum().backward()
    return mode.numbers


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("backward", [False, True])
def test_no_tensor_of_pixels_times_tokens(backward, monkeypatch):
    monkeypatch.setattr(plain_attention, "BATCH", 1 << 14)
    monkeypatch.setattr(plain_attention, "LIMIT", 1 << 16)
    size, grid, channels = (96, 80), (24, 20), 8
    pixels, tokens = 96 * 80, 24 * 20
    assert largest(size, grid, channels, "torch", backward) <= max(pixels * 16, 1 << 16) < pixels * tokens // 20
    assert largest(size, grid, channels, "reference") >= pixels * tokens, "the count must see it where it exists"


@pytest.mark.usefixtures("one_thread")
def test_buffers_do_not_grow_with_the_picture_the_batch_or_the_window(monkeypatch):
    monkeypatch.setattr(plain_attention, "BATCH", 1 << 12)
    monkeypatch.setattr(plain_attention, "LIMIT", 1 << 14)
    for size, grid, batch in (((32, 32), (8, 8), 1), ((16, 16), (64, 64), 1), ((32, 32), (16, 16), 3)):
        inputs = max(batch * size[0] * size[1] * 16, batch * grid[0] * grid[1] * 16)
        assert largest(size, grid, 4, "torch", batch=batch) <= max(inputs, 1 << 14)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(dtype=torch.float64), "got float64"),
        (dict(value_dtype=torch.float64), "got float64"),
        (dict(head_dim=160), "got 160"),
        (dict(capability=(7, 5)), "needs compute capability 8.0, got 7.5"),
        (dict(installed=False), "not installed"),
        (dict(capability=(8, 0)), None),
    ],
)
def test_reasons_against_triton_on_a_gpu(options, words, monkeypatch):
    options = {"capability": (9, 0), "installed": True, **options}
    capability, installed = options.pop("capability"), options.pop("installed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    missing = "needs the package triton, which is not installed"
    monkeypatch.setattr(choice, "_installation_fault", lambda kind: None if installed else missing)
    reason = ops.why_not("triton", "cuda", **options)
    assert reason is None if words is None else words in reason and "\n" not in reason


def arguments(**changed):
    given = dict(
        query=torch.randn(1, 4, 5, 2, 8),
        key=torch.randn(1, 2, 3, 2, 8),
        value=torch.randn(1, 2, 3, 6),
        row_bounds=window_bounds(4, 2, 0.1),
        col_bounds=window_bounds(5, 3, 0.1),
    )
    return {**given, **changed}


@pytest.mark.parametrize(
    "changed, words",
    [
        (dict(value=torch.randn(1, 2, 3, 5), head_mode="split"), "multiple of the 2 heads"),
        (dict(head_mode="max"), "'mean' or 'split', got 'max'"),
        (dict(query=torch.randn(1, 4, 5, 2, 8, dtype=torch.float64)), "one floating dtype"),
        (dict(value=torch.ones(1, 2, 3, 6, dtype=torch.int64)), "one floating dtype"),
        (dict(value=torch.randn(1, 2, 3, 6, device="meta")), "move them"),
        (dict(row_bounds=torch.zeros(5, 2, dtype=torch.int32)), r"row_bounds must be integers of shape \(4, 2\)"),
        (dict(col_bounds=torch.zeros(5, 2)), "col_bounds must be integers"),
        (dict(row_bounds=torch.tensor([[0, 1], [1, 1], [0, 2], [0, 2]])), "row_bounds: every window"),
        (dict(row_bounds=torch.tensor([[0, 1], [-1, 1], [0, 2], [0, 2]])), "row_bounds: every window"),
        (dict(col_bounds=torch.tensor([[0, 4]] * 5)), "0 <= start < end <= 3"),
    ],
)
def test_bad_arguments_are_refused(changed, words):
    assert windowed_attention(**arguments()).shape == (1, 4, 5, 6)
    with pytest.raises(ValueError, match=words):
        windowed_attention(**arguments(**changed))


@pytest.mark.parametrize("shape", [(224, 16, 384), (448, 32, 384)])
@pytest.mark.parametrize("backend", ["torch"])
def test_speed_on_the_cpu(shape, backend, benchmark):
    image, grid, channels = shape
    query, key = torch.randn(1, image, image, 4, 32), torch.randn(1, grid, grid, 4, 32)
    value, bounds = torch.randn(1, grid, grid, channels), window_bounds(image, grid, 0.1)
    out = benchmark(windowed_attention, query, key, value, bounds, bounds, backend=backend)
    row = query[:, 200:201]
    expected = reference.windowed_attention(row, key, value, bounds[200:201], bounds)
    torch.testing.assert_close(out[:, 200:201], expected, rtol=0, atol=5e-6)
