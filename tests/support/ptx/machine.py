"""Executes a `Program`: sets up the threads of several CTAs at a time, and a launch as a whole."""

import time

import numpy as np
import torch

from .accesses import ANY_WARP, Accesses, NeedOwners
from .arithmetic import FUNCTIONS
from .control import Control
from .counters import Counters
from .matrices import Matrices
from .memory import POISON, GlobalMemory, History, Tags
from .program import Program
from .report import Fault, Report
from .syntax import SHARED_BASE, Unsupported, register_name

THREADS_AT_ONCE = 8192
# What the generated code calls.
CALLED = (
    *("load_global", "store_global", "load_shared", "store_shared", "copy_async", "commit_copies", "wait_copies"),
    *("shuffle", "load_matrix", "store_matrix", "multiply_matrices", "multiply_group", "fence_proxy"),
    *("wgmma_fence", "wgmma_commit_group", "wgmma_wait_group", "call_function"),
)
# Parameters that Triton adds after those of a kernel: two kinds of scratch memory, which nothing here uses.
ADDED = 2


class Machine(Control, Accesses, Matrices, Counters):
    """One launch: the state of the threads that run together, and of what they share.

    Args:
        program: a `Program`. grid: three numbers of CTAs. params: name to number, as unsigned bits.
        memory: a `GlobalMemory` that is filled. num_warps, shared_bytes: of a CTA. report: a `Report`, added to.
        owners: whether to remember which CTA used a byte of global memory.
        collect: list faults in the report in place of raising the first.
        truncate: see `Matrices._product`. first_wins: of threads that store to one address at once.
        count: whether to count what accesses cost.
    """

    def __init__(self, program, grid, params, memory, num_warps, shared_bytes, report, owners, collect, truncate,
                 first_wins, count=True):  # fmt: skip
        self.counted = count
        self.program, self.grid, self.params, self.memory, self.report = program, grid, params, memory, report
        self.collect, self.truncate, self.first_wins = collect, truncate, first_wins
        self.threads = num_warps * 32
        self.shared_bytes = -(-max(shared_bytes, 16) // 16) * 16
        self.clock = 1
        widths = {"global": [4], "shared": [4]}
        for i in program.instructions:
            for space, found in widths.items():
                if i.parts[0] in ("ld", "st") and any(p.split(":")[0] == space for p in i.parts):
                    found.append(int(i.parts[-1].lstrip("busf")))
        grains = {space: min(w // 8 if w > 4 else w for w in found) for space, found in widths.items()}
        self.shared_grain = grains["shared"]
        self.owners = Tags(len(memory.buffer), grains["global"], True, memory.large) if owners else None
        self.global_views = {k: memory.buffer.view(k) for k in ("u1", "u2", "u4", "u8")}
        self.state_views = {k: memory.state.view(f"u{k}") for k in (1, 2, 4, 8)}
        self.registers = {}

    def run(self, ctas):
        """Execute the CTAs of these numbers, in order, as many together as make THREADS_AT_ONCE threads."""
        at_once = max(1, THREADS_AT_ONCE // self.threads)
        for first in range(0, len(ctas), at_once):
            self._chunk(ctas[first : first + at_once])

    def _chunk(self, ctas):
        self.count = len(ctas)
        self.n = n = self.count * self.threads
        self.warps = n // 32
        thread = np.arange(n)
        self.local = thread // self.threads
        cta = ctas[self.local]
        self.cta = (cta + 1).astype(np.int32)
        self.warp = (thread % self.threads // 32).astype(np.int32)
        self.lane = thread % 32
        self.warp_start = thread - self.lane
        size = self.shared_bytes
        self.shared_offset = (self.local * size - SHARED_BASE).astype(np.int64)
        self.shared = np.full(self.count * size // 2, POISON, np.uint16).view(np.uint8)
        self.shared_views = {k: self.shared.view(k) for k in ("u1", "u2", "u4", "u8")}
        self.tags = Tags(self.count * size, self.shared_grain, False)
        self.written_at = np.zeros(len(self.tags.written), np.int32)  # clock, for the fence of the proxies
        self.fenced_at = np.zeros((self.count, self.threads // 32), np.int32)
        self.epoch = np.full(n, self.clock * 64 + ANY_WARP, np.int32)
        self.copies, self.groups = [], np.zeros(n, np.int32)
        self.reads, self.product_groups = [], np.zeros(self.count, np.int32)
        self._choose_sample()
        namespace = self._namespace(cta, thread)
        exec(self.program.code, namespace)

        def masked(number, mask):
            if f"masked_{number}" not in namespace:
                exec(self.program.masked(number), namespace)
                namespace.update(self.program.constants)
            namespace[f"masked_{number}"](mask)

        blocks = range(len(self.program.blocks))
        predicates = [
            namespace[register_name(block.end[2], "?")] if block.end[0] == "branch" else None
            for block in self.program.blocks
        ]
        with np.errstate(all="ignore"):
            self._control([namespace[f"full_{n}"] for n in blocks], masked, predicates)

    def _namespace(self, cta, thread):
        """What the generated code refers to."""
        special = {
            "%tid.x": thread % self.threads, "%ntid.x": self.threads, "%laneid": self.lane, "%warpid": self.warp,
            "%ctaid.x": cta % self.grid[0], "%ctaid.y": cta // self.grid[0] % self.grid[1],
            "%ctaid.z": cta // (self.grid[0] * self.grid[1]),
            "%nctaid.x": self.grid[0], "%nctaid.y": self.grid[1], "%nctaid.z": self.grid[2],
            "%tid.y": 0, "%tid.z": 0, "%ntid.y": 1, "%ntid.z": 1,
        }  # fmt: skip
        special = {name: np.broadcast_to(np.asarray(value, np.uint32), self.n) for name, value in special.items()}
        namespace = {**FUNCTIONS, **self.program.constants, "special": special, "params": self.params}
        for name, kind in self.program.registers.items():
            array = self.registers.get(name)
            if array is None or len(array) < self.n:
                array = self.registers[name] = np.zeros(self.n, kind)
            array = array[: self.n]
            if kind != "?":  # nothing may depend on what was there
                array.view(np.uint16)[:] = POISON
            for view in "?" if kind == "?" else [k + kind[1] for k in "uif" if k + kind[1] != "f1"]:
                namespace[register_name(name, view)] = array.view(view)
        namespace["T64"] = np.empty(self.n)
        namespace.update({name: getattr(self, name) for name in CALLED})
        return namespace

    def _take(self, array, selected):
        return array if selected is None else array[selected]

    def _fault(self, kind, index, message):
        fault = Fault(kind, f"{message}; at {self.program.where(index)}")
        if not self.collect:
            raise fault
        if len(self.report.faults) < 50:
            self.report.faults.append(fault)

    def _unsupported(self, index, what):
        raise Unsupported(f"{what}; at {self.program.where(index)}")

    def _who(self, selected, position):
        """Text of a thread among the selected ones."""
        thread = position if selected is None else selected[position]
        return f"CTA {self.cta[thread] - 1} warp {self.warp[thread]} lane {self.lane[thread]}"

    def call_function(self, index, mask, _):
        """call: only the slow paths of sine and cosine, for angles beyond 2**31, do so."""
        self._unsupported(index, "a call of a function")


def run(program, grid, arguments, num_warps=None, shared_bytes=0, *, ctas=None, history=None, collect=False,
        truncate=False, first_wins=False, count=True):  # fmt: skip
    """Launch a kernel on CPU tensors, in place.

    Args:
        program: a `Program`, or PTX as text.
        grid: one to three numbers of CTAs.
        arguments: tensors and numbers, in the order of the parameters of the PTX (constants left out).
        num_warps: of a CTA; None takes what the PTX says. shared_bytes: of a CTA.
        ctas: numbers of the CTAs to execute, for launches too large to do as a whole; None executes all.
        history: a `memory.History`; None counts all memory as written.
        collect: list faults in the report in place of raising the first.
        truncate: sums of the matrix units cut off as tensor cores do, in place of rounded to the nearest.
        first_wins: of threads that store to one address at once the first one's number stays, in place of the last's.
        count: count what accesses cost, a quarter of the time; without it those figures of the report are 0.

    Returns:
        a `Report`.

    Raises:
        Fault: the program did something wrong. Unsupported: it holds what the machine has no meaning for.
        ValueError: arguments that don't fit the parameters.
    """
    program = Program(program) if isinstance(program, str) else program
    grid = (*grid, 1, 1)[:3]
    ctas = np.arange(np.prod(grid)) if ctas is None else np.asarray(ctas)
    missing = len(program.params) - len(arguments)
    if not 0 <= missing <= ADDED:
        raise ValueError(f"arguments: {program.name} takes {len(program.params)}, got {len(arguments)}")
    started = time.perf_counter()
    for owners in (False, True):
        memory, params = GlobalMemory(history or History()), {}
        report = Report(program.name, len(ctas))
        for (name, kind), value in zip(program.params, [*arguments, *[0] * missing], strict=True):
            value = memory.add(value) if isinstance(value, torch.Tensor) else value
            if kind[0] == "f":
                params[name] = np.dtype(kind).type(value).view(f"u{kind[1]}")
            else:
                params[name] = np.dtype(kind).type(int(value) % (1 << 8 * int(kind[1])))
        params.update({name: np.uint64(memory.add_constant(content)) for name, content in program.globals.items()})
        memory.fill()
        machine = Machine(program, grid, params, memory, num_warps or program.threads // 32, shared_bytes, report,
                          owners, collect, truncate, first_wins, count)  # fmt: skip
        try:
            machine.run(ctas)
        except NeedOwners:
            continue
        break
    report.digest = memory.give_back()
    report.seconds = time.perf_counter() - started
    return report
