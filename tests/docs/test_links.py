"""Every link of every page leads somewhere, and every page that a file names is there."""

import re

import documents
import pytest
from tree import ROOT, project_files

FILES = {name.as_posix() for name in project_files()}
FOLDERS = {parent.as_posix() for name in project_files() for parent in name.parents}
NAMED = re.compile(r"\b((?:docs|benchmarks|examples)/[\w./-]*\.(?:md|py|png|jpg|csv|ipynb|cff))\b")
MADE = {"benchmarks/results/gpu.csv"}  # by a command, on a machine with a GPU


def faults(name, text, all_pages, files=FILES, folders=FOLDERS):
    """Sentences about the links of a page that lead nowhere."""
    found = []
    for link in documents.links(text):
        if re.match(r"(https?|mailto):", link):
            continue
        path, _, anchor = link.partition("#")
        parts = name.split("/")[:-1]
        for part in path.split("/") if path else []:
            if part == "..":
                if not parts:
                    found.append(f"{name}: {link} leads out of the project")
                    break
                parts.pop()
            elif part not in ("", "."):
                parts.append(part)
        target = "/".join(parts) if path else name
        if target not in files and target.rstrip("/") not in folders:
            found.append(f"{name}: {link}: no such file")
        elif anchor and (target not in all_pages or anchor not in documents.anchors(all_pages[target])):
            found.append(f"{name}: {link}: no such heading")
    return found


@pytest.mark.parametrize("name", documents.pages())
def test_links_of_a_page(name):
    assert faults(name, documents.pages()[name], documents.pages()) == []


def test_pages_have_links_that_are_looked_at():
    counts = {name: len(documents.links(text)) for name, text in documents.pages().items()}
    assert counts["README.md"] > 15 and sum(counts.values()) > 50


@pytest.mark.parametrize(
    ("link", "said"),
    [
        ("[a](nowhere.md)", "nowhere.md: no such file"),
        ("[a](docs/usage.md#nothing)", "docs/usage.md#nothing: no such heading"),
        ("[a](#nothing)", "#nothing: no such heading"),
        ("![a](docs/nothing.png)", "docs/nothing.png: no such file"),
        ("[a](../outside.md)", "../outside.md leads out of the project"),
    ],
)
def test_a_link_that_leads_nowhere_is_told(link, said):
    assert any(said in fault for fault in faults("README.md", link, documents.pages()))


def test_good_links_are_taken():
    text = "# A page, `code` & more\n[a](README.md) [b](docs/) [c](#a-page-code--more) [d](https://a.org) `[e](f.md)`"
    assert faults("new.md", text, {**documents.pages(), "new.md": text}, FILES | {"new.md"}) == []


def test_pages_and_programs_that_files_name_are_there():
    missing = {}
    for name in sorted(FILES):
        if name.endswith((".py", ".md", "Makefile", ".yml", ".toml", ".js", ".html")) and not name.startswith("tests/"):
            named = NAMED.findall((ROOT / name).read_text(encoding="utf-8"))
            missing[name] = [path for path in named if path not in FILES | MADE]
    assert {name: paths for name, paths in missing.items() if paths} == {}
