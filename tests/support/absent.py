"""A driver of Triton for a GPU that isn't there: kernels are compiled for it and launched, and nothing is executed.

Tensors stay on the CPU, and every launcher plans as it would on that GPU: its kernels are the ones that a machine with
the GPU compiles, and with the same Triton and Python it finds them in the cache.
"""

import types
from collections import Counter
from contextlib import nullcontext
from importlib import import_module

import torch
import triton
from anyup_fast.kernels import tiling
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from anyup_fast.ops import choice

LAUNCHED = Counter()  # launches by the name of the kernel
COMPILED = Counter()  # kernels that were compiled ("miss"), found in the cache ("hit"), and counted only ("left out")


class _Launcher:
    def __init__(self, source, metadata):
        self.name = source.fn.__name__

    def __call__(self, *arguments):
        LAUNCHED[self.name] += 1


def install(arch=90, shared_memory=232448, *, compiling=True, kind="cpu"):
    """Set that driver for the rest of this process, and have the operators take Triton for tensors on the CPU.

    Args:
        arch: NVIDIA's number of the architecture, 90 for sm_90. shared_memory: bytes that a block may have.
        compiling: whether kernels are compiled. If not, they are only counted, one by one as they are launched; with
            "pretended" what stands for the compiled ones is remembered and launched as these would be.
        kind: in place of the CPU another kind of device, "meta", where what PyTorch itself does costs nothing either.

    Returns:
        The `tiling.Device` that the launchers plan for.
    """
    card = tiling.Device("cuda", divmod(arch, 10), shared_memory, f"sm_{arch}, absent")
    properties = dict(max_shared_mem=shared_memory, multiprocessor_count=132, warpSize=32, max_num_regs=65536)
    utils = types.SimpleNamespace(load_binary=lambda *_: (1, 1, 0, 0, 1024), get_device_properties=lambda _: properties)
    driver.set_active(
        types.SimpleNamespace(
            launcher_cls=_Launcher,
            utils=utils,
            binary_ext="cubin",
            get_current_device=lambda: 0,
            get_current_stream=lambda device=None: 0,
            get_current_target=lambda: GPUTarget("cuda", arch, 32),
            get_active_torch_device=lambda: torch.device(kind),
            set_current_device=lambda device: None,
        )
    )
    tiling.Device.of = classmethod(lambda cls, device: card)
    choice._GPUS = (kind,)
    choice.VENDORS[kind] = "nvidia"
    import_module("anyup_fast.ops.guidance").has_float64 = lambda device: True
    if kind == "meta":  # which has no autocast to ask for
        torch.is_autocast_enabled = lambda *_: False
        torch.autocast = lambda *_, **__: nullcontext()
    choice._installation_fault = choice.cache(lambda kind: None)
    count_compilations()
    if compiling == "pretended":
        JITFunction._do_compile = _pretended
    if not compiling:
        seen = set()

        def left_out(*, key, fn, **_):
            LAUNCHED[fn.name.rpartition(".")[2]] += 1
            if (fn.name, key) not in seen:
                seen.add((fn.name, key))
                COMPILED["left out"] += 1
            return True

        triton.knobs.runtime.jit_cache_hook = left_out
    return card


def _pretended(fn, key, signature, device, constants, options, attributes, warmup):
    """In place of a compilation: a kernel that is nothing but its name."""
    kernel = object.__new__(CompiledKernel)
    kernel.name = fn.fn.__name__
    kernel.module, kernel.function, kernel.packed_metadata, kernel._module_pid = 1, 1, (), None
    kernel._run = _Launcher(types.SimpleNamespace(fn=types.SimpleNamespace(__name__=kernel.name)), None)
    kernel.src = None
    fn.device_caches[device][0][key] = kernel
    COMPILED["left out"] += 1
    return kernel


def count_compilations():
    """Have Triton count in `COMPILED` what it compiles and what it finds in its cache, for the rest of this process."""

    def told(*, cache_hit, **_):
        COMPILED["hit" if cache_hit else "miss"] += 1

    triton.knobs.compilation.listener = told
