"""Windowed attention, forward: every output pixel against its own rectangle of low-resolution keys.

A program owns a tile of BLOCK_H x BLOCK_W output pixels and the rectangle of keys that their windows span, which the
host has computed per tile (`_spans`), for bounds of any order. Five designs, chosen in `tiling.py`:

window    the whole rectangle is one block of keys: softmax per head in registers, probabilities summed over the heads,
          then one product per block of channels. Bytes: the output once; keys and values come from the caches.
two_pass  any window, any number of channels: log-sum-exp per pixel and head first (4 bytes each), then
          probabilities, summed over the heads, times values. A block of keys is a piece of one row of the window.
stored    any window, many channels: weights are summed over the heads once and written down, for as many tiles at a
          time as SLAB bytes hold; a second kernel multiplies them with the values. Of float32 weights and values are
          sums of two float16, and three products of them take the place of one.
halved    the same for float32 and windows of up to 16 x 16 keys: softmax per head in registers, so that weights are
          made in one pass. Queries and keys are halves too, side by side with places that hide the keys that a pixel
          does not see: one product makes logits and masks. A key's place is its row and column modulo 16.
heads     any window, few channels: one pass, one running sum per head.

In the two looping designs the columns of a block stay the same while its row advances, so which columns a pixel sees is
worked out once per column block. Where all logits are provably small (|q| |k| bounds them), a fixed offset replaces the
running maximum: what is left per logit is one multiply-add, one exponential and the sum.
"""

import math
from contextlib import nullcontext
from functools import lru_cache, partial, wraps
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launches import INTERPRETED as _INTERPRETED
from .launches import Launches, cdiv, layout
from .tiling import Device, Tile, choose_tile

INTERPRETED = tl.constexpr(_INTERPRETED)
LOG2E = 1.4426950408889634
# Sizes that no kernel gains by knowing: it is not compiled anew for those that 16 divides, or that are 1.
COUNTS = ["height", "width", "grid_h", "grid_w", "n_cells", "each", "step", "pitch", "n_tiles_h", "n_tiles_w",
          "n_blocks_c", "first_tile", "quarter", "span_w"]  # fmt: skip
MOST_PLANS = 512
SLAB = 1 << 28
PARTS_X, PARTS_C = 256, 8  # cells and channels of a program that splits numbers in two
HALVED_P = 64  # pixels of a program of the design "halved"
MIX_KEYS = 64  # that weights are stored for: whole blocks of as many
# Largest offset, in powers of two, that may replace the running maximum: 2 ** (-2 * offset) has to be a normal number,
# and float32 results must not lose digits to the size of the exponent.
SAFE_OFFSET = {torch.bfloat16: 60.0, torch.float16: 0.0, torch.float32: 12.0}


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:  # the interpreter multiplies the raw bits of bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _tile(pid, row_ptr, col_ptr, row_tile_ptr, col_tile_ptr, height, width, n_tiles_h, n_tiles_w,
          BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, first=0, P: tl.constexpr = None):  # fmt: skip
    """Image, pixels (P,), which of them exist, their windows (P,) and the window of the whole tile.

    With P they are those of the tile from the pixel `first` on.
    """
    image = pid // (n_tiles_h * n_tiles_w)
    tile_h = pid // n_tiles_w % n_tiles_h
    tile_w = pid % n_tiles_w
    if P is None:
        offs = tl.arange(0, BLOCK_H * BLOCK_W)
    else:
        offs = first + tl.arange(0, P)
    i = tile_h * BLOCK_H + offs // BLOCK_W
    j = tile_w * BLOCK_W + offs % BLOCK_W
    mask_pix = (i < height) & (j < width)
    i = tl.minimum(i, height - 1)
    j = tl.minimum(j, width - 1)
    r0 = tl.load(row_ptr + 2 * i)
    r1 = tl.load(row_ptr + 2 * i + 1)
    c0 = tl.load(col_ptr + 2 * j)
    c1 = tl.load(col_ptr + 2 * j + 1)
    span_r0 = tl.load(row_tile_ptr + 4 * tile_h)
    span_r1 = tl.load(row_tile_ptr + 4 * tile_h + 1)
    all_r0 = tl.load(row_tile_ptr + 4 * tile_h + 2)
    all_r1 = tl.load(row_tile_ptr + 4 * tile_h + 3)
    span_c0 = tl.load(col_tile_ptr + 4 * tile_w)
    span_c1 = tl.load(col_tile_ptr + 4 * tile_w + 1)
    return image, i, j, mask_pix, r0, r1, c0, c1, span_r0, span_r1, all_r0, all_r1, span_c0, span_c1


@triton.jit
def _load_query(q_ptr, image, i, j, head, mask_pix, q_b, q_h, q_w, q_n, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    offs_d = tl.arange(0, BLOCK_D)
    offs = i.to(tl.int64) * q_h + j.to(tl.int64) * q_w
    ptrs = q_ptr + image.to(tl.int64) * q_b + tl.cast(head, tl.int64) * q_n + offs[:, None] + offs_d[None, :]
    return tl.load(ptrs, mask=mask_pix[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _length(q):
    """Euclidean length of each row, (P,), the same to the bit in all threads that hold it."""
    q = q.to(tl.float32)
    # Without its last bit a square is no product any more that the compiler may fuse with an addition: that rounds the
    # sum of two threads' numbers otherwise in one than in the other.
    squares = ((q * q).to(tl.int32, bitcast=True) & -2).to(tl.float32, bitcast=True)
    return tl.sqrt(tl.sum(squares, 1))


@triton.jit
def _key_places(span_w, BLOCK_K: tl.constexpr, SPAN_W: tl.constexpr):
    """Row and column in the rectangle of each of its up to 256 keys, (K,); it is SPAN_W wide, or `span_w` where 0."""
    offs_k = tl.arange(0, BLOCK_K)
    if SPAN_W == 0:
        # Exact for so few keys, and no division by what is not known before.
        key_r = (offs_k * ((65535 + span_w) // span_w)) >> 16
        return key_r, offs_k - key_r * span_w
    else:
        return offs_k // SPAN_W, offs_k % SPAN_W


@triton.jit
def _rectangle(span_r0, span_r1, span_c0, span_c1, r0, r1, c0, c1, span_w,
               BLOCK_K: tl.constexpr, SPAN_W: tl.constexpr, PACKED: tl.constexpr):  # fmt: skip
    """All keys of a tile: rows and columns (K,), which of them exist, and bits of keys (K,) and pixels (P,)."""
    key_r, key_c = _key_places(span_w, BLOCK_K, SPAN_W)
    mask_k = (key_r < span_r1 - span_r0) & (key_c < span_c1 - span_c0)
    if PACKED:
        # One bit per row and column of the rectangle: a key is seen if both of its bits are among the pixel's.
        key_bits = tl.where(mask_k, (1 << key_r) | (1 << (key_c + 16)), -1)
        row_bits = (1 << (r1 - span_r0)) - (1 << (r0 - span_r0))
        col_bits = (1 << (c1 - span_c0)) - (1 << (c0 - span_c0))
        pix_bits = row_bits | (col_bits << 16)
    else:
        key_bits, pix_bits = key_r, r0
    return span_r0 + key_r, span_c0 + key_c, mask_k, key_bits, pix_bits


@triton.jit
def _seen(row, col, mask_k, key_bits, pix_bits, r0, r1, c0, c1, PACKED: tl.constexpr):
    """Which pixel sees which key, (P, K)."""
    if PACKED:
        seen = (key_bits[None, :] & pix_bits[:, None]) == key_bits[None, :]
    else:
        seen = mask_k[None, :] & (row[None, :] >= r0[:, None]) & (row[None, :] < r1[:, None])
        seen = seen & (col[None, :] >= c0[:, None]) & (col[None, :] < c1[:, None])
    return seen


@triton.jit
def _hiding(span_r0, span_r1, span_c0, span_c1, r0, r1, c0, c1, mask_k, span_w,
            P: tl.constexpr, BLOCK_K: tl.constexpr, SPAN_W: tl.constexpr):  # fmt: skip
    """Factors (P, 32) and (32, K) of a product that is zero where a pixel sees a key, and below -2 ** 119 elsewhere.

    One place for each of 16 rows and 16 columns of the rectangle: a pixel has a number where it sees none, a key a one.
    """
    place = tl.arange(0, 32)
    of_row, n = place < 16, place % 16
    first = tl.where(of_row[None, :], (r0 - span_r0)[:, None], (c0 - span_c0)[:, None])
    last = tl.where(of_row[None, :], (r1 - span_r0)[:, None], (c1 - span_c0)[:, None])
    unseen = (n[None, :] < first) | (n[None, :] >= last)
    key_r, key_c = _key_places(span_w, BLOCK_K, SPAN_W)
    own = tl.where(of_row[:, None], key_r[None, :], key_c[None, :]) == n[:, None]
    # Keys beyond the rectangle have all places: no pixel sees 16 rows and 16 columns where there are such keys.
    own = own | (mask_k == 0)[None, :]
    return tl.where(unseen, -(2.0**120), 0.0).to(tl.bfloat16), tl.where(own, 1.0, 0.0).to(tl.bfloat16)


@triton.jit(do_not_specialize=COUNTS)
def _window_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, row_ptr, col_ptr, row_tile_ptr, col_tile_ptr,
    q_b, q_h, q_w, q_n, k_b, k_h, k_w, k_n, v_b, v_h, v_w,
    height, width, channels, n_tiles_h, n_tiles_w, span_w, qk_scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr, SPAN_W: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, HIDE: tl.constexpr,
):  # fmt: skip
    # Heads that split the channels have a program each: nothing of a head is live while another is worked on.
    PROGRAMS: tl.constexpr = HEADS if SPLIT else 1
    image, i, j, mask_pix, r0, r1, c0, c1, span_r0, span_r1, _, _, span_c0, span_c1 = _tile(
        tl.program_id(0) // PROGRAMS, row_ptr, col_ptr, row_tile_ptr, col_tile_ptr, height, width, n_tiles_h,
        n_tiles_w, BLOCK_H, BLOCK_W,
    )  # fmt: skip
    P: tl.constexpr = BLOCK_H * BLOCK_W
    row, col, mask_k, key_bits, pix_bits = _rectangle(
        span_r0, span_r1, span_c0, span_c1, r0, r1, c0, c1, span_w, BLOCK_K, SPAN_W, PACKED
    )
    key_h, key_w = row.to(tl.int64), col.to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    offs_c = tl.arange(0, BLOCK_C)
    k_ptrs = k_ptr + image.to(tl.int64) * k_b + (key_h * k_h + key_w * k_w)[None, :] + offs_d[:, None]
    mask_key_dim = mask_k[None, :] & (offs_d < HEAD_DIM)[:, None]
    weights = tl.zeros((P, BLOCK_K), tl.float32)
    if HIDE:
        unseen, own = _hiding(span_r0, span_r1, span_c0, span_c1, r0, r1, c0, c1, mask_k, span_w, P, BLOCK_K, SPAN_W)
    first_head = tl.program_id(0) % PROGRAMS
    n_heads: tl.constexpr = HEADS // PROGRAMS
    for head in tl.range(first_head, first_head + n_heads, num_stages=1):
        q = _load_query(q_ptr, image, i, j, head, mask_pix, q_b, q_h, q_w, q_n, HEAD_DIM, BLOCK_D)
        k = tl.load(k_ptrs + tl.cast(head, tl.int64) * k_n, mask=mask_key_dim, other=0.0)
        if HIDE:
            s = _dot(q, k, _dot(unseen, own, None, "ieee"), PRECISION)
        else:
            s = _dot(q, k, None, PRECISION)
            s = tl.where(_seen(row, col, mask_k, key_bits, pix_bits, r0, r1, c0, c1, PACKED), s, float("-inf"))
        e = tl.exp2(s * qk_scale - (tl.max(s, 1) * qk_scale)[:, None])
        weights += e * ((1.0 / n_heads) / tl.sum(e, 1))[:, None]
    n_channels = channels // PROGRAMS
    first = first_head * n_channels
    w = weights.to(v_ptr.dtype.element_ty)
    v_ptrs = v_ptr + image.to(tl.int64) * v_b + (key_h * v_h + key_w * v_w)[:, None] + (first + offs_c)[None, :]
    offs_out = ((image.to(tl.int64) * height + i) * width + j) * channels + first
    out_ptrs = out_ptr + offs_out[:, None] + offs_c[None, :]
    for c in tl.range(0, n_channels, BLOCK_C, num_stages=STAGES):
        mask_c = (c + offs_c < n_channels)[None, :]
        v = tl.load(v_ptrs + c, mask=mask_k[:, None] & mask_c, other=0.0)
        o = _dot(w, v, None, PRECISION).to(out_ptr.dtype.element_ty)
        tl.store(out_ptrs + c, o, mask=mask_pix[:, None] & mask_c)


@triton.jit
def _row(n, span_r0, all_r0, all_r1, EDGE: tl.constexpr):
    """The n-th row that all pixels of the tile see, or the n-th (EDGE) that only some of them may see."""
    if EDGE:
        above = all_r0 - span_r0
        row = tl.where(n < above, span_r0 + n, all_r1 + n - above)
    else:
        row = all_r0 + n
    return row


@triton.jit
def _stats_rows(
    q, k_ptrs, k_h, mask_key, bias, qk_scale, top, total, span_r0, span_r1, all_r0, all_r1, r0, r1,
    EDGE: tl.constexpr, FIXED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n_rows = span_r1 - span_r0 - (all_r1 - all_r0) if EDGE else all_r1 - all_r0
    for n in tl.range(0, n_rows, num_stages=STAGES):
        row = _row(n, span_r0, all_r0, all_r1, EDGE)
        k = tl.load(k_ptrs + row.to(tl.int64) * k_h, mask=mask_key, other=0.0)
        x = _dot(q, k, None, PRECISION) * qk_scale + bias
        if EDGE:
            x = tl.where(((row >= r0) & (row < r1))[:, None], x, float("-inf"))
        if FIXED:
            total += tl.sum(tl.exp2(x), 1)
        else:
            higher = tl.maximum(top, tl.max(x, 1))
            total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(x - higher[:, None]), 1)
            top = higher
    return top, total


@triton.jit
def _stats_window(
    q, k_base, k_h, k_w, c0, c1, offset, qk_scale, span_r0, span_r1, all_r0, all_r1, span_c0, span_c1, r0, r1,
    P: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    FIXED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    offs_d = tl.arange(0, BLOCK_D)
    offs_k = tl.arange(0, BLOCK_K)
    # Finite, so that a block nobody sees leaves no NaN.
    top = tl.full((P,), -1.0e30, tl.float32)
    total = tl.zeros((P,), tl.float32)
    for first in tl.range(span_c0, span_c1, BLOCK_K, num_stages=1):
        col = first + offs_k
        k_ptrs = k_base + (col.to(tl.int64) * k_w)[None, :] + offs_d[:, None]
        mask_key = (col < span_c1)[None, :] & (offs_d < HEAD_DIM)[:, None]
        seen = (col[None, :] >= c0[:, None]) & (col[None, :] < c1[:, None])
        bias = tl.where(seen, -offset[:, None], float("-inf"))
        top, total = _stats_rows(q, k_ptrs, k_h, mask_key, bias, qk_scale, top, total, span_r0, span_r1, all_r0,
                                 all_r1, r0, r1, True, FIXED, PRECISION, STAGES)  # fmt: skip
        top, total = _stats_rows(q, k_ptrs, k_h, mask_key, bias, qk_scale, top, total, span_r0, span_r1, all_r0,
                                 all_r1, r0, r1, False, FIXED, PRECISION, STAGES)  # fmt: skip
    return top, total


@triton.jit(do_not_specialize=COUNTS)
def _stats_kernel(
    q_ptr, k_ptr, norm_ptr, lse_ptr, row_ptr, col_ptr, row_tile_ptr, col_tile_ptr,
    q_b, q_h, q_w, q_n, k_b, k_h, k_w, k_n,
    height, width, n_tiles_h, n_tiles_w, qk_scale, safe_offset,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % HEADS
    image, i, j, mask_pix, r0, r1, c0, c1, span_r0, span_r1, all_r0, all_r1, span_c0, span_c1 = _tile(
        tl.program_id(0) // HEADS, row_ptr, col_ptr, row_tile_ptr, col_tile_ptr, height, width, n_tiles_h, n_tiles_w,
        BLOCK_H, BLOCK_W,
    )  # fmt: skip
    P: tl.constexpr = BLOCK_H * BLOCK_W
    q = _load_query(q_ptr, image, i, j, head, mask_pix, q_b, q_h, q_w, q_n, HEAD_DIM, BLOCK_D)
    k_base = k_ptr + image.to(tl.int64) * k_b + tl.cast(head, tl.int64) * k_n
    offset = _length(q) * tl.load(norm_ptr + image * HEADS + head) * qk_scale
    if tl.max(offset, 0) <= safe_offset:
        _, total = _stats_window(q, k_base, k_h, k_w, c0, c1, offset, qk_scale, span_r0, span_r1, all_r0, all_r1,
                                 span_c0, span_c1, r0, r1, P, HEAD_DIM, BLOCK_D, BLOCK_K, True,
                                 PRECISION, STAGES)  # fmt: skip
        lse = offset + tl.log2(total)
    else:
        top, total = _stats_window(q, k_base, k_h, k_w, c0, c1, tl.zeros((P,), tl.float32), qk_scale, span_r0, span_r1,
                                   all_r0, all_r1, span_c0, span_c1, r0, r1, P, HEAD_DIM, BLOCK_D, BLOCK_K, False,
                                   PRECISION, STAGES)  # fmt: skip
        lse = top + tl.log2(total)
    if not SPLIT:  # the mean over the heads rides along
        lse += tl.log2(HEADS * 1.0)
    offs_pix = (image.to(tl.int64) * height + i) * width + j
    tl.store(lse_ptr + offs_pix * HEADS + head, lse, mask=mask_pix)


@triton.jit
def _apply_rows(
    acc, queries, lses, k_ptrs, v_ptrs, k_h, k_n, v_h, mask_key, mask_value, seen, qk_scale, first_head,
    span_r0, span_r1, all_r0, all_r1, r0, r1,
    EDGE: tl.constexpr, N_HEADS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n_rows = span_r1 - span_r0 - (all_r1 - all_r0) if EDGE else all_r1 - all_r0
    for n in tl.range(0, n_rows, num_stages=STAGES):
        row = _row(n, span_r0, all_r0, all_r1, EDGE).to(tl.int64)
        v = tl.load(v_ptrs + row * v_h, mask=mask_value, other=0.0)
        for h in tl.static_range(N_HEADS):
            k = tl.load(k_ptrs + row * k_h + tl.cast(first_head + h, tl.int64) * k_n, mask=mask_key, other=0.0)
            e = tl.exp2(_dot(queries[h], k, None, PRECISION) * qk_scale - lses[h][:, None])
            w = e if h == 0 else w + e  # noqa: F821
        if EDGE:
            w = tl.where(seen & ((row >= r0) & (row < r1))[:, None], w, 0.0)
        else:
            w = tl.where(seen, w, 0.0)
        acc = _dot(w.to(v.dtype), v, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=COUNTS)
def _apply_kernel(
    q_ptr, k_ptr, v_ptr, lse_ptr, out_ptr, row_ptr, col_ptr, row_tile_ptr, col_tile_ptr,
    q_b, q_h, q_w, q_n, k_b, k_h, k_w, k_n, v_b, v_h, v_w,
    height, width, channels, n_tiles_h, n_tiles_w, n_blocks_c, qk_scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Channel blocks of one tile follow each other: they read the same keys.
    block = tl.program_id(0) % n_blocks_c
    image, i, j, mask_pix, r0, r1, c0, c1, span_r0, span_r1, all_r0, all_r1, span_c0, span_c1 = _tile(
        tl.program_id(0) // n_blocks_c, row_ptr, col_ptr, row_tile_ptr, col_tile_ptr, height, width, n_tiles_h,
        n_tiles_w, BLOCK_H, BLOCK_W,
    )  # fmt: skip
    P: tl.constexpr = BLOCK_H * BLOCK_W
    N_HEADS: tl.constexpr = 1 if SPLIT else HEADS
    if SPLIT:
        blocks = n_blocks_c // HEADS
        first_head = block // blocks
        c_end = (first_head + 1) * (channels // HEADS)
        c_start = first_head * (channels // HEADS) + (block % blocks) * BLOCK_C
    else:
        first_head = block * 0
        c_end = channels
        c_start = block * BLOCK_C
    offs_d = tl.arange(0, BLOCK_D)
    offs_k = tl.arange(0, BLOCK_K)
    offs_c = c_start + tl.arange(0, BLOCK_C)
    mask_c = (offs_c < c_end)[None, :]
    offs_pix = (image.to(tl.int64) * height + i) * width + j
    queries = ()
    lses = ()
    for h in tl.static_range(N_HEADS):
        head = first_head + h
        queries = queries + (_load_query(q_ptr, image, i, j, head, mask_pix, q_b, q_h, q_w, q_n, HEAD_DIM, BLOCK_D),)
        lses = lses + (tl.load(lse_ptr + offs_pix * HEADS + head, mask=mask_pix, other=0.0),)
    k_base = k_ptr + image.to(tl.int64) * k_b
    v_base = v_ptr + image.to(tl.int64) * v_b
    acc = tl.zeros((P, BLOCK_C), tl.float32)
    for first in tl.range(span_c0, span_c1, BLOCK_K, num_stages=1):
        col = first + offs_k
        k_ptrs = k_base + (col.to(tl.int64) * k_w)[None, :] + offs_d[:, None]
        v_ptrs = v_base + (col.to(tl.int64) * v_w)[:, None] + offs_c[None, :]
        mask_key = (col < span_c1)[None, :] & (offs_d < HEAD_DIM)[:, None]
        mask_value = (col < span_c1)[:, None] & mask_c
        seen = (col[None, :] >= c0[:, None]) & (col[None, :] < c1[:, None])
        acc = _apply_rows(acc, queries, lses, k_ptrs, v_ptrs, k_h, k_n, v_h, mask_key, mask_value, seen, qk_scale,
                          first_head, span_r0, span_r1, all_r0, all_r1, r0, r1, True, N_HEADS, PRECISION,
                          STAGES)  # fmt: skip
        acc = _apply_rows(acc, queries, lses, k_ptrs, v_ptrs, k_h, k_n, v_h, mask_key, mask_value, seen, qk_scale,
                          first_head, span_r0, span_r1, all_r0, all_r1, r0, r1, False, N_HEADS, PRECISION,
                          STAGES)  # fmt: skip
    out_ptrs = out_ptr + (offs_pix * channels)[:, None] + offs_c[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_pix[:, None] & mask_c)


@triton.jit
def _unit_below(limit):
    """A power of two and its reciprocal, by which what is no larger than `limit` comes into the range of float16."""
    exponent = tl.minimum(tl.maximum(limit.to(tl.int32, bitcast=True) >> 23, 15), 254)
    return ((exponent - 14) << 23).to(tl.float32, bitcast=True), ((268 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _halves(x):
    """Float32 within the range of float16 as two of those, what is rounded off being the second."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit(do_not_specialize=COUNTS)
def _parts_kernel(
    x_ptr, high_ptr, low_ptr, unit_ptr, x_b, x_h, x_w, height, width, channels, n_blocks_c, n_cells, each, step, pitch,
    BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Float32 as the sum of two float16, times a power of two of each image and channel, its `unit`.

    What is not finite counts for nothing in the choice of the unit. Cells have `pitch` places and runs of `each`
    channels begin at multiples of `step` of them. Of values `step` is `each`. Of keys these are heads, and there is one
    more cell, which everybody misses; each channel has four numbers side by side, its halves, the first of them again,
    and one of the cell's own places, see `_halved_kernel`.
    """
    image = (tl.program_id(0) // n_blocks_c).to(tl.int64)
    offs_c = tl.program_id(0) % n_blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = (offs_c < channels)[None, :]
    offs_x = tl.arange(0, BLOCK_X)
    base = x_ptr + image * x_b + offs_c[None, :]
    most = tl.zeros((BLOCK_X, BLOCK_C), tl.float32)
    for first in tl.range(0, height * width, BLOCK_X, num_stages=1):
        place = first + offs_x
        offs = (place // width).to(tl.int64) * x_h + (place % width).to(tl.int64) * x_w
        x = tl.abs(tl.load(base + offs[:, None], mask=(place < height * width)[:, None] & mask_c, other=0.0))
        most = tl.maximum(most, tl.where(x < float("inf"), x, 0.0))
    unit, factor = _unit_below(tl.max(most, 0))
    tl.store(unit_ptr + image * channels + offs_c, unit, mask=offs_c < channels)
    of_keys = step > each
    apart = tl.where(of_keys, 4, 1)
    column = offs_c // each * step + offs_c % each * apart
    for first in tl.range(0, n_cells, BLOCK_X, num_stages=1):
        place = first + offs_x
        row = place // width
        col = place % width
        offs = row.to(tl.int64) * x_h + col.to(tl.int64) * x_w
        there = place < height * width
        x = tl.load(base + offs[:, None], mask=there[:, None] & mask_c, other=0.0).to(tl.float32) * factor[None, :]
        high, low = _halves(x)
        out = (image * n_cells + place)[:, None] * pitch + column[None, :]
        mask = (place < n_cells)[:, None] & mask_c
        tl.store(high_ptr + out, high, mask=mask)
        tl.store(low_ptr + tl.where(of_keys, 1, 0) + out, low, mask=mask)
        if of_keys:
            tl.store(high_ptr + out + 2, high, mask=mask)
            for more in tl.range(0, step // 4, each, num_stages=1):
                n = (offs_c % each + more)[None, :]
                own = tl.where(n < 16, row[:, None] % 16 == n, (n < 32) & (col[:, None] % 16 == n - 16))
                own = own | ((there == 0)[:, None] & (n < 32))
                value = tl.where(own, 32768.0, 0.0).to(tl.float16)
                tl.store(high_ptr + out + (3 + 4 * more), value, mask=mask & (n < step // 4))


@triton.jit(do_not_specialize=COUNTS)
def _halved_kernel(
    q_ptr, k_ptr, unit_ptr, w_ptr, row_ptr, col_ptr, row_tile_ptr, col_tile_ptr, q_b, q_h, q_w, q_n,
    height, width, grid_h, grid_w, n_tiles_h, n_tiles_w, first_tile, quarter, n_keys, qk_scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What `_weights_kernel` makes for BLOCK_P pixels of a tile at once, in halves; keys are those of `_split_keys`."""
    PROGRAMS: tl.constexpr = BLOCK_H * BLOCK_W // BLOCK_P
    slot = tl.program_id(0) // PROGRAMS
    first = tl.program_id(0) % PROGRAMS * BLOCK_P
    image, i, j, mask_pix, r0, r1, c0, c1, span_r0, _, _, _, span_c0, _ = _tile(
        first_tile + slot, row_ptr, col_ptr, row_tile_ptr, col_tile_ptr, height, width, n_tiles_h, n_tiles_w,
        BLOCK_H, BLOCK_W, first, BLOCK_P,
    )  # fmt: skip
    image = image.to(tl.int64)
    pitch = quarter * 4
    offs_k = tl.arange(0, BLOCK_K)
    key_r, key_c = _key_places(pitch, BLOCK_K, 0)
    row = span_r0 + key_r
    col = span_c0 + key_c
    # For keys that are not there stands the cell that everybody misses: where such are, no pixel sees 16 x 16 keys.
    there = (key_r < 16) & (row < grid_h) & (col < grid_w)
    place = tl.where(there, row * grid_w + col, grid_h * grid_w)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    offs_4 = tl.arange(0, 4 * BLOCK_D)
    k_ptrs = k_ptr + ((image * (grid_h * grid_w + 1) + place) * (HEADS * 4 * BLOCK_D))[None, :] + offs_4[:, None]
    n = offs_d[None, :]
    unseen = tl.where(n < 16, (n - r0[:, None]) & 15, (n - c0[:, None]) & 15)
    unseen = (unseen >= tl.where(n < 16, (r1 - r0)[:, None], (c1 - c0)[:, None])) & (n < 32)
    unseen = tl.where(unseen, -65504.0, 0.0).to(tl.float16)
    weights = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    for head in tl.range(0, HEADS, num_stages=STAGES):
        k = tl.load(k_ptrs + head * (4 * BLOCK_D))
        units = tl.load(unit_ptr + (image * HEADS + head) * HEAD_DIM + offs_d, mask=mask_d, other=0.0) * qk_scale
        q = _load_query(q_ptr, image, i, j, head, mask_pix, q_b, q_h, q_w, q_n, HEAD_DIM, BLOCK_D)
        q = q.to(tl.float32) * units[None, :]
        most = tl.abs(q)
        # So that no sum of products comes near what hides a key, 2 ** 31, and 2 ** 31 of the least unit is enough.
        unit, factor = _unit_below(tl.maximum(tl.max(tl.where(most < float("inf"), most, 0.0), 1), 2.0**-14))
        unit *= 2.0 * BLOCK_D
        high, low = _halves(q * (factor * (0.5 / BLOCK_D))[:, None])
        # Four numbers of a query beside each other, as of a key: (first, first, second, whether unseen).
        q = tl.reshape(tl.join(tl.join(high, low), tl.join(high, unseen)), (BLOCK_P, 4 * BLOCK_D))
        s = _dot(q, k, None, "ieee")
        e = tl.exp2(s * unit[:, None] - (tl.max(s, 1) * unit)[:, None])
        # Times 4096, so that what is left of a half is no subnormal number.
        weights += e * ((4096.0 / HEADS) / tl.sum(e, 1))[:, None]
    high, low = _halves(weights)
    P: tl.constexpr = BLOCK_H * BLOCK_W
    rows = first + tl.arange(0, BLOCK_P)
    w_ptrs = w_ptr + slot.to(tl.int64) * (2 * P * n_keys) + (rows * n_keys)[:, None] + offs_k[None, :]
    mask = (offs_k < n_keys)[None, :]
    tl.store(w_ptrs, high, mask=mask)
    tl.store(w_ptrs + P * n_keys, low, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def _weights_kernel(
    q_ptr, k_ptr, lse_ptr, w_ptr, row_ptr, col_ptr, row_tile_ptr, col_tile_ptr,
    q_b, q_h, q_w, q_n, k_b, k_h, k_w, k_n,
    height, width, grid_h, n_tiles_h, n_tiles_w, first_tile, quarter, n_keys, qk_scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Mean over the heads of the weights of all keys that a tile spans, (tiles, PARTS, P, n_keys).

    A row of keys takes 4 * `quarter` places; up to the end of a block of BLOCK_N keys the rest is zero.
    """
    slot = tl.program_id(0)
    image, i, j, mask_pix, r0, r1, c0, c1, span_r0, span_r1, _, _, span_c0, span_c1 = _tile(
        first_tile + slot, row_ptr, col_ptr, row_tile_ptr, col_tile_ptr, height, width, n_tiles_h, n_tiles_w,
        BLOCK_H, BLOCK_W,
    )  # fmt: skip
    P: tl.constexpr = BLOCK_H * BLOCK_W
    pitch = quarter * 4
    offs_d = tl.arange(0, BLOCK_D)
    offs_k = tl.arange(0, BLOCK_K)
    offs_pix = (image.to(tl.int64) * height + i) * width + j
    queries = ()
    lses = ()
    for h in tl.static_range(HEADS):
        queries = queries + (_load_query(q_ptr, image, i, j, h, mask_pix, q_b, q_h, q_w, q_n, HEAD_DIM, BLOCK_D),)
        lses = lses + (tl.load(lse_ptr + offs_pix * HEADS + h, mask=mask_pix, other=0.0),)
    k_base = k_ptr + image.to(tl.int64) * k_b
    w_ptrs = w_ptr + slot.to(tl.int64) * (PARTS * P * n_keys) + (tl.arange(0, P) * n_keys)[:, None] + offs_k[None, :]
    n_rows = tl.cdiv(tl.cdiv((span_r1 - span_r0) * pitch, BLOCK_N) * BLOCK_N, pitch)
    for first in tl.range(0, pitch, BLOCK_K, num_stages=1):
        col = span_c0 + first + offs_k
        k_ptrs = k_base + (col.to(tl.int64) * k_w)[None, :] + offs_d[:, None]
        mask_key = (col < span_c1)[None, :] & (offs_d < HEAD_DIM)[:, None]
        in_row = (col[None, :] >= c0[:, None]) & (col[None, :] < c1[:, None])
        for n in tl.range(0, n_rows, num_stages=STAGES):
            row = span_r0 + n
            inside = (row >= r0) & (row < r1)
            k_row = tl.minimum(row, grid_h - 1).to(tl.int64) * k_h
            for h in tl.static_range(HEADS):
                k = tl.load(k_ptrs + k_row + tl.cast(h, tl.int64) * k_n, mask=mask_key, other=0.0)
                offset = tl.where(inside, lses[h], float("inf"))[:, None]
                e = tl.exp2(_dot(queries[h], k, None, PRECISION) * qk_scale - offset)
                w = e if h == 0 else w + e  # noqa: F821
            w = tl.where(in_row, w, 0.0)
            mask_w = ((first + offs_k < pitch) & (n * pitch + first + offs_k < n_keys))[None, :]
            if PARTS == 1:
                tl.store(w_ptrs + (n * pitch + first), w.to(w_ptr.dtype.element_ty), mask=mask_w)
            else:
                w *= 4096.0  # what is left of a half is no subnormal number then
                high = w.to(tl.float16)
                tl.store(w_ptrs + (n * pitch + first), high, mask=mask_w)
                tl.store(w_ptrs + (P * n_keys + n * pitch + first), (w - high.to(tl.float32)).to(tl.float16),
                         mask=mask_w)  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def _mix_kernel(
    w_ptr, v_ptr, low_ptr, unit_ptr, out_ptr, row_tile_ptr, col_tile_ptr, v_b, v_h, v_w,
    height, width, channels, n_tiles_h, n_tiles_w, n_blocks_c, first_tile, quarter, n_keys,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Values times the weights of `_weights_kernel`: one block of channels of one tile."""
    # Channel blocks of one tile follow each other: they read the same weights.
    slot = tl.program_id(0) // n_blocks_c
    tile = first_tile + slot
    image = (tile // (n_tiles_h * n_tiles_w)).to(tl.int64)
    tile_h = tile // n_tiles_w % n_tiles_h
    tile_w = tile % n_tiles_w
    span_r0 = tl.load(row_tile_ptr + 4 * tile_h)
    span_r1 = tl.load(row_tile_ptr + 4 * tile_h + 1)
    span_c0 = tl.load(col_tile_ptr + 4 * tile_w)
    span_c1 = tl.load(col_tile_ptr + 4 * tile_w + 1)
    P: tl.constexpr = BLOCK_H * BLOCK_W
    pitch = quarter * 4
    offs_p = tl.arange(0, P)
    offs_n = tl.arange(0, BLOCK_N)
    offs_c = tl.program_id(0) % n_blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = (offs_c < channels)[None, :]
    w_ptrs = w_ptr + slot.to(tl.int64) * (PARTS * P * n_keys) + (offs_p * n_keys)[:, None] + offs_n[None, :]
    v_base = image * v_b + offs_c[None, :]
    acc = tl.zeros((P, BLOCK_C), tl.float32)
    for first in tl.range(0, (span_r1 - span_r0) * pitch, BLOCK_N, num_stages=STAGES):
        key = first + offs_n
        # Keys beyond have weight zero: any of the window stands for them.
        row = tl.minimum(span_r0 + key // pitch, span_r1 - 1).to(tl.int64)
        col = tl.minimum(span_c0 + key % pitch, span_c1 - 1).to(tl.int64)
        offs_v = v_base + (row * v_h + col * v_w)[:, None]
        w = tl.load(w_ptrs + first)
        v = tl.load(v_ptr + offs_v, mask=mask_c, other=0.0)
        acc = _dot(w, v, acc, "ieee")
        if PARTS == 2:
            acc = _dot(tl.load(w_ptrs + (P * n_keys + first)), v, acc, "ieee")
            acc = _dot(w, tl.load(low_ptr + offs_v, mask=mask_c, other=0.0), acc, "ieee")
    if PARTS == 2:
        acc *= tl.load(unit_ptr + image * channels + offs_c, mask=offs_c < channels, other=0.0)[None, :] / 4096.0
    i = tile_h * BLOCK_H + offs_p // BLOCK_W
    j = tile_w * BLOCK_W + offs_p % BLOCK_W
    out_ptrs = out_ptr + (((image * height + i) * width + j) * channels)[:, None] + offs_c[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=((i < height) & (j < width))[:, None] & mask_c)


@triton.jit
def _heads_rows(
    acc, top, q, k_ptrs, v_ptrs, k_h, v_h, mask_key, mask_value, ones, bias, qk_scale,
    span_r0, span_r1, all_r0, all_r1, r0, r1,
    EDGE: tl.constexpr, FIXED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n_rows = span_r1 - span_r0 - (all_r1 - all_r0) if EDGE else all_r1 - all_r0
    for n in tl.range(0, n_rows, num_stages=STAGES):
        row = _row(n, span_r0, all_r0, all_r1, EDGE).to(tl.int64)
        k = tl.load(k_ptrs + row * k_h, mask=mask_key, other=0.0)
        v = tl.load(v_ptrs + row * v_h, mask=mask_value, other=0.0)
        v = tl.where(ones, tl.full(v.shape, 1.0, tl.float32).to(v.dtype), v)
        x = _dot(q, k, None, PRECISION) * qk_scale + bias
        if EDGE:
            x = tl.where(((row >= r0) & (row < r1))[:, None], x, float("-inf"))
        if not FIXED:
            higher = tl.maximum(top, tl.max(x, 1))
            acc *= tl.exp2(top - higher)[:, None]
            x -= higher[:, None]
            top = higher
        acc = _dot(tl.exp2(x).to(v.dtype), v, acc, PRECISION)
    return acc, top


@triton.jit
def _heads_window(
    q, k_base, v_base, k_h, k_w, v_h, v_w, c0, c1, offset, qk_scale, n_channels,
    span_r0, span_r1, all_r0, all_r1, span_c0, span_c1, r0, r1,
    P: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    FIXED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    offs_d = tl.arange(0, BLOCK_D)
    offs_k = tl.arange(0, BLOCK_K)
    offs_c = tl.arange(0, BLOCK_C)
    # The channel after the last is 1 everywhere: the product sums the weights along the way.
    ones = (offs_c == n_channels)[None, :]
    top = tl.full((P,), -1.0e30, tl.float32)
    acc = tl.zeros((P, BLOCK_C), tl.float32)
    for first in tl.range(span_c0, span_c1, BLOCK_K, num_stages=1):
        col = first + offs_k
        k_ptrs = k_base + (col.to(tl.int64) * k_w)[None, :] + offs_d[:, None]
        v_ptrs = v_base + (col.to(tl.int64) * v_w)[:, None] + offs_c[None, :]
        mask_key = (col < span_c1)[None, :] & (offs_d < HEAD_DIM)[:, None]
        mask_value = (col < span_c1)[:, None] & (offs_c < n_channels)[None, :]
        seen = (col[None, :] >= c0[:, None]) & (col[None, :] < c1[:, None])
        bias = tl.where(seen, -offset[:, None], float("-inf"))
        acc, top = _heads_rows(acc, top, q, k_ptrs, v_ptrs, k_h, v_h, mask_key, mask_value, ones, bias, qk_scale,
                               span_r0, span_r1, all_r0, all_r1, r0, r1, True, FIXED, PRECISION, STAGES)  # fmt: skip
        acc, top = _heads_rows(acc, top, q, k_ptrs, v_ptrs, k_h, v_h, mask_key, mask_value, ones, bias, qk_scale,
                               span_r0, span_r1, all_r0, all_r1, r0, r1, False, FIXED, PRECISION, STAGES)  # fmt: skip
    total = tl.sum(tl.where(ones, acc, 0.0), 1)
    return acc * (1.0 / total)[:, None]


@triton.jit(do_not_specialize=COUNTS)
def _heads_kernel(
    q_ptr, k_ptr, v_ptr, norm_ptr, out_ptr, row_ptr, col_ptr, row_tile_ptr, col_tile_ptr,
    q_b, q_h, q_w, q_n, k_b, k_h, k_w, k_n, v_b, v_h, v_w,
    height, width, channels, n_tiles_h, n_tiles_w, qk_scale, safe_offset,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    image, i, j, mask_pix, r0, r1, c0, c1, span_r0, span_r1, all_r0, all_r1, span_c0, span_c1 = _tile(
        tl.program_id(0), row_ptr, col_ptr, row_tile_ptr, col_tile_ptr, height, width, n_tiles_h, n_tiles_w,
        BLOCK_H, BLOCK_W,
    )  # fmt: skip
    P: tl.constexpr = BLOCK_H * BLOCK_W
    n_channels = channels // HEADS if SPLIT else channels
    offs_c = tl.arange(0, BLOCK_C)
    offs_out = ((image.to(tl.int64) * height + i) * width + j) * channels
    out_ptrs = out_ptr + offs_out[:, None] + offs_c[None, :]
    mask_out = mask_pix[:, None] & (offs_c < n_channels)[None, :]
    mean = tl.zeros((P, BLOCK_C), tl.float32)
    for head in tl.range(0, HEADS, num_stages=1):
        q = _load_query(q_ptr, image, i, j, head, mask_pix, q_b, q_h, q_w, q_n, HEAD_DIM, BLOCK_D)
        k_base = k_ptr + image.to(tl.int64) * k_b + tl.cast(head, tl.int64) * k_n
        v_base = v_ptr + image.to(tl.int64) * v_b
        if SPLIT:
            v_base += head * n_channels
        offset = _length(q) * tl.load(norm_ptr + image * HEADS + head) * qk_scale
        if tl.max(offset, 0) <= safe_offset:
            o = _heads_window(q, k_base, v_base, k_h, k_w, v_h, v_w, c0, c1, offset, qk_scale, n_channels,
                              span_r0, span_r1, all_r0, all_r1, span_c0, span_c1, r0, r1,
                              P, HEAD_DIM, BLOCK_D, BLOCK_K, BLOCK_C, True, PRECISION, STAGES)  # fmt: skip
        else:
            o = _heads_window(q, k_base, v_base, k_h, k_w, v_h, v_w, c0, c1, tl.zeros((P,), tl.float32), qk_scale,
                              n_channels, span_r0, span_r1, all_r0, all_r1, span_c0, span_c1, r0, r1,
                              P, HEAD_DIM, BLOCK_D, BLOCK_K, BLOCK_C, False, PRECISION, STAGES)  # fmt: skip
        if SPLIT:
            tl.store(out_ptrs + head * n_channels, o.to(out_ptr.dtype.element_ty), mask=mask_out)
        else:
            mean += o * (1.0 / HEADS)
    if not SPLIT:
        tl.store(out_ptrs, mean.to(out_ptr.dtype.element_ty), mask=mask_out)


def _on(device):
    return torch.get_device_module(device).device(device) if device.type in ("cuda", "xpu") else nullcontext()


def _frozen(bounds):
    return tuple(map(tuple, bounds.tolist()))


def _tile_table(bounds, block):
    """(tiles, 4) int32 for tiles of `block` queries: the keys [a, b) that some and [c, d) that all of them see."""
    n = -(-len(bounds) // block)
    last = torch.arange(n * block, device=bounds.device).clamp(max=len(bounds) - 1)
    start, end = bounds[last].view(n, block, 2).unbind(-1)
    some = start.amin(1), end.amax(1)
    common = start.amax(1) < end.amin(1)
    every = torch.where(common, start.amax(1), some[1]), torch.where(common, end.amin(1), some[1])
    return torch.stack((*some, *every), 1).to(torch.int32)


def _kept(make):
    """Decorator of what makes tables from bounds on the CPU: each is made once and never dropped.

    A captured graph holds nothing but the address of a table, and a stream may still read one that nobody asks for any
    more. They take a few kilobytes for each size of picture. `tables` of the decorated function holds them by content.
    """
    tables = {}

    @wraps(make)
    def of(bounds, *arguments):
        key = bounds.to(torch.int32).contiguous().numpy().tobytes(), *arguments
        if key not in tables:
            tables[key] = make(bounds.to(torch.int32), *arguments)
        return tables[key]

    of.tables = tables
    return of


@_kept
def _frozen_tables(bounds, block, device):
    table = _tile_table(bounds, block)
    # The caller may write to its bounds later.
    return bounds.clone().to(device), table.to(device), int((table[:, 1] - table[:, 0]).max())


def _tables(bounds, block, device):
    """Bounds and table of tiles on `device`, and the most keys a tile spans (None if only the device knows)."""
    if bounds.device.type == "cpu":
        return _frozen_tables(bounds, block, device)
    return bounds.to(torch.int32).contiguous(), _tile_table(bounds, block), None


def _spans(row_windows, col_windows, block_h, block_w):
    return _span(row_windows, block_h), _span(col_windows, block_w)


@lru_cache(maxsize=256)
def _span(windows, block):
    """The most keys that a tile of `block` queries spans."""
    table = _tile_table(torch.tensor(windows, dtype=torch.int32, device="cpu"), block)
    return int((table[:, 1] - table[:, 0]).max())


def _norms(key):
    """Length (B, heads) of the longest key of each head, which bounds every logit: |q . k| <= |q| |k|."""
    return torch.linalg.vector_norm(key, dim=-1, dtype=torch.float32).amax((1, 2)).contiguous()


class _Plan(NamedTuple):
    """All that the host works out for problems of one kind: which tile, which tables, which constants."""

    tile: Tile
    pointers: tuple  # rows, columns and their tiles, on the device
    n_tiles: tuple
    constants: dict
    window: dict  # width and constants of the design "window", sizes of "stored" and "halved"


_plans = {}


def _name(bounds):
    """What is equal for equal bounds on the CPU: by which rule they were made, or else what they hold."""
    rule, version = getattr(bounds, "made_by", (None, None))
    return rule if rule is not None and bounds._version == version else (bounds.dtype, bounds.numpy().tobytes())


def _plan(card, query, value, row_bounds, col_bounds, split, tile):
    """The `_Plan` of checked arguments; by one look-up where both bounds are known by their rule."""
    on_cpu = row_bounds.device.type == col_bounds.device.type == "cpu"
    heads, head_dim = query.shape[3:]
    key = None
    if on_cpu:
        names = _name(row_bounds), _name(col_bounds)
        key = card, query.device, query.dtype, value.dtype, heads, head_dim, value.shape[3], split, tile, names
        if key in _plans:
            return _plans[key]
    if tile is None:
        spans = partial(_spans, _frozen(row_bounds), _frozen(col_bounds)) if on_cpu else None
        dtype = value.dtype if value.dtype == query.dtype else torch.float32
        each = value.shape[3] // heads if split else value.shape[3]
        tile = choose_tile(card, dtype, each, spans, head_dim=head_dim, heads=heads, stored=not split)
    rows, row_tiles, span_h = _tables(row_bounds, tile.block_h, query.device)
    cols, col_tiles, span_w = _tables(col_bounds, tile.block_w, query.device)
    if tile.design in ("window", "stored", "halved") and (span_h is None or span_w is None):
        raise ValueError(f"tile: the design {tile.design!r} needs bounds on the CPU")
    if tile.design in ("stored", "halved") and split:
        raise ValueError(f"tile: the design {tile.design!r} has no heads that split the channels")
    wide = torch.float32 in (query.dtype, value.dtype) and card.kind == "cuda"
    constants = dict(HEADS=heads, HEAD_DIM=head_dim, BLOCK_D=max(16, triton.next_power_of_2(head_dim)), SPLIT=split)
    constants.update(BLOCK_H=tile.block_h, BLOCK_W=tile.block_w, BLOCK_K=tile.block_k)
    constants.update(PRECISION=tile.precision or ("tf32x3" if wide else "ieee"), STAGES=tile.stages)
    constants.update(num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True)
    window = {}
    if tile.design in ("stored", "halved"):
        quarter = cdiv(span_w, 4)
        window = dict(quarter=quarter, n_keys=cdiv(span_h * 4 * quarter, MIX_KEYS) * MIX_KEYS)
    if tile.design == "window":
        width = _rounded(span_h, span_w, tile.block_k)
        window = dict(span_w=width, SPAN_W=known_width(tile, width), PACKED=width <= 16 and span_h <= 16)
        window["HIDE"] = window["PACKED"] and hides(tile)
    plan = _Plan(tile, (rows, cols, row_tiles, col_tiles), (len(row_tiles), len(col_tiles)), constants, window)
    if key is not None:
        if len(_plans) >= MOST_PLANS:
            _plans.clear()  # the tables stay
        _plans[key] = plan
    return plan


def hides(tile):
    """Whether a product makes the masks of a "window", where compares would be a third of the instructions.

    Not where warps share rows: of two products, one after the other, each would compute all keys.
    """
    return tile.block_h * tile.block_w >= 16 * tile.warps


def known_width(tile, width):
    """The width of a "window" for which its kernel is compiled, 0 for one that serves all.

    Of few keys it is one of many that don't round; for many keys, what is not known beforehand takes instructions.
    """
    return width if tile.block_k > 64 else 0


def _rounded(span_h, span_w, block_k):
    """Keys in a row of the block of a window: no fewer than it spans, and such that few kernels serve many sizes."""
    square = cdiv(math.isqrt(block_k - 1) + 1, 4) * 4
    widths = *range(square, 33, 4), *range(square - 4, 0, -4)
    return next((width for width in widths if width >= span_w and width * span_h <= block_k), span_w)


def _log_sum_exp(launch, query, key, pointers, qk_scale, constants):
    """(B, H', W', heads) float32, to the base of 2: of the logits, plus log2(heads) unless the heads split channels."""
    batch, height, width, heads, _ = query.shape
    n_tiles = len(pointers[2]), len(pointers[3])
    lse = torch.empty(batch, height, width, heads, dtype=torch.float32, device=query.device)
    launch(
        _stats_kernel, batch * n_tiles[0] * n_tiles[1] * heads, query, key, _norms(key), lse, *pointers,
        *query.stride()[:4], *key.stride()[:4], height, width, *n_tiles, qk_scale, max(SAFE_OFFSET[query.dtype], 12.0),
        **constants,
    )  # fmt: skip
    return lse


def _parts(launch, x, parts, *sizes):
    """The units (B, C) of the channels of `x` (B, h, w, C), whose halves go into `parts`; see `_parts_kernel`."""
    batch, h, w, channels = x.shape
    units = torch.empty(batch, channels, dtype=torch.float32, device=x.device)
    blocks = cdiv(channels, PARTS_C)
    launch(
        _parts_kernel, batch * blocks, x, *parts, units, *x.stride()[:3], h, w, channels, blocks, *sizes,
        BLOCK_X=PARTS_X, BLOCK_C=PARTS_C, num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    return units


def _split_values(launch, value):
    """Float32 values as two tensors of float16, and the units (B, C) of their channels."""
    high, low = (torch.empty(value.shape, dtype=torch.float16, device=value.device) for _ in range(2))
    _, h, w, channels = value.shape
    return high, low, _parts(launch, value, (high, low), h * w, channels, channels, channels)


def _split_keys(launch, key, block_d):
    """Keys as `_halved_kernel` reads them, (B, cells, heads, block_d, 4) float16, and the units of their channels.

    There is one cell more than in the grid. The four parts are the first half, the second one, the first one again, and
    the cell's own places: one of 16 for its row, one of 16 for its column.
    """
    batch, h, w, heads, head_dim = key.shape
    make = torch.empty if head_dim == block_d else torch.zeros
    out = make(batch, h * w + 1, heads, block_d, 4, dtype=torch.float16, device=key.device)
    sizes = h * w + 1, head_dim, 4 * block_d, heads * 4 * block_d
    return out, _parts(launch, key.flatten(3), (out, out), *sizes)


def _launch_stored(launch, plan, query, key, value, out, qk_scale):
    """The designs "stored" and "halved", slab by slab."""
    tile, (rows, cols, row_tiles, col_tiles) = plan.tile, plan.pointers
    batch, height, width, _, _ = query.shape
    channels, quarter, n_keys = value.shape[3], plan.window["quarter"], plan.window["n_keys"]
    halved, pixels = tile.design == "halved", tile.block_h * tile.block_w
    wide = halved or torch.float32 in (query.dtype, value.dtype)
    both = dict(BLOCK_H=tile.block_h, BLOCK_W=tile.block_w, enable_fp_fusion=True)
    options = {name: value for name, value in plan.constants.items() if name != "SPLIT"}
    if halved:
        block_d = max(32, options["BLOCK_D"])
        keys, key_units = _split_keys(launch, key, block_d)
        del options["PRECISION"]
        options.update(BLOCK_D=block_d, BLOCK_P=min(HALVED_P, pixels))
    else:
        lse = _log_sum_exp(
            launch, query, key, plan.pointers, qk_scale, {**plan.constants, "BLOCK_K": tile.stats_block_k}
        )
        options.update(PARTS=2 if wide else 1, BLOCK_N=MIX_KEYS)
    high, low, units = _split_values(launch, value) if wide else (value, value, lse)
    parts, kind = (2, torch.float16) if wide else (1, value.dtype)
    tiles = batch * plan.n_tiles[0] * plan.n_tiles[1]
    room = max(1, min(tiles, SLAB // (parts * pixels * n_keys * kind.itemsize)))
    weights = torch.empty(room, parts, pixels, n_keys, dtype=kind, device=query.device)
    blocks = cdiv(channels, tile.block_c)
    mix = dict(both, PARTS=parts, BLOCK_N=tile.mix_k, BLOCK_C=tile.block_c, STAGES=tile.mix_stages)
    mix.update(num_warps=tile.warps, num_stages=tile.mix_stages)
    for first in range(0, tiles, room):
        count = min(room, tiles - first)
        if halved:
            launch(
                _halved_kernel, count * (pixels // options["BLOCK_P"]), query, keys, key_units, weights, rows, cols,
                row_tiles, col_tiles, *query.stride()[:4], height, width, *key.shape[1:3], *plan.n_tiles, first,
                quarter, n_keys, qk_scale, **options,
            )  # fmt: skip
        else:
            launch(
                _weights_kernel, count, query, key, lse, weights, rows, cols, row_tiles, col_tiles,
                *query.stride()[:4], *key.stride()[:4], height, width, key.shape[1], *plan.n_tiles, first, quarter,
                n_keys, qk_scale, **options,
            )  # fmt: skip
        launch(
            _mix_kernel, count * blocks, weights, high, low, units, out, row_tiles, col_tiles, *high.stride()[:3],
            height, width, channels, *plan.n_tiles, blocks, first, quarter, n_keys, **mix,
        )  # fmt: skip


def windowed_attention_fwd(query, key, value, row_bounds, col_bounds, *, scale=None, head_mode="mean", tile=None):
    """Launch the kernels for checked arguments (see `anyup_fast.ops.windowed_attention`).

    Args:
        tile: a `tiling.Tile`; None takes what `tiling.choose_tile` finds for this device.

    Returns:
        (B, H', W', C) in the dtype of `value`. Nothing here waits for the device; bounds on the CPU are copied to it
        once and remembered by their rule or their content, so that a second call can be captured in a graph.
    """
    batch, height, width, heads, head_dim = query.shape
    channels = value.shape[3]
    scale = head_dim**-0.5 if scale is None else scale
    if scale < 0:
        query, scale = -query, -scale
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out = torch.empty(batch, height, width, channels, dtype=value.dtype, device=value.device)
    split, card = head_mode == "split", Device.of(query.device)
    plan = _plan(card, query, value, row_bounds, col_bounds, split, tile)
    tile, options = plan.tile, plan.constants
    # Not zero, which would make NaN of the minus infinity of keys outside the window.
    qk_scale = max(scale, 1e-30) * LOG2E
    programs = batch * plan.n_tiles[0] * plan.n_tiles[1]
    strides = (*query.stride()[:4], *key.stride()[:4], *value.stride()[:3])
    with _on(query.device):
        given = layout(query), layout(key), layout(value)
        launch = Launches(("windowed_attention", card, *given, tile, split, *plan.window.values()))
        if tile.design == "window":
            launch(
                _window_kernel, programs * (heads if split else 1), query, key, value, out, *plan.pointers, *strides,
                height, width, channels, *plan.n_tiles, plan.window["span_w"], qk_scale, **options,
                BLOCK_C=tile.block_c, **{name: plan.window[name] for name in ("SPAN_W", "PACKED", "HIDE")},
            )  # fmt: skip
        elif tile.design == "heads":
            launch(
                _heads_kernel, programs, query, key, value, _norms(key), out, *plan.pointers, *strides, height, width,
                channels, *plan.n_tiles, qk_scale, SAFE_OFFSET[value.dtype], **options, BLOCK_C=tile.block_c,
            )  # fmt: skip
        elif tile.design in ("stored", "halved"):
            _launch_stored(launch, plan, query, key, value, out, qk_scale)
        else:
            first = {**options, "BLOCK_K": tile.stats_block_k}
            lse = _log_sum_exp(launch, query, key, plan.pointers, qk_scale, first)
            each = cdiv(channels // heads, tile.block_c)
            blocks = heads * each if split else cdiv(channels, tile.block_c)
            launch(
                _apply_kernel, programs * blocks, query, key, value, lse, out, *plan.pointers, *strides, height, width,
                channels, *plan.n_tiles, blocks, qk_scale, **options, BLOCK_C=tile.block_c,
            )  # fmt: skip
        launch.done()
    return out
