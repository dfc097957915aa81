"""Tiles of 3x3 convolutions, transformed so that the convolution becomes 36 products of matrices.

Tiles of 4x4 outputs and the 6x6 inputs they need (Winograd 1980; Lavin and Gray, arXiv 1509.09308). With the usual
points 0, +-1, +-2 float32 would lose a digit; +-3/4 and +-3/2, and rows of the input transform that sum to one, keep
the error within twice that of the plain convolution.
"""

from fractions import Fraction
from functools import cache

import torch
import torch.nn.functional as F

OUTPUTS, TAPS = 4, 3  # of a tile along one axis
INPUTS = OUTPUTS + TAPS - 1
AT_ONCE = 2048  # numbers for each tap of a weight that is transformed in float64
POINTS = Fraction(0), Fraction(3, 4), Fraction(-3, 4), Fraction(3, 2), Fraction(-3, 2)
WASTE = 1.5  # times as many outputs as needed, at most, for the sake of whole tiles


def with_halo(source, rows, cols, dtype, out=None):
    """Pixels of `source` (H, W, D) of two slices with one more on every side, zeros outside; into `out` if given.

    `out` may reach further down and to the right; what lies there beyond the halo is filled with zeros.
    """
    shape = rows.stop - rows.start + 2, cols.stop - cols.start + 2, source.shape[2]
    halo = source.new_empty(shape, dtype=dtype) if out is None else out
    inner = [
        slice(int(part.start == 0), part.stop - part.start + 2 - int(part.stop == length))
        for part, length in zip((rows, cols), source.shape[:2], strict=True)
    ]
    halo[tuple(inner)] = source[max(rows.start - 1, 0) : rows.stop + 1, max(cols.start - 1, 0) : cols.stop + 1]
    for axis, part in enumerate(inner):
        if part.start:
            halo.select(axis, 0).zero_()
        if part.stop < halo.shape[axis]:
            halo.narrow(axis, part.stop, halo.shape[axis] - part.stop).zero_()
    return halo


def worth_tiling(shape):
    """Whether an image of so many (rows, columns) is done in whole tiles without too much waste."""
    rows, cols = (-(-n // OUTPUTS) * OUTPUTS for n in shape)
    return rows * cols <= WASTE * shape[0] * shape[1]


@cache
def matrices():
    """Transforms of one axis in float64: outputs (4, 6), weight (6, 3), inputs (6, 6).

    For any d (6,) and g (3,): `outputs @ ((weight @ g) * (inputs @ d))` is the four sums of d[i : i + 3] * g.
    """
    outputs = [[point**i for point in POINTS] + [Fraction(i == OUTPUTS - 1)] for i in range(OUTPUTS)]
    weight, inputs = [], []
    for point in POINTS:
        others = [other for other in POINTS if other != point]
        product = _product(point - other for other in others)
        polynomial = [*_polynomial(others), Fraction(0)]
        size = sum(map(abs, polynomial))
        weight.append([point**k * size / product for k in range(TAPS)])
        inputs.append([coefficient / size for coefficient in polynomial])
    polynomial = _polynomial(POINTS)
    size = sum(map(abs, polynomial))
    weight.append([Fraction(0)] * (TAPS - 1) + [size])
    inputs.append([coefficient / size for coefficient in polynomial])
    with torch.inference_mode(False):  # they are kept, for training too
        return tuple(
            torch.tensor([[float(number) for number in row] for row in rows], dtype=torch.float64, device="cpu")
            for rows in (outputs, weight, inputs)
        )


def _product(numbers):
    result = Fraction(1)
    for number in numbers:
        result *= number
    return result


def _polynomial(roots):
    """Coefficients of the product of (x - root), the constant first."""
    result = [Fraction(1)]
    for root in roots:
        shifted, scaled = [Fraction(0), *result], [*(-root * c for c in result), Fraction(0)]
        result = [a + b for a, b in zip(shifted, scaled, strict=True)]
    return result


def transformed(weight):
    """A weight (out, in, 3, 3) for the products of transformed tiles: (36, in, out)."""
    _, of_weight, _ = matrices()
    both = torch.kron(of_weight, of_weight).to(weight.device)
    taps = weight.permute(2, 3, 1, 0).flatten(0, 1).flatten(1)
    out = weight.new_empty(INPUTS**2, taps.shape[1])
    for source, target in zip(taps.split(AT_ONCE, 1), out.split(AT_ONCE, 1), strict=True):
        target.copy_(both @ source.double())
    return out.view(INPUTS**2, weight.shape[1], weight.shape[0])


def transform(source, rows, cols, like, desk, inside=False):
    """Transformed tiles (36, tiles, D), in the dtype of `like`, of what the outputs of two slices need."""
    width = source.shape[2]
    tiles = [-(-(part.stop - part.start) // OUTPUTS) for part in (rows, cols)]
    reach = [n * OUTPUTS + 2 for n in tiles]
    halo = desk.buffer("halo", reach[0] * reach[1] * width, like).view(*reach, width)
    if inside:
        part = source[rows.start : rows.start + reach[0], cols.start : cols.start + reach[1]]
        if part.shape != halo.shape:
            halo.zero_()
        halo[: part.shape[0], : part.shape[1]] = part
    else:
        with_halo(source, rows, cols, like.dtype, halo)
    stride = halo.stride()
    overlapping = halo.as_strided(
        (INPUTS, INPUTS, *tiles, width), (*stride[:2], *(OUTPUTS * step for step in stride[:2]), 1)
    )
    numbers = INPUTS**2 * tiles[0] * tiles[1] * width
    cut, turned = (desk.buffer(name, numbers, like) for name in ("inputs", "products"))
    cut.view(overlapping.shape).copy_(overlapping)
    _, _, of_inputs = (matrix.to(like) for matrix in matrices())
    _both_axes(of_inputs, cut, turned)
    return cut.view(INPUTS**2, -1, width)


def transform_back(products, shape, out, desk):
    """Outputs (rows * cols, D) of the image of that `shape`, from its tiles' products (36, tiles, D), overwritten."""
    width = products.shape[2]
    tiles = [-(-n // OUTPUTS) for n in shape]
    of_outputs, _, _ = (matrix.to(products) for matrix in matrices())
    one_axis = desk.buffer("inputs", OUTPUTS * INPUTS * products[0].numel(), products)
    torch.mm(of_outputs, products.view(INPUTS, -1), out=one_axis.view(OUTPUTS, -1))
    both = products.view(-1)[: OUTPUTS**2 * products[0].numel()]
    torch.matmul(of_outputs, one_axis.view(OUTPUTS, INPUTS, -1), out=both.view(OUTPUTS, OUTPUTS, -1))
    image = both.view(OUTPUTS, OUTPUTS, *tiles, width).permute(2, 0, 3, 1, 4)
    if all(n % OUTPUTS == 0 for n in shape):
        out.view(image.shape).copy_(image)
    else:
        out.view(*shape, width).copy_(image.flatten(2, 3).flatten(0, 1)[: shape[0], : shape[1]])


def transform_gradient(grad, shape, desk):
    """What `transform_back` makes of the gradient (rows * cols, D) of its outputs: (36, tiles, D)."""
    width = grad.shape[1]
    tiles = [-(-n // OUTPUTS) for n in shape]
    count = tiles[0] * tiles[1] * width
    cut, turned = (desk.buffer(name, INPUTS**2 * count, grad) for name in ("gradient", "products"))
    whole = grad.view(*shape, width)
    if any(n % OUTPUTS for n in shape):
        whole = F.pad(whole, (0, 0, 0, tiles[1] * OUTPUTS - shape[1], 0, tiles[0] * OUTPUTS - shape[0]))
    parts = whole.view(tiles[0], OUTPUTS, tiles[1], OUTPUTS, width).permute(1, 3, 0, 2, 4)
    first = cut[: OUTPUTS**2 * count].view(OUTPUTS, -1)
    first.view(parts.shape).copy_(parts)
    of_outputs, _, _ = (matrix.to(grad).mT.contiguous() for matrix in matrices())
    second = turned[: INPUTS * OUTPUTS * count]
    torch.mm(of_outputs, first, out=second.view(INPUTS, -1))
    torch.matmul(of_outputs, second.view(INPUTS, OUTPUTS, -1), out=cut.view(INPUTS, INPUTS, -1))
    return cut.view(INPUTS**2, -1, width)


def _both_axes(matrix, x, room):
    """Apply a matrix (n, n) to both of the leading axes of `x` (n * n * rest), in place; `room` is as large."""
    n = len(matrix)
    torch.mm(matrix, x.view(n, -1), out=room.view(n, -1))
    torch.matmul(matrix, room.view(n, n, -1), out=x.view(n, n, -1))
