"""Modules built like other packages' AnyUp: their attributes and parameter names, the published formulae, plainly.

Masks, dense softmax and nested loops; nothing of anyup_fast is used, so that both can be compared.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask


class Block(nn.Module):
    def __init__(self, width_in, width):
        super().__init__()

        def half(channels):
            conv = nn.Conv2d(channels, width, 1, bias=False, padding_mode="reflect")
            return nn.GroupNorm(8, channels), nn.SiLU(), conv

        self.block = nn.Sequential(*half(width_in), *half(width))
        self.shortcut = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1, bias=False)

    def forward(self, x):
        return self.shortcut(x) + self.block(x)


class Unification(nn.Module):
    def __init__(self, filters, size):
        super().__init__()
        self.out_channels, self.kernel_size = filters, size
        self.basis = nn.Parameter(torch.randn(filters, 1, size, size))

    def forward(self, features):
        batch, channels, h, w = features.shape
        pad = self.kernel_size // 2
        one_by_one = features.reshape(-1, 1, h, w)
        responses = F.conv2d(one_by_one, self.basis, padding=pad)
        inside = F.conv2d(torch.ones_like(one_by_one[:1]), torch.ones_like(self.basis[:1]), padding=pad)
        channel_major = (responses / inside).reshape(batch, channels * self.out_channels, h, w)
        return channel_major.view(batch, self.out_channels, channels, h, w).softmax(1).mean(2)


class Rope(nn.Module):
    def __init__(self, dim):
        super().__init__()
        octaves = (2 * math.pi * 100.0 ** torch.linspace(0, -1, dim // 4)).repeat(2)
        nothing = torch.zeros(dim // 2)
        self.freqs = nn.Parameter(torch.stack((torch.cat((octaves, nothing)), torch.cat((nothing, octaves)))))

    def forward(self, x, coords):
        angle = coords @ self.freqs
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
        return x * angle.cos() + turned * angle.sin()


def edges(n_query, n_key, ratio):
    """(n_query, 2) integers: the low-res rows (or columns) that every output row (or column) sees."""
    centre = (torch.arange(n_query, dtype=torch.float32) + 0.5) / n_query
    low, high = (centre - ratio).clamp(0.0, 1.0), (centre + ratio).clamp(0.0, 1.0)
    return torch.stack(((low * n_key).floor(), (high * n_key).ceil()), 1).long()


def within(bounds, n_key):
    keys = torch.arange(n_key)
    return (keys >= bounds[:, :1]) & (keys < bounds[:, 1:])


def seen_cells(size, grid, ratio):
    """Boolean (pixels, cells)."""
    if ratio <= 0:
        return torch.ones(size[0] * size[1], grid[0] * grid[1], dtype=torch.bool)
    rows, cols = (within(edges(n, k, ratio), k) for n, k in zip(size, grid, strict=True))
    return (rows[:, None, :, None] & cols[None, :, None, :]).reshape(size[0] * size[1], -1)


def flat(x):
    return x.flatten(2).transpose(1, 2)


class CrossAttention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm_q, self.norm_k = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.attention = nn.MultiheadAttention(dim, num_heads, dropout=0.0, batch_first=True)

    def forward(self, query, key, value, seen):
        _, weights = self.attention(self.norm_q(query), self.norm_k(key), self.norm_k(key), attn_mask=~seen)
        return weights @ value, weights


class CrossAttentionBlock(nn.Module):
    def __init__(self, dim, num_heads, window_ratio):
        super().__init__()
        self.cross_attn = CrossAttention(dim, num_heads)
        self.window_ratio = window_ratio
        self.conv2d = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.shown = 0

    def forward(self, q, k, v, vis_attn=False, q_chunk_size=None):
        q = self.conv2d(q)
        seen = seen_cells(q.shape[2:], k.shape[2:], self.window_ratio)
        out, _ = self.cross_attn(flat(q), flat(k), flat(v), seen)
        self.shown += bool(vis_attn)  # a figure on the screen
        return out.transpose(1, 2).unflatten(2, q.shape[2:])


class Encoders(nn.Module):
    def __init__(
        self, input_dim=3, qk_dim=128, kernel_size=1, kernel_size_lfu=5, window_ratio=0.1, num_heads=4, lfu_dim=None
    ):
        super().__init__()
        self.qk_dim, self.lfu_dim, self.window_ratio = qk_dim, lfu_dim or qk_dim, window_ratio

        def conv(channels, size):
            return nn.Conv2d(channels, qk_dim, size, padding=size // 2, padding_mode="reflect", bias=False)

        def encoder(first, width=qk_dim):
            return nn.Sequential(first, Block(width, qk_dim), Block(qk_dim, qk_dim))

        self.image_encoder = encoder(conv(input_dim, kernel_size))
        self.key_encoder, self.query_encoder = encoder(conv(qk_dim, 1)), encoder(conv(qk_dim, 1))
        self.key_features_encoder = encoder(Unification(self.lfu_dim, kernel_size_lfu), self.lfu_dim)
        self.cross_decode = CrossAttentionBlock(qk_dim, num_heads, window_ratio)
        self.aggregation = encoder(conv(2 * qk_dim, 3))
        self.rope = Rope(qk_dim)

    def guide(self, image):
        x = self.image_encoder(image)
        axes = [torch.linspace(0, 1, n, dtype=x.dtype, device=x.device) for n in x.shape[2:]]
        coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(1, -1, 2)
        return self.rope(flat(x), coords).transpose(1, 2).unflatten(2, x.shape[2:])

    def query_key(self, guide, features, size):
        query = F.adaptive_avg_pool2d(self.query_encoder(guide), size)
        key = F.adaptive_avg_pool2d(self.key_encoder(guide), features.shape[2:])
        key = torch.cat((key, self.key_features_encoder(F.normalize(features, dim=1))), 1)
        return query, self.aggregation(key)


class PublishedAnyUp(Encoders):
    def forward(self, image, features, output_size=None, vis_attn=False, q_chunk_size=None):
        size = image.shape[2:] if output_size is None else output_size
        return self.upsample(self.guide(image), features, size, vis_attn=vis_attn, q_chunk_size=q_chunk_size)

    def upsample(self, enc_img, feats, out_size, vis_attn=False, q_chunk_size=None):
        query, key = self.query_key(enc_img, feats, out_size)
        return self.cross_decode(query, key, feats, vis_attn=vis_attn, q_chunk_size=q_chunk_size)


def neighbours(n, size, dilation):
    """(n, size): the positions that each of `n` positions attends to in dilated neighborhood attention.

    Position i belongs to the positions with its remainder by the dilation; among those it sees the `size` around its
    own place, and at the ends the first or last `size`.
    """
    table = []
    for i in range(n):
        group = list(range(i % dilation, n, dilation))
        place = group.index(i)
        first = min(max(place - size // 2, 0), len(group) - size)
        table.append(group[first : first + size])
    return torch.tensor(table)


def neighborhood_attention(query, key, value, size, dilation):
    """query, key, value (B, heads, H, W, d): each query attends to `size` keys around it, `dilation` apart."""
    rows, cols = (neighbours(*given) for given in zip(query.shape[2:4], size, dilation, strict=True))
    out = torch.empty(*query.shape[:4], value.shape[-1], dtype=value.dtype)
    for i, some_rows in enumerate(rows):
        for j, some_cols in enumerate(cols):
            keys = key[:, :, some_rows][:, :, :, some_cols].flatten(2, 3)
            values = value[:, :, some_rows][:, :, :, some_cols].flatten(2, 3)
            logits = torch.einsum("bnd,bnkd->bnk", query[:, :, i, j], keys) * query.shape[-1] ** -0.5
            out[:, :, i, j] = torch.einsum("bnk,bnkc->bnc", logits.softmax(-1), values)
    return out


class NattenCrossAttention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)

    def forward(self, q, k, v, size, dilation):
        def heads(x):
            return x.unflatten(1, (self.num_heads, -1)).permute(0, 1, 3, 4, 2)

        key, value = (F.interpolate(x, q.shape[2:], mode="nearest-exact") for x in (self.k_proj(k), v))
        value = value.permute(0, 2, 3, 1)[:, None].expand(-1, self.num_heads, -1, -1, -1)
        return neighborhood_attention(heads(self.q_proj(q)), heads(key), value, size, dilation).mean(1)


class NattenCrossAttentionBlock(nn.Module):
    def __init__(self, dim, num_heads, window_ratio):
        super().__init__()
        self.cross_attn = NattenCrossAttention(dim, num_heads)
        self.norm_q, self.norm_k = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.window_ratio, self.q_chunk_size = window_ratio, None
        self.conv2d = nn.Conv2d(dim, dim, 3, padding=1, bias=False)

    def forward(self, q, k, v, vis_attn=False, q_chunk_size=None):
        q = self.norm_q(self.conv2d(q).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        k = self.norm_k(k.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        grid, size = k.shape[2:], q.shape[2:]
        window = list(grid)
        if 0 < self.window_ratio < 0.5:
            window = [max(3, round(2 * self.window_ratio * n)) for n in grid]
            window = [n + 1 - n % 2 for n in window]
        dilation = [n // m for n, m in zip(size, grid, strict=True)]
        return self.cross_attn(q, k, v, window, dilation).permute(0, 3, 1, 2)


class NattenAnyUp(PublishedAnyUp):
    """After `use_natten=True`: the cross-attention exchanged, with the projections of the one before."""

    def __init__(self, **config):
        super().__init__(**config)
        before, dim = self.cross_decode, self.qk_dim
        self.cross_decode = NattenCrossAttentionBlock(dim, before.cross_attn.attention.num_heads, before.window_ratio)
        take_over(self.cross_decode, before)


@torch.no_grad()
def take_over(natten, published):
    """Copy the parameters of the published cross-attention into that on neighborhood attention."""
    mha = published.cross_attn.attention
    for part, proj in enumerate((natten.cross_attn.q_proj, natten.cross_attn.k_proj)):
        proj.weight.copy_(mha.in_proj_weight.chunk(3)[part][..., None, None])
        proj.bias.copy_(mha.in_proj_bias.chunk(3)[part])
    natten.norm_q.weight.copy_(published.cross_attn.norm_q.weight)
    natten.norm_k.weight.copy_(published.cross_attn.norm_k.weight)
    natten.conv2d.weight.copy_(published.conv2d.weight)


class InProjection(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(3 * dim, dim) * dim**-0.5)
        self.in_proj_bias = nn.Parameter(torch.randn(3 * dim) * 0.1)


class FlexCrossAttention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.dim, self.num_head = dim, num_heads
        self.norm_q, self.norm_k = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.attention = InProjection(dim)

    def forward(self, query, key, value, seen):
        def heads(x):
            return x.unflatten(-1, (self.num_head, -1)).transpose(1, 2)

        (w_q, w_k, _), (b_q, b_k, _) = self.attention.in_proj_weight.chunk(3), self.attention.in_proj_bias.chunk(3)
        q, k = heads(F.linear(self.norm_q(query), w_q, b_q)), heads(F.linear(self.norm_k(key), w_k, b_k))
        logits = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~seen, -math.inf)
        return (logits.softmax(-1) @ heads(value)).transpose(1, 2).flatten(2)


class FlexCrossAttentionBlock(nn.Module):
    def __init__(self, dim, num_heads, window_ratio):
        super().__init__()
        self.cross_attn = FlexCrossAttention(dim, num_heads)
        self.window_ratio = window_ratio
        self.conv2d = nn.Conv2d(dim, dim, 3, padding=1, bias=False)

    def forward(self, q, k, v, block_mask, vis_attn=False, q_chunk_size=None):
        q = self.conv2d(q)
        pixels, cells = (torch.arange(n) for n in (q[0, 0].numel(), k[0, 0].numel()))
        zero = torch.zeros((), dtype=torch.long)
        seen = block_mask.mask_mod(zero, zero, pixels[:, None], cells)
        return self.cross_attn(flat(q), flat(k), flat(v), seen).transpose(1, 2).unflatten(2, q.shape[2:])


def block_mask(height, width, h, w, ratio=0.1):
    """The windows as a BlockMask of flex attention, as Falcon-Perception hands them to its module."""
    rows, cols = edges(height, h, ratio), edges(width, w, ratio)

    def seen(batch, head, q, kv):
        (top, bottom), (left, right) = rows[q // width].unbind(-1), cols[q % width].unbind(-1)
        return (kv // w >= top) & (kv // w < bottom) & (kv % w >= left) & (kv % w < right)

    return create_block_mask(seen, None, None, height * width, h * w, device="cpu")


class FalconAnyUp(Encoders):
    """Images in [-1, 1], a mask from outside, V split by head, no output projection."""

    def __init__(self, **config):
        super().__init__(**config)
        decode = self.cross_decode
        heads, ratio = decode.cross_attn.attention.num_heads, decode.window_ratio
        self.cross_decode = FlexCrossAttentionBlock(self.qk_dim, heads, ratio)

    def forward(self, images, features, attn_mask, output_size=None, vis_attn=False, q_chunk_size=None):
        size = images.shape[2:] if output_size is None else output_size
        statistics = images.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
        images = ((images * 0.5 + 0.5 - statistics[0]) / statistics[1]).to(features)
        return self.upsample(self.guide(images), features, attn_mask, size)

    def upsample(self, enc_img, feats, attn_mask, out_size, vis_attn=False, q_chunk_size=None):
        query, key = self.query_key(enc_img, feats, out_size)
        return self.cross_decode(query, key, feats, attn_mask)


CLASSES = {"published": PublishedAnyUp, "natten": NattenAnyUp, "falcon": FalconAnyUp}


def build(kind, seed=0, **config):
    """A module with weights that matter: no norm is one, no bias zero."""
    torch.manual_seed(seed)
    module = CLASSES[kind](**{"qk_dim": 32, **config})
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            if "in_proj_weight" in name or "_proj.weight" in name:
                parameter.mul_(3)
    return module.eval()
