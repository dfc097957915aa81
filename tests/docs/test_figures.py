"""Figures in README are those of the tables that its commands make; pages keep to their length."""

import re
from importlib.util import module_from_spec, spec_from_file_location

import documents
import pytest
from tree import ROOT

spec = spec_from_file_location("costs_of_cards", ROOT / "docs" / "costs.py")
costs_of_cards = module_from_spec(spec)
spec.loader.exec_module(costs_of_cards)
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


def test_counted_figures_are_those_of_the_ledger():
    """`python docs/costs.py` writes them."""
    shapes, rows = costs()
    assert shapes == ["224/16/384", "448/32/384", "518/37/768", "1024/64/768"]
    assert costs_of_cards.page(README) == README
    assert sum("H100" in name and all(cells) for name, cells in rows.items()) == 2
    assert costs_of_cards.page(README.replace("| 0.", "| 9.")) != README.replace("| 0.", "| 9.")


def test_other_pages_tell_the_ledgers_figures():
    page = " ".join(documents.pages()["docs/migration.md"].split())
    (told,) = re.findall(
        r"float32 takes ([\d.]+) ms at 448/32/384 where one in bfloat16 takes ([\d.]+), and ([\d.]+) at 1024/64/768 "
        r"where that takes ([\d.]+):",
        page,
    )
    shapes = ("448/32/384", "1024/64/768")
    exact = [costs_of_cards.sums(dtype)[shape] for shape in shapes for dtype in ("float32", "bfloat16")]
    assert all(same(*pair) for pair in zip(told, exact, strict=True)), (told, exact)


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
