"""`anyup-fast check`: what it finds right, wrong, failing, and what it does not claim to have judged."""

import json
from collections import Counter
from pathlib import Path

import forked
import pytest
import torch
from anyup_fast.kernels import probe

from anyup_fast import cli, examination
from anyup_fast.examination import DTYPES, examine
from anyup_fast.ops import choice
from anyup_fast.plain import attention, unification

SUPPORT = Path(__file__).parent / "support"
OPERATORS = {
    "windowed_attention", "windowed_attention gradient", "feature_unification", "feature_unification gradient",
    "guidance", "project_keys", "project_queries", "project_queries gradient", "AnyUp", "AnyUp gradient",
}  # fmt: skip


@pytest.fixture(scope="module")
def found():
    return examine("cpu")


@pytest.fixture
def one_dtype(monkeypatch):
    """Float32 alone, where that is enough."""
    monkeypatch.setattr(examination, "DTYPES", (torch.float32,))


def test_plain_pytorch_is_right_and_triton_is_not_judged(found):
    verdicts = Counter((row.backend, row.verdict) for row in found.rows)
    assert set(verdicts) == {("torch", "ok"), ("triton", "not run")}
    assert found.faults == []
    assert {row.operator for row in found.rows} == OPERATORS
    assert {row.dtype for row in found.rows} == {str(dtype).removeprefix("torch.") for dtype in DTYPES}
    shapes = {(row.operator, row.shape) for row in found.rows}
    assert all(sum(name == operator for name, _ in shapes) >= 2 for operator in OPERATORS)
    assert all(row.reason.startswith("needs a GPU") for row in found.rows if row.backend == "triton")
    assert all(0 < row.error <= row.limit and row.milliseconds > 0 for row in found.rows if row.backend == "torch")


def test_the_table_has_a_line_for_each_operator_and_dtype(found):
    table = found.table()
    assert sum(line.endswith("  ok") for line in table) == len(OPERATORS) * len(DTYPES)
    (idle,) = (line for line in table if line.startswith("not run"))
    assert idle.startswith("not run on triton, for it needs a GPU (cuda or xpu)")
    assert any(line.startswith("anyup-fast ") for line in found.machine)
    assert "taken by itself: plain PyTorch, for Triton needs a GPU" in found.machine[-1]


def test_a_wrong_operator_is_told_and_the_command_fails(one_dtype, monkeypatch, capsys):
    right = attention.windowed_attention
    monkeypatch.setattr(attention, "windowed_attention", lambda *a, **k: right(*a, **k) * 1.001)
    assert cli.main(["check", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("```\nanyup-fast ") and printed.count("```") == 2
    wrong = [line.split()[:2] for line in printed.splitlines() if line.endswith("WRONG")]
    assert ["windowed_attention", "float32"] in wrong and ["AnyUp", "float32"] in wrong
    assert not any(operator == "feature_unification" for operator, _ in wrong)
    assert "are off: please report what stands between the marks" in printed


def test_an_operator_that_raises_costs_its_own_rows_only(one_dtype, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("out of resource\nand more")

    monkeypatch.setattr(unification, "feature_unification_backward", broken)
    found = examine("cpu")
    failed = [row for row in found.rows if row.verdict == "failed"]
    assert {row.operator for row in failed} == {"feature_unification gradient", "AnyUp gradient"}
    assert {row.reason for row in failed} == {"RuntimeError: out of resource"}
    assert [row for row in found.faults if row not in failed] == []


def test_not_a_number_is_wrong(one_dtype, monkeypatch):
    right = attention.windowed_attention
    monkeypatch.setattr(attention, "windowed_attention", lambda *a, **k: right(*a, **k) * float("nan"))
    assert {row.error for row in examine("cpu").faults} == {float("inf")}


def test_the_command_passes_here(one_dtype, capsys):
    assert cli.main(["check", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "comparisons are right" in printed and "fused path" not in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there(capsys):
    found = examine("cuda")
    assert {row.verdict for row in found.rows} == {"not run"}
    assert all("cannot be used here" in row.reason for row in found.rows)
    assert cli.main(["check", "--device", "cuda"]) == 1, "nothing was judged"
    assert "0 comparisons are right" in capsys.readouterr().out


def test_a_driver_that_executes_nothing_is_not_taken_for_right(one_dtype, monkeypatch):
    monkeypatch.setattr(choice, "_GPUS", ("cpu",))
    monkeypatch.setattr(choice, "_installation_fault", choice.cache(lambda kind: None))
    monkeypatch.setattr(probe, "runs", lambda device: False)
    rows = [row for row in examine("cpu").rows if row.backend == "triton"]
    assert {(row.verdict, row.reason) for row in rows} == {
        ("not run", "a kernel that was launched wrote nothing: the driver executes nothing")
    }


ABSENT = """
import json
import absent, torch
absent.install()
from anyup_fast import examination
from anyup_fast.examination import calls, examine
examination.DTYPES = (torch.float32,)
found = examine("cpu")
for row, call in calls("cpu"):
    if row.operator == "feature_unification" and row.dtype == "float32":
        call()
print(json.dumps([[[row.backend, row.verdict] for row in found.rows], absent.LAUNCHED]))
"""


def test_under_a_driver_without_a_device():
    """The kernels compile and are launched, and nothing runs: "not run", not "ok"."""
    result = forked.run("-c", ABSENT, PYTHONPATH=str(SUPPORT))
    assert result.returncode == 0, result.stderr
    verdicts, launched = json.loads(result.stdout)
    assert {tuple(pair) for pair in verdicts} == {("triton", "not run"), ("torch", "ok")}
    assert launched.pop("_probe_kernel") > 0
    assert launched == {"_grouped_kernel": 1, "_written_kernel": 1, "_gathered_kernel": 1}


@pytest.mark.slow("minutes in the interpreter; each kernel has tests of its own there")
def test_the_kernels_are_judged_where_they_run(one_dtype, monkeypatch):
    """In Triton's interpreter, which the tests stand for a GPU where there is none."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(choice, "_GPUS", ("cpu",))
        monkeypatch.setattr(choice, "_installation_fault", choice.cache(lambda kind: None))
    found = examine("cuda" if torch.cuda.is_available() else "cpu")
    assert found.faults == []
    assert sum(row.backend == "triton" and row.verdict == "ok" for row in found.rows) > 20
