"""What is mixed may differ from the features that make the keys, and gradients may be asked of it alone."""

import re

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from tree import ROOT

import anyup_fast
from anyup_fast import ops
from anyup_fast import prepared as prepared_module
from anyup_fast.ops import attention, reference
from anyup_fast.padded import padded

SIZE, GRID = (12, 15), (4, 5)


@pytest.fixture(scope="module")
def model():
    return tiny.model().requires_grad_(False)


def given(channels=6, values=3, batch=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(channels + 10 * values)
    shapes = (batch, 3, *SIZE), (batch, channels, *GRID), (batch, values, *GRID)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def twin(model, image, features, values, size=SIZE):
    """The whole attention, built by the plain layers in float64, applied to `values`."""
    exact = tiny.model().double().requires_grad_(False)
    exact.load_state_dict(model.state_dict())
    with ops.use_backend("reference"), torch.no_grad():
        guide = exact.guidance(image.double())
        query, key = exact.queries(guide, size), exact.keys(guide, features.double())
        query, key = exact.cross_decode.projected(query, key)
    bounds = exact.cross_decode.bounds(size, GRID)
    return reference.windowed_attention(query, key, values.permute(0, 2, 3, 1).double(), *bounds).permute(0, 3, 1, 2)


def close(found, expected, tolerance=2e-6):
    return found.shape == expected.shape and (found.double() - expected).abs().max() < tolerance * 3


@pytest.mark.parametrize("options", [{}, {"q_chunk_size": 5}, {"output_size": (7, 20)}, {"max_memory": 1 << 40}])
def test_the_weights_are_those_of_the_features(model, options):
    image, features, values = given()
    expected = twin(model, image, features, values, options.get("output_size", SIZE))
    assert close(model(image, features, values=values, **options), expected)
    if "max_memory" not in options:  # the plain layers have no plan by tiles
        assert close(model(image, features, backend="reference", values=values, **options), expected)
    other = twin(model, image, features + torch.randn_like(features), values, options.get("output_size", SIZE))
    assert not close(other, expected, 1e-5), "the features still matter"


def test_the_values_are_no_longer_the_features(model):
    image, features, values = given()
    colours = model(image, features, vis_attn=True)[1]
    mixed, picture = model(image, features, vis_attn=True, values=values)
    assert close(picture, colours.double()) and close(mixed, twin(model, image, features, values))
    assert close(model(image, features, values=features.clone()), model(image, features).double())


@pytest.mark.parametrize("batches", [(1, 1, 3), (3, 1, 1), (1, 3, 3), (3, 3, 1)], ids=str)
def test_a_single_one_serves_a_batch(model, batches):
    tensors = [t[:n] for t, n in zip(given(batch=3), batches, strict=True)]
    found = model(*tensors[:2], values=tensors[2])
    for index in range(3):
        image, features, values = (t[index if len(t) == 3 else 0][None] for t in tensors)
        assert close(found[index : index + 1], twin(model, image, features, values))
    prepared = model.prepare(*tensors[:2], values=tensors[2])
    assert close(prepared.full(), found.double())


def test_a_plan_by_tiles_mixes_them_too(model, monkeypatch):
    monkeypatch.setattr(type(model), "estimate_memory", lambda *_, **__: 1 << 60)  # too much, whatever is asked
    image, features, values = given()
    found = model(image, features, max_memory=1 << 34, values=values)
    assert close(found, twin(model, image, features, values), 1e-5)
    with pytest.raises(ValueError, match="gradients are recorded"):
        model(image, features, max_memory=1 << 34, values=values.requires_grad_())


def test_memory_is_that_of_the_values(model):
    shapes = (1, 3, 448, 448), (1, 384, 32, 32)
    whole, few = (model.estimate_memory(*shapes, values_shape=v) for v in (None, (1, 21, 32, 32)))
    assert whole - few > 0.5 * 4 * (384 - 21) * 448 * 448
    assert model.estimate_memory(*shapes, values_shape=shapes[1]) == whole
    with pytest.raises(ValueError, match="values_shape: need the grid"):
        model.estimate_memory(*shapes, values_shape=(1, 21, 16, 16))


def test_a_linear_layer_may_come_first(model):
    image, features, _ = given(channels=24)
    conv = torch.nn.Conv2d(24, 4, 1)
    with torch.no_grad():
        assert close(model(image, features, values=conv(features)), conv(model(image, features)).double(), 3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_output_has_the_dtype_of_the_values(model, dtype):
    image, features, values = given()
    found = model(image, features, values=values.to(dtype))
    assert found.dtype == dtype
    assert close(found, twin(model, image, features, values.to(dtype)), 2e-2 if dtype == torch.bfloat16 else 2e-6)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("size", [None, (20, 7)])
def test_gradients_of_the_values_alone(model, backend, size, monkeypatch):
    image, features, values = given()
    asked = []
    real = attention.plain.windowed_attention_backward
    monkeypatch.setattr(
        attention.plain, "windowed_attention_backward", lambda *a, **k: asked.append(k["for_query"]) or real(*a, **k)
    )
    values.requires_grad_()
    expected = twin(model, image, features, values, size or SIZE)
    grad = torch.randn_like(expected)
    (exact,) = torch.autograd.grad(expected, values, grad)
    found = model(image, features, size, backend=backend, values=values)
    found.backward(grad.float())
    assert close(values.grad, exact.double(), 1e-5)
    assert asked == ([] if backend == "reference" else [False])


def test_nothing_of_the_guidance_is_recorded(model):
    """Kept for the backward: queries, keys, values and tables, and nothing of as many channels as the features."""
    image, features, values = given(channels=48)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        model(image, features, values=values.requires_grad_()).sum().backward()
    pixels, cells = SIZE[0] * SIZE[1], GRID[0] * GRID[1]
    tables = 2 * SIZE[0], 2 * SIZE[1]
    assert sorted(sizes) == sorted([32 * pixels, 32 * cells, 3 * cells, *tables])
    assert values.grad.shape == values.shape and max(sizes) < 48 * pixels


def test_gradients_of_all_of_them():
    model = tiny.model().double()
    image, features, values = (t.requires_grad_() for t in given(dtype=torch.float64))
    found = model(image, features, values=values)
    grad = torch.randn_like(found)
    names = dict(model.named_parameters())
    with_names = [image, features, values, names["cross_decode.conv2d.weight"], names["image_encoder.0.weight"]]
    grads = torch.autograd.grad(found, with_names, grad)
    plain = model(image, features, values=values, backend="reference")
    for ours, theirs in zip(grads, torch.autograd.grad(plain, with_names, grad), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-9) and theirs.abs().max() > 0


def test_inference_tensors_make_no_trouble(model):
    with torch.inference_mode():
        image, features, values = given()
    layer = torch.nn.Conv2d(3, 2, 1)
    model(image, features, values=layer(values.clone())).sum().backward()
    assert layer.weight.grad.abs().max() > 0


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow("tracing, once more"))])
def test_a_compiled_model_trains_on_values(model, backend):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=backend != "eager", backend=backend)
    image, features, values = given()
    gradients = []
    for one in (compiled, model):
        leaf = values.clone().requires_grad_()
        one(image, features, values=leaf).square().sum().backward()
        gradients.append(leaf.grad)
    torch._dynamo.reset()
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bare", [True, False])
def test_everything_that_is_asked_of_a_prepared_image(model, bare, tmp_path):
    image, features, values = given()
    if bare:
        prepared = model.prepare(image, features, values=values)
    else:
        prepared = anyup_fast.prepare(image[0], features[0], model, values=values[0])
    whole = twin(model, image, features, values)
    assert prepared.channels == 3 and close(prepared.full(), whole)
    assert close(prepared.region(2, 3, 5, 6), whole[:, :, 2:7, 3:9])
    assert close(prepared.at([[1, 2], [11, 14]]), whole[:, :, [1, 11], [2, 14]].mT)
    weight = torch.randn(2, 3)
    assert close(prepared.head(weight).full(), torch.einsum("kv,bvhw->bkhw", weight.double(), whole), 5e-6)
    labels = prepared.head(weight, argmax=True).full()
    assert torch.equal(labels, torch.einsum("kv,bvhw->bkhw", weight.double(), whole).argmax(1))
    filled = np.zeros((1, 3, *SIZE), np.float32)
    prepared.stream(5, out=filled)
    assert close(torch.from_numpy(filled), whole)
    assert close(prepared.within(7, 9).full(), whole[:, :, :7, :9])
    assert close(prepared.attention_map(), model.prepare(image, features).attention_map().double())
    assert prepared.state().keys() == {"key", "norms"}


def test_answers_of_a_prepared_image_record_gradients_of_the_values(model, monkeypatch):
    monkeypatch.setattr(prepared_module, "BAND", 50)  # several pieces
    image, features, values = given(batch=2)
    values.requires_grad_()
    weight = torch.randn(2, 3)
    whole = twin(model, image, features, values)
    prepared = model.prepare(image, features, values=values)
    assert prepared.state()["key"].requires_grad is False
    for found, expected in (
        (prepared.full(), whole),
        (prepared.region(2, 3, 5, 6), whole[:, :, 2:7, 3:9]),
        (prepared.at([[1, 2], [11, 14], [1, 2]]), whole[:, :, [1, 11, 1], [2, 14, 2]].mT),
        (prepared.head(weight).full(), torch.einsum("kv,bvhw->bkhw", weight.double(), whole)),
        (prepared.within(7, 9).full(), whole[:, :, :7, :9]),
        (torch.cat([tile for _, tile in prepared.stream((5, 15))], 2), whole),
    ):
        grad = torch.randn_like(expected)
        (exact,) = torch.autograd.grad(expected, values, grad, retain_graph=True)
        (ours,) = torch.autograd.grad(found, values, grad.float())
        assert close(found.detach(), expected.detach(), 5e-6) and close(ours, exact.double(), 2e-5)
    with torch.no_grad():
        assert not prepared.full().requires_grad
    assert not prepared.head(weight, argmax=True).full().requires_grad
    filled = torch.zeros(2, 3, *SIZE)
    assert not prepared.stream(5, out=filled).requires_grad and close(filled, whole.detach())


def test_a_picture_that_is_read_and_one_that_is_padded(model):
    image, features, values = given()
    rows = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    read = anyup_fast.prepare(rows, features[0], model, values=values[0])
    tensor = torch.from_numpy(rows).permute(2, 0, 1)
    whole = anyup_fast.upsample_features_with_anyup(
        tensor, features[0], weights=model, value_range=(0, 255), values=values[0]
    )
    assert whole.shape == (3, *SIZE) and close(read.full()[0], whole.double(), 1e-5)
    frame = padded(image[0, :, :10, :13], 3)
    inside = anyup_fast.upsample_features_with_anyup(frame, features[0], weights=model, values=values[0])
    assert inside.shape == (3, 10, 13)
    assert close(anyup_fast.prepare(frame, features[0], model, values=values[0]).full()[0], inside.double())
    assert close(inside, twin(model, frame.image[None], features, values)[0, :, :10, :13])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (torch.randn(1, 3, 5, 4), r"values: need \(B, V, 4, 5\)"),
        (torch.randn(3, 4, 5), r"values\[None\]"),
        (torch.ones(1, 3, 4, 5, dtype=torch.int64), "values: need a floating-point tensor .* got torch.int64"),
        ([1.0], "values: need a floating-point tensor .* got list"),
        (torch.randn(1, 0, 4, 5), r"got \(1, 0, 4, 5\)"),
        (torch.randn(4, 3, 4, 5), "the batch of 4 does not fit that of image 2 and features 1"),
        (torch.randn(1, 3, 4, 5, device="meta"), "values is on meta"),
    ],
)
def test_what_does_not_fit_is_named(model, values, words):
    image, features, _ = given(batch=2)
    for ask in (model, model.prepare):
        with pytest.raises(ValueError, match=words):
            ask(image, features[:1], values=values)


def test_heads_that_split_channels_need_a_multiple(model):
    split = tiny.model(head_mode="split").requires_grad_(False)
    image, features, _ = given(channels=8)
    values = torch.randn(1, 12, *GRID)
    mixed, picture = split(image, features, values=values, vis_attn=True)
    assert mixed.shape == (1, 12, *SIZE) and close(picture, split(image, features, vis_attn=True)[1].double())
    with pytest.raises(ValueError, match="values: head_mode 'split' needs a multiple of the 4 heads"):
        split(image, features, values=values[:, :6])


def test_verbs_name_bad_values(model):
    image, features, values = given()
    for verb in (anyup_fast.prepare, anyup_fast.upsample_features_with_anyup):
        with pytest.raises(ValueError, match="values: holds NaN"):
            verb(image, features, weights=model, values=values * torch.nan)
        with pytest.raises(ValueError, match="values: need a floating-point tensor"):
            verb(image, features, weights=model, values=values.long())
        with pytest.warns(UserWarning, match="values asked for gradients"):
            verb(image, features, weights=model, values=values.clone().requires_grad_())
    assert (
        F.mse_loss(
            anyup_fast.upsample_features_with_anyup(image, features, weights=model, values=values.double()),
            model(image, features, values=values).double(),
        )
        == 0
    )


def test_the_recipe_of_the_page(tmp_path):
    pytest.importorskip("transformers")
    page = (ROOT / "docs" / "probing.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.+?)```", page, re.S)
    for word, small in (
        ("Conv2d(384, 21", "Conv2d(32, 3"),
        ("dinov2_vits14", tiny.encoder_folder(tmp_path / "encoder")),
    ):
        assert word in code
        code = code.replace(word, small)
    mask = torch.arange(42).expand(1, 28, -1) * 3 // 42
    image = F.one_hot(mask, 3).permute(0, 3, 1, 2) * 4.0 - 2
    mask[:, 0] = 255
    names = {"pictures": [(image, mask)] * 15}
    exec(code, names)
    right = (names["labels"] == mask)[mask != 255]
    assert names["labels"].shape == (1, 28, 42) and right.float().mean() > 0.5
