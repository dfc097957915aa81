"""The whole forward on the CPU: the fused path against the published formula.

    python benchmarks/forward.py                      # 224/16/384, 448/32/384, 518/37/384; the last needs 14 GiB
    python benchmarks/forward.py --rivals eager compiled chunks --shapes 224/16/384
    python benchmarks/forward.py --stages             # where the time goes, and the matrix products alone
    python benchmarks/forward.py --parts              # heads, points and regions against the whole
    python benchmarks/forward.py --training --shapes 224/16/384     # forward and backward
    python benchmarks/forward.py --precision highest medium --against HEAD~1   # both, beside the path of that commit

Rivals are the published formula, built of the twins: in eager mode, under torch.compile, and in eager mode in chunks of
8 query rows. All run in one process in turns, after one unmeasured turn each (in which the compiler works); ratios are
of medians, with the 20th and 80th percentiles beside them. Peak memory comes from one process per contender that runs
it once: the most resident memory during the call less that before it, output included; compiling is not measured so.
The fused result, and with --training every gradient, is compared with the plain layers in float64 before anything is
timed; for a precision below "highest" the error allowed is that of bfloat16 products. GPUs are measured by gpu.py.
"""

import argparse
import functools
import statistics
import subprocess
import sys
import time

from checkout import former, use_checkout

use_checkout()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from attention import SHAPES, percentiles, print_results, resident  # noqa: E402
from roofline import stages  # noqa: E402

import anyup_fast.decoder  # noqa: E402
import anyup_fast.fused  # noqa: E402
import anyup_fast.model  # noqa: E402
from anyup_fast import AnyUp  # noqa: E402
from anyup_fast.ops import reference, window_bounds  # noqa: E402

RIVALS = ("eager", "compiled", "chunks")
CHUNK_ROWS = 8
PRECISIONS = ("highest", "high", "medium")
TOLERANCE = {"highest": 5e-6, "high": 3e-5, "medium": 4e-3}
# Of the worst parameter; its gradient is a sum over all pixels.
GRADIENT_TOLERANCE = {"highest": 1e-3, "high": 1e-3, "medium": 0.2}


_former = None  # the package of another commit


def problem(shape, dtype=torch.float32):
    """(model, image, features) for "image/grid/channels": the shipped weights on smooth noise."""
    side, grid, channels = map(int, shape.split("/"))
    generator = torch.Generator().manual_seed(0)
    image = F.interpolate(torch.randn(1, 3, 16, 16, generator=generator), (side, side), mode="bicubic")
    features = torch.randn(1, channels, grid, grid, generator=generator)
    return AnyUp.from_pretrained("embedded").to(dtype), image.to(dtype), features.to(dtype)


def published(model, image, features, rows=None):
    """The published formula as its users run it: channels first, torch's own GroupNorm, the whole attention at once, or
    that of `rows` query rows at a time. All its convolutions pad by reflection, those of one pixel by nothing, which
    copies their input. Its attention is `nn.MultiheadAttention`, of which the weights, averaged over the heads, are
    used and the output is not."""

    def padded(x):
        return F.pad(x, (0, 0, 0, 0), mode="reflect")

    def block(x, layers):
        norm_in, _, conv_in, norm_out, _, conv_out = layers.block
        y = conv_in(padded(F.silu(F.group_norm(x, 8, norm_in.weight, norm_in.bias))))
        return conv_out(padded(F.silu(F.group_norm(y, 8, norm_out.weight, norm_out.bias)))) + layers.shortcut(x)

    def encode(x, encoder):
        first, *blocks = encoder
        x = first(padded(x))
        for layers in blocks:
            x = block(x, layers)
        return x

    guide = model.rope(encode(image, model.image_encoder))
    query = F.adaptive_avg_pool2d(encode(guide, model.query_encoder), image.shape[-2:])
    unify, *feature_blocks = model.key_features_encoder
    unified = reference.feature_unification(F.normalize(features, dim=1), unify.basis)
    for layers in feature_blocks:
        unified = block(unified, layers)
    key = F.adaptive_avg_pool2d(encode(guide, model.key_encoder), features.shape[-2:])
    key = encode(torch.cat((key, unified), 1), model.aggregation)
    decode, size = model.cross_decode, image.shape[-2:]
    attend = decode.cross_attn
    query = attend.norm_q(decode.conv2d(query).flatten(2).mT)
    key = attend.norm_k(key.flatten(2).mT)
    outside = _outside(*size, *features.shape[-2:], decode.window_ratio)
    step = (rows or size[0]) * size[1]
    bands = []
    for q, mask in zip(query.split(step, 1), outside.split(step), strict=True):
        weights = attend.attention(q, key, key, attn_mask=mask, need_weights=True, average_attn_weights=True)[1]
        bands.append(weights @ features.flatten(2).mT)
    return torch.cat(bands, 1).mT.unflatten(2, size)


@functools.lru_cache(maxsize=8)
def _outside(height, width, h, w, ratio):
    """Boolean (H * W, h * w): keys that a pixel does not see; kept from call to call."""
    rows = reference.inside(window_bounds(height, h, ratio), h)[:, None, :, None]
    cols = reference.inside(window_bounds(width, w, ratio), w)[None, :, None]
    return ~(rows & cols).view(height * width, h * w)


def contender(name, training=False):
    """A callable (model, image, features) -> output; with `training` it goes back from the output's sum of squares.

    `name`: "fused", the same with a precision after a space, "former", or a rival.
    """
    if name.startswith("fused "):
        precision, run = name.split()[1], contender("fused", training)

        def narrower(*arguments):
            torch.set_float32_matmul_precision(precision)
            try:
                return run(*arguments)
            finally:
                torch.set_float32_matmul_precision("highest")

        return narrower
    if name == "former":
        run, models = contender("fused", training), {}

        def beside(model, image, features):
            if model not in models:
                models[model] = _former.AnyUp.from_pretrained("embedded")
            return run(models[model], image, features)

        return beside
    if training:
        forward = contender(name)

        def step(model, image, features):
            model.zero_grad()
            out = forward(model, image, features)
            out.backward(out.detach())

        return step
    if name == "fused":
        return torch.nn.Module.__call__
    if name == "compiled":
        return torch.compile(published)
    return functools.partial(published, rows=CHUNK_ROWS if name == "chunks" else None)


def error(shape, name="fused"):
    """Norm of the difference between the fused result and the plain layers in float64, over the latter's norm."""
    model, image, features = problem(shape)
    out = contender(name)(model, image, features)
    model, image, features = problem(shape, torch.float64)
    guide = model.guidance(image)
    exact = model.cross_decode(model.queries(guide, image.shape[-2:]), model.keys(guide, features), features)
    return ((out - exact).norm() / exact.norm()).item()


def gradient_error(shape, name="fused"):
    """Worst distance of a parameter's gradient from that of the plain layers in float64, over the latter's norm."""
    model, image, features = problem(shape)
    contender(name, training=True)(model, image, features)
    exact, image, features = problem(shape, torch.float64)
    query, key = exact.queries(exact.guidance(image), image.shape[-2:]), exact.keys(exact.guidance(image), features)
    out = exact.cross_decode(query, key, features)
    out.backward(out.detach())
    both = zip(model.parameters(), exact.parameters(), strict=True)
    pairs = [(a.grad, b.grad) for a, b in both if b.grad is not None]
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def peak(shape, name, training=False, against=None):
    """Peak of resident memory, in GiB, that one call in a fresh process adds to what was there before."""
    command = [sys.executable, __file__, "--peak", name, "--shapes", shape, "--threads", str(torch.get_num_threads())]
    command += ["--training"] * training + (["--against", against] if name == "former" else [])
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"measuring the memory of {name} at {shape} failed: {result.stderr[-500:]}")
    return float(result.stdout)


def _print_peak(shape, name, training):
    run = contender(name, training)
    model, image, features = problem(shape)
    run(model, image[..., :32, :32], features[..., :2, :2])
    before = resident(reset=True)
    out = run(model, image, features)
    after = resident()
    del out
    print((after - before) / 2**30)


def compare(shape, rivals, repeats, memory, training=False, precisions=("highest",), against=None):
    """One row: errors, times of the fused path and its rivals in turns, the ratios to it, and the peaks."""
    fused = ["fused" if precision == "highest" else f"fused {precision}" for precision in precisions]
    errors = {}
    for name, precision in zip(fused, precisions, strict=True):
        wrong = errors[name] = (gradient_error if training else error)(shape, name)
        most = (GRADIENT_TOLERANCE if training else TOLERANCE)[precision]
        if not wrong <= most:
            raise SystemExit(f"{shape}: error {wrong:.2e} of {name} exceeds {most:.0e}, nothing was timed")
    arguments = problem(shape)
    names = [*fused, *(["former"] if against else []), *rivals]
    runs = {name: contender(name, training) for name in names}
    times = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run(*arguments)
            if turn:
                times[name].append(time.perf_counter() - start)
    row = dict(shape=shape, error=errors[fused[0]], errors=errors, ratio={})
    for name, measured in times.items():
        low, middle, high = percentiles(measured)
        row[name] = dict(seconds=middle, p20=low, p80=high)
        row["ratio"][name] = middle / row[fused[0]]["seconds"]
        if memory and name != "compiled":
            row[name]["peak_gib"] = peak(shape, name, training, against)
    return row


def by_stage(shape, repeats):
    """Median seconds of each stage of the fused path, and of its matrix products alone on this CPU.

    The latter is the number of operations over the rate at which a product of 4096 rows with a 128 x 128 matrix runs
    in the cache.
    """
    names = ("guidance", "unit_channels", "project_keys", "project_queries", "windowed_attention")
    arguments, measured = problem(shape), {name: [] for name in (*names, "whole")}

    def timed(name, run):
        def call(*args, **kwargs):
            start = time.perf_counter()
            result = run(*args, **kwargs)
            measured[name].append(time.perf_counter() - start)
            return result

        return call

    homes = dict.fromkeys(names, anyup_fast.fused)
    homes.update(unit_channels=anyup_fast.model, windowed_attention=anyup_fast.decoder)
    plain = {name: getattr(home, name) for name, home in homes.items()}
    model = arguments[0]
    unify = model.key_features_encoder[0]
    measured["feature_unification"] = []
    unify.forward = timed("feature_unification", unify.forward)
    try:
        for name, run in plain.items():
            setattr(homes[name], name, timed(name, run))
        for _ in range(repeats + 1):
            timed("whole", model)(*arguments[1:])
    finally:
        for name, run in plain.items():
            setattr(homes[name], name, run)
    row = {name: statistics.median(times[1:]) for name, times in measured.items()}
    operations = sum(stage.flops for stage in stages(shape, "float32"))
    return dict(shape=shape, seconds=row, gflop=operations / 1e9, products_alone=operations / _rate())


def parts(shape, repeats, classes=21, points=500, box=64):
    """Median seconds of what `AnyUp.prepare` answers: the first answer, and a further one of the same image.

    In turns with the whole forward; "attention" is the last stage of the whole and of the head.
    """
    model, image, features = problem(shape)
    generator = torch.Generator().manual_seed(1)
    head = torch.randn(classes, features.shape[1], generator=generator)
    where = torch.randint(image.shape[-1], (points, 2), generator=generator)
    side = min(box, image.shape[-1])
    asked = {
        f"head of {classes}": lambda prepared: prepared.head(head).full(),
        f"labels of {classes}": lambda prepared: prepared.head(head, argmax=True).full(),
        f"{points} points": lambda prepared: prepared.at(where),
        f"region {side}x{side}": lambda prepared: prepared.region(0, 0, side, side),
    }
    query, key, _ = model.guided(image, features, image.shape[-2:])
    query = model.projected_queries(query)
    few = F.conv2d(features, head[..., None, None])
    measured = {name: [] for name in ("whole", "attention", "attention, head")}
    measured |= {f"{name}, {which}": [] for name in asked for which in ("first", "further")}

    def timed(name, call, *arguments):
        start = time.perf_counter()
        call(*arguments)
        measured[name].append(time.perf_counter() - start)

    for _ in range(repeats + 1):
        timed("whole", model, image, features)
        timed("attention", model.cross_decode.attend, query, key, features)
        timed("attention, head", model.cross_decode.attend, query, key, few)
        for name, call in asked.items():
            prepared = model.prepare(image, features)
            timed(f"{name}, first", call, prepared)
            timed(f"{name}, further", call, prepared)
    seconds = {name: statistics.median(times[1:]) for name, times in measured.items()}
    return dict(shape=shape, parts=seconds, share={name: s / seconds["whole"] for name, s in seconds.items()})


def _rate(rows=4096, width=128, calls=30):
    """Operations per second of one product in the cache."""
    left, right, out = torch.randn(rows, width), torch.randn(width, width), torch.empty(rows, width)
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        times.append(time.perf_counter() - start)
    return 2 * rows * width * width / statistics.median(times)


def main(arguments=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="IMAGE/GRID/CHANNELS")
    parser.add_argument("--rivals", nargs="*", default=["eager"], choices=RIVALS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--stages", action="store_true", help="only the time per stage of the fused path")
    parser.add_argument("--parts", action="store_true", help="only heads, points and regions against the whole")
    parser.add_argument("--training", action="store_true", help="forward and backward")
    parser.add_argument("--precision", nargs="+", default=["highest"], choices=PRECISIONS, help="of the fused path")
    parser.add_argument(
        "--against", metavar="COMMIT", help="also the fused path of this commit, in turns with the rest"
    )
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--json", action="store_true", help="one JSON object, nothing else")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats: need at least 1, got {options.repeats}")
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(options.training)
    if options.against:
        global _former
        _former = former(options.against)
    if options.peak:
        _print_peak(options.shapes[0], options.peak, options.training)
        return 0

    def job(shape):
        if options.stages:
            return by_stage(shape, options.repeats)
        if options.parts:
            return parts(shape, options.repeats)
        settings = options.training, options.precision, options.against
        return compare(shape, options.rivals, options.repeats, not options.no_memory, *settings)

    print_results([functools.partial(job, shape) for shape in options.shapes], _line, options.threads, options.json)
    return 0


def _line(row):
    if "parts" in row:
        every = [f"{name} {seconds:.3f} s ({row['share'][name]:.2f})" for name, seconds in row["parts"].items()]
        return f"{row['shape']}: {', '.join(every)}"
    if "seconds" in row:
        parts = [f"{name} {seconds:.3f} s" for name, seconds in row["seconds"].items()]
        return f"{row['shape']}: {', '.join(parts)}; {row['gflop']:.0f} GFLOP alone {row['products_alone']:.3f} s"
    parts = [f"{row['shape']}: error {', '.join(f'{name} {wrong:.1e}' for name, wrong in row['errors'].items())}"]
    for name, ratio in row["ratio"].items():
        part = row[name]
        memory = f", {part['peak_gib']:.2f} GiB" if "peak_gib" in part else ""
        parts.append(f"{name} {part['seconds']:.3f} s ({part['p20']:.3f} to {part['p80']:.3f}), {ratio:.1f}x{memory}")
    return "; ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
