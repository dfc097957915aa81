"""Where no GPU is at hand, Triton's kernels run in its interpreter; it has to know before anything imports it."""

import gc
import importlib.util
import math
import os
import shutil
from pathlib import Path

# Two processes whose threads share the cores wait for each other: one thread for each, and for what they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

# What a processor multiplies fastest is measured in a test of its own, not in every process that tests start.
os.environ.setdefault("ANYUP_FAST_PRODUCTS", "default")

import longest  # noqa: E402
import pytest  # noqa: E402
import quick_interpreter  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    quick_interpreter.hasten()


def pytest_collection_finish():
    """What is there before the first test stays: thousands of items and modules that no search for garbage frees."""
    gc.freeze()


def pytest_sessionfinish():
    """At the end everything goes, as in any process."""
    gc.unfreeze()


def pytest_collection_modifyitems(items):
    """Between several processes the longest files are shared out first, so that none is left alone with one."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = {name: number for number, name in enumerate(longest.FILES)}
        items.sort(key=lambda item: place.get(item.nodeid.split("::")[0].removeprefix("tests/"), len(place)))


def _threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads():
    """PyTorch has two threads, whatever the machine."""
    yield from _threads(2)


@pytest.fixture
def one_thread():
    """PyTorch has one thread, the test's own: what a dispatch mode is to see is done there."""
    yield from _threads(1)


@pytest.fixture
def poisoned(monkeypatch):
    """What a launcher allocates holds NaN until a kernel writes it."""
    empty = torch.empty

    def poisoned_empty(*args, **options):
        out = empty(*args, **options)
        return out.fill_(math.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned_empty)


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A callable (module, old, new) -> a copy of a module of kernels in which `new` stands for `old`."""

    def copy(module, old, new):
        source = Path(module.__file__)
        name = f"broken_{tmp_path.name}"
        shutil.copytree(source.parent, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "tuned"))
        text = source.read_text(encoding="utf-8")
        assert old in text
        (tmp_path / name / source.name).write_text(text.replace(old, new), encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        return importlib.import_module(f"{name}.{source.stem}")

    return copy


@pytest.fixture(scope="module")
def torch_home(tmp_path_factory):
    """A TORCH_HOME that holds both published checkpoints, with random weights; and the weights."""
    from published_home import torch_home

    home = tmp_path_factory.mktemp("torch")
    return home, torch_home(home)
