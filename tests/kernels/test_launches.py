"""What a forward costs the host: launches, compilations, time; under a driver of a GPU that isn't there.

Tensors lie on "meta", where what PyTorch does itself costs nothing but its call, and kernels are not compiled: what
stands for them is remembered and launched as they would be. Each test runs in a process of its own, for here kernels
are interpreted.
"""

import json

import forked
import pytest
from tree import ROOT

SUPPORT = ROOT / "tests" / "support"
MOST_LAUNCHES = 50
MOST_COMPILED = 24
# On the machine of benchmarks/NOTES.md 0.55 to 0.6 ms; one that has other things to do takes several times as long.
MOST_SECONDS = 0.6e-3
PATIENCE = 4

CHILD = """
import json, statistics, sys, time
from collections import Counter
import absent
absent.install(kind="meta", compiling="pretended")
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from anyup_fast import AnyUp

torch.set_num_threads(1)
VIEWS = {"view", "permute", "t", "transpose", "expand", "select", "slice", "unsqueeze", "squeeze", "unbind", "alias",
         "as_strided", "detach", "_unsafe_view", "split", "chunk", "narrow", "empty", "new_empty", "empty_strided",
         "split_with_sizes"}


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.computed, self.float64, self.mixed, self.host = Counter(), 0, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, out))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        name = function.overloadpacket.__name__
        self.computed[name] += name not in VIEWS
        self.float64 += any(tensor.dtype == torch.float64 for tensor in tensors)
        devices = {tensor.device.type for tensor in tensors if tensor.dim()}
        self.host += name not in VIEWS and not any(tensor.device.type == "meta" for tensor in tensors)
        self.mixed += len(devices) > 1 or name in ("_local_scalar_dense", "is_nonzero")
        return out


def problem(size, grid, channels, batch=1, dtype=torch.bfloat16):
    return (torch.empty(batch, 3, *size, dtype=dtype, device="meta"),
            torch.empty(batch, channels, *grid, dtype=dtype, device="meta"))


def model(dtype=torch.bfloat16):
    return AnyUp().to(dtype).to("meta").eval().requires_grad_(False)


def counted(call):
    absent.LAUNCHED.clear()
    with Count() as count:
        call()
    return dict(triton=sum(absent.LAUNCHED.values()), torch=sum(count.computed.values()), float64=count.float64,
                mixed=count.mixed, host=count.host, launched=absent.LAUNCHED, computed=count.computed)
"""


def told(code):
    """The object that a process prints which runs `CHILD` and `code`."""
    result = forked.run("-c", CHILD + code, PYTHONPATH=str(SUPPORT))
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


LAUNCHES = """
found = {}
made = model()
for batch in (1, 8):
    given = problem((448, 448), (32, 32), 384, batch)
    with torch.no_grad():
        made(*given)
        found[batch] = counted(lambda: made(*given))
print(json.dumps(found))
"""


def test_launches_of_a_forward():
    found = told(LAUNCHES)
    for counts in found.values():
        assert counts["triton"] + counts["torch"] <= MOST_LAUNCHES, counts
        assert counts["float64"] == counts["mixed"] == 0, counts
    assert found["1"]["triton"] == found["8"]["triton"] > 30 and found["1"]["torch"] == found["8"]["torch"]


TIME = """
made, given, best = model(), problem((448, 448), (32, 32), 384), []
with torch.no_grad():
    made(*given)
    for _ in range(5):
        seconds = []
        for _ in range(50):
            start = time.perf_counter()
            made(*given)
            seconds.append(time.perf_counter() - start)
        best.append(statistics.median(seconds))
print(json.dumps(min(best)))
"""


def test_time_of_the_host():
    assert told(TIME) <= PATIENCE * MOST_SECONDS


SIZES = """
sizes = ((448, 32), (224, 16), (336, 24), (518, 37), (512, 32), (1024, 64), ((480, 640), (34, 45)),
         ((448, 672), (32, 48)), ((427, 640), (30, 45)), ((720, 1280), (51, 91)), ((392, 518), (28, 37)),
         ((378, 504), (27, 36)), ((600, 800), (42, 57)))
made, compiled = model(torch.DTYPE), []
with torch.no_grad():
    for pair in sizes:
        size, grid = ((side, side) if isinstance(side, int) else side for side in pair)
        before = absent.COMPILED["left out"]
        made(*problem(size, grid, 384, dtype=torch.DTYPE))
        compiled.append(absent.COMPILED["left out"] - before)
print(json.dumps(compiled))
"""


# In float32 the attention of a 64-grid has three kernels, wider windows two more.
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compilations_of_many_sizes(dtype):
    compiled = told(SIZES.replace("DTYPE", dtype))
    assert sum(compiled[:12]) <= MOST_COMPILED and compiled[12] <= 1, compiled


PREPARED = """
found = {}
for side, grid, channels in ((448, 32, 384), (1024, 64, 768)):
    prepared = model().prepare(*problem((side, side), (grid, grid), channels))
    for name, ask in (("full", prepared.full), ("other size", lambda: prepared.full((300, 300))),
                      ("region", lambda: prepared.region(64, 32, 256, 256))):
        ask()
        found[f"{side} {name}"] = counted(ask)
print(json.dumps(found))
"""


def test_launches_of_a_prepared_image():
    for name, counts in told(PREPARED).items():
        # What PyTorch computes of the bounds of windows lies on the CPU.
        assert counts["triton"] + counts["torch"] - counts["host"] <= 25 and counts["float64"] == 0, (name, counts)
        assert 9 <= counts["triton"] <= 10, (name, counts)


HOOKED = """
import triton
made, given, seen = model(), problem((56, 56), (4, 4), 32), []
triton.knobs.runtime.launch_enter_hook.add(seen.append)
with torch.no_grad():
    for _ in range(2):
        absent.LAUNCHED.clear()
        made(*given)
from anyup_fast.kernels import launches
print(json.dumps([launches.Launches("none")._watched, absent.LAUNCHED.total()]))
"""


def test_a_profiler_s_hooks_are_heeded():
    assert told(HOOKED) == [True, 41]


PROBLEMS = """
from anyup_fast.kernels import launches
launches.MOST_PROBLEMS = 7
made, sizes = model(), []
with torch.no_grad():
    for side in (14, 28, 42, 14, 28, 42):
        given = problem((side, side), (side // 14, side // 14), 384)
        before = absent.LAUNCHED.total()
        made(*given)
        sizes.append([len(launches._known), absent.LAUNCHED.total() - before])
print(json.dumps(sizes))
"""


def test_a_limited_number_of_problems_is_remembered():
    found = told(PROBLEMS)
    assert max(known for known, _ in found) <= 7
    assert len({launched for _, launched in found[3:]}) == 1, "what was forgotten is launched all the same"


ANOTHER_ORDER = """
from anyup_fast.kernels import keys, launches
x, stats = torch.empty(1, 32, 4, 4, device="meta"), torch.empty(1, 2, 8, 1, device="meta")
given = x, x, stats, 16, 1, 0.5
options = dict(M=32, GROUPS=8, BLOCK_P=32, num_warps=4)


def launched(kernels):
    launch = launches.Launches("problem")
    for kernel in kernels:
        launch(kernel, 1, *given, **options)
    launch.done()


launched([keys._start_kernel])
launched([keys._start_kernel])
try:
    launched([keys._unit_kernel])
except RuntimeError as error:
    print(json.dumps([str(error), absent.LAUNCHED]))
"""


def test_launches_in_another_order_are_refused():
    error, launched = told(ANOTHER_ORDER)
    assert "'problem'" in error and "_unit_kernel" in error and launched == {"_start_kernel": 2}
