"""The feature-agnostic layer in plain PyTorch, forward and backward: a few thousand responses at a time."""

from functools import lru_cache, partial

import torch
import torch.nn.functional as F

from ..cpu import products
from ..cpu.crew import crew_size, led, share_out
from ..cpu.pages import Room
from .walks import pieces

RESPONSES = 1 << 20  # of the feature-agnostic layer at once, on a CPU
MANY_RESPONSES = 9 << 24  # elsewhere, forward: in float32 six tenths of a gigabyte


@led
def unit_channels(features):
    """`anyup_fast.layers.unit_channels`."""
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1).contiguous()


@led
def feature_unification(features, basis):
    """`anyup_fast.ops.feature_unification`."""
    compute = torch.promote_types(features.dtype, torch.float32)
    filters = len(basis)
    channels, height, width = features.shape[1:]
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        taps = basis.to(compute).flatten(1).T
        if features.device.type != "cpu":
            return _together(features.to(compute), taps, basis.shape[-1])
        taps = taps.contiguous()
        out = features.new_empty(len(features), height, width, filters, dtype=compute)
        parts = list(pieces(height, width, max(1, RESPONSES // (filters * channels))))
        rooms = [Room() for _ in range(min(crew_size(out.device), len(parts)))]

        def unify(room, part, patches, target):
            inside = patches(part)
            shape = len(inside), channels, filters
            responses = room.buffer("responses", shape, inside)
            products.bmm(inside.mT, taps.expand(len(inside), *taps.shape), responses)
            responses = responses.view(-1, filters, channels)
            target[part] = torch.softmax(responses, 1, out=responses).mean(2).view_as(target[part])

        for source, target in zip(features, out, strict=True):
            work = partial(unify, patches=Patches(source, basis.shape[-1], compute), target=target)
            share_out(work, parts, rooms)
    return out.permute(0, 3, 1, 2).contiguous()


def _together(features, taps, k):
    """The same elsewhere than on CPUs, in few operations: many places of one map, or several maps, at a time."""
    batch, channels, height, width = features.shape
    filters = taps.shape[1]
    out = features.new_empty(batch, filters, height, width)
    padded = F.pad(features.permute(0, 2, 3, 1), (0, 0, *[k // 2] * 4))
    patches = padded.unfold(1, k, 1).unfold(2, k, 1).permute(0, 1, 2, 4, 5, 3)
    share = _shares_of_taps(height, width, k, features.dtype, features.device)
    maps = min(batch, max(1, MANY_RESPONSES // (height * width * filters * channels)))
    places = max(1, MANY_RESPONSES // (maps * filters * channels))
    for first in range(0, batch, maps):
        some = slice(first, first + maps)
        for rows, cols in pieces(height, width, places):
            seen, its_share, target = patches[some, rows, cols], share[rows, cols], out[some, :, rows, cols]
            inside = seen.new_empty(seen.shape)
            torch.mul(seen, its_share, out=inside)
            inside = inside.view(-1, k * k, channels)
            responses = torch.bmm(inside.mT, taps.expand(len(inside), *taps.shape)).view(-1, filters, channels)
            del inside
            torch.softmax(responses, 1, out=responses)
            shape = len(target), *target.shape[2:], filters, channels
            torch.mean(responses.view(shape), 4, out=target.permute(0, 2, 3, 1))
    return out


@lru_cache(maxsize=32)
def _shares_of_taps(height, width, k, dtype, device):
    """(h, w, 1, 1, 1): one over the number of taps that lie on the map; made once for each size."""
    with torch.inference_mode(False):  # they are kept, for training too
        rows, cols = (taps_inside(n, k, "cpu") for n in (height, width))
        return (1 / (rows[:, None] * cols).to(dtype))[..., None, None, None].to(device)


class Patches:
    """What a filter of k x k taps meets at each place of a map (C, h, w), divided by how many taps lie on the map.

    Attributes:
        share: (h, w, 1, 1, 1), one over the number of taps.
    """

    def __init__(self, source, k, dtype):
        channels, height, width = source.shape
        padded = source.new_zeros(height + k - 1, width + k - 1, channels, dtype=dtype)
        padded[k // 2 : k // 2 + height, k // 2 : k // 2 + width] = source.permute(1, 2, 0)
        self._patches = padded.unfold(0, k, 1).unfold(1, k, 1).permute(0, 1, 3, 4, 2)
        rows, cols = (taps_inside(n, k, source.device) for n in source.shape[1:])
        self.share = (1 / (rows[:, None] * cols).to(dtype))[..., None, None, None]

    def __call__(self, part):
        """(places, k * k, C) of two slices of the map."""
        return (self._patches[part] * self.share[part]).flatten(2, 3).flatten(0, 1)


def taps_inside(n, k, device):
    """(n,): how many of the k taps around each place of an axis lie on it."""
    place = torch.arange(n, device=device)
    return (place + k // 2).clamp(max=n - 1) - (place - k // 2).clamp(min=0) + 1


@led
def feature_unification_backward(grad, features, basis, for_features=True):
    """Gradients of `anyup_fast.ops.feature_unification` for features (if asked for, else empty) and basis."""
    wide = torch.promote_types(features.dtype, torch.float32)
    filters, _, k, _ = basis.shape
    channels, height, width = features.shape[1:]
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        matrix = basis.to(wide).flatten(1).T.contiguous()
        grad_matrix = torch.zeros_like(matrix)
        grad_features = features.new_empty(features.shape if for_features else 0)
        for b, (source, given) in enumerate(zip(features, grad.permute(0, 2, 3, 1), strict=True)):
            patches = Patches(source, k, wide)
            padded_shape = height + k - 1, width + k - 1, channels

            def through_softmax(sums, part, patches=patches, given=given):
                of_basis, spread = sums
                r, c = part
                inside = patches(part)
                weights = torch.bmm(inside.mT, matrix.expand(len(inside), *matrix.shape)).view(-1, filters, channels)
                torch.softmax(weights, 1, out=weights)
                slope = weights * (given[r, c].reshape(-1, filters, 1).to(wide) / channels)
                slope.addcmul_(weights, slope.sum(1, keepdim=True), value=-1)
                slope = slope.view(-1, channels, filters)
                of_basis.add_(torch.bmm(inside, slope).sum(0))
                if not for_features:
                    return
                shape = r.stop - r.start, c.stop - c.start
                taps = (slope @ matrix.T).view(*shape, channels, k * k).mul_(patches.share[r, c, 0])
                for i in range(k * k):
                    top, left = r.start + i // k, c.start + i % k
                    spread[top : top + shape[0], left : left + shape[1]] += taps[..., i]

            parts = list(pieces(height, width, max(1, RESPONSES // (filters * channels))))
            desks = [
                (torch.zeros_like(grad_matrix), matrix.new_zeros(padded_shape if for_features else 0))
                for _ in range(min(crew_size(grad.device), len(parts)))
            ]
            share_out(through_softmax, parts, desks, in_order=True)
            grad_matrix += sum(of_basis for of_basis, _ in desks)
            spread = sum(spread for _, spread in desks)
            if for_features:
                inner = spread[k // 2 : k // 2 + height, k // 2 : k // 2 + width]
                grad_features[b] = inner.permute(2, 0, 1)
    return grad_features, grad_matrix.T.reshape(basis.shape).to(basis.dtype)
