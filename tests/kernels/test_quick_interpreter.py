"""What the tests' shortcuts through Triton's interpreter leave out changes no bit."""

import itertools

import attention_cases
import numpy as np
import pytest
import torch
from anyup_fast.kernels import attention
from anyup_fast.kernels.tiling import Tile

interpreter = pytest.importorskip("triton.runtime.interpreter")
core = pytest.importorskip("triton.language.core")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU")


@pytest.fixture
def plain(monkeypatch):
    """A callable that takes the shortcuts away."""
    if not hasattr(interpreter, "_LangPatchScope"):
        pytest.skip("this Triton's interpreter is another: nothing is left out")
    semantic = type(interpreter.interpreter_semantic)

    def take_away():
        for place, name in (
            (interpreter, "_patch_lang"),
            (interpreter, "_get_np_dtype"),
            (core.tensor, "__init__"),
            (core.block_type, "__init__"),
            (core.dtype, "__eq__"),
            (semantic, "computation_type_impl"),
            (semantic, "binary_op_type_checking_impl"),
            (semantic, "broadcast_impl_value"),
        ):
            quick = getattr(place, name)
            monkeypatch.setattr(place, name, getattr(quick, "__wrapped__", quick))
        monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions())

    return take_away


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_with_and_without(dtype, plain):
    problem = attention_cases.make(1, dtype, (5, 6), (7, 6), 20, head_dim=32, ratio=0.15)
    given = dict(scale=problem.scale, head_mode=problem.head_mode, tile=Tile("window", 4, 4, 64, 16, 4))
    quick = attention.windowed_attention_fwd(*problem.tensors, **given)
    plain()
    assert torch.equal(quick, attention.windowed_attention_fwd(*problem.tensors, **given))


def operands():
    """Tensors of every type that kernels have and several shapes, and numbers."""
    for name in "int1 int8 uint8 int16 int32 uint32 int64 fp16 bf16 fp32 fp64".split():
        for shape in ((), (4,), (4, 1), (1, 4), (2, 4)):
            kind = core.dtype(name)
            handle = interpreter.TensorHandle(np.zeros(shape, interpreter._get_np_dtype(kind)), kind)
            yield core.tensor(handle, core.block_type(kind, list(shape)) if shape else kind)
    yield from (True, 3, -3, 2**33, 0.5)


def types(check, *arguments, **options):
    """Types of what `check` makes of two operands, or its complaint."""
    try:
        return [str(x.type) for x in check(interpreter.interpreter_semantic, *arguments, **options)]
    except (TypeError, ValueError, AttributeError) as error:
        return type(error), str(error)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # of the largest number, into 16 bits
def test_the_same_types_with_and_without(plain):
    semantic = type(interpreter.interpreter_semantic)
    given = list(itertools.product(operands(), operands(), (False, True), (False, True)))

    def found():
        check = semantic.binary_op_type_checking_impl
        return [types(check, a, b, arithmetic_check=both, div_or_mod=div) for a, b, both, div in given]

    quick = found()
    plain()
    slow = found()
    assert quick == slow and sum(isinstance(one, list) for one in quick) > len(quick) // 2
