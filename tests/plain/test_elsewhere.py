"""Plain PyTorch on other devices than CPUs: few operations, no waiting for copies, the same results."""

import contextlib
from collections import Counter
from unittest.mock import patch

import pytest
import torch
from elsewhere import NAME, Elsewhere
from torch._dynamo.trace_rules import get_torch_obj_rule_map
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anyup_fast import AnyUp, ops
from anyup_fast.plain import attention, gathered, keys, pooling, reference, rotary, unification, whole

VIEWS = {
    *("_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "diagonal", "expand", "narrow", "permute"),
    *("select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze"),
    *("view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
}


TABLES = (
    *(gathered._tables, rotary._axis, rotary._parts),
    *(keys._neighbours, pooling._edges, unification._shares_of_taps),
)


class Operations(TorchDispatchMode):
    """Counts what computes on "meta", by name, and what needs a tensor of the CPU as well."""

    def __init__(self):
        super().__init__()
        self.counts, self.copies = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:
            if function.namespace == "anyup_fast":
                return OPDEFS[function.name()]._init_fn(*args, **kwargs)
            if (parts := function.decompose(*args, **kwargs)) is not NotImplemented:
                return parts
        out, name = function(*args, **kwargs), function.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if any(x.device.type == "meta" for x in tensors):
            self.counts[name] += name not in VIEWS
            self.copies[name] += any(x.device.type == "cpu" and x.dim() for x in tensors)
        return out


def forget():
    for kept in TABLES:
        kept.cache_clear()


@pytest.fixture
def no_tables():
    """Tables of "meta" have no numbers here, those of `Elsewhere` have: neither may meet the other's."""
    forget()
    yield
    forget()


# Counted: 203 and 229. Eight of them are norms over groups, which are three kernels each on CUDA.
@pytest.mark.parametrize("side, grid, channels, most", [(448, 32, 384, 210), (1024, 64, 768, 233)])
@pytest.mark.usefixtures("no_tables")
@torch.no_grad()
def test_operations_of_a_forward(side, grid, channels, most):
    model = AnyUp().to("meta").eval()
    given = torch.empty(1, 3, side, side, device="meta"), torch.empty(1, channels, grid, grid, device="meta")
    get_torch_obj_rule_map()  # as in `Elsewhere`
    without = patch("torch.autocast", lambda *_, **__: contextlib.nullcontext())  # "meta" has none
    with without, patch("torch.is_autocast_enabled", lambda *_: False):
        for _ in range(2):  # the first one makes the tables of its size
            with Operations() as seen:
                model(*given)
    assert 100 < seen.counts.total() <= most
    assert not +seen.copies, "a copy from the CPU waits for the device"


@pytest.mark.parametrize("together, size", [(1 << 18, (33, 28)), (2 * 33 * 28, (33, 28)), (1 << 18, (16, 20))])
@torch.no_grad()
def test_images_of_a_batch_are_computed_together(together, size, monkeypatch):
    monkeypatch.setattr(whole, "TOGETHER", together)
    torch.manual_seed(0)
    model = AnyUp(qk_dim=32).eval()
    # Weights far from their first values, images and maps that differ in scale and mean.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter) * (parameter.ndim == 1))
    scale = torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1, 1)
    image, features = scale * torch.randn(3, 3, 33, 28) + scale, torch.randn(3, 6, 5, 4) / scale
    expected = model.double()(image.double(), features.double(), size)
    with Elsewhere() as device:
        actual = model.float().to(NAME)(image.to(NAME), features.to(NAME), size).cpu()
        split = device.counts["var_mean"]
    assert split == 12 * -(-3 // max(1, together // (33 * 28)))
    assert all(wrong(a, e) < 5e-6 for a, e in zip(actual, expected, strict=True))


def test_scratch_of_the_attention_follows_the_output():
    assert gathered.scratch_for(1 << 20) == gathered.SCRATCH
    assert gathered.scratch_for(3 << 27) == 3 << 26
    assert gathered.scratch_for(1 << 40) == gathered.MOST_SCRATCH


CASES = [
    ((9, 14), (14, 11), 8, 2, 0.35, "mean"),
    ((28, 42), (4, 6), 8, 2, 0.1, "split"),
    ((30, 25), (5, 6), 1, 1, 0.1, "mean"),
    ((9, 7), (8, 8), 4, 3, 0, "split"),
    ((5, 6), (11, 9), 4, 2, 0.2, "mean"),
]


def problem(size, grid, channels, batch, ratio, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, *size, 4, 8), (batch, *grid, 4, 8), (batch, *grid, channels)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return tensors, [ops.window_bounds(n, m, ratio) for n, m in zip(size, grid, strict=True)]


def wrong(actual, expected):
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("scratch", [gathered.SCRATCH, 1 << 15, 1 << 12])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("size, grid, channels, batch, ratio, mode", CASES)
@torch.no_grad()
def test_gathered_attention(size, grid, channels, batch, ratio, mode, dtype, tolerance, scratch, monkeypatch):
    monkeypatch.setattr(gathered, "SCRATCH", scratch)
    tensors, bounds = problem(size, grid, channels, batch, ratio, dtype)
    expected = reference.windowed_attention(*(x.double() for x in tensors), *bounds, head_mode=mode)
    with Elsewhere():
        there = [x.to(NAME) for x in tensors]
        actual = ops.windowed_attention(*there, *bounds, head_mode=mode, backend="torch").cpu()
    assert actual.dtype == dtype and wrong(actual, expected) < tolerance  # Measured 4e-7 in float32.


@torch.no_grad()
def test_keys_that_are_too_many_come_in_blocks(monkeypatch):
    for module, name, value in ((gathered, "SCRATCH", 128), (attention, "BATCH", 512), (attention, "LIMIT", 2048)):
        monkeypatch.setattr(module, name, value)
    tensors, bounds = problem((5, 7), (14, 11), 8, 2, 0)
    with Elsewhere():
        actual = ops.windowed_attention(*(x.to(NAME) for x in tensors), *bounds, backend="torch").cpu()
    expected = reference.windowed_attention(*(x.double() for x in tensors), *bounds)
    assert wrong(actual, expected) < 1e-6


@pytest.mark.parametrize("size, grid, channels, batch, ratio, mode", CASES)
def test_gradients_of_gathered_attention(size, grid, channels, batch, ratio, mode):
    tensors, bounds = problem(size, grid, channels, batch, ratio)
    exact = [x.double().requires_grad_() for x in tensors]
    reference.windowed_attention(*exact, *bounds, head_mode=mode).square().sum().backward()
    with Elsewhere():
        there = [x.to(NAME).requires_grad_() for x in tensors]
        ops.windowed_attention(*there, *bounds, head_mode=mode, backend="torch").square().sum().backward()
        found = [x.grad.cpu() for x in there]
    for grad, other in zip(found, exact, strict=True):
        assert wrong(grad, other.grad) < 5e-6
