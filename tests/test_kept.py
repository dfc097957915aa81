"""What is made of a model's parameters: kept as long as they stay what they are, made anew when they change."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import tiny
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from anyup_fast import accelerate, kept
from anyup_fast.ops import choice


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """Tensors on the CPU count as those of a GPU."""
    monkeypatch.setattr(choice, "_GPUS", ("cpu",))


@pytest.fixture
def model():
    return tiny.model()


HERE = torch.zeros(1)


def made(model):
    """Something that is kept for the model: another one as soon as it is made anew."""
    return kept.kept_of(model, HERE).of("thing", object)


def test_nothing_is_made_twice(model):
    assert made(model) is made(model) is not made(tiny.model())


def step(model):
    """One step of an optimizer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def assigned(model):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def half_and_back(model):
    model.half().float()


@torch.no_grad()
def in_place(model):
    model.cross_decode.conv2d.weight[0, 0, 0, 0] = 1


def another_part(model):
    model.query_encoder = copy.deepcopy(model.query_encoder)


CHANGES = {
    "step": step,
    "load_state_dict": lambda model: model.load_state_dict(model.state_dict()),
    "assign": assigned,
    "dtype": lambda model: model.double(),
    "half and back": half_and_back,
    "in place": in_place,
    "data": lambda model: setattr(model.rope.freqs, "data", model.rope.freqs.data.clone()),
    "parameter": lambda model: setattr(model.rope, "freqs", torch.nn.Parameter(model.rope.freqs.detach())),
    "part": another_part,
    "forgotten": kept.forget,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_is_made_anew(model, change):
    before = made(model)
    change(model)
    after = made(model)
    assert after is not before and after is made(model)


@pytest.mark.parametrize(
    "kind", [lambda model: model.train(), lambda model: model.requires_grad_(False), lambda _: gc.collect()]
)
def test_what_changes_no_number_changes_nothing(model, kind):
    before = made(model)
    kind(model)
    assert made(model) is before


def test_copies_pickles_and_state_dicts_know_nothing_of_it(model):
    names, size = set(vars(model)), len(pickle.dumps(model))
    before = made(model)
    assert set(vars(model)) == names and len(pickle.dumps(model)) == size
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert made(other) is not before and other.state_dict().keys() == model.state_dict().keys()
    assert made(model) is before


def test_it_keeps_no_model_alive():
    model = tiny.model()
    made(model)
    gone, thing = weakref.ref(model), weakref.ref(kept.kept_of(model, HERE))
    del model
    gc.collect()
    assert gone() is None and thing() is None


def test_memory_of_parameters_is_held_until_somebody_looks(model):
    """Else another parameter could come to lie where one was, and look like it."""
    made(model)
    pointer = model.rope.freqs.data_ptr()
    for _ in range(20):
        model.rope.freqs.data = model.rope.freqs.data + 1
        assert model.rope.freqs.data_ptr() != pointer


def test_modules_of_other_packages(model):
    class Foreign(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, image, features, output_size=None, vis_attn=False, q_chunk_size=None):
            return self.inner(image, features, output_size)

    outer = Foreign()
    assert "left alone" in str(accelerate(outer))
    before = made(outer)
    in_place(outer.inner)
    assert made(outer) is not before


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_parametrized_layers_are_not_trusted(model, name):
    torch.nn.utils.parametrize.register_parametrization(
        model.cross_decode.cross_attn.attention.out_proj, name, torch.nn.Tanh()
    )
    assert kept.kept_of(model, HERE) is None


def test_parameters_without_versions_are_not_trusted(model):
    with torch.inference_mode():
        model.rope.freqs = torch.nn.Parameter(torch.ones(2, 32), requires_grad=False)
    assert kept.kept_of(model, HERE) is None
    model.rope.freqs = torch.nn.Parameter(torch.ones(2, 32))
    assert made(model) is made(model)


def test_nothing_is_kept_where_graphs_are_traced(model):
    seen = []

    def function(x):
        seen.append(kept.kept_of(model, x))
        return x + 1

    make_fx(function)(torch.zeros(2))
    torch.func.vmap(function)(torch.zeros(2, 3))
    torch.export.export(Traced(function), (torch.zeros(2),), strict=False)
    assert seen and not any(seen)
    assert kept.kept_of(model, torch.zeros(2, device="meta")) is None, "no GPU"


class Traced(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_each_request_for_a_back_end_has_its_own(model):
    before = made(model)
    with choice.use_backend("torch"):
        assert made(model) is not before
    assert made(model) is before
    choice.forget_faults()
    assert made(model) is not before


def test_threads_agree(model):
    found, start = [], threading.Barrier(8)

    def look():
        start.wait()
        for _ in range(200):
            found.append(kept.kept_of(model, HERE))

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 1600 and {id(one) for one in found} == {id(kept.kept_of(model, HERE))}
