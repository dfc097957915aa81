"""The plan of a forward that needs the least memory: the image is passed over, the output filled tile by tile."""

import torch

from .checks import is_count
from .layers import broadcast
from .plain.memory import low_res_memory, nothing_kept
from .prepared import Prepared


def check_max_memory(max_memory, recorded, reason):
    """ValueError for a `max_memory` that is no number of bytes, or that can't be kept.

    Args:
        recorded: whether gradients are recorded.
        reason: why the model can't be asked for tiles: one sentence, or None.
    """
    if not is_count(max_memory):
        raise ValueError(f"max_memory: need a positive number of bytes or None, got {max_memory!r}")
    if recorded:
        reason = "gradients are recorded, whose layers keep their inputs; call it under torch.no_grad()"
    if reason is not None:
        raise ValueError(f"max_memory: cannot be kept: {reason}")


def filled_by_tiles(model, image, features, value, output_size, max_memory):
    """What attends to `value` (B, C', h, w) in `model.forward(image, features, output_size)`: (B, C', H', W').

    Raises:
        ValueError: `max_memory` is too small; the message gives the least that suffices.
    """
    out = value.numel() // value[0, 0].numel() * output_size[0] * output_size[1] * value.element_size()
    wide = torch.promote_types(model.rope.freqs.dtype, torch.float32)
    low_res = low_res_memory((1, *features.shape[1:]), model.rope.freqs.shape[1], wide)
    filled = None
    image, features, value = broadcast(image, features, value)
    with nothing_kept():
        for b in range(len(image)):
            rows = image[b].permute(1, 2, 0)
            prepared = Prepared(
                model, image[b : b + 1], features[b : b + 1], lambda first, last, rows=rows: rows[first:last].to(wide)
            ).showing(value[b : b + 1])
            if filled is None:
                least = prepared.tile_memory((32, 32)) + out + low_res
                if least > max_memory:
                    raise ValueError(f"max_memory: {max_memory} bytes are too few, the least that suffices is {least}")
                filled = value.new_empty(len(image), *output_size, value.shape[1]).permute(0, 3, 1, 2)
            tiles = max_memory - out - low_res
            prepared.stream(output_size=output_size, out=filled[b : b + 1], max_memory=tiles)
    return filled
