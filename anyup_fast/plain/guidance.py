"""The guidance network in plain PyTorch: all pixels of an image at the speed of the cache, or any pixels on their own.

Twelve normalisations couple the pixels of an image, two for each block of the image, query and key encoders, numbered
in that order. Once they are known as `norms` (12, 2, D), a scale and a shift each, every pixel is computed for itself.
"""

import torch
import torch.nn.functional as F

from ..cpu import products
from ..cpu.crew import led
from ..cpu.pages import new_empty
from . import whole
from .norms import Moments, group_affine, group_statistics, group_statistics_of_variances
from .pooling import Bins, Pool, pooled, pooled_both
from .rotary import Rotary
from .walks import PIXELS, Walk, pieces
from .weights import cast
from .width import wide_of

NORMS = 12
BLOCK = 1 << 17  # pixels read at once
IMAGE, QUERY, KEY = slice(0, 4), slice(4, 8), slice(8, 12)  # the normalisations of each encoder


@led
def guidance(image, weights, output_size, key_size, *, dtype, num_groups=8):
    """`anyup_fast.ops.guidance`: (B, H', W', D), (B, h, w, D) and (B, 12, 2, D), all in float32 at least."""
    compute = torch.promote_types(dtype, torch.float32)
    with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
        halved = products.halved(image, weights.image_conv)
        weights, size, dim = cast(weights, compute), image.shape[-2:], len(weights.image_conv)
        query = new_empty(image, (len(image), *output_size, dim), compute)
        key = image.new_empty(len(image), *key_size, dim, dtype=compute)
        norms = image.new_empty(len(image), NORMS, 2, dim, dtype=compute)
        if whole.fits(image.device, size):
            network = whole.Network(weights, size, num_groups)
            several = whole.together(size, len(image))
            for some in zip(*(tensor.split(several) for tensor in (image, query, key, norms)), strict=True):
                network(*some)
            return query, key, norms
        network = _Stored(weights, size, num_groups, halved)
        for picture, *results in zip(image, query, key, norms, strict=True):
            network(picture.to(compute).permute(1, 2, 0).reshape(-1, len(picture)), *results)
    return query, key, norms


def statistics(read, weights, size, key_size, *, num_groups=8):
    """Norms and keys of an image that is only read, row by row, and never held.

    Nine passes: mean and covariance of the colours, one for each further level of normalisations (seven), and the
    pooling of the keys. Every pass computes each pixel again from its colour.

    Args:
        read: callable (first, last) -> rows of the normalised image (last - first, W, channels), in the dtype and on
            the device of the weights.
        weights: GuidanceWeights in the dtype to compute in.
        size: (H, W). key_size: (h, w).

    Returns:
        norms (12, 2, D), key (h, w, D).
    """
    with torch.no_grad(), torch.autocast(weights.image_conv.device.type, enabled=False):
        return _statistics(read, weights, size, key_size, num_groups)


def _statistics(read, weights, size, key_size, num_groups):
    height, width = size
    guide = Guide(weights, size)
    norms = weights.image_conv.new_empty(NORMS, 2, guide.width)
    step = max(1, BLOCK // width)

    def blocks():
        for first in range(0, height, step):
            rows = read(first, min(first + step, height))
            for r, c in pieces(*rows.shape[:2], PIXELS):
                yield rows[r, c], slice(first + r.start, first + r.stop), c

    colours = Colours()
    for rgb, _, _ in blocks():
        colours.add(rgb.flatten(0, 1))
    first = weights.image[0]
    norms[0] = colours.affine(weights.image_conv, first.norm_in_weight, first.norm_in_bias, num_groups)

    def measured(number, moments):
        block = (*weights.image, *weights.query, *weights.key)[number // 2]
        inner = number % 2
        weight = block.norm_out_weight if inner else block.norm_in_weight
        bias = block.norm_out_bias if inner else block.norm_in_bias
        norms[number] = moments.affine(weight, bias, num_groups)

    for number in range(IMAGE.start + 1, IMAGE.stop):
        moments = Moments()
        for rgb, _, _ in blocks():
            moments.add(guide.image(rgb, norms, number).flatten(0, 1))
        measured(number, moments)
    for halves in range(4):
        both = Moments(), Moments()
        for rgb, rows, cols in blocks():
            x = guide.guide(rgb, rows, cols, norms)
            both[0].add(guide.queries(x, norms, halves).flatten(0, 1))
            both[1].add(guide.keys(x, norms, halves).flatten(0, 1))
        measured(QUERY.start + halves, both[0])
        measured(KEY.start + halves, both[1])
    axes = (Bins(n, m, slice(None)) for n, m in zip(size, key_size, strict=True))
    pooled = Pool(*axes, guide.width, like=norms)
    for rgb, rows, cols in blocks():
        pooled.add(guide.keys(guide.guide(rgb, rows, cols, norms), norms), rows, cols)
    return norms, pooled.mean()


class Guide:
    """The guidance network for images of one size, for any of their pixels.

    Args:
        weights: GuidanceWeights in the dtype to compute in.
        size: (H, W) of the image.
    """

    def __init__(self, weights, size):
        self.weights, self.size, self.width = weights, tuple(size), len(weights.image_conv)
        self.rotary = Rotary(weights.freqs, size, weights.image_conv.dtype)

    def image(self, rgb, norms, halves=4):
        """Image encoder of pixels (..., channels): (..., D) after so many halves of its two blocks."""
        return self._encoded(rgb @ self.weights.image_conv.T, self.weights.image, norms[IMAGE], halves)

    def guide(self, rgb, rows, cols, norms):
        """Guide (..., D) of pixels (..., channels) that lie at `rows`, `cols`.

        These are slices of the image for a rectangle (rows, cols, channels), else indices of the shape of the pixels.
        """
        return self.rotary(self.image(rgb, norms), rows, cols)

    def queries(self, guide, norms, halves=4):
        """Queries of pixels, before pooling and convolution, or what the query encoder holds after so many halves."""
        return self._encoded(_linear(guide, self.weights.query_conv), self.weights.query, norms[QUERY], halves)

    def keys(self, guide, norms, halves=4):
        """The image's part of the keys of pixels, before pooling, or what the encoder holds after so many halves."""
        return self._encoded(_linear(guide, self.weights.key_conv), self.weights.key, norms[KEY], halves)

    def _encoded(self, x, blocks, norms, halves):
        hidden = None
        for half in range(halves):
            block, (scale, shift) = blocks[half // 2], norms[half]
            active = F.silu(torch.addcmul(shift, x if hidden is None else hidden, scale), inplace=True)
            if hidden is None:
                hidden = _linear(active, block.conv_in)
            else:
                x, hidden = x + _linear(active, block.conv_out), None
        return x if hidden is None else hidden


def _linear(x, weight):
    """`x @ weight.T`, in the dtype of x, multiplied as narrowly as is asked for."""
    if products.halved(x, weight):
        return F.linear(x.bfloat16(), weight.bfloat16()).to(x.dtype)
    return x @ weight.T


class Colours:
    """Mean and covariance of an image's colours, as wide as the device is: in float64 by sums of their products."""

    def __init__(self):
        self.count, self.sums, self.products = 0, 0.0, 0.0
        self.mean = self.covariance = None  # in their place where there is but float32

    def add(self, rgb):
        """Take in pixels (P, channels)."""
        wide = wide_of(rgb.device, rgb.dtype)
        self.count += len(rgb)
        if wide == torch.float64:
            rgb = rgb.double()
            self.sums = self.sums + rgb.sum(0)
            self.products = self.products + rgb.T @ rgb
            return
        mean = rgb.mean(0)
        centred = rgb - mean
        rest = centred.mean(0)  # of the mean, what its rounding has left
        mean, centred = mean + rest, centred - rest
        covariance = torch.stack([(centred * channel[:, None]).mean(0) for channel in centred.T])
        if self.mean is not None:
            share, step = len(rgb) / self.count, mean - self.mean
            covariance = self.covariance + share * (covariance - self.covariance)
            covariance = covariance + share * (1 - share) * step[:, None] * step
            mean = self.mean + share * step
        self.mean, self.covariance = mean, covariance

    def affine(self, conv, weight, bias, num_groups):
        """(2, D): normalisation of `conv @ rgb`, which follows from mean and covariance of the colours."""
        if self.mean is None:
            conv = conv.double()
            mean, square = conv @ self.sums / self.count, ((conv @ self.products) * conv).sum(1) / self.count
            return group_affine(group_statistics(mean, square, num_groups), weight, bias)
        # Not as matrix products, which may be rounded more coarsely.
        mean = (conv * self.mean).sum(1)
        variance = ((conv[:, :, None] * self.covariance).sum(1) * conv).sum(1).clamp_(min=0)
        return group_affine(group_statistics_of_variances(mean, variance, num_groups), weight, bias)


class _Stored:
    """The whole network, pass by pass; beside its results it holds two or three images of D channels."""

    def __init__(self, weights, size, num_groups, halved):
        self.guide = Guide(weights, size)
        self.walk = Walk(size, self.guide.width, weights.image_conv, num_groups, halved=halved)
        self.weights, self.size, self.num_groups, self.width = weights, tuple(size), num_groups, self.guide.width

    def __call__(self, rgb, query, key, norms):
        """Fill `query` (H', W', D), `key` (h, w, D) and `norms` (12, 2, D) from the pixels `rgb` (H * W, channels)."""
        in_place = query.shape[:2] == self.size
        of_key, hidden = self._picture(rgb), self._picture(rgb, self.walk.factors)
        of_query = query.view(-1, self.width) if in_place else self._picture(rgb)
        query_moments, key_moments = self._image(rgb, of_query, of_key, norms[IMAGE])
        for x, moments, blocks, out, its_norms in (
            (of_key, key_moments, self.weights.key, key, norms[KEY]),
            (of_query, query_moments, self.weights.query, query, norms[QUERY]),
        ):
            if out.shape[0] * out.shape[1] < len(rgb):
                self.walk.blocks(x, hidden, moments, blocks, its_norms, self._pooled_last(out))
            else:
                self.walk.blocks(x, hidden, moments, blocks, its_norms)
                if out is key or not in_place:
                    out.view(-1, self.width).copy_(self._pooled(x, out))

    def _picture(self, rgb, dtype=None):
        return new_empty(rgb, (len(rgb), self.width), dtype)

    def _image(self, rgb, x, y, norms):
        """Leave the first convolutions of the query and key branches in `x` and `y`; returns their moments."""
        walk, weights, (first, second) = self.walk, self.weights, self.weights.image
        colours = Colours()
        colours.add(rgb)
        norms[0] = colours.affine(weights.image_conv, first.norm_in_weight, first.norm_in_bias, self.num_groups)
        expand = weights.image_conv.T.contiguous()
        scaled = expand * norms[0, 0]
        shift = norms[0, 1]
        first_in, first_out, second_out, *branch_convs = (
            matrix.to(walk.factors).T
            for matrix in (first.conv_in, first.conv_out, second.conv_out, weights.query_conv, weights.key_conv)
        )

        def first_half(desk, piece, moments):
            flat = piece.flat
            active = torch.addmm(shift, rgb[flat], scaled, out=desk.scratch(0, flat, self.width))
            product = desk.multiply(F.silu(active, inplace=True), first_in, x[flat])
            moments.put(piece.number, product, desk.scratch(1, flat, self.width))

        moments = walk.measured(first_half, self.width)
        norms[1] = moments.affine(first.norm_out_weight, first.norm_out_bias, self.num_groups)

        def second_half(desk, piece, moments):
            flat = piece.flat
            active = desk.active(x, flat, norms[1])
            torch.mm(rgb[flat], expand, out=x[flat])
            product = desk.add_product(x[flat], active, first_out)
            moments.put(piece.number, product, desk.scratch(1, flat, self.width))

        moments = walk.measured(second_half, self.width)
        norms[2] = moments.affine(second.norm_in_weight, second.norm_in_bias, self.num_groups)
        moments = walk.hidden(x, norms[2], second.conv_in, y)
        norms[3] = moments.affine(second.norm_out_weight, second.norm_out_bias, self.num_groups)

        def branch(desk, piece, *both):
            flat, rows, cols, number = piece
            guide = desk.add_product(x[flat], desk.active(y, flat, norms[3]), second_out)
            shape = rows.stop - rows.start, cols.stop - cols.start, self.width
            scratch = [desk.scratch(i, flat, self.width).view(shape) for i in range(3)]
            guide = self.guide.rotary(guide.view(shape), rows, cols, scratch).flatten(0, 1)
            for moments, matrix, out in zip(both, branch_convs, (x, y), strict=True):
                moments.put(number, desk.multiply(guide, matrix, out[flat]), desk.scratch(1, flat, self.width))

        return walk.measured(branch, self.width, self.width)

    def _pooled_last(self, out):
        """End of the last ResBlock where its result is pooled to fewer pixels: what is linear comes after that."""

        def last(x, hidden, norm, block):
            if not out.numel():
                return out

            if x.device.type == "cpu" and out.shape[1] <= Pool.FEW:
                pooled = pooled_both(self.walk, x, hidden, norm, out.shape[:2])
            else:

                def activate(desk, piece):
                    hidden[piece.flat] = desk.active(hidden, piece.flat, norm)

                self.walk.each(activate)
                pooled = self._pooled(x, out), self._pooled(hidden, out).to(out.dtype)
            return torch.addmm(*pooled, block.conv_out.T, out=out.view(-1, self.width))

        return last

    def _pooled(self, x, out):
        """Average of `x` (H * W, D) over the cells of `out` (h, w, D): (h * w, D)."""
        return pooled(x.view(1, *self.size, self.width), out.shape[:2])[0].flatten(0, 1)
