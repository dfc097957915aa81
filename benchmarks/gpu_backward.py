"""The backward on a GPU, for gpu.py: gradients against the twin in float64, and times alone and with the forward."""

import attention_cases
import torch
from anyup_fast.kernels import attention_backward as kernel
from anyup_fast.kernels import unification_backward as unification
from gpu_attention import problem
from gpu_steps import Lazy, Step
from roofline import parse

from anyup_fast.ops import reference, windowed_attention
from anyup_fast.ops.attention import windowed_attention_backward_op

SHAPES = ("448/32/384", "518/37/768", "1024/64/768")
# A plan that any device can run, beside the one it would choose.
SMALL = kernel.Plan(False, *3 * (kernel.Blocks(8, 8, 16, 16, 4),))
# Channels, filters, size of the filters and of the grid.
UNIFIED = ((384, 128, 5, 9), (100, 128, 5, 6), (48, 16, 3, 7))
UNIFIED_TOLERANCE = attention_cases.ON_GPUS
OPERATORS = ("windowed_attention", "windowed_attention gradient")


def problems(count, card, longest=40):
    """Steps of the sweep over the attention: `count` drawn problems by two plans each, twice."""
    for index in range(count):
        case = attention_cases.draw(index, longest=longest)
        for plan in (None, SMALL):
            yield _swept(case, plan, card)


def _swept(case, plan, card):
    there = Lazy(lambda: (case.grad().to(card.device), case.to(card.device)))

    def launch():
        grad, moved = there()
        options = dict(scale=case.scale, head_mode=case.head_mode, tiles=plan)
        return [kernel.windowed_attention_bwd(grad, *moved.tensors, **options) for _ in range(2)]

    def judge(outs):
        first, second = outs
        faults = case.gradient_faults(first)
        if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
            faults.append("two runs differ")
        limits = attention_cases.GRADIENT_TOLERANCE[case.value.dtype]
        errors = case.gradient_errors(first)
        worst = max(errors, key=lambda name: errors[name] / limits[name])
        return dict(error=errors[worst], limit=limits[worst], fault="; ".join(faults) or None)

    dtype = str(case.value.dtype).removeprefix("torch.")
    return Step("sweep backward", case.text, dtype, "default plan" if plan is None else "small blocks", launch, judge)


def unification_problems(card):
    """Steps of the sweep over the backward of feature unification."""
    for channels, filters, size, grid in UNIFIED:
        generator = torch.Generator().manual_seed(channels)
        shapes = (1, channels, grid, grid), (filters, 1, size, size), (1, filters, grid, grid)
        features, basis, grad = (torch.randn(shape, generator=generator) for shape in shapes)
        features = torch.nn.functional.normalize(features, dim=1)
        yield Step(
            "sweep unification",
            f"{channels} channels, {filters} filters of {size}, {grid}",
            "float32",
            "gradients",
            launch=lambda given=(grad, features, basis): unification.feature_unification_bwd(
                *(x.to(card.device) for x in given)
            ),
            judge=lambda gradients, given=(grad, features, basis): _unification_judged(gradients, *given),
        )


def _unification_judged(gradients, grad, features, basis):
    inputs = [x.double().requires_grad_() for x in (features, basis)]
    expected = torch.autograd.grad(reference.feature_unification(*inputs), inputs, grad.double())
    errors, faults = [], []
    for name, gradient, right in zip(("features", "basis"), gradients, expected, strict=True):
        errors.append(((gradient.double().cpu() - right).abs().max() / right.abs().max()).item())
        if not errors[-1] <= UNIFIED_TOLERANCE:
            faults.append(f"gradient of {name}: error {errors[-1]:.2e}")
    return dict(error=max(errors), limit=UNIFIED_TOLERANCE, fault="; ".join(faults) or None)


def judged(arguments, grad, gradients):
    """Largest error of the gradients, over their largest, against plain PyTorch in float64, with its limit."""
    wide = (x.double() for x in (grad, *arguments[:3]))
    scale = arguments[0].shape[-1] ** -0.5
    expected = windowed_attention_backward_op(*wide, *arguments[3:], scale, "mean", True, "torch")
    limits, errors = attention_cases.GRADIENT_TOLERANCE[grad.dtype], {}
    for name, gradient, right in zip(attention_cases.GRADIENTS, gradients, expected, strict=True):
        errors[name] = ((gradient.double() - right).abs().max() / right.abs().max()).item()
    wrong = [f"gradient of {name} wrong by {error:.2e}" for name, error in errors.items() if not error <= limits[name]]
    worst = max(errors, key=lambda name: errors[name] / limits[name])
    return dict(error=errors[worst], limit=limits[worst], fault="; ".join(wrong) or None)


def steps(shape, dtype, card):
    """The backward checked and timed, its launcher, and forward and backward together by two back ends.

    Args:
        shape: "image/grid/channels". dtype: name of it. card: `gpu_steps.Card`.
    """
    kind = attention_cases.DTYPES[dtype]
    image, _, channels = parse(shape)
    arguments = Lazy(lambda: problem(shape, kind, card))
    grad = Lazy(lambda: card.draw((1, image, image, channels), kind, 7))
    tensors = Lazy(lambda: [x.detach().requires_grad_() for x in arguments()[:3]])
    named = dict(part="backward", shape=shape, dtype=dtype, operators=OPERATORS)

    def call():
        return kernel.windowed_attention_bwd(grad(), *arguments())

    def both(backend):
        out = windowed_attention(*tensors(), *arguments()[3:], backend=backend)
        return torch.autograd.grad(out, tensors(), grad())

    yield Step(**named, what="kernels", launch=call, judge=lambda out: judged(arguments(), grad(), out), clock="graph")
    yield Step(**named, what="launcher", launch=call, clock="host", repeats=True, needs=("kernels",))
    for name, clock in (("triton", "graph"), ("torch", "events")):
        yield Step(
            **named,
            what=f"forward+backward, {name}",
            launch=lambda name=name: both(name),
            clock=clock,
            needs=("kernels",),
            rival=name == "torch",
            repeats=name == "torch",
        )
