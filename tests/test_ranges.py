"""What the values and axes of inputs mean: wrong ones are refused or warned of once, right ones stay silent."""

import re
import warnings

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import anyup_fast
from anyup_fast.image import denormalize, load_image, normalize

PHOTO = (np.random.default_rng(0).integers(0, 60, (56, 42, 3)) + np.linspace(0, 195, 56)[:, None, None]).astype(
    np.uint8
)
BYTES = torch.from_numpy(PHOTO).permute(2, 0, 1)
FLAT = torch.tensor([[40.0, 40, 40], [200, 170, 90], [20, 120, 220]]).T.reshape(3, 3, 1).repeat_interleave(20, 1)
FLAT = FLAT.expand(3, 60, 40).contiguous()
FEATURES = torch.randn(8, 4, 3, generator=torch.Generator().manual_seed(0))
CAMERA = np.random.default_rng(1).integers(3, 4090, (40, 50, 3)).astype(np.uint16)
LOW = (PHOTO // 8 + 120).astype(np.uint8)


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    pytest.importorskip("transformers")
    return tiny.encoder_folder(tmp_path_factory.mktemp("encoder"))


def half_size(image):
    return torch.nn.functional.interpolate(image[None].float(), scale_factor=0.5, mode="area")[0]


def said(call):
    """The warnings of a call, in the order in which they came."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(warning.filename == __file__ for warning in caught), "the caller's line is named"
    return [str(warning.message) for warning in caught]


def upsampled(image, model, features=FEATURES, **options):
    return anyup_fast.upsample_features_with_anyup(image, features, weights=model, **options)


# ---- an image tensor that has to be normalised

RIGHT = {
    "photograph": load_image(PHOTO),
    "resized": load_image(PHOTO, 30),
    "float16": load_image(PHOTO).half(),
    "dark": load_image(PHOTO // 8),
    "very dark": load_image(PHOTO // 100),
    "black": load_image(PHOTO * 0),
    "white": load_image(PHOTO * 0 + 255),
    "grey": load_image(PHOTO * 0 + 128),
    "low contrast": load_image(LOW),
    "low contrast, resized": load_image(LOW, 30),
    "between 0 and 1 after normalisation": load_image((PHOTO // 9 + 130).astype(np.uint8)),
    "the same, resized": load_image((PHOTO // 9 + 130).astype(np.uint8), 31),
    "noise": torch.randn(3, 200, 200, generator=torch.Generator().manual_seed(0)),
    "8-bit noise": load_image(np.random.default_rng(2).integers(0, 256, (40, 40, 3), dtype=np.uint8)),
    "zeros": torch.zeros(3, 20, 20),
    "a batch": torch.stack((load_image(PHOTO), load_image(LOW))),
}


@pytest.mark.parametrize("name", RIGHT)
def test_normalised_images_are_taken_in_silence(model, name):
    assert said(lambda: upsampled(RIGHT[name], model)) == []


@pytest.mark.parametrize(
    "image, message",
    [
        (BYTES.float(), r"values from 0 to \d+ .* write value_range=\(0, 255\)"),
        ((BYTES // 40).float(), r"values from 0 to 6 .* write value_range=\(0, 255\)"),
        (half_size(BYTES), r"write value_range=\(0, 255\)"),
        (FLAT, r"values from 20 to 220 .* write value_range=\(0, 255\)"),
        (BYTES.half(), r"write value_range=\(0, 255\)"),
        (torch.from_numpy(CAMERA.astype(np.float32)).permute(2, 0, 1), r"write value_range=\(0, 4095\)"),
        (BYTES * 257.0, r"write value_range=\(0, 65535\)"),
        (BYTES - 120.0, r"values from -120 to \d+ .* value_range='imagenet' if they are meant"),
        (normalize(load_image(PHOTO)), "was it normalised twice"),
    ],
)
def test_values_that_no_normalised_image_has_are_refused(model, image, message):
    with pytest.raises(ValueError, match=f"^image: .*{message}"):
        upsampled(image, model)
    assert said(lambda: upsampled(image, model, value_range="imagenet")) == []


@pytest.mark.parametrize(
    "image, span",
    [
        (BYTES / 255, "0, 1"),
        (FLAT / 255, "0, 1"),
        ((BYTES // 6) / 255, "0, 1"),
        (half_size(BYTES / 255), "0, 1"),
        ((BYTES / 255).half(), "0, 1"),
        ((BYTES / 255).bfloat16(), "0, 1"),
        (denormalize(load_image(PHOTO, 30)), "0, 1"),
        ((BYTES / 255).expand(2, 3, 56, 42), "0, 1"),
        (BYTES / 127.5 - 1, "-1, 1"),
        (FLAT / 127.5 - 1, "-1, 1"),
        (half_size(BYTES / 127.5 - 1), "-1, 1"),
        ((BYTES / 127.5 - 1).double(), "-1, 1"),
    ],
)
def test_values_before_normalisation_are_warned_of(model, image, span):
    (message,) = said(lambda: upsampled(image, model))
    assert f"image: its values lie in [{span}]" in message and f"write value_range=({span})" in message
    pair = tuple(int(n) for n in span.split(","))
    assert said(lambda: upsampled(image, model, value_range=pair)) == []
    assert said(lambda: upsampled(image, model, value_range="imagenet")) == []


def test_a_warning_comes_once_from_a_line():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for scale in (255, 256, 300):
            anyup_fast.upsample_features_with_anyup(BYTES / scale, FEATURES, weights=tiny.model())
    assert len(caught) == 1


@pytest.mark.parametrize(
    "image, value_range",
    [
        (BYTES, (0, 255)),
        (BYTES.float(), (0, 255)),
        (BYTES.to(torch.int16), (0, 255)),
        (BYTES / 255, (0, 1)),
        (BYTES / 127.5 - 1, (-1.0, 1)),
        (BYTES.double(), [0, 255]),
    ],
)
def test_value_range_settles_it_for_every_verb(model, encoder, image, value_range):
    right = load_image(PHOTO)
    given = {"value_range": value_range}

    def close(one, other):
        torch.testing.assert_close(one, other.to(one.dtype), rtol=1e-4, atol=1e-5)

    close(upsampled(image, model, **given), upsampled(right, model))
    close(anyup_fast.extract_features(image, encoder, **given), anyup_fast.extract_features(right, encoder))
    prepared = [
        anyup_fast.prepare(*some, weights=model, **k)
        for some, k in (((image, FEATURES), given), ((right, FEATURES), {}))
    ]
    close(prepared[0].region(3, 4, 9, 8), prepared[1].region(3, 4, 9, 8))
    mask = torch.arange(56 * 42).view(56, 42).remainder(5) == 0
    close(
        upsampled(mask.expand(3, 56, 42), model, value_range=(0, 1)),
        upsampled(load_image(mask.numpy().astype(np.uint8) * 255), model),
    )


@pytest.mark.parametrize(
    "image, value_range, message",
    [
        (BYTES, (0, 1), r"value_range: image has values from 0 to \d+, far beyond 0 to 1"),
        (load_image(PHOTO), (0, 1), "far beyond 0 to 1; .* clamp what is meant to lie beyond"),
        (load_image(PHOTO), (-1, 1), "far beyond -1 to 1"),
        (BYTES, 255, r"value_range: need the values of black and white, as \(0, 255\), None or 'imagenet', got 255"),
        (BYTES, (255, 0), r"got \(255, 0\)"),
        (BYTES, (0, float("nan")), r"value_range: need .* got \(0, nan\)"),
        (BYTES, "unit", "got 'unit'"),
        (BYTES, "imagenet", "image: need a floating-point tensor, got torch.uint8"),
        (BYTES > 9, None, r"got torch.bool; .* \(0, 1\) for a mask"),
    ],
)
def test_a_value_range_that_does_not_fit_is_refused(model, image, value_range, message):
    with pytest.raises(ValueError, match=message):
        upsampled(image, model, value_range=value_range)


@pytest.mark.parametrize("image", [BYTES / 255, load_image(PHOTO), (BYTES / 255).double()])
def test_a_value_range_that_makes_all_black_is_warned_of(model, image):
    (message,) = said(lambda: upsampled(image, model, value_range=(0, 255)))
    assert "nearly black in 0 to 255; write value_range=" in message
    dark = [BYTES // 100, (BYTES // 100).float(), BYTES * 0, BYTES // 20]
    assert [said(lambda: upsampled(one, model, value_range=(0, 255))) for one in dark] == [[]] * 4  # noqa: B023


def test_the_module_says_what_to_write(model):
    for given, message in (
        ((IMAGE, FEATURES[None]), r"image: need 4 dimensions .*; one alone is image\[None\]"),
        ((IMAGE[None], FEATURES), r"features: need 4 dimensions .*; one alone is features\[None\]"),
        ((IMAGE[None].permute(0, 2, 3, 1), FEATURES[None]), r"channels last\? write image.permute\(0, 3, 1, 2\)"),
        ((IMAGE[None, :1], FEATURES[None]), r"one channel\? write image.expand\(-1, 3, -1, -1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*given)


@pytest.mark.parametrize("features", [FEATURES > 0, FEATURES.long(), FEATURES.to(torch.uint8)])
def test_features_that_are_labels_or_masks_are_refused(model, features):
    with pytest.raises(
        ValueError, match=r"features: need a floating-point tensor, got .*; or write features.float\(\)"
    ):
        upsampled(IMAGE, model, features)


def test_the_figure_judges_its_image():
    pytest.importorskip("matplotlib")
    show = anyup_fast.visualize_feature_comparison
    with pytest.raises(ValueError, match=r"image: values from 0 to \d+"):
        show(BYTES.float(), FEATURES, FEATURES)
    assert "its values lie in [0, 1]" in said(lambda: show(BYTES / 255, FEATURES, FEATURES))[0]
    assert said(lambda: show(BYTES, FEATURES, FEATURES, value_range=(0, 255))) == []
    assert (
        said(lambda: show([PHOTO, load_image(PHOTO)], FEATURES.expand(2, 8, 4, 3), FEATURES.expand(2, 8, 4, 3))) == []
    )


# ---- pictures of load_image


def picture_files(folder, array):
    """A 16-bit grey picture as files."""
    for suffix in ("png", "tif"):
        path = folder / f"deep.{suffix}"
        Image.fromarray(array).save(path)
        yield path


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_16_bit_pictures_that_fill_fewer_bits_are_warned_of(tmp_path, bits):
    values = (CAMERA[..., 0] >> (12 - bits) if bits < 12 else CAMERA[..., 0].astype(np.uint16) << (bits - 12)) | 1
    white = (1 << bits) - 1
    expected = torch.from_numpy(values / np.float32(white))
    for source in (
        values,
        np.repeat(values[..., None], 3, 2),
        torch.from_numpy(values),
        *picture_files(tmp_path, values),
    ):
        (message,) = said(lambda: load_image(source))  # noqa: B023
        assert f"fill {bits} bits" in message and f"write value_range=(0, {white})" in message
        got = []
        assert said(lambda: got.append(load_image(source, value_range=(0, white)))) == []  # noqa: B023
        torch.testing.assert_close(denormalize(got[0])[0], expected.float(), rtol=0, atol=1e-6)
        assert said(lambda: load_image(source, value_range=(0, 65535))) == []  # noqa: B023


@pytest.mark.parametrize(
    "array",
    [
        CAMERA * 16,
        PHOTO * np.uint16(257),
        PHOTO // 8 * np.uint16(257),
        CAMERA // 8 * 8,
        CAMERA * 0,
        PHOTO // 8,
        PHOTO * 0,
        PHOTO // 100,
        PHOTO // 8 / 255,
        np.random.default_rng(0).random((20, 20, 3)) * 0.05,
    ],
    ids=["16 bits", "8 bits scaled", "dark", "left justified", "black", "uint8", "black8", "darkest", "float", "faint"],
)
def test_pictures_that_are_merely_dark_are_taken_in_silence(array):
    assert said(lambda: load_image(array)) == []


@pytest.mark.parametrize(
    "source, message",
    [
        (CAMERA.astype(np.int16), r"got int16 with values from \d+ to \d+: write value_range=\(0, 4095\)"),
        (CAMERA.astype(np.int32) - 1000, r"got int32 with values from -\d+ to \d+: write value_range=\(-\d+, \d+\)"),
        (BYTES.long(), r"got torch.int64 with values from 0 to \d+: write value_range=\(0, 255\)"),
        (PHOTO > 99, r"got bool: a mask is no picture; write value_range=\(0, 1\)"),
        (BYTES[0] > 99, r"got torch.bool: a mask"),
        (PHOTO.astype(np.float32), r"values from 0 to \d+, .* write value_range=\(0, 255\)"),
        (PHOTO / 127.5 - 1, r"write value_range=\(-1, 1\)"),
        (load_image(PHOTO), "already normalised images go to the tensor functions directly"),
        (BYTES.permute(1, 2, 0), r"channels first \(permute\(2, 0, 1\)"),
        (BYTES[None], r"one picture at a time \(tensor\[0\]\)"),
        (torch.cat((BYTES, BYTES[:1])), r"without alpha \(tensor\[:3\]\)"),
        (PHOTO.transpose(2, 0, 1), r"transpose\(1, 2, 0\)"),
        (PHOTO[None], r"one picture at a time \(array\[0\]\)"),
    ],
)
def test_other_arrays_are_refused_with_the_line_to_write(source, message):
    with pytest.raises(ValueError, match=message):
        load_image(source)


def test_a_mask_of_bytes_is_warned_of():
    mask = (PHOTO > 99).astype(np.uint8)
    for source in (mask, mask[..., 0], torch.from_numpy(mask[..., 0])):
        (message,) = said(lambda: load_image(source))  # noqa: B023
        assert "write value_range=(0, 1) if it is a mask" in message
        assert said(lambda: load_image(source, value_range=(0, 255))) == []  # noqa: B023
    assert torch.equal(load_image(mask, value_range=(0, 1)), load_image(mask * 255))
    assert torch.equal(load_image(mask > 0, value_range=(0, 1)), load_image(mask * 255))


@pytest.mark.parametrize("kind", [np.int16, np.int32, np.uint32, np.int64, np.float32])
def test_value_range_takes_any_number(kind):
    got = load_image(CAMERA.astype(kind), value_range=(64, 4095))
    expected = ((CAMERA.astype(np.float64) - 64) / 4031).clip(0, 1)
    np.testing.assert_allclose(denormalize(got).permute(1, 2, 0), expected, rtol=0, atol=1e-6)


def test_pictures_read_by_rows_are_judged_as_they_are_read(model):
    def answer(picture, **options):
        return anyup_fast.prepare(picture, FEATURES, weights=model, **options).region(2, 2, 8, 8)

    (message,) = said(lambda: answer(CAMERA | 1))
    assert "fill 12 bits" in message and "value_range=(0, 4095)" in message
    for picture in (CAMERA * 16, PHOTO, PHOTO // 8, PHOTO // 8 * np.uint16(257)):
        assert said(lambda: answer(picture)) == []  # noqa: B023
    expected = answer(CAMERA / np.float32(4095))
    for picture in (CAMERA, CAMERA.astype(np.int16), CAMERA.astype(np.float64)):
        torch.testing.assert_close(answer(picture, value_range=(0, 4095)), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="far beyond 0 to 255"):
        answer(CAMERA, value_range=(0, 255))
    with pytest.raises(ValueError, match="image: .*got int16; give value_range"):
        answer(CAMERA.astype(np.int16))


# ---- the order of the axes

IMAGE = load_image(PHOTO)


@pytest.mark.parametrize(
    "image, message",
    [
        (IMAGE.permute(1, 2, 0), r"got \(56, 42, 3\); channels last\? write image.permute\(2, 0, 1\)"),
        (IMAGE[None].permute(0, 2, 3, 1), r"channels last\? write image.permute\(0, 3, 1, 2\)"),
        (IMAGE[0], r"got \(56, 42\); one channel\? write image.expand\(3, -1, -1\), or load_image"),
        (IMAGE[:1], r"got \(1, 56, 42\); one channel\? write image.expand\(3, -1, -1\)"),
        (IMAGE[None, :1], r"one channel\? write image.expand\(-1, 3, -1, -1\)"),
        (torch.cat((IMAGE, IMAGE[:1])), r"alpha\? write image\[..., :3, :, :\], or load_image"),
        (IMAGE[None, None], r"got \(1, 1, 3, 56, 42\); one batch at a time: image\[0\]"),
    ],
)
def test_axes_of_an_image_are_refused_with_the_line_to_write(model, image, message):
    with pytest.raises(ValueError, match=f"^image: need the shape .*{message}"):
        upsampled(image, model)


@pytest.mark.parametrize(
    "shape, write",
    [
        ((4, 3, 384), "permute(2, 0, 1)"),
        ((2, 4, 3, 64), "permute(0, 3, 1, 2)"),
        ((1, 12, 384), "transpose(1, 2).reshape(1, 384, 4, 3)"),
        ((1, 13, 384), "[:, 1:].transpose(1, 2).reshape(1, 384, 4, 3)"),
        ((1, 17, 384), "[:, 5:].transpose(1, 2).reshape(1, 384, 4, 3)"),
    ],
)
def test_axes_of_features_that_their_shape_gives_away_are_refused(model, shape, write):
    features = torch.randn(shape)
    for verb in (upsampled, lambda image, model, features: anyup_fast.prepare(image, features, model)):
        with pytest.raises(ValueError, match=r"^features: .* are read as .*write features(.*)$") as caught:
            verb(IMAGE, model, features)
    written = str(caught.value).rpartition("write features")[2].lstrip(".")
    assert written == write
    made = eval(f"features{'' if write.startswith('[') else '.'}{written}")  # what it says to write is right
    assert made.shape[-2:] == (4, 3) and said(lambda: upsampled(IMAGE, model, made)) == []


def test_tokens_of_a_batch_are_told_from_a_map(model):
    images = IMAGE[None].expand(2, -1, -1, -1)
    with pytest.raises(ValueError, match=r"write features\[:, 1:\].transpose\(1, 2\).reshape\(2, 384, 4, 3\)$"):
        upsampled(images, model, torch.randn(2, 13, 384))


@pytest.mark.parametrize(
    "shape, message",
    [
        ((7, 5, 384), r"\(7, 5, 384\) are read as 7 channels .* channels last\? write features.permute\(2, 0, 1\)"),
        ((1, 48, 24), r"tokens \(B, N, C\)\? .*write features.transpose\(1, 2\).reshape\(1, 24, 8, 6\)"),
    ],
)
def test_axes_of_features_that_are_unlikely_are_warned_of(model, shape, message):
    (warned,) = said(lambda: upsampled(IMAGE, model, torch.randn(shape)))
    assert warned.startswith("features: ")
    assert re.search(message, warned)


@pytest.mark.parametrize(
    "shape",
    [(384, 4, 3), (2, 384, 4, 3), (1, 4, 3), (3, 56, 42), (16, 16, 16), (4, 4, 4), (5, 8, 3), (7, 1, 1), (4, 4, 6)],
)
def test_features_in_their_order_are_taken_in_silence(model, shape):
    assert said(lambda: upsampled(IMAGE, model, torch.randn(shape))) == []


def test_tokens_in_two_axes_are_refused_with_the_line_to_write(model):
    with pytest.raises(ValueError, match=r"got \(12, 384\); tokens \(N, C\)\? write features.T.reshape\(C, h, w\)"):
        upsampled(IMAGE, model, torch.randn(12, 384))
