"""The layers of AnyUp in plain PyTorch: the specification that every fused kernel is checked against."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .ops import Block, feature_unification, pooled, res_block
from .ops.unification import unit_channels as unit_channels_of
from .plain.convolution import convolve
from .plain.norms import RMS_EPS
from .plain.width import wide_of

ROPE_THETA = 100.0


def wide_dtype(dtype):
    """The dtype in which coordinates, statistics and softmax are computed for inputs of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


class GroupNorm(nn.GroupNorm):
    """GroupNorm whose statistics are exact to float32 rounding however many pixels there are.

    torch's own loses up to 4e-5 over 448x448 channels-last pixels on a CPU, ten times more than everything else in
    AnyUp together. It is kept where gradients are recorded, for its speed and fused backward pass.
    """

    def forward(self, x):
        if x.requires_grad:
            return super().forward(x)
        pixels = x.permute(0, 2, 3, 1).to(wide_dtype(x.dtype))
        count, wide = pixels.shape[1] * pixels.shape[2], wide_of(x.device, pixels.dtype)
        mean = pixels.sum(2).to(wide).sum(1) / count
        spread = (pixels - mean.to(pixels.dtype)[:, None, None]).square_().sum(2).to(wide).sum(1) / count
        mean, spread = (value.unflatten(1, (self.num_groups, -1)) for value in (mean, spread))
        group_mean = mean.mean(2, keepdim=True)
        variance = (spread + (mean - group_mean).square()).mean(2, keepdim=True)
        scale = (variance + self.eps).rsqrt().expand_as(mean).flatten(1) * self.weight.to(wide)
        shift = self.bias.to(wide) - group_mean.expand_as(mean).flatten(1) * scale
        normalised = torch.addcmul(shift.to(pixels.dtype)[:, None, None], pixels, scale.to(pixels.dtype)[:, None, None])
        return normalised.permute(0, 3, 1, 2).to(x.dtype)


class Conv2d(nn.Conv2d):
    """Convolution without bias at stride 1 whose float32 products are as exact as matrix products are (`convolve`)."""

    def __init__(self, in_channels, out_channels, kernel_size, padding=0):
        super().__init__(in_channels, out_channels, kernel_size, padding=padding, bias=False)

    def forward(self, x):
        return convolve(x, self.weight, self.padding[0])


class ResBlock(nn.Module):
    """`skip(x) + conv(silu(norm(conv(silu(norm(x))))))`, all convolutions 1x1 without bias.

    Maps (B, in_channels, H, W) to (B, out_channels, H, W); the skip is the identity where the widths agree, and a
    1x1 convolution (`shortcut`) where they don't. GroupNorm with 8 groups couples all pixels of an image.
    """

    def __init__(self, in_channels, out_channels, num_groups=8):
        super().__init__()
        self.block = nn.Sequential(
            GroupNorm(num_groups, in_channels),
            nn.SiLU(),
            Conv2d(in_channels, out_channels, 1),
            GroupNorm(num_groups, out_channels),
            nn.SiLU(),
            Conv2d(out_channels, out_channels, 1),
        )
        self.shortcut = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        return self.block(x) + self.shortcut(x)


class FeatureUnification(nn.Module):
    """Feature-agnostic layer: (B, C, h, w) -> (B, out_channels, h, w) for any C, in float32 (or float64).

    `basis` (out_channels, 1, k, k) are the filters shared by all channels; see
    `anyup_fast.plain.reference.feature_unification` for the formula.
    """

    def __init__(self, out_channels, kernel_size=5, init_gaussian_derivatives=False):
        super().__init__()
        if init_gaussian_derivatives:
            basis = gaussian_derivatives(out_channels, kernel_size)
        else:
            basis = torch.randn(out_channels, kernel_size, kernel_size)
        self.basis = nn.Parameter(basis[:, None])

    def forward(self, features, kept=None):
        return feature_unification(features, self.basis, kept=kept)


def gaussian_derivatives(count, size):
    """A bank (count, size, size) of Gaussian derivatives: every (row, column) order up to `size - 1`, lowest total
    order first, at one width after the other; each filter has unit norm."""
    orders = sorted(((i, j) for i in range(size) for j in range(size)), key=lambda order: (sum(order), order))
    x = torch.arange(size) - (size - 1) / 2
    bank = []
    while len(bank) < count:
        sigma = size / 5 * 1.25 ** (len(bank) // len(orders))
        profiles = []
        hermite, previous = torch.ones_like(x), torch.zeros_like(x)
        for order in range(size):
            profiles.append(hermite * torch.exp(-(x**2) / (2 * sigma**2)))
            hermite, previous = x / sigma * hermite - order * previous, hermite
        bank += [torch.outer(profiles[i], profiles[j]) for i, j in orders]
    bank = torch.stack(bank[:count])
    return bank / bank.flatten(1).norm(dim=1)[:, None, None]


class RotaryEmbedding(nn.Module):
    """Rotary position encoding over coordinates `linspace(0, 1)` per axis, rows first, with learned frequencies.

    `freqs` (2, dim): `angle = row * freqs[0] + col * freqs[1]`, and `x * cos(angle) + rotate_half(x) * sin(angle)`
    with `rotate_half(x) = cat(-x2, x1)`. Angles are computed in float32 (or float64), whatever the dtype of x.

    Two ways to call it:
        rope(x): x (B, dim, H, W), at the coordinates above.
        rope(x, coords): tokens x (B, N, dim) at coords (B, N, 2), (1, N, 2) or (N, 2), (row, column), as the published
            layer is called.
    """

    def __init__(self, dim):
        super().__init__()
        octaves = ROPE_THETA ** torch.linspace(0, -1, dim // 4)
        freqs = torch.zeros(2, dim)
        freqs[0, : dim // 2] = octaves.repeat(2)
        freqs[1, dim // 2 :] = octaves.repeat(2)
        self.freqs = nn.Parameter(2 * math.pi * freqs)

    def forward(self, x, coords=None):
        compute = wide_dtype(x.dtype)
        freqs = self.freqs.to(compute)
        if coords is None:
            if x.ndim != 4:
                raise ValueError(f"x: need (B, C, H, W), or tokens (B, N, C) with coords, got shape {tuple(x.shape)}")
            axis = 1
            rows, cols = (torch.linspace(0, 1, n, dtype=compute, device=x.device) for n in x.shape[-2:])
            angle = freqs[0, :, None, None] * rows[:, None] + freqs[1, :, None, None] * cols
        else:
            axis = -1
            self._check_tokens(x, coords)
            rows, cols = coords.to(compute).split(1, -1)
            angle = rows * freqs[0] + cols * freqs[1]
        wide = x.to(compute)
        first, second = wide.chunk(2, axis)
        return (wide * angle.cos() + torch.cat((-second, first), axis) * angle.sin()).to(x.dtype)

    def _check_tokens(self, x, coords):
        dim = self.freqs.shape[1]
        if x.ndim != 3 or x.shape[2] != dim:
            raise ValueError(f"x: with coords, need tokens (B, N, {dim}), got shape {tuple(x.shape)}")
        batch, count, _ = x.shape
        if tuple(coords.shape) not in ((count, 2), (1, count, 2), (batch, count, 2)):
            raise ValueError(
                f"coords: need ({batch}, {count}, 2), (1, {count}, 2) or ({count}, 2), got shape {tuple(coords.shape)}"
            )


class ReflectConv2d(Conv2d):
    """Convolution without bias that keeps (H, W) by reflect padding; an axis too short to reflect repeats its edge."""

    def forward(self, x):
        return super().forward(reflected(x, self.kernel_size[0] // 2))


def reflected(x, pad):
    """`x` with `pad` more rows and columns on every side, by reflection, or its edge where an axis is too short."""
    if not pad:
        return x
    if x.device.type != "cpu":  # PyTorch's own has no gradient there that is the same every time
        return _reflected_axis(_reflected_axis(x, pad, 3), pad, 2)
    x = F.pad(x, (pad, pad, 0, 0), mode="reflect" if x.shape[-1] > pad else "replicate")
    return F.pad(x, (0, 0, pad, pad), mode="reflect" if x.shape[-2] > pad else "replicate")


def _reflected_axis(x, pad, axis):
    n = x.shape[axis]
    if n > pad:
        edges = [x.narrow(axis, start, pad).flip(axis) for start in (1, n - 1 - pad)]
    else:
        size = [pad if i == axis else -1 for i in range(4)]
        edges = [x.narrow(axis, start, 1).expand(size) for start in (0, n - 1)]
    return torch.cat((edges[0], x, edges[1]), axis)


class RMSNorm(nn.Module):
    """`x / rms(x) * weight` over the last axis, in float32 (or float64), with float32's epsilon."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return rms_norm(x.to(wide_dtype(x.dtype)), self.weight).to(x.dtype)


def rms_norm(x, weight):
    """`x / rms(x) * weight` over the last axis, with float32's epsilon."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + RMS_EPS) * weight


def encoder(in_channels, out_channels, first):
    """`first`, then two ResBlocks; `first` is a module that gives `in_channels`."""
    return nn.Sequential(first, ResBlock(in_channels, out_channels), ResBlock(out_channels, out_channels))


def matrices(encoder):
    """Matrix of the first 1x1 convolution of an encoder, and its ResBlocks, as operators take them."""
    first, *blocks = encoder
    return first.weight.flatten(1), matrices_of(blocks)


def matrices_of(modules):
    """ResBlocks as a tuple of `anyup_fast.ops.Block`."""
    blocks = []
    for module in modules:
        norm_in, _, conv_in, norm_out, _, conv_out = module.block
        skip = None if isinstance(module.shortcut, nn.Identity) else module.shortcut.weight.flatten(1)
        weights = conv_in.weight.flatten(1), norm_out.weight, norm_out.bias, conv_out.weight.flatten(1)
        blocks.append(Block(norm_in.weight, norm_in.bias, *weights, skip))
    return tuple(blocks)


def wide_block(block, x):
    """Run a ResBlock in float32 although its parameters are 16-bit."""
    wide = {name: parameter.float() for name, parameter in block.named_parameters()}
    with torch.autocast(x.device.type, enabled=False):
        return torch.func.functional_call(block, wide, (x,))


def unit_channels(features, kept=None):
    """`features / max(|features|_2 over channels, 1e-12)`, in float32 (or float64)."""
    if torch.compiler.is_compiling() or features.requires_grad and torch.is_grad_enabled():
        return F.normalize(features.to(wide_dtype(features.dtype)), dim=1)
    return unit_channels_of(features, kept=kept)


def cell_colours(features):
    """Colours (B, 3, h, w) of the low-res cells, by their place: red is the row, green the column."""
    batch, _, h, w = features.shape
    rows = torch.linspace(0, 1, h, dtype=torch.float32, device=features.device).view(1, 1, h, 1).expand(batch, 1, h, w)
    cols = torch.linspace(0, 1, w, dtype=torch.float32, device=features.device).view(1, 1, 1, w).expand(batch, 1, h, w)
    return torch.cat((rows, cols, 1 - torch.maximum(rows, cols)), 1)


def broadcast(*tensors):
    """The tensors with the batch size of the longest; a single element is repeated as a view."""
    batch = max(tensor.shape[0] for tensor in tensors)  # `len` would fix it in graphs with dynamic shapes
    if not torch.compiler.is_compiling() and all(tensor.shape[0] == batch for tensor in tensors):
        return list(tensors)
    return [tensor.expand(batch, *tensor.shape[1:]) for tensor in tensors]


def projected_plainly(query, conv, norm, weight, bias):
    """`anyup_fast.ops.project_queries` by the plain layers: (B, H, W, D) through 3x3 convolution, norm, projection."""
    query = F.conv2d(query.to(conv.dtype).permute(0, 3, 1, 2), conv, padding=1).permute(0, 2, 3, 1)
    return F.linear(rms_norm(query.to(wide_dtype(query.dtype)), norm).to(query.dtype), weight, bias)


def records_gradients(module, *given):
    """Whether a call of the module with these tensors records gradients."""
    if not torch.is_grad_enabled():
        return False
    if getattr(module, "_is_replica", False):  # of nn.DataParallel, which has tensors in the parameters' place
        weights = [tensor for inner in module.modules() for tensor in inner._former_parameters.values()]
    else:
        weights = list(module.parameters())
    return any(tensor.requires_grad for tensor in (*given, *weights))


def recordable(*tensors):
    """The tensors; copies of those that were made in inference mode, which autograd can't keep."""
    if torch.compiler.is_compiling():
        return tensors
    return tuple(tensor.clone() if tensor.is_inference() else tensor for tensor in tensors)


def through(x, blocks):
    """`x` (B, H, W, D) through ResBlocks, with gradients."""
    for block in blocks:
        x = res_block(x, block)
    return x


def pooled_picture(x, size):
    """`adaptive_avg_pool2d` of (B, D, H, W)."""
    return pooled(x.permute(0, 2, 3, 1), size).permute(0, 3, 1, 2)


def computed_dtype(weight, device):
    """The dtype of a layer's weight, or that of autocast on a torch.device."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return weight.dtype


def stored_dtype(weight, device):
    """Of what layers that record gradients hold for every pixel: as computed, but float32 at least off GPUs."""
    dtype = computed_dtype(weight, device)
    return dtype if device.type in ("cuda", "xpu") else wide_dtype(dtype)
