"""Gradients of the fused layers against those of the plain ones in float64, and what they keep."""

import copy

import pytest
import torch
import torch.nn.functional as F

from anyup_fast import AnyUp, ops
from anyup_fast.layers import ResBlock, RMSNorm, RotaryEmbedding, matrices_of
from anyup_fast.ops import reference, use_precision
from anyup_fast.ops.blocks import branches_op, res_block_op
from anyup_fast.ops.queries import convolve_and_project_op
from anyup_fast.ops.unification import feature_unification_op
from anyup_fast.plain import walks

# Norm of the difference over norm, of the worst parameter. Measured: 1e-13, 5e-5 and 6.1e-2; the twin's own gradients
# in float32 are as far from float64.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-4, torch.bfloat16: 8e-2}
UNUSED = {f"cross_decode.cross_attn.attention.out_proj.{part}" for part in ("weight", "bias")}


def peaky(dtype=torch.float64, **config):
    """A small model with random weights far from their initial values, normalisations included."""
    torch.manual_seed(0)
    model = AnyUp(**{"qk_dim": 32, **config}).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def inputs(size=(20, 24), shape=(12, 5, 6), batch=(2, 2), dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(batch[0], 3, *size, generator=generator).to(dtype).requires_grad_()
    return image, torch.randn(batch[1], *shape, generator=generator).to(dtype).requires_grad_()


def plain(model, image, features, output_size=None):
    """The plain layers one after the other, single images or feature maps repeated."""
    batch = max(len(image), len(features))
    image, features = (tensor.expand(batch, *tensor.shape[1:]) for tensor in (image, features))
    guide = model.guidance(image)
    query = model.queries(guide, output_size or image.shape[-2:])
    return model.cross_decode(query, model.keys(guide, features), features)


def gradients(run, model, image, features, output_size=None, autocast=False):
    """Output, and gradients of its product with fixed random numbers by name."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = run(model, image, features, output_size)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    named = {name: p for name, p in model.named_parameters() if name not in UNUSED}
    tensors = {"image": image, "features": features, **named}
    return out, dict(zip(tensors, torch.autograd.grad(out, tensors.values(), weight.to(out)), strict=True))


def exact(model, image, features, output_size=None):
    """`gradients` of the plain layers in float64."""
    image, features = (tensor.detach().double().requires_grad_() for tensor in (image, features))
    return gradients(plain, copy.deepcopy(model).double(), image, features, output_size)


def distance(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "given, output_size, config",
    [
        (dict(), None, {}),
        (dict(shape=(40, 5, 6)), (10, 9), dict(lfu_dim=16)),
        (dict(size=(9, 11), shape=(3, 4, 3)), (20, 23), dict(num_heads=2, window_ratio=0.3)),
        (dict(size=(70, 90), shape=(33, 5, 6), batch=(1, 1)), None, {}),
        (dict(batch=(1, 3)), None, dict(window_rule="neighborhood")),
        (dict(batch=(3, 1), shape=(8, 1, 1)), (7, 8), dict(head_mode="split")),
        (dict(size=(1, 30), shape=(64, 2, 7)), None, {}),
    ],
)
def test_gradients_are_those_of_the_plain_layers(dtype, given, output_size, config):
    model, given = peaky(dtype, **config), inputs(**given, dtype=dtype)
    out, grads = gradients(AnyUp.__call__, model, *given, output_size)
    expected, expected_grads = exact(model, *given, output_size)
    assert distance(out.detach(), expected.detach()) < TOLERANCE[dtype]
    floor = 1e-3 * max(grad.norm().item() for grad in expected_grads.values())
    for name, grad in grads.items():
        wrong = (grad.double() - expected_grads[name]).norm().item()
        assert wrong <= TOLERANCE[dtype] * max(expected_grads[name].norm().item(), floor), name


def test_gradients_under_autocast_have_the_error_of_bfloat16_products():
    model, given = peaky(torch.float32), inputs(dtype=torch.float32)
    _, expected = exact(model, *given)
    for precision, tolerance in (("highest", TOLERANCE[torch.float32]), ("medium", TOLERANCE[torch.bfloat16])):
        with use_precision(precision):
            _, grads = gradients(AnyUp.__call__, model, *given, autocast=True)
        assert max(distance(grad, expected[name]) for name, grad in grads.items()) < tolerance


def test_two_runs_give_equal_bits():
    model, given = peaky(torch.float32), inputs(size=(70, 90), dtype=torch.float32)
    first, second = (gradients(AnyUp.__call__, model, *given)[1] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_wrong_gradients_would_show():
    model, given = peaky(), inputs()
    _, grads = gradients(AnyUp.__call__, model, *given)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.query_encoder[1].block[3].bias.add_(0.01)
    _, expected = exact(other, *given)
    assert max(distance(grad, expected[name]) for name, grad in grads.items()) > 1e3 * TOLERANCE[torch.float64]


def test_frozen_tensors_get_none_and_cost_the_others_nothing():
    model, (image, features) = peaky().requires_grad_(False), inputs()
    model(image.detach(), features).sum().backward()
    assert features.grad is not None and all(parameter.grad is None for parameter in model.parameters())
    assert not model(image.detach(), features.detach()).requires_grad
    full = exact(peaky(), image, features)[1]["features"]
    (grad,) = torch.autograd.grad(model(image.detach(), features), features, gradient_weight(image, features))
    assert distance(grad, full) < TOLERANCE[torch.float64]


def gradient_weight(image, features):
    shape = len(image), features.shape[1], *image.shape[-2:]
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).double()


def block(n_in=16, n_out=16, groups=8):
    torch.manual_seed(1)
    module = ResBlock(n_in, n_out, groups).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("n_in", [8, 12])
def test_res_block_is_its_twin_and_its_gradients_are_differences(n_in):
    module, x = block(n_in, 8, 4), torch.randn(2, 2, 3, n_in, dtype=torch.float64, requires_grad=True)
    (weights,) = matrices_of([module])
    expected = module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert distance(ops.res_block(x, weights, num_groups=4), expected.detach()) < 1e-13
    tensors = [tensor.detach().requires_grad_() for tensor in weights if tensor is not None]
    assert torch.autograd.gradcheck(lambda x, *t: ops.res_block(x, ops.Block(*t), num_groups=4), (x, *tensors))


def test_res_block_in_16_bits_stores_16_bits():
    module, x = block(), torch.randn(2, 30, 40, 16, dtype=torch.float64).bfloat16().requires_grad_()
    (weights,) = matrices_of([module])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = ops.res_block(x, weights)
    assert out.dtype == torch.bfloat16
    assert {t.dtype for t in kept if t.numel() >= x.numel()} == {torch.bfloat16}
    wide = x.detach().double().requires_grad_()
    expected = module(wide.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert distance(out.detach(), expected.detach()) < 2e-2
    given = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    (grad,) = torch.autograd.grad(out, x, given)
    (expected_grad,) = torch.autograd.grad(expected, wide, given.double())
    assert grad.dtype == torch.bfloat16
    assert distance(grad, expected_grad) < 2e-2


def test_branches_are_their_twins_and_their_gradients_are_differences():
    rotary = RotaryEmbedding(8).double()
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(8, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    freqs = (0.2 * rotary.freqs.detach()).requires_grad_()
    rotary.freqs.data.mul_(0.2)
    guide = rotary(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    for actual, weight in zip(ops.branches(x, freqs, *weights), weights, strict=True):
        assert distance(actual.detach(), F.linear(guide, weight).detach()) < 1e-13
    assert torch.autograd.gradcheck(ops.branches, (x, freqs, *weights))


def test_query_projection_is_its_twin_and_its_gradients_are_differences():
    torch.manual_seed(3)
    shapes = (2, 3, 4, 8), (8, 8, 3, 3), (8,), (8, 8), (8,)
    query, conv, norm, weight, bias = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    twin = RMSNorm(8).double()
    twin.weight.data.copy_(norm)
    expected = F.linear(twin(F.conv2d(query.permute(0, 3, 1, 2), conv, padding=1).permute(0, 2, 3, 1)), weight, bias)
    actual = ops.project_queries(query, conv, norm, weight, bias)
    assert distance(actual.detach(), expected.detach()) < 1e-13
    assert torch.autograd.gradcheck(ops.project_queries, (query, conv, norm, weight, bias))


@pytest.mark.parametrize("channels", [1, 3, 8, 20])
def test_unification_gradients_are_differences(channels):
    torch.manual_seed(4)
    features = torch.randn(2, channels, 3, 4, dtype=torch.float64, requires_grad=True)
    basis = torch.randn(4, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    run = lambda f, b: ops.feature_unification(f, b, backend="torch")  # noqa: E731
    assert torch.autograd.gradcheck(run, (features, basis))


def test_unification_gradients_in_pieces(monkeypatch):
    torch.manual_seed(5)
    features = torch.randn(2, 12, 7, 9, dtype=torch.float64, requires_grad=True)
    basis = torch.randn(8, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(reference.feature_unification(features, basis).square().sum(), (features, basis))
    monkeypatch.setattr("anyup_fast.plain.unification.RESPONSES", 8 * 12 * 4)
    actual = torch.autograd.grad(ops.feature_unification(features, basis).square().sum(), (features, basis))
    assert max(distance(a, e) for a, e in zip(actual, expected, strict=True)) < 1e-12


def test_second_derivatives_are_refused():
    model, (image, features) = peaky(), inputs()
    (grad,) = torch.autograd.grad(model(image, features).square().sum(), features, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="autograd|grad"):
        grad.square().sum().backward()


def test_what_is_kept_is_a_fixed_number_of_images():
    model, (image, features) = peaky(torch.float32), inputs(size=(64, 64), shape=(16, 16, 16), dtype=torch.float32)
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(image, features)
    images = sum(kept.values()) / (2 * 64 * 64 * 32 * 4)
    # Six blocks keep two each, the branches one, the convolution two, the attention one; some low-res maps beside.
    assert 14 < images < 20
    assert max(kept.values()) <= 2 * 64 * 64 * 32 * 4


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda w: ops.res_block(torch.zeros(1, 2, 2, 8), w), "do not fit together with 8 groups"),
        (lambda w: ops.res_block(torch.zeros(1, 2, 2, 16), w, num_groups=3), "do not fit together with 3 groups"),
        (lambda w: ops.res_block(torch.zeros(2, 2, 16), w), "do not fit together"),
        (lambda w: ops.branches(torch.zeros(1, 2, 2, 8), torch.zeros(2, 6), *[torch.zeros(8, 8)] * 2), "do not fit"),
    ],
)
def test_wrong_arguments_are_named(call, words):
    (weights,) = matrices_of([block()])
    with pytest.raises(ValueError, match=words):
        call(weights)


def test_registered_operators_keep_torchs_rules():
    x = torch.randn(2, 3, 4, 16, requires_grad=True)
    (weights,) = matrices_of([block().float()])
    arguments = x, [tensor for tensor in weights if tensor is not None], 8
    torch.library.opcheck(res_block_op, arguments)
    square = torch.randn(16, 16, requires_grad=True)
    torch.library.opcheck(branches_op, (x, torch.randn(2, 16, requires_grad=True), square, square))
    vector = torch.randn(16, requires_grad=True)
    conv = torch.randn(16, 16, 3, 3, requires_grad=True)
    torch.library.opcheck(convolve_and_project_op, (x, conv, vector, square, vector, 1e-6))
    features, basis = torch.randn(1, 6, 3, 4, requires_grad=True), torch.randn(8, 1, 3, 3, requires_grad=True)
    torch.library.opcheck(feature_unification_op, (features, basis, "torch"))


def test_training_follows_the_plain_layers():
    """Forty steps on one picture, in float32, from the same start: the losses stay within one per cent."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 20, 20, generator=generator)
    fine = torch.randn(1, 6, 20, 20, generator=generator)
    fine = F.avg_pool2d(F.pad(fine, (2,) * 4, mode="reflect"), 5, 1) * 3 + image.mean(1, keepdim=True)
    features = F.adaptive_avg_pool2d(fine, 5)
    losses = []
    for run in (AnyUp.__call__, plain):
        model = peaky(torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses.append([])
        for _ in range(40):
            loss = F.mse_loss(run(model, image, features), fine)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    fused, twin = map(torch.tensor, losses)
    assert twin[-1] < 0.9 * twin[0], "something has to be learned"
    assert ((fused - twin).abs() / twin).max() < 0.01


def test_pieces_do_not_change_the_gradients(monkeypatch):
    model, given = peaky(), inputs()
    _, whole = gradients(AnyUp.__call__, model, *given)
    monkeypatch.setattr(walks, "PIXELS", 50)
    _, cut = gradients(AnyUp.__call__, model, *given)
    assert max(distance(cut[name], grad) for name, grad in whole.items()) < 1e-11
