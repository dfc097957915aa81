"""The pages of the project, taken apart: links, anchors, commands of the shell, blocks of Python."""

import re
import shlex
from functools import cache

from tree import ROOT, project_files

FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.S | re.M)
# Programs whose arguments are looked at, and others that a page may name.
OURS = ("anyup-fast", "make", "python", "pip", "pytest")
OTHERS = ("export", "cd", "git", "hf", "jupyter", "apt-get")


@cache
def pages():
    """Path to text of every page, in order."""
    return {
        name.as_posix(): (ROOT / name).read_text(encoding="utf-8") for name in project_files() if name.suffix == ".md"
    }


def blocks(text, language):
    """The contents of the fenced blocks in a language."""
    return [body for _, found, body in FENCE.findall(text) if found == language]


def prose(text):
    """A page without its blocks, and without code in backticks, which holds no links."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def links(text):
    """Targets of the links and pictures of a page."""
    return re.findall(r"\]\(([^()\s]+)\)", prose(text)) + re.findall(r'<(?:a|img)\b[^>]*?(?:href|src)="([^"]+)"', text)


def anchors(text):
    """The anchors that the headings of a page get on GitHub."""
    found, counts = set(), {}
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", FENCE.sub("", text), re.M):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")
        counts[slug] = counts.get(slug, -1) + 1
        found.add(f"{slug}-{counts[slug]}" if counts[slug] else slug)
    return found | set(re.findall(r'<a (?:id|name)="([^"]+)"', text))


def commands(text):
    """Commands of a page: lists of words, those of its bash blocks, and indented ones of ours."""
    lines = []
    for body in (*blocks(text, "bash"), *blocks(text, "sh"), *blocks(text, "console")):
        lines += body.replace("\\\n", " ").splitlines()
    lines += re.findall(r"^    ((?:python (?:benchmarks|docs)/|anyup-fast |pytest ).*)$", FENCE.sub("", text), re.M)
    found = []
    for line in lines:
        commands = [[]]
        for word in shlex.split(line.strip().removeprefix("$ "), comments=True):
            if word in ("&&", "||", "|", ";"):
                commands.append([])
            elif commands[-1] or not re.fullmatch(r"[A-Z_]+=.*", word):  # variables of the environment go before
                commands[-1].append(word)
        found += [words for words in commands if words]
    return found


def mentions(text):
    """Commands in the middle of a sentence, as words: `python benchmarks/...`, `anyup-fast ...`, `make ...`."""
    spans = re.findall(
        r"`((?:python (?:benchmarks|docs|examples)/|anyup-fast |make |pytest )[^`]*)`", FENCE.sub("", text)
    )
    return [" ".join(span.split()).split(" ") for span in spans]
