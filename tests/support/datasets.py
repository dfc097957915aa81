"""Small data sets made on the spot, whole and broken pictures, and what a run has made of them."""

import io
from functools import cache

import numpy as np
from PIL import Image

from anyup_fast.batch.outputs import folder_digest


def picture(seed, size=(60, 76), mode="RGB"):
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[: size[0], : size[1]]
    base = np.stack([rows * 3 % 255, cols * 2 % 255, (rows + cols) % 255], -1)
    noisy = (base + rng.integers(0, 40, base.shape)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(noisy).convert(mode)


def encoded(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@cache
def broken_files():
    """name -> content that can't be read as a picture, each in a way of its own."""
    jpeg, png = encoded(picture(90), "jpeg"), encoded(picture(91))
    bomb = encoded(Image.new("1", (20_000, 20_000)))
    return {
        "empty.jpg": b"",
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "cut.png": png[: len(png) // 2],
        "text.png": b"this is no picture\n" * 20,
        "zeros.jpg": bytes(5000),
        "header.jpg": jpeg[:20],
        "wrong-checksum.png": png[:60] + bytes([png[60] ^ 255]) + png[61:],
        "page.webp": b"<html><body>not found</body></html>",
        "bomb.png": bomb,
        "tail.png": png[40:],
    }


def fill(folder, count=6, sizes=((60, 76), (76, 60), (56, 56)), broken=0):
    """A folder of pictures at mixed sizes and formats, and `broken` of `broken_files` below it."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        kind = ("png", "jpeg", "webp", "bmp", "tiff")[index % 5]
        place = folder / ("inner" if index % 3 == 2 else ".") / f"{index:03}.{kind}"
        place.parent.mkdir(exist_ok=True)
        mode = ("RGB", "L", "RGB")[index % 3]
        place.write_bytes(encoded(picture(index, sizes[index % len(sizes)], mode), kind))
    for name, content in list(broken_files().items())[:broken]:
        (folder / name).write_bytes(content)
    return folder


def contents(folder):
    """relative path -> digest of every file of a run but its manifest and lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("manifest.jsonl", ".lock"))
    return {path.relative_to(folder).as_posix(): folder_digest(path)["sha256"] for path in files}
