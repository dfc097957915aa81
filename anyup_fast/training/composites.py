"""Training and evaluation pictures: photographs, and cut-outs with an alpha channel pasted on them."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..files import expanded
from ..image import SUFFIXES

STAMP_SIDE = 0.25, 0.7  # least and greatest longer side of a cut-out, as a share of the picture's


@dataclass(frozen=True)
class Pictures:
    """Paths of photographs (`scenes`) and of cut-outs with exact alpha (`stamps`, may be empty)."""

    scenes: tuple
    stamps: tuple = ()


def find_pictures(scenes, stamps=None, *, held_out=None):
    """List the pictures below two folders, in a stable order.

    Args:
        scenes: folder of photographs, searched through.
        stamps: folder of cut-outs (pictures with transparency), or None.
        held_out: None = all of them, True = only the fifth of them kept for evaluation, False = the rest. The split
            hashes the file's name less leading and trailing numbers, so that `frog` and `frog-1` fall on the same
            side and a picture stays on its side when others are added. (Pictures that a camera named `IMG_0001`,
            `IMG_0002` ... count as one family: rename them for a split.)

    Raises:
        FileNotFoundError: a folder is missing, or no picture is left.
    """
    found = []
    for name, folder in (("scenes", scenes), ("stamps", stamps)):
        if folder is None:
            found.append(())
            continue
        folder = expanded(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{name}: no folder {str(folder)!r}; name one that holds pictures")
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not paths:
            raise FileNotFoundError(f"{name}: no pictures below {str(folder)!r}; looked for {sorted(SUFFIXES)}")
        paths = tuple(path for path in paths if held_out in (None, is_held_out(path)))
        if not paths:
            side = "" if held_out else "not "
            raise FileNotFoundError(
                f"{name}: none of the pictures below {str(folder)!r} is {side}kept for evaluation; add some, or use all"
            )
        found.append(paths)
    return Pictures(*found)


def is_held_out(path):
    """Whether this picture belongs to the fifth that is kept for evaluation."""
    stem = Path(path).stem.lower()
    family = re.sub(r"^\d+[_-]+|[_-]?\d+[a-z]?$|[_-][a-z]$", "", stem) or stem
    return hashlib.sha256(family.encode()).digest()[0] % 5 == 0


def composite(pictures, rng, size, stamps=(1, 4), crop=(0.4, 1.0), shapes=0.0, camouflage=0.0):
    """Paste random cut-outs on a random crop of a random photograph.

    Args:
        pictures: `Pictures` to draw from.
        rng: numpy Generator; the same state gives the same picture.
        size: side of the square result in pixels.
        stamps: least and greatest number of cut-outs.
        crop: least and greatest side of the crop, as a share of the photograph's shorter side.
        shapes: share of the cut-outs that are drawn, not taken from `pictures.stamps`: smooth outlines and thin
            strokes, filled with a crop of another photograph.
        camouflage: share of the cut-outs whose colours are brought near those of the ground that they cover, as white
            on pale or dark in shade.

    Returns:
        (picture, instances): uint8 (size, size, 3), and uint8 (size, size) with 0 for the photograph and i for the
        i-th cut-out where it is visible and at least half opaque.

    Raises:
        ValueError: a file that is damaged or no picture, a stamp without transparency or without anything opaque.
    """
    from PIL import Image

    scene = _scene(pictures, rng, size, crop)
    if rng.random() < 0.5:
        scene = scene.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    instances = np.zeros((size, size), np.uint8)
    count = int(rng.integers(stamps[0], stamps[1] + 1)) if pictures.stamps or shapes else 0
    for index in range(1, count + 1):
        if shapes and (not pictures.stamps or rng.random() < shapes):
            stamp = _shape(pictures, rng, size, crop)
        else:
            stamp = _place(_open_stamp(pictures.stamps[rng.integers(len(pictures.stamps))]), rng, size)
        if camouflage and rng.random() < camouflage:
            stamp = _camouflaged(stamp, scene, rng)
        scene = Image.alpha_composite(scene.convert("RGBA"), stamp).convert("RGB")
        instances[np.asarray(stamp)[..., 3] >= 128] = index
    return np.array(scene), instances


def _scene(pictures, rng, size, crop):
    from PIL import Image

    scene = _open("scenes", pictures.scenes[rng.integers(len(pictures.scenes))], "RGB")
    side = max(1, round(rng.uniform(*crop) * min(scene.size)))
    left, top = (rng.integers(n - side + 1) for n in scene.size)
    return scene.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side))


def _shape(pictures, rng, size, crop):
    """A drawn cut-out on a canvas of `size`: a wavy outline, or a few strokes of one width that cross."""
    from PIL import Image, ImageDraw

    fine = 4 * size
    outline = Image.new("L", (fine, fine))
    draw = ImageDraw.Draw(outline)
    middle = rng.uniform(0, fine, 2)
    if rng.random() < 0.5:
        angle = np.linspace(0, 2 * np.pi, 180, endpoint=False)
        radius = np.ones_like(angle)
        for waves in range(2, 8):
            radius += rng.normal(0, 0.45 / waves) * np.cos(waves * angle + rng.uniform(0, 2 * np.pi))
        radius = radius.clip(0.15) * rng.uniform(0.08, 0.3) * fine
        squeeze = np.exp(rng.uniform(-0.5, 0.5))
        points = middle[:, None] + np.stack((np.cos(angle) * squeeze, np.sin(angle) / squeeze)) * radius
        draw.polygon([tuple(point) for point in points.T], fill=255)
    else:
        width = round(np.exp(rng.uniform(np.log(0.008), np.log(0.06))) * fine)
        for _ in range(int(rng.integers(1, 5))):
            ends = middle + rng.normal(0, 0.3 * fine, (3, 2))
            at = np.linspace(0, 1, 40)[:, None]
            curve = (1 - at) ** 2 * ends[0] + 2 * at * (1 - at) * ends[1] + at**2 * ends[2]
            draw.line([tuple(point) for point in curve], fill=255, width=width, joint="curve")
    canvas = _scene(pictures, rng, size, crop).convert("RGBA")
    canvas.putalpha(outline.resize((size, size), Image.Resampling.BOX))
    return canvas


def _place(stamp, rng, size):
    from PIL import Image

    stamp = stamp.crop(stamp.getchannel("A").getbbox())
    if rng.random() < 0.5:
        stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    stamp = stamp.rotate(rng.uniform(-25, 25), Image.Resampling.BICUBIC, expand=True)
    factor = rng.uniform(*STAMP_SIDE) * size / max(stamp.size)
    # Premultiplied, or the colour hidden under full transparency bleeds into the edge.
    stamp = stamp.convert("RGBa").resize(
        [max(1, round(side * factor)) for side in stamp.size], Image.Resampling.LANCZOS
    )
    stamp = stamp.convert("RGBA")
    canvas = Image.new("RGBA", (size, size))
    reach = [max(1, size - side // 2) for side in stamp.size]
    corner = (int(rng.integers(-(side // 2), room)) for side, room in zip(stamp.size, reach, strict=True))
    canvas.paste(stamp, tuple(corner))
    return canvas


def _camouflaged(stamp, scene, rng):
    """The stamp with its mean colour moved by at least half towards the covered ground's, and less contrast in it."""
    from PIL import Image

    pixels, ground = np.asarray(stamp, np.float64), np.asarray(scene, np.float64)
    colours, alpha = pixels[..., :3], pixels[..., 3]
    moved, contrast = rng.uniform(0.5, 1), rng.uniform(0.4, 1)
    if not alpha.any():  # all of it lies outside the picture
        return stamp
    own, below = (np.average(picture, axis=(0, 1), weights=alpha) for picture in (colours, ground))
    colours = own + moved * (below - own) + contrast * (colours - own)
    return Image.fromarray(np.dstack((colours.round().clip(0, 255), alpha)).astype(np.uint8))


def _open(name, path, mode):
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert(mode)
    except Exception as error:  # decoders raise anything on damaged files
        raise ValueError(f"{name}: {path} cannot be read ({error}); mend or remove it") from error


def _open_stamp(path):
    stamp = _open("stamps", path, "RGBA")
    least, greatest = stamp.getchannel("A").getextrema()
    if greatest < 128 or least == 255:
        kind = "is opaque everywhere" if least == 255 else "has no opaque part"
        raise ValueError(f"stamps: {path} {kind}; a cut-out needs an alpha channel that shows its outline")
    return stamp
