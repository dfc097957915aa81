"""The machine that executes PTX: small kernels against PyTorch, and what it has to find in broken ones."""

import json
import os
import random
import sys
from functools import cache

import forked
import numpy as np
import pytest
import torch
from ptx import Fault, Unsupported, arithmetic, launcher, memory, run

TARGETS = "sm_80", "sm_90"


@cache
def small(target):
    """Rows of the small Triton kernels by name, from a process in which Triton compiles."""
    result = forked.run("-m", "ptx.small", target, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    assert result.returncode == 0, result.stderr[-3000:]
    return {row["name"]: row for row in map(json.loads, result.stdout.splitlines())}


@pytest.mark.parametrize("target", TARGETS)
def test_small_kernels(target):
    right = {name: row for name, row in small(target).items() if "kind" not in row}
    assert len(right) == 17
    assert {name: row["error"] for name, row in right.items() if not row["error"] <= row["limit"]} == {}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "name",
    ["mask left out", "read beyond a view", "never written", "two programs, one address",
     "two programs, one address, one number", "rows beyond 2**31, products of 32 bits"],
)  # fmt: skip
def test_broken_kernels(target, name):
    row = small(target)[name]
    assert row["found"] == row["kind"], row["text"]


@pytest.mark.parametrize("target", TARGETS)
def test_barriers_waits_and_fences_left_out(target):
    found = [row for name, row in small(target).items() if name.endswith(" left out") and name != "mask left out"]
    # Some guard nothing in this product: then the result is right.
    assert [row["name"] for row in found if row["found"] != row["kind"] and not (row["error"] or 1) <= 1e-6] == []
    caught = {row["name"].split()[0] for row in found if row["found"]}
    assert caught == {"barrier", "wait", *(["fence"] if target == "sm_90" else [])}


def test_tcgen05_is_not_executed():
    row = small("sm_100")["unsupported"]
    assert len(small("sm_100")) == 1 and "tcgen05" in row["text"]


# Programs without Triton.


def program(body, params="", registers=12):
    declared = f".reg .pred %p<4>; .reg .b16 %h<4>; .reg .b32 %r<{registers}>; .reg .f32 %f<8>; .reg .b64 %rd<8>;"
    return f""".target sm_80
.extern .shared .align 16 .b8 global_smem[];
.visible .entry made_up(.param .u64 x{params})
.reqntid 64
{{
{declared}
ld.param.b64 %rd1, [x];
mov.u32 %r1, %tid.x;
{body}
ret;
}}
"""


def found(body, *arguments, params="", **options):
    """The kind of fault of a made-up program, or None."""
    try:
        report = run(program(body, params), (1,), [torch.zeros(64, dtype=torch.int32), *arguments], 2, 1024, **options)
    except Fault as fault:
        return fault.kind
    return report.faults[0].kind if report.faults else None


MINE = "mov.b32 %r2, global_smem;\nshl.b32 %r3, %r1, 2;\nadd.s32 %r4, %r2, %r3;\nst.shared.b32 [%r4], %r1;\n"
OTHERS = "xor.b32 %r5, %r3, 128;\nadd.s32 %r6, %r2, %r5;\nld.shared.b32 %r7, [%r6];\n"
BAR = "bar.sync 0;\n"
GLOBAL = "cvt.u64.u32 %rd2, %r3;\nadd.s64 %rd3, %rd1, %rd2;\n"
COPY = "cp.async.ca.shared.global [%r4], [%rd3], 4;\ncp.async.commit_group;\n"
HALF = "setp.lt.u32 %p1, %r1, 32;\n"
ADDRESS = MINE.rpartition("st.shared")[0] + GLOBAL


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (None, MINE + BAR + OTHERS),
        ("shared race", MINE + OTHERS),
        ("shared race", MINE + BAR + OTHERS + "st.shared.b32 [%r4], %r7;\n"),
        (None, MINE + BAR + OTHERS + BAR + "st.shared.b32 [%r4], %r7;\n"),
        ("uninitialised", MINE + BAR + "ld.shared.b32 %r7, [%r4+256];\n"),
        ("out of bounds", MINE + "ld.shared.b32 %r7, [%r4+1024];\n"),
        ("misaligned", MINE + "ld.shared.b32 %r7, [%r4+2];\n"),
        ("shared race", MINE.replace("shl.b32 %r3, %r1, 2", "and.b32 %r3, %r1, 4")),
        (None, ADDRESS + "ld.global.b32 %r7, [%rd3];\nst.global.b32 [%rd3], %r7;\n"),
        ("out of bounds", ADDRESS + "ld.global.b32 %r7, [%rd3+4];\n"),
        ("misaligned", ADDRESS + "ld.global.b32 %r7, [%rd3+2];\n"),
        ("global race", ADDRESS + "st.global.b32 [%rd3], %r1;\nxor.b32 %r5, %r3, 128;\ncvt.u64.u32 %rd4, %r5;\n"
         "add.s64 %rd5, %rd1, %rd4;\nld.global.b32 %r8, [%rd5];\n"),
        (None, ADDRESS + COPY + "cp.async.wait_group 0;\nbar.sync 0;\n" + OTHERS),
        ("shared race", ADDRESS + COPY + BAR + OTHERS + "cp.async.wait_group 0;\n"),
        ("shared race", ADDRESS + COPY + "cp.async.wait_group 0;\n" + OTHERS),
        ("shared race", ADDRESS + COPY + COPY.replace("[%r4]", "[%r4+256]") + "cp.async.wait_group 1;\nbar.sync 0;\n"
         "ld.shared.b32 %r7, [%r4+256];\ncp.async.wait_group 0;\n"),
        ("copies", ADDRESS + COPY),
        ("divergence", "setp.lt.u32 %p1, %r1, 7;\n@%p1 bra $L;\nshfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;\n$L:\n"),
        (None, HALF + "@%p1 bra $L;\nshfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;\n$L:\n"),
        ("barrier", HALF + "@%p1 bra $L;\nbar.sync 0;\nbra $M;\n$L:\nbar.sync 0;\n$M:\n"),
    ],
)  # fmt: skip
def test_faults_of_made_up_programs(kind, body):
    assert found(body) == kind
    if kind:
        assert found(body, collect=True) == kind


# Two threads hold x * y of both, and each fuses its own product with the addition.
COPIES = """
cvt.rn.f32.u32 %f1, %r1; add.f32 %f1, %f1, 0f3F8CCCCD; mul.f32 %f2, %f1, 0f3FA66666;
mul.f32 %f3, %f1, %f2; mov.b32 %r3, %f3; shfl.sync.bfly.b32 %r4, %r3, 1, 31, -1; mov.b32 %f4, %r4;
FUSED
shr.u32 %r5, %r1, 1; shl.b32 %r5, %r5, 2; cvt.u64.u32 %rd2, %r5; add.s64 %rd3, %rd1, %rd2;
st.global.f32 [%rd3], %f5;
"""


def test_unequal_copies():
    equal, unequal = "add.f32 %f5, %f3, %f4;", "fma.rn.f32 %f5, %f1, %f2, %f4;"
    digests = {}
    for fused in (equal, unequal):
        body = COPIES.replace("FUSED", fused)
        assert found(body) == (None if fused == equal else "unequal copies")
        for first_wins in (False, True):
            out = torch.zeros(64, dtype=torch.int32)
            report = run(program(body), (1,), [out], 2, 1024, collect=True, first_wins=first_wins)
            digests[fused, first_wins] = report.digest, out.tolist()
    assert digests[equal, False] == digests[equal, True]
    assert digests[unequal, False] != digests[unequal, True]


@pytest.mark.parametrize(
    "instruction",
    ["tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 64", "mbarrier.init.shared.b64 [%r1], 1",
     "atom.global.add.u32 %r2, [%rd1], %r1", "add.rn.bf16x2 %r2, %r1, %r1", "bar.sync 1, 32",
     "cp.async.bulk.commit_group"],
)  # fmt: skip
def test_what_has_no_meaning_here_is_said(instruction):
    with pytest.raises(Unsupported):
        run(program(f"{instruction};"), (1,), [torch.zeros(64)], 2, 1024)


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="takes 1, got 2"):
        run(program(""), (1,), [torch.zeros(1), 1], 2)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), launcher("sm_80"):
        pass


def test_bits_against_python():
    draw = random.Random(0).getrandbits
    for _ in range(500):
        x, y, selector, start, length = draw(32), draw(32), draw(16), draw(5), draw(5) + 1
        field = x >> start & ((1 << length) - 1)
        assert int(arithmetic.bit_field(np.array([x], "u4"), start, length)[0]) == field
        top = min(start + length, 32) - 1
        field -= (x >> top & 1) << (top - start + 1)
        assert int(arithmetic.bit_field(np.array([x], "u4").view("i4"), start, length)[0]) == field
        both, picked = x | y << 32, []
        for n in range(4):
            pick = selector >> 4 * n & 15
            byte = both >> 8 * (pick & 7) & 255
            picked.append(255 * (byte >> 7) if pick & 8 else byte)
        out = arithmetic.permute_bytes(np.array([x], "u4"), np.array([y], "u4"), np.uint32(selector))
        assert int(out[0]) == int.from_bytes(picked, "little")
        a, b, c, table = draw(64), draw(64), draw(32), draw(8)
        assert int(arithmetic.high_product(np.array([a], "u8"), np.array([b], "u8"))[0]) == a * b >> 64
        count = draw(6)
        assert int(arithmetic.shift_left(np.array([x], "u4"), np.uint32(count))[0]) == x << count & 0xFFFFFFFF
        assert int(arithmetic.shift_right(np.array([x], "u4"), np.uint32(count))[0]) == x >> count
        wanted = sum((table >> (4 * (x >> n & 1) + 2 * (y >> n & 1) + (c >> n & 1)) & 1) << n for n in range(32))
        assert int(arithmetic.logic3(*(np.array([v], "u4") for v in (x, y, c)), table)[0]) == wanted
        left = arithmetic.funnel(np.array([x], "u4"), np.array([y], "u4"), np.array([count], "u4"), True, True)
        assert int(left[0]) == (both << (count & 31)) >> 32 & 0xFFFFFFFF


def test_roundings_are_those_of_pytorch():
    x = torch.randn(100000, generator=torch.Generator().manual_seed(0))
    x *= torch.randint(-12, 12, (100000,)).float().exp2()
    for kind, function in ((torch.bfloat16, arithmetic.round_bf16), (torch.float16, arithmetic.round_f16)):
        assert (function(x.numpy()) == x.to(kind).view(torch.int16).numpy().view(np.uint16)).all()
    cut = arithmetic.round_tf32(x.numpy(), False).view(np.float32)
    assert np.abs(cut - x.numpy()).max() > 0 and (np.abs(cut - x.numpy()) <= np.abs(x.numpy()) * 2.0**-11).all()


COUNTED = """
ld.param.b32 %r2, [near]; ld.param.b32 %r3, [far];
mul.lo.s32 %r4, %r1, %r2; cvt.u64.u32 %rd2, %r4; add.s64 %rd3, %rd1, %rd2; ld.global.b32 %r5, [%rd3];
mul.lo.s32 %r6, %r1, %r3; mov.b32 %r7, global_smem; add.s32 %r8, %r7, %r6; st.shared.b32 [%r8], %r5;
"""


@pytest.mark.parametrize(("near", "sectors"), [(0, 2), (4, 8), (8, 16), (32, 64), (128, 64)])
@pytest.mark.parametrize(("far", "ways"), [(4, 2), (8, 4), (64, 32), (128, 64), (132, 2)])
def test_counters(near, sectors, far, ways):
    text = program(COUNTED, ", .param .u32 near, .param .u32 far")
    report = run(text, (3,), [torch.zeros(64 * 128, dtype=torch.uint8), near, far], 2, 64 * 132)
    distinct = sectors if near else 1  # of a program
    assert report.global_load == dict(requests=3 * 2, sectors=3 * sectors, bytes=3 * 256, distinct=3 * distinct)
    assert report.shared_store == dict(requests=3 * 2, ways=3 * ways)
    assert report.instructions["ld.global"] == 3 * 2 and report.ctas == 3


def test_bytes_of_views():
    base = torch.zeros(40, 50, dtype=torch.int32)
    views = [base[2:9:3, 1::4], base.T[5:7, 3:], base[0], base[:, 1], base[1:2].expand(3, 50), base[3, 4]]
    for view in views:
        marked = torch.zeros_like(base)
        torch.as_strided(marked, view.shape, view.stride(), view.storage_offset()).fill_(-1)
        wanted = marked.view(torch.uint8).flatten().bool().numpy()
        for first in (0, 333, 5000):
            assert (memory.seen_by(view, first, 1000) == wanted[first : first + 1000]).all()
