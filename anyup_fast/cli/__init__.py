"""`anyup-fast`: the verbs from the command line, training, a check of the operators, a report on the installation."""

import argparse
import logging
import os
import sys
from contextlib import contextmanager

from .. import __version__
from . import batch, check, demo, fit_head, info, train, upsample, view

logger = logging.getLogger("anyup_fast")

# As anyup_fast.ops.choice and anyup_fast.cpu.products read them, which would load torch.
BACKEND_VARIABLE, PRECISION_VARIABLE = "ANYUP_FAST_BACKEND", "ANYUP_FAST_PRECISION"


def main(argv=None):
    """Run `anyup-fast` with the arguments `argv` (None: the command line's) and return its exit code.

    0 = done, 1 = it could not be done (a sentence on standard error says why), 2 = wrong arguments, 3 = done, but for
    pictures that could not be made (`batch`), 130 = interrupted, 141 = nobody reads the output, 143 = terminated.
    """
    if "torch" not in sys.modules:
        # Threads of GNU's OpenMP spin while they wait; beside any other busy process that costs a factor of thirty.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    _print_anything()
    arguments = _parser().parse_args(argv)
    try:
        with _reporting(arguments.quiet), _asking_for(arguments):
            code = arguments.run(arguments)
    except KeyboardInterrupt:
        print("anyup-fast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError) as error:
        print(f"anyup-fast: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    return code or 0


def _print_anything():
    """Have what a console can't print, such as a name in another alphabet, replaced."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


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


@contextmanager
def _asking_for(arguments):
    """Ask for a back end and a precision, in the processes that a command starts as well, where options name them."""
    options = {BACKEND_VARIABLE: "backend", PRECISION_VARIABLE: "precision"}
    wanted = {variable: getattr(arguments, option, None) for variable, option in options.items()}
    wanted = {variable: value for variable, value in wanted.items() if value is not None}
    before = {variable: os.environ.get(variable) for variable in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for variable, value in before.items():
            if value is None:
                os.environ.pop(variable)
            else:
                os.environ[variable] = value


def _parser():
    parser = argparse.ArgumentParser(
        prog="anyup-fast",
        description="Features of any vision encoder at pixel resolution, guided by the image (AnyUp).",
    )
    parser.add_argument("--version", action="version", version=f"anyup-fast {__version__}")
    parser.add_argument("--quiet", action="store_true", help="(before the command) print warnings and errors only")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (demo, upsample, view, fit_head, train, batch, check, info):
        command.add(commands)
    return parser
