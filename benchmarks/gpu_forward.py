"""The whole forward on a GPU, for gpu.py: whether it is right, then how fast it and each stage is.

Right means: every operator and the whole forward agree with the plain layers in float64 on the CPU, two runs are equal
to the bit, nothing waits for the device, and a captured CUDA graph gives the same, for what its inputs
hold when it is replayed. At the sizes that are timed, single pixels are compared with plain PyTorch in float64, which
the examination holds to the plain layers. Peak memory is what a call allocates beyond its
inputs, weights and one earlier call.
"""

import attention_cases
import torch
import torch.nn.functional as F
from gpu_steps import Lazy, Step
from roofline import floor_s, parse, peak_bytes

from anyup_fast import AnyUp
from anyup_fast.kept import kept_of
from anyup_fast.layers import unit_channels
from anyup_fast.ops import feature_unification, guidance, project_keys, project_queries, reference, use_backend

# Milliseconds and GiB to reach in bfloat16 on an H100.
GOALS_MS = {"448/32/384": 0.9, "518/37/768": 1.4, "1024/64/768": 5.0, "2048/128/1024": 35.0}
GOALS_GIB = {"448/32/384": 0.23, "1024/64/768": 2.0, "2048/128/1024": 10.5}
# Norm of the difference over norm.
TOLERANCE = {torch.float32: attention_cases.ON_GPUS, torch.bfloat16: 5e-3, torch.float16: 2e-3}
# Of gradients, which are sums over all pixels.
GRADIENT_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.2, torch.float16: 0.05}
OPERATORS = "guidance", "feature_unification", "project_queries", "windowed_attention", "AnyUp"
POINTS = 256
CASES = (
    ((56, 70), (4, 5), 384, None, 1),
    ((56, 70), (4, 5), 21, (100, 90), 2),
    ((64, 64), (9, 7), 1, (20, 30), 1),
    ((40, 1), (3, 1), 100, None, 1),
    ((48, 48), (1, 1), 768, None, 4),
    ((224, 224), (16, 16), 384, None, 1),
)


def inputs(size, grid, channels, batch=1):
    """Smooth noise as image (float32) and features."""
    generator = torch.Generator().manual_seed(0)
    image = F.interpolate(torch.randn(batch, 3, 12, 12, generator=generator), size, mode="bicubic")
    return image, torch.randn(batch, channels, *grid, generator=generator)


def plain(model, image, features, output_size):
    """The plain layers, one after the other."""
    guide = model.guidance(image)
    query = model.queries(guide, output_size or image.shape[-2:])
    return model.cross_decode(query, model.keys(guide, features), features)


def distance(actual, expected):
    """Norm of the difference over the norm."""
    return ((actual.cpu().double() - expected).norm() / expected.norm()).item()


def problems(card):
    """Steps of the sweep: for each case and dtype the forward, the operators, parts of the image, and gradients."""
    exact = Lazy(lambda: AnyUp.from_pretrained().double())
    for size, grid, channels, output, batch in CASES:
        image, features = inputs(size, grid, channels, batch)
        expected = Lazy(lambda a=image, b=features, output=output: _expected(exact(), a, b, output))
        for dtype, limit in TOLERANCE.items():
            model = Lazy(lambda dtype=dtype: AnyUp.from_pretrained().to(dtype).to(card.device))
            given = Lazy(lambda pair=(image, features), dtype=dtype: [x.to(dtype).to(card.device) for x in pair])
            for what, launch, judge in _swept(model, exact, given, output, expected, limit, card):
                text = f"{size} {grid} {channels} {output} {batch}"
                yield Step("sweep forward", text, str(dtype).removeprefix("torch."), what, launch, judge)


@torch.no_grad()
def _expected(exact, image, features, output):
    return plain(exact, image.double(), features.double(), output)


def _swept(model, exact, given, output, expected, limit, card):
    """(name, launch, judge) of what is compared in one case."""

    @torch.no_grad()
    def forward():
        return dict(_runs(model(), given(), output, card))

    @torch.no_grad()
    def operators():
        return _operators(model(), given(), output)

    @torch.no_grad()
    def parts():
        return _parts(model(), given(), output)

    def forward_judged(outs):
        return _worst({name: distance(out, expected()) for name, out in outs.items()}, limit)

    @torch.no_grad()
    def operators_judged(outs):
        wanted = _operators_expected(model(), exact(), given(), output)
        errors = {name: distance(out, wanted[name]) for name, out in outs.items()}
        # Rounded inputs and weights count; a product of 128 rounded numbers is allowed four times as much.
        return _worst(errors, 4 * limit)

    def parts_judged(outs):
        streamed, points, found = outs
        pairs = {"stream": (streamed, expected()), "points": (found, expected()[:, :, points[:, 0], points[:, 1]].mT)}
        return _worst({name: distance(*pair) for name, pair in pairs.items()}, 2 * limit)

    yield "forward", forward, forward_judged
    yield "operators", operators, operators_judged
    yield "parts", parts, parts_judged
    yield (
        "gradients",
        lambda: _gradients(model(), given(), output),
        lambda grads: _gradients_judged(grads, exact(), given(), output),
    )


def _worst(errors, limit):
    """Error, limit and, where it is beyond, whose it is; not a number is worse than any number."""
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    fault = None if errors[worst] <= limit else f"{worst}: error {errors[worst]:.1e}"
    return dict(error=errors[worst], limit=limit, fault=fault)


def _runs(model, given, output, card):
    """(name, output) of a first, a watched and a captured run; RuntimeError where they differ or wait."""
    first = model(*given, output)
    yield "first run", first
    if card.device.type != "cuda":
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = model(*given, output)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if not torch.equal(again, first):
        raise RuntimeError("two runs of the forward differ")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model(*given, output)
    graph.replay()
    torch.cuda.synchronize()
    if not torch.equal(captured, first):
        raise RuntimeError("a captured graph of the forward gives another result")
    yield "captured", captured.clone()
    for tensor in given:
        tensor.copy_(tensor.flip(2, 3))
    graph.replay()
    torch.cuda.synchronize()
    if not torch.equal(captured, model(*given, output)):
        raise RuntimeError("a captured graph of the forward does not follow its inputs")
    for tensor in given:
        tensor.copy_(tensor.flip(2, 3))


def _parts(model, given, output):
    """What `prepare` answers: tiles copied to the host while others are computed, and points."""
    prepared = model.prepare(*given)
    image, features = given
    size = tuple(output or image.shape[-2:])
    streamed = torch.empty((len(features), features.shape[1], *size), dtype=features.dtype)
    prepared.stream(tile=17, output_size=output, out=streamed)
    points = torch.tensor([[0, 0], [n - 1 for n in size]])
    return streamed, points, prepared.at(points, output)


@torch.enable_grad()
def _gradients(model, given, output):
    """Name to gradient of every parameter, None where it has none."""
    model.zero_grad()
    out = model(*given, output)
    out.backward(out.detach())
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return grads


@torch.enable_grad()
def _gradients_judged(grads, exact, given, output):
    """The worst parameter against the plain layers in float64 on the CPU."""
    expected = plain(exact, *(tensor.cpu().double() for tensor in given), output)
    expected.backward(expected.detach())
    twins = {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}
    # With a single key no weight matters: gradients are zero and their rounding is measured by the output.
    floor = 1e-3 * max(*(twin.norm() for twin in twins.values()), expected.norm())
    errors = {
        f"gradient of {name}": ((grads[name].cpu().double() - twin).norm() / max(twin.norm(), floor)).item()
        for name, twin in twins.items()
    }
    exact.zero_grad()
    return _worst(errors, GRADIENT_TOLERANCE[given[0].dtype])


def _operators(model, given, output):
    image, features = given
    size, grid = tuple(output or image.shape[-2:]), features.shape[-2:]
    query, key, _ = guidance(image, model.guidance_weights(), size, grid, dtype=image.dtype)
    unified = feature_unification(unit_channels(features), model.key_features_encoder[0].basis)
    return {"guidance, queries": query, "guidance, keys": key, "feature_unification": unified}


def _operators_expected(model, exact, given, output):
    image, features = given
    size, grid = tuple(output or image.shape[-2:]), features.shape[-2:]
    guide = exact.guidance(image.cpu().double())
    unit, basis = (x.cpu().double() for x in (unit_channels(features), model.key_features_encoder[0].basis))
    return {
        "guidance, queries": exact.queries(guide, size).permute(0, 2, 3, 1),
        "guidance, keys": F.adaptive_avg_pool2d(exact.key_encoder(guide), grid).permute(0, 2, 3, 1),
        "feature_unification": reference.feature_unification(unit, basis),
    }


def steps(shape, dtype, card, rates=None):
    """The whole checked and timed (in a graph, as it is called, on the host), then its stages.

    Args:
        shape: "image/grid/channels". dtype: name of it, of model, image and features. card: `gpu_steps.Card`.
        rates: bytes, operations and exponentials per second for the floor, or None where they were not measured.
    """
    side, grid, channels = parse(shape)
    kind = attention_cases.DTYPES[dtype]
    model = Lazy(lambda: AnyUp.from_pretrained().to(card.device, kind))
    given = Lazy(lambda: _given(side, grid, channels, kind, card))
    floor = rates and 1e3 * floor_s(shape, dtype, **dict(zip(("bytes_per_s", "flops", "exps"), rates, strict=True)))
    named = dict(part="forward", shape=shape, dtype=dtype, operators=OPERATORS)

    @torch.no_grad()
    def call():
        return model()(*given())

    note = f"peak expected {peak_bytes(shape, dtype) / 2**20:.0f} MiB"
    figures = dict(floor_ms=floor, note=note)
    if dtype == "bfloat16":
        figures["goal_ms"] = GOALS_MS.get(shape)
        figures["note"] += f", goal {1024 * GOALS_GIB[shape]:.0f} MiB" if shape in GOALS_GIB else ""

    yield Step(
        **named,
        what="AnyUp",
        launch=call,
        judge=lambda out: _points_judged(out, *given(), TOLERANCE[kind], card),
        clock="graph",
        figures=figures,
        derive=lambda ms: dict(share=floor and floor / ms),
    )
    yield Step(**named, what="AnyUp, called", launch=call, clock="events", repeats=True, needs=("AnyUp",))
    yield Step(**named, what="AnyUp, host", launch=call, clock="host", repeats=True, needs=("AnyUp",))
    for what, launch in _stages(model, given, side, grid, kind).items():
        yield Step(**named, what=f"stage {what}", launch=launch, clock="graph", repeats=True, needs=("AnyUp",))


def _given(side, grid, channels, kind, card):
    """Smooth noise as image, and features."""
    if not card.executes:
        return card.draw((1, 3, side, side), kind), card.draw((1, channels, grid, grid), kind)
    image = F.interpolate(card.draw((1, 3, 12, 12), torch.float32, 1), (side, side), mode="bicubic")
    return image.to(kind), card.draw((1, channels, grid, grid), kind)


@torch.no_grad()
def _points_judged(out, image, features, limit, card):
    """Error at random pixels against plain PyTorch in float64."""
    exact = AnyUp.from_pretrained().double().to(card.device)
    generator = torch.Generator().manual_seed(0)
    points = torch.stack([torch.randint(n, (POINTS,), generator=generator) for n in out.shape[2:]])
    with use_backend("torch"):
        expected = exact.prepare(image.double(), features.double()).at(points.mT)
    found = out[:, :, points[0], points[1]].mT
    return dict(error=distance(found, expected.cpu()), limit=limit)


def _stages(model, given, side, grid, kind):
    """Name to call of every stage but the attention, with what is made of weights kept, as in a forward."""

    def kept(name, make):
        found = kept_of(model(), given()[0])
        return make() if found is None else found.of(name, make), found

    @torch.no_grad()
    def guided():
        weights, made = kept("guidance", model().guidance_weights)
        return guidance(given()[0], weights, (side, side), (grid, grid), dtype=kind, kept=made)

    @torch.no_grad()
    def unified():
        return model().unified(given()[1], kept_of(model(), given()[0]))

    guide, unit = Lazy(guided), Lazy(unified)

    @torch.no_grad()
    def keys():
        weights, made = kept("keys", model().key_weights)
        return project_keys(guide()[1], unit(), weights, dtype=kind, kept=made)

    @torch.no_grad()
    def queries():
        weights, made = kept("queries", model().query_projection)
        return project_queries(guide()[0], *weights, kept=made)

    return dict(guidance=guided, feature_unification=unified, project_keys=keys, project_queries=queries)
