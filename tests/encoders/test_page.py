"""The table of docs/encoders.md: what it names is there, and its figures are what encoders say."""

import importlib.util

import families
import pytest
from tree import ROOT

from anyup_fast.encoders import list_encoders

spec = importlib.util.spec_from_file_location("encoders_page", ROOT / "docs" / "encoders.py")
page = importlib.util.module_from_spec(spec)
spec.loader.exec_module(page)


def test_every_registered_name_is_in_one_row():
    named = [name for row in page.ROWS for name in page.names_of(row)]
    assert sorted(named) == list_encoders()


def test_every_row_has_a_model_that_the_tests_load():
    for row in page.ROWS:
        assert row.key in families.FAMILIES if row.key else row.family in page.WRITTEN


def test_the_page_has_the_rows_as_they_are_written():
    lines = page.PAGE.read_text(encoding="utf-8").splitlines()
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")][1:]
    assert len(found) == len(page.ROWS)
    for cells, row in zip(found, page.ROWS, strict=True):
        assert cells[0] == row.family and cells[4:] == [row.statistics, row.licence, row.layer]
        assert all(f"`{name}`" in cells[1] for name in page.names_of(row)) and row.others in cells[1]
        assert row.patch in cells[2]


@pytest.mark.slow("makes every family of encoders")
def test_the_table_is_what_its_script_makes():
    pytest.importorskip("transformers", minversion="5.0")
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.page(text) == text
