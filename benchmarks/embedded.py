"""The runs behind the embedded weights: `embedded.csv` has them as a table, this lists or executes them.

    python benchmarks/embedded.py --list                # every command, in order, nothing is run
    python benchmarks/embedded.py RUNS --first PHOTOGRAPHS CUTOUTS --all PHOTOGRAPHS CUTOUTS

A row is a run of `anyup-fast train` (`train`; its options are columns, empty ones have the default), the mean of two
weights (`mean`), weights whose attention has its logits times a factor (`soften`), or the weights of a run at an
earlier step (`until`). `of` names the rows it starts from. Each row gets a folder in RUNS; what is there is not made
again, and a run that was interrupted goes on. `--target NAME` makes another row than the last, with those it needs.
"""

import argparse
import csv
import shutil
import sys
from pathlib import Path

TABLE = Path(__file__).with_name("embedded.csv")
OWN = ("run", "how", "of", "sources")  # columns that are no options of `anyup-fast train`
WEIGHTS = "anyup.safetensors"
SOURCES = {"first": ("SCENES", "STAMPS"), "all": ("ALL_SCENES", "ALL_STAMPS")}


def read(path=TABLE):
    """The rows of the table by their names, in its order."""
    with open(path, newline="", encoding="utf-8") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def needed(rows, target):
    """Names of the rows that `target` is made from, and itself, in the table's order."""
    if target not in rows:
        raise ValueError(f"no row {target!r}; there are {', '.join(rows)}")
    found, waiting = set(), [target]
    while waiting:
        name = waiting.pop()
        found.add(name)
        row = rows[name]
        above = (
            rows[row["of"].split()[0]]["of"] if row["how"] == "until" else row["of"]
        )  # a part of a run, not all of it
        waiting += [word for word in above.split() if word in rows and word not in found]
    return [name for name in rows if name in found]


def command(rows, name, folder, sources):
    """Arguments of `anyup-fast` for a row that trains, or for one that is a run up to an earlier step."""
    row, until = rows[name], []
    if row["how"] == "until":
        run, step = row["of"].split()
        row, until = rows[run], ["--until", step]
    scenes, stamps = sources[row["sources"]]
    words = ["train", "--scenes", scenes, "--stamps", stamps, "--out", f"{folder}/{row['run']}", "--threads", "1"]
    if row["of"]:
        words += ["--init", f"{folder}/{row['of']}/{WEIGHTS}"]
    for option in (column for column in row if column not in OWN and row[column]):
        words += [f"--{option}", *row[option].split()]
    return words + until


def mean(parts):
    """The weighted mean of state dicts; `parts` are pairs of one and its share."""
    return {name: sum(share * weights[name] for weights, share in parts) for name in parts[0][0]}


def softened(weights, factor):
    """The same weights with the logits of their attention times `factor`, by the projection of the queries."""
    weights = dict(weights)
    for kind in ("weight", "bias"):
        name = f"cross_decode.cross_attn.attention.in_proj_{kind}"
        weights[name] = weights[name].clone()
        weights[name][: len(weights[name]) // 3] *= factor
    return weights


def execute(rows, name, folder, sources):
    """Make the weights of a row; the ValueError names the row whose training ended with an error."""
    from safetensors.torch import load_file

    from anyup_fast import cli
    from anyup_fast.checkpoints import save_checkpoint

    row, target = rows[name], Path(folder, name, WEIGHTS)
    words = row["of"].split()
    if row["how"] in ("train", "until"):
        if cli.main(command(rows, name, folder, sources)) != 0:
            raise ValueError(f"row {name}: its training failed")
        if row["how"] == "until":
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(folder, words[0], WEIGHTS), target)
            Path(folder, words[0], WEIGHTS).unlink()  # not those of the whole run
        return
    parts = [load_file(Path(folder, word, WEIGHTS)) for word in words[::2]]
    shares = [float(word) for word in words[1::2]]
    made = softened(parts[0], *shares) if row["how"] == "soften" else mean(list(zip(parts, shares, strict=True)))
    target.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(target, made)


def described(rows, name, folder, sources):
    """One line about a row: a command of the shell, or what is done to weights."""
    row = rows[name]
    words = row["of"].split()
    if row["how"] in ("train", "until"):
        return " ".join(["anyup-fast", *command(rows, name, folder, sources)])
    if row["how"] == "soften":
        return f"# {name}: {words[0]}, logits of the attention times {words[1]}"
    return f"# {name}: " + " + ".join(f"{share} {part}" for part, share in zip(words[::2], words[1::2], strict=True))


def main(arguments=None):
    """Run the command line; the exit code is 0, or 2 with one sentence on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", default="RUNS", help="folder for the runs, one folder each")
    parser.add_argument("--first", nargs=2, metavar=("SCENES", "STAMPS"), help="photographs and cut-outs up to run x")
    parser.add_argument("--all", nargs=2, metavar=("SCENES", "STAMPS"), help="those of the runs from y on")
    parser.add_argument("--target", metavar="ROW", help="the row to make (default: the last of the table)")
    parser.add_argument("--table", default=TABLE, metavar="FILE", help="another table (default: embedded.csv)")
    parser.add_argument("--list", action="store_true", help="print what would be run, and run nothing")
    options = parser.parse_args(arguments)
    sources = {name: getattr(options, name) or SOURCES[name] for name in SOURCES}
    try:
        rows = read(options.table)
        target = options.target or list(rows)[-1]
        for name in needed(rows, target):
            if options.list:
                print(described(rows, name, options.runs, sources))
                continue
            if not (options.first and options.all):
                raise ValueError("name the pictures: --first SCENES STAMPS --all SCENES STAMPS")
            if not Path(options.runs, name, WEIGHTS).exists():
                print(described(rows, name, options.runs, sources), flush=True)
                execute(rows, name, options.runs, sources)
    except (OSError, ValueError) as error:
        print(f"embedded.py: {error}", file=sys.stderr)
        return 2
    if not options.list:
        print(f"-> {Path(options.runs, target, WEIGHTS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
