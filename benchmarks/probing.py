"""How good is a linear probe on the upsampled features? mIoU on a folder of pictures with masks, for any weights.

    python benchmarks/probing.py VOC2012 --encoder dinov2_vits14 --weights embedded anyup_multi_backbone

The folder has the layout of Pascal VOC: JPEGImages (.jpg or .png), SegmentationClass (PNG, 255 counts for nothing) and
ImageSets/Segmentation/train.txt and val.txt, the names without suffix. `--make FOLDER --scenes DIR --stamps DIR` writes
such a folder of composites with exact masks: a photograph with cut-outs of one class, a class for each folder of
cut-outs; of each class a third of the cut-outs, and of the photographs a fifth, are kept for val.

For every method the probe is the same: the features of the frozen encoder, standardised, and one linear layer, trained
with cross-entropy at the resolution of the resized picture. Interpolation and AnyUp are linear in what they spread, so
the layer is applied to the low-res features and its answers are spread, `model(image, features, values=logits)`. Starts
and order of pictures are equal. Predictions are made at the resolution of the mask.

Plus/minus of a difference is one standard error, by a bootstrap over the pictures of val; "near edges" counts pixels
with another class at most `BAND` rows and columns away.

    python benchmarks/probing.py --cost values          # or features, guide: time and memory of a training step
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from anyup_fast.encoders import load_encoder
from anyup_fast.files import written_aside
from anyup_fast.image import load_image
from anyup_fast.masks import IGNORED, confusion, ious, read_mask
from anyup_fast.model import AnyUp
from anyup_fast.training.composites import Pictures, composite, find_pictures

BAND = 4
DRAWS = 1000  # of the bootstrap
SPLITS = ("train", "val")


def listed(folder, split):
    """[(path of the picture, path of the mask)] of one split of a folder in the layout of VOC."""
    folder = Path(folder)
    names = (folder / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()
    pairs = []
    for name in names:
        pictures = [folder / "JPEGImages" / f"{name}{suffix}" for suffix in (".jpg", ".png")]
        mask = folder / "SegmentationClass" / f"{name}.png"
        found = [path for path in pictures if path.is_file()]
        if not found or not mask.is_file():
            raise FileNotFoundError(f"{split}.txt names {name!r}: need {pictures[0]} (or .png) and {mask}")
        pairs.append((found[0], mask))
    if not pairs:
        raise ValueError(f"{folder}: {split}.txt names no picture")
    return pairs


def make(folder, scenes, stamps, counts, size, seed):
    """Write composites in the layout of VOC; returns the names of the classes, "background" first."""
    folder, rng = Path(folder), np.random.default_rng(seed)
    classes = {}
    for place in sorted(path for path in Path(stamps).expanduser().iterdir() if path.is_dir()):
        paths = find_pictures(scenes, place).stamps
        if len(paths) >= 3:
            kept = [path for number, path in enumerate(paths) if number % 3 == 2]
            classes[place.name] = {"train": [path for path in paths if path not in kept], "val": kept}
    if not classes:
        raise ValueError(f"stamps: need a folder with at least three cut-outs for each class in {stamps}")
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for split, count in zip(SPLITS, counts, strict=True):
        grounds, names = find_pictures(scenes, held_out=split == "val").scenes, []
        for number in range(count):
            label = number % len(classes)
            drawn = Pictures(grounds, tuple(list(classes.values())[label][split]))
            picture, instances = composite(drawn, rng, size, stamps=(1, 2))
            names.append(f"{split}_{number:05}")
            Image.fromarray(picture).save(folder / "JPEGImages" / f"{names[-1]}.png")
            mask = Image.fromarray(np.where(instances > 0, label + 1, 0).astype(np.uint8))
            mask.save(folder / "SegmentationClass" / f"{names[-1]}.png")
        (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    names = ["background", *classes]
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    return names


class Examples:
    """Pictures of a split with their features, which are computed once and kept as float16."""

    def __init__(self, pairs, encoder, size, layer=-1):
        self.pairs, self.size, self.patch = pairs, size, encoder.patch_size
        self.features = []
        with torch.no_grad():
            for path, _ in pairs:
                self.features.append(encoder(self.image(path), layer=layer)[0].half().cpu())

    def image(self, path):
        """(1, 3, H, W)."""
        return load_image(path, self.size, self.patch)[None]

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        path, mask = self.pairs[index]
        return self.image(path), self.features[index][None].float(), torch.from_numpy(read_mask(mask))


def upsampler(name):
    """A function of (image, features, values, output size): "bilinear", or AnyUp with weights of this name."""
    if name == "bilinear":
        return lambda image, features, values, size: F.interpolate(values, size, mode="bilinear", align_corners=False)
    model = AnyUp.from_pretrained(name).requires_grad_(False)
    return lambda image, features, values, size: model(image, features, size, values=values)


def probe(examples, classes, seed):
    """A linear layer on standardised features: (1x1 convolution, function that standardises)."""
    numbers = torch.cat([features.flatten(1) for features in examples.features], 1).float()
    mean, spread = (statistic[None, :, None, None] for statistic in (numbers.mean(1), numbers.std(1).clamp(min=1e-6)))
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        layer = torch.nn.Conv2d(numbers.shape[0], classes, 1)
    return layer, lambda features: (features - mean) / spread


def trained(examples, classes, spread, steps, batch, rate, seed):
    """A function from features to logits, trained through an upsampler."""
    layer, standard = probe(examples, classes, seed)
    optimizer = torch.optim.AdamW(layer.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(examples)) for _ in range(-(-steps * batch // len(examples)))])
    for step in range(steps):
        for index in order[step * batch : (step + 1) * batch]:
            image, features, mask = examples[index]
            target = F.interpolate(mask[None, None].float(), image.shape[2:], mode="nearest-exact")[:, 0].long()
            logits = spread(image, features, layer(standard(features)), tuple(image.shape[2:]))
            loss = F.cross_entropy(logits, target, ignore_index=IGNORED)
            (loss / batch).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return lambda features: layer(standard(features))


def near_edges(mask):
    """Pixels (H, W), bool, that have another value at most `BAND` rows and columns away."""
    padded = torch.from_numpy(mask).float()[None, None]
    greatest, least = (F.max_pool2d(sign * padded, 2 * BAND + 1, stride=1, padding=BAND) * sign for sign in (1, -1))
    return (greatest != least)[0, 0].numpy()


@torch.no_grad()
def judged(examples, classes, spread, logits):
    """Counts of `confusion` of every picture, over all its pixels and near edges: two arrays (pictures, K, K)."""
    whole, edges = [], []
    for index in range(len(examples)):
        image, features, mask = examples[index]
        mask = mask.numpy()
        labels = spread(image, features, logits(features), mask.shape)[0].argmax(0).numpy()
        whole.append(confusion(labels, mask, classes))
        edges.append(confusion(labels, np.where(near_edges(mask), mask, IGNORED), classes))
    return np.stack(whole), np.stack(edges)


def mean_iou(counts):
    """Mean IoU of counts (pictures, K, K) that are summed over the pictures."""
    return float(np.nanmean(ious(counts.sum(0))))


def error_of_difference(counts, others, seed=0):
    """Standard error of the difference of two mean IoUs over the same pictures, by a bootstrap."""
    rng = np.random.default_rng(seed)
    draws = (rng.integers(0, len(counts), len(counts)) for _ in range(DRAWS))
    return float(np.std([mean_iou(counts[drawn]) - mean_iou(others[drawn]) for drawn in draws]))


def run(folder, encoder, weights, size, steps, batch, rate, seed, layer=-1, told=print):
    """Train and judge a probe for bilinear interpolation and for each of the weights.

    Returns:
        rows: a dict each, with method, miou, edges, and differences to bilinear with their errors.
    """
    pairs = {split: listed(folder, split) for split in SPLITS}
    values = {int(n) for split in SPLITS for _, mask in pairs[split] for n in np.unique(read_mask(mask))}
    classes = max(values - {IGNORED}) + 1
    encoder = load_encoder(encoder)
    start = time.perf_counter()
    train, val = (Examples(pairs[split], encoder, size, layer) for split in SPLITS)
    told(f"{len(train)} pictures to train, {len(val)} to judge, {classes} classes; "
         f"features {tuple(train.features[0].shape)} in {time.perf_counter() - start:.0f} s")  # fmt: skip
    rows, first = [], None
    for name in ("bilinear", *weights):
        start, spread = time.perf_counter(), upsampler(name)
        counts = judged(val, classes, spread, trained(train, classes, spread, steps, batch, rate, seed))
        first = counts if first is None else first
        row = {"method": str(name), "seconds": time.perf_counter() - start}
        for place, ours, theirs in zip(("miou", "edges"), counts, first, strict=True):
            row[place] = mean_iou(ours)
            row[f"{place}_gain"] = row[place] - mean_iou(theirs)
            row[f"{place}_error"] = error_of_difference(ours, theirs)
        rows.append(row)
        told(told_row(row))
    return rows


def told_row(row):
    """A row as a line of the table."""
    parts = [f"| {row['method']} "]
    for place in ("miou", "edges"):
        gain = f" ({row[f'{place}_gain']:+.3f} ± {row[f'{place}_error']:.3f})" if row["method"] != "bilinear" else ""
        parts.append(f"| {row[place]:.3f}{gain} ")
    return "".join(parts) + f"| {row['seconds']:.0f} s |"


def cost(what, size, channels, classes, repeats=5):
    """Time of a training step of a linear layer and the memory that it takes beyond its inputs.

    Args:
        what: "values", the layer before the upsampling; "features", after it; "guide", no layer and one channel without
            gradients, which is what both have in common.

    Returns:
        (seconds, and seconds of all processors together, the least of `repeats`; bytes by which the process grew at its
        largest).
    """
    model = AnyUp.from_pretrained("embedded").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, size, size, generator=generator)
    features = torch.randn(1, channels, size // 14, size // 14, generator=generator)
    target = torch.randint(classes, (1, size, size), generator=generator)
    layer = torch.nn.Conv2d(channels, classes, 1)
    before, times, busy = _peak(), [], []
    for _ in range(repeats):
        start, worked = time.perf_counter(), time.process_time()
        if what == "values":
            F.cross_entropy(model(image, features, values=layer(features)), target).backward()
        else:
            with torch.no_grad():
                upsampled = model(image, features, values=features[:, :1] if what == "guide" else None)
            if what == "features":
                F.cross_entropy(layer(upsampled), target).backward()
        times.append(time.perf_counter() - start)
        busy.append(time.process_time() - worked)
    return min(times), min(busy), _peak() - before


def _peak():
    """Bytes of memory that this process had at its largest."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(argv=None):
    """The command; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="in the layout of VOC")
    parser.add_argument("--encoder", default="dinov2_vits14")
    parser.add_argument("--layer", type=int, default=-1)
    parser.add_argument("--weights", nargs="*", default=["embedded"], help="of AnyUp: names, paths or URLs")
    parser.add_argument("--size", type=int, default=448, help="shorter side of the pictures")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=4, help="pictures of a step")
    parser.add_argument("--rate", type=float, default=2e-2, help="learning rate at its highest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    parser.add_argument("--make", metavar="FOLDER", help="write composites into this folder, in place of probing")
    parser.add_argument("--scenes", help="with --make: folder of photographs")
    parser.add_argument("--stamps", help="with --make: folder of folders of cut-outs, a class each")
    parser.add_argument("--count", type=int, nargs=2, default=(160, 80), metavar=("TRAIN", "VAL"), help="with --make")
    parser.add_argument("--cost", choices=("values", "features", "guide"), help="measure one training step")
    parser.add_argument("--channels", type=int, default=384, help="with --cost")
    parser.add_argument("--classes", type=int, default=21, help="with --cost")
    arguments = parser.parse_args(argv)
    if arguments.cost:
        seconds, busy, grown = cost(arguments.cost, arguments.size, arguments.channels, arguments.classes)
        told = f"{seconds:.2f} s a step, {busy:.2f} s of processors, {grown / 2**20:.0f} MiB"
        print(f"{arguments.cost}: {told}, {torch.get_num_threads()} threads")
        return 0
    if arguments.make:
        names = make(
            arguments.make, arguments.scenes, arguments.stamps, arguments.count, arguments.size, arguments.seed
        )
        print(f"{sum(arguments.count)} composites of {len(names)} classes: {', '.join(names)}")
        return 0
    if not arguments.folder:
        parser.error("name a folder, or --make or --cost")
    print("python benchmarks/probing.py", *(sys.argv[1:] if argv is None else argv))
    print("| method | mIoU | mIoU near edges | time |\n|---|---|---|---|")
    options = {name: getattr(arguments, name) for name in ("size", "steps", "batch", "rate", "seed", "layer")}
    rows = run(arguments.folder, arguments.encoder, arguments.weights, **options)
    if arguments.json:
        with written_aside(arguments.json) as aside:
            aside.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
