"""A step's batch: crops of cached pictures, with the features of one encoder at two resolutions."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..image import resized
from .augmentations import recoloured
from .config import LEAST_CELLS


@dataclass
class Sample:
    """A batch: guide (B,3,H,W) in [0,1], instances (B,H,W), features (B,C,h,w), target (B,C,h',w')."""

    guide: torch.Tensor
    instances: torch.Tensor
    features: torch.Tensor
    target: torch.Tensor


def draw_sample(cache, rng):
    """A random batch: one encoder, pair of resolutions, crop shape and guide size for all of its pictures."""
    config = cache.config
    spec = config.encoders[rng.integers(len(config.encoders))]
    shares = (1 - config.native_share) / 0.7 * np.array([0.4, 0.15, 0.15])
    low, high = [(2, 1), (4, 1), (4, 2), (1, 1)][rng.choice(4, p=[*shares, config.native_share])]
    batch, guide_pixels = config.batch, config.guide_pixels
    if config.large_share and rng.random() < config.large_share:
        batch, guide_pixels = -(-batch // 4), 4 * guide_pixels
    picked = [cache[int(i)] for i in rng.integers(len(cache), size=batch)]
    grid = picked[0][f"{spec}/{low}"].shape[-1]
    ratio = picked[0][f"{spec}/{high}"].shape[-1] // grid
    cell = config.size // grid
    least = min(LEAST_CELLS, grid)
    cells = rng.integers(least, min(grid, config.max_cells) + 1, size=2)
    dense_cell = math.sqrt(guide_pixels / (cells[0] * cells[1]))
    per_cell = int(np.clip(rng.uniform(0.6, 1.0) * dense_cell, 2, cell))
    shape = tuple(int(n) * per_cell for n in cells)
    colours_change = config.recolour_share and rng.random() < config.recolour_share
    guides, masks, features, targets = [], [], [], []
    for tensors in picked:
        top, left = (int(rng.integers(grid - n + 1)) for n in cells)
        rows, cols = slice(top, top + int(cells[0])), slice(left, left + int(cells[1]))
        window = [slice(s.start * cell, s.stop * cell) for s in (rows, cols)]
        fine = [slice(s.start * ratio, s.stop * ratio) for s in (rows, cols)]
        guide = tensors["image"][:, window[0], window[1]] / 255
        mask = tensors["instances"][window[0], window[1]]
        if colours_change:
            guide = recoloured(guide, mask, rng, config.spot_share)
        guide = resized(guide[None], shape)[0]
        mask = mask[None, None].float()
        mask = F.interpolate(mask, shape, mode="nearest-exact")[0, 0]
        crop = [guide, mask, tensors[f"{spec}/{low}"][:, rows, cols], tensors[f"{spec}/{high}"][:, fine[0], fine[1]]]
        if rng.random() < 0.5:
            crop = [t.flip(-1) for t in crop]
        for parts, part in zip((guides, masks, features, targets), crop, strict=True):
            parts.append(part.float())
    guide, instances, features, target = (torch.stack(parts) for parts in (guides, masks, features, targets))
    return Sample(guide, instances, *_mixed_channels(rng, config.variety_share, features, target))


def _mixed_channels(rng, variety, features, target):
    """Features and target, sometimes as another encoder might have made them.

    In a share `variety` of the steps that is `_as_of_another_encoder`; in half of the others a random rotation, cut
    to a random number of channels.
    """
    channels = features.shape[1]
    if variety and rng.random() < variety:
        features, target = _as_of_another_encoder(rng, features, target)
    elif channels >= 64 and rng.random() < 0.5:
        rotation = _rotation(rng, channels, int(rng.integers(channels // 4, channels + 1)))
        features, target = (torch.einsum("bchw,ck->bkhw", t, rotation) for t in (features, target))
    return features, target


def _as_of_another_encoder(rng, features, target):
    """Rotated to 48 to 768 channels, then rectified or moved away from zero, each channel at a scale of its own.

    Encoders differ in that: some end in a ReLU, some in a normalisation, some have channels that outgrow the rest.
    What is done to each channel is the same for `features` and `target`, and the same in all of their places.
    """
    kept = round(math.exp(rng.uniform(math.log(48), math.log(768))))
    rotation = _rotation(rng, features.shape[1], kept)
    features, target = (torch.einsum("bchw,ck->bkhw", t, rotation) for t in (features, target))
    mean, spread = features.mean((0, 2, 3), keepdim=True), features.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
    scale = np.exp(rng.normal(0, rng.uniform(0, 0.8), (1, kept, 1, 1)))
    if rectified := rng.random() < 0.5:
        shift = rng.uniform(-1.2, 1, (1, kept, 1, 1))
    else:
        shift = rng.normal(0, rng.uniform(0, 2), (1, kept, 1, 1))
    scale, shift = torch.from_numpy(scale).float(), torch.from_numpy(shift).float()
    features, target = ((t - mean) / spread + shift for t in (features, target))
    return tuple(scale * (t.relu() if rectified else t) for t in (features, target))


def _rotation(rng, channels, kept):
    """(channels, kept), with orthonormal columns where that are fewer channels than before, rows where more."""
    rotation, _ = torch.linalg.qr(torch.from_numpy(rng.standard_normal(sorted((channels, kept))[::-1])).float())
    return rotation if kept <= channels else rotation.T
