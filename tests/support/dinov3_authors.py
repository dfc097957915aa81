"""DINOv3's networks, small, with the parameter names of the files of its authors: what a conversion is held against.

Written from the description of the architecture: axial rotary positions of patches, LayerScale, storage tokens behind
the class token, queries, keys and values by one matrix with a bias that is masked for the keys.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class Qkv(nn.Linear):
    def __init__(self, dim, bias):
        super().__init__(dim, 3 * dim, bias)
        if bias:
            self.register_buffer("bias_mask", torch.ones(3 * dim))
            self.bias_mask[dim : 2 * dim] = 0

    def forward(self, x):
        return F.linear(x, self.weight, None if self.bias is None else self.bias * self.bias_mask)


class Scale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Attention(nn.Module):
    def __init__(self, dim, heads, bias):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, Qkv(dim, bias), nn.Linear(dim, dim)

    def forward(self, x, angles):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        prefix = x.shape[1] - len(angles)
        q, k = (torch.cat([t[:, :, :prefix], turned(t[:, :, prefix:], angles)], 2) for t in (q, k))
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


def turned(x, angles):
    """Pairs (i, i + d / 2) of the channels, turned by angles (N, d / 2)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


class Mlp(nn.Module):
    def __init__(self, dim, inside):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, inside), nn.Linear(inside, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGlu(nn.Module):
    def __init__(self, dim, inside):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(dim, inside), nn.Linear(dim, inside), nn.Linear(inside, dim)

    def forward(self, x):
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class Block(nn.Module):
    def __init__(self, dim, heads, inside, gated, bias):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, 1e-5), nn.LayerNorm(dim, 1e-5)
        self.attn, self.mlp = Attention(dim, heads, bias), (SwiGlu if gated else Mlp)(dim, inside)
        self.ls1, self.ls2 = Scale(dim), Scale(dim)

    def forward(self, x, angles):
        x = x + self.ls1(self.attn(self.norm1(x), angles))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Vit(nn.Module):
    """As DinoVisionTransformer, for `VITS`' row of a name; gives the normed patches (B, N, C)."""

    def __init__(self, dim, blocks, heads, inside, gated, bias):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.storage_tokens = nn.Parameter(torch.zeros(1, 4, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, 16, 16)})
        quarter = dim // heads // 4
        self.rope_embed = nn.Module()
        self.rope_embed.register_buffer("periods", 100.0 ** (torch.arange(quarter) / quarter))
        self.blocks = nn.ModuleList([Block(dim, heads, inside, gated, bias) for _ in range(blocks)])
        self.norm, self.local_cls_norm = nn.LayerNorm(dim, 1e-5), nn.LayerNorm(dim, 1e-5)

    def forward(self, image):
        x = self.patch_embed["proj"](image)
        h, w = x.shape[2:]
        rows, cols = (2 * (torch.arange(n) + 0.5) / n - 1 for n in (h, w))
        places = torch.stack(torch.meshgrid(rows, cols, indexing="ij"), -1).flatten(0, 1)
        angles = (2 * math.pi * places[:, :, None] / self.rope_embed.periods).flatten(1)
        tokens = [t.expand(len(image), -1, -1) for t in (self.cls_token, self.storage_tokens)]
        x = torch.cat([*tokens, x.flatten(2).mT], 1)
        for block in self.blocks:
            x = block(x, angles)
        return self.norm(x)[:, 5:]


class ConvBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(dim, dim, 7, padding=3, groups=dim), nn.LayerNorm(dim, 1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = self.pwconv2(F.gelu(self.pwconv1(self.norm(self.dwconv(x).permute(0, 2, 3, 1)))))
        return x + (y * self.gamma).permute(0, 3, 1, 2)


class Norm2d(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNext(nn.Module):
    """As the authors' ConvNeXt; gives the normed cells of the last stage (B, N, C)."""

    def __init__(self, channels, blocks):
        super().__init__()
        self.downsample_layers = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(3, channels[0], 4, 4), Norm2d(channels[0], 1e-6))]
            + [
                nn.Sequential(Norm2d(a, 1e-6), nn.Conv2d(a, b, 2, 2))
                for a, b in zip(channels[:-1], channels[1:], strict=True)
            ]
        )
        self.stages = nn.ModuleList(
            [nn.Sequential(*(ConvBlock(c) for _ in range(n))) for c, n in zip(channels, blocks, strict=True)]
        )
        self.norm = nn.LayerNorm(channels[-1], 1e-6)
        self.norms = nn.ModuleList([nn.Identity(), nn.Identity(), nn.Identity(), self.norm])

    def forward(self, x):
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(down(x))
        return self.norm(x.flatten(2).mT)
