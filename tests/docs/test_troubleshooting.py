"""Every sentence that docs/troubleshooting.md quotes is one that the package prints."""

import ast
import errno
import os
import re

import documents
import pytest
from tree import ROOT, project_files

PAGE = documents.pages()["docs/troubleshooting.md"]
LONG = 12  # characters that a quotation has in common with a string of the sources at least, or
SHORT = 5  # where the string is all there between two things that are put in
# What others say: PyTorch, the system.
FOREIGN = (
    "Expected to have finished reduction in the prior iteration",
    "Inference tensors cannot be saved for backward",
)


def quoted(page):
    """Sentences in backticks in the first column of the tables."""
    cells = [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if line.startswith("| `")]
    return [span for cell in cells for span in re.findall(r"`([^`]+)`", cell)]


def fragments(sources):
    """The strings of Python sources but docstrings, cut at what is put in, white space as one blank."""
    found = set()
    for source in sources:
        tree = ast.parse(source)
        bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
                found.update(re.split(r"%[-\d.]*[srdfg]|\{[^{}]*\}", re.sub(r"\s+", " ", node.value)))
    return {fragment for fragment in found if len(fragment.strip()) >= SHORT}


@pytest.fixture(scope="module")
def printed():
    """Strings of the sources, and all runs of `LONG` characters in them."""
    folders = "anyup_fast", "kernels"
    sources = [
        (ROOT / name).read_text(encoding="utf-8")
        for name in project_files()
        if name.suffix == ".py" and name.parts[0] in folders
    ]
    found = fragments(sources)
    return found, {fragment[i : i + LONG] for fragment in found for i in range(len(fragment) - LONG + 1)}


def strange(sentence, printed):
    """The longest run of plain words of a sentence that no string of the sources has, between what is put in."""
    whole, runs = printed
    for code in errno.errorcode:
        sentence = sentence.replace(os.strerror(code), "...")  # what the system says
    mask = [False] * len(sentence)
    for i in range(len(sentence) - LONG + 1):
        if sentence[i : i + LONG] in runs:
            mask[i : i + LONG] = [True] * LONG
    for fragment in whole:
        place = sentence.find(fragment)
        while place >= 0:
            mask[place : place + len(fragment)] = [True] * len(fragment)
            place = sentence.find(fragment, place + 1)
    longest, run = [], []
    for word in re.finditer(r"\S+", sentence):
        plain = re.fullmatch(r"[a-z']{2,}[,;:.?]?", word.group())
        run = [*run, word.group()] if plain and not all(mask[word.start() : word.end()]) else []
        longest = max(longest, run, key=len)
    return longest


@pytest.mark.parametrize("sentence", quoted(PAGE))
def test_a_quoted_sentence_is_in_the_sources(sentence, printed):
    if any(foreign in sentence for foreign in FOREIGN):
        assert len(strange(sentence, printed)) > 2, "ours after all"
        return
    # Two words may be a value: of a path, a name.
    assert len(strange(sentence, printed)) <= 2, strange(sentence, printed)


def test_the_page_quotes_and_its_foreign_sentences_are_there():
    assert len(quoted(PAGE)) > 50
    assert all(foreign in PAGE for foreign in FOREIGN)


@pytest.mark.parametrize(
    "sentence",
    [
        "image: the values from 0 to 255 look wrong, please choose value_range=(0, 255)",
        "the film could not be encoded because libx264 was not found",
        "out of cheese",
    ],
)
def test_a_sentence_that_nobody_prints_is_told(sentence, printed):
    assert len(strange(sentence, printed)) > 2
