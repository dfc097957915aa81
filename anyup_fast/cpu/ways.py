"""Ways to multiply matrices on CPUs: the names that settings have, and what this PyTorch offers of them."""

from typing import NamedTuple

import torch

VARIABLE = "ANYUP_FAST_PRODUCTS"


class Choice(NamedTuple):
    """How each kind of product is done on this machine; the first of its ways is PyTorch's default.

    Attributes:
        pixels: many pixels with a weight, "default" or "onednn".
        batched: several smaller ones at once, "default" or "onednn".
        convolution: 3x3, by "transformed" tiles or "direct".
        bfloat16: whether products of bfloat16 are "fast" or "slow".
    """

    pixels: str = "default"
    batched: str = "default"
    convolution: str = "transformed"
    bfloat16: str = "slow"

    def __str__(self):
        return ",".join(f"{name}={way}" for name, way in self._asdict().items())


WAYS = {
    "pixels": ("default", "onednn"),
    "batched": ("default", "onednn"),
    "convolution": ("transformed", "direct"),
    "bfloat16": ("slow", "fast"),
}


def parsed(text, default=None):
    """A `Choice` from what ANYUP_FAST_PRODUCTS says, or `default` for "auto"."""
    if text in ("", "auto"):
        return default
    if text == "default":
        return Choice(bfloat16="fast" if bfloat16_instructions() else "slow")
    if text == "onednn":
        return _possible(Choice("onednn", "onednn", bfloat16="fast" if bfloat16_instructions() else "slow"))
    parts = [part.partition("=") for part in text.split(",")]
    wrong = [name + sign + way for name, sign, way in parts if way not in WAYS.get(name, ())]
    if wrong:
        ways = "; ".join(f"{name}={' or '.join(ways)}" for name, ways in WAYS.items())
        raise ValueError(
            f"{VARIABLE}: need auto, default, onednn, or some of {ways}, with commas between; "
            f"got {wrong[0]!r} in {text!r}"
        )
    return _possible(Choice(**{name: way for name, _, way in parts}))


def _possible(wanted):
    """`wanted`, or why it can't be had."""
    if "onednn" in wanted and not has_onednn():
        raise RuntimeError(
            f"{VARIABLE}: this PyTorch ({torch.__version__}) has no oneDNN products; take default or auto"
        )
    return wanted


def has_onednn():
    """Whether PyTorch's private operators for it are there and take what they are given here."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def bfloat16_instructions():
    """Whether oneDNN says that it multiplies bfloat16 on this processor."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return torch.backends.mkldnn.is_available() and supported is not None and bool(supported())


def onednn_mm(a, b, out):
    """`torch.mm(a, b, out=out)` by oneDNN, float32."""
    return out.copy_(torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], ""))


def onednn_bmm(a, b, out):
    """`torch.bmm(a, b, out=out)` by oneDNN, float32, one after the other."""
    for one, other, target in zip(a, b, out, strict=True):
        target.copy_(torch.ops.mkldnn._linear_pointwise(one, other.T, None, "none", [], ""))
    return out
