"""Windowed attention on the CPU: the back end "torch" against the twin, which builds the whole attention.

    python benchmarks/attention.py                    # 224/16/384, 448/32/384, 518/37/384; the last needs 14 GiB
    python benchmarks/attention.py --shapes 224/16/384 --repeats 5 --json
    python benchmarks/attention.py --strip            # 256 rows of 2048/512/1, and the whole with --strip 2048

Both run in one process in turns, after one unmeasured turn each; the ratio is that of the medians, with the 20th and
80th percentiles of the times beside it. Peak memory comes from one process per back end that runs it once: the most
resident memory during the call less that before it, output included. The answer is compared before anything is timed.
"""

import argparse
import json
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from checkout import commit, use_checkout

use_checkout()

import torch  # noqa: E402

from anyup_fast.ops import reference, window_bounds, windowed_attention  # noqa: E402

SHAPES = ("224/16/384", "448/32/384", "518/37/384")
TOLERANCE = 5e-6


def problem(shape, rows=None, dtype=torch.float32, device="cpu"):
    """Arguments of `windowed_attention` for "image/grid/channels": 4 heads of 32, ratio 0.1, `rows` of the output."""
    image, grid, channels = map(int, shape.split("/"))
    generator = torch.Generator().manual_seed(0)
    bounds = window_bounds(image, grid, 0.1)
    first = 0 if rows is None else (image - rows) // 2
    chosen = bounds[first : first + (rows or image)]
    shapes = (1, len(chosen), image, 4, 32), (1, grid, grid, 4, 32), (1, grid, grid, channels)
    tensors = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
    return (*tensors, chosen, bounds)


def check(arguments, out, rows=8, columns=64):
    """Largest difference of `out` from the twin in float64 on sampled rows and columns, over the largest |value|."""
    query, key, value, row_bounds, col_bounds = arguments
    generator = torch.Generator().manual_seed(1)
    i = torch.randperm(query.shape[1], generator=generator)[:rows].sort().values
    j = torch.randperm(query.shape[2], generator=generator)[:columns].sort().values
    worst = 0.0
    for row in i:
        sample = query[:, row : row + 1][:, :, j.to(query.device)].double()
        expected = reference.windowed_attention(
            sample, key.double(), value.double(), row_bounds[row : row + 1], col_bounds[j]
        )
        difference = out[:, row : row + 1][:, :, j.to(out.device)].double() - expected
        worst = max(worst, (difference.abs().max() / value.abs().max()).item())
    return worst


def percentiles(times):
    """20th, 50th and 80th percentile of at least one time."""
    times = sorted(times)
    low, high = (times[round(share * (len(times) - 1))] for share in (0.2, 0.8))
    return low, statistics.median(times), high


def peak(shape, backend, rows=None):
    """Peak of resident memory, in GiB, that one call in a fresh process adds to what was there before."""
    command = [sys.executable, __file__, "--peak", backend, "--shapes", shape, "--rows", str(rows or 0)]
    command += ["--threads", str(torch.get_num_threads())]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"measuring the memory of {backend} at {shape} failed: {result.stderr[-500:]}")
    return float(result.stdout)


def _print_peak(shape, backend, rows):
    windowed_attention(*problem("16/4/8"), backend=backend)
    arguments = problem(shape, rows or None)
    before = resident(reset=True)
    out = windowed_attention(*arguments, backend=backend)
    after = resident()
    del out
    print((after - before) / 2**30)


def resident(reset=False):
    """Most bytes ever resident in this process; `reset` makes that what is resident now, where the system can."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="ascii"))[1]) * 1024


def compare(shape, repeats, memory):
    """One row: error, times of both back ends in turns, their ratio, and the peaks."""
    arguments = problem(shape)
    times = {"torch": [], "reference": []}
    error = check(arguments, windowed_attention(*arguments, backend="torch"))
    if not error <= TOLERANCE:
        raise SystemExit(f"{shape}: error {error:.2e} exceeds {TOLERANCE:.0e}, nothing was timed")
    for turn in range(repeats + 1):
        for backend, measured in times.items():
            start = time.perf_counter()
            windowed_attention(*arguments, backend=backend)
            if turn:
                measured.append(time.perf_counter() - start)
    row = dict(
        shape=shape, error=error, ratio=statistics.median(times["reference"]) / statistics.median(times["torch"])
    )
    for backend, measured in times.items():
        low, middle, high = percentiles(measured)
        row[backend] = dict(seconds=middle, p20=low, p80=high)
        if memory:
            row[backend]["peak_gib"] = peak(shape, backend)
    row["ratio"] = row["reference"]["seconds"] / row["torch"]["seconds"]
    return row


def strip(rows):
    """`rows` rows of the picture 2048x2048 from 512x512 features of one channel, through "torch" alone."""
    shape = "2048/512/1"
    arguments = problem(shape, rows)
    start = time.perf_counter()
    out = windowed_attention(*arguments, backend="torch")
    seconds = time.perf_counter() - start
    error = check(arguments, out, rows=4, columns=16)
    return dict(shape=shape, rows=rows, error=error, seconds=seconds, peak_gib=peak(shape, "torch", rows))


def print_results(jobs, line, threads, as_json):
    """Run the jobs and print the row of each by `line` as it is there; or, in the end, one JSON object with all."""
    machine = platform.processor() or platform.machine()
    report = dict(commit=commit(), torch=torch.__version__, machine=machine, threads=threads, results=[])
    if not as_json:
        print(f"{machine}, {threads} threads, torch {report['torch']}, commit {report['commit']}")
    for job in jobs:
        row = job()
        report["results"].append(row)
        if not as_json:
            print(line(row), flush=True)
    if as_json:
        print(json.dumps(report))


def main(arguments=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu"], help="GPUs are measured by gpu.py")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="IMAGE/GRID/CHANNELS")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--strip", type=int, nargs="?", const=256, metavar="ROWS", help="only that, for 2048/512/1")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--json", action="store_true", help="one JSON object, nothing else")
    parser.add_argument("--peak", choices=["torch", "reference"], help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats: need at least 1, got {options.repeats}")
    torch.set_num_threads(options.threads)
    if options.peak:
        _print_peak(options.shapes[0], options.peak, options.rows)
        return 0
    jobs = [lambda: strip(options.strip)] if options.strip else []
    if not jobs:
        jobs = [lambda s=s: compare(s, options.repeats, not options.no_memory) for s in options.shapes]
    print_results(jobs, _line, options.threads, options.json)
    return 0


def _line(row):
    if "rows" in row:
        return (
            f"{row['shape']}, {row['rows']} rows: {row['seconds']:.1f} s, {row['peak_gib']:.2f} GiB, "
            f"error {row['error']:.1e}"
        )
    parts = [f"{row['shape']}: {row['ratio']:.1f}x, error {row['error']:.1e}"]
    for name in ("torch", "reference"):
        part = row[name]
        memory = f", {part['peak_gib']:.2f} GiB" if "peak_gib" in part else ""
        parts.append(f"{name} {part['seconds']:.3f} s ({part['p20']:.3f} to {part['p80']:.3f}){memory}")
    return "; ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
