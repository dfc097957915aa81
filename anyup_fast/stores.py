"""Arrays on disk that are filled tile by tile: recognisable while they are incomplete, and resumable.

And the way of tiles from a GPU to the host.
"""

import json
import os

import numpy as np
import torch

from .files import expanded

SUFFIXES = (".npy", ".zarr")


class Store:
    """An array on disk (.npy or .zarr) that carries its name only when every tile is in it.

    Until then it lies beside as `NAME.partial`, with the tiles that are done listed in `NAME.partial.jsonl`: first line
    the settings, then a line for each tile, written after the tile itself.

    Args:
        path: the file (.npy) or folder (.zarr) to make.
        shape: of the array, rows and columns last. dtype: numpy's. tile: (height, width) of the tiles.
        settings: what the content depends on, as JSON; a store is only resumed with equal ones.
        resume: go on with an unfinished store; start where there is none.

    Raises:
        FileExistsError: `path` exists, or an unfinished store does and `resume` is not given.
        ValueError: another suffix, or an unfinished store of other settings.
        RuntimeError: .zarr without the package zarr.
    """

    def __init__(self, path, shape, dtype, tile, settings, resume=False):
        self.path = expanded(path)
        if self.path.suffix not in SUFFIXES:
            raise ValueError(f"out: a path must end in {' or '.join(SUFFIXES)}, got {str(path)!r}")
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.progress = self.path.with_name(self.path.name + ".partial.jsonl")
        if self.path.exists():
            raise FileExistsError(f"out: {self.path} exists; remove it or choose another name")
        dtype = np.dtype(dtype)
        settings = json.loads(json.dumps({**settings, "shape": shape, "dtype": dtype.name, "tile": tile}))
        self.done = set()
        unfinished = self.progress.exists()
        if unfinished and not resume:
            raise FileExistsError(f"out: {self.partial} is unfinished; finish it with resume=True, or remove it")
        if unfinished:
            first, *lines = self.progress.read_text(encoding="utf-8").splitlines(keepends=True)
            if json.loads(first) != settings:
                differing = sorted(k for k in settings if json.loads(first).get(k) != settings[k])
                raise ValueError(f"resume: {self.partial} was begun with other settings: {', '.join(differing)}")
            self.done = {tuple(json.loads(line)) for line in lines if line.endswith("\n")}
            self._rewrite(settings)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not unfinished:
            self._create(shape, dtype, tile)
            self._rewrite(settings)

    def _rewrite(self, settings):
        lines = [settings, *sorted(self.done)]
        aside = self.progress.with_name(self.progress.name + ".new")
        aside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        os.replace(aside, self.progress)

    def _create(self, shape, dtype, tile):
        if self.path.suffix == ".npy":
            np.lib.format.open_memmap(self.partial, "w+", dtype, tuple(shape))
        else:
            chunks = (*shape[:-2], *(min(n, m) for n, m in zip(tile, shape[-2:], strict=True)))
            store = str(self.partial)
            open_zarr().create_array(store=store, shape=shape, chunks=chunks, dtype=dtype, overwrite=True)

    def _array(self):
        """The array, opened for one tile: a mapping that stays would count as memory, page by page."""
        if self.path.suffix == ".npy":
            return np.load(self.partial, mmap_mode="r+")
        return open_zarr().open_array(store=str(self.partial), mode="r+")

    def write(self, box, values):
        """Put a tile (..., height, width) at the box (top, left, height, width), and note that it is there."""
        top, left, height, width = box
        array = self._array()
        array[..., top : top + height, left : left + width] = values
        if isinstance(array, np.memmap):
            array.flush()
        with open(self.progress, "a", encoding="utf-8") as file:
            file.write(json.dumps(box) + "\n")
        self.done.add(tuple(box))

    def finish(self):
        """Give the store its name; returns its path."""
        os.replace(self.partial, self.path)
        self.progress.unlink()
        return self.path


def open_zarr():
    """The package zarr.

    Raises:
        RuntimeError: it is not installed.
    """
    try:
        import zarr
    except ModuleNotFoundError as error:
        raise RuntimeError("out: .zarr needs the package zarr: pip install 'anyup-fast[stream]'") from error
    return zarr


def stored_dtype(dtype, classes=None):
    """Name of numpy's dtype for features of torch's `dtype`, or for labels of so many classes."""
    if classes is not None:
        return "uint8" if classes <= 256 else "int32"
    return "float32" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch.")


def as_stored(part, dtype):
    """A tensor on the CPU as an array of numpy's `dtype`."""
    part = part.float() if part.dtype == torch.bfloat16 else part
    return part.numpy().astype(dtype, copy=False)


def on_host(parts, kept):
    """Iterate over (box, tile on the CPU); from a CUDA GPU a tile is copied while the next one is computed.

    Args:
        parts: pairs (box, tensor), computed as they are asked for.
        kept: dict in which the stream that copies stays for the next time.
    """
    pending = None
    for box, part in parts:
        if part.device.type != "cuda":
            yield box, part.cpu()
            continue
        copier = kept.setdefault("copier", torch.cuda.Stream(part.device))
        copier.wait_stream(torch.cuda.current_stream(part.device))
        with torch.cuda.stream(copier):
            host = torch.empty_like(part, device="cpu", pin_memory=True).copy_(part, non_blocking=True)
            part.record_stream(copier)
            copied = copier.record_event()
        if pending is not None:
            yield _awaited(*pending)
        pending = box, host, copied
    if pending is not None:
        yield _awaited(*pending)


def _awaited(box, host, copied):
    copied.synchronize()
    return box, host
