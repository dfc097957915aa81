"""The backward kernels of feature unification against the twin's gradients in float64: on a GPU, else interpreted."""

import attention_cases
import pytest
import torch
from anyup_fast.kernels import unification_backward as kernels
from anyup_fast.kernels.tiling import Device
from unification_cases import A100, DEVICE, DTYPES, H100, MI300, Sizes, make

from anyup_fast.ops import reference

# Largest difference over the largest |expected|; a 16-bit gradient is rounded once. Measured in the interpreter: 5e-7.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
NAMES = "features", "basis"


@pytest.fixture(autouse=True)
def few_programs(poisoned, monkeypatch):
    """Few programs share what they work on, so that partial sums are added."""
    monkeypatch.setattr(kernels, "PROGRAMS", 5)


def gradient_of(features, basis):
    """A gradient of the output, drawn, with NaN around it."""
    generator = torch.Generator().manual_seed(features.shape[1])
    grad = torch.randn(len(features), len(basis), *features.shape[2:], generator=generator)
    return attention_cases._bordered(grad, DEVICE)


def faults(gradients, grad, features, basis):
    """Sentences about the gradients that differ from the twin's in float64."""
    inputs = [x.double().cpu().requires_grad_() for x in (features, basis)]
    expected = torch.autograd.grad(reference.feature_unification(*inputs), inputs, grad.double().cpu())
    found = []
    for name, gradient, of, right in zip(NAMES, gradients, (features, basis), expected, strict=True):
        assert gradient.shape == of.shape and gradient.dtype == of.dtype and gradient.is_contiguous()
        error = ((gradient.double().cpu() - right).abs().max() / right.abs().max()).item()
        if not error <= TOLERANCE.get(of.dtype, TOLERANCE[torch.float32]):
            found.append(f"{name}: error {error:.2e}")
    return found


def check(features, basis, module=kernels):
    grad = gradient_of(features, basis)
    assert faults(module.feature_unification_bwd(grad, features, basis), grad, features, basis) == []


@pytest.mark.parametrize("channels", [3, 21, 128, 256])
def test_channels_with_the_published_filters(channels):
    check(*make(channels, 128, 5, (1, 2, 3)))


@pytest.mark.parametrize("filters", [2, 12, 200])
@pytest.mark.parametrize("multiple", [True, False], ids=["grouped", "gathered"])
def test_numbers_of_filters(filters, multiple):
    channels = 2 * filters if multiple else 21
    assert kernels.plan(H100, channels, filters, 3)[0] == multiple
    check(*make(channels, filters, 3, (1, 1, 2)))


@pytest.mark.parametrize("channels", [16, 10])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_sizes_of_filters(size, channels):
    check(*make(channels, 8, size, (1, 3, 3)))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 7), (1, 6, 1), (2, 3, 2)])
@pytest.mark.parametrize("channels", [16, 5])
def test_grids(channels, shape):
    check(*make(channels, 8, 5, shape))


@pytest.mark.parametrize("channels", [16, 10])
def test_bands_of_rows(channels, monkeypatch):
    arguments = make(channels, 8, 3, (2, 5, 2))
    for most in (1, 3 * 2 * 2 * channels * 9):
        monkeypatch.setattr(kernels, "MOST_TAPPED", most)
        check(*arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype):
    features, basis = make(20, 16, 3, (2, 2, 3), dtype)
    check(features, basis)
    check(features, basis.to(dtype))


def test_any_strides():
    features, basis = make(16, 8, 3, (2, 3, 2))
    for view in (features.transpose(2, 3), features[:, :, ::2, 1::2], features[:1].expand(2, -1, -1, -1)):
        check(view, basis.transpose(2, 3))


@pytest.mark.parametrize("channels", [32, 20])
def test_large_responses_overflow_nothing(channels):
    features, basis = make(channels, 16, 3, (1, 2, 3))
    gradients = kernels.feature_unification_bwd(gradient_of(features, basis), features * 3e4, basis)
    assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("device", [H100, A100, MI300], ids=lambda d: d.name)
def test_the_plan_of_every_device(device, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(Device, "of", lambda _: device)
    check(*make(256, 128, 5, (1, 1, 2)))


@pytest.mark.parametrize("channels", [32, 20])
def test_two_runs_are_equal_to_the_bit(channels):
    arguments = make(channels, 16, 3, (2, 2, 3))
    first, second = (kernels.feature_unification_bwd(gradient_of(*arguments), *arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_of_the_size_of_the_responses_is_made(monkeypatch):
    features, basis = make(128, 128, 3, (1, 4, 5))
    grad = gradient_of(features, basis).contiguous()
    features = features.contiguous()
    monkeypatch.setattr(kernels, "MOST_TAPPED", 1)
    with Sizes() as sizes:
        kernels.feature_unification_bwd(grad, features, basis)
    # One row's taps; 4: bytes, where the interpreter copies.
    assert features.numel() <= max(sizes.made) <= 4 * 9 * 128 * 5 < features.numel() * 128 / 10


def test_an_unknown_precision_is_refused():
    arguments = make(16, 8, 3, (1, 2, 2))
    with pytest.raises(ValueError, match="precision: need one of tf32x3, tf32, ieee, got 'fp8'"):
        kernels.feature_unification_bwd(gradient_of(*arguments), *arguments, precision="fp8")


@pytest.mark.parametrize("channels", [24, 20])
def test_what_is_not_broken_passes(channels):
    check(*make(channels, 12, 3, (1, 3, 3)))


# What stands in the source, what replaces it, channels, filters.
BROKEN = [
    ("entry % channels", "entry // FILTERS", 24, 12),
    ("* (grad - delta) *", "* grad *", 24, 12),
    ("x = tl.load(x_ptrs, mask=mask_t[:, None] & mask_c[None, :]", "x = tl.load(x_ptrs, mask=mask_c[None, :]", 24, 12),
    ("(row < n_rows) & (col >= 0)", "(row < n_rows)", 24, 12),
    ("x_ptrs + group, mask=mask_x", "x_ptrs, mask=mask_x", 24, 12),
    ("tl.where(mask_a[None, :], _dot", "tl.where(mask_a[None, :] | True, _dot", 24, 12),
    ("tl.where(mask_a[:, None], response", "tl.where(mask_a[:, None] | True, response", 20, 12),
]


@pytest.mark.skipif(DEVICE != "cpu", reason="reads outside of what is there")
@pytest.mark.parametrize(("old", "new", "channels", "filters"), BROKEN)
def test_what_is_broken_is_caught(old, new, channels, filters, broken):
    features, basis = make(channels, filters, 3, (1, 3, 3))
    grad = gradient_of(features, basis)
    module = broken(kernels, old, new)
    assert faults(module.feature_unification_bwd(grad, features, basis), grad, features, basis)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("channels", [384, 100])
def test_it_can_be_captured_in_a_graph_and_waits_for_nothing(channels):
    features, basis = make(channels, 128, 5, (1, 12, 13), torch.bfloat16)
    grad = gradient_of(features, basis)
    expected = kernels.feature_unification_bwd(grad, features, basis)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            gradients = kernels.feature_unification_bwd(grad, features, basis)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
