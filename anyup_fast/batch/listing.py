"""What counts as a picture in a folder, what is left out and why, and lists of paths as other systems write them."""

import codecs
import os
from collections import Counter
from pathlib import Path

from ..formats import picture_suffixes
from .manifest import NAME

LISTS = (".txt", ".lst")
VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")

# Folders in which systems keep companions of pictures, none of them a picture of its own.
COMPANIONS = {
    "__macosx", "@eadir", "@__thumb", "#recycle", "$recycle.bin", "lost+found", "system volume information",
}  # fmt: skip

_HEIF = (".heic", ".heics", ".heif", ".heifs", ".hif")
_RAW = (
    ".3fr", ".arw", ".cr2", ".cr3", ".dng", ".erf", ".kdc", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw",
    ".rw2", ".sr2", ".srf", ".srw", ".x3f",
)  # fmt: skip
_DRAWN = (".ai", ".emf", ".eps", ".pdf", ".ps", ".svg", ".svgz", ".wmf")
_UNFINISHED = (".crdownload", ".download", ".part", ".partial", ".tmp")
_VIDEO = "a video: name it as the input to have its frames"

REMEDIES = {
    **dict.fromkeys(_HEIF, "pip install pillow-heif"),
    **dict.fromkeys((".avif", ".avifs"), "needs Pillow 11.3 or newer: pip install -U pillow"),
    **dict.fromkeys((".j2c", ".j2k", ".jp2", ".jpc", ".jpf", ".jpx"), "this Pillow is built without JPEG 2000"),
    ".webp": "this Pillow is built without WebP",
    ".jxl": "pip install pillow-jxl-plugin",
    **dict.fromkeys(_RAW, "camera raw: develop them to .tif or .jpg"),
    **dict.fromkeys(_DRAWN, "drawings, not pictures: draw them as .png"),
    **dict.fromkeys(_UNFINISHED, "unfinished downloads"),
    **dict.fromkeys(VIDEOS, _VIDEO),
}


class LeftOut(Counter):
    """(what, why) -> how many files or folders were not taken as pictures."""

    def lines(self):
        """One sentence about what may have been meant, as (True, text), and one about the rest, as (False, text)."""
        for meant in (True, False):
            parts = [(n, what, why) for (what, why), n in self.items() if self.may_be_meant(what, why) == meant]
            told = ", ".join(f"{n} {what} ({why})" for n, what, why in sorted(parts, key=lambda p: (-p[0], p[1])))
            if told:
                yield meant, f"left out: {told}"

    @staticmethod
    def may_be_meant(what, why):
        """Whether somebody may miss it: a picture that can't be read here, or a folder that could not be entered."""
        return what in REMEDIES and why != _VIDEO or what == "folder"

    def add_file(self, path):
        """Count a file that is no picture here by its suffix."""
        suffix = path.suffix.lower()
        self[suffix or "without suffix", REMEDIES.get(suffix, "no picture")] += 1


def pictures_below(folder, skip=None, made=()):
    """Files of a folder and all below it that are pictures.

    Args:
        folder: to search. skip: a folder that is not entered. made: absolute paths that are results, not pictures.

    Returns:
        (sorted list of Path, `LeftOut`). Left out are hidden files and folders, companions (`COMPANIONS`), results of
        runs, what has no suffix of a picture, and linked folders.
    """
    found, left, suffixes = [], LeftOut(), picture_suffixes()

    def unread(error):
        left["folder", f"{error.filename} can't be read: {error.strerror}"] += 1

    for place, folders, files in os.walk(folder, onerror=unread):
        root = Path(place)
        for name in list(folders):
            path = root / name
            why = _passed_over(path, name, skip)
            if why is not None:
                folders.remove(name)
            if why:
                left[why] += 1
        for name in files:
            path = root / name
            if name.startswith("."):
                left["hidden", "names that begin with a dot"] += 1
            elif str(path.absolute()) in made:
                left["made before", "results of this run"] += 1
            elif path.suffix.lower() not in suffixes:
                left.add_file(path)
            elif path.is_file() or path.is_symlink():  # a link to nowhere is a picture that fails
                found.append(path)
            else:
                left[path.suffix.lower(), "no regular file"] += 1
    return sorted(found), left


def _passed_over(path, name, skip):
    """(what, why) if a folder is not entered, () if that needs no word, None if it is entered."""
    if skip is not None and path.resolve() == skip:
        return ()
    if name.startswith("."):
        return "hidden", "names that begin with a dot"
    if name.lower() in COMPANIONS:
        return "companions", f"folders such as {name}"
    if path.is_symlink():
        return "linked", "links to folders are not followed: name them as the input"
    if holds_results(path):
        return "results", "folders that a run has made"
    return None


def is_companion(parts):
    """Whether one of these folders holds companions of pictures."""
    return any(part.lower() in COMPANIONS for part in parts)


def holds_results(folder):
    """Whether a folder is the output of a run."""
    path = Path(folder) / NAME
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(12).startswith(b'{"settings"')


def read_list(path):
    """Lines of a list of paths: (number, text), without empty ones and those that begin with #.

    UTF-8 with or without a byte order mark, UTF-16 and UTF-32 with one (and UTF-16 without, told by its zeros), any
    line ends. What is not UTF-8 is kept as the system keeps names that are not.
    """
    content = Path(path).read_bytes()
    for mark, coding in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF32_LE, "utf-32"),
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if content.startswith(mark):
            text = content.decode(coding, "replace")
            break
    else:
        odd, even = content[1:200:2].count(0), content[0:200:2].count(0)
        if max(odd, even) > len(content[:200]) // 8:
            text = content.decode("utf-16-le" if odd > even else "utf-16-be", "replace")
        else:
            text = content.decode("utf-8", "surrogateescape")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if line and not line.startswith("#"):
            yield number, line


def located(line, folder):
    """The path that a line of a list means, relative ones from `folder`.

    As it stands if that is there; else without quotes around it, with backslashes as slashes, or read as Windows' own
    code page, if that is there.
    """
    plain = line.strip("\"'")
    spellings = [line, os.path.expanduser(line), plain, plain.replace("\\", "/")]
    if any("\udc80" <= letter <= "\udcff" for letter in line):
        windows = plain.encode("utf-8", "surrogateescape").decode("cp1252", "replace")
        spellings += [windows, windows.replace("\\", "/")]
    for spelling in spellings:
        place = Path(os.path.normpath(Path(folder) / spelling))
        if os.path.lexists(place):
            return place
    return Path(os.path.normpath(Path(folder) / line))
