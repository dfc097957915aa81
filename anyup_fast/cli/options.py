"""Options that several commands take, and how a size is read."""

import argparse

DTYPES = ("float16", "bfloat16", "float32")


def add_inputs(command):
    """Options of every command that upsamples: encoder, weights, size of the pictures, device."""
    command.add_argument(
        "--encoder",
        default="dinov2_vits14",
        help="name (see `anyup-fast info`), or package.module:function of your own (default: dinov2_vits14)",
    )
    command.add_argument("--weights", default="embedded", help="name, path or URL (default: embedded)")
    command.add_argument(
        "--size", type=as_size, default=448, metavar="N|HxW", help="shorter side, or both sides (default: 448)"
    )
    add_device(command)
    command.add_argument(
        "--backend",
        choices=("auto", "triton", "torch", "reference"),
        help="of the operators (default: ANYUP_FAST_BACKEND, else auto)",
    )
    add_precision(command)
    command.add_argument(
        "--compute-dtype", choices=DTYPES, help="what AnyUp computes in, whatever is written (default: float32)"
    )


def add_picture(command):
    """How a picture file is read, and which layer of the encoder it goes to."""
    command.add_argument(
        "--value-range",
        type=float,
        nargs=2,
        metavar=("BLACK", "WHITE"),
        help="values of the picture that are black and white, such as 0 4095 (default: those of its type)",
    )
    command.add_argument(
        "--as-stored", action="store_true", help="leave the picture as it is stored, whatever its EXIF"
    )
    command.add_argument(
        "--fit",
        choices=("stretch", "pad"),
        default="stretch",
        help="how the sides become multiples of the encoder's patch: by resizing, or by padding that is cut off again",
    )
    command.add_argument("--layer", type=int, default=-1, help="layer of the encoder (default: the last)")


def add_precision(command):
    """How precisely float32 is multiplied."""
    command.add_argument(
        "--precision",
        choices=("highest", "high", "medium"),
        help="of products of float32: exact, or bfloat16 (CPUs) or TF32 (GPUs) where that is faster "
        "(default: ANYUP_FAST_PRECISION, else highest)",
    )


def add_device(command):
    """The device to compute on."""
    command.add_argument(
        "--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, ... (default: auto)"
    )


def as_device(name):
    """Name of the device that `--device` asks for."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def add_outputs(command):
    """Options of the commands that draw and write the features of one photograph."""
    command.add_argument("--mode", choices=("mean", "pca"), default="pca", help="colours of the figure (default: pca)")
    command.add_argument(
        "--dtype", choices=DTYPES, default="float16", help="of the written features (default: float16)"
    )


def as_size(text):
    """ "448" -> 448, "448x672" -> (448, 672)."""
    parts = text.lower().split("x")
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers, default=0) < 1:
        raise argparse.ArgumentTypeError(f"need a positive number of pixels or HEIGHTxWIDTH, got {text!r}")
    return numbers[0] if len(numbers) == 1 else tuple(numbers)
