"""The backward on a GPU, for `gpu.py`: gradients against the twin in float64, and times with the forward and alone."""

import time

import attention_cases
import torch
from anyup_fast.kernels import attention_backward as kernel
from anyup_fast.kernels import unification_backward as unification
from attention import problem

from anyup_fast.ops import reference, windowed_attention
from anyup_fast.ops.attention import windowed_attention_backward_op

SHAPES = ("448/32/384", "518/37/768", "1024/64/768")
# A plan that any device can run, beside the one it would choose.
SMALL = kernel.Plan(False, *3 * (kernel.Blocks(8, 8, 16, 16, 4),))
# Channels, filters, size of the filters and of the grid.
UNIFIED = ((384, 128, 5, 9), (100, 128, 5, 6), (48, 16, 3, 7))
UNIFIED_TOLERANCE = 2e-6


def sweep(count, device, longest=40):
    """Check `count` problems on `device` (a torch.device); list of sentences about what failed."""
    started, failed = time.perf_counter(), []
    for index in range(count):
        case = attention_cases.draw(index, longest=longest)
        there, grad = case.to(device), case.grad().to(device)
        for plan in (None, SMALL):
            first, second = (
                kernel.windowed_attention_bwd(
                    grad, *there.tensors, scale=case.scale, head_mode=case.head_mode, tiles=plan
                )
                for _ in range(2)
            )
            failed += [f"{case.text} {plan}: {fault}" for fault in case.gradient_faults(first)]
            if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
                failed.append(f"{case.text} {plan}: two runs differ")
    for channels, filters, size, grid in UNIFIED:
        failed += _unified(channels, filters, size, grid, device)
    print(f"backward: {count} problems, {len(failed)} failed, {time.perf_counter() - started:.0f} s")
    return failed


def _unified(channels, filters, size, grid, device):
    generator = torch.Generator().manual_seed(channels)
    shapes = (1, channels, grid, grid), (filters, 1, size, size), (1, filters, grid, grid)
    features, basis, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    features = torch.nn.functional.normalize(features, dim=1)
    inputs = [x.double().requires_grad_() for x in (features, basis)]
    expected = torch.autograd.grad(reference.feature_unification(*inputs), inputs, grad.double())
    gradients = unification.feature_unification_bwd(*(x.to(device) for x in (grad, features, basis)))
    failed = []
    for name, gradient, right in zip(("features", "basis"), gradients, expected, strict=True):
        error = ((gradient.double().cpu() - right).abs().max() / right.abs().max()).item()
        if not error <= UNIFIED_TOLERANCE:
            failed.append(f"unification of {channels} channels: gradient of {name}: error {error:.2e}")
    return failed


def checked(arguments, grad, gradients):
    """Largest error of the gradients, over their largest, against plain PyTorch in float64.

    Raises:
        RuntimeError: beyond the tolerance of the dtype.
    """
    wide = (x.double() for x in (grad, *arguments[:3]))
    scale = arguments[0].shape[-1] ** -0.5
    expected = windowed_attention_backward_op(*wide, *arguments[3:], scale, "mean", True, "torch")
    limits, worst = attention_cases.GRADIENT_TOLERANCE[grad.dtype], 0.0
    for name, gradient, right in zip(attention_cases.GRADIENTS, gradients, expected, strict=True):
        error = ((gradient.double() - right).abs().max() / right.abs().max()).item()
        if not error <= limits[name]:
            raise RuntimeError(f"gradient of {name} wrong by {error:.2e}: nothing is timed")
        worst = max(worst, error)
    return worst


def measure(shape, dtype, timed, device="cuda"):
    """Yield rows (dicts as of `gpu.measure`) for one shape, timed by `timed`: backward, and both ways per back end.

    Raises:
        RuntimeError: a gradient is wrong; nothing was timed then.
    """
    arguments = problem(shape, dtype=dtype, device=device)
    grad = torch.randn(*arguments[0].shape[:3], arguments[2].shape[3], device=device).to(dtype)
    error = checked(arguments, grad, kernel.windowed_attention_bwd(grad, *arguments))
    tensors = [x.requires_grad_() for x in arguments[:3]]

    def both(backend):
        out = windowed_attention(*tensors, *arguments[3:], backend=backend)
        return torch.autograd.grad(out, tensors, grad)

    calls = {"backward": lambda: kernel.windowed_attention_bwd(grad, *(x.detach() for x in tensors), *arguments[3:])}
    calls.update({f"forward+backward, {name}": lambda name=name: both(name) for name in ("triton", "torch")})
    for what, call in calls.items():
        p20, middle, p80, peak = timed(call)
        yield dict(
            shape=shape,
            dtype=str(dtype).removeprefix("torch."),
            what=what,
            milliseconds=middle,
            p20=p20,
            p80=p80,
            peak_mib=peak / 2**20,
            note=f"error {error:.1e}" if what == "backward" else "",
        )
