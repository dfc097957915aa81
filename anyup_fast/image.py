"""Pictures in, tensors out, and back: decoding, EXIF orientation, modes, resizing, ImageNet statistics.

Every picture becomes float32 RGB in [0, 1] first; compositing and resizing happen there, so that 16-bit and
float pictures keep their precision, and 8-bit ones are rounded only when they are written again.
"""

from numbers import Integral

import numpy as np
import torch
import torch.nn.functional as F

from .formats import SUFFIXES as SUFFIXES
from .padded import padded
from .pixels import MAX_PIXELS as MAX_PIXELS
from .pixels import decoded, full_scale, refuse_enormous
from .ranges import IMAGENET_MEAN, IMAGENET_STD, NORMALISED, checked_value_range, judge_normalised, scaled, unit_range
from .scales import whole_numbers


def normalize(image):
    """Subtract the ImageNet mean and divide by the ImageNet standard deviation, channel by channel.

    Args:
        image: floating point tensor (..., 3, H, W) with values in [0, 1], on any device.

    Returns:
        Tensor of the same shape, dtype and device (float16 and bfloat16 are computed in float32).

    Raises:
        ValueError: `image` is not a floating point tensor (..., 3, H, W).
    """
    wide, mean, std = _with_statistics(image)
    return ((wide - mean) / std).to(image.dtype)


def denormalize(image):
    """Undo `normalize` and clamp the result to [0, 1].

    Args:
        image: ImageNet-normalised floating point tensor (..., 3, H, W), on any device.

    Returns:
        Tensor of the same shape, dtype and device, values in [0, 1] (NaN stays NaN).

    Raises:
        ValueError: `image` is not a floating point tensor (..., 3, H, W).
    """
    wide, mean, std = _with_statistics(image)
    return (wide * std + mean).clamp(0, 1).to(image.dtype)


def normalised(image, value_range, name="image"):
    """An image tensor (..., 3, H, W) as the model takes it: ImageNet-normalised.

    Args:
        image: floating point, or whole numbers (bool too) with a `value_range`.
        value_range: None for what is normalised, and is judged; "imagenet" for the same unjudged; the values of black
            and white, as (0, 255), for what is not.

    Raises:
        ValueError: values that are not finite or can't be normalised ones, an unknown `value_range`.
    """
    value_range = checked_value_range(value_range, normalised=True)
    if value_range is None:
        judge_normalised(image, name)
        return image
    if value_range == NORMALISED:
        if not image.isfinite().all():
            raise ValueError(f"{name}: holds NaN or infinite values; mend them first (torch.nan_to_num)")
        return image
    wide = image.to(torch.promote_types(image.dtype, torch.float32) if image.is_floating_point() else torch.float32)
    unit = normalize(scaled(wide, value_range, name))
    return unit.to(image.dtype) if image.is_floating_point() else unit


def banded(image, value_range, name="image"):
    """An image tensor (..., bands, H, W) of other than three bands: as it is, or from black and white to [0, 1].

    Raises:
        ValueError: values that are not finite or not those of `value_range`, an unknown `value_range`.
    """
    value_range = checked_value_range(value_range, normalised=True)
    if value_range not in (None, NORMALISED):
        wide = torch.promote_types(image.dtype, torch.float32) if image.is_floating_point() else torch.float32
        return scaled(image.to(wide), value_range, name)
    if not image.isfinite().all():
        raise ValueError(f"{name}: holds NaN or infinite values; mend them first (torch.nan_to_num)")
    return image


def load_image(
    source, size=None, patch_multiple=None, *, max_pixels=MAX_PIXELS, value_range=None, upright=True, fit="stretch"
):
    """Read a picture of any common kind as an ImageNet-normalised tensor.

    EXIF orientation is applied (unreadable EXIF data: a warning, and the picture as it is stored). Palette,
    greyscale, CMYK, 1-bit and other modes become RGB; transparent parts are composited over white. 16-bit
    grey pictures are divided by 65535; mode I counts as 16-bit when it comes from a PNG or PPM file or holds
    a value above 255. Pillow decodes 16-bit *colour* files to 8 bits; to keep all 16, read them with another
    library and pass the array. Embedded colour profiles are not applied. Of a file with several pages or frames
    the first is taken, with a warning; of a PIL image, the frame it stands on.

    Resizing, at most one, is bicubic with antialiasing in float32, clamped to [0, 1].

    Args:
        source: one picture, as
            - str or path of a file ("~" is the home folder),
            - binary file object; it is read from its start and left open,
            - PIL image,
            - numpy array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8, uint16 or float in [0, 1],
            - torch tensor (H, W), (1, H, W) or (3, H, W), uint8, uint16 or float in [0, 1];
            arrays and tensors of any other type of number, or bool, with `value_range`.
        size: None keeps the size; an int is the length of the shorter side in pixels, aspect ratio kept;
            (height, width) is taken exactly.
        patch_multiple: when given, both sides are afterwards brought to the nearest multiple of this int
            (upwards from half way, never below one multiple) by resizing, not by cropping; with `fit="pad"` to the
            next one, by padding.
        max_pixels: files and PIL images with more pixels are refused before they are decoded, and so is
            resizing to more; None lifts both limits.
        value_range: (black, white), the values that stand for them, such as (0, 4095) of a camera with 12 bits; what
            lies beyond is clipped. None means the full scale of the type, and a warning where 16-bit values fill but
            the lower 8, 10, 12 or 14 bits.
        upright: apply the EXIF orientation; False leaves the picture as it is stored.
        fit: how the sides become multiples: "stretch" resizes, which changes the proportions a little; "pad" repeats
            the last row and the last column below and on the right.

    Returns:
        Contiguous (3, H, W) float32 tensor, ImageNet-normalised; on the CPU, or on the device of a tensor
        `source`. With `fit="pad"` an `anyup_fast.padded.Padded` around it, which the verbs take as an image, and
        answer for the picture in it.

    Raises:
        FileNotFoundError: there is no file at the path.
        TypeError: `source` is of none of these types.
        ValueError: a URL, a folder, not a picture, a truncated or damaged one, one that is empty or has more
            than `max_pixels`; an array or tensor of another shape or dtype, not finite or outside [0, 1]; a
            `size`, `patch_multiple` or `max_pixels` that is no positive int; a `value_range` that is none, or not
            that of the values; an unknown `fit`, or "pad" without `patch_multiple`.

    Note:
        A program that sets Pillow's process-wide `ImageFile.LOAD_TRUNCATED_IMAGES` gets truncated pictures
        here as everywhere else.
    """
    if size is not None and not _is_positive_int(size):
        if not (isinstance(size, (tuple, list)) and len(size) == 2 and all(map(_is_positive_int, size))):
            raise ValueError(f"size must be None, a positive int or (height, width), got {size!r}")
    for name, value in (("patch_multiple", patch_multiple), ("max_pixels", max_pixels)):
        if value is not None and not _is_positive_int(value):
            raise ValueError(f"{name} must be None or a positive int, got {value!r}")
    if fit not in ("stretch", "pad"):
        raise ValueError(f"fit must be 'stretch' or 'pad', got {fit!r}")
    if fit == "pad" and patch_multiple is None:
        raise ValueError(
            "fit='pad' needs patch_multiple, such as the encoder's patch_size; without it nothing is padded"
        )

    value_range = checked_value_range(value_range)

    if isinstance(source, torch.Tensor):
        picture = _from_tensor(source, value_range)
    elif isinstance(source, np.ndarray):
        picture = _from_array(source, value_range=value_range)
    else:
        pixels = decoded(source, max_pixels, value_range is not None, upright)
        return from_pixels(pixels, size, patch_multiple, max_pixels, value_range, fit)
    return _finished(picture, size, patch_multiple, max_pixels, fit)


def from_pixels(pixels, size=None, patch_multiple=None, max_pixels=MAX_PIXELS, value_range=None, fit="stretch"):
    """What `load_image` makes of a picture whose file is decoded, `pixels.Pixels`."""
    picture = _from_array(pixels.array, pixels.name, value_range, pixels.full)
    if pixels.white is not None:
        picture = picture.masked_fill(torch.from_numpy(pixels.white), 1.0)
    return _finished(picture, size, patch_multiple, max_pixels, fit)


def _finished(picture, size, patch_multiple, max_pixels, fit):
    """(3, H, W) with values in [0, 1] resized and normalised."""
    target = target_size(picture.shape[1:], size, patch_multiple if fit == "stretch" else None)
    if target != picture.shape[1:]:
        name = f"size={size!r}, patch_multiple={patch_multiple!r}: the resized picture"
        refuse_enormous(*target, max_pixels, name)
        picture = resized(picture[None], target)[0]
    picture = normalize(picture).contiguous()
    return padded(picture, int(patch_multiple)) if fit == "pad" else picture


def resized(images, size):
    """Images (B, 3, H, W) with values in [0, 1] at `size`, (height, width): bicubic, antialiased, clamped to [0, 1]."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def to_pil(image, normalized=True):
    """Turn an image tensor into a PIL picture, every value rounded to the nearest of 256 levels.

    Args:
        image: floating point tensor (3, H, W), on any device.
        normalized: True for ImageNet-normalised values (what falls outside [0, 1] is clipped), False for
            values in [0, 1].

    Returns:
        PIL.Image.Image of mode RGB. `to_pil(load_image(picture))` equals an 8-bit RGB picture exactly.

    Raises:
        ValueError: `image` is not a floating point (3, H, W) tensor, is empty, has NaN or infinity, or leaves
            [0, 1] with `normalized=False`.
    """
    from PIL import Image

    _check_float_image(image)
    if image.dim() != 3 or image.numel() == 0:
        raise ValueError(f"image must be one non-empty (3, H, W) tensor, got {tuple(image.shape)}")
    image = image.detach().float()
    if not normalized:
        image = unit_range(image, "image")
    elif image.isfinite().all():
        image = denormalize(image)
    else:
        raise ValueError("image has NaN or infinite values; replace them before making a picture")
    return Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def _check_float_image(image):
    if not isinstance(image, torch.Tensor) or not image.is_floating_point():
        got = image.dtype if isinstance(image, torch.Tensor) else type(image).__name__
        raise ValueError(f"image must be a floating point tensor, got {got}; load_image reads other sources")
    if image.dim() < 3 or image.shape[-3] != 3:
        raise ValueError(f"image must have the shape (..., 3, H, W), got {tuple(image.shape)}")


def _with_statistics(image):
    _check_float_image(image)
    wide = image.to(torch.promote_types(image.dtype, torch.float32))
    mean, std = (wide.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return wide, mean, std


def _is_positive_int(value):
    return isinstance(value, Integral) and not isinstance(value, bool) and value > 0


def target_size(shape, size, patch_multiple):
    """(H, W) that `load_image` gives a picture of `shape` (H, W)."""
    height, width = shape
    if isinstance(size, Integral):
        short = min(height, width)
        height, width = (max(1, (2 * side * int(size) + short) // (2 * short)) for side in (height, width))
    elif size is not None:
        height, width = map(int, size)
    if patch_multiple is not None:
        patch = int(patch_multiple)
        height, width = (max(1, (2 * side + patch) // (2 * patch)) * patch for side in (height, width))
    return height, width


def _from_tensor(tensor, value_range):
    if tensor.dim() == 2:
        tensor = tensor[None]
    if tensor.dim() != 3 or tensor.shape[0] not in (1, 3):
        raise ValueError(
            f"source: a tensor must be (3, H, W), (1, H, W) or (H, W), got {tuple(tensor.shape)}; "
            "pass one picture at a time (tensor[0]), channels first (permute(2, 0, 1) turns (H, W, 3) into it), "
            "without alpha (tensor[:3])"
        )
    if tensor.numel() == 0:
        raise ValueError(f"source: the tensor has no pixels, its shape is {tuple(tensor.shape)}")
    name = "source: the tensor"
    if tensor.is_complex():
        raise ValueError(f"{name} must be uint8, uint16 or float in [0, 1], got {tensor.dtype}; take its abs()")
    values = tensor.float()
    if value_range is not None:
        picture = scaled(values, value_range, name)
    elif tensor.is_floating_point():
        picture = unit_range(values, name)
    else:
        low, high = (int(bound) for bound in values.aminmax())
        full = whole_numbers(str(tensor.dtype), low, high, name, lambda: values.cpu().numpy().astype(np.int64))
        picture = values / full
    return picture.expand(3, -1, -1)


def _from_array(array, name="the array", value_range=None, full=None):
    """(H, W[, 1 | 3 | 4]) -> (3, H, W) float32 in [0, 1], alpha over white; `full` is the value of white, if known."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ValueError(
            f"source: {name} must be (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {array.shape}; "
            "pass one picture at a time (array[0]), channels last (transpose(1, 2, 0) turns (3, H, W) into it)"
        )
    if array.size == 0:
        raise ValueError(f"source: {name} has no pixels, its shape is {array.shape}")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"source: {name} must be uint8, uint16 or float in [0, 1], got {array.dtype}")
    picture = torch.from_numpy(array.transpose(2, 0, 1).astype(np.float32, order="C"))
    if value_range is not None:
        picture = scaled(picture, value_range, f"source: {name}")
    elif array.dtype.kind == "f":
        picture = unit_range(picture, f"source: {name}")
    else:
        picture = picture.div_(full or full_scale(array, f"source: {name}"))
    if len(picture) == 4:
        alpha = picture[3:]
        picture = picture[:3] * alpha + (1 - alpha)
    return picture.expand(3, -1, -1)
