"""DINOv3 (Siméoni et al., 2025) from the files of its authors: `.pth`, or a checkout of their repository.

On the hub, and in folders of transformers, it is a model like any other; here its state dict gets the names that
transformers gives the same parameters. Either spelling of them, with "model." before the blocks (transformers 5) or
without, is found by asking the model.
"""

import pickle
import re
from pathlib import Path

import torch

from ..files import expanded
from . import huggingface
from .base import IMAGENET_MEAN, IMAGENET_STD, optional_import

SATELLITE_MEAN, SATELLITE_STD = (0.430, 0.411, 0.296), (0.213, 0.156, 0.143)
# name: (channels, blocks, heads, channels inside the MLP, whether it is gated, whether the queries have a bias)
VITS = {
    "dinov3_vits16": (384, 12, 6, 1536, False, True),
    "dinov3_vits16plus": (384, 12, 6, 1536, True, True),
    "dinov3_vitb16": (768, 12, 12, 3072, False, True),
    "dinov3_vitl16": (1024, 24, 16, 4096, False, True),
    "dinov3_vith16plus": (1280, 32, 20, 5120, True, True),
    "dinov3_vit7b16": (4096, 40, 32, 8192, True, False),
}
# name: (channels of the stages, their blocks)
CONVNEXTS = {
    "dinov3_convnext_tiny": ((96, 192, 384, 768), (3, 3, 9, 3)),
    "dinov3_convnext_small": ((96, 192, 384, 768), (3, 3, 27, 3)),
    "dinov3_convnext_base": ((128, 256, 512, 1024), (3, 3, 27, 3)),
    "dinov3_convnext_large": ((192, 384, 768, 1536), (3, 3, 27, 3)),
}

_VIT_NAMES = (
    (r"^(cls_token|mask_token)$", r"embeddings.\1"),
    (r"^storage_tokens$", "embeddings.register_tokens"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"layer.\1.attention.o_proj."),
    (r"^blocks\.(\d+)\.ls([12])\.gamma$", r"layer.\1.layer_scale\2.lambda1"),
    (r"^blocks\.(\d+)\.mlp\.(?:fc1|w2)\.", r"layer.\1.mlp.up_proj."),
    (r"^blocks\.(\d+)\.mlp\.(?:fc2|w3)\.", r"layer.\1.mlp.down_proj."),
    (r"^blocks\.(\d+)\.mlp\.w1\.", r"layer.\1.mlp.gate_proj."),
    (r"^blocks\.(\d+)\.(norm[12])\.", r"layer.\1.\2."),
)
_CONVNEXT_NAMES = (
    (r"^downsample_layers\.(\d+)\.(\d+)\.", r"stages.\1.downsample_layers.\2."),
    (r"^stages\.(\d+)\.(\d+)\.dwconv\.", r"stages.\1.layers.\2.depthwise_conv."),
    (r"^stages\.(\d+)\.(\d+)\.norm\.", r"stages.\1.layers.\2.layer_norm."),
    (r"^stages\.(\d+)\.(\d+)\.pwconv([12])\.", r"stages.\1.layers.\2.pointwise_conv\3."),
    (r"^stages\.(\d+)\.(\d+)\.gamma$", r"stages.\1.layers.\2.gamma"),
    (r"^norm\.", "layer_norm."),
)
# periods of the rotary embedding, which the model computes; norms of small crops in training; the final norm again
_NOT_TAKEN = re.compile(r"^(rope_embed\.periods|local_cls_norm\..*|norms\.3\..*|blocks\.\d+\.attn\.qkv\.bias_mask)$")


def takes(weights):
    """Whether `weights`, as given to `load_encoder`, is a file or a checkout that this module reads."""
    path = expanded(str(weights))
    return path.is_file() or (path / "hubconf.py").is_file()


def load(name, weights):
    """Load a DINOv3 encoder from what its authors publish.

    Args:
        name: such as "dinov3_vits16", "dinov3_vitl16_sat" (satellite pictures) or "dinov3_convnext_tiny".
        weights: a `.pth` file with the state dict; or a folder that is a checkout of the authors' repository (it has a
            hubconf.py): `torch.hub.load(FOLDER, name, source="local")` is called, which runs the code in it and takes
            the weights from where that code finds them.

    Returns:
        Encoder on the CPU, in float32.

    Raises:
        ValueError: no name of a DINOv3 model. RuntimeError: the file holds something else, the checkout can't load it
            (the models for satellite pictures are loaded from files only), or transformers is missing or too old.
    """
    size = name.removesuffix("_sat")
    if size not in VITS and size not in CONVNEXTS:
        raise ValueError(f"weights={str(weights)!r} is a file or checkout of DINOv3, {name!r} none of its models")
    path = expanded(str(weights))
    state = _of_checkout(path, name) if path.is_dir() else _of_file(path)
    model = converted(size, state, path)
    satellite = name.endswith("_sat")
    mean, std = (SATELLITE_MEAN, SATELLITE_STD) if satellite else (IMAGENET_MEAN, IMAGENET_STD)
    kind = "a checkout" if path.is_dir() else "a file of its authors"
    source = f"{name} weights from {kind}: {path}"
    return huggingface.encoder_of(model, name, str(path), source=source, mean=mean, std=std)


def converted(name, state, path):
    """The model of transformers that holds a state dict of the authors, each parameter of it and nothing else.

    Args:
        name: a key of `VITS` or `CONVNEXTS`.
        state: state dict under the authors' names.
        path: where it comes from, for messages.

    Returns:
        DINOv3ViTModel or DINOv3ConvNextModel in float32, eval mode.

    Raises:
        RuntimeError: these are not the weights of this model, or transformers does not know it.
    """
    transformers = optional_import("transformers")
    kind = "DINOv3ViT" if name in VITS else "DINOv3ConvNext"
    if not hasattr(transformers, f"{kind}Config"):
        raise RuntimeError(
            f"{name} needs transformers 4.56 or newer, {transformers.__version__} is installed: "
            "pip install --upgrade transformers"
        )
    try:
        renamed = _vit_state(state) if name in VITS else _renamed(state, _CONVNEXT_NAMES)
    except KeyError as error:
        raise RuntimeError(f"{path} does not hold the weights of {name}: {error.args[0]}") from error
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(_config(transformers, name, kind))
    expected = model.state_dict()
    for key in list(renamed):
        if key not in expected and f"model.{key}" in expected:
            renamed[f"model.{key}"] = renamed.pop(key)
    buffers = [key for key, _ in model.named_buffers() if key not in expected]
    try:
        model.load_state_dict(renamed, strict=True, assign=True)
    except RuntimeError as error:
        raise RuntimeError(f"{path} does not hold the weights of {name}: {' '.join(str(error).split())}") from error
    if buffers:  # computed at the beginning, on no device so far
        _computed_again(model, transformers, name, kind)
    return model.float().eval()


def _config(transformers, name, kind):
    config = getattr(transformers, f"{kind}Config")
    if name in CONVNEXTS:
        channels, blocks = CONVNEXTS[name]
        return config(hidden_sizes=list(channels), depths=list(blocks))
    dim, blocks, heads, inside, gated, bias = VITS[name]
    return config(
        hidden_size=dim,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        intermediate_size=inside,
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
        query_bias=bias,
        key_bias=False,
        value_bias=bias,
        num_register_tokens=4,
        layer_norm_eps=1e-5,
        rope_theta=100.0,
        image_size=224,
        patch_size=16,
    )


def _computed_again(model, transformers, name, kind):
    """Give `model` the buffers that no state dict holds, from a model of one block, which has the same."""
    config = _config(transformers, name, kind)
    config.num_hidden_layers = 1
    small = dict(transformers.AutoModel.from_config(config).named_buffers())
    for key, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            owner, _, last = key.rpartition(".")
            setattr(model.get_submodule(owner), last, small[key].clone())


def _renamed(state, names):
    found = {}
    for key, value in state.items():
        if _NOT_TAKEN.match(key):
            continue
        for pattern, new in names:
            renamed, count = re.subn(pattern, new, key)
            if count:
                key = renamed
                break
        found[key] = value
    return found


def _vit_state(state):
    """A state dict of the authors' vision transformer under the names of transformers; KeyError with a sentence."""
    split = {}
    for key, value in state.items():
        owner, qkv, last = key.rpartition(".qkv.")
        if not qkv or last == "bias_mask":
            split[key] = value
            continue
        parts = dict(zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True))
        if last == "bias":
            masked = f"{owner}.qkv.bias_mask" in state  # its middle third is 0: keys have no bias
            if parts.pop("k_proj").any() and not masked:
                raise KeyError(f"{key} gives the keys a bias, which this model has not")
        for part, numbers in parts.items():
            split[f"{owner.replace('blocks', 'layer').replace('.attn', '.attention')}.{part}.{last}"] = numbers
    found = _renamed(split, _VIT_NAMES)
    mask = found.get("embeddings.mask_token")
    if mask is not None and mask.ndim == 2:
        found["embeddings.mask_token"] = mask[None]
    return found


def _of_file(path):
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, OSError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise RuntimeError(f"{path} is no file of tensors that can be loaded safely: {reason}") from error
    return _checked(state, path)


def _of_checkout(path, name):
    if name.endswith("_sat"):
        raise RuntimeError(f"{name} is not loaded by a checkout: download its .pth file and give that as weights")
    try:
        module = torch.hub.load(str(path), name, source="local")
    except Exception as error:  # the code of the checkout raises what it likes
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RuntimeError(
            f"the checkout {path} could not load {name} ({type(error).__name__}: {reason}); download its .pth file "
            "and give that as weights"
        ) from error
    return _checked(module.state_dict(), path)


def _checked(state, path):
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise RuntimeError(f"{Path(path)} holds no state dict of tensors, but {type(state).__name__}")
    return state
