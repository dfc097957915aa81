"""Feature unification: every channel against the same filters, a softmax, a mean, and no tensor of all responses.

The responses of a pixel lie channel-major, `n = channel * M + filter`; the softmax compares `n = a * C + b` over
a = 0..M-1 for each b, and the mean runs over b. A program owns one pixel and keeps its probabilities, summed over b, in
registers. Three designs:

grouped   C a multiple of M, small filters: the filter stays, `b mod M`, and the channels are `a * (C / M) + b div M`:
          for each of the C / M groups one product of the filters with the taps of its M channels.
written   any C, small filters: all responses of a pixel by products, into a piece of memory that is the program's own
          and small enough for the caches, and read from there in the order of the softmax.
gathered  any C, large filters: entry by entry, tap by tap.
"""

import torch
import triton
import triton.language as tl

from .attention import LOG2E, _dot, _on
from .launches import Launches
from .queries import DTYPES, dot_precision
from .tiling import Device

MOST_FILTERS = 256
ROOM = 64 << 20  # bytes of responses that are written at a time
# What the designs with products take at once: taps, and taps times channels.
MOST_TAPS, MOST_NUMBERS = 64, 8192


@triton.jit
def _pixel(height, width, SIZE: tl.constexpr):
    """Image, row and column of this program's pixel, and rows [r0, r1) and columns [c0, c1) of its taps on the map."""
    pid = tl.program_id(0)
    i = pid // width % height
    j = pid % width
    HALF: tl.constexpr = SIZE // 2
    r0, r1 = tl.maximum(i - HALF, 0), tl.minimum(i + HALF + 1, height)
    c0, c1 = tl.maximum(j - HALF, 0), tl.minimum(j + HALF + 1, width)
    return (pid // (height * width)).to(tl.int64), i, j, r0, r1, c0, c1


@triton.jit
def _taps(offs_t, i, j, r0, r1, c0, c1, SIZE: tl.constexpr):
    """Rows and columns of taps (T,) of the pixel (i, j), and which of them lie on the map."""
    row = i + offs_t // SIZE - SIZE // 2
    col = j + offs_t % SIZE - SIZE // 2
    return row, col, (offs_t < SIZE * SIZE) & (row >= r0) & (row < r1) & (col >= c0) & (col < c1)


@triton.jit(do_not_specialize=["height", "width", "groups"])
def _grouped_kernel(
    x_ptr, basis_ptr, out_ptr, height, width, groups, log2e,
    FILTERS: tl.constexpr, SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    image, i, j, r0, r1, c0, c1 = _pixel(height, width, SIZE)
    scale = log2e / ((r1 - r0) * (c1 - c0)).to(tl.float32)
    offs_t = tl.arange(0, BLOCK_T)
    row, col, mask_t = _taps(offs_t, i, j, r0, r1, c0, c1, SIZE)
    offs_a = tl.arange(0, BLOCK_M)
    mask_a = offs_a < FILTERS
    offs_x = ((image * height + row) * width + col) * groups * FILTERS
    x_ptrs = x_ptr + offs_x[:, None] + offs_a[None, :]
    mask_x = mask_t[:, None] & mask_a[None, :]
    acc = tl.zeros((BLOCK_F, BLOCK_M), tl.float32)
    for first in tl.range(0, FILTERS, BLOCK_F, num_stages=1):
        offs_f = first + tl.arange(0, BLOCK_F)
        mask_f = offs_f < FILTERS
        basis_ptrs = basis_ptr + offs_f[:, None] * (SIZE * SIZE) + offs_t[None, :]
        basis = tl.load(basis_ptrs, mask=mask_f[:, None] & (offs_t < SIZE * SIZE)[None, :], other=0.0)
        for group in tl.range(0, groups, num_stages=STAGES):
            x = tl.load(x_ptrs + group * FILTERS, mask=mask_x, other=0.0)
            response = _dot(basis, x, None, PRECISION)
            if FILTERS < BLOCK_M:
                response = tl.where(mask_a[None, :], response, float("-inf"))
            e = tl.exp2(response * scale - (tl.max(response, 1) * scale)[:, None])
            acc += e * tl.where(mask_f, 1.0 / tl.sum(e, 1), 0.0)[:, None]
    # The probabilities lie close to 1 / FILTERS: summed without it, they keep their digits.
    often = (FILTERS - tl.arange(0, BLOCK_F) + BLOCK_F - 1) // BLOCK_F * groups
    mean = tl.sum(acc - (often / FILTERS)[:, None], 0) / (groups * FILTERS) + 1.0 / FILTERS
    tl.store(out_ptr + ((image * FILTERS + offs_a) * height + i) * width + j, mean, mask=mask_a)


@triton.jit
def _responses(x_ptr, basis_ptr, image, i, j, r0, r1, c0, c1, height, width, channels, entry, mask,
               FILTERS: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    """Sums over the taps of the pixel (i, j) of what `entry`, channel * FILTERS + filter, names; filters lie by tap."""
    channel = entry // FILTERS
    filter = entry % FILTERS
    response = tl.zeros(entry.shape, tl.float32)
    for row in tl.range(r0, r1, num_stages=1):
        for col in tl.range(c0, c1, num_stages=1):
            offs_x = ((image * height + row) * width + col) * channels
            tap = (row - i + SIZE // 2) * SIZE + col - j + SIZE // 2
            x = tl.load(x_ptr + offs_x + channel, mask=mask, other=0.0)
            response += x * tl.load(basis_ptr + tap * FILTERS + filter, mask=mask, other=0.0)
    return response


@triton.jit
def _mean(acc, channels, FILTERS: tl.constexpr, BLOCK_B: tl.constexpr):
    """Mean over all channels of what was summed in columns of every BLOCK_B-th."""
    # The probabilities lie close to 1 / FILTERS: summed without it, they keep their digits.
    often = (channels - tl.arange(0, BLOCK_B) + BLOCK_B - 1) // BLOCK_B
    return tl.sum(acc - (often / FILTERS)[None, :], 1) / channels + 1.0 / FILTERS


@triton.jit(do_not_specialize=["height", "width", "channels"])
def _gathered_kernel(
    x_ptr, basis_ptr, out_ptr, height, width, channels, log2e,
    FILTERS: tl.constexpr, SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    image, i, j, r0, r1, c0, c1 = _pixel(height, width, SIZE)
    scale = log2e / ((r1 - r0) * (c1 - c0)).to(tl.float32)
    offs_a = tl.arange(0, BLOCK_M)
    mask_a = offs_a < FILTERS
    acc = tl.zeros((BLOCK_M, BLOCK_B), tl.float32)
    for first in tl.range(0, channels, BLOCK_B, num_stages=1):
        offs_b = first + tl.arange(0, BLOCK_B)
        mask_b = (offs_b < channels)[None, :]
        mask = mask_a[:, None] & mask_b
        entry = offs_a[:, None] * channels + offs_b[None, :]
        response = _responses(x_ptr, basis_ptr, image, i, j, r0, r1, c0, c1, height, width, channels, entry, mask,
                              FILTERS, SIZE)  # fmt: skip
        x = tl.where(mask_a[:, None], response * scale, float("-inf"))
        e = tl.exp2(x - tl.max(x, 0)[None, :])
        acc += tl.where(mask_b, e / tl.sum(e, 0)[None, :], 0.0)
    mean = _mean(acc, channels, FILTERS, BLOCK_B)
    tl.store(out_ptr + ((image * FILTERS + offs_a) * height + i) * width + j, mean, mask=mask_a)


@triton.jit(do_not_specialize=["height", "width", "n_pixels", "n_programs"])
def _written_kernel(
    x_ptr, basis_ptr, room_ptr, out_ptr, height, width, channels, n_pixels, n_programs, log2e,
    FILTERS: tl.constexpr, SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_B: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < FILTERS
    offs_t = tl.arange(0, BLOCK_T)
    offs_x = tl.arange(0, BLOCK_X)
    room = room_ptr + program.to(tl.int64) * channels * FILTERS
    for pixel in tl.range(program, n_pixels, n_programs, num_stages=1):
        image = (pixel // (height * width)).to(tl.int64)
        i = pixel // width % height
        j = pixel % width
        HALF: tl.constexpr = SIZE // 2
        r0, r1 = tl.maximum(i - HALF, 0), tl.minimum(i + HALF + 1, height)
        c0, c1 = tl.maximum(j - HALF, 0), tl.minimum(j + HALF + 1, width)
        row, col, mask_t = _taps(offs_t, i, j, r0, r1, c0, c1, SIZE)
        basis = tl.load(basis_ptr + offs_t[:, None] * FILTERS + offs_m[None, :],
                        mask=(offs_t < SIZE * SIZE)[:, None] & mask_m[None, :], other=0.0)  # fmt: skip
        at = ((image * height + row) * width + col) * channels
        for first in tl.range(0, channels, BLOCK_X, num_stages=STAGES):
            channel = first + offs_x
            mask = channel < channels
            x = tl.load(x_ptr + at[None, :] + channel[:, None], mask=mask_t[None, :] & mask[:, None], other=0.0)
            response = _dot(x, basis, None, PRECISION)
            tl.store(room + (channel * FILTERS)[:, None] + offs_m[None, :], response,
                     mask=mask[:, None] & mask_m[None, :])  # fmt: skip
        tl.debug_barrier()  # what one thread has written others read, in another order
        scale = log2e / ((r1 - r0) * (c1 - c0)).to(tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_B), tl.float32)
        for first in tl.range(0, channels, BLOCK_B, num_stages=1):
            offs_b = first + tl.arange(0, BLOCK_B)
            mask_b = (offs_b < channels)[None, :]
            x = tl.load(room + (offs_m * channels)[:, None] + offs_b[None, :], mask=mask_m[:, None] & mask_b, other=0.0)
            x = tl.where(mask_m[:, None], x * scale, float("-inf"))
            e = tl.exp2(x - tl.max(x, 0)[None, :])
            acc += tl.where(mask_b, e / tl.sum(e, 0)[None, :], 0.0)
        mean = _mean(acc, channels, FILTERS, BLOCK_B)
        tl.store(out_ptr + ((image * FILTERS + offs_m) * height + i) * width + j, mean, mask=mask_m)
        tl.debug_barrier()  # the next pixel writes over it


def why_not_feature_unification(channels, filters, kernel_size, dtype):
    """Why the kernels can't unify `channels` of `dtype` with so many filters of a size: one sentence, or None."""
    if dtype not in DTYPES:
        return f"needs float16, bfloat16 or float32, got {str(dtype).removeprefix('torch.')}"
    if filters > MOST_FILTERS:
        return f"needs at most {MOST_FILTERS} filters, got {filters}"
    if channels * filters >= 2**31:
        return f"needs fewer than 2**31 responses a pixel, got {channels} channels and {filters} filters"
    return None


def plan(device, channels, filters, kernel_size, precision=None, written=True):
    """Which kernel runs on a `tiling.Device`, a pure function: (design, keyword arguments).

    The design is "grouped", "written", unless that is excluded, or "gathered".
    """
    precision = dot_precision(device, torch.float32, precision)
    block = max(16, triton.next_power_of_2(filters))
    taps = max(16, triton.next_power_of_2(kernel_size**2))
    constants = dict(FILTERS=filters, SIZE=kernel_size, BLOCK_M=block)
    columns = min(2048 // block, triton.next_power_of_2(channels))
    wanted = written and channels >= 16 or channels % filters == 0
    if taps > MOST_TAPS or taps * block > MOST_NUMBERS or not wanted:
        constants.update(BLOCK_B=columns, num_warps=max(1, block * columns // 256), num_stages=1)
        return "gathered", dict(constants, enable_fp_fusion=True)
    constants.update(BLOCK_T=taps, PRECISION=precision, STAGES=2, num_stages=2, enable_fp_fusion=True)
    # Where registers allow it, twice the filters share the taps that are loaded and split.
    roomy = device.kind != "cuda" or device.capability[0] == 9
    rows = (16384 if roomy else 8192) // block
    if channels % filters:
        rows = max(16, min(rows, 128, triton.next_power_of_2(channels)))
        constants.update(BLOCK_X=rows, BLOCK_B=min(4096 // block, triton.next_power_of_2(channels)))
        return "written", dict(constants, num_warps=8 if rows * block > 4096 else 4)
    rows = min(block, rows)
    return "grouped", dict(constants, BLOCK_F=rows, num_warps=8 if rows * block > 4096 else 4)


def feature_unification_fwd(features, basis, *, precision=None):
    """Launch the kernels for checked arguments (see `anyup_fast.ops.feature_unification`).

    Args:
        features: (B, C, h, w), any strides; what `why_not_feature_unification` allows.
        basis: (M, 1, k, k), k odd, any float dtype.
        precision: of products on CUDA: "tf32x3" (None means this), "tf32" or "ieee".

    Returns:
        (B, M, h, w) float32. Beside it one float32 copy of the features is made, and where C is no
        multiple of M room for the responses of some pixels, at most ROOM bytes or one pixel's. Nothing here waits
        for the device.

    Raises:
        ValueError: no such precision.
    """
    batch, channels, height, width = features.shape
    filters, _, size, _ = basis.shape
    card = Device.of(features.device)
    design, constants = plan(card, channels, filters, size, precision)
    with _on(features.device):
        out = torch.empty(batch, filters, height, width, dtype=torch.float32, device=features.device)
        pixels = features.permute(0, 2, 3, 1)
        flat = basis.float().flatten(1)
        if design == "grouped":
            groups = channels // filters
            packed = torch.empty(batch, height, width, groups, filters, dtype=torch.float32, device=features.device)
            packed.copy_(pixels.unflatten(-1, (filters, groups)).transpose(-1, -2))
            arguments = packed, flat.contiguous(), out, height, width, groups
        else:
            arguments = pixels.float().contiguous(), flat.T.contiguous(), out, height, width, channels
        programs = batch * height * width
        if design == "written":
            n_pixels, programs = programs, max(1, min(programs, 2 * card.processors, ROOM // (4 * channels * filters)))
            room = torch.empty(programs, channels, filters, dtype=torch.float32, device=features.device)
            arguments = *arguments[:2], room, *arguments[2:], n_pixels, programs
        kernel = dict(grouped=_grouped_kernel, written=_written_kernel, gathered=_gathered_kernel)[design]
        launch = Launches(("feature_unification", card, features.shape, basis.shape, basis.data_ptr() % 16, precision))
        launch(kernel, programs, *arguments, LOG2E, **constants)
        launch.done()
    return out
