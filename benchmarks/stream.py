"""A picture that is never held: a linear head on features of 384 channels, streamed to disk.

    python benchmarks/stream.py                              # 1000, 3000 and 6000 pixels a side; about half an hour
    python benchmarks/stream.py --sides 500 1000 --json

Every size runs in a process of its own: a synthetic uint8 picture is written to disk and read by rows, nine times for
the statistics and keys and once for the output, whose logits go to an .npy file tile by tile. Memory is the most that
was ever resident in the process, interpreter and PyTorch included; `beyond` leaves out what was resident before the
picture was prepared (interpreter, PyTorch, weights and low-res features). The features have a grid of `--grid` cells
whatever the size of the picture, so that memory that grows with the picture would show; 0 means one cell per 14
pixels. The output is compared with `Prepared.at` on sampled pixels.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from checkout import commit, use_checkout

use_checkout()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from attention import resident  # noqa: E402

import anyup_fast  # noqa: E402

TOLERANCE = 1e-5
SAMPLES = 200


class Raw:
    """Rows of an uint8 picture in a plain file, (H, W, 3)."""

    def __init__(self, path, side):
        self.path, self.shape, self.dtype = path, (side, side, 3), np.dtype(np.uint8)

    def __getitem__(self, rows):
        first, last, _ = rows.indices(self.shape[0])
        per_row = self.shape[1] * 3
        values = np.fromfile(self.path, np.uint8, (last - first) * per_row, offset=first * per_row)
        return values.reshape(last - first, *self.shape[1:])


def draw(path, side, seed=0):
    """Write a picture of coloured blocks and noise, a hundred rows at a time."""
    rng = np.random.default_rng(seed)
    with open(path, "wb") as file:
        for first in range(0, side, 100):
            rows = min(100, side - first)
            blocks = rng.integers(0, 200, (1, -(-side // 50), 3)).repeat(50, 1)[:, :side]
            (blocks + rng.integers(0, 56, (rows, side, 3))).astype(np.uint8).tofile(file)


def run(side, grid, channels, classes, tile):
    """Stream one picture: seconds, memory, error."""
    torch.set_grad_enabled(False)
    generator = torch.Generator().manual_seed(0)
    cells = grid or -(-side // 14)
    features = torch.randn(1, channels, cells, cells, generator=generator)
    head = torch.randn(classes, channels, generator=generator)
    model = anyup_fast.AnyUp.from_pretrained()
    with tempfile.TemporaryDirectory() as folder:
        picture = Raw(Path(folder, "picture.raw"), side)
        draw(picture.path, side)
        before = resident()
        start = time.perf_counter()
        prepared = model.prepare(picture, features).head(head)
        prepared.region(0, 0, 1, 1)
        statistics = time.perf_counter() - start
        path = prepared.stream(tile, out=Path(folder, "logits.npy"))
        seconds = time.perf_counter() - start
        peak = resident()
        points = torch.randint(side, (SAMPLES, 2), generator=generator)
        out = np.load(path, mmap_mode="r")
        streamed = torch.from_numpy(out[0][:, points[:, 0], points[:, 1]].T)
        exact = prepared.at(points)[0]
        error = ((streamed - exact).norm() / exact.norm()).item()
    if not error <= TOLERANCE:
        raise SystemExit(f"{side}: error {error:.1e} exceeds {TOLERANCE:.0e}")
    row = dict(side=side, cells=cells, seconds=seconds, statistics_s=statistics, peak_gib=peak / 2**30)
    return row | dict(beyond_gib=(peak - before) / 2**30, us_per_pixel=1e6 * seconds / side**2, error=error)


def main(arguments=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[1000, 3000, 6000])
    parser.add_argument("--grid", type=int, default=128, help="low-res cells a side (default: 128; 0: side / 14)")
    parser.add_argument("--channels", type=int, default=384)
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--tile", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="one JSON object, nothing else")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(run(options.sides[0], options.grid, options.channels, options.classes, options.tile)))
        return 0
    report = dict(commit=commit(), torch=torch.__version__, threads=options.threads, results=[])
    for side in options.sides:
        command = [sys.executable, __file__, "--one", "--sides", side]
        for name in ("grid", "channels", "classes", "tile", "threads"):
            command += [f"--{name}", getattr(options, name)]
        result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"{side}: {result.stderr[-500:]}")
        row = json.loads(result.stdout)
        report["results"].append(row)
        if not options.json:
            print(
                f"{side} px, {row['cells']} cells: {row['seconds']:.1f} s ({row['statistics_s']:.1f} s statistics), "
                f"{row['us_per_pixel']:.2f} us a pixel, peak {row['peak_gib']:.2f} GiB, {row['beyond_gib']:.2f} beyond "
                f"the features, error {row['error']:.1e}",
                flush=True,
            )
    if options.json:
        print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
