"""Windows by the rule `neighborhood`, through the whole operator, against dilated neighborhood attention itself."""

import random

import pytest
import torch
import torch.nn.functional as F
from standins import neighborhood_attention
from vectors import relative

from anyup_fast.ops import neighborhood_bounds, windowed_attention

# Norm of the difference over norm, float32. Measured over the long sweep: 4e-7.
TOLERANCE = 2e-6
BACKENDS = ("torch", "reference")


def tensors(rng, size, grid):
    heads, head_dim, channels, batch = (
        rng.choice([1, 2, 4]),
        rng.choice([4, 8]),
        rng.choice([1, 5, 16]),
        rng.choice([1, 2]),
    )
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))

    def make(*shape):
        return torch.randn(*shape, generator=generator)

    query, key = make(batch, *size, heads, head_dim) * 2, make(batch, *grid, heads, head_dim)
    return query, key, make(batch, *grid, channels)


def odd_window(n_key, ratio):
    size = max(3, round(2 * ratio * n_key))
    return size + 1 - size % 2


def by_dilation(query, key, value, ratio):
    """Keys and values spread over the pixels of their cells, then attention to pixels one cell apart."""
    size, grid = query.shape[1:3], key.shape[1:3]
    heads = query.shape[3]

    def spread(x):
        x = F.interpolate(x.flatten(3).permute(0, 3, 1, 2), size, mode="nearest-exact")
        return x.permute(0, 2, 3, 1)

    key = spread(key).unflatten(-1, (heads, -1)).permute(0, 3, 1, 2, 4)
    value = spread(value)[:, None].expand(-1, heads, -1, -1, -1)
    window = [odd_window(n, ratio) if 0 < ratio < 0.5 else n for n in grid]
    dilation = [n // m for n, m in zip(size, grid, strict=True)]
    return neighborhood_attention(query.permute(0, 3, 1, 2, 4), key, value, window, dilation).mean(1)


def seen_by(i, n_query, n_key, ratio):
    """The low-res rows (or columns) that output row (or column) i sees, by the rule as it is stated for any sizes."""
    size = min(odd_window(n_key, ratio), n_key)
    if n_query >= n_key:
        cell = min(i // (n_query // n_key), n_key - 1)  # past the last whole cell: the last one
    else:
        cell = int((i + 0.5) * n_key / n_query)  # the one under the centre
    first = min(max(cell - size // 2, 0), n_key - size)
    return range(first, first + size)


def by_cells(query, key, value, ratio):
    """One output pixel and one head after the other."""
    batch, height, width, heads, head_dim = query.shape
    h, w, channels = value.shape[1:]
    out = torch.zeros(batch, height, width, channels)
    for i in range(height):
        for j in range(width):
            rows, cols = seen_by(i, height, h, ratio), seen_by(j, width, w, ratio)
            cells = [(r, c) for r in rows for c in cols]
            keys = torch.stack([key[:, r, c] for r, c in cells], 1)
            values = torch.stack([value[:, r, c] for r, c in cells], 1)
            for n in range(heads):
                weights = (keys[:, :, n] @ query[:, i, j, n, :, None] * head_dim**-0.5).softmax(1)
                out[:, i, j] += (weights * values).sum(1) / heads
    return out


def compare(rng, size, grid, ratio, oracle):
    query, key, value = tensors(rng, size, grid)
    bounds = [neighborhood_bounds(n, m, ratio) for n, m in zip(size, grid, strict=True)]
    expected = oracle(query, key, value, ratio)
    for backend in BACKENDS:
        error = relative(windowed_attention(query, key, value, *bounds, backend=backend), expected)
        assert error < TOLERANCE, (size, grid, ratio, backend, error)


def dividing(rng):
    while True:
        grid = rng.randint(3, 10), rng.randint(3, 10)
        ratio = rng.choice([0.05, 0.1, 0.2, 0.25, 0.3, 0.0, 0.6])
        if not 0 < ratio < 0.5 or all(odd_window(n, ratio) <= n for n in grid):
            return tuple(n * rng.randint(1, 4) for n in grid), grid, ratio


@pytest.mark.parametrize("seed", range(16))
def test_sizes_that_divide_give_dilated_neighborhood_attention(seed):
    rng = random.Random(seed)
    compare(rng, *dividing(rng), by_dilation)


@pytest.mark.slow("300 more draws of the hundred above")
@pytest.mark.parametrize("seed", range(100, 400))
def test_many_sizes_that_divide(seed):
    rng = random.Random(seed)
    compare(rng, *dividing(rng), by_dilation)


@pytest.mark.parametrize(
    "size, grid",
    [
        ((11, 13), (5, 4)),  # rows and columns left over
        ((12, 9), (5, 9)),
        ((4, 12), (7, 5)),  # fewer pixels than cells in one axis
        ((3, 2), (8, 9)),
        ((10, 10), (2, 1)),  # fewer cells than the smallest window
        ((9, 16), (9, 4)),
    ],
)
@pytest.mark.parametrize("ratio", [0.1, 0.3])
def test_other_sizes_follow_the_stated_rule(size, grid, ratio):
    compare(random.Random(hash((size, grid))), size, grid, ratio, by_cells)


@pytest.mark.parametrize("seed", range(3))
def test_both_definitions_agree_where_sizes_divide(seed):
    rng = random.Random(seed)
    grid, size, ratio = (5, 6), (10, 18), 0.3
    query, key, value = tensors(rng, size, grid)
    assert relative(by_cells(query, key, value, ratio), by_dilation(query, key, value, ratio)) < TOLERANCE


def test_another_window_is_noticed():
    rng = random.Random(0)
    query, key, value = tensors(rng, (12, 12), (6, 6))
    bounds = [neighborhood_bounds(12, 6, 0.45)] * 2
    assert relative(windowed_attention(query, key, value, *bounds), by_dilation(query, key, value, 0.2)) > 1e-2
