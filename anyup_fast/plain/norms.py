"""Normalisations over all pixels of an image: gathered piece by piece, applied as a scale and a shift, and back.

Where sums are float64 (`width.wide_of`) a channel is known by mean and mean square, whose difference is taken in the
end. In float32 it would be lost: there a channel is known by its mean and variance.
"""

import copy

import torch

from ..cpu import products
from .width import wide_of

NORM_EPS = 1e-5  # of GroupNorm
RMS_EPS = torch.finfo(torch.float32).eps  # of RMSNorm


class Moments:
    """Mean and spread of every channel over all pixels, gathered piece by piece."""

    PIECES = 256  # whose sums are kept before they are put together, where their number is not known

    def __init__(self, room=None, shares=None):
        """For an image in known pieces: `room` (2, pieces, D), which `put` fills, and each one's share of the pixels.

        The shares are (1, pieces), of `shares_of`.
        """
        self.room, self._shares = room, shares
        self._counts, self._count = [], 0
        self._whole = None  # elsewhere than on CPUs, of an image in one piece: variance and mean (D,) of every channel
        self._sums = None  # of means and mean squares over `_count` pixels; in float32 their mean and variance

    def add(self, x):
        """Take in the pixels `x` (P, D) as one more piece."""
        if self.room is None:
            # One block: small tensors that stay would cut the heap to pieces among the large ones that come and go.
            self.room = x.new_empty(2, self.PIECES, x.shape[1])
        self._counts.append(len(x))
        self.put(len(self._counts) - 1, x)
        if len(self._counts) == self.PIECES:
            self._gather()

    def put(self, number, x, scratch=None):
        """Take in the pixels `x` (P, D) of the piece of that number; `scratch`, if given, is written to."""
        if x.device.type != "cpu" and self._shares is not None and self._shares.numel() == 1:
            self._whole = torch.var_mean(x, 0, correction=0)
            return
        mean, variance = self.room[:, number]
        if x.device.type == "cpu":
            torch.ops.aten.batch_norm_update_stats.out(as_picture(x), None, None, 0.0, out0=mean, out1=variance)
        else:
            torch.mean(x, 0, out=mean)
            torch.mean(torch.sub(x, mean, out=scratch).square_(), 0, out=variance)

    def _gather(self):
        """Add the pieces since the last time to the others."""
        count = sum(self._counts)
        if not count:
            return
        room, shares = self.room[:, : len(self._counts)], shares_of(self._counts, self.room)
        if shares.dtype == torch.float64:
            sums = count * _mean_and_square(room, shares)
            self._sums = sums if self._sums is None else self._sums + sums
        else:
            both = _mean_and_variance(room, shares)
            if self._sums is not None:
                shares = shares_of((self._count, count), self.room)
                both = _mean_and_variance(torch.stack((self._sums, both), 1), shares)
            self._sums = both
        self._count, self._counts = self._count + count, []

    def groups(self, num_groups):
        """(2, num_groups): mean and inverse deviation of the groups of channels, as wide as the device is."""
        if self._whole is not None:
            variance, mean = self._whole
            return group_statistics_of_variances(mean, variance, num_groups)
        wide = wide_of(self.room.device, self.room.dtype) == torch.float64
        if self._shares is None:
            self._gather()
            if wide:
                return group_statistics(*self._sums / self._count, num_groups)
            return group_statistics_of_variances(*self._sums, num_groups)
        if wide:
            return group_statistics(*_mean_and_square(self.room, self._shares), num_groups)
        return group_statistics_of_variances(*_mean_and_variance(self.room, self._shares), num_groups)

    def affine(self, weight, bias, num_groups):
        """(2, D): GroupNorm over what was gathered, as `x * scale + shift`."""
        return group_affine(self.groups(num_groups), weight, bias)


def shares_of(counts, like):
    """(1, pieces), as wide as the device of `like` is: the share of the pixels that each piece has."""
    wide = wide_of(like.device, like.dtype)
    shares = like.new_full((1, len(counts)), counts[0] / sum(counts), dtype=wide)
    for i, count in enumerate(counts):
        if count != counts[0]:
            shares[0, i] = count / sum(counts)  # a fill: a tensor made of the list would wait for an accelerator
    return shares


def _mean_and_square(room, shares):
    """(2, D) in float64, from the pieces' means and variances (2, pieces, D)."""
    means, variances = room = room.double()
    variances.addcmul_(means, means)
    return torch.matmul(shares, room)[:, 0]


def _mean_and_variance(room, shares):
    """(2, D), from the pieces' means and variances (2, pieces, D), without a sum of what cancels."""
    means, variances = room
    shares = shares.T
    mean = means[0] + ((means - means[0]) * shares).sum(0)  # no matrix products, which may be rounded more coarsely
    return torch.stack((mean, ((variances + (means - mean).square()) * shares).sum(0)))


def as_picture(x):
    """Pixels (P, D) as the picture (1, D, P, 1), channels last, that torch's own normalisations take."""
    return x.view(1, len(x), 1, -1).permute(0, 3, 1, 2)


def group_statistics(mean, square, num_groups):
    """Mean and inverse deviation of groups of channels (2, num_groups), from those of every channel in float64.

    `square` is the mean square; float64 leaves of its difference from the mean's square what float32 can tell.
    """
    mean, square = torch.stack((mean, square)).view(2, num_groups, -1).mean(2)
    return torch.stack((mean, torch.addcmul(square, mean, mean, value=-1).clamp_(min=0).add_(NORM_EPS).rsqrt_()))


def group_statistics_of_variances(mean, variance, num_groups):
    """`group_statistics` from mean and variance of every channel: no difference of large numbers is taken."""
    mean, variance = (part.view(num_groups, -1) for part in (mean, variance))
    group_mean = mean.mean(1, keepdim=True)
    apart = mean - group_mean
    spread = torch.addcmul(variance, apart, apart).mean(1)
    return torch.stack((group_mean[:, 0], spread.add_(NORM_EPS).rsqrt_()))


def group_affine(statistics, weight, bias):
    """GroupNorm as scale and shift (2, D), from mean and inverse deviation (2, num_groups)."""
    out = weight.new_empty(2, len(weight))
    if statistics.dtype == weight.dtype and weight.device.type != "cpu":
        weight, bias, both = (x.unflatten(-1, (statistics.shape[1], -1)) for x in (weight, bias, out))
        mean, inverse = statistics[..., None]
        torch.mul(weight, inverse, out=both[0])
        torch.addcmul(bias, mean, both[0], value=-1, out=both[1])
        return out
    mean, inverse = by_channel(statistics.to(wide_of(weight.device, weight.dtype)), len(weight))
    out[0] = scale = inverse * weight
    out[1] = bias - mean * scale
    return out


def measured_affine(x, weight, bias, num_groups, out):
    """GroupNorm over all pixels of images (B, P, D), as scale and shift (B, 2, D) into `out`; elsewhere than on CPUs.

    Their deviations from the mean are squared there, group by group, so that float32 serves.
    """
    groups = x.unflatten(-1, (num_groups, -1))
    variance, mean = torch.var_mean(groups, (1, 3), correction=0)
    inverse = variance.add_(NORM_EPS).rsqrt_()[..., None]
    scale, shift = out.unflatten(-1, (num_groups, -1)).unbind(1)
    torch.mul(weight.view(num_groups, -1), inverse, out=scale)
    torch.addcmul(bias.view(num_groups, -1), mean[..., None], scale, value=-1, out=shift)
    return out


def by_channel(statistics, channels):
    """(..., num_groups) repeated to (..., channels)."""
    repeat = channels // statistics.shape[-1]
    return statistics[..., None].expand(*statistics.shape, repeat).flatten(-2)


class ThroughNorm:
    """Gradient of a GroupNorm, from the sums over all pixels of the gradient and of its product with the unit input.

    Args:
        statistics: mean and inverse deviation (2, num_groups).
        weight: (D,), of the norm.
    """

    def __init__(self, statistics, weight):
        self.num_groups = statistics.shape[1]
        self.narrow = by_channel(statistics, len(weight))
        self.wide = wide_of(weight.device, weight.dtype)
        self.mean, self.inverse = self.narrow.to(self.wide)
        self.weight = weight
        self.sums = torch.zeros(2, len(weight), dtype=self.wide, device=weight.device)

    def part(self):
        """One like this, of which nothing is known yet but the statistics."""
        part = copy.copy(self)
        part.sums = torch.zeros_like(self.sums)
        return part

    def take(self, parts):
        """Add the sums of `parts`, pairs of one like this and a tensor; returns the sum of these tensors."""
        for part, _ in parts:
            self.sums += part.sums
        return sum(other for _, other in parts)

    def add(self, grad, x, scratch):
        """Take in the gradients and inputs (P, D) of some pixels; `scratch` is written to."""
        if grad.device.type == "cpu":
            given = as_picture(grad), as_picture(x), None, None, None, *self.narrow
            _, unit, plain = torch.ops.aten.native_batch_norm_backward(*given, True, 0.0, [False, True, True])
        else:
            mean, inverse = self.narrow
            unit, plain = torch.sub(x, mean, out=scratch).mul_(grad).sum(0) * inverse, grad.sum(0)
        self.sums[0] += plain
        self.sums[1] += unit

    def coefficients(self, pixels, grad_weight, grad_bias):
        """Three (D,): the gradient for x is `first * grad + second + third * x`. Adds to those of weight and bias."""
        weight = self.weight.to(self.wide)
        plain, with_unit = self.sums
        grad_weight += with_unit
        grad_bias += plain
        means = torch.stack((weight * plain, weight * with_unit)).unflatten(1, (self.num_groups, -1)).mean(2) / pixels
        mean, mean_with_unit = by_channel(means, len(weight))
        share = -self.inverse.square() * mean_with_unit
        offset = -self.inverse * mean - share * self.mean
        return [part.to(self.weight.dtype) for part in (self.inverse * weight, offset, share)]


def rms_project(pixels, folded, bias, eps, out):
    """RMSNorm and projection of `pixels` (P, D), written to, into `out`; multiplied in the dtype of `folded`."""
    torch.mul(pixels, pixels, out=out)
    scale = out.mean(1, keepdim=True).add_(eps).rsqrt_()
    pixels.mul_(scale)
    if folded.dtype == out.dtype:
        products.addmm(bias, pixels, folded, out)
    else:
        torch.add(pixels.to(folded.dtype) @ folded, bias, out=out)
