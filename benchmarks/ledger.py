"""What one forward costs a GPU that is not there: counted launch by launch, nothing measured on a card.

    python benchmarks/ledger.py                                      # five shapes, bfloat16 and float32, sm_90
    python benchmarks/ledger.py --targets sm_80 sm_90 --shapes 448/32/384 --dtypes bfloat16 --launches
    python benchmarks/ledger.py --stages attention --shapes 2048/128/1024

prints a table and writes results/ledger.csv, one row per shape, dtype, target and stage, and one for their sum. Every
kernel is launched by the project's own launchers at the full size; of its programs a few, spread over the grid, are
executed as compiled PTX (tests/support/ptx) and stand for all, and one launch for all of one kernel and size. Columns:

launches, torch   kernels of Triton, and operations of PyTorch that a GPU would run as kernels.
MB                what is read and written of each tensor, once a launch, as if caches were perfect.
L2_MB             what each program asks for, each sector of 32 bytes once.
GFLOP             products of matrix units as executed, padding and parts of float32 included.
Gspecial          exponentials and other functions of the special function units, Ginstr warp instructions issued.
conflicts         ways of shared memory accesses over the ways of accesses free of conflicts.
host_us           median of Python's time on this machine, without a driver's own; TORCH_US for each of PyTorch.
times in ms       dram, l2, tensor, special, alu, issue, each alone at the card's full rate; `bound` is the largest.
expected_ms       the largest, of the others what is not hidden (see `expected`), and LAUNCH_US for each kernel.

Instructions are those of the disassembly: those inside each loop and outside of all, times how often a warp goes
through them. The rates of sm_90 are what was measured on an H100 (roofline.py), the others' are published. Left out:
latency of single programs, stalls at barriers, the clock under load, what caches miss, bank conflicts, power.
"""

import argparse
import csv
import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

from checkout import ROOT, use_checkout

os.environ.pop("TRITON_INTERPRET", None)
use_checkout()
sys.path.insert(0, str(ROOT / "tests" / "support"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from anyup_fast.kernels import attention, guidance, keys, queries, tiling, unification  # noqa: E402
from ptx import launch, memory  # noqa: E402
from ptx.project import device_of  # noqa: E402
from roofline import DESIGN_MS, DEVICES, parse  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from anyup_fast.files import written_aside  # noqa: E402
from anyup_fast.layers import RMS_EPS  # noqa: E402
from anyup_fast.model import AnyUp  # noqa: E402
from anyup_fast.ops import window_bounds  # noqa: E402

LAUNCH_US = 2.0  # from the end of a small kernel to the next one's start in a captured graph
TORCH_US = 5.0  # of the host for an operation of PyTorch on a GPU
SAMPLED = 4  # programs of a launch that are executed
ROUNDS = 9  # of the host's time
VIEWS = ("view", "reshape", "permute", "transpose", "t", "expand", "select", "slice", "unbind", "detach", "alias",
         "unsqueeze", "squeeze", "as_strided", "empty", "empty_like", "new_empty", "empty_strided", "_unsafe_view",
         "split", "unflatten", "resize_", "set_")  # fmt: skip


@dataclass(frozen=True)
class Card:
    """Rates of a card: see `CARDS`."""

    name: str
    processors: int
    clock: float
    dram: float
    products: float
    l2: float
    double: float  # cycles of a scheduler for a warp's instruction of float64
    registers: int = 65536
    shared: int = 233472
    threads: int = 2048
    programs: int = 32


H100 = DEVICES["h100"]
CARDS = {
    "sm_80": Card("A100 SXM", 108, 1.41e9, 2.039e12, 312e12, 7.2e12, 4, shared=167936),
    "sm_86": Card("RTX 3090", 82, 1.695e9, 0.936e12, 71e12, 2.8e12, 64, shared=102400, threads=1536, programs=16),
    "sm_89": Card("RTX 4090", 128, 2.52e9, 1.008e12, 165e12, 5.2e12, 64, shared=102400, threads=1536, programs=24),
    # 5120 bytes of L2 a cycle are published of the A100 and taken over.
    "sm_90": Card("H100 SXM", 132, 1.755e9, H100["bytes_per_s"], H100["flops"][2], 9.0e12, 2),
}
TIMES = "dram", "l2", "tensor", "special", "alu", "issue"
# Opcodes of pipes that take a warp's instruction in several cycles of a scheduler.
SPECIAL = re.compile(r"MUFU|F2F(?!P)|F2I|I2F|POPC|FLO|BREV")
DOUBLE = re.compile(r"D(?:ADD|MUL|FMA|SETP|MNMX)|MUFU\.\w+64")
ALU = re.compile(
    r"LOP|ISETP|FSETP|SEL|FSEL|FMNMX|IMNMX|SHF|PRMT|IADD|LEA|PLOP|F2FP|VIADD|IABS|FCHK|SGXT|BMSK|LEPC|R2P|P2R"
)


@dataclass
class Cost:
    """What a launch or a stage costs; numbers of executions are those of the whole grid."""

    kernel: str
    launches: int = 0
    torch: int = 0
    bytes: float = 0
    sectors: float = 0
    flops: float = 0
    special: float = 0
    instructions: float = 0
    ways: float = 0
    requests: float = 0
    host_us: float = 0
    expected: float = 0
    matched: bool = True
    note: str = ""
    times: Counter = field(default_factory=Counter)

    def add(self, other):
        """Put another one's numbers to these."""
        for name in ("launches", "torch", "bytes", "sectors", "flops", "special", "instructions", "ways", "requests",
                     "host_us", "expected"):  # fmt: skip
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.times.update(other.times)
        self.matched &= other.matched
        return self


def regions(loops, count):
    """For each of `count` places the number of its loop, -1 outside. `loops`: (first, last), outer ones first."""
    inside = np.full(count, -1)
    for number, (first, last) in enumerate(loops):
        inside[first : last + 1] = number
    return inside


def ordered(loops):
    """Loops of one head taken together, outer ones before inner ones."""
    found = {}
    for first, last in loops:
        found[first] = max(last, found.get(first, -1))
    return sorted(found.items(), key=lambda loop: (loop[0], -loop[1]))


def depths(loops):
    """How many loops are around each."""
    return [sum(a <= c and d <= b for a, b in loops) - 1 for c, d in loops]


def disassembled(ptx, target):
    """(opcodes in order, loops, registers, bytes of stack) of PTX as ptxas compiles it."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    arch = target + ("a" if target == "sm_90" else "")
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "k.ptx", Path(folder) / "k.cubin"
        source.write_text(ptx)
        command = [get_ptxas(int(target[3:])).path, "-lineinfo", "--regAllocOptLevel=2", f"-arch={arch}", source]
        subprocess.run([*command, "-o", binary], check=True)
        usage, code = (
            subprocess.run([tools / tool, option, binary], check=True, capture_output=True, text=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    usage = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    opcodes, labels, branches = [], {}, []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        if found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);", line):
            if branch := re.search(r"`\((\.L_x_\d+)\)", found[2]):
                branches.append((len(opcodes), branch[1]))
            opcodes.append(found[1])
    while opcodes and opcodes[-1] in ("NOP", "BRA"):
        opcodes.pop()
    loops = [(labels[to], at) for at, to in branches if labels.get(to, at + 1) <= at < len(opcodes)]
    return opcodes, ordered(loops), int(usage[1]), int(usage[2])


def back_edges(program):
    """Loops of a PTX program as (first, last) block."""
    ends = ((n, block.end) for n, block in enumerate(program.blocks) if block.end[0] in ("jump", "branch"))
    return ordered((end[-1], n) for n, end in ends if end[-1] <= n)


def executed(opcodes, loops, report):
    """Times of each instruction of the disassembly over all warps that were executed; whether the loops agree."""
    program = report.launched["program"]
    blocks, own = program.blocks, back_edges(program)
    sizes = np.array([len(block.instructions) for block in blocks])
    times = np.array([report.blocks.get(n, 0) for n in range(len(blocks))])
    matched = len(own) == len(loops) and depths(own) == depths(loops)
    inside, place = regions(own, len(blocks)), regions(loops, len(opcodes))
    if not matched:
        inside[:], place[:] = -1, -1
    weights = np.zeros(len(opcodes))
    for number in range(-1, len(own) if matched else 0):
        some = inside == number
        weights[place == number] = (sizes * times)[some].sum() / max(1, sizes[some].sum())
    return weights, matched


def products(report):
    """Operations of matrix units of the executed programs, by the type of their operands."""
    found = Counter()
    for number, times in report.blocks.items():
        for instruction in report.launched["program"].blocks[number].instructions:
            shape = next((re.fullmatch(r"m(\d+)n(\d+)k(\d+)", part) for part in instruction.parts if part[0] == "m"
                          and part[1:2].isdigit()), None)  # fmt: skip
            if shape and instruction.parts[0] in ("mma", "wgmma"):
                warps = times / (4 if instruction.parts[0] == "wgmma" else 1)
                kind = "tf32" if "tf32" in instruction.parts else "half"
                found[kind] += 2 * np.prod([int(n) for n in shape.groups()]) * warps
    return found


def resident(card, warps, registers, shared):
    """Programs that a processor holds at once."""
    registers = -(-registers // 8) * 8 * 32 * warps
    return max(1, min(card.registers // registers, card.shared // max(1, shared + 1024),
                      card.threads // (32 * warps), card.programs))  # fmt: skip


def expected(times, hiding, ahead):
    """Seconds of a launch: the largest of `times`, and of the others what `hiding` warps a scheduler leave uncovered.

    A warp waits for what it asked for, so one warp alone adds up memory, matrix units, special functions and the rest;
    of w the others work meanwhile. Where copies are asked for `ahead`, a turn of the loop before, memory is not waited
    for. Both memories serve one request, and what `alu` takes is issued too.
    """
    memory = max(times["dram"], times["l2"])
    kinds = [times["tensor"], times["special"], max(times["alu"], times["issue"]), *([] if ahead else [memory])]
    return max(memory, max(kinds) + (sum(kinds) - max(kinds)) / hiding)


class Ledger:
    """Counts the launches of one target."""

    def __init__(self, target):
        self.target, self.card, self.codes = target, CARDS[target], {}

    def cost(self, report):
        """The `Cost` of a launch that was executed in part."""
        card, about = self.card, report.launched
        ptx = about["ptx"]
        if ptx not in self.codes:
            self.codes[ptx] = disassembled(ptx, self.target)
        opcodes, loops, registers, stack = self.codes[ptx]
        weights, matched = executed(opcodes, loops, report)
        scale = about["ctas"] / report.ctas
        classes = {name: np.array([bool(kind.match(o)) for o in opcodes], bool)
                   for name, kind in (("special", SPECIAL), ("double", DOUBLE), ("alu", ALU))}  # fmt: skip
        special = classes["special"] & ~classes["double"]
        counted = {name: scale * weights[some].sum() for name, some in {**classes, "special": special}.items()}
        flops = products(report)
        held = resident(card, about["warps"], registers, about["shared"])
        # Whole waves: the last one takes as long as any.
        schedulers = 4 * card.processors
        programs = -(-about["ctas"] // card.processors) * card.processors / about["ctas"]
        per = programs / (schedulers * card.clock)
        issued = scale * weights.sum()
        arguments = {}
        for pointer, size, used in about["arguments"]:
            moved = sum(min(size, 32 * scale * sectors) for sectors in used)
            arguments[pointer] = max(arguments.get(pointer, 0), moved)
        moved = sum(arguments.values())
        sectors = 32 * scale * (report.global_load["distinct"] + report.global_store["distinct"])
        warps = min(held, -(-about["ctas"] // card.processors)) * about["warps"] / 4
        rates = {"half": 1, "tf32": 2}
        times = dict(
            dram=moved / card.dram, l2=sectors / card.l2,
            tensor=programs * scale * sum(n * rates[kind] for kind, n in flops.items()) / card.products,
            special=8 * counted["special"] * per,
            alu=(2 * counted["alu"] + card.double * counted["double"]) * per, issue=issued * per,
        )  # fmt: skip
        shared = report.shared_load + report.shared_store
        ahead = "LDGSTS" in {o.split(".")[0] for first, last in loops for o in opcodes[first : last + 1]}
        return Cost(
            report.kernel, 1, 0, moved, sectors, scale * sum(flops.values()), 32 * counted["special"], issued,
            scale * shared["ways"], scale * shared["requests"], 0,
            expected(times, max(1, warps), ahead) + LAUNCH_US * 1e-6, matched,
            f"{about['ctas']} x {about['warps']} warps, {held} held, {registers} registers, {about['shared']} shared"
            + f", {stack} spilt" * (stack > 0),
            Counter(times),
        )  # fmt: skip


class Operations(TorchDispatchMode):
    """Counts what PyTorch would run as kernels, and the seconds a CPU needs for it."""

    def __init__(self):
        super().__init__()
        self.found, self.seconds, self.paused = [], 0.0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        started = time.perf_counter()
        result = function(*args, **(kwargs or {}))
        self.seconds += time.perf_counter() - started
        name = function.overloadpacket.__name__
        if not self.paused and name not in VIEWS:
            tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, result)) if torch.is_tensor(x)]
            if any(t.device.type == "meta" or t.numel() > 1 for t in tensors):
                self.found.append((name, sum(t.nbytes for t in tensors)))
        return result


def blank(*shape, dtype=torch.float32):
    """Zeros that take up memory only where they are written to."""
    size = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(memory.blank(size, np.uint8, True)).view(dtype).view(shape)


def stages(shape, dtype, target):
    """Yield the stages of a forward as (name, function without arguments)."""
    side, cells, channels = parse(shape)
    torch.manual_seed(0)
    model = AnyUp().eval().requires_grad_(False)
    dim = model.config["qk_dim"] if "qk_dim" in getattr(model, "config", {}) else 128
    image, features = blank(1, 3, side, side, dtype=dtype), blank(1, channels, cells, cells)
    halves = queries.in_halves(device_of(target), dtype)
    weights = guidance.prepared(model.guidance_weights(), dtype, halves)
    yield "guidance", lambda: guidance.guidance_fwd(image, weights, (side, side), (cells, cells), dtype=dtype)
    basis = model.key_features_encoder[0].basis
    yield "unit channels", lambda: keys.unit_channels_fwd(features)
    yield "unification", lambda: unification.feature_unification_fwd(features, basis)
    low = blank(1, cells, cells, dim), blank(1, dim, cells, cells)
    of_keys = keys.prepared(model.key_weights())
    yield "keys", lambda: keys.project_keys_fwd(*low, of_keys, eps=RMS_EPS, dtype=dtype, ready=True)
    query = blank(1, side, side, dim, dtype=dtype)
    projection = queries.prepared(*model.query_projection(), dtype, halves)
    yield "queries", lambda: queries.project_queries_fwd(query, *projection, eps=RMS_EPS, ready=True)
    heads = query.unflatten(-1, (4, -1)), blank(1, cells, cells, 4, dim // 4, dtype=dtype)
    value, bounds = blank(1, cells, cells, channels, dtype=dtype), window_bounds(side, cells, 0.1)
    yield "attention", lambda: attention.windowed_attention_fwd(*heads, value, bounds, bounds)


def pointer(argument):
    """Where a tensor's storage begins; None for a number."""
    return argument.untyped_storage().data_ptr() if torch.is_tensor(argument) else None


def counted(ledger, name, call):
    """(the `Cost` of a stage, those of its launches)."""

    def spread(_, number):
        return np.unique(((np.arange(SAMPLED) + 0.5) / SAMPLED * number).astype(int))

    operations = Operations()
    run = launch.run

    known = {}

    def paused(program, grid, given, *args, **options):
        key = program, grid
        operations.paused = True
        try:
            if key not in known:
                known[key] = run(program, grid, given, *args, **options), list(map(pointer, given))
            report, before = known[key]
            report, now = copy(report), list(map(pointer, given))
            report.used = {here: report.used[there] for here, there in zip(now, before, strict=True) if here}
            return report
        finally:
            operations.paused = False

    launch.run = paused
    try:
        with launch.launcher(ledger.target, device_of=(tiling.Device,), ctas=spread, collect=True) as reports:
            active = launch.driver.active
            active.idle = True
            call()  # what is made once is there from here on
            active.idle = False
            with operations:
                call()
            found = [ledger.cost(report) for report in reports]
            active.idle, active.history.poison = True, lambda tensor: tensor
            clock = Operations()
            host = []
            with clock:
                for _ in range(ROUNDS):
                    before, inside = time.perf_counter(), clock.seconds
                    call()
                    host.append(time.perf_counter() - before - (clock.seconds - inside))
    finally:
        launch.run = run
    total = Cost(name)
    for cost in found:
        total.add(cost)
    moved = sum(size for _, size in operations.found)
    total.add(Cost("", 0, len(operations.found), moved, host_us=1e6 * statistics.median(host)
                   + TORCH_US * len(operations.found), times=Counter(dram=moved / ledger.card.dram),
                   expected=moved / ledger.card.dram + 1e-6 * LAUNCH_US * len(operations.found)))  # fmt: skip
    return total, found


COLUMNS = ("shape", "dtype", "target", "stage", "launches", "torch", "MB", "L2_MB", "GFLOP", "Gspecial", "Ginstr",
           "conflicts", "host_us", *TIMES, "bound", "bound_ms", "expected_ms", "loops")  # fmt: skip


def row(shape, dtype, target, cost):
    """A line of the table."""
    bound = max(TIMES, key=lambda name: cost.times[name])
    figures = dict(
        shape=shape, dtype=dtype, target=target, stage=cost.kernel, launches=cost.launches, torch=cost.torch,
        MB=cost.bytes / 1e6, L2_MB=cost.sectors / 1e6, GFLOP=cost.flops / 1e9, Gspecial=cost.special / 1e9,
        Ginstr=cost.instructions / 1e9, conflicts=cost.ways / cost.requests if cost.requests else 1,
        host_us=cost.host_us, **{name: 1e3 * cost.times[name] for name in TIMES}, bound=bound,
        bound_ms=1e3 * cost.times[bound], expected_ms=1e3 * cost.expected, loops="exact" if cost.matched else "mean",
    )  # fmt: skip
    return {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in figures.items()}


def ledger(shapes, dtypes, targets, only=None, launches=False, show=print):
    """The lines of all stages, and of each shape's sum; each is shown as it comes."""
    books = {target: Ledger(target) for target in targets}
    for shape, dtype, target in itertools.product(shapes, dtypes, targets):
        total = Cost("sum")
        for name, call in stages(shape, getattr(torch, dtype), target):
            if only and name not in only:
                continue
            cost, each = counted(books[target], name, call)
            for one in each if launches else ():
                line = row(shape, dtype, target, one)
                show("   ", one.kernel, one.note, {k: line[k] for k in COLUMNS[6:] if k != "host_us"})
            total.add(cost)
            yield row(shape, dtype, target, cost)
            del call
        if not only:
            yield row(shape, dtype, target, total)


def main(arguments=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = ["224/16/384", *(shape for shape in DESIGN_MS if shape != "2048/512/1")]
    parser.add_argument("--shapes", nargs="+", default=shapes, metavar="IMAGE/GRID/CHANNELS")
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16", "float32"], choices=list(("bfloat16", "float16", "float32"))
    )
    parser.add_argument("--targets", nargs="+", default=["sm_90"], choices=list(CARDS))
    parser.add_argument("--stages", nargs="+", help="only these; no table is written")
    parser.add_argument("--launches", action="store_true", help="each launch too")
    parser.add_argument("--csv", default=ROOT / "benchmarks" / "results" / "ledger.csv", type=Path)
    options = parser.parse_args(arguments)
    memory.LARGE = 1 << 20
    torch.set_num_threads(1)
    lines = []
    for line in ledger(options.shapes, options.dtypes, options.targets, options.stages, options.launches):
        lines.append(line)
        print("  ".join(f"{name} {value}" for name, value in line.items()), flush=True)
    if not options.stages:
        with written_aside(options.csv) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
