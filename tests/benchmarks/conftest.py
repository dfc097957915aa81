"""Steps of the run on a GPU, taken here: a card that is the CPU, where Triton's kernels are interpreted."""

import importlib

import pytest
import torch
from tree import ROOT


@pytest.fixture
def gpu_scripts(monkeypatch):
    """A callable from the name of a script of benchmarks/ for GPUs to the module."""
    if torch.cuda.is_available():
        pytest.skip("meant for the interpreter")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def here(gpu_scripts):
    """The CPU as a card: it computes, and its clock says 2 ms and 5 us."""

    class Here(gpu_scripts("gpu_steps").Card):
        device = torch.device("cpu")
        said = dict(milliseconds=2.0, p20=1.0, p80=3.0, peak_mib=1.0)

        def wait(self):
            pass

        def lost(self):
            return None

        def tidy(self):
            pass

        def free_gib(self):
            return 8.0

        def timed(self, clock, call):
            call()
            return dict(host_us=5.0) if clock == "host" else dict(self.said)

        def machine(self):
            return dict(device="none", capability="0.0", cuda="none")

    return Here()


@pytest.fixture
def journal(gpu_scripts, tmp_path):
    """A callable that opens the file of rows, anew each time."""
    module = gpu_scripts("gpu_steps")
    machine = dict.fromkeys(module.MACHINE, "none")
    return lambda: module.Journal(tmp_path / "gpu.csv", machine)


@pytest.fixture
def taken(gpu_scripts, here, journal):
    """A callable that takes steps and gives their rows."""

    def take(steps):
        run = gpu_scripts("gpu_steps").Run(here, journal(), again=True)
        run.take(steps)
        return run.made

    return take
