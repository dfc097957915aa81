"""Which pictures are computed together."""

from concurrent.futures import ThreadPoolExecutor

import torch

from ..image import target_size
from ..model import AnyUp
from .settings import output_size_of
from .sources import picture_size
from .stages import lanes

GPU_BATCH = 8  # pictures of one size that a GPU takes at once


def batches_of(sources, wanted, batch_size, patch, settings):
    """Pictures that are computed together: (sources, names of those to be written).

    Args:
        batch_size: how many; or a function from the size (H, W) of the pictures to that.

    Which pictures share a batch depends on the sources alone, not on what is done: rounding may depend on the batch,
    and a run that was interrupted gives the same files as one that was not.
    """
    groups, aspect = {}, isinstance(settings.output_size, int) and settings.aspect == "picture"
    if batch_size == 1 or isinstance(settings.size, tuple) and not aspect:
        groups[settings.size, None] = sources
    else:
        with ThreadPoolExecutor(8) as pool:
            for index, (source, size) in enumerate(zip(sources, pool.map(picture_size, sources), strict=True)):
                if size is None:
                    key = ("unreadable", index), None
                else:
                    target = target_size(size, settings.size, patch)
                    key = target, output_size_of(settings, target, size) if aspect else None
                groups.setdefault(key, []).append(source)
    for (size, _), group in groups.items():
        several = batch_size
        if callable(batch_size):  # a picture that can't be read is a group of its own, of no size
            several = batch_size(size) if len(group) > 1 else 1
        for first in range(0, len(group), several):
            batch = tuple(group[first : first + several])
            names = frozenset(source.name for source in batch) & wanted
            if names:
                yield batch, names


def at_once(size, encoder, settings, device):
    """How many pictures (H, W) a GPU takes at once: what half of its memory holds, from 1 to `GPU_BATCH`.

    Where two such batches are in work at a time, both lie in that half.

    All of its memory counts, not what happens to be free, so that every run on such a device makes the same batches.
    """
    grid = [max(1, n // encoder.patch_size) for n in size]
    height, width = output_size_of(settings, size)
    with torch.device("meta"):
        model = AnyUp()
    one = model.estimate_memory((1, 3, *size), (1, encoder.dim, *grid), (height, width), device=device)
    one += height * width * encoder.dim * 4  # the answer in the dtype that is written, beside the one that is computed
    return max(1, min(GPU_BATCH, _memory_of(torch.device(device)) // (2 * lanes(device)) // one))


def _memory_of(device):
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return getattr(torch, device.type).get_device_properties(device).total_memory
