"""Every operator on this machine against float64: what `anyup-fast check` runs.

An operator is computed on a device at a few shapes and in every dtype that it serves, its gradients as well, and held
to its twin in float64 on the CPU (`anyup_fast.plain.reference` and the plain layers). What can't be judged is told as
"not run", never as right.
"""

import copy
import platform
import time
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from . import __version__, ops
from .checks import checked_device
from .layers import projected_plainly, rms_norm
from .model import AnyUp
from .ops import choice, reference
from .ops.choice import first_line

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Largest difference over the largest |expected|. Tensor cores round sums of float32 towards zero and take their
# operands in pieces, which costs up to ten times what a kernel loses in exact arithmetic (2e-6).
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
GRADIENT_FACTOR = 3  # the same for gradients, in which more is added up
GRADIENT = " gradient"
SEED = 3


@dataclass
class Row:
    """One comparison.

    Attributes:
        operator, shape, dtype: what was computed; the operator's name ends in " gradient" for gradients.
        backend: the one that is asked for.
        error, limit: largest difference from float64 over the largest |expected|; None where it was not run.
        milliseconds: of a second call; None where there was none.
        verdict: "ok", "WRONG", "failed" or "not run".
        reason: of the latter two.
    """

    operator: str
    shape: str
    dtype: str
    backend: str
    error: float | None = None
    limit: float | None = None
    milliseconds: float | None = None
    verdict: str = "not run"
    reason: str = ""


@dataclass
class Examination:
    """What `examine` has found.

    Attributes:
        rows: list of `Row`. machine: sentences about what it ran on.
    """

    rows: list = field(default_factory=list)
    machine: list = field(default_factory=list)

    @property
    def faults(self):
        """Rows that are wrong or failed."""
        return [row for row in self.rows if row.verdict in ("WRONG", "failed")]

    def table(self):
        """The rows as lines of text: of each operator, dtype and back end the worst; what was not run by its reason."""
        lines = [f"{'operator':32} {'dtype':9} {'back end':10} {'error':>8} {'limit':>8} {'ms':>8}  verdict"]
        idle = {}
        for row in _worst(self.rows):
            if row.verdict == "not run":
                idle.setdefault((row.backend, row.reason), []).append(row.operator)
                continue
            numbers = [_number(row.error, ".1e"), _number(row.limit, ".0e"), _number(row.milliseconds, ".2f")]
            told = f"{row.verdict}{f': {row.reason}' if row.reason else ''}"
            lines.append(
                f"{row.operator:32} {row.dtype:9} {row.backend:10} {' '.join(f'{n:>8}' for n in numbers)}  {told}"
            )
        for (backend, reason), operators in idle.items():
            lines += [f"not run on {backend}, for it {reason}:", f"  {', '.join(dict.fromkeys(operators))}"]
        return lines


def examine(device="cpu", *, progress=None):
    """Compare every operator on a device with float64.

    Args:
        device: a torch.device or its name. One that can't be used here gives rows "not run" with the reason.
        progress: called with each `Row` as it is there.

    Returns:
        Examination.
    """
    found = Examination(machine=_machine())
    told = progress or (lambda row: None)
    device, reason = _usable(device)
    found.machine.append(f"device: {_described(device) if reason is None else reason}")
    if reason is None:
        why = choice.why_no_triton(None, device)
        found.machine.append("taken by itself: " + ("Triton" if why is None else f"plain PyTorch, for Triton {why}"))
    for backend in ("triton", "torch"):
        for operator, shape, problem in _problems():
            for dtype in DTYPES:
                for row in _rows(operator, shape, problem, dtype, device, backend, reason):
                    found.rows.append(row)
                    told(row)
    return found


def calls(device, backend="triton"):
    """What `examine` computes on a back end, without judging it: to compile kernels for a device that isn't there.

    Args:
        device: a torch.device or its name. backend: "triton" or "torch".

    Yields:
        (row, call): a `Row` that is "not run", and a function without arguments that computes it once.

    Raises:
        ValueError: a device that can't be used here.
    """
    device = checked_device(device)
    for operator, shape, problem in _problems():
        for dtype in DTYPES:
            given = [tensor.to(device, dtype) for tensor in problem.tensors]
            row = Row(operator, shape, str(dtype).removeprefix("torch."), backend)
            yield row, partial(_called, _values, problem, dtype, given, backend)
            if problem.leaves and (backend != "triton" or problem.triton_gradient):
                row = replace(row, operator=operator + GRADIENT)
                yield row, partial(_called, _gradients, problem, dtype, given, backend)


def _called(call, problem, dtype, tensors, backend):
    with choice.use_backend(backend):
        return call(problem.run, dtype, tensors, problem.leaves)


def _usable(device):
    try:
        return checked_device(device), None
    except ValueError as error:
        return torch.device(str(device).split(":")[0]), str(error)


def _machine():
    triton = "not installed"
    if find_spec("triton") is not None:
        import triton as installed

        triton = installed.__version__
    return [
        f"anyup-fast {__version__}, torch {torch.__version__}, triton {triton}, Python {platform.python_version()}",
        f"{platform.system()} {platform.machine()}, back end asked for: {choice.requested()}",
    ]


def _described(device):
    if device.type != "cuda":
        return str(device)
    major, minor = torch.cuda.get_device_capability(device)
    version = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return f"{device}, {torch.cuda.get_device_name(device)}, capability {major}.{minor}, {version}"


def _rows(operator, shape, problem, dtype, device, backend, unusable):
    """A row for the operator in one dtype on one back end, and one for its gradients where it has some."""
    row = Row(operator, shape, str(dtype).removeprefix("torch."), backend)
    rows = [row, replace(row, operator=operator + GRADIENT)] if problem.leaves else [row]
    reason = unusable or (_why_no_kernel(operator, device) if backend == "triton" else None)
    if reason:
        for row in rows:
            row.reason = reason
        return rows
    for row in rows:
        gradient = row.operator.endswith(GRADIENT)
        if gradient and backend == "triton" and not problem.triton_gradient:
            row.reason = "its gradients are those of plain PyTorch on every device"
            continue
        try:
            _compare(row, problem, dtype, device, gradient)
        except Exception as error:  # whatever a compiler or a device raises is what this is made to tell
            row.verdict, row.reason = "failed", f"{type(error).__name__}: {first_line(error)}"
    return rows


def _why_no_kernel(operator, device):
    named = None if operator == "AnyUp" else operator
    return choice.why_no_triton(named, device) or choice.why_not_executed(device)


def _compare(row, problem, dtype, device, gradient):
    given = [tensor.to(dtype) for tensor in problem.tensors]
    wide, here = [tensor.double() for tensor in given], [tensor.to(device) for tensor in given]
    call = _gradients if gradient else _values
    expected = call(problem.twin, dtype, wide, problem.leaves)
    with choice.use_backend(row.backend):
        for _ in range(2):  # the first call compiles
            start = time.perf_counter()
            found = call(problem.run, dtype, here, problem.leaves)
            if device.type in ("cuda", "xpu", "mps"):
                getattr(torch, device.type).synchronize()
    row.milliseconds = 1e3 * (time.perf_counter() - start)
    limit = GRADIENT_FACTOR * LIMITS[dtype] if gradient else problem.limit or LIMITS[dtype]
    row.error, row.limit = _error(found, expected), limit
    row.verdict = "ok" if row.error <= row.limit else "WRONG"


def _values(run, dtype, tensors, leaves):
    with torch.no_grad():
        out = run(dtype, *tensors)
    return out if isinstance(out, tuple) else (out,)


def _gradients(run, dtype, tensors, leaves):
    tensors = [tensor.clone().requires_grad_(i in leaves) for i, tensor in enumerate(tensors)]
    out = run(dtype, *tensors)
    generator = torch.Generator().manual_seed(SEED)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype).to(out)
    return torch.autograd.grad(out, [tensors[i] for i in leaves], grad)


def _error(found, expected):
    """Largest difference over the largest |expected| among pairs of tensors; infinite where one is not finite."""
    errors = []
    for one, wanted in zip(found, expected, strict=True):
        difference = (one.double().cpu() - wanted).abs().max() / wanted.abs().max()
        errors.append(difference.item() if torch.isfinite(one).all() else float("inf"))
    return max(errors)


def _worst(rows):
    """Of each operator, dtype and back end the row that is furthest from being right."""
    worst = {}
    for row in rows:
        key = row.operator, row.dtype, row.backend
        if key not in worst or _badness(row) > _badness(worst[key]):
            worst[key] = row
    return worst.values()


def _badness(row):
    order = ("not run", "ok", "WRONG", "failed")
    return order.index(row.verdict), (row.error or 0) / (row.limit or 1)


def _number(value, spec):
    return "" if value is None else format(value, spec)


@dataclass
class _Problem:
    """Tensors of one call, what computes it, and its twin: both called with the dtype and the tensors."""

    tensors: list
    run: object
    twin: object
    leaves: tuple = ()  # of the tensors, those that have a gradient
    triton_gradient: bool = False
    limit: float | None = None  # in place of that of its dtype


def _draw(*shape):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(SEED + sum(shape)), dtype=torch.float32, device="cpu"
    )


def _problems():
    """(operator, shape, _Problem) of everything that is compared."""
    yield from _of_attention()
    yield from _of_unification()
    yield from _of_the_network()


def _of_attention():
    for size, grid, channels, ratio, mode in (
        ((19, 23), (9, 8), 20, 0.1, "mean"),
        ((40, 33), (32, 32), 36, 0.1, "mean"),
        ((24, 24), (24, 20), 12, 0.4, "split"),
    ):
        bounds = [ops.window_bounds(n, m, ratio) for n, m in zip(size, grid, strict=True)]
        tensors = [_draw(1, *size, 4, 32), _draw(1, *grid, 4, 32), _draw(1, *grid, channels)]

        def run(dtype, *tensors, bounds=bounds, mode=mode):
            return ops.windowed_attention(*tensors, *bounds, head_mode=mode)

        def twin(dtype, *tensors, bounds=bounds, mode=mode):
            return reference.windowed_attention(*tensors, *bounds, head_mode=mode)

        shape = f"{size} from {grid}, {channels} channels, {mode}"
        yield "windowed_attention", shape, _Problem(tensors, run, twin, (0, 1, 2), triton_gradient=True)


def _of_unification():
    filters = 128

    def run(dtype, features, basis):
        return ops.feature_unification(features, basis) - 1 / filters  # what is left is what matters

    def twin(dtype, features, basis):
        return reference.feature_unification(features, basis) - 1 / filters

    for channels, grid in ((256, (5, 6)), (100, (4, 7)), (3, (9, 2))):
        tensors = [F.normalize(_draw(1, channels, *grid), dim=1), 3 * _draw(filters, 1, 5, 5)]
        yield "feature_unification", f"{channels} channels, {grid}", _Problem(tensors, run, twin, (0, 1), True, 1e-4)


def _of_the_network():
    made = _model()

    @cache
    def model(dtype, device, wide=False):
        """The model with its weights rounded to a dtype, in that dtype or in float64."""
        return copy.deepcopy(made).to(dtype).to(device, torch.float64 if wide else dtype)

    def queries(dtype, query):
        return ops.project_queries(query, *model(dtype, query.device).query_projection())

    def queries_twin(dtype, query):
        return projected_plainly(query, *model(dtype, query.device, wide=True).query_projection())

    def keys(dtype, from_image, from_features):
        weights = model(dtype, from_image.device).key_weights()
        from_features = 1 / 128 + 1e-3 * from_features.float().permute(0, 3, 1, 2)
        return ops.project_keys(from_image.float(), from_features, weights, dtype=dtype)

    def keys_twin(dtype, from_image, from_features):
        layers = model(dtype, from_image.device, wide=True)
        from_features = 1 / 128 + 1e-3 * from_features.permute(0, 3, 1, 2)
        _, *blocks = layers.key_features_encoder
        for block in blocks:
            from_features = block(from_features)
        merged = layers.aggregation(torch.cat((from_image.permute(0, 3, 1, 2), from_features), 1)).permute(0, 2, 3, 1)
        norm, weight, bias = layers.cross_decode.projection(1)
        return F.linear(rms_norm(merged, norm), weight, bias)

    for size, output, grid in (
        ((20, 24), (20, 24), (5, 6)),
        ((33, 17), (11, 17), (4, 3)),
        ((16, 16), (24, 24), (2, 2)),
    ):

        def guidance(dtype, image, output=output, grid=grid):
            weights = model(dtype, image.device).guidance_weights()
            return ops.guidance(image, weights, output, grid, dtype=dtype)[:2]

        def guidance_twin(dtype, image, output=output, grid=grid):
            layers = model(dtype, image.device, wide=True)
            guide = layers.guidance(image)
            from_image = F.adaptive_avg_pool2d(layers.key_encoder(guide), grid)
            return tuple(x.permute(0, 2, 3, 1) for x in (layers.queries(guide, output), from_image))

        def whole(dtype, image, features, output=output):
            return model(dtype, image.device)(image, features, output)

        def whole_twin(dtype, image, features, output=output):
            return model(dtype, image.device, wide=True)(image, features, output, backend="reference")

        image, shape = _draw(1, 3, *size), f"{size} to {output}"
        yield "guidance", shape, _Problem([image], guidance, guidance_twin)
        yield "project_queries", f"{output}", _Problem([_draw(1, *output, 128)], queries, queries_twin, (0,))
        cells = [_draw(1, *grid, 128), _draw(2, *grid, 128)[1:]]
        yield "project_keys", f"{grid}", _Problem(cells, keys, keys_twin)
        tensors = [image, _draw(1, 40, *grid)]
        yield "AnyUp", f"{shape} from {grid}", _Problem(tensors, whole, whole_twin, (0, 1), triton_gradient=True)


def _model():
    """AnyUp with weights that matter: no norm is one, no bias zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = AnyUp().eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model
