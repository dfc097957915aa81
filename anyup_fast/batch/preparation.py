"""What a run needs besides its pictures, brought into its folder, and the description of its settings."""

import hashlib
import logging
import os
from pathlib import Path

import numpy as np

from ..checkpoints import locate_checkpoint
from ..files import written_aside
from ..heads import linear_head, load_head
from .colours import Colours
from .sources import file_digest
from .stages import HEAD, PCA, Reader, Upsampler

logger = logging.getLogger("anyup_fast")


def describe(settings, folder, manifest, sources, head, pca, pca_sample, device, overwrite):
    """Bring head and PCA to the folder of a run, and say what its files depend on.

    Returns:
        JSON-able settings, with digests of the weights, the head and the PCA.

    Raises:
        ValueError: the folder holds pictures made with other settings and `overwrite` is not given; a head or PCA that
            is missing, does not fit or is not needed.
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
    content = _head(head, settings, folder)
    if content is not None:
        described["head_sha256"] = hashlib.sha256(content).hexdigest()
    _refuse_others(manifest, described, folder, overwrite)
    if content is not None:
        with written_aside(Path(folder) / HEAD) as aside:
            aside.write_bytes(content)
    if settings.kind == "pca":
        _place_colours(settings, folder, sources, pca, pca_sample, device)
        described["pca_sha256"] = file_digest(Path(folder) / PCA)
        _refuse_others(manifest, described, folder, overwrite)
    elif pca is not None:
        raise ValueError(f"pca: goes with the kind 'pca', got kind={settings.kind!r}")
    return described


def _json(size):
    return list(size) if isinstance(size, tuple) else size


def _refuse_others(manifest, described, folder, overwrite):
    if overwrite:
        return
    done = {record["settings"] for record in manifest.records.values() if record["status"] == "done"}
    for digest in sorted(done):
        then = manifest.settings[digest]
        differing = [key for key in described if then.get(key) != described[key]]
        if differing:
            told = ", ".join(f"{key} {then.get(key)!r} (now {described[key]!r})" for key in differing)
            raise ValueError(
                f"output: {folder} holds pictures made with {told}; overwrite them, or name another folder"
            )


def _head(head, settings, folder):
    """The head as the bytes of a .safetensors file; None where the kind needs none."""
    from safetensors.torch import save

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
    weight, bias = load_head(head) if isinstance(head, (str, os.PathLike)) else linear_head(head)
    tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return save({name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()})


def _place_colours(settings, folder, sources, given, sample, device):
    """Have a PCA that fits the settings in the folder: the given one, the one that is there, or a new one."""
    place = Path(folder) / PCA
    features = {"encoder": settings.encoder, "encoder_weights": settings.encoder_weights, "layer": settings.layer}
    if given is not None:
        colours = Colours.load(given)
        if colours.features != features:
            raise ValueError(f"pca: {given} was fitted to {colours.features}, the run has {features}")
        colours.save(place)
    elif not place.is_file() or Colours.load(place).features != features:
        fit_colours(settings, folder, sources, sample, device, features).save(place)


def fit_colours(settings, folder, sources, sample, device, features):
    """PCA of the low-res features of at most `sample` pictures, spread evenly over the sources."""
    upsampler = Upsampler(settings, folder, device, colours=False)
    reader = Reader(settings, upsampler.encoder.patch_size)
    chosen = np.unique(np.linspace(0, len(sources) - 1, min(sample, len(sources))).round().astype(int))
    logger.info("fitting the PCA to %d pictures", len(chosen))
    maps = []
    for index in chosen:
        picture = reader(sources[index])
        if picture.error is None:
            maps.append(upsampler.features([picture.image])[1][0].cpu())
    return Colours.fit(maps, features)
