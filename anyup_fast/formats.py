"""Which files are pictures: suffixes, formats that packages beside Pillow read, pages."""

import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}  # of the commonest pictures

_NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PALM", "PDF", "WMF"}  # known to Pillow, not drawn by it
_ONE_PICTURE = {"CUR", "ICNS", "ICO", "MPO", "PSD"}  # further parts are no pages: layers, previews, sizes
_SUBFILE = 254  # a TIFF tag: bit 0 says that a page is a smaller copy
_HEIF_BRANDS = {b"heic", b"heim", b"heis", b"heix", b"hevc", b"hevx"}


@cache
def add_openers():
    """Let Pillow read HEIC and JPEG XL where packages for them are installed."""
    for package in ("pillow_heif", "pillow_jxl"):
        if find_spec(package) is None:
            continue
        try:
            module = import_module(package)  # pillow_jxl registers itself
            if package == "pillow_heif":
                module.register_heif_opener()
        except Exception as error:
            warnings.warn(f"{package} can't be used ({error}): its pictures are not read", stacklevel=2)


def picture_suffixes():
    """Suffixes, in lower case, of the files that Pillow reads here as pictures."""
    from PIL import Image

    add_openers()
    Image.init()
    known = Image.registered_extensions()
    return {suffix for suffix, kind in known.items() if kind in Image.OPEN and kind not in _NO_PICTURES} | SUFFIXES


def page_count(image):
    """Pages or frames of an opened PIL image; layers, previews and smaller copies of a page are none.

    A file whose further pages are damaged counts as one.
    """
    try:
        count = 1 if image.format in _ONE_PICTURE else getattr(image, "n_frames", 1)
        if image.format == "TIFF" and count > 1:
            count = sum(_is_page(image, index) for index in range(count))
            image.seek(0)
    except Exception as error:  # whatever a decoder raises
        warnings.warn(f"{image.format}: the pages can't be counted ({error})", stacklevel=2)
        return 1
    return count


def _is_page(image, index):
    image.seek(index)
    return not image.tag_v2.get(_SUBFILE, 0) & 1


def why_unknown(file, error):
    """Why Pillow could not open a binary file, as the end of a sentence."""
    try:
        file.seek(0)
        start = file.read(12)
    except (OSError, ValueError):  # closed, or read once only
        start = b""
    if start[4:8] == b"ftyp" and start[8:] in _HEIF_BRANDS and find_spec("pillow_heif") is None:
        return "is HEIC, which needs a package: pip install pillow-heif"
    return f"is damaged or not a picture that Pillow reads ({error})"
