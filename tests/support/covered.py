"""Which share of the statements the tests run, folder by folder: a table, of what `coverage json` wrote.

    coverage json -q -o coverage.json && python tests/support/covered.py coverage.json

`make coverage` does it all. Folders of the package are named by the folder, the modules beside them together.
"""

import json
import sys
from collections import Counter
from pathlib import Path, PurePath


def folders(report):
    """{folder: (statements, statements that ran)}, in order of the folders' names, all of them last."""
    statements, ran = Counter(), Counter()
    for name, file in report["files"].items():
        folder = PurePath(*PurePath(name).parts[:-1][:2]).as_posix()
        for place in (f"{folder}/", "all"):
            statements[place] += file["summary"]["num_statements"]
            ran[place] += file["summary"]["covered_lines"]
    names = sorted(statements, key=lambda name: (name == "all", name))
    return {name: (statements[name], ran[name]) for name in names if statements[name]}


def table(report):
    """Lines of Markdown."""
    rows = [f"| {name} | {n} | {100 * ran / n:.1f} % |" for name, (n, ran) in folders(report).items()]
    return ["| folder | statements | run by the tests |", "|---|---:|---:|", *rows]


if __name__ == "__main__":
    print("\n".join(table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
