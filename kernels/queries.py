"""3x3 convolution of the queries, RMSNorm and projection in one pass: what the attention takes is all that is written.

A program owns a tile of BLOCK_H x BLOCK_W pixels with all their channels: nine taps times DIM input channels, BLOCK_K
at a time, into one accumulator in float32; the norm and the second product follow in registers. Bytes: the queries in
and out, once each; the taps come from the caches.

Of float32 both factors are sums of two float16 (HALVES): three products of those, two of them small, take the place of
one. Weights are split once, each column in its own unit, a power of two; a program splits what it reads, in the unit of
the largest number that its tile sees, so that nothing leaves the range of float16. What is smaller than that by 2 ** 17
or more loses digits: the error stays below 2 ** -39 of the largest.
"""

import torch
import triton
import triton.language as tl

from .attention import _dot, _halves, _on
from .launches import Launches, cdiv, layout, side_by_side
from .tiling import Device

DIMS = (16, 32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PRECISIONS = ("tf32x3", "tf32", "ieee")
# Of products of halves, by the first number of the compute capability: rows of pixels, channels in and out at a time,
# warps, stages.
HALVED = {8: (8, 32, 32, 8, 2), 9: (8, 32, 16, 8, 3), 10: (8, 32, 64, 8, 2), 12: (8, 32, 32, 8, 2)}
SCALE = tl.constexpr(1024.0)  # of a normalised pixel, whose numbers lie within the square root of DIM


@triton.jit
def _dot_halves(x, high_ptrs, low, acc):
    """`acc` plus the product of float32 with a matrix in two halves; the second lies `low` behind the first."""
    x_high, x_low = _halves(x)
    high = tl.load(high_ptrs)
    acc = _dot(x_low, high, acc, "ieee")
    acc = _dot(x_high, tl.load(high_ptrs + low), acc, "ieee")
    return _dot(x_high, high, acc, "ieee")


@triton.jit
def _unit(
    x_ptrs, x_h, x_w, first_i, first_j, height, width, offs_d,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A power of two and its reciprocal: by it the largest finite number that a tile sees lies below 2 ** 15."""
    COLS: tl.constexpr = BLOCK_W + 2
    most = tl.zeros((BLOCK_S, offs_d.shape[0]), tl.float32)
    for start in tl.range(0, (BLOCK_H + 2) * COLS, BLOCK_S, num_stages=1):
        place = start + tl.arange(0, BLOCK_S)
        row = first_i - 1 + place // COLS
        col = first_j - 1 + place % COLS
        seen = (row >= 0) & (row < tl.minimum(height, first_i + BLOCK_H + 1)) & (col >= 0) & (col < width)
        ptrs = x_ptrs + (row.to(tl.int64) * x_h + col.to(tl.int64) * x_w)[:, None] + offs_d[None, :]
        x = tl.abs(tl.load(ptrs, mask=seen[:, None], other=0.0))
        most = tl.maximum(most, tl.where(x < float("inf"), x, 0.0))
    exponent = tl.maximum(tl.max(tl.max(most, 1), 0).to(tl.int32, bitcast=True) >> 23, 15)
    return ((exponent - 14) << 23).to(tl.float32, bitcast=True), ((268 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["height", "width", "n_tiles_h", "n_tiles_w", "columns"])
def _query_projection_kernel(
    x_ptr, conv_ptr, norm_ptr, proj_ptr, bias_ptr, out_ptr,
    x_b, x_h, x_w, height, width, n_tiles_h, n_tiles_w, columns, eps,
    DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, HALVES: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    image = (pid // (n_tiles_h * n_tiles_w)).to(tl.int64)
    offs = tl.arange(0, BLOCK_H * BLOCK_W)
    i = pid // n_tiles_w % n_tiles_h * BLOCK_H + offs // BLOCK_W
    j = pid % n_tiles_w * BLOCK_W + offs % BLOCK_W
    offs_k = tl.arange(0, BLOCK_K)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, DIM)
    x_ptrs = x_ptr + image * x_b + (i.to(tl.int64) * x_h + j.to(tl.int64) * x_w)[:, None] + offs_k[None, :]
    conv_ptrs = conv_ptr + offs_k[:, None] * DIM + offs_d[None, :]
    PIECES: tl.constexpr = DIM // BLOCK_K
    acc = tl.zeros((BLOCK_H * BLOCK_W, DIM), tl.float32)
    if HALVES:  # norm_ptr has the units of the convolution's columns, then those of the projection's
        first_i = pid // n_tiles_w % n_tiles_h * BLOCK_H
        unit, factor = _unit(x_ptr + image * x_b, x_h, x_w, first_i, pid % n_tiles_w * BLOCK_W, height, width, offs_d,
                             BLOCK_H, BLOCK_W, BLOCK_S)  # fmt: skip
    for step in tl.range(0, 9 * PIECES, num_stages=STAGES):
        down = step // PIECES // 3 - 1
        right = step // PIECES % 3 - 1
        mask = (i + down >= 0) & (i + down < height) & (j + right >= 0) & (j + right < width)
        shift = tl.cast(down, tl.int64) * x_h + tl.cast(right, tl.int64) * x_w + step % PIECES * BLOCK_K
        x = tl.load(x_ptrs + shift, mask=mask[:, None], other=0.0)
        if HALVES:
            acc = _dot_halves(x * factor, conv_ptrs + step * (BLOCK_K * DIM), 9 * DIM * DIM, acc)
        else:
            acc = _dot(x, tl.load(conv_ptrs + step * (BLOCK_K * DIM)), acc, PRECISION)
    # Rounded after the norm, which brings it into the range of every dtype.
    weight = tl.load(norm_ptr + offs_d)[None, :]
    if HALVES:
        acc *= weight * unit
        y = acc * (tl.rsqrt(tl.sum(acc * acc, 1) * (1.0 / DIM) + eps) * SCALE)[:, None]
    else:
        y = acc * tl.rsqrt(tl.sum(acc * acc, 1) * (1.0 / DIM) + eps)[:, None] * weight
        y = y.to(x_ptr.dtype.element_ty)
    offs_pix = (image * height + i) * width + j
    mask_pix = ((i < height) & (j < width))[:, None]
    # All columns there are: a number known beforehand would have the loop unrolled, for which registers are missing.
    for n in tl.range(0, columns, BLOCK_N, num_stages=1):
        proj_ptrs = proj_ptr + offs_d[:, None] * DIM + (n + offs_n)[None, :]
        bias = tl.load(bias_ptr + n + offs_n)[None, :]
        if HALVES:
            out = _dot_halves(y, proj_ptrs, DIM * DIM, tl.zeros((BLOCK_H * BLOCK_W, BLOCK_N), tl.float32))
            out = out * tl.load(norm_ptr + DIM + n + offs_n)[None, :] * (1.0 / SCALE) + bias
        else:
            out = _dot(y, tl.load(proj_ptrs), None, PRECISION) + bias
        out_ptrs = out_ptr + (offs_pix * DIM)[:, None] + (n + offs_n)[None, :]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_pix)


def why_not_query_projection(qk_dim, dtype):
    """Why the kernel can't serve queries of `qk_dim` channels in `dtype`: one sentence, or None."""
    if dtype not in DTYPES:
        return f"needs float16, bfloat16 or float32, got {str(dtype).removeprefix('torch.')}"
    if qk_dim not in DIMS:
        return f"needs a qk_dim of {', '.join(map(str, DIMS[:-1]))} or {DIMS[-1]}, got {qk_dim}"
    return None


def dot_precision(device, dtype, precision):
    """`input_precision` of products of `dtype` on a `tiling.Device`.

    Args:
        precision: "tf32x3", "tf32" or "ieee"; None means "tf32x3". It counts for float32 on CUDA alone; elsewhere
            products are "ieee".

    Raises:
        ValueError: no such precision.
    """
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision: need one of {', '.join(PRECISIONS)}, got {precision!r}")
    if device.kind != "cuda" or dtype != torch.float32:
        return "ieee"
    return precision or "tf32x3"


def in_halves(device, dtype, precision=None):
    """Whether the kernel's factors are sums of two float16 on a `tiling.Device`: float32 of no other precision."""
    return device.kind == "cuda" and dtype == torch.float32 and precision is None


def plan(device, dtype, dim, precision=None):
    """Constants and options of the kernel for a `tiling.Device`, a pure function: dict of keyword arguments."""
    halves = in_halves(device, dtype, precision)
    precision = "ieee" if halves else dot_precision(device, dtype, precision)
    cuda, generation = device.kind == "cuda", device.capability[0]
    if halves:
        rows, piece, columns, warps, stages = HALVED[generation]
    elif dtype == torch.float32 and cuda:
        rows, piece, columns, warps, stages = (8 if generation == 10 else 4), 32, 16, 8, 2
    elif dtype == torch.float32:
        rows, piece, columns, warps, stages = 4, 32, 32, 4, 2
    elif cuda and device.shared_memory >= 160000:
        rows, columns = (8, 32) if generation == 9 else (16 if generation < 9 else 8, 64)
        piece, warps, stages = 64, 8, 3
    else:
        rows, piece, columns, warps, stages = 8, 32, 64, (4 if cuda else 8), 2
    # On sm_90 registers for two programs on a multiprocessor.
    options = dict(maxnreg=128) if halves and generation == 9 else {}
    return dict(
        options,
        DIM=dim,
        BLOCK_H=rows,
        BLOCK_W=16,
        BLOCK_K=min(piece, dim),
        BLOCK_N=min(columns, dim),
        PRECISION=precision,
        STAGES=stages,
        HALVES=halves,
        BLOCK_S=32,
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
    )


def prepared(conv_weight, norm_weight, proj_weight, proj_bias, dtype, halves=False):
    """The four weights as the kernel reads them.

    Returns:
        (3, 3, in, out), (out,), (in, out) and (out,): the matrices in `dtype`, the vectors in float32. With `halves`
        the matrices are (2, ...), two parts in float16, the norm's weight is multiplied into the projection, and in
        its place are the units (2, out) of both matrices' columns.
    """
    conv, proj, bias = conv_weight.permute(2, 3, 1, 0), proj_weight.T, side_by_side(proj_bias.float())
    if not halves:
        return side_by_side(conv.to(dtype)), side_by_side(norm_weight.float()), side_by_side(proj.to(dtype)), bias
    dim = len(proj_bias)
    conv, conv_unit = in_parts(conv.reshape(1, -1, dim).mT.float())
    proj, proj_unit = in_parts(norm_weight.float() * proj_weight[None].float())
    conv = side_by_side(conv.mT.reshape(2, 3, 3, dim, dim))
    return conv, torch.cat((conv_unit, proj_unit)), side_by_side(proj[0].mT), bias


def in_parts(matrices):
    """Float32 matrices (n, rows, cols) as sums of two in float16.

    Returns:
        (n, 2, rows, cols) float16 and (n, rows) float32, the powers of two that the rows of the sum are multiplied by.
    """
    most = torch.where(matrices.isfinite(), matrices.abs(), 0.0).amax(-1)
    # As in the kernel: the largest of a row lies below 2 ** 15.
    exponent = (most.view(torch.int32) >> 23).clamp(min=15)
    scaled = matrices * ((268 - exponent) << 23).view(torch.float32)[..., None]
    high = scaled.half()
    return torch.stack((high, (scaled - high.float()).half()), 1), ((exponent - 14) << 23).view(torch.float32)


def project_queries_fwd(
    query, conv_weight, norm_weight, proj_weight, proj_bias, *, eps, precision=None, ready=False
):  # fmt: skip
    """Launch the kernel: `linear(rmsnorm(conv3x3(query)))`, zero padding, for checked arguments.

    Args:
        query: (B, H', W', D), D as `why_not_query_projection` allows; float16, bfloat16 or float32, any strides.
        conv_weight: (D, D, 3, 3): out, in, rows, columns.
        norm_weight: (D,) of the norm.
        proj_weight: (D, D) and proj_bias: (D,) of the projection. Weights may have any float dtype.
        eps: of the norm.
        precision: of float32 products on CUDA: "tf32x3", "tf32" or "ieee"; None means those of two halves each, as
            exact as "tf32x3".
        ready: whether the weights are what `prepared` made of these, with `in_halves` of device, dtype and precision.

    Returns:
        (B, H', W', D) in the dtype of `query`. Products are of that dtype; sums, norm and bias are float32, and the
        convolution is rounded only once it is normalised. Nothing here waits for the device.

    Raises:
        ValueError: no such precision.
    """
    batch, height, width, dim = query.shape
    query = query if query.stride(-1) == 1 else query.contiguous()
    card = Device.of(query.device)
    constants = plan(card, query.dtype, dim, precision)
    weights = conv_weight, norm_weight, proj_weight, proj_bias
    with _on(query.device):
        conv, norm, proj, bias = weights if ready else prepared(*weights, query.dtype, constants["HALVES"])
        out = torch.empty(batch, height, width, dim, dtype=query.dtype, device=query.device)
        tiles = cdiv(height, constants["BLOCK_H"]), cdiv(width, constants["BLOCK_W"])
        launch = Launches(("project_queries", card, layout(query), precision))
        launch(
            _query_projection_kernel, batch * tiles[0] * tiles[1], query, conv, norm, proj, bias, out,
            *query.stride()[:3], height, width, *tiles, dim, eps, **constants,
        )  # fmt: skip
        launch.done()
    return out
