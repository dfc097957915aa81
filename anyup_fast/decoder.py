"""The end of AnyUp: 3x3 convolution of the queries and windowed cross-attention, under the published names."""

import torch
import torch.nn.functional as F
from torch import nn

from .checks import is_flag
from .layers import Conv2d, RMSNorm
from .logs import log_once
from .ops import neighborhood_bounds, window_bounds, windowed_attention

WINDOW_RULES = {"ratio": window_bounds, "neighborhood": neighborhood_bounds}


def chosen_rule(window_rule, use_natten):
    """Name of the window rule from the arguments of `AnyUp`; None with `use_natten` is "neighborhood", else "ratio".

    Raises:
        ValueError: `use_natten` with another rule, or a value of it that says neither yes nor no.
    """
    if not is_flag(use_natten):
        raise ValueError(
            f"use_natten: need True or False, got {use_natten!r}; by position, lfu_dim comes after it: pass it by name"
        )
    if not use_natten:
        return "ratio" if window_rule is None else window_rule
    if window_rule not in (None, "neighborhood"):
        raise ValueError(
            f"use_natten=True means window_rule='neighborhood', got window_rule={window_rule!r}: leave one of them out"
        )
    log_once("AnyUp: use_natten=True: windows by the rule 'neighborhood', computed without NATTEN")
    return "neighborhood"


class CrossAttention(nn.Module):
    """Windowed cross-attention whose values are the raw features: no value projection, no output projection.

    `attention` only holds `in_proj_*` (its first two thirds are used) and `out_proj` (unused, its gradients are
    zero) under the names of the published state dict.
    """

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm_q = RMSNorm(dim)
        self.norm_k = RMSNorm(dim)
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)

    def project(self, query, key):
        """Normalise and project (B, ..., dim) queries and keys to (B, ..., heads, head_dim)."""
        q = F.linear(self.norm_q(query), *self.in_projection(0))
        k = F.linear(self.norm_k(key), *self.in_projection(1))
        return q.unflatten(-1, (self.heads, -1)), k.unflatten(-1, (self.heads, -1))

    @property
    def heads(self):
        """Number of attention heads."""
        return self.attention.num_heads

    def in_projection(self, part):
        """Weight (dim, dim) and bias (dim,) of the projection of queries (part 0) or keys (part 1)."""
        weight, bias = (
            tensor.chunk(3)[part] for tensor in (self.attention.in_proj_weight, self.attention.in_proj_bias)
        )
        out = getattr(self.attention, "out_proj", None)  # modules of other packages may have none
        unused = () if out is None else (out.weight, out.bias)
        if part == 0 and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in unused):
            # Sums of nothing: a gradient of zero, as DistributedDataParallel wants one of every parameter.
            bias = bias + sum(tensor[:0].sum() for tensor in unused)
        return weight, bias


class CrossDecode(nn.Module):
    """3x3 convolution of the queries (zero padding), then windowed cross-attention to the low-res features."""

    def __init__(self, dim, num_heads, window_ratio, window_rule="ratio", head_mode="mean"):
        super().__init__()
        if window_rule not in WINDOW_RULES:
            known = ", ".join(map(repr, WINDOW_RULES))
            raise ValueError(f"window_rule: there is no rule {window_rule!r}; use one of {known}")
        if head_mode not in ("mean", "split"):
            raise ValueError(f"head_mode: need 'mean' or 'split', got {head_mode!r}")
        self.window_ratio, self.window_rule, self.head_mode = window_ratio, window_rule, head_mode
        self.conv2d = Conv2d(dim, dim, 3, padding=1)
        self.cross_attn = CrossAttention(dim, num_heads)

    def forward(self, query, key, value, q_chunk_size=None):
        """query (B, dim, H', W'), key (B, dim, h, w), value (B, C, h, w) -> (B, C, H', W')."""
        return self.attend(*self.projected(query, key), value, q_chunk_size)

    def projected(self, query, key):
        """query (B, dim, H', W'), key (B, dim, h, w) -> (B, H', W', heads, d) and (B, h, w, heads, d)."""
        query = self.conv2d(query).permute(0, 2, 3, 1)
        return self.cross_attn.project(query, key.permute(0, 2, 3, 1))

    def projection(self, part):
        """(norm, weight, bias) of the projection of queries (part 0) or keys (part 1)."""
        attention = self.cross_attn
        return (attention.norm_q, attention.norm_k)[part].weight, *attention.in_projection(part)

    def attend(self, query, key, value, q_chunk_size=None, head_mode=None, kept=None):
        """Projected query (B, H', W', heads, d), key (B, h, w, heads, d), value (B, C, h, w) -> (B, C, H', W')."""
        value = value.permute(0, 2, 3, 1)
        row_bounds, col_bounds = self.bounds(query.shape[1:3], key.shape[1:3])
        options = dict(head_mode=head_mode or self.head_mode, kept=kept)
        if q_chunk_size is None:
            return windowed_attention(query, key, value, row_bounds, col_bounds, **options).permute(0, 3, 1, 2)
        bands = [
            windowed_attention(band, key, value, bounds, col_bounds, **options)
            for band, bounds in zip(query.split(q_chunk_size, 1), row_bounds.split(q_chunk_size), strict=True)
        ]
        return torch.cat(bands, 1).permute(0, 3, 1, 2)

    def bounds(self, output_size, key_size):
        """Windows of the rows and of the columns, by the rule of this model (see `anyup_fast.ops.windows`)."""
        rule = WINDOW_RULES[self.window_rule]
        return tuple(rule(n, m, self.window_ratio) for n, m in zip(output_size, key_size, strict=True))
