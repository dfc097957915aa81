"""The benchmarks of the windowed attention: what they compare, and that they refuse where they should."""

import importlib.util
import json
import subprocess
import sys

import forked
import pytest
from tree import ROOT

FOLDER = ROOT / "benchmarks"
if not (FOLDER / "attention.py").is_file():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)


@pytest.fixture
def scripts(monkeypatch):
    """The scripts as modules, imported as if from their own folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    loaded = {}
    for name in ("checkout", "attention"):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        loaded[name] = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, loaded[name])
        spec.loader.exec_module(loaded[name])
    return loaded


@pytest.mark.parametrize("memory", [False, pytest.param(True, marks=pytest.mark.slow("two processes more"))])
def test_attention_command_prints_one_json_object(memory):
    given = "--device", "cpu", "--json", "--shapes", "40/8/12", "--repeats", "2"
    result = forked.run(FOLDER / "attention.py", *given, *([] if memory else ["--no-memory"]))
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    (row,) = report["results"]
    assert row["shape"] == "40/8/12" and row["error"] < 5e-6
    assert row["ratio"] == pytest.approx(row["reference"]["seconds"] / row["torch"]["seconds"])
    assert [row[name].get("peak_gib", -1) >= 0 for name in ("torch", "reference")] == [memory] * 2


@pytest.mark.slow("two processes of half a gigabyte")
def test_peak_memory_tells_the_back_ends_apart(scripts):
    flat, whole = (scripts["attention"].peak("160/24/8", name) for name in ("torch", "reference"))
    # The twin's logits alone: 160 * 160 pixels, 24 * 24 keys, 4 heads, 4 bytes.
    assert flat < 0.05 and whole > 160 * 160 * 24 * 24 * 4 * 4 / 2**30


def test_the_strip_is_checked_and_measured(scripts, monkeypatch):
    attention = scripts["attention"]
    original = attention.problem
    monkeypatch.setattr(attention, "problem", lambda shape, rows=None: original("48/12/1", rows))
    monkeypatch.setattr(attention, "peak", lambda shape, backend, rows: 0.25)
    row = attention.strip(8)
    assert row["rows"] == 8 and row["error"] < 1e-6 and row["peak_gib"] == 0.25


def test_a_wrong_result_is_not_timed(scripts, monkeypatch):
    attention = scripts["attention"]
    right = attention.windowed_attention
    monkeypatch.setattr(attention, "windowed_attention", lambda *a, **k: right(*a, **k) * 1.001)
    with pytest.raises(SystemExit, match="nothing was timed"):
        attention.compare("24/6/4", 1, False)


def test_the_checkout_needs_no_installation(tmp_path):
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        f"sys.path.insert(0, {str(FOLDER)!r})\n"
        "import checkout; checkout.use_checkout(); checkout.use_checkout()\n"
        "import anyup_fast.kernels.tiling as t, anyup_fast\n"
        "print(t.__file__); print(anyup_fast.__file__)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [
        str(FOLDER.parent / "kernels" / "tiling.py"),
        str(FOLDER.parent / "anyup_fast" / "__init__.py"),
    ]
