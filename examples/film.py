"""Film of a video: every frame in the colours of one PCA of its features, at pixel resolution.

python examples/film.py video.mp4 --out film.mp4 --figure film.jpg
"""

import argparse
import tempfile
from pathlib import Path

import av
import numpy as np
import skimage.data
from matplotlib.figure import Figure

import anyup_fast
from anyup_fast.batch.video import write_film


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("video", nargs="?", help="a video (default: a camera that pans over a motorcycle)")
    parser.add_argument("--frames", type=int, default=24, help="of the default video (default: 24)")
    parser.add_argument("--size", type=int, default=280, help="shorter side of the film (default: 280)")
    parser.add_argument("--encoder", default="dinov2_vits14", help="default: dinov2_vits14")
    parser.add_argument("--out", default="film.mp4", help="film to write: .mp4, .mkv or .mov (default: film.mp4)")
    parser.add_argument("--figure", default="film.jpg", help="frames above their colours (default: film.jpg)")
    args = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as folder:
        video, pictures = args.video or Path(folder, "pan.mp4"), Path(folder, "pictures")
        if not args.video:
            write_film(pan(skimage.data.stereo_motorcycle()[0], args.frames, 378), video, rate=12)
        # One PCA for the whole film. A run into a folder that stays goes on where it was interrupted.
        summary = anyup_fast.batch.run(video, pictures, kind="pca", size=args.size, encoder=args.encoder)
        for name, error in summary.failed.items():
            print(f"{name}: {error}")
        count = anyup_fast.batch.make_film(video, pictures, args.out)
        draw(video, args.out, args.figure)
    print(f"-> {args.out}, {count} frames, and {args.figure}")


def pan(photo, count, side):
    """Squares (side, side, 3) along the diagonal of a photograph (H, W, 3)."""
    for share in np.linspace(0, 1, count):
        top, left = (round(share * (length - side)) for length in photo.shape[:2])
        yield photo[top : top + side, left : left + side]


def draw(video, film, path, columns=4):
    rows = [list(av.open(str(file)).decode(video=0)) for file in (video, film)]
    height, width = rows[1][0].height, rows[1][0].width
    figure = Figure(figsize=(2.4 * columns, 4.8 * height / width + 0.1), dpi=110, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for panels, frames in zip(figure.subplots(2, columns, squeeze=False), rows, strict=True):
        for axes, number in zip(panels, np.linspace(0, len(frames) - 1, columns).round().astype(int), strict=True):
            axes.imshow(frames[number].to_image().resize((width, height)))
            axes.set_axis_off()
    figure.savefig(path)


if __name__ == "__main__":
    main()
