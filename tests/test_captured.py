"""Captured forwards, on a stand-in for CUDA's graphs: a replay runs again what was captured, on the CPU."""

import copy
import gc
import threading
import types
import weakref
from collections import OrderedDict
from contextlib import contextmanager, nullcontext

import pytest
import tiny
import torch

from anyup_fast import captured, kept, ops
from anyup_fast.ops import choice

IMAGE, FEATURES = (1, 3, 6, 5), (1, 8, 2, 2)


class Stream:
    """A stream that counts what is asked of it."""

    def __init__(self, *_):
        self.waited, self.synchronized = [], 0

    def wait_stream(self, other):
        self.waited.append(other)

    def synchronize(self):
        self.synchronized += 1


class Graph:
    """Replays by running again, into the tensor that was captured."""

    def __init__(self):
        self.run = self.out = None

    def replay(self):
        self.out.copy_(self.run())


@pytest.fixture
def cuda(monkeypatch):
    """Tensors on the CPU count as those of a GPU, whose streams and graphs are stand-ins; yields what is going on.

    Kernels would be interpreted, slowly: plain PyTorch takes their place.
    """
    state = types.SimpleNamespace(stream=Stream(), events=[])
    monkeypatch.setattr(choice, "_GPUS", ("cpu",))
    monkeypatch.setattr(choice, "_installation_fault", choice.cache(lambda kind: "is left out"))
    monkeypatch.setattr(captured, "why_not", lambda *_: None)
    monkeypatch.setattr(captured, "KINDS", ("cpu",))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _=None: state.stream)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)

    @contextmanager
    def stream(one):
        state.events.append("warm up")
        yield

    @contextmanager
    def graph(one, *, stream, capture_error_mode):
        state.events.append(("capture", stream.synchronized, capture_error_mode))
        yield

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    real = captured.captured_graph

    def captured_graph(run, device):
        made, out = real(run, device)
        made.run, made.out = run, out
        return made, out

    monkeypatch.setattr(captured, "captured_graph", captured_graph)
    choice.forget_faults()
    yield state
    choice.forget_faults()


@pytest.fixture
def interpreted(cuda, monkeypatch):
    """Kernels are taken after all."""
    monkeypatch.setattr(choice, "_installation_fault", choice.cache(lambda kind: None))


@pytest.fixture(scope="module")
def made():
    return tiny.model().requires_grad_(False)


@pytest.fixture
def model(made):
    return copy.deepcopy(made)


def given(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(IMAGE, generator=generator), torch.randn(FEATURES, generator=generator)


def close(a, b):
    return torch.allclose(a, b, atol=1e-6)


def test_it_is_what_forward_gives_in_one_tensor(cuda, model):
    forward = model.captured(IMAGE, FEATURES)
    first = forward(*given(0))
    assert close(first, model(*given(0))) and not close(first, model(*given(1)))
    second = forward(*given(1))
    assert second is first and close(second, model(*given(1)))
    assert forward.captures == 1 and cuda.events == ["warm up", ("capture", 1, "thread_local")]


def test_other_values_than_the_features(cuda, model):
    values = [torch.randn(1, 2, *FEATURES[2:]) for _ in range(2)]
    forward = model.captured(IMAGE, FEATURES, values_shape=(1, 2, *FEATURES[2:]))
    first = forward(*given(0), values[0])
    assert first.shape[1] == 2 and close(first, model(*given(0), values=values[0]))
    assert close(forward(values=values[1]), model(*given(0), values=values[1])) and forward.captures == 1
    assert model.captured(IMAGE, FEATURES) is not forward
    with pytest.raises(ValueError, match="values: captured for shape"):
        forward(values=values[0][:, :1])
    with pytest.raises(ValueError, match="captured without"):
        model.captured(IMAGE, FEATURES)(values=values[0])
    with pytest.raises(ValueError, match="values_shape: need the grid"):
        model.captured(IMAGE, FEATURES, values_shape=(1, 2, 3, 3))


def test_inputs_may_be_filled_in_place(cuda, model):
    forward = model.captured(IMAGE, FEATURES, (3, 4))
    for own, value in zip((forward.image, forward.features), given(2), strict=True):
        own.copy_(value)
    assert close(forward(), model(*given(2), (3, 4)))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.query_encoder[0].weight.mul_(2),
        lambda model: model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()}),
        lambda model: model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()}, assign=True),
        lambda model: setattr(model.rope.freqs, "data", model.rope.freqs * 2),
        lambda model: setattr(model.cross_decode, "window_ratio", 0.4),
    ],
    ids=["in place", "load_state_dict", "assign", "data", "window"],
)
def test_what_changes_is_captured_anew(cuda, model, change):
    forward = model.captured(IMAGE, FEATURES)
    before = forward(*given()).clone()
    change(model)
    after = forward(*given())
    assert forward.captures == 2 and close(after, model(*given())) and not close(after, before)
    forward(*given())
    assert forward.captures == 2


def test_what_is_kept_belongs_to_the_graph(cuda, interpreted, model):
    forward = model.captured(IMAGE, FEATURES)
    assert close(forward(*given()), model(*given(), backend="torch"))
    assert forward._kept is not kept.kept_of(model, forward.image)
    ready = "guidance, ready", torch.float32, False  # on a CPU factors are no halves
    table = forward._kept.of(ready, None).tables[IMAGE[2:]]
    model(*given())
    assert table is not kept.kept_of(model, forward.image).of(ready, None).tables[IMAGE[2:]]
    assert forward._kept.of(ready, None).tables[IMAGE[2:]] is table


def test_another_request_for_a_back_end_is_captured_anew(cuda, model):
    forward = model.captured(IMAGE, FEATURES)
    forward(*given())
    with ops.use_backend("torch"):
        forward(*given())
    assert forward.captures == 2


def test_equal_arguments_give_the_same_one_and_the_oldest_goes(cuda, model, monkeypatch):
    monkeypatch.setattr(captured, "MOST", 2)
    first = model.captured(IMAGE, FEATURES)
    assert model.captured(list(IMAGE), FEATURES, IMAGE[2:]) is first
    others = [model.captured(IMAGE, FEATURES, (n, n)) for n in (3, 4)]
    assert model.captured(IMAGE, FEATURES, (4, 4)) is others[1]
    assert model.captured(IMAGE, FEATURES) is not first
    assert isinstance(captured._captured[model], OrderedDict) and len(captured._captured[model]) == 2


def test_other_dtypes(cuda, model):
    forward = model.captured(IMAGE, FEATURES, features_dtype=torch.float16)
    image, features = given()
    out = forward(image.double(), features)
    assert out.dtype == torch.float16 and torch.allclose(out.float(), model(image, features), atol=3e-3)


def test_streams_wait_for_each_other(cuda, model):
    forward = model.captured(IMAGE, FEATURES)
    forward(*given())
    first, cuda.stream = cuda.stream, Stream()
    forward(*given())
    assert cuda.stream.waited == [first] and first.waited == []


def test_another_thread_is_refused(cuda, model):
    forward, found = model.captured(IMAGE, FEATURES), []

    def call():
        try:
            forward(*given())
        except RuntimeError as error:
            found.append(str(error))
        found.append(model.captured(IMAGE, FEATURES) is not forward)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert found == ["a captured forward serves the thread that made it: call AnyUp.captured in this one", True]


def test_it_does_not_keep_its_model(cuda, made):
    model = copy.deepcopy(made)
    forward, gone = model.captured(IMAGE, FEATURES), weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    with pytest.raises(RuntimeError, match="the model of this captured forward is gone"):
        forward(*given())


def test_what_does_not_fit_is_refused(cuda, model):
    forward = model.captured(IMAGE, FEATURES)
    with pytest.raises(ValueError, match=r"features: captured for shape \(1, 8, 2, 2\), got \(1, 8, 2, 3\)"):
        forward(given()[0], torch.zeros(1, 8, 2, 3))
    with pytest.raises(ValueError, match="image_shape: need 3 channels"):
        model.captured((1, 4, 6, 5), FEATURES)
    with pytest.raises(ValueError, match="need floating dtypes"):
        model.captured(IMAGE, FEATURES, dtype=torch.int32)
    model.rope.freqs = torch.nn.Parameter(model.rope.freqs.detach())
    with torch.inference_mode():
        model.rope.freqs = torch.nn.Parameter(torch.ones(2, 32), requires_grad=False)
    with pytest.raises(RuntimeError, match="changes of its parameters can't be seen"):
        model.captured(IMAGE, FEATURES)


def test_a_cpu_is_refused(made):
    with pytest.raises(RuntimeError, match="needs a CUDA device, the model is on cpu; call the model itself"):
        made.captured(IMAGE, FEATURES)
