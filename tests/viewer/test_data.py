"""What a page holds, against what the package computes; and what is refused before anything is computed."""

import html
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
import viewed
from PIL import Image

import anyup_fast
from anyup_fast import load_image, prepare, view, wrap_encoder
from anyup_fast.heads import Head, save_head
from anyup_fast.viewer import SCRIPTS, planes
from anyup_fast.viewer.budget import estimated
from anyup_fast.viewer.directions import directions
from anyup_fast.viewer.page import FILES

CHANNELS = 12


class Cells(torch.nn.Module):
    """Features of 7x7 pixels: their mean colours through a fixed matrix, and how often it was asked."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.mix = torch.randn(CHANNELS, 12, generator=torch.Generator().manual_seed(0))

    def forward(self, x):
        self.calls += 1
        colours = F.avg_pool2d(x, 7)
        return torch.einsum("oc,bchw->bohw", self.mix, torch.cat([colours, colours**2, colours.sin(), colours**3], 1))


@pytest.fixture
def cells():
    return Cells().eval()


@pytest.fixture
def encoder(cells):
    return wrap_encoder(cells, patch_size=7, name="cells")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    return [
        str(tiny.photograph(folder / "one.png", (42, 56))),
        str(tiny.photograph(folder / "two.png", (70, 49), seed=1)),
    ]


@pytest.fixture(scope="module")
def model():
    return tiny.model()


def stored(page):
    return viewed.data(page.html)


def basis_of(data):
    return viewed.floats(data["basis"], data["directions"], data["channels"])


def test_planes_are_the_features_along_the_directions(photos, encoder, model):
    page = view(photos, encoder=encoder, weights=model, size=None)
    data = stored(page)
    basis = basis_of(data)
    assert (data["format"], data["directions"], data["channels"]) == (1, CHANNELS, CHANNELS)
    assert (data["encoder"], data["version"]) == ("cells", anyup_fast.__version__)
    torch.testing.assert_close(basis @ basis.T, torch.eye(CHANNELS), rtol=0, atol=1e-5)
    assert [(p["name"], p["height"], p["width"], p["grid"], p["patch"]) for p in data["pictures"]] == [
        ("one.png", 42, 56, [6, 8], [7, 7]),
        ("two.png", 70, 49, [10, 7], [7, 7]),
    ]
    for photo, picture in zip(photos, data["pictures"], strict=True):
        image = load_image(photo)
        features = anyup_fast.extract_features(image, encoder)
        high = prepare(image, features, model).head(basis).full()[0]
        low = torch.einsum("kc,chw->khw", basis, features)
        for name, expected in (("high", high), ("low", low)):
            got = viewed.coordinates(picture[name], CHANNELS, *expected.shape[1:])
            step = torch.tensor(picture[name]["scale"])[:, None, None]
            assert ((got - expected).abs() <= 0.501 * step + 1e-4).all()
        assert low.std() > 10 * step.max(), "the features hardly vary: nothing is shown"
        shown = viewed.picture(picture["photo"])
        assert (shown.format, shown.size) == ("JPEG", (picture["width"], picture["height"]))


def test_colours_are_those_of_the_low_res_features(photos, encoder, model):
    data = stored(view(photos, encoder=encoder, weights=model, size=None))
    count = data["directions"]
    low = torch.cat([viewed.coordinates(p["low"], count, *p["grid"]).flatten(1) for p in data["pictures"]], 1)
    pca, mean = data["views"]
    assert (pca["name"], mean["name"]) == ("PCA", "mean")
    for shown, rows in ((pca, 3), (mean, 1)):
        painted = viewed.floats(shown["weight"], rows, count) @ low + torch.tensor(shown["bias"])[:, None]
        assert painted.quantile(0.01) > -0.2 and painted.quantile(0.99) < 1.2 and painted.std() > 0.1
    channel_mean = (basis_of(data).T @ low).mean(0)
    expected = (channel_mean - channel_mean.min()) / (channel_mean.max() - channel_mean.min())
    torch.testing.assert_close(painted[0], expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("fit", ["stretch", "pad"])
def test_the_attention_of_the_lattice_is_that_of_its_pixels(photos, encoder, model, fit):
    size = (45, 59) if fit == "pad" else (49, 63)
    data = stored(view(photos[0], encoder=encoder, weights=model, size=size, fit=fit, attention_step=10))
    (picture,) = data["pictures"]
    assert (picture["height"], picture["width"], picture["grid"], picture["patch"]) == (*size, [7, 9], [7, 7])
    image = load_image(photos[0], size, 7, fit=fit)
    prepared = prepare(image, anyup_fast.extract_features(image, encoder), model)
    got = picture["attention"]
    (tall, wide), levels = got["window"], torch.from_numpy(np.array(viewed.picture(got["image"])))
    assert (got["step"], len(got["rows"]), len(got["columns"])) == (10, *(-(-(n - 5) // 10) for n in size))
    blocks = levels.view(len(got["rows"]), tall, len(got["columns"]), wide) * got["scale"][0]
    for i, top in enumerate(got["rows"]):
        for j, left in enumerate(got["columns"]):
            there = F.pad(prepared.attention(5 + 10 * i, 5 + 10 * j)[0], (0, wide, 0, tall))
            expected = there[top : top + tall, left : left + wide]
            assert abs(expected.sum().item() - 1) < 1e-5, "the window misses a cell"
            torch.testing.assert_close(blocks[i, :, j], expected, rtol=0, atol=0.51 * got["scale"][0] + 1e-6)


def test_no_attention_where_none_is_asked_for(photos, encoder, model):
    (picture,) = stored(view(photos[0], encoder=encoder, weights=model, size=42, attention_step=None))["pictures"]
    assert picture["attention"] is None


def test_a_padded_picture_is_shown_without_its_padding(photos, encoder, model):
    data = stored(view(photos[0], encoder=encoder, weights=model, size=(45, 59), fit="pad"))
    (picture,) = data["pictures"]
    image = load_image(photos[0], (45, 59), 7, fit="pad")
    features = anyup_fast.extract_features(image, encoder)
    expected = prepare(image, features, model).head(basis_of(data)).full()[0]
    got = viewed.coordinates(picture["high"], data["directions"], 45, 59)
    assert (got - expected).abs().max() <= 0.501 * max(picture["high"]["scale"]) + 1e-4
    assert viewed.picture(picture["photo"]).size == (59, 45)


def test_what_is_prepared_is_shown_as_it_is(photos, encoder, model):
    image = load_image(photos[0], 42, 7)
    prepared = prepare(image, anyup_fast.extract_features(image, encoder), model)
    given = stored(view(prepared, names="one.png"))["pictures"]
    made = stored(view(photos[0], encoder=encoder, weights=model, size=42))["pictures"]
    assert given == made


@pytest.mark.parametrize("channels", [5, 60])
def test_directions_keep_the_cosines(channels):
    """Both ways to the singular vectors: fewer channels than cells, and more."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 36, generator=generator)
    maps = torch.randn(channels, 3, generator=generator) @ hidden + 2
    basis = directions([maps.view(channels, 6, 6), maps.view(channels, 4, 9)], 32)
    assert len(basis) == 4, "three directions and the mean: no more are there"
    torch.testing.assert_close(basis @ basis.T, torch.eye(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(basis.T @ (basis @ maps), maps, rtol=0, atol=1e-4)


def test_directions_span_what_is_fixed():
    generator = torch.Generator().manual_seed(0)
    maps, fixed = torch.randn(20, 6, 6, generator=generator), torch.randn(3, 20, generator=generator)
    fixed = torch.cat([fixed, fixed[:1]])  # the same text twice is one direction
    basis = directions([maps], 8, fixed)
    assert basis.shape == (8, 20)
    torch.testing.assert_close(fixed @ basis.T @ basis, fixed, rtol=0, atol=1e-5)
    torch.testing.assert_close(basis @ basis.T, torch.eye(8), rtol=0, atol=1e-5)
    without = directions([maps], 5)
    tokens = F.normalize(maps.flatten(1), dim=0)
    assert (basis @ tokens).square().sum() > 0.75 * (directions([maps], 8) @ tokens).square().sum()
    assert (without @ tokens).square().sum() < (directions([maps], 8) @ tokens).square().sum()


@pytest.mark.parametrize(("count", "height", "columns"), [(32, 448, 1), (32, 513, 2), (32, 2048, 4), (3, 16384, 3)])
def test_planes_stay_within_a_canvas(count, height, columns):
    assert planes.plane_columns(count, height, 7) == columns
    assert -(-count // columns) * height <= planes.CANVAS


def test_planes_in_columns_are_where_they_are_looked_for(monkeypatch):
    monkeypatch.setattr(planes, "CANVAS", 40)
    coordinates = torch.randn(7, 15, 6)
    levels = planes.Levels(coordinates)
    got = levels.stored(coordinates)
    assert got["columns"] == 4
    assert (viewed.coordinates(got, 7, 15, 6) - coordinates).abs().max() <= 0.501 * levels.scale.max()


def test_features_that_do_not_vary_are_grey(photos, model):
    encoder = wrap_encoder(lambda x: torch.ones(len(x), 1, x.shape[2] // 7, x.shape[3] // 7), patch_size=7)
    data = stored(view(photos[0], encoder=encoder, weights=model, size=42))
    assert data["directions"] == 1
    assert [view["bias"] for view in data["views"]] == [[0.5, 0.5, 0.5], [0.5]]


# Prompts and classes


def test_prompts_and_classes_are_seen_exactly(photos, encoder, model):
    texts = F.normalize(torch.randn(2, CHANNELS, generator=torch.Generator().manual_seed(3)), dim=1)
    encoder.similarity = lambda prompts: texts
    head = F.normalize(torch.randn(3, CHANNELS, generator=torch.Generator().manual_seed(4)), dim=1)
    prompts = ["a cat", "<b>dogs</b>"]
    data = stored(view(photos, encoder=encoder, weights=model, size=42, prompts=prompts, head=head, directions=6))
    basis = basis_of(data)
    assert [one["name"] for one in data["prompts"]] == prompts
    assert [one["name"] for one in data["classes"]] == ["class 1", "class 2", "class 3"]
    seen = torch.stack([viewed.floats(one["weight"], 6) for one in data["prompts"] + data["classes"]])
    torch.testing.assert_close(seen @ basis, torch.cat([texts, head]), rtol=0, atol=1e-5)


def test_prompts_need_texts(photos, encoder, model):
    with pytest.raises(ValueError, match=r"^prompts: cells gives features .* load_encoder\(name, project=True\)"):
        view(photos, encoder=encoder, weights=model, size=42, prompts="a cat")
    with pytest.raises(ValueError, match="^prompts: efficientnet_lite0 was trained without texts; CLIP and SigLIP"):
        view(photos, encoder="efficientnet_lite0", prompts=["a cat"])
    image = load_image(photos[0], 42, 7)
    prepared = prepare(image, anyup_fast.extract_features(image, encoder), model)
    with pytest.raises(ValueError, match="^prompts: what is prepared already has no encoder"):
        view(prepared, prompts=["a cat"])


@pytest.mark.parametrize(
    ("head", "complaint"),
    [
        (torch.eye(3, CHANNELS + 1), "13 channels, the features 12: it was made with another encoder"),
        ((torch.eye(3, CHANNELS), torch.ones(3)), "has a bias"),
        (torch.eye(10, CHANNELS), "has 10 classes; the page shows 9 at most"),
        (torch.eye(CHANNELS)[:3] * torch.tensor([[1.0], [2], [3]]), "rows of 1 to 3 in length"),
        (torch.zeros(3, CHANNELS), "rows of 0 to 0 in length"),
    ],
)
def test_heads_that_do_not_fit_are_refused(photos, encoder, model, head, complaint):
    with pytest.raises(ValueError, match=f"^head: it .*{complaint}|^head: it {complaint}"):
        view(photos[0], encoder=encoder, weights=model, size=42, head=head)


def test_a_head_file_brings_its_names_and_is_told_to_be_another_encoders(photos, encoder, model, tmp_path, caplog):
    weight = F.normalize(torch.randn(2, CHANNELS, generator=torch.Generator().manual_seed(4)), dim=1)
    save_head(tmp_path / "head.safetensors", weight, None, ["sky", "<i>sea</i>"], "cells", "prototype")
    data = stored(view(photos[0], encoder=encoder, weights=model, size=42, head=tmp_path / "head.safetensors"))
    assert [one["name"] for one in data["classes"]] == ["sky", "<i>sea</i>"] and not caplog.records
    other = Head(weight, None, ("sky", "sea"), "dinov2_vits14")
    view(photos[0], encoder=encoder, weights=model, size=42, head=other)
    assert "made for features of the encoder 'dinov2_vits14' and is applied to those of 'cells'" in caplog.text


# Bad input


def test_pictures_that_make_too_large_a_page_are_told_before_anything_is_computed(photos, encoder, cells, model):
    one, asked = estimated(42, 56, CHANNELS), cells.calls
    with pytest.raises(ValueError) as error:
        view([photos[0]] * 50, encoder=encoder, weights=model, size=None, max_bytes=int(20.5 * one))
    said = str(error.value)
    assert "50 of 42x56 pixels with 12 directions make a page of some" in said and cells.calls == asked
    assert "20 of the 50 pictures would do" in said
    side, enough = (int(re.search(rf"{word}(\d+)", said)[1]) for word in ("size=", "max_bytes of "))
    height, width = (n * side / 42 for n in (42, 56))
    assert 50 * estimated(height, width, CHANNELS) <= 20.5 * one and enough >= 50 * one
    kept = wrap_encoder(cells, patch_size=7, name="cells")
    page = view([photos[0]] * 3, encoder=kept, weights=model, size=None, max_bytes=10**6)
    assert len(page.names) == 3 and page.size < 10**6


def test_a_page_that_grows_beyond_what_was_estimated_is_refused(photos, encoder, model):
    page = view(photos, encoder=encoder, weights=model, size=42)
    with pytest.raises(ValueError, match=r"^pictures: 2 of \d+x\d+ pixels .* max_bytes is 0.1\d+ MB; .* would do, or"):
        view(photos, encoder=encoder, weights=model, size=42, max_bytes=page.size - 1)


def test_pictures_larger_than_a_canvas_are_told_with_a_size_that_would_do(encoder, cells, model):
    picture, asked = Image.new("L", (17000, 70)), cells.calls
    with pytest.raises(ValueError, match=r"^pictures: picture 1 has 70x17003 pixels, .* size=\d+ would do$") as error:
        view(picture, encoder=encoder, weights=model, size=None)
    side = int(re.search(r"size=(\d+)", str(error.value))[1])
    assert cells.calls == asked and planes.plane_columns(CHANNELS, side, 17000 * side // 70) is not None


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"pictures": []}, "pictures: need at least one"),
        ({"directions": 33}, "directions: need a whole number from 1 to 32, got 33"),
        ({"directions": 2.5}, "directions: need a whole number from 1 to 32, got 2.5"),
        ({"attention_step": 0}, "attention_step: need a whole number from 1 on, got 0"),
        ({"attention_step": 43}, "attention_step: need at most 42 for a picture of 42x56, got 43"),
        ({"names": ["a", "b"]}, "names: need a string for each of the 1 pictures"),
        ({"head": torch.eye(4, CHANNELS), "directions": 3}, "directions: 3 can't hold 0 prompts and 4 classes"),
    ],
)
def test_bad_options_are_refused(photos, encoder, model, options, complaint):
    with pytest.raises(ValueError) as error:
        view(**{"pictures": photos[0], "encoder": encoder, "weights": model, "size": None, **options})
    assert str(error.value).startswith(complaint)


def test_pictures_of_several_encoders_are_refused(photos, encoder, model):
    image = load_image(photos[0], 42, 7)
    prepared = prepare(image, torch.randn(5, 6, 8), model)
    with pytest.raises(ValueError, match=r"^pictures: two.png has 12 channels, picture 1 5; one page takes"):
        view([prepared, photos[1]], encoder=encoder, weights=model, names=["picture 1", "two.png"])
    with pytest.raises(ValueError, match="what is prepared has to be one image .* got a batch of 2"):
        view(prepare(image[None].repeat(2, 1, 1, 1), torch.randn(2, 5, 6, 8), model))


def test_features_of_nothing_are_refused(photos, model):
    encoder = wrap_encoder(lambda x: torch.zeros(len(x), 3, x.shape[2] // 7, x.shape[3] // 7), patch_size=7)
    with pytest.raises(ValueError, match="^pictures: their features are zero everywhere"):
        view(photos[0], encoder=encoder, weights=model, size=42)


# The page as a file and in a notebook


class Elements(HTMLParser):
    """Start tags with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def names(self):
        return [tag for tag, _ in self.found]


EVIL = "</script><img src=x onerror=alert(1)>&amp;<!-- data -->\udce9.png"


def test_names_are_text_never_markup(photos, encoder, model):
    plain = view(photos[0], encoder=encoder, weights=model, size=42, title="x", names="a")
    page = view(photos[0], encoder=encoder, weights=model, size=42, names=EVIL)
    assert Elements(page.html).names() == Elements(plain.html).names()
    name = stored(page)["pictures"][0]["name"]
    assert name == EVIL.replace("\udce9", "?")
    assert html.escape(f"Features of {name}") in page.html
    assert "img" not in Elements(page._repr_html_()).names()


def test_a_notebook_shows_the_page_in_a_frame_of_its_own(photos, encoder, model):
    page = view(photos[0], encoder=encoder, weights=model, size=42)
    ((tag, attributes),) = Elements(page._repr_html_()).found
    assert tag == "iframe" and attributes["srcdoc"] == page.html and attributes["title"] == "Features of one.png"
    assert attributes["sandbox"].split() == ["allow-scripts", "allow-downloads"]


def test_the_file_is_the_page(photos, encoder, model, tmp_path):
    page = view(photos, encoder=encoder, weights=model, size=42)
    path = tmp_path / "new" / "page.html"
    assert page.write(str(path)) == path and path.read_text(encoding="utf-8") == page.html
    assert path.stat().st_size == page.size and "2 pictures" in repr(page)
    with pytest.raises(OSError):
        page.write(tmp_path / "new")
    assert [one.name for one in tmp_path.rglob("*")] == ["new", "page.html"]


def test_nothing_in_the_page_comes_from_elsewhere(photos, encoder, model):
    page = view(photos[0], encoder=encoder, weights=model, size=42)
    for tag, attributes in Elements(page.html).found:
        assert tag not in ("link", "base", "iframe", "object", "embed"), tag
        for name in ("src", "href", "action", "srcset", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    policy = [a["content"] for tag, a in Elements(page.html).found if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policy) == 1 and "default-src 'none'" in policy[0] and "http" not in policy[0]


def test_scripts_stay_within_their_elements():
    assert len(SCRIPTS) == len(set(SCRIPTS)) > 0
    assert sorted(SCRIPTS) == sorted(path.name for path in FILES.glob("*.js"))
    for name in SCRIPTS:
        text = (FILES / name).read_text(encoding="utf-8")
        assert "</script" not in text.lower() and "<!--" not in text, name
    assert "</style" not in (FILES / "style.css").read_text(encoding="utf-8").lower()
