"""`anyup-fast demo`: for a first look; features, figure and page of a photograph go to a folder."""

from pathlib import Path

from . import upsample, view
from .options import add_inputs, add_outputs


def add(commands):
    """Add the command to the parser's."""
    command = commands.add_parser("demo", help="upsample the features of a photograph and draw the comparison")
    command.add_argument("photo", nargs="?", help="a picture file (default: the astronaut that scikit-image ships)")
    command.add_argument(
        "--out", default="demo", metavar="FOLDER", help="where figure, features and page go (default: demo)"
    )
    add_inputs(command)
    add_outputs(command)
    absent = {"output_size": None, "layer": -1, "region": None, "head": None, "labels": False, "stream": None}
    command.set_defaults(run=run, value_range=None, as_stored=False, fit="stretch", **absent)


def run(arguments):
    """Upsample, write and draw; and the page in which the features are looked at."""
    out = Path(arguments.out)
    arguments.figure, arguments.out = out / "comparison.png", out / "features.safetensors"
    upsample.run(arguments)
    photo = upsample.photograph(arguments.photo)
    view.write([photo], out / "view.html", arguments, names=[Path(arguments.photo or upsample.DEMO_PHOTO).name])
