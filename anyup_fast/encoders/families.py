"""Vision models of transformers as functions of pictures: what some families need, which outputs are layers."""

import inspect
import threading
from contextlib import nullcontext
from types import MethodType

import torch
from torch import nn
from torch.nn import functional as F

_alone = threading.Lock()  # of models that note the size of a picture in their own modules


class Vision(nn.Module):
    """A vision model of transformers: pictures in, what its layers gave out, as it came.

    `forward` returns the hidden states, or () where they were not asked for, and the output: the last map of a neck or
    a backbone where there is one, else `last_hidden_state`.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.takes = frozenset(inspect.signature(model.forward).parameters)
        self.singly = False  # whether pictures go in one by one
        self.positions = _free_sizes(model)
        shifting = any(hasattr(module, "native_shift") for module in model.modules())
        self.notes_sizes = shifting or self.positions is not None or self.kind == "HieraModel"

    @property
    def kind(self):
        """Name of the model's class."""
        return type(self.model).__name__

    def forward(self, image, hidden=True):
        if self.singly and len(image) > 1:
            found = [self(one[None], hidden) for one in image]
            states = [torch.cat(parts) for parts in zip(*(states for states, _ in found), strict=True)]
            return states, torch.cat([last for _, last in found])
        with _alone if self.notes_sizes else nullcontext():
            output = self.model(pixel_values=image, **self._arguments(image, hidden))
        return (_states(output) if hidden else []), self._last(output)

    def _arguments(self, image, hidden):
        config = self.model.config
        arguments = {"output_hidden_states": hidden or self.kind == "HieraModel", "return_dict": True}
        if "interpolate_pos_encoding" in self.takes:
            arguments["interpolate_pos_encoding"] = True
        if self.kind == "ViTMAEModel":
            # nothing is masked, and ascending noise leaves the patches in their order
            count = (image.shape[2] // config.patch_size) * (image.shape[3] // config.patch_size)
            arguments["noise"] = torch.arange(count, device=image.device).expand(len(image), count)
        if self.kind == "HieraModel":
            self._roll_back_to(image.shape[2:])
        if self.positions is not None:
            self.positions.grid = tuple(n // config.patch_size for n in image.shape[2:])
        return arguments

    def _roll_back_to(self, size):
        """Hiera puts its states back in order by a table that is made for the native size; make it for `size`."""
        config, encoder = self.model.config, self.model.encoder
        grid = [n // stride for n, stride in zip(size, config.patch_stride, strict=True)]
        steps = [config.query_stride] * len(config.depths[:-1])
        for stage in range(len(config.depths)):
            encoder.schedule[stage] = steps, grid
            if stage < config.num_query_pool:
                grid = [n // stride for n, stride in zip(grid, config.query_stride, strict=True)]
                steps = steps[1:]

    def _last(self, output):
        config = self.model.config
        if (maps := getattr(output, "fpn_hidden_states", None)) is not None:
            # of the maps of a neck the one that masks are made of: SAM3 says which has the stride of the patches
            scales = list(getattr(config, "scale_factors", ()))
            return maps[scales.index(1.0)] if 1.0 in scales else maps[-1]
        if self.kind == "HieraModel":
            return output.reshaped_hidden_states[-1]
        if getattr(output, "feature_maps", None) is not None:
            return output.feature_maps[-1]
        return getattr(output, "last_hidden_state", None)

    def layers(self, states):
        """Which of `states` are outputs of layers: indices, without what is no layer's output but its input."""
        numbers = list(range(len(states)))
        if len(states) > 1 and states[-1].shape == states[-2].shape and torch.equal(states[-1], states[-2]):
            numbers.pop()
        if self.kind in ("TimmWrapperModel", "TimmBackbone"):
            return numbers
        return numbers if len(numbers) == self._stages() else numbers[1:] or numbers

    def _stages(self):
        config = self.model.config
        for name in ("num_hidden_layers", "depths", "depth", "hidden_sizes"):
            value = getattr(config, name, None)
            if isinstance(value, (list, tuple)):
                return len(value)
            if isinstance(value, int):
                return value
        return None


def _states(output):
    """Hidden states of an output, those in the order of the picture where the model gives both."""
    states = getattr(output, "reshaped_hidden_states", None) or getattr(output, "hidden_states", None) or ()
    flat = []
    for state in states:
        while isinstance(state, (list, tuple)):
            state = state[-1]  # a stage that gives what its blocks gave
        flat.append(state)
    return flat


def _free_sizes(model):
    """Free `model` of ties to its native size that it was written with, not trained with."""
    for module in model.modules():
        if hasattr(module, "set_shift_and_window_size"):
            module.native_shift = module.shift_size
            module.set_shift_and_window_size = MethodType(_shift_for, module)
    if type(model).__name__ == "ViTMAEModel":
        model.config.mask_ratio = 0.0
    embeddings = getattr(model, "embeddings", None)
    if type(embeddings).__name__.startswith("Aimv2") and hasattr(embeddings, "position_embedding"):
        embeddings.position_embedding = Positions(embeddings.position_embedding.weight)
        return embeddings.position_embedding
    return None


def _shift_for(self, size):
    """Swin: no shift where one window covers the grid. Its own method makes the window smaller instead, for good."""
    self.shift_size = 0 if min(size) <= self.window_size else self.native_shift


class Positions(nn.Module):
    """Learned positions of a square grid, interpolated (bicubic) to `grid`."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight
        self.grid = None

    def forward(self, numbers):
        side = round(len(self.weight) ** 0.5)
        if self.grid == (side, side):
            return self.weight[None]
        square = self.weight.T.reshape(1, -1, side, side)
        return F.interpolate(square, self.grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
