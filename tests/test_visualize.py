import io
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from anyup_fast import visualize
from anyup_fast.image import normalize
from anyup_fast.visualize import channel_mean, joint_pca, similarity, visualize_feature_comparison


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def smooth(channels=8, low=(4, 6), high=(16, 24), seed=0):
    """Low-res features and the same, bilinear, at high resolution."""
    lr = random(1, channels, *low, seed=seed)
    return lr[0], F.interpolate(lr, high, mode="bilinear")[0]


def photo(height=16, width=24):
    return normalize(torch.rand(3, height, width, generator=torch.Generator().manual_seed(3)))


def panels(figure):
    """(left, top, right, bottom) of every panel, in pixels of the written picture."""
    width, height = figure.canvas.get_width_height()
    boxes = [axes.get_position() for axes in figure.axes]
    found = [(b.x0 * width, (1 - b.y1) * height, b.x1 * width, (1 - b.y0) * height) for b in boxes]
    assert np.allclose(found, np.round(found), atol=1e-6), "panels must lie on whole pixels"
    return np.round(found).astype(int)


# Channel mean


def test_channel_mean_is_scaled_over_both_maps():
    lr, hr = smooth()
    got = channel_mean(lr, hr)
    means = lr.mean(0).numpy(), hr.mean(0).numpy()
    low, high = min(m.min() for m in means), max(m.max() for m in means)
    for values, mean in zip(got, means, strict=True):
        assert values.dtype == np.float32 and values.shape == mean.shape
        np.testing.assert_allclose(values, (mean - low) / (high - low), atol=1e-6)

    wider = hr.clone()
    wider[:, 0, 0] = 10
    assert channel_mean(lr, wider)[0].max() < 0.5 < got[0].max()


def test_channel_mean_of_a_large_map_equals_that_of_its_parts(monkeypatch):
    lr, hr = smooth(channels=5, high=(37, 11))
    whole = channel_mean(lr, hr)
    monkeypatch.setattr(visualize, "_PART", 5 * 11 * 4)
    for a, b in zip(whole, channel_mean(lr, hr), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


# Joint PCA


@pytest.mark.parametrize("channels", [3, 8, 40])
def test_pca_equals_numpy_svd(channels):
    lr, hr = random(channels, 5, 7, dtype=torch.float64), random(channels, 9, 6, seed=1, dtype=torch.float64)
    lr, hr = (x * torch.linspace(3, 0.5, channels, dtype=torch.float64)[:, None, None] + 2 for x in (lr, hr))
    got = joint_pca(lr, hr)

    tokens = [x.flatten(1).T.numpy() for x in (lr, hr)]
    mean = (tokens[0].mean(0) + tokens[1].mean(0)) / 2
    centred = [t - mean for t in tokens]
    axes = np.linalg.svd(np.concatenate([t / np.sqrt(len(t)) for t in centred]))[2][:3]
    for k, axis in enumerate(axes):
        projected = [t @ (axis * np.sign(axis[np.abs(axis).argmax()])) for t in centred]
        low = min(np.percentile(p, 1) for p in projected)
        high = max(np.percentile(p, 99) for p in projected)
        for values, p in zip(got, projected, strict=True):
            expected = np.clip((p - low) / (high - low), 0, 1)
            np.testing.assert_allclose(values[..., k].ravel(), expected, atol=1e-5)


def test_pca_gives_equal_features_equal_colours():
    lr = random(12, 4, 4)
    blocks = lr.repeat_interleave(8, 1).repeat_interleave(8, 2)
    low, high = joint_pca(lr, blocks)
    np.testing.assert_allclose(high, low.repeat(8, 0).repeat(8, 1), atol=1e-5)

    shifted = joint_pca(lr, blocks + 1.0)
    assert np.abs(shifted[1] - shifted[0].repeat(8, 0).repeat(8, 1)).max() > 0.1


def test_pca_outliers_do_not_take_the_whole_scale():
    lr, hr = smooth(channels=6, low=(16, 16), high=(32, 32))
    hr[:, 5, 5] *= 1000
    assert np.std(joint_pca(lr, hr)[0][..., 1]) > 0.1
    assert np.std(channel_mean(lr, hr)[0]) < 0.01


def test_pca_of_sampled_and_divided_maps(monkeypatch):
    lr, hr = smooth(channels=10, low=(8, 8), high=(64, 48))
    whole = joint_pca(lr, hr)
    monkeypatch.setattr(visualize, "_PART", 10 * 48 * 5)
    for a, b in zip(whole, joint_pca(lr, hr), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    monkeypatch.setattr(visualize, "_SAMPLE", 800)
    sampled = joint_pca(lr, hr)
    assert 0 < np.abs(sampled[1] - whole[1]).max() and np.abs(sampled[1] - whole[1]).mean() < 0.1
    np.testing.assert_array_equal(sampled[1], joint_pca(lr, hr)[1])


@pytest.mark.parametrize("height, width", [(1, 1), (1, 100_000), (70_000, 2), (141, 142), (300, 401), (448, 448)])
def test_sample_is_bounded_and_spread(height, width):
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    sample = visualize._sampled(torch.stack([rows, columns]))
    count = sample[0].numel()
    assert min(height * width, visualize._SAMPLE) / 5 <= count <= visualize._SAMPLE
    for positions, side in zip(sample, (height, width), strict=True):
        assert abs(positions.double().mean() - (side - 1) / 2) <= max(1, side / 100)


def test_pca_of_few_channels():
    lr, hr = random(1, 4, 4), random(1, 8, 8, seed=1)
    for values, source in zip(joint_pca(lr, hr), (lr, hr), strict=True):
        assert values.shape[2] == 3 and (values == values[..., :1]).all()
        assert np.corrcoef(values[..., 0].ravel(), source.ravel())[0, 1] > 0.9
    for values in joint_pca(random(2, 4, 4), random(2, 8, 8, seed=1)):
        assert (values[..., 2] == 0).all() and values[..., 0].std() > 0.1 and values[..., 1].std() > 0.1
    assert [x.shape for x in joint_pca(lr, hr, n_components=2)] == [(4, 4, 2), (8, 8, 2)]


@pytest.mark.parametrize("channels", [1, 2, 3, 100])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e4])
def test_constant_features_are_mid_grey(channels, value):
    lr, hr = torch.full((channels, 3, 5), value), torch.full((channels, 7, 11), value)
    for values in (*joint_pca(lr, hr), *channel_mean(lr, hr)):
        assert (values == 0.5).all()


def test_rounding_noise_is_no_picture():
    # One direction only: what the second and third axes see is float32 rounding.
    lr, hr = (random(1, *size) * random(64, 1, 1, seed=1) + 5 for size in ((4, 4), (16, 16)))
    low, high = joint_pca(lr, hr)
    assert high[..., 0].std() > 0.1 and (low[..., 1:] == 0.5).all() and (high[..., 1:] == 0.5).all()
    # Channels whose mean is 0 in exact arithmetic.
    lr, hr = (x - x.mean(0) for x in smooth(channels=384))
    assert all((values == 0.5).all() for values in channel_mean(lr, hr))
    assert channel_mean(lr, hr + torch.linspace(0, 1e-3, 24))[1].std() > 0.1


def test_small_object_on_constant_ground_is_seen():
    lr, hr = torch.zeros(4, 32, 32), torch.zeros(4, 64, 64)
    hr[1, 10, 10] = 1
    assert joint_pca(lr, hr)[1][10, 10, 0] == 1 and joint_pca(lr, hr)[1][0, 0, 0] == 0


# Kinds of input


@pytest.mark.parametrize("function", [channel_mean, joint_pca], ids=lambda f: f.__name__)
def test_kinds_of_features(function):
    lr, hr = smooth()
    expected = function(lr, hr)
    read_only = hr.numpy().copy()
    read_only.flags.writeable = False
    kinds = {
        "batch of one": (lr[None], hr[None]),
        "gradient": (lr.clone().requires_grad_(), hr),
        "numpy": (lr.numpy(), read_only),
        "reversed": (lr.numpy()[:, ::-1][:, ::-1], hr.numpy()[:, :, ::-1].copy()[:, :, ::-1]),
        "big-endian": (lr.numpy().astype(">f4"), hr),
        "channels last": (lr, hr.permute(1, 2, 0).contiguous().permute(2, 0, 1)),
        "double": (lr.double(), hr.double()),
    }
    for kind, (low, high) in kinds.items():
        for a, b in zip(function(low, high), expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, err_msg=kind)
    for dtype, tolerance in ((torch.float16, 0.01), (torch.bfloat16, 0.08)):
        for a, b in zip(function(lr.to(dtype), hr.to(dtype)), expected, strict=True):
            assert a.dtype == np.float32
            np.testing.assert_allclose(a, b, atol=tolerance)


@pytest.mark.parametrize("function", [channel_mean, joint_pca], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "lr, hr, message",
    [
        (torch.ones(2, 2), torch.ones(3, 4, 4), r"lr_features must be \(C, h, w\).*\(2, 2\)"),
        (torch.ones(3, 2, 2), torch.ones(1, 1, 3, 4, 4), r"hr_features must be .*\(1, 1, 3, 4, 4\)"),
        (torch.ones(2, 3, 2, 2), torch.ones(3, 4, 4), "lr_features must be the map of one image"),
        (torch.ones(3, 2, 2), torch.ones(4, 4, 4), "same number of channels, got 3 .* and 4"),
        (torch.ones(0, 2, 2), torch.ones(0, 4, 4), "lr_features has no values"),
        (
            torch.ones(3, 2, 2).int(),
            torch.ones(3, 4, 4),
            "lr_features must be floating point, got torch.int32",
        ),
        (torch.ones(3, 2, 2), np.ones((3, 4, 4), int), "hr_features must be floating point, got int64"),
        (torch.full((3, 2, 2), torch.nan), torch.ones(3, 4, 4), "lr_features has NaN"),
        (
            torch.ones(3, 2, 2),
            torch.ones(3, 4, 4).index_fill(1, torch.tensor(3), -torch.inf),
            "hr_features has",
        ),
    ],
)
def test_bad_features(function, lr, hr, message):
    with pytest.raises(ValueError, match=message):
        function(lr, hr)


def test_bad_arguments():
    with pytest.raises(TypeError, match="lr_features must be a torch tensor or a numpy array, got list"):
        channel_mean([[1.0]], torch.ones(1, 2, 2))
    for n_components in (0, 2.0, True):
        with pytest.raises(ValueError, match="n_components must be a positive int"):
            joint_pca(torch.ones(3, 2, 2), torch.ones(3, 4, 4), n_components)
    with pytest.raises(ValueError, match="too large for a PCA"):
        joint_pca(random(3, 2, 2) * 1e30, random(3, 4, 4) * 1e30)


# Similarity


def test_similarity_is_the_cosine(monkeypatch):
    features = random(6, 9, 13)
    expected = F.cosine_similarity(features, features[:, 4:5, 11:12], dim=0)
    for part in (2**20, 1):
        monkeypatch.setattr(visualize, "_PART", part)
        got = similarity(features, 4, 11)
        assert got.dtype == np.float32 and np.abs(got).max() <= 1 and got[4, 11] == pytest.approx(1)
        np.testing.assert_allclose(got, expected, atol=1e-6)
    assert np.abs(similarity(features, 4, 10) - got).max() > 0.5
    np.testing.assert_allclose(similarity(features * 1e30, 4, 11), got, atol=1e-6)
    np.testing.assert_allclose(similarity(features * 1e-30, 4, 11), got, atol=1e-6)
    np.testing.assert_allclose(similarity(features[None].numpy(), 4, 11), got, atol=1e-6)


def test_similarity_to_nothing_and_beyond_the_map():
    features = random(6, 3, 5)
    features[:, 1, 1] = 0
    assert (similarity(features, 1, 1) == 0).all() and similarity(features, 0, 0)[1, 1] == 0
    for row, col, name in ((3, 0, "row"), (-1, 0, "row"), (0, 5, "col"), (0, 1.0, "col")):
        with pytest.raises(ValueError, match=f"{name} must be an int from 0 to"):
            similarity(features, row, col)
    with pytest.raises(ValueError, match="features has NaN"):
        similarity(features.log(), 0, 0)


# The figure

pytest_figure = pytest.mark.usefixtures("matplotlib")


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib")


@pytest_figure
@pytest.mark.parametrize("mode", ["mean", "pca"])
def test_figure_shows_every_feature_pixel(tmp_path, mode):
    lr, hr = smooth(low=(14, 16), high=(448, 512))
    path = tmp_path / "new" / "figure.png"
    figure = visualize_feature_comparison(photo(28, 32), lr, hr, mode, str(path))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["photograph 28x32", "low-res features 14x16 x 8", "high-res features 448x512 x 8"]
    with Image.open(path) as picture:
        assert picture.size == figure.canvas.get_width_height()
        written = np.asarray(picture.convert("RGB")).astype(int)
    boxes = panels(figure)
    assert [(bottom - top, right - left) for left, top, right, bottom in boxes] == [(448, 512)] * 3
    assert boxes[-1][2] + boxes[0][0] == written.shape[1] < 3 * 512 * 1.03
    assert written.shape[0] < 448 * 1.15

    shown = [written[top:bottom, left:right] for left, top, right, bottom in boxes]
    colours = (channel_mean if mode == "mean" else joint_pca)(lr, hr)
    if mode == "mean":
        from matplotlib import colormaps

        colours = [colormaps["viridis"](values)[..., :3] for values in colours]
    colours = [colours[0].repeat(32, 0).repeat(32, 1), colours[1]]
    for seen, expected in zip(shown[1:], colours, strict=True):
        assert np.abs(seen - expected * 255).max() <= 1.01


@pytest_figure
def test_photograph_is_denormalised():
    lr, hr = smooth(low=(14, 16), high=(448, 512))
    colour = torch.tensor([0.2, 0.5, 0.9])[:, None, None]
    rgb = {}
    for name, image in (
        ("normalised", normalize(colour.expand(3, 8, 8))),
        ("wrong mean", colour.expand(3, 8, 8)),
    ):
        figure = visualize_feature_comparison(image, lr, hr)
        figure.canvas.draw()
        left, top, right, bottom = panels(figure)[0]
        rgb[name] = np.asarray(figure.canvas.buffer_rgba())[(top + bottom) // 2, (left + right) // 2, :3]
    np.testing.assert_allclose(rgb["normalised"], [51, 128, 230], atol=1)
    assert np.abs(rgb["wrong mean"] - np.array([51.0, 128, 230])).max() > 20


@pytest_figure
def test_pil_photograph_and_aspect_ratio():
    lr, hr = smooth(low=(4, 4), high=(32, 32))
    picture = Image.fromarray(np.full((30, 60, 3), 128, np.uint8))
    figure = visualize_feature_comparison(picture, lr.numpy(), hr.numpy())
    for left, top, right, bottom in panels(figure):
        assert (right - left) == 2 * (bottom - top) and bottom - top >= 32


@pytest.mark.parametrize(
    "photo_size, hr, rows, expected",
    [
        ((448, 448), (448, 448), 1, (448, 448)),
        ((300, 451), (300, 451), 1, (300, 451)),
        ((1000, 1500), (200, 300), 1, (400, 600)),
        ((100, 100), (600, 448), 1, (600, 600)),
        ((100, 200), (448, 448), 1, (448, 896)),
        ((400, 100), (400, 100), 1, (1200, 300)),
        ((50, 50), (1, 1), 1, (448, 448)),
        ((4096, 2048), (4096, 2048), 1, (2048, 1024)),
        ((4096, 2048), (4096, 2048), 16, (1024, 512)),
    ],
)
def test_panel_size(photo_size, hr, rows, expected):
    assert visualize._panel_size((*photo_size, 3), hr, rows) == expected


@pytest_figure
def test_batch_has_one_row_per_image():
    pairs = [smooth(seed=seed) for seed in range(3)]
    lr, hr = (torch.stack(maps) for maps in zip(*pairs, strict=True))
    images = torch.stack([photo(), photo(), photo()])
    figure = visualize_feature_comparison(images, lr, hr, "pca")
    assert len(figure.axes) == 9
    tops = panels(figure)[::3, 1]
    assert (np.diff(tops) >= 256).all()
    for i, pair in enumerate(pairs):
        np.testing.assert_array_equal(figure.axes[3 * i + 1].images[0].get_array(), joint_pca(*pair)[0])
    from_list = visualize_feature_comparison(list(images), lr, hr, "pca")
    np.testing.assert_array_equal(panels(from_list), panels(figure))
    with pytest.raises(ValueError, match="same batch size, got 1, 3 and 3"):
        visualize_feature_comparison(photo(), lr, hr)
    with pytest.raises(ValueError, match="same batch size, got 3, 2 and 3"):
        visualize_feature_comparison(images, lr[:2], hr)


@pytest_figure
@pytest.mark.parametrize("suffix", [".png", ".PNG", ".jpg", ".jpeg", ".pdf"])
def test_file_formats(tmp_path, matplotlib, suffix):
    path = tmp_path / f"figure{suffix}"
    with matplotlib.rc_context({"savefig.bbox": "tight", "savefig.dpi": 30, "savefig.transparent": True}):
        figure = visualize_feature_comparison(photo(), *smooth(), path=path)
    assert os.listdir(tmp_path) == [path.name]
    if suffix == ".pdf":
        assert path.read_bytes().startswith(b"%PDF-")
    else:
        with Image.open(path) as picture:
            assert picture.size == figure.canvas.get_width_height()
            assert picture.format == ("PNG" if suffix.lower() == ".png" else "JPEG")
            assert min(picture.convert("RGB").getpixel((0, 0))) >= 250


@pytest_figure
def test_failing_write_leaves_no_file(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def half(self, target, **options):
        target.write_bytes(b"half a picture")
        raise OSError("disk full")

    path = tmp_path / "figure.png"
    path.write_bytes(b"older")
    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        visualize_feature_comparison(photo(), *smooth(), path=path)
    assert os.listdir(tmp_path) == ["figure.png"] and path.read_bytes() == b"older"


@pytest.mark.parametrize("name", ["figure.bmp", "figure", "figure.png.txt"])
def test_unsupported_suffix(tmp_path, name):
    with pytest.raises(ValueError, match=r"path must end in one of \.png, \.jpg, \.jpeg, \.pdf, got"):
        visualize_feature_comparison(photo(), *smooth(), path=tmp_path / name)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"mode": "median"}, ValueError, "mode must be one of 'mean', 'pca', got 'median'"),
        ({"path": 3}, TypeError, "path must be None, a str or a Path, got int"),
        ({"lr_features": torch.ones(4, 4)}, ValueError, r"lr_features must be \(C, h, w\)"),
        ({"lr_features": torch.ones(3, 4, 4)}, ValueError, "same number of channels"),
        ({"hr_features": torch.full((8, 16, 24), torch.nan)}, ValueError, "hr_features has NaN"),
        ({"image": torch.ones(16, 24)}, ValueError, r"image must be a non-empty tensor \(3, H, W\)"),
        ({"image": torch.ones(4, 16, 24)}, ValueError, "image must have the shape"),
        ({"image": torch.full((3, 16, 24), torch.nan)}, ValueError, "image has NaN"),
        ({"image": []}, ValueError, "same batch size, got 0, 1 and 1"),
    ],
)
@pytest_figure
def test_bad_figure_arguments(changes, error, message):
    lr, hr = smooth()
    good = {"image": photo(), "lr_features": lr, "hr_features": hr}
    visualize_feature_comparison(**good)
    with pytest.raises(error, match=message):
        visualize_feature_comparison(**{**good, **changes})


def test_without_matplotlib(monkeypatch):
    for module in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RuntimeError, match=r"needs matplotlib: pip install 'anyup-fast\[viz\]'"):
        visualize_feature_comparison(photo(), *smooth())
    assert joint_pca(*smooth())[1].shape == (16, 24, 3)


@pytest_figure
def test_pyplot_is_never_imported(tmp_path):
    program = """
import sys, torch
from anyup_fast import visualize
assert "matplotlib" not in sys.modules
lr, hr = torch.randn(4, 3, 3), torch.randn(4, 9, 9)
visualize.channel_mean(lr, hr), visualize.joint_pca(lr, hr), visualize.similarity(hr, 1, 1)
assert "matplotlib" not in sys.modules
for suffix in visualize.FIGURE_SUFFIXES:
    visualize.visualize_feature_comparison(torch.zeros(3, 9, 9), lr, hr, path="figure" + suffix)
assert "matplotlib.figure" in sys.modules
print("matplotlib.pyplot" in sys.modules)
import matplotlib.pyplot
print("matplotlib.pyplot" in sys.modules, matplotlib.pyplot.get_fignums())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False\nTrue []\n"), done.stderr


def test_a_notebook_gets_the_figure_as_a_picture():
    image, (lr, hr) = photo(), smooth()
    figures = [visualize_feature_comparison(image, lr, hr, mode) for mode in ("mean", "pca")]
    figures.append(visualize_feature_comparison(*(torch.stack((x, x)) for x in (image, lr, hr))))
    figures.append(pickle.loads(pickle.dumps(figures[0])))
    for figure in figures:
        data = figure._repr_png_()
        width, height = Image.open(io.BytesIO(data)).size
        assert data.startswith(b"\x89PNG") and (width, height) == tuple(figure.get_size_inches() * figure.dpi)
