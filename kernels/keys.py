"""Keys: what the image and the features say of each low-resolution cell, merged and projected, for a whole batch.

Everything is float32, for the unified features are 1/M plus a few parts in a hundred thousand. A layer is one kernel:
it puts the statistics of the tiles before it together, applies them as a normalisation on the way in, multiplies, adds
the skip and leaves the statistics of its own tile. Cells are few, so that a program takes few of them and the
statistics are few numbers; where they are many, a kernel of its own puts them together first.

    start   unified features, a plane for each channel, to cells of channels, and their statistics
    layer   half of a ResBlock
    merge   3x3 convolution, reflected at the borders, over the image's channels and those of the features
    project RMSNorm and projection
    unit    features of unit length over their channels
"""

import torch
import triton
import triton.language as tl

from .attention import _dot, _on
from .guidance import NORM_EPS, _narrow, _pixels
from .launches import Launches, cdiv, layout, side_by_side
from .queries import dot_precision
from .tiling import Device

DIMS = (32, 64, 128)
FILTERS = (16, 32, 64, 128, 256)
CELLS = 32  # of a program
FEW_TILES = 256  # whose statistics every program of a layer puts together for itself
TILES = 128  # at a time
COUNTS = ["n_cells", "n_tiles", "seen_tiles", "per_tile", "has_skip", "height", "width"]


@triton.jit
def _store_stats(x, mask_p, count, stats_ptr, image, tile, n_tiles, first_group, GROUPS: tl.constexpr,
                 N: tl.constexpr, PER_GROUP: tl.constexpr):  # fmt: skip
    """Mean and squared deviation over the tile of the groups that the N channels of `x` (P, N) make up."""
    n = count.to(tl.float32) * PER_GROUP
    inside = mask_p.to(tl.float32)[:, None, None]
    x = tl.reshape(x, (x.shape[0], N // PER_GROUP, PER_GROUP)) * inside
    mean = tl.sum(tl.sum(x, 2), 0) / n
    gap = (x - mean[None, :, None]) * inside
    spread = tl.sum(tl.sum(gap * gap, 2), 0)
    group = first_group + tl.arange(0, N // PER_GROUP)
    ptrs = stats_ptr + (image * (2 * GROUPS) + group) * n_tiles + tile
    tl.store(ptrs, mean)
    tl.store(ptrs + GROUPS * n_tiles, spread)


@triton.jit
def _gathered(stats_ptr, image, n_cells, n_tiles, per_tile, GROUPS: tl.constexpr, PER_GROUP: tl.constexpr,
              BLOCK_T: tl.constexpr):  # fmt: skip
    """Mean and variance (GROUPS,) over an image, from tiles of `per_tile` cells; no large numbers are subtracted."""
    rows = stats_ptr + image * (2 * GROUPS * n_tiles) + (tl.arange(0, GROUPS) * n_tiles)[:, None]
    total = tl.zeros((GROUPS, BLOCK_T), tl.float32)
    for first in tl.range(0, n_tiles, BLOCK_T, num_stages=1):
        tile = first + tl.arange(0, BLOCK_T)
        share = tl.where(tile < n_tiles, tl.minimum(per_tile, n_cells - tile * per_tile), 0).to(tl.float32)
        total += tl.load(rows + tile[None, :], mask=(tile < n_tiles)[None, :], other=0.0) * share[None, :]
    mean = tl.sum(total, 1) / n_cells
    total = tl.zeros((GROUPS, BLOCK_T), tl.float32)
    for first in tl.range(0, n_tiles, BLOCK_T, num_stages=1):
        tile = first + tl.arange(0, BLOCK_T)
        mask = (tile < n_tiles)[None, :]
        share = tl.where(tile < n_tiles, tl.minimum(per_tile, n_cells - tile * per_tile), 0).to(tl.float32)
        gap = tl.load(rows + tile[None, :], mask=mask, other=0.0) - mean[:, None]
        spread = tl.load(rows + GROUPS * n_tiles + tile[None, :], mask=mask, other=0.0)
        total += spread / PER_GROUP + gap * gap * share[None, :]
    return mean, tl.sum(total, 1) / n_cells


@triton.jit
def _combine_kernel(
    stats_ptr, out_ptr, n_cells, n_tiles, per_tile,
    GROUPS: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Statistics of many tiles as those of one, which is the whole image."""
    image = tl.program_id(0).to(tl.int64)
    mean, variance = _gathered(stats_ptr, image, n_cells, n_tiles, per_tile, GROUPS, PER_GROUP, BLOCK_T)
    out_ptrs = out_ptr + image * (2 * GROUPS) + tl.arange(0, GROUPS)
    tl.store(out_ptrs, mean)
    tl.store(out_ptrs + GROUPS, variance * PER_GROUP * n_cells)


@triton.jit
def _of_channels(groups, offs_k, GROUPS: tl.constexpr, PER_GROUP: tl.constexpr):
    """What is known of groups (GROUPS,) for channels (K,)."""
    member = (offs_k // PER_GROUP)[:, None] == tl.arange(0, GROUPS)[None, :]
    return tl.sum(tl.where(member, groups[None, :], 0.0), 1)


@triton.jit
def _multiplied(
    x_ptr, stats_ptr, gain_ptr, bias_ptr, weight_ptr, image, offs_p, mask_p, n_cells, n_tiles, per_tile, origin,
    IN: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """weight @ silu(norm(x)), (P, D); `origin` is taken from x first, as it was from the statistics."""
    PER_GROUP: tl.constexpr = IN // GROUPS
    mean, variance = _gathered(stats_ptr, image, n_cells, n_tiles, per_tile, GROUPS, PER_GROUP, BLOCK_T)
    inverse = 1.0 / tl.sqrt(variance + NORM_EPS)
    offs_row = (image * n_cells + offs_p) * IN
    offs_d = tl.arange(0, D)
    acc = tl.zeros((BLOCK_P, D), tl.float32)
    for first in tl.range(0, IN, BLOCK_K, num_stages=STAGES):
        offs_k = first + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + offs_row[:, None] + offs_k[None, :], mask=mask_p[:, None], other=0.0)
        scale = _of_channels(inverse, offs_k, GROUPS, PER_GROUP) * tl.load(gain_ptr + offs_k)
        middle = _of_channels(mean, offs_k, GROUPS, PER_GROUP)
        x = (x - origin - middle[None, :]) * scale[None, :] + tl.load(bias_ptr + offs_k)[None, :]
        x = x / (1.0 + tl.exp(-x))
        w = tl.load(weight_ptr + offs_d[None, :] * IN + offs_k[:, None])
        acc = _dot(x, w, acc, PRECISION)
    return acc


@triton.jit
def _skipped(
    acc, skip_ptr, skip_weight_ptr, image, offs_p, mask_p, n_cells, has_skip,
    SKIP: tl.constexpr, D: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`acc` plus the skip, of SKIP channels: as it is, or multiplied where it has another width than D."""
    offs_row = (image * n_cells + offs_p) * SKIP
    offs_d = tl.arange(0, D)
    if SKIP == D:
        mask = (offs_p < n_cells * has_skip)[:, None]
        acc += tl.load(skip_ptr + offs_row[:, None] + offs_d[None, :], mask=mask, other=0.0)
    else:
        for first in tl.range(0, SKIP, BLOCK_K, num_stages=STAGES):
            offs_k = first + tl.arange(0, BLOCK_K)
            x = tl.load(skip_ptr + offs_row[:, None] + offs_k[None, :], mask=mask_p[:, None], other=0.0)
            w = tl.load(skip_weight_ptr + offs_d[None, :] * SKIP + offs_k[:, None])
            acc = _dot(x, w, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=COUNTS)
def _start_kernel(
    x_ptr, out_ptr, stats_ptr, n_cells, n_tiles, origin,
    M: tl.constexpr, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Planes (M, cells) as cells (cells, M), and the statistics of what lies beyond `origin`."""
    image, tile, offs_p, mask_p, count = _pixels(tl.program_id(0), n_tiles, n_cells, BLOCK_P)
    offs_m = tl.arange(0, M)
    ptrs = x_ptr + (image * M + offs_m)[None, :] * n_cells + offs_p[:, None]
    x = tl.load(ptrs, mask=mask_p[:, None], other=0.0)
    tl.store(out_ptr + ((image * n_cells + offs_p) * M)[:, None] + offs_m[None, :], x, mask=mask_p[:, None])
    _store_stats(x - origin, mask_p, count, stats_ptr, image, tile, n_tiles, 0, GROUPS, M, M // GROUPS)


@triton.jit(do_not_specialize=COUNTS)
def _layer_kernel(
    x_ptr, stats_ptr, gain_ptr, bias_ptr, weight_ptr, skip_ptr, skip_weight_ptr, out_ptr, out_stats_ptr,
    n_cells, n_tiles, seen_tiles, per_tile, has_skip, origin,
    IN: tl.constexpr, SKIP: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """skip + weight @ silu(norm(x)), and its statistics; those of x are of `seen_tiles` tiles."""
    image, tile, offs_p, mask_p, count = _pixels(tl.program_id(0), n_tiles, n_cells, BLOCK_P)
    acc = _multiplied(x_ptr, stats_ptr, gain_ptr, bias_ptr, weight_ptr, image, offs_p, mask_p, n_cells, seen_tiles,
                      per_tile, origin, IN, D, GROUPS, BLOCK_P, BLOCK_T, BLOCK_K, PRECISION, STAGES)  # fmt: skip
    acc = _skipped(acc, skip_ptr, skip_weight_ptr, image, offs_p, mask_p, n_cells, has_skip, SKIP, D, BLOCK_K,
                   PRECISION, STAGES)  # fmt: skip
    out_ptrs = out_ptr + ((image * n_cells + offs_p) * D)[:, None] + tl.arange(0, D)[None, :]
    tl.store(out_ptrs, acc, mask=mask_p[:, None])
    _store_stats(acc, mask_p, count, out_stats_ptr, image, tile, n_tiles, 0, GROUPS, D, D // GROUPS)


@triton.jit
def _reflected(place, n):
    """`place`, at most one step outside of 0 to n - 1, reflected; an axis of one place repeats it."""
    place = tl.where(place < 0, -place, place)
    return tl.maximum(tl.where(place < n, place, 2 * n - 2 - place), 0)


@triton.jit(do_not_specialize=[*COUNTS, "image_b", "features_b"])
def _merge_kernel(
    image_ptr, features_ptr, conv_ptr, out_ptr, stats_ptr, image_b, features_b, height, width, n_cells, n_tiles,
    D: tl.constexpr, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """3x3 convolution of the image's and the features' channels, weights (3, 3, 2 * D, D); BLOCK_N channels out."""
    BLOCKS: tl.constexpr = D // BLOCK_N
    PIECES: tl.constexpr = D // BLOCK_K
    image, tile, offs_p, mask_p, count = _pixels(tl.program_id(0) // BLOCKS, n_tiles, n_cells, BLOCK_P)
    first_n = tl.program_id(0) % BLOCKS * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    i = offs_p // width
    j = offs_p % width
    image_ptrs = image_ptr + image * image_b + offs_k[None, :]
    features_ptrs = features_ptr + image * features_b + offs_k[None, :]
    conv_ptrs = conv_ptr + offs_k[:, None] * D + offs_n[None, :]
    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for step in tl.range(0, 9 * PIECES, num_stages=STAGES):
        tap = step // PIECES
        first = step % PIECES * BLOCK_K
        row = _reflected(i + tap // 3 - 1, height)
        col = _reflected(j + tap % 3 - 1, width)
        offs = ((row * width + col).to(tl.int64) * D + first)[:, None]
        w_ptrs = conv_ptrs + (tap * (2 * D) + first) * D
        acc = _dot(tl.load(image_ptrs + offs, mask=mask_p[:, None], other=0.0), tl.load(w_ptrs), acc, PRECISION)
        x = tl.load(features_ptrs + offs, mask=mask_p[:, None], other=0.0)
        acc = _dot(x, tl.load(w_ptrs + D * D), acc, PRECISION)
    out_ptrs = out_ptr + ((image * n_cells + offs_p) * D)[:, None] + offs_n[None, :]
    tl.store(out_ptrs, acc, mask=mask_p[:, None])
    _store_stats(acc, mask_p, count, stats_ptr, image, tile, n_tiles, first_n // (D // GROUPS), GROUPS, BLOCK_N,
                 D // GROUPS)  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def _project_kernel(
    x_ptr, norm_ptr, weight_ptr, bias_ptr, out_ptr, n_cells, n_tiles, eps,
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """RMSNorm and projection; the cells are divided by their length after the product."""
    image, _, offs_p, mask_p, _ = _pixels(tl.program_id(0), n_tiles, n_cells, BLOCK_P)
    offs_row = ((image * n_cells + offs_p) * D)[:, None]
    offs_d = tl.arange(0, D)
    acc = tl.zeros((BLOCK_P, D), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    for first in tl.range(0, D, BLOCK_K, num_stages=STAGES):
        offs_k = first + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + offs_row + offs_k[None, :], mask=mask_p[:, None], other=0.0)
        squares += x * x
        w = tl.load(weight_ptr + offs_d[None, :] * D + offs_k[:, None])
        acc = _dot(x * tl.load(norm_ptr + offs_k)[None, :], w, acc, PRECISION)
    inverse = tl.rsqrt(tl.sum(squares, 1) * (1.0 / D) + eps)
    out = acc * inverse[:, None] + tl.load(bias_ptr + offs_d)[None, :]
    tl.store(out_ptr + offs_row + offs_d[None, :], _narrow(out, out_ptr.dtype.element_ty), mask=mask_p[:, None])


@triton.jit(do_not_specialize=["height", "width", "x_b", "x_c", "x_h", "n_cells", "n_tiles", "channels"])
def _unit_kernel(
    x_ptr, out_ptr, x_b, x_c, x_h, x_w, width, channels, n_cells, n_tiles, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Cells of all their channels divided by their length, or by 1e-12 where that is smaller."""
    image, _, offs_p, mask_p, _ = _pixels(tl.program_id(0), n_tiles, n_cells, BLOCK_P)
    offs_c = tl.arange(0, BLOCK_C)
    offs = (offs_p // width).to(tl.int64) * x_h + (offs_p % width).to(tl.int64) * x_w
    ptrs = x_ptr + image * x_b + offs[:, None] + (offs_c.to(tl.int64) * x_c)[None, :]
    step = tl.cast(x_c, tl.int64)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in tl.range(0, channels, BLOCK_C, num_stages=1):
        mask = mask_p[:, None] & (first + offs_c < channels)[None, :]
        x = tl.load(ptrs + first * step, mask=mask, other=0.0).to(tl.float32)
        squares += x * x
    inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(squares, 1)), 1e-12)
    out_ptrs = out_ptr + ((image * n_cells + offs_p) * channels)[:, None] + offs_c[None, :]
    for first in tl.range(0, channels, BLOCK_C, num_stages=1):
        mask = mask_p[:, None] & (first + offs_c < channels)[None, :]
        x = tl.load(ptrs + first * step, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptrs + first, x * inverse[:, None], mask=mask)


def why_not_keys(dim, filters, num_groups=8):
    """What the kernels don't cover of keys `dim` wide from so many filters: one sentence, or None."""
    if dim not in DIMS:
        return f"needs a qk_dim of {', '.join(map(str, DIMS[:-1]))} or {DIMS[-1]}, got {dim}"
    if filters not in FILTERS:
        return f"needs {', '.join(map(str, FILTERS[:-1]))} or {FILTERS[-1]} filters, got {filters}"
    if num_groups not in (1, 2, 4, 8, 16):
        return f"needs groups of channels, a power of two of them and at most 16, got {num_groups}"
    return None


def plan(device, dim, filters, precision=None):
    """Constants and options of the launches for a `tiling.Device`, a pure function: those of layers and of merging."""
    precision = dot_precision(device, torch.float32, precision)
    layer = dict(BLOCK_P=CELLS, BLOCK_T=TILES, BLOCK_K=min(32, dim, filters), PRECISION=precision, STAGES=2)
    layer.update(num_warps=8, num_stages=2, enable_fp_fusion=True)
    merge = {name: value for name, value in layer.items() if name != "BLOCK_T"}
    return layer, dict(merge, BLOCK_K=min(32, dim), BLOCK_N=min(64, dim))


def prepared(weights):
    """`KeyWeights` as the kernels read them: float32, side by side, (3, 3, in, out) for the convolution."""

    def floats(tensor):
        return side_by_side(tensor.float())

    def blocks(some):
        return tuple(type(block)(*(None if part is None else floats(part) for part in block)) for block in some)

    rest = map(floats, (weights.norm, weights.weight, weights.bias))
    merge = floats(weights.merge.permute(2, 3, 1, 0))
    return type(weights)(blocks(weights.features), merge, blocks(weights.blocks), *rest)


def project_keys_fwd(from_image, from_features, weights, *, eps, dtype, num_groups=8, precision=None, ready=False):
    """Launch the kernels for checked arguments (see `anyup_fast.ops.project_keys`).

    Args:
        from_image: (B, h, w, D), any float dtype. from_features: (B, M, h, w), float32. What is repeated over the batch
            as a view is computed once.
        weights: KeyWeights, any float dtype; with `ready` as `prepared` gives them.
        eps: of the last norm. dtype: of the result. num_groups: of the normalisations.
        precision: of products on CUDA: "tf32x3" (None means this), "tf32" or "ieee".

    Returns:
        (B, h, w, D) in `dtype`. Eleven launches for any batch, eight more on grids of more than `FEW_TILES` tiles.
        Nothing here waits for the device.

    Raises:
        ValueError: no such precision.
    """
    batch, height, width, dim = from_image.shape
    filters = from_features.shape[1]
    with torch.no_grad(), _on(from_image.device):
        weights = weights if ready else prepared(weights)
        source, features = (x[:1] if x.stride(0) == 0 else x for x in (from_image, from_features))
        source, features = source.float().contiguous(), features.float().contiguous()
        card = Device.of(from_image.device)
        key = ("project_keys", card, precision, num_groups, batch, layout(source), layout(features), dtype, ready)
        network = _Network(features, weights, plan(card, dim, filters, precision), num_groups, Launches(key))
        out = torch.empty(batch, height, width, dim, dtype=dtype, device=from_image.device)
        network(source, features, out, eps)
        network.launch.done()
    return out


class _Network:
    """Launches the layers one after the other for all images; holds what all of them need."""

    def __init__(self, like, weights, constants, num_groups, launch):
        self.device, self.weights, self.launch = like.device, weights, launch
        self.layers, self.merging = constants
        self.groups, self.dim = num_groups, len(weights.norm)
        self.height, self.width = like.shape[-2:]
        self.n_cells = self.height * self.width
        self.n_tiles = cdiv(self.n_cells, CELLS)

    def __call__(self, image, features, out, eps):
        weights, batch = self.weights, len(out)
        x, stats, origin = self.start(features)
        for block in weights.features:
            x, stats = self.block(x, stats, block, origin)
            origin = 0.0
        x, stats = self.merge(image, x, batch)
        for block in weights.blocks:
            x, stats = self.block(x, stats, block)
        constants = {name: value for name, value in self.layers.items() if name != "BLOCK_T"}
        self.launch(
            _project_kernel, batch * self.n_tiles, x, weights.norm, weights.weight, weights.bias, out, self.n_cells,
            self.n_tiles, eps, D=self.dim, **constants,
        )  # fmt: skip

    def room(self, batch, channels):
        """Room for a value of every cell and channel, and for the statistics of all tiles."""
        cells = torch.empty(batch, self.n_cells, channels, dtype=torch.float32, device=self.device)
        return cells, torch.empty(batch, 2, self.groups, self.n_tiles, dtype=torch.float32, device=self.device)

    def start(self, features):
        """The features' cells, their statistics, and what was taken from each number for these."""
        batch, filters = features.shape[:2]
        out, stats = self.room(batch, filters)
        # The softmax of the unification gives 1/M on average: what lies beyond it keeps its digits.
        origin = 1.0 / filters
        self.launch(
            _start_kernel, batch * self.n_tiles, features, out, stats, self.n_cells, self.n_tiles, origin, M=filters,
            GROUPS=self.groups, BLOCK_P=CELLS, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        return out, stats, origin

    def seen(self, stats, channels):
        """Statistics as a layer takes them: how many tiles they are of, and how many cells a tile has."""
        if self.n_tiles <= FEW_TILES:
            return stats, self.n_tiles, CELLS
        out = torch.empty(len(stats), 2, self.groups, 1, dtype=torch.float32, device=self.device)
        self.launch(
            _combine_kernel, len(stats), stats, out, self.n_cells, self.n_tiles, CELLS, GROUPS=self.groups,
            PER_GROUP=channels // self.groups, BLOCK_T=TILES, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        return out, 1, self.n_cells

    def layer(self, x, stats, gain, bias, weight, skip=None, skip_weight=None, origin=0.0):
        """Half of a block; `skip` is what is added to the product, multiplied with `skip_weight` if there is one."""
        batch, channels = len(x), x.shape[2]
        out, out_stats = self.room(batch, self.dim)
        stats, seen, per_tile = self.seen(stats, channels)
        self.launch(
            _layer_kernel, batch * self.n_tiles, x, stats, gain, bias, weight, x if skip is None else skip,
            weight if skip_weight is None else skip_weight, out, out_stats, self.n_cells, self.n_tiles, seen, per_tile,
            int(skip is not None), origin, IN=channels, SKIP=self.dim if skip_weight is None else skip.shape[2],
            D=self.dim, GROUPS=self.groups, **self.layers,
        )  # fmt: skip
        return out, out_stats

    def block(self, x, stats, block, origin=0.0):
        """A ResBlock."""
        hidden, stats = self.layer(x, stats, block.norm_in_weight, block.norm_in_bias, block.conv_in, origin=origin)
        return self.layer(hidden, stats, block.norm_out_weight, block.norm_out_bias, block.conv_out, x, block.skip)

    def merge(self, image, features, batch):
        """The convolution over both sources, each of one image or of all."""
        out, stats = self.room(batch, self.dim)
        each = self.n_cells * self.dim
        self.launch(
            _merge_kernel, batch * self.n_tiles * (self.dim // self.merging["BLOCK_N"]), image, features,
            self.weights.merge, out, stats, each * (len(image) > 1), each * (len(features) > 1), self.height,
            self.width, self.n_cells, self.n_tiles, D=self.dim, GROUPS=self.groups, **self.merging,
        )  # fmt: skip
        return out, stats


def unit_channels_fwd(features):
    """Launch the kernel for features (B, C, h, w) of 16 or 32 bits, any strides: `anyup_fast.ops.unit_channels`.

    Returns:
        (B, C, h, w) float32 with the channels side by side in memory. Nothing here waits for the device.
    """
    batch, channels, height, width = features.shape
    with _on(features.device):
        out = torch.empty(batch, height, width, channels, dtype=torch.float32, device=features.device)
        n_cells = height * width
        n_tiles = cdiv(n_cells, CELLS)
        launch = Launches(("unit_channels", Device.of(features.device), layout(features)))
        launch(
            _unit_kernel, batch * n_tiles, features, out, *features.stride(), width, channels, n_cells, n_tiles,
            BLOCK_P=CELLS, BLOCK_C=64, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        launch.done()
    return out.permute(0, 3, 1, 2)
