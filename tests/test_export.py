"""Graphs that leave the process: torch.export with open sizes, and ONNX files as another runtime sees them."""

import pytest
import tiny
import torch

from anyup_fast import export
from anyup_fast.ops import neighborhood_bounds

OPEN = torch.export.Dim.DYNAMIC
EVERYWHERE = {"image": {0: OPEN, 2: OPEN, 3: OPEN}, "features": dict.fromkeys(range(4), OPEN)}
# Batch, (H, W), (h, w), channels: none is what the graph was traced with.
SIZES = (
    (3, (40, 23), (4, 9), 12),
    (1, (30, 30), (5, 6), 8),
    (2, (16, 16), (1, 1), 4),
    (1, (9, 10), (12, 14), 16),
    (1, (720, 6), (64, 2), 4),
)
CONFIGS = (
    {},
    {"window_rule": "neighborhood", "window_ratio": 0.2, "head_mode": "split"},
    {"window_ratio": 0, "kernel_size": 3, "lfu_dim": 16},
)


def inputs(batch, size, grid, channels):
    generator = torch.Generator().manual_seed(sum(size))
    image = torch.randn(batch, 3, *size, generator=generator)
    return image, torch.randn(batch, channels, *grid, generator=generator)


def distance(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    "output_size",
    [pytest.param(None, marks=pytest.mark.slow("with an output size it runs by default")), (33, 21)],
)
@torch.no_grad()
def test_an_exported_program_runs_at_other_sizes(output_size, tmp_path):
    model = tiny.model()
    sizes = {**EVERYWHERE, "output_size": output_size and (OPEN, OPEN)}
    program = torch.export.export(model, (*inputs(2, (28, 34), (7, 5), 8), output_size), dynamic_shapes=sizes)
    used = {str(node.target).split(".default")[0] for node in program.graph.nodes if "anyup_fast" in str(node.target)}
    names = "guidance", "feature_unification", "project_keys", "project_queries", "window_bounds", "windowed_attention"
    assert used == {f"anyup_fast.{name}" for name in names}
    torch.export.save(program, tmp_path / "anyup.pt2")
    loaded = torch.export.load(tmp_path / "anyup.pt2").module()
    for number, size in enumerate(SIZES):
        given = inputs(*size)
        output = output_size and (output_size[0] + number, output_size[1] - 2 * number)
        assert distance(loaded(*given, output), model(*given, output)) < 1e-6


def test_a_program_exported_with_gradients_has_the_layers_that_record_them():
    model = tiny.model()
    program = torch.export.export(model, inputs(2, (28, 34), (7, 5), 8), dynamic_shapes=EVERYWHERE)
    graphs = [module.graph for module in program.graph_module.modules() if hasattr(module, "graph")]
    assert any("anyup_fast.res_block" in str(node.target) for graph in graphs for node in graph.nodes)
    given = inputs(*SIZES[0])
    loaded = program.module()
    out = loaded(*given)
    assert distance(out, model(*given)) < 1e-6
    out.sum().backward()
    assert all(p.grad is not None for name, p in loaded.named_parameters() if "out_proj" not in name)


@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_the_graph_that_becomes_a_file_is_the_model(config):
    model = tiny.model(**config)
    for size in (*SIZES, (2, (1, 1), (1, 1), 4), (1, (2, 5), (2, 1), 4)):
        for output in (None, (17, 40), (5, 3)):
            given = inputs(*size)
            assert distance(export.PlainForward(model, output)(*given), model(*given, output)) < 1e-5


@pytest.mark.parametrize("ratio", [0, 0.05, 0.1, 0.25, 0.49, 0.5])
def test_neighborhoods_in_the_graph(ratio):
    for n, m in [(n, m) for n in (*range(1, 20), 37, 64) for m in (*range(1, 14), 27)]:
        assert torch.equal(export.neighborhood(n, m, ratio), neighborhood_bounds(n, m, ratio).long())


@pytest.mark.parametrize("size, pad", [((1, 1), 1), ((5, 1), 2), ((2, 3), 2), ((3, 7), 2)])
def test_reflection_by_indices(size, pad):
    from anyup_fast.layers import reflected

    x = torch.randn(2, 3, *size)
    assert torch.equal(export.reflected(x, pad), reflected(x, pad))


def onnx_file(path, model, *arguments, **options):
    """An onnxruntime session on the written file, after a look at what it holds."""
    needs = "needs the onnx extra and onnxruntime, which dev installs"
    onnx = pytest.importorskip("onnx", reason=needs)
    pytest.importorskip("onnxscript", reason=needs)
    runtime = pytest.importorskip("onnxruntime", reason=needs)
    export.export_onnx(model, path, *arguments, **options)
    proto = onnx.load(path)
    onnx.checker.check_model(proto)
    assert {node.domain for node in proto.graph.node} == {""} and not proto.functions
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def check(session, model, sizes, output_size=None):
    for size in sizes:
        image, features = inputs(*size)
        (out,) = session.run(None, {"image": image.numpy(), "features": features.numpy()})
        assert distance(torch.from_numpy(out), model(image, features, output_size)) < 1e-5


def test_onnxruntime_gives_the_same(tmp_path):
    model = tiny.model()
    session = onnx_file(tmp_path / "anyup.onnx", model, (1, 3, None, None), (None, 8, None, None))
    check(session, model, [(1, size, grid, 8) for _, size, grid, _ in SIZES])


@pytest.mark.slow("ten seconds for each configuration")
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("output_size", [None, (17, 40)])
def test_onnxruntime_gives_the_same_for_every_configuration(config, output_size, tmp_path):
    model = tiny.model(**config)
    session = onnx_file(tmp_path / "anyup.onnx", model, output_size=output_size)
    check(session, model, SIZES, output_size)


@pytest.mark.slow("ten seconds for a larger picture")
def test_onnxruntime_gives_the_same_over_many_pixels(tmp_path):
    model = tiny.model()
    session = onnx_file(tmp_path / "anyup.onnx", model, (1, 3, 448, 448), (1, 8, 8, 8), output_size=(28, 28))
    check(session, model, [(1, (448, 448), (8, 8), 8)], (28, 28))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (((1, 3, 8),), "image_shape: need four"),
        (((1, 4, None, None),), "image_shape: need 3 channels"),
        (((1, 3, None, None), (2, 8, None, None)), "differ in batch size"),
        (((None,) * 4, (None, 0, None, None)), "features_shape: need four"),
    ],
)
def test_shapes_that_do_not_fit_are_named(arguments, words, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match=words):
        export.export_onnx(tiny.model(), tmp_path / "anyup.onnx", *arguments)
    assert not list(tmp_path.iterdir())


def test_other_dtypes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="need float32 on the CPU, got torch.bfloat16"):
        export.export_onnx(tiny.model().bfloat16(), tmp_path / "anyup.onnx")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ImportError, match=r"onnxscript: pip install 'anyup-fast\[onnx\]'"):
        export.export_onnx(tiny.model(), tmp_path / "anyup.onnx")
