"""The kernels of the guidance network compiled for GPUs that are not there: spills, tensor cores, odd arguments.

As a script it compiles what its arguments name, outside the interpreter, and prints a JSON line for each kernel.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = ("bfloat16", "float32")
MOST_SPILT = 16
MOST_SPILT_WIDE = 512  # of 256 channels, where a 16-bit layer onto the image spills
SHARED = 101376  # of the least of the GPUs with tensor cores for bfloat16
if __name__ != "__main__" and not BENCHMARKS.is_dir():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)
INTEGERS = ("height", "width", "n_pixels", "n_tiles", "n_rows", "n_cols", "n_cells", "n_blocks", "n_images", "n_splits")


def launches(dtype, dim, target):
    """Name -> (kernel, constants, options, dtypes of its pointers) of everything a forward launches."""
    import compile_kernels  # makes the checkout importable
    import torch
    from anyup_fast.kernels import guidance as g

    wide = "ieee" if target.startswith("gfx") else "tf32x3"
    both = []
    for sizes in g.tile_sizes(getattr(torch, dtype), dim, compile_kernels.device_of(target)):
        options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
        sizes.update(PRECISION=wide if dtype == "float32" else "ieee", STAGES=options["num_stages"])
        both.append((sizes, options))
    (layer, options), (guide_layer, guide_options) = both
    common = dict(D=dim, GROUPS=8, CHANNELS=3)
    stored = dict(x_ptr=dtype, skip_ptr=dtype, out_ptr=dtype, weight_ptr=dtype)
    guide = dict(stored, query_ptr=dtype, key_ptr=dtype, query_weight_ptr=dtype, key_weight_ptr=dtype)
    pool = dict(BLOCK_J=1, BLOCK_X=16, BLOCK_D=min(dim, 128))
    last = dict(BLOCK_P=g.LAST_ROWS, BLOCK_N=min(dim, 64), BLOCK_K=32, PRECISION=wide)
    tiles = dict(BLOCK_P=g.IMAGE_PIXELS, BLOCK=g.TILES)
    found = {
        "image stats": (g._image_stats_kernel, tiles, dict(num_warps=8), {}),
        "image affine": (g._image_affine_kernel, tiles, dict(num_warps=4), {}),
        "affine": (g._affine_kernel, dict(tiles, BLOCK_P=layer["BLOCK_P"]), dict(num_warps=8), {}),
        "rotation": (g._rotation_kernel, {}, dict(num_warps=4), {}),
        "guide": (g._guide_kernel, guide_layer, guide_options, guide),
        "pool": (g._pool_kernel, dict(pool, ACTIVE=True), dict(num_warps=4), dict(x_ptr=dtype, y_ptr=dtype)),
        "pool after": (g._pool_kernel, dict(pool, ACTIVE=False), dict(num_warps=4), dict(stored, x_out_ptr=dtype)),
        "last": (g._last_kernel, last, dict(num_warps=4), {}),
    }
    for name, from_image, skip in (
        ("layer", False, "none"),
        ("layer of the image", True, "none"),
        ("layer onto the image", False, "image"),
        ("layer onto x", False, "stored"),
    ):
        constants = dict(layer, FROM_IMAGE=from_image, SKIP=skip, IMAGE_PRECISION=wide)
        found[name] = g._layer_kernel, constants, options, stored
    return {
        name: (fn, {**common, **constants}, options, pointers)
        for name, (fn, constants, options, pointers) in found.items()
    }


def compiled(fn, constants, options, pointers, target, ones=()):
    """Compile one kernel as the launcher would; arguments named in `ones` are 1, which Triton makes constants."""
    import compile_kernels as c
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes, values = {}, {}, {}
    for index, name in enumerate(fn.arg_names):
        if name in constants or name in ones:
            signature[name], values[(index,)] = "constexpr", constants.get(name, 1)
        elif name.endswith("_ptr"):
            signature[name] = "*" + c.TYPES[pointers.get(name, "float32")]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    source = ASTSource(fn=fn, signature=signature, constexprs=values, attrs=attributes)
    kind, arch, warp, _ = c.TARGETS[target]
    return triton.compile(source, target=GPUTarget(kind, arch, warp), options=dict(options, enable_fp_fusion=True))


def main():
    """Command line."""
    sys.path.insert(0, str(BENCHMARKS))
    import compile_kernels as c

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES)
    parser.add_argument("--dims", nargs="+", type=int, default=[128])
    parser.add_argument("--kernels", nargs="+")
    parser.add_argument("--ones", action="store_true", help="every size is 1")
    options = parser.parse_args()
    for dtype in options.dtypes:
        for dim in options.dims:
            for name, launch in launches(dtype, dim, options.target).items():
                if options.kernels and name not in options.kernels:
                    continue
                binary = compiled(*launch, options.target, INTEGERS if options.ones else ())
                print(json.dumps(dict(dtype=dtype, dim=dim, kernel=name, **c.measure(binary))), flush=True)


def rows(*arguments):
    """What the script prints for `arguments`, run by itself so that nothing is interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert found
    return found


def faults(found, most_spilt, most_shared=SHARED):
    """Sentences about kernels that spill, take too much shared memory, leave tensor cores idle or repeat work."""
    complaints = []
    for row in found:
        name = f"{row['dtype']} {row['dim']} {row['kernel']}"
        # The library's cosine in float64 has a table on its stack.
        if row["stack"] > (64 if row["kernel"] == "rotation" else most_spilt):
            complaints.append(f"{name}: {row['stack']} bytes spilt")
        if row["shared"] > most_shared:
            complaints.append(f"{name}: {row['shared']} bytes of shared memory")
        multiplies = row["kernel"].startswith(("layer", "guide", "last"))
        if multiplies and not row["tensor_core"]:
            complaints.append(f"{name}: no tensor cores")
        # 64 pixels of 128 channels are 64 activations for each of 128 threads.
        if row["dtype"] != "float32" and row["dim"] <= 128 and multiplies and row["exp2"] > 64:
            complaints.append(f"{name}: {row['exp2']} exponentials, so threads repeat each other's")
    return complaints


@pytest.mark.parametrize("target", TARGETS)
def test_layers_without_spills(target):
    found = rows(target, "--dtypes", "bfloat16", "--kernels", "layer onto x", "guide")
    assert len(found) == 2 and faults(found, MOST_SPILT) == []


def test_sizes_of_one():
    found = rows("sm_90", "--ones", "--dims", "32", "--dtypes", "bfloat16")
    assert len(found) == 12 and faults(found, MOST_SPILT) == []


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel(target):
    found = rows(target, "--dtypes", "bfloat16", "float16", "float32", "--dims", "128", "64", "32")
    assert len(found) == 3 * 3 * 12 and faults(found, MOST_SPILT) == []


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_the_largest_width(target):
    found = rows(target, "--dims", "256")
    assert len(found) == 2 * 12 and faults(found, MOST_SPILT_WIDE) == []


def test_faults_are_seen():
    fine = dict(dtype="bfloat16", dim=128, kernel="guide", stack=16, shared=40960, tensor_core=8, exp2=64)
    turn = dict(fine, kernel="rotation", stack=48, tensor_core=0, exp2=0)
    assert faults([fine, turn], 16) == []
    wrong = [dict(fine, stack=24), dict(turn, stack=72), dict(fine, shared=10**6), dict(fine, tensor_core=0)]
    assert [fault.rpartition(": ")[2] for fault in faults([*wrong, dict(fine, exp2=128)], 16)] == [
        "24 bytes spilt",
        "72 bytes spilt",
        "1000000 bytes of shared memory",
        "no tensor cores",
        "128 exponentials, so threads repeat each other's",
    ]


if __name__ == "__main__":
    main()
