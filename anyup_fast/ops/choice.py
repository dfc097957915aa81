"""Back ends of the operators: their order, who asks for one, why one can't run, and what happens when a kernel fails.

"auto" takes the first back end without a reason against it. ANYUP_FAST_BACKEND in the environment, `use_backend` around
some calls or `backend=` of one call ask for another by name; one that can't run then raises the reason.

Whatever can be asked of the installation is asked, once in a process. What only trying can tell (a compiler that
crashes, shared memory that runs out, an assembler older than the chip) is met by `attempt`: one warning, and plain
PyTorch for that operator on that device from then on.
"""

import logging
import os
import re
import shutil
import sysconfig
import types
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from ..logs import log_once, warn_once
from ..plain.precision import requested as requested_precision

BACKENDS = ("triton", "torch", "reference")
TRITON_OR_TORCH = "triton|torch"  # to a registered operator: Triton, and plain PyTorch where its kernel fails
VARIABLE = "ANYUP_FAST_BACKEND"
LEAST_TRITON = (3, 4)
LEAST_CAPABILITY = (8, 0)
VENDORS = {"cuda": "nvidia", "hip": "amd", "xpu": "intel"}  # Triton's names of who makes the device
_GPUS = ("cuda", "xpu")
_NO_GPU = "needs a GPU"
_TRACING = [getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL")]

_asked = ContextVar("anyup_fast_backend", default=None)
_asked_in_graphs = None  # the same for graphs that are traced, where context variables can't be read
_asked_again = 0  # how often faults were forgotten
_failed = {}  # (operator, name of the device) -> why its Triton kernel is not tried again


class use_backend:
    """Context manager: operators that are not told otherwise take this back end.

    It holds for the thread (or task) that enters it; a graph that is traced takes the one entered last.

    Args:
        backend: "auto" or one of `BACKENDS`.

    Raises:
        ValueError: another name.
    """

    def __init__(self, backend):
        if backend != "auto":
            check_name(backend)
        self.backend = backend

    def __enter__(self):
        global _asked_in_graphs
        self._before = _asked_in_graphs
        _asked_in_graphs = self.backend
        if not torch.compiler.is_compiling():
            self._token = _asked.set(self.backend)
        return self

    def __exit__(self, *_):
        global _asked_in_graphs
        _asked_in_graphs = self._before
        if not torch.compiler.is_compiling():
            _asked.reset(self._token)


def requested():
    """The back end that `use_backend` or the environment asks for; "auto" if neither does."""
    asked = _asked_in_graphs if torch.compiler.is_compiling() else _asked.get()
    if asked is None:
        asked = os.environ.get(VARIABLE) or "auto"
        if asked != "auto":
            check_name(asked, VARIABLE)
    return asked


def asked():
    """Something hashable that is another one as soon as operators may choose another back end."""
    return requested(), _asked_again


def is_gpu(device):
    """Whether a torch.device is of a kind that Triton has kernels for."""
    return device.type in _GPUS


def check_name(backend, argument="backend"):
    """ValueError unless `backend` is one of `BACKENDS`."""
    if backend not in BACKENDS:
        known = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ValueError(f"{argument}: no back end {backend!r}; use one of {known}")


def choose(operator, backend, why_not):
    """Resolve `backend`: the first back end without a reason against it for "auto", else the one asked for.

    Args:
        operator: its name, for messages.
        backend: "auto" or a name.
        why_not: callable from a name to a sentence or None.

    Returns:
        A name; `TRITON_OR_TORCH` where "auto" takes Triton.

    Raises:
        ValueError: no such back end. RuntimeError: the one asked for can't run; the message says why.
    """
    if backend == "auto":
        backend = requested()
    if backend != "auto":
        check_name(backend)
        if reason := why_not(backend):
            raise RuntimeError(f"backend: {backend!r} can't run: {reason}")
        return backend
    for name in BACKENDS:
        reason = why_not(name)
        if reason is None:
            return TRITON_OR_TORCH if name == "triton" else name
        if reason.startswith(_NO_GPU):  # what is true of all operators is said once, and who asked for a CPU knows it
            log_once(f"{name!r} not taken: {reason}", logging.DEBUG)
        else:
            log_once(f"{operator}: {name!r} not taken: {reason}")
    raise RuntimeError(f"{operator}: no back end can run")


def chosen(kept, operator, about, backend, why_not):
    """`choose`, for "auto" once for each `about` (hashable) of what is kept for a model (or None)."""
    if kept is None or backend != "auto":
        return choose(operator, backend, why_not)
    return kept.of(("back end", operator, about), lambda: choose(operator, backend, why_not))


def on_triton(backend):
    """Whether an operator that is told `backend` has Triton's dtypes and strides."""
    return backend in ("triton", TRITON_OR_TORCH)


def why_no_triton(operator, device, *dtypes):
    """Why Triton's kernels can't run on a torch.device with tensors of these dtypes: one sentence, or None."""
    if device.type not in _GPUS:
        return f"{_NO_GPU} ({' or '.join(_GPUS)}), got tensors on {device.type}"
    for dtype in dtypes:
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"needs float16, bfloat16 or float32, got {str(dtype).removeprefix('torch.')}"
    reason = _device_fault(device, dtypes) or _failed.get((operator, str(device)))
    if reason and not torch.compiler.is_compiling():
        warn_once(f"anyup_fast computes in plain PyTorch on {_name(device)}: Triton {reason}")
    return reason


def _device_fault(device, dtypes):
    kind = "hip" if device.type == "cuda" and torch.version.hip is not None else device.type
    if kind == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < LEAST_CAPABILITY:
            return "needs compute capability {}.{}, got {}.{}".format(*LEAST_CAPABILITY, *capability)
    return installation_fault(kind) or (_family_fault(device, *dtypes) if kind == "hip" else None)


def _family_fault(device, *dtypes):
    from ..kernels.tiling import Device, why_no_kernels

    return why_no_kernels(Device.of(device), *dtypes)


_family_fault._dynamo_marked_constant = True


def installation_fault(kind):
    """Why this installation of Triton has no kernels for GPUs of a kind ("cuda", "hip", "xpu"): a sentence, or None."""
    return _installation_fault(kind)


# A graph is traced with the answer, for nothing of what is asked can be traced.
installation_fault._dynamo_marked_constant = True


@cache
def _installation_fault(kind):
    if find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    try:
        triton = import_module("triton")
    except Exception as error:  # a broken installation raises anything
        return f"can't be imported: {first_line(error)}"
    if _version(triton) < LEAST_TRITON:
        return f"needs version {'.'.join(map(str, LEAST_TRITON))} or newer, found {triton.__version__}"
    if reason := _compiler_fault(kind):
        return reason
    try:
        target = import_module("triton.runtime").driver.active.get_current_target()
    except Exception as error:  # each vendor's driver has errors of its own
        return f"finds no {VENDORS[kind]} driver ({first_line(error)}); it may be built for another vendor's GPUs"
    if target.backend != kind:
        return f"is set to {target.backend} and the tensors lie on {kind}: it is built for another vendor's GPUs"
    return None


def _version(triton):
    return tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))


def _compiler_fault(kind):
    """Why Triton could not build what it builds in C at run time, if it builds anything: a sentence, or None.

    Of the vendors' drivers some come compiled, others compile a small module; those name the function that does.
    """
    try:
        driver = import_module(f"triton.backends.{VENDORS[kind]}.driver")
    except ImportError:
        return f"has no back end for {VENDORS[kind]}: it is built for another vendor's GPUs"
    if not hasattr(driver, "compile_module_from_src"):
        return None
    named = os.environ.get("CC")
    if not any(shutil.which(name) for name in ([named.split()[0]] if named else ("gcc", "clang"))):
        wanted = f"CC={named}" if named else "gcc or clang"
        return f"needs a C compiler to launch kernels, and {wanted} is not to be found; install one (apt install gcc)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return (
            "needs Python's headers to launch kernels, and Python.h is missing; install them (apt install python3-dev)"
        )
    return None


def attempt(operator, backend, device, kernel, plain):
    """`kernel()` where `backend` is Triton, `plain()` else.

    With `TRITON_OR_TORCH` a kernel that can't be compiled or launched is answered by a warning and `plain()`, from
    then on for this operator on this device. An error of the device itself, or memory that runs out, is raised.
    """
    if backend == "triton":
        return kernel()
    if backend != TRITON_OR_TORCH or (operator, str(device)) in _failed:
        return plain()
    try:
        return kernel()
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if _of_the_device(error):
            raise
        reason = f"failed to compile or launch {_kernel_of(error)}: {type(error).__name__}: {first_line(error)}"
        out = plain()
    _failed[operator, str(device)] = reason
    warn_once(
        f"{operator}: Triton {reason}. On {_name(device)} this operator runs in plain PyTorch from now on, slower and "
        f"just as exact. Please report it with what `anyup-fast check` prints."
    )
    return out


def runs_now(tensor):
    """Whether what is called with a tensor runs at once: no graph is traced and no function transformed."""
    if torch.compiler.is_compiling() or type(tensor) is not torch.Tensor or torch._C._are_functorch_transforms_active():
        return False
    return not any(map(torch._C._get_dispatch_mode, _TRACING))


def why_not_executed(device):
    """Why kernels that are launched on a device can't be judged: one sentence, or None if they run there."""
    from ..kernels import probe

    if probe.runs(device):
        return None
    return "a kernel that was launched wrote nothing: the driver executes nothing"


def _of_the_device(error):
    """Whether an error says that the device is lost or out of memory, or that a kernel went wrong while it ran.

    A kernel that the device does not take ("no kernel image ...", "device kernel image is invalid") has not run.
    """
    text = str(error)
    return "CUDA error" in text or ("Triton Error" in text and "kernel image" not in text)


def forget_faults():
    """Ask the installation again and try again what has failed."""
    global _asked_again
    _asked_again += 1
    _installation_fault.cache_clear()
    _failed.clear()
    warn_once.cache_clear()


def _kernel_of(error):
    """Name of the Triton kernel that an error came out of."""
    trace, name = error.__traceback__, "its kernel"
    while trace is not None:
        fn = getattr(trace.tb_frame.f_locals.get("self"), "fn", None)
        if isinstance(fn, types.FunctionType):
            name = fn.__name__
        trace = trace.tb_next
    return name


def _name(device):
    """A device as users call it."""
    if device.type == "cuda" and torch.cuda.is_available():
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def first_line(error):
    """The first line of what an error says, or its kind."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def triton_precision():
    """Of float32 products in Triton: None for the kernels' own choice, unless we or PyTorch are told to be faster."""
    if asked := requested_precision():
        return None if asked == "highest" else "tf32"
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if setting is None:  # before PyTorch 2.9
        setting = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    elif setting == "none":
        setting = torch.backends.fp32_precision
    return "tf32" if setting == "tf32" else None
