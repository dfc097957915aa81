"""What the plain path takes in memory, and the door to large buffers for who does not compute: see `cpu.pages`."""

import torch

from ..cpu.crew import crew_size
from ..cpu.pages import kept, new_empty, nothing_kept, release
from . import whole
from .gathered import scratch_for
from .keys import GATHERED
from .unification import MANY_RESPONSES
from .walks import MANY_PIXELS

__all__ = ["forward_memory", "kept", "low_res_memory", "new_empty", "nothing_kept", "release", "tile_memory"]

FORWARD_BUFFERS = 24 << 20  # bytes that the pieces in work take during a forward
TILE_BUFFERS = 96 << 20  # the same for a tile of a prepared image, whatever its size
FOR_WORKER = 15 << 20  # bytes of each further worker
# Of an image in pieces, and as a whole, that other devices than CPUs hold at once: their pieces are large.
WALKING, CONVOLVING, CONVOLVING_WHOLE = 3, 5, 2


def forward_memory(image_shape, features_shape, output_size, dim, dtype, device, plain, values_shape=None):
    """Bytes at the peak of a forward without gradients beyond its inputs, its output included.

    Args:
        image_shape: (B, channels, H, W). features_shape: (B, C, h, w). output_size: (H', W').
        dim: width of queries and keys. dtype: of model, image and features. device: a torch.device.
        plain: whether plain PyTorch computes there, which widens 16 bits to float32 and works piece by piece.
        values_shape: (B, V, h, w) of what is mixed; None means the features.
    """
    values_shape = features_shape if values_shape is None else values_shape
    batch, attended = max(image_shape[0], features_shape[0]), values_shape[1]
    answers = max(batch, values_shape[0])
    height, width = output_size
    channels, h, w = features_shape[1:]
    compute = torch.promote_types(dtype, torch.float32) if plain else dtype
    pixels = image_shape[2] * image_shape[3]
    same_size = height * width == pixels
    image, query = (n * dim * compute.itemsize for n in (pixels, batch * height * width))
    keys = batch * h * w * dim * max(4, compute.itemsize)
    encoders = (2 if same_size else 3) * image + pixels * image_shape[1] * (16 + compute.itemsize)
    output = answers * height * width * attended * dtype.itemsize
    walking = convolving = attending = low_res = 0
    if plain and device.type != "cpu":
        wide, grid = compute.itemsize, h * w
        if whole.fits(device, image_shape[2:]):
            several = whole.together(image_shape[2:], image_shape[0])
            encoders = several * (whole.IMAGES - same_size) * image
        else:
            walking = WALKING * min(pixels, MANY_PIXELS) * dim * wide
        convolving = _convolving((height, width), batch, MANY_PIXELS, device) * dim * wide
        numbers = answers * height * width * attended
        attending = min(scratch_for(numbers), answers * height * width * (8 * grid + attended)) * wide
        responses = min(MANY_RESPONSES, batch * grid * channels * dim) * 5 // 4  # with what the filters meet
        merging = 4 * batch * grid * dim + min(GATHERED, 18 * batch * grid * dim)
        low_res = max(responses + batch * grid * channels, merging) * wide
    later = max(query + convolving, output + attending) + keys + kept(image, 2 if same_size else 3, device)
    beside_query = max(encoders + walking, low_res_memory(features_shape, dim, compute) + low_res, later)
    return query + beside_query + FORWARD_BUFFERS + _further_workers(device)


def low_res_memory(features_shape, dim, dtype):
    """Bytes at the peak of what is computed on the low-res grid: the unified features, then the keys."""
    batch, channels, h, w = features_shape
    wide = max(4, dtype.itemsize)
    keys = batch * h * w * dim * wide
    unit = batch * h * w * channels * wide
    return keys + max(unit + unit // batch, keys + 9 * keys // batch)


def tile_memory(tile, most, batch, dim, channels, element, labels, device, plain):
    """Bytes that a tile (height, width) of a prepared image takes while it is computed, itself included.

    Args:
        most: pixels of a piece of work. batch: images. dim: width of queries. channels: of the answers.
        element: bytes of one of their numbers. labels: whether the answer is an index in place of the channels.
        device, plain: see `forward_memory`.
    """
    pixels = (tile[0] + 2) * (tile[1] + 2)
    wide = max(4, element)
    piece = min(pixels, most) * wide
    answers = piece * channels + (8 * pixels if labels else pixels * channels * wide)
    buffers = TILE_BUFFERS + _further_workers(device)
    if plain and device.type != "cpu":
        size = tile[0] + 2, tile[1] + 2
        buffers += _convolving(size, batch, min(most, MANY_PIXELS), device) * dim * wide
    return buffers + batch * (2 * piece * dim + answers)


def _further_workers(device):
    return (crew_size(device) - 1) * FOR_WORKER


def _convolving(size, batch, most, device):
    """Pixels of queries (H, W) that their convolution holds beside itself and its result, off CPUs."""
    pixels = size[0] * size[1]
    if whole.fits(device, size):
        return CONVOLVING_WHOLE * whole.together(size, batch) * pixels
    return CONVOLVING * min(pixels, most)
