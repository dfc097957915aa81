"""Which modules compute what AnyUp does: decided by names, shapes, layers and arguments, never by a class's name."""

import inspect

import torch
from torch import nn

from .model import AnyUp
from .plain.norms import RMS_EPS

ENCODERS = ("image_encoder", "query_encoder", "key_encoder", "key_features_encoder", "aggregation")
COMPUTES = ("forward", "upsample")  # methods that a subclass may override to compute something else
ARGUMENTS = {
    "published": ["image", "features", "output_size", "vis_attn", "q_chunk_size"],
    "falcon": ["images", "features", "attn_mask", "output_size", "vis_attn", "q_chunk_size"],
}
ARGUMENTS["natten"] = ARGUMENTS["published"]


def recognised(module):
    """(kind, config, None), or (None, None, one sentence about what differs)."""
    shapes = {name: tuple(tensor.shape) for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    attention = "cross_decode.cross_attn."
    if f"{attention}q_proj.weight" in shapes:
        kind = "natten"
    else:
        kind = "published" if f"{attention}attention.out_proj.weight" in shapes else "falcon"
    try:
        config = _config(module, kind, shapes)
        with torch.device("meta"):
            expected = {name: tuple(tensor.shape) for name, tensor in AnyUp(**config).named_parameters()}
    except _Differs as error:
        return None, None, str(error)
    except (TypeError, ValueError, RuntimeError, ArithmeticError, AssertionError) as error:
        return None, None, f"no AnyUp has its widths: {error}"
    reason = (
        _difference(_named_as(kind, expected), shapes)
        or _other_layers(module)
        or _other_arguments(module, kind)
        or _overridden(module)
    )
    return (None, None, reason) if reason else (kind, config, None)


class _Differs(Exception):
    pass


def _config(module, kind, shapes):
    """Arguments of AnyUp, read off the module."""
    for name, dimensions in (("image_encoder.0.weight", 4), ("key_features_encoder.0.basis", 4)):
        if len(shapes.get(name, ())) != dimensions:
            raise _Differs(f"it has no parameter {name} of {dimensions} dimensions")
    qk_dim, input_dim, kernel_size, _ = shapes["image_encoder.0.weight"]
    lfu_dim, _, kernel_size_lfu, _ = shapes["key_features_encoder.0.basis"]
    path = {"published": "attention.num_heads", "natten": "num_heads", "falcon": "num_head"}[kind]
    mode = {"natten": {"window_rule": "neighborhood"}, "falcon": {"head_mode": "split"}}.get(kind, {})
    return {
        "input_dim": input_dim,
        "qk_dim": qk_dim,
        "kernel_size": kernel_size,
        "kernel_size_lfu": kernel_size_lfu,
        "window_ratio": _number(module, "cross_decode.window_ratio", (int, float)),
        "num_heads": _number(module, f"cross_decode.cross_attn.{path}", int),
        "lfu_dim": lfu_dim,
        **mode,
    }


def _number(module, path, types):
    value = module
    for name in path.split("."):
        value = getattr(value, name, None)
    if not isinstance(value, types) or isinstance(value, bool):
        raise _Differs(f"its {path} is {value!r}, no number")
    return value


def _named_as(kind, shapes):
    """Shapes of AnyUp's parameters under the names of another kind."""
    attention = "cross_decode.cross_attn."
    shapes = dict(shapes)
    if kind == "published":
        return shapes
    for part in ("weight", "bias"):
        del shapes[f"{attention}attention.out_proj.{part}"]
    if kind == "falcon":
        return shapes
    dim = shapes[f"{attention}norm_q.weight"][0]
    for part in ("weight", "bias"):
        del shapes[f"{attention}attention.in_proj_{part}"]
        for which in "qk":
            shapes[f"{attention}{which}_proj.{part}"] = (dim, dim, 1, 1) if part == "weight" else (dim,)
    for which in "qk":
        shapes[f"cross_decode.norm_{which}.weight"] = shapes.pop(f"{attention}norm_{which}.weight")
    return shapes


def _difference(expected, shapes):
    """The first difference between two {name: shape}, as a sentence, or None."""
    missing, unknown = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    if missing or unknown:
        return f"its parameters differ: missing {missing[:3]}, unknown {unknown[:3]}"
    for name, shape in expected.items():
        if shapes[name] != shape:
            return f"its {name} has shape {shapes[name]}, that of an AnyUp with its other widths {shape}"
    return None


def _other_layers(module):
    """What in the layers computes something else although all parameters fit: one sentence, or None."""
    for encoder in ENCODERS:
        for index, layer in enumerate(module.get_submodule(encoder)):
            block = layer._modules.get("block") if index else None
            if index and [type(part).__name__ for part in block or ()] != ["GroupNorm", "SiLU", "Conv2d"] * 2:
                return f"its {encoder}.{index} is no block of two GroupNorm, SiLU, Conv2d"
    for name, layer in module.named_modules():
        if isinstance(layer, nn.GroupNorm) and (layer.num_groups, layer.eps) != (8, 1e-5):
            return f"its {name} has {layer.num_groups} groups and eps {layer.eps}, not 8 and 1e-05"
        if isinstance(layer, nn.RMSNorm) and layer.eps not in (None, RMS_EPS):
            return f"its {name} has eps {layer.eps}, not that of float32"
        if isinstance(layer, nn.Conv2d):
            size = layer.kernel_size[0]
            plain = (layer.stride, layer.dilation, layer.groups) == ((1, 1), (1, 1), 1)
            mode = "zeros" if name == "cross_decode.conv2d" else "reflect"
            padded = pair(layer.padding) == (size // 2, size // 2) and layer.padding_mode == mode
            if not plain or (size > 1 and not padded):
                return f"its {name} is padded, strided or grouped otherwise: {layer}"
    return None


def _other_arguments(module, kind):
    """How the arguments of forward differ from those of the kind: one sentence, or None."""
    given = list(inspect.signature(class_before(module).forward).parameters)[1:]
    if given[: len(ARGUMENTS[kind])] != ARGUMENTS[kind]:
        return f"its forward takes ({', '.join(given)}), the {kind} one ({', '.join(ARGUMENTS[kind])})"
    return None


def _overridden(module):
    """Which class of the module or its layers computes otherwise than the one that it derives from: one sentence."""
    for name, layer in module.named_modules():
        classes = [cls for cls in class_before(layer).__mro__ if cls is not nn.Module]
        for method in COMPUTES:
            own, *others = [cls.__name__ for cls in classes if method in vars(cls)] or [None]
            if others:
                return f"{f'its {name}' if name else 'it'} is a {own}, whose {method} overrides that of {others[0]}"
    return None


def class_before(module):
    """The class of a module, or what it was before `accelerate` exchanged it."""
    stands_for = getattr(type(module), "_stands_for", None)
    return type(module) if stands_for is None else stands_for[1]


def pair(size):
    """`size` as (height, width): an int stands for both."""
    return (size, size) if isinstance(size, int) else size
