"""The project's kernels through their own launchers, on the machine, against the twins in float64.

A `Case` is one problem for one kernel or tile and one dtype; `measure` runs it for a target and gives a row of figures.

    python -m ptx.project sm_80 [--cases NAME ...] [--small | --every] [--first-wins]      # rows as JSON lines

needs a process without TRITON_INTERPRET, and finds this package by tests/support on PYTHONPATH.
"""

import argparse
import contextlib
import copy
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial

import attention_cases
import torch
import torch.nn.functional as F
import triton
from anyup_fast.kernels import (
    attention,
    attention_backward,
    guidance,
    keys,
    queries,
    tiling,
    unification,
    unification_backward,
)

from anyup_fast.layers import RMS_EPS, RMSNorm
from anyup_fast.model import AnyUp
from anyup_fast.ops import reference
from anyup_fast.plain import keys as plain_keys
from anyup_fast.plain.weights import cast

from .launch import SHARED, launcher
from .report import Fault
from .syntax import Unsupported

MODULES = attention, attention_backward, guidance, unification, unification_backward, queries, keys
TARGETS = "sm_80", "sm_86", "sm_89", "sm_90"
DTYPES = attention_cases.DTYPES
# Largest difference from float64 over the largest number expected: what the tests in the interpreter allow.
GUIDANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2.5e-3}
PROJECTION = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
KEYS = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
UNIT = 3e-7
UNIFICATION = 8e-7
UNIFICATION_GRADIENT = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
# Kinds of faults, by the tool of CUDA that looks for their like.
MEMCHECK = "out of bounds", "outside the tensor", "misaligned", "uninitialised"
EQUAL = ("unequal copies",)
# Attention problems: odd strides, borders full of NaN.
SHAPES = [
    dict(size=(19, 23), grid=(7, 11), channels=37, batch=2, ratio=0.1, head_dim=32),
    dict(size=(19, 23), grid=(7, 11), channels=37, batch=2, ratio=0.3, head_dim=32),
    dict(size=(9, 17), grid=(6, 7), channels=44, batch=1, ratio=0.2, head_dim=32, head_mode="split"),
    dict(size=(16, 16), grid=(8, 8), channels=64, batch=1, ratio=0.1, head_dim=32),
    dict(size=(11, 9), grid=(13, 5), channels=20, batch=2, ratio=0.15, head_dim=12, heads=2),
    dict(size=(6, 7), grid=(5, 9), channels=8, batch=1, ratio=0.3, head_dim=32, scale=1.0),
    dict(size=(5, 30), grid=(3, 40), channels=260, batch=1, ratio=0.12, head_dim=32),
]
NUMBERED = {f"shape{number}": shape for number, shape in enumerate(SHAPES)}


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        kernel: what runs, say "attention window". tile: how. dtype: of what is stored. shape: text of the problem.
        solve: function target -> (error, limit), to be called inside `launcher`.
        fits: function target -> whether the tile can run there.
        precision: of the products, as a GPU's launcher would choose it; None where it asks `tiling.Device`.
        small: whether it is one of the one or two that show a kernel or tile. main: whether the short run has it.
        truncate: whether matrix units cut off.
        images: of a batch of which only the CTAs of the first and the last image are executed; None executes all.
    """

    kernel: str
    tile: str
    dtype: str
    shape: str
    solve: Callable = field(repr=False)
    fits: Callable = field(repr=False, default=lambda target: True)
    precision: str | None = None
    small: bool = False
    main: bool = False
    truncate: bool = False
    images: int | None = None

    @property
    def name(self):
        """One word, for the command line and pytest."""
        words = self.kernel, self.tile, self.dtype, self.shape, *(["truncated"] if self.truncate else [])
        return "-".join("_".join(word.split()) for word in words if word)


def device_of(target):
    """The `tiling.Device` of a target."""
    arch = int(target.removeprefix("sm_"))
    return tiling.Device("cuda", (arch // 10, arch % 10), SHARED[arch])


def problem_of(shape, dtype, seed=3):
    """An attention problem of one of the `SHAPES`; with `aligned` its tensors are dense, so that loads are vectors."""
    shape = dict(shape)
    aligned = shape.pop("aligned", False)
    problem = attention_cases.make(seed, dtype, **shape)
    if aligned:
        problem.query, problem.key, problem.value = (x.contiguous() for x in problem.tensors[:3])
    return problem


def _spans(problem):
    return partial(attention._spans, *(attention._frozen(b) for b in (problem.row_bounds, problem.col_bounds)))


@cache
def _known(given, dtype):
    """Channels of a head and spans of the problem of a shape, given as items: asked of hundreds of tiles."""
    problem = problem_of(dict(given), dtype)
    return problem.value.shape[3] // (problem.query.shape[3] if problem.head_mode == "split" else 1), _spans(problem)


def _attention(tile, dtype, shape):
    """The case's functions `fits` and `solve` for one tile of the forward."""

    def fits(target):
        channels, spans = _known(tuple(shape.items()), dtype)
        return tile in tiling.candidates(dtype, device_of(target)) and tile.fits(channels, spans)

    def solve(target):
        problem = problem_of(shape, dtype)
        out = attention.windowed_attention_fwd(
            *problem.tensors, scale=problem.scale, head_mode=problem.head_mode, tile=tile
        )
        return problem.error(out), attention_cases.TOLERANCE[dtype]

    return dict(fits=fits, solve=solve)


def _small_shapes(tile):
    """The least problems with every kind of turn: full and cut tiles of pixels, blocks of keys and of channels."""
    if tile.design == "window":
        grid = {64: (5, 9), 128: (7, 13), 256: (11, 17)}[tile.block_k]
        shape, channels = dict(size=(9, 17), grid=grid, ratio=0.5, head_dim=32), (tile.block_c + 16, tile.block_c + 8)
    elif tile.design == "halved":
        shape, channels = (
            dict(size=(9, 17), grid=(11, 15), ratio=0.5, head_dim=32),
            (tile.block_c + 16, tile.block_c + 8),
        )
    else:
        shape = dict(size=(9, 9), grid=(3, tile.block_k + 5), ratio=0.4, head_dim=32)
        few = tile.block_c - 16 or 8
        channels = (few, tile.block_c - 3) if tile.design == "heads" else (tile.block_c + 16, tile.block_c + 8)
    return {"aligned": dict(shape, channels=channels[0], aligned=True), "odd": dict(shape, channels=channels[1])}


def _levels(shape, dtype):
    """Whether a case is small, and the one of the short run: dense tensors of 16 bits, float32 with odd strides."""
    main = shape == ("odd" if dtype == torch.float32 else "aligned")
    main |= shape == "many keys" and dtype == torch.bfloat16
    return dict(small=shape in ("aligned", "odd", "many keys"), main=main)


def _forward(dtype):
    precision = "tf32x3" if dtype == torch.float32 else "ieee"
    for tile in tiling.candidates(dtype):
        text = f"{tile.block_h}x{tile.block_w} k{tile.block_k} c{tile.block_c} w{tile.warps} s{tile.stages}"
        for name, shape in {**_small_shapes(tile), **NUMBERED}.items():
            case = dict(kernel=f"attention {tile.design}", tile=text, precision=precision)
            case.update(shape=name, **_levels(name, dtype), **_attention(tile, dtype, shape))
            yield case
            if dtype == torch.float32:
                yield dict(case, truncate=True, small=False, main=False)


def _backward(dtype):
    # Slopes of float16 are multiplied as float32, in steps of tf32 on a GPU.
    precision = "tf32x3" if dtype == torch.float32 else "tf32"
    small = dict(size=(9, 9), grid=(4, 5), ratio=0.2, head_dim=32)
    # 128 keys in one block where a plan has such, and more pixels than one of its tiles.
    many = dict(size=(17, 9), grid=(7, 13), ratio=0.5, head_dim=32, channels=48, aligned=True)
    shapes = {"aligned": dict(small, channels=48, aligned=True), "odd": dict(small, channels=24), "many keys": many}
    shapes.update(NUMBERED)
    for name, shape in shapes.items():
        for window in (True, False):

            def chosen(target, window=window, shape=shape):
                spans = _known(tuple(shape.items()), dtype)[1] if window else None
                return attention_backward.plan(device_of(target), dtype, spans)

            def fits(target, window=window, chosen=chosen):
                return chosen(target).window == window

            def solve(target, shape=shape, chosen=chosen):
                problem = problem_of(shape, dtype)
                grad = problem.grad().contiguous() if shape.get("aligned") else problem.grad()
                gradients = attention_backward.windowed_attention_bwd(
                    grad, *problem.tensors, scale=problem.scale, head_mode=problem.head_mode,
                    tiles=chosen(target),
                )  # fmt: skip
                errors, limits = problem.gradient_errors(gradients), attention_cases.GRADIENT_TOLERANCE[dtype]
                return worst((errors[name], limits[name]) for name in errors)

            case = dict(kernel=f"attention backward {'window' if window else 'blocks'}", tile="as planned")
            case.update(precision=precision, shape=name, **_levels(name, dtype), fits=fits, solve=solve)
            yield case
            if dtype == torch.float32:
                yield dict(case, truncate=True, small=False, main=False)


def worst(pairs):
    """The (error, limit) that comes closest to its limit."""
    return max(pairs, key=lambda pair: pair[0] / pair[1] if math.isfinite(pair[0]) else math.inf)


def relative(out, wanted):
    """Largest difference over the largest |wanted|; infinite where `out` is not finite."""
    if not torch.isfinite(out).all():
        return math.inf
    return ((out.double() - wanted).abs().max() / wanted.abs().max()).item()


def network(dim, channels=3, seed=3):
    """A model in float64 with peaky random weights that float32 holds exactly, and the weights as kernels take them."""
    torch.manual_seed(seed)
    model = AnyUp(qk_dim=dim, input_dim=channels).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter + 0.5 * torch.randn_like(parameter) if parameter.ndim == 1 else 1.5 * parameter)
    return copy.deepcopy(model).double(), model.guidance_weights()


@contextlib.contextmanager
def _one_program():
    """One program works on all tiles of an image in the layers of the guidance that take several."""
    before = guidance.PER_PROCESSOR
    guidance.PER_PROCESSOR = 0
    try:
        yield
    finally:
        guidance.PER_PROCESSOR = before


def _guidance(dtype):
    sizes = {
        "pooled": ((9, 10), (7, 9), (2, 3)),
        "several tiles": ((11, 13), (11, 13), (5, 7)),
        "larger": ((7, 9), (15, 11), (3, 3)),
        "several turns": ((15, 13), (15, 13), (5, 7)),
    }
    for dim in (32, 128):
        for text, (size, output_size, key_size) in sizes.items():
            turns = _one_program if text == "several turns" else contextlib.nullcontext

            def solve(target, dim=dim, size=size, output_size=output_size, key_size=key_size, turns=turns):
                model, weights = network(dim)
                generator = torch.Generator().manual_seed(1)
                image = attention_cases._bordered(torch.randn(2, 3, *size, generator=generator).to(dtype))
                with turns():
                    found = guidance.guidance_fwd(image, weights, output_size, key_size, dtype=dtype)[:2]
                with torch.no_grad():
                    guide = model.guidance(image.double())
                    key = F.adaptive_avg_pool2d(model.key_encoder(guide), key_size)
                    wanted = model.queries(guide, output_size), key
                errors = [relative(x, y.permute(0, 2, 3, 1)) for x, y in zip(found, wanted, strict=True)]
                return max(errors), GUIDANCE[dtype]

            main = text == ("several turns" if dtype == torch.bfloat16 else "pooled")
            main &= dim == (128 if dtype == torch.bfloat16 else 32)
            small = text == "pooled" or (text == "several turns" and dim == 128 and dtype != torch.float32)
            yield dict(kernel="guidance", tile=f"dim {dim}", shape=text, small=small, main=main, solve=solve)


@contextlib.contextmanager
def _few_tiles(most):
    """Statistics of more tiles than these are put together by a kernel of their own."""
    before, keys.FEW_TILES = keys.FEW_TILES, most
    try:
        yield
    finally:
        keys.FEW_TILES = before


def _keys(dtype):
    shapes = {"several tiles": (2, (5, 9)), "one cell": (1, (1, 1)), "many tiles": (1, (7, 10))}
    for dim, filters in ((128, 128), (32, 32), (64, 32)):
        for text, (batch, size) in shapes.items():

            def solve(target, dim=dim, filters=filters, batch=batch, size=size, text=text):
                torch.manual_seed(3)
                model = AnyUp(qk_dim=dim, lfu_dim=filters)
                with torch.no_grad():
                    for parameter in model.parameters():
                        spread = 0.5 * torch.randn_like(parameter)
                        parameter.copy_(parameter + spread if parameter.ndim == 1 else 1.5 * parameter)
                    weights = model.key_weights()
                from_image = torch.randn(batch, *size, dim)
                from_features = (1 + 3e-3 * torch.randn(batch, filters, *size)) / filters
                with _few_tiles(1 if text == "many tiles" else keys.FEW_TILES):
                    out = keys.project_keys_fwd(from_image, from_features, weights, eps=RMS_EPS, dtype=dtype)
                given = from_image.double(), from_features.double(), cast(weights, torch.float64)
                return relative(out, plain_keys.project_keys(*given, eps=RMS_EPS)), KEYS[dtype]

            small = text != "one cell" and dim == 128
            main = small and dtype == (torch.float32 if text == "many tiles" else torch.bfloat16)
            yield dict(kernel="keys", tile=f"dim {dim}/{filters}", shape=text, small=small, main=main, solve=solve)

    def unit(target):
        features = attention_cases._bordered(torch.randn(2, 70, 5, 7, generator=torch.Generator().manual_seed(1)))
        features = features.to(dtype)
        return relative(keys.unit_channels_fwd(features), F.normalize(features.double(), dim=1)), UNIT

    yield dict(kernel="keys", tile="unit channels", shape="odd", small=True, main=dtype == torch.bfloat16, solve=unit)


@contextlib.contextmanager
def _few_programs():
    """Few programs share what the backward of the unification works on, so that partial sums are added."""
    before = unification_backward.PROGRAMS
    unification_backward.PROGRAMS = 5
    try:
        yield
    finally:
        unification_backward.PROGRAMS = before


def _unification(dtype):
    # Channels, filters, their size, batch and grid; the first three are a grouped, a written and a gathered one.
    shapes = ((128, 128, 5, (1, 2, 2)), (24, 16, 3, (1, 3, 2)), (11, 16, 3, (1, 3, 2)),
              (100, 128, 5, (1, 2, 3)), (24, 12, 3, (2, 3, 2)),
              (21, 8, 3, (1, 2, 2)), (384, 128, 5, (1, 2, 2)))  # fmt: skip
    for number, (channels, filters, size, (batch, *grid)) in enumerate(shapes):

        def draw(channels=channels, filters=filters, size=size, batch=batch, grid=grid):
            generator = torch.Generator().manual_seed(channels + filters)
            features = F.normalize(torch.randn(batch, channels, *grid, generator=generator), dim=1).to(dtype)
            basis = 3 * torch.randn(filters, 1, size, size, generator=generator)
            grad = torch.randn(batch, filters, *grid, generator=generator)
            return attention_cases._bordered(features), basis, attention_cases._bordered(grad)

        def solve(target, draw=draw):
            features, basis, _ = draw()
            out = unification.feature_unification_fwd(features, basis)
            return relative(out, reference.feature_unification(features.double(), basis.double())), UNIFICATION

        def gradients(target, draw=draw):
            features, basis, grad = draw()
            with _few_programs():
                found = unification_backward.feature_unification_bwd(grad, features, basis)
            wide = [x.double().requires_grad_() for x in (features, basis)]
            wanted = torch.autograd.grad(reference.feature_unification(*wide), wide, grad.double())
            limits = (UNIFICATION_GRADIENT[x.dtype] for x in (features, basis))
            return worst((relative(x, y), limit) for x, y, limit in zip(found, wanted, limits, strict=True))

        case = dict(tile=f"{channels}/{filters}/{size}", shape=f"{batch}x{'x'.join(map(str, grid))}")
        case.update(small=number < 3, main=number < 3)
        yield dict(case, kernel="unification", solve=solve)
        yield dict(case, kernel="unification backward", solve=gradients)


def _projection(dtype):
    shapes = {"aligned": (128, (1, 5, 17)), "odd": (128, (1, 5, 17)), "several tiles": (128, (2, 9, 17)),
              "dim 32": (32, (1, 17, 18)), "dim 16": (16, (1, 6, 33))}  # fmt: skip
    for name, (dim, (batch, *size)) in shapes.items():

        def solve(target, name=name, dim=dim, batch=batch, size=size):
            generator = torch.Generator().manual_seed(1)
            draw = partial(torch.randn, generator=generator)
            query = draw(batch, *size, dim).to(dtype)
            query = query if name == "aligned" else attention_cases._bordered(query)
            conv, norm = draw(dim, dim, 3, 3) / (3 * dim**0.5), 1 + draw(dim) / 4
            weight, bias = draw(dim, dim) / dim**0.5, draw(dim)
            out = queries.project_queries_fwd(query, conv, norm, weight, bias, eps=RMS_EPS)
            layer = RMSNorm(dim).double()
            layer.weight.data = norm.double()
            wide = F.conv2d(query.double().permute(0, 3, 1, 2), conv.double(), padding=1).permute(0, 2, 3, 1)
            wanted = F.linear(layer(wide), weight.double(), bias.double()).detach()
            return relative(out, wanted), PROJECTION[dtype]

        yield dict(kernel="query projection", tile=f"dim {dim}", shape=name, **_levels(name, dtype), solve=solve)


def cases():
    """Every `Case`: the short run's, of bfloat16 and where it is other code of float32, are marked as main."""
    found = []
    for name, dtype in DTYPES.items():
        for group in (_forward, _backward, _guidance, _keys, _unification, _projection):
            for case in group(dtype):
                short = dtype == torch.bfloat16 or (dtype == torch.float32 and not group == _unification)
                found.append(Case(dtype=name, **{**case, "main": case["main"] and short}))
    return [case for case in found if any(map(case.fits, TARGETS))]


def entries():
    """Names of all kernels of the project that are launched."""
    return {
        name
        for module in MODULES
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, triton.runtime.jit.KernelInterface)
    }


def measure(case, target, *, first_wins=False, edit=None):
    """Run one case.

    Returns:
        a dict: kernel, tile, target, dtype, shape, truncated, error, limit, the number of faults by kind (memcheck,
        racecheck, equal_address), kernels (names launched), launches, digest (of all that was written), seconds,
        faults (texts) and failed (an exception as text, or nothing).
    """

    def constants(name, given):
        return {**given, "PRECISION": case.precision} if case.precision and "PRECISION" in given else given

    def ends(name, n):
        each = n // case.images
        return [*range(each), *range(n - each, n)] if each else range(n)

    started = time.perf_counter()
    error, limit, failed = math.inf, 1.0, ""
    options = dict(constants=constants, device_of=(tiling.Device,), edit=edit)
    options.update(collect=True, truncate=case.truncate, first_wins=first_wins, ctas=ends if case.images else None)
    options.update(count=False)
    with launcher(target, **options) as reports:
        try:
            error, limit = case.solve(target)
        except (Fault, Unsupported) as found:
            failed = f"{type(found).__name__}: {found}"
    faults = [fault for report in reports for fault in report.faults]
    counted = [sum(fault.kind in kinds for fault in faults) for kinds in (MEMCHECK, EQUAL)]
    return dict(
        kernel=case.kernel, tile=case.tile, target=target, dtype=case.dtype, shape=case.shape, truncated=case.truncate,
        error=error, limit=limit, memcheck=counted[0], racecheck=len(faults) - sum(counted), equal_address=counted[1],
        kernels=sorted({report.kernel for report in reports}), launches=len(reports),
        digest=hashlib.sha256("".join(report.digest for report in reports).encode()).hexdigest(),
        seconds=round(time.perf_counter() - started, 3), faults=[str(fault)[:400] for fault in faults], failed=failed,
    )  # fmt: skip


def main(arguments=None):
    """Command line: rows as JSON lines, each with the name of its case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--cases", nargs="+", help="names; else those of the short run of this target")
    parser.add_argument("--small", action="store_true", help="all small ones")
    parser.add_argument("--every", action="store_true", help="all that this target can run")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--kernels", nargs="+", default=[""], help="only problems whose names begin so")
    parser.add_argument("--first-wins", action="store_true", help="of threads that store to one address at once")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for case in cases():
        wanted = (
            case.name in options.cases
            if options.cases
            else options.every or case.main or (options.small and case.small)
        )
        wanted = wanted and case.name.startswith(tuple(options.kernels))
        if wanted and case.dtype in options.dtypes and case.fits(options.target):
            row = measure(case, options.target, first_wins=options.first_wins)
            print(json.dumps({"name": case.name, **row}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
