"""What training changes in guides and features, so that the weights learn to do without it."""

import io
import math

import numpy as np
import torch
import torch.nn.functional as F

FAINT_SHARE = 0.35  # of the recoloured instances come near the colours around them
FAINT_REACH = 8  # pixels around an instance that count for that, and that it goes on below others
SPOT_SIZE = 3, 14  # least and greatest distance of the noise's points that spots are cut from, in pixels
SPOT_COVER = 0.02, 0.15  # least and greatest part of an instance that spots cover
SPOT_SLOPE = 4.0  # of a spot's rim, per standard deviation of the noise that it is cut from


def photometric(image, rng):
    """Change exposure, contrast, saturation and colour balance of images (B,3,H,W) in [0,1]; sometimes add noise."""
    shape = (image.shape[0], 1, 1, 1)

    def factor(spread):
        return torch.from_numpy(np.exp(rng.uniform(-spread, spread, shape))).float()

    grey = image.mean(1, keepdim=True)
    image = grey + (image - grey) * factor(0.5)
    mean = image.mean((1, 2, 3), keepdim=True)
    image = (mean + (image - mean) * factor(0.3)) * factor(0.3)
    gains = torch.from_numpy(np.exp(rng.uniform(-0.15, 0.15, (image.shape[0], 3, 1, 1)))).float()
    image = (image * gains).clamp(0, 1) ** factor(0.3)
    if rng.random() < 0.3:
        image = image + torch.from_numpy(rng.normal(0, rng.uniform(0, 0.04), image.shape)).float()
    return image.clamp(0, 1)


def degraded(image, rng):
    """Blur images (B,3,H,W) in [0,1], add noise or compress them as JPEG; one, two or all three of it."""
    chosen = rng.random(3) < 0.5
    chosen[rng.integers(3)] = True
    blur, noise, jpeg = chosen
    if blur:
        sigma = rng.uniform(0.4, 1.5)
        taps = torch.exp(-0.5 * (torch.arange(-4, 5) / sigma).square())
        kernel = torch.outer(taps, taps)[None, None] / taps.sum().square()
        planes = F.pad(image.flatten(0, 1)[:, None], (4, 4, 4, 4), mode="replicate")
        image = F.conv2d(planes, kernel).view_as(image)
    if noise:
        image = image + torch.from_numpy(rng.normal(0, rng.uniform(0.01, 0.06), image.shape)).float()
    if jpeg:
        image = torch.stack([_as_jpeg(picture, int(rng.integers(25, 91))) for picture in image])
    return image.clamp(0, 1)


def _as_jpeg(image, quality):
    from PIL import Image

    file = io.BytesIO()
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255


def recoloured(image, instances, rng, spot_share=0.0):
    """Give every instance of an image random colours of its own: no pair of colours shall tell what belongs together.

    The instances are taken apart and laid over each other again, in the order of their numbers. The colours of an
    instance turn about the grey axis by a random angle; its saturation, contrast and mean brightness change as well.
    A share `FAINT_SHARE` of the instances, the lowest apart, then come near the mean colour that lies around them:
    edges that are hardly seen. Outlines become sharp to six pixels wide, as lenses and motion make them.

    A share `spot_share` of the instances carries spots, as teeth, highlights and strands of hair are: a colour that is
    found elsewhere does not make them part of what has it there.

    Args:
        image: (3, H, W) in [0, 1].
        instances: uint8 (H, W), the number of every pixel's instance.
        rng: numpy Generator.
        spot_share: from 0 to 1.

    Returns:
        (3, H, W) in [0, 1].
    """
    out = image
    for number in instances.unique():
        where = (instances == number).float()[None]
        layer = _grown(image, where)
        mean = _mean_colour(layer, where)
        saturation, contrast = np.exp(rng.uniform((-0.7, -0.5), (0.4, 0.3)))
        angle, shift = rng.uniform((0, -0.2), (2 * np.pi, 0.2))
        turn = torch.from_numpy(saturation * _turn_about_grey(angle) + (1 - saturation) / 3).float()
        grey = mean.mean()
        shift = (grey + shift).clamp(0.1, 0.9) - grey
        layer = contrast * torch.einsum("cd,dhw->chw", turn, layer) + (1 - contrast) * grey + shift
        around = (_box_mean(where, FAINT_REACH) > 0) & (instances < number)
        faint, moved, fainter = rng.random() < FAINT_SHARE, rng.uniform(0.6, 1), rng.uniform(0.4, 1)
        if faint and around.any():
            mean, ground = _mean_colour(layer, where), _mean_colour(out, around)
            layer = mean + moved * (ground - mean) + fainter * (layer - mean)
        if spot_share and rng.random() < spot_share:
            elsewhere = (instances < number).any() and rng.random() < 0.5
            colour = _mean_colour(out, (instances < number).float()[None]) if elsewhere else _random_colour(rng)
            layer = torch.lerp(layer, colour, rng.uniform(0.5, 1) * _spots(instances.shape, rng))
        below = (_box_mean(where, FAINT_REACH) > 0) & (instances > number)  # goes on under those that cover it
        opacity = where + below
        for _ in range(int(rng.integers(4))):
            opacity = _box_mean(opacity, 1)
        out = torch.lerp(out, layer, opacity)
    return out.clamp(0, 1)


def _grown(image, where):
    """`image` (3, H, W) with the pixels at the rim of `where` (1, H, W) and around it taken from its inside."""
    inside = (_box_mean(where, 1) > 0.99).float()
    if inside.all():
        return image
    near = _box_mean(torch.cat((image * inside, inside)), 4)
    from_inside = near[:3] / near[3:].clamp_min(1e-6)
    return torch.where((inside == 0) & (near[3:] > 1e-3), from_inside, image)


def _spots(shape, rng):
    """(1, H, W) from 0 to 1: round or drawn-out spots that cover a small part of the picture."""
    coarse = [math.ceil(n / math.exp(rng.uniform(*map(math.log, SPOT_SIZE)))) + 1 for n in shape]
    noise = torch.from_numpy(rng.standard_normal((1, 1, *coarse), dtype=np.float32))
    height = F.interpolate(noise, tuple(shape), mode="bilinear", align_corners=False)[0]
    level = height.flatten().quantile(1 - rng.uniform(*SPOT_COVER))
    return (SPOT_SLOPE * (height - level) / height.std()).clamp(0, 1)


def _random_colour(rng):
    """(3, 1, 1) in [0, 1], half of them black, white or a grey."""
    colour = rng.random(3) if rng.random() < 0.5 else np.full(3, np.clip(rng.uniform(-0.5, 1.5), 0, 1))
    return torch.from_numpy(colour).float()[:, None, None]


def _mean_colour(image, where):
    return ((image * where).sum((1, 2)) / where.sum())[:, None, None]


def _box_mean(maps, reach):
    """Mean of (C, H, W) over the `2 * reach + 1` rows and columns around each pixel, of those inside."""
    for axis in (1, 2):  # sums of shifted maps: several times faster on a CPU than pooling
        length, at = maps.shape[axis], torch.arange(maps.shape[axis])
        around = F.pad(maps, (0, 0, reach, reach) if axis == 1 else (reach, reach))
        total = around.narrow(axis, 0, length).clone()
        for shift in range(1, 2 * reach + 1):
            total += around.narrow(axis, shift, length)
        count = (at + reach).clamp(max=length - 1) - (at - reach).clamp(min=0) + 1
        maps = total / (count[:, None] if axis == 1 else count)
    return maps


def _turn_about_grey(angle):
    """(3, 3) float64, the rotation of colours by `angle` that leaves greys as they are."""
    cos, sin = np.cos(angle), np.sin(angle) / np.sqrt(3)
    off = (1 - cos) / 3
    return cos * np.eye(3) + off + sin * np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])


def noisy(features, rng):
    """Features (B,C,h,w) with independent noise in every number, of up to their own standard deviation."""
    spread = features.std((2, 3), keepdim=True)
    noise = torch.from_numpy(rng.standard_normal(features.shape, dtype=np.float32))
    return features + rng.uniform(0, 1) * spread * noise
