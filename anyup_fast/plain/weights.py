"""Weights of the fused networks, by name."""

from itertools import chain, islice
from typing import NamedTuple

import torch


class Block(NamedTuple):
    """A ResBlock `skip(x) + conv_out(silu(norm_out(conv_in(silu(norm_in(x))))))`: norms (D,), convolutions (D, D).

    `skip` is None for the identity; where the width changes it is a matrix, as the convolutions are.
    """

    norm_in_weight: torch.Tensor
    norm_in_bias: torch.Tensor
    conv_in: torch.Tensor
    norm_out_weight: torch.Tensor
    norm_out_bias: torch.Tensor
    conv_out: torch.Tensor
    skip: torch.Tensor | None = None


class GuidanceWeights(NamedTuple):
    """Weights of the network that turns an image into queries and keys, width D; blocks keep the width.

    `x = image_conv @ rgb`; the image blocks; the rotary embedding with `freqs`, which gives `guide`; then, each for
    itself, `query_conv @ guide` with the query blocks and `key_conv @ guide` with the key blocks.
    """

    image_conv: torch.Tensor  # (D, channels of the image)
    image: tuple  # two Blocks
    freqs: torch.Tensor  # (2, D)
    query_conv: torch.Tensor  # (D, D)
    query: tuple
    key_conv: torch.Tensor
    key: tuple

    def flat(self):
        """All tensors as one list, as a registered operator takes them."""
        return _flat(self)

    @classmethod
    def from_flat(cls, tensors):
        """The inverse of `flat`."""
        rest = iter(tensors)
        return cls(next(rest), _blocks(rest), next(rest), next(rest), _blocks(rest), next(rest), _blocks(rest))


class KeyWeights(NamedTuple):
    """Weights that make projected keys of the pooled guide and of the unified features."""

    features: tuple  # two Blocks, the first from M to D channels
    merge: torch.Tensor  # 3x3 convolution (D, 2 * D, 3, 3), reflect padding
    blocks: tuple  # two Blocks
    norm: torch.Tensor  # (D,)
    weight: torch.Tensor  # (D, D)
    bias: torch.Tensor  # (D,)

    def flat(self):
        """All tensors as one list, as a registered operator takes them."""
        return _flat(self)

    @classmethod
    def from_flat(cls, tensors):
        """The inverse of `flat`; one tensor more than without it means that the first block has a skip."""
        rest = iter(tensors)
        return cls(_blocks(rest, skip=len(tensors) == 29), next(rest), _blocks(rest), *rest)


def _flat(weights):
    if not isinstance(weights, tuple):
        return [] if weights is None else [weights]
    return list(chain.from_iterable(map(_flat, weights)))


def _blocks(tensors, skip=False):
    return Block(*islice(tensors, 6 + skip)), Block(*islice(tensors, 6))


def cast(weights, dtype):
    """A tuple of tensors, None and such tuples, in another dtype."""
    if isinstance(weights, torch.Tensor):
        return weights.to(dtype)
    if weights is None:
        return None
    parts = [cast(part, dtype) for part in weights]
    return type(weights)(*parts) if hasattr(weights, "_fields") else tuple(parts)
