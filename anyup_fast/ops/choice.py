"""Back ends of the operators: their order, and why one can't run."""

import logging
from functools import cache
from importlib.util import find_spec

import torch

BACKENDS = ("triton", "torch", "reference")
_GPUS = ("cuda", "xpu")
_log = logging.getLogger("anyup_fast.ops")


def check_name(backend):
    """ValueError unless `backend` is one of `BACKENDS`."""
    if backend not in BACKENDS:
        known = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ValueError(f"backend: no back end {backend!r}; use one of {known}")


def why_no_triton(device, *dtypes):
    """Why Triton's kernels can't run on a torch.device with tensors of these dtypes: one sentence, or None."""
    if device.type not in _GPUS:
        return f"needs a GPU ({' or '.join(_GPUS)}), got tensors on {device.type}"
    if find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    for dtype in dtypes:
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"needs float16, bfloat16 or float32, got {str(dtype).removeprefix('torch.')}"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return "needs compute capability 8.0, got {}.{}".format(*capability)
    if device.type == "cuda" and torch.version.hip is not None:
        from ..kernels.tiling import Device, why_no_kernels

        return why_no_kernels(Device.of(device), *dtypes)
    return None


def choose(operator, backend, why_not):
    """Resolve `backend`: the first back end without a reason against it for "auto", else the one asked for.

    Args:
        operator: its name, for messages.
        backend: "auto" or a name.
        why_not: callable from a name to a sentence or None.

    Raises:
        ValueError: no such back end. RuntimeError: the one asked for can't run; the message says why.
    """
    if backend != "auto":
        check_name(backend)
        if reason := why_not(backend):
            raise RuntimeError(f"backend: {backend!r} can't run: {reason}")
        return backend
    for name in BACKENDS:
        reason = why_not(name)
        if reason is None:
            return name
        log_once(f"{operator}: {name!r} not taken: {reason}")
    raise RuntimeError(f"{operator}: no back end can run")


def log_once(message):
    """Log `message` at level INFO, the first time it comes up; while a graph is traced, not at all."""
    if not torch.compiler.is_compiling():
        _logged(message)


@cache
def _logged(message):
    _log.info(message)


log_once.cache_clear = _logged.cache_clear
