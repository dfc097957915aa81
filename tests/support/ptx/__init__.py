"""A machine that executes, on a CPU, the PTX that Triton compiles for NVIDIA GPUs.

Triton's interpreter runs the source of a kernel; this runs what the compiler made of it: layouts and swizzles,
`ldmatrix`, `cp.async` pipelines, the fragments of `mma` and `wgmma`, barriers, predicates, roundings. It shows
compiled kernels to be right where there is no GPU. It says nothing about time, nor about what ptxas makes of the PTX.

    with launcher("sm_80", device_of=(tiling.Device,)) as reports:
        out = windowed_attention_fwd(query, key, value, rows, cols)      # CPU tensors
    run(ptx, grid, arguments, num_warps, shared_bytes)                   # or a program by itself

`launcher` needs a process without TRITON_INTERPRET, so tests start one (`project.py`, `small.py`, `far.py` and
`planted.py` are its commands) and look up the rows it reports.

syntax, program, emitter    PTX text -> basic blocks -> NumPy code, one version for all threads, one under a mask
machine, control            a launch: the threads of as many CTAs as make 8192 run together; branches, barriers
memory, accesses            memory, loads, stores, asynchronous copies, and their checks
matrices, arithmetic        shuffles and matrix units; instructions that NumPy has no function for
counters, report            what was executed and what accesses cost; faults
launch                      stands in for Triton's driver: specialisation and compilation stay Triton's own
project, far, planted       the project's kernels; tensors beyond 2**31 elements; pieces taken out
small                       small kernels, right and broken, for the tests of the machine itself

Exact to the bit: integers, conversions, float32 and float64 arithmetic (`fma.f32` goes through float64, so that one
case in about 2**29 is rounded twice; `fma.f64` through what NumPy's longdouble has). `mma` and `wgmma`: products and
sums in float64, rounded once, operands of tf32 cut to 10 bits; with `truncate` sums are cut off as tensor cores are
known to do it. Functions (ex2, lg2, sqrt, rsqrt, rcp, division) are NumPy's: a GPU's may be off by two units in the
last place.

Checked, each a `Fault` that names the line of PTX and source, CTA, warp and lane:

* global memory: outside every tensor (guards lie between storages), outside the elements of the tensor's view,
  misaligned, never written (torch.empty is followed from launch to launch)
* shared memory: outside, misaligned, never written; two warps at a byte between two barriers, one of them writing;
  bytes under an asynchronous copy that is not waited for; on sm_90 operands of wgmma without a barrier or a proxy
  fence since they were written, or written again before the product is waited for
* global memory within a launch: a byte used by two CTAs, one of them writing, or by two warps with no barrier between
* unequal copies: threads that hold one number, rounded in several ways, store it to one address at once, so that the
  result depends on which store wins (with `first_wins` it is the other one)
* lanes missing at shuffles and matrix units, warps at different barriers, copies nobody waits for, no end

Not seen: races of lanes of one warp (warps run in step here), the order in which CTAs use global memory, anything in
ptxas.

Executed: sm_80, sm_86, sm_89 and sm_90, as far as the project's kernels go. Everything else raises `Unsupported`, at
the latest when it is reached: tcgen05 and with it sm_100, for which kernels are compiled only; mbarrier, TMA,
clusters, atomics, packed 16-bit arithmetic, named barriers, calls of functions.

Addresses have 64 bits and large storages are copied page by page as they are used, so tensors may reach beyond 2**31
elements: a product of 32 bits that overflows leads outside of its tensor (`far.py`).
"""

from .launch import launcher
from .machine import run
from .report import Fault, Report
from .syntax import Unsupported

__all__ = ["Fault", "Report", "Unsupported", "launcher", "run"]
