"""Cut-outs for training from Tux Paint's stamps, which Debian distributes as tuxpaint-stamps-default.

    apt-get download tuxpaint-stamps-default && dpkg-deb -x tuxpaint-stamps-default_*.deb PACKAGE
    python benchmarks/cutouts.py PACKAGE --out CUTOUTS

Copies the stamps that make composites: a clear outline, a size that bears enlarging, and the many colours of a
photograph or a shaded drawing (not letters, signs or line drawings). A name that is in CUTOUTS already stays as it is.
The package is under GPL-2, as its copyright file says.
"""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from anyup_fast.files import written_aside

LONGER_SIDE, SHORTER_SIDE = 120, 60
OPAQUE_SHARE = (0.12, 0.93)
TRANSLUCENT_SHARE = 0.15
COLOURS, COLOUR_STEP = 36, 24
MIRRORED = ("_mirror", "_flip")  # the same stamp once more


def is_cutout(picture):
    """Whether a picture has a clear outline and many colours.

    Judged on a copy of at most 256 px: opaque are pixels with alpha above 200, translucent those from 21 to 234, and
    colours differ when one of their channels, in steps of 24, does.
    """
    if max(picture.size) < LONGER_SIDE or min(picture.size) < SHORTER_SIDE:
        return False
    small = picture.convert("RGBA")
    small.thumbnail((256, 256))
    pixels = np.asarray(small)
    alpha = pixels[..., 3]
    opaque = alpha > 200
    least, greatest = OPAQUE_SHARE
    if alpha.max() < 255 or not least < opaque.mean() < greatest:
        return False
    if ((alpha > 20) & (alpha < 235)).mean() > TRANSLUCENT_SHARE:
        return False
    return len(np.unique(pixels[opaque][:, :3] // COLOUR_STEP, axis=0)) >= COLOURS


def write_cutouts(package, out):
    """Copy the stamps below `package` for which `is_cutout` holds to `out`, under their own names; the paths written.

    Raises:
        FileNotFoundError: no PNG in a folder "stamps" below `package`. OSError: a picture is damaged.
    """
    stamps = [path for path in sorted(Path(package).rglob("*.png")) if "stamps" in path.parts]
    if not stamps:
        raise FileNotFoundError(f"package: no stamps below {str(package)!r}; unpack tuxpaint-stamps-default there")
    written = []
    for path in stamps:
        target = Path(out) / path.name
        if target.exists() or path.stem.lower().endswith(MIRRORED):
            continue
        with Image.open(path) as picture:
            if not is_cutout(picture):
                continue
        with written_aside(target) as aside:
            shutil.copyfile(path, aside)
        written.append(target)
    return written


def main(argv=None):
    """Run the command line; the exit code is 0, or 2 with one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="cutouts.py", description="Cut-outs from Tux Paint's stamps.")
    parser.add_argument("package", help="folder of the unpacked package tuxpaint-stamps-default")
    parser.add_argument("--out", required=True, help="folder for the cut-outs")
    arguments = parser.parse_args(argv)
    try:
        written = write_cutouts(arguments.package, arguments.out)
    except OSError as error:
        print(f"cutouts.py: {error}", file=sys.stderr)
        return 2
    print(f"{len(written)} cut-outs in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
