"""What a run needs besides its pictures, brought into its folder, and the description of its settings."""

import hashlib
import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..checkpoints import locate_checkpoint
from ..files import written_aside
from ..heads import Head, checked_classes, encoded_head, linear_head, read_head
from ..model import AnyUp
from ..plain.memory import forward_memory
from .colours import Colours
from .manifest import settings_digest
from .reading import Reader
from .reasons import gigabytes, memory_of_machine, shown
from .settings import output_size_of
from .sources import file_digest
from .stages import HEAD, PCA, Upsampler

logger = logging.getLogger("anyup_fast")

# Settings that are described where they are not the usual ones.
_OPTIONAL = ("zarr_format", "aspect", "precision", "compute_dtype", "encoder_sha256", "classes")
MANY_PIXELS = 1 << 24  # of an output: fewer are computed on any machine


def describe(settings, folder, manifest, sources, head, pca, pca_sample, overwrite, encoder, decoders, brought=None):
    """Bring head and PCA to the folder of a run, and say what its files depend on.

    Args:
        encoder: gives the encoder when it is called. decoders: gives open `Decoders` when it is called.
        brought: an encoder that has no name to be loaded by; None where it has.

    Returns:
        (settings, with the aspect that the run has been begun with and the head's classes; JSON-able settings, with
        digests of the weights, the head and the PCA).

    Raises:
        ValueError: the folder holds pictures made with other settings and `overwrite` is not given; a head or PCA that
            is missing, does not fit or is not needed; an output that no machine's memory holds.
    """
    described = {
        "kind": settings.kind,
        "format": settings.format,
        "dtype": settings.dtype,
        "encoder": settings.encoder,
        "encoder_weights": settings.encoder_weights,
        "layer": settings.layer,
        "weights_sha256": file_digest(locate_checkpoint(settings.weights)),
        "size": _json(settings.size),
        "output_size": _json(settings.output_size),
    }
    if brought is not None:
        described["encoder_sha256"] = _digest_of(brought)
    if settings.zarr_format != 3:
        described["zarr_format"] = settings.zarr_format
    if settings.precision != "highest":
        described["precision"] = settings.precision
    if settings.compute_dtype != "float32":
        described["compute_dtype"] = settings.compute_dtype
    if settings.kind != "pca" and pca is not None:
        raise ValueError(f"pca: goes with the kind 'pca', got kind={settings.kind!r}")
    head = _head(head, settings, folder)
    outputs, channels = (None, None) if head is None else head.weight.shape
    if head is not None:
        described["head_sha256"] = hashlib.sha256(encoded_head(head, named=False)).hexdigest()
        settings = replace(settings, classes=head.classes)
        if head.classes is not None:
            described["classes"] = list(head.classes)
    settings = _as_begun(settings, described, manifest, folder)
    _refuse_others(manifest, described, folder, overwrite)
    if head is not None:
        if settings.layer == -1 and channels != encoder().dim:
            raise ValueError(
                f"head: it takes {channels} channels, the encoder {settings.encoder} gives {encoder().dim}; give "
                "the head that was trained on these features"
            )
        with written_aside(Path(folder) / HEAD) as aside:
            aside.write_bytes(encoded_head(head))
        if reason := head.why_not_on(settings.encoder):
            logger.warning("%s", shown(reason))
    _refuse_beyond_reason(settings, outputs, encoder)
    if settings.kind == "pca":
        _place_colours(settings, folder, sources, pca, pca_sample, encoder, decoders)
        described["pca_sha256"] = file_digest(Path(folder) / PCA)
        _refuse_others(manifest, described, folder, overwrite)
    return settings, described


def _digest_of(encoder):
    """sha256 of all that an encoder's state dict holds, and of its statistics."""
    digest = hashlib.sha256(repr((encoder.mean, encoder.std, encoder.patch_size)).encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _as_begun(settings, described, manifest, folder):
    """Settings with the aspect ratio that pictures in the folder have, if there are any; noted in `described`."""
    if not isinstance(settings.output_size, int):
        return settings
    former = {**described}
    if settings.kind == "pca" and (Path(folder) / PCA).is_file():
        former["pca_sha256"] = file_digest(Path(folder) / PCA)
    if any(record["settings"] == settings_digest(former) for record in manifest.records.values()):
        return replace(settings, aspect="resized")
    described["aspect"] = settings.aspect
    return settings


def _refuse_beyond_reason(settings, channels, encoder):
    """Raise where the output of one picture, or on a CPU computing it, would take more than the machine's memory."""
    limit = memory_of_machine()
    if settings.output_size is None or settings.kind == "lowres" or limit is None:
        return
    height, width = output_size_of(settings, (1, 1))
    if height * width < MANY_PIXELS:
        return
    encoder = encoder()
    channels = channels or (3 if settings.kind == "pca" else encoder.dim)
    needed = height * width * (1 if settings.kind == "labels" else 4 * channels)
    if encoder.device.type == "cpu":
        dim = AnyUp.from_pretrained(settings.weights).rope.freqs.shape[1]
        shapes = (1, 3, 1, 1), (1, 1 if settings.kind == "labels" else channels, 1, 1), (height, width)
        needed = forward_memory(*shapes, dim, torch.float32, encoder.device, plain=True)
    if needed > limit:
        raise ValueError(
            f"output_size: {_told(settings.output_size)} takes {gigabytes(needed)} of memory for a picture, this "
            f"machine has {gigabytes(limit)}; ask for less, or use the kind 'lowres', which gives any part when asked"
        )


def _told(size):
    return "x".join(map(str, size)) if isinstance(size, tuple) else size


def _json(size):
    return list(size) if isinstance(size, tuple) else size


def _refuse_others(manifest, described, folder, overwrite):
    if overwrite:
        return
    done = {record["settings"] for record in manifest.records.values() if record["status"] == "done"}
    for digest in sorted(done):
        then = manifest.settings[digest]
        differing = [key for key in dict.fromkeys((*described, *_OPTIONAL)) if then.get(key) != described.get(key)]
        if differing:
            told = ", ".join(f"{key} {then.get(key)!r} (now {described.get(key)!r})" for key in differing)
            raise ValueError(
                f"output: {folder} holds pictures made with {told}; overwrite them, or name another folder"
            )


def _head(head, settings, folder):
    """The head as `Head`, with the names of the settings where these have some; None where the kind needs none."""
    if settings.kind not in ("head", "labels"):
        if head is not None:
            raise ValueError(f"head: goes with the kinds 'head' and 'labels', got kind={settings.kind!r}")
        return None
    if head is None and not (Path(folder) / HEAD).is_file():
        raise ValueError(
            f"head: the kind {settings.kind!r} needs one: a .safetensors file with weight (K, C) and bias (K,)"
        )
    if head is None:
        head = Path(folder) / HEAD
    if isinstance(head, (str, os.PathLike)):
        head = read_head(Path(head).expanduser())
    elif not isinstance(head, Head):
        head = Head(*linear_head(head))
    if settings.classes is None:
        return head
    return replace(head, classes=checked_classes(settings.classes, len(head.weight)))


def _place_colours(settings, folder, sources, given, sample, encoder, decoders):
    """Have a PCA that fits the settings in the folder: the given one, the one that is there, or a new one."""
    place = Path(folder) / PCA
    features = {"encoder": settings.encoder, "encoder_weights": settings.encoder_weights, "layer": settings.layer}
    if given is not None:
        colours = Colours.load(Path(given).expanduser())
        if colours.features != features:
            raise ValueError(f"pca: {given} was fitted to {colours.features}, the run has {features}")
        colours.save(place)
    elif not place.is_file() or Colours.load(place).features != features:
        fit_colours(settings, folder, sources, sample, features, encoder(), decoders()).save(place)
    if settings.layer == -1:
        Colours.load(place).head(encoder().dim)  # raises where it does not fit


def fit_colours(settings, folder, sources, sample, features, encoder, decoders):
    """PCA of the low-res features of at most `sample` pictures, spread evenly over the sources.

    Pictures that can't be made are left out. Where none of these can be, all others are tried.

    Raises:
        ValueError: not one picture can be made.
    """
    upsampler = Upsampler(settings, folder, str(encoder.device), colours=False, encoder=encoder)
    decoders.reader = Reader(settings, encoder.patch_size)
    chosen = np.unique(np.linspace(0, len(sources) - 1, min(sample, len(sources))).round().astype(int)).tolist()
    logger.info("fitting the PCA to %d pictures", len(chosen))
    maps, why = [], None
    others = sorted(set(range(len(sources))) - set(chosen))
    for indices in (chosen, *([index] for index in others)):
        if maps:
            break
        for (picture,), _ in decoders.batches([((sources[index],), frozenset()) for index in indices], lambda: None):
            features_of = upsampler.features_of(picture)
            if features_of is None:
                why = why or f"{shown(picture.source.name)}: {picture.error}"
            else:
                maps.append(features_of)
    if not maps:
        raise ValueError(f"pca: there is no picture to fit it to, all {len(sources)} fail; the first, {why}")
    return Colours.fit(maps, features)
