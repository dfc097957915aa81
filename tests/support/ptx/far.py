"""Launches whose tensors reach beyond 2**31 elements: products of 32 bits overflow there, on the machine as on a GPU.

Such tensors are far from full: inputs of a few numbers with strides that lead beyond 2**31, and batches of one image
repeated without a copy, of which the first and the last are computed. Memory nobody touches is never really there.

    python -m ptx.far sm_80 [--cases NAME ...]      # rows as JSON lines, of all cases
"""

import argparse
import json
import math
import sys
from functools import partial

import attention_cases
import torch
import torch.nn.functional as F

from .project import (
    GUIDANCE,
    RMS_EPS,
    TARGETS,
    UNIFICATION,
    Case,
    attention,
    attention_backward,
    device_of,
    guidance,
    measure,
    network,
    queries,
    reference,
    relative,
    tiling,
    unification,
    worst,
)

FAR = 2**31
AXES = {"batch": 0, "rows": 1, "columns": 2, "heads": 3}
DTYPE = torch.bfloat16
SHAPE = dict(size=(9, 9), grid=(4, 5), channels=24, batch=3, ratio=0.2, head_dim=32)
SMALL = dict(SHAPE, batch=1, grid=(1, 3), channels=56)


def strided(x, axis):
    """A copy of `x` whose last elements along an axis lie FAR elements or more from the first; the rest is dense."""
    n = x.shape[axis]
    stride = -(-FAR // (n - 1) // 16) * 16
    strides = list(torch.empty([1 if a == axis else m for a, m in enumerate(x.shape)], device="meta").stride())
    strides[axis] = stride
    storage = torch.empty(stride * (n - 1) + x.numel(), dtype=x.dtype)
    return storage.as_strided(x.shape, strides).copy_(x)


def repeated(x, numbers):
    """One image as a batch so large that what holds so many `numbers` for an image has more than FAR."""
    return x.expand(FAR // numbers + 1, *x.shape[1:])


def ends(x):
    """The first and the last image of a batch."""
    return torch.stack((x[0], x[-1]))


def _tiles():
    tiles = [tile for tile, known in tiling.HALF_TILES.items() if {"sm_80", "sm_90"} <= set(known)]
    return {
        "window": tiles[0],
        "heads": next(t for t in tiles if t.design == "heads" and t.block_c == 64),
        "two_pass": next(t for t in tiles if t.design == "two_pass"),
    }


def _plan(target, problem, window):
    spans = partial(attention._spans, *(attention._frozen(b) for b in (problem.row_bounds, problem.col_bounds)))
    plan = attention_backward.plan(device_of(target), DTYPE, spans if window else None)
    assert plan.window == window
    return plan


def _gradient_error(problem, grad, found):
    errors, limits = problem.gradient_errors(found, grad), attention_cases.GRADIENT_TOLERANCE[DTYPE]
    return worst((errors[name], limits[name]) for name in errors)


def _far_strides():
    """Attention, forward and backward, on inputs with far strides."""
    for name, axis in AXES.items():

        def problem(axis=axis):
            found = attention_cases.make(3, DTYPE, **SHAPE)
            found.query, found.key = strided(found.query, axis), strided(found.key, axis)
            if axis < 3:
                found.value = strided(found.value, axis)
            return found

        for design, tile in _tiles().items():

            def forward(target, problem=problem, tile=tile):
                case = problem()
                out = attention.windowed_attention_fwd(*case.tensors, tile=tile)
                return case.error(out), attention_cases.TOLERANCE[DTYPE]

            yield Case(f"attention {design}", "", "bfloat16", f"far {name}", forward)
        for window in (True, False):

            def backward(target, problem=problem, axis=axis, window=window):
                case = problem()
                grad = strided(case.grad(), axis) if axis < 3 else case.grad()
                tiles = _plan(target, case, window)
                found = attention_backward.windowed_attention_bwd(grad, *case.tensors, tiles=tiles)
                return _gradient_error(case, grad, found)

            kind = "window" if window else "blocks"
            yield Case(f"attention backward {kind}", "", "bfloat16", f"far {name}", backward, precision="tf32")


def _far_batches():
    """Every kernel with an output of more than FAR elements; of the batch only the ends are executed."""
    pixels = math.prod(SMALL["size"])

    def attend(target, tile):
        case = attention_cases.make(3, DTYPE, **SMALL)
        given = [repeated(x, pixels * SMALL["channels"]) for x in case.tensors[:3]]
        out = attention.windowed_attention_fwd(*given, *case.tensors[3:], tile=tile)
        assert out.numel() > FAR
        return max(case.error(x[None]) for x in ends(out)), attention_cases.TOLERANCE[DTYPE]

    def attend_backward(target, window):
        case = attention_cases.make(3, DTYPE, **SMALL)
        grad = case.grad()
        given = [repeated(x, case.query.numel()) for x in (grad, *case.tensors[:3])]
        found = attention_backward.windowed_attention_bwd(*given, *case.tensors[3:], tiles=_plan(target, case, window))
        assert found[0].numel() > FAR
        return worst(_gradient_error(case, grad, [x[n : n + 1] for x in found]) for n in (0, len(found[0]) - 1))

    def guide(target):
        model, weights = network(32)
        image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(DTYPE)
        # Pooled keys of 32 cells: a program of the last product has one image.
        query, key, _ = guidance.guidance_fwd(repeated(image, 32**3), weights, (32, 32), (4, 8), dtype=DTYPE)
        assert query.numel() > FAR
        with torch.no_grad():
            wide = model.guidance(image.double())
            wanted = model.queries(wide, (32, 32)), F.adaptive_avg_pool2d(model.key_encoder(wide), (4, 8))
        pairs = ((ends(x), y.permute(0, 2, 3, 1)) for x, y in zip((query, key), wanted, strict=True))
        return max(relative(x, y) for x, y in pairs), GUIDANCE[DTYPE]

    def project(target):
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(1))
        query, conv, norm = draw(1, 9, 9, 32).to(DTYPE), draw(32, 32, 3, 3) / 100, 1 + draw(32) / 4
        weight, bias = draw(32, 32) / 6, draw(32)
        out = queries.project_queries_fwd(repeated(query, query.numel()), conv, norm, weight, bias, eps=RMS_EPS)
        assert out.numel() > FAR
        near = queries.project_queries_fwd(query, conv, norm, weight, bias, eps=RMS_EPS)
        return relative(ends(out), near.double()), 0.0

    def unify(target):
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(1))
        features, basis = draw(1, 1, 1, 1).to(DTYPE), 3 * draw(256, 1, 3, 3)
        out = unification.feature_unification_fwd(repeated(features, 256), basis)
        assert out.numel() > FAR
        wanted = reference.feature_unification(features.double(), basis.double())
        return relative(ends(out), wanted), UNIFICATION

    def unify_grouped(target):
        """Without the launcher, which would fill its copy of the features."""
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(1))
        features, basis = F.normalize(draw(1, 16, 2, 3), dim=1), 3 * draw(16, 1, 3, 3)
        design, constants = unification.plan(device_of(target), 16, 16, 3)
        assert design == "grouped"
        images = FAR // features.numel() + 1
        packed, out = torch.empty(images, 2, 3, 1, 16), torch.empty(images, 16, 2, 3)
        packed[0] = packed[-1] = features[0].permute(1, 2, 0)[:, :, None]
        arguments = packed, basis.flatten(1), out, 2, 3, 1, attention.LOG2E
        unification._grouped_kernel[(images * 6,)](*arguments, **constants)
        wanted = reference.feature_unification(features.double(), basis.double())
        return relative(ends(out), wanted), UNIFICATION

    def case(kernel, solve, numbers, **more):
        return Case(kernel, "", "bfloat16", "far output", solve, images=FAR // numbers + 1, **more)

    for design, tile in _tiles().items():
        yield case(f"attention {design}", partial(attend, tile=tile), pixels * SMALL["channels"])
    for window in (True, False):
        kind = "window" if window else "blocks"
        solve = partial(attend_backward, window=window)
        yield case(f"attention backward {kind}", solve, pixels * 4 * SMALL["head_dim"], precision="tf32")
    yield case("guidance", guide, 32**3)
    yield case("query projection", project, 81 * 32)
    yield case("unification gathered", unify, 256)
    yield case("unification grouped", unify_grouped, 96)


def cases():
    """All of them."""
    return [*_far_strides(), *_far_batches()]


def main(arguments=None):
    """Command line: rows as JSON lines, each with the name of its case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--cases", nargs="+", help="names; else all")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for case in cases():
        if not options.cases or case.name in options.cases:
            print(json.dumps({"name": case.name, **measure(case, options.target)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
