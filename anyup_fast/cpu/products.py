"""Products of matrices on CPUs: which of PyTorch's libraries multiplies, and how precisely.

PyTorch gives float32 products to its BLAS, mostly MKL. It also brings oneDNN, which on some processors (AMD's of 2024)
multiplies more than twice as fast and as exactly, on others more slowly. Each kind of product that the CPU path has is
therefore timed both ways once on a machine (`calibration`); the answer is kept in a file, so that later processes
compute the same numbers. ANYUP_FAST_PRODUCTS says which to take instead: "default", "onednn", "auto", or what a
`Choice` prints.

oneDNN is reached by private operators of PyTorch, which are asked for and never needed. Its public switch,
`torch.backends.mkldnn.matmul.fp32_precision`, is one for the whole process: who reads PyTorch's settings in another
thread meanwhile would get an error.

Less precise products are asked for by `use_precision`, ANYUP_FAST_PRECISION, `torch.set_float32_matmul_precision` or,
from torch 2.9 on, `torch.backends.mkldnn.matmul.fp32_precision`. "highest" is exact. "medium" (bf16), tensors in
bfloat16 and autocast to it mean factors rounded to bfloat16 and sums in float32, where the processor multiplies these
faster than float32, else exact products too. "high" (tf32) is exact: a float32 as a sum of two bfloat16 takes three
products of half the cost each. With PyTorch's own setting at "medium" or "high" processors with AMX may round factors
of the products that are float32 here as well (logits, low-res keys); `use_precision` leaves those alone.
"""

import logging
import os
import threading
from contextvars import ContextVar

import torch

from ..logs import log_once
from .calibration import kept_or_measured
from .ways import VARIABLE, onednn_bmm, onednn_mm, parsed

LEAST_ROWS = 256  # of a product that is worth it
LEAST_WIDTH = 16
PRECISIONS = ("highest", "high", "medium")
PRECISION_VARIABLE = "ANYUP_FAST_PRECISION"

_lock = threading.RLock()
_found = None  # (Choice, where it is from, gains)
_requested = ContextVar("anyup_fast_precision", default=None)
_thread = threading.local()  # `asked`, in a crew's threads: what the caller's thread asks for


def choice():
    """The `Choice` of this process."""
    return (_found or _find())[0]


def explained():
    """The choice in words, for people: one line for each kind of product."""
    _, source, gains = _found or _find()
    lines = [f"{name}: {way}" for name, way in choice()._asdict().items()]
    return [f"{line} ({gains[name]})" if (name := line.split(":")[0]) in gains else line for line in lines], source


def chosen_again(given=None):
    """Forget the choice; `given`, if any, is taken as the environment variable's value would be."""
    global _found
    with _lock:
        _found = None if given is None else (parsed(given), "given", {})


def _find():
    global _found
    with _lock:
        if _found is None:
            given = parsed(os.environ.get(VARIABLE, "auto"))
            _found = (given, f"{VARIABLE} in the environment", {}) if given else kept_or_measured()
            log_once(f"products on this CPU, {_found[1]}: {'; '.join(explained()[0])}", logging.DEBUG)
        return _found


# What a call asks for -------------------------------------------------------------------------------------------------


class use_precision:
    """Context manager: products of float32 on CPUs, and of Triton's float32 kernels, are as precise as this says.

    It holds for the thread (or task) that enters it, before PyTorch's settings and autocast.

    Args:
        precision: "highest", "high" or "medium", as of `torch.set_float32_matmul_precision`.

    Raises:
        ValueError: another name.
    """

    def __init__(self, precision):
        self.precision = _checked(precision, "precision")

    def __enter__(self):
        self._token = _requested.set(self.precision)
        return self

    def __exit__(self, *_):
        _requested.reset(self._token)


def _checked(precision, argument):
    if precision not in PRECISIONS:
        known = ", ".join(map(repr, PRECISIONS))
        raise ValueError(f"{argument}: need one of {known}, got {precision!r}")
    return precision


def requested():
    """What `use_precision` or ANYUP_FAST_PRECISION asks for, None if neither does."""
    if found := _requested.get():
        return found
    given = os.environ.get(PRECISION_VARIABLE)
    return _checked(given, PRECISION_VARIABLE) if given else None


def asked():
    """ "highest", "high" or "medium": what this thread's caller asks for, by name, PyTorch's settings or autocast."""
    return getattr(_thread, "asked", None) or requested() or _setting()


def _setting():
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16:
        return "medium"
    setting = getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", None)
    if setting is None:  # before PyTorch 2.9
        return torch.get_float32_matmul_precision()
    if setting == "none":
        setting = torch.backends.fp32_precision
    return {"bf16": "medium", "tf32": "high"}.get(setting, "highest")


class asking:
    """While this lasts the current thread is asked for this precision by its caller."""

    def __init__(self, precision):
        self.precision = precision

    def __enter__(self):
        self.before = getattr(_thread, "asked", None)
        _thread.asked = self.precision

    def __exit__(self, *_):
        _thread.asked = self.before


def halved(*tensors):
    """Whether products of these tensors are done in bfloat16: they are of that type, or less is asked for; on CPUs."""
    if any(tensor.device.type != "cpu" or tensor.dtype == torch.float64 for tensor in tensors):
        return False
    wanted = asked() == "medium" or any(tensor.dtype == torch.bfloat16 for tensor in tensors)
    return wanted and choice().bfloat16 == "fast"


# Products -------------------------------------------------------------------------------------------------------------


def _by_onednn(kind, *tensors):
    return (
        all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
        and getattr(choice(), kind) == "onednn"
    )


def mm(a, b, out):
    """`torch.mm(a, b, out=out)` the fastest way."""
    if len(a) >= LEAST_ROWS and min(b.shape) >= LEAST_WIDTH and _by_onednn("pixels", a, b, out):
        return onednn_mm(a, b, out)
    return torch.mm(a, b, out=out)


def addmm_(out, a, b):
    """`out.addmm_(a, b)` the fastest way."""
    if len(a) >= LEAST_ROWS and min(b.shape) >= LEAST_WIDTH and _by_onednn("pixels", a, b, out):
        return out.add_(torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], ""))
    return out.addmm_(a, b)


def addmm(bias, a, b, out):
    """`torch.addmm(bias, a, b, out=out)` the fastest way; bias is (N,)."""
    if len(a) >= LEAST_ROWS and min(b.shape) >= LEAST_WIDTH and _by_onednn("pixels", bias, a, b, out):
        return out.copy_(torch.ops.mkldnn._linear_pointwise(a, b.T, bias, "none", [], ""))
    return torch.addmm(bias, a, b, out=out)


def bmm(a, b, out=None):
    """`torch.bmm(a, b, out=out)` the fastest way."""
    if _by_onednn("batched", a, b) and min(a.shape[1:]) >= LEAST_WIDTH and b.shape[2] >= LEAST_WIDTH:
        return onednn_bmm(a, b, a.new_empty(*a.shape[:2], b.shape[2]) if out is None else out)
    return torch.bmm(a, b) if out is None else torch.bmm(a, b, out=out)
