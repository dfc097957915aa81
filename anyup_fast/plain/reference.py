"""The twins of the fused operators: plain, never optimised, float32 (or float64) inside."""

import torch
import torch.nn.functional as F

from .convolution import convolve


def inside(bounds, n_key):
    """Boolean (n_query, n_key): which keys of one axis lie in each half-open window of `bounds` (n_query, 2)."""
    keys = torch.arange(n_key, device=bounds.device)
    return (keys >= bounds[:, :1]) & (keys < bounds[:, 1:])


def windowed_attention_weights(query, key, row_bounds, col_bounds, scale):
    """Attention weights per head, zero outside the windows: (B, heads, H', W', h, w)."""
    batch, height, width, heads, _ = query.shape
    h, w = key.shape[1:3]
    rows, cols = inside(row_bounds, h), inside(col_bounds, w)
    outside = ~(rows[:, None, :, None] & cols[None, :, None, :])
    logits = torch.einsum("bijnd,bklnd->bnijkl", query, key) * scale
    logits = logits.masked_fill(outside, float("-inf"))
    return logits.flatten(-2).softmax(-1).view(batch, heads, height, width, h, w)


def windowed_attention(query, key, value, row_bounds, col_bounds, *, scale=None, head_mode="mean"):
    """Twin of `anyup_fast.ops.windowed_attention`: builds the whole attention (B, heads, H', W', h, w)."""
    compute = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.to(compute) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    weights = windowed_attention_weights(q, k, row_bounds.to(q.device), col_bounds.to(q.device), scale)
    if head_mode == "mean":
        out = torch.einsum("bijkl,bklc->bijc", weights.mean(1), v)
    else:
        v = v.unflatten(-1, (query.shape[3], -1))
        out = torch.einsum("bnijkl,bklnc->bijnc", weights, v).flatten(-2)
    return out.to(value.dtype)


def feature_unification(features, basis):
    """Channel-agnostic description of a feature map: (B, C, h, w) -> (B, M, h, w), for any C.

    Every channel is convolved (zero padding) with the M shared filters `basis` (M, 1, k, k) and divided by the
    number of taps inside the map. The (B, C * M, h, w) responses lie channel-major; the published code views
    them as (B, M, C, h, w) all the same, so that its softmax compares the entries `n = a * C + b`, a = 0..M-1,
    for each fixed `b`, and its mean runs over `b`. The published weights were trained that way. Where C is a
    multiple of M this is a softmax, for the fixed filter `b mod M`, over the channels `a * (C / M) + b div M`.

    Computed in float32 (float64 for float64 input) whatever the dtype of the input, and returned so: the result
    is 1/M plus a few parts in a hundred thousand, which 16-bit floats cannot hold.

    Source: AnyUp (arXiv 2510.12764), feature-agnostic layer.
    """
    compute = torch.promote_types(features.dtype, torch.float32)
    features, basis = features.to(compute), basis.to(compute)
    batch, channels, h, w = features.shape
    filters, _, k, _ = basis.shape
    with torch.autocast(features.device.type, enabled=False):
        responses = convolve(features.reshape(batch * channels, 1, h, w), basis, padding=k // 2)
        taps = F.conv2d(features.new_ones(1, 1, h, w), features.new_ones(1, 1, k, k), padding=k // 2)
    responses = (responses / taps).reshape(batch, filters, channels, h, w)
    return responses.softmax(1).mean(2)
