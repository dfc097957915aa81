"""Optimizers of training: AdamW as PyTorch has it, Muon as PyTorch has it but for its bfloat16."""

import copy

import pytest
import tiny
import torch

from anyup_fast.training.optimizers import Muon, Optimizer, orthogonal


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


def stepped(kind, model, rates, skip=()):
    optimizer = Optimizer(model, kind, 1e-2)
    for seed, lr in enumerate(rates):
        for name, gradient in gradients(model, seed).items():
            if name not in skip:
                model.get_parameter(name).grad = gradient
        optimizer.step(lr)
    return optimizer


def test_adamw_is_that_of_pytorch():
    ours, theirs = tiny.model(), tiny.model()
    rates = (1e-2, 5e-3, 1e-3)
    stepped("adamw", ours, rates)
    optimizer = torch.optim.AdamW(theirs.parameters(), weight_decay=1e-2)
    for seed, lr in enumerate(rates):
        for name, gradient in gradients(theirs, seed).items():
            theirs.get_parameter(name).grad = gradient
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    for name, parameter in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter), name


@pytest.mark.parametrize("shape", [(32, 32), (32, 90), (90, 32)])
def test_muon_is_that_of_pytorch_but_for_bfloat16(shape):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has no Muon")
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = Muon([ours], 1e-2), torch.optim.Muon([theirs], 1e-2, 0.0, adjust_lr_fn="match_rms_adamw")
    for seed in range(4):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    way = (theirs - start).norm()
    assert way > 0.05
    assert (ours - theirs).norm() < 0.02 * way


@pytest.mark.parametrize("shape", [(16, 16), (16, 40), (40, 16)])
def test_orthogonal_keeps_directions_and_evens_their_lengths(shape):
    generator = torch.Generator().manual_seed(3)
    left, _, right = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    matrix = left * torch.logspace(0, -1, 16) @ right
    values = torch.diagonal(left.T @ orthogonal(matrix) @ right.T)
    assert values.min() > 0.6 and values.max() < 1.25
    torch.testing.assert_close(left * values @ right, orthogonal(matrix), atol=1e-4, rtol=0)
    assert not orthogonal(torch.zeros(shape)).any()


def test_muon_has_the_matrices_and_adamw_the_rest():
    model = tiny.model()
    optimizer = Optimizer(model, "muon", 0.0)
    apart = [name for name, _, _ in optimizer.matrices]
    for name in ("query_encoder.1.block.2.weight", "aggregation.0.weight", "cross_decode.conv2d.weight"):
        assert apart.count(name) == 1
    assert apart.count("cross_decode.cross_attn.attention.in_proj_weight") == 3
    for name in ("image_encoder.0.weight", "key_features_encoder.0.basis", "rope.freqs", "aggregation.1.block.0.bias"):
        assert name not in apart
    counted = [p for opt in optimizer.optimizers for group in opt.param_groups for p in group["params"]]
    assert sum(p.numel() for p in counted) == sum(p.numel() for p in model.parameters())


def test_a_step_of_muon_moves_every_weight_by_its_rate_and_nothing_without_a_gradient():
    model, start = tiny.model(), tiny.model()
    still = "aggregation.0.weight"
    optimizer = stepped("muon", model, (1e-2,), skip=(still,))
    assert torch.equal(model.get_parameter(still), start.get_parameter(still))
    for name, rows, _ in optimizer.matrices:
        if name != still:
            way = (model.get_parameter(name) - start.get_parameter(name)).flatten(1)[rows]
            # Orthogonal of n rows in m >= n columns: the root mean square is m^-1/2; singular values 0.7 to 1.2.
            assert 0.6 * 0.2e-2 < way.square().mean().sqrt() < 1.25 * 0.2e-2, name


def test_gradients_are_zeroed_in_place_and_kept_by_a_resumed_run():
    model = tiny.model()
    optimizer = stepped("muon", model, (1e-3,), skip=("rope.freqs",))
    optimizer.zero_grad()
    assert model.rope.freqs.grad is None
    assert not any(p.grad.any() for name, p in model.named_parameters() if name != "rope.freqs")
    again = tiny.model()
    resumed = Optimizer(again, "muon", 1e-2)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert again.rope.freqs.grad is None
    optimizer.step(1e-3)
    resumed.step(1e-3)
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
