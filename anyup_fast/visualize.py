"""Feature maps as pictures: channel mean, joint PCA, similarity to a pixel, and the side-by-side comparison.

Arrays are computed in parts of a few rows, so that a high-resolution map is never converted or copied whole.
Only `visualize_feature_comparison` needs matplotlib, and never its pyplot: no window, no global figures.
"""

import io
import os
from functools import partial
from numbers import Integral

import numpy as np
import torch

from .files import expanded, written_aside
from .padded import Padded
from .ranges import NORMALISED

FIGURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".pdf")
MODES = ("mean", "pca")

_PART = 2**20  # values converted to float32 (or float64) at a time
_SAMPLE = 20_000  # pixels of one map that the PCA looks at, at most
_ROUNDING = 1e-6  # variation below this share of the features' size is float32 rounding, not a picture

_DPI = 100
_PANEL_SIDE, _PANEL_WIDTH = 448, 256  # pixels at least, longer side and width, so that titles can be read
_PANEL_LIMIT = 2048  # pixels at most, longer side
_FIGURE_LIMIT = 16_384  # pixels at most, all rows of a figure together


def channel_mean(lr_features, hr_features):
    """Mean over the channels of both maps, scaled to [0, 1] by the minimum and maximum over both.

    Args:
        lr_features: (C, h, w) floating point tensor or array, on any device; (1, C, h, w) is accepted.
        hr_features: (C, H', W') likewise, with the same C.

    Returns:
        `(lr, hr)`: float32 arrays (h, w) and (H', W') in [0, 1]; 0.5 everywhere if nothing varies.

    Raises:
        TypeError: features that are neither a tensor nor an array.
        ValueError: another number of dimensions, a batch of several, no values, another dtype, different
            numbers of channels, NaN or infinite values.
    """
    maps = _checked_pair(lr_features, hr_features)
    means, sizes = [], []
    for name, features in maps.items():
        size = 0.0
        mean = _empty(features, 1)
        for columns, part in _parts(name, features):
            mean[:, columns] = part.mean(0)
            size += torch.linalg.vector_norm(part, 1).item()
        means.append(mean.view(tuple(features.shape[1:])).numpy())
        sizes.append(size / (len(features) * mean.numel()))
    return _painted(means, tolerance=_ROUNDING * max(sizes), percentiles=((0, 100),))[0]


def joint_pca(lr_features, hr_features, n_components=3):
    """Colours from one PCA of both maps: equal features get equal colours, wherever they are.

    The principal axes are those of the low-res tokens and an evenly strided sample of the high-res pixels
    (at most 20,000 of each map), either map counting one half. Each axis points where its largest loading is
    positive. Both maps are then scaled alike: per component, from the lower of their two 1st percentiles to
    the higher of their two 99th, and clipped.

    Args:
        lr_features: (C, h, w) floating point tensor or array, on any device; (1, C, h, w) is accepted.
        hr_features: (C, H', W') likewise, with the same C.
        n_components: length of the last axis of the results; 3 makes RGB pictures.

    Returns:
        `(lr, hr)`: float32 arrays (h, w, n_components) and (H', W', n_components) in [0, 1]. A component that
        doesn't vary is 0.5 everywhere. One channel gives a grey picture (its values in all components), and
        with fewer channels than components the missing components are 0 (0.5 if nothing varies at all).

    Raises:
        TypeError: features that are neither a tensor nor an array.
        ValueError: as `channel_mean`; or `n_components` is no positive int.
    """
    if not isinstance(n_components, Integral) or isinstance(n_components, bool) or n_components < 1:
        raise ValueError(f"n_components must be a positive int, got {n_components!r}")
    maps = _checked_pair(lr_features, hr_features)
    mean, axes, size = principal_axes(maps, n_components)
    projected = [_projected(name, features, mean, axes) for name, features in maps.items()]

    lr, hr = (np.zeros((*one.shape[1:], n_components), np.float32) for one in projected)
    for k, pair in enumerate(zip(*projected, strict=True)):
        (lr[..., k], hr[..., k]), varies = _painted(pair, tolerance=_ROUNDING * size, percentiles=((1, 99), (0, 100)))
        if k == 0 and (len(axes) == 1 or not varies):
            lr[...], hr[...] = lr[..., :1], hr[..., :1]
            break
    return lr, hr


def similarity(features, row, col):
    """Cosine similarity of every pixel's features to those of one pixel.

    Args:
        features: (C, H, W) floating point tensor or array, on any device; (1, C, H, W) is accepted.
        row, col: the pixel, counted from 0 at the top left.

    Returns:
        (H, W) float32 array in [-1, 1]; 0 where either vector is zero.

    Raises:
        TypeError: features that are neither a tensor nor an array.
        ValueError: as `channel_mean`; or `row` or `col` is no int inside the map.
    """
    features = _single(features, "features")
    for name, at, side in (("row", row, features.shape[1]), ("col", col, features.shape[2])):
        if not isinstance(at, Integral) or isinstance(at, bool) or not 0 <= at < side:
            raise ValueError(f"{name} must be an int from 0 to {side - 1}, got {at!r}")
    pixel, length = _scaled(_wide(features[:, row : row + 1, col : col + 1]).flatten(1))
    cosines = _empty(features, 1)
    for columns, part in _parts("features", features):
        part, lengths = _scaled(part)
        cosines[:, columns] = pixel.T @ part / length / lengths
    return cosines.clamp_(-1, 1).view(tuple(features.shape[1:])).float().numpy()


def visualize_feature_comparison(image, lr_features, hr_features, mode="mean", path=None, *, value_range=None):
    """Photograph, low-res features and high-res features side by side, one row per image of a batch.

    The three panels have the photograph's aspect ratio and at least one screen pixel per high-res feature
    pixel, as long as the longer side stays within 2048 pixels (less from 9 rows on). Features are drawn
    without smoothing; a map larger than its panel is averaged. Each row has its own scale of colours, shared
    by its two feature panels.

    Args:
        image: ImageNet-normalised floating point tensor (3, H, W) or (B, 3, H, W), on any device; or whatever
            else `load_image` reads (PIL image, path, array); or a list of B of these; or a `Padded` image, of which the
            picture is shown.
        lr_features: (C, h, w) or (B, C, h, w) floating point tensor or array, on any device.
        hr_features: (C, H', W') or (B, C, H', W') likewise, with the same C.
        mode: "mean" shows the mean over the channels (`channel_mean`, in the colours of viridis), "pca" the
            first three principal components as red, green and blue (`joint_pca`).
        path: file to write as well; its suffix (.png, .jpg, .jpeg, .pdf) chooses the format.
        value_range: what the values of image tensors mean, see `upsample_features_with_anyup`.

    Returns:
        matplotlib.figure.Figure with an Agg canvas, unknown to pyplot: it opens no window, needs no closing. A
        notebook shows it as a picture.

    Raises:
        TypeError: features that are neither a tensor nor an array, a `path` that is no path, an `image` that
            `load_image` can't take.
        ValueError: as `channel_mean`; batch sizes that differ; a wrong shape of `image`, or NaN in it; an
            unknown `mode`; an unsupported suffix of `path`.
        RuntimeError: matplotlib is not installed.
        OSError: the file cannot be written; none is left behind then.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    path = None if path is None else _checked_path(path)
    lr_features, hr_features = _batch(lr_features, "lr_features"), _batch(hr_features, "hr_features")
    padded = image if isinstance(image, Padded) else None
    photos = _photos(image if padded is None else padded.picture, value_range)
    if not len(photos) == len(lr_features) == len(hr_features):
        raise ValueError(
            f"image, lr_features and hr_features must have the same batch size, got {len(photos)}, "
            f"{len(lr_features)} and {len(hr_features)}"
        )
    _check_channels(lr_features, hr_features)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("visualize_feature_comparison needs matplotlib: pip install 'anyup-fast[viz]'") from error

    paint = channel_mean if mode == "mean" else joint_pca
    rows = []
    for photo, lr, hr in zip(photos, lr_features, hr_features, strict=True):
        titles = [f"photograph {_size(photo)}"]
        titles += [
            f"{name} {_size(x[0])} x {len(x)}" for name, x in (("low-res features", lr), ("high-res features", hr))
        ]
        low, high = paint(lr, hr)
        low = low if padded is None else _within(low, padded)
        rows.append(((photo, low, high), titles, _panel_size(photo.shape, hr.shape[1:], len(photos))))

    # Everything is placed in pixels from the top left; the strip above each row holds its titles.
    widest = max(width for *_, (_, width) in rows)
    gap, strip = max(2, widest // 64), max(4, widest // 14)
    figure_width = 3 * widest + 4 * gap
    figure_height = sum(strip + height for *_, (height, _) in rows) + gap
    figure = Figure((figure_width / _DPI, figure_height / _DPI), dpi=_DPI, layout="none", facecolor="white")
    FigureCanvasAgg(figure)
    figure._repr_png_ = partial(_as_png, figure)  # what notebooks ask for; pyplot would tell them otherwise
    top = 0
    for pictures, titles, (height, width) in rows:
        top += strip
        for column, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
            left = gap + column * (widest + gap)
            axes = figure.add_axes(
                (
                    left / figure_width,
                    1 - (top + height) / figure_height,
                    width / figure_width,
                    height / figure_height,
                )
            )
            axes.set_axis_off()
            smaller = picture.shape[0] > height or picture.shape[1] > width
            axes.imshow(
                picture,
                cmap="viridis",
                vmin=0,
                vmax=1,
                origin="upper",
                aspect="auto",
                interpolation="antialiased" if column == 0 or smaller else "nearest",
            )
            points = 72 / _DPI
            axes.set_title(title, loc="center", fontsize=width / 25 * points, pad=strip / 4 * points, color="black")
        top += height
    if path is not None:
        with written_aside(path) as aside:
            # The box keeps the size whatever savefig.bbox is set to.
            figure.savefig(
                aside,
                format=path.suffix[1:].lower(),
                dpi=_DPI,
                bbox_inches=figure.bbox_inches,
                facecolor="white",
                transparent=False,
            )
    return figure


def _within(low, padded):
    """Painted low-res features (h, w) or (h, w, 3), each cell over its pixels, cut where the picture ends."""
    painted = torch.from_numpy(low)
    if painted.ndim == 2:
        return padded.spread(painted).numpy()
    return padded.spread(painted.movedim(-1, 0)).movedim(0, -1).numpy()


def _as_png(figure):
    """Bytes of the figure as a .png file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI, bbox_inches=figure.bbox_inches, facecolor="white")
    return file.getvalue()


def _size(picture):
    return f"{picture.shape[0]}x{picture.shape[1]}"


def _checked_path(path):
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be None, a str or a Path, got {type(path).__name__}")
    path = expanded(path)
    if path.suffix.lower() not in FIGURE_SUFFIXES:
        raise ValueError(f"path must end in one of {', '.join(FIGURE_SUFFIXES)}, got {str(path)!r}")
    return path


def _photos(image, value_range=None):
    """One float32 array (H, W, 3) in [0, 1] per image of a batch."""
    from .image import denormalize, load_image, normalised

    if isinstance(image, (list, tuple)):
        return [photo for one in image for photo in _photos(one, value_range)]
    if not isinstance(image, torch.Tensor):
        image, value_range = load_image(image), NORMALISED
    if image.dim() not in (3, 4) or image.numel() == 0:
        raise ValueError(
            f"image must be a non-empty tensor (3, H, W) or (B, 3, H, W), got the shape {tuple(image.shape)}"
        )
    if image.isnan().any():
        raise ValueError("image has NaN values; replace them before making a picture")
    if value_range is not None or image.is_floating_point() and image.shape[-3] == 3:
        image = normalised(image.detach(), value_range)
    photos = denormalize(image).reshape(-1, *image.shape[-3:]).float().cpu()
    return list(photos.permute(0, 2, 3, 1).numpy())


def _panel_size(photo, hr, rows):
    """(height, width) in pixels: the photograph's aspect ratio, no smaller than `hr`, within the limits."""
    (height, width), (hr_height, hr_width) = photo[:2], hr
    if hr_height * width >= hr_width * height:
        height, width = hr_height, -(-width * hr_height // height)
    else:
        height, width = -(-height * hr_width // width), hr_width
    # A whole factor, so that small maps get blocks of equal size.
    factor = max(1, -(-_PANEL_SIDE // max(height, width)), -(-_PANEL_WIDTH // width))
    height, width = height * factor, width * factor
    shrink = min(1, min(_PANEL_LIMIT, _FIGURE_LIMIT // rows) / max(height, width))
    return max(1, round(height * shrink)), max(1, round(width * shrink))


def _batch(features, name):
    """The same values as (B, C, h, w), or the reason why they are no feature maps."""
    if isinstance(features, torch.Tensor):
        floating = features.is_floating_point()
    elif isinstance(features, np.ndarray):
        floating = features.dtype.kind == "f"
    else:
        raise TypeError(f"{name} must be a torch tensor or a numpy array, got {type(features).__name__}")
    if features.ndim not in (3, 4):
        raise ValueError(f"{name} must be (C, h, w) or (B, C, h, w), got the shape {tuple(features.shape)}")
    if 0 in features.shape:
        raise ValueError(f"{name} has no values, its shape is {tuple(features.shape)}")
    if not floating:
        raise ValueError(f"{name} must be floating point, got {features.dtype}; convert it to float32")
    return features[None] if features.ndim == 3 else features


def _single(features, name):
    batch = _batch(features, name)
    if len(batch) > 1:
        raise ValueError(
            f"{name} must be the map of one image, (C, h, w) or (1, C, h, w), got {tuple(features.shape)}; "
            "pass the images one by one"
        )
    return batch[0]


def _check_channels(lr_features, hr_features):
    lr, hr = lr_features.shape[-3], hr_features.shape[-3]
    if lr != hr:
        raise ValueError(
            f"lr_features and hr_features must have the same number of channels, got {lr} "
            f"(shape {tuple(lr_features.shape)}) and {hr} (shape {tuple(hr_features.shape)})"
        )


def _checked_pair(lr_features, hr_features):
    maps = {
        "lr_features": _single(lr_features, "lr_features"),
        "hr_features": _single(hr_features, "hr_features"),
    }
    _check_channels(*maps.values())
    return maps


def _wide_dtype(features):
    wider = features.dtype == torch.float64 if isinstance(features, torch.Tensor) else features.itemsize > 4
    return torch.float64 if wider else torch.float32


def _wide(features):
    """A part of a map as a float32 tensor; float64 for what is wider."""
    dtype = _wide_dtype(features)
    if isinstance(features, torch.Tensor):
        return features.detach().to(dtype)
    return torch.from_numpy(np.array(features, np.float64 if dtype == torch.float64 else np.float32))


def _empty(features, count):
    """For `count` results per pixel of a map, on the CPU: (count, h * w), as wide as its parts."""
    return torch.empty(count, features.shape[1] * features.shape[2], dtype=_wide_dtype(features), device="cpu")


def _scaled(vectors):
    """Vectors (C, n) over their largest entries (lest squares overflow or underflow), and their lengths."""
    tiny = torch.finfo(vectors.dtype).tiny
    vectors = vectors / vectors.abs().amax(0).clamp_min(tiny)
    return vectors, torch.linalg.vector_norm(vectors, dim=0).clamp_min(tiny)


def _parts(name, features):
    """(C, h, w) as wide (C, n) tensors of whole rows, checked to be finite, each with its slice of h * w."""
    channels, height, width = features.shape
    rows = max(1, _PART // (channels * width))
    for top in range(0, height, rows):
        part = _wide(features[:, top : top + rows]).flatten(1)
        if not torch.stack(torch.aminmax(part)).isfinite().all():
            raise ValueError(f"{name} has NaN or infinite values; replace them before making a picture")
        yield slice(top * width, top * width + part.shape[1]), part


def _sampled(features):
    """Evenly strided pixels of a map, at most _SAMPLE, as a view."""
    height, width = features.shape[1:]
    step = 1
    while -(-height // step) * -(-width // step) > _SAMPLE:
        step += 1
    return features[:, min(step, height) // 2 :: step, min(step, width) // 2 :: step]


def principal_axes(maps, n_components):
    """One PCA of several maps (name -> (C, h, w)), each counting the same.

    Returns:
        mean (C,) and axes (min(n_components, C), C) in float64, each pointing where its largest loading is positive,
        and the features' root mean square length.

    Raises:
        ValueError: values that are not finite, or too large.
    """
    maps = {name: _sampled(features) for name, features in maps.items()}
    pixels = {name: len(maps) * features.shape[1] * features.shape[2] for name, features in maps.items()}
    mean = sum(
        part.cpu().double().sum(1) / pixels[name]
        for name, features in maps.items()
        for _, part in _parts(name, features)
    )
    covariance = 0
    for name, features in maps.items():
        for _, part in _parts(name, features):
            part = part - mean.to(part)[:, None]
            covariance += (part @ part.T).cpu().double() / pixels[name]
    if not covariance.isfinite().all():
        raise ValueError(f"{' and '.join(maps)} have values too large for a PCA in float32; scale them down")
    axes = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :n_components].T
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    return mean, axes * largest.sign(), (covariance.trace() + mean.square().sum()).sqrt().item()


def _projected(name, features, mean, axes):
    """Coordinates of every pixel along the axes: array (number of axes, h, w)."""
    coordinates = _empty(features, len(axes))
    for columns, part in _parts(name, features):
        coordinates[:, columns] = (axes.to(part) @ (part - mean.to(part)[:, None])).cpu()
    return coordinates.view(-1, *features.shape[1:]).numpy()


def _painted(pair, tolerance, percentiles):
    """Two arrays scaled to [0, 1] alike, and whether anything varies; 0.5 everywhere if nothing does.

    The ends of the scale are the outer of the two arrays' percentiles: the first pair of percentiles that are
    further apart than the tolerance.
    """
    for ends in percentiles:
        found = [np.percentile(values, ends) for values in pair]
        low, high = min(ends[0] for ends in found), max(ends[1] for ends in found)
        if high - low > tolerance:
            return [((values - low) / (high - low)).clip(0, 1).astype(np.float32) for values in pair], True
    return [np.full(values.shape, 0.5, np.float32) for values in pair], False
