"""Files of a run: encoded, written aside, read back, renamed; and read again.

Everything is made below OUTPUT/.partial and renamed from there, so that whatever carries its name is complete.
"""

import hashlib
import io
import json
import os
import shutil
import uuid
from pathlib import Path

import numpy as np
import torch

from ..stores import open_zarr

PARTIAL = ".partial"
STORE = "store.zarr"
ZARR_CHUNK = 512  # rows and columns of a chunk

_BLOCK = 1 << 20


def aside(folder):
    """A new path below OUTPUT/.partial, whose folder exists."""
    place = Path(folder) / PARTIAL
    place.mkdir(parents=True, exist_ok=True)
    return place / uuid.uuid4().hex


def clear_partial(folder):
    """Remove what killed runs have left unfinished."""
    if (Path(folder) / PARTIAL).exists():
        shutil.rmtree(Path(folder) / PARTIAL)


def paths_of(name, settings):
    """Relative paths of the files (with zarr: folders) of a picture, one for each thing that is kept apart."""
    if settings.format == "safetensors":
        return [f"{name}.safetensors"]
    if settings.format == "zarr":
        return [f"{STORE}/{name}{'' if thing == settings.storage[0] else '.' + thing}" for thing in settings.storage]
    suffix = settings.format
    return [f"{name}.{suffix if thing == settings.storage[0] else f'{thing}.{suffix}'}" for thing in settings.storage]


def save(folder, name, tensors, settings):
    """Write what is kept of a picture.

    Args:
        folder: of the run. name: of the picture. tensors: what `settings.storage` names, on the CPU.

    Returns:
        relative path -> {"bytes", "sha256"}.

    Raises:
        OSError: a disk that is full or fails. Nothing half written carries its name then.
    """
    paths = paths_of(name, settings)
    if settings.format == "zarr":
        return {
            path: _save_array(folder, path, tensors[thing])
            for path, thing in reversed(list(zip(paths, settings.storage, strict=True)))
        }
    if settings.format == "safetensors":
        contents = [_safetensors(tensors)]
    else:
        encode = _npy if settings.format == "npy" else _png
        contents = [encode(tensors[thing]) for thing in settings.storage]
    # The answer last: where it is, everything is.
    return {path: _save_bytes(folder, path, data) for path, data in reversed(list(zip(paths, contents, strict=True)))}


def _safetensors(tensors):
    from safetensors.torch import save as encode

    return encode(tensors)


def _npy(tensor):
    file = io.BytesIO()
    np.save(file, tensor.numpy(), allow_pickle=False)
    return file.getbuffer()


def _png(tensor):
    from PIL import Image

    file = io.BytesIO()
    array = tensor.numpy()
    if array.dtype == np.int32:
        raise ValueError("format: png holds at most 65,536 classes; use npy or safetensors")
    Image.fromarray(array).save(file, "png", compress_level=4)
    return file.getbuffer()


def _save_bytes(folder, path, data):
    target, place = Path(folder) / path, aside(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(place, "wb", buffering=0) as file:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
            os.fsync(file.fileno())
        _check_written(place, data)
        os.replace(place, target)
    finally:
        place.unlink(missing_ok=True)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _check_written(place, data):
    """Raise OSError unless the file holds exactly the data."""
    view, read = memoryview(data), 0
    with open(place, "rb", buffering=0) as file:
        while part := file.read(_BLOCK):
            if part != view[read : read + len(part)]:
                raise OSError(f"{place} does not hold what was written into it: the disk or the file system fails")
            read += len(part)
    if read != len(view):
        raise OSError(f"{place} holds {read} of the {len(view)} bytes written into it: is the disk full?")


def _save_array(folder, path, tensor):
    zarr = open_zarr()
    array, place, target = tensor.numpy(), aside(folder), Path(folder) / path
    chunks = tuple(min(n, ZARR_CHUNK) for n in array.shape)
    chunks = (*array.shape[:-2], *chunks[-2:]) if array.ndim >= 2 and array.dtype != np.uint8 else chunks
    try:
        made = zarr.create_array(
            store=str(place), shape=array.shape, chunks=chunks, dtype=array.dtype, compressors=None
        )
        made[...] = array
        if not np.array_equal(zarr.open_array(store=str(place), mode="r")[...], array):
            raise OSError(f"{place} does not hold what was written into it: the disk or the file system fails")
        _make_groups(folder, Path(path).parent)
        if target.exists():
            os.replace(target, aside(folder))
        os.replace(place, target)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return folder_digest(target)


def _make_groups(folder, group):
    """The zarr groups on the way to an array: a small file in each folder."""
    for part in reversed([group, *group.parents][:-1]):
        place = Path(folder) / part / "zarr.json"
        if not place.exists():
            _save_bytes(folder, part / "zarr.json", json.dumps({"zarr_format": 3, "node_type": "group"}).encode())


def folder_digest(path):
    """{"bytes", "sha256"} over names and contents of all files below a folder; of a file, over its contents."""
    path, digest, size = Path(path), hashlib.sha256(), 0
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        if path.is_dir():
            digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        with open(file, "rb") as opened:
            while part := opened.read(_BLOCK):
                digest.update(part)
                size += len(part)
    return {"bytes": size, "sha256": digest.hexdigest()}


def size_on_disk(path):
    """Bytes of a file, or of all files below a folder; None where there is neither."""
    path = Path(path)
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return path.stat().st_size if path.exists() else None


def remove(folder, path):
    """Remove a file or array of the run, if it is there."""
    place = Path(folder) / path
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def read_back(folder, name, settings):
    """What `save` has kept of a picture, as arrays that read no more of the file than is asked for.

    Returns:
        thing -> `Stored`.
    """
    paths = [Path(folder) / path for path in paths_of(name, settings)]
    if settings.format == "safetensors":
        return {thing: Stored(_slices(paths[0], thing)) for thing in settings.storage}
    if settings.format == "zarr":
        zarr = open_zarr()
        opened = [zarr.open_array(store=str(path), mode="r") for path in paths]
    elif settings.format == "npy":
        opened = [np.load(path, mmap_mode="r") for path in paths]
    else:
        from PIL import Image

        opened = [np.asarray(Image.open(path)) for path in paths]
    return {thing: Stored(array) for thing, array in zip(settings.storage, opened, strict=True)}


def _slices(path, thing):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.get_slice(thing)


class Stored:
    """An array on disk. `stored[...]` and any slices give tensors."""

    def __init__(self, array):
        self.array = array

    @property
    def shape(self):
        """Of the whole array."""
        shape = self.array.get_shape() if hasattr(self.array, "get_shape") else self.array.shape
        return tuple(shape)

    def __getitem__(self, place):
        part = self.array[place]
        return part if isinstance(part, torch.Tensor) else torch.from_numpy(np.array(part))
