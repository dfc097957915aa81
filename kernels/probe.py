"""A kernel that writes known numbers: whether what is launched on a device runs there at all."""

import torch
import triton
import triton.language as tl

from .attention import _on

COUNT = 64


@triton.jit
def _probe_kernel(out_ptr, COUNT: tl.constexpr):
    offs = tl.arange(0, COUNT)
    tl.store(out_ptr + offs, 2 * offs + 1)


def runs(device):
    """Whether a kernel launched on a torch.device writes what it should: a driver may take launches and do nothing."""
    out = torch.zeros(COUNT, dtype=torch.int32, device=device)
    with _on(out.device):
        _probe_kernel[(1,)](out, COUNT)
    return out.tolist() == [2 * i + 1 for i in range(COUNT)]
