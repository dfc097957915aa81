"""The guidance network, forward: from the image to queries and the image's part of the keys.

A layer is one kernel: normalisation as an affine map and SiLU on the way in, the product with a D x D matrix, the skip,
and on the way out mean and squared deviation of every group of channels over the tile, of the values as stored. A small
kernel puts the tiles together in float64, in a fixed order, and gives the affine map of the next layer. A program owns
BLOCK_P whole pixels of one image and reads all it needs of them before it writes, so that layers work in place: three
images of D channels are alive at most.

The image's own statistics follow from its mean and covariance; what its first convolution gives is computed anew
where it is needed, in float32. The last layer of the image encoder rotates its result and multiplies it at once for
both branches. Where a branch ends in fewer pixels, its last product comes after the pooling, with which it commutes.

Of float32 the factors of these products are sums of two float16 (HALVES, see `queries.py`). What a norm gives has a
bound: no number of n is further from their mean than sqrt(n) times the standard deviation. Divided by that, rounded to
a power of two, activations are in the range of float16, and what is rounded off stays below 2 ** -40 of the bound.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .attention import INTERPRETED, _dot, _on, _unit_below
from .launches import Launches, cdiv, layout, side_by_side
from .queries import _dot_halves, in_halves, in_parts
from .tiling import RDNA, Device

NORM_EPS = tl.constexpr(1e-5)
IMAGE_PIXELS = 2048  # of a program that only reads the image
TILES = 2048  # whose statistics are put together at a time, and FEW_TILES where there are no more
FEW_TILES = 512
IMAGE_TILES = 512  # of the image's own statistics at a time
MOST_CHANNELS = 16
DIMS = (32, 64, 128, 256)
# Pooling comes before the last product from this ratio of pixels upwards: what is pooled is stored in float32, twice.
FEWER = 4
NORMS = 12
PER_PROCESSOR = 3  # programs of a layer on a multiprocessor at once, each with its matrix
PROGRAMS = 1024  # that keep a GPU busy while it pools to few cells
POOL_PIXELS = 16  # of a program at a time
POOL_STAGES = 3
LAST_ROWS = 32  # of a program of the last product
TABLES = 16  # of rotation, for as many sizes, that stay with weights that are kept
# Sizes that no kernel gains by knowing: it is not compiled anew for those that 16 divides, or that are 1.
COUNTS = ["image_b", "image_c", "image_h", "n_pixels", "width", "height", "n_tiles", "n_rows", "n_cols", "n_cells",
          "n_blocks", "n_images", "n_splits", "n_programs", "n_turns", "each", "n_all"]  # fmt: skip


@triton.jit
def _narrow(x, dtype: tl.constexpr):
    """Float32 in the dtype that is stored, rounded to the nearest."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter cuts the bits off
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _pixels(pid, n_tiles, n_pixels, BLOCK_P: tl.constexpr):
    """Image, number of the tile in it, its pixels (P,), which of them exist, and how many."""
    image = (pid // n_tiles).to(tl.int64)
    tile = pid % n_tiles
    offs_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    count = tl.minimum(BLOCK_P, n_pixels - tile * BLOCK_P)
    return image, tile, offs_p, offs_p < n_pixels, count


@triton.jit
def _colours(image_ptr, image, image_b, image_c, image_h, image_w, offs_p, mask_p, width, CHANNELS: tl.constexpr):
    """Channels of the image as a tuple of (P,) float32."""
    offs = (offs_p // width).to(tl.int64) * image_h + (offs_p % width).to(tl.int64) * image_w
    colours = ()
    for c in tl.static_range(CHANNELS):
        ptrs = image_ptr + image * image_b + tl.cast(c, tl.int64) * image_c + offs
        colours = colours + (tl.load(ptrs, mask=mask_p, other=0.0).to(tl.float32),)
    return colours


@triton.jit
def _rounded(x):
    """Float32 rounded to the 11 bits of TF32."""
    return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _two_parts(x, second):
    """What TF32 holds of float32, or where `second` what it holds of the rest."""
    high = _rounded(x)
    return tl.where(second, _rounded(x - high), high)


@triton.jit
def _conv(conv_ptr, offs_d, D: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr):
    """Columns `offs_d` of the first convolution, a matrix (CHANNELS, D) of float32, as `_expanded` takes it."""
    offs_c = tl.arange(0, 16)
    if PRECISION == "tf32x3" and 3 * CHANNELS <= 16:
        ptrs = conv_ptr + (offs_c % CHANNELS)[:, None] * D + offs_d[None, :]
        weights = tl.load(ptrs, mask=(offs_c < 3 * CHANNELS)[:, None], other=0.0)
        return _two_parts(weights, (offs_c >= 2 * CHANNELS)[:, None])
    else:
        ptrs = conv_ptr + offs_c[:, None] * D + offs_d[None, :]
        return tl.load(ptrs, mask=(offs_c < CHANNELS)[:, None], other=0.0)


@triton.jit
def _expanded(
    image_ptr, conv, image, image_b, image_c, image_h, image_w, offs_p, mask_p, width, acc,
    CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`acc` plus the first convolution on the image, of which `conv` are some columns (see `_conv`).

    Of few channels the three products of "tf32x3" are one: 16 places are multiplied anyway.
    """
    offs_c = tl.arange(0, 16)
    ONE: tl.constexpr = PRECISION == "tf32x3" and 3 * CHANNELS <= 16
    offs = (offs_p // width).to(tl.int64) * image_h + (offs_p % width).to(tl.int64) * image_w
    channel = offs_c % CHANNELS if ONE else offs_c
    there = offs_c < 3 * CHANNELS if ONE else offs_c < CHANNELS
    ptrs = image_ptr + image * image_b + offs[:, None] + (channel.to(tl.int64) * image_c)[None, :]
    colours = tl.load(ptrs, mask=mask_p[:, None] & there[None, :], other=0.0).to(tl.float32)
    if ONE:
        colours = _two_parts(colours, ((offs_c >= CHANNELS) & (offs_c < 2 * CHANNELS))[None, :])
        return _dot(colours, conv, acc, "tf32")
    else:
        return _dot(colours, conv, acc, PRECISION)


@triton.jit
def _silu(x, CUDA: tl.constexpr, unit=1.0):
    """x / (1 + exp(-x * unit)), by the device's own 2 ** y and 1 / y, which are off by a unit in the last place."""
    denominator = 1.0 + tl.exp2(x * (unit * -1.4426950408889634))
    if CUDA and not INTERPRETED:
        # Triton's division checks ranges: here infinity has the reciprocal zero, and nothing is smaller than one.
        return x * tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [denominator], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return x / denominator


@triton.jit
def _active(x, affine_ptr, image, offs_d, D: tl.constexpr, CUDA: tl.constexpr):
    """silu(norm(x)) for channels `offs_d`, in float32."""
    scale = tl.load(affine_ptr + image * (2 * D) + offs_d)
    shift = tl.load(affine_ptr + image * (2 * D) + D + offs_d)
    return _silu(x.to(tl.float32) * scale[None, :] + shift[None, :], CUDA)


@triton.jit
def _unit_of_norm(units_ptr, n_all, D: tl.constexpr, GROUPS: tl.constexpr):
    """`_unit_below` what a norm gives over `n_all` pixels; its bounds lie behind the units of the matrix."""
    n = tl.cast(n_all, tl.float32) * (D // GROUPS)
    return _unit_below(tl.load(units_ptr + D) * tl.sqrt(n) + tl.load(units_ptr + D + 1))


@triton.jit
def _active_product(
    x, affine_ptr, image, offs_k, w_ptrs, acc, unit, factor,
    D: tl.constexpr, CUDA: tl.constexpr,
):  # fmt: skip
    """`acc` plus the product of silu(norm(x)) / unit and a matrix in two halves, from channels `offs_k`."""
    scale = tl.load(affine_ptr + image * (2 * D) + offs_k) * factor
    shift = tl.load(affine_ptr + image * (2 * D) + D + offs_k) * factor
    return _dot_halves(_silu(x * scale[None, :] + shift[None, :], CUDA, unit), w_ptrs, D * D, acc)


@triton.jit
def _group_sums(x, mask_p, N: tl.constexpr, PER_GROUP: tl.constexpr, PRECISION: tl.constexpr):
    """Sums over the pixels of the tile and the channels of each group, of numbers of 16 bits."""
    # A product that follows another keeps rows of pixels together in a warp. Without it several warps would compute the
    # same activations for the first one.
    G: tl.constexpr = N // PER_GROUP
    COLS: tl.constexpr = G if G > 16 else 16
    member = tl.arange(0, N)[:, None] // PER_GROUP == tl.arange(0, COLS)[None, :]
    sums = _dot(x, tl.where(member, 1.0, 0.0).to(x.dtype), None, PRECISION)
    sums = tl.sum(tl.where(mask_p[:, None], sums, 0.0), 0)
    return tl.sum(tl.reshape(sums, (COLS // G, G)), 0)


@triton.jit
def _stats(wide, x, mask_p, count, N: tl.constexpr, PER_GROUP: tl.constexpr, PRECISION: tl.constexpr):
    """Mean and squared deviation over the tile of each group of N channels: of `wide`, in float32, and `x`, as stored.

    Of 16 bits squares are rounded before they are summed: to the nearest, so that the errors of so many cancel out.
    """
    n = tl.maximum(count * PER_GROUP, 1).to(tl.float32)
    G: tl.constexpr = N // PER_GROUP
    groups = tl.reshape(wide, (x.shape[0], G, PER_GROUP))
    if x.dtype == tl.float32:
        inside = mask_p.to(tl.float32)[:, None, None]
        mean = tl.sum(tl.sum(groups * inside, 2), 0) / n
        gap = groups * inside - mean[None, :, None] * inside
        spread = tl.sum(tl.sum(gap * gap, 2), 0)
    else:
        mean = _group_sums(x, mask_p, N, PER_GROUP, PRECISION) / n
        gap = tl.reshape(groups - mean[None, :, None], (x.shape[0], N))
        spread = _group_sums(_narrow(gap * gap, tl.bfloat16), mask_p, N, PER_GROUP, PRECISION)
    return mean, spread


@triton.jit
def _store_stats(
    mean, spread, stats_ptr, image, place, n_places, first_group,
    GROUPS: tl.constexpr, PER_GROUP: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    group = first_group + tl.arange(0, N // PER_GROUP)
    ptrs = stats_ptr + (image * GROUPS + group) * (2 * n_places) + place
    tl.store(ptrs, mean)
    tl.store(ptrs + n_places, spread)


@triton.jit(do_not_specialize=COUNTS)
def _image_stats_kernel(
    image_ptr, stats_ptr, image_b, image_c, image_h, image_w, n_pixels, width, n_tiles,
    CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Per tile and channel the mean, and the sums of the products of deviations from it; relative to pixel 0."""
    image, tile, offs_p, mask_p, count = _pixels(tl.program_id(0), n_tiles, n_pixels, BLOCK_P)
    colours = _colours(image_ptr, image, image_b, image_c, image_h, image_w, offs_p, mask_p, width, CHANNELS)
    ROWS: tl.constexpr = CHANNELS + CHANNELS * (CHANNELS + 1) // 2
    out_ptrs = stats_ptr + image * (ROWS * n_tiles) + tile
    gaps = ()
    for c in tl.static_range(CHANNELS):
        origin = tl.load(image_ptr + image * image_b + tl.cast(c, tl.int64) * image_c).to(tl.float32)
        x = tl.where(mask_p, colours[c] - origin, 0.0)
        mean = tl.sum(x, 0) / count.to(tl.float32)
        tl.store(out_ptrs, mean)
        out_ptrs += n_tiles
        gaps = gaps + (tl.where(mask_p, x - mean, 0.0),)
    for i in tl.static_range(CHANNELS):
        for j in tl.static_range(i, CHANNELS):
            tl.store(out_ptrs, tl.sum(gaps[i] * gaps[j], 0))
            out_ptrs += n_tiles


@triton.jit
def _weighted(a_ptr, b_ptr, c_ptr, n_pixels, n_tiles, PAIR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    """Mean over all pixels, in float64, of what tiles hold: a, or c plus the product of a and b per pixel."""
    total = tl.zeros((BLOCK,), tl.float64)
    for first in tl.range(0, n_tiles, BLOCK, num_stages=1):
        tile = first + tl.arange(0, BLOCK)
        mask = tile < n_tiles
        count = tl.minimum(BLOCK_P, n_pixels - tile * BLOCK_P).to(tl.float64)
        a = tl.load(a_ptr + tile, mask=mask, other=0.0).to(tl.float64)
        if PAIR:
            b = tl.load(b_ptr + tile, mask=mask, other=0.0).to(tl.float64)
            c = tl.load(c_ptr + tile, mask=mask, other=0.0).to(tl.float64)
            total += tl.where(mask, count * a * b + c, 0.0)
        else:
            total += tl.where(mask, count * a, 0.0)
    return tl.sum(total, 0) / tl.cast(n_pixels, tl.float64)


@triton.jit(do_not_specialize=COUNTS)
def _image_affine_kernel(
    stats_ptr, image_ptr, conv_ptr, weight_ptr, bias_ptr, affine_ptr, image_b, image_c, n_pixels, n_tiles,
    D: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """GroupNorm of the image's first convolution as scale and shift, from the statistics of the image."""
    image = tl.program_id(0).to(tl.int64)
    PER_GROUP: tl.constexpr = D // GROUPS
    offs_d = tl.arange(0, GROUPS)[:, None] * PER_GROUP + tl.arange(0, PER_GROUP)[None, :]
    ROWS: tl.constexpr = CHANNELS + CHANNELS * (CHANNELS + 1) // 2
    base = stats_ptr + image * (ROWS * n_tiles)
    products = base + CHANNELS * n_tiles
    means = ()
    mean = tl.zeros((GROUPS, PER_GROUP), tl.float64)
    for c in tl.static_range(CHANNELS):
        row = base + c * n_tiles
        means = means + (_weighted(row, row, row, n_pixels, n_tiles, False, BLOCK_P, BLOCK),)
        origin = tl.load(image_ptr + image * image_b + tl.cast(c, tl.int64) * image_c).to(tl.float32)
        mean += tl.load(conv_ptr + offs_d + D * c).to(tl.float64) * (means[c] + origin.to(tl.float64))
    variance = tl.zeros((GROUPS, PER_GROUP), tl.float64)
    for i in tl.static_range(CHANNELS):
        for j in tl.static_range(i, CHANNELS):
            rows = base + i * n_tiles, base + j * n_tiles
            product = _weighted(rows[0], rows[1], products, n_pixels, n_tiles, True, BLOCK_P, BLOCK)
            products += n_tiles
            both = tl.load(conv_ptr + offs_d + D * i).to(tl.float64)
            both *= tl.load(conv_ptr + offs_d + D * j).to(tl.float64)
            variance += both * (product - means[i] * means[j]) * (1.0 if i == j else 2.0)
    group_mean = tl.sum(mean, 1) / PER_GROUP
    gap = mean - group_mean[:, None]
    spread = tl.sum(tl.maximum(variance, 0.0) + gap * gap, 1) / PER_GROUP
    scale = tl.load(weight_ptr + offs_d).to(tl.float64) / tl.sqrt(spread + NORM_EPS)[:, None]
    shift = tl.load(bias_ptr + offs_d).to(tl.float64) - group_mean[:, None] * scale
    tl.store(affine_ptr + image * (2 * D) + offs_d, scale.to(tl.float32))
    tl.store(affine_ptr + image * (2 * D) + D + offs_d, shift.to(tl.float32))


@triton.jit(do_not_specialize=COUNTS)
def _affine_kernel(
    stats_ptr, weight_ptr, bias_ptr, affine_ptr, n_pixels, n_tiles, each,
    D: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """GroupNorm as scale and shift, from the statistics that a layer has left; a program per image and group."""
    image = (tl.program_id(0) // GROUPS).to(tl.int64)
    group = tl.program_id(0) % GROUPS
    PER_GROUP: tl.constexpr = D // GROUPS
    row = stats_ptr + (image * GROUPS + group) * (2 * n_tiles)
    total = tl.zeros((BLOCK,), tl.float64)
    square = tl.zeros((BLOCK,), tl.float64)
    for first in tl.range(0, n_tiles, BLOCK, num_stages=1):
        tile = first + tl.arange(0, BLOCK)
        mask = tile < n_tiles
        count = tl.minimum(each, n_pixels - tile * each).to(tl.float64)
        mean = tl.load(row + tile, mask=mask, other=0.0).to(tl.float64)
        spread = tl.load(row + n_tiles + tile, mask=mask, other=0.0).to(tl.float64)
        total += tl.where(mask, count * mean, 0.0)
        square += tl.where(mask, count * mean * mean + spread / PER_GROUP, 0.0)
    mean = tl.sum(total, 0) / tl.cast(n_pixels, tl.float64)
    variance = tl.maximum(tl.sum(square, 0) / tl.cast(n_pixels, tl.float64) - mean * mean, 0.0)
    offs_d = group * PER_GROUP + tl.arange(0, PER_GROUP)
    scale = tl.load(weight_ptr + offs_d).to(tl.float64) / tl.sqrt(variance + NORM_EPS)
    shift = tl.load(bias_ptr + offs_d).to(tl.float64) - mean * scale
    tl.store(affine_ptr + image * (2 * D) + offs_d, scale.to(tl.float32))
    tl.store(affine_ptr + image * (2 * D) + D + offs_d, shift.to(tl.float32))


@triton.jit
def _merged(n, mean, spread, more, more_mean, more_spread):
    """Number, mean and squared deviation of two sets put together."""
    both = n + more
    share = more / tl.maximum(both, 1.0)
    gap = more_mean - mean
    return both, mean + gap * share, spread + more_spread + gap * gap * (n * share)


@triton.jit(do_not_specialize=COUNTS)
def _layer_kernel(
    x_ptr, affine_ptr, weight_ptr, units_ptr, skip_ptr, out_ptr, stats_ptr, image_ptr, conv_ptr,
    image_b, image_c, image_h, image_w, n_pixels, width, n_programs, n_turns, n_all,
    D: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, FROM_IMAGE: tl.constexpr, SKIP: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    IMAGE_PRECISION: tl.constexpr, STAGES: tl.constexpr, CUDA: tl.constexpr, LOOP: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """skip + weight @ silu(norm(x)); x is stored or made from the image, SKIP is "none", "stored" or "image".

    A program works on `n_turns` tiles one after the other, on one tile without LOOP. Of matrices in halves `units_ptr`
    has the units and two bounds of the norm, which was made over `n_all` pixels of an image.
    """
    image = (tl.program_id(0) // n_programs).to(tl.int64)
    program = tl.program_id(0) % n_programs
    offs_d = tl.arange(0, D)
    WHOLE: tl.constexpr = BLOCK_K == D and not HALVES
    if WHOLE:  # stays in shared memory
        w = tl.load(weight_ptr + offs_d[None, :] * D + offs_d[:, None])
    if (FROM_IMAGE and WHOLE) or (SKIP == "image" and LOOP):
        conv = _conv(conv_ptr, offs_d, D, CHANNELS, IMAGE_PRECISION)
    if HALVES:
        unit, factor = _unit_of_norm(units_ptr, n_all, D, GROUPS)
    done = 0.0
    mean = tl.zeros((GROUPS,), tl.float32)
    spread = tl.zeros((GROUPS,), tl.float32)
    for turn in tl.range(0, n_turns if LOOP else 1, num_stages=2):
        start = (program * n_turns + turn) * BLOCK_P
        offs_p = start + tl.arange(0, BLOCK_P)
        mask_p = offs_p < n_pixels
        count = tl.minimum(tl.maximum(n_pixels - start, 0), BLOCK_P)
        offs_row = (image * n_pixels + offs_p) * D
        acc = tl.zeros((BLOCK_P, D), tl.float32)
        if WHOLE:
            if FROM_IMAGE:
                x = _expanded(image_ptr, conv, image, image_b, image_c, image_h, image_w, offs_p, mask_p, width, None,
                              CHANNELS, IMAGE_PRECISION)  # fmt: skip
            else:
                x = tl.load(x_ptr + offs_row[:, None] + offs_d[None, :], mask=mask_p[:, None], other=0.0)
            acc = _dot(_narrow(_active(x, affine_ptr, image, offs_d, D, CUDA), w.dtype), w, acc, PRECISION)
        else:
            for first in tl.range(0, D, BLOCK_K, num_stages=STAGES):
                offs_k = first + tl.arange(0, BLOCK_K)
                if FROM_IMAGE:
                    part = _conv(conv_ptr, offs_k, D, CHANNELS, IMAGE_PRECISION)
                    x = _expanded(image_ptr, part, image, image_b, image_c, image_h, image_w, offs_p, mask_p, width,
                                  None, CHANNELS, IMAGE_PRECISION)  # fmt: skip
                else:
                    x = tl.load(x_ptr + offs_row[:, None] + offs_k[None, :], mask=mask_p[:, None], other=0.0)
                w_ptrs = weight_ptr + offs_d[None, :] * D + offs_k[:, None]
                if HALVES:
                    acc = _active_product(x, affine_ptr, image, offs_k, w_ptrs, acc, unit, factor, D, CUDA)
                else:
                    w = tl.load(w_ptrs)
                    acc = _dot(_narrow(_active(x, affine_ptr, image, offs_k, D, CUDA), w.dtype), w, acc, PRECISION)
        if HALVES:
            acc *= (tl.load(units_ptr + offs_d) * unit)[None, :]
        if SKIP == "image":
            if not LOOP:
                conv = _conv(conv_ptr, offs_d, D, CHANNELS, IMAGE_PRECISION)
            acc = _expanded(image_ptr, conv, image, image_b, image_c, image_h, image_w, offs_p, mask_p, width, acc,
                            CHANNELS, IMAGE_PRECISION)  # fmt: skip
        if SKIP == "stored":
            ptrs = skip_ptr + offs_row[:, None] + offs_d[None, :]
            acc += tl.load(ptrs, mask=mask_p[:, None], other=0.0).to(tl.float32)
        out = _narrow(acc, out_ptr.dtype.element_ty)
        # What is written may be what other threads of this program read. In the loop, which a barrier would keep from
        # copying ahead, all copies of a tile have arrived before the first thread goes on.
        if not LOOP:
            tl.debug_barrier()
        tl.store(out_ptr + offs_row[:, None] + offs_d[None, :], out, mask=mask_p[:, None])
        # Few registers are left where operands lie in them.
        wide = acc if LOOP else out.to(tl.float32)
        more_mean, more_spread = _stats(wide, out, mask_p, count, D, D // GROUPS, PRECISION)
        more = (count * (D // GROUPS)).to(tl.float32)
        done, mean, spread = _merged(done, mean, spread, more, more_mean, more_spread)
    _store_stats(mean, spread, stats_ptr, image, program, n_programs, 0, GROUPS, D // GROUPS, D)


@triton.jit(do_not_specialize=COUNTS)
def _rotation_kernel(freqs_ptr, table_ptr, height, width, D: tl.constexpr):
    """Cosine and sine of what each row, then each column, contributes to the angles: (H + W, 2, D)."""
    place = tl.program_id(0)
    offs_d = tl.arange(0, D)
    of_row = place < height
    index = tl.where(of_row, place, place - height)
    steps = tl.maximum(tl.where(of_row, height, width) - 1, 1)
    freqs = tl.load(freqs_ptr + tl.where(of_row, 0, D) + offs_d).to(tl.float64)
    angle = freqs * (index.to(tl.float64) / steps.to(tl.float64))
    out_ptrs = table_ptr + place.to(tl.int64) * (2 * D) + offs_d
    tl.store(out_ptrs, tl.cos(angle).to(tl.float32))
    tl.store(out_ptrs + D, tl.sin(angle).to(tl.float32))


@triton.jit
def _rotation(table_ptr, row, col, mask_p, offs_d, D: tl.constexpr):
    """Cosine and sine of the angles of pixels, for channels `offs_d`; `row` and `col` are lines of the table."""
    mask = mask_p[:, None]
    row_ptrs = table_ptr + (row.to(tl.int64) * (2 * D))[:, None] + offs_d[None, :]
    col_ptrs = table_ptr + (col.to(tl.int64) * (2 * D))[:, None] + offs_d[None, :]
    row_cos = tl.load(row_ptrs, mask=mask, other=0.0)
    row_sin = tl.load(row_ptrs + D, mask=mask, other=0.0)
    col_cos = tl.load(col_ptrs, mask=mask, other=0.0)
    col_sin = tl.load(col_ptrs + D, mask=mask, other=0.0)
    return row_cos * col_cos - row_sin * col_sin, row_sin * col_cos + row_cos * col_sin


@triton.jit
def _branch(
    lower, upper, weight_ptr, units_ptr, unit, out_ptr, stats_ptr, image, tile, n_tiles, offs_row, mask_p, count,
    D: tl.constexpr, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """First product of a branch on the guide, which comes as its lower and upper half of the channels.

    With HALVES they come divided by `unit`.
    """
    HALF: tl.constexpr = D // 2
    PER_GROUP: tl.constexpr = D // GROUPS
    offs_h = tl.arange(0, HALF)
    for first in tl.range(0, D, BLOCK_N, num_stages=1):
        offs_n = first + tl.arange(0, BLOCK_N)
        w_ptrs = weight_ptr + offs_n[None, :] * D + offs_h[:, None]
        if HALVES:
            acc = _dot_halves(lower, w_ptrs, D * D, tl.zeros((lower.shape[0], BLOCK_N), tl.float32))
            acc = _dot_halves(upper, w_ptrs + HALF, D * D, acc) * (tl.load(units_ptr + offs_n) * unit)[None, :]
        else:
            acc = _dot(lower, tl.load(w_ptrs), None, PRECISION)
            acc = _dot(upper, tl.load(w_ptrs + HALF), acc, PRECISION)
        out = _narrow(acc, out_ptr.dtype.element_ty)
        tl.store(out_ptr + offs_row[:, None] + offs_n[None, :], out, mask=mask_p[:, None])
        mean, spread = _stats(acc, out, mask_p, count, BLOCK_N, PER_GROUP, PRECISION)
        _store_stats(mean, spread, stats_ptr, image, tile, n_tiles, first // PER_GROUP, GROUPS, PER_GROUP, BLOCK_N)


@triton.jit(do_not_specialize=COUNTS)
def _guide_kernel(
    x_ptr, affine_ptr, weight_ptr, units_ptr, skip_ptr, table_ptr, query_weight_ptr, query_units_ptr, key_weight_ptr,
    key_units_ptr, query_ptr, key_ptr, query_stats_ptr, key_stats_ptr, n_pixels, height, width, n_tiles, n_all,
    D: tl.constexpr, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, CUDA: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Last layer of the image encoder, rotated, and the first product of either branch."""
    image, tile, offs_p, mask_p, count = _pixels(tl.program_id(0), n_tiles, n_pixels, BLOCK_P)
    HALF: tl.constexpr = D // 2
    offs_h = tl.arange(0, HALF)
    offs_row = (image * n_pixels + offs_p) * D
    lower = tl.zeros((BLOCK_P, HALF), tl.float32)
    upper = tl.zeros((BLOCK_P, HALF), tl.float32)
    unit = 1.0
    if HALVES:
        unit, factor = _unit_of_norm(units_ptr, n_all, D, GROUPS)
    for first in tl.range(0, D, BLOCK_K, num_stages=STAGES):
        offs_k = first + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + offs_row[:, None] + offs_k[None, :], mask=mask_p[:, None], other=0.0)
        w_ptrs = weight_ptr + offs_h[None, :] * D + offs_k[:, None]
        if HALVES:
            lower = _active_product(x, affine_ptr, image, offs_k, w_ptrs, lower, unit, factor, D, CUDA)
            upper = _active_product(x, affine_ptr, image, offs_k, w_ptrs + HALF * D, upper, unit, factor, D, CUDA)
        else:
            w = tl.load(w_ptrs)
            a = _narrow(_active(x, affine_ptr, image, offs_k, D, CUDA), w.dtype)
            lower = _dot(a, w, lower, PRECISION)
            upper = _dot(a, tl.load(w_ptrs + HALF * D), upper, PRECISION)
    if HALVES:
        lower *= (tl.load(units_ptr + offs_h) * unit)[None, :]
        upper *= (tl.load(units_ptr + HALF + offs_h) * unit)[None, :]
    skip_ptrs = skip_ptr + offs_row[:, None] + offs_h[None, :]
    lower += tl.load(skip_ptrs, mask=mask_p[:, None], other=0.0).to(tl.float32)
    upper += tl.load(skip_ptrs + HALF, mask=mask_p[:, None], other=0.0).to(tl.float32)
    row = offs_p // width
    col = height + offs_p % width
    cos, sin = _rotation(table_ptr, row, col, mask_p, offs_h, D)
    first_half = _narrow(lower * cos - upper * sin, x_ptr.dtype.element_ty)
    cos, sin = _rotation(table_ptr, row, col, mask_p, HALF + offs_h, D)
    second_half = _narrow(upper * cos + lower * sin, x_ptr.dtype.element_ty)
    if HALVES:  # in the unit of the largest finite number, for this has no bound
        most = tl.maximum(tl.abs(first_half), tl.abs(second_half))
        unit, factor = _unit_below(tl.max(tl.max(tl.where(most < float("inf"), most, 0.0), 1), 0))
        first_half *= factor
        second_half *= factor
    tl.debug_barrier()  # the branches write over x and the skip
    _branch(first_half, second_half, query_weight_ptr, query_units_ptr, unit, query_ptr, query_stats_ptr, image, tile,
            n_tiles, offs_row, mask_p, count, D, GROUPS, BLOCK_N, PRECISION, HALVES)  # fmt: skip
    _branch(first_half, second_half, key_weight_ptr, key_units_ptr, unit, key_ptr, key_stats_ptr, image, tile,
            n_tiles, offs_row, mask_p, count, D, GROUPS, BLOCK_N, PRECISION, HALVES)  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def _pool_kernel(
    x_ptr, y_ptr, affine_ptr, x_out_ptr, y_out_ptr, height, width, n_rows, n_cols, n_cells, n_blocks, n_images,
    n_splits,
    D: tl.constexpr, ACTIVE: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr,
    CUDA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Means over the cells of adaptive_avg_pool2d, of x and (ACTIVE) of silu(norm(y)).

    A program takes BLOCK_J cells of one image and the rows of one split of them; splits add up. Outputs are
    (splits, B, n_rows * n_cols, D).
    """
    pid = tl.program_id(0)
    offs_d = pid % (D // BLOCK_D) * BLOCK_D + tl.arange(0, BLOCK_D)
    pid = pid // (D // BLOCK_D)
    split = (pid % n_splits).to(tl.int64)
    pid = pid // n_splits
    image = (pid // n_blocks).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_J * BLOCK_X)
    offs_j = (pid % n_blocks) * BLOCK_J + offs_r // BLOCK_X
    mask_j = offs_j < n_cells
    cell = tl.minimum(offs_j, n_cells - 1)
    i = (cell // n_cols).to(tl.int64)
    j = (cell % n_cols).to(tl.int64)
    top = i * height // n_rows
    rows = ((i + 1) * height + n_rows - 1) // n_rows - top
    left = j * width // n_cols
    right = ((j + 1) * width + n_cols - 1) // n_cols
    start = top + rows * split // n_splits
    stop = top + rows * (split + 1) // n_splits
    x_sum = tl.zeros((BLOCK_J * BLOCK_X, BLOCK_D), tl.float32)
    y_sum = tl.zeros((BLOCK_J * BLOCK_X, BLOCK_D), tl.float32)
    pieces = tl.cdiv(tl.max(right - left, 0).to(tl.int32), BLOCK_X)
    for step in tl.range(0, tl.max(stop - start, 0).to(tl.int32) * pieces, num_stages=STAGES):
        line = start + step // pieces
        col = left + step % pieces * BLOCK_X + offs_r % BLOCK_X
        mask = (mask_j & (line < stop) & (col < right))[:, None]
        offs = (((image * height + line) * width + col) * D)[:, None] + offs_d[None, :]
        x_sum += tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if ACTIVE:
            y = tl.load(y_ptr + offs, mask=mask, other=0.0)
            y_sum += tl.where(mask, _active(y, affine_ptr, image, offs_d, D, CUDA), 0.0)
    # Multiplied after the sum: fused with it, the product would be rounded otherwise in some threads than in others.
    area = tl.max(tl.reshape((rows * (right - left)).to(tl.float32), (BLOCK_J, BLOCK_X)), 1)
    share = (1.0 / area)[:, None]
    cells = (pid % n_blocks) * BLOCK_J + tl.arange(0, BLOCK_J)
    offs_out = (((split * n_images + image) * n_cells + cells) * D)[:, None] + offs_d[None, :]
    mask_out = (cells < n_cells)[:, None]
    x_mean = tl.sum(tl.reshape(x_sum, (BLOCK_J, BLOCK_X, BLOCK_D)), 1) * share
    tl.store(x_out_ptr + offs_out, _narrow(x_mean, x_out_ptr.dtype.element_ty), mask=mask_out)
    if ACTIVE:
        y_mean = tl.sum(tl.reshape(y_sum, (BLOCK_J, BLOCK_X, BLOCK_D)), 1) * share
        tl.store(y_out_ptr + offs_out, _narrow(y_mean, y_out_ptr.dtype.element_ty), mask=mask_out)


@triton.jit(do_not_specialize=COUNTS)
def _last_kernel(
    x_ptr, y_ptr, weight_ptr, out_ptr, n_rows, n_splits,
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x + weight @ y for what was pooled, (splits, rows, D), in float32 whatever the outcome is stored in."""
    offs_n = tl.program_id(0) % (D // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_p = tl.program_id(0) // (D // BLOCK_N) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = (offs_p < n_rows)[:, None]
    offs_row = (offs_p.to(tl.int64) * D)[:, None]
    per_split = tl.cast(n_rows, tl.int64) * D
    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for first in tl.range(0, D, BLOCK_K, num_stages=1):
        offs_k = first + tl.arange(0, BLOCK_K)
        y = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
        for split in tl.range(0, n_splits, num_stages=1):
            y += tl.load(y_ptr + split * per_split + offs_row + offs_k[None, :], mask=mask, other=0.0)
        w = tl.load(weight_ptr + offs_n[None, :] * D + offs_k[:, None]).to(tl.float32)
        acc = _dot(y, w, acc, PRECISION)
    for split in tl.range(0, n_splits, num_stages=1):
        acc += tl.load(x_ptr + split * per_split + offs_row + offs_n[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + offs_row + offs_n[None, :], _narrow(acc, out_ptr.dtype.element_ty), mask=mask)


def tile_sizes(dtype, dim, device, halves=False):
    """Constants and options of the launches for what is stored in `dtype`, `dim` channels wide, on a `tiling.Device`.

    Returns:
        two dicts, of the layers and of the last layer of the image encoder: BLOCK_P pixels, BLOCK_K channels in at a
        time, BLOCK_N channels out at a time (the latter only), LOOP, whether programs work on several tiles (the former
        only), CUDA, HALVES, num_warps, num_stages, and maxnreg where registers are to be saved.
    """
    # Without the matrix units of sm_90 and sm_100 operands lie in registers.
    old = device.kind == "cuda" and device.capability[0] not in (9, 10)
    large = dim > 128
    common = dict(CUDA=device.kind == "cuda", HALVES=halves)
    if dtype == torch.float32:
        layer = dict(common, BLOCK_P=32 if large else 64, BLOCK_K=32, num_warps=8 if old or large else 4)
        layer["num_stages"] = 1 if large and device.family == "gfx950" else 2  # there two take more than 64 KiB
        guide = dict(layer, BLOCK_P=16 if large else 32 if old else 64, BLOCK_N=32, num_warps=8)
        return dict(layer, LOOP=False), guide
    if device.family in RDNA:
        layer = dict(common, BLOCK_P=32, BLOCK_K=32, num_warps=8, num_stages=1)
        return dict(layer, LOOP=False), dict(layer, BLOCK_K=min(dim, 64), BLOCK_N=32)
    layer = dict(common, BLOCK_P=32, BLOCK_K=64, num_warps=8, num_stages=1)
    if large:
        return dict(layer, LOOP=False), dict(layer, BLOCK_P=16, BLOCK_N=64)
    layer.update(BLOCK_P=64, BLOCK_K=dim, num_warps=4)
    # A warp with rows of its own computes their activations once; where operands lie in registers, that is too many.
    guide = dict(layer, BLOCK_N=min(dim, 64), num_warps=8 if old else 4)
    if device.kind == "cuda" and not old:
        layer["LOOP"] = True
        if device.capability[0] == 9:  # so few registers that PER_PROCESSOR programs fit on a multiprocessor
            layer["maxnreg"] = 168
        return layer, guide
    return dict(layer, LOOP=False), guide


def why_not_guidance(image_channels, qk_dim, dtype, num_groups=8):
    """What the kernels don't cover of a network: one sentence, or None where they cover it all.

    Args:
        image_channels: of the image. qk_dim: width D. dtype: of what is stored. num_groups: of the normalisations.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"needs float32, bfloat16 or float16, got {str(dtype).removeprefix('torch.')}"
    if not 1 <= image_channels <= MOST_CHANNELS:
        return f"needs an image of 1 to {MOST_CHANNELS} channels, got {image_channels}"
    if qk_dim not in DIMS:
        return f"needs a qk_dim of {', '.join(map(str, DIMS[:-1]))} or {DIMS[-1]}, got {qk_dim}"
    if num_groups not in (1, 2, 4, 8, 16, 32) or qk_dim // num_groups > 32:
        return f"needs groups of 1 to 32 channels, a power of two of them, got {num_groups} of {qk_dim}"
    return None


class Ready(NamedTuple):
    """`GuidanceWeights` as the kernels read them; `prepared` makes it."""

    # (D, D) in the dtype that is stored or (2, D, D) in halves: of the blocks in order, of the queries, of the keys
    matrices: tuple
    units: tuple  # (D + 4,) for each of these in halves: see `prepared`; else None
    norms: tuple  # (weight, bias) of the twelve normalisations
    image_conv: torch.Tensor  # (channels, D) float32
    freqs: torch.Tensor
    query_last: torch.Tensor  # the last matrices of the branches, in the dtype of the parameters
    key_last: torch.Tensor
    dtypes: tuple  # of all of these
    tables: dict  # (H, W) -> table of rotation, where they are kept


def prepared(weights, dtype, halves=False):
    """`Ready` from GuidanceWeights for what is stored in `dtype`; what needs no change is taken as it is.

    With `halves` a matrix is split in two, see `queries.in_parts`. Its units are those of its rows, the largest weight
    and the largest bias of the norm before it, and two numbers that nobody reads.
    """
    blocks = (*weights.image, *weights.query, *weights.key)
    matrices = [matrix for block in blocks for matrix in (block.conv_in, block.conv_out)]
    matrices += [weights.query_conv, weights.key_conv]
    units = (None,) * len(matrices)
    if halves:
        matrices, units = in_parts(torch.stack(matrices).float())
        norms = [torch.stack((block.norm_in_weight, block.norm_in_bias, block.norm_out_weight, block.norm_out_bias))
                 for block in blocks]  # fmt: skip
        most = torch.zeros(len(matrices), 4, device=units.device)
        most[:NORMS, :2] = torch.stack(norms).float().abs().amax(-1).view(NORMS, 2)
        matrices, units = matrices.unbind(), torch.cat((units, most), 1).unbind()
    elif any(matrix.dtype != dtype for matrix in matrices):  # one cast in place of one for each
        matrices = torch.stack(matrices).to(dtype).unbind()
    norms = [(block.norm_in_weight, block.norm_in_bias, block.norm_out_weight, block.norm_out_bias) for block in blocks]
    norms = [side_by_side(part) for parts in norms for part in parts]
    last = weights.query[-1].conv_out, weights.key[-1].conv_out
    rest = list(map(side_by_side, (weights.image_conv.t().float(), weights.freqs, *last)))
    dtypes = tuple(tensor.dtype for tensor in (*norms, *rest))
    pairs = tuple(zip(norms[::2], norms[1::2], strict=True))
    return Ready(tuple(map(side_by_side, matrices)), units, pairs, *rest, dtypes, {})


def guidance_fwd(image, weights, output_size, key_size, *, dtype, num_groups=8, precision=None):
    """Launch the kernels for checked arguments (see `anyup_fast.ops.guidance`).

    Args:
        image: (B, channels, H, W), any float dtype and strides.
        weights: the network's tensors as `anyup_fast.plain.weights.GuidanceWeights`, any float dtype; or what
            `prepared` made of them for `dtype` (in halves: `in_halves`), which then keeps tables of rotation for the
            sizes that it has met.
        output_size: (H', W') of the queries; (0, 0) leaves them out. key_size: (h, w) of the keys.
        dtype: in which full-resolution tensors are stored and multiplied: float32, bfloat16 or float16.
        num_groups: of the normalisations.
        precision: of float32 products: "tf32x3", "tf32" or "ieee"; None means the most exact that is fast, which on
            CUDA are those of two halves each.

    Returns:
        query (B, H', W', D) in `dtype`, before its 3x3 convolution; key (B, h, w, D) and norms (B, 12, 2, D), scale and
        shift of the normalisations of the image, query and key encoders, in float32; norms as a view of (12, B, 2, D).
        Nothing here waits for the device.

    Raises:
        ValueError: a network that `why_not_guidance` has a reason against.
    """
    keep = isinstance(weights, Ready)
    reason = why_not_guidance(image.shape[1], weights.freqs.shape[1], dtype, num_groups)
    if reason is not None:
        raise ValueError(f"weights: {reason}")
    with torch.no_grad(), _on(image.device):
        ready = weights if keep else prepared(weights, dtype, in_halves(Device.of(image.device), dtype, precision))
        network = _Network(image, ready, dtype, num_groups, precision, (tuple(output_size), tuple(key_size)), keep)
        start, key_start, hidden = network.encode()
        key = network.branch(key_start, hidden, 8, key_size, torch.float32, True, ready.key_last)
        del key_start
        pool_first = output_size[0] * output_size[1] * FEWER <= network.n_pixels
        query = network.branch(start, hidden, 4, output_size, dtype, pool_first, ready.query_last)
        del hidden
        if tuple(query.shape[1:3]) != tuple(output_size):
            query = network.pooled(query, output_size)
        network.launch.done()
        return query, key, network.norms.transpose(0, 1)


def guided_queries_fwd(image, weights, norms, output_size, *, dtype, whole, place=(0, 0), num_groups=8, precision=None):
    """Queries of a rectangle of an image whose normalisations are known, from the pixels of the rectangle alone.

    Args:
        image: (B, channels, height, width), the rectangle. weights, dtype, num_groups, precision: as `guidance_fwd`.
        norms: (B, 12, 2, D), that of `guidance_fwd` for the whole image.
        output_size: (H', W') to which the rectangle is pooled; its own size leaves it as it is.
        whole: (H, W) of the image. place: row and column of the rectangle in it.

    Returns:
        (B, H', W', D) in `dtype`. Nothing here waits for the device.
    """
    with torch.no_grad(), _on(image.device):
        keep = isinstance(weights, Ready)
        ready = weights if keep else prepared(weights, dtype, in_halves(Device.of(image.device), dtype, precision))
        given = norms.transpose(0, 1).contiguous()
        options = dtype, num_groups, precision, (tuple(output_size),), keep
        network = _Network(image, ready, *options, given, tuple(whole), tuple(place))
        start, _, hidden = network.encode()
        pool_first = output_size[0] * output_size[1] * FEWER <= network.n_pixels
        query = network.branch(start, hidden, 4, output_size, dtype, pool_first, ready.query_last)
        if tuple(query.shape[1:3]) != tuple(output_size):
            query = network.pooled(query, output_size)
        network.launch.done()
        return query


class _Network:
    """Launches the layers for one image after the other; holds what all of them need.

    With `given`, the norms (12, B, 2, D) of the image of size `whole` that this one is a rectangle of, statistics count
    no more.
    """

    def __init__(self, image, ready, dtype, num_groups, precision, sizes, keep, given=None, whole=None, place=(0, 0)):
        self.image, self.ready, self.dtype = image, ready, dtype
        self.batch, self.channels, self.height, self.width = image.shape
        self.dim, self.n_pixels = ready.freqs.shape[1], self.height * self.width
        device = Device.of(image.device)
        self.precision = precision or ("tf32x3" if device.kind == "cuda" else "ieee")
        halves = ready.units[0] is not None
        self.layer_sizes, self.guide_sizes = tile_sizes(dtype, self.dim, device, halves)
        self.sizes = dict(D=self.dim, GROUPS=num_groups)
        self.programs = max(1, PER_PROCESSOR * device.processors)
        self.given = given is not None
        self.norms = given if self.given else self.empty(NORMS, self.batch, 2, self.dim)
        self.whole, self.place = whole or (self.height, self.width), place
        self.n_all = self.whole[0] * self.whole[1]
        self.keep, self.table = keep, ready.tables.get(self.whole)
        # All tensors but the image begin at a multiple of 16 bytes.
        about = layout(image), self.dim, ready.dtypes, dtype, halves, num_groups, self.precision, self.given
        self.launch = Launches(("guidance", device, *about, self.whole, *sizes, self.table is None))

    def empty(self, *shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=self.image.device)

    def picture(self):
        """Room for a value of every pixel and channel."""
        return self.empty(self.batch, self.height, self.width, self.dim, dtype=self.dtype)

    def stats(self, each):
        """Room for the statistics of pieces of `each` pixels; the number of such pieces in an image."""
        n = cdiv(self.n_pixels, each)
        return self.empty(self.batch, self.sizes["GROUPS"], 2, n), n

    def affine(self, number, stats, each):
        """Scale and shift (B, 2, D) of a normalisation over what `stats` tells of pieces of `each` pixels."""
        out = self.norms[number]
        if self.given:
            return out
        n_tiles = stats.shape[-1]
        self.launch(
            _affine_kernel, self.batch * self.sizes["GROUPS"], stats, *self.ready.norms[number], out, self.n_pixels,
            n_tiles, each, **self.sizes, BLOCK=FEW_TILES if n_tiles <= FEW_TILES else TILES, num_warps=8,
            enable_fp_fusion=True,
        )  # fmt: skip
        return out

    def first_affine(self):
        """Scale and shift of the normalisation of the image's first convolution."""
        if self.given:
            return self.norms[0]
        n_tiles = cdiv(self.n_pixels, IMAGE_PIXELS)
        stats = self.empty(self.batch, self.channels * (self.channels + 3) // 2, n_tiles)
        self.launch(
            _image_stats_kernel, self.batch * n_tiles, self.image, stats, *self.image.stride(), self.n_pixels,
            self.width, n_tiles, CHANNELS=self.channels, BLOCK_P=IMAGE_PIXELS, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
        out = self.norms[0]
        self.launch(
            _image_affine_kernel, self.batch, stats, self.image, self.ready.image_conv, *self.ready.norms[0], out,
            *self.image.stride()[:2], self.n_pixels, n_tiles, **self.sizes, CHANNELS=self.channels,
            BLOCK_P=IMAGE_PIXELS, BLOCK=IMAGE_TILES, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        return out

    def layer(self, x, affine, matrix, out, skip="none", stored=None):
        """Fill `out`, x None standing for the image's first convolution; returns what `affine` takes of it."""
        constants = dict(self.layer_sizes, STAGES=self.layer_sizes["num_stages"])
        if skip == "image":
            constants.pop("maxnreg", None)  # which would spill
        block_p = constants["BLOCK_P"]
        turns = cdiv(cdiv(self.n_pixels, block_p) * self.batch, self.programs) if constants["LOOP"] else 1
        stats, n_programs = self.stats(turns * block_p)
        self.launch(
            _layer_kernel, self.batch * n_programs, out if x is None else x, affine, *self.matrix(matrix),
            out if stored is None else stored, out, stats, self.image, self.ready.image_conv, *self.image.stride(),
            self.n_pixels, self.width, n_programs, turns, self.n_all, **self.sizes, CHANNELS=self.channels,
            FROM_IMAGE=x is None, SKIP=skip, PRECISION=self.product(), IMAGE_PRECISION=self.precision, **constants,
            enable_fp_fusion=True,
        )  # fmt: skip
        return stats, turns * block_p

    def matrix(self, number):
        """A matrix and its units."""
        units = self.ready.units[number]
        return self.ready.matrices[number], self.ready.image_conv if units is None else units

    def product(self):
        """Precision of the products of what is stored."""
        return self.precision if self.dtype == torch.float32 else "ieee"

    def rotation(self):
        """Table of rotation of the rows, then the columns of this image, (height + width, 2, D).

        It is that of the whole image, which was kept or is made anew and stays with kept weights, or the part of it.
        """
        height, width = self.whole
        table = self.table
        if table is None:
            table = self.empty(height + width, 2, self.dim)
            self.launch(
                _rotation_kernel, height + width, self.ready.freqs, table, height, width, D=self.dim, num_warps=4,
                enable_fp_fusion=True,
            )  # fmt: skip
            if self.keep:
                tables = self.ready.tables
                if len(tables) >= TABLES:
                    tables.clear()
                tables[self.whole] = table
        if (self.height, self.width) == self.whole:
            return table
        row, col = self.place[0], height + self.place[1]
        return torch.cat((table[row : row + self.height], table[col : col + self.width]))

    def encode(self):
        """First convolutions of the branches, each a picture and its statistics, and a picture that is free."""
        x, y = self.picture(), self.picture()
        stats = self.layer(None, self.first_affine(), 0, x)
        stats = self.layer(x, self.affine(1, *stats), 1, x, "image")
        stats = self.layer(x, self.affine(2, *stats), 2, y)
        affine = self.affine(3, *stats)
        table = self.rotation()
        block_p = self.guide_sizes["BLOCK_P"]
        (query_stats, n_tiles), (key_stats, _) = self.stats(block_p), self.stats(block_p)
        self.launch(
            _guide_kernel, self.batch * n_tiles, y, affine, *self.matrix(3), x, table, *self.matrix(12),
            *self.matrix(13), x, y, query_stats, key_stats, self.n_pixels, self.height, self.width, n_tiles,
            self.n_all, **self.sizes, PRECISION=self.product(), STAGES=self.guide_sizes["num_stages"],
            **self.guide_sizes, enable_fp_fusion=True,
        )  # fmt: skip
        return (x, (query_stats, block_p)), (y, (key_stats, block_p)), self.picture()

    def branch(self, start, hidden, matrix, size, dtype, pool_first, last):
        """ResBlocks on `start`, a picture (written over) and its statistics; their matrices begin with `matrix`.

        Returns:
            the picture, or with `pool_first` what it comes to at `size`, (B, *size, D) in `dtype`.
        """
        x, stats = start
        for number in (matrix, matrix + 2):  # a matrix has the number of the normalisation before it
            stats = self.layer(x, self.affine(number, *stats), number, hidden)
            affine = self.affine(number + 1, *stats)
            if number > matrix and 0 in size:
                return self.empty(self.batch, *size, self.dim, dtype=dtype)
            if number > matrix and pool_first:
                return self.pooled_last(x, hidden, affine, last, size, dtype)
            stats = self.layer(hidden, affine, number + 1, x, "stored", x)
        return x

    def pool(self, x, y, affine, x_out, y_out, size, n_splits):
        """Means of x, and of the active y unless it is None, over cells; see the kernel."""
        most = cdiv(self.width, size[1]) + (self.width % size[1] > 0)
        block_x = min(POOL_PIXELS, triton.next_power_of_2(most))
        block_j, block_d = POOL_PIXELS // block_x, min(self.dim, 128)
        n_cells = size[0] * size[1]
        n_blocks = cdiv(n_cells, block_j)
        self.launch(
            _pool_kernel, self.batch * n_blocks * n_splits * (self.dim // block_d), x, x if y is None else y,
            x if y is None else affine, x_out, x_out if y is None else y_out, self.height, self.width, *size, n_cells,
            n_blocks, self.batch, n_splits, D=self.dim, ACTIVE=y is not None, BLOCK_J=block_j, BLOCK_X=block_x,
            BLOCK_D=block_d, CUDA=self.layer_sizes["CUDA"], STAGES=POOL_STAGES, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip

    def pooled(self, x, size):
        """A picture in another size."""
        out = self.empty(self.batch, *size, self.dim, dtype=x.dtype)
        self.pool(x, None, None, out, None, size, 1)
        return out

    def pooled_last(self, x, hidden, affine, weight, size, dtype):
        """End of a branch, pooled before its last product."""
        n_rows = self.batch * size[0] * size[1]
        n_splits = min(cdiv(PROGRAMS, n_rows), max(1, self.height // size[0]))
        x_mean, y_mean = (self.empty(n_splits, n_rows, self.dim) for _ in range(2))
        self.pool(x, hidden, affine, x_mean, y_mean, size, n_splits)
        out = self.empty(self.batch, *size, self.dim, dtype=dtype)
        block_n = min(self.dim, 64)
        self.launch(
            _last_kernel, cdiv(n_rows, LAST_ROWS) * (self.dim // block_n), x_mean, y_mean, weight, out, n_rows,
            n_splits, D=self.dim, BLOCK_P=LAST_ROWS, BLOCK_N=block_n, BLOCK_K=32, PRECISION=self.precision,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        return out
