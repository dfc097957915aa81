"""What code written for the published package relies on: argument orders, names, and the package's own name."""

import importlib.util
import json
import os
import warnings

import forked
import pytest
import standins
import tiny
import torch
from published_home import offline
from standins import build
from tree import ROOT
from vectors import relative

import anyup_fast
from anyup_fast import AnyUp
from anyup_fast.checkpoints import save_checkpoint
from anyup_fast.layers import RotaryEmbedding
from anyup_fast.logs import log_once

# Norm of the difference over norm. Measured: 9e-7 at most between upsample and forward, 4e-6 against the stand-in.
TOLERANCE = 5e-6
STAND_IN_TOLERANCE = 2e-5


def inputs(size=(20, 22), grid=(4, 5), channels=8, images=1, maps=1, seed=5):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(images, 3, *size, generator=generator)
    return image, torch.randn(maps, channels, *grid, generator=generator)


# The order of forward's arguments.


@torch.no_grad()
def test_forward_takes_the_published_order():
    model, (image, features) = tiny.model(), inputs()
    expected = model(image, features, output_size=(10, 11), vis_attn=True, q_chunk_size=4)
    found = model(image, features, (10, 11), True, 4)
    assert len(found) == 2 and all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert torch.equal(model(image, features, None, False, 4), model(image, features, q_chunk_size=4))
    assert torch.equal(model(image, features, None, 0), model(image, features))


@pytest.mark.parametrize(
    "given, message",
    [
        ((None, 256, False), "vis_attn: need True or False, got 256; by position, vis_attn comes before q_chunk_size"),
        ((None, 256), "vis_attn: need True or False, got 256"),
        ((None, None, True), "vis_attn: need True or False, got None"),
        ((None, 1, True), "q_chunk_size: need a number of rows or None, got True; by position, vis_attn comes before"),
        ((None, True, False), "q_chunk_size: need a number of rows or None, got False"),
    ],
)
@pytest.mark.parametrize("method", ["forward", "upsample"])
def test_the_other_order_is_refused(method, given, message):
    model, (image, features) = tiny.model(), inputs()
    first = image if method == "forward" else torch.zeros(1, model.qk_dim, 20, 22)
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(first, features, *given)


# upsample


@pytest.mark.parametrize("output_size", [None, (31, 17), (3, 4)])
@pytest.mark.parametrize(
    "config",
    [{}, {"kernel_size": 3, "lfu_dim": 16}, {"window_rule": "neighborhood"}, {"head_mode": "split"}, {"num_heads": 2}],
)
@torch.no_grad()
def test_upsample_gives_what_forward_gives(config, output_size):
    model, (image, features) = tiny.model(**config), inputs(images=2, maps=2)
    guide = model.rope(model.image_encoder(image))
    expected = model(image, features, output_size)
    found = model.upsample(guide, features, output_size or image.shape[2:])
    assert found.shape == expected.shape and relative(found, expected) < TOLERANCE
    pictures = model.upsample(guide, features, output_size, True, 5), model(image, features, output_size, True, 5)
    for actual, wanted in zip(*pictures, strict=True):
        assert relative(actual, wanted) < TOLERANCE


@pytest.mark.parametrize("kind", ["published", "natten"])
@torch.no_grad()
def test_upsample_takes_the_published_call(kind):
    stand_in, (image, features) = build(kind), inputs()
    config = {"qk_dim": 32}
    if kind == "published":
        model = AnyUp(**config)
        model.load_state_dict(stand_in.state_dict())
    else:
        published = build("published")
        standins.take_over(stand_in.cross_decode, published.cross_decode)
        for name in ("image_encoder", "query_encoder", "key_encoder", "key_features_encoder", "aggregation", "rope"):
            stand_in.get_submodule(name).load_state_dict(published.get_submodule(name).state_dict())
        model = AnyUp(**config, use_natten=True)
        model.load_state_dict(published.state_dict())
    guide = stand_in.guide(image)
    expected = stand_in.upsample(enc_img=guide, feats=features, out_size=(20, 25))
    assert relative(model.upsample(enc_img=guide, feats=features, out_size=(20, 25)), expected) < STAND_IN_TOLERANCE


@pytest.mark.parametrize("given", [{"images": 3}, {"maps": 3}])
@torch.no_grad()
def test_upsample_of_one_and_many(given):
    model, (image, features) = tiny.model(), inputs(**given)
    found = model.upsample(model.guidance(image), features, (7, 9))
    assert found.shape[0] == 3 and relative(found, model(image, features, (7, 9))) < TOLERANCE


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@torch.no_grad()
def test_upsample_in_other_dtypes(dtype, tolerance):
    model, (image, features) = tiny.model().to(dtype), inputs()
    found = model.upsample(model.guidance(image.to(dtype)), features.to(dtype), (20, 22))
    wide = tiny.model().to(dtype).double()
    assert found.dtype == dtype
    expected = wide(image.to(dtype).double(), features.to(dtype).double())
    assert relative(found.double(), expected) < tolerance


def test_gradients_through_upsample():
    model, given = tiny.model(), inputs()
    results = []
    for call in (model, lambda image, features: model.upsample(model.guidance(image), features, image.shape[2:])):
        image, features = (tensor.clone().requires_grad_() for tensor in given)
        model.zero_grad()
        call(image, features).square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append({"image": image.grad, "features": features.grad, **gradients})
    assert results[0].keys() == results[1].keys() and len(results[0]) > 60
    for name, expected in results[0].items():
        torch.testing.assert_close(
            results[1][name], expected, rtol=2e-4, atol=2e-5 * expected.abs().max().item() + 1e-5
        )


@torch.no_grad()
def test_upsample_is_one_graph():
    model, (image, features) = tiny.model(), inputs()
    guide = model.guidance(image)
    compiled = torch.compile(model.upsample, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(guide, features, (9, 7)), model.upsample(guide, features, (9, 7)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"enc_img": torch.zeros(1, 3, 20, 22)}, r"enc_img: need 32 channels, got shape \(1, 3, 20, 22\)"),
        ({"enc_img": torch.zeros(1, 440, 32)}, "enc_img: need 4 dimensions"),
        ({"feats": [1.0]}, "feats: need a floating-point tensor, got list"),
        ({"feats": torch.zeros(3, 8, 4, 5), "enc_img": torch.zeros(2, 32, 9, 9)}, "enc_img and feats differ in batch"),
        ({"out_size": 14}, r"out_size: need \(height, width\) or None, got 14"),
        ({"q_chunk_size": 0}, "q_chunk_size: need a positive number"),
    ],
)
def test_upsample_names_what_does_not_fit(change, message):
    given = {"enc_img": torch.zeros(1, 32, 20, 22), "feats": torch.zeros(1, 8, 4, 5), "out_size": (20, 22)}
    with pytest.raises(ValueError, match=message):
        tiny.model().upsample(**{**given, **change})


@pytest.mark.parametrize("kind", ["published", "natten", "falcon"])
@torch.no_grad()
def test_upsample_of_accelerated_modules(kind):
    module, (image, features) = build(kind), inputs(size := (20, 25))
    guide = module.guide(image)
    mask = (standins.block_mask(*size, 4, 5),) if kind == "falcon" else ()
    before = module.upsample(guide, features, *mask, size)
    assert anyup_fast.accelerate(module).replaced
    after = module.upsample(guide, features, *mask, size)
    if kind == "falcon":
        assert torch.equal(after, before), "its method, which takes a mask, is its own"
        return
    assert relative(after, before) < STAND_IN_TOLERANCE and not torch.equal(after, before)
    if kind == "natten":
        with pytest.warns(UserWarning, match="draws no picture") as caught:
            assert torch.equal(module.upsample(guide, features, size, vis_attn=True), after)
        assert caught[0].filename == __file__
    else:
        assert torch.equal(module.upsample(guide, features, size, vis_attn=True), before)
        assert module.cross_decode.shown == 1, "the figure is the module's own"


# The constructor and attributes.


@torch.no_grad()
def test_use_natten_is_the_neighborhood_rule(caplog):
    log_once.cache_clear()
    with caplog.at_level("INFO", "anyup_fast"):
        models = [tiny.model(**given) for given in ({"use_natten": True}, {"window_rule": "neighborhood"})]
    assert caplog.text.count("use_natten=True: windows by the rule 'neighborhood', computed without NATTEN") == 1
    assert torch.equal(*(model(*inputs()) for model in models))
    assert tiny.model(use_natten=True, window_rule="neighborhood").cross_decode.window_rule == "neighborhood"
    for given in ({}, {"use_natten": False}, {"window_rule": None}, {"use_natten": False, "window_rule": "ratio"}):
        assert tiny.model(**given).cross_decode.window_rule == "ratio"
    assert tiny.model(use_natten=False, window_rule="neighborhood").cross_decode.window_rule == "neighborhood"


def test_positional_arguments_of_the_published_constructor():
    model = AnyUp(3, 32, 1, 5, 0.2, 2, False, True, 16)
    assert (model.cross_decode.window_rule, model.lfu_dim, model.window_ratio) == ("neighborhood", 16, 0.2)


def test_arguments_that_contradict_or_are_unknown():
    with pytest.raises(ValueError, match="use_natten=True means window_rule='neighborhood', got window_rule='ratio'"):
        AnyUp(use_natten=True, window_rule="ratio")
    with pytest.raises(ValueError, match="use_natten: need True or False, got 16; by position, lfu_dim comes after it"):
        AnyUp(3, 32, 1, 5, 0.1, 4, False, 16)
    with pytest.raises(TypeError, match="unexpected keyword argument 'widnow_ratio'"):
        AnyUp(qk_dim=32, widnow_ratio=0.2)
    with pytest.warns(
        UserWarning, match="AnyUp: name='anyup' is taken as in the published code, and ignored"
    ) as caught:
        AnyUp(qk_dim=32, name="anyup")
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AnyUp(qk_dim=32)


def test_use_natten_in_the_config_of_a_checkpoint(tmp_path):
    path = tmp_path / "natten.safetensors"
    save_checkpoint(path, tiny.model().state_dict(), {"qk_dim": 32, "use_natten": True})
    for given, rule in ((None, "neighborhood"), ("ratio", "ratio"), ("neighborhood", "neighborhood")):
        assert AnyUp.from_pretrained(path, window_rule=given).cross_decode.window_rule == rule
    save_checkpoint(path, tiny.model().state_dict(), {"qk_dim": 32, "use_natten": True, "window_rule": "ratio"})
    with pytest.raises(ValueError, match="no AnyUp can be made from the config .*use_natten=True means"):
        AnyUp.from_pretrained(path)
    save_checkpoint(path, tiny.model().state_dict(), {"qk_dim": 32, "depth": 3})
    with pytest.raises(ValueError, match=r"arguments that AnyUp does not know: \['depth'\]"):
        AnyUp.from_pretrained(path)


def test_widths_are_attributes():
    assert (AnyUp().qk_dim, AnyUp().lfu_dim) == (128, 128)
    model = AnyUp(qk_dim=32, lfu_dim=16)
    assert (model.qk_dim, model.lfu_dim, model.input_dim) == (32, 16, 3)
    module = build("published", lfu_dim=16)
    anyup_fast.accelerate(module)
    assert (module.qk_dim, module.lfu_dim) == (32, 16)


# rope


def coordinates(h, w):
    axes = torch.linspace(0, 1, h), torch.linspace(0, 1, w)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(1, h * w, 2)


def tokens_of(x):
    return x.flatten(2).transpose(1, 2)


@torch.no_grad()
def test_rope_of_tokens_is_the_published_one():
    rope, stand_in = RotaryEmbedding(32), standins.Rope(32)
    stand_in.load_state_dict(rope.state_dict())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 32, 5, 7, generator=generator)
    tokens, coords = tokens_of(x), coordinates(5, 7)
    expected = stand_in(tokens, coords)
    # Measured: 1e-7 at most.
    assert relative(rope(tokens, coords), expected) < 1e-6
    assert relative(tokens_of(rope(x)), expected) < 1e-6
    assert torch.equal(rope(tokens, coords[0]), rope(tokens, coords))
    anywhere = torch.rand(2, 35, 2, generator=generator)
    assert relative(rope(tokens, anywhere), stand_in(tokens, anywhere)) < 1e-6
    assert relative(rope(tokens.half(), coords.half()).float(), expected) < 2e-2
    assert rope(tokens.half(), coords).dtype == torch.float16


@pytest.mark.parametrize(
    "given, message",
    [
        (
            (torch.zeros(1, 6, 32),),
            r"x: need \(B, C, H, W\), or tokens \(B, N, C\) with coords, got shape \(1, 6, 32\)",
        ),
        ((torch.zeros(1, 32, 2, 3), torch.zeros(1, 6, 2)), r"x: with coords, need tokens \(B, N, 32\), got shape"),
        ((torch.zeros(1, 6, 16), torch.zeros(1, 6, 2)), r"x: with coords, need tokens \(B, N, 32\)"),
        (
            (torch.zeros(2, 6, 32), torch.zeros(1, 5, 2)),
            r"coords: need \(2, 6, 2\), \(1, 6, 2\) or \(6, 2\), got shape",
        ),
        ((torch.zeros(2, 6, 32), torch.zeros(3, 6, 2)), r"coords: need .* got shape \(3, 6, 2\)"),
    ],
)
def test_rope_names_shapes_that_do_not_fit(given, message):
    with pytest.raises(ValueError, match=message):
        RotaryEmbedding(32)(*given)


@torch.no_grad()
def test_the_steps_of_the_published_forward_one_by_one():
    model, (image, features) = tiny.model(), inputs()
    encoded = model.image_encoder(image)
    tokens = model.rope(tokens_of(encoded), coordinates(20, 22))
    guide = tokens.transpose(1, 2).unflatten(2, (20, 22))
    assert relative(model.upsample(guide, features, (20, 22)), model(image, features)) < TOLERANCE


# The name `anyup`. Each in a process of its own, as it changes what can be imported.

needs_none = pytest.mark.skipif(importlib.util.find_spec("anyup") is not None, reason="an anyup is installed here")


def run(source, *arguments, cwd, folders=(), env=None):
    path = os.pathsep.join([*map(str, folders), str(ROOT)])
    done = forked.run("-c", source, *arguments, cwd=cwd, PYTHONPATH=path, **(env or {}))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


INSTALLED = """
import importlib.util, inspect, json, pickle, sys
import torch, anyup_fast
assert anyup_fast.AnyUp and "anyup" not in sys.modules and importlib.util.find_spec("anyup") is None
anyup_fast.install_as_anyup()
first = sys.modules["anyup"], sys.modules["anyup.model"]
anyup_fast.install_as_anyup()
assert first == (sys.modules["anyup"], sys.modules["anyup.model"])

import anyup.model
from anyup import anyup_multi_backbone, model
from anyup.model import AnyUp
assert AnyUp is anyup_fast.AnyUp and model is first[1] and anyup.model is model
assert importlib.util.find_spec("anyup.model").origin == importlib.util.find_spec("anyup").origin
for name in ("anyup.layers", "anyup.utils.img"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert error.name in ("anyup.layers", "anyup.utils"), error
    else:
        raise AssertionError(name)

torch.manual_seed(0)
made = AnyUp(qk_dim=32).eval()
pretrained = anyup_multi_backbone(device="cpu")
published = anyup.anyup(use_natten=True, pretrained=False, device="meta")
image, features = torch.load(sys.argv[1] + "/inputs.pt")
with torch.no_grad():
    torch.save((made(image, features), pretrained(image, features)), sys.argv[1] + "/outputs.pt")
with open(sys.argv[1] + "/model.pkl", "wb") as file:
    pickle.dump(made, file)
rule, device = published.cross_decode.window_rule, published.image_encoder[0].weight.device.type
print(json.dumps([type(made).__module__, rule, device]))
"""


@needs_none
@torch.no_grad()
def test_code_that_imports_anyup_gets_this_package(torch_home, tmp_path):
    home, weights = torch_home
    image, features = inputs()
    torch.save((image, features), tmp_path / "inputs.pt")
    assert run(INSTALLED, tmp_path, cwd=tmp_path, env=offline({}, home)) == ["anyup_fast.model", "neighborhood", "meta"]
    made, pretrained = torch.load(tmp_path / "outputs.pt")
    stand_in = standins.PublishedAnyUp().eval()
    stand_in.load_state_dict(weights["anyup_multi_backbone"])
    # Measured: 4e-7.
    assert relative(pretrained, stand_in(image, features)) < 1e-5
    # A process without the modules `anyup` reads the pickle.
    source = (
        "import json, pickle, sys, torch; folder = sys.argv[1]; model = pickle.load(open(folder + '/model.pkl', 'rb'));"
        "assert 'anyup' not in sys.modules\n"
        "with torch.no_grad(): torch.save(model(*torch.load(folder + '/inputs.pt')), folder + '/again.pt')\n"
        "print(json.dumps(type(model).__name__))"
    )
    assert run(source, tmp_path, cwd=tmp_path) == "AnyUp"
    assert torch.equal(torch.load(tmp_path / "again.pt"), made)


REFUSED = """
import json, sys, types
import anyup_fast

def refused():
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "anyup"}
    try:
        anyup_fast.install_as_anyup()
    except RuntimeError as error:
        assert before == {name: module for name, module in sys.modules.items() if name.split(".")[0] == "anyup"}
        return str(error)

messages = [refused()]
import anyup
messages.append(refused())
for name in ("anyup", "anyup.model"):
    sys.modules.pop("anyup")
    sys.modules[name] = types.ModuleType(name)
    messages.append(refused())
print(json.dumps([anyup.__spec__.origin, messages]))
"""


@needs_none
@pytest.mark.parametrize("kind", ["package", "folder without __init__"])
def test_an_anyup_of_somebody_else_is_not_hidden(kind, tmp_path):
    theirs = tmp_path / "site" / "anyup"
    theirs.mkdir(parents=True)
    (theirs / "model.py").write_text("class AnyUp: pass\n")
    file = theirs / "__init__.py"
    if kind == "package":
        file.write_text("")
    origin, messages = run(REFUSED, cwd=tmp_path, folders=[theirs.parent])
    place = str(file if kind == "package" else theirs)
    assert origin == (place if kind == "package" else None)
    places = [f"in {place}", f"imported from {place}"]
    places += [f"imported from <module '{name}'>" for name in ("anyup", "anyup.model")]
    for message, where in zip(messages, places, strict=True):
        assert f"there is an anyup already, {where}, and it is not hidden" in message
        assert "pip uninstall anyup" in message and "anyup_fast.accelerate" in message
