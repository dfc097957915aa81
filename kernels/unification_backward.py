"""Feature unification, backward: gradients of features and filters by recomputation, without atomics.

Of each softmax (one for every pixel and b, see `feature_unification.py`) a first kernel keeps its log-sum-exp and its
mean of the incoming gradient: two numbers per pixel and channel. With them every response knows its own gradient, so a
second kernel goes through channels as they lie, for any C: all filters with a block of channels at one pixel, one
product with the filters for what each tap adds to the features, one with the taps for the filters. The taps (k * k
numbers per pixel and channel, for a band of rows at a time) are gathered by a third kernel; sums for the filters are
kept per program and added at the end.
"""

import torch
import triton
import triton.language as tl

from .attention import LOG2E, _dot, _on
from .queries import dot_precision
from .tiling import Device
from .unification import _pixel, _responses, _taps
from .unification import plan as forward_plan

# Programs that share the pixels in the second kernel, and numbers that the taps of one band of rows may take.
PROGRAMS, MOST_TAPPED = 512, 2**26


@triton.jit
def _grouped_stats_kernel(
    x_ptr, basis_ptr, grad_ptr, lse_ptr, delta_ptr, height, width, groups, log2e,
    FILTERS: tl.constexpr, SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    image, i, j, r0, r1, c0, c1 = _pixel(height, width, SIZE)
    scale = log2e / ((r1 - r0) * (c1 - c0)).to(tl.float32)
    offs_t = tl.arange(0, BLOCK_T)
    row, col, mask_t = _taps(offs_t, i, j, r0, r1, c0, c1, SIZE)
    offs_a = tl.arange(0, BLOCK_M)
    mask_a = offs_a < FILTERS
    pixel = (image * height + i) * width + j
    grad = tl.load(grad_ptr + pixel * FILTERS + offs_a, mask=mask_a, other=0.0)
    offs_x = ((image * height + row) * width + col) * groups * FILTERS
    x_ptrs = x_ptr + offs_x[:, None] + (offs_a * groups)[None, :]
    mask_x = mask_t[:, None] & mask_a[None, :]
    for first in tl.range(0, FILTERS, BLOCK_F, num_stages=1):
        offs_f = first + tl.arange(0, BLOCK_F)
        mask_f = offs_f < FILTERS
        basis_ptrs = basis_ptr + offs_t[None, :] * FILTERS + offs_f[:, None]
        basis = tl.load(basis_ptrs, mask=mask_f[:, None] & (offs_t < SIZE * SIZE)[None, :], other=0.0)
        for group in tl.range(0, groups, num_stages=STAGES):
            x = tl.load(x_ptrs + group, mask=mask_x, other=0.0)
            response = tl.where(mask_a[None, :], _dot(basis, x, None, PRECISION) * scale, float("-inf"))
            top = tl.max(response, 1)
            e = tl.exp2(response - top[:, None])
            total = tl.sum(e, 1)
            offs_b = (pixel * groups + group) * FILTERS + offs_f
            tl.store(lse_ptr + offs_b, top + tl.log2(total), mask=mask_f)
            tl.store(delta_ptr + offs_b, tl.sum(e * grad[None, :], 1) / total, mask=mask_f)


@triton.jit
def _gathered_stats_kernel(
    x_ptr, basis_ptr, grad_ptr, lse_ptr, delta_ptr, height, width, channels, log2e,
    FILTERS: tl.constexpr, SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    image, i, j, r0, r1, c0, c1 = _pixel(height, width, SIZE)
    scale = log2e / ((r1 - r0) * (c1 - c0)).to(tl.float32)
    offs_a = tl.arange(0, BLOCK_M)
    mask_a = offs_a < FILTERS
    pixel = (image * height + i) * width + j
    grad = tl.load(grad_ptr + pixel * FILTERS + offs_a, mask=mask_a, other=0.0)
    for first in tl.range(0, channels, BLOCK_B, num_stages=1):
        offs_b = first + tl.arange(0, BLOCK_B)
        mask_b = offs_b < channels
        entry = offs_a[:, None] * channels + offs_b[None, :]
        mask = mask_a[:, None] & mask_b[None, :]
        response = _responses(x_ptr, basis_ptr, image, i, j, r0, r1, c0, c1, height, width, channels, entry, mask,
                              FILTERS, SIZE)  # fmt: skip
        response = tl.where(mask_a[:, None], response * scale, float("-inf"))
        top = tl.max(response, 0)
        e = tl.exp2(response - top[None, :])
        total = tl.sum(e, 0)
        tl.store(lse_ptr + pixel * channels + offs_b, top + tl.log2(total), mask=mask_b)
        tl.store(delta_ptr + pixel * channels + offs_b, tl.sum(e * grad[:, None], 0) / total, mask=mask_b)


@triton.jit
def _load_taps(x_ptr, basis_ptr, first, image, i, j, r0, r1, c0, c1, height, width, channels, offs_c, mask_c,
               FILTERS: tl.constexpr, SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr):  # fmt: skip
    """Filters (M, T) and features (T, C) at taps `first` onwards of the pixel (i, j)."""
    offs_t = first + tl.arange(0, BLOCK_T)
    offs_m = tl.arange(0, BLOCK_M)
    row, col, mask_t = _taps(offs_t, i, j, r0, r1, c0, c1, SIZE)
    x_ptrs = x_ptr + (((image * height + row) * width + col) * channels)[:, None] + offs_c[None, :]
    x = tl.load(x_ptrs, mask=mask_t[:, None] & mask_c[None, :], other=0.0)
    mask_basis = (offs_m < FILTERS)[:, None] & (offs_t < SIZE * SIZE)[None, :]
    return tl.load(basis_ptr + offs_t[None, :] * FILTERS + offs_m[:, None], mask=mask_basis, other=0.0), x


@triton.jit
def _taps_kernel(
    x_ptr, basis_ptr, grad_ptr, lse_ptr, delta_ptr, tapped_ptr, sums_ptr,
    height, width, channels, first_row, n_rows, n_blocks_c, n_items, n_programs, log2e,
    FILTERS: tl.constexpr, SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    N_BLOCKS_T: tl.constexpr = (SIZE * SIZE + BLOCK_T - 1) // BLOCK_T
    HALF: tl.constexpr = SIZE // 2
    program = tl.program_id(0) // N_BLOCKS_T
    first_tap = tl.program_id(0) % N_BLOCKS_T * BLOCK_T
    each = tl.cdiv(n_items, n_programs)
    offs_m = tl.arange(0, BLOCK_M)
    offs_t = first_tap + tl.arange(0, BLOCK_T)
    acc = tl.zeros((BLOCK_M, BLOCK_T), tl.float32)
    for item in tl.range(program * each, tl.minimum((program + 1) * each, n_items), num_stages=1):
        pix = (item // n_blocks_c).to(tl.int64)
        offs_c = item % n_blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_c = offs_c < channels
        image = pix // (n_rows * width)
        i = first_row + (pix // width % n_rows).to(tl.int32)
        j = (pix % width).to(tl.int32)
        r0, r1 = tl.maximum(i - HALF, 0), tl.minimum(i + HALF + 1, height)
        c0, c1 = tl.maximum(j - HALF, 0), tl.minimum(j + HALF + 1, width)
        share = 1.0 / ((r1 - r0) * (c1 - c0)).to(tl.float32)
        basis, x = _load_taps(x_ptr, basis_ptr, first_tap, image, i, j, r0, r1, c0, c1, height, width, channels, offs_c,
                              mask_c, FILTERS, SIZE, BLOCK_M, BLOCK_T)  # fmt: skip
        if N_BLOCKS_T == 1:
            response = _dot(basis, x, None, PRECISION)
        else:
            response = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
            for block in tl.range(0, N_BLOCKS_T, num_stages=1):
                some, there = _load_taps(x_ptr, basis_ptr, block * BLOCK_T, image, i, j, r0, r1, c0, c1, height, width,
                                         channels, offs_c, mask_c, FILTERS, SIZE, BLOCK_M, BLOCK_T)  # fmt: skip
                response = _dot(some, there, response, PRECISION)
        # Responses lie channel-major; which softmax one belongs to, and where in it, is the published interleaving.
        entry = offs_c[None, :] * FILTERS + offs_m[:, None]
        mask = (offs_m < FILTERS)[:, None] & mask_c[None, :]
        pixel = (image * height + i) * width + j
        lse = tl.load(lse_ptr + pixel * channels + entry % channels, mask=mask, other=0.0)
        delta = tl.load(delta_ptr + pixel * channels + entry % channels, mask=mask, other=0.0)
        grad = tl.load(grad_ptr + pixel * FILTERS + entry // channels, mask=mask, other=0.0)
        # Nothing where there is no response: gradient and mean are 0 there.
        slope = tl.exp2(response * (share * log2e) - lse) * (grad - delta) * share
        acc = _dot(slope, tl.trans(x), acc, PRECISION)
        tapped = _dot(tl.trans(basis), slope, None, PRECISION)
        tapped_ptrs = tapped_ptr + ((pix * (SIZE * SIZE) + offs_t) * channels)[:, None] + offs_c[None, :]
        tl.store(tapped_ptrs, tapped, mask=(offs_t < SIZE * SIZE)[:, None] & mask_c[None, :])
    mask = (offs_m < FILTERS)[:, None] & (offs_t < SIZE * SIZE)[None, :]
    sums_ptrs = sums_ptr + (program.to(tl.int64) * FILTERS + offs_m)[:, None] * (SIZE * SIZE) + offs_t[None, :]
    tl.store(sums_ptrs, acc, mask=mask)


@triton.jit
def _gather_kernel(
    tapped_ptr, out_ptr, height, width, channels, first_row, n_rows, top, n_out, n_blocks_c,
    SIZE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offs_c = tl.program_id(0) % n_blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    pix = (tl.program_id(0) // n_blocks_c).to(tl.int64)
    image = pix // (n_out * width)
    i = top + pix // width % n_out
    j = pix % width
    out_ptrs = out_ptr + ((image * height + i) * width + j) * channels + offs_c
    acc = tl.load(out_ptrs, mask=mask_c, other=0.0)
    for tap in tl.range(0, SIZE * SIZE, num_stages=1):
        row = i - tap // SIZE + SIZE // 2 - first_row
        col = j - tap % SIZE + SIZE // 2
        inside = (row >= 0) & (row < n_rows) & (col >= 0) & (col < width)
        offs = (((image * n_rows + row) * width + col) * (SIZE * SIZE) + tap) * channels
        acc += tl.load(tapped_ptr + offs + offs_c, mask=offs_c < tl.where(inside, channels, 0), other=0.0)
    tl.store(out_ptrs, acc, mask=mask_c)


def plan(device, channels, filters, kernel_size, precision=None):
    """Constants and options of the kernels on a `tiling.Device`, a pure function.

    Returns:
        (whether the statistics are the grouped ones, of the statistics, of the taps, of their gathering): keyword
        arguments.
    """
    design, stats = forward_plan(device, channels, filters, kernel_size, precision, written=False)
    grouped = design == "grouped"
    if grouped:
        stats.update(BLOCK_F=min(stats["BLOCK_F"], 64), num_warps=8)
    block = max(16, triton.next_power_of_2(filters))
    # Of 32 channels the products with 128 filters spill 80 to 184 bytes.
    taps = dict(FILTERS=filters, SIZE=kernel_size, BLOCK_M=block, BLOCK_C=max(16, min(32, 2048 // block)))
    taps.update(BLOCK_T=max(16, min(32, triton.next_power_of_2(kernel_size**2))))
    taps.update(PRECISION=dot_precision(device, torch.float32, precision), num_warps=8, num_stages=1)
    block_c = min(256, triton.next_power_of_2(channels))
    gather = dict(SIZE=kernel_size, BLOCK_C=block_c, num_warps=max(1, block_c // 64), num_stages=1)
    return grouped, stats, dict(taps, enable_fp_fusion=True), dict(gather, enable_fp_fusion=True)


def feature_unification_bwd(grad, features, basis, *, precision=None):
    """Gradients of `feature_unification_fwd`, for checked arguments.

    Args:
        grad: (B, M, h, w), gradient of the output, any strides and float dtype.
        features, basis, precision: as the forward was given them.

    Returns:
        (grad_features, grad_basis), contiguous, in shape and dtype of their tensors, computed in float32. Equal to the
        bit from run to run; nothing here waits for the device.

    Raises:
        ValueError: no such precision.
    """
    batch, channels, height, width = features.shape
    filters, _, size, _ = basis.shape
    grouped, stats, taps, gather = plan(Device.of(features.device), channels, filters, size, precision)
    with _on(features.device):

        def room(*shape):
            return torch.empty(shape, dtype=torch.float32, device=features.device)

        x = features.permute(0, 2, 3, 1).float().contiguous()
        given = (grad.permute(0, 2, 3, 1).float() / channels).contiguous()
        by_tap = basis.float().flatten(1).T.contiguous()
        lse, delta = room(batch, height, width, channels), room(batch, height, width, channels)
        kernel = _grouped_stats_kernel if grouped else _gathered_stats_kernel
        kernel[(batch * height * width,)](
            x, by_tap, given, lse, delta, height, width, channels // filters if grouped else channels, LOG2E, **stats
        )
        out, sums = torch.zeros_like(x), torch.zeros(filters, size * size, dtype=torch.float32, device=x.device)
        blocks, pieces = triton.cdiv(channels, taps["BLOCK_C"]), triton.cdiv(size * size, taps["BLOCK_T"])
        rows = max(1, min(height, MOST_TAPPED // (batch * width * channels * size * size)))
        for first in range(0, height, rows):
            n_rows = min(rows, height - first)
            items = batch * n_rows * width * blocks
            programs = min(PROGRAMS, items)
            tapped, parts = room(batch, n_rows, width, size * size, channels), room(programs, filters, size * size)
            _taps_kernel[(programs * pieces,)](
                x, by_tap, given, lse, delta, tapped, parts, height, width, channels, first, n_rows, blocks, items,
                programs, LOG2E, **taps,
            )  # fmt: skip
            sums += parts.sum(0)
            top, bottom = max(0, first - size // 2), min(height, first + n_rows + size // 2)
            gathered = triton.cdiv(channels, gather["BLOCK_C"])
            _gather_kernel[(batch * (bottom - top) * width * gathered,)](
                tapped, out, height, width, channels, first, n_rows, top, bottom - top, gathered, **gather
            )
        grad_features = out.permute(0, 3, 1, 2).to(features.dtype).contiguous()
        return grad_features, sums.view(basis.shape).to(basis.dtype)
