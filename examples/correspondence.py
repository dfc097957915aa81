"""Keypoints of a stereo pair found again by their features, with the measured disparity as the truth."""

import argparse

import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from skimage.feature import corner_peaks, corner_shi_tomasi

import anyup_fast
from anyup_fast.encoders import load_encoder


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=392, help="shorter side to work at (default: 392)")
    parser.add_argument("--points", type=int, default=400, help="keypoints at most (default: 400)")
    parser.add_argument("--encoder", default="dinov2_vits14", help="default: dinov2_vits14")
    parser.add_argument("--out", default="correspondence.jpg", help="picture to write (default: correspondence.jpg)")
    args = parser.parse_args(arguments)

    left, right, disparity = skimage.data.stereo_motorcycle()
    encoder = load_encoder(args.encoder)
    images = [anyup_fast.load_image(x, size=args.size, patch_multiple=encoder.patch_size) for x in (left, right)]
    features = [anyup_fast.extract_features(image, encoder) for image in images]
    size, corners = images[0].shape[1:], corner_shi_tomasi(images[0].mean(0).numpy())
    points = corner_peaks(corners, min_distance=4, exclude_border=5, num_peaks=args.points)
    there = tuple(((points + 0.5) * disparity.shape / size).astype(int).T)
    truth = points[:, 1] - disparity[there] * size[1] / left.shape[1]
    seen = np.isfinite(truth) & (truth >= 0)  # the disparity was measured, and the right picture reaches as far
    points, truth, errors = points[seen], truth[seen], {}

    figure = Figure(figsize=(10.2, 7.3), dpi=100, layout="constrained")
    at_left, *panels = figure.subplots(2, 2, subplot_kw=dict(xticks=[], yticks=[], frame_on=False)).flat
    at_left.imshow(left, extent=(0, size[1], size[0], 0))
    at_left.scatter(points[:, 1], points[:, 0], s=9, c="white", edgecolors="black", linewidths=0.5)
    at_left.set_title(f"left picture: {len(points)} keypoints", fontsize=10)
    ways = {
        "low-res features, nearest": lambda _, features: F.interpolate(features[None], size, mode="nearest-exact")[0],
        "low-res features, bilinear": lambda _, features: F.interpolate(features[None], size, mode="bilinear")[0],
        "upsampled features": anyup_fast.upsample_features_with_anyup,
    }
    for axes, (name, way) in zip(panels, ways.items(), strict=True):
        found = find(points, *map(way, images, features))
        error = errors[name] = np.abs(found - truth)
        print(title := f"{name}: median error {np.median(error):.1f} px, {np.mean(error <= 2):.0%} within 2 px")
        colours = np.where(error <= 2, "#00c853", "#ff1744")
        axes.imshow(right, alpha=0.75, extent=(0, size[1], size[0], 0))
        axes.hlines(points[:, 0], truth, found, colors=colours, linewidth=1.3)
        axes.scatter(found, points[:, 0], s=9, c=colours, edgecolors="black", linewidths=0.5, zorder=3)
        axes.set_title(title, fontsize=10)
    figure.savefig(args.out)
    return errors


def find(points, left, right, reach=4):
    """Columns of the right map (C, H, W) where the surroundings of points of the left one are, each in its own row."""
    left, right, columns = F.normalize(left, dim=0), F.normalize(right, dim=0), []
    for row, col in points:
        rows = slice(row - reach, row + reach + 1)
        score = F.conv2d(right[:, rows], left[None, :, rows, col - reach : col + reach + 1], padding=(0, reach))[0, 0]
        columns.append(torch.nonzero(score >= score.max() - 1e-4).float().mean())  # the middle of a tie
    return np.array(columns)


if __name__ == "__main__":
    main()
