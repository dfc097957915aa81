"""Make the API pages out of the docstrings, and check their links: `python docs/api.py`, or `make docs`.

pdoc makes them: it reads the docstrings as they are (no second language, no folder of stubs and no theme to keep),
its pages are plain files with a search that works from disk, and it brings four small packages.
"""

import argparse
import html
import re
import sys
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[1]
# What tests/test_public.py promises; the rest of the package is for those who read it.
MODULES = [
    "anyup_fast",
    "anyup_fast.model",
    "anyup_fast.prepared",
    "anyup_fast.heads",
    "anyup_fast.padded",
    "anyup_fast.encoders",
    "anyup_fast.encoders.text",
    "anyup_fast.batch",
    "anyup_fast.viewer",
    "anyup_fast.training",
    "anyup_fast.ops",
    "anyup_fast.plain.reference",
    "anyup_fast.export",
    "anyup_fast.kept",
]


def specifications(modules=MODULES):
    """The modules as pdoc takes them, each without those below it."""
    return [word for name in modules for word in (name, f"!{re.escape(name)}\\..+")]


def make(folder):
    """Write the pages of `MODULES` into a folder."""
    import pdoc

    for module in map(import_module, MODULES):
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            vars(module).setdefault(name, value)  # names that a package resolves when they are asked for
    pdoc.render.configure(docformat="google", footer_text=f"anyup-fast {import_module('anyup_fast').__version__}")
    pdoc.pdoc(*specifications(), output_directory=Path(folder))


def broken_links(folder):
    """Sentences about links between pages of a folder that lead to no file, or to no place in one."""
    folder = Path(folder)
    pages = {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in folder.rglob("*.html")}
    pages = {name: re.sub(r"<script\b.*?</script>", "", text, flags=re.S) for name, text in pages.items()}
    places = {name: set(re.findall(r"""\bid=["']([^"']+)["']""", text)) for name, text in pages.items()}
    faults = []
    for name, text in sorted(pages.items()):
        for link in sorted(
            {html.unescape(link) for link in re.findall(r"""<a\b[^>]*?\bhref=["']([^"']+)["']""", text)}
        ):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, place = unquote(link).partition("#")
            target = ((folder / name).parent / path).resolve() if path else (folder / name).resolve()
            key = target.relative_to(folder.resolve()).as_posix() if target.is_relative_to(folder.resolve()) else None
            if key not in pages:
                faults.append(f"{name}: {link} leads to no page")
            elif place and place not in places[key]:
                faults.append(f"{name}: {link} leads to no place of {key}")
    return faults


def main(arguments=None):
    """Run the command line; the exit code is 1 where a link leads nowhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=ROOT / "build" / "docs", metavar="FOLDER", help="default: build/docs")
    options = parser.parse_args(arguments)
    make(options.out)
    faults = broken_links(options.out)
    print(*faults, f"-> {Path(options.out) / 'index.html'}", sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
