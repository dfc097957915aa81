"""Heads from points, masks and prompts: what they are, what they give, and what is refused."""

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image

import anyup_fast
from anyup_fast import fitting, masks
from anyup_fast.heads import read_head
from anyup_fast.prepared import Prepared

SIZE, GRID, CHANNELS = (24, 32), (6, 8), 12


@pytest.fixture(scope="module")
def model():
    return tiny.model().requires_grad_(False)


def scene(seed, classes=3):
    """Image, features and mask of vertical stripes, each of its own colour and its own direction among the features."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(classes, CHANNELS, generator=torch.Generator().manual_seed(99)) + 1
    cells = torch.arange(GRID[1]) * classes // GRID[1]
    features = directions[cells].T[:, None].expand(-1, GRID[0], -1).clone()
    features += 0.2 * torch.randn(features.shape, generator=generator)
    mask = cells.repeat_interleave(SIZE[1] // GRID[1]).expand(SIZE).clone()
    image = mask[None].float().expand(3, -1, -1) / classes + 0.05 * torch.randn(3, *SIZE, generator=generator)
    return image, features, mask


def prepared(model, seed, classes=3):
    image, features, mask = scene(seed, classes)
    return anyup_fast.prepare(image, features, model), mask


def test_a_prototype_is_the_mean_direction_of_its_points(model):
    one, mask = prepared(model, 0)
    points = [(3, 2, 0), (20, 5, 0), (4, 16, 1), (9, 28, 2), (22, 30, 2)]
    head = anyup_fast.fit_head(one, points, classes=["a", "b", "c"], encoder="some")
    whole = one.full()[0].double()
    for label in range(3):
        unit = [F.normalize(whole[:, row, column], dim=0) for row, column, c in points if c == label]
        expected = F.normalize(torch.stack(unit).mean(0), dim=0)
        assert torch.allclose(head.weight[label].double(), expected, atol=1e-5)
    assert (head.bias, head.classes, head.encoder, head.kind) == (None, ("a", "b", "c"), "some", "prototype")
    labels = one.head(head, argmax=True).full()[0]
    cosines = F.cosine_similarity(head.weight.double()[:, :, None, None], whole[None], dim=1)
    assert (labels == cosines.argmax(0)).float().mean() > 0.995
    assert (labels == mask).float().mean() > 0.8
    array = anyup_fast.fit_head(one, np.array(points))
    assert torch.equal(array.weight, head.weight) and array.classes is None


@pytest.mark.parametrize("kind", ["prototype", "linear"])
@pytest.mark.parametrize("classes", [2, 3])
def test_a_head_of_several_pictures_labels_another(model, kind, classes, tmp_path):
    if kind == "linear":
        pytest.importorskip("sklearn")
    pictures, truths = zip(*(prepared(model, seed, classes) for seed in (1, 2)), strict=True)
    head = anyup_fast.fit_head(pictures, truths, kind, samples=60)
    other, mask = prepared(model, 3, classes)
    labels = other.head(head, argmax=True).full()[0]
    assert (labels == mask).float().mean() > 0.85 and head.weight.shape == (classes, CHANNELS)
    head.save(tmp_path / "head.safetensors")
    again = read_head(tmp_path / "head.safetensors")
    assert torch.equal(other.head(again, argmax=True).full()[0], labels) and again.kind == kind
    assert torch.equal(anyup_fast.fit_head(pictures, truths, kind, samples=60).weight, head.weight)
    assert not torch.equal(anyup_fast.fit_head(pictures, truths, kind, samples=60, seed=1).weight, head.weight)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_linear_head_is_that_of_the_library(model, classes):
    linear = pytest.importorskip("sklearn.linear_model")
    one, mask = prepared(model, 0, classes)
    head = anyup_fast.fit_head(one, mask, "linear", samples=10**6)
    samples = one.full()[0].flatten(1).T.numpy()
    mean, spread = samples.mean(0), samples.std(0)
    fitted = linear.LogisticRegression(max_iter=1000).fit((samples - mean) / spread, mask.flatten())
    probabilities = (torch.from_numpy(samples) @ head.weight.T + head.bias).softmax(1).numpy()
    expected = fitted.predict_proba((samples - mean) / spread)
    assert np.abs(probabilities - expected).max() < 2e-2 and expected.min() < 0.01


def test_features_at_full_resolution_are_never_made(model, monkeypatch):
    def refuse(*_):
        raise AssertionError("more than points was asked for")

    for name in ("full", "region", "stream"):
        monkeypatch.setattr(Prepared, name, refuse)
    asked = []
    at = Prepared.at
    monkeypatch.setattr(Prepared, "at", lambda self, points, **o: asked.append(len(points)) or at(self, points, **o))
    one, mask = prepared(model, 0)
    anyup_fast.fit_head([one, one], [mask, mask], samples=7)
    assert asked == [21, 21]


def test_pairs_generators_and_files(model, tmp_path):
    scenes = [scene(seed) for seed in (4, 5)]
    expected = anyup_fast.fit_head(
        [anyup_fast.prepare(image, features, model) for image, features, _ in scenes], [m for *_, m in scenes]
    )
    paths = []
    for number, (*_, mask) in enumerate(scenes):
        picture = Image.fromarray(mask.numpy().astype(np.uint8), "P")
        picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
        paths.append(tmp_path / f"{number}.png")
        picture.save(paths[-1])
    pairs = ((image, features) for image, features, _ in scenes)
    found = anyup_fast.fit_head(pairs, iter(paths), weights=model)
    assert torch.equal(found.weight, expected.weight)
    single = anyup_fast.fit_head((scenes[0][0], scenes[0][1]), str(paths[0]), weights=model)
    assert single.weight.shape == expected.weight.shape and not torch.equal(single.weight, expected.weight)


def test_what_is_ignored_counts_for_nothing(model):
    one, mask = prepared(model, 0)
    scribbles = torch.full_like(mask, 255)
    scribbles[5:7] = mask[5:7]
    head = anyup_fast.fit_head(one, scribbles, samples=10**6)
    points = [(r, c, int(mask[r, c])) for r in (5, 6) for c in range(SIZE[1])]
    assert torch.allclose(head.weight, anyup_fast.fit_head(one, points).weight, atol=1e-6)
    minus = torch.where(scribbles == 255, -1, scribbles)
    assert torch.equal(anyup_fast.fit_head(one, minus, ignore=-1, samples=10**6).weight, head.weight)


def test_a_mask_of_twice_the_size_lies_on_the_same_pixels(model):
    one, mask = prepared(model, 0)
    large = mask.repeat_interleave(2, 0).repeat_interleave(2, 1)
    found, expected = (anyup_fast.fit_head(one, m, samples=10**6).weight for m in (large, mask))
    assert torch.allclose(found, expected, atol=1e-6)
    with pytest.raises(ValueError, match="48x32 pixels do not lie on a picture of 24x32"):
        anyup_fast.fit_head(one, mask.repeat_interleave(2, 0))


@pytest.mark.parametrize("kind", ["prototype", "linear"])
def test_a_class_that_nothing_shows_is_named_and_never_found(model, kind, caplog):
    if kind == "linear":
        pytest.importorskip("sklearn")
    one, mask = prepared(model, 0, classes=2)
    head = anyup_fast.fit_head(one, torch.where(mask == 1, 3, mask), kind, classes=["a", "b", "c", "d", "e"])
    assert "nothing shows the classes 1 (b), 2 (c), 4 (e)" in caplog.text
    assert head.weight.shape == (5, CHANNELS) and not head.weight[[1, 2, 4]].any()
    assert one.head(head, argmax=True).full().unique().tolist() == [0, 3]
    assert one.head((-head.weight, head.bias), argmax=True).full().unique().tolist() == [0, 3]


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ([(1, 2, 0), (3, 4, 0)], {}, "two classes at least, there is only class 0"),
        ([], {}, "there is no class; 255 counts for nothing"),
        ([(1, 2, 0), (24, 4, 1)], {}, r"\[24, 4\] .* lies outside"),
        ([(1, 2, 0), (3, 4, -1)], {}, r"it holds \[-1\]"),
        ([(1, 2, 0), (3, 4, 2)], {"classes": ["a", "b"]}, r"from 0 to 1; it holds \[2\]"),
        ([(1.5, 2, 0), (3, 4, 1)], {}, "points are whole numbers"),
        (torch.zeros(SIZE), {}, "mask: need whole numbers"),
        (torch.zeros(SIZE, dtype=torch.uint8), {}, "only class 0"),
        (torch.full(SIZE, -7), {}, r"it holds \[-7\]"),
        ("no/such.png", {}, "no file"),
        ([(1, 2, 0)], {"kind": "svm"}, "kind: need 'prototype' or 'linear'"),
        ([(1, 2, 0)], {"samples": 0}, "samples: need a positive number"),
        ([(1, 2, 0)], {"classes": ["a", "a"]}, "a different name for each"),
        ([(1, 2, 0)], {"C": 0}, "C: need a positive number"),
    ],
)
def test_what_does_not_fit_is_refused(model, target, options, words):
    one, _ = prepared(model, 0)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        anyup_fast.fit_head(one, target, **options)


def test_several_inputs_that_do_not_fit_are_told_by_number(model):
    one, mask = prepared(model, 0)
    with pytest.raises(ValueError, match="number 1 of the inputs: mask: classes are numbers from 0 up"):
        anyup_fast.fit_head([one, one], [mask, mask - 5])
    with pytest.raises(ValueError, match="there are more inputs than the 1 targets"):
        anyup_fast.fit_head([one, one], [mask])
    with pytest.raises(ValueError, match="inputs: need what prepare gives, or a pair"):
        anyup_fast.fit_head([one, "photo.jpg"], [mask, mask])
    with pytest.raises(ValueError, match="inputs: need one picture's, or a list of several, got str"):
        anyup_fast.fit_head("photo.jpg", mask)
    with pytest.raises(ValueError, match="answers with labels"):
        anyup_fast.fit_head(one.head(torch.randn(3, CHANNELS), argmax=True), mask)
    image, features, _ = scene(1)
    with pytest.raises(ValueError, match="a batch of 2"):
        anyup_fast.fit_head(model.prepare(image.expand(2, -1, -1, -1), features.expand(2, -1, -1, -1)), mask)
    with pytest.raises(ValueError, match="5 channels, the ones before have 12"):
        anyup_fast.fit_head([one, (image, features[:5])], [mask, mask], weights=model)


def test_without_the_library_it_says_so_before_any_work(model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.linear_model", None)
    with pytest.raises(RuntimeError, match="pip install 'anyup-fast.fit.'"):
        fitting.Fit("linear")


@pytest.mark.parametrize("mode", ["P", "L", "1", "I;16"])
def test_masks_are_read_as_they_are_stored(tmp_path, mode):
    values = np.array([[0, 1, 1], [1, 0, 0]], np.uint8)
    if mode == "I;16":
        values = values.astype(np.uint16) * 300
    picture = Image.fromarray(values.astype(bool) if mode == "1" else values)
    if mode == "P":
        picture = Image.fromarray(values, "P")
        picture.putpalette([9, 9, 9, 200, 0, 0])
    picture.save(tmp_path / "mask.png")
    assert np.array_equal(masks.read_mask(tmp_path / "mask.png"), values)


def test_what_is_no_mask_is_named(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "colours.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    with pytest.raises(ValueError, match="colours.png has the mode RGB, a mask has one whole number a pixel"):
        masks.read_mask(tmp_path / "colours.png")
    with pytest.raises(ValueError, match="broken.png cannot be read"):
        masks.read_mask(tmp_path / "broken.png")


def test_agreement_is_counted():
    mask, labels = np.array([[0, 0, 1], [1, 255, 2]]), torch.tensor([[0, 1, 1], [1, 0, 1]])
    counts = masks.confusion(labels, mask, 4)
    assert counts.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    found = masks.ious(counts)
    assert found[:3].tolist() == [0.5, 0.5, 0.0] and np.isnan(found[3])


@pytest.mark.parametrize(
    ("name", "text", "names"),
    [
        ("a.txt", "\ufeffsky\n\n tree \r\n", ("sky", "tree")),
        ("a.json", '["sky", "tree"]', ("sky", "tree")),
        ("a.json", '{"1": "tree", "0": "sky"}', ("sky", "tree")),
        ("a.json", '{"1": "tree", "2": "sky"}', "indices must be 0 to 1"),
        ("a.json", '{"a": "tree"}', "no names of classes"),
        ("a.json", '"sky"', "need a list"),
        ("a.json", '["sky", 1]', "a different name"),
        ("a.txt", "sky\nsky", "a different name"),
        ("a.txt", "", "need a list"),
        ("a.json", "{", "no names of classes"),
    ],
)
def test_names_of_classes_are_read(tmp_path, name, text, names):
    (tmp_path / name).write_text(text, encoding="utf-8")
    if isinstance(names, tuple):
        assert masks.read_classes(tmp_path / name) == names
    else:
        with pytest.raises(ValueError, match=f"{name} holds no names of classes.*{names}|{names}"):
            masks.read_classes(tmp_path / name)
