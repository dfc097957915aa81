"""Dense similarity: how much every pixel's features are like those of one pixel, low-res and at pixel resolution.

python examples/similarity.py photo.jpg --at 300 120 --at 80 200 --out similarity.jpg
"""

import argparse

import numpy as np
import skimage.data
from matplotlib.figure import Figure
from PIL import Image, ImageOps

import anyup_fast
from anyup_fast.encoders import load_encoder
from anyup_fast.visualize import similarity

POINTS = [(180, 290), (240, 120)]  # coffee and saucer of the default photograph


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("photo", nargs="?", help="a picture file (default: the coffee that scikit-image ships)")
    parser.add_argument("--at", nargs=2, type=int, action="append", metavar=("ROW", "COLUMN"), help="of the photograph")
    parser.add_argument("--size", type=int, default=448, help="shorter side to work at (default: 448)")
    parser.add_argument("--encoder", default="dinov2_vits14", help="default: dinov2_vits14")
    parser.add_argument("--out", default="similarity.jpg", help="picture to write (default: similarity.jpg)")
    args = parser.parse_args(arguments)

    photo = ImageOps.exif_transpose(Image.open(args.photo)) if args.photo else Image.fromarray(skimage.data.coffee())
    encoder = load_encoder(args.encoder)
    image = anyup_fast.load_image(photo, size=args.size, patch_multiple=encoder.patch_size)
    lr_features = anyup_fast.extract_features(image, encoder)
    hr_features = anyup_fast.upsample_features_with_anyup(image, lr_features)

    height, width = image.shape[1:]
    maps = []
    for row, col in args.at or POINTS:
        row, col = row * height // photo.height, col * width // photo.width
        low = similarity(lr_features, row // encoder.patch_size, col // encoder.patch_size)
        maps.append(((row, col), low, similarity(hr_features, row, col)))
    draw(photo.convert("RGB").resize((width, height)), maps, args.out)
    print(f"-> {args.out}")
    return maps


def draw(photo, maps, path):
    figure = Figure(figsize=(10.2, 3.4 * photo.height / photo.width * len(maps)), dpi=110, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    panels = figure.subplots(len(maps), 3, squeeze=False)
    for (at_photo, at_low, at_high), ((row, col), low, high) in zip(panels, maps, strict=True):
        scale = dict(cmap="magma", vmin=np.percentile(high, 1), vmax=1, extent=(0, photo.width, photo.height, 0))
        at_photo.imshow(photo, extent=scale["extent"])
        at_low.imshow(low, interpolation="nearest", **scale)
        at_high.imshow(high, **scale)
        for axes in (at_photo, at_low, at_high):
            axes.plot(col, row, "o", markersize=8, markerfacecolor="none", markeredgecolor="white", markeredgewidth=3.5)
            axes.plot(col, row, "o", markersize=8, markerfacecolor="none", markeredgecolor="black", markeredgewidth=1.5)
            axes.set_axis_off()
    for axes, title in zip(panels[0], ("photograph", "similarity, low-res", "at pixel resolution"), strict=True):
        axes.set_title(title, fontsize=12)
    figure.savefig(path)


if __name__ == "__main__":
    main()
