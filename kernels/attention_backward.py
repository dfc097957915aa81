"""Windowed attention, backward: gradients of query, key and value by recomputation, without atomics.

With S the softmax of one head, A the weights of the values (the mean of all S, or S where the heads split the channels)
and G the gradient of the output, everything follows from `slope` = G V^T: D = sum of S * slope over the window, then
S * (slope - D), times scale (and 1 / heads), with K for the queries and with Q for the keys; A^T G for the values.
Stored between the kernels are 8 bytes per pixel and head: log-sum-exp and D.

queries   a program owns a tile of pixels, as in the forward. Where the rectangle of keys that its windows span is one
          block ("window"), softmax, D and the gradient come from one slope held in registers. Else ("blocks") the
          forward's statistics come first, then two sweeps over the blocks of keys: one for D, one for the gradient.
keys      a program owns a tile of keys and walks over the tiles of pixels that can see one of them. The gradients of
values    keys and of a block of channels of the values are two kernels, so that each holds its sums in registers. Few
          tiles of keys share the pixels between several programs, whose sums are added at the end.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl

from .attention import (
    LOG2E,
    _dot,
    _frozen,
    _kept,
    _load_query,
    _log_sum_exp,
    _on,
    _rectangle,
    _seen,
    _spans,
    _tables,
    _tile,
)
from .launches import launched
from .tiling import RDNA, Device

KEY_W = 8
# See `Plan.width`.
MOST_WIDTH = 128
# Programs that the kernels by key aim at, and the most that share one tile of keys.
PROGRAMS, MOST_SPLITS = 1024, 32


@triton.jit
def _dot_slope(slope, x, acc, PRECISION: tl.constexpr):
    """Product with rounded slopes; those may lie beyond the range of float16, but not of what multiplies it."""
    if x.dtype == tl.float16:
        return _dot(slope, x.to(tl.float32), acc, PRECISION)
    else:
        return _dot(slope.to(x.dtype), x, acc, PRECISION)


@triton.jit
def _slopes(a_ptrs, b_ptrs, mask_a, mask_b, n_channels,
            BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Products over the channels, (M, N), of what lies at a_ptrs (M, BLOCK_C) and at b_ptrs (BLOCK_C, N) onwards."""
    offs_c = tl.arange(0, BLOCK_C)
    acc = tl.zeros((a_ptrs.shape[0], b_ptrs.shape[1]), tl.float32)
    for c in tl.range(0, n_channels, BLOCK_C, num_stages=STAGES):
        mask_c = c + offs_c < n_channels
        a = tl.load(a_ptrs + c, mask=mask_a[:, None] & mask_c[None, :], other=0.0)
        b = tl.load(b_ptrs + c, mask=mask_c[:, None] & mask_b[None, :], other=0.0)
        acc = _dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def _query_window_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, grad_q_ptr, row_ptr, col_ptr, row_tile_ptr, col_tile_ptr,
    g_b, g_h, g_w, q_b, q_h, q_w, q_n, k_b, k_h, k_w, k_n, v_b, v_h, v_w,
    height, width, channels, n_tiles_h, n_tiles_w, qk_scale, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr, SPAN_W: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    image, i, j, mask_pix, r0, r1, c0, c1, span_r0, span_r1, _, _, span_c0, span_c1 = _tile(
        tl.program_id(0), row_ptr, col_ptr, row_tile_ptr, col_tile_ptr, height, width, n_tiles_h, n_tiles_w,
        BLOCK_H, BLOCK_W,
    )  # fmt: skip
    row, col, mask_k, key_bits, pix_bits = _rectangle(
        span_r0, span_r1, span_c0, span_c1, r0, r1, c0, c1, 0, BLOCK_K, SPAN_W, PACKED
    )
    key_h, key_w = row.to(tl.int64), col.to(tl.int64)
    image = image.to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    offs_c = tl.arange(0, BLOCK_C)
    offs_pix = (image * height + i) * width + j
    k_ptrs = k_ptr + image * k_b + (key_h * k_h + key_w * k_w)[None, :] + offs_d[:, None]
    v_ptrs = v_ptr + image * v_b + (key_h * v_h + key_w * v_w)[None, :] + offs_c[:, None]
    g_ptrs = grad_ptr + image * g_b + (i.to(tl.int64) * g_h + j.to(tl.int64) * g_w)[:, None] + offs_c[None, :]
    mask_d = offs_d < HEAD_DIM
    per_head = channels // HEADS
    if not SPLIT:
        slope = _slopes(g_ptrs, v_ptrs, mask_pix, mask_k, channels, BLOCK_C, PRECISION, STAGES)
    for head in tl.range(0, HEADS, num_stages=1):
        q = _load_query(q_ptr, image, i, j, head, mask_pix, q_b, q_h, q_w, q_n, HEAD_DIM, BLOCK_D)
        k = tl.load(k_ptrs + tl.cast(head, tl.int64) * k_n, mask=mask_k[None, :] & mask_d[:, None], other=0.0)
        if SPLIT:
            first = head * per_head
            slope = _slopes(g_ptrs + first, v_ptrs + first, mask_pix, mask_k, per_head, BLOCK_C, PRECISION, STAGES)
        s = _dot(q, k, None, PRECISION)
        seen = _seen(row, col, mask_k, key_bits, pix_bits, r0, r1, c0, c1, PACKED)
        s = tl.where(seen, s, float("-inf"))
        top = tl.max(s, 1) * qk_scale
        e = tl.exp2(s * qk_scale - top[:, None])
        total = tl.sum(e, 1)
        e *= (1.0 / total)[:, None]
        delta = tl.sum(e * slope, 1)
        lse = top + tl.log2(total)
        share = scale
        if not SPLIT:
            lse += tl.log2(HEADS * 1.0)
            share = scale / HEADS
        tl.store(lse_ptr + offs_pix * HEADS + head, lse, mask=mask_pix)
        tl.store(delta_ptr + offs_pix * HEADS + head, delta, mask=mask_pix)
        grad_q = _dot_slope(e * (slope - delta[:, None]), tl.trans(k), None, PRECISION) * share
        grad_q_ptrs = grad_q_ptr + ((offs_pix * HEADS + head) * HEAD_DIM)[:, None] + offs_d[None, :]
        tl.store(grad_q_ptrs, grad_q.to(grad_q_ptr.dtype.element_ty), mask=mask_pix[:, None] & mask_d[None, :])


@triton.jit
def _key_block(
    n, g_ptrs, v_base, v_h, v_w, mask_pix, r0, r1, c0, c1, span_r0, span_r1, span_c0, span_c1, n_channels,
    KEY_H: tl.constexpr, KEY_W: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The n-th block of keys of a rectangle: rows, columns and which exist (K,), who sees them and slopes (P, K)."""
    offs_k = tl.arange(0, KEY_H * KEY_W)
    n_cols = tl.cdiv(span_c1 - span_c0, KEY_W)
    row = span_r0 + n // n_cols * KEY_H + offs_k // KEY_W
    col = span_c0 + n % n_cols * KEY_W + offs_k % KEY_W
    mask_k = (row < span_r1) & (col < span_c1)
    seen = _seen(row, col, mask_k, row, r0, r0, r1, c0, c1, False)
    row, col = row.to(tl.int64), col.to(tl.int64)
    v_ptrs = v_base + (row * v_h + col * v_w)[None, :] + tl.arange(0, BLOCK_C)[:, None]
    return row, col, mask_k, seen, _slopes(g_ptrs, v_ptrs, mask_pix, mask_k, n_channels, BLOCK_C, PRECISION, STAGES)


@triton.jit
def _query_blocks_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, grad_q_ptr, row_ptr, col_ptr, row_tile_ptr, col_tile_ptr,
    g_b, g_h, g_w, q_b, q_h, q_w, q_n, k_b, k_h, k_w, k_n, v_b, v_h, v_w,
    height, width, channels, n_tiles_h, n_tiles_w, qk_scale, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, KEY_H: tl.constexpr, KEY_W: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first_head = tl.program_id(0) % (HEADS // GROUP) * GROUP
    image, i, j, mask_pix, r0, r1, c0, c1, span_r0, span_r1, _, _, span_c0, span_c1 = _tile(
        tl.program_id(0) // (HEADS // GROUP), row_ptr, col_ptr, row_tile_ptr, col_tile_ptr, height, width, n_tiles_h,
        n_tiles_w, BLOCK_H, BLOCK_W,
    )  # fmt: skip
    P: tl.constexpr = BLOCK_H * BLOCK_W
    image = image.to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    n_channels = channels
    k_base = k_ptr + image * k_b + tl.cast(first_head, tl.int64) * k_n
    v_base = v_ptr + image * v_b
    g_ptrs = grad_ptr + image * g_b + (i.to(tl.int64) * g_h + j.to(tl.int64) * g_w)[:, None]
    g_ptrs += tl.arange(0, BLOCK_C)[None, :]
    if SPLIT:
        n_channels = channels // HEADS
        v_base += first_head * n_channels
        g_ptrs += first_head * n_channels
    offs_stats = ((image * height + i) * width + j) * HEADS + first_head
    queries, lses, deltas, accs = (), (), (), ()
    for h in tl.static_range(GROUP):
        q = _load_query(q_ptr, image, i, j, first_head + h, mask_pix, q_b, q_h, q_w, q_n, HEAD_DIM, BLOCK_D)
        queries = queries + (q,)
        lses = lses + (tl.load(lse_ptr + offs_stats + h, mask=mask_pix, other=0.0),)
        deltas = deltas + (tl.zeros((P,), tl.float32),)
        accs = accs + (tl.zeros((P, BLOCK_D), tl.float32),)
    n_blocks = tl.cdiv(span_r1 - span_r0, KEY_H) * tl.cdiv(span_c1 - span_c0, KEY_W)
    for n in tl.range(0, n_blocks, num_stages=1):
        row, col, mask_k, seen, slope = _key_block(
            n, g_ptrs, v_base, v_h, v_w, mask_pix, r0, r1, c0, c1, span_r0, span_r1, span_c0, span_c1, n_channels,
            KEY_H, KEY_W, BLOCK_C, PRECISION, STAGES,
        )  # fmt: skip
        k_ptrs = k_base + (row * k_h + col * k_w)[None, :] + offs_d[:, None]
        sums = ()
        for h in tl.static_range(GROUP):
            k = tl.load(k_ptrs + tl.cast(h, tl.int64) * k_n, mask=mask_d[:, None] & mask_k[None, :], other=0.0)
            e = tl.exp2(_dot(queries[h], k, None, PRECISION) * qk_scale - lses[h][:, None])
            sums = sums + (deltas[h] + tl.sum(tl.where(seen, e, 0.0) * slope, 1),)
        deltas = sums
    if not SPLIT:  # in the log-sum-exp rides the mean over the heads
        scaled = ()
        for h in tl.static_range(GROUP):
            scaled = scaled + (deltas[h] * HEADS,)
        deltas = scaled
    for n in tl.range(0, n_blocks, num_stages=1):
        row, col, mask_k, seen, slope = _key_block(
            n, g_ptrs, v_base, v_h, v_w, mask_pix, r0, r1, c0, c1, span_r0, span_r1, span_c0, span_c1, n_channels,
            KEY_H, KEY_W, BLOCK_C, PRECISION, STAGES,
        )  # fmt: skip
        k_ptrs = k_base + (row * k_h + col * k_w)[None, :] + offs_d[:, None]
        gradients = ()
        for h in tl.static_range(GROUP):
            k = tl.load(k_ptrs + tl.cast(h, tl.int64) * k_n, mask=mask_d[:, None] & mask_k[None, :], other=0.0)
            e = tl.exp2(_dot(queries[h], k, None, PRECISION) * qk_scale - lses[h][:, None])
            e = tl.where(seen, e, 0.0) * (slope - deltas[h][:, None])
            gradients = gradients + (_dot_slope(e, tl.trans(k), accs[h], PRECISION),)
        accs = gradients
    for h in tl.static_range(GROUP):
        tl.store(delta_ptr + offs_stats + h, deltas[h], mask=mask_pix)
        grad_q_ptrs = grad_q_ptr + ((offs_stats + h) * HEAD_DIM)[:, None] + offs_d[None, :]
        grad_q = (accs[h] * scale).to(grad_q_ptr.dtype.element_ty)
        tl.store(grad_q_ptrs, grad_q, mask=mask_pix[:, None] & mask_d[None, :])


@triton.jit
def _key_tile(
    pid, row_range_ptr, col_range_ptr, n_rows, n_cols, n_tiles_h, n_tiles_w, n_splits,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, KEY_H: tl.constexpr, KEY_W: tl.constexpr,
):  # fmt: skip
    """Split, image, keys (K,), which of them exist; the pixels that may see one, and this split's steps over them."""
    split = pid % n_splits
    image = pid // n_splits // (n_tiles_h * n_tiles_w)
    tile_h = pid // n_splits // n_tiles_w % n_tiles_h
    tile_w = pid // n_splits % n_tiles_w
    offs_k = tl.arange(0, KEY_H * KEY_W)
    row = tile_h * KEY_H + offs_k // KEY_W
    col = tile_w * KEY_W + offs_k % KEY_W
    i0, i1 = tl.load(row_range_ptr + 2 * tile_h), tl.load(row_range_ptr + 2 * tile_h + 1)
    j0, j1 = tl.load(col_range_ptr + 2 * tile_w), tl.load(col_range_ptr + 2 * tile_w + 1)
    steps = tl.cdiv(i1 - i0, BLOCK_H) * tl.cdiv(j1 - j0, BLOCK_W)
    first = tl.cdiv(steps, n_splits) * split
    last = tl.minimum(first + tl.cdiv(steps, n_splits), steps)
    mask_k = (row < n_rows) & (col < n_cols)
    return split.to(tl.int64), image.to(tl.int64), row, col, mask_k, i0, i1, j0, j1, first, last


@triton.jit
def _pixels(step, i0, i1, j0, j1, row, col, mask_k, row_ptr, col_ptr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """One step's pixels (P,), which of them exist, and who of them sees which key, (K, P)."""
    offs = tl.arange(0, BLOCK_H * BLOCK_W)
    n_tiles_w = tl.cdiv(j1 - j0, BLOCK_W)
    i = i0 + step // n_tiles_w * BLOCK_H + offs // BLOCK_W
    j = j0 + step % n_tiles_w * BLOCK_W + offs % BLOCK_W
    mask_pix = (i < i1) & (j < j1)
    r0 = tl.load(row_ptr + 2 * i, mask=mask_pix, other=0)
    r1 = tl.load(row_ptr + 2 * i + 1, mask=mask_pix, other=0)
    c0 = tl.load(col_ptr + 2 * j, mask=mask_pix, other=0)
    c1 = tl.load(col_ptr + 2 * j + 1, mask=mask_pix, other=0)
    seen = mask_k[:, None] & (row[:, None] >= r0[None, :]) & (row[:, None] < r1[None, :])
    seen = seen & (col[:, None] >= c0[None, :]) & (col[:, None] < c1[None, :])
    return i, j, mask_pix, seen


@triton.jit
def _key_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, grad_k_ptr, row_ptr, col_ptr, row_range_ptr, col_range_ptr,
    g_b, g_h, g_w, q_b, q_h, q_w, q_n, k_b, k_h, k_w, k_n, v_b, v_h, v_w,
    n_images, height, width, n_rows, n_cols, channels, n_tiles_h, n_tiles_w, n_splits, qk_scale, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, KEY_H: tl.constexpr, KEY_W: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first_head = tl.program_id(0) % (HEADS // GROUP) * GROUP
    split, image, row, col, mask_k, i0, i1, j0, j1, first, last = _key_tile(
        tl.program_id(0) // (HEADS // GROUP), row_range_ptr, col_range_ptr, n_rows, n_cols, n_tiles_h, n_tiles_w,
        n_splits, BLOCK_H, BLOCK_W, KEY_H, KEY_W,
    )  # fmt: skip
    offs_d = tl.arange(0, BLOCK_D)
    offs_c = tl.arange(0, BLOCK_C)
    mask_key = mask_k[:, None] & (offs_d < HEAD_DIM)[None, :]
    key_h, key_w = row.to(tl.int64), col.to(tl.int64)
    k_ptrs = k_ptr + image * k_b + (key_h * k_h + key_w * k_w)[:, None] + offs_d[None, :]
    k_ptrs += tl.cast(first_head, tl.int64) * k_n
    v_ptrs = v_ptr + image * v_b + (key_h * v_h + key_w * v_w)[:, None] + offs_c[None, :]
    g_base = grad_ptr + image * g_b
    n_channels = channels
    if SPLIT:
        n_channels = channels // HEADS
        v_ptrs += first_head * n_channels
        g_base += first_head * n_channels
    keys, accs = (), ()
    for h in tl.static_range(GROUP):
        keys = keys + (tl.load(k_ptrs + tl.cast(h, tl.int64) * k_n, mask=mask_key, other=0.0),)
        accs = accs + (tl.zeros((KEY_H * KEY_W, BLOCK_D), tl.float32),)
    for step in tl.range(first, last, num_stages=1):
        i, j, mask_pix, seen = _pixels(step, i0, i1, j0, j1, row, col, mask_k, row_ptr, col_ptr, BLOCK_H, BLOCK_W)
        g_ptrs = g_base + (i.to(tl.int64) * g_h + j.to(tl.int64) * g_w)[None, :] + offs_c[:, None]
        slope = _slopes(v_ptrs, g_ptrs, mask_k, mask_pix, n_channels, BLOCK_C, PRECISION, STAGES)
        offs_stats = ((image * height + i) * width + j) * HEADS + first_head
        sums = ()
        for h in tl.static_range(GROUP):
            q = _load_query(q_ptr, image, i, j, first_head + h, mask_pix, q_b, q_h, q_w, q_n, HEAD_DIM, BLOCK_D)
            lse = tl.load(lse_ptr + offs_stats + h, mask=mask_pix, other=0.0)
            delta = tl.load(delta_ptr + offs_stats + h, mask=mask_pix, other=0.0)
            e = tl.exp2(_dot(keys[h], tl.trans(q), None, PRECISION) * qk_scale - lse[None, :])
            e = tl.where(seen, e, 0.0) * (slope - delta[None, :])
            sums = sums + (_dot_slope(e, q, accs[h], PRECISION),)
        accs = sums
    offs_key = ((split * n_images + image) * n_rows + row) * n_cols + col
    for h in tl.static_range(GROUP):
        grad_k_ptrs = grad_k_ptr + ((offs_key * HEADS + first_head + h) * HEAD_DIM)[:, None] + offs_d[None, :]
        tl.store(grad_k_ptrs, (accs[h] * scale).to(grad_k_ptr.dtype.element_ty), mask=mask_key)


@triton.jit
def _value_kernel(
    grad_ptr, q_ptr, k_ptr, lse_ptr, grad_v_ptr, row_ptr, col_ptr, row_range_ptr, col_range_ptr,
    g_b, g_h, g_w, q_b, q_h, q_w, q_n, k_b, k_h, k_w, k_n,
    n_images, height, width, n_rows, n_cols, channels, n_tiles_h, n_tiles_w, n_splits, n_blocks_c, qk_scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, KEY_H: tl.constexpr, KEY_W: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Channel blocks of one tile follow each other: they read the same queries.
    block = tl.program_id(0) % n_blocks_c
    split, image, row, col, mask_k, i0, i1, j0, j1, first, last = _key_tile(
        tl.program_id(0) // n_blocks_c, row_range_ptr, col_range_ptr, n_rows, n_cols, n_tiles_h, n_tiles_w,
        n_splits, BLOCK_H, BLOCK_W, KEY_H, KEY_W,
    )  # fmt: skip
    N_HEADS: tl.constexpr = 1 if SPLIT else HEADS
    first_head, c_start, c_end = block * 0, block * BLOCK_C, channels
    if SPLIT:
        first_head = block // (n_blocks_c // HEADS)
        c_start = first_head * (channels // HEADS) + block % (n_blocks_c // HEADS) * BLOCK_C
        c_end = (first_head + 1) * (channels // HEADS)
    offs_d = tl.arange(0, BLOCK_D)
    offs_c = c_start + tl.arange(0, BLOCK_C)
    mask_c = (offs_c < c_end)[None, :]
    k_ptrs = k_ptr + image * k_b + (row.to(tl.int64) * k_h + col.to(tl.int64) * k_w)[:, None] + offs_d[None, :]
    k_ptrs += tl.cast(first_head, tl.int64) * k_n
    mask_key = mask_k[:, None] & (offs_d < HEAD_DIM)[None, :]
    keys = ()
    for h in tl.static_range(N_HEADS):
        keys = keys + (tl.load(k_ptrs + tl.cast(h, tl.int64) * k_n, mask=mask_key, other=0.0),)
    acc = tl.zeros((KEY_H * KEY_W, BLOCK_C), tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        i, j, mask_pix, seen = _pixels(step, i0, i1, j0, j1, row, col, mask_k, row_ptr, col_ptr, BLOCK_H, BLOCK_W)
        g_ptrs = grad_ptr + image * g_b + (i.to(tl.int64) * g_h + j.to(tl.int64) * g_w)[:, None] + offs_c[None, :]
        g = tl.load(g_ptrs, mask=mask_pix[:, None] & mask_c, other=0.0)
        offs_stats = ((image * height + i) * width + j) * HEADS + first_head
        for h in tl.static_range(N_HEADS):
            q = _load_query(q_ptr, image, i, j, first_head + h, mask_pix, q_b, q_h, q_w, q_n, HEAD_DIM, BLOCK_D)
            lse = tl.load(lse_ptr + offs_stats + h, mask=mask_pix, other=0.0)
            e = tl.exp2(_dot(keys[h], tl.trans(q), None, PRECISION) * qk_scale - lse[None, :])
            w = e if h == 0 else w + e  # noqa: F821
        acc = _dot(tl.where(seen, w, 0.0).to(g.dtype), g, acc, PRECISION)
    offs_key = ((split * n_images + image) * n_rows + row) * n_cols + col
    grad_v_ptrs = grad_v_ptr + (offs_key * channels)[:, None] + offs_c[None, :]
    tl.store(grad_v_ptrs, acc.to(grad_v_ptr.dtype.element_ty), mask=mask_k[:, None] & mask_c)


@dataclass(frozen=True)
class Blocks:
    """What one kernel takes at once: block_h x block_w pixels, block_k keys (16 or more), block_c channels; its warps
    and stages."""

    block_h: int
    block_w: int
    block_k: int
    block_c: int
    warps: int
    stages: int = 2


@dataclass(frozen=True)
class Plan:
    """How the backward runs.

    Attributes:
        window: whether the rectangle of keys of a tile of pixels is one block.
        query, key, value: `Blocks` of the kernels of the three gradients.
        width: numbers of one head, times heads, that a program accumulates gradients for.
        precision: of float32 products on CUDA: "tf32x3" (None means this), "tf32" or "ieee".
    """

    window: bool
    query: Blocks
    key: Blocks
    value: Blocks
    width: int = MOST_WIDTH
    precision: str | None = None


def plan(device, dtype, spans):
    """The `Plan` for one problem, a pure function.

    Args:
        device: a `tiling.Device`.
        dtype: of the products: that of query and value, float32 where they differ.
        spans: as in `tiling.choose_tile`.
    """
    keys = None
    if spans is not None:
        rows, cols = spans(8, 8)
        keys = max(16, triton.next_power_of_2(rows * cols))
    cuda, generation = device.kind == "cuda", device.capability[0]
    # There operands come from shared memory, which leaves registers for more pixels.
    roomy = device.family in ("sm_90", "sm_100")
    # Elsewhere on CUDA more than this spills: 240 bytes of the windows of 64 keys in float32, for one.
    narrow = cuda and not roomy
    # Slopes of float16 are multiplied as float32.
    width = 64 if narrow and dtype != torch.bfloat16 else MOST_WIDTH
    if device.family in RDNA:
        windows = dict.fromkeys((16, 32) if dtype == torch.float16 else (16, 32, 64), (64, 4))
        query, key, value = Blocks(4, 8, 32, 32, 4, 1), Blocks(2, 8, 32, 32, 4, 1), Blocks(2, 8, 32, 64, 4, 1)
        width = 32 if dtype == torch.float16 else MOST_WIDTH
    elif dtype == torch.float32:
        windows = dict.fromkeys((16, 32) if narrow else (16, 32, 64), (32 if roomy else 16, 8))
        query, key = Blocks(8, 8, 32 if roomy else 16, 16, 8), Blocks(2, 8, 64, 16, 8 if generation == 10 else 4)
        value = Blocks(4 if roomy else 2, 8, 64, 32, 8 if generation == 10 else 4)
    else:
        # On sm_90 eight warps on 64 rows would compute rows twice; four spill 72 bytes, where 128 rows do not fit.
        windows = {**dict.fromkeys((16, 32, 64), (64, 4)), 128: (64, 8 if cuda and generation != 9 else 4)}
        if dtype == torch.float16 and device.family == "sm_90":
            del windows[128]
        query = Blocks(8, 8, 64, 64, 8) if roomy else Blocks(4 if narrow else 8, 8, 32, 64, 4)
        if narrow and dtype == torch.bfloat16:
            query = Blocks(8, 8, 32, 32, 8)  # 32 pixels by four warps spill 184 bytes on sm_80
        key, value = Blocks(2, 8, 64, 32, 4) if narrow else Blocks(4, 8, 64, 64, 4), Blocks(4, 8, 64, 128, 4)
    if keys in windows:
        block_c, warps = windows[keys]
        query = Blocks(8, 8, keys, block_c, warps, query.stages)
        if device.family == "sm_90" and keys == 128 and math.prod(spans(16, 8)) <= keys:
            query = Blocks(16, 8, keys, block_c, 8, query.stages)
    return Plan(keys in windows, query, key, value, width)


def _range_table(bounds, n_key, block):
    """(tiles, 2) int32 for tiles of `block` keys: the queries [a, b) among which are all that see one of them."""
    first = torch.arange(0, n_key, block, device=bounds.device)[:, None]
    sees = (bounds[:, 0] < first + block) & (bounds[:, 1] > first)
    query = torch.arange(len(bounds), device=bounds.device)
    start, end = torch.where(sees, query, len(bounds)).amin(1), torch.where(sees, query + 1, 0).amax(1)
    return torch.stack((torch.minimum(start, end), end), 1).to(torch.int32)


@_kept
def _frozen_ranges(bounds, n_key, block, device):
    return _range_table(bounds, n_key, block).to(device)


def _ranges(bounds, n_key, block, device):
    if bounds.device.type == "cpu":
        return _frozen_ranges(bounds, n_key, block, device)
    return _range_table(bounds, n_key, block)


def _keys(blocks):
    return dict(KEY_H=blocks.block_k // KEY_W, KEY_W=KEY_W)


def _added(parts, dtype):
    return parts[0] if len(parts) == 1 else parts.sum(0).to(dtype)


def windowed_attention_bwd(
    grad, query, key, value, row_bounds, col_bounds, *, scale=None, head_mode="mean", tiles=None, for_query=True
):
    """Gradients of `windowed_attention_fwd`, for checked arguments.

    Args:
        grad: (B, H', W', C), gradient of the output, any strides; taken in the dtype of `value`.
        query, key, value, row_bounds, col_bounds, scale, head_mode: as the forward was given them.
        tiles: a `Plan`; None takes what `plan` finds for this device.
        for_query: whether the gradients of query and key are asked for, which take two of the three kernels.

    Returns:
        (grad_query, grad_key, grad_value), contiguous, in shape and dtype of their tensors; the first two (B, 0) where
        they are not asked for. Sums are float32. Equal to the bit from run to run; nothing here waits for the device.

    Raises:
        ValueError: `tiles` takes windows as one block that they do not fit in, or whose bounds are not on the CPU.
    """
    batch, height, width, heads, head_dim = query.shape
    n_rows, n_cols, channels = value.shape[1:]
    signed = scale = head_dim**-0.5 if scale is None else scale
    if scale < 0:
        query, scale = -query, -scale
    grad = grad.to(value.dtype)
    grad, query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (grad, query, key, value))
    split = head_mode == "split"
    on_cpu = row_bounds.device.type == col_bounds.device.type == "cpu"
    card = Device.of(query.device)
    if tiles is None:
        spans = partial(_spans, _frozen(row_bounds), _frozen(col_bounds)) if on_cpu else None
        dtype = value.dtype if value.dtype == query.dtype else torch.float32
        tiles = plan(card, dtype, spans)
    if tiles.window and not on_cpu:
        raise ValueError("tiles: one block for the whole window needs bounds on the CPU")
    wide = torch.float32 in (query.dtype, value.dtype)
    sizes = dict(HEADS=heads, HEAD_DIM=head_dim, BLOCK_D=max(16, triton.next_power_of_2(head_dim)), SPLIT=split)
    # Slopes of float16 are multiplied as float32.
    sizes["PRECISION"] = (tiles.precision or ("tf32x3" if wide else "tf32")) if card.kind == "cuda" else "ieee"
    most = 1 if split else max(1, tiles.width // sizes["BLOCK_D"])
    group = max(n for n in range(1, heads + 1) if heads % n == 0 and n <= most)
    qk_scale = max(scale, 1e-30) * LOG2E
    strides = (*grad.stride()[:3], *query.stride()[:4], *key.stride()[:4])
    value_strides = value.stride()[:3]

    def constants(blocks, **more):
        pixels = dict(BLOCK_H=blocks.block_h, BLOCK_W=blocks.block_w, STAGES=blocks.stages)
        options = dict(num_warps=blocks.warps, num_stages=blocks.stages, enable_fp_fusion=True)
        return {**sizes, **pixels, **options, **more}

    def by_key(blocks, parts, like):
        """Programs, room for the sums of all splits, pointers to the pixels that see a tile, and the numbers."""
        ranges = (
            _ranges(row_bounds, n_rows, blocks.block_k // KEY_W, query.device),
            _ranges(col_bounds, n_cols, KEY_W, query.device),
        )
        n_tiles = len(ranges[0]), len(ranges[1])
        programs = batch * n_tiles[0] * n_tiles[1] * parts
        steps = triton.cdiv(height, blocks.block_h) * triton.cdiv(width, blocks.block_w)
        splits = min(triton.cdiv(PROGRAMS, programs), MOST_SPLITS, steps)
        dtype = like.dtype if splits == 1 else torch.float32
        sums = torch.empty(splits, *like.shape, dtype=dtype, device=like.device)
        numbers = batch, height, width, n_rows, n_cols, channels, *n_tiles, splits
        return (programs * splits,), sums, (rows, cols, *ranges), numbers

    with _on(query.device):
        rows, row_tiles, span_h = _tables(row_bounds, tiles.query.block_h, query.device)
        cols, col_tiles, span_w = _tables(col_bounds, tiles.query.block_w, query.device)
        pointers, n_tiles = (rows, cols, row_tiles, col_tiles), (len(row_tiles), len(col_tiles))
        numbers = *strides, *value_strides, height, width, channels, *n_tiles, qk_scale, signed
        programs = batch * n_tiles[0] * n_tiles[1]
        grad_query = torch.empty(query.shape if for_query else (batch, 0), dtype=query.dtype, device=query.device)
        delta = torch.empty(batch, height, width, heads, dtype=torch.float32, device=query.device)
        blocks = tiles.query
        if not for_query:
            del delta
            lse = _log_sum_exp(launched, query, key, pointers, qk_scale, constants(blocks, BLOCK_K=blocks.block_k))
        elif tiles.window:
            if span_h * span_w > blocks.block_k:
                raise ValueError(
                    f"tiles: {blocks.block_k} keys do not hold the {span_h} x {span_w} that a tile of pixels spans"
                )
            lse = torch.empty(delta.shape, dtype=delta.dtype, device=delta.device)
            _query_window_kernel[(programs,)](
                grad, query, key, value, lse, delta, grad_query, *pointers, *numbers,
                **constants(blocks, BLOCK_K=blocks.block_k, BLOCK_C=blocks.block_c, SPAN_W=span_w,
                            PACKED=span_w <= 16 and span_h <= 16),
            )  # fmt: skip
        else:
            options = constants(blocks, BLOCK_K=blocks.block_k)
            lse = _log_sum_exp(launched, query, key, pointers, qk_scale, options)
            _query_blocks_kernel[(programs * (heads // group),)](
                grad, query, key, value, lse, delta, grad_query, *pointers, *numbers,
                **constants(blocks, **_keys(blocks), BLOCK_C=blocks.block_c, GROUP=group),
            )  # fmt: skip

        grad_key = key.new_empty(batch, 0)
        if for_query:
            blocks = tiles.key
            grid, sums, pointers, numbers = by_key(blocks, heads // group, key)
            _key_kernel[grid](
                grad, query, key, value, lse, delta, sums, *pointers, *strides, *value_strides, *numbers, qk_scale,
                scale, **constants(blocks, **_keys(blocks), BLOCK_C=blocks.block_c, GROUP=group),
            )  # fmt: skip
            grad_key = _added(sums, key.dtype)

        blocks = tiles.value
        each = channels // heads if split else channels
        parts = triton.cdiv(each, blocks.block_c) * (heads if split else 1)
        grid, sums, pointers, numbers = by_key(blocks, parts, value)
        _value_kernel[grid](
            grad, query, key, lse, sums, *pointers, *strides, *numbers, parts, qk_scale,
            **constants(blocks, **_keys(blocks), BLOCK_C=blocks.block_c),
        )  # fmt: skip
        return grad_query, grad_key, _added(sums, value.dtype)
