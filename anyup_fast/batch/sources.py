"""Where pictures come from: a folder, a glob, a list of paths, one picture, or the frames of a video."""

import glob
import hashlib
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..image import SUFFIXES, load_image

logger = logging.getLogger("anyup_fast")

LISTS = (".txt", ".lst")
VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")

_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Source:
    """One picture: its name in the output, the file that holds it, and in a video its frame and presentation time."""

    name: str
    path: str
    frame: int | None = None
    time: int | None = None


def find_sources(given, without=None):
    """List the pictures that `given` stands for, sorted by name (frames and lists in their own order).

    Args:
        given: a folder (searched through for pictures), a glob ("**" reaches into folders), a .txt or .lst file with a
            path per line (relative ones from the list's own folder; empty lines and those that begin with # are
            passed over), a video, or a picture.
        without: a folder to leave out, where the results go.

    Returns:
        list of Source. Names are relative to the folder, to the first part of the glob without wildcards, or to the
        list; they keep the suffix, so that `a.jpg` and `a.png` stay apart. Frames are called frame-00000000 and so on.

    Raises:
        FileNotFoundError: nothing there, or nothing in it. ValueError: a video without frames, two entries of a list
            with one name. RuntimeError: a video without the package av.
    """
    text, path = os.fspath(given), Path(given)
    if path.is_dir():
        sources = _below(path, sorted(path.rglob("*")), without)
        wanted = f"pictures ({', '.join(sorted(SUFFIXES))})"
    elif path.is_file() and path.suffix.lower() in VIDEOS:
        from .video import frame_times

        times = frame_times(path)
        return [Source(f"frame-{index:08}", text, index, time) for index, time in enumerate(times)]
    elif path.is_file() and path.suffix.lower() in LISTS:
        sources = _listed(path)
        wanted = "paths"
    elif path.is_file():
        return [Source(path.name, text)]
    elif _WILD.search(text):
        fixed = Path(*_before_wildcards(path.parts))
        found = (Path(name) for name in sorted(glob.glob(text, recursive=True)))
        sources = [s for s in _named(fixed, found) if not _inside(s.path, without)]
        wanted = "files"
    else:
        raise FileNotFoundError(f"input: there is no folder, file or video {text!r}; check the path")
    if not sources:
        raise FileNotFoundError(f"input: {text!r} holds no {wanted}")
    return sources


def _before_wildcards(parts):
    for part in parts[:-1]:
        if _WILD.search(part):
            return
        yield part


def _below(folder, paths, without):
    found = [path for path in paths if not _inside(path, without)]
    videos = sum(path.suffix.lower() in VIDEOS for path in found)
    if videos:
        logger.info("%d videos below %s are left out; name one as the input to have its frames", videos, folder)
    return _named(folder, (path for path in found if path.suffix.lower() in SUFFIXES))


def _named(folder, paths):
    return [Source(path.relative_to(folder).as_posix(), str(path)) for path in paths if path.is_file()]


def _inside(path, folder):
    return folder is not None and Path(folder).resolve() in Path(path).resolve().parents


def _listed(path):
    sources, seen = [], {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        place = Path(os.path.normpath(path.parent / line))
        try:
            name = place.relative_to(os.path.normpath(path.parent)).as_posix()
        except ValueError:
            name = place.relative_to(place.anchor).as_posix().lstrip("./")
        if name in seen:
            raise ValueError(f"input: lines {seen[name]} and {number} of {path} both are {name!r}; keep one")
        seen[name] = number
        sources.append(Source(name, str(place)))
    return sources


def fingerprint(path):
    """Size and time of change of a file as {"bytes", "mtime_ns"}; None where it can't be told."""
    try:
        state = os.stat(path)
    except OSError:
        return None
    return {"bytes": state.st_size, "mtime_ns": state.st_mtime_ns}


def file_digest(path):
    """SHA-256 of a file, as a hexadecimal number."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file):
    digest = hashlib.sha256()
    while part := file.read(1 << 20):
        digest.update(part)
    return digest.hexdigest()


def read_source(source, size, patch_multiple):
    """Decode one source.

    Returns:
        (image (3, H, W) as of `load_image`, SHA-256 of the file; None for a frame).

    Raises:
        OSError, ValueError: it can't be read; the message says why.
    """
    if source.frame is not None:
        from .video import read_frame

        return load_image(read_frame(source.path, source.time), size, patch_multiple), None
    return load_image(source.path, size, patch_multiple), file_digest(source.path)


def picture_size(source):
    """(H, W) of a source as it will be decoded, from its header; None where that can't be read.

    The orientation that a camera noted is taken into account. All frames of a video have one size.
    """
    if source.frame is not None:
        return (0, 0)
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(source.path) as picture:
            width, height = picture.size
            turned = picture.getexif().get(0x0112) in (5, 6, 7, 8)
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
    return (width, height) if turned else (height, width)
