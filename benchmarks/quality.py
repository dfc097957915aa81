"""How good are the upsampled features? One command that judges any weights beside the interpolations.

    python benchmarks/quality.py --scenes DIR --stamps DIR --encoders dinov2_vits14 efficientnet_lite0 \\
        --weights embedded anyup_multi_backbone model.safetensors --reference anyup_multi_backbone --cache DIR

With `--cache` an interrupted run goes on where it stopped, and scores of weights judged before cost nothing; pictures
(`--figures`) are drawn anew.

**Boundary segmentation.** Cut-outs are pasted on photographs, both kept out of training. The features of the
picture are upsampled to its pixels. An instance's prototype (the photograph is one more instance) is the mean of
the low-res features weighted by the share of each cell that the instance covers; every pixel goes to the prototype
with the greatest cosine. Scores are the IoU of each instance, over the whole picture and over the pixels near a
boundary only, those with a pixel of another instance at most `BAND` rows and columns away (Chebyshev distance);
averaged over the instances of a picture, then over pictures. Instances with fewer than `MIN_PIXELS` visible pixels
count as photograph; a picture without a cut-out, or without photograph left, is drawn again.

**Reconstruction.** The features of a photograph at `size`, upsampled to the grid of the same photograph at twice the
size and guided by that, against its features there: mean cosine, and mean squared error over the variance of the
target (all its numbers, about their common mean).

**Flat regions** (`--figures`). In the flatter half of each photograph's pixels, of the first principal components:
how much the upsampled features bend in step with the grid, relative to their roughness (`blockiness`) and as it shows
(`grid_trace`), and how rough they are (`speckle`).

**Share of the gain.** (x - bilinear) / (reference - bilinear) in boundary IoU, averaged over the encoders.

Plus/minus is one standard error over pictures; differences to the reference are paired by picture.

Beside the interpolations stand the two classical upsamplers that look at the image: joint bilateral upsampling (Kopf
et al. 2007) and the fast guided filter (He and Sun, arXiv 1505.00996), which need no training. Beside the encoders of
the package stands "thin_resnet50" (thin_resnet.py), which no weights here were trained on.
"""

import argparse
import functools
import hashlib
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from anyup_fast import __version__
from anyup_fast.encoders import load_encoder as load_registered
from anyup_fast.files import written_aside
from anyup_fast.image import denormalize, load_image, normalize
from anyup_fast.model import AnyUp
from anyup_fast.training.composites import composite, find_pictures

BAND = 4
MIN_PIXELS = 60
INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
FILTERS = ("joint bilateral", "guided filter")
FIGURE_COMPONENTS = 32
FLATNESS = ("blocks", "grid", "speckle")  # what `draw_figures` measures: `blockiness`, `grid_trace`, `speckle`


# An upsampler is prepared with the image and then called with (features, values, output_size). It returns `values`,
# any maps on the grid of `features`, as the method that looks at `features` spreads them: all methods are linear in
# what they spread, so similarities to prototypes or principal components may be upsampled in place of features.


def interpolation(mode):
    """The upsampler "nearest", "bilinear" or "bicubic"; it looks neither at the image nor at the features."""
    corners = {} if mode == "nearest" else {"align_corners": False}

    def prepare(image):
        return lambda features, values, size: F.interpolate(values, size, mode=mode, **corners)

    return prepare


def joint_bilateral(image, reach=2, sigma_place=0.75, sigma_colour=0.1):
    """Joint bilateral upsampling: cells weigh by their distance (in cells) and by how near their colour is.

    A cell's colour is its mean over the image in [0, 1]; cells at most `reach` rows and columns away count, and beyond
    the border the nearest ones again.
    """

    def upsample(features, values, size):
        guide, grid = shrunk(denormalize(image), size), values.shape[-2:]
        colours = F.adaptive_avg_pool2d(guide, grid)
        places = [(torch.arange(n) + 0.5) / n * m - 0.5 for n, m in zip(size, grid, strict=True)]
        nearest = [place.round().long() for place in places]
        total, weights = torch.zeros(1, values.shape[1], *size), torch.zeros(1, 1, *size)
        for down in range(-reach, reach + 1):
            for right in range(-reach, reach + 1):
                cells = [at + step for at, step in zip(nearest, (down, right), strict=True)]
                far = [((cell - place) / sigma_place).square() for cell, place in zip(cells, places, strict=True)]
                rows, cols = (cell.clamp(0, m - 1) for cell, m in zip(cells, grid, strict=True))
                other = colours[..., rows, :][..., cols]
                unlike = ((guide - other) / sigma_colour).square().mean(1, keepdim=True)
                weight = torch.exp(-(far[0][:, None] + far[1] + unlike) / 2) + 1e-12
                total += weight * values[..., rows, :][..., cols]
                weights += weight
        return total / weights

    return upsample


def guided_filter(image, reach=1, epsilon=1e-3):
    """The fast guided filter: each value as a linear function of colour, fitted around each cell, then interpolated."""

    def upsample(features, values, size):
        guide, grid = shrunk(denormalize(image), size), values.shape[-2:]
        colours = F.adaptive_avg_pool2d(guide, grid)

        def box(maps):
            return F.avg_pool2d(maps, 2 * reach + 1, 1, reach, count_include_pad=False)

        colour, value = box(colours), box(values)
        square = box((colours[:, :, None] * colours[:, None]).flatten(1, 2)).unflatten(1, (3, 3))
        spread = (square - colour[:, :, None] * colour[:, None]).permute(0, 3, 4, 1, 2) + epsilon * torch.eye(3)
        mixed = box((colours[:, :, None] * values[:, None]).flatten(1, 2)).unflatten(1, (3, -1))
        mixed = (mixed - colour[:, :, None] * value[:, None]).permute(0, 3, 4, 1, 2)
        slopes = torch.linalg.solve(spread, mixed)  # (1, h, w, 3, K)
        offset = value - torch.einsum("bchw,bhwck->bkhw", colour, slopes)
        maps = torch.cat((offset, slopes.permute(0, 3, 4, 1, 2).flatten(1, 2)), 1)
        offset, slopes = F.interpolate(box(maps), size, mode="bilinear").split(
            (values.shape[1], maps.shape[1] - values.shape[1]), 1
        )
        return offset + torch.einsum("bchw,bckhw->bkhw", guide, slopes.unflatten(1, (3, -1)))

    return upsample


def anyup(model):
    """The upsampler of an `AnyUp`."""

    def prepare(image):
        def upsample(features, values, size):
            query, key, _ = model.guided(image, features, tuple(size))
            return model.cross_decode.attend(model.projected_queries(query), key, values)

        return upsample

    return prepare


def digest_of(model):
    """What names the model's function: a digest of its settings and of its weights."""
    digest = hashlib.sha256(repr((model.window_ratio, model.cross_decode.window_rule, model.head_mode)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def remembered(cache, key, compute):
    """`compute()`, {encoder: array}; kept in the folder `cache` under a digest of `key`.

    The package's version is part of the digest; empty the folder where its code changed without that.
    """
    if cache is None:
        return compute()
    digest = hashlib.sha256(json.dumps([__version__, key]).encode()).hexdigest()
    path = Path(cache) / f"scores-{digest[:24]}.json"
    if not path.is_file():
        found = compute()
        with written_aside(path) as aside:
            aside.write_text(json.dumps({encoder: scores.tolist() for encoder, scores in found.items()}))
    return {encoder: np.array(scores) for encoder, scores in json.loads(path.read_text()).items()}


def shrunk(image, size):
    """(B, 3, H, W) at another size, antialiased where it is smaller."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(image, size, mode="bicubic", antialias=True, align_corners=False)


def load_weights(weights):
    """`AnyUp.from_pretrained(weights)`; "untrained" is a fresh model, the control that training must beat."""
    if weights != "untrained":
        return AnyUp.from_pretrained(weights)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return AnyUp().eval()


def boundary_band(labels, distance=BAND):
    """Pixels (H, W) that have another label at most `distance` rows and columns away; bool."""
    padded = labels.float()[None, None]
    greatest, least = (
        F.max_pool2d(sign * padded, 2 * distance + 1, stride=1, padding=distance) * sign for sign in (1, -1)
    )
    return (greatest != least)[0, 0]


def prototype_similarities(features, labels):
    """Dot products of features with the unit prototypes of the labels.

    Args:
        features: (1, C, h, w).
        labels: (H, W) int, every value 0..K-1 present.

    Returns:
        (1, K, h, w). Upsampled, their argmax is the prototype with the greatest cosine to the upsampled feature: the
        length of that feature is the same for all prototypes.
    """
    masks = F.one_hot(labels.long()).permute(2, 0, 1).to(features.dtype)
    weight = F.adaptive_avg_pool2d(masks, features.shape[-2:]).flatten(1)
    prototypes = F.normalize((weight / weight.sum(1, keepdim=True)) @ features[0].flatten(1).T, dim=1)
    return torch.einsum("kc,bchw->bkhw", prototypes, features)


def mean_iou(predicted, labels, where=None):
    """IoU of every label (0..K-1, all present) among the pixels `where`, averaged over the labels there."""
    if where is not None:
        predicted, labels = predicted[where], labels[where]
    scores = []
    for label in labels.unique():
        hit, wanted = predicted == label, labels == label
        scores.append((hit & wanted).sum().item() / (hit | wanted).sum().item())
    return sum(scores) / len(scores)


def draw_composites(pictures, count, size, seed=0, camouflage=0.0):
    """`count` composites: normalised images (N, 3, size, size), labels (N, size, size) int64.

    A share `camouflage` of the cut-outs gets colours near those of the ground they cover.
    The i-th depends on the seed, that share and i alone. Labels of a picture are 0 (photograph) to K-1, all present,
    K >= 2.
    """
    images, labels = [], []
    for index in range(count):
        rng = np.random.default_rng((seed, index))
        for _ in range(100):
            picture, instances = composite(pictures, rng, size, camouflage=camouflage)
            area = np.bincount(instances.ravel())
            instances[area[instances] < MIN_PIXELS] = 0
            found, instances = np.unique(instances, return_inverse=True)
            if len(found) > 1 and found[0] == 0 and (instances == 0).sum() >= MIN_PIXELS:
                break
        else:
            raise ValueError(
                f"--size {size} or the stamps are too small: no cut-out of {MIN_PIXELS} visible pixels in 100 draws"
            )
        images.append(normalize(torch.from_numpy(picture).permute(2, 0, 1) / 255))
        labels.append(torch.from_numpy(instances.reshape(size, size)))
    return torch.stack(images), torch.stack(labels)


def load_square(path, size):
    """The centre of a photograph, its shorter side brought to `size`: (1, 3, size, size), normalised."""
    image = load_image(path, size=size)
    top, left = ((n - size) // 2 for n in image.shape[1:])
    return image[None, :, top : top + size, left : left + size]


def halve(image):
    """(B, 3, H, W) at half the size, antialiased."""
    return shrunk(image, [n // 2 for n in image.shape[-2:]])


@functools.cache
def load_encoder(name):
    """The encoder of that name: "thin_resnet50" (see thin_resnet.py), or one that anyup_fast knows."""
    if name == "thin_resnet50":
        import thin_resnet

        return thin_resnet.load()
    return load_registered(name)


def encode(encoder, images, cache=None):
    """Features (N, C, h, w) of normalised images by the encoder of that name; kept in the folder `cache`.

    The file's name hashes the encoder's name and the pixels: empty the folder when an encoder's weights change.
    """
    path = None
    if cache is not None:
        digest = hashlib.sha256(encoder.encode() + images.contiguous().numpy().tobytes()).hexdigest()
        path = Path(cache) / f"features-{digest[:24]}.pt"
        if path.is_file():
            return torch.load(path, weights_only=True)
    model = load_encoder(encoder)
    features = torch.cat([model(image[None]) for image in images])
    if path is not None:
        with written_aside(path) as aside:
            torch.save(features, aside)
    return features


def score_segmentation(upsampler, images, labels, features):
    """Scores {encoder: (N, 2)} of an upsampler: boundary and whole-picture IoU of every composite."""
    scores = {encoder: np.empty((len(images), 2)) for encoder in features}
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        upsample, band = upsampler(image[None]), boundary_band(label)
        for encoder, low in features.items():
            low = low[index : index + 1]
            maps = upsample(low, prototype_similarities(low, label), label.shape)
            predicted = maps[0].argmax(0)
            scores[encoder][index] = mean_iou(predicted, label, band), mean_iou(predicted, label)
    return scores


def score_reconstruction(upsampler, images, features, targets):
    """Scores {encoder: (N, 2)}: cosine and normalised squared error of `features` upsampled to the targets' grid."""
    scores = {encoder: np.empty((len(images), 2)) for encoder in features}
    for index, image in enumerate(images):
        upsample = upsampler(image[None])
        for encoder in features:
            low, target = features[encoder][index : index + 1], targets[encoder][index : index + 1]
            found = upsample(low, low, target.shape[-2:])
            cosine = F.cosine_similarity(found, target, dim=1).mean()
            scores[encoder][index] = cosine, (found - target).square().mean() / target.var(correction=0)
    return scores


def shares_of_gain(means, reference, baseline="bilinear"):
    """{method: (x - baseline) / (reference - baseline), averaged over encoders} from {method: {encoder: mean}}.

    None for every method where the reference gains nothing over the baseline with some encoder.
    """
    floor, top = means[baseline], means[reference]
    if any(top[encoder] <= floor[encoder] for encoder in floor):
        return dict.fromkeys(means)
    return {
        method: sum((x[e] - floor[e]) / (top[e] - floor[e]) for e in floor) / len(floor) for method, x in means.items()
    }


def flat_regions(image):
    """The flatter half of a normalised image (1, 3, H, W): pixels (H, W) by grey-value gradient, its maximum in 3x3."""
    grey = denormalize(image).mean(1, keepdim=True)
    rows, cols = torch.gradient(grey, dim=(2, 3))
    slope = F.max_pool2d(rows.hypot(cols), 3, stride=1, padding=1)[0, 0]
    return slope <= slope.median()


def blockiness(maps, grid, flat):
    """How much the maps bend in step with the low-res grid, in the flat parts of the photograph.

    Along one axis, D(x) = |F(x-1) - 2 F(x) + F(x+1)|, the length over channels, averaged over the flat pixels for
    each of the s places x mod s inside a low-res cell (s pixels); the number is the greatest of these s means over
    the mean of them, averaged over both axes. 1: no trace of the grid at any place in the cell (window edges do not
    lie on cell borders). s / 2: flat inside cells with steps between them (nearest), or bent once per cell (bilinear).

    Args:
        maps: (1, C, H, W).
        grid: (h, w), dividing (H, W).
        flat: (H, W) bool.
    """
    return sum((means.max() / means.mean()).item() for means in _bends_in_a_cell(maps, grid, flat)) / 2


def grid_trace(maps, grid, flat):
    """How much the maps bend in step with the grid, as it shows; `blockiness` is relative to how rough they are.

    The greatest of the same s means less their mean, over the standard deviation of F on flat pixels: 0 is no trace.
    What happens to fall on one place of the cells counts too: a third to nine tenths of the number comes about at a
    period one pixel off the grid's, and rough maps have more of that.
    """
    excess = [(means.max() - means.mean()).item() for means in _bends_in_a_cell(maps, grid, flat)]
    return sum(excess) / 2 / _spread(maps, flat)


def _bends_in_a_cell(maps, grid, flat):
    """For each axis (s,): mean over flat pixels of |F(x-1) - 2 F(x) + F(x+1)| at each of the s places in a cell."""
    found = []
    for axis, cells in zip((1, 2), grid, strict=True):
        turned = maps[0].transpose(1, axis)
        bend = (turned[:, :-2] - 2 * turned[:, 1:-1] + turned[:, 2:]).norm(dim=0)
        kept = flat.transpose(0, axis - 1)[1:-1]
        step = turned.shape[1] // cells
        place = torch.arange(1, len(bend) + 1) % step
        found.append(torch.stack([bend[place == p][kept[place == p]].mean() for p in range(step)]))
    return found


def speckle(maps, flat):
    """Mean over flat pixels of |F - box3x3(F)| (length over channels) over the standard deviation of F there."""
    maps = maps - maps[0, :, flat].mean(1)[:, None, None]
    rough = maps - F.avg_pool2d(maps, 3, stride=1, padding=1, count_include_pad=False)
    return rough[0].norm(dim=0)[flat].mean().item() / _spread(maps, flat)


def _spread(maps, flat):
    """Standard deviation (length over channels) of maps (1, C, H, W) on flat pixels."""
    kept = maps[0, :, flat]
    return (kept - kept.mean(1, keepdim=True)).square().sum(0).mean().sqrt().item()


def principal_components(features, count):
    """(1, C, h, w) -> (1, min(count, rank), h, w): centred, by falling variance."""
    rows = features[0].flatten(1).T
    u, s, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    maps = (u * s)[:, :count]
    return maps.T.reshape(1, -1, *features.shape[-2:])


def panel(image, low, upsampled):
    """A row of pictures (H, W, 3) uint8: the photograph, the low-res components, each of the upsampled ones.

    The first three components are red, green and blue, scaled alike everywhere by their low-res range.
    """
    size = image.shape[-2:]
    least, greatest = (getattr(low[:, :3], kind)((2, 3), keepdim=True) for kind in ("amin", "amax"))
    tiles = [denormalize(image)]
    for maps in (F.interpolate(low, size), *upsampled):
        colours = (maps[:, :3] - least) / (greatest - least).clamp_min(1e-12)
        tiles.append(F.pad(colours, (0, 0, 0, 0, 0, 3 - colours.shape[1])).clamp(0, 1))
    return [(tile[0].permute(1, 2, 0) * 255).round().byte().numpy() for tile in tiles]


def write_sheet(path, rows, titles):
    """Write rows of equal pictures (lists of (H, W, 3) uint8) as one, titles above the columns."""
    from PIL import Image, ImageDraw

    height, width, gap, head = *rows[0][0].shape[:2], 4, 16
    sheet = Image.new("RGB", (len(titles) * (width + gap), head + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((column * (width + gap) + 2, 2), title, fill="black")
        for row, tiles in enumerate(rows):
            sheet.paste(Image.fromarray(tiles[column]), (column * (width + gap), head + row * (height + gap)))
    with written_aside(path) as aside:
        sheet.save(aside)


def draw_figures(folder, photographs, upsamplers, encoders, size):
    """Write a sheet per photograph (a row per encoder) and return {encoder: {method: (N, 3)}}: FLATNESS of them."""
    methods = [method for method in upsamplers if method not in ("nearest", "bicubic", *FILTERS)]
    shape = len(photographs), len(FLATNESS)
    scores = {encoder: {method: np.empty(shape) for method in methods} for encoder in encoders}
    for index, photograph in enumerate(photographs):
        image = load_square(photograph, size)
        flat = flat_regions(image)
        lows = {encoder: load_encoder(encoder)(image) for encoder in encoders}
        components = {encoder: principal_components(low, FIGURE_COMPONENTS) for encoder, low in lows.items()}
        found = {encoder: [] for encoder in encoders}
        for method in methods:
            upsample = upsamplers[method](image)
            for encoder, low in lows.items():
                maps = upsample(low, components[encoder], (size, size))
                grid = low.shape[-2:]
                numbers = blockiness(maps, grid, flat), grid_trace(maps, grid, flat), speckle(maps, flat)
                scores[encoder][method][index] = numbers
                found[encoder].append(maps[:, :3].clone())
        rows = [panel(image, components[encoder], found[encoder]) for encoder in encoders]
        write_sheet(
            Path(folder) / f"{index:02d}_{Path(photograph).stem}.png",
            rows,
            ["photograph", "low-res", *methods],
        )
    return scores


def standard_error(values):
    """Standard error of the mean; nan for a single value."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def table(header, rows):
    """A markdown table."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown(results):
    """The results of `evaluate` as markdown tables."""
    setting, reference = results["setting"], results["setting"]["reference"]
    parts = []

    def section(title, scores, columns, paired):
        header, rows = ["method"], []
        for encoder in setting["encoders"]:
            for k, column in enumerate(columns):
                header.append(f"{encoder}<br>{column}")
                if k == 0 and paired:
                    header.append(f"minus {reference}")
        for method in next(iter(scores.values())):
            row = [method]
            for encoder in setting["encoders"]:
                values = np.array(scores[encoder][method])
                for k in range(len(columns)):
                    x = values[:, k]
                    row.append(f"{x.mean():.4f} ± {standard_error(x):.4f}")
                    if k == 0 and paired:
                        y = x - np.array(scores[encoder][reference])[:, k]
                        row.append("" if method == reference else f"{y.mean():+.4f} ± {standard_error(y):.4f}")
            rows.append(row)
        if "shares" in results and scores is results["segmentation"]:
            header.append("share of the gain")
            for row in rows:
                share = results["shares"][row[0]]
                row.append("–" if share is None else f"{100 * share:.1f} %")
        parts.append(f"{title}\n\n{table(header, rows)}")

    pictures = "kept out of training" if setting["held_out"] else "all of them"
    if setting["camouflage"]:
        pictures += f", {100 * setting['camouflage']:.0f} % of the cut-outs camouflaged"
    section(
        f"Boundary segmentation: {setting['pictures']} composites at {setting['size']} px ({pictures}, "
        f"{plural('seed', setting['seeds'])}), mean IoU within {BAND} px of a boundary and over the whole picture",
        results["segmentation"],
        ("boundary IoU", "whole IoU"),
        reference is not None,
    )
    if "reconstruction" in results:
        section(
            f"Reconstruction: {setting['photographs']} photographs, features at {setting['size']} px against those at "
            f"{2 * setting['size']} px, cosine and squared error over the variance",
            results["reconstruction"],
            ("cosine", "error"),
            reference is not None,
        )
    if "figures" in results:
        section(
            f"Flat regions of {setting['figures']} photographs at {2 * setting['size']} px: blocks (1: no trace of the "
            "grid in what roughness there is), trace of the grid as it shows and speckle (lower is smoother)",
            results["figures"],
            FLATNESS,
            False,
        )
    return "\n\n".join(parts) + "\n"


def plural(noun, values):
    """ "seed 0", "seeds 0, 1"."""
    return f"{noun}{'s' if len(values) > 1 else ''} {', '.join(map(str, values))}"


def label_of(weights, everything):
    """The file's stem, or the whole text where two of them share it."""
    stem = Path(weights).stem
    return stem if [Path(other).stem for other in everything].count(stem) == 1 else weights


def by_encoder(scores):
    """{method: {encoder: array}} -> {encoder: {method: list}}."""
    encoders = next(iter(scores.values()))
    return {e: {method: found[e].tolist() for method, found in scores.items()} for e in encoders}


@torch.inference_mode()
def evaluate(arguments, say=lambda text: None):
    """Do what the parsed command line says; return the results as what JSON can hold, every score by picture.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: pictures, sizes, encoders or weights that cannot be used.
    """
    for name in ("pictures", "size"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name}: need at least 1, got {getattr(arguments, name)}")
    if not 0 <= arguments.camouflage <= 1:
        raise ValueError(f"--camouflage: need a share from 0 to 1, got {arguments.camouflage}")
    labels = {label_of(weights, arguments.weights): weights for weights in arguments.weights}
    reference = {weights: label for label, weights in labels.items()}.get(arguments.reference, arguments.reference)
    if reference is not None and reference not in labels:
        raise ValueError(f"--reference: {reference!r} is none of the weights {', '.join(labels)}")
    upsamplers = {mode: interpolation(mode) for mode in INTERPOLATIONS}
    upsamplers |= dict(zip(FILTERS, (joint_bilateral, guided_filter), strict=True))
    identities = {method: method for method in upsamplers}
    for label, weights in labels.items():
        model = load_weights(weights)
        if reason := model.why_not_fused():
            raise ValueError(f"--weights: {weights} cannot be judged: {reason}")
        upsamplers[label], identities[label] = anyup(model), digest_of(model)

    size, encoders, cache = arguments.size, arguments.encoders, arguments.cache
    pictures = find_pictures(arguments.scenes, arguments.stamps, held_out=arguments.held_out)

    def judged(section, methods, tensors, compute):
        seen = [hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in tensors]
        scores = {}
        for method in methods:
            start = time.perf_counter()
            key = [section, identities[method], encoders, seen]
            scores[method] = remembered(cache, key, functools.partial(compute, upsamplers[method]))
            say(f"{section}, {method}: {time.perf_counter() - start:.1f} s")
        return scores

    drawn = [
        draw_composites(pictures, arguments.pictures, size, seed, arguments.camouflage) for seed in arguments.seeds
    ]
    images, instances = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    features = {e: torch.cat([encode(e, part, cache) for part, _ in drawn]) for e in encoders}
    scores = judged(
        "segmentation",
        upsamplers,
        [images, instances, *features.values()],
        lambda upsampler: score_segmentation(upsampler, images, instances, features),
    )
    results = {"segmentation": by_encoder(scores)}
    if reference is not None:
        means = {m: {e: float(found[e][:, 0].mean()) for e in encoders} for m, found in scores.items()}
        results["shares"] = shares_of_gain(means, reference)

    photographs = evenly(pictures.scenes, arguments.photographs)
    if photographs:
        large = torch.cat([load_square(path, 2 * size) for path in photographs])
        small = halve(large)
        lows = {encoder: encode(encoder, small, cache) for encoder in encoders}
        targets = {encoder: encode(encoder, large, cache) for encoder in encoders}
        scores = judged(
            "reconstruction",
            upsamplers,
            [large, *lows.values(), *targets.values()],
            lambda upsampler: score_reconstruction(upsampler, large, lows, targets),
        )
        results["reconstruction"] = by_encoder(scores)

    shown = []
    if arguments.figures is not None:
        shown = [*evenly(pictures.scenes, arguments.figure_scenes), *arguments.photos]
        scores = draw_figures(arguments.figures, shown, upsamplers, encoders, 2 * size)
        results["figures"] = {e: {m: x.tolist() for m, x in found.items()} for e, found in scores.items()}
        say(f"figures: {len(shown)} in {arguments.figures}")
    results["setting"] = {
        "encoders": encoders,
        "reference": reference,
        "pictures": len(images),
        "photographs": len(photographs),
        "figures": len(shown),
        "size": size,
        "seeds": list(arguments.seeds),
        "camouflage": arguments.camouflage,
        "held_out": bool(arguments.held_out),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    return results


def evenly(items, count):
    """At most `count` of the items, evenly spaced."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def build_parser():
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="quality.py", description="Judge AnyUp weights on pictures kept out of training."
    )
    parser.add_argument("--scenes", required=True, help="folder of photographs")
    parser.add_argument("--stamps", required=True, help="folder of cut-outs with transparency")
    parser.add_argument("--encoders", nargs="+", default=["dinov2_vits14", "efficientnet_lite0"], metavar="NAME")
    parser.add_argument(
        "--weights",
        nargs="+",
        default=["embedded"],
        metavar="WEIGHTS",
        help='names, paths or URLs of checkpoints; "untrained" is a control',
    )
    parser.add_argument("--reference", help="which of the weights the others are compared with")
    parser.add_argument("--pictures", type=int, default=48, help="composites per seed (default 48)")
    parser.add_argument("--photographs", type=int, default=12, help="for the reconstruction (default 12; 0: none)")
    parser.add_argument("--size", type=int, default=224, help="side of the composites in pixels (default 224)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the composites (default 0)")
    parser.add_argument(
        "--camouflage",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of the cut-outs, whose colours are brought near those of the ground (default 0)",
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--held-out",
        action="store_const",
        const=True,
        default=True,
        help="only pictures kept out of training (default)",
    )
    group.add_argument("--all", dest="held_out", action="store_const", const=None, help="all pictures")
    parser.add_argument("--cache", help="folder that keeps the encoders' outputs and the scores")
    parser.add_argument("--markdown", help="write the tables to this file")
    parser.add_argument("--json", help="write every score to this file")
    parser.add_argument("--figures", help="write panels of photographs at twice the size into this folder")
    parser.add_argument("--figure-scenes", type=int, default=4, help="photographs drawn from the scenes (default 4)")
    parser.add_argument("--photos", nargs="+", default=[], metavar="FILE", help="further photographs to draw")
    return parser


def main(argv=None):
    """Run the command line; the exit code is 0, or 2 with one sentence on stderr."""
    arguments = build_parser().parse_args(argv)
    try:
        results = evaluate(arguments, say=lambda text: print(text, file=sys.stderr, flush=True))
        text = markdown(results)
        for path, content in ((arguments.markdown, text), (arguments.json, json.dumps(results, indent=1))):
            if path is not None:
                with written_aside(path) as aside:
                    aside.write_text(content + ("" if content.endswith("\n") else "\n"), encoding="utf-8")
    except (ValueError, OSError, RuntimeError) as error:
        print(f"quality.py: {error}", file=sys.stderr)
        return 2
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
