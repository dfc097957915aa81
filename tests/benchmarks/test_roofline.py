"""The roofline: its counts by hand for a small shape, and the design's table."""

import importlib.util
import sys

import forked
import pytest
import torch
from tree import ROOT

FOLDER = ROOT / "benchmarks"
if not (FOLDER / "roofline.py").is_file():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)


@pytest.fixture
def roofline(monkeypatch):
    """The script as a module, imported as if from its own folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("checkout", "roofline"):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
    return module


def test_counts_of_a_small_shape(roofline):
    # 64 pixels, 4 cells, 3 channels, float32. An axis sees 1, 1, 1, 2, 2, 1, 1, 1 keys: 1.25 in the mean.
    rgb, layer, product, silu = 64 * 3 * 4, 64 * 128 * 4, 64 * 2 * 128 * 128, 64 * 128
    low, low_product = 4 * 128 * 4, 4 * 2 * 128 * 128
    expected = {
        "image moments": (rgb, 64 * 24, 0),
        "image block 1 in": (rgb + layer, 64 * 2 * 3 * 128 + product, silu),
        "image block 1 out": (rgb + 2 * layer, 64 * 2 * 3 * 128 + product, silu),
        "image block 2 in": (2 * layer, product, silu),
        "image block 2 out, rotary, first of query and key": (4 * layer, 3 * product, silu),
        "query block 1 in": (2 * layer, product, silu),
        "query block 1 out": (3 * layer, product, silu),
        "query block 2 in": (2 * layer, product, silu),
        "query block 2 out": (3 * layer, product, silu),
        "key block 1 in": (2 * layer, product, silu),
        "key block 1 out": (3 * layer, product, silu),
        "key block 2 in": (2 * layer, product, silu),
        "pooling of the keys": (2 * layer + 2 * low, 0, silu),
        "feature unification": (4 * 3 * 4 + 4 * 128 * 4, 4 * 3 * 128 * 25 * 2, 4 * 3 * 128),
        "keys at low resolution": (28 * low, 29 * low_product, 8 * 4 * 128),
        "3x3 convolution, norm and projection": (2 * layer, 10 * product, 0),
        "attention": (layer + 64 * 3 * 4 + low + 4 * 3 * 4, 64 * 1.25**2 * 2 * (128 + 3), 64 * 1.25**2 * 4),
    }
    found = roofline.stages("8/2/3", "float32")
    assert {stage.name: stage[1:] for stage in found} == expected
    assert [stage.name for stage in found] == list(expected)
    assert roofline.peak_bytes("8/2/3", "float32") == 4 * layer
    assert roofline.peak_bytes("8/2/1000", "float32") == layer + 64 * 1000 * 4


def test_layers_move_31_images(roofline):
    layer = 2048**2 * 128 * 2
    moved = sum(stage.bytes for stage in roofline.stages("2048/1/1"))
    assert moved / layer == pytest.approx(31, rel=0.01)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_by_name_or_as_torch_has_them(roofline, dtype):
    assert roofline.stages("16/2/4", dtype) == roofline.stages("16/2/4", getattr(torch, dtype))
    half, this = (sum(s.bytes for s in roofline.stages("160/2/4", d)) for d in ("bfloat16", dtype))
    assert this / half == pytest.approx(2 if dtype == "float32" else 1, rel=1e-3)


def test_attention_takes_two_passes_where_its_kernels_do(roofline):
    few, one, many = (roofline.stages(s)[-1].exps for s in ("448/32/384", "2048/128/1", "2048/128/1024"))
    assert many == 2 * one and few < one


def test_the_design(roofline):
    for shape, floor in roofline.DESIGN_MS.items():
        assert 1e3 * roofline.floor_s(shape) == pytest.approx(floor, rel=0.15), shape
    gib = {shape: roofline.peak_bytes(shape) / 2**30 for shape in roofline.DESIGN_MS}
    assert gib["448/32/384"] == pytest.approx(0.23 / 1.15, rel=0.1)
    assert (gib["1024/64/768"], gib["2048/128/1024"]) == (1.75, 9)


def test_rates_can_be_replaced(roofline):
    slow = dict(bytes_per_s=1.0, flops=1e30, exps=1e30)
    assert roofline.floor_s("16/2/4", **slow) == sum(stage.bytes for stage in roofline.stages("16/2/4"))
    assert roofline.floor_s("16/2/4", device="cpu") > roofline.floor_s("16/2/4")
    assert roofline.rates_of("cpu", "float32") == (14e9, 140e9, 0.88e9)


@pytest.mark.parametrize("shape", ["448/32", "448/32/0", "a/b/c", "448x32x384", "-1/2/3"])
def test_other_shapes_are_refused(roofline, shape):
    with pytest.raises(ValueError, match="shape: need image/grid/channels like 448/32/384, got "):
        roofline.stages(shape)


def test_other_dtypes_are_refused(roofline):
    with pytest.raises(ValueError, match="dtype: need one of bfloat16, float16, float32, got 'float64'"):
        roofline.stages("8/2/3", torch.float64)


def test_command(roofline, capsys):
    assert roofline.main(["--shapes", "448/32/384"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "448/32/384 bfloat16: peak 0.191 GiB beyond the inputs"
    assert lines[-1].endswith("design 0.58") and len(lines) == 2 + len(roofline.stages("448/32/384")) + 1
    roofline.main(["--shapes", "448/32/384", "16/2/1", "--exps", "1e12"])
    assert "design" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        roofline.main(["--shapes", "448"])
    with pytest.raises(SystemExit):
        roofline.main(["--flops", "-1"])


def test_it_runs_as_a_script():
    result = forked.run(FOLDER / "roofline.py", "--shapes", "16/2/1", "--device", "cpu", "--dtype", "float32")
    assert result.returncode == 0 and result.stdout.startswith("16/2/1 float32: peak "), result.stderr
