"""What the numbers of a picture mean: which values are black and white, and what looks as if they were others.

What can't be right is refused. What can hardly be is warned of; `value_range` settles either.
"""

import numpy as np
import torch

from .logs import warn_caller
from .scales import ROUNDING, guess

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
NORMALISED = "imagenet"  # the value_range of what is ImageNet-normalised already

_BEYOND = 8.0  # ImageNet-normalised pictures lie in [-2.12, 2.64]; Gaussian noise stays below this
_TWICE = 11.5  # what a picture that is normalised twice stays below
_WHITE = 2.7  # more than normalised white
_SAMPLE = 4096  # values looked at one by one
_FEWEST = 4  # different values, for 256 levels to be told from chance


def checked_value_range(value_range, normalised=False):
    """`value_range` as None, or (black, white) as floats; with `normalised` also "imagenet".

    Raises:
        ValueError: it is something else.
    """
    if value_range is None or normalised and isinstance(value_range, str) and value_range == NORMALISED:
        return value_range
    pair = value_range if isinstance(value_range, (tuple, list)) else ()
    if len(pair) != 2 or not all(_is_number(n) for n in pair) or not pair[0] < pair[1]:
        others = f"None or {NORMALISED!r}" if normalised else "or None"
        raise ValueError(f"value_range: need the values of black and white, as (0, 255), {others}, got {value_range!r}")
    return float(pair[0]), float(pair[1])


def _is_number(n):
    return isinstance(n, (int, float, np.integer, np.floating)) and not isinstance(n, bool) and abs(n) < float("inf")


def scaled(values, value_range, name):
    """A floating-point tensor with black and white at `value_range` as one in [0, 1]; what lies beyond is clipped.

    Raises:
        ValueError: values that are not finite, or beyond the range by more than a quarter of it.
    """
    (black, white), (low, high) = value_range, _extremes(values)
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"{name} has NaN or infinite values; replace them (torch.nan_to_num)")
    width = white - black
    if low < black - width / 4 or high > white + width / 4:
        raise ValueError(
            f"value_range: {name} has values from {low:g} to {high:g}, far beyond {black:g} to {white:g}; "
            "give the values that are black and white, and clamp what is meant to lie beyond"
        )
    if low < high < black + width / 64 and not (values == values.round()).all():
        warn_caller(
            f"value_range: {name} has values from {low:g} to {high:g}, nearly black in {black:g} to {white:g}; "
            f"write value_range={guess(low, high)} if these are black and white"
        )
    return ((values - black) / width).clamp(0, 1)


def unit_range(values, name):
    """A floating-point tensor in [0, 1], clipped where it leaves that by rounding, or a ValueError that says more."""
    low, high = _extremes(values)
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"{name} has NaN or infinite values; replace them, pictures hold values in [0, 1]")
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise ValueError(
            f"{name} has values from {low:g} to {high:g}, floating point pictures hold values in [0, 1]: write "
            f"value_range={guess(low, high)} if these are black and white (or divide 8-bit values by 255), clamp what "
            "resizing overshot; already normalised images go to the tensor functions directly"
        )
    return values.clamp(0, 1)


def judge_normalised(image, name="image"):
    """See that a floating-point `image` (..., 3, H, W) can be ImageNet-normalised.

    Raises:
        ValueError: NaN or infinite values, or a range that no normalised picture has.
    """
    low, high = _extremes(image)
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"{name}: holds NaN or infinite values; mend them first (torch.nan_to_num)")
    if low >= -ROUNDING and high > _WHITE or max(-low, high) > _BEYOND or _counts(image, low, high):
        remedy = f"write value_range={guess(low, high)} if these are black and white"
        if low < -_BEYOND and max(-low, high) <= _TWICE:
            remedy = "was it normalised twice? what load_image gives is normalised"
        raise ValueError(
            f"{name}: values from {low:g} to {high:g} are not those of an ImageNet-normalised picture (-2.12 to 2.64): "
            f"{remedy}, value_range='imagenet' if they are meant; load_image normalises"
        )
    looks = _looks(image, low, high)
    if looks is not None:
        warn_caller(
            f"{name}: its values lie in [{looks[0]}, {looks[1]}], as before the ImageNet normalisation: write "
            f"value_range={looks} if these are black and white, value_range='imagenet' if it is normalised"
        )


def _extremes(values):
    low, high = torch.stack(torch.aminmax(values.detach())).tolist()
    return low, high


def _counts(image, low, high):
    """Whether all values are whole numbers, as of an 8-bit picture that is very dark."""
    if low < 0 or high < 3 or high > 255 or high != int(high):
        return False
    some = _some(image)
    return bool((some == some.round()).all())


def _looks(image, low, high):
    """(0, 1) or (-1, 1) where the values look as if they were of that range, else None."""
    unit = low >= -ROUNDING
    if high > 1 + ROUNDING or low < -1 - ROUNDING or high - low < ROUNDING:
        return None
    some = _some(image)
    mean, std = (some.new_tensor(values)[:, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    if _on_levels(some * std + mean, image.dtype):
        return None  # a normalised picture of low contrast
    if _on_levels(some if unit else some * 0.5 + 0.5, image.dtype):
        return (0, 1) if unit else (-1, 1)
    red, _, blue = some.mean(1).tolist()
    if blue - red > 0.2:
        return None  # as of grey after normalisation
    if unit:
        return (0, 1) if low <= 0.15 and high >= 0.85 or low <= 0.05 and high - low >= 0.4 else None
    return (-1, 1) if low <= -0.85 and high >= 0.85 else None


def _some(image):
    """Some pixels of an image (..., 3, H, W): (3, n), float64 on the CPU."""
    pixels = image.detach().movedim(-3, 0).flatten(1)
    step = -(-pixels.shape[1] // _SAMPLE)
    return pixels[:, ::step].to("cpu", torch.float64)


def _on_levels(unit, dtype):
    """Whether values in [0, 1] are those of 8 bits, as exactly as the dtype tells them apart."""
    error = max(255 / 2 * torch.finfo(dtype).eps, 2e-3)
    if error > 0.15:
        return False
    levels = unit * 255
    return bool(((levels - levels.round()).abs() <= error).all()) and len(levels.round().unique()) >= _FEWEST
