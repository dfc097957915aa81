"""The whole forward on a GPU: whether it is right, then how fast each stage is. Part of gpu.py, which runs it.

Right means: every operator and the whole forward agree with the plain layers in float64 on the CPU, two runs are equal
to the bit, nothing waits for the device, and a captured CUDA graph gives the same, for what its inputs
hold when it is replayed. Peak memory is what a call allocates beyond its inputs, weights and one earlier call.
"""

import torch
import torch.nn.functional as F
from roofline import floor_s, peak_bytes

from anyup_fast import AnyUp
from anyup_fast.layers import unit_channels
from anyup_fast.ops import feature_unification, guidance, project_keys, project_queries, reference

# Milliseconds and GiB to reach in bfloat16 on an H100.
GOALS_MS = {"448/32/384": 0.9, "518/37/768": 1.4, "1024/64/768": 5.0, "2048/128/1024": 35.0}
GOALS_GIB = {"448/32/384": 0.23, "1024/64/768": 2.0, "2048/128/1024": 10.5}
# Norm of the difference over norm.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 5e-3, torch.float16: 2e-3}
# Of gradients, which are sums over all pixels.
GRADIENT_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.2, torch.float16: 0.05}
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


@torch.no_grad()
def sweep(device):
    """Sentences about what failed."""
    failed = []
    exact = AnyUp.from_pretrained().double()
    for size, grid, channels, output, batch in CASES:
        image, features = inputs(size, grid, channels, batch)
        for dtype, limit in TOLERANCE.items():
            here = [tensor.to(dtype) for tensor in (image, features)]
            expected = plain(exact, image.double(), features.double(), output)
            model = AnyUp.from_pretrained().to(dtype).to(device)
            given = [tensor.to(device) for tensor in here]
            what = f"forward {size} {grid} {channels} {output} {batch} {dtype}"
            try:
                for out, text in _runs(model, given, output, device):
                    error = distance(out, expected)
                    if not error <= limit:
                        failed.append(f"{what}, {text}: error {error:.1e} exceeds {limit:.0e}")
            except RuntimeError as error:  # a launch that fails, a wait for the device: told with the rest
                failed.append(f"{what}: {' '.join(str(error).split())[:200]}")
            failed += _operator_faults(model, exact, given, output)
            failed += [f"{what}, {fault}" for fault in _part_faults(model, given, output, expected, limit)]
            failed += [f"{what}, {fault}" for fault in _gradient_faults(model, exact, given, output)]
    print(f"correctness of the forward: {len(CASES) * len(TOLERANCE)} problems, {len(failed)} failed")
    return failed


def _runs(model, given, output, device):
    """The output of a first, a watched and a captured run; RuntimeError where they differ or wait."""
    first = model(*given, output)
    yield first, "first run"
    if device.type != "cuda":
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
    yield captured, "captured"
    for tensor in given:
        tensor.copy_(tensor.flip(2, 3))
    graph.replay()
    torch.cuda.synchronize()
    if not torch.equal(captured, model(*given, output)):
        raise RuntimeError("a captured graph of the forward does not follow its inputs")
    for tensor in given:
        tensor.copy_(tensor.flip(2, 3))


def _part_faults(model, given, output, expected, limit):
    """Faults of what `prepare` answers: tiles copied to the host while others are computed, and points."""
    prepared = model.prepare(*given)
    streamed = torch.empty(expected.shape, dtype=given[1].dtype)
    prepared.stream(tile=17, output_size=output, out=streamed)
    points = torch.tensor([[0, 0], [n - 1 for n in expected.shape[2:]]])
    found = prepared.at(points, output)
    pairs = {"stream": (streamed, expected), "points": (found, expected[:, :, points[:, 0], points[:, 1]].mT)}
    errors = {name: distance(*pair) for name, pair in pairs.items()}
    return [f"{name}: error {error:.1e}" for name, error in errors.items() if not error <= 2 * limit]


@torch.enable_grad()
def _gradient_faults(model, exact, given, output):
    """The worst parameter, where its gradient differs from that of the plain layers in float64 on the CPU."""
    limit = GRADIENT_TOLERANCE[given[0].dtype]
    out = model(*given, output)
    out.backward(out.detach())
    expected = plain(exact, *(tensor.cpu().double() for tensor in given), output)
    expected.backward(expected.detach())
    pairs = zip(model.named_parameters(), exact.parameters(), strict=True)
    grads = {name: (p.grad.cpu().double(), twin.grad) for (name, p), twin in pairs if twin.grad is not None}
    # With a single key no weight matters: gradients are zero and their rounding is measured by the output.
    floor = 1e-3 * max(*(twin.norm() for _, twin in grads.values()), expected.norm())
    errors = {name: ((grad - twin).norm() / max(twin.norm(), floor)).item() for name, (grad, twin) in grads.items()}
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    model.zero_grad()
    exact.zero_grad()
    return [f"gradient of {worst}: error {errors[worst]:.1e}"] * (not errors[worst] <= limit)


def _operator_faults(model, exact, given, output):
    image, features = given
    size, grid = tuple(output or image.shape[-2:]), features.shape[-2:]
    wide = image.cpu().double()
    guide = exact.guidance(wide)
    query, key, _ = guidance(image, model.guidance_weights(), size, grid, dtype=image.dtype)
    unit = unit_channels(features)
    basis = model.key_features_encoder[0].basis
    pairs = {
        "guidance, queries": (query, exact.queries(guide, size).permute(0, 2, 3, 1)),
        "guidance, keys": (key, F.adaptive_avg_pool2d(exact.key_encoder(guide), grid).permute(0, 2, 3, 1)),
        "feature_unification": (
            feature_unification(unit, basis),
            reference.feature_unification(unit.cpu().double(), basis.cpu().double()),
        ),
    }
    limit = TOLERANCE[image.dtype]
    errors = {name: distance(*pair) for name, pair in pairs.items()}
    # Rounded inputs and weights count; a product of 128 rounded numbers is allowed four times as much.
    return [f"{name}: error {error:.1e}" for name, error in errors.items() if not error <= 4 * limit]


@torch.no_grad()
def measure(shape, dtype, timed):
    """Yield rows for one shape: the whole, captured in a graph, and each stage.

    Args:
        shape: "image/grid/channels". dtype: of model, image and features.
        timed: callable from a call to (20th, 50th, 80th percentile in ms, peak bytes).
    """
    side, grid, channels = map(int, shape.split("/"))
    image, features = (tensor.to("cuda", dtype) for tensor in inputs((side, side), (grid, grid), channels))
    model = AnyUp.from_pretrained().to("cuda", dtype)
    name = str(dtype).removeprefix("torch.")
    constant = dict(shape=shape, dtype=name)
    floor = 1e3 * floor_s(shape, name)

    def row(what, call, **more):
        p20, middle, p80, peak = timed(call)
        return dict(constant, what=what, milliseconds=middle, p20=p20, p80=p80, peak_mib=peak / 2**20, **more)

    goal = GOALS_MS.get(shape, "") if dtype == torch.bfloat16 else ""
    note = f"peak expected {peak_bytes(shape, name) / 2**20:.0f} MiB"
    if dtype == torch.bfloat16 and shape in GOALS_GIB:
        note += f", goal {1024 * GOALS_GIB[shape]:.0f} MiB"
    yield row("forward", lambda: model(image, features), floor_ms=floor, goal_ms=goal, note=note)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        model(image, features)
    yield row("forward, captured graph", captured.replay, floor_ms=floor, goal_ms=goal, note="")
    del captured
    query, from_image, _ = guidance(image, model.guidance_weights(), (side, side), (grid, grid), dtype=dtype)
    unify = model.key_features_encoder[0]
    unified = unify(unit_channels(features))
    calls = {
        "guidance": lambda: guidance(image, model.guidance_weights(), (side, side), (grid, grid), dtype=dtype),
        "feature_unification": lambda: unify(unit_channels(features)),
        "project_keys": lambda: project_keys(from_image, unified, model.key_weights()),
        "project_queries": lambda: project_queries(query, *model.query_projection()),
    }
    for what, call in calls.items():
        yield row(f"stage {what}", call, note="")
