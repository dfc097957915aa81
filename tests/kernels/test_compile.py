"""Every kernel compiled for GPUs that are not there: hardly a spill, tensor cores in use, shared memory as foretold.

Each test runs benchmarks/compile_kernels.py in a process of its own, so that nothing is interpreted. The
default run takes some targets; `pytest -m slow` all of them, in every dtype.
"""

import json

import forked
import pytest
from tree import ROOT

SCRIPT = ROOT / "benchmarks" / "compile_kernels.py"
if not SCRIPT.is_file():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)
TARGETS = "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 gfx90a gfx942 gfx950 gfx1100 gfx1201".split()
RDNA = ("gfx1100", "gfx1201")
DTYPES = ("bfloat16", "float16", "float32")
MOST_SPILT = 64
GRIDS = {"448/32/384", "518/37/768", "1024/64/768"}
# Kernels without products, and those whose products are float32 whatever is stored: RDNA multiplies those one by one.
PLAIN = {"parts", "image stats", "image affine", "affine", "rotation", "pool", "pool after"}
PLAIN |= {"gathered", "gathered stats", "gather", "unit", "start", "combine"}
FLOATS = {"last"}
UNIFICATION = "grouped", "grouped stats", "written", "gathered", "gathered stats", "taps", "gather"
INTEGERS = "height width n_pixels n_tiles n_rows n_cols n_cells n_blocks n_images n_splits".split()


def some(values, fast):
    """Parameters of which only those in `fast` belong to the default run."""
    return [
        pytest.param(
            value,
            marks=()
            if value in fast
            else pytest.mark.slow("minutes; the kernels are the same for another GPU or dtype"),
        )
        for value in values
    ]


def compiled(*arguments):
    result = forked.run(SCRIPT, "--json", *arguments)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert rows
    return rows


def faults(rows, most_spilt=MOST_SPILT):
    """Sentences about kernels that spill, leave tensor cores idle, don't fit or repeat each other's work."""
    complaints = []
    for row in rows:
        multiplies = row["kernel"] not in PLAIN and not (row["kernel"] in FLOATS and row["target"] in RDNA)
        # 64 pixels of 128 channels are 64 activations for each of 128 threads.
        many = row["group"] == "guidance" and row["dtype"] != "float32" and row["dim"] <= 128 and row["exp2"] > 64
        name = f"{row['target']} {row['dtype']} {row['kernel']} {row['tile']} {row['block_k']} {row['block_c']}"
        for complaint, wrong in (
            (f"{row['stack']} bytes spilt", row["stack"] > most_spilt),
            ("no tensor cores", multiplies and not row["tensor_core"]),
            (f"{row['shared']} bytes of shared memory, foretold {row['bound']}", row["shared"] > row["bound"]),
            (f"{row['exp2']} exponentials, so threads repeat each other's", many and multiplies),
        ):
            if wrong:
                complaints.append(f"{name}: {complaint}")
    return complaints


def overrated(rows):
    """Tiles of the attention that are foretold to take far more shared memory than any of their kernels does.

    The kernels of a tile may have stages of their own, and have its forecast in common.
    Forecasts are whole KiB, and the most of all releases: one takes 43 KiB on 3.4 and 30 on 3.9. On AMD releases differ
    too much for a limit.
    """
    most = {}
    for row in rows:
        tile = tuple(row[name] for name in ("target", "dtype", "design", "tile", "block_c", "warps", "bound"))
        tile += (row["block_k"],) if row["design"] == "window" else ()
        if row["design"] and row["target"].startswith("sm_"):  # "parts" belongs to no tile
            most[tile] = max(row["shared"], most.get(tile, 0))
    return [f"{tile}: takes {size}" for tile, size in most.items() if tile[6] > 1.5 * size + 3072]


@pytest.mark.parametrize("target", some(TARGETS, ("sm_90", "gfx1100")))
def test_default_tiles(target):
    rows = compiled("--targets", target, "--groups", "attention", "--defaults")
    assert {grid for row in rows for grid in row["default_for"].split()} == GRIDS
    assert faults(rows) == []


@pytest.mark.slow("minutes for each target")
@pytest.mark.parametrize("target", TARGETS)
def test_every_tile(target):
    rows = compiled("--targets", target, "--groups", "attention", "--dtypes", *DTYPES)
    assert faults(rows) == [] and overrated(rows) == []


@pytest.mark.slow("minutes for each target")
@pytest.mark.parametrize("target", TARGETS)
def test_every_tile_with_heads_that_split_channels(target):
    rows = compiled("--targets", target, "--groups", "attention", "--split", "--dtypes", *DTYPES)
    assert faults(rows, MOST_SPILT_SPLIT if target == "gfx1201" else MOST_SPILT) == []


MOST_SPILT_SPLIT = 80  # twenty registers of windows of 256 keys


@pytest.mark.parametrize("dtype", some(DTYPES, ("bfloat16",)))
@pytest.mark.parametrize("target", some(TARGETS, ("sm_90",)))
def test_backward(target, dtype):
    if target in RDNA and dtype == "float32":
        pytest.skip("plain PyTorch runs there")
    rows = compiled("--targets", target, "--groups", "backward", "--dtypes", dtype)
    assert {row["kernel"] for row in rows} == {"query_window", "query_blocks", "key", "value"}
    assert {grid for row in rows for grid in row["default_for"].split()} == {*GRIDS, "224/16/384", "any"}
    assert faults(rows) == []


@pytest.mark.parametrize("target", some([t for t in TARGETS if t not in RDNA], ("sm_90",)))
def test_unification(target):
    rows = compiled("--targets", target, "--groups", "unification", "--dtypes", "float32")
    assert sorted(row["kernel"] for row in rows) == sorted(UNIFICATION)
    assert faults(rows) == []


KEYS = {"unit", "project", "start", "layer", "layer of another width", "merge", "combine"}


@pytest.mark.parametrize(
    "dtypes, more",
    [
        pytest.param(("float32",), 0, id="float32"),
        pytest.param(DTYPES, 4, id="all", marks=pytest.mark.slow("16 bits change two of seven kernels")),
    ],
)
@pytest.mark.parametrize("target", some([t for t in TARGETS if t not in RDNA], ("sm_90",)))
def test_keys(target, dtypes, more):
    rows = compiled("--targets", target, "--groups", "keys", "--dtypes", *dtypes)
    assert {row["kernel"] for row in rows} == KEYS and len(rows) == len(KEYS) + more
    assert faults(rows) == []


@pytest.mark.parametrize("target", some(TARGETS, ("sm_90",)))
def test_queries(target):
    rows = compiled("--targets", target, "--groups", "queries", "--dtypes", *DTYPES)
    assert len(rows) == (2 if target in RDNA else 3) and faults(rows) == []


@pytest.mark.parametrize("target", some(TARGETS, ("sm_90",)))
def test_guidance(target):
    rows = compiled("--targets", target, "--groups", "guidance", "--dtypes", "bfloat16")
    assert len(rows) == 12 and faults(rows) == []


@pytest.mark.slow("half a minute; sizes of one are launched in the interpreter")
def test_guidance_with_sizes_of_one():
    given = "--groups", "guidance", "--dims", "32", "--dtypes", "bfloat16", "--ones", *INTEGERS
    rows = compiled("--targets", "sm_90", *given)
    assert len(rows) == 12 and faults(rows) == []


@pytest.mark.slow("minutes for each target")
@pytest.mark.parametrize("target", TARGETS)
def test_guidance_of_every_width(target):
    rows = compiled("--targets", target, "--groups", "guidance", "--dtypes", *DTYPES, "--dims", "128", "64", "32")
    assert len(rows) == (2 if target in RDNA else 3) * 3 * 12 and faults(rows) == []


@pytest.mark.slow("minutes for each target")
@pytest.mark.parametrize("target", TARGETS)
def test_guidance_of_the_largest_width(target):
    rows = compiled("--targets", target, "--groups", "guidance", "--dims", "256")
    most = MOST_SPILT_WIDE if target == "gfx1100" else MOST_SPILT
    assert len(rows) == (1 if target in RDNA else 2) * 12 and faults(rows, most) == []


MOST_SPILT_WIDE = 184  # 46 registers of the layer onto x


def test_faults_are_seen():
    row = dict(group="guidance", target="sm_90", dtype="bfloat16", kernel="guide", tile=64, block_k=64, block_c=64)
    fine = dict(row, dim=128, stack=64, tensor_core=6, shared=20, bound=20, exp2=64)
    plain = dict(fine, kernel="rotation", tensor_core=0, exp2=80)
    floats = dict(fine, kernel="last", target="gfx1100", tensor_core=0)
    assert faults([fine, plain, floats, dict(fine, group="attention", exp2=128)]) == []
    wrong = [dict(fine, stack=72), dict(fine, tensor_core=0), dict(fine, shared=30), dict(fine, exp2=128)]
    assert [fault.rpartition(": ")[2] for fault in faults([*wrong, dict(floats, target="sm_90")])] == [
        "72 bytes spilt",
        "no tensor cores",
        "30 bytes of shared memory, foretold 20",
        "128 exponentials, so threads repeat each other's",
        "no tensor cores",
    ]


def test_forecasts_that_are_too_high_are_seen():
    row = dict(target="sm_90", dtype="float16", design="two_pass", tile="8x8", block_k=16, block_c=64)
    row.update(warps=4, stages=1)
    rows = [dict(row, shared=6000, bound=20480), dict(row, block_k=32, shared=19900, bound=20480)]
    assert overrated([*rows, dict(rows[0], design=None)]) == []
    assert len(overrated(rows[:1])) == 1
    assert len(overrated([dict(rows[0], design="window"), dict(rows[1], design="window")])) == 1
