"""Attention on other devices than CPUs: all tiles of a large part of the image by the same few operations.

Tiles have one size each, of queries and of keys, so that one gather cuts all of them and one more puts the results
where they belong. Where tiles and windows lie is told by small tables that stay on the device.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

# Numbers held at once, the logits of a part, or its results and values: half of what the output takes, within limits.
SCRATCH, MOST_SCRATCH = 1 << 27, 1 << 29
SETUP = 2  # what one more tile along an axis costs: as much as so many queries more
LONGEST = 32  # queries of a tile along one axis


def scratch_for(numbers):
    """How many numbers are held at once beside an output of so many."""
    return max(SCRATCH, min(numbers // 2, MOST_SCRATCH))


class Axis(NamedTuple):
    """How one axis is cut into tiles of `length` queries and `n_keys` keys each.

    Attributes:
        starts, lows: first query and first key of each tile.
    """

    length: int
    n_keys: int
    starts: tuple
    lows: tuple


@lru_cache(maxsize=64)
def cut(windows, n_key, longest):
    """The `Axis` of least work for the windows of its queries, tiles of at most `longest` queries."""
    found = []
    for length in range(1, min(longest, len(windows)) + 1):
        starts = range(0, len(windows), length)
        spans = [windows[start : start + length] for start in starts]
        lows = [min(low for low, _ in span) for span in spans]
        n_keys = max(max(high for _, high in span) - low for span, low in zip(spans, lows, strict=True))
        lows = tuple(min(low, n_key - n_keys) for low in lows)
        found.append((len(starts) * (SETUP + length) * n_keys, Axis(length, n_keys, tuple(starts), lows)))
    return min(found)[1]


class Plan(NamedTuple):
    """Tiles of an image: both axes, and how many tiles of rows and of columns are computed at once."""

    rows: Axis
    cols: Axis
    n_rows: int
    n_cols: int


@lru_cache(maxsize=64)
def planned(row_windows, col_windows, grid, batch, heads, dim, groups, channels, scratch):
    """The `Plan` for a grid (h, w), or None if the keys of one query are too many to be held at once."""
    for longest in (LONGEST, 16, 8, 4, 2, 1):
        rows, cols = (cut(w, n, longest) for w, n in zip((row_windows, col_windows), grid, strict=True))
        queries, keys = rows.length * cols.length, rows.n_keys * cols.n_keys
        logits = heads * queries * keys + max(queries * keys, (queries + keys) * heads * dim)
        results = groups * queries * keys + (queries + keys) * channels
        if logits <= scratch:
            tiles = max(1, scratch // max(logits, results))
            n_cols = min(tiles, len(cols.starts))
            all_cols = n_cols == len(cols.starts)
            n_rows = min(max(1, tiles // n_cols), batch * len(rows.starts)) if all_cols else 1
            return Plan(rows, cols, n_rows, n_cols)
    return None


class Tables:
    """Where the tiles of a `Plan` lie, on a device: made once for each size.

    Images of a batch lie below each other: their rows are those of one tall image.

    Attributes:
        queries, keys: of the rows and of the columns, (tiles, length) and (tiles, n_keys): places in the image.
        biases: of both axes, (tiles, length, n_keys), minus infinity where a query does not look; None if all look
            everywhere.
        places: (B * H', 1, 1) and (W', groups): their sum is where a pixel's result lies among those of its part.
        heads: (heads,), counted.
    """

    def __init__(self, plan, windows, grid, batch, heads, groups, dtype, device):
        tile = groups * plan.rows.length * plan.cols.length
        self.queries, self.keys, self.biases, places = [], [], [], []
        for axis, its_windows, n_key, images in zip(plan[:2], windows, grid, (batch, 1), strict=True):
            image = torch.arange(images)[:, None, None]
            query = torch.tensor(axis.starts)[:, None] + torch.arange(axis.length)
            query = query.clamp(max=len(its_windows) - 1)  # queries past the last are the last once more
            key = torch.tensor(axis.lows)[:, None] + torch.arange(axis.n_keys)
            bounds = torch.tensor(its_windows)[query]
            outside = (key[:, None] < bounds[..., :1]) | (key[:, None] >= bounds[..., 1:])
            bias = torch.zeros(outside.shape, dtype=dtype).masked_fill_(outside, float("-inf"))
            self.queries.append((query + image * len(its_windows)).flatten(0, 1))
            self.keys.append((key + image * n_key).flatten(0, 1))
            self.biases.append(bias.repeat(images, 1, 1) if outside.any() else None)
            place = torch.arange(len(its_windows))
            number = (place // axis.length + image[:, 0] * len(axis.starts)).flatten()
            places.append((number, (place % axis.length).repeat(images)))
        (row, inner_row), (col, inner_col) = places
        group = torch.arange(groups) * (plan.rows.length * plan.cols.length)
        rows = row % plan.n_rows * min(plan.n_cols, len(plan.cols.starts)) * tile + inner_row * plan.cols.length
        cols = (col % plan.n_cols * tile + inner_col)[:, None] + group
        self.places = [rows[:, None, None], cols]
        self.heads = torch.arange(heads)
        for name, tables in vars(self).items():
            kept = [None if table is None else table.to(device) for table in tables] if isinstance(tables, list) else 0
            setattr(self, name, kept or tables.to(device))

    def bias(self, rows, cols):
        """Both halves of the bias of a part: they broadcast to (tile rows, tile columns, heads, T, length, R, n_keys).

        None if all look everywhere.
        """
        of_rows, of_cols = self.biases
        of_rows = None if of_rows is None else of_rows[rows, None, None, :, None, :, None]
        of_cols = None if of_cols is None else of_cols[None, cols, None, None, :, None]
        return [half for half in (of_rows, of_cols) if half is not None]


@lru_cache(maxsize=32)
def _tables(plan, windows, grid, batch, heads, groups, dtype, device):
    with torch.inference_mode(False):  # they are kept, for training too
        return Tables(plan, windows, grid, batch, heads, groups, dtype, device)


def attend(query, key, value, windows, out, scale, head_mode):
    """Fill `out` (B, H', W', C); returns whether it did: not where the keys of one query are too many.

    Args:
        query, key, value: as of `plain.attention.windowed_attention`. windows: tuples of pairs, of rows and of columns.
    """
    batch, height, width, heads, dim = query.shape
    grid, channels = tuple(key.shape[1:3]), value.shape[3]
    groups = heads if head_mode == "split" else 1
    plan = planned(*windows, grid, batch, heads, dim, groups, channels, scratch_for(out.numel()))
    if plan is None:
        return False
    dtype = torch.promote_types(torch.promote_types(query.dtype, value.dtype), torch.float32)
    tables = _tables(plan, windows, grid, batch, heads, groups, dtype, query.device)
    query = query.flatten(0, 1)
    key = torch.mul(key, scale).flatten(0, 1) if key.dtype == dtype else key.to(dtype).mul_(scale).flatten(0, 1)
    value = value.flatten(0, 1).unflatten(-1, (groups, -1))
    out = out.flatten(0, 1).unflatten(-1, (groups, -1))
    places = (tables.places[0] + tables.places[1]).view(batch * height, width, groups)
    rows_of_tiles, cols_of_tiles = len(tables.queries[0]), len(tables.queries[1])
    for first_row in range(0, rows_of_tiles, plan.n_rows):
        rows = slice(first_row, min(first_row + plan.n_rows, rows_of_tiles))
        y = _covered(plan.rows, rows, height)
        for first_col in range(0, cols_of_tiles, plan.n_cols):
            cols = slice(first_col, min(first_col + plan.n_cols, cols_of_tiles))
            x = _covered(plan.cols, cols, width)
            weights = _weights(query, key, tables, rows, cols, dtype)
            if groups == 1:
                weights = weights.mean(2, keepdim=True)
            _results(weights, value, tables, rows, cols, places[y, x], out[y, x])
    return True


def _covered(axis, tiles, length):
    """The places of an axis, of several images of that length, that a slice of its tiles covers."""
    edges = (
        (tile // len(axis.starts)) * length + min(tile % len(axis.starts) * axis.length, length)
        for tile in (tiles.start, tiles.stop)
    )
    return slice(*edges)


def _cut_out(source, tables, rows, cols, heads):
    """Places of `source` (H, W, heads, d) by tables of rows and columns: (rows, columns, heads, T, length, d)."""
    of_rows, of_cols = tables[0][rows], tables[1][cols]
    shape = len(of_rows), len(of_cols), len(heads), of_rows.shape[1], of_cols.shape[1], source.shape[3]
    places = of_rows[:, None, None, :, None], of_cols[:, None, None], heads[:, None, None]
    return torch.ops.aten.index.Tensor_out(source, places, out=source.new_empty(shape))


def _weights(query, key, tables, rows, cols, dtype):
    """(rows, columns, heads, P, K) of some tiles."""
    q = _cut_out(query, tables.queries, rows, cols, tables.heads).to(dtype)
    k = _cut_out(key, tables.keys, rows, cols, tables.heads)
    logits = q.new_empty(*q.shape[:5], *k.shape[3:5])
    q, k = q.flatten(3, 4).flatten(0, 2), k.flatten(3, 4).flatten(0, 2).mT
    products_of = logits.view(len(q), q.shape[1], k.shape[2])
    halves = tables.bias(rows, cols)
    if not halves:
        torch.bmm(q, k, out=products_of)
    else:
        if len(halves) == 2:
            torch.add(halves[0].expand_as(logits), halves[1], out=logits)
        else:
            logits.copy_(halves[0].expand_as(logits))
        products_of.baddbmm_(q, k)
    del q, k
    weights = logits.flatten(5).flatten(3, 4)
    return torch.softmax(weights, -1, out=weights)


def _results(weights, value, tables, rows, cols, places, out):
    """Write what the weights (rows, columns, groups, P, K) make of the values to `out` (H, W, groups, c)."""
    groups = tables.heads[: weights.shape[2]]
    met = _cut_out(value, tables.keys, rows, cols, groups).to(weights.dtype)
    results = torch.bmm(weights.flatten(0, 2), met.flatten(3, 4).flatten(0, 2)).flatten(0, 1)
    del met
    if out.dtype == results.dtype and out.is_contiguous():
        torch.index_select(results, 0, places.flatten(), out=out.view(-1, out.shape[-1]))
    else:
        out.copy_(results.index_select(0, places.flatten()).view(out.shape))
