"""The benchmarks of the whole forward and of streaming: what they compare, and that they refuse where they should."""

import importlib.util
import json
import sys

import forked
import pytest
import torch
from tree import ROOT

FOLDER = ROOT / "benchmarks"
if not (FOLDER / "forward.py").is_file():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)


@pytest.fixture
def forward(monkeypatch):
    """benchmarks/forward.py as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("checkout", "attention", "roofline", "forward"):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
    with torch.no_grad():
        yield module


def run(script, *arguments):
    result = forked.run(FOLDER / script, *arguments)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow("processes that measure memory; the parts of it run by default")
def test_forward_prints_one_json_object():
    report = run("forward.py", "--json", "--shapes", "64/8/12", "--rivals", "eager", "chunks", "--repeats", "1")
    (row,) = report["results"]
    assert row["error"] < 5e-6 and set(row["ratio"]) == {"fused", "eager", "chunks"}
    assert row["ratio"]["eager"] == pytest.approx(row["eager"]["seconds"] / row["fused"]["seconds"])
    assert all(row[name]["peak_gib"] >= 0 for name in row["ratio"])


def test_the_rivals_compute_the_same(forward):
    arguments = forward.problem("64/8/12")
    expected = forward.contender("fused")(*arguments)
    for name in ("eager", "chunks"):
        assert torch.allclose(forward.contender(name)(*arguments), expected, atol=1e-4)


def test_a_wrong_result_is_not_timed(forward, monkeypatch):
    right = forward.AnyUp.projected_queries
    monkeypatch.setattr(forward.AnyUp, "projected_queries", lambda *arguments: right(*arguments) * 1.01)
    with pytest.raises(SystemExit, match="nothing was timed"):
        forward.compare("64/8/12", ["eager"], 1, memory=False)


def test_stages_add_up_to_the_whole(forward):
    row = forward.by_stage("96/8/12", 3)
    parts = dict(row["seconds"])
    whole = parts.pop("whole")
    assert set(parts) >= {"guidance", "project_queries", "project_keys", "windowed_attention", "feature_unification"}
    assert 0 < sum(parts.values()) < 1.5 * whole
    assert row["gflop"] > 0 and row["products_alone"] > 0
    assert "forward" not in vars(forward.AnyUp.from_pretrained().key_features_encoder[0])


def test_parts_are_compared_with_the_whole(forward):
    row = forward.parts("96/8/48", 3, classes=2, points=5, box=16)
    assert row["share"]["whole"] == 1 and len(row["parts"]) == 3 + 8
    assert row["share"]["region 16x16, further"] < row["share"]["region 16x16, first"]


def test_streams_are_checked_and_measured():
    report = run("stream.py", "--json", "--sides", "90", "--grid", "6", "--channels", "16", "--tile", "32")
    (row,) = report["results"]
    assert row["side"] == 90 and row["error"] < 1e-5
    assert row["statistics_s"] < row["seconds"] and row["peak_gib"] > row["beyond_gib"] >= 0


def test_the_sweep_for_gpus_sees_what_is_wrong(gpu_scripts, here, taken, monkeypatch):
    gpu_forward = gpu_scripts("gpu_forward")
    monkeypatch.setattr(gpu_forward, "CASES", (((24, 30), (3, 4), 12, None, 1),))
    assert {row["verdict"] for row in taken(gpu_forward.problems(here))} == {"ok"}
    right = gpu_forward.AnyUp.projected_queries
    monkeypatch.setattr(gpu_forward.AnyUp, "projected_queries", lambda *arguments: right(*arguments) * 1.3)
    verdicts = {(row["dtype"], row["what"]): (row["verdict"], row["note"]) for row in taken(gpu_forward.problems(here))}
    for dtype in ("float32", "bfloat16", "float16"):
        assert verdicts[dtype, "forward"][0] == "WRONG" and "first run: error" in verdicts[dtype, "forward"][1]
    for what, note in (("parts", "stream: error"), ("gradients", "gradient of")):
        verdict, told = verdicts["float32", what]
        assert verdict == "WRONG" and told.startswith(note)
    assert verdicts["float32", "operators"] == ("ok", "")


def test_the_forward_is_held_to_single_pixels_before_it_is_timed(gpu_scripts, here, taken, monkeypatch):
    gpu_forward = gpu_scripts("gpu_forward")
    rows = taken(gpu_forward.steps("20/4/6", "float32", here, rates=(1e9, 1e9, 1e9)))
    assert [row["what"] for row in rows[:3]] == ["AnyUp", "AnyUp, called", "AnyUp, host"] and len(rows) == 7
    assert {row["verdict"] for row in rows} == {"ok"}
    assert 0 < float(rows[0]["error"]) < 5e-6
    assert float(rows[0]["share"]) == pytest.approx(float(rows[0]["floor_ms"]) / 2, rel=1e-5)
    right = gpu_forward.AnyUp.forward
    monkeypatch.setattr(gpu_forward.AnyUp, "forward", lambda *arguments: right(*arguments) * 1.0001)
    rows = taken(gpu_forward.steps("20/4/6", "float32", here))
    assert [row["verdict"] for row in rows] == ["WRONG", *["not timed"] * 6]
    assert not any(row["milliseconds"] or row["host_us"] for row in rows)
