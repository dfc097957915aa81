"""3x3 convolutions of pieces of an image that lies as (H, W, D), without padding of their own, and their gradients.

In float32 on CPUs they are done by transformed tiles (`tiles`), with a quarter of the multiplications, where that is
faster (`products`).
"""

import itertools

import torch
import torch.nn.functional as F

from . import products
from .tiles import (
    INPUTS,
    OUTPUTS,
    TAPS,
    matrices,
    transform,
    transform_back,
    transform_gradient,
    transformed,
    with_halo,
    worth_tiling,
)


class Convolution:
    """Convolution by a weight (out, in, 3, 3)."""

    ROWS = OUTPUTS  # pieces of a multiple of so many rows are done fastest

    def __init__(self, weight, halved=False):
        """`halved`: multiply in bfloat16, directly: transformed tiles would multiply its rounding."""
        on_cpu = weight.device.type == "cpu"
        exact = on_cpu and weight.dtype == torch.float32 and not halved
        self.tiled = exact and products.choice().convolution != "direct"
        self.weight = weight.bfloat16() if halved else weight
        if self.tiled:
            self.transformed = transformed(weight)
        elif on_cpu:
            self.weight = self.weight.contiguous(memory_format=torch.channels_last)

    def __call__(self, source, rows, cols, out, desk, inside=False):
        """Fill `out` (rows * cols, out channels) for the pixels of two slices.

        Args:
            source: (H, W, in), zeros around it; with `inside` (H + 2, W + 2, in), its border included.
            desk: `plain.walks.Desk`; its scratch 0 may be `out`.
        """
        shape = rows.stop - rows.start, cols.stop - cols.start
        if self.tiled and worth_tiling(shape):
            transform_back(self._products(source, rows, cols, desk, inside), shape, out, desk)
            return
        if inside:
            halo = source[rows.start : rows.stop + 2, cols.start : cols.stop + 2].to(self.weight.dtype)
        else:
            halo = with_halo(source, rows, cols, self.weight.dtype)
        if halo.device.type == "cpu":
            convolved = F.conv2d(halo[None].permute(0, 3, 1, 2), self.weight)
            out.copy_(convolved[0].permute(1, 2, 0).flatten(0, 1))
            return
        # On accelerators a convolution may be rounded more coarsely than matrix products are.
        for row, col, part in _under_taps(halo, shape):
            tap = self.weight[:, :, row, col].T
            if row or col:
                out.addmm_(part, tap)
            else:
                torch.mm(part, tap, out=out)

    def _products(self, source, rows, cols, desk, inside):
        inputs = transform(source, rows, cols, self.weight, desk, inside)
        numbers = len(inputs) * inputs.shape[1] * self.transformed.shape[2]
        results = desk.buffer("products", numbers, inputs).view(*inputs.shape[:2], -1)
        return products.bmm(inputs, self.transformed, results)


class WeightGradient:
    """Gradient for the weight (out, in, 3, 3) of a convolution, gathered piece by piece."""

    def __init__(self, weight):
        self.weight, self.tiled = weight, weight.device.type == "cpu" and weight.dtype == torch.float32
        self.total = torch.zeros_like(weight)
        self.of_tiles = weight.new_zeros(INPUTS**2, weight.shape[1], weight.shape[0]) if self.tiled else None

    def add(self, grad, source, rows, cols, desk):
        """Take in the gradient (rows * cols, out) of the outputs of two slices of `source` (H, W, in)."""
        shape = rows.stop - rows.start, cols.stop - cols.start
        if self.tiled and worth_tiling(shape):
            inputs = transform(source, rows, cols, self.of_tiles, desk)
            self.of_tiles.baddbmm_(inputs.mT, transform_gradient(grad, shape, desk))
            return
        halo = with_halo(source, rows, cols, self.weight.dtype)
        if grad.device.type != "cpu":
            for row, col, part in _under_taps(halo, shape):
                self.total[:, :, row, col] += grad.T @ part
            return
        halo = halo.permute(2, 0, 1)[None]
        grad = grad.view(1, *shape, -1).permute(0, 3, 1, 2)
        window = [1, 1], [0, 0], [1, 1]
        wanted = False, True, False
        self.total += torch.ops.aten.convolution_backward(
            grad, halo, self.weight, None, *window, False, [0, 0], 1, wanted
        )[1]

    def result(self):
        """The gradient (out, in, 3, 3)."""
        if not self.tiled:
            return self.total
        _, of_weight, _ = matrices()
        both = torch.kron(of_weight, of_weight).to(self.of_tiles).T @ self.of_tiles.flatten(1)
        return self.total + both.view(TAPS, TAPS, *self.of_tiles.shape[1:]).permute(3, 2, 0, 1)


def _under_taps(halo, shape):
    """Row and column of each tap of a filter, and the pixels (rows * cols, D) of `halo` that lie under it."""
    for row, col in itertools.product(range(TAPS), repeat=2):
        yield row, col, halo[row : row + shape[0], col : col + shape[1]].flatten(0, 1)
