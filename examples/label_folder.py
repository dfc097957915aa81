"""Label a folder: a head, made of clicks in one picture, gives every picture of a folder its label map."""

import argparse
from pathlib import Path

import numpy as np
import skimage.data
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image, ImageOps

import anyup_fast
from anyup_fast.encoders import load_encoder

LEFT, RIGHT, _ = skimage.data.stereo_motorcycle()
PICTURES = {"crop": RIGHT[120:420, 200:650], "dark": RIGHT // 2, "mirrored": RIGHT[:, ::-1], "right": RIGHT}
CLASSES = ("seat and handlebars", "bodywork", "engine and wheels", "floor", "behind")  # clicks: row, column, class
CLICKS = [(195, 260, 0), (110, 480, 0), (190, 380, 1), (285, 620, 1), (330, 360, 2), (310, 400, 2), (430, 620, 2)]
CLICKS += [(450, 300, 3), (470, 50, 3), (415, 330, 3), (50, 250, 4), (60, 40, 4), (70, 580, 4), (230, 650, 4)]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "folder", nargs="?", help="of pictures (default: four of a motorcycle, and a head clicked in a fifth)"
    )
    parser.add_argument("--head", default="head.safetensors", help="made by few_clicks.py, fit-head or in the viewer")
    parser.add_argument("--labels", default="labels", help="folder for the label maps (default: labels)")
    parser.add_argument("--size", type=int, default=448, help="shorter side to work at (default: 448)")
    parser.add_argument("--encoder", default="dinov2_vits14", help="default: dinov2_vits14")
    parser.add_argument("--out", default="label_folder.jpg", help="picture to write (default: label_folder.jpg)")
    args = parser.parse_args(arguments)
    folder = Path(args.folder or example("pictures", args.head, args.encoder, args.size))
    settings = dict(format="png", size=args.size, encoder=args.encoder)
    summary = anyup_fast.batch.run(folder, args.labels, kind="labels", head=args.head, **settings)
    print(*summary.lines(), sep="\n")
    archive = anyup_fast.open(args.labels)
    names, classes = list(archive)[:4], archive.classes(next(iter(archive)))
    colours = colormaps["tab10"](range(len(classes)))[:, :3]
    figure = Figure(figsize=(10.2, 4.2), dpi=110, layout="constrained")
    panels = figure.subplots(2, len(names), subplot_kw=dict(xticks=[], yticks=[], frame_on=False))
    for (upper, lower), name in zip(panels.T, names, strict=True):
        labels = archive[name].full().numpy()
        upper.set_title(name, fontsize=10)
        photo = ImageOps.exif_transpose(Image.open(folder / name)).convert("RGB").resize(labels.shape[::-1])
        upper.imshow(photo)
        lower.imshow(0.4 * np.asarray(photo) / 255 + 0.6 * colours[labels])
    figure.legend([Patch(color=c) for c in colours], classes, loc="outside lower center", ncols=9, frameon=False)
    figure.savefig(args.out)
    return archive


def example(folder, head, encoder, size):
    """Put pictures into a folder, and a head that is clicked in another one into a file."""
    Path(folder).mkdir(exist_ok=True)
    for name, picture in PICTURES.items():
        Image.fromarray(np.ascontiguousarray(picture)).save(Path(folder, f"{name}.png"))
    encoder = load_encoder(encoder)
    image = anyup_fast.load_image(LEFT, size=size, patch_multiple=encoder.patch_size)
    points = np.array(CLICKS)
    points[:, :2] = points[:, :2] * image.shape[1:] // LEFT.shape[:2]
    features = anyup_fast.extract_features(image, encoder)
    anyup_fast.fit_head((image, features), points, classes=CLASSES, encoder=encoder).save(head)
    return folder


if __name__ == "__main__":
    main()
