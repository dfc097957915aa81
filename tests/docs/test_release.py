"""What goes with a release: one version everywhere, templates and a workflow that ask for what there is."""

import re

import documents
import pytest
from tree import ROOT, project_files

import anyup_fast

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_is_told_alike():
    (cited,) = re.findall(r"^version: (.+)$", text_of("CITATION.cff"), re.M)
    changes = re.search(r"^## (\S+) - (\S+)$", documents.pages()["CHANGELOG.md"], re.M)
    assert cited == changes[1] == anyup_fast.__version__
    assert f'date-released: "{changes[2]}"' in text_of("CITATION.cff")


@pytest.mark.parametrize("name", ["bug", "card", "wish"])
def test_issue_templates_ask_for_the_check(name):
    assert "`anyup-fast check" in text_of(f".github/ISSUE_TEMPLATE/{name}.yml")


def test_the_workflow_runs_what_there_is():
    text = text_of(".github/workflows/ci.yml")
    targets = re.findall(r"run: make (\S+)", text)
    assert {"lint", "test", "docs", "triton-releases"} <= set(targets)
    assert all(re.search(rf"^{target}:", MAKEFILE, re.M) for target in targets)


def test_files_of_the_release_go_into_the_sdist():
    manifest = text_of("MANIFEST.in")
    assert "CITATION.cff CONTRIBUTING.md" in manifest and "graft .github" in manifest
    assert {"CITATION.cff", "CONTRIBUTING.md"} <= {name.as_posix() for name in project_files()}
