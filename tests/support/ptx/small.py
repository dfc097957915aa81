"""Small Triton kernels, right and broken, for the tests of the machine itself.

    python -m ptx.small sm_80        # JSON lines: name, error and limit, or the kind of fault that has to be found

needs a process without TRITON_INTERPRET.
"""

import argparse
import json
import re
import sys
from functools import partial

import torch
import triton
import triton.language as tl

from .far import FAR, strided
from .launch import launcher
from .report import Fault
from .syntax import Unsupported

# What is taken out of a compiled product, and the kind of fault that it has to be.
PIECES = {
    "barrier": (r"\tbar\.sync \t0;", "shared race"),
    "wait": (r"\tcp\.async\.wait_group \t0;", "shared race"),
    "fence": (r"\tfence\.proxy\.async\.shared::cta;", "proxy fence"),
}


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Sum of two vectors."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=mask) + tl.load(y_ptr + offs, mask=mask), mask=mask)


@triton.jit
def unmasked_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """A copy that reads beyond the end."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs), mask=offs < n)


@triton.jit
def clash_kernel(out_ptr, BLOCK: tl.constexpr):
    """All programs store to the same place."""
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.arange(0, BLOCK) + tl.program_id(0))


@triton.jit
def same_kernel(out_ptr, BLOCK: tl.constexpr):
    """All programs store the same numbers to the same place."""
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.arange(0, BLOCK))


@triton.jit
def softmax_kernel(x_ptr, out_ptr, stride, n, BLOCK: tl.constexpr):
    """Softmax of rows."""
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + offs, mask=offs < n, other=float("-inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + row * n + offs, e / tl.sum(e, 0), mask=offs < n)


@triton.jit
def reduce_kernel(x_ptr, sum_ptr, top_ptr, where_ptr, M: tl.constexpr, N: tl.constexpr):
    """Sums of columns; largest numbers of rows, and where the least ones are."""
    x = tl.load(x_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(sum_ptr + tl.arange(0, N), tl.sum(x, 0))
    tl.store(top_ptr + tl.arange(0, M), tl.max(x, 1))
    tl.store(where_ptr + tl.arange(0, M), tl.argmin(x, 1))


@triton.jit
def matmul_kernel(a_ptr, b_ptr, c_ptr, m, n, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                  PRECISION: tl.constexpr, STAGES: tl.constexpr, TRANS: tl.constexpr):  # fmt: skip
    """A product of matrices; TRANS: the right one lies transposed."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in tl.range(0, k, BLOCK_K, num_stages=STAGES):
        ks = first + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + rows[:, None] * k + ks[None, :], mask=(rows < m)[:, None] & (ks < k)[None, :], other=0.0)
        if TRANS:
            mask = (cols < n)[:, None] & (ks < k)[None, :]
            b = tl.trans(tl.load(b_ptr + cols[:, None] * k + ks[None, :], mask=mask, other=0.0))
        else:
            mask = (ks < k)[:, None] & (cols < n)[None, :]
            b = tl.load(b_ptr + ks[:, None] * n + cols[None, :], mask=mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    c = acc.to(c_ptr.dtype.element_ty)
    tl.store(c_ptr + rows[:, None] * n + cols[None, :], c, mask=(rows < m)[:, None] & (cols < n)[None, :])


@triton.jit
def chain_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    """Two products; what the first one gives is the left operand of the second (registers on sm_90)."""
    offs = tl.arange(0, N)
    a = tl.load(a_ptr + offs[:, None] * N + offs[None, :])
    b = tl.load(b_ptr + offs[:, None] * N + offs[None, :])
    tl.store(c_ptr + offs[:, None] * N + offs[None, :], tl.dot(tl.dot(a, b).to(a.dtype), b))


@triton.jit
def branch_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Programs take different paths and turns."""
    pid = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    if tl.sum(x, 0) * (pid % 3 - 1) > 0:
        for turn in range(pid):
            x = x * 0.5 + tl.sum(x, 0) * (turn + 1) / BLOCK
    else:
        x = -x
    tl.store(out_ptr + pid * BLOCK + offs, x)


@triton.jit
def rows_kernel(x_ptr, out_ptr, stride, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """A copy of rows; without WIDE their offsets are products of 32 bits."""
    row = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + tl.program_id(0) * BLOCK + offs, tl.load(x_ptr + row * stride + offs))


def relative(out, wanted):
    """Largest difference over the largest |wanted|."""
    return ((out.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()


def matmul(kind, precision, sizes=(70, 50, 83), blocks=(32, 32, 32), warps=4, stages=1, trans=False):
    """Error of a product."""
    m, n, k = sizes
    a, b, c = torch.randn(m, k).to(kind), torch.randn(k, n).to(kind), torch.empty(m, n)
    grid = triton.cdiv(m, blocks[0]), triton.cdiv(n, blocks[1])
    options = dict(PRECISION=precision, STAGES=stages, TRANS=trans, num_warps=warps, num_stages=stages)
    matmul_kernel[grid](a, b.T.contiguous() if trans else b, c, m, n, k, *blocks, **options)
    return relative(c, a.double() @ b.double())


def right(far):
    """Yield (name, error, limit) of kernels that work; `far` is a tensor with far rows."""
    x, y, out = torch.randn(1000), torch.randn(1000), torch.empty(1000)
    add_kernel[(4,)](x, y, out, 1000, BLOCK=256)
    yield "vector add", relative(out, x + y), 0
    x, out = torch.randn(9, 130)[:, :117], torch.empty(9, 117)
    softmax_kernel[(9,)](x, out, x.stride(0), 117, BLOCK=128)
    yield "softmax", relative(out, x.softmax(1)), 1e-6
    for warps in (1, 8):
        x = torch.randn(32, 64)
        total, top, where = torch.empty(64), torch.empty(32), torch.empty(32, dtype=torch.int32)
        reduce_kernel[(1,)](x, total, top, where, M=32, N=64, num_warps=warps)
        wrong = relative(top, x.amax(1)) + (where != x.argmin(1)).sum().item()
        yield f"reductions, {warps} warps", relative(total, x.sum(0)) + wrong, 1e-6
    for kind, precision, limit in ((torch.bfloat16, "ieee", 1e-6), (torch.float16, "ieee", 1e-6),
                                   (torch.float32, "tf32", 1e-3), (torch.float32, "tf32x3", 1e-6),
                                   (torch.float32, "ieee", 1e-6)):  # fmt: skip
        name = f"matmul {kind}, {precision}".replace("torch.", "")
        yield name, matmul(kind, precision, trans=True), limit
        error = matmul(kind, precision, (128, 64, 64), (64, 64, 32), warps=8, stages=2)
        yield name + ", 8 warps, 2 stages", error, limit
    a, b, c = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16(), torch.empty(64, 64)
    chain_kernel[(1,)](a, b, c, N=64)
    yield "chain of products", relative(c, (a.float() @ b.float()).bfloat16().double() @ b.double()), 1e-2
    x, out = torch.randn(128), torch.empty(7, 128)
    branch_kernel[(7,)](x, out, BLOCK=128)
    wanted = []
    for pid in range(7):
        z = x.double()
        if z.sum() * (pid % 3 - 1) > 0:
            for turn in range(pid):
                z = z * 0.5 + z.sum() * (turn + 1) / 128
        else:
            z = -z
        wanted.append(z)
    yield "divergent programs", relative(out, torch.stack(wanted)), 1e-5
    out = torch.empty(3, 128)
    rows_kernel[(3,)](far, out, far.stride(0), BLOCK=128, WIDE=True)
    yield "rows beyond 2**31, products of 64 bits", relative(out, far), 0


def broken(far, again):
    """Yield (name, kind of fault it has to be, function); `again` runs a product with part of its PTX taken out."""
    x, out = torch.randn(1000), torch.empty(1000)
    yield "mask left out", "out of bounds", lambda: unmasked_kernel[(4,)](x, out, 1000, BLOCK=256)
    view, longer = torch.randn(2000)[:1000], torch.empty(1024)
    yield "read beyond a view", "outside the tensor", lambda: unmasked_kernel[(4,)](view, longer, 1000, BLOCK=256)
    half = torch.empty(1024)
    half[:1000] = 1.0
    yield "never written", "uninitialised", lambda: unmasked_kernel[(4,)](half, longer, 1000, BLOCK=256)
    clash = torch.empty(128, dtype=torch.int32)
    yield "two programs, one address", "global race", lambda: clash_kernel[(2,)](clash, BLOCK=128)
    yield "two programs, one address, one number", "global race", lambda: same_kernel[(2,)](clash, BLOCK=128)
    rows = torch.empty(3, 128)
    narrow = partial(rows_kernel[(3,)], far, rows, far.stride(0), BLOCK=128, WIDE=False)
    yield "rows beyond 2**31, products of 32 bits", "out of bounds", narrow
    for what, (pattern, kind) in PIECES.items():
        for which in range(again(pattern, None)):
            yield f"{what} {which} left out", kind, partial(again, pattern, which)


def product_without(target):
    """A function (pattern, which) -> how often it is in a product's PTX, or with `which` the error without that one."""
    a, b = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    ptx = []

    def product(edit):
        with launcher(target, edit=edit):
            c = torch.empty(64, 64)
            options = dict(PRECISION="ieee", STAGES=2, TRANS=False, num_warps=4, num_stages=2)
            matmul_kernel[(1, 1)](a, b, c, 64, 64, 64, 64, 64, 32, **options)
            return relative(c, a.double() @ b.double())

    def again(pattern, which):
        if which is None:
            product(lambda text: ptx.append(text) or text)
            return len(re.findall(pattern, ptx[-1]))
        piece = list(re.finditer(pattern, ptx[-1]))[which]
        return product(lambda text: text[: piece.start()] + text[piece.end() :])

    return again


def main(arguments=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    again = product_without(options.target)
    try:
        again("", None)
    except Unsupported as reason:
        print(json.dumps(dict(name="unsupported", text=str(reason))))
        return 0
    far = strided(torch.randn(3, 128), 0)
    assert 2 * far.stride(0) >= FAR > far.stride(0)
    with launcher(options.target):
        for name, error, limit in right(far):
            print(json.dumps(dict(name=name, error=error, limit=limit)), flush=True)
    with launcher(options.target):
        for name, kind, function in broken(far, again):
            error = found = None
            try:
                error = function()
            except Fault as fault:
                found = fault
            row = dict(name=name, kind=kind, found=found and found.kind, error=error, text=str(found or ""))
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
