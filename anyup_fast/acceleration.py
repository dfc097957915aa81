"""AnyUp modules of other packages made fast in place: their classes are exchanged, their parameters stay theirs.

Recognised are three kinds, by the structure of the module, the names and shapes of its parameters and the arguments of
its forward; none of the packages is imported:

* "published", the authors' module (`image, features, output_size, vis_attn, q_chunk_size`);
* "natten", the same after `use_natten=True`: projections as 1x1 convolutions, windows by the rule `neighborhood`;
* "falcon", that of Falcon-Perception (`images, features, attn_mask, output_size, ...`): images in [-1, 1], which the
  module normalises itself, every head weighs its own share of the channels, no output projection.
"""

import logging
import types
import warnings
from dataclasses import dataclass
from functools import cache
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

from .decoder import CrossAttention, CrossDecode
from .layers import FeatureUnification, RotaryEmbedding, rms_norm, unit_channels, wide_dtype
from .model import AnyUp
from .recognition import ENCODERS, pair, recognised

logger = logging.getLogger("anyup_fast")

PARTS = {*ENCODERS, "rope", "cross_decode"}
ALIKE = 5  # of the seven parts make a module worth a line in the report
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _Exchanged:
    """In front of the class of somebody's module; `_exchanged` makes the class of both.

    Nothing is stored in the instance, so that copies, replicas and state dicts are what they were.
    """

    _stands_for = None  # (the mixin, the class before)

    def __reduce_ex__(self, protocol):
        _, (_, *arguments), *state = super().__reduce_ex__(max(protocol, 2))
        return _new, (*self._stands_for, *arguments), *state


class _Part:
    """An inner module: it gains methods, and its own forward stays what it was."""


@cache
def _exchanged(mixin, original):
    """The class that has the methods of `mixin` before those of `original`, and the name of `original`."""
    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    if issubclass(mixin, _Part):
        names["forward"] = original.forward
    names["_stands_for"] = (mixin, original)
    return types.new_class(original.__name__, (mixin, original), exec_body=lambda body: body.update(names))


def _new(mixin, original, *arguments):
    cls = _exchanged(mixin, original)
    return cls.__new__(cls, *arguments)


class _Attention(_Exchanged, _Part, CrossAttention):
    pass


class _NattenAttention(_Attention):
    heads = property(lambda self: self.num_heads)

    def in_projection(self, part):
        conv = (self.q_proj, self.k_proj)[part]
        return conv.weight.flatten(1), conv.bias


class _FalconAttention(_Attention):
    heads = property(lambda self: self.num_head)


class _Decode(_Exchanged, _Part, CrossDecode):
    window_rule, head_mode = "ratio", "mean"

    def projected(self, query, key):
        query = self.conv2d(query)
        return tuple(self._project(x.permute(0, 2, 3, 1), part) for part, x in enumerate((query, key)))

    def _project(self, x, part):
        norm, weight, bias = self.projection(part)
        x = rms_norm(x.to(wide_dtype(x.dtype)), norm).to(x.dtype)
        return F.linear(x, weight, bias).unflatten(-1, (self.cross_attn.heads, -1))


class _NattenDecode(_Decode):
    window_rule = "neighborhood"

    def projection(self, part):
        return (self.norm_q, self.norm_k)[part].weight, *self.cross_attn.in_projection(part)


class _FalconDecode(_Decode):
    head_mode = "split"


class _Accelerated(_Exchanged, AnyUp):
    """The whole module. `super(AnyUp, self)` is the class that it had."""

    input_dim = property(lambda self: self.image_encoder[0].weight.shape[1])

    @property
    def window_ratio(self):
        return self.cross_decode.window_ratio

    @window_ratio.setter
    def window_ratio(self, ratio):
        vars(self)["window_ratio"] = ratio

    def guidance(self, image):
        return RotaryEmbedding.forward(self.rope, self.image_encoder(image))

    def unified(self, features, kept=None):
        return FeatureUnification.forward(self.key_features_encoder[0], unit_channels(features, kept), kept)


class _Published(_Accelerated):
    def forward(self, image, features, output_size=None, vis_attn=False, q_chunk_size=None):
        if vis_attn:  # a figure of its own, on the screen
            return super(AnyUp, self).forward(image, features, output_size, vis_attn, q_chunk_size)
        return AnyUp.forward(self, image, features, pair(output_size))

    def upsample(self, enc_img, feats, out_size, vis_attn=False, q_chunk_size=None):
        if vis_attn:  # what its own forward calls, too
            return super(AnyUp, self).upsample(enc_img, feats, out_size, vis_attn, q_chunk_size)
        return AnyUp.upsample(self, enc_img, feats, pair(out_size))


class _Natten(_Accelerated):
    def forward(self, image, features, output_size=None, vis_attn=False, q_chunk_size=None):
        _warn_of_no_picture(vis_attn)
        return AnyUp.forward(self, image, features, pair(output_size))

    def upsample(self, enc_img, feats, out_size, vis_attn=False, q_chunk_size=None):
        _warn_of_no_picture(vis_attn)
        return AnyUp.upsample(self, enc_img, feats, pair(out_size))


def _warn_of_no_picture(vis_attn):
    if vis_attn:
        warnings.warn("vis_attn: the variant on neighborhood attention draws no picture", stacklevel=3)


class _Falcon(_Accelerated):
    def forward(self, images, features, attn_mask=None, output_size=None, vis_attn=False, q_chunk_size=None):
        output_size = tuple(images.shape[-2:]) if output_size is None else pair(output_size)
        _check_mask(attn_mask, self.cross_decode, output_size, features.shape[-2:])
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        image = (images * 0.5 + 0.5 - mean) / std
        return AnyUp.forward(self, image.to(features.device), features, output_size)

    def upsample(self, *args, **kwargs):  # its own, which takes a mask
        return super(AnyUp, self).upsample(*args, **kwargs)


KINDS = {
    "published": (_Published, _Decode, _Attention),
    "natten": (_Natten, _NattenDecode, _NattenAttention),
    "falcon": (_Falcon, _FalconDecode, _FalconAttention),
}


@dataclass(frozen=True)
class Replaced:
    """A module whose computation was replaced.

    Attributes:
        name: its dotted name below the module given to `accelerate`; "" is that module itself.
        kind: "published", "natten" or "falcon".
        config: the arguments of `AnyUp` that compute the same.
    """

    name: str
    kind: str
    config: dict

    def __str__(self):
        return f"{self.name or '(the module itself)'}: {self.kind}, {self.config}"


@dataclass(frozen=True)
class LeftAlone:
    """A module that looks like an AnyUp and was not touched: its dotted name, and why."""

    name: str
    reason: str

    def __str__(self):
        return f"{self.name or '(the module itself)'}: left alone, {self.reason}"


class Acceleration:
    """What `accelerate` did; `print` it.

    Attributes:
        replaced: tuple of `Replaced`.
        left_alone: tuple of `LeftAlone`.
    """

    def __init__(self, replaced, left_alone, modules):
        self.replaced, self.left_alone, self._modules = tuple(replaced), tuple(left_alone), modules

    def restore(self):
        """Give every replaced module the class that it had before. A second call does nothing.

        Raises:
            RuntimeError: a module was given a forward beside that of its class since then (the `compile()` of
                Falcon-Perception's sets one), which would still be that of this package. No module is restored.
        """
        for entry, module in zip(self.replaced, self._modules, strict=True):
            if isinstance(module, _Accelerated) and "forward" in vars(module):
                raise RuntimeError(
                    f"{entry.name or 'the module'} has a forward that was set after accelerate (compile() may set one) "
                    "and would stay: delete it first, `del module.forward`"
                )
        for module in self._modules:
            if isinstance(module, _Accelerated):
                for part in (module.cross_decode.cross_attn, module.cross_decode, module):
                    part.__class__ = part._stands_for[1]

    def __str__(self):
        return "\n".join(map(str, (*self.replaced, *self.left_alone))) or "there is no module that looks like an AnyUp"

    __repr__ = __str__


def accelerate(module):
    """Replace the computation of every AnyUp module of another package inside `module` by that of this package.

    In place: the module keeps its identity, parameters, names, hooks and arguments; parameters are shared and still
    train; `.to`, `.half`, `load_state_dict`, `deepcopy` and `pickle` act on it as before (loading such a pickle needs
    this package). Only its class changes, to one with the same name below the class that it had. `vis_attn=True` of the
    published module still runs its own code, which shows a figure; `q_chunk_size` is accepted and needed no longer.
    What changes: inner layers are no longer called, so that hooks put on them do not run; sizes that do not divide
    follow `anyup_fast.ops.neighborhood_bounds` in the NATTEN variant; the windows of Falcon-Perception's module are
    those of its `cross_decode.window_ratio`, and a mask with other windows is an error.

    Args:
        module: any nn.Module. Accelerate before compiling.

    Returns:
        Acceleration: what was replaced, what looks alike and why it was left alone, and `restore()`. The same is
        logged, with level WARNING where nothing was replaced. A module accelerated before counts as replaced.

    Raises:
        ValueError: `module` is no nn.Module.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"module: need an nn.Module, got {type(module).__name__}")
    replaced, left_alone, modules = [], [], []
    for name, candidate in list(module.named_modules()):
        if len(PARTS & candidate._modules.keys()) < ALIKE:
            continue
        reason = _why_not_exchanged(candidate)
        if reason is None:
            kind, config, reason = recognised(candidate)
        if reason is not None:
            left_alone.append(LeftAlone(name, reason))
            continue
        decode = candidate.cross_decode
        if not isinstance(candidate, _Accelerated):
            for part, mixin in zip((candidate, decode, decode.cross_attn), KINDS[kind], strict=True):
                part.__class__ = _exchanged(mixin, type(part))
        replaced.append(Replaced(name, kind, config))
        modules.append(candidate)
    report = Acceleration(replaced, left_alone, modules)
    logger.log(logging.INFO if replaced else logging.WARNING, "accelerate: %s", report)
    return report


def _why_not_exchanged(module):
    """Why the class of a module that looks alike can't be exchanged: one sentence, or None."""
    if isinstance(module, _Accelerated):
        return None
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted, and scripted code can't be exchanged: accelerate before torch.jit"
    if isinstance(module, AnyUp):
        return "it is anyup_fast's own AnyUp already"
    for name, inner in module.named_modules():
        if "forward" in vars(inner):
            return f"{name or 'it'} has a forward beside that of its class (compile() may set one): accelerate first"
        if name and any(getattr(inner, hooks) for hooks in HOOKS):
            return f"its layer {name} has hooks, which would no longer be called"
    return None


_agreed = WeakKeyDictionary()  # mask -> what it was compared with


def _check_mask(mask, decode, size, grid):
    """ValueError where a BlockMask has other windows than `decode`, by its lengths and at three pixels."""
    if mask is None or torch.compiler.is_compiling():
        return
    if not hasattr(mask, "mask_mod") or not hasattr(mask, "seq_lengths"):
        raise ValueError(f"attn_mask: need a BlockMask or None, got {type(mask).__name__}")
    compared = (tuple(size), tuple(grid), decode.window_ratio)
    if compared in _agreed.get(mask, ()):
        return
    lengths = size[0] * size[1], grid[0] * grid[1]
    if tuple(mask.seq_lengths) != lengths:
        raise ValueError(f"attn_mask: made for lengths {tuple(mask.seq_lengths)}, need {lengths}: {size} from {grid}")
    rows, cols = decode.bounds(size, grid)
    pixels = torch.tensor([0, (size[0] // 2) * size[1] + size[1] // 2, lengths[0] - 1], device="cpu")
    device = mask.kv_num_blocks.device
    nothing = torch.zeros((), dtype=torch.long, device=device)
    seen = mask.mask_mod(nothing, nothing, pixels[:, None].to(device), torch.arange(lengths[1], device=device))
    for pixel, keys in zip(pixels.tolist(), seen.cpu(), strict=True):
        (top, bottom), (left, right) = rows[pixel // size[1]].tolist(), cols[pixel % size[1]].tolist()
        expected = torch.zeros(tuple(grid), dtype=torch.bool, device="cpu")
        expected[top:bottom, left:right] = True
        if not torch.equal(keys.view(tuple(grid)), expected):
            raise ValueError(
                f"attn_mask: at pixel {divmod(pixel, size[1])} its window is not that of window_ratio "
                f"{decode.window_ratio}: set cross_decode.window_ratio to the ratio that the mask was made with"
            )
    _agreed.setdefault(mask, set()).add(compared)
