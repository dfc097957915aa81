"""Picture files to arrays: decoding, EXIF orientation, modes. Needs no PyTorch, which is long in starting."""

import io
import os
import re
import struct
import threading
from dataclasses import dataclass

import numpy as np

from .files import expanded
from .formats import add_openers, page_count, why_unknown
from .logs import warn_caller
from .scales import whole_numbers

MAX_PIXELS = 178_956_970  # where Pillow, too, takes a picture for a decompression bomb

_URL = re.compile(r"(https?|ftp|file|s3|gs|hf):/|data:\w+/", re.IGNORECASE)
_ORIENTATION = 0x0112  # EXIF
_UNDONE = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # by orientation: number of Pillow's Transpose that undoes it
_DEEP_GREY = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_pillow_limit = threading.Lock()


@dataclass
class Pixels:
    """A picture that is decoded, and no tensor yet.

    Attributes:
        array: (H, W), or (H, W, C) with 1, 3 or 4 channels, of numbers. name: for messages.
        full: the value of white; None for floats in [0, 1], or where the values of black and white are given.
        white: (H, W) bool, what is transparent of a grey picture; None for nothing.
    """

    array: np.ndarray
    name: str = "the array"
    full: int | None = None
    white: np.ndarray | None = None


def decoded(source, max_pixels=MAX_PIXELS, ranged=False, upright=True):
    """Decode a file or a PIL image.

    Args:
        source, max_pixels, upright: see `image.load_image`.
        ranged: whether the values of black and white are given: then any will do.

    Returns:
        Pixels.

    Raises:
        TypeError, ValueError, FileNotFoundError: as `image.load_image`.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        return _from_pil(source, "the PIL image", max_pixels, ranged, upright)
    if isinstance(source, (str, os.PathLike)):
        path, name = expanded(source), repr(str(source))
        if _URL.match(str(source)):
            raise ValueError(f"source: {name} is a URL, not a path; download it first and pass the path")
        if os.path.isdir(path):
            raise ValueError(f"source: {name} is a folder; pass the path of one picture in it")
        if not os.path.exists(path):
            raise FileNotFoundError(f"source: there is no file {name}; check the path")
        with open(path, "rb") as file:
            opened = _opened(file, name, max_pixels)
            pages = page_count(opened)
            if pages > 1:
                warn_caller(f"{name} has {pages} pages or frames, of which the first is taken")
            return _from_pil(opened, name, max_pixels, ranged, upright)
    if hasattr(source, "read") and not isinstance(source, io.TextIOBase):
        name = f"the file object {getattr(source, 'name', type(source).__name__)!r}"
        return _from_pil(_opened(source, name, max_pixels), name, max_pixels, ranged, upright)
    raise TypeError(
        "source must be a path, a binary file object (opened with 'rb', or io.BytesIO around bytes), "
        f"a PIL image, a numpy array or a torch tensor, got {type(source).__name__}"
    )


def _opened(file, name, max_pixels):
    """The header of a binary file as a lazy PIL image; Pillow's own size limit yields to a higher one."""
    from PIL import Image

    add_openers()
    try:
        if max_pixels is not None and max_pixels <= MAX_PIXELS:
            return Image.open(file)
        with _pillow_limit:
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                return Image.open(file)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"source: {name} is too large for max_pixels={max_pixels} or Pillow's own limit: {error} "
            "Raise max_pixels (None: no limit) if that is intended"
        ) from error
    except Exception as error:
        raise ValueError(f"source: {name} {why_unknown(file, error)}") from error


def _from_pil(image, name, max_pixels, ranged, upright):
    from PIL import ImageOps

    width, height = image.size
    if width == 0 or height == 0:
        raise ValueError(f"source: {name} has no pixels, its size is {width} x {height}")
    refuse_enormous(height, width, max_pixels, f"source: {name}")
    from_16_bit_file = image.format in ("PNG", "PPM")
    try:
        turned = 1 if upright or image.format != "TIFF" else image.getexif().get(_ORIENTATION, 1)
        image.load()
        if turned in _UNDONE and _ORIENTATION not in image.getexif():  # Pillow turns a TIFF while it loads it
            image = image.transpose(_UNDONE[turned])
        try:
            image = ImageOps.exif_transpose(image) if upright else image
        except (SyntaxError, struct.error) as error:
            warn_caller(f"{name}: its EXIF data is unreadable ({error}), orientation unknown")
        if image.mode not in (*_DEEP_GREY, "F"):
            if image.mode == "La":
                image = image.convert("LA")
            see_through = image.mode in ("P", "PA", "LA", "RGBA", "RGBa") or "transparency" in image.info
            image = image.convert("RGBA" if see_through else "RGB")
        array = np.asarray(image)
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"source: {name} (mode {image.mode}) cannot be decoded, it is truncated, damaged or of an "
            f"unsupported kind ({type(error).__name__}: {error})"
        ) from error
    if image.mode not in _DEEP_GREY or ranged:
        known = array.dtype.kind not in "fc" and not ranged
        return Pixels(array, name, full_scale(array, f"source: {name}") if known else None)

    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 65535:
        raise ValueError(
            f"source: {name} (mode {image.mode}) has values from {low} to {high}, not from 0 to 65535; "
            "write value_range, the values of black and white"
        )
    sixteen_bit = image.mode != "I" or from_16_bit_file or high > 255
    white = array == image.info["transparency"] if "transparency" in image.info else None
    array = array.astype(np.uint16 if sixteen_bit else np.uint8)
    return Pixels(array, name, full_scale(array, f"source: {name}"), white)


def full_scale(array, name):
    """The value of white in an array of integers, with a warning where it looks as if it were another.

    Raises:
        ValueError: its type does not tell.
    """
    return whole_numbers(array.dtype.name, int(array.min()), int(array.max()), name, lambda: array)


def refuse_enormous(height, width, max_pixels, name):
    """ValueError where there are more pixels than that."""
    if max_pixels is not None and height * width > max_pixels:
        raise ValueError(
            f"{name} has {width} x {height} = {height * width} pixels, more than max_pixels={max_pixels}; "
            "raise max_pixels (None: no limit) if that is intended"
        )
