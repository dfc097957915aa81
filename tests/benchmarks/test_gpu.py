"""The run on a GPU: its steps in Triton's interpreter, its flow for a card that isn't there, what survives a stop."""

import contextlib
import csv
import os
import signal
import subprocess
import time

import attention_cases
import forked
import pytest
import torch
from tree import ROOT

FOLDER = ROOT / "benchmarks"
if not (FOLDER / "gpu.py").is_file():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)


@pytest.fixture
def attention(gpu_scripts, monkeypatch, tmp_path):
    """gpu_attention.py, with no measured tiles."""
    module = gpu_scripts("gpu_attention")
    monkeypatch.setattr(module.tiling, "TUNED", tmp_path)
    module.tiling.forget_tuned()
    yield module
    module.tiling.forget_tuned()


@pytest.fixture
def steps(gpu_scripts):
    return gpu_scripts("gpu_steps")


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def wrong(attention, monkeypatch):
    """Make the kernel's results wrong."""
    right = attention.kernel.windowed_attention_fwd
    monkeypatch.setattr(attention.kernel, "windowed_attention_fwd", lambda *a, **k: right(*a, **k) + 0.1)


def test_it_refuses_in_one_sentence_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = forked.run(FOLDER / "gpu.py")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "nothing to measure on: needs a GPU that torch.cuda.is_available() sees, found none\n"


def test_the_sweep_passes_and_fails(attention, here, taken, monkeypatch):
    tile = attention.tiling.Tile("two_pass", 4, 4, 16, 16, 4, stats_block_k=16)
    monkeypatch.setattr(attention.tiling, "candidates", lambda dtype, device: (tile,))
    assert {row["verdict"] for row in taken(attention.problems(1, here, longest=6))} == {"ok"}
    wrong(attention, monkeypatch)
    assert {row["verdict"] for row in taken(attention.problems(1, here, longest=6))} == {"WRONG"}


def test_rows_of_the_attention(attention, here, taken):
    kernel, launcher = taken(attention.steps("16/4/17", "bfloat16", here, rates=(1e9, 1e12, 1e12)))
    assert (kernel["verdict"], kernel["clock"], kernel["milliseconds"], kernel["host_us"]) == ("ok", "graph", "2", "")
    assert (launcher["verdict"], launcher["clock"], launcher["milliseconds"], launcher["host_us"]) == (
        *("ok", "host", "", "5"),
    )
    moved = 16 * 16 * (128 + 17) * 2 + 4 * 4 * (128 + 17) * 2
    assert float(kernel["floor_ms"]) == pytest.approx(moved / 1e6, rel=1e-5)
    assert float(kernel["share"]) == pytest.approx(moved / 2e6, rel=1e-5)
    assert float(kernel["rate"]) == pytest.approx(moved * 500, rel=1e-5)
    assert 0 < float(kernel["error"]) <= float(kernel["limit"]) == 1e-2


def test_no_time_beside_what_is_wrong(attention, here, taken, monkeypatch, capsys):
    wrong(attention, monkeypatch)
    monkeypatch.setattr(here, "timed", lambda *_: pytest.fail("timed"))
    kernel, launcher = taken(attention.steps("16/4/16", "bfloat16", here))
    assert (kernel["verdict"], launcher["verdict"], launcher["note"]) == ("WRONG", "not timed", "kernel is WRONG")
    assert not any(row[name] for row in (kernel, launcher) for name in ("milliseconds", "host_us", "share", "rate"))
    assert " ms" not in capsys.readouterr().out


def test_no_time_where_the_examination_failed(attention, steps, here, journal):
    kept = journal()
    kept.add(steps.Step("check", "a", "bfloat16", "windowed_attention, triton", None), dict(verdict="WRONG", error=1.0))
    run = steps.Run(here, kept)
    for dtype in ("bfloat16", "float16"):
        run.take(attention.steps("16/4/16", dtype, here))
    assert [row["verdict"] for row in run.made] == ["not timed", "not timed", "ok", "ok"]
    assert run.made[0]["note"] == "the examination of windowed_attention is WRONG"


def test_rivals(attention, here, taken, monkeypatch):
    monkeypatch.setattr(attention, "flex", raising(NotImplementedError("not here")))
    rows = {row["what"]: row for row in taken(attention.rival_steps("16/4/17", here))}
    assert list(rows) == ["torch", "reference", "sdpa", "flex"]
    assert all(rows[name]["verdict"] == "ok" for name in ("torch", "reference", "sdpa"))
    assert (rows["flex"]["verdict"], rows["flex"]["note"]) == ("failed", "NotImplementedError: not here")
    (large,) = taken(step for step in attention.rival_steps("448/32/384", here) if step.what == "reference")
    assert (large["verdict"], large["note"]) == ("not timed", "needs about 11 GiB, 8 are free")


@pytest.mark.parametrize("name", ["sdpa", "flex_mask"])
def test_rivals_compute_the_same(attention, here, name):
    given = attention.problem("20/5/16", torch.float32, here)
    expected = attention.windowed_attention(*given, backend="reference")
    if name == "sdpa":
        torch.testing.assert_close(attention.sdpa(given)(), expected, rtol=0, atol=1e-5)
    else:
        mask = attention._mask(given)
        assert mask.shape == (400, 25) and mask.sum() == (given[3].diff(dim=1).sum() ** 2)


def test_tuning_writes_the_fastest_tile(attention, here, taken, monkeypatch):
    tiles = [attention.tiling.Tile("window", 8, 8, 16, 16, 4), attention.tiling.Tile("window", 4, 4, 16, 16, 4)]
    refused = attention.tiling.Tile("window", 4, 4, 16, 32, 4)
    monkeypatch.setattr(attention, "tuning_tiles", lambda *a: [*tiles, refused])
    monkeypatch.setattr(attention.tiling, "shared_memory", lambda *a: 0)
    right = attention.kernel.windowed_attention_fwd

    def launch(*arguments, tile):
        if tile == refused:
            raise RuntimeError("out of resource: shared memory")
        return right(*arguments, tile=tile)

    monkeypatch.setattr(attention.kernel, "windowed_attention_fwd", launch)
    clock = iter((5.0, 3.0))
    monkeypatch.setattr(here, "timed", lambda *_: dict(milliseconds=next(clock)))
    rows = taken(attention.tuning_steps("16/4/16", "float16", here))
    assert [row["verdict"] for row in rows] == ["ok", "ok", "failed"]
    attention.save_tuned(rows, attention.tiling.Device("cuda", (9, 0), 232448, "some card"))
    (entry,) = attention.tiling.load_tuned("some card")
    assert entry["tile"] == tiles[1] and entry["milliseconds"] == 3.0
    assert (entry["dtype"], entry["channels"]) == ("float16", 16)


def test_tuning_offers_tiles_that_fit_for_every_shape(attention):
    for shape in attention.SHAPES:
        image, grid, channels = map(int, shape.split("/"))
        bounds = [attention.window_bounds(image, grid, 0.1)] * 2
        windows = [attention.kernel._frozen(b) for b in bounds]
        for dtype in (torch.bfloat16, torch.float32):
            tiles = attention.tuning_tiles(dtype, channels, bounds)
            assert tiles and len(set(tiles)) == len(tiles)
            assert all(t.fits(channels, lambda h, w, x=windows: attention.kernel._spans(*x, h, w)) for t in tiles)


@pytest.mark.parametrize(
    ("shape", "microseconds"), [("448/32/384", 69), ("518/37/768", 161), ("1024/64/768", 630), ("2048/512/1", 43700)]
)
def test_floors_on_an_h100(attention, shape, microseconds):
    assert attention.floor_ms(shape) * 1e3 == pytest.approx(microseconds, rel=0.12)


def test_float32_is_held_to_what_matrix_units_can():
    expected = attention_cases.ON_GPUS if torch.cuda.is_available() else 2e-6
    assert attention_cases.TOLERANCE[torch.float32] == expected <= 2e-5


def some(steps, *launches):
    return [steps.Step("part", "s", "d", str(i), launch) for i, launch in enumerate(launches)]


def raising(error):
    def launch(*_):
        raise error

    return launch


def test_what_raises_costs_its_own_row(steps, here, journal):
    """CalledProcessError stands for what is no RuntimeError: compilers, assemblers, resources."""
    seen, path = [], journal().path

    def later():
        seen.append([row["verdict"] for row in read(path)])

    run = steps.Run(here, journal())
    failing = subprocess.CalledProcessError(255, ["ptxas"])
    run.take(some(steps, later, raising(failing), later, raising(ValueError("a\n" + 300 * "b" + "\nat last")), later))
    assert seen == [[], ["ok", "failed"], ["ok", "failed"] * 2], "a row is in the file before the next is made"
    rows = read(path)
    assert [row["verdict"] for row in rows] == ["ok", "failed", "ok", "failed", "ok"]
    assert rows[1]["note"].startswith("CalledProcessError: Command '['ptxas']'")
    assert rows[3]["note"].startswith("ValueError: a bbb") and rows[3]["note"].endswith("b at last")
    assert len(run.faults) == 2 and run.counts == {"ok": 3, "failed": 2}


def test_a_second_run_goes_on(steps, here, journal):
    made = []

    def numbered(i):
        return lambda: made.append(i)

    first = steps.Run(here, journal())
    first.take(some(steps, numbered(0), raising(ValueError("no"))))
    with open(first.journal.path, "a", encoding="utf-8") as file:
        file.write("none,0.0,torn")
    second = steps.Run(here, journal())
    second.take(some(steps, numbered(0), numbered(1), numbered(2)))
    assert made == [0, 2] and second.counts == {"there before": 2, "ok": 1}
    assert [row["what"] for row in second.faults] == ["1"], "what went wrong before is still wrong"
    assert [row["what"] for row in read(first.journal.path)] == ["0", "1", "2"]
    third = steps.Run(here, journal(), again=True)
    third.take(some(steps, numbered(0), numbered(1)))
    assert made == [0, 2, 0, 1] and not third.faults
    other = steps.Journal(first.journal.path, dict.fromkeys(steps.MACHINE, "other"))
    assert other.rows == {} and len(read(first.journal.path)) == 5


def test_another_file_is_refused(steps, tmp_path):
    path = tmp_path / "old.csv"
    path.write_text("device,milliseconds\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has other columns than this version writes; name another file with --csv"):
        steps.Journal(path, dict.fromkeys(steps.MACHINE, "none"))
    assert path.read_text(encoding="utf-8") == "device,milliseconds\n"


def test_a_lost_card_ends_the_run(steps, here, journal, monkeypatch):
    monkeypatch.setattr(here, "lost", lambda: "an illegal memory access")
    run = steps.Run(here, journal())
    with pytest.raises(steps.Stopped, match="the card is lost .an illegal memory access.: start again, it goes on"):
        run.take(some(steps, raising(RuntimeError("CUDA error")), lambda: pytest.fail("went on")))
    assert [row["verdict"] for row in read(run.journal.path)] == ["failed"]


def test_no_step_begins_when_the_time_is_up(steps, here, journal):
    run = steps.Run(here, journal(), until=time.perf_counter() + 1)
    run.take(some(steps, lambda: pytest.fail("begun")))
    assert run.counts == {"left out": 1} and not run.journal.rows


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, None])
def test_a_stop_loses_nothing(gpu_scripts, steps, here, journal, monkeypatch, number, capsys):
    gpu = gpu_scripts("gpu")
    monkeypatch.setattr(steps, "ENOUGH_S", 0.0)

    before = signal.getsignal(signal.SIGTERM)

    def stopped():
        if number is None:
            time.sleep(60)
        os.kill(os.getpid(), number)
        time.sleep(60)

    monkeypatch.setattr(gpu, "plan", lambda *_: [some(steps, lambda: None, stopped, lambda: pytest.fail("went on"))])
    options = gpu.parsed(["--parts", "sweeps"])
    code = gpu.perform(options, here, journal(), seconds=1.0 if number is None else 500.0)
    assert code == (0 if number is None else 128 + number)
    assert [row["verdict"] for row in read(journal().path)] == ["ok"]
    assert ("the time is up" if number is None else f"signal {number}") in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_examination_is_kept_and_not_made_again(gpu_scripts, here, journal, monkeypatch):
    gpu = gpu_scripts("gpu")
    Row, calls = gpu.examination.Row, []
    rows = [Row("AnyUp", str(i), "float32", "triton", 1e-6, 2e-5, 1.0, "ok") for i in range(3)]
    rows.append(Row("AnyUp", "3", "float32", "triton", 1.0, 2e-5, 1.0, "WRONG"))

    def examine(device, progress):
        calls.append(device)
        for row in rows:
            progress(row)
        return gpu.examination.Examination()

    monkeypatch.setattr(gpu.examination, "examine", examine)
    options = gpu.parsed(["--parts", "check"])
    for _ in range(2):
        assert gpu.perform(options, here, journal()) == 1
    assert len(calls) == 1
    kept = read(journal().path)
    assert [row["verdict"] for row in kept] == ["ok", "ok", "ok", "WRONG", "ok"]
    assert kept[0]["what"] == "AnyUp, triton" and not any(row["milliseconds"] for row in kept)


@pytest.mark.parametrize("clock", ["graph", "events", "host"])
def test_the_clock(steps, monkeypatch, clock):
    """On a stand-in for torch.cuda: what is called how often, and what lies between two events."""
    done, now = [], iter(range(1000))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(now), len(done)

        def elapsed_time(self, other):
            assert done[self.at[1] : other.at[1]] == ["replayed" if clock == "graph" else "called"]
            return float(other.at[0] - self.at[0])

    class Graph:
        def replay(self):
            done.append("replayed")

    for name, value in dict(
        Event=Event, CUDAGraph=Graph, graph=lambda graph, stream: contextlib.nullcontext(), synchronize=lambda: None,
        Stream=lambda: None, stream=lambda stream: contextlib.nullcontext(),
        reset_peak_memory_stats=lambda: None, empty_cache=lambda: None, memory_allocated=lambda: 2**20,
        max_memory_allocated=lambda: 3 * 2**20,
    ).items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    card = steps.Card()
    card.device = torch.device("cpu")
    figures = card.timed(clock, lambda: done.append("called"), seconds=0.2, most=10)
    if clock == "host":
        assert done == ["called"] * 10 and 0 < figures.pop("host_us") < 1e5 and not figures
    else:
        assert figures == dict(milliseconds=1.0, p20=1.0, p80=1.0, peak_mib=2.0)
        assert done[:4] == ["called"] * 3 + ["replayed" if clock == "graph" else "called"]


REHEARSAL = """
import json, sys
sys.path.insert(0, {folder!r})
import gpu
csv = sys.argv[1]
right = gpu.gpu_backward.kernel.windowed_attention_bwd
def refused(*arguments, **options):
    raise gpu.gpu_backward.kernel.triton.runtime.errors.OutOfResources(300000, 232448, "shared memory")
gpu.gpu_backward.kernel.windowed_attention_bwd = refused
some = ["--rehearse", "sm_90", "--csv", csv, "--parts", "attention", "forward", "backward", "--dtypes", "bfloat16"]
codes = [gpu.main([*some, "--shapes", "448/32/384"])]
gpu.gpu_backward.kernel.windowed_attention_bwd = right
codes.append(gpu.main([*some, "--shapes", "448/32/384"]))
codes.append(gpu.main([*some, "--shapes", "448/32/384", "--again"]))
print("codes", json.dumps(codes))
"""


def test_a_rehearsal(tmp_path):
    """448/32/384 on a card that isn't there: a launcher raises at first; then goes on; then everything again."""
    path = tmp_path / "gpu.csv"
    result = forked.run("-c", REHEARSAL.format(folder=str(FOLDER)), str(path), TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines()[-1] == "codes [1, 1, 0]"
    rows = read(path)
    first, again = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert [row["part"] for row in first] == ["attention"] * 2 + ["forward"] * 7 + ["backward"] * 4
    assert [row["verdict"] for row in first[:9]] == ["not run"] * 9
    failed, *unmade, plain = first[9:]
    assert failed["verdict"] == "failed" and failed["note"].startswith("OutOfResources: out of resource: shared memory")
    assert [row["verdict"] for row in (*unmade, plain)] == ["not timed"] * 3
    assert {row["verdict"] for row in again} == {"not run"}
    assert not any(row[name] for row in rows for name in ("milliseconds", "host_us", "error", "share", "rate"))
    assert {row["device"] for row in rows} == {"sm_90, absent"} and {row["capability"] for row in rows} == {"9.0"}
    assert "13 there before" in result.stdout and "launches, none executed" in result.stdout
    assert not (tmp_path / "cache").exists(), "a rehearsal compiles nothing"


@pytest.mark.slow("eight seconds: five processes that import Triton; the parts of it run by default")
def test_kernels_are_compiled_beforehand_and_found(tmp_path):
    """In a cache that was carried elsewhere, too."""
    made, moved = tmp_path / "made", tmp_path / "moved"
    command = [FOLDER / "gpu.py", "--compile-only", "--target", "sm_90", "--csv", tmp_path / "gpu.csv", "--again"]
    command += ["--parts", "attention", "--shapes", "448/32/384", "--cache"]
    told = []
    for cache, workers in ((made, "2"), (moved, "1")):
        result = forked.run(*command, cache, "--workers", workers)
        assert result.returncode == 0, result.stderr[-2000:]
        told.append(result.stdout.splitlines())
        if cache is made:
            made.rename(moved)
    # The kernels are steps 1 and 3, the launchers, which launch no other, 2 and 4.
    launched = "; 2 launches, none executed"
    assert told[0][:2] == [
        "process 0, code 0: kernels: 0 found in the cache, 0 compiled; 0 launches, none executed",
        f"process 1, code 0: kernels: 0 found in the cache, 2 compiled{launched}",
    ]
    assert told[1][0] == f"process 0, code 0: kernels: 2 found in the cache, 0 compiled{launched}"
    for lines, cache in zip(told, (made, moved), strict=True):
        assert lines[-1].startswith(f"{cache}: 2 kernels, 0.") and " MiB, for Triton " in lines[-1]
    kept = [path.suffix for path in moved.rglob("*") if path.is_file()]
    assert kept.count(".cubin") == 2 and set(kept) == {".cubin", ".json"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--compile-only"], "--compile-only and --target sm_NN go together"),
        (["--rehearse", "sm_90", "--compile-only", "--target", "sm_90"], "leave --compile-only out"),
        (["--workers", "2"], "--workers: need 1, or more with --compile-only, got 2"),
        (["--minutes", "0"], "--minutes: need more than 0, got 0.0"),
    ],
)
def test_options_that_contradict_each_other(gpu_scripts, arguments, sentence, capsys):
    with pytest.raises(SystemExit):
        gpu_scripts("gpu").parsed(arguments)
    assert sentence in capsys.readouterr().err
