"""Tiles compiled for GPUs that are not there: no spills to speak of, and tensor cores in use."""

import json
import os
import subprocess
import sys

import pytest
from tree import ROOT

SCRIPT = ROOT / "benchmarks" / "compile_kernels.py"
if not SCRIPT.is_file():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
MOST_SPILT = 64


def compiled(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, "--json", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert rows
    return rows


def faults(rows):
    return [
        f"{row['target']} {row['dtype']} {row['kernel']} {row['tile']} {row['block_k']} {row['block_c']}: {complaint}"
        for row in rows
        for complaint, wrong in (
            (f"{row['stack']} bytes spilt", row["default_for"] and row["stack"] > MOST_SPILT),
            ("no tensor cores", not row["tensor_core"]),
            (f"{row['shared']} bytes of shared memory, foretold {row['bound']}", row["shared"] > row["bound"]),
        )
        if wrong
    ]


@pytest.mark.parametrize("target", TARGETS)
def test_default_tiles(target):
    rows = compiled("--targets", target, "--defaults")
    assert {grid for row in rows for grid in row["default_for"].split()} >= {"448/32/384", "518/37/768", "1024/64/768"}
    assert faults(rows) == []


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_tile(target):
    assert faults(compiled("--targets", target, "--dtypes", "bfloat16", "float16", "float32")) == []


def test_faults_are_seen():
    row = dict(target="sm_90", dtype="float32", kernel="window", tile="8x8", block_k=64, block_c=64, default_for="a")
    fine = dict(row, stack=0, tensor_core=6, shared=10, bound=20)
    assert faults([fine, dict(fine, stack=64), dict(fine, stack=200, default_for="")]) == []
    wrong = [dict(fine, stack=72), dict(fine, tensor_core=0), dict(fine, shared=30)]
    assert [f.rpartition(": ")[2] for f in faults(wrong)] == [
        "72 bytes spilt",
        "no tensor cores",
        "30 bytes of shared memory, foretold 20",
    ]
