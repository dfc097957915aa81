"""`anyup-fast fit-head`: a head from pictures with masks, or from prompts, judged by pictures that were held out."""

import logging

from .options import add_inputs, as_device
from .progress import Steps

logger = logging.getLogger("anyup_fast")

IGNORED = 255  # that of anyup_fast.masks, which would load torch


def add(commands):
    """Add the command to the parser's."""
    command = commands.add_parser("fit-head", help="a linear head from pictures with masks, or from prompts")
    command.add_argument("pictures", nargs="?", help="folder, glob (quoted), .txt or .lst list of paths, or picture")
    command.add_argument("--masks", metavar="FOLDER", help="that of a/b.jpg is FOLDER/a/b.png: the class of each pixel")
    command.add_argument("--out", required=True, metavar="FILE", help=".safetensors of the head, for --head of others")
    command.add_argument(
        "--kind",
        choices=("prototype", "linear"),
        default="prototype",
        help="mean direction of a class, or logistic regression by scikit-learn (default: prototype)",
    )
    command.add_argument(
        "--held-out",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="of the pictures, to judge by; of a single picture, of its pixels; 0 judges nothing (default: 0.2)",
    )
    command.add_argument("--classes", metavar="FILE", help="names: .txt, one a line, or .json, list or index to name")
    command.add_argument(
        "--ignore", type=int, default=IGNORED, metavar="N", help="value of pixels that count for nothing; -1: none"
    )
    command.add_argument("--samples", type=int, default=256, metavar="N", help="pixels of each class and mask (256)")
    command.add_argument("--C", type=float, default=1.0, help="of --kind linear: inverse of its penalty (default: 1)")
    command.add_argument("--seed", type=int, default=0, help="of the draw of pictures and pixels (default: 0)")
    command.add_argument(
        "--prompts", nargs="+", metavar="TEXT", help="a class each, for an encoder with a tower for texts (text:NAME)"
    )
    command.add_argument("--layer", type=int, default=-1, help="layer of the encoder (default: the last)")
    add_inputs(command)
    command.set_defaults(run=run)


def run(arguments):
    """Fit, write, judge, and tell."""
    from ..files import check_writable, expanded
    from ..fitting import prompt_head
    from ..labelled import Folder, find_labelled, fit_folder
    from ..masks import read_classes

    if bool(arguments.pictures) != bool(arguments.masks):
        raise ValueError("fit-head: PICTURES and --masks FOLDER go together")
    if not arguments.prompts and not arguments.pictures:
        raise ValueError("fit-head: name PICTURES and --masks FOLDER, or --prompts TEXT ...")
    if expanded(arguments.out).suffix != ".safetensors":
        raise ValueError(f"--out: the file must end in .safetensors, got {arguments.out!r}")
    check_writable(arguments.out)
    classes = read_classes(arguments.classes) if arguments.classes else None
    ignore = None if arguments.ignore == -1 else arguments.ignore
    steps, judged = Steps(), None
    if arguments.pictures:
        count = len(classes) if classes else len(arguments.prompts) if arguments.prompts else None
        labelled, bare = find_labelled(arguments.pictures, arguments.masks, count, ignore)
        left = f"; {len(bare)} without a mask are left out, such as {bare[0]}" if bare else ""
        steps.done(f"{len(labelled)} pictures with masks{left}")
    device = as_device(arguments.device)
    encoder = _encoder(arguments, device)
    steps.done("encoder loaded")
    folder = Folder(encoder, arguments.layer, arguments.size, arguments.weights, arguments.compute_dtype)
    if arguments.prompts:
        head = prompt_head(encoder, arguments.prompts, classes=classes)
        if arguments.pictures:
            where = f"of all {len(labelled)} pictures, none of which the prompts have seen"
            judged = folder.judge(labelled, head, where, -1 if ignore is None else ignore)
    else:
        options = {name: getattr(arguments, name) for name in ("kind", "held_out", "samples", "seed", "C")}
        head, judged = fit_folder(labelled, folder, classes=classes, ignore=ignore, **options)
    head.save(arguments.out)
    steps.done(f"head of the kind {head.kind!r}: {len(head.weight)} classes of {head.weight.shape[1]} channels")
    for line in judged.lines() if judged else ():
        logger.info("%s", line)
    logger.info("-> %s", arguments.out)


def _encoder(arguments, device):
    from ..checks import checked_device
    from ..encoders import load_encoder

    return load_encoder(arguments.encoder, device=checked_device(device), project=bool(arguments.prompts))
