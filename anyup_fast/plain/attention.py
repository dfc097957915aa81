"""Exact operators in plain PyTorch, for any device; memory stays flat in the number of pixels.

Pixels of a small rectangle share almost the same window. Both axes are cut where windows change, so that the rectangle
of keys that a tile needs is hardly larger than each pixel's own; tiles side by side are batched into dense products, a
few megabytes at a time. Bounds are read on the CPU and nothing else is read: no device is waited for.
"""

from functools import cached_property, lru_cache
from itertools import groupby, product

import torch

from ..cpu import products
from ..cpu.crew import crew_size, led, share_out
from ..cpu.pages import Room, new_empty
from . import gathered

# Numbers held at once: the logits of a batch of tiles and their results (a cache's worth each), any buffer at all.
BATCH = 1 << 20
OUTPUTS = 1 << 18
LIMIT = 1 << 24
# What one more tile along an axis costs: as much as so many queries more.
TILE_COST = 8
# Up to here, many keys are cheaper with one running sum per head than with all logits at once.
FEW_CHANNELS = 64


@led
def windowed_attention(query, key, value, row_bounds, col_bounds, *, scale=None, head_mode="mean"):
    """Forward of `anyup_fast.ops.windowed_attention`, without recording gradients (the operator has its own backward).

    Bounds that lie on an accelerator are copied to the CPU, which waits for it; bounds on the CPU cost no waiting.
    """
    batch, height, width, heads, head_dim = query.shape
    scale = head_dim**-0.5 if scale is None else scale
    out = new_empty(value, (batch, height, width, value.shape[3]), recorded=query.requires_grad)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        if out.device.type != "cpu":
            windows = tuple(map(_windows, (row_bounds, col_bounds)))
            if gathered.attend(query, key, value, windows, out, scale, head_mode):
                return out
        rows, cols, blocked = _plan(row_bounds, col_bounds, heads, value.shape[3])
        strips = [] if blocked else _strips(rows, cols, key, heads, value.shape[3], BATCH)
        compute = _blocked if blocked else _forward
        tiles = list(product(rows, cols if blocked else strips))
        rooms = [Room() for _ in range(min(crew_size(out.device), len(tiles)))]
        for tensors in zip(query, key, value, out, strict=True):

            def attend(room, tile, tensors=tensors):
                compute(*tile, *tensors, scale, head_mode, room)

            share_out(attend, tiles, rooms)
    return out


@led
def windowed_attention_backward(
    grad, query, key, value, row_bounds, col_bounds, *, scale=None, head_mode="mean", for_value=True, for_query=True
):
    """Gradients of `windowed_attention` for query and key, and for value; those that are not asked for are empty.

    Weights are computed again, a few tiles at a time.
    """
    heads, head_dim = query.shape[3:]
    scale = head_dim**-0.5 if scale is None else scale
    compute = _compute_dtype(query, value)
    grads = [
        new_empty(query, query.shape if for_query else (len(query), 0), compute, recorded=True),
        torch.zeros(key.shape if for_query else (len(key), 0), dtype=compute, device=key.device),
        torch.zeros(value.shape if for_value else (len(value), 0), dtype=compute, device=value.device),
    ]
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        rows, cols, _ = _plan(row_bounds, col_bounds, heads, value.shape[3], blocks=False)
        strips = _strips(rows, cols, key, heads, value.shape[3], BATCH // 2)
        tiles = list(product(rows, strips))
        for *tensors, of_query, of_key, of_value in zip(grad, query, key, value, *grads, strict=True):

            def attend(sums, tile, tensors=tensors, of_query=of_query):
                _backward(*tile, *tensors, of_query, *sums, scale, head_mode)

            # Neighbouring tiles see the same keys: each worker has sums of its own.
            workers = min(crew_size(grad.device), len(tiles))
            sums = [
                (of_key, of_value),
                *((torch.zeros_like(of_key), torch.zeros_like(of_value)) for _ in range(1, workers)),
            ]
            costs = [_cost(row, strip) for row, strip in tiles]
            share_out(attend, tiles, sums, in_order=True, costs=costs)
            for key_sum, value_sum in sums[1:]:
                of_key += key_sum
                of_value += value_sum
    return tuple(g.to(x.dtype) for g, x in zip(grads, (query, key, value), strict=True))


class Tile:
    """Queries [start, stop) of one axis and the keys [low, high) that their windows span."""

    def __init__(self, windows, start, stop):
        self.start, self.stop, self.windows = start, stop, windows[start:stop]
        self.low, self.high = min(low for low, _ in self.windows), max(high for _, high in self.windows)

    def outside(self, low, high, length):
        """Boolean (length, high - low): keys not seen; queries past the last see what it sees."""
        windows = torch.tensor(self.windows + self.windows[-1:] * (length - len(self.windows)), device="cpu")
        keys = torch.arange(low, high, device="cpu")
        return (keys < windows[:, :1]) | (keys >= windows[:, 1:])

    @cached_property
    def bias(self):
        """(R, T): minus infinity where a query does not look, else 0; None if all look everywhere."""
        return _bias(self.outside(self.low, self.high, self.stop - self.start))


class Strip:
    """Neighbouring column tiles, padded to `length` queries and `n_keys` keys each."""

    def __init__(self, tiles, n_key):
        self.tiles = tiles
        self.length = max(t.stop - t.start for t in tiles)
        self.n_keys = max(t.high - t.low for t in tiles)
        self.lows = [min(t.low, n_key - self.n_keys) for t in tiles]

    def queries(self, row, source, dtype, room, some=slice(None)):
        """The queries of `source` (H', W', heads, d) inside, as (tiles, heads, T * length, d), zeros where padded.

        `some`: of the tiles. They lie in the buffer "queries" of `room`.
        """
        heads, dim = source.shape[2:]
        tiles = self.tiles[some]
        shape = len(tiles), heads, row.stop - row.start, self.length, dim
        packed = room.buffer("queries", shape, source, dtype)
        for tile, part in zip(tiles, packed, strict=True):
            length = tile.stop - tile.start
            part[:, :, :length] = source[row.start : row.stop, tile.start : tile.stop].permute(2, 0, 1, 3)
            if length < self.length:
                part[:, :, length:] = 0
        return packed.flatten(2, 3)

    def keys(self, row, source, dtype):
        """The keys of `source` (h, w, heads, d) inside, as (tiles, heads, R * n_keys, d)."""
        parts = [source[row.low : row.high, low : low + self.n_keys] for low in self.lows]
        return torch.stack(parts).to(dtype).flatten(1, 2).transpose(1, 2)

    @cached_property
    def _columns(self):
        pairs = zip(self.tiles, self.lows, strict=True)
        return _bias(torch.stack([tile.outside(low, low + self.n_keys, self.length) for tile, low in pairs]))

    def bias(self, row, like):
        """(tiles, 1, R, n_keys, T, length): minus infinity where a query does not look; None if all look everywhere."""
        if row.bias is None and self._columns is None:
            return None
        zero = like.new_zeros(1, 1)
        rows, cols = (zero if part is None else part.to(like) for part in (row.bias, self._columns))
        if cols is zero:
            cols = zero.expand(1, self.n_keys, self.length)
        elif rows is zero:
            rows = zero.expand(row.high - row.low, row.stop - row.start)
        return rows[:, None, :, None] + cols[:, None, None, :, None, :]


def _bias(outside):
    """Boolean (..., queries, keys) as floats (..., keys, queries): minus infinity where true; None where nothing is."""
    if not outside.any():
        return None
    with torch.inference_mode(False):  # they are kept, for training too
        bias = torch.zeros(outside.shape, dtype=torch.float32, device=outside.device)
        return bias.masked_fill_(outside, float("-inf")).mT.contiguous()


@lru_cache(maxsize=64)
def _cut(windows, longest):
    """Cut one axis, at changes of window, into tiles of at most `longest` queries, for the least work."""
    edges = [0]
    for _, run in groupby(windows):
        stop = edges[-1] + len(list(run))
        edges += [*range(edges[-1] + longest, stop, longest), stop]
    best = [(0, None)]
    for i, stop in enumerate(edges[1:], 1):
        low, high = windows[stop - 1]
        options = []
        for j in range(i - 1, -1, -1):
            if stop - edges[j] > longest:
                break
            low, high = min(low, windows[edges[j]][0]), max(high, windows[edges[j]][1])
            options.append((best[j][0] + (TILE_COST + stop - edges[j]) * (high - low), j))
        best.append(min(options))
    tiles, i = [], len(edges) - 1
    while i:
        i, stop = best[i][1], edges[i]
        tiles.append(Tile(windows, edges[i], stop))
    return tuple(tiles[::-1])


def _windows(bounds):
    return tuple(map(tuple, bounds.tolist()))


def _plan(row_bounds, col_bounds, heads, channels, blocks=True):
    """(row tiles, column tiles, whether the keys of a tile come in blocks), within the limits above."""
    axes = [_windows(bounds) for bounds in (row_bounds, col_bounds)]
    for longest in (32, 16, 8, 4, 2, 1):
        rows, cols = (_cut(windows, longest) for windows in axes)
        logits = heads
        for tiles in (rows, cols):
            logits *= max(t.stop - t.start for t in tiles) * max(t.high - t.low for t in tiles)
        if logits <= BATCH or (logits <= LIMIT and (channels > FEW_CHANNELS or not blocks)):
            return rows, cols, False
        if blocks and longest <= 16 and (channels <= FEW_CHANNELS or longest == 8):
            return rows, cols, True
    return rows, cols, False


def _strips(rows, cols, key, heads, channels, batch):
    queries = max(t.stop - t.start for t in rows) * max(t.stop - t.start for t in cols)
    keys = max(t.high - t.low for t in rows) * max(t.high - t.low for t in cols)
    n = max(1, min(batch // (heads * queries * keys), LIMIT // (channels * (queries + keys))))
    return _batched(cols, key.shape[2], n)


@lru_cache(maxsize=64)
def _batched(tiles, n_key, n):
    return [Strip(tiles[i : i + n], n_key) for i in range(0, len(tiles), n)]


def _cost(row, strip):
    """Of one strip, about: every query costs its keys, and its own numbers as much as a few dozen keys."""
    queries, keys = (row.stop - row.start) * strip.length, (row.high - row.low) * strip.n_keys
    return len(strip.tiles) * queries * (keys + 32)


def _compute_dtype(query, value):
    return torch.promote_types(torch.promote_types(query.dtype, value.dtype), torch.float32)


def _weights(row, strip, query, key, scale, dtype, room):
    """Queries (tiles, heads, P, d), scaled keys (tiles, heads, K, d) and weights (tiles, heads, K, P) of one strip.

    Queries lie side by side: a softmax over a few dozen keys is done for many of them at once. Queries and weights lie
    in buffers of `room`.
    """
    q, k = strip.queries(row, query, dtype, room), strip.keys(row, key, dtype).mul(scale)
    logits = room.buffer("weights", (*k.shape[:3], q.shape[2]), q)
    products.bmm(k.flatten(0, 1), q.flatten(0, 1).mT, logits.flatten(0, 1))
    bias = strip.bias(row, logits)
    if bias is not None:
        logits.view(*logits.shape[:2], *bias.shape[2:]).add_(bias)
    return q, k, torch.softmax(logits, -2, out=logits)


def _some(v, queries):
    """Slices of the tiles whose values (tiles, groups, K, c) are to be met at once by so many queries each."""
    several = max(1, OUTPUTS // (v.shape[1] * v.shape[3] * queries)) if v.device.type == "cpu" else len(v)
    return [slice(first, first + several) for first in range(0, len(v), several)]


def _groups(x, heads, head_mode):
    """Channels as (..., groups, C / groups): one group for each set of weights that serves them."""
    return x.unflatten(-1, (heads if head_mode == "split" else 1, -1))


def _forward(row, strip, query, key, value, out, scale, head_mode, room):
    """Write the output (H', W', C) of one strip."""
    weights = _weights(row, strip, query, key, scale, _compute_dtype(query, value), room)[2]
    n, heads, keys, queries = weights.shape
    if head_mode == "mean":
        weights = torch.mean(weights, 1, keepdim=True, out=room.buffer("mean", (n, 1, keys, queries), weights))
    value, out = (_groups(x, heads, head_mode) for x in (value, out))
    step = max(1, LIMIT // (n * (queries + keys) * value.shape[2]))
    for v, o in zip(value.split(step, -1), out.split(step, -1), strict=True):
        v = strip.keys(row, v, weights.dtype)
        for part in _some(v, queries):
            some, met = weights[part].flatten(0, 1), v[part]
            result = room.buffer("results", (*met.shape[:2], queries, met.shape[3]), met)
            products.bmm(some.mT, met.flatten(0, 1), result.flatten(0, 1))
            result = result.transpose(1, 2).unflatten(1, (-1, strip.length))
            for tile, pixels in zip(strip.tiles[part], result, strict=True):
                o[row.start : row.stop, tile.start : tile.stop] = pixels[:, : tile.stop - tile.start]


def _backward(row, strip, grad, query, key, value, grad_query, grad_key, grad_value, scale, head_mode):
    """Write the query gradient of one strip, add to those of the keys and values it reads; empty ones are left out."""
    room = Room()
    q, k, weights = _weights(row, strip, query, key, scale, grad_value.dtype, room)
    heads = weights.shape[1]
    grad, v = _groups(grad, heads, head_mode), strip.keys(row, _groups(value, heads, head_mode), q.dtype)
    share = v.shape[1] / heads
    of_value = torch.empty_like(v) if grad_value.numel() else None
    slope = torch.empty_like(weights) if grad_query.numel() else None
    for part in _some(v, weights.shape[3]):
        g = strip.queries(row, grad, q.dtype, Room(), part)
        if slope is not None:
            torch.mul(weights[part], v[part].mul(share) @ g.mT, out=slope[part])
        if of_value is not None:
            shared = weights[part].mean(1, keepdim=True) if head_mode == "mean" else weights[part]
            torch.matmul(shared, g, out=of_value[part])
    sums = []
    if slope is not None:
        slope.addcmul_(weights, slope.sum(-2, keepdim=True), value=-1)
        for_query = (slope.mT @ k).transpose(1, 2).unflatten(1, (-1, strip.length))
        for_key = (slope @ q).mul_(scale).transpose(1, 2)
        for tile, part in zip(strip.tiles, for_query, strict=True):
            grad_query[row.start : row.stop, tile.start : tile.stop] = part[:, : tile.stop - tile.start]
        sums.append((grad_key, for_key))
    if of_value is not None:
        sums.append((grad_value, of_value.transpose(1, 2).flatten(2)))
    for total, parts in sums:
        for low, part in zip(strip.lows, parts, strict=True):
            seen = total[row.low : row.high, low : low + strip.n_keys]
            seen += part.view_as(seen)


def _blocked(row, col, query, key, value, out, scale, head_mode, *_):
    """Write the output (H', W', C) of one tile whose window is long: block after block of keys, running softmax."""
    heads = query.shape[2]
    queries = (row.stop - row.start) * (col.stop - col.start)
    value, out = (_groups(x, heads, head_mode) for x in (value, out))
    q = query[row.start : row.stop, col.start : col.stop].to(_compute_dtype(query, value))
    q = q.flatten(0, 1).transpose(0, 1) * scale
    room = max(1, BATCH // (heads * queries))
    n_cols = min(room, col.high - col.low)
    n_rows = min(max(1, room // n_cols), row.high - row.low)
    step = max(1, LIMIT // (heads * queries + n_rows * n_cols * value.shape[2]))
    for v, o in zip(value.split(step, -1), out.split(step, -1), strict=True):
        # Finite, so that a block a query does not see at all leaves no NaN: the first seen key wipes it out.
        top = torch.full((heads, queries, 1), -1e30, dtype=q.dtype, device=q.device)
        total, summed = torch.zeros_like(top), torch.zeros((), dtype=q.dtype, device=q.device)
        for r in range(row.low, row.high, n_rows):
            for c in range(col.low, col.high, n_cols):
                seen = slice(r, min(r + n_rows, row.high)), slice(c, min(c + n_cols, col.high))
                logits = q @ key[seen].to(q.dtype).flatten(0, 1).permute(1, 2, 0)
                _hide(logits, row, col, *seen)
                higher = torch.maximum(top, logits.amax(-1, keepdim=True))
                keep, top = torch.exp(top - higher), higher
                logits.sub_(top).exp_()
                total = total * keep + logits.sum(-1, keepdim=True)
                summed = summed * keep + logits @ v[seen].to(q.dtype).flatten(0, 1).transpose(0, 1)
        summed /= total
        if head_mode == "mean":
            summed = summed.mean(0, keepdim=True)
        o[row.start : row.stop, col.start : col.stop] = summed.transpose(0, 1).unflatten(0, (-1, col.stop - col.start))


def _hide(logits, row, col, row_keys, col_keys):
    """Push keys outside a query's window far down in `logits` (heads, P, K), touching only what holds some."""
    rows = row.outside(row_keys.start, row_keys.stop, row.stop - row.start)
    cols = col.outside(col_keys.start, col_keys.stop, col.stop - col.start)
    logits = logits.view(-1, len(rows), len(cols), rows.shape[1], cols.shape[1])
    if rows.any():
        logits.masked_fill_(rows.to(logits.device)[:, None, :, None], -1e30)
    inner = [max(low for low, _ in col.windows), min(high for _, high in col.windows)]
    first, last = (min(max(edge, col_keys.start), col_keys.stop) - col_keys.start for edge in inner)
    for part in (slice(0, first), slice(max(first, last), None)):
        if cols[:, part].any():
            logits[..., part].masked_fill_(cols[:, part].to(logits.device)[:, None], -1e30)
