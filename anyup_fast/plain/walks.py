"""Walks over images by pieces of a few thousand pixels, on any device.

A piece of the image goes through normalisation, activation, product, skip and statistics while it lies in the cache;
only the products are written back. On CPUs every thread has pieces of its own (`cpu.crew`). Products are matrix
products throughout, 16-bit tensors are computed in float32.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..cpu import products
from ..cpu.crew import crew_size, share_out
from ..cpu.pages import Room, new_empty
from .norms import Moments, shares_of

PIXELS = 4096  # of a piece on a CPU: with 128 channels of float32 two megabytes
WORTH_SHARING = 2048  # pixels for each worker at least: to wake one takes a fraction of a millisecond
MANY_PIXELS = 1 << 18  # of a piece elsewhere: with 128 channels of float32 128 megabytes, of which a desk holds three


def pieces(height, width, most):
    """Cut an image into slices (rows, cols) of at most `most` pixels that lie next to each other in memory."""
    if width > most:
        for row in range(height):
            for col in range(0, width, most):
                yield slice(row, row + 1), slice(col, min(col + most, width))
    else:
        for row in range(0, height, most // width):
            yield slice(row, min(row + most // width, height)), slice(0, width)


class Piece(NamedTuple):
    """A rectangle of an image whose pixels lie next to each other: where in (H * W), which rows, which columns.

    Attributes:
        number: of this one among the pieces of the image.
    """

    flat: slice
    rows: slice
    cols: slice
    number: int


class Desk(Room):
    """What one worker has for itself: room for a piece of the image, three times, and further buffers by name."""

    def __init__(self, room):
        super().__init__()
        self._room = room

    def scratch(self, i, flat, width):
        """Scratch number `i` (0 to 2) for one piece: (pixels, width)."""
        n = flat.stop - flat.start
        return self._room[i, : n * width].view(n, width)

    def active(self, x, flat, norm):
        """`silu(x * scale + shift)` of one piece with the norm (2, D), in scratch 0."""
        scale, shift = norm
        out = self.scratch(0, flat, x.shape[1])
        return F.silu(torch.addcmul(shift, x[flat], scale, out=out), inplace=True)

    def multiply(self, a, matrix, out):
        """`a @ matrix` into `out`, multiplied in the dtype of the matrix; `a` of one piece, or a part of it."""
        a = self._narrowed(a, matrix)
        if out.dtype == matrix.dtype:
            return products.mm(a, matrix, out)
        return out.copy_(self._product(a, matrix))

    def add_product(self, out, a, matrix):
        """`out + a @ matrix` into `out`, multiplied in the dtype of the matrix."""
        a = self._narrowed(a, matrix)
        return products.addmm_(out, a, matrix) if out.dtype == matrix.dtype else out.add_(self._product(a, matrix))

    def wide(self, x, flat, dtype):
        """The numbers `x` (P, D) of one piece in another dtype, in scratch 1 if that has to be."""
        return x if x.dtype == dtype else self.scratch(1, flat, x.shape[1]).copy_(x)

    def _narrowed(self, a, matrix):
        if a.dtype == matrix.dtype:
            return a
        return self.buffer("narrow", a.shape, matrix).copy_(a)

    def _product(self, a, matrix):
        return torch.mm(a, matrix, out=self.buffer("product", (len(a), matrix.shape[1]), matrix))


class Walk:
    """Passes over the pixels of an image that lie as (H * W, D), piece by piece."""

    def __init__(self, size, width, like, num_groups=8, rows=1, parts=1, halved=False):
        """`width`: channels at most; `like`: a tensor on the device and of the dtype to compute in.

        Pieces are as many times smaller on CPUs as `parts` says and, where they fit, have a multiple of `rows` rows.
        With `halved` factors of products are rounded to bfloat16.
        """
        self.size, self.num_groups = size, num_groups
        self.factors = torch.bfloat16 if halved else like.dtype
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

        matrix = weight.to(self.factors).T

        def multiply(desk, piece, moments):
            flat = piece.flat
            product = desk.multiply(desk.active(x, flat, norm), matrix, out[flat])
            moments.put(piece.number, desk.wide(product, flat, norm.dtype), desk.scratch(1, flat, out.shape[1]))

        return self.measured(multiply, out.shape[1])

    def blocks(self, x, hidden, moments, blocks, norms=None, last=None):
        """ResBlocks on `x`, in place where its width stays.

        Args:
            x: (H * W, in). hidden: (H * W, D), written to, as narrow as products are or as wide. moments: those of `x`.
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
        out = x if block.skip is None else x.new_empty(hidden.shape)
        matrix = block.conv_out.to(self.factors).T

        def end(desk, piece, *moments):
            flat = piece.flat
            if block.skip is not None:
                torch.mm(x[flat], block.skip.T, out=out[flat])
            desk.add_product(out[flat], desk.active(hidden, flat, norm), matrix)
            for its in moments:
                its.put(piece.number, out[flat], desk.scratch(1, flat, out.shape[1]))

        if measured:
            return out, self.measured(end, out.shape[1])
        self.each(end)
        return out, None


def flat_pixels(x):
    """(B, H, W, D) as (B, H * W, D)."""
    return x.reshape(len(x), -1, x.shape[-1])
