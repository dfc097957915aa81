"""The front end of every kernel on every release of Triton that is promised, none of which needs a GPU.

`pytest -m slow` takes the installed release. `pytest -m releases` fetches the newest patch of each minor release that
constraints.txt allows, with pip, into the folder that TRITON_RELEASES names (kept there for the next run) or into a
temporary one; 0.6 GB each.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tree import ROOT

SCRIPT, CONSTRAINTS = ROOT / "benchmarks" / "compile_kernels.py", ROOT / "constraints.txt"
if not (SCRIPT.is_file() and CONSTRAINTS.is_file()):
    pytest.skip("benchmarks/ and constraints.txt are not beside the tests", allow_module_level=True)
# Between them they have every design, plan and precision.
TARGETS = ("sm_80", "sm_90", "gfx1100")
KERNELS = {
    "attention": {"window", "halved", "stats", "apply", "weights", "mix", "parts", "heads"},
    "backward": {"query_window", "query_blocks", "key", "value"},
    "guidance": {
        *("image stats", "image affine", "affine", "rotation", "guide", "pool", "pool after", "last"),
        *("layer", "layer of the image", "layer onto the image", "layer onto x"),
    },
    "keys": {"unit", "project", "start", "layer", "layer of another width", "merge", "combine"},
    "queries": {"query_projection"},
    "unification": {"grouped", "grouped stats", "written", "gathered", "gathered stats", "taps", "gather"},
}


def promised():
    """Minor releases that constraints.txt allows, as in "3.9"."""
    first, end = re.search(r"^triton>=3\.(\d+),<3\.(\d+)$", CONSTRAINTS.read_text(encoding="utf-8"), re.M).groups()
    return [f"3.{minor}" for minor in range(int(first), int(end))]


def front_end(folder, cache):
    """Lines about every kernel, from the Triton in `folder`, or from the installed one for None."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    if folder is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), environment.get("PYTHONPATH"))))
    command = [sys.executable, SCRIPT, "--front-end", "--json", "--targets", *TARGETS]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def faults(rows):
    """Sentences about kernels that Triton refuses, and about those that are missing."""
    found = {group: {row["kernel"] for row in rows if row["group"] == group} for group in KERNELS}
    missing = [f"{group}: {name} was not compiled" for group in KERNELS for name in KERNELS[group] - found[group]]
    return missing + [
        f"{row['target']} {row['dtype']} {row['group']} {row['kernel']}: {row['error']}" for row in rows if row["error"]
    ]


@pytest.mark.slow("ten seconds; test_compile.py and test_ptx.py have its kernels")
def test_the_installed_release(tmp_path):
    rows = front_end(None, tmp_path)
    assert {row["target"] for row in rows} == set(TARGETS)
    assert faults(rows) == []


@pytest.fixture(scope="session")
def releases(tmp_path_factory):
    """The folder for releases of Triton; one that nobody named goes away at the end."""
    if given := os.environ.get("TRITON_RELEASES"):
        yield Path(given)
        return
    folder = tmp_path_factory.mktemp("triton")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.releases
@pytest.mark.parametrize("release", promised())
def test_each_release(release, releases, tmp_path):
    folder = releases / release
    if not (folder / "triton").is_dir():
        install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile", "--target", folder]
        result = subprocess.run([*install, f"triton=={release}.*"], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
    rows = front_end(folder, tmp_path)
    assert {row["triton"].rpartition(".")[0] for row in rows} == {release}
    refused = faults(rows)
    print(f"Triton {rows[0]['triton']}: {len(rows) - sum(bool(row['error']) for row in rows)} of {len(rows)} kernels")
    assert refused == []


def test_setup_asks_for_the_oldest_promised():
    assert f'"triton>={promised()[0]}; ' in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_faults_are_seen():
    fine = [
        dict(target="sm_90", dtype="float32", group=group, kernel=kernel, error="")
        for group, kernels in KERNELS.items()
        for kernel in kernels
    ]
    assert faults(fine) == []
    assert faults([dict(fine[0], error="no"), *fine[1:]])[0].endswith(f"{fine[0]['kernel']}: no")
    assert faults(fine[:-1]) == [f"unification: {fine[-1]['kernel']} was not compiled"]
