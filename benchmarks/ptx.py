"""Executes the compiled kernels for GPUs that are not there, on a machine for PTX, and tables what came of it.

    python benchmarks/ptx.py                          # one or two problems per kernel and tile
    python benchmarks/ptx.py --every --dtypes bfloat16 float16 float32      # all problems, also with sums cut off

into results/ptx.csv. One row per kernel, tile, target and dtype: the error against float64 that comes closest to its
limit, that limit, and the numbers of faults found: of memory (memcheck), of order (racecheck), and of copies of one
number that are rounded in several ways and stored to one address (equal_address). The machine is tests/support/ptx.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from checkout import ROOT, use_checkout

use_checkout()

from anyup_fast.files import written_aside  # noqa: E402

TARGETS = "sm_80", "sm_86", "sm_89", "sm_90"
CHILD = "from checkout import use_checkout; use_checkout(); from ptx.project import main; main()"
COLUMNS = ("kernel", "tile", "target", "dtype", "problems", "launches", "error", "limit", "memcheck", "racecheck",
           "equal_address")  # fmt: skip


def measured(target, dtypes, every, kernels):
    """The rows of all problems of a target, from a process in which Triton compiles; each is printed as it comes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [ROOT / "tests" / "support", ROOT / "benchmarks", *filter(None, [environment.get("PYTHONPATH")])]
    environment.update(PYTHONPATH=os.pathsep.join(map(str, paths)), OMP_NUM_THREADS="1")
    command = [sys.executable, "-c", CHILD, target, "--dtypes", *dtypes, "--every" if every else "--small"]
    command += ["--kernels", *kernels] if kernels else []
    rows = []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            row = json.loads(line)
            rows.append(row)
            text = f"{target} {row['name']}: error {row['error']:.1e}, limit {row['limit']:.1e}, {row['seconds']:.1f} s"
            print("\n    ".join([text, *complaints(row)]), flush=True)
    if process.returncode:
        raise RuntimeError(f"{target}: the process that executes failed with {process.returncode}")
    return rows


def complaints(row):
    """Sentences about what is wrong with a problem's row."""
    found = [*row["faults"], *([row["failed"]] if row["failed"] else [])]
    return found or ([] if row["error"] <= row["limit"] else ["beyond the limit"])


def table(rows):
    """One row per kernel, tile, target and dtype of the rows of problems."""
    found = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in COLUMNS[:4]), []).append(row)
    for key, some in found.items():
        worst = max(some, key=lambda row: row["error"] / row["limit"])
        counts = {name: sum(row[name] for row in some) for name in ("launches", *COLUMNS[-3:])}
        figures = dict(error=f"{worst['error']:.2e}", limit=worst["limit"])
        yield {**dict(zip(COLUMNS[:4], key, strict=True)), "problems": len(some), **counts, **figures}


def replaced(path, made):
    """The rows of a table with those of `made` in the places of the former ones."""
    anew = {tuple(row[name] for name in COLUMNS[:4]): row for row in made}
    with open(path, newline="", encoding="utf-8") as file:
        return [anew.pop(tuple(row[name] for name in COLUMNS[:4]), row) for row in csv.DictReader(file)] + [
            *anew.values()
        ]


def main(arguments=None):
    """Command line; 1 where a row is beyond its limit or has a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--every", action="store_true", help="all problems, in place of the small ones")
    parser.add_argument("--kernels", nargs="+", help="only problems whose names begin so; other rows of the table stay")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="targets at a time")
    options = parser.parse_args(arguments)
    with ThreadPoolExecutor(options.jobs) as pool:
        found = pool.map(
            lambda target: measured(target, options.dtypes, options.every, options.kernels), options.targets
        )
        rows = [row for some in found for row in some]
    path, made = ROOT / "benchmarks" / "results" / "ptx.csv", list(table(rows))
    if options.kernels:
        made = replaced(path, made)
    with written_aside(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(made)
    return int(any(map(complaints, rows)))


if __name__ == "__main__":
    sys.exit(main())
