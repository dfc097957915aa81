"""The entry points of torch.hub, from a checkout that nobody installed."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from published_home import NAMES, offline
from standins import NattenAnyUp, PublishedAnyUp, take_over
from tree import ROOT
from vectors import inputs, relative

from anyup_fast import AnyUp

# Run by a Python that sees no installed anyup_fast.
PROBE = """
import json, sys
import torch
repo, folder = sys.argv[1:]
image, features = torch.load(folder + "/inputs.pt")
outputs, kernels = {}, []
for name in ("anyup", "anyup_multi_backbone", "anyup_embedded"):
    for use_natten in (False, True):
        with torch.no_grad():
            model = torch.hub.load(repo, name, use_natten=use_natten, source="local")
            kernels.append([name for name in sys.modules if name.startswith("anyup_fast.kernels.")])
            outputs[f"{name}/{use_natten}"] = model(image, features)
torch.save(outputs, folder + "/outputs.pt")
import anyup_fast.kernels.tiling
print(json.dumps([[anyup_fast.__file__, anyup_fast.kernels.tiling.__file__], kernels[0]]))
"""


def uninstalled(source, *arguments):
    """Environment and command of a Python that runs `source` and sees no installed anyup_fast."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    # Without `site` no .pth file is read, so that an editable installation is not seen.
    folders = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    environment |= {"PYTHONPATH": os.pathsep.join(folders), "PYTHONDONTWRITEBYTECODE": "1"}
    return environment, [sys.executable, "-S", "-c", source, *arguments]


@torch.no_grad()
def test_a_checkout_loads_without_an_installation_and_gives_the_published_numbers(torch_home, tmp_path):
    home, weights = torch_home
    image, features = inputs(size=(28, 35), grid=(4, 5))
    torch.save((image, features), tmp_path / "inputs.pt")
    environment, command = uninstalled(PROBE, str(ROOT), str(tmp_path))
    done = subprocess.run(
        command, cwd=tmp_path, env=offline(environment, home), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    files, loaded = json.loads(done.stdout.splitlines()[-1])
    assert files == [str(ROOT / "anyup_fast" / "__init__.py"), str(ROOT / "kernels" / "tiling.py")]
    assert loaded == [], "the folder is known, and no kernel is imported with the model"
    outputs = torch.load(tmp_path / "outputs.pt")
    for name, checkpoint in NAMES.items():
        published = PublishedAnyUp().eval()
        published.load_state_dict(weights[checkpoint])
        # Measured: 4e-7.
        assert relative(outputs[f"{name}/False"], published(image, features)) < 1e-5
        natten = NattenAnyUp()
        natten.load_state_dict(weights[checkpoint], strict=False)
        take_over(natten.cross_decode, published.cross_decode)
        assert relative(outputs[f"{name}/True"], natten(image, features)) < 1e-5
    embedded = AnyUp.from_pretrained("embedded")(image, features)
    torch.testing.assert_close(outputs["anyup_embedded/False"], embedded)
    assert relative(outputs["anyup_embedded/True"], embedded) > 1e-3


def load(name, **options):
    return torch.hub.load(str(ROOT), name, source="local", **options)


@pytest.mark.parametrize("name", ["anyup", "anyup_multi_backbone", "anyup_embedded"])
def test_without_weights_nothing_is_fetched(name, monkeypatch, tmp_path):
    for variable, value in offline({}, tmp_path).items():
        monkeypatch.setenv(variable, value)
    torch.manual_seed(3)
    model = load(name, use_natten=True, pretrained=False, device="cpu")
    assert isinstance(model, AnyUp) and model.cross_decode.window_rule == "neighborhood"
    assert len(model.state_dict()) == 73
    torch.manual_seed(3)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), AnyUp().parameters(), strict=True))
    assert list(tmp_path.iterdir()) == []


def test_positional_arguments_are_those_of_the_published_entry_points():
    model = load("anyup", use_natten=False, pretrained=False, device="meta")
    assert model.cross_decode.window_rule == "ratio" and next(model.parameters()).is_meta
    positional = torch.hub.load(str(ROOT), "anyup", True, False, "meta", source="local")
    assert positional.cross_decode.window_rule == "neighborhood" and next(positional.parameters()).is_meta


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_an_unknown_device_is_named(device):
    with pytest.raises(ValueError, match=f"device: '{device}' cannot be used here"):
        load("anyup_embedded", device=device)


def test_offline_the_message_tells_where_to_put_the_file(monkeypatch, tmp_path):
    for variable, value in offline({}, tmp_path).items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(RuntimeError, match="fetch the file elsewhere and put it at .*anyup_paper.pth"):
        load("anyup")


# Another checkout is installed in editable form: its finder answers for `anyup_fast.kernels`.
ANOTHER = """
import sys
from importlib.util import spec_from_file_location

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "anyup_fast.kernels":
            folder = sys.argv[2] + "/kernels"
            return spec_from_file_location(name, folder + "/__init__.py", submodule_search_locations=[folder])

sys.meta_path.append(Finder)
import torch
if sys.argv[3] == "before":
    sys.path.insert(0, sys.argv[2])
    import anyup_fast
    sys.path.pop(0)
torch.hub.load(sys.argv[1], "anyup", pretrained=False, source="local")
import anyup_fast.kernels.tiling
print(anyup_fast.__file__, anyup_fast.kernels.tiling.__file__, sep="\\n")
"""


@pytest.mark.parametrize("imported", ["before", "not yet"])
def test_kernels_are_those_of_the_package_that_is_used(imported, tmp_path):
    for name in ("anyup_fast", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.pyc", "*.safetensors"))
    environment, command = uninstalled(ANOTHER, str(ROOT), str(tmp_path), imported)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    used = tmp_path if imported == "before" else ROOT
    assert done.stdout.split() == [str(used / "anyup_fast" / "__init__.py"), str(used / "kernels" / "tiling.py")]


def test_embedded_weights_without_safetensors(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(RuntimeError, match="anyup_embedded: .* package safetensors: pip install safetensors"):
        load("anyup_embedded")
    assert isinstance(load("anyup_embedded", pretrained=False), AnyUp)
