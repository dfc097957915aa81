"""Padding in place of stretching: features, outputs, points and masks are the picture's."""

import io

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image

import anyup_fast
from anyup_fast.encoders import Encoder
from anyup_fast.padded import Padded, whole_size

PATCH = 14


class Means(Encoder):
    """The mean colour of each cell."""

    def __init__(self, stride=PATCH):
        super().__init__("means", source="none", patch_size=stride, dim=3, num_layers=1)

    def features(self, image, layer):
        return F.avg_pool2d(image, self.patch_size)


def dotted(height, width, row, col, spread=9.0):
    """A black picture, uint8, with a bright spot around (row, col), in pixels whose centres are whole numbers."""
    rows, cols = np.arange(height)[:, None] - row, np.arange(width) - col
    spot = np.exp(-(rows**2 + cols**2) / (2 * spread**2))
    return np.repeat((spot * 255).round().astype(np.uint8)[..., None], 3, 2)


def centre(maps, stride=1.0):
    """Where the brightness of a map (C, h, w) lies, in pixels of the image that has `stride` pixels a cell."""
    light = maps.double().mean(0)
    light = (light - light.min()).clamp(min=0.05 * (light.max() - light.min())) - 0.05 * (light.max() - light.min())
    axes = [(torch.arange(n).double() + 0.5) * stride - 0.5 for n in light.shape]
    total = light.sum()
    return (light.sum(1) @ axes[0] / total).item(), (light.sum(0) @ axes[1] / total).item()


def turned_file(array):
    """A JPEG-like file whose pixels lie on their side and whose EXIF says so: shown, it is `array`."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(array))).save(file, "PNG", exif=exif)
    file.seek(0)
    return file


HEIGHT, WIDTH, ROW, COL = 101, 137, 62.0, 45.0


@pytest.mark.parametrize("size, output_size", [(None, None), (130, None), (None, (75, 91)), (None, (202, 274))])
@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize("fit", ["stretch", "pad"])
def test_a_dot_is_where_it_is_in_the_picture(fit, upright, size, output_size):
    source = dotted(HEIGHT, WIDTH, ROW, COL)
    there, shape = (ROW, COL), (HEIGHT, WIDTH)
    file = turned_file(source)
    if not upright:  # as it is stored, a quarter turn to the left
        there, shape = (WIDTH - 1 - COL, ROW), (WIDTH, HEIGHT)
        output_size = output_size and output_size[::-1]
    image = anyup_fast.load_image(file, size, PATCH, fit=fit, upright=upright)
    picture = image.picture if fit == "pad" else image
    features = anyup_fast.extract_features(image, Means())
    found = [n * scale for n, scale in zip(features.shape[1:], (PATCH, PATCH), strict=True)]
    if fit == "pad":
        assert all(0 <= n - m < PATCH for n, m in zip(found, picture.shape[1:], strict=True))
    scales = [n / m for n, m in zip(picture.shape[1:], shape, strict=True)]
    wanted = [(t + 0.5) * s - 0.5 for t, s in zip(there, scales, strict=True)]
    assert np.abs(np.subtract(centre(features, PATCH), wanted)).max() <= 1
    if fit == "pad":  # were they read as if they covered the picture alone, the dot would be elsewhere
        squeezed = [(t + 0.5) * n / m - 0.5 for t, n, m in zip(wanted, picture.shape[1:], found, strict=True)]
        assert np.abs(np.subtract(squeezed, wanted)).max() > 1
    assert np.abs(np.subtract(centre(picture), wanted)).max() <= 1
    output = anyup_fast.upsample_features_with_anyup(image, features, output_size)
    assert output.shape[1:] == (output_size or picture.shape[1:])
    scales = [n / m for n, m in zip(output.shape[1:], shape, strict=True)]
    wanted = [(t + 0.5) * s - 0.5 for t, s in zip(there, scales, strict=True)]
    assert np.abs(np.subtract(centre(output), wanted)).max() <= 1


def test_outputs_are_cut_out_of_those_of_the_whole_image():
    model = tiny.model()
    image = anyup_fast.load_image(dotted(50, 33, 20, 20), None, 16, fit="pad")
    assert isinstance(image, Padded) and image.size == (50, 33) and image.image.shape == (3, 64, 48)
    features = torch.randn(5, 4, 3)
    whole = model(image.image[None], features[None])
    got = anyup_fast.upsample_features_with_anyup(image, features, weights=model)
    torch.testing.assert_close(got[None], whole[..., :50, :33], rtol=0, atol=1e-5)
    prepared = anyup_fast.prepare(image, features, model)
    assert prepared.output_size == (50, 33)
    near = dict(rtol=0, atol=1e-5)
    torch.testing.assert_close(prepared.full(), whole[..., :50, :33], **near)
    torch.testing.assert_close(prepared.full(), whole[..., :50, :33], **near)  # keys are there already
    torch.testing.assert_close(prepared.region(40, 20, 10, 13), whole[..., 40:50, 20:33], **near)
    points = torch.tensor([[0, 0], [49, 32], [10, 20]])
    torch.testing.assert_close(prepared.at(points)[0], whole[0, :, points[:, 0], points[:, 1]].mT, **near)
    last = prepared.at([[1.0, 1.0]], align="normalized")[0, 0]
    torch.testing.assert_close(last, whole[0, :, 49, 32], **near)
    weight = torch.randn(4, 5)
    labels = prepared.head(weight, argmax=True).full()
    assert torch.equal(labels[0], torch.einsum("kc,chw->khw", weight, prepared.full()[0]).argmax(0))
    streamed = np.zeros((1, 5, 50, 33), np.float32)
    prepared.stream(16, out=streamed)
    torch.testing.assert_close(torch.from_numpy(streamed), whole[..., :50, :33], **near)
    torch.testing.assert_close(prepared.attention(49, 32).sum(), torch.tensor(1.0))
    half = model(image.image[None], features[None], (32, 25))
    torch.testing.assert_close(prepared.full((25, 17)), half[..., :25, :17], **near)


def test_points_beyond_the_picture_are_refused():
    prepared = anyup_fast.prepare(
        anyup_fast.load_image(dotted(50, 33, 20, 20), None, 16, fit="pad"), torch.randn(5, 4, 3), tiny.model()
    )
    with pytest.raises(ValueError, match=r"lies outside \(50, 33\)"):
        prepared.at([[50, 0]])
    with pytest.raises(ValueError, match="leaves the output of 50x33"):
        prepared.region(40, 0, 11, 5)
    with pytest.raises(ValueError, match="leaves the output of 64x48"):
        prepared.within(65, 10)


def test_cells_beyond_the_picture_are_cut():
    image = anyup_fast.load_image(dotted(40, 70, 20, 20), None, 32, fit="pad")
    assert image.image.shape == (3, 64, 96)
    features = anyup_fast.extract_features(image, Means(8))
    assert features.shape == (3, 5, 9)  # of 8 x 12
    torch.testing.assert_close(features, F.avg_pool2d(image.image, 8)[:, :5, :9])
    assert image.covered(features)[0].shape == (3, 40, 72)
    model = tiny.model()
    got = anyup_fast.upsample_features_with_anyup(image, features, weights=model)
    expected = model(image.image[None, :, :40, :72], features[None])[0, :, :40, :70]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    whole = F.avg_pool2d(image.image, 8)
    assert anyup_fast.upsample_features_with_anyup(image, whole, weights=model).shape == (3, 40, 70)
    spread = image.spread(features)
    assert spread.shape == (3, 40, 70) and torch.equal(spread[:, 39, 69], features[:, 4, 8])


def test_padding_repeats_the_edge_and_keeps_the_pixels():
    array = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    image = anyup_fast.load_image(array, None, 14, fit="pad")
    assert torch.equal(image.picture, anyup_fast.load_image(array))
    assert torch.equal(image.image[:, 30:, :40], image.picture[:, 29:].expand(3, 12, 40))
    assert torch.equal(image.to(torch.float64).picture.float(), image.picture)
    assert anyup_fast.load_image(array[:28, :28], None, 14, fit="pad").image.shape == (3, 28, 28)


@pytest.mark.parametrize("picture, image", [((157, 205), (168, 210)), ((41, 1), (48, 16)), ((1999, 7), (2000, 8))])
@pytest.mark.parametrize("out", [(10, 20), (157, 205), (500, 333)])
def test_sizes_of_the_whole_are_exact_to_half_a_pixel(picture, image, out):
    for whole, n, part, full in zip(whole_size(out, picture, image), out, picture, image, strict=True):
        assert whole >= n and abs(part / full * whole - n) <= 0.5


def test_what_does_not_fit_is_refused():
    array = np.zeros((30, 40, 3), np.uint8)
    with pytest.raises(ValueError, match="fit must be 'stretch' or 'pad', got 'crop'"):
        anyup_fast.load_image(array, fit="crop")
    with pytest.raises(ValueError, match="fit='pad' needs patch_multiple"):
        anyup_fast.load_image(array, fit="pad")
    image = anyup_fast.load_image(array, None, 16, fit="pad")
    with pytest.raises(ValueError, match=r"a grid of 3x7 cells fits no stride, for a picture of \(30, 40\)"):
        anyup_fast.upsample_features_with_anyup(image, torch.randn(5, 3, 7), weights=tiny.model())
    with pytest.raises(ValueError, match="are not square cells"):
        image.cut(torch.randn(5, 3, 7))
    with pytest.raises(ValueError, match="does not lie in an image of"):
        Padded(image.image, (33, 40))
    ambiguous = Padded(torch.zeros(3, 12, 12), (5, 5))
    with pytest.raises(ValueError, match=r"fits several strides, \[3, 4, 6\]"):
        ambiguous.covered(torch.zeros(1, 2, 2))


@pytest.mark.parametrize("mode", ["mean", "pca"])
def test_the_figure_shows_the_picture_and_tells_the_grid(mode):
    pytest.importorskip("matplotlib")
    image = anyup_fast.load_image(
        np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8), None, 16, fit="pad"
    )
    features = torch.randn(5, 3, 5, generator=torch.Generator().manual_seed(0))
    upsampled = torch.randn(5, 40, 70, generator=torch.Generator().manual_seed(1))
    figure = anyup_fast.visualize_feature_comparison(image, features, upsampled, mode)
    photograph, low, high = figure.axes
    assert photograph.get_title() == "photograph 40x70" and low.get_title() == "low-res features 3x5 x 5"
    shown = low.images[0].get_array()
    assert shown.shape[:2] == high.images[0].get_array().shape[:2] == (40, 70)
    assert (shown[32:, 64:] == shown[39, 69]).all() and (shown[:16, :16] == shown[0, 0]).all()
    assert (shown[31, 63] != shown[32, 64]).any()
