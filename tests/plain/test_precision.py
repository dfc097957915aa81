"""Precision of float32 products on CPUs, through the model: exact, or within the error that bfloat16 has."""

import pytest
import tiny
import torch

import anyup_fast
from anyup_fast import AnyUp, upsample_features_with_anyup
from anyup_fast.cpu import products
from anyup_fast.ops import use_precision

MEDIUM = 6e-3  # measured: 2.6e-3 here, 2.2e-3 on photographs
GRADIENTS = 5e-2  # of the parameter whose gradient is off most; measured: 2.1e-2


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.delenv(products.PRECISION_VARIABLE, raising=False)
    products.chosen_again("bfloat16=fast")
    yield
    products.chosen_again()
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, 12, 12, generator=generator)
    image = torch.nn.functional.interpolate(image, (96, 84), mode="bicubic")
    return AnyUp.from_pretrained("embedded"), image, torch.randn(1, 24, 8, 7, generator=generator)


def far(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("size", [None, (48, 40), (100, 130)])
@torch.no_grad()
def test_medium_is_near_and_high_is_exact(problem, size):
    model, image, features = problem
    exact = model(image, features, size)
    torch.set_float32_matmul_precision("medium")
    assert 1e-4 < far(model(image, features, size), exact) < MEDIUM
    torch.set_float32_matmul_precision("highest")
    with use_precision("medium"):
        narrow = model(image, features, size)
    assert 1e-4 < far(narrow, exact) < MEDIUM and narrow.dtype == torch.float32
    with use_precision("high"):
        assert torch.equal(model(image, features, size), exact)
    with use_precision("medium"):
        assert torch.equal(model(image, features, size), narrow)
        products.chosen_again("bfloat16=slow")
        assert torch.equal(model(image, features, size), exact)


@torch.no_grad()
def test_results_are_the_same_bits_every_time(problem, two_threads):
    model, image, features = problem
    for precision in products.PRECISIONS:
        with use_precision(precision):
            first = model(image, features)
            assert all(torch.equal(model(image, features), first) for _ in range(3))


@torch.no_grad()
def test_autocast_and_bfloat16_take_products_in_bfloat16(problem):
    model, image, features = problem
    exact = model(image, features)
    with torch.autocast("cpu", torch.bfloat16):
        assert 1e-4 < far(model(image, features), exact) < MEDIUM
    narrow = tiny.model().bfloat16()
    wide = tiny.model()
    wide.load_state_dict(narrow.state_dict())
    given = image.bfloat16(), features.bfloat16()
    expected = wide(*(tensor.float() for tensor in given))
    results = []
    for choice in ("bfloat16=fast", "bfloat16=slow"):
        products.chosen_again(choice)
        results.append(narrow(*given))
        assert results[-1].dtype == torch.bfloat16 and far(results[-1], expected) < 2e-2
    assert not torch.equal(*results)


def test_float64_stays_float64(problem):
    _, image, features = problem
    model = tiny.model().double()
    with torch.no_grad():
        exact = model(image.double(), features.double())
        with use_precision("medium"):
            assert torch.equal(model(image.double(), features.double()), exact)


def test_gradients_are_near(problem):
    _, image, features = problem
    model = AnyUp.from_pretrained("embedded")

    def gradients():
        model.zero_grad()
        given = features.clone().requires_grad_()
        out = model(image, given)
        out.backward(out.detach())
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None] + [given.grad]

    exact = gradients()
    with use_precision("high"):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), exact, strict=True))
    with use_precision("medium"):
        narrow = gradients()
    errors = [far(a, b) for a, b in zip(narrow, exact, strict=True)]
    assert 1e-4 < max(errors) < GRADIENTS


def test_every_way_of_multiplying_gives_the_same_forward_and_gradients(problem):
    _, image, features = problem
    results = []
    for choice in ("default", "convolution=direct", "onednn"):
        if choice == "onednn" and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            continue
        products.chosen_again(choice)
        model = AnyUp.from_pretrained("embedded")
        out = model(image, features)
        out.backward(out.detach())
        results.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for other in results[1:]:
        assert far(other[0], results[0][0]) < 1e-5
        assert max(far(a, b) for a, b in zip(other, results[0], strict=True)) < 1e-3


@torch.no_grad()
def test_a_prepared_image_keeps_the_precision_it_was_made_with(problem):
    model, image, features = problem
    exact, narrow = (
        anyup_fast.prepare(image, features, model),
        anyup_fast.prepare(image, features, model, precision="medium"),
    )
    full = exact.full()
    assert 1e-4 < far(narrow.full(), full) < MEDIUM
    box = 10, 12, 33, 41
    cut = full[..., 10:43, 12:53]
    assert far(exact.region(*box), cut) < 1e-5
    with use_precision("highest"):
        assert 1e-4 < far(narrow.region(*box), cut) < MEDIUM
    points = torch.tensor([[3, 4], [80, 60]])
    assert 1e-4 < far(narrow.at(points), exact.at(points)) < 2 * MEDIUM


def test_verbs_take_a_precision(problem):
    model, image, features = problem
    exact = upsample_features_with_anyup(image, features, weights=model)
    narrow = upsample_features_with_anyup(image, features, weights=model, precision="medium")
    assert 1e-4 < far(narrow, exact) < MEDIUM
    assert torch.equal(upsample_features_with_anyup(image, features, weights=model, precision="highest"), exact)
    with pytest.raises(ValueError, match="precision: need one of 'highest', 'high', 'medium', got 'fast'"):
        upsample_features_with_anyup(image, features, weights=model, precision="fast")
