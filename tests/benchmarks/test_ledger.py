"""The ledger: its arithmetic by hand, one stage counted by hand, and a small forward from one end to the other."""

import csv
from collections import Counter

import forked
import pytest
from tree import ROOT

FOLDER = ROOT / "benchmarks"
if not (FOLDER / "ledger.py").is_file():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)
# Pure functions of the script, by a process of its own: it takes Triton out of its interpreter.
BY_HAND = """
import ledger
from collections import Counter
loops = ledger.ordered([(2, 9), (4, 6), (4, 7), (12, 13)])
assert loops == [(2, 9), (4, 7), (12, 13)] and ledger.depths(loops) == [0, 1, 0]
assert ledger.regions(loops, 14).tolist() == [-1, -1, 0, 0, 1, 1, 1, 1, 0, 0, -1, -1, 2, 2]
times = dict(dram=4.0, l2=3.0, tensor=1.0, special=2.0, alu=2.5, issue=3.0)
assert ledger.expected(times, 1, False) == 10 and ledger.expected(times, 2, False) == 7
assert ledger.expected(times, 1, True) == 6 and ledger.expected(times, 3, True) == 4
card = ledger.CARDS["sm_90"]
held = [ledger.resident(card, 4, *given) for given in ((168, 58368), (255, 1024), (40, 1024), (40, 120000))]
assert held == [3, 2, 12, 1]
"""


def run(*command):
    result = forked.run(*command, PYTHONPATH=str(FOLDER))
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_by_hand():
    run("-c", BY_HAND)


GIVEN = "--shapes", "32/4/384", "--dtypes", "bfloat16", "--targets", "sm_90"


def counted_by_hand(queries):
    """32 x 32 pixels are whole tiles: ten products of 128 x 128 each, and queries in and out."""
    assert float(queries["GFLOP"]) == pytest.approx(2 * 1024 * 10 * 128**2 / 1e9, rel=1e-3)
    moved = 2 * 1024 * 128 * 2 + 10 * 128**2 * 2 + 2 * 128 * 4
    assert float(queries["MB"]) == pytest.approx(moved / 1e6, rel=1e-2)


def test_one_stage():
    (line,) = (text for text in run(FOLDER / "ledger.py", *GIVEN, "--stages", "queries").splitlines() if text)
    row = dict(pair.rsplit(" ", 1) for pair in line.split("  "))
    assert row["stage"] == "queries" and row["launches"] == "1"
    counted_by_hand(row)


@pytest.mark.slow("a quarter of a minute for figures of the ledger alone")
def test_a_small_forward(tmp_path):
    path = tmp_path / "ledger.csv"
    run(FOLDER / "ledger.py", *GIVEN, "--csv", path)
    rows = {row["stage"]: row for row in csv.DictReader(path.open(encoding="utf-8"))}
    assert list(rows) == ["guidance", "unit channels", "unification", "keys", "queries", "attention", "sum"]
    found = {stage: Counter({k: float(row[k]) for k in ("launches", "torch", "MB", "GFLOP", "Gspecial", "Ginstr",
                                                        "bound_ms", "expected_ms", "conflicts")})
             for stage, row in rows.items()}  # fmt: skip
    total = found.pop("sum")
    for name in ("launches", "torch", "expected_ms"):
        assert sum(row[name] for row in found.values()) == pytest.approx(total[name], rel=1e-3)
    assert total["launches"] + total["torch"] <= 50
    assert all(row["expected_ms"] >= row["bound_ms"] > 0 and row["conflicts"] >= 1 for row in found.values())
    assert all(row["launches"] and row["Ginstr"] for row in found.values())
    counted_by_hand(found["queries"])
    # An exponential and a reciprocal for each of twelve activations of a pixel and channel, at least.
    assert found["guidance"]["Gspecial"] >= 2 * 12 * 1024 * 128 / 1e9
