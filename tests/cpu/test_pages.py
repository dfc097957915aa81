"""Large buffers: as good as any tensor, on memory that is used again, within a limit, across forks."""

import copy
import gc
import io
import os
import pickle
import sys
import threading

import forked
import pytest
import torch

from anyup_fast.cpu import pages
from anyup_fast.cpu.pages import LARGE_PAGE, LEAST, new_empty
from anyup_fast.logs import log_once

ROOM = 6 << 20  # a whole number of large pages
SIDE = 1100  # squared, in float32: more than LEAST
LIKE = torch.empty(0)

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is kept under Linux only")


@pytest.fixture(scope="module", autouse=True)
def little_to_search():
    """The searches for garbage below go through what is made here, not through all that other tests have imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    pages.release()
    yield
    pages.release()


@pytest.mark.parametrize("shape", [(), (0, 5), (3, 4), (SIDE, SIDE), (1, SIDE, 2, SIDE)])
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
def test_shapes_and_types_are_those_of_any_empty_tensor(shape, dtype):
    found, expected = new_empty(LIKE, shape, dtype), LIKE.new_empty(shape, dtype=dtype)
    assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())
    assert found.device == expected.device and not found.requires_grad
    found.fill_(3)
    assert found.eq(3).all()
    assert found.untyped_storage().nbytes() == expected.untyped_storage().nbytes()


def test_a_large_tensor_can_do_what_others_can():
    with torch.inference_mode():
        inside = new_empty(LIKE, (SIDE, SIDE)).fill_(1)
    assert inside.is_inference()
    x = new_empty(LIKE, (SIDE, SIDE)).fill_(2)
    saved = io.BytesIO()
    torch.save(x, saved)
    saved.seek(0)
    shared = new_empty(x, x.shape).copy_(x).share_memory_()
    for other in (copy.deepcopy(x), pickle.loads(pickle.dumps(x)), torch.load(saved), shared):
        assert torch.equal(other, x)
    weight = x.requires_grad_()
    (weight * weight).sum().backward()
    assert weight.grad.eq(4).all()
    array = x.detach().numpy()
    del x, weight
    gc.collect()
    taken = new_empty(LIKE, (SIDE, SIDE)).fill_(5)  # must not be the memory that the array shows
    assert (array == 2).all() and taken.eq(5).all()


@linux
def test_memory_is_used_again_when_its_tensor_is_gone_and_not_before():
    first = new_empty(LIKE, (SIDE, SIDE))
    place = first.data_ptr()
    assert place % LARGE_PAGE == 0
    second = new_empty(LIKE, (SIDE, SIDE))
    assert second.data_ptr() != place
    view = first[5:]
    del first
    assert new_empty(LIKE, (SIDE, SIDE)).data_ptr() != place
    pages.release()
    del view
    again = new_empty(LIKE, (SIDE, SIDE - 9))
    assert again.data_ptr() == place
    assert new_empty(LIKE, (LEAST // 4 - 1,)).data_ptr() != place


@linux
def test_a_large_span_is_cut_for_several_and_whole_again_afterwards(monkeypatch):
    monkeypatch.setattr(pages, "KEPT", 1 << 30)
    large = new_empty(LIKE, (4 * ROOM,), torch.uint8)
    place = large.data_ptr()
    del large
    parts = [new_empty(LIKE, (ROOM - 5,), torch.uint8) for _ in range(4)]
    assert [x.data_ptr() for x in parts] == [place + i * ROOM for i in range(4)]
    for i, part in enumerate(parts):
        part.fill_(i)
    assert all(part.eq(i).all() for i, part in enumerate(parts))
    assert new_empty(LIKE, (ROOM,), torch.uint8).data_ptr() not in range(place, place + 4 * ROOM)
    del parts[2], parts[0], part
    pages.release()  # what is free of the region is given back, the rest stays as it is
    assert pages.bytes_kept() == 0 and parts[0].eq(1).all() and parts[1].eq(3).all()
    parts.clear()
    assert new_empty(LIKE, (4 * ROOM,), torch.uint8).data_ptr() == place


@linux
def test_no_more_is_kept_than_were_in_use_at_once_and_the_limit(monkeypatch):
    monkeypatch.setattr(pages, "KEPT", ROOM)
    held = new_empty(LIKE, (ROOM,), torch.uint8)
    tensors = [new_empty(LIKE, (ROOM,), torch.uint8) for _ in range(3)]
    last = tensors[-1].data_ptr()
    while tensors:
        del tensors[0]
    assert pages.bytes_kept() == 3 * ROOM  # four were in use
    taken = new_empty(LIKE, (3 * ROOM,), torch.uint8)
    assert pages.bytes_kept() == ROOM  # again four, and the limit
    assert new_empty(LIKE, (ROOM,), torch.uint8).data_ptr() == last  # what was in use first has gone first
    del taken, held
    tensors = [new_empty(LIKE, (ROOM,), torch.uint8) for _ in range(12)]
    tensors.clear()
    assert pages.bytes_kept() == pages.MOST * ROOM
    pages.release()
    assert pages.bytes_kept() == 0 and pages._used["most"] == 0
    monkeypatch.setattr(pages, "KEPT", 0)
    new_empty(LIKE, (ROOM,), torch.uint8)
    assert pages.bytes_kept() == 0


@linux
def test_nothing_is_kept_where_bytes_are_counted():
    new_empty(LIKE, (SIDE, SIDE))
    assert pages.bytes_kept()
    with pages.nothing_kept():
        assert not pages.bytes_kept()
        with pytest.raises(KeyError), pages.nothing_kept():
            raise KeyError
        new_empty(LIKE, (SIDE, SIDE))
        assert not pages.bytes_kept()
    new_empty(LIKE, (SIDE, SIDE))
    assert pages.bytes_kept()


@linux
def test_while_training_holds_memory_no_more_is_kept_than_was_in_use(monkeypatch):
    monkeypatch.setattr(pages, "KEPT", ROOM)
    tensors = [new_empty(LIKE, (ROOM,), torch.uint8, recorded=True) for _ in range(5)]
    del tensors[1:]
    assert pages.bytes_kept() == 4 * ROOM
    tensors += [new_empty(LIKE, (ROOM,), torch.uint8, recorded=True) for _ in range(2)]
    assert pages.bytes_kept() == 2 * ROOM
    larger = new_empty(LIKE, (2 * ROOM,), torch.uint8, recorded=True)
    assert pages.bytes_kept() == 0 and pages._used == {"now": 5 * ROOM, "most": 5 * ROOM, "recorded": 5 * ROOM}
    del larger
    assert pages.bytes_kept() == 2 * ROOM
    tensors.clear()
    assert pages._used["now"] == pages._used["recorded"] == 0 and pages.bytes_kept() == 5 * ROOM


@linux
def test_tensors_that_go_while_another_thread_is_at_it_are_taken_back():
    tensors = [new_empty(LIKE, (ROOM,), torch.uint8) for _ in range(3)]
    with pages._locked():
        tensors.clear()  # as a garbage collection within the lock would
        assert pages._used["now"] == 3 * ROOM
    assert pages._used["now"] == 0 and pages.bytes_kept() == 3 * ROOM

    def use():
        for _ in range(200):
            new_empty(LIKE, (ROOM,), torch.uint8)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pages._used["now"] == 0
    spans = [span for region in pages._regions for span in region.spans]
    assert all(span.free for span in spans) and len(spans) == len(pages._regions)


def test_where_nothing_can_be_kept_tensors_are_plain(monkeypatch):
    monkeypatch.setattr(pages, "_possible", lambda: False)
    assert new_empty(LIKE, (SIDE, SIDE)).fill_(1).eq(1).all()
    assert not pages.bytes_kept()


@linux
def test_the_environment_sets_the_limit():
    code = "from anyup_fast.cpu import pages; print(pages.KEPT)"
    for given, expected in ((None, 128 << 20), ("0", 0)):
        result = forked.run("-c", code, **({} if given is None else {"ANYUP_FAST_KEPT_BYTES": given}))
        assert result.returncode == 0 and int(result.stdout) == expected, result.stderr


@pytest.mark.parametrize("given", ["much", "-1", "1.5", ""])
def test_a_limit_that_is_no_number_of_bytes_is_refused(given, monkeypatch):
    monkeypatch.setenv("ANYUP_FAST_KEPT_BYTES", given)
    with pytest.raises(ValueError, match=f"ANYUP_FAST_KEPT_BYTES: need a whole number of bytes, .* got '{given}'"):
        pages._from_environment("ANYUP_FAST_KEPT_BYTES", 1)


@linux
def test_a_system_that_takes_no_advice_is_told_of_and_worked_with(caplog):
    class Deaf:
        def madvise(self, advice):
            raise OSError("not here")

    log_once.cache_clear()
    with caplog.at_level("INFO", "anyup_fast.ops"):
        pages._advise(Deaf(), 1)
    assert "takes no advice" in caplog.text and "not here" in caplog.text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_process_writes_to_memory_of_its_own():
    code = (
        "import os, torch; torch.set_num_threads(1)\n"
        "from anyup_fast.cpu.pages import new_empty\n"
        "x = new_empty(torch.empty(0), (1100, 1100)).fill_(1); y = new_empty(x, x.shape).fill_(1); del y\n"
        "if (child := os.fork()) == 0:\n"
        "    x.fill_(7); new_empty(x, x.shape).fill_(7); os._exit(0)\n"
        "print(os.waitpid(child, 0)[1], bool(x.eq(1).all()))\n"
    )
    result = forked.run("-c", code)
    assert result.stdout.split() == ["0", "True"], result.stderr
