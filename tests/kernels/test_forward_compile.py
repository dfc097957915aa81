"""The kernels of the query projection and of feature unification, compiled for GPUs that are not there.

Run as a script with the name of a target it prints one JSON line per kernel.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
# Bytes: measured were 8 for one kernel on Triton 3.6.0, none on 3.9.0.
MOST_SPILT = 8
# Channels of the features and size of the filters, 128 of which are compiled.
UNIFIED = {"grouped": (384, 5), "gathered": (100, 5)}


def problems(device):
    """Yield (kernel, dtype, device function, constants and options, pointers to other than the queries' dtype)."""
    from anyup_fast.kernels import queries, unification

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        constants = queries.plan(device, dtype, 128)
        yield "query_projection", dtype, queries._query_projection_kernel, constants, ("norm_ptr", "bias_ptr")
    for name, (channels, size) in UNIFIED.items():
        grouped, constants = unification.plan(device, channels, 128, size)
        assert grouped == (name == "grouped")
        yield name, torch.float32, getattr(unification, f"_{name}_kernel"), constants, ()


def rows(target):
    """Yield figures of every kernel, compiled as its launcher would for contiguous tensors."""
    import compile_kernels
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kind, arch, warp, shared = compile_kernels.TARGETS[target]
    device = compile_kernels.device_of(target)
    for kernel, dtype, fn, constants, wide in problems(device):
        dtype = str(dtype).removeprefix("torch.")
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion")}
        signature, attributes, values = {}, {}, {}
        for index, name in enumerate(fn.arg_names):
            if name in constants:
                signature[name], values[(index,)] = "constexpr", constants[name]
            elif name.endswith("_ptr"):
                signature[name] = "*fp32" if name in wide else "*" + compile_kernels.TYPES[dtype]
            else:
                signature[name] = "fp32" if name in ("eps", "log2e") else "i32"
            if name.endswith("_ptr") or name.startswith("x_"):
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn=fn, signature=signature, constexprs=values, attrs=attributes)
        compiled = triton.compile(source, target=GPUTarget(kind, arch, warp), options=options)
        yield dict(
            triton=triton.__version__,
            target=target,
            kernel=kernel,
            dtype=dtype,
            warps=options["num_warps"],
            room=shared,
            **compile_kernels.measure(compiled),
        )


def faults(found):
    """Sentences about kernels that spill, leave the tensor cores idle or don't fit."""
    return [
        f"{row['target']} {row['dtype']} {row['kernel']}: {complaint}"
        for row in found
        for complaint, wrong in (
            (f"{row['stack']} bytes spilt", row["stack"] > MOST_SPILT),
            ("no tensor cores", not row["tensor_core"] and row["kernel"] != "gathered"),
            (f"{row['shared']} bytes of shared memory of {row['room']}", row["shared"] > row["room"]),
        )
        if wrong
    ]


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="benchmarks/ is not beside the tests")
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_for(target):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, __file__, target], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["kernel"] for row in found] == 3 * ["query_projection"] + list(UNIFIED)
    assert faults(found) == []


def test_faults_are_seen():
    fine = dict(target="sm_90", dtype="float32", kernel="grouped", stack=0, tensor_core=6, shared=10, room=20)
    assert faults([fine, dict(fine, kernel="gathered", tensor_core=0)]) == []
    wrong = [dict(fine, stack=16), dict(fine, tensor_core=0), dict(fine, shared=30)]
    assert [f.rpartition(": ")[2] for f in faults(wrong)] == [
        "16 bytes spilt",
        "no tensor cores",
        "30 bytes of shared memory of 20",
    ]


if __name__ == "__main__":
    sys.path.insert(0, str(BENCHMARKS))
    for figures in rows(sys.argv[1]):
        print(json.dumps(figures), flush=True)
