"""What a training learns from: its pictures and their features, computed once and kept on disk."""

import hashlib
import json
import logging
import re

import numpy as np
import torch

from ..files import expanded, written_aside
from ..image import normalize, resized
from .composites import composite, find_pictures
from .config import SHRINKS

logger = logging.getLogger("anyup_fast")


class TargetCache:
    """Training pictures with the features of each encoder at three sizes, computed once and kept on disk.

    `cache[i]` gives the tensors of picture i: `image` uint8 (3, S, S), `instances` uint8 (S, S), and for each encoder
    `<encoder>/4`, `/2`, `/1`, float16 (C, h, w): features of the picture at S/4, S/2 and S.
    """

    def __init__(self, folder, config):
        of_pictures = ("held_out", "encoders", "size", "plain_share", "crop", "shapes_share", "seed")
        settings = {key: getattr(config, key) for key in of_pictures} | {"encoders": sorted(set(config.encoders))}
        if config.camouflage_share:  # without it the folder's name stays what it was before there was such a share
            settings["camouflage_share"] = config.camouflage_share
        pictures = find_pictures(config.scenes, config.stamps, held_out=False if config.held_out else None)
        names = [path.name for path in pictures.scenes + pictures.stamps]
        digest = hashlib.sha256(json.dumps([settings, names]).encode()).hexdigest()[:12]
        self.folder = expanded(folder) / f"targets-{digest}"
        self.config, self.pictures = config, pictures

    def __len__(self):
        return self.config.pictures

    def path(self, index):
        """File of picture `index`."""
        return self.folder / f"{index:06}.safetensors"

    def __getitem__(self, index):
        from safetensors.torch import load_file

        return load_file(self.path(index))

    def fill(self, progress=iter):
        """Compute what is missing; interrupted, it goes on where it stopped.

        Raises:
            ValueError: an unknown encoder or layer, a size that its patches do not divide (both before anything is
                computed), a picture that cannot be used, a folder filled from other pictures of the same names.
            RuntimeError: an encoder's weights are missing.
        """
        record = self.folder / "pictures.json"
        sizes = json.dumps([path.stat().st_size for path in self.pictures.scenes + self.pictures.stamps])
        if record.exists() and record.read_text() != sizes:
            raise ValueError(f"cache: {self.folder} was filled from other pictures of the same names; remove it")
        missing = [index for index in range(len(self)) if not self.path(index).exists()]
        if not missing:
            return
        from ..encoders import load_encoder

        names = dict.fromkeys(name_and_layer(spec)[0] for spec in self.config.encoders)
        loaded = {name: load_encoder(name) for name in names}
        encoders = {spec: loaded[name_and_layer(spec)[0]] for spec in self.config.encoders}
        size = self.config.size
        for spec, encoder in encoders.items():
            unit = max(SHRINKS) * encoder.patch_size
            if size % unit:
                nearest = max(unit, round(size / unit) * unit)
                raise ValueError(f"size: {spec} needs a multiple of {unit} pixels, got {size}; nearest is {nearest}")
            if not 1 <= abs(name_and_layer(spec)[1]) <= encoder.num_layers:
                raise ValueError(f"encoders: {spec} must name a layer from 1 to {encoder.num_layers}, or its negative")
            logger.info("targets: %s from %s", spec, encoder.source)
        with written_aside(record) as aside:
            aside.write_text(sizes)
        for index in progress(missing):
            self._compute(index, encoders)

    @torch.no_grad()
    def _compute(self, index, encoders):
        from safetensors.torch import save_file

        config = self.config
        rng = np.random.default_rng((config.seed, index))
        plain = rng.random() < config.plain_share or not self.pictures.stamps
        stamps = (0, 0) if plain else (1, 5)
        shares = {"shapes": config.shapes_share, "camouflage": config.camouflage_share}
        picture, instances = composite(self.pictures, rng, config.size, stamps, crop=config.crop, **shares)
        image = torch.from_numpy(picture).permute(2, 0, 1).contiguous()
        tensors = {"image": image, "instances": torch.from_numpy(instances)}
        for shrink in SHRINKS:
            small = normalize(resized(image[None] / 255, (config.size // shrink,) * 2))
            for encoder in dict.fromkeys(encoders.values()):
                specs = [spec for spec in encoders if encoders[spec] is encoder]
                features = encoder.of_layers(small, [name_and_layer(spec)[1] for spec in specs])
                tensors |= {f"{spec}/{shrink}": f[0].half() for spec, f in zip(specs, features, strict=True)}
        with written_aside(self.path(index)) as aside:
            save_file(tensors, aside)


def name_and_layer(spec):
    """ "name:layer" -> (name, layer); the layer is -1 where none is given."""
    name, layer = re.fullmatch(r"(.*?)(?::(-?\d+))?", spec).groups()
    return name, int(layer or -1)
