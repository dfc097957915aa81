"""The part of the GPU script about gradients, run on the CPU: what it compares, and that it refuses where it should."""

import pytest
import torch
from tree import ROOT

from anyup_fast.ops.attention import windowed_attention_op

FOLDER = ROOT / "benchmarks"
if not (FOLDER / "gpu_backward.py").is_file():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)


@pytest.fixture
def script(monkeypatch):
    """gpu_backward.py, with kernels of small blocks that few programs share."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu_backward

    if torch.cuda.is_available():
        pytest.skip("meant for the interpreter")
    small = gpu_backward.kernel.Blocks(4, 4, 16, 16, 4)
    monkeypatch.setattr(gpu_backward, "SMALL", gpu_backward.kernel.Plan(False, small, small, small))
    monkeypatch.setattr(gpu_backward.kernel, "plan", lambda *_: gpu_backward.SMALL)
    monkeypatch.setattr(gpu_backward.kernel, "PROGRAMS", 4)
    monkeypatch.setattr(gpu_backward.unification, "PROGRAMS", 2)
    monkeypatch.setattr(gpu_backward, "UNIFIED", ((24, 12, 3, 2),))
    return gpu_backward


def test_the_sweep_passes_and_fails(script, monkeypatch):
    assert script.sweep(1, torch.device("cpu"), longest=4) == []
    right = script.kernel.windowed_attention_bwd
    monkeypatch.setattr(script.kernel, "windowed_attention_bwd", lambda *a, **k: [x * 1.1 for x in right(*a, **k)])
    unified = script.unification.feature_unification_bwd
    monkeypatch.setattr(script.unification, "feature_unification_bwd", lambda *a: [x * 1.1 for x in unified(*a)])
    failed = script.sweep(1, torch.device("cpu"), longest=4)
    assert any("gradient of value: error" in sentence for sentence in failed)
    assert any("unification of 24 channels: gradient of basis" in sentence for sentence in failed)


def test_rows(script, monkeypatch):
    ran = []

    def timed(call):
        ran.append(call())
        return 1.0, 2.0, 3.0, 2**20

    # The operator refuses the back end "triton" on a CPU; the registered one under it does not.
    monkeypatch.setattr(
        script,
        "windowed_attention",
        lambda *a, backend: windowed_attention_op(*a, a[0].shape[-1] ** -0.5, "mean", backend),
    )
    rows = list(script.measure("6/3/4", torch.float32, timed, device="cpu"))
    assert [row["what"] for row in rows] == ["backward", "forward+backward, triton", "forward+backward, torch"]
    assert all(row["milliseconds"] == 2.0 and row["peak_mib"] == 1.0 for row in rows)
    for gradients in zip(*ran, strict=True):
        torch.testing.assert_close(gradients[0], gradients[2], rtol=0, atol=1e-5)
        assert torch.equal(gradients[0], gradients[1])


def test_a_wrong_gradient_is_not_timed(script, monkeypatch):
    right = script.kernel.windowed_attention_bwd
    monkeypatch.setattr(script.kernel, "windowed_attention_bwd", lambda *a, **k: [x * 1.1 for x in right(*a, **k)])
    with pytest.raises(RuntimeError, match=r"gradient of query wrong by 1\.00e-01: nothing is timed"):
        next(script.measure("6/3/4", torch.float32, pytest.fail, device="cpu"))
