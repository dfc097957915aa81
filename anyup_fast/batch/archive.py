"""What a run has made, by name: whole, in part, or (of low-res features) computed when it is asked for."""

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch

from ..checkpoints import locate_checkpoint
from ..checks import checked_box, checked_device, checked_points
from ..model import AnyUp
from . import outputs
from .manifest import NAME, Manifest
from .settings import Settings
from .sources import file_digest
from .stages import unpack_image


def open_archive(output, *, weights=None, device="cpu"):
    """Open what `anyup_fast.batch.run` has made.

    Args:
        output: its folder.
        weights: for low-res features, the weights of AnyUp that they were prepared with; None means where the run found
            them.
        device: where answers are computed.

    Returns:
        Archive: name of a source -> `Answers`, or `anyup_fast.prepared.Prepared` of a run with kind "lowres".

    Raises:
        FileNotFoundError: no manifest there. ValueError: a damaged one.
    """
    folder = Path(output).expanduser()
    if not (folder / NAME).is_file():
        raise FileNotFoundError(f"output: there is no {NAME} in {str(folder)!r}; name the folder of a batch run")
    return Archive(folder, weights, checked_device(device))


class Archive(Mapping):
    """The pictures of a run that are done, by name.

    Attributes:
        folder: of the run. failed: name -> why it was not made.
    """

    def __init__(self, folder, weights, device):
        self.folder, self._weights, self._device = folder, weights, device
        self._manifest = Manifest(folder)
        records = self._manifest.records
        self._done = {name: record for name, record in records.items() if record["status"] == "done"}
        self.failed = {name: record["error"] for name, record in records.items() if record["status"] == "failed"}

    def __len__(self):
        return len(self._done)

    def __iter__(self):
        return iter(sorted(self._done))

    def __getitem__(self, name):
        if name not in self._done:
            reason = f"it failed: {self.failed[name]}" if name in self.failed else "it is not in the manifest"
            raise KeyError(f"{name!r}: {reason}")
        settings = self.settings(name)
        things = outputs.read_back(self.folder, self._done[name]["files"], settings)
        if settings.kind == "lowres":
            image = unpack_image(things["image"][:]).to(self._device)
            state = {part: things[part][:][None] for part in ("key", "norms")}
            return self._model.prepare(image[None], things["features"][:][None].to(self._device), state)
        return Answers(settings, things, self._device)

    def settings(self, name):
        """`Settings` that a picture was made with."""
        known = self._manifest.settings[self._done[name]["settings"]]
        return Settings(**{key: value for key, value in known.items() if key in Settings.__dataclass_fields__})

    def classes(self, name):
        """Names of the outputs of the head that a picture was made with, in order, or None where it had none."""
        return self.settings(name).classes

    def record(self, name):
        """A picture's line in the manifest."""
        return self._done[name]

    def verify(self):
        """Compare every file with its digest; returns the names of those that differ or are missing."""
        return [
            name
            for name in self
            for path, about in self._done[name]["files"].items()
            if outputs.size_on_disk(self.folder / path) != about["bytes"]
            or outputs.folder_digest(self.folder / path)["sha256"] != about["sha256"]
        ]

    @cached_property
    def _model(self):
        (digest,) = {record["settings"] for record in self._done.values()}
        weights = self._manifest.headers[digest]["weights"] if self._weights is None else self._weights
        path = locate_checkpoint(weights)
        if file_digest(path) != self._manifest.settings[digest]["weights_sha256"]:
            raise ValueError(f"weights: {os.fspath(weights)!r} are not those that {self.folder} was made with")
        return AnyUp.from_pretrained(path, device=self._device)


class Answers:
    """What is stored of one picture. Parts are read without the rest.

    Channels come first: features and head outputs (C, H, W), labels (H, W), PCA pictures (3, H, W). int8 is given back
    as float32, within half a step of what was computed (`scale`, a 127th of the channel's greatest value).
    """

    def __init__(self, settings, things, device):
        self._settings, self._device = settings, device
        self._stored = things[settings.storage[0]]
        self._scale = things["scale"][:].to(device) if "scale" in things else None

    @property
    def output_size(self):
        """(H, W)."""
        shape = self._stored.shape
        return tuple(shape[:2] if self._settings.kind == "pca" else shape[-2:])

    def full(self):
        """Everything."""
        return self.region(0, 0, *self.output_size)

    def region(self, top, left, height, width):
        """A rectangle.

        Raises:
            ValueError: it is empty or leaves the output.
        """
        top, left, height, width = checked_box((top, left, height, width), self.output_size)
        rows, cols = slice(top, top + height), slice(left, left + width)
        if self._settings.kind == "pca":
            return self._stored[rows, cols].permute(2, 0, 1).to(self._device)
        if self._settings.kind == "labels":
            return self._stored[rows, cols].to(self._device)
        part = self._stored[:, rows, cols].to(self._device)
        return part if self._scale is None else part.float() * self._scale[:, None, None]

    def at(self, points, align="pixel"):
        """Single pixels, as `Prepared.at` takes them: (N, 2) -> (N, C), of labels (N,)."""
        points = checked_points(torch.as_tensor(points)[None], 1, self.output_size, align)[0]
        return torch.stack([self.region(row, col, 1, 1)[..., 0, 0] for row, col in points.tolist()])


open = open_archive  # as anyup_fast.open
