"""Segmentation from a few clicks: every pixel gets the class whose clicked pixels have the most similar features.

python examples/few_clicks.py photo.jpg --click cat 120 200 --click sofa 40 60 --out few_clicks.jpg
"""

import argparse

import numpy as np
import skimage.data
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image, ImageOps

import anyup_fast
from anyup_fast.encoders import load_encoder

CLICKS = [  # on the default photograph
    *(("suit", 300, 90), ("suit", 420, 200), ("suit", 390, 170), ("face", 115, 225), ("hair", 50, 225)),
    *(("helmet", 430, 400), ("helmet", 200, 200), ("flag", 60, 20), ("flag", 230, 30), ("flag", 420, 40)),
    *(("shuttle", 150, 440), ("shuttle", 80, 405), ("table", 290, 430), ("wall", 60, 90), ("wall", 60, 330)),
]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("photo", nargs="?", help="a picture file (default: the astronaut that scikit-image ships)")
    parser.add_argument("--click", nargs=3, action="append", metavar=("CLASS", "ROW", "COLUMN"), help="on the photo")
    parser.add_argument("--size", type=int, default=448, help="shorter side to work at (default: 448)")
    parser.add_argument("--encoder", default="dinov2_vits14", help="default: dinov2_vits14")
    parser.add_argument("--head", default="head.safetensors", help="file of the head (default: head.safetensors)")
    parser.add_argument("--out", default="few_clicks.jpg", help="picture to write (default: few_clicks.jpg)")
    args = parser.parse_args(arguments)

    photo = ImageOps.exif_transpose(Image.open(args.photo)) if args.photo else Image.fromarray(skimage.data.astronaut())
    encoder = load_encoder(args.encoder)
    image = anyup_fast.load_image(photo, size=args.size, patch_multiple=encoder.patch_size)
    features = anyup_fast.extract_features(image, encoder)
    prepared = anyup_fast.prepare(image, features)

    clicks = [(int(row), int(column), name) for name, row, column in args.click or CLICKS]
    names = list(dict.fromkeys(name for *_, name in clicks))
    points = np.array([(row, column, names.index(name)) for row, column, name in clicks])
    points[:, :2] = points[:, :2] * prepared.output_size // (photo.height, photo.width)
    head = anyup_fast.fit_head(prepared, points, classes=names, encoder=encoder)
    head.save(args.head)  # what `anyup-fast batch --kind labels --head` applies to any number of pictures
    labels = prepared.head(head, argmax=True).full()[0].numpy()
    low = (head.weight @ features.flatten(1)).argmax(0).view(features.shape[1:]).numpy()

    height, width = prepared.output_size
    colours = colormaps["tab10"](range(len(names)))[:, :3]
    figure = Figure(figsize=(10.2, 3.4 * height / width + 0.6), dpi=110, layout="constrained")
    panels = figure.subplots(1, 3, subplot_kw=dict(xticks=[], yticks=[], frame_on=False))
    for axes, title in zip(panels, ("a few clicks", "low-res labels", "labels at pixel resolution"), strict=True):
        axes.imshow(photo.convert("RGB").resize((width, height)), extent=(0, width, height, 0))
        axes.set_title(title, fontsize=11)
    for axes, shown in ((panels[1], low), (panels[2], labels)):
        axes.imshow(colours[shown], alpha=0.6, extent=(0, width, height, 0), interpolation="nearest")
    for index, name in enumerate(names):
        rows, columns, _ = points[points[:, 2] == index].T
        panels[0].scatter(columns, rows, color=colours[index], edgecolors="white", s=50, label=name)
    figure.legend(loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(args.out)
    return labels, low, head


if __name__ == "__main__":
    main()
