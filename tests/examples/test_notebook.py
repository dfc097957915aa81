"""The notebook: as it stands in the slow run, its cells as plain Python on a small picture by default."""

import json
import os
import re

import numpy as np
import pytest
from PIL import Image
from tree import ROOT

NOTEBOOK = ROOT / "examples" / "walk.ipynb"


def cells():
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_notebook_is_stored_as_it_ran():
    assert NOTEBOOK.stat().st_size < 300_000
    assert [cell["execution_count"] for cell in cells()] == list(range(1, len(cells()) + 1))
    outputs = [output for cell in cells() for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"execute_result", "stream"}
    assert {output["name"] for output in outputs if output["output_type"] == "stream"} == {"stdout"}
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) == 2


def test_cells_of_the_notebook_on_a_small_picture(dinov2, monkeypatch, tmp_path):
    pytest.importorskip("IPython", reason="needs IPython: pip install ipykernel")
    monkeypatch.chdir(tmp_path)
    source = "\n\n".join("".join(cell["source"]) for cell in cells())
    source, count = re.subn(r"^SIZE = \d+", "SIZE = 140", source, flags=re.M)
    assert count == 1
    names = {}
    exec(compile(source, str(NOTEBOOK), "exec"), names)
    assert names["difference"] < 1e-4
    assert sorted(np.unique(names["labels"])) == list(range(len(names["CLASSES"])))
    # The clicked pixels have the classes that were clicked.
    rows, columns, classes = names["clicks"].T
    assert (names["labels"][rows, columns] == classes).mean() >= 0.8
    assert "<html" in (tmp_path / "view.html").read_text(encoding="utf-8").lower()
    assert Image.open("labels.jpg").size == (280, 140)


@pytest.mark.slow("half a minute")
def test_notebook_runs_in_jupyter(dinov2, tmp_path):
    for package in ("nbclient", "ipykernel"):
        pytest.importorskip(package, reason="needs pip install nbclient ipykernel")
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    there = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=there).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) == 2
    assert os.path.getsize(tmp_path / "view.html") > 100_000
