import csv
import importlib.util
import sys

import pytest
import tiny
from datasets import fill
from tree import ROOT

pytest.importorskip("transformers")


def test_every_method_is_timed(tmp_path, monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("throughput", ROOT / "benchmarks" / "throughput.py")
    throughput = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "throughput", throughput)
    spec.loader.exec_module(throughput)
    encoder, weights = tiny.encoder_folder(tmp_path / "encoder"), str(tiny.checkpoint(tmp_path / "a.safetensors"))
    command = ["--pictures", fill(tmp_path / "in", 5), "--count", 4, "--size", 56, "--encoder", encoder]
    command += ["--weights", weights, "--rounds", 1, "--csv", tmp_path / "out.csv"]
    rows = throughput.main([str(word) for word in command])
    assert [row["method"] for row in rows] == ["encoder and upsampler", "simple loop", "pipeline (local)"]
    assert all(row["images_per_s"] > 0 and row["count"] == 4 for row in rows)
    assert rows[0]["share_of_computing_alone"] == 1 and "read" in rows[2]["stages_s"]
    with open(tmp_path / "out.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 3
