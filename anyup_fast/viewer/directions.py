"""The few directions in which a page holds features, and the colours that are made of them."""

import numpy as np
import torch
import torch.nn.functional as F

from ..visualize import principal_axes

_RANK = 1e-6  # singular values below this share of the greatest are rounding, not a direction
_PERCENTILES = 1, 99  # of a principal component, shown as black and white


def directions(features, count, fixed=None):
    """Orthonormal directions that keep the cosines between features best.

    They span `fixed`, and beyond that are the first right singular vectors of the features of all pictures together,
    uncentred, each brought to unit length: cosines know of no length.

    Args:
        features: low-res features of each picture, (C, h, w) tensors.
        count: of the directions; there are fewer where the features have fewer.
        fixed: (m, C) directions that have to be kept exactly, m at most `count`, or None.

    Returns:
        (K, C) float32 on the CPU, orthonormal rows, K at most `count`.
    """
    tokens = torch.cat([one.flatten(1).T.cpu().double() for one in features])
    tokens = F.normalize(tokens, dim=1, eps=torch.finfo(tokens.dtype).tiny)
    kept = tokens.new_empty(0, tokens.shape[1])
    if fixed is not None and len(fixed):
        kept = _leading(fixed.cpu().double(), len(fixed))
    beyond = tokens - (tokens @ kept.T) @ kept
    more = _leading(beyond, count - len(kept), least=_RANK * tokens.square().sum().sqrt())
    # A second time: what rounding has left of the first directions in the others.
    return torch.linalg.qr(torch.cat([kept, more]).T).Q.T.float().contiguous()


def _leading(rows, count, least=0.0):
    """The first `count` right singular vectors of (N, C) rows, by the smaller of their two Gram matrices."""
    wide = rows.shape[1] > len(rows)
    values, vectors = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    values, vectors = values.flip(0)[:count].clamp_min(0).sqrt(), vectors.flip(1)[:, :count]
    there = values > max(float(least), _RANK * float(values[0])) if count else values > 0
    vectors = vectors[:, there]
    if wide:
        vectors = F.normalize(rows.T @ vectors, dim=0)
    return vectors.T


def views(low, basis):
    """How coordinates become colours: clip(weight @ z + bias), the same at low and high resolution.

    Args:
        low: coordinates of the low-res features of each picture, (K, h, w) float32 tensors.
        basis: (K, C), what they are coordinates in.

    Returns:
        {"PCA": (weight (3, K), bias (3,)), "mean": (weight (1, K), bias (1,))}, float32 arrays. Scales are those of the
        low-res features: the high-res ones are weighted means of them. The mean is that over all C channels, as far
        as the directions see it.
    """
    mean, axes, _ = principal_axes({f"features of picture {i + 1}": one for i, one in enumerate(low)}, 3)
    axes = axes.float().cpu()
    weight, bias = _scaled(axes, [one.flatten(1) for one in low], _PERCENTILES)
    if len(axes) == 1:
        weight, bias = weight.repeat(3, 1), bias.repeat(3)
    missing = 3 - len(weight)
    weight, bias = F.pad(weight, (0, 0, 0, missing)), F.pad(bias, (0, missing))
    channel_mean = basis.mean(1)[None]
    both = {"PCA": (weight, bias), "mean": _scaled(channel_mean, [one.flatten(1) for one in low], (0, 100))}
    return {name: tuple(t.numpy() for t in pair) for name, pair in both.items()}


def _scaled(axes, low, percentiles):
    """(weight, bias) that bring axes @ z between two percentiles to [0, 1]; 0.5 for what does not vary."""
    values = torch.cat([axes @ one for one in low], 1).numpy()
    dark, light = np.percentile(values, percentiles, axis=1)
    width = light - dark
    varies = width > 1e-6 * np.abs(values).max(initial=0)
    width = np.where(varies, width, 1)
    weight = np.where(varies[:, None], axes.numpy() / width[:, None], 0)
    bias = np.where(varies, -dark / width, 0.5)
    return torch.from_numpy(weight.astype(np.float32)), torch.from_numpy(bias.astype(np.float32))
