"""Windowed attention on a GPU, for gpu.py: what is checked, what is timed, rivals, and tiles to choose from."""

import itertools
import json
import math
from dataclasses import asdict

import attention_cases
import torch
from anyup_fast.kernels import attention as kernel
from anyup_fast.kernels import tiling
from attention import check
from gpu_steps import Lazy, Step
from roofline import DEVICES, SIZES, parse

from anyup_fast.files import written_aside
from anyup_fast.ops import reference, window_bounds, windowed_attention

# Image, cells and channels; the goal for bfloat16 on an H100 in milliseconds.
SHAPES = {"448/32/384": 0.09, "518/37/768": 0.21, "1024/64/768": 1.0, "2048/128/1024": 20.0, "2048/512/1": 100.0}
H100 = DEVICES["h100"]["bytes_per_s"], DEVICES["h100"]["flops"][2], DEVICES["h100"]["exps"]
OPERATOR = "windowed_attention"
RIVALS_LIMIT = 5e-2  # they round weights to 16 bits, head by head


def power_of_two(n):
    """The least power of two that is at least 16 and `n`."""
    return 2 ** max(4, math.ceil(math.log2(n)))


def problem(shape, dtype, card):
    """Arguments of `windowed_attention` for "image/grid/channels" on a card: 4 heads of 32, ratio 0.1."""
    image, grid, channels = parse(shape)
    bounds = window_bounds(image, grid, 0.1)
    shapes = (1, image, image, 4, 32), (1, grid, grid, 4, 32), (1, grid, grid, channels)
    return (*(card.draw(s, dtype, seed) for seed, s in enumerate(shapes)), bounds, bounds)


def floor_ms(shape, out_bytes=2, in_bytes=2, rates=H100):
    """Milliseconds that "image/grid/channels" takes at least: output bytes, products, exponentials at these rates."""
    image, grid, channels = parse(shape)
    keys = window_bounds(image, grid, 0.1).diff(dim=1).double().mean().item() ** 2
    pixels = image * image
    moved = pixels * (128 * in_bytes + channels * out_bytes) + grid * grid * (128 + channels) * in_bytes
    passes = 1 if channels < 64 or keys <= 256 else 2
    copied, products, exps = rates
    return 1e3 * max(
        moved / copied,
        pixels * keys * 2 * (128 * passes + channels) / products,
        pixels * keys * 4 * passes / exps,
    )


def steps(shape, dtype, card, rates=None):
    """The kernel checked on sampled pixels and timed, and the time of its launcher.

    Args:
        shape: "image/grid/channels". dtype: name of it. card: `gpu_steps.Card`.
        rates: bytes, operations and exponentials per second for the floor, or None where they were not measured.
    """
    arguments = Lazy(lambda: problem(shape, attention_cases.DTYPES[dtype], card))
    named = dict(part="attention", shape=shape, dtype=dtype, operators=(OPERATOR,))
    floor = rates and floor_ms(shape, SIZES[dtype], SIZES[dtype], rates)

    def call():
        return kernel.windowed_attention_fwd(*arguments())

    figures = dict(floor_ms=floor, goal_ms=SHAPES.get(shape) if dtype == "bfloat16" else None)
    yield Step(
        **named,
        what="kernel",
        launch=call,
        judge=lambda out: judged(arguments(), out),
        clock="graph",
        figures=figures,
        derive=lambda ms: dict(rate=1e3 * _moved(shape, dtype) / ms, share=floor and floor / ms),
    )
    yield Step(**named, what="launcher", launch=call, clock="host", repeats=True, needs=("kernel",))


def _moved(shape, dtype):
    image, grid, channels = parse(shape)
    return (image * image + grid * grid) * (128 + channels) * SIZES[dtype]


def judged(arguments, out):
    """Error and limit of an output on sampled rows and columns."""
    return dict(error=check(arguments, out, rows=2, columns=16), limit=attention_cases.TOLERANCE[out.dtype])


def tuning_steps(shape, dtype, card):
    """Candidate tiles, each checked and timed."""
    kind = attention_cases.DTYPES[dtype]
    arguments = Lazy(lambda: problem(shape, kind, card))
    image, grid, channels = parse(shape)
    bounds = window_bounds(image, grid, 0.1)
    device = tiling.Device.of(card.device)
    for tile in tuning_tiles(kind, channels, (bounds, bounds)):
        if tiling.shared_memory(tile, device, kind) <= device.shared_memory:
            text = json.dumps(asdict(tile))
            yield Step(
                "tiles",
                shape,
                dtype,
                text,
                launch=lambda tile=tile: kernel.windowed_attention_fwd(*arguments(), tile=tile),
                judge=lambda out: judged(arguments(), out),
                clock="graph",
                figures=dict(tile=text),
                rival=True,  # a tile that can't run is not taken, that is all
            )


def problems(count, card, longest=50):
    """Steps of the sweep: `count` drawn problems by several tiles, each tile in each dtype, and a captured graph."""
    for index in range(count):
        case = attention_cases.draw(index, longest=longest)
        channels = case.value.shape[3]
        tiles = [None, tiling.Tile("two_pass", 8, 8, 16, 32, 4, stats_block_k=16)]
        if channels < 64:
            tiles.append(tiling.Tile("heads", 8, 8, 16, power_of_two(channels + 1), 4))
        for tile in tiles:
            yield _swept(case, tile, card)
    for dtype in attention_cases.DTYPES.values():
        for tile in tiling.candidates(dtype, tiling.Device.of(card.device)):
            channels = 12 if tile.design == "heads" else 4 * (tile.block_c // 4 + 3)
            case = attention_cases.make(1, dtype, (longest - 3, longest), (7, 8), channels, head_dim=32)
            yield _swept(case, tile, card)
    if card.device.type == "cuda":
        yield Step("sweep attention", "96/12/40", "bfloat16", "captured graph", lambda: _replayed(card), _same)


def _swept(case, tile, card):
    """Twice, with NaN around the inputs, against the twin in float64."""
    there = Lazy(lambda: case.to(card.device))

    def launch():
        options = dict(scale=case.scale, head_mode=case.head_mode, tile=tile)
        return [kernel.windowed_attention_fwd(*there().tensors, **options) for _ in range(2)]

    def judge(outs):
        fault = None if torch.equal(*outs) else "two runs differ"
        return dict(error=case.error(outs[0]), limit=attention_cases.TOLERANCE[case.value.dtype], fault=fault)

    dtype = str(case.value.dtype).removeprefix("torch.")
    return Step("sweep attention", case.text, dtype, "default tile" if tile is None else str(tile), launch, judge)


def _replayed(card):
    arguments = problem("96/12/40", torch.bfloat16, card)
    expected = kernel.windowed_attention_fwd(*arguments)
    card.wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel.windowed_attention_fwd(*arguments)
    graph.replay()
    return out, expected


def _same(pair):
    out, expected = pair
    return dict(error=(out.double() - expected.double()).abs().max().item(), limit=0.0)


def _mask(arguments):
    query, key, _, rows, cols = arguments
    seen = reference.inside(rows, key.shape[1])[:, None, :, None] & reference.inside(cols, key.shape[2])[:, None]
    return seen.reshape(query.shape[1] * query.shape[2], -1).to(query.device)


def sdpa(arguments):
    """The same result by scaled_dot_product_attention per head with a boolean mask, then the mean over the heads."""
    query, key, value, *_ = arguments
    mask = _mask(arguments)
    q, k = (x.flatten(1, 2).transpose(1, 2) for x in (query, key))
    v = value.flatten(1, 2)[:, None].expand(-1, q.shape[1], -1, -1)

    def call():
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.mean(1).unflatten(1, query.shape[1:3])

    return call


def flex(arguments):
    """The same by FlexAttention, compiled, with the window as its block mask, then the mean over the heads."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, key, value, rows, cols = arguments
    width, w = query.shape[2], key.shape[2]
    rows, cols = rows.to(query.device), cols.to(query.device)

    def seen(batch, head, pixel, token):
        i, j, r, c = pixel // width, pixel % width, token // w, token % w
        return (r >= rows[i, 0]) & (r < rows[i, 1]) & (c >= cols[j, 0]) & (c < cols[j, 1])

    q, k = (x.flatten(1, 2).transpose(1, 2) for x in (query, key))
    v = value.flatten(1, 2)[:, None].expand(-1, q.shape[1], -1, -1)
    block_mask = torch.compile(create_block_mask)(seen, None, None, q.shape[2], k.shape[2], device=query.device.type)
    run = torch.compile(flex_attention)

    def call():
        return run(q, k, v, block_mask=block_mask).mean(1).unflatten(1, query.shape[1:3])

    return call


def rival_steps(shape, card):
    """What else computes the same in bfloat16, as far as memory allows."""
    image, grid, channels = parse(shape)
    arguments = Lazy(lambda: problem(shape, torch.bfloat16, card))
    pairs, pixels = image * image * grid * grid / 2**30, image * image / 2**30
    wide = pixels * max(channels, 32)
    made = {
        # The first two wait for the device, which no graph can hold.
        "torch": (lambda: lambda: windowed_attention(*arguments(), backend="torch"), 1, "events"),
        "reference": (lambda: lambda: windowed_attention(*arguments(), backend="reference"), 60 * pairs, "events"),
        "sdpa": (lambda: sdpa(arguments()), 3 * pairs + 16 * wide, "graph"),
        "flex": (lambda: flex(arguments()), 24 * wide, "graph"),
    }
    for name, (factory, gib, clock) in made.items():
        call = Lazy(factory)
        yield Step(
            "rivals",
            shape,
            "bfloat16",
            name,
            launch=lambda call=call: call()(),
            judge=lambda out: dict(judged(arguments(), out), limit=RIVALS_LIMIT),
            clock=clock,
            rival=True,
            gib=gib,
        )


def tuning_tiles(dtype, channels, bounds):
    """The tiles that --tune tries for one problem."""
    windows = [kernel._frozen(b) for b in bounds]
    tiles = []
    for (block_h, block_w), warps, stages in itertools.product(((8, 8), (8, 16), (16, 16)), (4, 8), (2, 3)):
        rows, cols = kernel._spans(*windows, block_h, block_w)
        keys, width = power_of_two(rows * cols), power_of_two(cols)
        shape = block_h, block_w
        if block_h * block_w * keys <= 4096 * warps and keys <= 256:
            tiles += [tiling.Tile("window", *shape, keys, c, warps, stages) for c in (32, 64, 128)]
        if keys > 128 and channels < 64:
            block_c = power_of_two(channels + 1)
            tiles += [tiling.Tile("heads", *shape, k, block_c, warps, stages) for k in (32, 64, 128) if k <= width]
        elif keys > 128 and block_h * block_w < 256:
            tiles += [
                tiling.Tile("two_pass", *shape, k, c, warps, stages, stats_block_k=min(width, 64))
                for k, c in ((16, 32), (16, 64), (32, 64), (16, 256), (32, 128), (32, 256), (32, 512))
                if (c <= 64) == (dtype == torch.float32)
            ]
    return [tile for tile in tiles if dtype != torch.float32 or tile.block_c <= 64]


def save_tuned(rows, card):
    """Write the fastest tile of each problem for a `tiling.Device`, from rows of a journal; path of the file."""
    best = {(e["dtype"], e["keys"], e["channels"]): e for e in tiling.load_tuned(card.name)}
    measured = [row for row in rows if row["part"] == "tiles" and row["verdict"] == "ok"]
    for row in sorted(measured, key=lambda row: -float(row["milliseconds"])):
        image, grid, channels = map(int, row["shape"].split("/"))
        keys = int(window_bounds(image, grid, 0.1).diff(dim=1).max()) ** 2
        best[row["dtype"], keys, channels] = dict(
            dtype=row["dtype"],
            keys=keys,
            channels=channels,
            milliseconds=float(row["milliseconds"]),
            tile=tiling.Tile(**json.loads(row["tile"])),
        )
    path = tiling.tuned_path(card.name)
    with written_aside(path) as aside:
        aside.write_text(tiling.dump_tuned(card, list(best.values())), encoding="utf-8")
    tiling.forget_tuned()
    return path
