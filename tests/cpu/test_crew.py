"""Work shared out among threads: everything once, settings kept, failures told, forks survived; tiled convolutions."""

import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.nn.functional as F

from anyup_fast import AnyUp
from anyup_fast.cpu import convolution, crew
from anyup_fast.cpu.convolution import Convolution, WeightGradient
from anyup_fast.cpu.crew import crew_size, led, share_out
from anyup_fast.plain import walks
from anyup_fast.plain.walks import Walk

CPU = torch.device("cpu")


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 17])
def test_every_item_is_worked_on_once_by_a_thread_of_its_own(two_threads, count, in_order):
    desks = [[] for _ in range(min(2, count))]
    share_out(lambda desk, item: desk.append((item, threading.get_ident())), list(range(count)), desks, in_order)
    assert sorted(item for desk in desks for item, _ in desk) == list(range(count))
    if in_order:
        assert [item for desk in desks for item, _ in desk] == list(range(count))
    for desk in desks:
        assert len({thread for _, thread in desk}) <= 1


def test_runs_are_of_equal_cost(two_threads):
    desks = [], []
    share_out(lambda desk, item: desk.append(item), list(range(6)), desks, in_order=True, costs=[1, 1, 1, 1, 1, 5])
    assert desks == ([0, 1, 2, 3, 4], [5])
    assert crew._edges([1] * 7, 3) == [0, 2, 5, 7] and crew._edges([9, 1], 2) == [0, 1, 2]
    assert crew._edges([5], 3)[0] == 0 and crew._edges([5], 3)[-1] == 1
    assert crew._edges([5, 0, 0], 4) == sorted(crew._edges([5, 0, 0], 4))


def test_workers_are_single_threaded_and_the_caller_keeps_its_threads(two_threads):
    seen = []
    met = threading.Barrier(2)

    def work(desk, item):
        torch.randn(300, 300) @ torch.randn(300, 300)
        torch.randn(1 << 18).exp()
        seen.append((torch.get_num_threads(), crew_size(CPU), torch.is_grad_enabled()))
        met.wait(10)

    share_out(work, [0, 1], [0, 1])
    assert seen == [(1, 1, False)] * 2
    found = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert torch.get_num_threads() == 2 and found == [2]


def test_a_failure_is_raised_after_the_others_are_done(two_threads):
    done = []

    def work(desk, item):
        if item == 0:
            raise ValueError("number 0")
        done.append(item)

    with pytest.raises(ValueError, match="number 0"):
        share_out(work, list(range(6)), [0, 1], in_order=True)
    assert done == [3, 4, 5]


def test_inference_mode_reaches_the_workers(two_threads):
    for inside in (False, True):
        with torch.inference_mode(inside):
            rows = torch.zeros(4)
            share_out(lambda _, item, rows=rows: rows[item : item + 1].add_(1), list(range(4)), [0, 1])
        assert torch.equal(rows, torch.ones(4))


def test_results_do_not_depend_on_who_did_what_nor_on_the_run(two_threads):
    torch.manual_seed(0)
    model, image, features = AnyUp(qk_dim=32).eval(), torch.randn(1, 3, 96, 96), torch.randn(1, 20, 6, 6)
    with torch.no_grad():
        outs = [model(image, features) for _ in range(4)]
        torch.set_num_threads(1)
        alone = model(image, features)
    assert all(torch.equal(out, outs[0]) for out in outs)
    torch.testing.assert_close(alone, outs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_forked_process_has_workers_of_its_own():
    code = (
        "import torch, multiprocessing as m; torch.set_num_threads(2)\n"
        "from anyup_fast.cpu.crew import share_out\n"
        "def child(q):\n"
        "    out = []; share_out(lambda d, i: out.append(i), list(range(8)), [0, 1]); q.put(sorted(out))\n"
        "share_out(lambda d, i: None, [0, 1], [0, 1])\n"
        "c = m.get_context('fork'); q = c.Queue(); p = c.Process(target=child, args=(q,)); p.start()\n"
        "assert q.get(timeout=30) == list(range(8)); p.join(10); print('whole')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "whole", result.stderr


def plain(x, weight):
    out = F.conv2d(x.double().permute(2, 0, 1)[None], weight.double(), padding=1)
    return out[0].permute(1, 2, 0).flatten(0, 1)


@pytest.mark.parametrize("size", [(4, 4), (16, 24), (30, 50), (7, 9), (3, 5), (1, 6), (5, 1)])
@pytest.mark.parametrize("channels", [(8, 8), (24, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_convolutions_and_their_gradients_in_pieces(size, channels, dtype, monkeypatch):
    monkeypatch.setattr(walks, "PIXELS", 200)
    torch.manual_seed(0)
    x, weight = torch.randn(*size, channels[0], dtype=dtype), torch.randn(*channels[::-1], 3, 3, dtype=dtype)
    grad = torch.randn(size[0] * size[1], channels[1], dtype=dtype)
    walk, convolve = Walk(size, max(channels), x, rows=Convolution.ROWS), Convolution(weight)
    out = torch.full_like(grad, float("nan"))
    walk.each(lambda desk, piece: convolve(x, piece.rows, piece.cols, out[piece.flat], desk))
    padded, inside = F.pad(x, (0, 0, 1, 1, 1, 1)), torch.empty_like(out)
    walk.each(lambda desk, piece: convolve(padded, piece.rows, piece.cols, inside[piece.flat], desk, inside=True))
    parts = walk.gathered(
        lambda desk, piece, sums: sums.add(grad[piece.flat], x, piece.rows, piece.cols, desk),
        lambda: WeightGradient(weight),
    )
    exact = weight.double().requires_grad_()
    plain(x, exact).backward(grad.double())
    tolerance = 2e-6 if dtype == torch.float32 else 1e-13
    for found, expected in (
        (out, plain(x, weight)),
        (inside, plain(x, weight)),
        (sum(part.result() for part in parts), exact.grad),
    ):
        assert (found - expected).norm() <= tolerance * expected.norm()


def test_a_picture_of_16_bits_is_convolved_in_float32():
    torch.manual_seed(0)
    x, weight = torch.randn(12, 20, 8).bfloat16(), torch.randn(8, 8, 3, 3)
    walk, convolve, out = Walk((12, 20), 8, weight, rows=Convolution.ROWS), Convolution(weight), torch.empty(240, 8)
    walk.each(lambda desk, piece: convolve(x, piece.rows, piece.cols, out[piece.flat], desk))
    assert (out - plain(x, weight)).norm() <= 2e-6 * plain(x, weight).norm()


def test_tiles_are_used_where_they_should_be():
    assert convolution.worth_tiling((16, 224)) and convolution.worth_tiling((8, 7))
    assert not convolution.worth_tiling((1, 400))
    assert Convolution(torch.randn(8, 8, 3, 3)).tiled and not Convolution(torch.randn(8, 8, 3, 3).double()).tiled


def test_transforms_made_in_inference_mode_serve_training():
    convolution.matrices.cache_clear()
    with torch.inference_mode():
        convolution.transformed(torch.randn(4, 4, 3, 3))
    assert not any(matrix.is_inference() for matrix in convolution.matrices())


def test_the_transforms_make_a_convolution_of_products():
    of_outputs, of_weight, of_inputs = convolution.matrices()
    inputs, weight = torch.randn(6, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    expected = inputs.unfold(0, 3, 1) @ weight
    torch.testing.assert_close(of_outputs @ ((of_weight @ weight) * (of_inputs @ inputs)), expected)


def test_the_leader_does_what_lies_between_alone_and_as_the_caller_would(two_threads):
    def settings(x):
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        seen = threading.get_ident(), torch.get_num_threads(), *modes
        desks = []
        share_out(lambda desk, item: desks.append((desk, crew_size(CPU))), [0, 1], range(crew_size(CPU)), in_order=True)
        return seen, sorted(desks), led(lambda x: threading.get_ident())(x), crew_size(CPU)

    for recorded, inference in ((True, False), (False, False), (False, True)):
        with torch.inference_mode(inference), torch.set_grad_enabled(recorded):
            (thread, *others), desks, again, size = led(settings)(torch.zeros(1))
        assert thread == again != threading.get_ident() and others == [1, recorded, inference]
        assert desks == [(0, 1), (1, 1)] and size == 2
    torch.set_num_threads(1)
    assert led(settings)(torch.zeros(1))[0][0] == threading.get_ident()


def test_failures_of_the_leader_and_of_both_come_home(two_threads):
    @led
    def fails(x):
        share_out(lambda desk, item: [].pop(), [0, 1], [0, 1])

    for _ in range(2):
        with pytest.raises(IndexError, match="pop from empty"):
            fails(torch.zeros(1))


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ")
def test_an_interrupt_ends_the_work_at_the_next_piece(two_threads):
    done = []

    def work(desk, item):
        if item == 2:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        done.append(item)
        time.sleep(0.05)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            share_out(work, list(range(200)), [0, 1])
    finally:
        signal.signal(signal.SIGINT, before)
    assert 2 <= len(done) <= 8
    share_out(lambda desk, item: done.append(item), [-1, -2], [0, 1])
    assert sorted(done)[:2] == [-2, -1]


def test_callers_side_by_side_all_get_their_own(two_threads):
    def caller(number):
        torch.set_num_threads(2)
        out = torch.zeros(40)
        for _ in range(20):
            share_out(lambda desk, item: out[item : item + 1].add_(number), list(range(40)), [0, 1])
        sums[number] = out

    sums = {}
    threads = [threading.Thread(target=caller, args=(number,)) for number in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(torch.equal(sums[number], torch.full((40,), 20.0 * number)) for number in (1, 2, 3))
