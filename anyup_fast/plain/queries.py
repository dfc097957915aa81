"""Queries in plain PyTorch, forward and backward: their 3x3 convolution, norm and projection."""

from functools import partial

import torch

from ..cpu import products
from ..cpu.convolution import Convolution, WeightGradient
from ..cpu.crew import led
from ..cpu.pages import new_empty
from . import whole
from .norms import rms_project
from .walks import Walk, flat_pixels
from .weights import cast

CONVOLVED = 2  # times smaller pieces where a convolution takes five buffers


@led
def project_queries(query, conv, norm, weight, bias, *, eps, convolved=None):
    """`anyup_fast.ops.project_queries`, in float32 at least; `convolved`, if given, takes the convolution's output."""
    compute = torch.promote_types(query.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        halved = products.halved(query, conv)
        conv, norm, weight, bias = (tensor.to(compute) for tensor in (conv, norm, weight, bias))
        out = new_empty(query, query.shape, compute, recorded=convolved is not None)
        height, width, dim = query.shape[1:]
        if whole.fits(query.device, (height, width)):
            return whole.project_queries(query, conv, norm, weight, bias, eps, out, convolved)
        walk = Walk((height, width), dim, conv, rows=Convolution.ROWS, parts=CONVOLVED)
        convolve, folded = Convolution(conv, halved), (weight * norm).T.contiguous()
        folded = folded.bfloat16() if halved else folded

        def project(desk, piece, b):
            flat, rows, cols, _ = piece
            pixels = desk.scratch(0, flat, dim)
            convolve(query[b], rows, cols, pixels, desk)
            if convolved is not None:
                convolved[b].view(-1, dim)[flat] = pixels
            rms_project(pixels, folded, bias, eps, out[b].view(-1, dim)[flat])

        for b in range(len(query)):
            walk.each(partial(project, b=b))
    return out


def convolve_and_project(query, conv, norm, weight, bias, eps):
    """`project_queries` for who records gradients: (projected, convolved), the latter for backward."""
    convolved = new_empty(query, query.shape, torch.promote_types(query.dtype, torch.float32), recorded=True)
    return project_queries(query, conv, norm, weight, bias, eps=eps, convolved=convolved), convolved


@led
def project_queries_backward(grad, query, pixels, conv, norm, weight, bias, eps):
    """Gradients of `anyup_fast.ops.project_queries` for query, conv, norm, weight and bias.

    `pixels` (B, H', W', D) is what the convolution made of `query`.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        originals, halved = (conv, norm, weight, bias), products.halved(query, conv)
        conv, norm, weight, bias = cast(originals, wide)
        height, width, dim = query.shape[1:]
        walk = Walk((height, width), dim, conv, rows=Convolution.ROWS, parts=CONVOLVED, halved=halved)
        back = Convolution(conv.flip(2, 3).transpose(0, 1), halved)
        folded = (weight * norm).to(walk.factors)
        grad_query = new_empty(query, query.shape, recorded=True)
        of_conv = new_empty(query, (height, width, dim), wide, recorded=True)
        grad_conv, of_projection, grad_bias = (tensor.new_zeros(tensor.shape) for tensor in (conv, weight, bias))

        def start():
            return WeightGradient(conv), torch.zeros_like(of_projection), torch.zeros_like(grad_bias)

        def picture(source, convolved, given, result):
            def through_projection(desk, piece, sums):
                flat, rows, cols, _ = piece
                for_conv, for_weight, for_bias = sums
                squares = torch.mul(convolved[flat], convolved[flat], out=desk.scratch(1, flat, dim))
                inverse = squares.mean(1, keepdim=True).add_(eps).rsqrt_()
                unit = torch.mul(convolved[flat], inverse, out=desk.scratch(0, flat, dim))
                down = desk.scratch(2, flat, dim).copy_(given[flat])  # read three times
                for_bias += down.sum(0)
                for_weight.addmm_(down.T, unit)
                down = desk.multiply(down, folded, of_conv.view(-1, dim)[flat])
                along = torch.mul(down, unit, out=desk.scratch(1, flat, dim)).mean(1, keepdim=True)
                down.addcmul_(unit, along, value=-1).mul_(inverse)
                for_conv.add(down, source, rows, cols, desk)

            for for_conv, for_weight, for_bias in walk.gathered(through_projection, start):
                grad_conv.add_(for_conv.result())
                of_projection.add_(for_weight)
                grad_bias.add_(for_bias)

            def through_convolution(desk, piece):
                flat, rows, cols, _ = piece
                out = desk.scratch(0, flat, dim)
                back(of_conv, rows, cols, out, desk)
                result[flat] = out

            walk.each(through_convolution)

        for tensors in zip(query, *map(flat_pixels, (pixels, grad, grad_query)), strict=True):
            picture(*tensors)
        grads = grad_conv, (weight * of_projection).sum(0), of_projection * norm, grad_bias
    return grad_query, *(g.to(w.dtype) for g, w in zip(grads, originals, strict=True))
