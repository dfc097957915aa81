"""Short names for models of the Hugging Face hub, and what is said of a name that is none, or of two things."""

import difflib
import os
from importlib.util import find_spec

from .base import optional_import

_LVD = "facebook/dinov3-{}-pretrain-lvd1689m"
_SAT = "facebook/dinov3-{}-pretrain-sat493m"

# short name: name on the hub
ALIASES = {
    **{
        f"dinov3_{size}": _LVD.format(size)
        for size in ("vits16", "vits16plus", "vitb16", "vitl16", "vith16plus", "vit7b16")
    },
    **{f"dinov3_{size}_sat": _SAT.format(size) for size in ("vitl16", "vit7b16")},
    **{f"dinov3_convnext_{size}": _LVD.format(f"convnext-{size}") for size in ("tiny", "small", "base", "large")},
    **{f"dino_{size}": f"facebook/dino-{size}" for size in ("vits16", "vits8", "vitb16", "vitb8")},
    "siglip_base": "google/siglip-base-patch16-224",
    "siglip_so400m": "google/siglip-so400m-patch14-384",
    "siglip2_base": "google/siglip2-base-patch16-224",
    "siglip2_large": "google/siglip2-large-patch16-256",
    "siglip2_so400m": "google/siglip2-so400m-patch16-384",
    "siglip2_giant": "google/siglip2-giant-opt-patch16-384",
    "clip_vitb32": "openai/clip-vit-base-patch32",
    "clip_vitb16": "openai/clip-vit-base-patch16",
    "clip_vitl14": "openai/clip-vit-large-patch14",
    "clip_vitl14_336": "openai/clip-vit-large-patch14-336",
    "metaclip2_vith14": "facebook/metaclip-2-worldwide-huge-quickgelu",
    "aimv2_large": "apple/aimv2-large-patch14-224",
    "radio_v4": "nvidia/C-RADIOv4-H",
    "radio_v4_so400m": "nvidia/C-RADIOv4-SO400M",
    "sam_vitb": "facebook/sam-vit-base",
    "sam_vitl": "facebook/sam-vit-large",
    "sam_vith": "facebook/sam-vit-huge",
    **{
        f"sam2_hiera_{size}": f"facebook/sam2-hiera-{size.replace('_', '-')}"
        for size in ("tiny", "small", "base_plus", "large")
    },
    "sam2.1_hiera_tiny": "facebook/sam2.1-hiera-tiny",
    "sam3": "facebook/sam3",
    "mae_vitb16": "facebook/vit-mae-base",
    "mae_vitl16": "facebook/vit-mae-large",
    "mae_vith14": "facebook/vit-mae-huge",
    "hiera_tiny": "facebook/hiera-tiny-224-hf",
    "ijepa_vith14": "facebook/ijepa_vith14_1k",
    **{f"pixio_{size}": f"facebook/pixio-{size}" for size in ("vitb16", "vitl16", "vith16")},
    **{
        f"depth_anything_v2_{size}": f"depth-anything/Depth-Anything-V2-{size.capitalize()}-hf"
        for size in ("small", "base", "large")
    },
}
GATED = ("dinov3_", "sam3", "pixio_")  # beginnings of names whose licence is accepted on the hub first


def told(name):
    """Where the model of a short name comes from, in a few words."""
    gated = ", licence to be accepted there" if name.startswith(GATED) else ""
    return f"Hugging Face hub, {ALIASES[name]}{gated}"


def check_alone(name):
    """Refuse a short name that is a folder here as well.

    Raises:
        ValueError: it is; the message says how either is named.
    """
    if name in ALIASES and os.path.isdir(name):
        raise ValueError(
            f"encoder name {name!r} is a folder here and the short name of {ALIASES[name]}: write './{name}' for the "
            f"folder, {ALIASES[name]!r} for the model of the hub"
        )


def unknown(name, known):
    """The sentence about a name that is none of `known`."""
    beginning = [one for one in known if name and one.startswith(name)]
    close = difflib.get_close_matches(name, beginning or known, n=1, cutoff=0 if beginning else 0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    if _is_of_timm(name):
        hint = f"timm has a model of that name: write 'timm:{name}'. "
    return (
        f"unknown encoder name {name!r}; {hint}Known: {', '.join(sorted(known))}; or a Hugging Face vision "
        "model as 'owner/model' or 'hf:FOLDER', 'timm:NAME' of timm, 'package.module:function' of your own"
    )


def _is_of_timm(name):
    if find_spec("timm") is None:
        return False
    return bool(optional_import("timm").list_models(name))
