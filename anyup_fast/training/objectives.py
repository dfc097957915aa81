"""The loss of training: the recipe of the paper (arXiv 2510.12764, training section), and terms of our own.

A picture at full size S gives the targets (features of the whole picture at S); the same picture at S/2 and S/4 gives
low-resolution features. A step crops both to the same cells, guides the upsampling by the crop resized to a few pixels
per cell, and compares the output with the target crop:

    loss = main_weight * main + consistency_weight * consistency + 0.1 * reconstruction
           + dense_weight * dense + mask_weight * mask + segment_weight * segment
           + native_weight * native + spread_weight * spread + smooth_weight * smooth

`main` is (1 - cosine) + MSE at the target's grid, after both were min-max normalised per pixel by the target's channel
range; `consistency` the same between the outputs under a photometrically changed guide and under the clean one
(detached), at the guide's resolution; `reconstruction` the same between the area-downsampled output and the low-res
features. `dense` is ours: pictures with pasted cut-outs have exact masks, so near a mask's boundary the output at the
guide's resolution is compared with target features interpolated inside each instance only. `mask` asks the same of the
attention itself, whatever the features: minus the logarithm of the weight on the pixel's own instance, where a cell
belongs to each instance by the share of it that the instance covers. `segment` asks what the features are for: every
pixel goes to the instance whose mean feature it resembles most, by a softmax, and is blamed by cross-entropy and by one
minus the soft IoU, each instance counting alike, near boundaries and over the whole guide. `native` is the counterpart
of `reconstruction` for features of the full picture, which have no finer target: each cell's mean of the output must
give the cell's features back. `spread` is the attention's mean square distance from its pixel, in cells. Both keep the
attention local on the large grids of everyday use, where weight at a window's edge would show as blocks. `smooth`
is the output's second differences where the guide is flat: the edge-aware smoothness known from learned depth (Godard
et al., arXiv 1609.03677, section 3.3), which blames blocks and speckle themselves and leaves edges alone.
"""

import torch
import torch.nn.functional as F

from ..image import normalize
from ..ops import pooled, windowed_attention
from .augmentations import degraded, noisy, photometric

OWN_TERMS = ("dense", "mask", "segment", "native", "spread", "smooth")  # ours, each with a weight of its own
REGION_CHANNELS = 96  # of the features, which "dense" and others of these terms see
LEAST_WEIGHT = 1e-3  # on the pixel's own instance: below, "mask" does not grow further
SMOOTH_CELL = 14  # pixels per cell at which "smooth" counts in full; where cells are smaller, bends are steep by nature
FLAT_STEP = 0.02  # of a guide in [0, 1] from pixel to pixel: at greater ones "smooth" soon leaves the edge alone
SHARPNESS = 5.0  # of the softmax of "segment", over the similarities' standard deviation among the instances
SEGMENT_BAND = 0.29  # cells on either side of a boundary that count as near it in "segment"
LEAST_SHARE = 0.3  # cells that an instance covers in all, below which "segment" leaves it out


def feature_loss(output, target, weight=None):
    """(1 - cosine) + MSE, both per pixel of (B,C,H,W), the MSE after min-max normalising both by the target's range."""
    low, high = target.amin(1, keepdim=True), target.amax(1, keepdim=True)
    difference = ((output - target) / (high - low).clamp_min(1e-6)).square().mean(1)
    loss = 1 - F.cosine_similarity(output, target, dim=1) + difference
    return loss.mean() if weight is None else (loss * weight).sum() / weight.sum().clamp_min(1.0)


def edge_aware_smoothness(output, guide):
    """Mean square second difference of (B,C,H,W) over its variance, each pixel weighed by exp(-step / FLAT_STEP).

    `step` is the guide's (B,3,H,W) greatest difference to the two neighbours, mean over the colours. 0 where H and W
    are below 3.
    """
    found = []
    for axis in (2, 3):
        count = output.shape[axis] - 2
        if count < 1:
            continue
        bend = output.diff(n=2, dim=axis).square().sum(1)
        step = guide.diff(dim=axis).abs().mean(1)
        step = torch.maximum(step.narrow(axis - 1, 0, count), step.narrow(axis - 1, 1, count))
        weight = torch.exp(-step / FLAT_STEP)
        found.append((bend * weight).sum() / weight.sum().clamp_min(1e-3))
    spread = output.detach().var((2, 3)).sum(1).mean().clamp_min(1e-12)
    return sum(found, output.new_zeros(())) / spread


def instance_target(features, instances):
    """Features (B,C,h,w) at the resolution of `instances` (B,H,W), each pixel from cells of its own instance only.

    Cells count by the square of the share their own instance covers, under a small Gaussian; the result is bilinear
    in between. Also returns a weight (B,H,W): 1 within about one and a half cells of a boundary, 0 elsewhere.
    """
    batch, channels, h, w = features.shape
    height, width = instances.shape[-2:]
    taps = torch.tensor([0.25, 1.0, 0.25])
    blur = (taps[:, None] * taps)[None, None]
    out = torch.zeros(batch, channels, height, width)
    covered = torch.zeros(batch, 1, height, width)
    for index in range(int(instances.max()) + 1):
        mask = (instances == index).float()[:, None]
        share = F.adaptive_avg_pool2d(mask, (h, w)).square()
        held = F.conv2d(share, blur, padding=1)
        mixed = F.conv2d((features * share).flatten(0, 1)[:, None], blur, padding=1).view_as(features)
        known = (held > 1e-3).float()
        both = torch.cat((mixed / held.clamp_min(1e-3) * known, known), 1)
        fine = F.interpolate(both, (height, width), mode="bilinear", align_corners=False)
        seen = fine[:, -1:]
        out += mask * fine[:, :-1] / seen.clamp_min(1e-3)
        covered += mask * (seen > 0.05)
    reach = [2 * round(0.75 * n / m) + 1 for n, m in zip((height, width), (h, w), strict=True)]
    pad = [n // 2 for n in reach]
    high = F.max_pool2d(instances[:, None], reach, 1, pad)
    low = -F.max_pool2d(-instances[:, None], reach, 1, pad)
    return out, ((high != low).float() * covered)[:, 0]


def instance_shares(instances, size):
    """(B, instances, h, w): the share of each cell that each instance of (B, H, W), numbered from 0, covers."""
    one_hot = F.one_hot(instances.long()).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(one_hot.float(), size)


def prototype_similarities(features, given, shares):
    """How much each cell of `given` (B,C,h,w) resembles each instance's mean feature: (B, instances, h, w).

    The mean of `features` is weighted by `shares`, the part of each cell that the instance covers, and brought to unit
    length. The result is divided by its standard deviation among the instances of a picture, so that features of
    any scale count alike.
    """
    prototypes = F.normalize(torch.einsum("bkhw,bchw->bkc", shares, features), dim=-1)
    present = (shares.sum((2, 3)) >= LEAST_SHARE).float()
    found = torch.einsum("bkc,bchw->bkhw", prototypes, given) * present[..., None, None]
    count = present.sum(1).clamp_min(1)[:, None, None, None]
    away = (found - found.sum(1, keepdim=True) / count) * present[..., None, None]
    spread = (away.square().sum(1, keepdim=True) / count).mean((2, 3), keepdim=True).sqrt()
    return away / spread.clamp_min(1e-6)


def boundary_band(instances, near):
    """Pixels of (B,H,W) with another instance at most `near` rows and columns away."""
    padded = instances[:, None].float()
    high, low = (sign * F.max_pool2d(sign * padded, 2 * near + 1, 1, near) for sign in (1, -1))
    return (high != low)[:, 0]


def segment_loss(similarities, instances, present, band):
    """Cross-entropy plus one minus soft IoU, mean over instances, over the pixels of `band` and over all of them.

    Args:
        similarities: (B, K, H, W), as `prototype_similarities` scales them.
        instances: int64 (B, H, W), below K.
        present: bool (B, K), which instances compete; pixels of the others do not count.
        band: bool (B, H, W).

    Returns:
        scalar, the mean over the pictures of those with two instances or more among the pixels that count; 0 if none.
    """
    losses = []
    logits = (SHARPNESS * similarities.float()).masked_fill(~present[:, :, None, None], -torch.inf)
    for scores, labels, competing, near in zip(logits, instances, present, band, strict=True):
        counts = competing[labels]
        for where in (near & counts, counts):
            wanted = F.one_hot(labels[where], len(scores))[:, competing]
            pixels = wanted.sum(0)
            here = pixels > 0
            if here.sum() < 2:
                continue
            log_p = scores[:, where].T[:, competing].log_softmax(1)
            p = log_p.exp()
            entropy = -(log_p * wanted).sum(0)[here] / pixels[here]
            hit = (p * wanted).sum(0)
            iou = (hit / (p.sum(0) + pixels - hit))[here]
            losses.append(entropy.mean() + 1 - iou.mean())
    return torch.stack(losses).mean() if losses else similarities.new_zeros(())


def decode_region(model, query, key, features, rows, cols):
    """Output (B, C, rows, cols) of two slices, from what `AnyUp.encoded` gives."""
    height, width = query.shape[1:3]
    top, left = max(rows.start - 1, 0), max(cols.start - 1, 0)
    halo = query[:, top : min(rows.stop + 1, height), left : min(cols.stop + 1, width)]
    part = model.projected_queries(halo)[:, rows.start - top :, cols.start - left :]
    part = part[:, : rows.stop - rows.start, : cols.stop - cols.start]
    row_bounds, col_bounds = model.cross_decode.bounds((height, width), key.shape[1:3])
    value = features.permute(0, 2, 3, 1)
    bounds = row_bounds[rows], col_bounds[cols]
    return windowed_attention(part, key, value, *bounds, head_mode=model.head_mode).permute(0, 3, 1, 2)


def training_loss(model, sample, rng, config):
    """Loss of one batch and its terms as floats."""
    image = photometric(sample.guide, rng) if rng.random() < 0.5 else sample.guide
    if config.degraded_share and rng.random() < config.degraded_share:
        image = degraded(image, rng)
    given = sample.features
    if config.noise_share and rng.random() < config.noise_share:
        given = noisy(given, rng)
    query, key = model.encoded(normalize(image), given)
    terms = {}
    if sample.target.shape != sample.features.shape:
        coarse = model.projected_queries(pooled(query, sample.target.shape[-2:]))
        output = model.cross_decode.attend(coarse, key, given)
        terms["main"] = feature_loss(output, sample.target)
        small = F.adaptive_avg_pool2d(output, sample.features.shape[-2:])
        terms["reconstruction"] = feature_loss(small, sample.features)
    # At the guide's resolution a region and a part of the channels are enough: the attention is the same for all.
    rows, cols = (_random_slice(rng, n, config.region) for n in query.shape[1:3])
    part = torch.from_numpy(rng.permutation(sample.features.shape[1])[:REGION_CHANNELS])
    features = given[:, part]
    native = config.native_weight and "main" not in terms
    if native:
        per_cell = query.shape[2] // features.shape[3]
        rows, cols = (_whole_cells(pixels, per_cell) for pixels in (rows, cols))
    places, square_distance = _places(features, query.shape[1:3], rows, cols)
    shares = instance_shares(sample.instances, features.shape[-2:])
    maps = features, places, shares, prototype_similarities(sample.features, given, shares)
    region = decode_region(model, query, key, torch.cat(maps, 1), rows, cols)
    region, seen_places, seen_shares, similarities = region.split([part.shape[1] for part in maps], 1)
    if config.spread_weight:
        terms["spread"] = square_distance(seen_places).mean()
    if config.mask_weight and shares.shape[1] > 1:
        own = seen_shares.gather(1, sample.instances[:, None, rows, cols].long())
        terms["mask"] = -own.float().clamp_min(LEAST_WEIGHT).log().mean()
    if config.segment_weight and shares.shape[1] > 1:
        near = max(1, round(SEGMENT_BAND * query.shape[2] / features.shape[3]))
        instances = sample.instances.long()
        band = boundary_band(instances, near)[:, rows, cols]
        terms["segment"] = segment_loss(similarities, instances[:, rows, cols], shares.sum((2, 3)) >= LEAST_SHARE, band)
    if native:
        cells = [slice(pixels.start // per_cell, pixels.stop // per_cell) for pixels in (rows, cols)]
        terms["native"] = feature_loss(
            F.avg_pool2d(region, per_cell), sample.features[:, part][..., cells[0], cells[1]]
        )
    if config.smooth_weight:
        scale = query.shape[2] / features.shape[3] / SMOOTH_CELL
        terms["smooth"] = scale**2 * edge_aware_smoothness(region, sample.guide[..., rows, cols])
    if config.dense_weight and sample.instances[:, rows, cols].any():
        target, weight = instance_target(sample.target[:, part], sample.instances)
        terms["dense"] = feature_loss(region, target[..., rows, cols], weight[:, rows, cols])
    if rng.random() < config.consistency_share:
        image = photometric(sample.guide, rng)
        if config.degraded_share and rng.random() < 0.5:
            image = degraded(image, rng)
        query, key = model.encoded(normalize(image), given)
        other = decode_region(model, query, key, features, rows, cols)
        terms["consistency"] = feature_loss(other, region.detach()) / config.consistency_share
    weights = {"main": config.main_weight, "reconstruction": 0.1, "consistency": config.consistency_weight}
    weights |= {name: getattr(config, f"{name}_weight") for name in OWN_TERMS}
    total = sum((weights[name] * term for name, term in terms.items()), torch.zeros((), requires_grad=True))
    return total, {name: term.item() for name, term in terms.items()}


def _places(features, size, rows, cols):
    """Where each low-res cell lies, as three more channels to upsample, and what to make of them.

    The attention's mean square distance from a pixel p is E[r.r] - 2 p.E[r] + p.p over the cells r it looks at, all in
    units of cells and counted from the middle of the region, so that 16-bit floats lose little.
    """
    (row_cells, row_pixels), (col_cells, col_pixels) = (
        _axis_places(n, total, part) for n, total, part in zip(features.shape[-2:], size, (rows, cols), strict=True)
    )
    grid = torch.meshgrid(row_cells, col_cells, indexing="ij")
    places = torch.stack((*grid, grid[0] ** 2 + grid[1] ** 2)).expand(len(features), -1, -1, -1)

    def square_distance(seen):
        row, col, square = seen.unbind(1)
        p_row, p_col = row_pixels[:, None], col_pixels[None]
        return square - 2 * (row * p_row + col * p_col) + p_row**2 + p_col**2

    return places, square_distance


def _axis_places(cells, pixels, part):
    """Positions of all cells and of the pixels of the slice `part`, in cells from the middle of the slice."""
    middle = (part.start + part.stop) / 2 / pixels * cells
    position = (torch.arange(part.start, part.stop) + 0.5) / pixels * cells
    return torch.arange(cells) + 0.5 - middle, position - middle


def _whole_cells(pixels, per_cell):
    """The slice moved and cut to whole cells, at least one."""
    start = pixels.start // per_cell
    return slice(start * per_cell, (start + max(1, (pixels.stop - pixels.start) // per_cell)) * per_cell)


def _random_slice(rng, length, size):
    start = int(rng.integers(max(1, length - size + 1)))
    return slice(start, min(length, start + size))
