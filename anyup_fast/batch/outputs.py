"""Files of a run: encoded, written aside, read back, renamed; and read again.

Everything is made below OUTPUT/.partial and renamed from there, so that whatever carries its name is complete.
"""

import errno
import hashlib
import io
import json
import os
import shutil
import uuid
from functools import cache
from pathlib import Path

import numpy as np
import torch

from ..stores import open_zarr

PARTIAL = ".partial"
STORE = "store.zarr"
CLASSES = "classes"  # what the names are called inside of files
CLASS_COLOURS = "0072b2 e69f00 009e73 cc79a7 56b4e9 d55e00 f0e442 eeeeee 4b2a8c"  # as in viewer/colours.js
ZARR_CHUNK = 512  # rows and columns of a chunk

_BLOCK = 1 << 20
_OWN = {"head", "pca"}  # with a suffix, files of the run itself
_OF_STORES = {"zarr.json", ".zgroup", ".zattrs", ".zarray"}


def aside(folder):
    """A new path below OUTPUT/.partial, whose folder exists."""
    place = Path(folder) / PARTIAL
    place.mkdir(parents=True, exist_ok=True)
    return place / uuid.uuid4().hex


def clear_partial(folder):
    """Remove what killed runs have left unfinished."""
    if (Path(folder) / PARTIAL).exists():
        shutil.rmtree(Path(folder) / PARTIAL)


def probe(folder):
    """Write a small file into the folder of a run, read it back and remove it.

    Raises:
        OSError: that can't be done; the message says why, and that no picture is at fault.
    """
    try:
        path = f"{PARTIAL}/{uuid.uuid4().hex}"
        _save_bytes(folder, path, b"a file can be written here\n")
        remove(folder, path)
    except OSError as error:
        number = error.errno or errno.EIO
        raise OSError(number, f"output: {folder} can't be written ({error.strerror or error})") from error


def paths_of(name, settings, limit=255):
    """Relative paths of the files (with zarr: folders) of a picture, one for each thing that is kept apart.

    Args:
        limit: bytes that the name of a file may have. A longer one is cut, and a digest of it appended; so is one that
            a file of the run itself has.
    """
    *folders, leaf = name.split("/")
    longest = max(len(_suffix(thing, settings)) for thing in settings.storage)
    own = _OF_STORES if settings.format == "zarr" else () if folders else _OWN
    leaf = _shortened(leaf, limit - longest, leaf in own)
    folders = [_shortened(part, limit, not index and part in (STORE, PARTIAL)) for index, part in enumerate(folders)]
    place = "/".join([STORE] * (settings.format == "zarr") + folders + [leaf])
    kept = settings.storage[:1] if settings.format == "safetensors" else settings.storage
    return [place + _suffix(thing, settings) for thing in kept]


def _suffix(thing, settings):
    inner = "" if thing == settings.storage[0] else f".{thing}"
    return inner if settings.format == "zarr" else f"{inner}.{settings.format}"


def _shortened(part, limit, taken=False):
    """A part of a path in at most `limit` bytes, of one that is longer or `taken` its beginning and a digest."""
    if len(os.fsencode(part)) <= limit and not taken:
        return part
    stem, kept = f"~{hashlib.sha256(os.fsencode(part)).hexdigest()[:16]}", ""
    for letter in part:
        if len(os.fsencode(kept + letter)) + len(stem) > limit:
            break
        kept += letter
    return kept + stem


def longest_name(folder):
    """Bytes that the name of a file may have in a folder."""
    if hasattr(os, "pathconf") and "PC_NAME_MAX" in os.pathconf_names:
        return os.pathconf(folder, "PC_NAME_MAX")
    return 255


def save(folder, name, tensors, settings):
    """Write what is kept of a picture.

    Args:
        folder: of the run. name: of the picture. tensors: what `settings.storage` names, on the CPU.
            Names of classes in the settings go along: in the metadata of safetensors and as text in PNG a JSON list
            called `classes`, in zarr an attribute. npy has no place for them.

    Returns:
        relative path -> {"bytes", "sha256"}.

    Raises:
        OSError: a disk that is full or fails. Nothing half written carries its name then.
    """
    paths = paths_of(name, settings, longest_name(folder))
    about = None if settings.classes is None else {CLASSES: json.dumps(settings.classes, ensure_ascii=False)}
    if settings.format == "zarr":
        return {
            path: _save_array(folder, path, tensors[thing], settings.zarr_format, settings.classes)
            for path, thing in reversed(list(zip(paths, settings.storage, strict=True)))
        }
    if settings.format == "safetensors":
        contents = [_safetensors(tensors, about)]
    elif settings.format == "png":
        contents = [_png(tensors[thing], about) for thing in settings.storage]
    else:
        contents = [_npy(tensors[thing]) for thing in settings.storage]
    # The answer last: where it is, everything is.
    return {path: _save_bytes(folder, path, data) for path, data in reversed(list(zip(paths, contents, strict=True)))}


def _safetensors(tensors, about):
    from safetensors.torch import save as encode

    return encode(tensors, about)


def _npy(tensor):
    file = io.BytesIO()
    np.save(file, tensor.numpy(), allow_pickle=False)
    return file.getbuffer()


@cache
def _palette():
    """Colours of 256 classes: nine that common kinds of colour vision tell apart, each other far from those before."""
    colours = [tuple(bytes.fromhex(colour)) for colour in CLASS_COLOURS.split()]
    levels = np.minimum(np.arange(9) * 32, 255)
    others = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    apart = np.abs(others[:, None] - np.array(colours)).sum(-1).min(1)
    while len(colours) < 256:
        colours.append(others[apart.argmax()])
        apart = np.minimum(apart, np.abs(others - colours[-1]).sum(-1))
    return np.array(colours, np.uint8).tobytes()


def _png(tensor, about):
    from PIL import Image, PngImagePlugin

    file = io.BytesIO()
    array = tensor.numpy()
    if array.dtype == np.int32:
        raise ValueError("format: png holds at most 65,536 classes; use npy or safetensors")
    notes = PngImagePlugin.PngInfo()
    for key, text in (about or {}).items():
        notes.add_itxt(key, text)
    picture = Image.fromarray(array)
    if picture.mode == "L":  # labels, which would all look black; their values stay the pixels'
        picture.putpalette(_palette())
    picture.save(file, "png", compress_level=4, pnginfo=notes)
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


def _save_array(folder, path, tensor, zarr_format, classes=None):
    zarr = open_zarr()
    array, place, target = tensor.numpy(), aside(folder), Path(folder) / path
    chunks = tuple(min(n, ZARR_CHUNK) for n in array.shape)
    chunks = (*array.shape[:-2], *chunks[-2:]) if array.ndim >= 2 and array.dtype != np.uint8 else chunks
    try:
        made = zarr.create_array(
            store=str(place), shape=array.shape, chunks=chunks, dtype=array.dtype, compressors=None,
            zarr_format=zarr_format,
        )  # fmt: skip
        if classes is not None:
            made.attrs[CLASSES] = list(classes)
        made[...] = array
        if not np.array_equal(zarr.open_array(store=str(place), mode="r")[...], array):
            raise OSError(f"{place} does not hold what was written into it: the disk or the file system fails")
        _make_groups(folder, Path(path).parent, zarr_format)
        if target.exists():
            os.replace(target, aside(folder))
        os.replace(place, target)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return folder_digest(target)


def _make_groups(folder, group, zarr_format):
    """The zarr groups on the way to an array: a small file in each folder."""
    about = {"zarr_format": zarr_format, **({"node_type": "group"} if zarr_format == 3 else {})}
    for part in reversed([group, *group.parents][:-1]):
        path = part / ("zarr.json" if zarr_format == 3 else ".zgroup")
        if not (Path(folder) / path).exists():
            _save_bytes(folder, path, json.dumps(about).encode())


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


def read_back(folder, files, settings):
    """What `save` has kept of a picture, as arrays that read no more of the file than is asked for.

    Args:
        files: what `save` gave.

    Returns:
        thing -> `Stored`.
    """
    paths = [Path(folder) / path for path in reversed(list(files))]
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
