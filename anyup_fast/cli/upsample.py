"""`anyup-fast upsample`: the features of one photograph at pixel resolution, whole, in part, or through a head."""

import json
import logging
import os
from pathlib import Path

from .. import __version__
from .options import add_inputs, add_outputs, add_picture, as_device, as_size
from .progress import Steps

logger = logging.getLogger("anyup_fast")

DEMO_PHOTO = "astronaut"
NAMED = 20  # classes of a head whose names are told at most


def add(commands):
    """Add the command to the parser's."""
    command = commands.add_parser("upsample", help="upsample the features of a photograph")
    command.add_argument("photo", help="a picture file")
    add_picture(command)
    command.add_argument(
        "--output-size",
        type=as_size,
        metavar="N|HxW",
        help="shorter side of the output, or both sides (default: those of the resized photo)",
    )
    command.add_argument("--out", metavar="FILE", help="write lr_features and hr_features to this .safetensors file")
    command.add_argument("--figure", metavar="FILE", help="draw the comparison to this .png, .jpg or .pdf file")
    command.add_argument(
        "--region",
        type=int,
        nargs=4,
        metavar=("TOP", "LEFT", "HEIGHT", "WIDTH"),
        help="only this rectangle of the output",
    )
    command.add_argument(
        "--head",
        metavar="FILE",
        help="a linear head in place of the features: .safetensors with weight (K, C) and bias",
    )
    command.add_argument("--labels", action="store_true", help="with --head: the index of the greatest output")
    command.add_argument("--stream", metavar="PATH", help="write the output tile by tile to this .npy or .zarr")
    command.add_argument("--tile", type=int, default=256, help="with --stream: side of the tiles (default: 256)")
    command.add_argument("--resume", action="store_true", help="with --stream: finish what was interrupted")
    add_inputs(command)
    add_outputs(command)
    command.set_defaults(run=run)


def run(arguments):
    """Upsample and write what is asked for; also `demo`, which names no picture."""
    import torch

    from ..api import extract_features, load_image, prepare, visualize_feature_comparison
    from ..checkpoints import locate_checkpoint
    from ..encoders import load_encoder
    from ..files import check_writable
    from ..heads import read_head
    from ..model import AnyUp
    from ..stores import open_zarr
    from ..visualize import FIGURE_SUFFIXES

    for option, path, suffixes in (
        ("--out", arguments.out, (".safetensors",)),
        ("--figure", arguments.figure, FIGURE_SUFFIXES),
    ):
        if path and Path(path).suffix.lower() not in suffixes:
            raise ValueError(f"{option}: the file must end in {' or '.join(suffixes)}, got {str(path)!r}")
    for option, given, other, present in (
        ("--labels", arguments.labels, "--head", arguments.head),
        ("--figure", arguments.figure, "no --region, --head or --stream", not (
            arguments.region or arguments.head or arguments.stream)),
        ("--stream", arguments.stream, "no --region", not arguments.region),
    ):  # fmt: skip
        if given and not present:
            raise ValueError(f"{option}: needs {other}")
    head = read_head(arguments.head) if arguments.head else None
    outputs = [path for path in (arguments.out, arguments.figure, arguments.stream) if path]
    if not outputs:
        raise ValueError("nothing would be written: name a file with --out, --figure or --stream")
    for path in outputs:
        check_writable(path)
    steps = Steps()
    device = _device(arguments.device)
    compute_dtype = getattr(torch, arguments.compute_dtype or "float32")
    model = AnyUp.from_pretrained(arguments.weights, device=device).to(compute_dtype)
    steps.done(f"AnyUp weights: {arguments.weights} ({locate_checkpoint(arguments.weights).name})")
    encoder = load_encoder(arguments.encoder, device=device)
    steps.done("encoder loaded")
    options = {"value_range": arguments.value_range, "upright": not arguments.as_stored, "fit": arguments.fit}
    image = load_image(photograph(arguments.photo), arguments.size, encoder.patch_size, **options).to(device)
    picture = image.picture if arguments.fit == "pad" else image
    steps.done(f"photograph {arguments.photo or DEMO_PHOTO}: {_shape(picture)}")
    lr_features = extract_features(image, encoder, layer=arguments.layer)
    steps.done(f"low-res features: {_shape(lr_features)}")
    size = arguments.output_size
    if isinstance(size, int):
        size = tuple(round(n * size / min(picture.shape[1:])) for n in picture.shape[1:])
    if not (arguments.region or arguments.head or arguments.stream):
        _check_memory(model, picture, lr_features, size or tuple(picture.shape[1:]))
    prepared, written = prepare(image, lr_features, model, dtype=compute_dtype), []
    if head is not None:
        if reason := head.why_not_on(arguments.encoder):
            logger.warning("%s", reason)
        prepared = prepared.head(head, argmax=arguments.labels)
        names = list(head.classes or ())
        names = f" ({', '.join(names[:NAMED] + ['...'] * (len(names) > NAMED))})" if names else ""
        steps.done(f"head: {prepared.channels} outputs{names} in place of {len(lr_features)} channels")
    if arguments.stream:
        streamed = prepared.stream(arguments.tile, size, out=arguments.stream, resume=arguments.resume)
        if head is not None and head.classes and streamed.suffix == ".zarr":
            open_zarr().open_array(store=str(streamed), mode="r+").attrs["classes"] = list(head.classes)
        written.append(streamed)
        steps.done("output streamed")
    if not arguments.stream or arguments.out or arguments.figure:
        hr_features = (prepared.region(*arguments.region, size) if arguments.region else prepared.full(size))[0]
        steps.done(f"high-res {'labels' if arguments.labels else 'features'}: {_shape(hr_features)}")
        if arguments.labels and head.classes:
            for line in _shares(hr_features, head.classes):
                logger.info("%s", line)
    if arguments.figure:
        visualize_feature_comparison(image, lr_features, hr_features, arguments.mode, arguments.figure)
        steps.done("figure drawn")
        written.append(arguments.figure)
    if arguments.out:
        tensors = {"lr_features": lr_features, "hr_features": hr_features}
        _save_features(arguments.out, tensors, getattr(torch, arguments.dtype), arguments, head)
        steps.done(f"features written as {arguments.dtype}")
        written.append(arguments.out)
    for path in written:
        logger.info("-> %s", path)


def _device(name):
    import torch

    from ..checks import checked_device

    device = checked_device(as_device(name))
    if device.type == "cpu":
        why = ": PyTorch finds no GPU" if name == "auto" else ""
        logger.info("computing on the CPU, %d threads%s", torch.get_num_threads(), why)
    else:
        described = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
        logger.info("computing on %s%s", device, described)
    return device


def _check_memory(model, image, features, size):
    """MemoryError where the whole output can't fit into this machine's memory."""
    if image.device.type != "cpu" or not hasattr(os, "sysconf"):
        return
    needed = model.estimate_memory((1, *image.shape), (1, *features.shape), size)
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise MemoryError(
            f"--output-size: {size[0]}x{size[1]} pixels of {len(features)} channels take {needed / 2**30:.0f} GiB of "
            f"memory, this machine has {there / 2**30:.0f}; --stream, --region or --head take less"
        )


def photograph(name):
    """A picture's name, or the photograph of the demo where there is none."""
    if name is not None:
        return name
    try:
        from skimage import data
    except ModuleNotFoundError as error:
        raise RuntimeError("the demo's photograph comes from scikit-image: install it, or name a picture") from error
    return getattr(data, DEMO_PHOTO)()


def _shape(tensor):
    return "x".join(str(n) for n in tensor.shape)


def _shares(labels, classes):
    """A line for each class that a label map shows: its index, its name, its share of the pixels."""
    counts = labels.flatten().bincount(minlength=len(classes)).tolist()
    for index, (name, count) in enumerate(zip(classes, counts, strict=True)):
        if count:
            yield f"  {index} {name}: {count / labels.numel():.1%}"


def _save_features(path, tensors, dtype, arguments, head=None):
    import torch
    from safetensors.torch import save_file

    from ..files import written_aside

    tensors = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in tensors.items()
    }
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError(f"--dtype: the features leave the range of {arguments.dtype}; use bfloat16 or float32")
    about = {"encoder": arguments.encoder, "weights": arguments.weights, "anyup_fast": __version__}
    if head is not None and head.classes:
        about["classes"] = json.dumps(head.classes, ensure_ascii=False)
    with written_aside(path) as aside:
        save_file(tensors, aside, {name: str(value) for name, value in about.items()})
