"""Problems for feature unification, cards to plan for, and what a launcher allocates."""

import attention_cases
import torch
import torch.nn.functional as F
from anyup_fast.kernels.tiling import Device
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = list(attention_cases.DTYPES.values())
H100 = Device("cuda", (9, 0), 232448, "H100")
A100 = Device("cuda", (8, 0), 166912, "A100")
MI300 = Device("hip", (9, 4), 65536, "MI300")


def make(channels, filters, size, shape, dtype=torch.float32):
    """Features (B, C, h, w) of unit length with NaN around them, and filters (M, 1, k, k) that give peaked results."""
    generator = torch.Generator().manual_seed(channels + filters)
    batch, *grid = shape
    features = F.normalize(torch.randn(batch, channels, *grid, generator=generator), dim=1).to(dtype)
    basis = 3 * torch.randn(filters, 1, size, size, generator=generator)
    return attention_cases._bordered(features, DEVICE), basis.to(DEVICE)


class Sizes(TorchDispatchMode):
    """Collects how many numbers each tensor made inside holds."""

    def __init__(self):
        super().__init__()
        self.made = [0]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.made += [x.numel() for x in (result if isinstance(result, tuple) else (result,)) if torch.is_tensor(x)]
        return result
