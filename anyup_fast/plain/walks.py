"""What surrounds the attention, in plain PyTorch for any device: walks over images by pieces of a few thousand pixels,
the projections of queries and keys, the feature-agnostic layer.

A piece of the image goes through normalisation, activation, product, skip and statistics while it lies in the cache;
only the products are written back. On CPUs every thread has pieces of its own (`crew`). Products are matrix products
throughout, 16-bit tensors are computed in float32.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..cpu.convolution import Convolution
from ..cpu.crew import crew_size, led, share_out
from ..cpu.pages import new_empty

PIXELS = 4096  # of a piece on a CPU: with 128 channels of float32 two megabytes
WORTH_SHARING = 2048  # pixels for each worker at least: to wake one takes a fraction of a millisecond
CONVOLVED = 2  # times smaller pieces where a convolution takes five buffers
MANY_PIXELS = 1 << 20  # of a piece elsewhere
RESPONSES = 1 << 20  # of the feature-agnostic layer at once
NORM_EPS = 1e-5


@led
def project_queries(query, conv, norm, weight, bias, *, eps, convolved=None):
    """`anyup_fast.ops.project_queries`, in float32 at least; `convolved`, if given, takes the convolution's output."""
    compute = torch.promote_types(query.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        conv, norm, weight, bias = (tensor.to(compute) for tensor in (conv, norm, weight, bias))
        out = new_empty(query, query.shape, compute, recorded=convolved is not None)
        height, width, dim = query.shape[1:]
        walk = Walk((height, width), dim, conv, rows=Convolution.ROWS, parts=CONVOLVED)
        convolve, folded = Convolution(conv), (weight * norm).T.contiguous()

        def project(desk, piece, b):
            flat, rows, cols, _ = piece
            pixels = desk.scratch(0, flat, dim)
            convolve(query[b], rows, cols, pixels, desk)
            if convolved is not None:
                convolved[b].view(-1, dim)[flat] = pixels
            _project(pixels, folded, bias, eps, out[b].view(-1, dim)[flat])

        for b in range(len(query)):
            walk.each(partial(project, b=b))
    return out


@led
def project_keys(from_image, from_features, weights, *, eps, num_groups=8):
    """`anyup_fast.ops.project_keys`."""
    compute = torch.promote_types(from_image.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(from_image.device.type, enabled=False):
        weights = cast(weights, compute)
        batch, h, w, dim = from_image.shape
        out = from_image.new_empty(from_image.shape, dtype=compute)
        filters = from_features.shape[1]
        walk = Walk((h, w), max(2 * dim, filters), weights.merge, num_groups)
        convolve, folded = Convolution(weights.merge), (weights.weight * weights.norm).T.contiguous()
        rows, cols = (_reflected(n, out.device) for n in (h, w))
        hidden, x = (out.new_empty(h * w, dim) for _ in range(2))

        def picture(image, features, target):
            unified = features.to(compute).permute(1, 2, 0).reshape(-1, filters).clone()
            unified = walk.blocks(unified, hidden, walk.moments(unified), weights.features)
            both = torch.cat((image.to(compute), unified.view(h, w, dim)), -1)
            padded = both.index_select(0, rows).index_select(1, cols)

            def merge(desk, piece, moments):
                flat, r, c, number = piece
                convolve(padded, r, c, x[flat], desk, inside=True)
                moments.put(number, x[flat], desk.scratch(1, flat, dim))

            moments = walk.measured(merge, dim)
            key = walk.blocks(x, hidden, moments, weights.blocks)

            def project(desk, piece):
                _project(key[piece.flat], folded, weights.bias, eps, target.view(-1, dim)[piece.flat])

            walk.each(project)

        for tensors in zip(from_image, from_features, out, strict=True):
            picture(*tensors)
    return out.to(from_image.dtype)


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
        taps = basis.to(compute).flatten(1).T.contiguous()
        out = features.new_empty(len(features), height, width, filters, dtype=compute)
        parts = list(pieces(height, width, max(1, RESPONSES // (filters * channels))))

        def unify(_, part, patches, target):
            inside = patches(part)
            responses = torch.bmm(inside.mT, taps.expand(len(inside), *taps.shape)).view(-1, filters, channels)
            target[part] = torch.softmax(responses, 1, out=responses).mean(2).view_as(target[part])

        for source, target in zip(features, out, strict=True):
            work = partial(unify, patches=Patches(source, basis.shape[-1], compute), target=target)
            share_out(work, parts, range(min(crew_size(out.device), len(parts))))
    return out.permute(0, 3, 1, 2).contiguous()


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


def pieces(height, width, most):
    """Cut an image into slices (rows, cols) of at most `most` pixels that lie next to each other in memory."""
    if width > most:
        for row in range(height):
            for col in range(0, width, most):
                yield slice(row, row + 1), slice(col, min(col + most, width))
    else:
        for row in range(0, height, most // width):
            yield slice(row, min(row + most // width, height)), slice(0, width)


def cast(weights, dtype):
    """A tuple of tensors, None and such tuples, in another dtype."""
    if isinstance(weights, torch.Tensor):
        return weights.to(dtype)
    if weights is None:
        return None
    parts = [cast(part, dtype) for part in weights]
    return type(weights)(*parts) if hasattr(weights, "_fields") else tuple(parts)


def taps_inside(n, k, device):
    """(n,): how many of the k taps around each place of an axis lie on it."""
    place = torch.arange(n, device=device)
    return (place + k // 2).clamp(max=n - 1) - (place - k // 2).clamp(min=0) + 1


def _reflected(n, device):
    """Places of an axis with one more on either side, reflected; an axis of one place repeats it."""
    return (n - 1 - (n - 1 - torch.arange(-1, n + 1, device=device).abs()).abs()).clamp(0, n - 1)


def _project(pixels, folded, bias, eps, out):
    """RMSNorm and projection of `pixels` (P, D), which is written to, into `out`."""
    torch.mul(pixels, pixels, out=out)
    scale = out.mean(1, keepdim=True).add_(eps).rsqrt_()
    torch.addmm(bias, pixels.mul_(scale), folded, out=out)


class Moments:
    """Mean and mean square of every channel over all pixels, gathered piece by piece."""

    PIECES = 256  # whose sums are kept before they are put together, where their number is not known

    def __init__(self, room=None, shares=None):
        """For an image in known pieces: `room` (2, pieces, D), which `put` fills, and each one's share of the pixels.

        The shares are (1, pieces) in float64.
        """
        self.room, self._shares = room, shares
        self._counts, self._count, self._sums = [], 0, None

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
        mean, variance = self.room[:, number]
        if x.device.type == "cpu":
            torch.ops.aten.batch_norm_update_stats.out(as_picture(x), None, None, 0.0, out0=mean, out1=variance)
        else:
            torch.mean(x, 0, out=mean)
            torch.mean(torch.sub(x, mean, out=scratch).square_(), 0, out=variance)

    def _gather(self):
        """Add the pieces since the last time to the others."""
        count = sum(self._counts)
        if count:
            sums = count * _mean_and_square(self.room[:, : len(self._counts)], shares_of(self._counts, self.room))
            self._sums = sums if self._sums is None else self._sums + sums
            self._count, self._counts = self._count + count, []

    def groups(self, num_groups):
        """(2, num_groups): mean and inverse deviation of the groups of channels, in float64."""
        if self._shares is not None:
            return group_statistics(*_mean_and_square(self.room, self._shares), num_groups)
        self._gather()
        return group_statistics(*self._sums / self._count, num_groups)

    def affine(self, weight, bias, num_groups):
        """(2, D): GroupNorm over what was gathered, as `x * scale + shift`."""
        return group_affine(self.groups(num_groups), weight, bias)


def shares_of(counts, like):
    """(1, pieces), float64: the share of the pixels that each piece has."""
    shares = like.new_full((1, len(counts)), counts[0] / sum(counts), dtype=torch.float64)
    for i, count in enumerate(counts):
        if count != counts[0]:
            shares[0, i] = count / sum(counts)  # a fill: a tensor made of the list would wait for an accelerator
    return shares


def _mean_and_square(room, shares):
    """(2, D) in float64, from the pieces' means and variances (2, pieces, D)."""
    means, variances = room = room.double()
    variances.addcmul_(means, means)
    return torch.matmul(shares, room)[:, 0]


def as_picture(x):
    """Pixels (P, D) as the picture (1, D, P, 1), channels last, that torch's own normalisations take."""
    return x.view(1, len(x), 1, -1).permute(0, 3, 1, 2)


def group_statistics(mean, square, num_groups):
    """Mean and inverse deviation of groups of channels (2, num_groups), from those of every channel in float64.

    `square` is the mean square; float64 leaves of its difference from the mean's square what float32 can tell.
    """
    mean, square = torch.stack((mean, square)).view(2, num_groups, -1).mean(2)
    return torch.stack((mean, torch.addcmul(square, mean, mean, value=-1).clamp_(min=0).add_(NORM_EPS).rsqrt_()))


def group_affine(statistics, weight, bias):
    """GroupNorm as scale and shift (2, D), from mean and inverse deviation (2, num_groups)."""
    mean, inverse = by_channel(statistics.double(), len(weight))
    out = weight.new_empty(2, len(weight))
    out[0] = scale = inverse * weight
    out[1] = bias - mean * scale
    return out


def by_channel(statistics, channels):
    """(..., num_groups) repeated to (..., channels)."""
    repeat = channels // statistics.shape[-1]
    return statistics[..., None].expand(*statistics.shape, repeat).flatten(-2)


class Piece(NamedTuple):
    """A rectangle of an image whose pixels lie next to each other: where in (H * W), which rows, which columns.

    Attributes:
        number: of this one among the pieces of the image.
    """

    flat: slice
    rows: slice
    cols: slice
    number: int


class Desk:
    """What one worker has for itself: room for a piece of the image, three times."""

    def __init__(self, room):
        self._room = room
        self.kept = {}  # further buffers, by name, made by whoever first needs them

    def scratch(self, i, flat, width):
        """Scratch number `i` (0 to 2) for one piece: (pixels, width)."""
        n = flat.stop - flat.start
        return self._room[i, : n * width].view(n, width)

    def active(self, x, flat, norm):
        """`silu(x * scale + shift)` of one piece with the norm (2, D), in scratch 0."""
        scale, shift = norm
        out = self.scratch(0, flat, x.shape[1])
        return F.silu(torch.addcmul(shift, x[flat], scale, out=out), inplace=True)

    def buffer(self, name, numbers, like):
        """At least so many numbers like `like`, which stay until the walk is over."""
        found = self.kept.get(name)
        if found is None or found.numel() < numbers:
            found = self.kept[name] = like.new_empty(numbers)
        return found[:numbers]


class Walk:
    """Passes over the pixels of an image that lie as (H * W, D), piece by piece."""

    def __init__(self, size, width, like, num_groups=8, rows=1, parts=1):
        """`width`: channels at most; `like`: a tensor on the device and of the dtype to compute in.

        Pieces are as many times smaller on CPUs as `parts` says and, where they fit, have a multiple of `rows` rows.
        """
        self.size, self.num_groups = size, num_groups
        workers = max(1, min(crew_size(like.device), size[0] * size[1] // WORTH_SHARING))
        most = max(1, PIXELS // parts) if like.device.type == "cpu" else MANY_PIXELS
        if workers > 1:  # as many pieces for one as for the other
            rounds = -(-size[0] * size[1] // (most * workers))
            most = min(most, max(1, -(-size[0] // (rounds * workers))) * size[1])
        if most >= rows * size[1]:
            most = most // (rows * size[1]) * rows * size[1]
        self.pieces = [
            Piece(slice(rows.start * size[1] + cols.start, (rows.stop - 1) * size[1] + cols.stop), rows, cols, number)
            for number, (rows, cols) in enumerate(pieces(*size, most))
        ]
        counts = [piece.flat.stop - piece.flat.start for piece in self.pieces]
        longest = max(counts)
        self._like, self._shares = like, shares_of(counts, like)
        self.desks = [Desk(new_empty(like, (3, longest * width))) for _ in range(min(workers, len(self.pieces)))]

    def each(self, work):
        """Call `work(desk, piece)` for every piece."""
        share_out(work, self.pieces, self.desks)

    def gathered(self, work, start):
        """Call `work(desk, piece, sums)` for every piece; returns the sums, which `start` makes for each desk."""
        places = [(desk, start()) for desk in self.desks]
        share_out(lambda place, piece: work(place[0], piece, place[1]), self.pieces, places, in_order=True)
        return [sums for _, sums in places]

    def measured(self, work, *widths):
        """Call `work(desk, piece, *moments)` for every piece; returns the moments, a list of them for several widths.

        The work gives each of them its pixels by `Moments.put`; `widths` are their channels.
        """
        moments = [Moments(self._like.new_empty(2, len(self.pieces), width), self._shares) for width in widths]
        share_out(lambda desk, piece: work(desk, piece, *moments), self.pieces, self.desks)
        return moments if len(moments) > 1 else moments[0]

    def moments(self, x):
        """Moments of all of `x`."""

        def measure(desk, piece, moments):
            moments.put(piece.number, x[piece.flat], desk.scratch(1, piece.flat, x.shape[1]))

        return self.measured(measure, x.shape[1])

    def hidden(self, x, norm, weight, out):
        """`weight @ active(x)` into `out`; returns its moments."""

        def multiply(desk, piece, moments):
            flat = piece.flat
            product = torch.mm(desk.active(x, flat, norm), weight.T, out=out[flat])
            moments.put(piece.number, product, desk.scratch(1, flat, out.shape[1]))

        return self.measured(multiply, out.shape[1])

    def blocks(self, x, hidden, moments, blocks, norms=None, last=None):
        """ResBlocks on `x`, in place where its width stays.

        Args:
            x: (H * W, in). hidden: (H * W, D), written to. moments: those of `x`.
            norms: (2 * blocks, 2, D), filled with the normalisations.
            last: callable (x, hidden, norm, block) that ends the last block in its own way.
        """
        for i, block in enumerate(blocks):
            outer = moments.affine(block.norm_in_weight, block.norm_in_bias, self.num_groups)
            moments = self.hidden(x, outer, block.conv_in, hidden)
            inner = moments.affine(block.norm_out_weight, block.norm_out_bias, self.num_groups)
            if norms is not None:
                norms[2 * i], norms[2 * i + 1] = outer, inner
            if last is not None and block is blocks[-1]:
                return last(x, hidden, inner, block)
            x, moments = self._ended(x, hidden, inner, block, measured=block is not blocks[-1])
        return x

    def _ended(self, x, hidden, norm, block, measured):
        """Second half of a ResBlock, with the moments of what it gives if they are needed."""
        out = x if block.skip is None else hidden.new_empty(hidden.shape)

        def end(desk, piece, *moments):
            flat = piece.flat
            if block.skip is not None:
                torch.mm(x[flat], block.skip.T, out=out[flat])
            out[flat].addmm_(desk.active(hidden, flat, norm), block.conv_out.T)
            for its in moments:
                its.put(piece.number, out[flat], desk.scratch(1, flat, out.shape[1]))

        if measured:
            return out, self.measured(end, out.shape[1])
        self.each(end)
        return out, None
