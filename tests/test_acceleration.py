"""`accelerate` against modules built like other packages', before and after, and against the golden vectors."""

import copy
import functools
import io
import json
import logging
import pickle

import pytest
import standins
import torch
from standins import CLASSES, PublishedAnyUp, build
from torch import nn
from vectors import GOLDEN, GOLDEN_TOLERANCE, relative, tensors_of

import anyup_fast
from anyup_fast.acceleration import Acceleration, accelerate

KINDS = tuple(CLASSES)
OTHER = {"qk_dim": 64, "kernel_size_lfu": 3, "window_ratio": 0.21, "num_heads": 2, "lfu_dim": 32, "input_dim": 3}

# Norm of the difference over norm, float32 on both sides. Measured: 9e-6 for outputs, 4e-5 for gradients.
TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 2e-4


def inputs(kind, channels=16, size=(24, 30), grid=(4, 5), output_size=None, batch=1, ratio=0.1, seed=1):
    """Arguments of the forward of a kind, image and features first."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(batch, 3, *size, generator=generator) * 2 - 1
    features = torch.randn(batch, channels, *grid, generator=generator)
    out = output_size or size
    mask = (standins.block_mask(*out, *grid, ratio=ratio),) if kind == "falcon" else ()
    return image, features, *mask, output_size


class Pipeline(nn.Module):
    """Somebody's model with an upsampler inside."""

    def __init__(self, upsampler):
        super().__init__()
        self.backbone = nn.Conv2d(3, 16, 6, stride=6)
        self.head = nn.ModuleDict({"upsampler": upsampler})

    def forward(self, image, *rest):
        return self.head["upsampler"](image, self.backbone(image), *rest)


@pytest.mark.parametrize("output_size", [None, (12, 20)])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_outputs_stay_what_they_were(kind, output_size):
    module, given = build(kind), inputs(kind, output_size=output_size, batch=2)
    before = module(*given)
    report = accelerate(module)
    assert [(entry.name, entry.kind) for entry in report.replaced] == [("", kind)] and not report.left_alone
    after = module(*given)
    assert after.shape == before.shape and after.dtype == before.dtype
    assert relative(after, before) < TOLERANCE
    assert not torch.equal(after, before), "the computation is another one"


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_other_widths_are_read_off_the_module(kind):
    module, given = build(kind, **OTHER), inputs(kind, ratio=OTHER["window_ratio"])
    before = module(*given)
    (entry,) = accelerate(module).replaced
    assert {name: entry.config[name] for name in OTHER} == OTHER
    assert relative(module(*given), before) < TOLERANCE


@pytest.mark.parametrize("kind", ["published", "falcon"])
@torch.no_grad()
def test_a_first_convolution_that_couples_pixels_is_right_too(kind):
    module, given = build(kind, kernel_size=3), inputs(kind)
    before = module(*given)
    (entry,) = accelerate(module).replaced
    assert entry.config["kernel_size"] == 3
    assert relative(module(*given), before) < TOLERANCE


@pytest.mark.parametrize("name", ["small", "variant", "full"])
@torch.no_grad()
def test_stand_in_and_replacement_both_give_the_golden_vectors(name):
    tensors, metadata = tensors_of(GOLDEN / f"{name}.safetensors")
    weights = tensors if name != "full" else tensors_of(GOLDEN / "full_weights.safetensors")[0]
    module = PublishedAnyUp(**json.loads(metadata["config"])).eval()
    prefix = "state_dict."
    module.load_state_dict({key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)})
    size = json.loads(metadata["cases"])[0]["output_size"]
    image, features, expected = (tensors[f"case0.{part}"] for part in ("image", "features", "output"))
    assert relative(module(image, features, size), expected) < GOLDEN_TOLERANCE
    assert accelerate(module).replaced
    assert relative(module(image, features, size), expected) < GOLDEN_TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_shared_parameters(kind):
    module = build(kind)
    image, features, *rest = inputs(kind)
    parameters = dict(module.named_parameters())

    def gradients():
        given = [x.clone().requires_grad_() for x in (image, features)]
        module.zero_grad()
        out = module(*given, *rest)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found = {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()}
        return found | {"image": given[0].grad, "features": given[1].grad}

    before = gradients()
    accelerate(module)
    after = gradients()
    assert all(p is parameters[name] for name, p in module.named_parameters())
    for name, expected in before.items():
        if name.endswith("k_proj.bias"):  # the same for all keys: no softmax sees it, what is left is rounding
            assert max(after[name].abs().max(), expected.abs().max()) < 1e-4
            continue
        reached = after[name] is not None and bool(after[name].abs().sum())
        assert reached == (expected is not None and bool(expected.abs().sum())), name
        if reached:
            assert relative(after[name], expected) < GRADIENT_TOLERANCE, name


def test_training_goes_on_with_the_optimizer_made_before():
    losses = []
    for accelerated in (False, True):
        model = Pipeline(build("published"))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        if accelerated:
            accelerate(model)
        image, _, _ = inputs("published")
        target = torch.randn(1, 16, 24, 30, generator=torch.Generator().manual_seed(5))
        track = []
        for _ in range(5):
            loss = (model(image) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            track.append(loss.item())
        losses.append(track)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[1][-1] < losses[1][0]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_state_dict_is_the_same_objects_and_restore_undoes_everything(kind):
    module = build(kind)
    image, features, *rest = inputs(kind)
    before, tensors = module(image, features, *rest), module.state_dict(keep_vars=True)
    classes = {name: type(part) for name, part in module.named_modules()}
    attributes = {name: set(vars(part)) for name, part in module.named_modules()}
    text = repr(module)
    report = accelerate(module)
    shared = module.state_dict(keep_vars=True)
    assert list(shared) == list(tensors) and all(shared[name] is tensors[name] for name in tensors)
    assert isinstance(module, CLASSES[kind]) and repr(module) == text
    assert {name: set(vars(part)) for name, part in module.named_modules()} == attributes
    report.restore()
    assert {name: type(part) for name, part in module.named_modules()} == classes
    assert torch.equal(module(image, features, *rest), before)
    report.restore()
    assert type(module) is CLASSES[kind], "a second restore does nothing"


@torch.no_grad()
def test_what_is_done_to_the_outer_module_acts():
    model = Pipeline(build("published"))
    image, _, _ = inputs("published")
    accelerate(model)
    before = model(image)
    model.double()
    assert relative(model(image.double()), before.double()) < TOLERANCE and model(image.double()).dtype == torch.float64
    model.bfloat16()
    assert 0 < relative(model(image.bfloat16()).float(), before) < 0.1
    model.float()
    other = Pipeline(build("published", seed=7))
    expected = other(image)
    model.load_state_dict(other.state_dict())
    assert relative(model(image), expected) < TOLERANCE
    third = Pipeline(build("published", seed=8))
    model.load_state_dict(third.state_dict(), assign=True)
    assert relative(model(image), third(image)) < TOLERANCE
    called = []
    model.head["upsampler"].register_forward_hook(lambda *_: called.append(1))
    model(image)
    assert called == [1]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_copies_and_pickles_are_accelerated_and_their_own(kind):
    module, given = build(kind), inputs(kind)
    accelerate(module)
    expected = module(*given)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    copies = copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False)
    next(module.parameters()).zero_()
    for twin in copies:
        assert type(twin) is type(module)
        assert torch.equal(twin(*given), expected), "with parameters of its own"
        report = accelerate(twin)
        assert report.replaced, "what is accelerated already counts as replaced"
        report.restore()
        assert type(twin) is CLASSES[kind] and relative(twin(*given), expected) < TOLERANCE


def replica(module):
    """What nn.DataParallel makes of a module for a device: tensors in place of parameters."""
    twins = {inner: inner._replicate_for_data_parallel() for inner in module.modules()}
    for inner, twin in twins.items():
        for name, child in inner._modules.items():
            setattr(twin, name, twins[child])
        twin._former_parameters = {}
        for name, parameter in inner._parameters.items():
            if parameter is None:
                twin._parameters[name] = None
            else:
                twin._former_parameters[name] = parameter.clone()
                setattr(twin, name, twin._former_parameters[name])
    return twins[module]


@pytest.mark.parametrize("kind", [*KINDS, "own"])
def test_replicas_of_data_parallel_train_the_module(kind):
    module = anyup_fast.AnyUp(qk_dim=32) if kind == "own" else build(kind)
    given = inputs(kind)
    if kind != "own":
        accelerate(module)

    def gradients(of):
        module.zero_grad()
        of(*given).square().sum().backward()
        return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}

    expected = gradients(module)
    found = gradients(replica(module))
    assert len(found) > 60 and found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


@torch.no_grad()
def test_inner_modules_keep_their_own_forward():
    module = build("published")
    image, features, _ = inputs("published")
    before = module(image, features)
    accelerate(module)
    query, key = module.query_key(module.guide(image), features, image.shape[2:])
    assert torch.equal(module.cross_decode(query, key, features, vis_attn=False), before)


@torch.no_grad()
def test_arguments_of_the_published_forward():
    module = build("published")
    image, features, _ = inputs("published")
    small = module(image, features, 12)
    accelerate(module)
    assert relative(module(image, features, 12), small) < TOLERANCE
    expected = module(image, features)
    assert torch.equal(module(image=image, features=features, q_chunk_size=7), expected)
    assert torch.equal(module(image, features, None, False, 7), expected)
    shown = module(image, features, None, True)
    assert module.cross_decode.shown == 1, "the figure is the module's own"
    assert relative(shown, expected) < TOLERANCE
    assert module.window_ratio == module.cross_decode.window_ratio == 0.1
    module.window_ratio = 0.3  # as before without effect
    assert torch.equal(module(image, features), expected)
    module.cross_decode.window_ratio = 0.3
    assert relative(module(image, features), expected) > 100 * TOLERANCE


@torch.no_grad()
def test_the_natten_variant_draws_no_picture():
    module = build("natten")
    image, features, _ = inputs("natten")
    accelerate(module)
    with pytest.warns(UserWarning, match="vis_attn"):
        assert torch.equal(module(image, features, vis_attn=True), module(image, features))


@torch.no_grad()
def test_falcon_masks_are_compared_with_the_windows():
    module = build("falcon")
    image, features, mask, _ = inputs("falcon")
    accelerate(module)
    expected = module(images=image, features=features, attn_mask=mask)
    assert torch.equal(module(image, features, None), expected)
    with pytest.raises(ValueError, match=r"attn_mask: .* window_ratio 0.1: set cross_decode.window_ratio"):
        module(image, features, standins.block_mask(24, 30, 4, 5, ratio=0.3))
    with pytest.raises(ValueError, match=r"attn_mask: made for lengths \(240, 20\), need \(720, 20\)"):
        module(image, features, standins.block_mask(12, 20, 4, 5))
    with pytest.raises(ValueError, match="attn_mask: need a BlockMask or None, got int"):
        module(image, features, 3)


NEAR_MISSES = {
    "renamed": (lambda m: setattr(m, "ropes", m._modules.pop("rope")), r"missing \['rope.freqs'\], unknown \['ropes"),
    "reshaped": (
        lambda m: setattr(m.cross_decode, "conv2d", nn.Conv2d(32, 32, 5, padding=2, bias=False)),
        r"cross_decode.conv2d.weight has shape \(32, 32, 5, 5\), .* \(32, 32, 3, 3\)",
    ),
    "bias": (
        lambda m: setattr(m.query_encoder, "0", nn.Conv2d(32, 32, 1)),
        r"unknown \['query_encoder.0.bias'\]",
    ),
    "buffer": (lambda m: m.register_buffer("scale", torch.ones(1)), r"unknown \['scale'\]"),
    "no basis": (lambda m: delattr(m.key_features_encoder[0], "basis"), "no parameter key_features_encoder.0.basis"),
    "activation": (
        lambda m: m.image_encoder[1].block.__setitem__(1, nn.ReLU()),
        "image_encoder.1 is no block of two GroupNorm, SiLU, Conv2d",
    ),
    "groups": (
        lambda m: m.image_encoder[2].block.__setitem__(0, nn.GroupNorm(4, 32)),
        r"image_encoder.2.block.0 has 4 groups and eps 1e-05, not 8",
    ),
    "epsilon": (
        lambda m: setattr(m.cross_decode.cross_attn, "norm_q", nn.RMSNorm(32, eps=1e-3)),
        "norm_q has eps 0.001",
    ),
    "padding": (lambda m: setattr(m.aggregation[0], "padding_mode", "zeros"), "aggregation.0 is padded, strided or"),
    "stride": (lambda m: setattr(m.query_encoder[0], "stride", (2, 2)), "query_encoder.0 is padded, strided or"),
    "heads": (lambda m: setattr(m.cross_decode.cross_attn.attention, "num_heads", 5), "no AnyUp has its widths"),
    "no ratio": (lambda m: delattr(m.cross_decode, "window_ratio"), "cross_decode.window_ratio is None, no number"),
    "hooks": (
        lambda m: m.image_encoder[0].register_forward_hook(lambda *_: None),
        "its layer image_encoder.0 has hooks",
    ),
    "backward hooks": (
        lambda m: m.aggregation.register_full_backward_hook(lambda *_: None),
        "its layer aggregation has hooks",
    ),
    "own forward": (lambda m: setattr(m, "forward", m.forward), "it has a forward beside .* accelerate first"),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses_are_left_alone_and_reported(case, caplog):
    change, reason = NEAR_MISSES[case]
    module = build("published")
    change(module)
    model = Pipeline(module)
    classes = {name: type(part) for name, part in model.named_modules()}
    with caplog.at_level(logging.WARNING, "anyup_fast"):
        report = accelerate(model)
    assert not report.replaced and {name: type(part) for name, part in model.named_modules()} == classes
    (entry,) = report.left_alone
    assert entry.name == "head.upsampler"
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(entry.reason)
    assert "head.upsampler: left alone" in caplog.text and str(report) in caplog.text


def test_other_arguments_are_left_alone():
    class Reordered(PublishedAnyUp):
        def forward(self, features, image, output_size=None, vis_attn=False, q_chunk_size=None):
            return super().forward(image, features, output_size)

    (entry,) = accelerate(Reordered(qk_dim=32)).left_alone
    assert "its forward takes (features, image," in entry.reason


def overriding(cls, method):
    """A class below `cls` whose `method` gives twice as much."""
    inherited = getattr(cls, method)

    @functools.wraps(inherited)
    def twice(self, *args, **kwargs):
        return 2 * inherited(self, *args, **kwargs)

    return type("Twice", (cls,), {method: twice})


@pytest.mark.parametrize("name", ["", "cross_decode", "image_encoder.1", "key_encoder.0"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_a_subclass_computes_is_not_dropped(kind, name):
    module, given = build(kind), inputs(kind)
    layer = module.get_submodule(name)
    base, layer.__class__ = type(layer).__name__, overriding(type(layer), "forward")
    before = module(*given)
    report = accelerate(module)
    (entry,) = report.left_alone
    base = "PublishedAnyUp" if base == "NattenAnyUp" else base  # whose forward that is
    assert entry.reason == f"{f'its {name}' if name else 'it'} is a Twice, whose forward overrides that of {base}"
    assert not report.replaced and torch.equal(module(*given), before)


def test_an_upsample_of_its_own_is_not_dropped_and_a_mere_name_is_no_obstacle():
    (entry,) = accelerate(type("Own", (PublishedAnyUp,), {"upsample": lambda self: None})(qk_dim=32)).left_alone
    assert entry.reason == "it is a Own, whose upsample overrides that of PublishedAnyUp"
    named = type("Named", (PublishedAnyUp,), {"extra_repr": lambda self: "", "other": 3})(qk_dim=32)
    report = accelerate(named)
    assert report.replaced and accelerate(named).replaced, "and what is accelerated is so the second time"


def test_the_kinds_are_told_apart_in_one_model(caplog):
    model = nn.Sequential(*(build(kind) for kind in KINDS), anyup_fast.AnyUp(qk_dim=32), nn.Linear(2, 2))
    with caplog.at_level(logging.INFO, "anyup_fast"):
        report = anyup_fast.accelerate(model)
    assert isinstance(report, Acceleration) and str(report) in caplog.text
    assert [(entry.name, entry.kind) for entry in report.replaced] == [
        ("0", "published"),
        ("1", "natten"),
        ("2", "falcon"),
    ]
    assert [str(entry) for entry in report.left_alone] == ["3: left alone, it is anyup_fast's own AnyUp already"]
    assert type(model[3]) is anyup_fast.AnyUp


def test_no_anyup_and_no_module():
    report = accelerate(nn.Linear(2, 2))
    assert not report.replaced and not report.left_alone and "no module that looks like an AnyUp" in str(report)
    with pytest.raises(ValueError, match="module: need an nn.Module, got int"):
        accelerate(3)


@torch.no_grad()
def test_compiled_before_and_after():
    model = Pipeline(build("published"))
    image, _, _ = inputs("published")
    before = model(image)
    compiled = torch.compile(model, backend="eager")
    assert relative(compiled(image), before) < TOLERANCE
    (entry,) = accelerate(compiled).replaced
    assert entry.name == "_orig_mod.head.upsampler"
    after = compiled(image)
    assert torch.equal(after, model(image)) and not torch.equal(after, before)
    module = model.head["upsampler"]
    inner, called = module.forward, []
    module.forward = lambda *given: called.append(1) or inner(*given)  # as the compile() of Falcon-Perception does
    assert torch.equal(model(image), after) and called == [1]


@torch.no_grad()
def test_an_accelerated_module_can_be_prepared():
    module = build("published")
    image, features, _ = inputs("published")
    whole = module(image, features)
    accelerate(module)
    region = module.prepare(image, features).region(top=3, left=4, height=8, width=9)
    assert relative(region, whole[..., 3:11, 4:13]) < TOLERANCE


@torch.no_grad()
def test_a_forward_set_later_is_not_left_behind_by_restore():
    first, second = build("published"), build("falcon")
    given, before = inputs("falcon"), second(*inputs("falcon"))
    report = accelerate(model := nn.ModuleDict({"first": first, "second": second}))
    after = second(*given)
    second.forward = torch.compile(second.forward, backend="eager")  # as the compile() of Falcon-Perception does
    with pytest.raises(RuntimeError, match="second has a forward that was set after .* delete it first"):
        report.restore()
    assert type(first) is not PublishedAnyUp, "all or nothing"
    assert relative(second(*given), after) < TOLERANCE
    del model["second"].forward
    report.restore()
    assert type(first) is PublishedAnyUp and torch.equal(second(*given), before)


@torch.no_grad()
def test_compiled_modules_follow_restore():
    model = Pipeline(build("published"))
    image, _, _ = inputs("published")
    before = model(image)
    report = accelerate(model)
    compiled = torch.compile(model, backend="eager")
    model.head["upsampler"].compile(backend="eager")
    assert relative(compiled(image), before) < TOLERANCE and relative(model(image), before) < TOLERANCE
    report.restore()
    assert torch.equal(compiled(image), before) and torch.equal(model(image), before)
