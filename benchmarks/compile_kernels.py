"""Compiles every shipped tile of the windowed attention for four GPUs, none of which has to be there.

    python benchmarks/compile_kernels.py                     # all of it, as a table into results/compiled.csv
    python benchmarks/compile_kernels.py --targets sm_90 --dtypes bfloat16 --defaults --json

Columns: registers per thread, bytes of stack (spills), shared memory, instructions that use tensor cores, all
instructions, and the instructions of each loop from the innermost outwards. On AMD: vector registers, spilt ones times
four as the stack, and MFMA instructions.
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
from pathlib import Path

from checkout import ROOT, use_checkout

use_checkout()

import torch  # noqa: E402
from anyup_fast.kernels import tiling  # noqa: E402

from anyup_fast.files import written_aside  # noqa: E402

TARGETS = {
    "sm_80": ("cuda", 80, 32, 166912),
    "sm_90": ("cuda", 90, 32, 232448),
    "sm_100": ("cuda", 100, 32, 232448),
    "gfx942": ("hip", "gfx942", 64, 65536),
}
TENSOR_CORES = r"\b(?:HGMMA|HMMA|UTCHMMA|UTCQMMA|UTCMMA|UTC\w*MMA)|v_mfma_\w+"
# Pixels, cells and channels of the problems whose default tiles are held to a limit of spills.
GRIDS = {"448/32/384": (448, 32, 384), "518/37/768": (518, 37, 768), "1024/64/768": (1024, 64, 768)}
TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def device_of(target):
    """The `tiling.Device` of a compile target."""
    kind, arch, _, shared = TARGETS[target]
    capability = (arch // 10, arch % 10) if kind == "cuda" else (9, 4)
    return tiling.Device(kind, capability, shared)


def default_tile(target, dtype, image, grid, channels):
    """The tile chosen for one of `GRIDS`, and the width of the rectangle of keys that it spans."""
    from anyup_fast.kernels.attention import _frozen, _spans

    from anyup_fast.ops import window_bounds

    bounds = _frozen(window_bounds(image, grid, 0.1))

    def spans(block_h, block_w):
        return _spans(bounds, bounds, block_h, block_w)

    tile = tiling.choose_tile(device_of(target), getattr(torch, dtype), channels, spans, tuned=[])
    return tile, spans(tile.block_h, tile.block_w)[1]


def kernels_of(tile):
    """The device functions a tile launches, each with its own block_k."""
    from anyup_fast.kernels import attention as w

    if tile.design == "two_pass":
        return {"stats": (w._stats_kernel, tile.stats_block_k), "apply": (w._apply_kernel, tile.block_k)}
    return {tile.design: (getattr(w, f"_{tile.design}_kernel"), tile.block_k)}


def compile_tile(fn, block_k, tile, target, dtype, span_w=None):
    """Compile one device function of the forward as its launcher would."""
    constants = dict(BLOCK_H=tile.block_h, BLOCK_W=tile.block_w, BLOCK_K=block_k, BLOCK_C=tile.block_c)
    constants.update(SPAN_W=span_w or round(block_k**0.5), PACKED=True, STAGES=tile.stages)
    options = dict(num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True)
    return compile_kernel(fn, constants, options, target, dtype, tile.precision)


def compile_kernel(fn, constants, options, target, dtype, precision=None):
    """Compile one device function for 4 heads of 32 and channels divisible by 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kind, arch, warp, _ = TARGETS[target]
    wide = {"float32": "tf32x3", "float16": "tf32"}.get(dtype, "ieee") if kind == "cuda" else "ieee"
    constants = dict(HEADS=4, HEAD_DIM=32, BLOCK_D=32, SPLIT=False, PRECISION=precision or wide, **constants)
    signature, attributes, values = {}, {}, {}
    for index, name in enumerate(fn.arg_names):
        if name in constants:
            signature[name], values[(index,)] = "constexpr", constants[name]
        elif name in ("row_ptr", "col_ptr", "row_tile_ptr", "col_tile_ptr", "row_range_ptr", "col_range_ptr"):
            signature[name] = "*i32"
        elif name.endswith("_ptr"):
            sums = ("lse_ptr", "norm_ptr", "delta_ptr", "grad_k_ptr", "grad_v_ptr")
            signature[name] = "*fp32" if name in sums else "*" + TYPES[dtype]
        else:
            signature[name] = "fp32" if name in ("qk_scale", "scale", "safe_offset", "log2e") else "i32"
        if name.endswith("_ptr") or re.fullmatch(r"[gqkv]_[bhwn]|channels", name):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=fn, signature=signature, constexprs=values, attrs=attributes)
    return triton.compile(source, target=GPUTarget(kind, arch, warp), options=options)


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
        instructions = len(re.findall(r"^\s+[vs]_\w+|^\s+(?:global|buffer|ds|flat)_\w+", code, re.M))
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


def rows(targets, dtypes, defaults_only=False):
    """Yield one dict per kernel of each tile: the candidates, and which of `GRIDS` they are the default of."""
    import triton

    for target in targets:
        for dtype in dtypes:
            chosen, widths = {}, {}
            for grid, sizes in GRIDS.items():
                tile, widths[grid] = default_tile(target, dtype, *sizes)
                chosen.setdefault(tile, []).append(grid)
            tiles = chosen if defaults_only else dict.fromkeys((*tiling.candidates(getattr(torch, dtype)), *chosen))
            for tile in tiles:
                device = device_of(target)
                bound = tile.shared_memory(torch.finfo(getattr(torch, dtype)).bits // 8, device.kind)
                if bound > device.shared_memory or device.capability < tile.needs:
                    continue
                for name, (fn, block_k) in kernels_of(tile).items():
                    compiled = compile_tile(
                        fn, block_k, tile, target, dtype, widths.get(next(iter(chosen.get(tile, [])), None))
                    )
                    yield dict(
                        triton=triton.__version__,
                        target=target,
                        dtype=dtype,
                        kernel=name,
                        tile=f"{tile.block_h}x{tile.block_w}",
                        block_k=block_k,
                        block_c=tile.block_c,
                        warps=tile.warps,
                        stages=tile.stages,
                        **measure(compiled),
                        bound=bound,
                        default_for=" ".join(chosen.get(tile, ())),
                    )


def backward_rows(targets, dtypes):
    """As `rows`, for the kernels of the backward and the plans of `GRIDS` and of windows that are not one block."""
    import triton
    from anyup_fast.kernels import attention_backward as w
    from anyup_fast.kernels.attention import _frozen, _spans

    from anyup_fast.ops import window_bounds

    for target, dtype in itertools.product(targets, dtypes):
        device, seen = device_of(target), {}
        for grid, (image, cells, _) in {**GRIDS, "any": (0, 0, 0)}.items():
            bounds = _frozen(window_bounds(image, cells, 0.1)) if image else None
            spans = functools.partial(_spans, bounds, bounds) if image else None
            plan = w.plan(device, getattr(torch, dtype), spans)
            kernels = {"key": (w._key_kernel, plan.key), "value": (w._value_kernel, plan.value)}
            if plan.window:
                kernels["query_window"] = w._query_window_kernel, plan.query
            else:
                kernels["query_blocks"] = w._query_blocks_kernel, plan.query
            for name, (fn, blocks) in kernels.items():
                width = spans(blocks.block_h, blocks.block_w)[1] if name == "query_window" else w.KEY_W
                seen.setdefault((name, fn, blocks, width), []).append(grid)
        for (name, fn, blocks, width), grids in seen.items():
            sizes = dict(BLOCK_H=blocks.block_h, BLOCK_W=blocks.block_w, BLOCK_C=blocks.block_c, STAGES=blocks.stages)
            sizes.update(KEY_H=blocks.block_k // w.KEY_W, KEY_W=w.KEY_W, GROUP=4)
            sizes.update(BLOCK_K=blocks.block_k, SPAN_W=width, PACKED=width <= 16)
            options = dict(num_warps=blocks.warps, num_stages=blocks.stages, enable_fp_fusion=True)
            yield dict(
                triton=triton.__version__,
                target=target,
                dtype=dtype,
                kernel=name,
                tile=f"{blocks.block_h}x{blocks.block_w}",
                block_k=blocks.block_k,
                block_c=blocks.block_c,
                warps=blocks.warps,
                stages=blocks.stages,
                **measure(compile_kernel(fn, sizes, options, target, dtype)),
                bound=device.shared_memory,
                default_for=" ".join(grids),
            )


def main(arguments=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=list(TYPES))
    parser.add_argument("--defaults", action="store_true", help="the forward alone, tiles of the 32, 37, 64 grids")
    parser.add_argument("--backward", action="store_true", help="only the kernels of the backward")
    parser.add_argument("--json", action="store_true", help="print JSON lines and write no table")
    options = parser.parse_args(arguments)
    table = []
    found = () if options.backward else rows(options.targets, options.dtypes, options.defaults)
    if options.backward or not options.defaults:
        found = itertools.chain(found, backward_rows(options.targets, options.dtypes))
    for row in found:
        table.append(row)
        print(json.dumps(row) if options.json else "  ".join(f"{v}" for v in row.values()), flush=True)
    if not options.json:
        path = ROOT / "benchmarks" / "results" / "compiled.csv"
        path.parent.mkdir(exist_ok=True)
        with written_aside(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
