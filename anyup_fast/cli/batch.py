"""`anyup-fast batch`: a folder, a list or a video into files."""

import logging
import os
import sys

from ..batch.settings import DTYPES, FORMATS, KINDS
from . import progress
from .options import add_inputs, as_size

logger = logging.getLogger("anyup_fast")


def add(commands):
    """Add the command to the parser's."""
    command = commands.add_parser("batch", help="a folder, list or video into files; run again, it goes on")
    command.add_argument("input", help="folder, glob (quoted), .txt or .lst list of paths, video, or picture")
    command.add_argument("output", help="folder of the results and of their manifest")
    command.add_argument("--kind", choices=tuple(KINDS), default="features", help=f"{_told(KINDS)} (default: features)")
    command.add_argument("--format", choices=FORMATS, help="default: png for pca, else safetensors")
    command.add_argument("--dtype", choices=DTYPES, default="float16", help="of features (default: float16)")
    command.add_argument("--head", metavar="FILE", help=".safetensors with weight (K, C) and bias, for head and labels")
    command.add_argument("--pca", metavar="FILE", help="pca.safetensors of another run, for its colours")
    command.add_argument("--film", metavar="FILE", help="with --kind pca: also make this .mp4, .mkv or .mov")
    command.add_argument("--rate", type=float, metavar="FPS", help="of the film (default: the video's, else 25)")
    command.add_argument("--layer", type=int, default=-1, help="layer of the encoder (default: the last)")
    command.add_argument("--output-size", type=as_size, metavar="N|HxW", help="of the output (default: every pixel)")
    command.add_argument(
        "--batch-size", type=int, metavar="N", help="pictures at once (default: 1 on CPUs, up to 8 on GPUs)"
    )
    command.add_argument(
        "--workers", type=int, metavar="N", help="processes that decode (default: by the CPUs; 0: none)"
    )
    command.add_argument("--pages", action="store_true", help="every page or frame of pictures that have several")
    command.add_argument(
        "--zarr-format", type=int, choices=(2, 3), default=3, help="of stores; zarr-python 2 reads 2 (default: 3)"
    )
    command.add_argument("--engine", choices=("local", "ray"), default="local", help="default: local")
    command.add_argument("--ray-address", metavar="ADDRESS", help="of a running Ray cluster (default: start one here)")
    command.add_argument("--overwrite", action="store_true", help="replace what was made with other settings")
    command.add_argument("--verify", action="store_true", help="compare what is done with its digests first")
    add_inputs(command)
    command.set_defaults(run=run)


def run(arguments):
    """Do what is left to do; the exit code tells of pictures that could not be made, or of a signal."""
    from .. import batch

    if arguments.film and arguments.kind != "pca":
        raise ValueError(f"--film: needs --kind pca, got {arguments.kind}")
    names = (
        "kind", "format", "dtype", "encoder", "layer", "weights", "size", "output_size", "head", "pca", "batch_size",
        "workers", "device", "engine", "ray_address", "overwrite", "verify", "pages", "zarr_format",
        "precision", "compute_dtype",
    )  # fmt: skip
    if arguments.film:
        batch.check_film(arguments.film)
    bar = progress.bar(disable=arguments.quiet, extra="batch")
    summary = batch.run(
        arguments.input,
        arguments.output,
        progress=lambda count: bar(total=count, unit="image"),
        **{name: getattr(arguments, name) for name in names},
    )
    if summary.signal is not None:
        if summary.abandoned:  # threads still compute, and the end of the interpreter would wait for what they hold
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(128 + summary.signal)
        return 128 + summary.signal
    if arguments.film:
        count = batch.make_film(arguments.input, arguments.output, arguments.film, arguments.rate)
        logger.info("-> %s, %d frames", arguments.film, count)
    return 3 if summary.failed else 0


def _told(choices):
    return "; ".join(f"{name} = {text}" for name, text in choices.items())
