"""The project's kernels as compiled for GPUs that are not there, executed: see tests/support/ptx.

Triton compiles in processes of their own, for here its interpreter is on. Each reports rows, which the tests look up.
"""

import csv
import json
import os
import sys
from functools import cache

import forked
import pytest
from ptx import project
from tree import ROOT

# Removed pieces of each kind that the default run tries.
TRIED = 3
FAULTS = "memcheck", "racecheck", "equal_address"
# The longest run has every problem on these; sm_86 and sm_89, with the instructions of sm_80, have the small ones.
WHOLE = "sm_80", "sm_90"
SWEEP = [
    (case, target)
    for target in project.TARGETS
    for case in project.cases()
    if case.fits(target) and (case.small or target in WHOLE)
]
# Every kernel, tile and main dtype once, each on one of the targets; all targets have some of each kind.
MAIN = [
    (case, target)
    for n, case in enumerate(case for case in project.cases() if case.main)
    for target in [[t for t in project.TARGETS if case.fits(t)][n % sum(map(case.fits, project.TARGETS))]]
]
# Of these kernels the default run has one tile and problem for each dtype.
ONCE = {f"attention {design}" for design in ("heads", "stored", "two_pass", "backward window", "backward blocks")}
FIRST = {(case.kernel, case.dtype): case for case, _ in reversed(MAIN)}
SHORT = [(case, target) for case, target in MAIN if case.kernel not in ONCE or case is FIRST[case.kernel, case.dtype]]
MORE = [pair for pair in MAIN if pair not in SHORT]
# Whose programs have threads that store one number to one address.
FIRST_WINS = "attention_heads-8x8_k32_c16_w4_s2-float32-odd", "guidance-dim_32-float32-pooled"


def rows(module, *arguments):
    """What a module of the package prints in a process in which Triton compiles: a list of dicts."""
    path = os.pathsep.join(filter(None, sys.path))
    result = forked.run("-m", f"ptx.{module}", *arguments, PYTHONPATH=path)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def by_name(found):
    return {row["name"]: row for row in found}


@cache
def rows_of(pairs, target):
    names = [case.name for case, where in pairs if where == target]
    return by_name(rows("project", target, "--cases", *names))


def short(target):
    return rows_of(tuple(SHORT), target)


@cache
def sweep(target):
    return by_name(rows("project", target, "--every" if target in WHOLE else "--small"))


@cache
def far(target):
    return by_name(rows("far", target))


def complaints(row):
    """Sentences about what is wrong with a row."""
    found = [*row["faults"], *([row["failed"]] if row["failed"] else [])]
    if not row["error"] <= row["limit"]:
        found.append(f"error {row['error']:.2e} exceeds {row['limit']:.1e}")
    return found


def ids(pairs):
    return [f"{target}-{case.name}" for case, target in pairs]


@pytest.mark.parametrize(("case", "target"), SHORT, ids=ids(SHORT))
def test_each_kernel(case, target):
    assert complaints(short(target)[case.name]) == []


@pytest.mark.slow("half a minute: the other tiles of kernels of which the default run has one")
@pytest.mark.parametrize(("case", "target"), MORE, ids=ids(MORE))
def test_each_further_tile(case, target):
    assert complaints(rows_of(tuple(MORE), target)[case.name]) == []


def test_every_kernel_is_executed():
    executed = {kernel for target in project.TARGETS for row in short(target).values() for kernel in row["kernels"]}
    assert executed == project.entries() and len(executed) > 20


def test_every_target_executes_attention_and_layers():
    for target in project.TARGETS:
        kernels = {row["kernel"].split()[0] for row in short(target).values()}
        assert len(kernels & {"attention", "guidance", "unification", "query"}) >= 2


def test_the_table_of_the_repository_has_no_fault():
    with (ROOT / "benchmarks" / "results" / "ptx.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert {row["target"] for row in table} == set(project.TARGETS) and len(table) > 150
    wrong = [
        row
        for row in table
        if not float(row["error"]) <= float(row["limit"]) or any(row[name] != "0" for name in FAULTS)
    ]
    assert wrong == []


@pytest.mark.parametrize("name", FIRST_WINS)
def test_which_of_two_equal_stores_wins_changes_no_bit(name):
    (target,) = (where for case, where in SHORT if case.name == name)
    first = by_name(rows("project", target, "--cases", name, "--first-wins"))
    assert list(first) == [name] and first[name]["digest"] == short(target)[name]["digest"]


# Who finds it: memcheck, racecheck or the comparison with float64.
FINDER = {
    "guard": lambda row: row["memcheck"],
    "mask": lambda row: not row["error"] <= row["limit"],
    "barrier": lambda row: row["racecheck"],
    "wait": lambda row: row["racecheck"],
    "fence": lambda row: row["racecheck"],
}


def silent(found):
    """Those rows in which something is taken out, the result is wrong and the checks say nothing."""
    return [(row["what"], row["which"]) for row in found if row["what"] != "mask" and complaints(row)
            and not row["faults"] and not row["failed"].startswith("Fault")]  # fmt: skip


@pytest.mark.parametrize(
    ("target", "kernel", "things"),
    [
        ("sm_80", "attention window", ("guard", "barrier")),
        ("sm_80", "attention heads", ("mask",)),
        ("sm_80", "query projection", ("wait",)),
        ("sm_90", "attention window", ("barrier", "fence")),
    ],
    ids=["sm_80 window", "sm_80 heads", "sm_80 projection", "sm_90 window"],
)
def test_what_is_taken_out_of_a_kernel_is_missed(target, kernel, things):
    found = rows("planted", target, "--kernel", kernel, "--most", str(TRIED), "--what", *things)
    assert silent(found) == []
    for what in things:
        some = [row for row in found if row["what"] == what]
        assert some and any(map(FINDER[what], some)), f"none of {len(some)} of what was taken out was found: {what}"


def test_far_strides_and_outputs_of_the_window():
    names = "attention_window-bfloat16-far_heads", "attention_window-bfloat16-far_output"
    found = by_name(rows("far", "sm_80", "--cases", *names))
    assert list(found) == list(names)
    assert [complaints(row) for row in found.values()] == [[], []]


@pytest.mark.slow("three quarters of an hour: every shape, tile and dtype")
@pytest.mark.parametrize(("case", "target"), SWEEP, ids=ids(SWEEP))
def test_every_problem(case, target):
    assert complaints(sweep(target)[case.name]) == []


@pytest.mark.slow("minutes; two of them run by default")
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_beyond_2_to_the_31(target):
    found = far(target)
    assert len(found) == 29 and {row["shape"] for row in found.values()} >= {"far heads", "far output"}
    assert {name: complaints(row) for name, row in found.items() if complaints(row)} == {}


@pytest.mark.slow("minutes: every piece in turn, of which TRIED run by default")
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kernel", ["attention window", "attention heads", "attention two_pass"])
def test_whatever_is_taken_out(target, kernel):
    found = rows("planted", target, "--kernel", kernel)
    assert silent(found) == []
    assert {row["what"] for row in found} >= {"guard", "barrier"}


def test_complaints():
    fine = dict(faults=[], failed="", error=1.0, limit=2.0)
    assert complaints(fine) == [] and complaints({**fine, "error": float("nan")}) != []
    for wrong in (dict(faults=["unequal copies"]), dict(failed="Unsupported"), dict(error=3.0)):
        assert len(complaints({**fine, **wrong})) == 1
