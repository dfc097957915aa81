"""`anyup-fast train`: weights of your own."""

import logging

from ..training.config import TrainConfig
from . import progress
from .options import add_precision

logger = logging.getLogger("anyup_fast")

# Fields of TrainConfig that are an option each; their types and defaults are TrainConfig's.
SETTINGS = {
    "pictures": "training pictures to make",
    "size": "side of the training pictures in pixels",
    "steps": "steps",
    "batch": "pictures per step",
    "guide_pixels": "pixels of a guide, at most",
    "optimizer": "adamw, or muon, which fits in fewer steps",
    "lr": "learning rate at its highest",
    "warmup": "steps of warm-up",
    "ema": "decay of the averaged weights, which are the result",
    "main_weight": "weight of the paper's loss at higher resolution",
    "dense_weight": "weight of the loss at mask boundaries; 0 = the paper's loss alone",
    "mask_weight": "weight of the attention's weight on the pixel's own instance",
    "segment_weight": "weight of telling instances apart by the upsampled features, at every pixel",
    "large_share": "share of steps with four times the guide's pixels and a quarter of the pictures",
    "region": "pixels along each axis of the part of a guide that is decoded at its own resolution",
    "native_share": "share of steps on features of the full picture",
    "native_weight": "weight of giving each cell's features back in those steps",
    "spread_weight": "weight of the attention's mean square distance, in cells",
    "smooth_weight": "weight of second differences where the guide is flat",
    "degraded_share": "share of steps whose guide is blurred, noisy or compressed",
    "noise_share": "share of steps whose low-res features are noisy",
    "variety_share": "share of steps with features as another encoder might have made them",
    "recolour_share": "share of steps whose guides show every instance in random colours of its own",
    "spot_share": "share of those instances with spots of another colour",
    "plain_share": "share of training pictures without cut-outs",
    "shapes_share": "share of the cut-outs that are drawn shapes and strokes",
    "camouflage_share": "share of the cut-outs with colours near those of the ground",
    "consistency_weight": "weight of giving the same under changed colours",
    "consistency_share": "share of steps that compute it",
    "max_cells": "low-res cells of a crop along one axis, at most",
    "seed": "seed of everything random",
    "draws": "another number: other draws over the pictures of the same seed",
}


def add(commands):
    """Add the command to the parser's."""
    command = commands.add_parser("train", help="train weights of your own, by the recipe of the paper")
    command.add_argument("--scenes", required=True, metavar="FOLDER", help="photographs")
    command.add_argument("--stamps", metavar="FOLDER", help="cut-outs with transparency, pasted on the photographs")
    command.add_argument(
        "--out", required=True, metavar="FOLDER", help="folder of the run; an unfinished run is resumed"
    )
    command.add_argument("--cache", metavar="FOLDER", help="folder of the cached targets (default: inside --out)")
    command.add_argument(
        "--encoders",
        nargs="+",
        default=TrainConfig.encoders,
        metavar="NAME",
        help="NAME or NAME:LAYER; one per step is drawn, one named twice twice as often "
        f"(default: {' '.join(TrainConfig.encoders)})",
    )
    command.add_argument(
        "--all", action="store_true", help="train on every picture; else a fifth is kept for evaluation"
    )
    for name, text in SETTINGS.items():
        default = getattr(TrainConfig, name)
        command.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"{text} (default: {default})"
        )
    command.add_argument("--save-every", type=int, default=200, help="steps between two states on disk (default: 200)")
    command.add_argument(
        "--until", type=int, metavar="STEP", help="stop after this step; without it the same command goes on"
    )
    command.add_argument(
        "--crop",
        type=float,
        nargs=2,
        default=TrainConfig.crop,
        metavar=("LEAST", "GREATEST"),
        help="side of a picture's crop, as a share of the photograph's shorter side "
        f"(default: {' '.join(map(str, TrainConfig.crop))})",
    )
    command.add_argument("--threads", type=int, help="threads of the CPU (default: PyTorch's choice)")
    command.add_argument("--init", metavar="WEIGHTS", help="weights to go on from: a name, path or URL")
    add_precision(command)
    command.add_argument("--float32", action="store_true", help="no bfloat16: the same as --precision highest")
    command.set_defaults(run=run)


def run(arguments):
    """Train, or go on with a run."""
    import torch

    from ..training import train

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    config = TrainConfig(
        encoders=tuple(arguments.encoders),
        held_out=not arguments.all,
        crop=tuple(arguments.crop),
        bf16=not arguments.float32 and arguments.precision in (None, "medium"),
        **{name: getattr(arguments, name) for name in ("scenes", "stamps", "init", *SETTINGS)},
    )
    bar = progress.bar(disable=arguments.quiet, extra="train")
    options = {"cache": arguments.cache, "save_every": arguments.save_every, "until": arguments.until}
    path = train(config, arguments.out, progress=bar, **options)
    logger.info("-> %s", path)
