"""The part of the GPU script about gradients, run on the CPU: what it compares, and that it refuses where it should."""

import pytest
import torch
from tree import ROOT

from anyup_fast.ops.attention import windowed_attention_op

FOLDER = ROOT / "benchmarks"
if not (FOLDER / "gpu_backward.py").is_file():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)


@pytest.fixture
def script(gpu_scripts, monkeypatch):
    """gpu_backward.py, with kernels of small blocks that few programs share."""
    gpu_backward = gpu_scripts("gpu_backward")
    small = gpu_backward.kernel.Blocks(4, 4, 16, 16, 4)
    monkeypatch.setattr(gpu_backward, "SMALL", gpu_backward.kernel.Plan(False, small, small, small))
    monkeypatch.setattr(gpu_backward.kernel, "plan", lambda *_: gpu_backward.SMALL)
    monkeypatch.setattr(gpu_backward.kernel, "PROGRAMS", 4)
    monkeypatch.setattr(gpu_backward.unification, "PROGRAMS", 2)
    monkeypatch.setattr(gpu_backward, "UNIFIED", ((24, 12, 3, 2),))
    return gpu_backward


def test_the_sweep_passes_and_fails(script, here, taken, monkeypatch):
    def rows():
        return taken([*script.problems(1, here, longest=4), *script.unification_problems(here)])

    assert [row["verdict"] for row in rows()] == ["ok"] * 3
    right = script.kernel.windowed_attention_bwd
    monkeypatch.setattr(script.kernel, "windowed_attention_bwd", lambda *a, **k: [x * 1.1 for x in right(*a, **k)])
    unified = script.unification.feature_unification_bwd
    monkeypatch.setattr(script.unification, "feature_unification_bwd", lambda *a: [x * 1.1 for x in unified(*a)])
    failed = rows()
    assert [row["verdict"] for row in failed] == ["WRONG"] * 3
    assert all("gradient of value: error" in row["note"] for row in failed[:2])
    assert "gradient of basis: error" in failed[2]["note"] and failed[2]["shape"].startswith("24 channels")


def test_rows(script, here, taken, monkeypatch):
    ran = []

    # The operator refuses the back end "triton" on a CPU; the registered one under it does not.
    monkeypatch.setattr(
        script,
        "windowed_attention",
        lambda *a, backend: windowed_attention_op(*a, a[0].shape[-1] ** -0.5, "mean", backend),
    )
    monkeypatch.setattr(here, "timed", lambda clock, call: ran.append((clock, call())) or dict(here.said))
    rows = taken(script.steps("6/3/4", "float32", here))
    assert [row["what"] for row in rows] == [
        *("kernels", "launcher", "forward+backward, triton", "forward+backward, torch")
    ]
    assert all((row["verdict"], row["milliseconds"], row["peak_mib"]) == ("ok", "2", "1") for row in rows)
    assert [clock for clock, _ in ran] == ["graph", "host", "graph", "events"]
    for gradients in zip(*(result for _, result in ran), strict=True):
        torch.testing.assert_close(gradients[0], gradients[3], rtol=0, atol=1e-5)
        assert torch.equal(gradients[0], gradients[2])


def test_a_wrong_gradient_is_not_timed(script, here, taken, monkeypatch):
    right = script.kernel.windowed_attention_bwd
    monkeypatch.setattr(script.kernel, "windowed_attention_bwd", lambda *a, **k: [x * 1.1 for x in right(*a, **k)])
    monkeypatch.setattr(here, "timed", lambda *_: pytest.fail("timed"))
    rows = taken(script.steps("6/3/4", "float32", here))
    assert [row["verdict"] for row in rows] == ["WRONG", *["not timed"] * 3]
    assert "gradient of query wrong by 1.00e-01" in rows[0]["note"]
    assert all(not row["milliseconds"] and not row["host_us"] for row in rows)
