"""What a GPU can do at most, measured in the same run: bytes copied, bfloat16 products, exponentials. For gpu.py."""

import torch
import triton
import triton.language as tl
from gpu_steps import Lazy, Step
from roofline import SIZES

COPIED = 1 << 32  # bytes read, and as many written
SIDE = 8192
THREADS, ROUNDS, PROGRAMS = 512, 4096, 132 * 16
NAMES = "copy", "bfloat16 product", "exponentials"


@triton.jit
def _exps_kernel(out_ptr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = -offs.to(tl.float32)
    for _ in range(ROUNDS):
        x = tl.exp2(-x)
    tl.store(out_ptr + offs, x)


def _exps(card):
    out = torch.empty(PROGRAMS * THREADS * 4, dtype=torch.float32, device=card.device)
    _exps_kernel[(PROGRAMS,)](out, ROUNDS=ROUNDS, BLOCK=4 * THREADS, num_warps=THREADS // 32)
    return out


def steps(card):
    """The three ceilings; column `rate` is per second, bytes read and written."""
    source = Lazy(lambda: card.draw((COPIED // 2,), torch.bfloat16))
    target = Lazy(lambda: torch.empty_like(source()))
    factors = Lazy(lambda: [card.draw((SIDE, SIDE), torch.bfloat16, seed) for seed in (1, 2)])
    copy, product, exps = (dict(part="ceilings", shape="", dtype="", what=name, clock="events") for name in NAMES)

    def copied():
        return target().copy_(source()) if card.executes else None

    def multiplied():
        return torch.mm(*factors()) if card.executes else None

    yield Step(**copy, launch=copied, derive=lambda ms: dict(rate=2e3 * COPIED / ms))
    yield Step(**product, launch=multiplied, derive=lambda ms: dict(rate=2e3 * SIDE**3 / ms))
    amount = PROGRAMS * THREADS * 4 * ROUNDS
    yield Step(**exps, launch=lambda: _exps(card), derive=lambda ms: dict(rate=1e3 * amount / ms))


def rates(journal, dtype):
    """(bytes, operations in a dtype, exponentials) per second as measured, or None where one is missing.

    Products of float32 are three in TF32, at half the rate of bfloat16: derived, not measured.
    """
    found = [journal.value(("ceilings", "", "", name), "rate") for name in NAMES]
    if None in found:
        return None
    copied, products, exps = found
    return copied, products / (6 if SIZES[dtype] == 4 else 1), exps
