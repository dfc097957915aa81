"""Pictures of every mode, orientation and depth against numbers written by hand; bad input; resizing."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from anyup_fast.image import IMAGENET_MEAN, IMAGENET_STD, denormalize, load_image, normalize, to_pil

EXACT = dict(rtol=0, atol=2e-6)


def unit(source, *args, **kwargs):
    """What `load_image` read, back in [0, 1] as an (H, W, 3) array, without the clamp of `denormalize`."""
    image = load_image(source, *args, **kwargs)
    assert image.dtype == torch.float32 and image.dim() == 3 and image.is_contiguous()
    return image.permute(1, 2, 0).cpu().numpy() * IMAGENET_STD + IMAGENET_MEAN


def saved(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    file.seek(0)
    return file


def random_rgb(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png_header(width, height):
    """A PNG that claims a size and holds next to no data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# ---- statistics


def test_normalize_uses_the_imagenet_statistics():
    image = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1).expand(3, 2, 2)
    torch.testing.assert_close(normalize(image), torch.zeros(3, 2, 2))
    white = normalize(torch.ones(3, 1, 1)).flatten().tolist()
    assert white == pytest.approx([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 4, 5), (2, 2, 3, 1, 1), (0, 3, 4, 5)])
def test_denormalize_undoes_normalize(dtype, shape):
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    there = normalize(image)
    back = denormalize(there)
    assert there.dtype == back.dtype == dtype and there.shape == back.shape == shape
    tolerance = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 3e-7, torch.float64: 1e-15}[dtype]
    torch.testing.assert_close(back, image, rtol=0, atol=tolerance)  # one rounding of values up to 2.7


def test_low_precision_is_computed_in_float32():
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(normalize(image), normalize(image.float()).bfloat16())


def test_denormalize_clamps():
    assert denormalize(torch.full((3, 1, 1), 9.0)).tolist() == [[[1.0]]] * 3
    assert denormalize(torch.full((3, 1, 1), -9.0)).tolist() == [[[0.0]]] * 3


@pytest.mark.parametrize("function", [normalize, denormalize, to_pil])
@pytest.mark.parametrize(
    "image, message",
    [
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "floating point tensor, got torch.uint8"),
        (np.zeros((3, 4, 4)), "floating point tensor, got ndarray"),
        (torch.zeros(4, 4, 3), r"\(\.\.\., 3, H, W\), got \(4, 4, 3\)"),
        (torch.zeros(3, 4), r"got \(3, 4\)"),
    ],
)
def test_tensor_functions_refuse(function, image, message):
    with pytest.raises(ValueError, match=message):
        function(image)


# ---- modes

RED, GREEN, BLUE, WHITE = (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)


def palette_picture(mode="P"):
    picture = Image.new("P", (2, 2))
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 51, 102, 153])
    picture.putdata([0, 1, 2, 3])
    return picture if mode == "P" else picture.convert(mode)


PALETTE = np.array([[RED, GREEN], [BLUE, (0.2, 0.4, 0.6)]])


def test_palette():
    np.testing.assert_allclose(unit(palette_picture()), PALETTE, **EXACT)
    for kind in ("PNG", "GIF", "BMP", "TIFF"):
        np.testing.assert_allclose(unit(saved(palette_picture(), kind)), PALETTE, **EXACT)


def test_palette_with_one_transparent_index():
    expected = PALETTE.copy()
    expected[0, 0] = WHITE
    for kind in ("PNG", "GIF"):
        file = saved(palette_picture(), kind, transparency=0)
        assert Image.open(file).mode == "P"
        np.testing.assert_allclose(unit(file), expected, **EXACT)


def test_palette_with_an_alpha_table_is_composited_over_white():
    file = saved(palette_picture(), transparency=bytes([255, 51, 0, 255]))
    assert Image.open(file).mode == "P"
    expected = PALETTE.copy()
    expected[0, 1] = 0.2 * np.array(GREEN) + 0.8
    expected[1, 0] = WHITE
    np.testing.assert_allclose(unit(file), expected, **EXACT)


def test_palette_with_alpha_channel():
    picture = palette_picture("PA")
    picture.putalpha(Image.frombytes("L", (2, 2), bytes([255, 0, 51, 255])))
    expected = PALETTE.copy()
    expected[0, 1] = WHITE
    expected[1, 0] = 0.2 * np.array(BLUE) + 0.8
    np.testing.assert_allclose(unit(picture), expected, **EXACT)


@pytest.mark.parametrize("kind", [None, "PNG", "BMP", "TIFF"])
def test_greyscale(kind):
    picture = Image.frombytes("L", (3, 1), bytes([0, 51, 255]))
    expected = np.array([[[0] * 3, [0.2] * 3, [1] * 3]])
    np.testing.assert_allclose(unit(saved(picture, kind) if kind else picture), expected, **EXACT)


def test_greyscale_with_a_transparent_level():
    picture = Image.frombytes("L", (3, 1), bytes([0, 51, 102]))
    got = unit(saved(picture, transparency=51))
    np.testing.assert_allclose(got[0, :, 0], [0, 1, 0.4], **EXACT)


def test_rgb_with_a_transparent_colour():
    picture = Image.frombytes("RGB", (2, 1), bytes([255, 0, 0, 0, 0, 255]))
    np.testing.assert_allclose(unit(saved(picture, transparency=(255, 0, 0))), [[WHITE, BLUE]], **EXACT)


@pytest.mark.parametrize("kind", [None, "PNG", "TIFF"])
def test_one_bit(kind):
    picture = Image.new("1", (9, 2))
    picture.putpixel((8, 1), 1)
    got = unit(saved(picture, kind) if kind else picture)
    expected = np.zeros((2, 9, 3))
    expected[1, 8] = 1
    np.testing.assert_allclose(got, expected, **EXACT)


@pytest.mark.parametrize("kind", [None, "PNG", "WEBP"])
def test_alpha_is_composited_over_white(kind):
    picture = Image.new("RGBA", (3, 1))
    picture.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (0, 102, 0, 51)])
    file = saved(picture, kind, lossless=True, exact=True) if kind else picture
    expected = [[RED, WHITE, (0.8, 0.8 + 0.2 * 0.4, 0.8)]]
    np.testing.assert_allclose(unit(file), expected, **EXACT)


def test_grey_alpha_is_composited_over_white():
    picture = Image.new("LA", (3, 1))
    picture.putdata([(102, 255), (102, 0), (0, 51)])
    for source in (picture, saved(picture)):
        np.testing.assert_allclose(unit(source)[0, :, 1], [0.4, 1, 0.8], **EXACT)


@pytest.mark.parametrize("premultiplied, straight", [("RGBa", "RGBA"), ("La", "LA")])
def test_premultiplied_alpha(premultiplied, straight):
    picture = Image.new(straight, (1, 1), (100,) * (len(straight) - 1) + (128,)).convert(premultiplied)
    alpha = 128 / 255
    np.testing.assert_allclose(unit(picture), 100 / 255 * alpha + 1 - alpha, rtol=0, atol=2 / 255)


@pytest.mark.parametrize("kind", [None, "JPEG", "TIFF"])
def test_cmyk(kind):
    picture = Image.new("CMYK", (40, 8))
    inks = [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255)]
    for index, ink in enumerate(inks):
        picture.paste(ink, (8 * index, 0, 8 * index + 8, 8))
    got = unit(saved(picture, kind, **({"quality": 100} if kind == "JPEG" else {})) if kind else picture)
    expected = np.array([WHITE, (0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 0, 0)])
    np.testing.assert_allclose(got, np.tile(expected.repeat(8, 0), (8, 1, 1)), rtol=0, atol=2.1 / 255)


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "RGBX"])
def test_other_colour_modes(mode):
    rgb = Image.new("RGB", (2, 2), (255, 0, 0))
    np.testing.assert_allclose(unit(rgb.convert(mode)), np.tile(RED, (2, 2, 1)), rtol=0, atol=1.1 / 255)


# ---- more than 8 bits

DEEP = np.arange(64 * 32, dtype=np.uint16).reshape(64, 32) * 32


def deep_sources():
    little, big = DEEP.astype("<u2").tobytes(), DEEP.astype(">u2").tobytes()
    grey = Image.frombytes("I;16", (32, 64), little)
    return {
        "I;16": grey,
        "I;16B": Image.frombytes("I;16B", (32, 64), big),
        "I": Image.fromarray(DEEP.astype(np.int32)),
        "PNG": saved(grey),
        "TIFF": saved(grey, "TIFF"),
        "PGM": io.BytesIO(b"P5 32 64 65535\n" + big),
        "uint16": DEEP,
        "uint16 big-endian": DEEP.astype(">u2"),
        "float64": DEEP / 65535,
        "F": Image.fromarray((DEEP / 65535).astype(np.float32)),
    }


@pytest.mark.parametrize("name", deep_sources())
def test_16_bit_and_float_pictures_keep_all_levels(name):
    got = unit(deep_sources()[name])
    np.testing.assert_allclose(got, np.repeat(DEEP[..., None] / 65535, 3, axis=2), **EXACT)
    assert len(np.unique(got[..., 0].round(6))) == DEEP.size > 256


def test_16_bit_levels_survive_resizing():
    ramp = np.repeat(np.arange(4096, dtype=np.uint16)[None] * 16, 8, axis=0)
    got = unit(ramp, (8, 2048))[0, 4:-4, 0]
    assert len(np.unique(got.round(6))) == 2040
    np.testing.assert_allclose(got, (np.arange(2048) * 32 + 8)[4:-4] / 65535, rtol=0, atol=1e-5)


def test_16_bit_colour_arrays():
    colour = np.array([[[65535, 257, 1]]], dtype=np.uint16)
    np.testing.assert_allclose(unit(colour), [[[1, 1 / 255, 1 / 65535]]], **EXACT)


def test_mode_i_is_8_bit_only_while_nothing_exceeds_255():
    low = Image.fromarray(np.array([[0, 51, 255]], dtype=np.int32))
    high = Image.fromarray(np.array([[0, 51, 256]], dtype=np.int32))
    np.testing.assert_allclose(unit(low)[0, :, 0], [0, 0.2, 1], **EXACT)
    np.testing.assert_allclose(unit(high)[0, :, 0], [0, 51 / 65535, 256 / 65535], **EXACT)


def test_a_dark_16_bit_file_stays_dark():
    dark = np.array([[0, 51, 255]], dtype=np.uint16)
    for file in (saved(Image.fromarray(dark)), io.BytesIO(b"P5 3 1 65535\n" + dark.astype(">u2").tobytes())):
        np.testing.assert_allclose(unit(file)[0, :, 0], dark[0] / 65535, **EXACT)


def test_16_bit_png_with_a_transparent_level():
    data = saved(Image.fromarray(np.array([[0, 1000, 65535]], dtype=np.uint16))).getvalue()
    body = b"tRNS" + struct.pack(">H", 1000)  # by hand, older Pillows read but don't write it
    chunk = struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body))
    start = data.index(b"IDAT") - 4
    file = io.BytesIO(data[:start] + chunk + data[start:])
    np.testing.assert_allclose(unit(file)[0, :, 0], [0, 1, 1], **EXACT)


# ---- orientation

BY_HAND = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a[:, ::-1].transpose(1, 0, 2),
}


def exif(orientation):
    data = Image.Exif()
    data[0x0112] = orientation
    return data


@pytest.mark.parametrize("orientation", BY_HAND)
def test_exif_orientation(orientation):
    stored = random_rgb(5, 7)
    expected = BY_HAND[orientation](stored) / 255
    for kind in ("PNG", "TIFF"):
        options = {"tiffinfo": {0x0112: orientation}} if kind == "TIFF" else {"exif": exif(orientation)}
        file = saved(Image.fromarray(stored), kind, **options)
        np.testing.assert_allclose(unit(file), expected, **EXACT)
        np.testing.assert_allclose(unit(Image.open(file)), expected, **EXACT)


@pytest.mark.parametrize("orientation", BY_HAND)
def test_exif_orientation_of_jpeg(orientation):
    quarters = np.array([[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 255)]], dtype=np.uint8)
    stored = quarters.repeat(16, 0).repeat(32, 1)
    got = unit(saved(Image.fromarray(stored), "JPEG", quality=95, subsampling=0, exif=exif(orientation)))
    np.testing.assert_allclose(got, BY_HAND[orientation](stored) / 255, rtol=0, atol=4 / 255)


def test_exif_orientation_of_16_bit_and_alpha_pictures():
    upright = unit(saved(Image.fromarray(DEEP), exif=exif(6)))
    np.testing.assert_allclose(upright[..., 0], DEEP[::-1].T / 65535, **EXACT)
    picture = Image.new("LA", (2, 1))
    picture.putdata([(102, 255), (102, 0)])
    np.testing.assert_allclose(unit(saved(picture, exif=exif(6)))[..., 0], [[0.4], [1]], **EXACT)


def test_size_counts_after_the_orientation():
    file = saved(Image.fromarray(random_rgb(20, 40)), exif=exif(6))
    assert load_image(file, 10).shape == (3, 20, 10)
    assert load_image(file, (12, 34)).shape == (3, 12, 34)


def test_unreadable_exif_warns_and_leaves_the_picture():
    stored = random_rgb(3, 4)
    file = saved(Image.fromarray(stored), exif=b"Exif\0\0garbage!")
    with pytest.warns(UserWarning, match="EXIF data is unreadable"):
        np.testing.assert_allclose(unit(file), stored / 255, **EXACT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image(saved(Image.fromarray(stored), exif=exif(1)))


# ---- sources


def test_every_source_gives_the_same_picture(tmp_path):
    rgb = random_rgb(6, 5)
    path = tmp_path / "picture.png"
    Image.fromarray(rgb).save(path)
    chw = torch.from_numpy(rgb).permute(2, 0, 1)
    expected = normalize(chw.float() / 255)
    sources = {
        "str": str(path),
        "Path": path,
        "bytes file": io.BytesIO(path.read_bytes()),
        "PIL": Image.fromarray(rgb),
        "lazy PIL": Image.open(path),
        "uint8": rgb,
        "opaque RGBA": np.dstack([rgb, np.full((6, 5), 255, np.uint8)]),
        "float32": rgb.astype(np.float32) / 255,
        "float64 of negative strides": (rgb[::-1, ::-1] / 255)[::-1, ::-1],
        "uint8 tensor": chw,
        "float tensor": chw.float() / 255,
        "double tensor": chw.double() / 255,
    }
    for name, source in sources.items():
        got = load_image(source)
        assert got.is_contiguous() and got.dtype == torch.float32, name
        torch.testing.assert_close(got, expected, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


def test_grey_arrays_and_tensors():
    grey = np.array([[0, 51, 255]], dtype=np.uint8)
    expected = np.repeat(grey[..., None] / 255, 3, axis=2)
    for source in (grey, grey[..., None], torch.from_numpy(grey), torch.from_numpy(grey)[None]):
        np.testing.assert_allclose(unit(source), expected, **EXACT)
        np.testing.assert_allclose(unit(source, (1, 3)), expected, **EXACT)


def test_float_arrays_with_alpha():
    np.testing.assert_allclose(unit(np.array([[[0.5, 0, 0, 0.5]]])), [[[0.75, 0.5, 0.5]]], **EXACT)


def test_tensors_stay_on_their_device_and_in_the_graph():
    tensor = torch.rand(3, 8, 8, requires_grad=True)
    load_image(tensor, 4).sum().backward()
    assert tensor.grad.isfinite().all() and tensor.grad.abs().sum() > 0
    if torch.cuda.is_available():
        assert load_image(tensor.detach().cuda(), 4).device.type == "cuda"


def test_sources_are_left_alone(tmp_path):
    rgb = random_rgb(6, 5)
    file = saved(Image.fromarray(rgb))
    file.seek(10)
    first = load_image(file)
    assert not file.closed
    assert torch.equal(load_image(file), first)  # read from its start, wherever it stood
    array, tensor, picture = (
        rgb.copy(),
        torch.rand(3, 4, 4),
        Image.open(saved(Image.fromarray(rgb), exif=exif(6))),
    )
    kept = tensor.clone()
    for source in (array, tensor, picture):
        load_image(source, 3)
    assert (array == rgb).all() and torch.equal(tensor, kept)
    assert picture.size == (5, 6) and (np.asarray(picture) == rgb).all() and picture.getexif()[0x0112] == 6
    broken = io.BytesIO(b"no picture")
    with pytest.raises(ValueError):
        load_image(broken)
    assert not broken.closed
    path = tmp_path / "picture.png"
    path.write_bytes(file.getvalue())
    with open(path, "rb") as opened:
        load_image(opened)
        assert not opened.closed and opened.seek(0) == 0


def test_a_stream_that_cannot_seek():
    class Stream(io.RawIOBase):
        data = saved(Image.fromarray(random_rgb(6, 5))).getvalue()

        def read(self, size=-1):
            data, self.data = (self.data, b"") if size < 0 else (self.data[:size], self.data[size:])
            return data

        def seek(self, *args):
            raise io.UnsupportedOperation("seek")

    np.testing.assert_allclose(unit(Stream()), random_rgb(6, 5) / 255, **EXACT)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_give_their_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    file = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(file).n_frames == 3
    np.testing.assert_allclose(unit(file), np.tile(RED, (8, 8, 1)), **EXACT)


# ---- sizes


@pytest.mark.parametrize(
    "shape, size, patch, expected",
    [
        ((30, 40), None, None, (30, 40)),
        ((30, 40), 15, None, (15, 20)),
        ((40, 30), 15, None, (20, 15)),
        ((40, 30), np.int64(60), None, (80, 60)),
        ((100, 3), 1, None, (33, 1)),
        ((30, 40), (7, 50), None, (7, 50)),
        ((30, 40), [7, 50], None, (7, 50)),
        ((30, 40), None, 14, (28, 42)),
        ((21, 35), None, 14, (28, 42)),
        ((3, 40), None, 14, (14, 42)),
        ((30, 40), 28, 14, (28, 42)),
        ((30, 40), (20, 22), 14, (14, 28)),
        ((28, 42), None, 14, (28, 42)),
    ],
)
def test_target_sizes(shape, size, patch, expected):
    image = np.zeros((*shape, 3), np.uint8)
    assert load_image(image, size, patch).shape == (3, *expected)
    assert load_image(torch.zeros(3, *shape), size, patch).shape == (3, *expected)


def test_one_resize_only():
    rgb = random_rgb(30, 40)
    assert torch.equal(load_image(rgb, 25, 14), load_image(rgb, (28, 28), None))
    assert load_image(rgb, 25).shape == (3, 25, 33)
    assert torch.equal(load_image(rgb, 30), load_image(rgb))


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (200, 31, 7)])
@pytest.mark.parametrize("size", [(11, 13), (90, 71), (1, 1), 17])
def test_a_constant_picture_stays_constant(colour, size):
    got = unit(Image.new("RGB", (37, 41), colour), size)
    np.testing.assert_allclose(got, np.broadcast_to(np.array(colour) / 255, got.shape), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(20, 30), (17, 91), (140, 100)])
def test_resizing_is_antialiased_bicubic(size):
    picture = Image.fromarray(random_rgb(60, 80)).resize((100, 70), Image.Resampling.BILINEAR)
    by_pillow = np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC)) / 255
    np.testing.assert_allclose(unit(picture, size), by_pillow, rtol=0, atol=1.6 / 255)
    nearest = np.asarray(picture.resize(size[::-1], Image.Resampling.NEAREST)) / 255
    assert np.abs(unit(picture, size) - nearest).max() > 16 / 255


def test_resizing_does_not_overshoot():
    edge = np.zeros((8, 8, 3), np.uint8)
    edge[:, 4:] = 255
    got = unit(edge, (64, 64))
    assert got.min() >= -1e-6 and got.max() <= 1 + 1e-6


@pytest.mark.parametrize("size", [0, -3, 2.0, True, "448", (3,), (3, 4, 5), (0, 4), (4, -1), (4.0, 4), (True, 4), ()])
def test_bad_size(size):
    with pytest.raises(ValueError, match=r"size must be None, a positive int or \(height, width\), got"):
        load_image(np.zeros((4, 4), np.uint8), size)


@pytest.mark.parametrize("name", ["patch_multiple", "max_pixels"])
@pytest.mark.parametrize("value", [0, -14, 14.0, True, "14", (14, 14)])
def test_bad_patch_multiple_and_max_pixels(name, value):
    with pytest.raises(ValueError, match=f"{name} must be None or a positive int, got"):
        load_image(np.zeros((4, 4), np.uint8), **{name: value})


# ---- bad sources


def test_missing_file_folder_and_url(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*nowhere.png"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(FileNotFoundError, match="no file"):
        load_image("nul\0byte.png")
    with pytest.raises(ValueError, match="is a folder"):
        load_image(tmp_path)
    for url in ("http://example.org/a.png", "HTTPS://example.org/a.png", Path("https://example.org/a.png")):
        with pytest.raises(ValueError, match="is a URL.*download it first"):
            load_image(url)


@pytest.mark.parametrize("data", [b"", b"GIF", b"hello, world, this is text", b"\x89PNG\r\n\x1a\n", png_header(0, 5)])
def test_not_an_image(tmp_path, data):
    path = tmp_path / "broken.png"
    path.write_bytes(data)
    for source in (path, io.BytesIO(data)):
        with pytest.raises(ValueError, match="source: .* (damaged or not a picture|cannot be decoded)"):
            load_image(source)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_truncated_pictures_are_refused(kind):
    data = saved(Image.fromarray(random_rgb(24, 32)), kind).getvalue()
    whole = load_image(io.BytesIO(data))
    assert whole.shape == (3, 24, 32)
    for kept in (0.1, 0.3, 0.5, 0.9, 0.97):
        with pytest.raises(ValueError, match="source: .* (damaged or not a picture|truncated, damaged)"):
            load_image(io.BytesIO(data[: int(len(data) * kept)]))


def test_truncated_lazy_pil_image_is_refused():
    data = saved(Image.fromarray(random_rgb(24, 32))).getvalue()
    with pytest.raises(ValueError, match="the PIL image .*truncated, damaged"):
        load_image(Image.open(io.BytesIO(data[: len(data) // 2])))


def test_the_truncated_picture_would_be_half_grey_otherwise(monkeypatch):
    data = saved(Image.new("RGB", (256, 256), "red"), "JPEG").getvalue()
    half = data[: int(len(data) * 0.8)]
    with pytest.raises(ValueError, match="truncated"):
        load_image(io.BytesIO(half))
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert not torch.equal(load_image(io.BytesIO(half)), load_image(io.BytesIO(data)))


def test_damaged_checksum_is_refused():
    data = bytearray(saved(Image.fromarray(random_rgb(24, 32))).getvalue())
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(ValueError, match="cannot be decoded"):
        load_image(io.BytesIO(bytes(data)))


def test_enormous_pictures_are_refused_from_their_header():
    bomb = png_header(50_000, 50_000)
    with pytest.raises(ValueError, match="2500000000 pixels.*178956970"):
        load_image(io.BytesIO(bomb))
    with pytest.raises(ValueError, match="50000 x 50000 = 2500000000 pixels.*max_pixels=2000000000"):
        load_image(io.BytesIO(bomb), max_pixels=2_000_000_000)
    file = saved(Image.fromarray(random_rgb(10, 11)))
    for source in (file, Image.open(file), Image.fromarray(random_rgb(10, 11))):
        with pytest.raises(ValueError, match="11 x 10 = 110 pixels, more than max_pixels=109"):
            load_image(source, max_pixels=109)
        assert load_image(source, max_pixels=110).shape == (3, 10, 11)


def test_no_limit_reaches_past_pillows_own(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    file = saved(Image.fromarray(random_rgb(10, 11)))
    with pytest.raises(ValueError, match="110 pixels.*Raise max_pixels"):
        load_image(file)
    assert load_image(file, max_pixels=None).shape == (3, 10, 11)
    assert Image.MAX_IMAGE_PIXELS == 10
    with pytest.raises(ValueError, match="damaged or not a picture"):
        load_image(io.BytesIO(b"text"), max_pixels=None)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_pillows_warning_made_an_error_is_no_damage(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="too large.*110 pixels"):
            load_image(saved(Image.fromarray(random_rgb(10, 11))))


def test_arrays_have_no_limit_but_resizing_has():
    assert load_image(random_rgb(10, 11), max_pixels=5).shape == (3, 10, 11)
    with pytest.raises(ValueError, match="size=400.*the resized picture.*more than max_pixels=178956970"):
        load_image(np.zeros((1, 2000), np.uint8), 400)


def test_zero_sized():
    with pytest.raises(ValueError, match="no pixels, its size is 0 x 5"):
        load_image(Image.new("RGB", (0, 5)))
    with pytest.raises(ValueError, match=r"the array has no pixels, its shape is \(0, 5, 3\)"):
        load_image(np.zeros((0, 5, 3), np.uint8))
    with pytest.raises(ValueError, match=r"the tensor has no pixels, its shape is \(3, 4, 0\)"):
        load_image(torch.zeros(3, 4, 0))


@pytest.mark.parametrize("make", [np.array, torch.tensor, lambda values: Image.fromarray(np.array(values, np.float32))])
@pytest.mark.parametrize(
    "value, message",
    [
        (float("nan"), "NaN or infinite"),
        (float("inf"), "NaN or infinite"),
        (-float("inf"), "NaN or infinite"),
        (255.0, r"from 0.5 to 255.*divide 8-bit values by 255"),
        (-2.1, r"from -2.1 to 0.5.*normalised images go to the tensor functions directly"),
        (1.01, "from 0.5 to 1.01"),
    ],
)
def test_values_that_are_no_picture(make, value, message):
    with pytest.raises(ValueError, match=f"source: .*{message}"):
        load_image(make([[0.5, value]]))


def test_rounding_beyond_the_range_is_clipped():
    assert denormalize(load_image(torch.tensor([[1.00001, -0.00001]]))).max() <= 1
    np.testing.assert_allclose(unit(np.array([[1.00001, -0.00001]]))[0, :, 0], [1, 0], **EXACT)


def test_mode_i_outside_16_bits():
    for values in ([[0, 70000]], [[-1, 5]]):
        with pytest.raises(ValueError, match="not from 0 to 65535"):
            load_image(Image.fromarray(np.array(values, dtype=np.int32)))


@pytest.mark.parametrize(
    "source, message",
    [
        (np.zeros(4, np.uint8), r"the array must be \(H, W\).*got \(4,\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), "one picture at a time"),
        (np.zeros((4, 4, 2), np.uint8), r"got \(4, 4, 2\)"),
        (np.zeros((3, 40, 50), np.uint8), "channels last"),
        (np.zeros((4, 4), bool), "uint8, uint16 or float.*got bool"),
        (np.zeros((4, 4), np.int64), "got int64"),
        (np.zeros((4, 4), complex), "got complex128"),
        (np.zeros((4, 4), object), "got object"),
        (torch.zeros(4), r"got \(4,\)"),
        (torch.zeros(1, 3, 4, 4), "one picture at a time"),
        (torch.zeros(4, 4, 3), "channels first"),
        (torch.zeros(4, 8, 8), r"got \(4, 8, 8\)"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "uint8 or float in .*got torch.int64"),
        (torch.zeros(3, 4, 4, dtype=torch.bool), "got torch.bool"),
    ],
)
def test_wrong_shapes_and_dtypes(source, message):
    with pytest.raises(ValueError, match=message):
        load_image(source)


@pytest.mark.parametrize("source", [None, 5, b"\x89PNG", [[0, 1]], io.StringIO("text")])
def test_sources_of_no_known_type(source):
    with pytest.raises(TypeError, match=f"source must be a path.*got {type(source).__name__}"):
        load_image(source)


# ---- and back


def test_round_trip_is_exact():
    rgb = random_rgb(64, 48)
    rgb[:, :, 0].flat[:256] = np.arange(256)
    rgb[:, :, 1].flat[:256] = np.arange(256)
    rgb[:, :, 2].flat[:256] = np.arange(256)
    for source in (Image.fromarray(rgb), saved(Image.fromarray(rgb)), rgb):
        picture = to_pil(load_image(source))
        assert picture.mode == "RGB" and (np.asarray(picture) == rgb).all()


def test_to_pil_rounds_to_the_nearest_level():
    values = torch.tensor([0.0, 0.49, 0.51, 99.6, 254.4, 255.0]).view(1, 1, 6).expand(3, 1, 6) / 255
    assert np.asarray(to_pil(values, normalized=False))[0, :, 0].tolist() == [0, 0, 1, 100, 254, 255]
    assert np.asarray(to_pil(normalize(values)))[0, :, 2].tolist() == [0, 0, 1, 100, 254, 255]


def test_to_pil_clips_normalised_values_and_takes_any_float():
    assert np.asarray(to_pil(torch.full((3, 1, 1), 50.0))).tolist() == [[[255, 255, 255]]]
    rgb = random_rgb(8, 8)
    half = np.asarray(to_pil(load_image(rgb).bfloat16().requires_grad_())).astype(int)
    assert np.abs(half - rgb).max() <= 2
    assert (np.asarray(to_pil(load_image(rgb).double())) == rgb).all()


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (3, 0, 4)])
def test_to_pil_refuses_batches_and_nothing(shape):
    with pytest.raises(ValueError, match="one non-empty"):
        to_pil(torch.zeros(shape))


def test_to_pil_refuses_values_that_are_no_picture():
    for bad in (float("nan"), float("inf")):
        for normalized in (True, False):
            with pytest.raises(ValueError, match="NaN or infinite"):
                to_pil(torch.full((3, 2, 2), bad), normalized)
    with pytest.raises(ValueError, match="divide 8-bit values by 255"):
        to_pil(torch.full((3, 2, 2), 200.0), normalized=False)
