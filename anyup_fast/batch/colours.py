"""One PCA over a sample of a data set, so that equal features have equal colours in all of its pictures."""

import json
from dataclasses import dataclass

import numpy as np
import torch

from ..files import written_aside
from ..visualize import principal_axes

TENSORS = ("mean", "axes", "low", "high")
ENDS = (1, 99)  # percentiles of the sample's coordinates that become black and full colour


@dataclass(frozen=True)
class Colours:
    """The axes of a PCA and the ends of the colour scale, float32 tensors.

    Attributes:
        mean: (C,). axes: (3, C); missing ones (C < 3) are zero. low, high: (3,), coordinates of 0 and of 255.
        features: what they were fitted to, name -> setting.
    """

    mean: torch.Tensor
    axes: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    features: dict

    @classmethod
    def fit(cls, maps, features):
        """Fit to an iterable of (C, h, w) with equal C, each map counting the same.

        Raises:
            ValueError: no maps, or values that are not finite.
        """
        maps = dict(enumerate(maps))
        if not maps:
            raise ValueError("pca: there are no features to fit it to")
        mean, axes, _ = principal_axes(maps, 3)
        axes = torch.cat((axes, axes.new_zeros(3 - len(axes), len(mean))))
        tokens = [(axes @ (part.cpu().double().flatten(1) - mean[:, None])).numpy() for part in maps.values()]
        low, high = np.percentile(np.concatenate(tokens, 1), ENDS, axis=1)
        return cls(*(torch.as_tensor(t).float().contiguous() for t in (mean, axes, low, high)), features)

    @classmethod
    def load(cls, path):
        """Read what `save` has written.

        Raises:
            FileNotFoundError: no file. ValueError: something else is in it.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                about = (file.metadata() or {}).get("features", "{}")
        except SafetensorError as error:
            raise ValueError(f"pca: {path} is no .safetensors file ({error})") from error
        if set(tensors) != set(TENSORS) or tuple(tensors["axes"].shape) != (3, len(tensors["mean"])):
            raise ValueError(f"pca: {path} must hold {', '.join(TENSORS)} as a run saves them, got {sorted(tensors)}")
        return cls(**tensors, features=json.loads(about))

    def save(self, path):
        """Write to a .safetensors file."""
        from safetensors.torch import save_file

        with written_aside(path) as aside:
            tensors = {name: getattr(self, name) for name in TENSORS}
            save_file(tensors, aside, {"features": json.dumps(self.features)})

    def head(self, channels):
        """(weight (3, C), bias (3,)) whose outputs are the coordinates.

        Raises:
            ValueError: fitted to another number of channels.
        """
        if channels != len(self.mean):
            raise ValueError(f"pca: was fitted to {len(self.mean)} channels, the features have {channels}")
        return self.axes, -self.axes @ self.mean

    def paint(self, coordinates):
        """Coordinates (B, 3, H, W) -> uint8 (B, H, W, 3). An axis along which nothing varies is half grey."""
        low, high = (ends.to(coordinates.device).view(3, 1, 1) for ends in (self.low, self.high))
        varies = high > low
        shares = (coordinates - low) / torch.where(varies, high - low, 1)
        shares = torch.where(varies, shares.clamp(0, 1), 0.5)
        return (shares * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
