"""The picture of the page in README.md, and the figures of docs/labelling.md.

python docs/view.py               docs/view.png, a screenshot by Chromium (tests/support/browser.py says which)
python docs/view.py --measure     error of cosines and bytes, for photographs that scikit-image ships
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

import anyup_fast

HERE = Path(__file__).parent
PHOTOGRAPHS = "astronaut", "coffee", "chelsea", "rocket"
SIZE = 448
SUPPORT = HERE.parent / "tests" / "support"
POINTS = [[(90, 195), (120, 180)], [(330, 130), (300, 270)], [(40, 60)]]
CLASSES = "person", "suit", "background"


def main(arguments=None):
    """Draw, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="print figures in place of drawing")
    parser.add_argument("--out", type=Path, default=HERE / "view.png", help="the picture (default: docs/view.png)")
    arguments = parser.parse_args(arguments)
    sys.path.insert(0, str(SUPPORT))
    measure() if arguments.measure else draw(arguments.out)


def photograph(name):
    """A photograph of scikit-image."""
    from skimage import data

    return getattr(data, name)()


def measure():
    """Print what a page costs and how exact it is."""
    import viewed

    print("| photograph | size | cosine error, mean | greatest | MB in the page |\n|---|---|---|---|---|")
    for name in PHOTOGRAPHS:
        image = anyup_fast.load_image(photograph(name), SIZE, 14)
        prepared = anyup_fast.prepare(image, anyup_fast.extract_features(image, "dinov2_vits14"))
        stored = viewed.data(anyup_fast.view(prepared, names=name).html)
        (picture,) = stored["pictures"]
        height, width = picture["height"], picture["width"]
        z = viewed.coordinates(picture["high"], stored["directions"], height, width)
        generator = torch.Generator().manual_seed(0)
        points = torch.stack([torch.randint(n, (1500,), generator=generator) for n in (height, width)], 1)
        true = F.normalize(prepared.at(points)[0], dim=1)
        seen = F.normalize(z[:, points[:, 0], points[:, 1]].T, dim=1)
        error = (true @ true.T - seen @ seen.T).abs()
        size = sum(len(part["image"]) for part in (picture["high"], picture["low"], picture["attention"]))
        size = (size + len(picture["photo"])) / 1e6
        print(f"| {name} | {height}x{width} | {error.mean():.4f} | {error.max():.3f} | {size:.2f} |")


def draw(out):
    """Write the screenshot: points of three classes on the photograph of the demo, labels beside it."""
    import browser
    from PIL import Image

    page = anyup_fast.view(photograph("astronaut"), names="astronaut", size=SIZE)
    with tempfile.TemporaryDirectory() as folder, browser.launcher() as launch:
        path = page.write(Path(folder) / "view.html")
        with browser.Opened(launch(), path, (1280, 860)) as opened:
            opened.press("Add a class")
            for number, (name, points) in enumerate(zip(CLASSES, POINTS, strict=True), start=1):
                opened.page.get_by_label(f"Name of class {number}").fill(name)
                opened.stage.focus()
                opened.page.keyboard.press(str(number))
                for point in points:
                    opened.click(*point)
            opened.hover(*POINTS[0][0])
            opened.page.screenshot(path=Path(folder) / "view.png")
        picture = Image.open(Path(folder) / "view.png").convert("RGB")
        picture.quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(out, optimize=True)
    print(f"-> {out}, {out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
