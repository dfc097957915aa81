"""Compiles every kernel, forward and backward, for GPUs none of which has to be there.

    python benchmarks/compile_kernels.py                     # all of it, as a table into results/compiled.csv
    python benchmarks/compile_kernels.py --targets sm_90 --dtypes bfloat16 --groups attention --defaults --json
    python benchmarks/compile_kernels.py --front-end --json  # only what Triton makes of the source, for any GPU

Columns: registers per thread, bytes of stack (spills), shared memory, instructions that use tensor cores, all
instructions, the instructions of each loop from the innermost outwards, and the shared memory that `tiling` foretells
(attention) or the target has. On AMD: vector registers, spilt ones times four as the stack, and MFMA or WMMA
instructions.
"""

import argparse
import csv
import functools
import itertools
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from checkout import ROOT, use_checkout

use_checkout()

import torch  # noqa: E402
from anyup_fast.kernels import tiling  # noqa: E402

from anyup_fast.files import written_aside  # noqa: E402

# Kind, architecture and threads of a warp as Triton calls them; compute capability; bytes of shared memory.
TARGETS = {
    "sm_80": ("cuda", 80, 32, (8, 0), 166912),
    "sm_86": ("cuda", 86, 32, (8, 6), 101376),
    "sm_89": ("cuda", 89, 32, (8, 9), 101376),
    "sm_90": ("cuda", 90, 32, (9, 0), 232448),
    "sm_100": ("cuda", 100, 32, (10, 0), 232448),
    "sm_120": ("cuda", 120, 32, (12, 0), 101376),
    "gfx90a": ("hip", "gfx90a", 64, (9, 0), 65536),
    "gfx942": ("hip", "gfx942", 64, (9, 4), 65536),
    "gfx950": ("hip", "gfx950", 64, (9, 5), 65536),
    "gfx1100": ("hip", "gfx1100", 32, (11, 0), 65536),
    "gfx1201": ("hip", "gfx1201", 32, (12, 0), 65536),
}
TENSOR_CORES = r"\b(?:HGMMA|HMMA|UTCHMMA|UTCQMMA|UTCMMA|UTC\w*MMA)|v_s?w?mf?ma_\w+"
# Pixels, cells and channels of the problems whose default tiles are held to a limit of spills.
GRIDS = {"448/32/384": (448, 32, 384), "518/37/768": (518, 37, 768), "1024/64/768": (1024, 64, 768)}
# Its windows have few enough keys for one block of the backward on every target and in every dtype.
FEW_KEYS = {"224/16/384": (224, 16, 384)}
TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
GROUPS = ("attention", "backward", "guidance", "keys", "queries", "unification")
WINDOWS = ("row_ptr", "col_ptr", "row_tile_ptr", "col_tile_ptr", "row_range_ptr", "col_range_ptr")
FLOATS = ("qk_scale", "scale", "safe_offset", "log2e", "eps", "origin")
SUMS = dict.fromkeys(("lse_ptr", "norm_ptr", "delta_ptr", "grad_k_ptr", "grad_v_ptr"), "float32")
# Strides and numbers that are divisible by 16 where channels are.
ALIGNED = r"[gqkvx]_[bhwn]|channels|n_keys"


@dataclass(frozen=True)
class Launch:
    """A kernel as one of the launchers would compile it.

    Attributes:
        group, kernel, dtype: what it is called in the table.
        fn: the device function; constants, options: its constexpr arguments and Triton's options.
        pointers: dtypes of pointers to something else than `dtype`.
        figures: columns of the table that say which tile it is, and `bound`.
    """

    group: str
    kernel: str
    dtype: str
    fn: object
    constants: dict
    options: dict
    pointers: dict = field(default_factory=dict)
    figures: dict = field(default_factory=dict)

    @classmethod
    def of(cls, group, kernel, dtype, fn, constants, pointers=None, **figures):
        """With constants and options in one dict, as the launchers have them; those the function lacks are left out."""
        options = {name: constants[name] for name in ("num_warps", "num_stages", "maxnreg") if name in constants}
        options["enable_fp_fusion"] = True
        constants = {name: value for name, value in constants.items() if name in fn.arg_names}
        tile = f"{constants['BLOCK_H']}x{constants['BLOCK_W']}" if "BLOCK_H" in constants else constants.get("BLOCK_P")
        named = dict(tile=tile, block_k=constants.get("BLOCK_K"), block_c=constants.get("BLOCK_C"))
        return cls(group, kernel, dtype, fn, constants, options, pointers or {}, {**named, **figures})


def device_of(target):
    """The `tiling.Device` of a compile target."""
    kind, arch, _, capability, shared = TARGETS[target]
    return tiling.Device(kind, capability, shared, arch=arch if kind == "hip" else "")


def _attention_constants(target, dtype, precision=None):
    """What both directions of the attention take, for 4 heads of 32 and channels divisible by 16."""
    wide = {"float32": "tf32x3", "float16": "tf32"}.get(dtype, "ieee") if TARGETS[target][0] == "cuda" else "ieee"
    return dict(HEADS=4, HEAD_DIM=32, BLOCK_D=32, SPLIT=False, PRECISION=precision or wide)


def _spans_of(image, grid):
    """Function (block_h, block_w) -> (rows, cols) of keys, as `tiling.choose_tile` takes it."""
    from anyup_fast.kernels.attention import _frozen, _spans

    from anyup_fast.ops import window_bounds

    bounds = _frozen(window_bounds(image, grid, 0.1))
    return functools.partial(_spans, bounds, bounds)


def kernels_of(tile):
    """The device functions a tile launches, each with its own block_k."""
    from anyup_fast.kernels import attention as w

    if tile.design == "halved":
        return {"halved": (w._halved_kernel, tile.block_k), "mix": (w._mix_kernel, tile.mix_k)}
    if tile.design == "stored":
        kernels = {"stats": (w._stats_kernel, tile.stats_block_k), "weights": (w._weights_kernel, tile.block_k)}
        return {**kernels, "mix": (w._mix_kernel, tile.mix_k)}
    if tile.design == "two_pass":
        return {"stats": (w._stats_kernel, tile.stats_block_k), "apply": (w._apply_kernel, tile.block_k)}
    return {tile.design: (getattr(w, f"_{tile.design}_kernel"), tile.block_k)}


def attention(target, dtype, defaults=False, split=False):
    """Launches of every tile that `target` may be given, or of the `defaults` of `GRIDS` alone."""
    from anyup_fast.kernels import attention as w

    device, kind = device_of(target), getattr(torch, dtype)
    if dtype == "float32":
        pointers = dict(high_ptr="float16", low_ptr="float16")
        constants = dict(BLOCK_X=w.PARTS_X, BLOCK_C=w.PARTS_C, num_warps=8)
        yield Launch.of("attention", "parts", dtype, w._parts_kernel, constants, pointers, default_for="")
    chosen, widths = {}, {}
    for grid, (image, cells, channels) in GRIDS.items():
        spans = _spans_of(image, cells)
        tile = tiling.choose_tile(device, kind, channels, spans, tuned=[])
        chosen.setdefault(tile, []).append(grid)
        widths.setdefault(tile, spans(tile.block_h, tile.block_w)[1])
    for tile in chosen if defaults else dict.fromkeys((*tiling.candidates(kind, device), *chosen)):
        if split and tile.design in ("stored", "halved"):
            continue
        for name, (fn, block_k) in kernels_of(tile).items():
            constants = dict(BLOCK_H=tile.block_h, BLOCK_W=tile.block_w, BLOCK_K=block_k, BLOCK_C=tile.block_c)
            constants["HIDE"] = w.hides(tile)
            constants.update(SPAN_W=w.known_width(tile, widths.get(tile, round(block_k**0.5))), PACKED=True)
            constants.update(STAGES=tile.stages)
            constants.update(_attention_constants(target, dtype, tile.precision), SPLIT=split)
            constants.update(num_warps=tile.warps, num_stages=tile.stages)
            pointers = SUMS
            if name in ("weights", "mix"):
                wide = dtype == "float32"
                constants.update(PARTS=2 if wide else 1, BLOCK_N=w.MIX_KEYS if name == "weights" else block_k)
                pointers = dict(SUMS, w_ptr="float16" if wide else dtype, unit_ptr="float32", low_ptr="float16")
                pointers.update(v_ptr="float16" if wide else dtype)
            if name == "halved":
                constants["BLOCK_P"] = w.HALVED_P
                pointers = dict(k_ptr="float16", unit_ptr="float32", w_ptr="float16")
            if name == "mix":
                constants.update(STAGES=tile.mix_stages, num_stages=tile.mix_stages)
            bound = tiling.shared_memory(tile, device, kind)
            figures = dict(design=tile.design, block_c=tile.block_c, bound=bound)
            grids = " ".join(chosen.get(tile, ()))
            yield Launch.of("attention", name, dtype, fn, constants, pointers, **figures, default_for=grids)


def backward(target, dtype):
    """Launches of the plans of `GRIDS` and of windows that are not one block."""
    from anyup_fast.kernels import attention_backward as w

    device, seen = device_of(target), {}
    for grid, (image, cells, _) in {**FEW_KEYS, **GRIDS, "any": (0, 0, 0)}.items():
        spans = _spans_of(image, cells) if image else None
        plan = w.plan(device, getattr(torch, dtype), spans)
        kernels = {"key": (w._key_kernel, plan.key), "value": (w._value_kernel, plan.value)}
        if plan.window:
            kernels["query_window"] = w._query_window_kernel, plan.query
        else:
            kernels["query_blocks"] = w._query_blocks_kernel, plan.query
        for name, (fn, blocks) in kernels.items():
            width = spans(blocks.block_h, blocks.block_w)[1] if name == "query_window" else w.KEY_W
            seen.setdefault((name, fn, blocks, width, plan.width // 32), []).append(grid)
    for (name, fn, blocks, width, group), grids in seen.items():
        constants = dict(BLOCK_H=blocks.block_h, BLOCK_W=blocks.block_w, BLOCK_C=blocks.block_c, STAGES=blocks.stages)
        constants.update(KEY_H=blocks.block_k // w.KEY_W, KEY_W=w.KEY_W)
        constants.update(BLOCK_K=blocks.block_k, SPAN_W=width, PACKED=width <= 16)
        constants.update(_attention_constants(target, dtype), GROUP=group)
        constants.update(num_warps=blocks.warps, num_stages=blocks.stages)
        figures = dict(block_k=blocks.block_k, default_for=" ".join(grids))
        yield Launch.of("backward", name, dtype, fn, constants, SUMS, **figures)


def guidance(target, dtype, dim=128):
    """Launches of a whole forward of the guidance network, `dim` channels wide."""
    from anyup_fast.kernels import guidance as g

    halves = g.in_halves(device_of(target), getattr(torch, dtype))
    layer, guide = g.tile_sizes(getattr(torch, dtype), dim, device_of(target), halves)
    wide = "tf32x3" if TARGETS[target][0] == "cuda" else "ieee"
    for sizes in (layer, guide):
        sizes.update(PRECISION=wide if dtype == "float32" else "ieee", STAGES=sizes["num_stages"])
    stored = dict.fromkeys(("x_ptr", "skip_ptr", "out_ptr", "weight_ptr"), dtype)
    both = {f"{name}{kind}_ptr": dtype for name in ("query", "key") for kind in ("", "_weight")}
    if halves:
        both.update(dict.fromkeys(("query_weight_ptr", "key_weight_ptr"), "float16"))
        stored["weight_ptr"] = "float16"
    pool = dict(BLOCK_J=1, BLOCK_X=16, BLOCK_D=min(dim, 128), CUDA=layer["CUDA"], STAGES=g.POOL_STAGES, num_warps=4)
    last = dict(BLOCK_P=g.LAST_ROWS, BLOCK_N=min(dim, 64), BLOCK_K=32, PRECISION=wide, num_warps=4)
    tiles = dict(BLOCK_P=g.IMAGE_PIXELS, BLOCK=g.TILES, num_warps=8)
    found = [
        ("image stats", g._image_stats_kernel, tiles, {}),
        ("image affine", g._image_affine_kernel, dict(tiles, BLOCK=g.IMAGE_TILES, num_warps=4), {}),
        ("affine", g._affine_kernel, tiles, {}),
        ("rotation", g._rotation_kernel, dict(num_warps=4), {}),
        ("guide", g._guide_kernel, guide, {**stored, **both}),
        ("pool", g._pool_kernel, dict(pool, ACTIVE=True), dict(x_ptr=dtype, y_ptr=dtype)),
        ("pool after", g._pool_kernel, dict(pool, ACTIVE=False), dict(stored, x_out_ptr=dtype)),
        ("last", g._last_kernel, last, {}),
    ]
    for name, from_image, skip in (
        ("layer", False, "none"),
        ("layer of the image", True, "none"),
        ("layer onto the image", False, "image"),
        ("layer onto x", False, "stored"),
    ):
        constants = dict(layer, FROM_IMAGE=from_image, SKIP=skip, IMAGE_PRECISION=wide)
        if skip == "image":
            constants.pop("maxnreg", None)
        found.append((name, g._layer_kernel, constants, stored))
    for name, fn, constants, pointers in found:
        pointers = {name: pointers.get(name, "float32") for name in fn.arg_names if name.endswith("_ptr")}
        constants = dict(constants, D=dim, GROUPS=8, CHANNELS=3)
        yield Launch.of("guidance", name, dtype, fn, constants, pointers, dim=dim, block_c=constants.get("BLOCK_N"))


def keys(target, dtype):
    """Launches of all that makes keys, 128 channels and filters; `dtype` is what is given and asked for."""
    from anyup_fast.kernels import keys as k

    if tiling.why_no_kernels(device_of(target), torch.float32):
        return
    layer, merge = k.plan(device_of(target), 128, 128)
    few = dict(BLOCK_P=k.CELLS, num_warps=4)
    found = [
        ("unit", k._unit_kernel, dict(few, BLOCK_C=64), dict(x_ptr=dtype)),
        ("project", k._project_kernel, layer, dict(out_ptr=dtype)),
    ]
    if dtype == "float32":
        found += [
            ("start", k._start_kernel, dict(few, M=128), {}),
            ("layer", k._layer_kernel, dict(layer, IN=128, SKIP=128), {}),
            ("layer of another width", k._layer_kernel, dict(layer, IN=128, SKIP=256), {}),
            ("merge", k._merge_kernel, merge, {}),
            ("combine", k._combine_kernel, dict(PER_GROUP=16, BLOCK_T=k.TILES, num_warps=4), {}),
        ]
    for name, fn, constants, pointers in found:
        pointers = {name: pointers.get(name, "float32") for name in fn.arg_names if name.endswith("_ptr")}
        yield Launch.of("keys", name, dtype, fn, dict(constants, D=128, GROUPS=8), pointers)


def queries(target, dtype):
    """The launch of the query projection."""
    from anyup_fast.kernels import queries as q

    constants = q.plan(device_of(target), getattr(torch, dtype), 128)
    pointers = dict(norm_ptr="float32", bias_ptr="float32")
    if constants["HALVES"]:
        pointers.update(conv_ptr="float16", proj_ptr="float16")
    yield Launch.of("queries", "query_projection", dtype, q._query_projection_kernel, constants, pointers)


def unification(target, dtype):
    """Launches of feature unification, 128 filters of 5x5, and of its backward; they know float32 alone."""
    from anyup_fast.kernels import unification as f
    from anyup_fast.kernels import unification_backward as b

    if dtype != "float32":
        return
    device = device_of(target)
    for name, channels in (("grouped", 384), ("written", 1000), ("gathered", 100)):
        design, constants = f.plan(device, channels, 128, 5, written=name == "written")
        assert design == name
        yield Launch.of("unification", name, dtype, getattr(f, f"_{name}_kernel"), constants)
        if name == "written":
            continue
        stats = b.plan(device, channels, 128, 5)[1]
        yield Launch.of("unification", f"{name} stats", dtype, getattr(b, f"_{name}_stats_kernel"), stats)
    _, _, taps, gather = b.plan(device, 384, 128, 5)
    yield Launch.of("unification", "taps", dtype, b._taps_kernel, taps)
    yield Launch.of("unification", "gather", dtype, b._gather_kernel, gather)


def launches(target, dtypes, groups=GROUPS, defaults=False, split=False, dims=(128,)):
    """Yield everything that is launched on `target` for these dtypes; those its kernels do not serve are left out."""
    for dtype in dtypes:
        if tiling.why_no_kernels(device_of(target), getattr(torch, dtype)):
            continue
        for group in groups:
            if group == "attention":
                yield from attention(target, dtype, defaults, split)
            elif group == "guidance":
                for dim in dims:
                    yield from guidance(target, dtype, dim)
            else:
                made = dict(backward=backward, keys=keys, queries=queries, unification=unification)
                yield from made[group](target, dtype)


class Enough(Exception):
    """Ends a compilation early; `metadata` holds what was found out until then."""

    def __init__(self, metadata):
        super().__init__("the stages asked for are done")
        self.metadata = metadata


@functools.cache
def _stop_before(stage, kind):
    """Make Triton's back end of a kind of target raise `Enough` in place of a stage, in this process."""
    import importlib

    name, cls = {"cuda": ("nvidia", "CUDABackend"), "hip": ("amd", "HIPBackend")}[kind]
    backend = getattr(importlib.import_module(f"triton.backends.{name}.compiler"), cls)
    add_stages = backend.add_stages

    def shortened(self, stages, *arguments, **options):
        add_stages(self, stages, *arguments, **options)

        def stop(_, metadata):
            raise Enough(dict(metadata))

        stages[stage] = stop

    backend.add_stages = shortened
    backend.hash = lambda self: stage  # else it asks for assembler and linker, which some releases do not bring


def compiled(launch, target, ones=()):
    """Compile one kernel as its launcher would; arguments named in `ones` are 1, which Triton makes constants."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes, values = {}, {}, {}
    for index, name in enumerate(launch.fn.arg_names):
        if name in launch.constants or name in ones:
            signature[name], values[(index,)] = "constexpr", launch.constants.get(name, 1)
        elif name in WINDOWS:
            signature[name] = "*i32"
        elif name.endswith("_ptr"):
            signature[name] = "*" + TYPES[launch.pointers.get(name, launch.dtype)]
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        aligned = re.fullmatch(ALIGNED, name) and launch.group != "unification"
        if signature[name] != "constexpr" and (name.endswith("_ptr") or aligned):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.fn, signature=signature, constexprs=values, attrs=attributes)
    return triton.compile(source, target=GPUTarget(*TARGETS[target][:3]), options=launch.options)


def front_end(launch, target, stage="ttgir"):
    """What Triton knows of a kernel before `stage`, "ttgir" being the first that depends on the GPU: its metadata."""
    _stop_before(stage, TARGETS[target][0])
    try:
        compiled(launch, target)
    except Enough as enough:
        return enough.metadata
    raise RuntimeError(f"stage: Triton compiled {launch.kernel} for {target} without a stage {stage!r}")


def _nvidia(tool, *arguments):
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def loop_lengths(sass):
    """Instructions of every loop in a disassembly, inner loops counted in outer ones too."""
    position, labels, branches = 0, {}, []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = position
        if re.search(r"/\*[0-9a-f]{4,}\*/.*;", line):
            position += 1
            if branch := re.search(r"BRA(?:\.\w+)*\s.*?`\((\.L_x_\d+)\)", line):
                branches.append((position, branch[1]))
    loops = [stop - labels[name] for stop, name in branches if labels.get(name, stop) < stop - 4]
    return sorted(loops), position


def measure(compiled):
    """Figures of one compiled kernel, read from the binary."""
    if "cubin" in compiled.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = re.search(r"REG:(\d+) STACK:(\d+)", _nvidia("cuobjdump", "-res-usage", file.name))
            code = _nvidia("nvdisasm", "-c", file.name)
        registers, stack = int(usage[1]), int(usage[2])
        loops, instructions = loop_lengths(code)
    else:
        code = compiled.asm["amdgcn"]
        registers, spilt = (int(re.search(rf"\.{n}:\s*(\d+)", code)[1]) for n in ("vgpr_count", "vgpr_spill_count"))
        stack, loops = 4 * spilt, []
        instructions = len(re.findall(r"^\s+[vs]_\w+|^\s+(?:global|buffer|ds|flat|scratch)_\w+", code, re.M))
    cores = re.findall(TENSOR_CORES, code)
    return dict(
        registers=registers,
        stack=stack,
        shared=compiled.metadata.shared,
        tensor_core=len(cores),
        kind=min(set(cores), default=""),
        instructions=instructions,
        exp2=len(re.findall(r"MUFU\.EX2|v_exp_f32", code)),
        loops=" ".join(map(str, loops)),
    )


def row(launch, target, ones=(), only_front_end=False):
    """One line of the table."""
    import triton

    named = dict(triton=triton.__version__, target=target, dtype=launch.dtype, group=launch.group, kernel=launch.kernel)
    named.update(dict(dict.fromkeys(("design", "tile", "block_k", "block_c")), **launch.figures))
    named.update(warps=launch.options["num_warps"], stages=launch.options.get("num_stages"))
    if only_front_end:
        try:
            front_end(launch, target)
        except Exception as error:  # each kernel's own, so that the others are seen too
            while error.__cause__ is not None:
                error = error.__cause__
            return dict(named, error=f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}")
        return dict(named, error="")
    named.update(measure(compiled(launch, target, ones)))
    bound, default_for = (named.pop(name, None) for name in ("bound", "default_for"))
    return dict(named, bound=device_of(target).shared_memory if bound is None else bound, default_for=default_for)


def _row_of(job):
    """For a process of its own: the line of the `index`-th launch."""
    target, what, how, index = job
    launch = next(itertools.islice(launches(target, **what), index, None))
    return row(launch, target, *how)


def rows(targets, what, how=(), jobs=1):
    """Yield the lines of all launches, several at a time with `jobs` processes.

    Args:
        what: arguments of `launches`. how: further ones of `row`.
    """
    work = [(target, what, how, i) for target in targets for i, _ in enumerate(launches(target, **what))]
    if jobs == 1:
        yield from map(_row_of, work)
        return
    with get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(_row_of, work)


def main(arguments=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=list(TYPES))
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=GROUPS)
    parser.add_argument("--defaults", action="store_true", help="of the attention only tiles of the 32, 37, 64 grids")
    parser.add_argument("--split", action="store_true", help="heads of the attention's forward split the channels")
    parser.add_argument("--dims", nargs="+", type=int, default=[128], help="widths of the guidance network")
    parser.add_argument("--ones", nargs="+", default=[], help="arguments that are 1")
    parser.add_argument("--front-end", action="store_true", help="stop before anything that depends on the GPU")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", action="store_true", help="print JSON lines and write no table")
    options = parser.parse_args(arguments)
    what = {name: getattr(options, name) for name in ("dtypes", "groups", "defaults", "split", "dims")}
    table = []
    for line in rows(options.targets, what, (options.ones, options.front_end), options.jobs):
        table.append(line)
        print(json.dumps(line) if options.json else "  ".join(f"{v}" for v in line.values()), flush=True)
    if not (options.json or options.front_end):
        path = ROOT / "benchmarks" / "results" / "compiled.csv"
        path.parent.mkdir(exist_ok=True)
        with written_aside(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for line in table for name in line)))
            writer.writeheader()
            writer.writerows(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
