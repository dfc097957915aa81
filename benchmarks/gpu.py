"""The package on a GPU: first whether it is right, then how fast it is. At most ten minutes a command.

    python benchmarks/gpu.py                  # a CUDA machine with torch and triton; nothing to install
    python benchmarks/gpu.py                  # again: goes on with what is not in the file yet
    python benchmarks/gpu.py --tune           # candidate tiles, into kernels/tuned/<device>.json
    python benchmarks/gpu.py --compile-only --target sm_90 --cache DIR --workers 16    # the kernels of a run, anywhere
    python benchmarks/gpu.py --cache DIR      # finds them there, with the same Triton and Python
    python benchmarks/gpu.py --rehearse sm_90 # anywhere: all of it for a GPU that isn't there

What matters most comes first: what `anyup-fast check` compares; the ceilings of this card (bytes copied, products,
exponentials); the attention, the forward and the backward at three sizes; larger sizes and float32; sweeps over drawn
problems; at last what else computes the same. Each row is appended to the CSV as it is made, with device, versions,
commit and a digest of the sources; what is there for the same machine and sources is not made again. What raises costs
its own row. The exit code is 1 if anything was wrong, in this run or in one that it goes on with, 2 where nothing can
be measured.

A time stands beside a result that was held to something more exact, or there is none. Times of kernels are those of
replays of a captured CUDA graph, medians with 20th and 80th percentiles, the L2 cache cleared before each and the queue
never empty; microseconds of the host until a call returns are a row of their own. `share` is the time that the card
needs at least, at the ceilings measured in the same file, over the time taken. Peak memory is what a call allocates
beyond its inputs.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from checkout import ROOT, commit, use_checkout

use_checkout()
sys.path.insert(0, str(ROOT / "tests" / "support"))

import absent  # noqa: E402
import attention_cases  # noqa: E402
import gpu_attention  # noqa: E402
import gpu_backward  # noqa: E402
import gpu_ceilings  # noqa: E402
import gpu_forward  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from anyup_fast.kernels import tiling  # noqa: E402
from compile_kernels import TARGETS  # noqa: E402
from gpu_steps import KEY, Absent, Card, Journal, Run, Step, Stopped, told  # noqa: E402

from anyup_fast import examination  # noqa: E402
from anyup_fast.files import written_aside  # noqa: E402
from anyup_fast.ops import why_not  # noqa: E402

SHAPES = gpu_attention.SHAPES
FIRST = gpu_backward.SHAPES
PARTS = ("check", "ceilings", "attention", "forward", "backward", "sweeps", "rivals")
SOURCES = ("anyup_fast/**/*.py", "kernels/*.py", "kernels/tuned/*.json", "benchmarks/gpu*.py", "tests/support/*.py")
CHECK_SHARE = 0.4  # of the time: with a cold cache the examination compiles for minutes
COMPLETE = Step("check", "", "", "complete", None)


def unable():
    """Why nothing can be measured here: a sentence, or None."""
    if not torch.cuda.is_available():
        return "needs a GPU that torch.cuda.is_available() sees, found none"
    return why_not("triton", "cuda", torch.bfloat16)


def sources():
    """A digest of what decides about the rows."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in ROOT.glob(pattern)}):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def stopping(seconds):
    """Raise `Stopped` within, after so many seconds (None: never) or at a signal that asks to end."""
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("signals arrive in the main thread: run it there")

    def stop(number, _):
        stopped = Stopped("the time is up" if number == signal.SIGALRM else f"signal {number}")
        stopped.signal = None if number == signal.SIGALRM else number
        raise stopped

    numbers = signal.SIGALRM, signal.SIGTERM, signal.SIGINT
    before = [signal.signal(number, stop) for number in numbers]
    try:
        if seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class _CheckIsUp(Stopped):
    pass


def check(run, until):
    """The rows of `anyup-fast check`, as many as there is time for."""
    if COMPLETE.key in run.journal.rows and not run.again:
        run.take(_examined(row["shape"], row["dtype"], row["what"]) for row in _there(run.journal))
        return

    def progress(row):
        step = _examined(row.shape, row.dtype, f"{row.operator}, {row.backend}")
        if step.key not in run.journal.rows or run.again:
            run.add(step, dict(verdict=row.verdict, error=row.error, limit=row.limit, note=row.reason))
        if time.perf_counter() > until:
            raise _CheckIsUp("the time of the check is up")

    try:
        found = examination.examine(run.card.device, progress=progress)
    except _CheckIsUp as stopped:
        print(f"{stopped}: the rest of it is left to the next run", flush=True)
        run.counts["left out"] += 1
        return
    print("\n".join(found.machine), flush=True)
    run.add(COMPLETE, dict(verdict="ok" if run.card.executes else "not run"))


def _examined(shape, dtype, what):
    return Step("check", shape, dtype, what, None)


def _there(journal):
    return [row for row in list(journal.rows.values()) if row["part"] == "check"]


def launched(card):
    """Steps that launch what the examination would, for a card that executes nothing and is therefore not examined."""
    for row, call in examination.calls(card.device):
        yield Step("examined", row.shape, row.dtype, row.operator, call)


def plan(options, card, journal):
    """Yield groups of steps, what matters most first; a group's tensors are gone when the next is made."""

    def measured(part, shapes, dtype):
        for shape in shapes:
            if part in options.parts and shape in options.shapes and dtype in options.dtypes:
                if part == "backward":
                    yield gpu_backward.steps(shape, dtype, card)
                else:
                    module = dict(attention=gpu_attention, forward=gpu_forward)[part]
                    yield module.steps(shape, dtype, card, gpu_ceilings.rates(journal, dtype))

    rest = [shape for shape in SHAPES if shape not in FIRST]
    if "ceilings" in options.parts:
        yield gpu_ceilings.steps(card)
    for shape in FIRST:
        yield from measured("attention", [shape], "bfloat16")
        yield from measured("forward", [shape], "bfloat16")
    yield from measured("backward", FIRST, "bfloat16")
    for dtype, shapes in (("bfloat16", rest), ("float32", list(SHAPES)), ("float16", list(SHAPES))):
        for shape in shapes:
            yield from measured("attention", [shape], dtype)
            yield from measured("forward", [shape], dtype)
    for dtype in ("float32", "float16"):
        yield from measured("backward", FIRST, dtype)
    if "sweeps" in options.parts:
        yield gpu_attention.problems(options.count, card)
        yield gpu_backward.problems(options.count, card)
        yield gpu_forward.problems(card)
        yield gpu_backward.unification_problems(card)
    if "rivals" in options.parts and card.executes:
        for shape in options.shapes:
            yield gpu_attention.rival_steps(shape, card)


def settled(cache):
    """Make Triton's cache in a folder that was moved or copied its own: it names its files by whole paths."""
    for group in cache.glob("*/__grp__*.json"):
        named = json.loads(group.read_text(encoding="utf-8"))
        there = {name: group.parent / name for name in named["child_paths"]}
        named["child_paths"] = {name: str(path) for name, path in there.items() if path.exists()}
        with written_aside(group) as aside:
            aside.write_text(json.dumps(named), encoding="utf-8")


def trimmed(cache):
    """Leave out of Triton's cache what a run does not need; bytes of what is left."""
    for path in cache.glob("*/*.source"):
        path.unlink()
    settled(cache)
    return sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())


def spread(given, workers, cache):
    """Compile in several processes, each its share; the exit code.

    Args:
        given: arguments of the command line. workers: how many. cache: the folder they share, or None for Triton's own.
    """
    with tempfile.TemporaryDirectory() as folder:
        running = []
        try:
            for k in range(workers):
                command = [sys.executable, __file__, *given, "--share", f"{k}/{workers}"]
                with open(Path(folder) / str(k), "wb") as out:
                    running.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT))
            codes = [process.wait() for process in running]
        finally:
            for process in running:
                process.terminate()
        for k, code in enumerate(codes):
            lines = (Path(folder) / str(k)).read_text(encoding="utf-8").splitlines()
            print(f"process {k}, code {code}: " + ("\n".join(lines[-20:]) if code else lines[-1]))
    if cache is not None:
        size = trimmed(cache) / 2**20
        print(f"{cache}: {len(list(cache.glob('*/*.cubin')))} kernels, {size:.1f} MiB, for Triton {triton.__version__} "
              f"on Python {platform.python_version()}")  # fmt: skip
    return max(map(abs, codes))


def tiles(options, card):
    """Groups of candidate tiles, for --tune."""
    for dtype in options.dtypes:
        for shape in options.shapes:
            yield gpu_attention.tuning_steps(shape, dtype, card)


def perform(options, card, journal, seconds=None):
    """Take every step there is time for, and say what came of it.

    Args:
        options: as of the command line. card: `gpu_steps.Card`. journal: `gpu_steps.Journal`.
        seconds: when to stop; None means never.

    Returns:
        Exit code: 0, 1 if something was wrong, 128 and the number of a signal that stopped it.
    """
    started = time.perf_counter()
    until = float("inf") if seconds is None else started + seconds
    run, code = Run(card, journal, options.again, until, options.share), 0
    try:
        with stopping(seconds):
            if "check" in options.parts and not options.tune:
                if not options.compile_only:
                    check(run, until if seconds is None else started + CHECK_SHARE * seconds)
                if not card.executes:
                    run.take(launched(card))
            for steps in tiles(options, card) if options.tune else plan(options, card, journal):
                run.take(steps)
                card.tidy()
    except Stopped as stopped:
        print(f"stopped: {stopped}", flush=True)
        code = 128 + stopped.signal if getattr(stopped, "signal", None) else int("lost" in str(stopped))
    if options.tune and card.executes:
        tuned = [row for row in journal.rows.values() if row["part"] == "tiles"]
        print(f"tiles written to {gpu_attention.save_tuned(tuned, tiling.Device.of(card.device))}")
    print(summary(run, time.perf_counter() - started))
    return code or int(bool(run.faults))


def summary(run, seconds):
    """What a run has come to, as text: what is timed, what is wrong, counts."""
    lines = ["", table([row for row in run.journal.rows.values() if row["milliseconds"] or row["host_us"]])]
    for row in run.faults:
        name = " ".join(row[column] for column in KEY)
        lines.append(
            f"{row['verdict']}: {name}; error {row['error'] or 'none'}, limit {row['limit'] or 'none'}; {row['note']}"
        )
    counts = ", ".join(f"{number} {verdict}" for verdict, number in sorted(run.counts.items()))
    lines.append(f"{run.journal.path}: {counts or 'no row'}; {seconds:.0f} s")
    compiled = dict(absent.COMPILED)
    lines.append(
        f"kernels: {compiled.get('hit', 0)} found in the cache, {compiled.get('miss', 0)} compiled"
        + (f", {compiled['left out']} not compiled" if "left out" in compiled else "")
        + (f"; {sum(absent.LAUNCHED.values())} launches, none executed" if not run.card.executes else "")
    )
    return "\n".join(lines)


def table(rows):
    """Text of the rows that have times, aligned; "" if there is none."""
    heads = "part shape dtype what milliseconds host_us peak_mib floor_ms share goal_ms".split()
    lines = [heads, *([row[name] for name in heads] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    text = ["  ".join(cell.rjust(n) for cell, n in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(text) if rows else ""


def _share(text):
    return tuple(map(int, text.split("/")))


def parsed(arguments=None):
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="when to stop (default: 9; without a card never)")
    parser.add_argument("--csv", type=Path, help="the file that rows are appended to (default: results/gpu.csv)")
    parser.add_argument("--again", action="store_true", help="also make rows that are there")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--tune", action="store_true", help="candidate tiles alone, and write the fastest down")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=list(attention_cases.DTYPES))
    parser.add_argument("--count", type=int, default=16, help="drawn problems in each sweep")
    parser.add_argument("--cache", type=Path, help="Triton's cache (default: TRITON_CACHE_DIR, or what Triton takes)")
    parser.add_argument("--commit", help="name of the commit, where the checkout is no repository")
    parser.add_argument("--workers", type=int, default=1, help="processes of --compile-only")
    parser.add_argument("--share", type=_share, help=argparse.SUPPRESS)
    cards = [name for name in TARGETS if name.startswith("sm_")]
    parser.add_argument("--rehearse", choices=cards, metavar="sm_NN", help="for a card that isn't there, uncompiled")
    parser.add_argument("--compile-only", action="store_true", help="only compile what a run launches; see --target")
    parser.add_argument("--target", choices=cards, metavar="sm_NN", help="the card to compile for")
    options = parser.parse_args(arguments)
    if options.minutes is not None and options.minutes <= 0:
        parser.error(f"--minutes: need more than 0, got {options.minutes}")
    if options.workers < 1 or options.workers > 1 and not options.compile_only:
        parser.error(f"--workers: need 1, or more with --compile-only, got {options.workers}")
    if options.compile_only != (options.target is not None):
        parser.error("--compile-only and --target sm_NN go together")
    if options.compile_only and options.rehearse:
        parser.error("--rehearse compiles nothing: leave --compile-only out")
    return options


def main(arguments=None):
    """Command line; returns the exit code."""
    options = parsed(arguments)
    target = options.rehearse or options.target
    if target and os.environ.get("TRITON_INTERPRET", "0") != "0":
        print("nothing to compile: TRITON_INTERPRET is set, which compiles nothing; unset it", file=sys.stderr)
        return 2
    if target is None and (reason := unable()):
        print(f"nothing to measure on: {reason}", file=sys.stderr)
        return 2
    if options.cache is not None:
        os.environ["TRITON_CACHE_DIR"] = str(options.cache.resolve())
        if options.share is None:
            settled(options.cache.resolve())
    if options.compile_only and options.share is None:
        given = sys.argv[1:] if arguments is None else list(map(str, arguments))
        return spread(given, options.workers, options.cache and options.cache.resolve())
    # Lines of the source in a kernel are two thirds of it, and part of what the cache knows it by.
    os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")
    if target:
        os.environ["TRITON_STORE_BINARY_ONLY"] = "1"
        card = Absent(target, absent.install(TARGETS[target][1], TARGETS[target][4], compiling=options.compile_only))
    else:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        absent.count_compilations()
        card = Card()
    machine = dict(card.machine(), python=platform.python_version(), torch=torch.__version__, triton=triton.__version__)
    machine.update(commit=options.commit or commit(), sources=sources())
    path = options.csv or ROOT / "benchmarks" / "results" / "gpu.csv"
    if target and options.csv is None:
        path = Path(tempfile.mkdtemp(prefix="anyup-fast-")) / "gpu.csv"
    try:
        journal = Journal(path, machine)
    except (ValueError, OSError) as error:
        print(f"no file to write to: {told(error)}", file=sys.stderr)
        return 2
    seconds = None if target and options.minutes is None else 60 * (options.minutes or 9)
    return perform(options, card, journal, seconds)


if __name__ == "__main__":
    sys.exit(main())
