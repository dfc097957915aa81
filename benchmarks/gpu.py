"""Windowed attention and the whole forward on a GPU: first whether they are right, then how fast they are.

    python benchmarks/gpu.py                    # any CUDA machine with torch and triton; nothing else to install
    python benchmarks/gpu.py --tune             # also measure the candidate tiles and write kernels/tuned/<device>.json
    python benchmarks/gpu.py --check            # the correctness sweep alone

The sweep compares every design, dtype and head mode with the twin in float64, with NaN around the inputs, each twice
for equality to the bit, and once captured in a CUDA graph; then every shape to be timed, on sampled pixels. If one
fails, no time is printed. Times are medians of CUDA events around single calls (20th and 80th percentiles beside them)
after a warm-up, with the L2 cache cleared before each call and the caching allocator left alone; peak memory is what a
call allocates beyond its inputs. Rivals run where they fit: the twin, SDPA with a mask, FlexAttention (compiled) with
the same window. The forward is measured whole, captured in a graph, and stage by stage (`gpu_forward.py`). The
backward is compared gradient by gradient and timed alone and with the forward (`gpu_backward.py`). Rows go to
results/gpu.csv with device, versions and commit.
"""

import argparse
import csv
import itertools
import json
import math
import statistics
import sys
import time
from dataclasses import asdict

from checkout import ROOT, commit, use_checkout

use_checkout()
sys.path.insert(0, str(ROOT / "tests" / "support"))

import attention_cases  # noqa: E402
import gpu_backward  # noqa: E402
import gpu_forward  # noqa: E402
import torch  # noqa: E402
from anyup_fast.kernels import tiling  # noqa: E402
from anyup_fast.kernels import windowed_attention as kernel  # noqa: E402
from attention import check, problem  # noqa: E402

from anyup_fast.files import written_aside  # noqa: E402
from anyup_fast.ops import reference, why_not, window_bounds, windowed_attention  # noqa: E402

# Image, cells and channels; the goal for bfloat16 on an H100 in milliseconds.
SHAPES = {"448/32/384": 0.09, "518/37/768": 0.21, "1024/64/768": 1.0, "2048/128/1024": 20.0, "2048/512/1": 100.0}
# What an H100 was measured to do: bytes copied, bfloat16 operations and exponentials per second.
BYTES, FLOPS, EXPS = 3.0e12, 790e12, 3.7e12
LIMIT_S = 480
COLUMNS = (
    "device capability torch triton cuda commit shape dtype what milliseconds p20 p80 peak_mib gb_per_s floor_ms "
    "share_of_floor goal_ms tile note"
).split()


def unable():
    """Why nothing can be measured here: a sentence, or None."""
    if not torch.cuda.is_available():
        return "needs a GPU that torch.cuda.is_available() sees, found none"
    return why_not("triton", "cuda", torch.bfloat16)


def power_of_two(n):
    """The least power of two that is at least 16 and `n`."""
    return 2 ** max(4, math.ceil(math.log2(n)))


def floor_ms(shape, out_bytes=2, in_bytes=2):
    """Milliseconds an H100 needs at least for "image/grid/channels": output bytes, products, exponentials."""
    image, grid, channels = map(int, shape.split("/"))
    keys = window_bounds(image, grid, 0.1).diff(dim=1).double().mean().item() ** 2
    pixels = image * image
    moved = pixels * (128 * in_bytes + channels * out_bytes) + grid * grid * (128 + channels) * in_bytes
    passes = 1 if channels < 64 or keys <= 256 else 2
    return 1e3 * max(
        moved / BYTES, pixels * keys * 2 * (128 * passes + channels) / FLOPS, pixels * keys * 4 * passes / EXPS
    )


def sweep(count, device, longest=50):
    """Run the correctness sweep on `device` (a torch.device); list of sentences about what failed."""
    started, failed = time.perf_counter(), []

    def judge(case, tile=None):
        there = case.to(device)
        out, again = (
            kernel.windowed_attention_fwd(*there.tensors, scale=case.scale, head_mode=case.head_mode, tile=tile)
            for _ in range(2)
        )
        error, limit = case.error(out), attention_cases.TOLERANCE[case.value.dtype]
        if not error <= limit:
            failed.append(f"{case.text} {tile}: error {error:.2e} exceeds {limit:.1e}")
        elif not torch.equal(out, again):
            failed.append(f"{case.text} {tile}: two runs differ")

    for index in range(count):
        case = attention_cases.draw(index, longest=longest)
        judge(case)
        judge(case, tiling.Tile("two_pass", 8, 8, 16, 32, 4, stats_block_k=16))
        if case.value.shape[3] < 64:
            judge(case, tiling.Tile("heads", 8, 8, 16, power_of_two(case.value.shape[3] + 1), 4))
    for dtype in attention_cases.DTYPES.values():
        for tile in tiling.candidates(dtype):
            channels = 12 if tile.design == "heads" else 4 * (tile.block_c // 4 + 3)
            if tile.needs <= tiling.Device.of(device).capability:
                judge(attention_cases.make(1, dtype, (longest - 3, longest), (7, 8), channels, head_dim=32), tile)
    if device.type == "cuda":
        failed += _graph_faults(device)
    print(f"correctness: {count} problems, every tile, {len(failed)} failed, {time.perf_counter() - started:.0f} s")
    return failed


def _graph_faults(device):
    arguments = problem("96/12/40", dtype=torch.bfloat16, device=device)
    expected = kernel.windowed_attention_fwd(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel.windowed_attention_fwd(*arguments)
    graph.replay()
    torch.cuda.synchronize()
    return [] if torch.equal(out, expected) else ["a captured graph gives another result"]


def timed(call, seconds=1.0, most=30):
    """(20th, 50th, 80th percentile in ms, peak bytes) of `call`, each time with a cold L2 cache."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del out
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    times, deadline = [], time.perf_counter() + seconds
    while len(times) < 5 or (len(times) < most and time.perf_counter() < deadline):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    times.sort()
    return times[len(times) // 5], statistics.median(times), times[-1 - len(times) // 5], peak


def _mask(arguments):
    query, key, _, rows, cols = arguments
    seen = reference.inside(rows, key.shape[1])[:, None, :, None] & reference.inside(cols, key.shape[2])[:, None]
    return seen.reshape(query.shape[1] * query.shape[2], -1).to(query.device)


def sdpa(arguments):
    """The same result by scaled_dot_product_attention per head with a boolean mask, then the mean over the heads."""
    query, key, value, *_ = arguments
    mask = _mask(arguments)
    q, k = (x.flatten(1, 2).transpose(1, 2) for x in (query, key))
    v = value.flatten(1, 2)[:, None].expand(-1, q.shape[1], -1, -1)

    def call():
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.mean(1).unflatten(1, query.shape[1:3])

    return call


def flex(arguments):
    """The same by FlexAttention, compiled, with the window as its block mask, then the mean over the heads."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, key, value, rows, cols = arguments
    width, w = query.shape[2], key.shape[2]
    rows, cols = rows.to(query.device), cols.to(query.device)

    def seen(batch, head, pixel, token):
        i, j, r, c = pixel // width, pixel % width, token // w, token % w
        return (r >= rows[i, 0]) & (r < rows[i, 1]) & (c >= cols[j, 0]) & (c < cols[j, 1])

    q, k = (x.flatten(1, 2).transpose(1, 2) for x in (query, key))
    v = value.flatten(1, 2)[:, None].expand(-1, q.shape[1], -1, -1)
    block_mask = torch.compile(create_block_mask)(seen, None, None, q.shape[2], k.shape[2], device=query.device.type)
    run = torch.compile(flex_attention)

    def call():
        return run(q, k, v, block_mask=block_mask).mean(1).unflatten(1, query.shape[1:3])

    return call


def rivals(shape, arguments):
    """Name to (factory, GiB it needs, why it can't do this shape) of what else computes the same."""
    image, grid, channels = map(int, shape.split("/"))
    pairs, pixels = image * image * grid * grid / 2**30, image * image / 2**30
    return {
        "torch": (lambda: lambda: windowed_attention(*arguments, backend="torch"), 1, None),
        "reference": (lambda: lambda: windowed_attention(*arguments, backend="reference"), 60 * pairs, None),
        "sdpa": (lambda: sdpa(arguments), 3 * pairs + 16 * pixels * max(channels, 32), None),
        "flex": (
            lambda: flex(arguments),
            24 * pixels * max(channels, 32),
            "FlexAttention needs at least 16 channels" if channels < 16 else None,
        ),
    }


def measure(shape, dtype, started, tune=False, device="cuda"):
    """Yield rows (dicts) for one shape: ours, then candidate tiles, or what else fits into memory and time.

    Raises:
        RuntimeError: a result is wrong; nothing was timed then.
    """
    kernel_call = kernel.windowed_attention_fwd
    arguments = problem(shape, dtype=dtype, device=device)
    image, grid, channels = map(int, shape.split("/"))
    size = arguments[2].element_size()
    moved = (image * image + grid * grid) * (128 + channels) * size
    floor = floor_ms(shape, size, size)
    constant = dict(shape=shape, dtype=str(dtype).removeprefix("torch."), floor_ms=floor)
    if dtype == torch.bfloat16:
        constant["goal_ms"] = SHAPES.get(shape, "")

    def row(what, call, tile=None, note=""):
        p20, middle, p80, peak = timed(call)
        figures = dict(milliseconds=middle, p20=p20, p80=p80, peak_mib=peak / 2**20, gb_per_s=moved / middle / 1e6)
        text = "" if tile is None else json.dumps(asdict(tile))
        return dict(constant, **figures, what=what, share_of_floor=floor / middle, tile=text, note=note)

    error = checked(arguments, kernel_call(*arguments))
    yield row("triton", lambda: kernel_call(*arguments), note=f"error {error:.1e}")
    if tune:
        for tile in tuning_tiles(dtype, channels, arguments[3:]):
            if time.perf_counter() - started > 4 * LIMIT_S:
                yield dict(constant, what="tile", note="the remaining ones left out: the time was up")
                return
            room = tiling.Device.of(torch.device(device)).shared_memory
            if tile.shared_memory(size) <= room:
                checked(arguments, kernel_call(*arguments, tile=tile))
                yield row("tile", lambda tile=tile: kernel_call(*arguments, tile=tile), tile)
    elif dtype == torch.bfloat16:
        for name, (factory, needs, reason) in rivals(shape, arguments).items():
            free = torch.cuda.mem_get_info()[0] / 2**30
            if reason is None and needs > 0.9 * free:
                reason = f"needs about {needs:.0f} GiB, {free:.0f} are free"
            if reason is None and time.perf_counter() - started > 0.75 * LIMIT_S:
                reason = "left out: the time was up"
            yield dict(constant, what=name, note=reason) if reason else rival(name, factory, row, constant)


def rival(name, factory, row, constant):
    """The row of a rival; one that raises gets its error in place of a time."""
    try:
        return row(name, factory())
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return dict(constant, what=name, note=f"raised {type(error).__name__}: {' '.join(str(error).split())[:80]}")


def tuning_tiles(dtype, channels, bounds):
    """The tiles that --tune tries for one problem."""
    windows = [kernel._frozen(b) for b in bounds]
    tiles = []
    for (block_h, block_w), warps, stages in itertools.product(((8, 8), (8, 16), (16, 16)), (4, 8), (2, 3)):
        rows, cols = kernel._spans(*windows, block_h, block_w)
        keys, width = power_of_two(rows * cols), power_of_two(cols)
        shape = block_h, block_w
        if block_h * block_w * keys <= 4096 * warps and keys <= 256:
            tiles += [tiling.Tile("window", *shape, keys, c, warps, stages) for c in (32, 64, 128)]
        if keys > 128 and channels < 64:
            block_c = power_of_two(channels + 1)
            tiles += [tiling.Tile("heads", *shape, k, block_c, warps, stages) for k in (32, 64, 128) if k <= width]
        elif keys > 128 and block_h * block_w < 256:
            tiles += [
                tiling.Tile("two_pass", *shape, k, c, warps, stages, stats_block_k=min(width, 64))
                for k, c in ((16, 32), (16, 64), (32, 64), (16, 256), (32, 128), (32, 256), (32, 512))
                if (c <= 64) == (dtype == torch.float32)
            ]
    return [tile for tile in tiles if dtype != torch.float32 or tile.block_c <= 64]


def checked(arguments, out):
    """Error of `out` on sampled rows against the twin; RuntimeError beyond the tolerance of its dtype."""
    error, limit = check(arguments, out, rows=2, columns=16), attention_cases.TOLERANCE[out.dtype]
    if not error <= limit:
        raise RuntimeError(f"wrong by {error:.2e}, allowed are {limit:.1e}: nothing is timed")
    return error


def table(rows):
    """Text of the rows, aligned."""
    heads = ("shape", "dtype", "what", "milliseconds", "peak_mib", "gb_per_s", "floor_ms", "goal_ms", "note")
    lines = [heads]
    for row in rows:
        lines.append([f"{v:.3f}" if isinstance(v := row.get(name, ""), float) else str(v) for name in heads])
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join("  ".join(cell.rjust(n) for cell, n in zip(line, widths, strict=True)) for line in lines)


def save_csv(path, rows):
    """Append to the CSV at `path`, made anew aside and renamed."""
    old = []
    if path.is_file():
        with open(path, newline="", encoding="utf-8") as file:
            old = list(csv.DictReader(file))
    with written_aside(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([*old, *rows])


def save_tuned(rows, name):
    """Write the fastest tile of each problem for the device `name`, beside those of other problems there."""
    best = {(e["dtype"], e["keys"], e["channels"]): e for e in tiling.load_tuned(name)}
    measured = [row for row in rows if row["what"] == "tile" and "milliseconds" in row]
    for row in sorted(measured, key=lambda row: -row["milliseconds"]):
        image, grid, channels = map(int, row["shape"].split("/"))
        keys = int(window_bounds(image, grid, 0.1).diff(dim=1).max()) ** 2
        best[row["dtype"], keys, channels] = dict(
            dtype=row["dtype"],
            keys=keys,
            channels=channels,
            milliseconds=row["milliseconds"],
            tile=tiling.Tile(**json.loads(row["tile"])),
        )
    path = tiling.tuned_path(name)
    with written_aside(path) as aside:
        aside.write_text(tiling.dump_tuned(name, list(best.values())), encoding="utf-8")
    tiling.load_tuned.cache_clear()
    return path


def main(arguments=None):
    """Command line; returns 2 where there is nothing to measure on and 1 where a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="the correctness sweep alone")
    parser.add_argument("--tune", action="store_true", help="measure tiles and write the fastest down")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=list(attention_cases.DTYPES))
    parser.add_argument("--count", type=int, default=16, help="problems in the sweep")
    options = parser.parse_args(arguments)
    if reason := unable():
        print(f"nothing to measure on: {reason}", file=sys.stderr)
        return 2
    import triton

    torch.backends.cuda.matmul.allow_tf32 = False
    started = time.perf_counter()
    device = torch.device("cuda")
    failed = sweep(options.count, device) or gpu_forward.sweep(device) or gpu_backward.sweep(options.count, device)
    if failed:
        print("\n".join(failed), file=sys.stderr)
        return 1
    if options.check:
        return 0
    constant = dict(
        device=torch.cuda.get_device_name(),
        capability="{}.{}".format(*torch.cuda.get_device_capability()),
        torch=torch.__version__,
        triton=triton.__version__,
        cuda=torch.version.cuda or torch.version.hip,
        commit=commit(),
    )
    problems = [(shape, attention_cases.DTYPES[dtype]) for dtype in options.dtypes for shape in options.shapes]
    for shape, dtype in problems:
        arguments = problem(shape, dtype=dtype, device="cuda")
        checked(arguments, kernel.windowed_attention_fwd(*arguments))
    del arguments
    rows = []
    for shape, dtype in problems:
        for row in measure(shape, dtype, started, options.tune):
            rows.append(row)
            print(row["shape"], row["dtype"], row["what"], row.get("milliseconds", "-"), row["note"], flush=True)
        torch.cuda.empty_cache()
        if shape in gpu_backward.SHAPES and not options.tune:
            for row in gpu_backward.measure(shape, dtype, timed):
                rows.append(row)
                print(row["shape"], row["dtype"], row["what"], row["milliseconds"], row["note"], flush=True)
            torch.cuda.empty_cache()
        if shape in gpu_forward.GOALS_MS and not options.tune:
            for row in gpu_forward.measure(shape, dtype, timed):
                rows.append(row)
                print(row["shape"], row["dtype"], row["what"], row["milliseconds"], row["note"], flush=True)
            torch.cuda.empty_cache()
    save_csv(ROOT / "benchmarks" / "results" / "gpu.csv", [{**constant, **row} for row in rows])
    if options.tune:
        print(f"tiles written to {save_tuned(rows, constant['device'])}")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
