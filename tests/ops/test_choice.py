"""Which back end is taken: who asks for one, why Triton can't run, and what becomes of a kernel that fails."""

import importlib
import json
import logging
import os
import subprocess
import sys
import threading
import types

import forked
import pytest
import tiny
import torch

import anyup_fast
from anyup_fast import ops
from anyup_fast.ops import choice

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing is known of the installation, nothing has failed, nobody has asked for a back end."""
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    choice.forget_faults()
    yield
    choice.forget_faults()


@pytest.fixture
def installed(monkeypatch):
    """A Triton that is as it should be for CUDA; a namespace whose attributes tests change to what is wrong."""
    target = types.SimpleNamespace(backend="cuda", arch=90, warp_size=32)
    active = types.SimpleNamespace(get_current_target=lambda: target)
    modules = {
        "triton": types.SimpleNamespace(__version__="3.6.0"),
        "triton.runtime": types.SimpleNamespace(driver=types.SimpleNamespace(active=active)),
        "triton.backends.nvidia.driver": types.SimpleNamespace(compile_module_from_src=None),
    }

    def import_module(name):
        if name not in modules:
            raise ImportError(f"No module named {name!r}")
        return modules[name]

    monkeypatch.setattr(choice, "import_module", import_module)
    monkeypatch.setattr(choice, "find_spec", lambda name: "found")
    monkeypatch.setattr(choice.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.delenv("CC", raising=False)
    return types.SimpleNamespace(modules=modules, target=target, active=active)


@pytest.fixture
def on_cpu(monkeypatch):
    """Tensors on the CPU count as those of a GPU whose Triton is as it should be."""
    monkeypatch.setattr(choice, "_GPUS", ("cpu",))
    monkeypatch.setattr(choice, "_installation_fault", choice.cache(lambda kind: None))


def small(**options):
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(1, 6, 5, 2, 8, generator=generator)
    key, value = torch.randn(1, 3, 4, 2, 8, generator=generator), torch.randn(1, 3, 4, 6, generator=generator)
    return ops.windowed_attention(
        query, key, value, ops.window_bounds(6, 3, 0.2), ops.window_bounds(5, 4, 0.2), **options
    )


def test_an_installation_as_it_should_be_has_no_fault(installed):
    assert choice.installation_fault("cuda") is None


@pytest.mark.parametrize(
    ("version", "fault"),
    [
        ("3.3.1", "needs version 3.4 or newer, found 3.3.1"),
        ("3.2.0+gitb2684bf3", "needs version 3.4 or newer, found 3.2.0+gitb2684bf3"),
        ("2.1.0", "needs version 3.4 or newer, found 2.1.0"),
        ("3.4.0", None),
        ("3.10.0", None),
        ("4.0.0", None),
    ],
)
def test_versions(installed, version, fault):
    installed.modules["triton"].__version__ = version
    assert choice.installation_fault("cuda") == fault


def test_a_missing_or_broken_package(installed, monkeypatch):
    del installed.modules["triton"]
    assert choice.installation_fault("cuda") == "can't be imported: No module named 'triton'"
    choice.forget_faults()
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    assert choice.installation_fault("cuda") == "needs the package triton, which is not installed"


def test_a_compiler_is_needed_where_the_driver_is_compiled_at_run_time(installed, monkeypatch):
    monkeypatch.setattr(choice.shutil, "which", lambda name: None)
    fault = choice.installation_fault("cuda")
    assert fault.startswith("needs a C compiler") and "gcc or clang is not to be found" in fault
    choice.forget_faults()
    monkeypatch.setenv("CC", "icx -w")
    assert "CC=icx -w is not to be found" in choice.installation_fault("cuda")
    choice.forget_faults()
    del installed.modules["triton.backends.nvidia.driver"].compile_module_from_src
    assert choice.installation_fault("cuda") is None, "this release brings its driver compiled"


def test_headers_are_needed_as_well(installed, monkeypatch, tmp_path):
    monkeypatch.setattr(choice.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Python.h is missing" in choice.installation_fault("cuda")
    choice.forget_faults()
    (tmp_path / "Python.h").write_text("")
    assert choice.installation_fault("cuda") is None


def test_triton_of_another_vendor(installed):
    assert "has no back end for intel" in choice.installation_fault("xpu")
    choice.forget_faults()
    installed.target.backend = "hip"
    assert choice.installation_fault("cuda").startswith("is set to hip and the tensors lie on cuda")
    choice.forget_faults()

    def none_active():
        raise RuntimeError("0 active drivers ([]). There should only be one.\nmore")

    installed.active.get_current_target = none_active
    fault = choice.installation_fault("cuda")
    assert fault.startswith("finds no nvidia driver (0 active drivers") and "more" not in fault


def test_it_is_asked_once(installed):
    asked = []
    installed.active.get_current_target = lambda: asked.append(1) or installed.target
    for _ in range(3):
        assert choice.installation_fault("cuda") is None
    assert len(asked) == 1


def test_old_cards_are_told_once_and_loudly(installed, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with caplog.at_level(logging.INFO, "anyup_fast.ops"):
        for _ in range(2):
            reason = choice.why_no_triton("guidance", CUDA, torch.float32)
            assert reason == "needs compute capability 8.0, got 7.5"
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", f"anyup_fast computes in plain PyTorch on cuda:0: Triton {reason}")
    ]


def test_what_is_no_gpu_stays_quiet(caplog):
    with caplog.at_level(logging.WARNING, "anyup_fast.ops"):
        assert choice.why_no_triton("guidance", torch.device("cpu"), torch.float32).startswith("needs a GPU")
    assert caplog.records == []


class Broken(Exception):
    """What a compiler raises."""


def failing(error):
    def run(*args, **options):
        raise error

    return run


@pytest.fixture
def kernel(on_cpu, monkeypatch):
    """A callable that makes the launcher of the attention raise."""

    def raise_(error):
        made = types.ModuleType("anyup_fast.kernels.attention")
        made.windowed_attention_fwd = failing(error)
        monkeypatch.setitem(sys.modules, "anyup_fast.kernels.attention", made)

    return raise_


def test_a_kernel_that_fails_is_answered_by_plain_pytorch_after_one_warning(kernel, caplog):
    kernel(Broken("LLVM ERROR: unsupported\nmore of it"))
    expected = small(backend="torch")
    with caplog.at_level(logging.INFO, "anyup_fast.ops"):
        for _ in range(3):
            assert torch.equal(small(), expected)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len([text for text in warnings if text.startswith("windowed_attention: Triton failed to compile")]) == 1
    assert "Broken: LLVM ERROR: unsupported. On cpu this operator runs in plain PyTorch from now on" in warnings[0]
    assert "anyup-fast check" in warnings[0] and "more of it" not in warnings[0]
    reason = choice.why_no_triton("windowed_attention", torch.device("cpu"), torch.float32)
    assert reason.startswith("failed to compile or launch")
    assert choice.why_no_triton("guidance", torch.device("cpu"), torch.float32) is None, "another operator"


@pytest.mark.parametrize(
    "text",
    [
        "Triton Error [CUDA]: no kernel image is available for execution on the device",
        "Triton Error [CUDA]: device kernel image is invalid",
        "PTXAS error: ptxas fatal: Value 'sm_121a' is not defined for option 'gpu-name'",
    ],
)
def test_code_that_the_device_does_not_take_is_answered_by_plain_pytorch(kernel, caplog, text):
    """An assembler older than the chip."""
    kernel(RuntimeError(text))
    with caplog.at_level(logging.WARNING, "anyup_fast.ops"):
        assert torch.equal(small(), small(backend="torch"))
    assert len(caplog.records) == 1 and text.split(":")[0] in caplog.records[0].getMessage()


def test_the_warning_names_the_kernel():
    class Kernel:
        def __init__(self, fn):
            self.fn = fn

        def run(self):
            raise Broken("out of resource: shared memory")

    def _window_kernel():
        pass

    try:
        Kernel(_window_kernel).run()
    except Broken as error:
        assert choice._kernel_of(error) == "_window_kernel"


def test_asked_for_by_name_it_raises(kernel):
    kernel(Broken("no"))
    with pytest.raises(Broken):
        small(backend="triton")
    with choice.use_backend("triton"), pytest.raises(Broken):
        small()
    assert not choice._failed


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: unspecified launch failure"),
        KeyboardInterrupt(),
    ],
)
def test_what_is_no_fault_of_the_kernel_is_raised(kernel, error):
    kernel(error)
    with pytest.raises(type(error)):
        small()
    assert not choice._failed


def test_a_fault_of_plain_pytorch_is_not_recorded_as_one_of_triton(kernel, monkeypatch):
    kernel(Broken("no"))
    from anyup_fast.plain import attention as plain

    monkeypatch.setattr(plain, "windowed_attention", failing(ZeroDivisionError("here too")))
    with pytest.raises(ZeroDivisionError):
        small()
    assert not choice._failed


def test_backward_falls_back_by_itself(on_cpu, monkeypatch, caplog):
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(1, 8, 4, 5, generator=generator, requires_grad=True)
    basis = torch.randn(16, 1, 3, 3, generator=generator, requires_grad=True)

    def gradients(**options):
        return torch.autograd.grad(
            ops.feature_unification(features, basis, **options).square().sum(), (features, basis)
        )

    expected = gradients(backend="torch")
    for name in ("unification", "unification_backward"):
        made = types.ModuleType(name)
        made.feature_unification_fwd = made.feature_unification_bwd = failing(Broken("no"))
        made.why_not_feature_unification = lambda *_: None
        monkeypatch.setitem(sys.modules, f"anyup_fast.kernels.{name}", made)
    with caplog.at_level(logging.WARNING, "anyup_fast.ops"):
        for found, wanted in zip(gradients(), expected, strict=True):
            assert torch.equal(found, wanted)
    assert {operator for operator, _ in choice._failed} == {"feature_unification", "feature_unification_backward"}
    assert len(caplog.records) == 2


def test_the_environment_asks(monkeypatch):
    assert choice.requested() == "auto"
    monkeypatch.setenv(choice.VARIABLE, "reference")
    assert choice.requested() == "reference"
    assert ops.choose_backend(*(torch.randn(1, 2, 2, 1, 4),) * 2, torch.randn(1, 2, 2, 3)) == "reference"
    monkeypatch.setenv(choice.VARIABLE, "cudnn")
    with pytest.raises(ValueError, match="ANYUP_FAST_BACKEND: no back end 'cudnn'; use one of 'auto', 'triton'"):
        small()
    monkeypatch.setenv(choice.VARIABLE, "triton")
    with pytest.raises(RuntimeError, match="'triton' can't run: needs a GPU"):
        small()
    assert torch.equal(small(backend="torch"), small(backend="torch")), "a call's own word counts more"


def test_use_backend_is_nested_and_of_one_thread(monkeypatch):
    seen = []
    with choice.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(choice.requested()))
        thread.start()
        thread.join()
        with choice.use_backend("torch"):
            seen.append(choice.requested())
        seen.append(choice.requested())
    assert [*seen, choice.requested()] == ["auto", "torch", "reference", "auto"]
    with pytest.raises(ValueError, match="backend: no back end 'cuda'"):
        choice.use_backend("cuda")
    monkeypatch.setenv(choice.VARIABLE, "torch")
    with choice.use_backend("auto"):
        assert choice.requested() == "auto", "the context counts more than the environment"


def test_a_traced_graph_asks_without_breaking(on_cpu, monkeypatch):
    monkeypatch.setattr(
        choice, "_installation_fault", choice.cache(lambda kind: "is asked for nothing that can be traced")
    )

    def traced(features, basis):
        return ops.feature_unification(features, basis) + 1

    features, basis = torch.randn(1, 8, 4, 4), torch.randn(16, 1, 3, 3)
    compiled = torch.compile(traced, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(features, basis), traced(features, basis))
    with choice.use_backend("reference"):
        torch.testing.assert_close(compiled(features, basis), traced(features, basis))


PRECISION = """
import json, sys, torch
from anyup_fast.ops.choice import triton_precision
exec(sys.argv[1])
print(json.dumps(triton_precision()))
"""


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("", None),
        ("torch.set_float32_matmul_precision('high')", "tf32"),
        ("torch.set_float32_matmul_precision('highest')", None),
        ("torch.backends.cuda.matmul.allow_tf32 = True", "tf32"),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "tf32"),
        ("torch.backends.cuda.matmul.fp32_precision = 'ieee'", None),
        ("torch.backends.fp32_precision = 'tf32'", "tf32"),
        ("torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'ieee'", None),
    ],
)
def test_every_way_to_set_the_precision_of_products_is_heeded(setting, expected):
    if "fp32_precision" in setting and not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this PyTorch has no fp32_precision")
    result = forked.run("-c", PRECISION, setting)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == expected


NO_COMPILER = """
import json, logging, sys, torch, types
import triton.backends.nvidia.driver as nvidia
from triton.runtime import driver

nvidia.compile_module_from_src = None  # as in the releases that compile their driver at run time
target = types.SimpleNamespace(backend="cuda", arch=90, warp_size=32)
driver.set_active(types.SimpleNamespace(get_current_target=lambda: target))  # a driver without a device

import anyup_fast
from anyup_fast.ops import choice

said = []
handler = logging.Handler()
handler.emit = lambda record: said.append([record.levelname, record.getMessage()])
logging.getLogger("anyup_fast").addHandler(handler)
torch.manual_seed(0)
image, features = torch.randn(3, 28, 28), torch.randn(8, 2, 2)
expected = anyup_fast.upsample_features_with_anyup(image, features)
assert said == [], said
choice._GPUS = ("cpu",)
choice.VENDORS["cpu"] = "nvidia"
found = [anyup_fast.upsample_features_with_anyup(image, features) for _ in range(2)]
print(json.dumps([[torch.equal(expected, one) for one in found], said]))
"""


def test_without_a_compiler_the_verb_gives_the_plain_path_s_numbers_after_one_warning(tmp_path):
    pytest.importorskip("triton")
    kept = {name: value for name, value in os.environ.items() if name not in ("CC", "TRITON_INTERPRET")}
    environment = {**kept, "PATH": str(tmp_path)}
    command = [sys.executable, "-c", NO_COMPILER]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    equal, said = json.loads(printed)
    assert equal == [True, True]
    assert len(said) == 1 and said[0][0] == "WARNING" and "Triton needs a C compiler" in said[0][1]


def test_the_kernels_are_imported_where_they_are_used():
    """What stands for a launcher above is looked up there: a renamed module would make those tests pass idly."""
    for name in ("attention", "attention_backward", "unification", "unification_backward", "guidance", "queries"):
        assert importlib.util.find_spec(f"anyup_fast.kernels.{name}") is not None


@pytest.fixture
def given():
    torch.manual_seed(0)
    return torch.randn(1, 3, 24, 20), torch.randn(1, 5, 4, 3)


@torch.no_grad()
def test_a_whole_call_can_be_sent_to_a_back_end(given):
    model = tiny.model()
    out = model(*given)
    assert torch.equal(model(*given, backend="torch"), out)
    assert torch.equal(model(*given, backend="auto"), out)
    reference = model(*given, backend="reference")
    assert not torch.equal(reference, out)
    torch.testing.assert_close(reference, out, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="backend: 'triton' can't run: needs a GPU"):
        model(*given, backend="triton")
    with pytest.raises(ValueError, match="no back end 'cuda'"):
        model(*given, backend="cuda")


@torch.no_grad()
def test_the_reference_takes_the_plain_layers_only(given, monkeypatch):
    model = tiny.model()
    expected = model(*given, output_size=(9, 7), backend="reference")
    for name in ("guidance", "attention", "unification", "queries"):
        module = importlib.import_module(f"anyup_fast.plain.{name}")
        for function in ("guidance", "windowed_attention", "feature_unification", "project_queries"):
            if hasattr(module, function):
                monkeypatch.setattr(module, function, failing(Broken(function)))
    with pytest.raises(Broken):
        model(*given)
    assert torch.equal(model(*given, output_size=(9, 7), backend="reference"), expected)
    guide = model.guidance(given[0])
    with choice.use_backend("reference"):
        torch.testing.assert_close(model.upsample(guide, given[1], (9, 7)), expected)


@torch.no_grad()
def test_verbs_and_prepared_images_ask_too(given):
    model = tiny.model()
    image, features = given
    expected = anyup_fast.upsample_features_with_anyup(image, features, weights=model)
    assert torch.equal(
        anyup_fast.upsample_features_with_anyup(image, features, weights=model, backend="torch"), expected
    )
    with pytest.raises(RuntimeError, match="'triton' can't run"):
        anyup_fast.upsample_features_with_anyup(image, features, weights=model, backend="triton")
    prepared = anyup_fast.prepare(image, features, weights=model, backend="triton")
    for answer in (prepared.full, lambda: prepared.region(0, 0, 4, 4)):
        with pytest.raises(RuntimeError, match="'triton' can't run"):
            answer()
    with choice.use_backend("torch"):
        prepared = model.prepare(image, features)
    assert torch.equal(prepared.full(), expected)
    with choice.use_backend("reference"), pytest.raises(ValueError, match="the back end 'reference', the plain layers"):
        model.prepare(image, features)


def test_the_command_line_asks(tmp_path, monkeypatch):
    from anyup_fast import cli

    seen = []
    monkeypatch.setattr(cli.info, "run", lambda arguments: seen.append(choice.requested()))
    assert cli.main(["info"]) == 0
    photo = tiny.photograph(tmp_path / "a.png")
    command = ["upsample", str(photo), "--out", str(tmp_path / "f.safetensors"), "--backend", "triton"]
    monkeypatch.setattr(cli.upsample, "run", lambda arguments: seen.append(choice.requested()))
    assert cli.main(command) == 0
    monkeypatch.setenv(choice.VARIABLE, "torch")
    assert cli.main(command[:-2]) == 0 and cli.main(command) == 0 and choice.requested() == "torch"
    assert seen == ["auto", "triton", "torch", "triton"]


def test_too_little_shared_memory_is_answered_by_plain_pytorch(on_cpu, monkeypatch, caplog):
    from anyup_fast.kernels import tiling

    tiny_card = tiling.Device("cuda", (8, 6), 1000, "a card with a kilobyte")
    monkeypatch.setattr(tiling.Device, "of", classmethod(lambda cls, device: tiny_card))
    expected = small(backend="torch")
    with caplog.at_level(logging.WARNING, "anyup_fast.ops"):
        assert torch.equal(small(), expected)
    (said,) = (record.getMessage() for record in caplog.records)
    assert "1000 bytes of shared memory are too few" in said
    with pytest.raises(RuntimeError, match="1000 bytes of shared memory are too few"):
        small(backend="triton")


def test_launches_are_made_under_the_device_of_the_tensors(monkeypatch):
    """Tensors on cuda:1 while cuda:0 is the current one."""
    from anyup_fast.kernels import attention

    entered = []
    module = types.SimpleNamespace(device=lambda device: entered.append(device) or "guard")
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert attention._on(torch.device("cuda", 1)) == "guard" and entered == [torch.device("cuda", 1)]


HIDDEN = """
import torch, anyup_fast
try:
    anyup_fast.upsample_features_with_anyup(torch.zeros(3, 28, 28), torch.ones(4, 2, 2), device="cuda")
except ValueError as error:
    print(error)
print(tuple(anyup_fast.upsample_features_with_anyup(torch.zeros(3, 28, 28), torch.ones(4, 2, 2)).shape))
"""


def test_hidden_gpus_are_told_in_one_sentence():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", HIDDEN]
    told, shape = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout.splitlines()
    assert told.startswith("device: 'cuda' cannot be used here (") and told.endswith("'cpu' always can")
    assert shape == "(4, 28, 28)"
