"""One step of the run on a GPU, what it is timed with, and the file that its row goes to. Part of gpu.py.

A step is computed, judged against something more exact, and only then timed. What it raises costs its own row.
"""

import csv
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from anyup_fast.kept import Kept, captured_here

COLUMNS = (
    "device capability python torch triton cuda commit sources part shape dtype what verdict error limit milliseconds "
    "p20 p80 host_us peak_mib rate floor_ms share goal_ms clock tile note"
).split()
MACHINE = COLUMNS[:8]
KEY = "part", "shape", "dtype", "what"
WRONG = "WRONG", "failed"
ENOUGH_S = 5.0  # what has to be left of the time for a step to begin


class Stopped(BaseException):
    """The time is up or a signal came: no error of a step, so that nothing that meets errors meets it."""


@dataclass
class Step:
    """One row.

    Attributes:
        part, shape, dtype, what: strings that name it; with the machine they are its key in the file.
        launch: callable without arguments that computes it.
        judge: callable from what `launch` gave to a dict of `error`, `limit` and, if something else is wrong, `fault`;
            None where there is nothing to compare with.
        clock: "graph" (replays of a captured CUDA graph), "events" (around single calls), "host" (until the call
            returns), or None where it is not timed.
        needs: `what` of steps of the same part, shape and dtype without which it is not timed.
        operators: operators of the examination none of which may be wrong in its dtype.
        derive: callable from milliseconds to a dict of further columns. figures: columns that are known before.
        repeats: it launches no kernel but those of steps before; a card that executes nothing is spared it.
        rival: something else than this package: its errors are told and are no fault.
        gib: memory it needs beside its inputs; it is left out where less is free.
    """

    part: str
    shape: str
    dtype: str
    what: str
    launch: object
    judge: object = None
    clock: str | None = None
    needs: tuple = ()
    operators: tuple = ()
    derive: object = None
    figures: dict = field(default_factory=dict)
    rival: bool = False
    repeats: bool = False
    gib: float = 0.0

    @property
    def key(self):
        """What it is found by in the file."""
        return self.part, self.shape, self.dtype, self.what

    def row(self, card):
        """Compute, judge and time it on a card.

        Returns:
            dict of columns; `verdict` is "ok", "WRONG", or "not run" on a card that executes nothing.
        """
        row = dict(self.figures)
        out = self.launch() if card.executes or not self.repeats else None
        card.wait()
        row["verdict"] = "ok" if card.executes else "not run"
        if self.judge is not None and card.executes:
            judged = self.judge(out)
            fault = judged.pop("fault", None)
            row.update(judged)
            if fault or not judged["error"] <= judged["limit"]:
                return {**row, "verdict": "WRONG", "note": fault or ""}
        del out
        if self.clock is not None:
            row["clock"] = self.clock
            row.update(card.timed(self.clock, self.launch))
            if "milliseconds" in row and self.derive is not None:
                row.update(self.derive(row["milliseconds"]))
        return row


class Lazy:
    """What a group of steps shares, made when the first of them asks for it; an error is raised anew each time."""

    def __init__(self, make):
        self._make = make

    @cached_property
    def _made(self):
        return self._make()

    def __call__(self):
        return self._made


class Card:
    """The GPU that is there.

    Attributes:
        executes: whether what is launched is computed. device: where tensors lie.
    """

    executes = True
    device = torch.device("cuda")

    def draw(self, shape, dtype, seed=0):
        """Normal random numbers, drawn where they lie."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(dtype)

    def wait(self):
        """Wait for everything that was launched; what it has done wrong is raised here."""
        torch.cuda.synchronize()

    def lost(self):
        """Why nothing can be computed here any more: the error, or None."""
        try:
            torch.cuda.synchronize()
            torch.zeros(1, device=self.device).item()
        except torch.OutOfMemoryError:
            return None
        except RuntimeError as error:  # an illegal access, say, which leaves the context unusable
            return told(error)
        return None

    def tidy(self):
        """Give memory that nothing uses back."""
        torch.cuda.empty_cache()

    def free_gib(self):
        """GiB that could be allocated."""
        return torch.cuda.mem_get_info()[0] / 2**30

    def timed(self, clock, call, seconds=0.5, most=30):
        """dict of columns: milliseconds with percentiles and the peak of memory, or microseconds of the host."""
        return self._host(call, most) if clock == "host" else self._kernels(clock, call, seconds, most)

    def _host(self, call, most):
        times = []
        for _ in range(most):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            times.append(1e6 * (time.perf_counter() - start))
        torch.cuda.synchronize()
        return dict(host_us=statistics.median(times))

    def _kernels(self, clock, call, seconds, most):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        out = call()
        torch.cuda.synchronize()
        once = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() - before
        del out
        graph = kept = None  # what a graph reads lives as long as it
        if clock == "graph":
            # As `AnyUp.captured` does: what is made of weights is made before, in the stream that is captured.
            kept, stream = Kept(), torch.cuda.Stream()
            with captured_here(kept):
                with torch.cuda.stream(stream):
                    call()
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream):
                    call()
            call = graph.replay
        # Writing this clears the L2 cache, and takes so long that the queue is never empty.
        flush = torch.empty(512 << 20, dtype=torch.int8, device=self.device)
        events, deadline = [], time.perf_counter() + seconds
        call()
        least, together = (5, 5) if once < 0.1 else (1, 1)
        while len(events) < least or (len(events) < most and time.perf_counter() < deadline):
            for _ in range(together):
                flush.zero_()
                events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
                events[-1][0].record()
                call()
                events[-1][1].record()
            torch.cuda.synchronize()
        times = sorted(start.elapsed_time(stop) for start, stop in events)
        graph = kept = None
        self.tidy()
        share = len(times) // 5
        middle = statistics.median(times)
        return dict(milliseconds=middle, p20=times[share], p80=times[-1 - share], peak_mib=peak / 2**20)

    def machine(self):
        """Columns that say what it is."""
        return dict(
            device=torch.cuda.get_device_name(),
            capability="{}.{}".format(*torch.cuda.get_device_capability()),
            cuda=torch.version.cuda or torch.version.hip,
        )


class Absent(Card):
    """A GPU that isn't there, under the driver of tests/support/absent.py: nothing is executed, nothing has a time."""

    executes = False
    device = torch.device("cpu")

    def __init__(self, target="", like=None):
        self.target, self.like = target, like

    def draw(self, shape, dtype, seed=0):
        """Memory that nobody touches."""
        return torch.empty(shape, dtype=dtype)

    def wait(self):
        """Nothing was launched that could be waited for."""

    def lost(self):
        """It was never there."""
        return None

    def tidy(self):
        """Nothing is kept."""

    def free_gib(self):
        """As much as one likes."""
        return float("inf")

    def timed(self, clock, call, **_):
        """No columns."""
        return {}

    def machine(self):
        """Columns that say what it would be."""
        major, minor = self.like.capability
        return dict(device=f"{self.target}, absent", capability=f"{major}.{minor}", cuda="none")


def told(error, most=240):
    """Kind and text of an error on one line: its beginning and, where compilers say what is wrong, its end."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-(most // 2) :]}"


class Journal:
    """The CSV that rows are appended to, one by one.

    Args:
        path: of the file; made if it isn't there. machine: columns of every row; rows of other machines are
            left alone.

    Attributes:
        rows: key to row (dict of strings) of what is there for this machine.

    Raises:
        ValueError: the file has other columns.
    """

    def __init__(self, path, machine):
        self.path, self.machine, self.rows = Path(path), {name: str(machine[name]) for name in MACHINE}, {}
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        whole = text[: text.rfind("\n") + 1]  # a line that was torn is no row
        lines = list(csv.reader(whole.splitlines()))
        if lines and lines[0] != COLUMNS:
            raise ValueError(f"{self.path} has other columns than this version writes; name another file with --csv")
        for line in lines[1:]:
            row = dict(zip(COLUMNS, line, strict=True))
            if all(row[name] == value for name, value in self.machine.items()):
                self.rows[tuple(row[name] for name in KEY)] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if whole != text:
            self.path.write_text(whole, encoding="utf-8")
        if not lines:
            self._append(COLUMNS)

    def _append(self, values):
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(values)

    def add(self, step, row):
        """Append the row of a step (its `part`, `shape`, `dtype` and `what`): it is in the file when this returns."""
        row = {**self.machine, **{name: getattr(step, name) for name in KEY}, **row}
        line = {name: _text(row.get(name)) for name in COLUMNS}
        if unknown := row.keys() - set(COLUMNS):
            raise ValueError(f"row: no columns {sorted(unknown)}")
        self._append(line.values())
        self.rows[tuple(line[name] for name in KEY)] = line
        return line

    def value(self, key, column):
        """A number of a row that is "ok", or None."""
        row = self.rows.get(key, {})
        return float(row[column]) if row.get("verdict") == "ok" and row[column] else None


def _text(value):
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())


class Run:
    """Takes steps one after the other, each to its row.

    Args:
        card: `Card` or `Absent`. journal: `Journal`. again: take steps whose row is there as well.
        until: value of `time.perf_counter` after which no step begins.
        share: (k, n) takes step k of every n, whatever it needs: one of n processes that only compile. None takes all.

    Attributes:
        counts: Counter of verdicts of this run, "there before" and "left out" besides.
        faults: rows that are wrong, those that were there before included.
    """

    def __init__(self, card, journal, again=False, until=float("inf"), share=None):
        self.card, self.journal, self.again, self.until, self.share = card, journal, again, until, share
        self._seen = 0
        self.counts, self.faults, self.made = Counter(), [], []

    def take(self, steps):
        """Take steps; those there is no time for are counted as "left out".

        Raises:
            Stopped: the card is lost: it has to be started again.
        """
        for step in steps:
            self._seen += 1
            if self.share is not None and self._seen % self.share[1] != self.share[0]:
                continue
            if step.key in self.journal.rows and not self.again:
                self.counts["there before"] += 1
                self._note(step, self.journal.rows[step.key])
            elif time.perf_counter() + ENOUGH_S > self.until:
                self.counts["left out"] += 1
            else:
                self.add(step, self._row(step))
                if self.journal.rows[step.key]["verdict"] == "failed" and (reason := self.card.lost()):
                    behind = " ".join(step.key)
                    raise Stopped(f"the card is lost ({reason}): start again, it goes on behind {behind}")

    def add(self, step, row):
        """Write and print a row that was made."""
        line = self.journal.add(step, row)
        self.counts[line["verdict"]] += 1
        self.made.append(line)
        self._note(step, line)
        print(sentence(line), flush=True)

    def _note(self, step, line):
        if line["verdict"] in WRONG and not step.rival:
            self.faults.append(line)

    def _row(self, step):
        try:
            if reason := self._why_not(step):
                return dict(verdict="not timed", note=reason)
            return step.row(self.card)
        except Exception as error:  # whatever a compiler, a launch or a device raises belongs to this row
            row = dict(verdict="failed", note=told(error))
        self.card.tidy()
        return row

    def _why_not(self, step):
        if self.share is not None:
            return None
        for what in step.needs:
            verdict = self.journal.rows.get((*step.key[:3], what), {}).get("verdict", "missing")
            if verdict not in ("ok", "not run"):
                return f"{what} is {verdict}"
        for row in self.journal.rows.values():
            operator, _, backend = row["what"].rpartition(", ")
            judged = row["part"] == "check" and row["verdict"] in WRONG and backend == "triton"
            if judged and operator in step.operators and row["dtype"] == step.dtype:
                return f"the examination of {operator} is {row['verdict']}"
        if step.gib > self.card.free_gib():
            return f"needs about {step.gib:.0f} GiB, {self.card.free_gib():.0f} are free"
        return None


def sentence(row):
    """A row as a line of text: no time stands where something is wrong."""
    texts = [" ".join(filter(None, (row[name] for name in KEY))), row["verdict"]]
    for name, unit in (("error", "error"), ("milliseconds", "ms"), ("host_us", "us of the host"), ("peak_mib", "MiB")):
        if row[name]:
            texts.append(f"{float(row[name]):.3g} {unit}" if name != "error" else f"error {float(row[name]):.1e}")
    if row["share"]:
        texts.append(f"{100 * float(row['share']):.0f} % of what the card can")
    return "; ".join(filter(None, (*texts, row["note"])))
