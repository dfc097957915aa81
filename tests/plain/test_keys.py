"""Keys in plain PyTorch on a device that isn't there: a whole batch in few operations, as exact as on the CPU."""

import pytest
import tiny
import torch
from elsewhere import NAME, Elsewhere

from anyup_fast.plain import keys
from anyup_fast.plain.norms import RMS_EPS
from anyup_fast.plain.weights import KeyWeights, cast

VIEWS = {"view", "permute", "t", "transpose", "expand", "select", "slice", "unsqueeze", "unbind", "detach"}
VIEWS |= {"_unsafe_view", "_reshape_alias", "split"}
MOST = 140


@pytest.fixture(scope="module")
def model():
    made = tiny.model(lfu_dim=16).requires_grad_(False)
    for parameter in made.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter) if parameter.ndim == 1 else 0)
    return made


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (1, 6)])
@pytest.mark.parametrize("batch", [1, 5])
def test_a_batch_takes_no_more_operations_than_an_image(model, batch, size):
    from_image = torch.randn(batch, *size, 32)
    from_features = (1 + 3e-3 * torch.randn(batch, 16, *size)) / 16
    weights = model.key_weights()
    wide = from_image.double(), from_features.double(), cast(weights, torch.float64)
    wanted = keys.project_keys(*wide, eps=RMS_EPS)
    with Elsewhere() as device:
        there = KeyWeights.from_flat([tensor.to(NAME) for tensor in weights.flat()])
        given = from_image.to(NAME), from_features.to(NAME)
        device.counts.clear()
        out = keys.project_keys(*given, there, eps=RMS_EPS)
        computed = sum(count for name, count in device.counts.items() if name not in VIEWS)
        out = out.to("cpu")
    assert computed <= MOST
    assert (out - wanted).abs().max() <= 2e-6 * wanted.abs().max()
