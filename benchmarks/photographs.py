"""Photographs for training from GCompris's data files, which Debian distributes as gcompris-qt-data.

    apt-get download gcompris-qt-data && dpkg-deb -x gcompris-qt-data_*.deb PACKAGE
    python benchmarks/photographs.py PACKAGE --out PHOTOGRAPHS

The package holds its pictures in Qt resource files (*.rcc). Some 160 of them are photographs or paintings of animals,
monuments and things, about 1,024 px wide, under GPL-3 or later, CC-BY-SA, CC-BY, GFDL or in the public domain, as
its copyright file says picture by picture.
"""

import argparse
import io
import struct
import sys
import zlib
from pathlib import Path

from PIL import Image

from anyup_fast.files import written_aside

ACTIVITIES = (
    "categorization",
    "clickgame",
    "details",
    "erase",
    "explore_farm_animals",
    "explore_monuments",
    "explore_world_animals",
    "explore_world_music",
    "louis-braille",
)
NO_PHOTOGRAPHS = ("louis-braille_chart", "louis-braille_night_printing")
LEAST_SIDE = 250
SUFFIXES = {".webp", ".jpg", ".jpeg", ".png"}
DIRECTORY, ZLIB, ZSTD = 2, 1, 4  # flags of an entry


def resource_files(path):
    """Yield (name, bytes) of every file inside a Qt resource file (format versions 1 to 3).

    Raises:
        ValueError: `path` is no such file, is damaged, or holds a file compressed by zstd.
    """
    content = Path(path).read_bytes()
    if content[:4] != b"qres":
        raise ValueError(f"{path}: not a Qt resource file; it begins with {content[:4]!r}, not b'qres'")
    try:
        yield from _entries(path, content)
    except (struct.error, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged or cut off ({error}); unpack the package again") from error


def _entries(path, content):
    version, tree, data, names = struct.unpack_from(">4I", content, 4)
    length = 14 if version == 1 else 22

    def name_at(offset):
        (count,) = struct.unpack_from(">H", content, names + offset)
        start = names + offset + 6
        return content[start : start + 2 * count].decode("utf-16-be")

    def entries(index, folder):
        offset = tree + length * index
        name, flags = struct.unpack_from(">IH", content, offset)
        here = f"{folder}/{name_at(name)}" if index else ""
        if flags & DIRECTORY:
            count, first = struct.unpack_from(">II", content, offset + 6)
            for child in range(first, first + count):
                yield from entries(child, here)
            return
        if flags & ZSTD:
            raise ValueError(f"{path}: {here} is compressed by zstd; unpack it with Qt's own tools")
        (at,) = struct.unpack_from(">I", content, offset + 10)
        (size,) = struct.unpack_from(">I", content, data + at)
        packed = content[data + at + 4 : data + at + 4 + size]
        yield here, zlib.decompress(packed[4:]) if flags & ZLIB else packed

    return entries(0, "")


def write_photographs(package, out):
    """Write the opaque pictures of the `ACTIVITIES` below `package` as gcompris_<activity>_<name>.jpg; their paths.

    Pictures with a shorter side below `LEAST_SIDE` pixels, or with transparency, are left out.

    Raises:
        FileNotFoundError: no resource file of one of the activities below `package`.
        ValueError: see `resource_files`. OSError: a picture is damaged.
    """
    found = {path.stem: path for path in sorted(Path(package).rglob("*.rcc")) if path.stem in ACTIVITIES}
    if missing := [activity for activity in ACTIVITIES if activity not in found]:
        raise FileNotFoundError(f"package: no {missing[0]}.rcc below {str(package)!r}; unpack gcompris-qt-data there")
    written = []
    for activity, path in found.items():
        for name, content in resource_files(path):
            name = f"{activity}_{Path(name).stem}" if Path(name).suffix.lower() in SUFFIXES else None
            if name is None or name in NO_PHOTOGRAPHS:
                continue
            picture = Image.open(io.BytesIO(content))
            if min(picture.size) < LEAST_SIDE or picture.convert("RGBA").getchannel("A").getextrema()[0] < 10:
                continue
            target = Path(out) / f"gcompris_{name.removesuffix('_background')}.jpg"
            with written_aside(target) as aside:
                picture.convert("RGB").save(aside, quality=95)
            written.append(target)
    return written


def main(argv=None):
    """Run the command line; the exit code is 0, or 2 with one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="photographs.py", description="Photographs from GCompris's data files.")
    parser.add_argument("package", help="folder of the unpacked package gcompris-qt-data")
    parser.add_argument("--out", required=True, help="folder for the photographs")
    arguments = parser.parse_args(argv)
    try:
        written = write_photographs(arguments.package, arguments.out)
    except (ValueError, OSError) as error:
        print(f"photographs.py: {error}", file=sys.stderr)
        return 2
    print(f"{len(written)} photographs in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
