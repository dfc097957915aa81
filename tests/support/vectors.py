"""The golden vectors, what is read from them and drawn beside them, and how far a result is from another."""

import torch
from tree import ROOT

GOLDEN = ROOT / "tests" / "golden"
# Norm of the difference over norm. Measured: 1.1e-6 against these float32 outputs, whose own distance from float64
# is up to 2e-5 on the peaky random weights; two correct orders of summation may differ by as much.
GOLDEN_TOLERANCE = 5e-5


def tensors_of(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def inputs(batch=1, channels=12, size=(28, 35), grid=(4, 5), seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(batch, 3, *size, generator=generator)
    return image, torch.randn(batch, channels, *grid, generator=generator)
