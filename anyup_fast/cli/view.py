"""`anyup-fast view`: photographs in, one page of HTML out, in which their features are looked at and labelled."""

import logging
from pathlib import Path

from .options import add_inputs, add_picture, as_device
from .progress import Steps

logger = logging.getLogger("anyup_fast")

SUFFIXES = (".html", ".htm")
DIRECTIONS, ATTENTION_STEP = 32, 8


def add(commands):
    """Add the command to the parser's."""
    command = commands.add_parser(
        "view", help="make a page in which features of photographs are looked at and labelled", description=__doc__
    )
    command.add_argument("photos", nargs="+", metavar="PHOTO", help="picture files")
    command.add_argument(
        "--out", default="page.html", metavar="FILE", help="the page, an .html file (default: page.html)"
    )
    add_picture(command)
    command.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="a text whose similarity can be shown; may be given several times; for encoders that were trained with "
        "texts, such as text:siglip2_base",
    )
    command.add_argument("--head", metavar="FILE", help="class prototypes to start with, a .safetensors file")
    command.add_argument(
        "--directions",
        type=int,
        default=DIRECTIONS,
        help="how many the features are held in, at most 32 (default: 32): fewer make a smaller page",
    )
    command.add_argument(
        "--attention-step",
        type=int,
        default=ATTENTION_STEP,
        help="where every so many-th pixel looks is in the page, too; 0 leaves that out (default: 8)",
    )
    command.add_argument("--max-bytes", type=int, help="of the page (default: 128000000)")
    add_inputs(command)
    command.set_defaults(run=run)


def run(arguments):
    """Make the page and write it."""
    out = Path(arguments.out)
    if out.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--out: the file must end in {' or '.join(SUFFIXES)}, got {arguments.out!r}")
    more = {} if arguments.max_bytes is None else {"max_bytes": arguments.max_bytes}
    write(
        arguments.photos,
        out,
        arguments,
        layer=arguments.layer,
        fit=arguments.fit,
        value_range=arguments.value_range,
        upright=not arguments.as_stored,
        prompts=arguments.prompt,
        head=arguments.head,
        directions=arguments.directions,
        attention_step=arguments.attention_step or None,
        **more,
    )


def write(pictures, out, arguments, **options):
    """Write the page of `pictures`, by the options of every command that upsamples and by those of `view`."""
    from ..files import check_writable
    from ..viewer.view import view

    check_writable(out)
    steps = Steps()
    page = view(
        pictures,
        encoder=arguments.encoder,
        weights=arguments.weights,
        size=arguments.size,
        device=as_device(arguments.device),
        dtype=arguments.compute_dtype,
        **options,
    )
    page.write(out)
    steps.done(f"page of {page.size / 1e6:.1f} MB, to be opened in a browser")
    logger.info("-> %s", out)
