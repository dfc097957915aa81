"""Models of timm, by `forward_intermediates`."""

import difflib
import inspect
import re
from pathlib import Path

import torch

from ..files import expanded
from .base import IMAGENET_MEAN, IMAGENET_STD, Encoder, optional_import
from .layout import PROBE_BATCH, as_map, find_layout, probe_sizes

TIMM = "1.0.22"  # the oldest whose networks can be described without being made
PREFIXES = ("timm:", "timm/")
REMEDY = "pip install 'anyup-fast[timm]'"
# What makes a model take pictures of any size, where its class knows it.
ANY_SIZE = {"dynamic_img_size": True, "strict_img_size": False}
NO_NORM = ("Hiera", "HieraDet")  # classes whose inner maps timm refuses to normalise


class TimmEncoder(Encoder):
    """A model of timm: layer k is the k-th of `forward_intermediates` (blocks of a ViT, stages of other networks).

    `layer=-1` has the model's final norm where there is one that maps take; the layers before are as they are. Class
    and register tokens are left out. Inner layers of networks in stages have their own strides and channels.

    Attributes:
        native_size: (height, width) that the model was trained at.
        layouts: for each layer, how it lies.
    """

    def __init__(self, name, model, *, layouts, native_size, **attributes):
        super().__init__(name, dim=layouts[-1].channels, num_layers=len(layouts), **attributes)
        self.model, self.layouts, self.native_size = model, layouts, native_size

    def features_of_layers(self, image, layers):
        found = _run(self.model, image, sorted(set(layers)), self.num_layers)
        return [
            as_map(found[layer], self.layouts[layer - 1], tuple(image.shape[2:]), batch=len(image), name=self.name)
            for layer in layers
        ]

    def features(self, image, layer):
        return self.features_of_layers(image, (layer,))[0]


def load(name, weights="auto"):
    """Load a model of timm.

    It is run on noise once, at three sizes that are not square, so that layers, strides and channels are what it gives.

    Args:
        name: "timm:NAME" or "timm/NAME", NAME as timm has it ("vit_small_patch16_224.augreg_in21k"), or
            "hf-hub:owner/model" of a repository of timm's format.
        weights: "auto" (timm's own, from the hub or its cache), "random" (none, for trials), or a local file.

    Returns:
        Encoder on the CPU, in float32.

    Raises:
        ValueError: no such model or `weights`, or a name that is a local folder, too.
        RuntimeError: timm or the weights are not there, or the model takes pictures of one size alone.
    """
    timm = optional_import("timm", REMEDY)
    if _numbers(timm.__version__) < _numbers(TIMM):
        raise RuntimeError(
            f"{name} needs timm {TIMM} or newer, {timm.__version__} is installed: pip install --upgrade timm"
        )
    wanted = name[len(PREFIXES[0]) :]
    if name.startswith("timm/") and Path(name).is_dir():
        raise ValueError(f"{name!r} is a folder here, and names a model of timm: say 'hf:./{name}' or 'timm:{wanted}'")
    weights = "auto" if weights == "auto" else str(expanded(str(weights)))
    if weights not in ("auto", "random") and not Path(weights).is_file():
        raise ValueError(f"weights must be 'auto', 'random' or an existing file for {name}, got {weights!r}")
    _check_name(timm, wanted)
    model = _made(timm, name, wanted, weights)
    config = model.pretrained_cfg
    mean, std = (config.get(key, usual) for key, usual in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)))
    where = {"auto": f"weights from {_origin(config)}", "random": "RANDOM weights, for trials"}.get(weights, weights)
    patch, layouts = _measured(model, name)
    return TimmEncoder(
        name,
        model,
        source=f"timm {wanted} ({timm.__version__}): {where} (mean {list(mean)}, std {list(std)})",
        patch_size=patch,
        layouts=layouts,
        native_size=tuple(config.get("input_size", (3, None, None))[1:]),
        mean=mean,
        std=std,
    )


def _check_name(timm, wanted):
    if wanted.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return
    architecture, _, tag = wanted.partition(".")
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()"
        raise ValueError(f"timm {timm.__version__} has no model {architecture!r}; {hint} Newer ones need a newer timm")
    if tag and wanted not in timm.list_pretrained(f"{architecture}.*"):
        tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
        raise ValueError(f"timm {timm.__version__} has no weights {tag!r} of {architecture}; it has {', '.join(tags)}")


def _made(timm, name, wanted, weights):
    """The model in eval mode, for pictures of any size, without its classifier."""
    arguments = {"pretrained": weights != "random", "num_classes": 0}
    if weights not in ("auto", "random"):
        own = {} if weights.endswith(".npz") else {"custom_load": False}  # older timm reads all files of some as .npz
        arguments["pretrained_cfg_overlay"] = {"file": weights, **own}
    try:
        with torch.device("meta"):
            kind = type(timm.create_model(wanted, num_classes=0))
    except NotImplementedError as error:
        raise RuntimeError(
            f"{name} can't be described by timm {timm.__version__} without being made ({_first(error)}): "
            "pip install --upgrade timm"
        ) from error
    arguments |= any_size(kind)
    if not hasattr(kind, "forward_intermediates"):
        raise RuntimeError(
            f"{name}: {kind.__name__} of timm {timm.__version__} gives no inner maps; pip install --upgrade timm"
        )
    try:
        return timm.create_model(wanted, **arguments).float().eval()
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise RuntimeError(
            f"{name} could not be loaded ({_first(error)}); it needs network access or a filled local cache, a file as "
            "weights=..., or weights='random' for a trial without"
        ) from error


def any_size(kind):
    """Arguments with which a class of timm makes a model that takes pictures of any size, as far as it knows them."""
    known = {key for base in kind.__mro__ for key in inspect.signature(base.__init__).parameters}
    return {key: value for key, value in ANY_SIZE.items() if key in known}


def _origin(config):
    return config.get("hf_hub_id") or config.get("url") or config.get("file") or "timm"


def _run(model, image, layers, last):
    """Layer -> its output; `last` is the number of layers."""
    inner, found = [layer for layer in layers if layer != last], {}
    final = type(model).__name__ not in NO_NORM
    for some, norm in ((inner, False), ([last] if last in layers else [], final)):
        if some:
            indices = [layer - 1 for layer in some]
            maps = model.forward_intermediates(
                image, indices=indices, norm=norm, stop_early=True, intermediates_only=True
            )
            found |= zip(some, maps, strict=True)
    return found


def _measured(model, name):
    """The multiple that sides must have, and the layout of every layer."""
    info = getattr(model, "feature_info", None)
    info = getattr(info, "info", info)
    if not info:
        raise RuntimeError(f"{name}: {type(model).__name__} gives no maps; take another model of timm")
    unit, count, size = max(one["reduction"] for one in info), len(info), model.pretrained_cfg.get("input_size")
    sizes, runs = probe_sizes(unit), []
    with torch.no_grad():
        for height, width in sizes:
            image = torch.randn(PROBE_BATCH, 3, height, width, generator=torch.Generator().manual_seed(0))
            try:
                runs.append(_run(model, image, range(1, count + 1), count))
            except (RuntimeError, AssertionError, ValueError) as error:
                raise RuntimeError(
                    f"{name}: {type(model).__name__} takes pictures of its own size, {size}, or of few others, not of "
                    f"{height}x{width} ({_first(error)}); take a model for any size, a ViT, Swin or ConvNeXt, say"
                ) from error
    layouts = [
        find_layout([run[layer] for run in runs], sizes, PROBE_BATCH, name=f"{name}, layer {layer}")
        for layer in range(1, count + 1)
    ]
    return unit, layouts


def _numbers(version):
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def _first(error):
    return " ".join(str(error).split())[:300] or type(error).__name__
