"""The benchmarks of the windowed attention: what they compare, and that they refuse where they should."""

import csv
import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from tree import ROOT

FOLDER = ROOT / "benchmarks"
if not (FOLDER / "gpu.py").is_file():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)


@pytest.fixture
def scripts(monkeypatch):
    """The scripts as modules, imported as if from their own folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    loaded = {}
    for name in ("checkout", "attention", "gpu"):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        loaded[name] = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, loaded[name])
        spec.loader.exec_module(loaded[name])
    return loaded


def test_attention_command_prints_one_json_object():
    command = [sys.executable, FOLDER / "attention.py", "--device", "cpu", "--json", "--shapes", "40/8/12"]
    result = subprocess.run([*command, "--repeats", "2"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    (row,) = report["results"]
    assert row["shape"] == "40/8/12" and row["error"] < 5e-6
    assert row["ratio"] == pytest.approx(row["reference"]["seconds"] / row["torch"]["seconds"])
    assert all(row[name]["peak_gib"] >= 0 for name in ("torch", "reference"))


@pytest.mark.slow
def test_peak_memory_tells_the_back_ends_apart(scripts):
    flat, whole = (scripts["attention"].peak("160/24/8", name) for name in ("torch", "reference"))
    # The twin's logits alone: 160 * 160 pixels, 24 * 24 keys, 4 heads, 4 bytes.
    assert flat < 0.05 and whole > 160 * 160 * 24 * 24 * 4 * 4 / 2**30


def test_the_strip_is_checked_and_measured(scripts, monkeypatch):
    attention = scripts["attention"]
    original = attention.problem
    monkeypatch.setattr(attention, "problem", lambda shape, rows=None: original("48/12/1", rows))
    monkeypatch.setattr(attention, "peak", lambda shape, backend, rows: 0.25)
    row = attention.strip(8)
    assert row["rows"] == 8 and row["error"] < 1e-6 and row["peak_gib"] == 0.25


def test_a_wrong_result_is_not_timed(scripts, monkeypatch):
    attention = scripts["attention"]
    right = attention.windowed_attention
    monkeypatch.setattr(attention, "windowed_attention", lambda *a, **k: right(*a, **k) * 1.001)
    with pytest.raises(SystemExit, match="nothing was timed"):
        attention.compare("24/6/4", 1, False)


def test_gpu_command_refuses_in_one_sentence_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = subprocess.run([sys.executable, FOLDER / "gpu.py"], capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "nothing to measure on: needs a GPU that torch.cuda.is_available() sees, found none\n"


def test_the_checkout_needs_no_installation(tmp_path):
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        f"sys.path.insert(0, {str(FOLDER)!r})\n"
        "import checkout; checkout.use_checkout(); checkout.use_checkout()\n"
        "import anyup_fast.kernels.tiling as t, anyup_fast\n"
        "print(t.__file__); print(anyup_fast.__file__)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [
        str(FOLDER.parent / "kernels" / "tiling.py"),
        str(FOLDER.parent / "anyup_fast" / "__init__.py"),
    ]


@pytest.fixture
def small(scripts, monkeypatch, tmp_path):
    """gpu.py with its clock and its files replaced, for tensors on the CPU."""
    gpu = scripts["gpu"]
    if torch.cuda.is_available():
        pytest.skip("meant for the interpreter")

    def timed(call):
        call()
        return 1.0, 2.0, 3.0, 4096

    monkeypatch.setattr(gpu, "timed", timed)
    monkeypatch.setattr(gpu.tiling, "TUNED", tmp_path)
    monkeypatch.setattr(gpu.torch.cuda, "mem_get_info", lambda: (2**33, 2**34))
    gpu.tiling.forget_tuned()
    yield gpu
    gpu.tiling.forget_tuned()


def test_the_sweep_passes_and_fails(small, monkeypatch):
    tile = small.tiling.Tile("two_pass", 4, 4, 16, 16, 4, stats_block_k=16)
    monkeypatch.setattr(small.tiling, "candidates", lambda dtype, device: (tile,))
    assert small.sweep(1, torch.device("cpu"), longest=6) == []
    right = small.kernel.windowed_attention_fwd
    monkeypatch.setattr(small.kernel, "windowed_attention_fwd", lambda *a, **k: right(*a, **k) + 0.1)
    failed = small.sweep(1, torch.device("cpu"), longest=6)
    assert failed and all("exceeds" in sentence for sentence in failed)


def test_a_failed_sweep_prints_no_speed(small, monkeypatch, capsys):
    monkeypatch.setattr(small, "unable", lambda: None)
    monkeypatch.setattr(small, "sweep", lambda count, device: ["something differs"])
    monkeypatch.setattr(small, "measure", lambda *a: pytest.fail("measured in spite of a failure"))
    assert small.main([]) == 1
    assert capsys.readouterr() == ("", "something differs\n")


def test_rows_rivals_and_files(small, monkeypatch, tmp_path):
    rows = list(small.measure("16/4/17", torch.bfloat16, small.time.perf_counter(), device="cpu"))
    assert [row["what"] for row in rows] == ["triton", "torch", "reference", "sdpa", "flex"]
    assert all(row.get("milliseconds") == 2.0 or row["note"] for row in rows)
    assert all("milliseconds" in row for row in rows[:4]), [row["note"] for row in rows]
    path = tmp_path / "gpu.csv"
    for _ in range(2):
        small.save_csv(path, [{"device": "none", **row} for row in rows])
    with open(path, newline="", encoding="utf-8") as file:
        saved = list(csv.DictReader(file))
    assert len(saved) == 2 * len(rows) and saved[0]["what"] == "triton" and saved[0]["milliseconds"] == "2.0"
    assert small.table(rows).count("\n") == len(rows)


def test_a_wrong_kernel_is_not_timed(small, monkeypatch):
    right = small.kernel.windowed_attention_fwd
    monkeypatch.setattr(small.kernel, "windowed_attention_fwd", lambda *a, **k: right(*a, **k) + 0.1)
    with pytest.raises(RuntimeError, match="nothing is timed"):
        next(small.measure("16/4/16", torch.bfloat16, 0.0, device="cpu"))


@pytest.mark.parametrize("arguments", ["sdpa", "flex_mask"])
def test_rivals_compute_the_same(small, arguments):
    given = small.problem("20/5/16")
    expected = small.windowed_attention(*given, backend="reference")
    if arguments == "sdpa":
        torch.testing.assert_close(small.sdpa(given)(), expected, rtol=0, atol=1e-5)
    else:
        mask = small._mask(given)
        assert mask.shape == (400, 25) and mask.sum() == (given[3].diff(dim=1).sum() ** 2)


def test_tuning_writes_the_fastest_tile(small, monkeypatch):
    tiles = [small.tiling.Tile("window", 8, 8, 16, 16, 4), small.tiling.Tile("window", 4, 4, 16, 16, 4)]
    monkeypatch.setattr(small, "tuning_tiles", lambda *a: tiles)
    clock = iter((9.0, 5.0, 3.0))
    monkeypatch.setattr(small, "timed", lambda call: (0.0, next(clock), 9.0, 0))
    rows = list(small.measure("16/4/16", torch.float16, small.time.perf_counter(), tune=True, device="cpu"))
    small.save_tuned(rows, small.tiling.Device("cuda", (9, 0), 232448, "some card"))
    (entry,) = small.tiling.load_tuned("some card")
    assert entry["tile"] == tiles[1] and entry["milliseconds"] == 3.0
    assert (entry["dtype"], entry["channels"]) == ("float16", 16)


def test_tuning_offers_tiles_that_fit_for_every_shape(small):
    for shape in small.SHAPES:
        image, grid, channels = map(int, shape.split("/"))
        bounds = [small.window_bounds(image, grid, 0.1)] * 2
        windows = [small.kernel._frozen(b) for b in bounds]
        for dtype in (torch.bfloat16, torch.float32):
            tiles = small.tuning_tiles(dtype, channels, bounds)
            assert tiles and len(set(tiles)) == len(tiles)
            assert all(t.fits(channels, lambda h, w, x=windows: small.kernel._spans(*x, h, w)) for t in tiles)


@pytest.mark.parametrize(
    ("shape", "microseconds"), [("448/32/384", 69), ("518/37/768", 161), ("1024/64/768", 630), ("2048/512/1", 43700)]
)
def test_floors(scripts, shape, microseconds):
    assert scripts["gpu"].floor_ms(shape) * 1e3 == pytest.approx(microseconds, rel=0.12)
