"""Every command of every page is taken by the real program: parsed, not run."""

import argparse
import os
import re
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from unittest.mock import patch

import documents
import pytest
from tree import ROOT

from anyup_fast import cli

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.search(r"^\.PHONY:(.*)$", MAKEFILE, re.M).group(1).split())
EXTRAS = set(re.findall(r'^        "(\w+)": ', (ROOT / "setup.py").read_text(encoding="utf-8"), re.M))


class Parsed(Exception):
    """Raised in place of what a program does after it has read its arguments."""


@cache
def script(path):
    """The module of a script; the environment, which one that compiles kernels changes, stays as it was."""
    spec = spec_from_file_location("page_" + path.replace("/", "_").removesuffix(".py"), ROOT / path)
    module = module_from_spec(spec)
    with patch.dict(os.environ):
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def checked(monkeypatch):
    """Callable: words of a command -> one sentence about what is wrong with it, or None."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    given = []
    parse = argparse.ArgumentParser.parse_args

    def parsed(parser, arguments=None, namespace=None):
        given.append(parser)
        raise Parsed(parse(parser, arguments, namespace))

    def run(main, words):
        with monkeypatch.context() as change:
            change.setattr(argparse.ArgumentParser, "parse_args", parsed)
            try:
                main(words)
            except Parsed:
                return None
            except SystemExit as stop:
                return None if stop.code == 0 else "its arguments are refused"
        return "it reads no arguments"

    def options_of(main):
        given.clear()
        run(main, [])
        return {option for parser in given for action in parser._actions for option in action.option_strings}

    def check(words, whole=True):
        program, *rest = words
        if program not in documents.OURS:
            return None if program in documents.OTHERS else f"no program that is known here: {program}"
        if program == "make":
            wrong = [word for word in rest if word not in TARGETS and not re.match(r"[A-Z]+=", word)]
            return f"no target of the Makefile: {wrong}" if wrong else None
        if program == "pip":
            extras = {name for word in rest for names in re.findall(r"\[([\w,]+)\]", word) for name in names.split(",")}
            wrong = extras - EXTRAS if any(word.startswith(("anyup-fast", ".[")) for word in rest) else set()
            return f"no extra of this package: {sorted(wrong)}" if wrong else None
        if program == "pytest":
            wrong = [word for word in rest if "/" in word and not (ROOT / word.split("::")[0]).exists()]
            return f"no such tests: {wrong}" if wrong else None
        if program == "anyup-fast":
            if whole:
                return run(cli.main, rest)
            parsers = cli._parser()._subparsers._group_actions[0].choices
            names = [name for name in re.split(r"\|", " ".join(rest).split(" -")[0]) if name.strip()]
            named = {name.strip().split()[0] for name in names} - {"COMMAND"}
            known = {"--version", "--quiet", "--help"}
            known |= {o for name in named & set(parsers) for a in parsers[name]._actions for o in a.option_strings}
            wrong = (named - set(parsers)) | ({word for word in rest if word.startswith("--")} - known)
            return f"not taken: {sorted(wrong)}" if wrong else None
        if rest and rest[0] in ("-m", "-c"):
            import_module(rest[1]) if rest[0] == "-m" else compile(rest[1], "a page", "exec")
            return None
        path, *rest = rest
        if not (ROOT / path).is_file():
            return f"no such file: {path}"
        if "argparse" not in (ROOT / path).read_text(encoding="utf-8"):
            return f"it takes no arguments: {rest}" if rest else None
        main = script(path).main
        if whole:
            return run(main, rest)
        wrong = {word.split("=")[0] for word in rest if word.startswith("--")} - options_of(main)
        return f"no options of {path}: {sorted(wrong)}" if wrong else None

    return check


@pytest.mark.parametrize("name", [name for name, text in documents.pages().items() if documents.commands(text)])
def test_commands_of_a_page_are_taken(name, checked):
    told = [(" ".join(words), checked(words)) for words in documents.commands(documents.pages()[name])]
    assert [(words, fault) for words, fault in told if fault] == []


@pytest.mark.parametrize("name", [name for name, text in documents.pages().items() if documents.mentions(text)])
def test_commands_within_sentences_are_there(name, checked):
    told = [(" ".join(words), checked(words, whole=False)) for words in documents.mentions(documents.pages()[name])]
    assert [(words, fault) for words, fault in told if fault] == []


def test_there_are_commands_to_look_at():
    counts = {name: len(documents.commands(text)) for name, text in documents.pages().items()}
    assert counts["README.md"] > 8 and sum(counts.values()) > 35


@pytest.mark.parametrize(
    "line",
    [
        "anyup-fast upsample photo.jpg --colour red",
        "anyup-fast paint photo.jpg",
        "make coffee",
        "python benchmarks/nothing.py",
        "python benchmarks/quality.py --scenes A --stamps B --unknown",
        "pip install 'anyup-fast[nothing]'",
        "pytest tests/nowhere",
        "rm -rf build",
    ],
)
def test_a_command_that_would_fail_is_told(line, checked, capsys):
    (words,) = documents.commands(f"```bash\n{line}\n```")
    assert checked(words)


@pytest.mark.parametrize("span", ["python benchmarks/quality.py --unknown", "anyup-fast batch --colour", "make coffee"])
def test_a_mention_of_what_is_not_there_is_told(span, checked):
    (words,) = documents.mentions(f"As `{span}` does.")
    assert checked(words, whole=False)
