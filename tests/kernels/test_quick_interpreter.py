"""What the tests' shortcuts through Triton's interpreter leave out changes no bit."""

import attention_cases
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

    def take_away():
        for place, name in (
            (interpreter, "_patch_lang"),
            (interpreter, "_get_np_dtype"),
            (core.tensor, "__init__"),
            (core.block_type, "__init__"),
        ):
            monkeypatch.setattr(place, name, getattr(place, name).__wrapped__)
        monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions())

    return take_away


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_with_and_without(dtype, plain):
    if not hasattr(interpreter, "_LangPatchScope"):
        pytest.skip("this Triton's interpreter is another: nothing is left out")
    problem = attention_cases.make(1, dtype, (5, 6), (7, 6), 20, head_dim=32, ratio=0.15)
    given = dict(scale=problem.scale, head_mode=problem.head_mode, tile=Tile("window", 4, 4, 64, 16, 4))
    quick = attention.windowed_attention_fwd(*problem.tensors, **given)
    plain()
    assert torch.equal(quick, attention.windowed_attention_fwd(*problem.tensors, **given))
