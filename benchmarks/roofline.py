"""What the whole forward has to move and compute, stage by stage, and the time a device needs for that at least.

    python benchmarks/roofline.py                                    # five shapes, bfloat16, an H100
    python benchmarks/roofline.py --shapes 448/32/384 --dtype float32 --device cpu
    python benchmarks/roofline.py --bytes-per-s 2e12 --flops 300e12 --exps 2e12

A shape is image/grid/channels, all square, batch 1, output as large as the image. Counted is the plan with stored
layers: every fused layer reads and writes images of 128 channels in the dtype once, and nothing else.

bytes   what a stage reads and writes of tensors of the size of the image, the output or the grid, each once: no
        weights, no statistics, no second reading by neighbouring programs.
flops   two per multiply-add of the products: no norms, activations, rotary embedding or pooling.
exps    exponentials: one per SiLU, one per head, key and pixel of the attention (twice where it takes two passes), one
        per response of feature unification. Reciprocals, sines and cosines are left out.

A stage takes at least as long as the largest of the three, each at the full rate of the device; the total is the sum,
since a stage waits for the statistics of the one before. Feature unification computes in float32 whatever the dtype,
and its products are charged at the rate of the dtype all the same. In float32 an H100 is charged three products in
TF32, at half the rate of bfloat16, for each: derived, not measured. The design's floors stand beside the totals of
their shapes; they count the bytes of the layers and the attention alone, so a total exceeds its floor by what the
products of the 3x3 convolution, feature unification and the keys take.
"""

import argparse
import sys
from typing import NamedTuple

from checkout import use_checkout

use_checkout()

from anyup_fast.ops import window_bounds  # noqa: E402

DIM, HEADS, FILTERS, TAPS, RATIO = 128, 4, 128, 25, 0.1
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
# Bytes, operations and exponentials per second. H100: measured on one, but for float32. CPU: two cores of an AMD EPYC
# server, products while idle, bytes and exponentials (torch, float32) with other work beside them.
DEVICES = {
    "h100": dict(bytes_per_s=3.0e12, flops={2: 790e12, 4: 790e12 / 6}, exps=3.7e12),
    "cpu": dict(bytes_per_s=14e9, flops={2: 140e9, 4: 140e9}, exps=0.88e9),
}
# The design's floors of the whole forward with stored layers, in milliseconds, bfloat16 on an H100.
DESIGN_MS = {"448/32/384": 0.58, "518/37/768": 0.85, "1024/64/768": 3.3, "2048/128/1024": 20.0, "2048/512/1": 60.0}


class Stage(NamedTuple):
    """One step of the forward: bytes moved, operations and exponentials (see the module)."""

    name: str
    bytes: float
    flops: float
    exps: float

    def times(self, bytes_per_s, flops, exps):
        """Seconds for bytes, operations and exponentials at these rates, by name; the largest is the floor."""
        return {"bytes": self.bytes / bytes_per_s, "flops": self.flops / flops, "exps": self.exps / exps}


def parse(shape):
    """Three positive integers from "image/grid/channels"; ValueError for anything else."""
    parts = shape.split("/")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"shape: need image/grid/channels like 448/32/384, got {shape!r}")
    return tuple(map(int, parts))


def element_size(dtype):
    """Bytes of a dtype given by name ("bfloat16") or as a torch.dtype; ValueError for one that is not counted."""
    name = str(dtype).removeprefix("torch.")
    if name not in SIZES:
        raise ValueError(f"dtype: need one of {', '.join(SIZES)}, got {name!r}")
    return SIZES[name]


def stages(shape, dtype="bfloat16"):
    """The stages of one forward in their order, a pure function.

    Args:
        shape: "image/grid/channels".
        dtype: of image, features, stored layers and output: one of `SIZES`, by name or as a torch.dtype.

    Returns:
        list of `Stage`.

    Raises:
        ValueError: another shape or dtype.
    """
    image, grid, channels = parse(shape)
    size = element_size(dtype)
    pixels, cells = image**2, grid**2
    layer, product, rgb = pixels * DIM * size, 2 * pixels * DIM**2, pixels * 3 * size
    keys = window_bounds(image, grid, RATIO).diff(dim=1).double().mean().item() ** 2
    passes = 1 if channels < 64 or keys <= 256 else 2
    from_rgb = 2 * pixels * DIM * 3
    silu = pixels * DIM

    def block(name):
        return [
            Stage(f"{name} in", 2 * layer, product, silu),
            Stage(f"{name} out", 3 * layer, product, silu),
        ]

    low, low_product = cells * DIM, 2 * cells * DIM**2
    return [
        Stage("image moments", rgb, 2 * pixels * (3 + 9), 0),
        Stage("image block 1 in", rgb + layer, from_rgb + product, silu),
        Stage("image block 1 out", rgb + 2 * layer, from_rgb + product, silu),
        Stage("image block 2 in", 2 * layer, product, silu),
        Stage("image block 2 out, rotary, first of query and key", 4 * layer, 3 * product, silu),
        *block("query block 1"),
        *block("query block 2"),
        *block("key block 1"),
        Stage("key block 2 in", 2 * layer, product, silu),
        Stage("pooling of the keys", 2 * layer + 2 * low * size, 0, silu),
        Stage(
            "feature unification",
            cells * channels * size + cells * FILTERS * 4,
            2 * cells * channels * FILTERS * TAPS,
            cells * channels * FILTERS,
        ),
        # Last of the key branch; two blocks on the features; merge of both, 3x3; two blocks; norm and projection.
        Stage(
            "keys at low resolution", (3 + 10 + 3 + 10 + 2) * low * size, (1 + 5 + 18 + 4 + 1) * low_product, 8 * low
        ),
        Stage("3x3 convolution, norm and projection", 2 * layer, (9 + 1) * product, 0),
        Stage(
            "attention",
            layer + pixels * channels * size + cells * (DIM + channels) * size,
            2 * pixels * keys * (DIM * passes + channels),
            pixels * keys * HEADS * passes,
        ),
    ]


def peak_bytes(shape, dtype="bfloat16"):
    """Expected peak of memory beyond the inputs: four images of 128 channels, or one and the output."""
    image, _, channels = parse(shape)
    layer = image**2 * DIM * element_size(dtype)
    return max(4 * layer, layer + image**2 * channels * element_size(dtype))


def floor_s(shape, dtype="bfloat16", *, bytes_per_s=None, flops=None, exps=None, device="h100"):
    """Least seconds of the whole forward on a device of `DEVICES`, whose rates the arguments replace."""
    rates = rates_of(device, dtype, bytes_per_s, flops, exps)
    return sum(max(stage.times(*rates).values()) for stage in stages(shape, dtype))


def rates_of(device, dtype, bytes_per_s=None, flops=None, exps=None):
    """(bytes, operations, exponentials) per second of a device for `dtype`, each replaced where one is given."""
    figures = DEVICES[device]
    return (
        bytes_per_s or figures["bytes_per_s"],
        flops or figures["flops"][element_size(dtype)],
        exps or figures["exps"],
    )


def report(shape, dtype, rates, compare):
    """Table of one shape as text; `compare`: whether the design's floor applies to these rates."""
    rows = [("stage", "MB", "GFLOP", "Gexp", "ms", "bound by")]
    total, sums = 0.0, [0.0, 0.0, 0.0]
    for stage in stages(shape, dtype):
        times = stage.times(*rates)
        bound = max(times, key=times.get)
        total += times[bound]
        sums = [a + b for a, b in zip(sums, stage[1:], strict=True)]
        rows.append((stage.name, *_scaled(stage[1:]), f"{1e3 * times[bound]:.4g}", bound))
    note = f"design {DESIGN_MS[shape]:g}" if compare and shape in DESIGN_MS else ""
    rows.append(("total", *_scaled(sums), f"{1e3 * total:.4g}", note))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [f"{shape} {dtype}: peak {peak_bytes(shape, dtype) / 2**30:.3g} GiB beyond the inputs"]
    for row in rows:
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join((row[0].ljust(widths[0]), *cells)).rstrip())
    return "\n".join(lines)


def _scaled(figures):
    return [f"{figure / scale:.4g}" for figure, scale in zip(figures, (1e6, 1e9, 1e9), strict=True)]


def main(arguments=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(DESIGN_MS), metavar="IMAGE/GRID/CHANNELS")
    parser.add_argument("--dtype", default="bfloat16", choices=list(SIZES))
    parser.add_argument("--device", default="h100", choices=list(DEVICES), help="whose rates are taken")
    parser.add_argument("--bytes-per-s", type=float, help="bytes read and written per second")
    parser.add_argument("--flops", type=float, help="operations per second of products in the dtype")
    parser.add_argument("--exps", type=float, help="exponentials per second")
    options = parser.parse_args(arguments)
    given = options.bytes_per_s, options.flops, options.exps
    if any(rate is not None and rate <= 0 for rate in given):
        parser.error("rates have to be positive")
    rates = rates_of(options.device, options.dtype, *given)
    compare = (options.dtype, options.device, given) == ("bfloat16", "h100", (None, None, None))
    try:
        tables = [report(shape, options.dtype, rates, compare) for shape in options.shapes]
    except ValueError as error:
        parser.error(str(error))
    print("\n\n".join(tables))
    return 0


if __name__ == "__main__":
    sys.exit(main())
