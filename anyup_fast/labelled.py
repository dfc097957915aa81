"""A folder of pictures with masks: a head fitted to some of them, and judged by the others."""

import logging
import operator
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .api import extract_features, prepare
from .batch.sources import picture_size, read_source, survey
from .fitting import Fit
from .masks import IGNORED, check_proportions, check_values, confusion, ious, read_mask

BLOCK = 32  # side of the blocks of pixels that are held out of a single picture
NONE = -1  # what counts for nothing where every value of a mask counts
TOLD = 5  # seconds between two lines about the progress

logger = logging.getLogger("anyup_fast")


@dataclass(frozen=True)
class Labelled:
    """A picture (`anyup_fast.batch.sources.Source`), the path of its mask, and the greatest class in that."""

    source: object
    mask: Path
    greatest: int


@dataclass(frozen=True, eq=False)
class Judged:
    """What a head does on pixels that it was not fitted to.

    Attributes:
        counts: `anyup_fast.masks.confusion`, summed over pictures. classes: names, or None.
        where: a sentence about these pixels.
    """

    counts: np.ndarray
    classes: tuple | None
    where: str

    @property
    def ious(self):
        """Intersection over union of each class, NaN for one that is neither there nor found."""
        return ious(self.counts)

    @property
    def mean(self):
        """The mean of `ious` over the classes that they have a number for."""
        return float(np.nanmean(self.ious))

    def lines(self):
        """The figures as text, a line for each class."""
        yield f"IoU {self.where}:"
        names = self.classes or [str(n) for n in range(len(self.counts))]
        width = max(map(len, names))
        for name, score in zip(names, self.ious, strict=True):
            yield f"  {name:<{width}}  {'not there' if np.isnan(score) else f'{score:.3f}'}"
        yield f"  {'mean':<{width}}  {self.mean:.3f}"


def find_labelled(pictures, masks, classes=None, ignore=IGNORED):
    """Pictures and their masks, by name: `a/b.jpg` has the mask `a/b.png`.

    Args:
        pictures: folder, glob, list or video, as `anyup_fast.batch.sources.survey` takes them. masks: folder.
        classes: how many there are; None means any. ignore: what counts for nothing, or None.

    Returns:
        (list of `Labelled`, names of the pictures without a mask).

    Raises:
        FileNotFoundError: no folder, or no picture with a mask. ValueError: bad masks; the message names them.
    """
    folder = Path(masks).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"masks: there is no folder {str(folder)!r}; check the path")
    if Path(pictures).expanduser().resolve() == folder.resolve():
        raise ValueError("masks: this is the folder of the pictures; put the masks into one of their own")
    sources, _ = survey(pictures, folder)
    found, bare, faults = [], [], []
    for source in sources:
        path = folder / Path(source.name).with_suffix(".png")
        if not path.is_file():
            bare.append(source.name)
            continue
        greatest = 0
        try:
            mask = read_mask(path)
            check_values(mask, classes, ignore)
            greatest = int(mask.max(initial=0, where=mask != ignore))
            size = picture_size(source)
            if size is not None and mask.shape != size:
                check_proportions(mask, size)
                told = f"{mask.shape[0]}x{mask.shape[1]}", f"{size[0]}x{size[1]}"
                logger.warning("mask %s has %s pixels, its picture %s; it is laid over it", path, *told)
        except (ValueError, OSError) as error:
            told = str(error).removeprefix("mask: ")
            faults.append(told if path.name in told else f"{path.name}: {told}")
        found.append(Labelled(source, path, greatest))
    if not found:
        raise FileNotFoundError(
            f"masks: none of the {len(sources)} pictures has one in {str(folder)!r}; {sources[0].name} would need "
            f"{Path(sources[0].name).with_suffix('.png')}"
        )
    if faults:
        more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise ValueError(f"masks: {len(faults)} of {len(found)} are bad: {'; '.join(faults[:10])}{more}")
    return found, bare


def split(labelled, held_out, seed):
    """(pictures to fit, pictures to judge by), by chance; of a single picture neither holds all: both are it."""
    if isinstance(held_out, bool) or not isinstance(held_out, (int, float)) or not 0 <= held_out < 1:
        raise ValueError(f"held_out: need a share in [0, 1), got {held_out!r}")
    if held_out == 0 or len(labelled) == 1:
        return labelled, labelled if held_out else []
    count = min(len(labelled) - 1, max(1, round(held_out * len(labelled))))
    chosen = set(np.random.default_rng(seed).permutation(len(labelled))[:count].tolist())
    return (
        [one for number, one in enumerate(labelled) if number not in chosen],
        [one for number, one in enumerate(labelled) if number in chosen],
    )


class Folder:
    """Pictures with masks, prepared one at a time.

    Args:
        encoder: loaded. layer, size: as of `anyup_fast.batch.Settings`. weights: of AnyUp, a name, a path or a model.
        dtype: what AnyUp computes in, None as `prepare` has it.
    """

    def __init__(self, encoder, layer=-1, size=448, weights="embedded", dtype=None):
        self.encoder, self.layer, self.size, self.weights, self.dtype = encoder, layer, size, weights, dtype

    def prepared(self, source):
        """`Prepared` of one source.

        Raises:
            ValueError: it can't be read, or the encoder refuses it; the message names it.
        """
        try:
            image, _ = read_source(source, self.size, self.encoder.patch_size)
            image = image.to(self.encoder.device)
            return prepare(
                image, extract_features(image, self.encoder, layer=self.layer), self.weights, dtype=self.dtype
            )
        except Exception as error:  # decoders raise anything on damaged files
            raise ValueError(f"{source.name}: {error}") from error

    def fit(self, labelled, fit, held=None):
        """Give `fit` (an `anyup_fast.fitting.Fit`) each picture and its mask, without pixels that are held out."""
        for one in _told(labelled, "fitted"):
            mask = read_mask(one.mask)
            if held is not None:
                mask = np.where(held, fit.ignore, mask)
            try:
                fit.add(self.prepared(one.source), mask)
            except ValueError as error:
                named = str(error).startswith(one.source.name)
                raise error if named else ValueError(f"{one.source.name}: {error}") from error

    def judge(self, labelled, head, where, ignore, held=None):
        """`Judged`: labels by `head` at the resolution of each mask, against it."""
        classes = len(head.weight)
        counts = np.zeros((classes, classes), np.int64)
        for one in _told(labelled, "judged"):
            mask = read_mask(one.mask)
            labels = self.prepared(one.source).head(head, argmax=True).full(mask.shape)[0]
            shown = mask if held is None else np.where(held, mask, ignore)
            counts += confusion(labels, shown, classes, ignore)
        return Judged(counts, head.classes, where)


def fit_folder(
    labelled, folder, kind="prototype", *, classes=None, held_out=0.2, ignore=IGNORED, samples=256, seed=0, C=1.0
):
    """Fit a head to pictures with masks, and judge it by what was held out.

    Args:
        labelled: of `find_labelled`. folder: `Folder`, which prepares them.
        kind, classes, ignore, samples, seed, C: as of `anyup_fast.fit_head`.
        held_out: share of the pictures that the head is judged by and not fitted to; of a single picture, share of its
            pixels, in blocks of 32 x 32. 0 judges nothing.

    Returns:
        (`Head`, `Judged` or None).

    Raises:
        ValueError: a share that is none, or as `fit_head`.
    """
    ignore = NONE if ignore is None else operator.index(ignore)
    to_fit, to_judge = split(labelled, held_out, seed)
    held, where = None, f"of {len(to_judge)} held-out pictures, {len(to_fit)} were fitted"
    if len(labelled) == 1 and held_out:
        mask = read_mask(labelled[0].mask)
        rows, cols = (-(-n // BLOCK) for n in mask.shape)
        blocks = np.random.default_rng(seed).random((rows, cols)) < held_out
        held = blocks.repeat(BLOCK, 0).repeat(BLOCK, 1)[: mask.shape[0], : mask.shape[1]]
        if not (held & (mask != ignore)).any():
            raise ValueError(f"held_out: {held_out} holds no block of the only picture; give a greater share, or 0")
        where = f"on held-out blocks of {BLOCK}x{BLOCK} pixels of the only picture; expect less of others"
    fit = Fit(kind, classes, folder.encoder, ignore, samples, seed, C)
    folder.fit(to_fit, fit, held)
    head = fit.head(max(one.greatest for one in labelled) + 1)
    return head, folder.judge(to_judge, head, where, ignore, held) if to_judge else None


def _told(labelled, what):
    """The same pictures; every few seconds a line says how many are done."""
    start = time.monotonic()
    for number, one in enumerate(labelled):
        yield one
        if time.monotonic() - start > TOLD:
            start = time.monotonic()
            logger.info("  %d of %d pictures %s", number + 1, len(labelled), what)
