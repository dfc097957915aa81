"""`anyup_fast.view`: pictures in, a page out, in which their features are looked at and labelled."""

import logging
import os
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import torch
import torch.nn.functional as F

from .. import __version__
from ..api import extract_features, load_image, prepare
from ..encoders import Encoder, load_encoder
from ..image import to_pil
from ..padded import Padded
from ..prepared import Prepared
from .budget import MAX_BYTES, Budget
from .classes import Classes
from .directions import directions as directions_of
from .directions import views
from .page import Page
from .planes import Levels, floats, lattice, photograph

MOST_DIRECTIONS = 32

_log = logging.getLogger("anyup_fast")


@dataclass
class _Picture:
    name: str
    image: object  # as the verbs take it, or None where it is prepared already
    prepared: Prepared | None = None
    features: torch.Tensor | None = None  # (C, h, w)

    @property
    def shown(self):
        """What is shown: the picture without padding, ImageNet-normalised (3, H, W)."""
        if self.image is not None:
            return self.image.picture if isinstance(self.image, Padded) else self.image
        height, width = self.prepared.output_size
        return self.prepared.image[0, :, :height, :width]


def view(
    pictures,
    *,
    encoder="dinov2_vits14",
    layer=-1,
    weights="embedded",
    size=448,
    fit="stretch",
    value_range=None,
    upright=True,
    prompts=(),
    head=None,
    directions=MOST_DIRECTIONS,
    attention_step=8,
    names=None,
    title=None,
    max_bytes=MAX_BYTES,
    device=None,
    backend=None,
    precision=None,
    dtype=None,
):
    """A page of HTML in which the features of pictures are hovered over, clicked on and labelled.

    The page is one text that needs no server and no network. It holds the features of every picture, at low and at high
    resolution, as their coordinates along `directions` common directions, in 8 bits: with 32, cosines of DINOv2 at
    448x448 are those of the features within 0.003 on average and 0.03 at most, in some 2 MB a picture. What is clicked
    in it is exported as a label map and as a head that `Prepared.head` and the commands take (docs/labelling.md).

    Args:
        pictures: one picture or a list of them: whatever `load_image` reads, or what `prepare` gives for one image
            (encoder, layer, weights, size and what follows from them is settled then). Sizes may differ.
        encoder: a name, or what `load_encoder` or `wrap_encoder` gives.
        layer: of the encoder, -1 is the last.
        weights: of AnyUp, see `upsample_features_with_anyup`.
        size, fit, value_range, upright: see `load_image`; of a padded picture the page shows the picture alone.
        prompts: texts, a similarity each; for encoders that were trained with texts, which are loaded with
            `project=True` where they are named.
        head: class prototypes to start with: a head file, or what `Prepared.head` takes, without bias; nine at most.
        directions: how many the features are held in, 1 to 32; they span prompts and prototypes exactly.
        attention_step: where every so many-th pixel looks is in the page, too; None leaves that out.
        names: of the pictures; None takes those of their files.
        title: of the page; None makes one of the names.
        max_bytes: of the page. A browser holds its text two times while it reads it, and its pictures besides.
        device, backend, precision, dtype: see `upsample_features_with_anyup`.

    Returns:
        `anyup_fast.viewer.page.Page`: `.write(path)`; a notebook shows it.

    Raises:
        ValueError: no pictures, a page that would be larger than `max_bytes` or a browser's canvas (with what would
            fit, before anything is computed), prompts for an encoder without texts, a head of other channels, with a
            bias or more than nine classes, options out of range. TypeError, FileNotFoundError, RuntimeError: as
            `load_image`, `extract_features` and `prepare`.
    """
    pictures, names = _named(pictures, names)
    for option, number, most in (("directions", directions, MOST_DIRECTIONS), ("attention_step", attention_step, None)):
        if number is None and option == "attention_step":
            continue
        if not isinstance(number, Integral) or isinstance(number, bool) or not 1 <= number <= (most or number):
            raise ValueError(f"{option}: need a whole number from 1{f' to {most}' if most else ' on'}, got {number!r}")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    classes = Classes(head)
    if len(prompts) + len(classes.names) > directions:
        raise ValueError(
            f"directions: {directions} can't hold {len(prompts)} prompts and {len(classes.names)} classes; "
            "give more directions or less of these"
        )
    reading = {"size": size, "fit": fit, "value_range": value_range, "upright": upright}
    loaded = None
    if not all(isinstance(one, Prepared) for one in pictures):
        loaded = _encoder(encoder, prompts, device)
    elif prompts:
        raise ValueError("prompts: what is prepared already has no encoder to read them; give the pictures themselves")
    channels = pictures[0].channels if isinstance(pictures[0], Prepared) else loaded.dim
    budget = Budget(max_bytes, min(directions, channels), len(pictures))
    entries = [_read(one, name, reading, loaded, budget) for one, name in zip(pictures, names, strict=True)]

    computing = {"device": device, "backend": backend, "precision": precision, "dtype": dtype}
    for entry in entries:
        _extract(entry, loaded, layer, device, entries[0])
    channels = len(entries[0].features)
    fixed = classes.directions(channels, getattr(loaded, "name", None))
    if prompts:
        fixed = torch.cat([F.normalize(loaded.similarity(prompts).float().cpu(), dim=1), fixed])
    basis = directions_of([entry.features for entry in entries], directions, fixed)
    if not len(basis):
        raise ValueError("pictures: their features are zero everywhere, so that there is nothing to show")
    low = [torch.einsum("kc,chw->khw", basis, entry.features.float().cpu()) for entry in entries]
    colours = views(low, basis)
    stored, taken = [], 0
    for entry, coordinates in zip(entries, low, strict=True):
        prepared = entry.prepared or prepare(entry.image, entry.features, weights, **computing)
        stored.append(_stored(entry, prepared, basis, coordinates, attention_step))
        taken += sum(len(part["image"]) for part in (stored[-1]["high"], stored[-1]["low"])) + len(stored[-1]["photo"])
        _log.info(
            "%s: %dx%d pixels, %d directions, %.1f MB of the page so far",
            entry.name, *entry.shown.shape[1:], len(basis), taken / 1e6,
        )  # fmt: skip
        budget.check(taken, len(stored), *entry.shown.shape[1:])
    seen = (fixed.to(basis) @ basis.T).numpy()
    page = Page(
        {
            "format": 1,
            "title": _text(title)
            if title is not None
            else f"Features of {', '.join(names[:3])}" + " ..." * (len(names) > 3),
            "encoder": getattr(loaded, "name", "") or "",
            "weights": weights if isinstance(weights, str) else type(weights).__name__,
            "version": __version__,
            "channels": channels,
            "directions": len(basis),
            "basis": floats(basis.numpy()),
            "views": [
                {"name": name, "weight": floats(weight), "bias": bias.tolist()}
                for name, (weight, bias) in colours.items()
            ],
            "prompts": [
                {"name": _text(prompt), "weight": floats(row)}
                for prompt, row in zip(prompts, seen[: len(prompts)], strict=True)
            ],
            "classes": [
                {"name": _text(name), "weight": floats(row)}
                for name, row in zip(classes.names, seen[len(prompts) :], strict=True)
            ],
            "pictures": stored,
        }
    )
    budget.check(page.size, len(stored), *entries[-1].shown.shape[1:])
    return page


def _named(pictures, names):
    """(list of pictures, list of their names)."""
    pictures = list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]
    if not pictures:
        raise ValueError("pictures: need at least one, got none")
    if names is None:
        names = [
            Path(one).name if isinstance(one, (str, os.PathLike)) else f"picture {i + 1}"
            for i, one in enumerate(pictures)
        ]
    names = [names] if isinstance(names, str) else list(names)
    if len(names) != len(pictures) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"names: need a string for each of the {len(pictures)} pictures, got {names!r}")
    return pictures, [_text(name) for name in names]


def _title(names):
    """Of a page with pictures of these names."""
    return f"Features of {', '.join(names[:3])}{' and others' if len(names) > 3 else ''}"


def _text(text):
    """A string that can be written: file names may hold bytes that are no text."""
    return str(text).encode("utf-8", "replace").decode()


def _encoder(encoder, prompts, device):
    """The encoder, in the space of texts where there are prompts."""
    if isinstance(encoder, Encoder):
        if prompts and not hasattr(encoder, "similarity"):
            raise ValueError(
                f"prompts: {encoder.name} gives features that can't be compared with texts; load a CLIP or SigLIP "
                "model with load_encoder(name, project=True)"
            )
        return encoder
    try:
        return load_encoder(encoder, device=device, project=bool(prompts))
    except (ValueError, RuntimeError) as error:
        if str(error).startswith("project: "):
            raise type(error)(f"prompts: {str(error).removeprefix('project: ')}") from error
        raise


def _read(picture, name, reading, encoder, budget):
    """The picture as `_Picture`, its features still missing where it isn't prepared."""
    if isinstance(picture, Prepared):
        if picture.image is None or len(picture.image) != 1 or len(picture.maps) != 1:
            got = "one that is read by rows" if picture.image is None else f"a batch of {len(picture.image)}"
            raise ValueError(f"pictures: what is prepared has to be one image that lies in memory, got {got}")
        entry = _Picture(name, None, picture, picture.maps[0])
    else:
        entry = _Picture(name, load_image(picture, patch_multiple=encoder.patch_size, **reading))
    budget.add(name, *entry.shown.shape[1:])
    return entry


def _extract(entry, encoder, layer, device, first):
    if entry.features is None:
        image = entry.image if device is None else entry.image.to(device)
        entry.features = extract_features(image, encoder, layer=layer)
    if first.features is not None and len(entry.features) != len(first.features):
        raise ValueError(
            f"pictures: {entry.name} has {len(entry.features)} channels, {first.name} {len(first.features)}; one page "
            "takes features of one encoder"
        )


def _stored(entry, prepared, basis, coordinates, attention_step):
    """A picture as the page holds it."""
    height, width = entry.shown.shape[1:]
    levels = Levels(coordinates)
    covered = prepared.image.shape[2:]
    high = prepared.head(basis.to(prepared.maps.device)).full()[0].float()
    return {
        "name": entry.name,
        "height": height,
        "width": width,
        "grid": list(coordinates.shape[1:]),
        "patch": [n / cells for n, cells in zip(covered, coordinates.shape[1:], strict=True)],
        "photo": photograph(to_pil(entry.shown.float().cpu())),
        "high": levels.stored(high),
        "low": levels.stored(coordinates),
        "attention": None if attention_step is None else lattice(prepared, attention_step),
    }
