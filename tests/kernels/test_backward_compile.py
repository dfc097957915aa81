"""The backward kernels compiled for GPUs that are not there: spills, tensor cores, shared memory.

Run as a script with the name of a target it prints one JSON line per kernel of feature unification.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
# Bytes of the worst kernel, as measured on Triton 3.9.0 (232, 112, 72 and 184) and rounded up; elsewhere none.
MOST_SPILT = {("sm_80", "float32"): 240, ("sm_80", "bfloat16"): 120, ("sm_90", "bfloat16"): 96}
MOST_SPILT_TAPS = 192
# Channels of the features; 128 filters of 5x5 are compiled.
UNIFIED = {"grouped": 384, "gathered": 100}
if not BENCHMARKS.is_dir():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)


def lines(*command):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def most_spilt(row):
    return MOST_SPILT_TAPS if row["kernel"] == "taps" else MOST_SPILT.get((row["target"], row["dtype"]), 0)


def faults(rows):
    """Sentences about kernels that spill, leave the tensor cores idle or don't fit."""
    return [
        f"{row['target']} {row['dtype']} {row['kernel']}: {complaint}"
        for row in rows
        for complaint, wrong in (
            (f"{row['stack']} bytes spilt", row["stack"] > most_spilt(row)),
            ("no tensor cores", not row["tensor_core"] and row["kernel"] not in ("gathered", "gather")),
            (f"{row['shared']} bytes of shared memory of {row['bound']}", row["shared"] > row["bound"]),
        )
        if wrong
    ]


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        pytest.param(target, dtype, marks=[] if (target, dtype) == ("sm_90", "bfloat16") else [pytest.mark.slow])
        for target in TARGETS
        for dtype in ("bfloat16", "float32")
    ],
)
def test_windowed_attention(target, dtype):
    rows = lines(BENCHMARKS / "compile_kernels.py", "--json", "--backward", "--targets", target, "--dtypes", dtype)
    assert {row["kernel"] for row in rows} == {"query_window", "query_blocks", "key", "value"}
    assert faults(rows) == []


@pytest.mark.parametrize("target", [pytest.param(t, marks=[] if t == "sm_90" else [pytest.mark.slow]) for t in TARGETS])
def test_feature_unification(target):
    rows = lines(__file__, target)
    assert [row["kernel"] for row in rows] == ["grouped", "gathered", "taps", "gather"]
    assert faults(rows) == []


def test_faults_are_seen():
    fine = dict(target="gfx942", dtype="float32", kernel="key", stack=0, tensor_core=6, shared=10, bound=20)
    spilt = dict(fine, target="sm_80", stack=240), dict(fine, kernel="taps", stack=192)
    assert faults([fine, dict(fine, kernel="gather", tensor_core=0), *spilt]) == []
    wrong = [dict(fine, stack=16), dict(fine, tensor_core=0), dict(fine, shared=30)]
    assert [f.rpartition(": ")[2] for f in faults(wrong)] == [
        "16 bytes spilt",
        "no tensor cores",
        "30 bytes of shared memory of 20",
    ]


def rows(target):
    """Yield figures of the kernels of feature unification, compiled as their launcher would."""
    import compile_kernels
    from anyup_fast.kernels import unification_backward as f

    device = compile_kernels.device_of(target)
    _, _, taps, gather = f.plan(device, 384, 128, 5)
    found = {name: f.plan(device, channels, 128, 5)[1] for name, channels in UNIFIED.items()}
    kernels = dict(grouped=f._grouped_stats_kernel, gathered=f._gathered_stats_kernel)
    kernels.update(taps=f._taps_kernel, gather=f._gather_kernel)
    for name, constants in {**found, "taps": taps, "gather": gather}.items():
        options = {key: constants.pop(key) for key in ("num_warps", "num_stages", "enable_fp_fusion")}
        compiled = compile_kernels.compile_kernel(
            kernels[name], constants, options, target, "float32", constants.pop("PRECISION", None)
        )
        figures = compile_kernels.measure(compiled)
        yield dict(target=target, kernel=name, dtype="float32", bound=device.shared_memory, **figures)


if __name__ == "__main__":
    sys.path.insert(0, str(BENCHMARKS))
    for figures in rows(sys.argv[1]):
        print(json.dumps(figures), flush=True)
