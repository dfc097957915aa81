"""Figures in README are those of the tables that its commands make; pages keep to their length."""

import csv
import re

import documents
import pytest
from tree import ROOT

README = documents.pages()["README.md"]
NOTES = documents.pages()["benchmarks/NOTES.md"]
LENGTHS = {
    "README.md": 150,
    "docs/training.md": 120,
    "docs/training-findings.md": 60,
    "anyup_fast/weights/README.md": 100,
    "CONTRIBUTING.md": 70,
}


@pytest.mark.parametrize("name", LENGTHS)
def test_a_page_keeps_to_its_length(name):
    assert len(documents.pages()[name].splitlines()) <= LENGTHS[name]


def costs():
    """The table of costs: shapes, and the cells of each row by what it begins with."""
    body = README[README.index("## What it costs") :]
    lines = re.search(r"^(?:\|.*\n)+", body, re.M).group().splitlines()
    head, _, *rest = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    return [shape.replace(" ", "") for shape in head[1:]], {row[0]: row[1:] for row in rest}


def same(told, exact):
    """Whether a figure is another one, rounded to the digits that it has."""
    digits = len(told.partition(".")[2])
    return abs(float(told) - exact) <= 0.5 * 10**-digits * 1.0001


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_counted_figures_are_those_of_the_ledger(dtype):
    with open(ROOT / "benchmarks" / "results" / "ledger.csv", newline="", encoding="utf-8") as file:
        sums = {
            row["shape"]: float(row["expected_ms"])
            for row in csv.DictReader(file)
            if (row["dtype"], row["target"], row["stage"]) == (dtype, "sm_90", "sum")
        }
    shapes, rows = costs()
    (cells,) = [cells for name, cells in rows.items() if f"H100, {dtype}: counted" in name]
    told = dict(zip(shapes, cells, strict=True))
    assert [shape for shape, cell in told.items() if not same(cell.removesuffix(" ms"), sums[shape])] == []


@pytest.mark.parametrize(("row", "time", "memory"), [("float32: measured", 1, 0), ('precision="medium"', 2, 1)])
def test_measured_figures_are_those_of_the_notes(row, time, memory):
    shapes, rows = costs()
    (cells,) = [cells for name, cells in rows.items() if row in name]
    assert sum(map(bool, cells)) == 3
    for shape, cell in zip(shapes, cells, strict=True):
        if cell:
            seconds, gib = re.fullmatch(r"([\d.]+) s, ([\d.]+) GiB", cell).groups()
            (line,) = re.findall(rf"^\| {shape.replace('/', ' / ')} \|.* s \(.*GiB \|.*e-6, .*$", NOTES, re.M)
            noted = [part.strip() for part in line.split("|")[1:-1]]
            assert same(seconds, float(noted[time].split()[0])), (shape, line)
            assert gib == noted[4].removesuffix(" GiB").split(", ")[memory]


def test_no_figure_stands_without_its_command():
    body = README[README.index("## What it costs") : README.index("## Weights")]
    assert "python benchmarks/forward.py --precision highest medium" in body and "python benchmarks/ledger.py" in body
    assert "counted" in body and "measured" in body.lower()


def test_a_wrong_figure_is_told():
    assert same("0.97", 0.9693) and same("5.3", 5.265) and not same("0.96", 0.9693) and not same("5.2", 5.265)


def test_no_page_waits_for_a_figure():
    """Words in capitals that stand for what is to be measured."""
    waiting = re.compile(r"^[A-Z]{4,}$|\b(?:TODO|FIXME|TBD|XXX|FOUND|MEASURED)\b(?!`)", re.M)
    assert {name: waiting.findall(text) for name, text in documents.pages().items() if waiting.search(text)} == {}
