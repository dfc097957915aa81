"""Masks: the class of each pixel, read from a file; points drawn from it; how far two label maps agree."""

import json

import numpy as np
import torch

from .files import expanded
from .heads import checked_classes

IGNORED = 255  # the usual value of pixels that count for nothing
STRETCH = 1.05  # by which the proportions of a mask and its picture may differ: sides are rounded to patches


def read_mask(path):
    """The values of a mask as they are stored: whole numbers (H, W), of a palette picture its indices.

    Args:
        path: PNG (or what else Pillow reads) with one whole number a pixel: palette, grey of 8 or 16 bits, 1 bit.

    Raises:
        FileNotFoundError: no such file. ValueError: it can't be read, or has colours.
    """
    from PIL import Image

    path = expanded(path)
    if not path.is_file():
        raise FileNotFoundError(f"mask: there is no file {str(path)!r}; check the path")
    try:
        with Image.open(path) as picture:
            mode, values = picture.mode, np.asarray(picture)
    except Exception as error:  # decoders raise anything on damaged files
        raise ValueError(f"mask: {path} cannot be read ({error}); mend or remove it") from error
    if values.ndim != 2 or values.dtype.kind not in "biu":
        raise ValueError(
            f"mask: {path} has the mode {mode}, a mask has one whole number a pixel; write the index of the class as a "
            "palette or grey picture"
        )
    return values.astype(np.int64)


def checked_mask(mask):
    """A mask that is given, a path or anything like an array, as whole numbers (H, W).

    Raises:
        ValueError: other numbers or another shape. FileNotFoundError: a path with nothing there.
    """
    if isinstance(mask, str) or hasattr(mask, "__fspath__"):
        return read_mask(mask)
    values = mask.cpu().numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)
    if values.ndim != 2 or 0 in values.shape or values.dtype.kind not in "biu":
        raise ValueError(f"mask: need whole numbers (H, W), the class of each pixel, got {values.dtype} {values.shape}")
    return values.astype(np.int64)


def check_values(mask, classes=None, ignore=IGNORED):
    """ValueError where a mask (H, W) holds anything but classes in [0, `classes`) and `ignore`."""
    values = np.unique(mask)
    wrong = [int(n) for n in values if n != ignore and (n < 0 or classes is not None and n >= classes)]
    if wrong:
        most = "from 0 up" if classes is None else f"from 0 to {classes - 1}"
        told = "" if ignore is None else f", and {ignore} for pixels that count for nothing"
        raise ValueError(f"mask: classes are numbers {most}{told}; it holds {wrong[:9]}")


def check_proportions(mask, size):
    """ValueError where a mask has other proportions than a picture of `size`, (height, width)."""
    ratio = mask.shape[0] * size[1] / (mask.shape[1] * size[0])
    if max(ratio, 1 / ratio) > STRETCH:
        raise ValueError(
            f"mask: its {mask.shape[0]}x{mask.shape[1]} pixels do not lie on a picture of {size[0]}x{size[1]}"
        )


def drawn_points(mask, most, rng, ignore=IGNORED):
    """Some pixels of every class of a mask.

    Args:
        mask: (H, W). most: pixels of a class. rng: of numpy.

    Returns:
        places (N, 2) in [0, 1], rows first, float64, as `Prepared.at` takes them with align="normalized"; and their
        classes (N,).
    """
    flat = mask.ravel()
    chosen = []
    for label in np.unique(flat):
        if label != ignore:
            found = np.flatnonzero(flat == label)
            chosen.append(found if len(found) <= most else np.sort(rng.choice(found, most, replace=False)))
    chosen = np.concatenate(chosen) if chosen else np.empty(0, np.int64)
    places = np.stack((chosen // mask.shape[1], chosen % mask.shape[1]), 1)
    return (places + 0.5) / np.array(mask.shape), flat[chosen]


def confusion(labels, mask, classes, ignore=IGNORED):
    """How often a pixel of each class (rows) is given each label (columns): (classes, classes), int64.

    Args:
        labels: (H, W), what was found. mask: (H, W), what is true, in which `ignore` counts for nothing.
    """
    labels = labels.cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    counts = mask != ignore
    pairs = mask[counts] * classes + labels[counts].astype(np.int64)
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def ious(counts):
    """Intersection over union of each class of a `confusion`: (classes,), NaN for one that is in neither."""
    hits = np.diag(counts).astype(np.float64)
    union = counts.sum(0) + counts.sum(1) - hits
    return np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)


def read_classes(path):
    """Names of classes: a text file with one a line, or JSON with a list, or with a dict of index to name.

    Raises:
        FileNotFoundError: no such file. ValueError: something else in it.
    """
    path = expanded(path)
    if not path.is_file():
        raise FileNotFoundError(f"classes: there is no file {str(path)!r}; check the path")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            names = json.loads(text)
            if isinstance(names, dict):
                numbers = sorted((int(index), name) for index, name in names.items())
                if [index for index, _ in numbers] != list(range(len(numbers))):
                    raise ValueError(f"the indices must be 0 to {len(numbers) - 1}, got {[n for n, _ in numbers][:9]}")
                names = [name for _, name in numbers]
        else:
            names = [line.strip() for line in text.splitlines() if line.strip()]
        if not isinstance(names, list) or not names:
            raise ValueError("need a list of names, or a dict of index to name")
        return checked_classes(names, len(names))
    except (ValueError, TypeError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"classes: {path} holds no names of classes ({error})") from error
