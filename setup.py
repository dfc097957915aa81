"""Packaging of anyup-fast; the tables of pytest and ruff are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "anyup_fast" / "__init__.py").read_text(encoding="utf-8"), re.M
).group(1)

# The folder kernels/ is installed as anyup_fast.kernels, never as a top-level package of that name.
PACKAGES = find_packages(include=["anyup_fast", "anyup_fast.*"])
PACKAGES += ["anyup_fast.kernels"] + [f"anyup_fast.kernels.{name}" for name in find_packages("kernels")]

ENCODERS = ["transformers>=4.48", "onnx>=1.16"]
TIMM = ["timm>=1.0.22"]
VIZ = ["matplotlib>=3.7"]
DEMO = ["scikit-image>=0.22"]
TRAIN = ["tqdm>=4.60"]
STREAM = ["zarr>=3.0; python_version >= '3.11'"]
BATCH = ["tqdm>=4.60", "av>=12", "filelock>=3.12", *STREAM]
RAY = ["ray[data]>=2.40"]
FIT = ["scikit-learn>=1.4"]
ONNX = ["onnx>=1.16", "onnxscript>=0.5"]
# PyTorch's builds for GPUs bring the Triton that fits them, some under other names (triton-xpu, pytorch-triton-rocm):
# one of our own choice would be unpacked over it. The tests, and who has a build without one, ask for it here.
TRITON = ["triton>=3.4; platform_system == 'Linux'"]
TESTS = [*TRITON, "pytest>=8", "pytest-benchmark>=4", "pytest-xdist>=3.5", "onnxruntime>=1.20"]
DOCS = ["pdoc>=15"]
NOTEBOOKS = ["nbclient>=0.9", "ipykernel>=6.25"]
DEV = [
    *TESTS,
    *DOCS,
    *NOTEBOOKS,
    *("ruff>=0.6", "oxlint>=1.60", "playwright>=1.49", "build>=1.2", "setuptools>=64"),
]

setup(
    name="anyup-fast",
    version=VERSION,
    description="AnyUp feature upsampling: features of any encoder at pixel resolution, fast",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=PACKAGES,
    package_dir={"anyup_fast.kernels": "kernels"},
    package_data={
        "anyup_fast.weights": ["*.safetensors", "*.md"],
        "anyup_fast.kernels": ["tuned/*.json"],
        "anyup_fast.viewer": ["*.html", "*.css", "*.js"],
    },
    install_requires=[
        "torch>=2.7",
        "numpy>=1.24",
        "pillow>=10.1",
        "safetensors>=0.4",
    ],
    extras_require={
        "encoders": ENCODERS,
        "timm": TIMM,
        "viz": VIZ,
        "demo": ENCODERS + VIZ + DEMO,
        "train": TRAIN,
        "stream": STREAM,
        "batch": BATCH,
        "ray": BATCH + RAY,
        "fit": FIT,
        "onnx": ONNX,
        "triton": TRITON,
        "docs": DOCS,
        "dev": ENCODERS + VIZ + DEMO + TRAIN + BATCH + RAY + FIT + ONNX + DEV,
    },
    entry_points={"console_scripts": ["anyup-fast = anyup_fast.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Operating System :: OS Independent",
        "Topic :: Scientific/Engineering :: Image Processing",
    ],
)
