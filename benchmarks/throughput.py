"""Pictures per second over a data set: one after another, the pipeline, Ray, and what encoder and upsampler allow.

    python benchmarks/throughput.py --pictures FOLDER --count 40 --size 224 --encoder efficientnet_lite0 --kind labels

A round runs every method once; told are the medians over the rounds, and the share of the pipeline in what encoder and
upsampler alone reach on pictures that lie in memory, one after another with PyTorch's threads.
"""

import argparse
import csv
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

# Threads of GNU's OpenMP spin while they wait; beside any other busy process that costs a factor of thirty.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch  # noqa: E402
from checkout import commit, use_checkout  # noqa: E402

use_checkout()

from safetensors.torch import save_file  # noqa: E402

from anyup_fast.batch import Settings, run  # noqa: E402
from anyup_fast.batch.manifest import Manifest  # noqa: E402
from anyup_fast.batch.preparation import describe  # noqa: E402
from anyup_fast.batch.reading import Reader  # noqa: E402
from anyup_fast.batch.sources import find_sources  # noqa: E402
from anyup_fast.batch.stages import Upsampler, Writer  # noqa: E402
from anyup_fast.encoders import load_encoder  # noqa: E402

CLASSES = 21


def main(argv=None):
    """Measure and print; returns the rows, one for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", required=True, metavar="FOLDER")
    parser.add_argument("--count", type=int, default=40, help="pictures of the folder that are taken (default: 40)")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--encoder", default="efficientnet_lite0")
    parser.add_argument("--weights", default="embedded")
    parser.add_argument("--kind", default="labels", choices=("labels", "features", "lowres"))
    parser.add_argument("--engines", nargs="+", default=["local"], choices=("local", "ray"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", metavar="FILE", help="append the rows to this file")
    arguments = parser.parse_args(argv)

    given = {name: getattr(arguments, name) for name in ("kind", "size", "encoder", "weights")}
    sources = find_sources(arguments.pictures)[: arguments.count]
    with tempfile.TemporaryDirectory() as root:
        root, head = Path(root), None
        settings = Settings(**given)
        if arguments.kind == "labels":
            head = root / "head.safetensors"
            save_file({"weight": torch.randn(CLASSES, channels(settings, sources[0]))}, head)
        listing = root / "list.txt"
        listing.write_text("".join(f"{Path(source.path).resolve()}\n" for source in sources))
        simple = root / "simple"
        simple.mkdir()
        encoder = load_encoder(settings.encoder, weights=settings.encoder_weights)
        describe(settings, simple, Manifest(simple), sources, head, None, 1, False, lambda: encoder, None)
        upsampler = Upsampler(settings, simple, encoder=encoder)
        methods = {
            "encoder and upsampler": lambda place: computing_alone(settings, upsampler, sources),
            "simple loop": lambda place: simple_loop(settings, upsampler, sources, simple),
        }
        for engine in arguments.engines:
            methods[f"pipeline ({engine})"] = lambda place, engine=engine: pipeline(listing, place, head, engine, given)
        seconds = {name: [] for name in methods}
        stages = {name: {} for name in methods}
        for number in range(arguments.rounds):
            for name, method in methods.items():
                taken, stages[name] = method(root / f"{number}-{name}")
                seconds[name].append(taken)
    rows = [row(name, seconds, stages[name], len(sources), arguments) for name in methods]
    report(rows, arguments.csv)
    return rows


def channels(settings, source):
    """Channels of the encoder's features."""
    from anyup_fast.encoders import load_encoder

    encoder = load_encoder(settings.encoder)
    image = Reader(settings, encoder.patch_size)(source).image
    return encoder(image[None], layer=settings.layer).shape[1]


def computing_alone(settings, upsampler, sources):
    """Seconds that encoder and upsampler take for pictures in memory."""
    reader = Reader(settings, upsampler.encoder.patch_size)
    pictures = [reader(source) for source in sources]
    start = time.perf_counter()
    for picture in pictures:
        upsampler([picture])
        picture.tensors = None
    return time.perf_counter() - start, {}


def simple_loop(settings, upsampler, sources, folder):
    """Seconds for reading, computing and writing one after another."""
    reader, writer = Reader(settings, upsampler.encoder.patch_size), Writer(settings, folder)
    start, stages = time.perf_counter(), {}
    for source in sources:
        picture = writer(upsampler([reader(source)])[0])
        for stage, seconds in picture.seconds.items():
            stages[stage] = stages.get(stage, 0.0) + seconds
    return time.perf_counter() - start, stages


def pipeline(listing, place, head, engine, given):
    """Seconds of a run, from its first picture asked for to its last one written."""
    summary = run(listing, place, head=head, engine=engine, **given)
    if not summary.complete:
        raise RuntimeError(f"pictures: some could not be made: {summary.failed}")
    return summary.seconds, summary.stages


def row(name, seconds, stages, count, arguments):
    """What is told of a method."""
    median, alone = statistics.median(seconds[name]), seconds["encoder and upsampler"]
    share = statistics.median(first / second for first, second in zip(alone, seconds[name], strict=True))
    return {
        "method": name,
        "images_per_s": round(count / median, 3),
        "share_of_computing_alone": round(share, 3),
        "stages_s": "; ".join(f"{stage} {taken:.2f}" for stage, taken in stages.items()),
        "count": count,
        "size": arguments.size,
        "encoder": Path(arguments.encoder).name,
        "kind": arguments.kind,
        "rounds": arguments.rounds,
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "commit": commit(),
    }


def report(rows, path):
    """Print the rows; append them to a CSV file if one is named."""
    for each in rows:
        print(
            f"{each['method']:24} {each['images_per_s']:8.2f} images/s  {each['share_of_computing_alone']:6.1%} of "
            f"computing alone  {each['stages_s']}"
        )
    if path:
        new = not Path(path).exists()
        with open(path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            if new:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
