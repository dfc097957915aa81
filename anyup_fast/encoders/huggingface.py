"""Vision models of Hugging Face transformers: ViTs, hierarchical or convolutional networks, vision towers."""

import inspect
import logging
import math

import torch

from ..files import expanded
from .base import IMAGENET_MEAN, IMAGENET_STD, Encoder, newer, optional_import, read_pretrained, tokens_to_grid

_log = logging.getLogger("anyup_fast")


class HuggingFaceEncoder(Encoder):
    """A vision model of transformers.

    `layer=-1` is the model's `last_hidden_state`, with the final norm if the model applies one to it; the
    layers before are `hidden_states[1:]` as they are. Class and register tokens are dropped. In hierarchical
    and convolutional models layers differ in stride and channels; `patch_size` and `dim` are the last one's.
    """

    def __init__(self, name, model, *, prefix_tokens, **attributes):
        super().__init__(name, **attributes)
        self.model = model
        self.prefix_tokens = prefix_tokens

    def features(self, image, layer):
        last = layer == self.num_layers
        output = _run(self.model, image, hidden_states=not last)
        maps = output.last_hidden_state if last else output.hidden_states[layer]
        if maps.ndim == 4:
            return maps
        height, width = image.shape[2:]
        tokens = maps[:, self.prefix_tokens :]
        count = tokens.shape[1]
        stride = math.isqrt(height * width // count)
        grid = height // stride, width // stride
        if grid[0] * grid[1] != count or (last and stride != self.patch_size):
            raise RuntimeError(
                f"{self.name} gave {maps.shape[1]} tokens for H = {height}, W = {width}: no grid of patches "
                f"after {self.prefix_tokens} class and register tokens"
            )
        return tokens_to_grid(tokens, grid)


def load(name, weights="auto"):
    """Load a vision model of the Hugging Face hub or of a local folder.

    The model runs once, on an empty picture of its native size, so that stride, channels, layers and class
    tokens are what it really gives.

    Args:
        name: "owner/model", a folder with a "/" in its name, or either after "hf:".
        weights: "auto" only; the name says where they are.

    Returns:
        Encoder on the CPU, in float32.

    Raises:
        ValueError: `weights` is not "auto".
        RuntimeError: the model cannot be had, is no vision model, or its tokens form no grid.
    """
    if str(weights) != "auto":
        raise ValueError(f"weights must be 'auto' for {name}, got {str(weights)!r}; the name says where they are")
    place = name.removeprefix("hf:")
    place = str(expanded(place)) if place.startswith("~") else place
    ways = f"network access or a filled local cache if {place!r} is a model of the hub, else a folder with one"
    transformers = optional_import("transformers")
    config = read_pretrained(transformers.AutoConfig, place, ways, trust_remote_code=False)
    if hasattr(config, "vision_config"):
        config = config.vision_config
    model, report = read_pretrained(transformers.AutoModel, place, ways, config=config, output_loading_info=True)
    kind = type(model).__name__
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key and "mask_token" not in key)
    if missing or report["mismatched_keys"]:
        raise RuntimeError(
            f"{place} does not hold all the weights of its {kind}: missing {missing}, other shapes "
            f"{list(report['mismatched_keys'])}{newer(place)}"
        )
    if model.main_input_name != "pixel_values":
        raise RuntimeError(f"{place}: {kind} takes {model.main_input_name}, it is no vision model")
    mean, std, note = _normalisation(place)
    source = f"{kind} weights from Hugging Face: {place} ({note})"
    model = model.float().eval()
    return HuggingFaceEncoder(name, model, source=source, mean=mean, std=std, **_measure(model, place))


def _run(model, image, hidden_states):
    arguments = {"output_hidden_states": hidden_states}
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        arguments["interpolate_pos_encoding"] = True
    try:
        return model(pixel_values=image, **arguments)
    except ValueError as error:
        size = tuple(image.shape[2:])
        raise ValueError(f"image of size {size} is refused by {type(model).__name__}: {error}") from error
    except TypeError as error:
        if "missing" not in str(error):
            raise
        raise RuntimeError(
            f"{type(model).__name__} takes more than pixel_values ({error}), as models do that want patches cut "
            "beforehand (NaFlex); take its variant for a fixed size"
        ) from error


def _measure(model, place):
    """Run `model` once and return its patch_size, dim, num_layers and prefix_tokens."""
    kind, config = type(model).__name__, model.config
    side = _side(getattr(config, "image_size", None)) or 224
    with torch.no_grad():
        output = _run(model, torch.zeros(1, 3, side, side), hidden_states=True)
    last, hidden = getattr(output, "last_hidden_state", None), getattr(output, "hidden_states", None)
    if last is None or last.ndim not in (3, 4):
        raise RuntimeError(f"{place}: {kind} gives no last_hidden_state of tokens or maps")
    layers = len(hidden) - 1 if hidden else 1
    if last.ndim == 4:
        # a side that the stride does not divide leaves a partial last cell
        stride = -(-side // last.shape[2])
        return {"patch_size": stride, "dim": last.shape[1], "num_layers": layers, "prefix_tokens": 0}
    patch = _side(getattr(config, "patch_size", None))
    if patch is None:
        raise RuntimeError(f"{place}: the config of {kind} names no square patch_size")
    # hierarchical models halve the grid between stages
    stride = patch * 2 ** (len(config.depths) - 1) if hasattr(config, "depths") else patch
    grid = side // stride
    prefix = last.shape[1] - grid**2
    # a class token, a distillation token, registers
    most = 2 + (getattr(config, "num_register_tokens", 0) or 0)
    if not 0 <= prefix <= most:
        raise RuntimeError(
            f"{place}: {kind} gives {last.shape[1]} tokens for {side}x{side} pixels, not {grid}x{grid} "
            f"patches after at most {most} class and register tokens"
        )
    return {"patch_size": stride, "dim": last.shape[2], "num_layers": layers, "prefix_tokens": prefix}


def _side(value):
    """An int as it is, a sequence of equal ints as one of them; else None."""
    if isinstance(value, (list, tuple)) and len(set(value)) == 1:
        value = value[0]
    return value if isinstance(value, int) else None


def _normalisation(place):
    """Return mean and standard deviation for values in [0, 1], and a note on where they come from."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(place)
    except OSError:
        note = "no image processor config: ImageNet mean and std assumed"
        _log.warning("%s: %s", place, note)
        return IMAGENET_MEAN, IMAGENET_STD, note
    if settings.get("rescale_offset"):
        raise RuntimeError(f"{place}: images rescaled with an offset (rescale_offset) are not supported")
    scale = 255 * settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 255
    mean, std = (0.0,) * 3, (1.0,) * 3
    if settings.get("do_normalize", True):
        if not settings.get("image_mean") or not settings.get("image_std"):
            raise RuntimeError(f"{place}: its image processor config names no image_mean and image_std")
        mean, std = settings["image_mean"], settings["image_std"]
    return [m / scale for m in mean], [s / scale for s in std], f"mean {list(mean)}, std {list(std)}"
