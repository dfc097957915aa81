"""Where pictures come from: a folder, a glob, a list of paths, one picture, or the frames of a video."""

import glob
import hashlib
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..formats import add_openers, page_count, picture_suffixes
from ..pixels import Pixels, decoded
from .listing import LISTS, VIDEOS, LeftOut, is_companion, located, pictures_below, read_list

_WILD = re.compile(r"[*?\[]")
_ORIENTATION = 0x0112  # EXIF's tag


@dataclass(frozen=True)
class Source:
    """One picture: its name in the output, the file that holds it, and in a video its frame and presentation time.

    `page` is that of a file with several, `broken` why a frame that a video announces can't be had.
    """

    name: str
    path: str
    frame: int | None = None
    time: int | None = None
    page: int | None = None
    broken: str | None = None


def find_sources(given, without=None, pages=False):
    """As `survey`, the list of Source alone."""
    return survey(given, without, pages)[0]


def survey(given, without=None, pages=False):
    """List the pictures that `given` stands for, sorted by name (frames and lists in their own order).

    Args:
        given: a folder (searched through for pictures), a glob ("**" reaches into folders), a .txt or .lst file with a
            path per line (relative ones from the list's own folder; empty lines and those that begin with # are
            passed over), a video, or a picture.
        without: the folder where the results go; what is in it is no picture.
        pages: whether every page or frame of a file with several is a picture, called NAME/frame-00000000 and so on.

    Returns:
        (list of Source, `LeftOut`). Names are relative to the folder, to the first part of the glob without wildcards,
        or to the list; they keep the suffix, so that `a.jpg` and `a.png` stay apart. Frames of a video are called
        frame-00000000 and so on.

    Raises:
        FileNotFoundError: nothing there, or nothing in it. ValueError: a video without frames, two entries of a list
            with one name, results that would lie among the pictures. RuntimeError: a video without the package av.
    """
    text = os.path.expanduser(os.fspath(given))
    path, left = Path(text), LeftOut()
    without = None if without is None else Path(without).expanduser().resolve()
    if path.is_dir():
        _refuse_same(path, without)
        found, left = pictures_below(path, without, _made_in(without, path))
        sources = [Source(place.relative_to(path).as_posix(), str(place)) for place in found]
    elif path.is_file() and path.suffix.lower() in VIDEOS:
        from .video import frames_of

        return [Source(f"frame-{n:08}", text, n, time, None, broken) for n, time, broken in frames_of(path)], left
    elif path.is_file() and path.suffix.lower() in LISTS:
        sources = _listed(path)
    elif os.path.lexists(path):
        sources = [Source(path.name, text)]
    elif _WILD.search(text):
        sources, left = _globbed(path, without)
    else:
        raise FileNotFoundError(f"input: there is no folder, file or video {text!r}; check the path")
    if not sources:
        told = "".join(f"; {line}" for _, line in left.lines())
        kind = "paths" if path.is_file() else f"pictures ({', '.join(sorted(picture_suffixes()))})"
        raise FileNotFoundError(f"input: {text!r} holds no {kind}{told}")
    return (_paged(sources) if pages else sources), left


def _refuse_same(folder, without):
    if without is not None and folder.resolve() == without:
        raise ValueError(
            f"output: {str(folder)!r} is the folder of the pictures, where results would be taken for pictures; name "
            f"another folder, or one inside it such as {str(folder / 'features')!r}"
        )


def _made_in(without, folder):
    """Absolute paths of what a run has made, where its folder contains that of the pictures."""
    from .manifest import NAME, Manifest

    if without is None or without not in folder.resolve().parents or not (without / NAME).is_file():
        return set()
    records = Manifest(without).records.values()
    return {str(folder.absolute() / os.path.relpath(without / path, folder.resolve()))
            for record in records for path in record.get("files", ())}  # fmt: skip


def _globbed(path, without):
    """Files that a glob matches. Brackets in folders that are there are letters, not wildcards."""
    fixed, rest = _before_wildcards(path)
    _refuse_same(fixed, without)
    made, left, sources = _made_in(without, fixed), LeftOut(), []
    named = bool(Path(path.name).suffix) and not _WILD.search(Path(path.name).suffix)  # *.jpg: all of them are meant
    suffixes = picture_suffixes()
    pattern = os.path.join(glob.escape(str(fixed)), *rest)
    for place in sorted(Path(name) for name in glob.glob(pattern, recursive=True)):
        inner = place.relative_to(fixed)
        if place.is_dir() or _inside(place, without) and not _inside(fixed, without) or str(place.absolute()) in made:
            continue
        if is_companion(inner.parts[:-1]) and not is_companion(rest):
            left["companions", "files in folders where systems keep them"] += 1
        elif not named and place.suffix.lower() not in suffixes:
            left.add_file(place)
        else:
            sources.append(Source(inner.as_posix(), str(place)))
    return sources, left


def _before_wildcards(path):
    """(the folder before the first wildcard, the parts from there on)."""
    fixed, parts = Path(path.anchor), path.parts[bool(path.anchor) :]
    for index, part in enumerate(parts):
        if index == len(parts) - 1 or _WILD.search(part) and not (fixed / part).exists():
            return fixed, parts[index:]
        fixed = fixed / part
    return fixed, ()


def _inside(path, folder):
    return folder is not None and (folder == Path(path).resolve() or folder in Path(path).resolve().parents)


def _listed(path):
    sources, seen = [], {}
    for number, line in read_list(path):
        place = located(line, path.parent)
        try:
            name = place.relative_to(os.path.normpath(path.parent)).as_posix()
        except ValueError:
            name = place.relative_to(place.anchor).as_posix().lstrip("./")
        if name in seen:
            raise ValueError(f"input: lines {seen[name]} and {number} of {path} both are {name!r}; keep one")
        seen[name] = number
        sources.append(Source(name, str(place)))
    return sources


def _paged(sources):
    """Every page of every file; what has one, or can't be opened, stays as it is."""
    with ThreadPoolExecutor(8) as pool:
        counts = pool.map(lambda source: header_of(source.path).get("frames", 1), sources)
        return [
            page
            for source, count in zip(sources, counts, strict=True)
            for page in (
                [Source(f"{source.name}/frame-{n:08}", source.path, page=n) for n in range(count)]
                if count > 1
                else [source]
            )
        ]


def fingerprint(path):
    """Size and time of change of a file as {"bytes", "mtime_ns"}; None where it can't be told."""
    try:
        state = os.stat(path)
    except (OSError, ValueError):
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


def header_of(path):
    """What the header of a picture tells, nothing decoded; {} where it can't be read.

    Returns:
        dict with "size" ([H, W] as it is stored), and "orientation" (2 to 8, as EXIF has it) and "frames" (pages of a
        document, frames of an animation) where they aren't 1.
    """
    from PIL import Image

    add_openers()
    about = {}
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return about
        with Image.open(path) as picture:
            about["size"] = list(picture.size[::-1])
            orientation = picture.getexif().get(_ORIENTATION, 1)
            if orientation in range(2, 9):
                about["orientation"] = orientation
            frames = page_count(picture)
            if frames > 1:
                about["frames"] = frames
    except Exception:  # whatever a decoder raises: reading the picture says what is wrong with it
        return about
    return about


def decode_source(source, about=None):
    """Decode one source.

    Args:
        about: a dict that is told the "size" of a frame of a video.

    Returns:
        (Pixels, SHA-256 of the file; None for a frame of a video).

    Raises:
        OSError, ValueError: it can't be read; the message says why. Decoders raise others, too.
    """
    if source.broken is not None:
        raise ValueError(source.broken)
    if source.frame is not None:
        from .video import read_frame

        frame = read_frame(source.path, source.time, source.frame)
        if about is not None:
            about["size"] = list(frame.shape[:2])
        return Pixels(frame, full=255), None
    mode = os.stat(source.path).st_mode if os.path.exists(source.path) else None
    if os.path.islink(source.path) and mode is None:
        raise FileNotFoundError(
            f"source: {source.path!r} is a link to {os.readlink(source.path)!r}, which is not there"
        )
    if mode is not None and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"source: {source.path!r} is no regular file but a pipe or a device")
    if source.page is None:
        return decoded(source.path), file_digest(source.path)
    from PIL import Image

    with Image.open(source.path) as picture:
        picture.seek(source.page)
        return decoded(picture), file_digest(source.path)


def read_source(source, size=None, patch_multiple=None):
    """Read one source at once: (image as `load_image` gives it, digest); errors as `decode_source`."""
    from ..image import from_pixels

    pixels, digest = decode_source(source)
    return from_pixels(pixels, size, patch_multiple), digest


def upright(about):
    """(H, W) of a picture as it is decoded, from what `header_of` tells; None where that is nothing."""
    size = about.get("size")
    return None if size is None else tuple(size[::-1] if about.get("orientation", 1) >= 5 else size)


def picture_size(source):
    """(H, W) of a source as it will be decoded, from its header; None where that can't be read.

    The orientation that a camera noted is taken into account. All frames of a video have the size of the first.
    """
    if source.frame is None:
        return upright(header_of(source.path))
    from .video import frame_size

    return frame_size(source.path)
