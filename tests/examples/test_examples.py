"""The examples do what their pictures show: on small pictures here, at their own sizes where the run is slow."""

import ast
import re

import numpy as np
import pytest
from PIL import Image
from tree import ROOT

SCRIPTS = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
PUBLIC = {"anyup_fast", "anyup_fast.encoders", "anyup_fast.visualize", "anyup_fast.batch.video"}


@pytest.fixture(scope="module")
def composite(dinov2, tmp_path_factory):
    """A cat in an ellipse on gravel: the file, (row, column) of a pixel of either, and where the cat is."""
    from skimage import data

    side = 224
    cat, gravel = (Image.fromarray(x).convert("RGB") for x in (data.chelsea()[:, 75:375], data.gravel()))
    rows, cols = np.ogrid[:side, :side]
    mask = ((rows - 105) / 75) ** 2 + ((cols - 120) / 60) ** 2 <= 1
    picture = np.where(mask[..., None], *(np.asarray(x.resize((side, side))) for x in (cat, gravel)))
    path = tmp_path_factory.mktemp("composite") / "composite.png"
    Image.fromarray(picture).save(path)
    return path, ("105", "120"), ("200", "30"), mask


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def enlarged(low, side):
    return np.kron(low, np.ones((side // len(low), side // len(low)), low.dtype))


def is_picture(path):
    with Image.open(path) as picture:
        picture.load()
        assert picture.width >= 1000 and len(np.unique(np.asarray(picture.convert("L")))) > 100


def test_similarity_keeps_to_the_object(example, composite):
    path, inside, _, mask = composite
    ((_, low, high),) = example("similarity").main([str(path), "--at", *inside, "--size", "224"])
    is_picture("similarity.jpg")
    apart = (high[mask].mean() + high[~mask].mean()) / 2
    assert iou(high > apart, mask) > max(0.9, iou(enlarged(low, 224) > apart, mask))


def test_few_clicks_segment_better_than_low_res_ones(example, composite):
    path, inside, outside, mask = composite
    clicks = ["--click", "cat", *inside, "--click", "gravel", *outside]
    labels, low, head = example("few_clicks").main([str(path), *clicks, "--size", "224"])
    is_picture("few_clicks.jpg")
    assert head.classes == ("cat", "gravel") and labels.shape == mask.shape
    assert iou(labels == 0, mask) > max(0.9, iou(enlarged(low, 224) == 0, mask))


def test_upsampled_correspondences_are_nearer_to_the_truth(example):
    errors = example("correspondence").main(["--size", "140", "--points", "80"])
    is_picture("correspondence.jpg")
    nearest, bilinear, upsampled = (np.median(error) for error in errors.values())
    assert upsampled < bilinear / 2 < nearest / 2


def test_a_folder_is_labelled_by_the_clicks_in_another_picture(example):
    archive = example("label_folder").main(["--size", "140"])
    is_picture("label_folder.jpg")
    assert sorted(archive) == ["crop.png", "dark.png", "mirrored.png", "right.png"]
    assert archive.classes("dark.png") == ("seat and handlebars", "bodywork", "engine and wheels", "floor", "behind")
    right, mirrored, dark = (archive[f"{name}.png"].full().numpy() for name in ("right", "mirrored", "dark"))
    assert len(np.unique(right)) == 5
    assert (right == mirrored[:, ::-1]).mean() > 0.85 and (right == dark).mean() > 0.8


def test_a_folder_without_a_head_is_told(example, composite):
    with pytest.raises(FileNotFoundError, match="head.safetensors"):
        example("label_folder").main([str(composite[0].parent)])


def test_film(example):
    av = pytest.importorskip("av")
    example("film").main(["--frames", "4", "--size", "168"])
    is_picture("film.jpg")
    with av.open("film.mp4") as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert [frame.shape for frame in frames] == [(168, 168, 3)] * 4
    # What the camera has moved away from by (down, right) keeps its colour.
    down, right = (round((length - 378) / 3 * 168 / 378) for length in (500, 741))
    for one, next_one in zip(frames, frames[1:], strict=False):
        one, next_one = one.astype(float), next_one.astype(float)
        moved = np.abs(one[down:, right:] - next_one[:-down, :-right]).mean()
        assert moved < 0.6 * np.abs(one - next_one).mean()


@pytest.mark.parametrize("name", SCRIPTS)
def test_examples_are_short_and_use_what_is_public(name):
    text = (ROOT / "examples" / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) < 70
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    modules = {node.module for node in nodes if node.module.partition(".")[0] == "anyup_fast"}
    assert modules <= PUBLIC, modules
    assert not [alias.name for node in nodes for alias in node.names if alias.name.startswith("_")]


def test_readme_shows_every_example_with_its_picture():
    page = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert {name for name in re.findall(r"\]\((\w+\.(?:py|ipynb))\)", page)} == {*SCRIPTS, "walk.ipynb"}
    for picture in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page):
        assert (ROOT / "examples" / picture).stat().st_size < 250_000
    assert len(re.findall(r"!\[", page)) >= len(SCRIPTS)


@pytest.mark.slow("two minutes: every example as it stands")
@pytest.mark.parametrize("name", SCRIPTS)
def test_examples_run_without_arguments(example, name):
    example(name.removesuffix(".py")).main([])
    is_picture(f"{name.removesuffix('.py')}.jpg")
