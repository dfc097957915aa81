"""Products on CPUs: every way is exact, the choice is measured once and kept, and precision is what is asked for."""

import json
import subprocess
import sys
import threading

import pytest
import torch

from anyup_fast.cpu import calibration, products, tiles, ways
from anyup_fast.cpu.convolution import Convolution
from anyup_fast.cpu.crew import led, share_out
from anyup_fast.cpu.pages import Room
from anyup_fast.cpu.ways import Choice, parsed

ALL = ["default", "pixels=onednn", "batched=onednn", "convolution=direct", "onednn"]


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.delenv(products.PRECISION_VARIABLE, raising=False)
    yield
    products.chosen_again()
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the choice is kept; the environment names none."""
    monkeypatch.delenv(ways.VARIABLE, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    products.chosen_again()
    return tmp_path


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def far(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


def possible(way):
    if "onednn" in way and not ways.has_onednn():
        pytest.skip("this PyTorch has no oneDNN products")
    return way


@pytest.mark.parametrize("way", ALL)
@pytest.mark.parametrize("rows, inner, outer", [(4096, 128, 128), (300, 48, 100), (257, 3, 128), (5, 128, 128)])
def test_products_are_exact_every_way(way, rows, inner, outer):
    products.chosen_again(possible(way))
    a, weight, bias, before = numbers(rows, inner), numbers(outer, inner, seed=1), numbers(outer), numbers(rows, outer)
    exact = a.double() @ weight.double().T
    for b in (weight.T, weight.T.contiguous()):
        out = torch.empty(rows, outer)
        assert products.mm(a, b, out) is out and far(out, exact) < 1e-6
        assert far(products.addmm(bias, a, b, out), exact + bias) < 1e-6
        assert far(products.addmm_(before.clone(), a, b), exact + before) < 1e-6
    view = torch.zeros(rows + 2, outer)
    products.mm(a, weight.T, view[1:-1])
    assert far(view[1:-1], exact) < 1e-6 and not view[0].any() and not view[-1].any()


@pytest.mark.parametrize("way", ALL)
@pytest.mark.parametrize(
    "shape", [(36, 112, 128, 128), (16, 81, 32, 196), (1, 196, 81, 64), (21, 60, 25, 17), (2, 3, 4, 5)]
)
def test_batched_products_are_exact_every_way(way, shape):
    products.chosen_again(possible(way))
    n, rows, inner, outer = shape
    a, b = numbers(n, rows, inner), numbers(n, outer, inner, seed=1).mT
    exact = a.double() @ b.double()
    out = torch.empty(n, rows, outer)
    assert far(products.bmm(a, b), exact) < 1e-6 and far(products.bmm(a, b, out), exact) < 1e-6
    transposed = numbers(n, inner, rows).mT
    assert far(products.bmm(transposed, b, out), transposed.double() @ b.double()) < 1e-6


@pytest.mark.parametrize("way", ALL)
@pytest.mark.parametrize("shape", [(16, 20), (5, 7), (1, 9)])
def test_convolutions_are_exact_every_way(way, shape):
    products.chosen_again(possible(way))
    image, weight = numbers(*shape, 32), numbers(48, 32, 3, 3, seed=1) / 17
    exact = torch.nn.functional.conv2d(image.permute(2, 0, 1)[None].double(), weight.double(), padding=1)[0]
    out, rows = torch.empty(shape[0] * shape[1], 48), tuple(slice(0, n) for n in shape)
    Convolution(weight)(image, *rows, out, Room())
    assert far(out.view(*shape, 48).permute(2, 0, 1), exact) < 2e-6
    Convolution(weight, halved=True)(image, *rows, out, Room())
    assert 1e-4 < far(out.view(*shape, 48).permute(2, 0, 1), exact) < 1e-2


def test_one_way_gives_the_same_bits_every_time():
    a, b = numbers(4096, 128), numbers(128, 128, seed=1)
    for way in ALL:
        if "onednn" in way and not ways.has_onednn():
            continue
        products.chosen_again(way)
        results = [products.mm(a, b.T, torch.empty(4096, 128)) for _ in range(3)]
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_what_the_environment_may_say(monkeypatch):
    assert parsed("auto", "nothing") == "nothing" and parsed("", None) is None
    fast = "fast" if ways.bfloat16_instructions() else "slow"
    assert parsed("default") == Choice("default", "default", "transformed", fast)
    assert parsed("convolution=direct") == Choice(convolution="direct")
    for choice in (Choice(), Choice(convolution="direct", bfloat16="fast")):
        assert parsed(str(choice)) == choice
    for wrong in ("mkl", "pixels=mkl", "pixels", "default,onednn", "pixels=default;batched=default"):
        with pytest.raises(ValueError, match=f"ANYUP_FAST_PRODUCTS: need auto, default, onednn, .* in '{wrong}'"):
            parsed(wrong)
    monkeypatch.setattr(ways, "has_onednn", lambda: False)
    with pytest.raises(RuntimeError, match="has no oneDNN products; take default or auto"):
        parsed("onednn")
    monkeypatch.setenv(ways.VARIABLE, "convolution=direct")
    products.chosen_again()
    assert products.choice() == Choice(convolution="direct")
    assert products.explained()[1] == "ANYUP_FAST_PRODUCTS in the environment"


def test_what_was_measured_is_kept_for_later_processes(folder, monkeypatch):
    first = products.choice()
    path = calibration.kept_at()
    (entry,) = json.loads(path.read_text()).values()
    assert entry["choice"] == str(first) and set(entry["gains"]) >= {"convolution"}
    monkeypatch.setattr(calibration, "measure", lambda: pytest.fail("measured again"))
    products.chosen_again()
    assert products.choice() == first
    lines, source = products.explained()
    assert source == f"kept in {path}" and len(lines) == 4 and "times as fast" in lines[2]
    known = json.loads(path.read_text())
    (name,) = known
    known[name]["choice"] = "convolution=direct,bfloat16=slow"
    path.write_text(json.dumps({**known, "another machine": {"choice": "nonsense"}}))
    products.chosen_again()
    assert products.choice() == Choice(convolution="direct")


@pytest.mark.parametrize("content", ["{", "[]", '{"x": 1}', "null"])
def test_a_file_that_says_nothing_is_measured_anew_and_mended(folder, monkeypatch, content):
    monkeypatch.setattr(calibration, "measure", lambda: (Choice(bfloat16="fast"), {}))
    calibration.kept_at().parent.mkdir()
    calibration.kept_at().write_text(content)
    assert products.choice() == Choice(bfloat16="fast")
    assert json.loads(calibration.kept_at().read_text())[calibration._machine()]["choice"] == str(
        Choice(bfloat16="fast")
    )


def test_where_nothing_can_be_kept_every_process_measures(folder, monkeypatch, caplog):
    (folder / "anyup_fast").write_text("a file where the folder should be")
    monkeypatch.setattr(calibration, "measure", lambda: (Choice(convolution="direct"), {}))
    with caplog.at_level("INFO", "anyup_fast.ops"):
        assert products.choice() == Choice(convolution="direct")
    assert "can't be written" in caplog.text and products.explained()[1] == "measured"


def test_the_answer_of_a_process_that_was_faster_counts(folder, monkeypatch):
    def slow():
        entry = {calibration._machine(): {"choice": "convolution=direct", "gains": {}}}
        calibration.kept_at().parent.mkdir()
        calibration.kept_at().write_text(json.dumps(entry))
        return Choice(), {}

    monkeypatch.setattr(calibration, "measure", slow)
    assert products.choice() == Choice(convolution="direct")


def test_a_way_is_taken_for_its_speed_if_it_is_exact(monkeypatch):
    if not ways.has_onednn():
        pytest.skip("this PyTorch has no oneDNN products")
    monkeypatch.setattr(calibration, "ROUNDS", 2)
    rounds = []

    def in_turns(*runs):
        rounds.append([run() for run in runs])
        return [2.0] + [1.0] * (len(runs) - 1)

    monkeypatch.setattr(calibration, "_in_turns", in_turns)
    choice, gains = calibration.measure()
    assert choice[:3] == ("onednn", "onednn", "direct") and "2.00 times" in gains["pixels"] and len(rounds) >= 3
    monkeypatch.setattr(calibration, "onednn_mm", lambda a, b, out: out.copy_(a.bfloat16() @ b.bfloat16()))
    monkeypatch.setattr(calibration, "onednn_bmm", lambda a, b, out: torch.bmm(a, b, out=out).mul_(1.00001))
    assert calibration.measure()[0][:2] == ("default", "default")
    monkeypatch.setattr(calibration, "_in_turns", lambda *runs: [1.0] * len(runs))
    assert calibration.measure()[0] == Choice()
    monkeypatch.setattr(calibration, "has_onednn", lambda: False)
    monkeypatch.setattr(calibration, "bfloat16_instructions", lambda: False)
    choice, gains = calibration.measure()
    assert choice == Choice() and set(gains) == {"convolution"}


def test_measuring_leaves_the_threads_as_they_were():
    before = torch.get_num_threads()
    calibration.measure()
    assert torch.get_num_threads() == before


@pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul"), reason="PyTorch 2.9 brought settings for each back end"
)
def test_precision_is_that_of_pytorchs_settings():
    assert products.asked() == "highest"
    for precision in products.PRECISIONS:
        torch.set_float32_matmul_precision(precision)
        assert products.asked() == precision
    torch.set_float32_matmul_precision("highest")
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        for setting, precision in (("bf16", "medium"), ("tf32", "high"), ("ieee", "highest")):
            torch.backends.mkldnn.matmul.fp32_precision = setting
            assert products.asked() == precision
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def test_precision_is_asked_for_by_name_before_the_settings(monkeypatch):
    with torch.autocast("cpu", torch.bfloat16):
        assert products.asked() == "medium"
        with products.use_precision("highest"):
            assert products.asked() == "highest"
    with torch.autocast("cpu", torch.float16):
        assert products.asked() == "highest"
    monkeypatch.setenv(products.PRECISION_VARIABLE, "high")
    assert products.asked() == "high"
    with products.use_precision("medium"), products.use_precision("highest"):
        assert products.asked() == "highest"
    with pytest.raises(ValueError, match="precision: need one of 'highest', 'high', 'medium', got 'bf16'"):
        products.use_precision("bf16")
    monkeypatch.setenv(products.PRECISION_VARIABLE, "low")
    with pytest.raises(ValueError, match="ANYUP_FAST_PRECISION: need one of .* got 'low'"):
        products.asked()


def test_precision_holds_for_the_thread_that_asks():
    seen = []
    with products.use_precision("medium"):
        thread = threading.Thread(target=lambda: seen.append(products.asked()))
        thread.start()
        thread.join()
    assert seen == ["highest"]


@pytest.mark.parametrize("threads", [1, 2])
def test_those_who_work_for_a_caller_are_asked_what_it_is_asked(threads):
    seen = []

    @led
    def operator(tensor):
        with torch.autocast("cpu", enabled=False):
            share_out(lambda desk, item: seen.append(products.asked()), [1, 2, 3, 4], list(range(threads)))

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            operator(torch.zeros(1))
        assert seen == ["medium"] * 4
        operator(torch.zeros(1))
        assert seen[4:] == ["highest"] * 4
    finally:
        torch.set_num_threads(before)


def test_what_is_halved():
    products.chosen_again("bfloat16=fast")
    narrow, wide, widest = (torch.zeros(2, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64))
    assert products.halved(narrow) and products.halved(wide, narrow) and not products.halved(wide)
    assert not products.halved(torch.zeros(2, dtype=torch.float16))
    with products.use_precision("medium"):
        assert products.halved(wide) and not products.halved(widest) and not products.halved(wide.to("meta"))
        products.chosen_again("bfloat16=slow")
        assert not products.halved(wide) and not products.halved(narrow)
    with products.use_precision("high"):
        products.chosen_again("bfloat16=fast")
        assert not products.halved(wide)


def test_info_tells_what_was_taken():
    result = subprocess.run(
        [sys.executable, "-m", "anyup_fast.cli", "info"], capture_output=True, text=True, check=True
    )
    assert "products on this CPU, " in result.stdout and "  pixels: " in result.stdout


def test_tiles_know_nothing_of_products():
    assert not hasattr(tiles, "products")
