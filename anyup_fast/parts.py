"""What `Prepared` asks for: how its methods run, and queries of parts of an image by the fused kernels."""

import copy
import functools
import hashlib

import torch

from .checks import checked_tile
from .endings import step
from .kept import kept_of
from .ops.choice import use_backend
from .ops.guidance import guided_queries
from .plain.pooling import Bins, pooled_part
from .plain.precision import as_asked
from .plain.walks import pieces
from .stores import as_stored, on_host

MOST_BYTES = 40 << 20  # of one of the three pictures of a rectangle that is computed at a time


def answer(method):
    """Run a method of `Prepared` on the back end that it was prepared with, without recording gradients.

    What is mixed is an exception: where it asks for gradients, the mixing is recorded (`Prepared._recorded`).
    """

    @functools.wraps(method)
    def run(self, *arguments, **options):
        if torch.is_grad_enabled() and self._value.requires_grad and not self._argmax:
            self = copy.copy(self)
            self._records = True
        with torch.no_grad(), use_backend(self._backend), as_asked(self._precision), step():
            return method(self, *arguments, **options)

    return run


def exactly(method):
    """Run a method of `Prepared` without autocast."""

    @functools.wraps(method)
    def run(self, *arguments):
        with torch.autocast(self._features.device.type, enabled=False):
            return method(self, *arguments)

    return run


def filled(out, shape, dtype, parts, kept):
    """`out`, a tensor or an array of `shape` (numpy's `dtype` in an array), with the tiles of `parts` in it.

    Args:
        parts: pairs ((top, left, height, width), tile). kept: of `on_host`.
    """
    if tuple(out.shape) != shape:
        raise ValueError(f"out: need shape {shape}, got {tuple(out.shape)}")
    elsewhere = isinstance(out, torch.Tensor) and out.device.type != "cpu"
    for (top, left, height, width), part in parts if elsewhere else on_host(parts, kept):
        part = part if isinstance(out, torch.Tensor) else as_stored(part, dtype)
        out[..., top : top + height, left : left + width] = part
    return out


def digest_of(settings, tensors):
    """Settings and tensors as a hexadecimal number."""
    digest = hashlib.sha256(repr(settings).encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def chosen_tile(tile, max_memory, memory):
    """(height, width) of the tiles of a stream: those given, or the largest whose `memory` (bytes) stays within."""
    if tile is not None:
        pair = checked_tile(tile)
        if max_memory is not None and memory(pair) > max_memory:
            raise ValueError(f"max_memory: tiles of {pair} take {memory(pair)} bytes, got {max_memory}")
        return pair
    if max_memory is None:
        return 256, 256
    sides = [side for side in (2048, 1024, 512, 256, 128, 64, 32) if memory((side, side)) <= max_memory]
    if not sides:
        raise ValueError(f"max_memory: need at least {memory((32, 32))} bytes, got {max_memory}")
    return sides[0], sides[0]


def whole_queries(model, image, shared, size):
    """Queries (B, *size, D) of all of an image (B, channels, H, W); None where Triton's kernels are not taken.

    It takes the memory of a forward.

    Args:
        shared: with norms and key, as `Prepared` keeps them.
    """
    return _queries(model, image, shared, size, (0, 0))


def part_queries(model, image, shared, rows, cols, size):
    """Queries (B, rows, cols, D) of two slices of an output of `size`, or None, as `whole_queries`.

    None also where an output of another size than the image's needs more pixels than `MOST_BYTES` have room for.
    """
    whole = tuple(image.shape[2:])
    axes = [Bins(n, m, part) for n, m, part in zip(whole, size, (rows, cols), strict=True)]
    down, across = (axis.needed for axis in axes)
    dim, itemsize = shared["norms"].shape[-1], shared["key"].dtype.itemsize
    most = MOST_BYTES // (len(image) * dim * itemsize)
    height, width = down.stop - down.start, across.stop - across.start
    if height * width <= most:
        box = image[:, :, down, across]
        query = _queries(model, box, shared, (height, width), (down.start, across.start), whole)
        return query if query is None or size == whole else pooled_part(query, *axes)
    if size != whole:
        return None
    out = None
    for r, c in pieces(height, width, max(1, most)):
        place = down.start + r.start, across.start + c.start
        box = image[:, :, place[0] : down.start + r.stop, place[1] : across.start + c.stop]
        query = _queries(model, box, shared, tuple(box.shape[2:]), place, whole)
        if query is None:
            return None
        out = query.new_empty(len(image), height, width, dim) if out is None else out
        out[:, r, c] = query
    return out


def _queries(model, box, shared, size, place, whole=None):
    kept = kept_of(model, box)
    weights = model.guidance_weights() if kept is None else kept.of("guidance", model.guidance_weights)
    options = dict(dtype=shared["key"].dtype, whole=whole or tuple(box.shape[2:]), place=place, kept=kept)
    return guided_queries(box, weights, shared["norms"], size, **options)
