"""3x3 convolution of the queries, RMSNorm and projection in one pass: what the attention takes is all that is written.

A program owns a tile of BLOCK_H x BLOCK_W pixels with all their channels: nine taps times DIM input channels, BLOCK_K
at a time, into one accumulator in float32; the norm and the second product follow in registers. Bytes: the queries in
and out, once each; the taps come from the caches.
"""

import torch
import triton
import triton.language as tl

from .attention import _dot, _on
from .launches import Launches, cdiv, layout, side_by_side
from .tiling import Device

DIMS = (16, 32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PRECISIONS = ("tf32x3", "tf32", "ieee")


@triton.jit(do_not_specialize=["height", "width", "n_tiles_h", "n_tiles_w"])
def _query_projection_kernel(
    x_ptr, conv_ptr, norm_ptr, proj_ptr, bias_ptr, out_ptr,
    x_b, x_h, x_w, height, width, n_tiles_h, n_tiles_w, eps,
    DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
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
    for step in tl.range(0, 9 * PIECES, num_stages=STAGES):
        down = step // PIECES // 3 - 1
        right = step // PIECES % 3 - 1
        mask = (i + down >= 0) & (i + down < height) & (j + right >= 0) & (j + right < width)
        shift = tl.cast(down, tl.int64) * x_h + tl.cast(right, tl.int64) * x_w + step % PIECES * BLOCK_K
        x = tl.load(x_ptrs + shift, mask=mask[:, None], other=0.0)
        acc = _dot(x, tl.load(conv_ptrs + step * (BLOCK_K * DIM)), acc, PRECISION)
    # Rounded after the norm, which brings it into the range of every dtype.
    y = acc * tl.rsqrt(tl.sum(acc * acc, 1) * (1.0 / DIM) + eps)[:, None] * tl.load(norm_ptr + offs_d)[None, :]
    y = y.to(x_ptr.dtype.element_ty)
    offs_pix = (image * height + i) * width + j
    mask_pix = ((i < height) & (j < width))[:, None]
    for n in tl.range(0, DIM, BLOCK_N, num_stages=1):
        proj = tl.load(proj_ptr + offs_d[:, None] * DIM + (n + offs_n)[None, :])
        out = _dot(y, proj, None, PRECISION) + tl.load(bias_ptr + n + offs_n)[None, :]
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


def plan(device, dtype, dim, precision=None):
    """Constants and options of the kernel for a `tiling.Device`, a pure function: dict of keyword arguments."""
    precision = dot_precision(device, dtype, precision)
    cuda, generation = device.kind == "cuda", device.capability[0]
    if dtype == torch.float32 and cuda:
        rows, piece, columns, warps, stages = (8 if generation == 10 else 4), 32, 16, 8, 2
    elif dtype == torch.float32:
        rows, piece, columns, warps, stages = 4, 32, 32, 4, 2
    elif cuda and device.shared_memory >= 160000:
        rows, piece, columns, warps, stages = (16 if generation < 10 else 8), 64, 64, 8, 3
    else:
        rows, piece, columns, warps, stages = 8, 32, 64, (4 if cuda else 8), 2
    return dict(
        DIM=dim,
        BLOCK_H=rows,
        BLOCK_W=16,
        BLOCK_K=min(piece, dim),
        BLOCK_N=min(columns, dim),
        PRECISION=precision,
        STAGES=stages,
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
    )


def prepared(conv_weight, norm_weight, proj_weight, proj_bias, dtype):
    """The four weights as the kernel reads them: (3, 3, in, out) and (in, out) in `dtype`, vectors in float32."""
    conv = side_by_side(conv_weight.permute(2, 3, 1, 0).to(dtype))
    vectors = side_by_side(norm_weight.float()), side_by_side(proj_bias.float())
    return conv, vectors[0], side_by_side(proj_weight.T.to(dtype)), vectors[1]


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
        precision: of float32 products on CUDA: "tf32x3" (None means this), "tf32" or "ieee".
        ready: whether the weights are what `prepared` made of these.

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
        conv, norm, proj, bias = weights if ready else prepared(*weights, query.dtype)
        out = torch.empty(batch, height, width, dim, dtype=query.dtype, device=query.device)
        tiles = cdiv(height, constants["BLOCK_H"]), cdiv(width, constants["BLOCK_W"])
        launch = Launches(("project_queries", card, layout(query), precision))
        launch(
            _query_projection_kernel, batch * tiles[0] * tiles[1], query, conv, norm, proj, bias, out,
            *query.stride()[:3], height, width, *tiles, eps, **constants,
        )  # fmt: skip
        launch.done()
    return out
