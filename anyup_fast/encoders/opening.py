"""The part of a saved model of transformers that sees pictures, whatever it was saved with."""

import inspect
from importlib import import_module

import torch

from .base import newer, optional_import, read_pretrained

# what models of several parts call the one that sees pictures; heads over a backbone call it so
PARTS = ("vision_model", "image_model", "vision_tower", "visual", "vision_encoder", "vision_backbone", "backbone")
# what may be missing: it serves training, or what is drawn from the features of the whole picture
SPARE = ("pooler", "mask_token", "attn_pool", ".head.", "summary", "num_batches_tracked")


def open_model(place, ways):
    """Load the vision model at `place`: alone where it can be, else out of the whole that it was saved in.

    Returns:
        nn.Module of transformers that takes pixel_values, in float32 and eval mode.

    Raises:
        RuntimeError: it cannot be had, takes no pictures, or weights of it are missing.
    """
    transformers = optional_import("transformers")
    whole = read_pretrained(transformers.AutoConfig, place, ways, trust_remote_code=False)
    config = next((found for name in ("vision_config", "image_config") if (found := getattr(whole, name, None))), whole)
    _refuse_by_kind(place, config)
    model, why = None, None
    # Asked of the mapping itself: its keys are all configs of transformers, whose import takes seconds.
    if type(config) in transformers.AutoModel._model_mapping and not _has_backbone(config):
        loader = transformers.AutoModel
        if config.model_type == "timm_wrapper":
            _free_of_one_size(config)
        if config.model_type == "timm_backbone":
            config.use_pretrained_backbone = False  # its weights are in the file, and not at timm
            loader = _Plain(transformers.TimmBackbone)
        model, report = read_pretrained(loader, place, ways, config=config, output_loading_info=True)
        why = _missing(report, "")
    if model is None or why:
        kind = _class_of(transformers, whole)
        if kind is not None and kind is not type(model):
            alone = config is whole and not _has_backbone(config) and "For" not in kind.__name__
            model, why = _out_of_whole(kind, place, ways, whole, alone)
    if model is None:
        raise RuntimeError(
            f"{place}: transformers {transformers.__version__} has no vision model of a {type(config).__name__}"
        )
    if why:
        raise RuntimeError(f"{place} does not hold all the weights of its {type(model).__name__}: {why}{newer(place)}")
    if not _sees(model):
        taken = [*inspect.signature(model.forward).parameters]
        why = (
            "patches cut beforehand; take a model of whole pictures" if "grid_thw" in taken else "it is no vision model"
        )
        raise RuntimeError(f"{place}: {type(model).__name__} takes {taken[0]}, {why}")
    return model.float().eval()


def _free_of_one_size(config):
    """Have a model of timm in its wrapper made so that it takes pictures of any size, where its class can."""
    timm = optional_import("timm", "pip install 'anyup-fast[timm]'")
    from .timm_models import any_size

    given = config.model_args or {}
    with torch.device("meta"):
        kind = type(timm.create_model(config.architecture, pretrained=False, **given))
    config.model_args = {**any_size(kind), **given}


def statistics_in_wrapper(settings):
    """(mean, std) of a model of timm that transformers wraps, as its config says or timm knows it; None of others."""
    name = {"timm_wrapper": "architecture", "timm_backbone": "backbone"}.get(settings.get("model_type"))
    if name is None:
        return None
    given = settings.get("pretrained_cfg") or {}
    if given.get("mean") and given.get("std"):
        return given["mean"], given["std"]
    timm = optional_import("timm", "pip install 'anyup-fast[timm]'")
    known = timm.get_pretrained_cfg(settings[name], allow_unregistered=True)
    return None if known is None else (known.mean, known.std)


class _Plain:
    """A class of transformers whose own `from_pretrained` takes other names than places: read as all others are."""

    def __init__(self, kind):
        self.kind = kind

    def from_pretrained(self, place, **arguments):
        transformers = import_module("transformers")
        return transformers.PreTrainedModel.from_pretrained.__func__(self.kind, place, **arguments)


def _refuse_by_kind(place, config):
    kind = str(config.model_type)
    if kind.startswith("siglip2"):
        raise RuntimeError(
            f"{place}: this SigLIP2 takes more than pixel_values (patches cut beforehand, NaFlex); take its variant "
            "for a fixed size, such as google/siglip2-base-patch16-224"
        )
    if any(getattr(config, name, None) is not None for name in ("tubelet_size", "num_frames", "frames_per_clip")):
        raise RuntimeError(
            f"{place}: {kind} is a video model, which takes clips of frames; take a model of pictures, such as "
            "facebook/dinov2-base, and give it the frames"
        )


def _has_backbone(config):
    """Whether the model is a head over a backbone of another kind."""
    inside = hasattr(config, "fpn_hidden_size") or getattr(config, "is_hybrid", False)
    return getattr(config, "backbone_config", None) is not None and not inside


def _class_of(transformers, config):
    """The class that a model says it was saved from, or None."""
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
        module = import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
        if hasattr(module, name):
            return getattr(module, name)
    return None


def _out_of_whole(kind, place, ways, config, alone):
    whole, report = read_pretrained(kind, place, ways, config=config, output_loading_info=True)
    part = whole if alone and _sees(whole) else _vision_part(whole)
    prefix = next(name for name, module in whole.named_modules() if module is part)
    return part, _missing(report, f"{prefix}." if prefix else "")


def _vision_part(model):
    named = dict(model.named_children())
    for name in PARTS:
        if name in named:
            return named[name] if _sees(named[name]) else _vision_part(named[name])
    base = getattr(model, "base_model", model)
    if base is not model:
        return _vision_part(base)
    inner = [part for name, part in model.named_modules() if name.rpartition(".")[2] in PARTS and _sees(part)]
    backbones = [part for part in model.modules() if type(part).__name__.endswith("Backbone") and _sees(part)]
    return next(iter(inner + backbones), model)


def _sees(model):
    """Whether a module takes pictures, no text, and gives its hidden states."""
    takes = inspect.signature(model.forward).parameters
    gives = "output_hidden_states" in takes or any(taken.kind is taken.VAR_KEYWORD for taken in takes.values())
    return hasattr(model, "config") and "pixel_values" in takes and "input_ids" not in takes and gives


def _missing(report, prefix):
    """What the weights of the part under `prefix` lack; "" if they are whole."""
    missing = sorted(
        key
        for key in report["missing_keys"]
        if key.startswith(prefix) and not any(spare in f".{key}" for spare in SPARE)
    )
    other = [key for key in report["mismatched_keys"] if str(key[0]).startswith(prefix)]
    return f"missing {missing}, other shapes {other}" if missing or other else ""
