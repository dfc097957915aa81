"""Stands in for Triton's driver: `kernel[grid](...)` on CPU tensors compiles for a GPU and runs its PTX here."""

import contextlib

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver

from .machine import run
from .memory import History
from .program import Program

# Bytes of shared memory a block may have, and how many multiprocessors a card has.
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
PROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}
MADE_BY = "empty", "empty_like", "empty_strided"


class Driver:
    """What Triton's runtime asks of a driver. Specialisation and compilation are Triton's own."""

    def __init__(self, target, edit, ctas, options):
        self.arch = int(target.removeprefix("sm_"))
        self.edit, self.ctas, self.options = edit, ctas, options
        self.reports, self.history, self.idle = [], History(), False
        self.utils, self.current = self, None

    def get_current_device(self):
        """The number of the architecture, so that kernels of several targets are kept apart."""
        return self.arch

    def get_current_stream(self, device):
        """Launches are done when they return."""
        return 0

    def get_current_target(self):
        """What to compile for."""
        return GPUTarget("cuda", self.arch, 32)

    def get_device_properties(self, device):
        """The limit that a kernel's shared memory is held to."""
        return {"max_shared_mem": SHARED[self.arch]}

    def load_binary(self, name, kernel, shared, device):
        """Module, function, registers, spills and most threads of a kernel."""
        return 1, 1, 0, 0, 1024

    def launcher_cls(self, source, metadata):
        """A launcher of the kernel that is being loaded, `current`."""
        compiled = self.current
        program = None
        taken = [kind != "constexpr" for kind in source.signature.values()]

        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            nonlocal program
            active = driver.active
            if x * y * z == 0 or active.idle:
                return
            if active.edit:
                code = Program(active.edit(compiled.asm["ptx"]))
            else:
                code = program = program or Program(compiled.asm["ptx"])
            given = [a for a, wanted in zip(arguments, taken, strict=True) if wanted]
            report = run(
                code, (x, y, z), given, compiled.metadata.num_warps, compiled.metadata.shared, history=active.history,
                ctas=active.ctas(code.name, x * y * z) if active.ctas else None, **active.options,
            )  # fmt: skip
            tensors = [a for a in given if isinstance(a, torch.Tensor)]
            places = [a.untyped_storage().data_ptr() for a in tensors]
            report.launched = dict(
                ctas=x * y * z, warps=compiled.metadata.num_warps, shared=compiled.metadata.shared, program=code,
                ptx=compiled.asm["ptx"],
                arguments=[(p, a.nbytes, report.used[p]) for p, a in zip(places, tensors, strict=True)],
            )  # fmt: skip
            active.reports.append(report)

        return launch


def _no_assembler(*stages_of):
    """Hook of Triton's compiler: PTX is the end of it. Called with nothing it names itself, for Triton's cache."""
    if not stages_of:
        return "ptx only", "ptx only"
    _, stages, *_ = stages_of
    stages["cubin"] = lambda source, metadata: b"none"
    return None


@contextlib.contextmanager
def launcher(target, *, constants=None, device_of=(), edit=None, ctas=None, **options):
    """Inside, Triton kernels launched with CPU tensors run as their PTX for `target`.

    Memory that torch.empty and its like give inside counts as never written until a kernel or the host writes it.

    Args:
        target: "sm_80", "sm_86", "sm_89" or "sm_90" (others compile, and raise `Unsupported` sooner or later).
        constants: function (kernel name, keyword arguments) -> keyword arguments, to launch as on a GPU what decides by
            the device of its tensors.
        device_of: classes whose static `of` is to say (as `tiling.Device.of` does) what the target is.
        edit: function PTX -> PTX, to see whether broken code is caught.
        ctas: function (kernel name, number of CTAs) -> numbers of those to execute; None executes all.
        options: `collect`, `truncate`, `first_wins` and `count` of `run`.

    Yields:
        the list of reports, one per launch.

    Raises:
        RuntimeError: TRITON_INTERPRET is on: then nothing is compiled.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET: need a process that started without it, got it set")
    active = Driver(target, edit, ctas, options)
    arch, before = active.arch, driver._active
    made = {name: getattr(torch, name) for name in MADE_BY}
    new_empty, init_handles, jit_run = torch.Tensor.new_empty, CompiledKernel._init_handles, triton.JITFunction.run
    devices = [(cls, cls.__dict__["of"]) for cls in device_of]
    hook = triton.knobs.runtime.add_stages_inspection_hook

    def poisoned(function):
        def make(*args, **kwargs):
            out = function(*args, **kwargs)
            plain = type(out) is torch.Tensor and out.device.type == "cpu" and out.numel()
            return active.history.poison(out) if plain else out

        return make

    def handles(self):
        if self._run is None:
            active.current = self
            init_handles(self)
            self.module = None  # nothing to unload

    def run_kernel(self, *args, grid, warmup, **kwargs):
        kwargs = constants(self.__name__, kwargs) if constants else kwargs
        return jit_run(self, *args, grid=grid, warmup=warmup, **kwargs)

    try:
        driver.set_active(active)
        triton.knobs.runtime.add_stages_inspection_hook = _no_assembler
        CompiledKernel._init_handles, triton.JITFunction.run = handles, run_kernel
        for name, function in made.items():
            setattr(torch, name, poisoned(function))
        torch.Tensor.new_empty = poisoned(new_empty)
        for cls, _ in devices:
            of = classmethod(
                lambda c, device: c("cuda", (arch // 10, arch % 10), SHARED[arch], processors=PROCESSORS[arch])
            )
            cls.of = of
        yield active.reports
    finally:
        driver._active = before
        triton.knobs.runtime.add_stages_inspection_hook = hook
        CompiledKernel._init_handles, triton.JITFunction.run = init_handles, jit_run
        for name, function in made.items():
            setattr(torch, name, function)
        torch.Tensor.new_empty = new_empty
        for cls, of in devices:
            cls.of = of
