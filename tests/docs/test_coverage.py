"""The table of coverage: what it is made of, and that the notes have one of the folders that there are."""

import re

import covered
from tree import ROOT


def file(statements, ran):
    return {"summary": {"num_statements": statements, "covered_lines": ran}}


def test_folders_are_summed_up():
    files = {
        "kernels/a.py": file(10, 5),
        "pack/b.py": file(30, 30),
        "pack/in/c.py": file(4, 3),
        "pack/in/d.py": file(4, 4),
    }
    files["pack/in/deep/e.py"] = file(2, 1)
    files["pack/none/__init__.py"] = file(0, 0)
    assert covered.folders({"files": files}) == {
        "kernels/": (10, 5),
        "pack/": (30, 30),
        "pack/in/": (10, 8),
        "all": (50, 43),
    }
    assert covered.table({"files": files})[2:] == [
        "| kernels/ | 10 | 50.0 % |",
        "| pack/ | 30 | 100.0 % |",
        "| pack/in/ | 10 | 80.0 % |",
        "| all | 50 | 86.0 % |",
    ]


def test_the_notes_have_every_folder():
    notes = (ROOT / "benchmarks" / "NOTES.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^\| ((?:anyup_fast|kernels)/\S*) \| \d+ \| \d+\.\d % \|$", notes, re.M))
    packages = {path.parent for top in ("anyup_fast", "kernels") for path in (ROOT / top).glob("**/*.py")}
    assert told == {f"{package.relative_to(ROOT).as_posix()}/" for package in packages if any(package.glob("[!_]*.py"))}
