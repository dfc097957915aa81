"""Images as a whole, on other devices than CPUs: guidance and queries in few operations.

A device that computes all pixels at once gains nothing by pieces, and every operation costs it a launch. So images of
up to `PIXELS` pixels go through the network undivided, small ones several at a time; larger ones go piece by piece
(`walks.py`).
"""

import torch
import torch.nn.functional as F

from .norms import measured_affine
from .pooling import pooled
from .rotary import Rotary

PIXELS = 1 << 20  # of an image, at most: with 128 channels of float32 half a gigabyte
TOGETHER = 1 << 18  # pixels of several images that are computed at once
IMAGES = 4  # of D channels that the network holds at once, the queries among them


def fits(device, size):
    """Whether images of a size (H, W) are computed as a whole on a torch.device."""
    return device.type != "cpu" and size[0] * size[1] <= PIXELS


def together(size, batch):
    """How many of a batch of images (H, W) are computed at once."""
    return min(batch, max(1, TOGETHER // (size[0] * size[1])))


class Network:
    """The guidance network for images of one size.

    Args:
        weights: GuidanceWeights in the dtype to compute in.
        size: (H, W).
    """

    def __init__(self, weights, size, num_groups):
        self.weights, self.size, self.num_groups = weights, tuple(size), num_groups
        self.rotary = Rotary(weights.freqs, size, weights.image_conv.dtype)

    def __call__(self, image, query, key, norms):
        """Fill query (B, H', W', D), key (B, h, w, D) and norms (B, 12, 2, D) from an image (B, channels, H, W)."""
        weights, dim = self.weights, query.shape[-1]
        in_place, pixels = query.shape[1:3] == self.size, len(image) * self.size[0] * self.size[1]
        x = query.view(-1, dim) if in_place else query.new_empty(pixels, dim)
        hidden, spare, guide = (torch.empty_like(x) for _ in range(3))
        expand = weights.image_conv.T.expand(len(image), -1, -1)
        torch.bmm(image.to(query.dtype).flatten(2).mT, expand, out=x.view(len(image), -1, dim))
        of_image, of_query, of_key = norms.unflatten(1, (3, -1)).unbind(1)
        self._blocks(x, hidden, spare, weights.image, of_image)
        given, cos, sin, out = (tensor.view(-1, *self.size, dim) for tensor in (x, hidden, spare, guide))
        self.rotary(given, slice(None), slice(None), (cos[0], sin[0], out))
        torch.mm(guide, weights.query_conv.T, out=x)
        stream = torch.mm(guide, weights.key_conv.T, out=spare)
        self._blocks(stream, hidden, guide, weights.key, of_key, key)
        self._blocks(x, hidden, guide, weights.query, of_query, None if in_place else query)

    def _blocks(self, x, hidden, spare, blocks, norms, end=None):
        """ResBlocks on `x` (B * H * W, D), in place, or to their average over the cells of `end` (B, h, w, D).

        `hidden` and `spare`, of the shape of `x`, and `norms` (B, 2 * blocks, 2, D) are written to.
        """
        shape = len(norms), -1, x.shape[1]
        for i, block in enumerate(blocks):
            self._activate(x.view(shape), block.norm_in_weight, block.norm_in_bias, norms[:, 2 * i], spare.view(shape))
            torch.mm(spare, block.conv_in.T, out=hidden)
            inner = hidden.view(shape)
            self._activate(inner, block.norm_out_weight, block.norm_out_bias, norms[:, 2 * i + 1], inner)
            if end is None or block is not blocks[-1]:
                x.addmm_(hidden, block.conv_out.T)
            elif end.numel():  # what is linear comes after the average
                pictures = (y.view(len(end), *self.size, -1) for y in (x, hidden))
                averages = (pooled(picture, end.shape[1:3]).flatten(0, 2) for picture in pictures)
                torch.addmm(*averages, block.conv_out.T, out=end.view(-1, x.shape[1]))

    def _activate(self, x, weight, bias, norm, out):
        """`silu(norm(x))` of (B, P, D) into `out`; the norm's scale and shift into `norm` (B, 2, D)."""
        scale, shift = measured_affine(x, weight, bias, self.num_groups, norm).unbind(1)
        F.silu(torch.addcmul(shift[:, None], x, scale[:, None], out=out), inplace=True)


def project_queries(query, conv, norm, weight, bias, eps, out, convolved):
    """`plain.queries.project_queries` of images (B, H', W', D) as a whole into `out`, weights in the dtype of that.

    The convolution is nine products: images lie in a margin of zeros, one after the other, so that what a tap sees from
    the first pixel to the last is one run of the memory. What that gives for the margins is left out.
    """
    height, width, dim = query.shape[1:]
    taps, folded = conv.permute(2, 3, 1, 0).contiguous().flatten(0, 1), (weight * norm).T
    start = width + 3  # the first pixel of the first image
    several = together((height, width), len(query))
    for first in range(0, len(query), several):
        some = slice(first, first + several)
        padded = F.pad(query[some].to(out.dtype), (0, 0, 1, 1, 1, 1))
        length = padded[..., 0].numel() - 2 * start
        around, scale = torch.empty_like(padded), padded.new_empty(*padded.shape[:3], 1)
        run, seen = around.view(-1, dim)[start : start + length], padded.view(-1, dim)
        for i, tap in enumerate(taps):
            place = i // 3 * (width + 2) + i % 3
            torch.addmm(run, seen[place : place + length], tap, beta=int(i > 0), out=run)
        if convolved is not None:
            convolved[some] = around[:, 1:-1, 1:-1]
        squares = torch.mul(run, run, out=seen[:length])
        torch.mean(squares, 1, keepdim=True, out=scale.view(-1, 1)[start : start + length]).add_(eps).rsqrt_()
        del padded, seen, squares
        pixels = torch.mul(
            around[:, 1:-1, 1:-1], scale[:, 1:-1, 1:-1], out=query.new_empty(query[some].shape, dtype=out.dtype)
        )
        del around, run
        torch.addmm(bias, pixels.view(-1, dim), folded, out=out[some].view(-1, dim))
    return out
