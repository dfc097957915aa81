"""Products timed on this machine, once: the fastest exact way of each kind, kept in a file for later processes."""

import json
import platform
import statistics
import time
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F

from ..files import written_aside
from ..logs import log_once
from . import tiles
from .pages import Room
from .ways import Choice, bfloat16_instructions, has_onednn, onednn_bmm, onednn_mm, parsed

EXACT = 1e-6  # largest error of an exact product, relative
MARGIN = 1.25  # times as fast as the default another way must be: a tenth is lost again between other operations
WORTH_HALVING = 1.25  # times as fast as float32 products in bfloat16 must be
ROUNDS = 7
OUTPUTS = 16  # of 2 MB, to be written to in turns


def kept_at():
    """The file with the choice for this processor and this PyTorch."""
    return Path(torch.hub.get_dir()).expanduser() / "anyup_fast" / "products.json"


def _machine():
    """The processor, by what tells one from another: virtual machines hide its name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    first = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    features = first.get("flags", first.get("Features", ""))
    parts = [first[key] for key in ("model name", "cpu family", "model", "CPU part") if key in first]
    name = " ".join(parts) or platform.processor() or platform.machine()
    return f"{name}, features {zlib.crc32(features.encode()):08x}, torch {torch.__version__}"


def kept_or_measured():
    """(Choice, where it is from, gains in words) for this processor and this PyTorch."""
    path, machine = kept_at(), _machine()
    known = _read(path)
    if machine not in known:
        measured, gains = measure()
        known = _read(path)  # another process may have been faster: its answer counts
        if machine not in known:
            known[machine] = {"choice": str(measured), "gains": gains}
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with written_aside(path) as aside:
                    Path(aside).write_text(json.dumps(known, indent=1), encoding="utf-8")
            except OSError as error:
                log_once(f"products on this CPU are timed in every process: {path} can't be written: {error}")
                return measured, "measured", gains
    entry = known[machine]
    return parsed(entry["choice"]), f"kept in {path}", entry["gains"]


def _read(path):
    """What the file says, of machines whose entry can be understood; a file that can't be read says nothing."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {machine: entry for machine, entry in known.items() if _understood(entry)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        log_once(f"products on this CPU are timed anew: {path} can't be read: {error}")
        return {}


def _understood(entry):
    try:
        return parsed(entry["choice"]) is not None and isinstance(entry["gains"], dict)
    except (ValueError, RuntimeError, KeyError, TypeError):
        return False


def measure():
    """(Choice, gains in words): each kind of product timed in turns, in this thread alone, in a quarter of a second.

    A way that is not exact, or not at least `MARGIN` times as fast as the default, is not taken.
    """
    here = dict(dtype=torch.float32, device="cpu")  # whatever PyTorch's defaults are
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape):
        return torch.randn(shape, generator=generator, **here)

    with torch.inference_mode(), torch.autocast("cpu", enabled=False), _one_thread():
        x, weight, outs = numbers(4096, 128), numbers(128, 128), _Turns(torch.zeros(OUTPUTS, 4096, 128, **here))
        few, weights, results = numbers(36, 112, 128), numbers(36, 128, 128), torch.empty(36, 112, 128, **here)
        picture = numbers(1, 66, 66, 128)
        half, half_weight, half_outs = x.bfloat16(), weight.bfloat16(), _Turns(outs.tensors.bfloat16())
        filters = numbers(128, 128, 3, 3)
        runs = {
            "pixels": (
                lambda: torch.mm(x, weight.T, out=outs.next()),
                lambda: onednn_mm(x, weight.T, outs.next()),
                x.double() @ weight.double().T,
            ),
            "batched": (
                lambda: torch.bmm(few, weights, out=results),
                lambda: onednn_bmm(few, weights, results),
                few.double() @ weights.double(),
            ),
        }
        found, gains = {}, {}
        for name, (default, other, exact) in runs.items():
            if not has_onednn():
                continue
            error = ((other() - exact).norm() / exact.norm()).item()
            seconds = _in_turns(default, other)
            gain = seconds[0] / seconds[1]
            taken = error <= EXACT and gain >= MARGIN
            found[name] = "onednn" if taken else "default"
            gains[name] = f"onednn is {gain:.2f} times as fast, error {error:.0e}"
        bmm = onednn_bmm if found.get("batched") == "onednn" else torch.bmm
        of_tiles, room = tiles.transformed(filters), Room()

        def tiled():
            rows = cols = slice(0, 64)
            inputs = tiles.transform(picture[0], rows, cols, of_tiles, room, inside=True)
            results = room.buffer("products", inputs.numel(), inputs).view_as(inputs)
            bmm(inputs, of_tiles, out=results)
            tiles.transform_back(results, (64, 64), outs.next(), room)

        direct_filters = filters.contiguous(memory_format=torch.channels_last)
        seconds = _in_turns(tiled, lambda: F.conv2d(picture.permute(0, 3, 1, 2), direct_filters))
        gain = seconds[0] / seconds[1]
        found["convolution"] = "direct" if gain >= MARGIN else "transformed"
        gains["convolution"] = f"direct is {gain:.2f} times as fast"
        if bfloat16_instructions():
            pixels = runs["pixels"][found.get("pixels") == "onednn"]
            seconds = _in_turns(pixels, lambda: torch.mm(half, half_weight.T, out=half_outs.next()))
            gain = seconds[0] / seconds[1]
            found["bfloat16"] = "fast" if gain >= WORTH_HALVING else "slow"
            gains["bfloat16"] = f"bfloat16 is {gain:.2f} times as fast as float32"
    return Choice(**found), gains


def _in_turns(*runs):
    times = [[] for _ in runs]
    for turn in range(ROUNDS + 1):
        for run, seconds in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if turn:
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


class _Turns:
    """Tensors to write to in turns, more than a cache holds."""

    def __init__(self, tensors):
        self.tensors, self.count = tensors, 0

    def next(self):
        self.count += 1
        return self.tensors[self.count % len(self.tensors)]


class _one_thread:
    def __enter__(self):
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_):
        torch.set_num_threads(self.threads)
