"""Window rules: which low-resolution rows or columns each output row or column attends to.

Flooring a float is a discontinuity, so the rules are evaluated once, on the CPU, and every back end receives
the same integers. In traced graphs they are operators of their own, which no compiler can reorder.
"""

from functools import lru_cache, wraps

import torch
from torch import Tensor

# Where the compiler cuts graphs into parts that it captures (`mode="reduce-overhead"`), what makes or reads tables on
# the CPU stays outside of them.
UNCAPTURED = {"tags": torch.Tag.cudagraph_unsafe} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


def _kept(rule):
    """`rule` with its last tables kept; in a graph that is traced, the operator of its name in their place."""

    @lru_cache(maxsize=256)
    @torch.inference_mode(False)  # what is kept must serve training as well
    def kept(n_query, n_key, ratio):
        table = rule(n_query, n_key, ratio)
        # By this launchers know it again, without reading it; the version says that nobody has written to it.
        table.made_by = (rule.__name__, n_query, n_key, float(ratio)), table._version
        return table

    @wraps(rule)
    def bounds(n_query, n_key, ratio):
        if torch.compiler.is_compiling():
            return getattr(torch.ops.anyup_fast, rule.__name__)(n_query, n_key, float(ratio))
        return kept(n_query, n_key, ratio)

    bounds.cache_clear = kept.cache_clear
    return bounds


def is_made_for(bounds, n_query, n_key):
    """Whether `bounds` are a kept table of a rule, for so many queries and keys, as it was made."""
    rule, version = getattr(bounds, "made_by", (None, None))
    return rule is not None and rule[1:3] == (n_query, n_key) and bounds._version == version


@_kept
def window_bounds(n_query, n_key, ratio):
    """Bounds along one axis of the windows that cover `ratio` of the axis on either side of a query.

    With `pos = (i + 0.5) / n_query` the window of query `i` is
    `[floor(clamp(pos - ratio, 0, 1) * n_key), ceil(clamp(pos + ratio, 0, 1) * n_key))`, evaluated in float32
    in this order of operations: the published weights were trained with it, and float64 gives other windows
    for many sizes (720 queries on 64 keys, for one).

    Args:
        n_query: number of output rows (or columns), at least 1.
        n_key: number of low-resolution rows (or columns), at least 1.
        ratio: half width of the window as a share of the axis; zero or less means every key.

    Returns:
        int32 tensor (n_query, 2) on the CPU, half-open `[start, end)`, never empty, monotone in both columns.
        It is shared between calls: copy it before writing to it.

    Source: AnyUp (arXiv 2510.12764), section on local window attention.
    """
    if ratio <= 0:
        return torch.tensor([[0, n_key]], dtype=torch.int32, device="cpu").repeat(n_query, 1)
    position = (torch.arange(n_query, dtype=torch.float32, device="cpu") + 0.5) / n_query
    start = ((position - ratio).clamp(0.0, 1.0) * n_key).floor()
    end = ((position + ratio).clamp(0.0, 1.0) * n_key).ceil()
    return torch.stack((start, end), 1).to(torch.int32)


@_kept
def neighborhood_bounds(n_query, n_key, ratio):
    """Bounds along one axis of the published "NATTEN" variant: a fixed number of cells around the query's own.

    The window of query `i` holds `k = max(3, round(2 * ratio * n_key))` keys, made odd by adding one, around the
    key `i // (n_query // n_key)`, and is shifted, not cut, at the borders. Python's `round` is meant: halves go
    to the even neighbour. The rule was made for sizes that divide; elsewhere the queries beyond the last whole
    cell belong to the last key, and with fewer queries than keys the query's key is the one under its centre.

    Args:
        n_query: number of output rows (or columns), at least 1.
        n_key: number of low-resolution rows (or columns), at least 1; never are more than these attended to.
        ratio: half width of the window as a share of the axis; outside (0, 0.5) every key.

    Returns:
        int32 tensor (n_query, 2) as from `window_bounds`, shared between calls in the same way.

    Source: AnyUp (arXiv 2510.12764), published code, neighborhood attention.
    """
    if not 0 < ratio < 0.5:
        return torch.tensor([[0, n_key]], dtype=torch.int32, device="cpu").repeat(n_query, 1)
    size = max(3, round(2 * ratio * n_key))
    size = min(size + 1 - size % 2, n_key)
    query = torch.arange(n_query, device="cpu")
    if n_query >= n_key:
        cell = (query // (n_query // n_key)).clamp(max=n_key - 1)
    else:
        cell = (2 * query + 1) * n_key // (2 * n_query)
    start = (cell - size // 2).clamp(0, n_key - size)
    return torch.stack((start, start + size), 1).to(torch.int32)


@torch.library.custom_op("anyup_fast::window_bounds", mutates_args=(), **UNCAPTURED)
def window_bounds_op(n_query: int, n_key: int, ratio: float) -> Tensor:
    """`anyup_fast.ops.window_bounds` as a traced graph sees it: a table of the caller's own."""
    return window_bounds(n_query, n_key, ratio).clone()


@torch.library.custom_op("anyup_fast::neighborhood_bounds", mutates_args=(), **UNCAPTURED)
def neighborhood_bounds_op(n_query: int, n_key: int, ratio: float) -> Tensor:
    """`anyup_fast.ops.neighborhood_bounds` as a traced graph sees it: a table of the caller's own."""
    return neighborhood_bounds(n_query, n_key, ratio).clone()


@window_bounds_op.register_fake
@neighborhood_bounds_op.register_fake
def _(n_query, n_key, ratio):
    return torch.empty(n_query, 2, dtype=torch.int32, device="cpu")
