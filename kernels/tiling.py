"""Which design and tile of the windowed attention runs: a pure function of device, dtype, channels and window."""

import json
import math
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch

TUNED = Path(__file__).parent / "tuned"
# A measured tile is used for windows and channels within this factor of those it was measured with.
NEAR = 2.0


# Chips that Triton compiles alike: by what NVIDIA's compute capability and the name of AMD's architecture begin with.
# sm_90 and sm_100 multiply from shared memory, the others from registers; gfx11 and gfx12 have warps of 32 threads.
FAMILIES = {
    "cuda": {(8,): "sm_80", (9,): "sm_90", (10,): "sm_100", (12,): "sm_120"},
    "hip": {"gfx90a": "gfx9", "gfx94": "gfx9", "gfx95": "gfx950", "gfx11": "gfx11", "gfx12": "gfx12"},
}
RDNA = ("gfx11", "gfx12")


@dataclass(frozen=True)
class Device:
    """What a tile has to fit: the kind of device ("cuda", "hip", "xpu", "cpu"), its compute capability (0, 0) where
    there is none, bytes of shared memory per block, its name, under which tiles are tuned, and AMD's name of its
    architecture ("gfx942"), and its multiprocessors."""

    kind: str
    capability: tuple
    shared_memory: int
    name: str = ""
    arch: str = ""
    processors: int = 128

    @classmethod
    def of(cls, device):
        """The device that tensors on `device` (a torch.device) run on."""
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            capability = properties.major, properties.minor
            if torch.version.hip is not None:
                arch = properties.gcnArchName.partition(":")[0]
                return cls("hip", capability, 65536, properties.name, arch, properties.multi_processor_count)
            shared = getattr(properties, "shared_memory_per_block_optin", 65536)
            return cls("cuda", capability, shared, properties.name, "", properties.multi_processor_count)
        return cls(device.type, (0, 0), 65536)

    @property
    def family(self):
        """Which of `FAMILIES` it belongs to; None where its kernels were never compiled."""
        own = self.arch or "gfx{}{}".format(*self.capability) if self.kind == "hip" else self.capability
        known = FAMILIES.get(self.kind, {})
        return next((family for prefix, family in known.items() if own[: len(prefix)] == prefix), None)


def why_no_kernels(device, *dtypes):
    """Why the kernels can't serve a `Device` with tensors of these dtypes: one sentence, or None."""
    if device.kind != "hip":
        return None
    if device.family is None:
        known = ", ".join(f"{prefix}*" for prefix in FAMILIES["hip"])
        return f"needs an AMD GPU with matrix units ({known}), got {device.arch or device.name}"
    if device.family in RDNA and torch.float32 in dtypes:
        return f"needs float16 or bfloat16 on {device.arch}, whose matrix units know no float32: the registers run out"
    return None


@dataclass(frozen=True)
class Tile:
    """One way to run the kernels.

    Attributes:
        design: "window", "halved", "two_pass", "stored" or "heads" (see `attention.py`).
        block_h, block_w: output pixels of a program.
        block_k: keys at a time; "window" and "halved" need the whole rectangle of a tile in it.
        block_c: channels at a time.
        warps, stages: Triton's num_warps and num_stages.
        stats_block_k: keys at a time in the first of two passes.
        mix_k, mix_stages: keys at a time and stages in the product with the values of "stored" and "halved".
        precision: of float32 products ("tf32x3", "tf32", "ieee"); None means the most exact that is fast.
    """

    design: str
    block_h: int
    block_w: int
    block_k: int
    block_c: int
    warps: int
    stages: int = 2
    stats_block_k: int = 64
    mix_k: int = 64
    mix_stages: int = 3
    precision: str | None = None

    def fits(self, channels, spans):
        """Whether the tile can compute windows with `spans` (see `choose_tile`) and `channels` per set of weights."""
        if self.design == "heads":
            return channels < self.block_c
        if self.design == "two_pass":
            return True
        if spans is None:
            return False
        if self.design == "stored":
            return channels >= self.block_c
        rows, cols = spans(self.block_h, self.block_w)
        if self.design == "halved":
            return channels >= self.block_c and max(rows, cols) <= 16
        return rows * cols <= self.block_k


def _window(block_h, block_w, block_k, block_c, warps, **rest):
    return Tile("window", block_h, block_w, block_k, block_c, warps, **rest)


# Best first; the first one that fits is taken. Beside each tile, for the families of chips where no kernel of it spills
# more than 64 bytes, stand the KiB of shared memory that it takes: as compiled for 4 heads of 32 numbers, whether they
# split the channels or not, the most of Triton 3.4 and 3.9 (on AMD the former takes up to five times as much, on NVIDIA
# mostly 1 KiB more).
HALF_TILES = {
    _window(8, 8, 64, 64, 4): dict(sm_80=24, sm_90=25, sm_100=34, sm_120=24, gfx9=41, gfx950=41, gfx11=25, gfx12=25),
    _window(8, 16, 64, 64, 8): dict(sm_80=40, sm_90=34, sm_100=51, sm_120=40, gfx9=16, gfx950=17, gfx11=16, gfx12=16),
    _window(8, 16, 128, 64, 8): dict(sm_80=64, sm_90=50, sm_100=83, sm_120=64, gfx9=82, gfx950=82, gfx12=49),
    _window(8, 8, 128, 64, 8): dict(sm_80=40, sm_90=57, sm_100=58, sm_120=40, gfx9=17, gfx950=34, gfx12=17),
    _window(8, 8, 128, 32, 8): dict(gfx11=16),
    _window(8, 8, 256, 128, 8): dict(sm_90=177),
    _window(8, 8, 256, 64, 8): dict(sm_80=72, sm_90=105, sm_100=106, sm_120=72, gfx9=33, gfx950=68, gfx12=33),
    _window(8, 8, 256, 32, 8): dict(sm_80=53, sm_90=69, sm_100=70, sm_120=53, gfx9=33, gfx950=34, gfx12=33),
    Tile("heads", 8, 16, 64, 16, 8): dict(sm_80=16, sm_90=20, sm_100=39, sm_120=16, gfx9=36, gfx950=41, gfx12=36),
    Tile("heads", 8, 8, 16, 16, 4, stages=1): dict(gfx11=4),
    Tile("heads", 8, 16, 64, 32, 8): dict(sm_80=20, sm_90=24, sm_100=43, sm_120=20, gfx9=36, gfx12=36),
    Tile("heads", 8, 16, 32, 32, 8): dict(gfx950=20),
    Tile("heads", 4, 8, 16, 32, 4, stages=1): dict(gfx11=2),
    Tile("heads", 8, 8, 64, 64, 8): dict(sm_80=24, sm_90=28, sm_100=29, sm_120=24, gfx9=20),
    Tile("heads", 8, 8, 32, 64, 8): dict(gfx950=12),
    Tile("heads", 4, 8, 16, 64, 4, stages=1): dict(gfx11=2, gfx12=2),
    Tile("stored", 8, 16, 32, 256, 8): dict(sm_90=145),
    Tile("stored", 8, 16, 32, 128, 8, mix_k=32, mix_stages=2): dict(sm_80=49, sm_120=49),
    Tile("two_pass", 8, 16, 32, 256, 8): dict(sm_90=80, sm_100=81),
    Tile("two_pass", 8, 16, 32, 128, 8): dict(sm_80=48, sm_90=64, sm_100=65, sm_120=48, gfx9=32, gfx950=49),
    Tile("two_pass", 8, 8, 16, 128, 8, stages=1, stats_block_k=32): dict(gfx11=5, gfx12=5),
    Tile("two_pass", 8, 8, 16, 64, 4, stages=1, stats_block_k=32): dict(
        sm_80=19, sm_90=19, sm_100=20, sm_120=19, gfx9=5, gfx950=5, gfx11=5, gfx12=5
    ),
}
WIDE_TILES = {
    _window(8, 8, 64, 32, 4): dict(sm_80=17, sm_90=24, sm_100=25, gfx9=25, gfx950=25),
    _window(8, 8, 64, 32, 8): dict(sm_120=17),
    Tile("halved", 8, 16, 256, 128, 8, mix_k=32): dict(sm_90=153),
    Tile("stored", 8, 16, 32, 128, 8, stats_block_k=32, mix_k=32): dict(sm_90=153),
    Tile("stored", 8, 16, 32, 128, 8, stats_block_k=32, mix_k=32, mix_stages=2): dict(sm_80=153),
    _window(8, 8, 128, 16, 8): dict(sm_80=77, sm_90=88, sm_100=33, sm_120=77, gfx9=32, gfx950=32),
    _window(8, 8, 256, 16, 8): dict(sm_100=65),
    _window(4, 8, 256, 16, 8): dict(gfx9=32, gfx950=32),
    Tile("heads", 8, 8, 32, 16, 4): dict(sm_80=26, sm_90=30, sm_100=15, sm_120=26, gfx9=12, gfx950=16),
    Tile("heads", 8, 8, 32, 32, 4): dict(sm_80=32, sm_90=32, sm_100=17, sm_120=32, gfx9=12, gfx950=16),
    Tile("heads", 8, 8, 32, 64, 8): dict(sm_80=44, sm_100=29, sm_120=44, gfx9=12, gfx950=16),
    Tile("heads", 8, 8, 16, 64, 8): dict(sm_90=43),
    Tile("two_pass", 8, 8, 16, 32, 4, stats_block_k=32): dict(
        sm_80=74, sm_90=78, sm_100=19, sm_120=74, gfx9=14, gfx950=24
    ),
    Tile("two_pass", 8, 8, 16, 16, 4, stages=1, stats_block_k=16): dict(
        sm_80=66, sm_90=68, sm_100=9, sm_120=66, gfx9=8, gfx950=8
    ),
}


def _sizes(dtype):
    return WIDE_TILES if dtype == torch.float32 else HALF_TILES


def shared_memory(tile, device, dtype, head_dim=32, heads=4):
    """Bytes of shared memory that a tile takes on a `Device`, for heads of `head_dim` numbers.

    Those of the tables are what was compiled, on the family of the device (the most that any promised release of Triton
    takes); others are estimated from above.
    """
    known = _compiled(tile, dtype).get(device.family)
    if known is None:
        return _estimate(tile, device.kind, dtype, head_dim, heads)
    more = 0
    if head_dim > 32 or heads > 4:
        usual = _estimate(tile, device.kind, dtype, 32, 4)
        more = max(0, _estimate(tile, device.kind, dtype, head_dim, heads) - usual)
    return 1024 * known + more


def _compiled(tile, dtype):
    """The tables' entry of a tile, or of the one that it was `_narrowed` from."""
    sizes = _sizes(dtype)
    if tile in sizes:
        return sizes[tile]
    for wide, known in sizes.items():
        blocks = dict(block_k=wide.block_k, stats_block_k=wide.stats_block_k)
        narrower = tile.block_k <= wide.block_k and tile.stats_block_k <= wide.stats_block_k
        if tile.design not in ("window", "halved") and narrower and replace(tile, **blocks) == wide:
            return known
    return {}


def _estimate(tile, kind, dtype, head_dim, heads):
    pixels, stages = tile.block_h * tile.block_w, max(1, tile.stages)
    depth = 16
    while depth < head_dim:
        depth *= 2
    if tile.design == "halved":  # whatever comes in, what is multiplied has 16 bits
        depth = max(32, depth)
        numbers = tile.block_k * (4 * depth * stages + pixels) + pixels * 4 * depth
        return 2 * max(numbers, 2 * tile.mix_k * (pixels + tile.block_c) * tile.mix_stages) + 4096
    if tile.design in ("two_pass", "stored"):
        numbers = pixels * max(heads * depth + tile.block_k, tile.block_c)
        numbers += tile.block_k * (heads * depth + tile.block_c) * stages
        if tile.design == "stored":
            numbers = max(numbers, tile.mix_k * (pixels + tile.block_c) * tile.mix_stages)
    elif tile.design == "window":
        numbers = pixels * (depth + tile.block_k + tile.block_c) + tile.block_k * (depth + tile.block_c * stages)
    else:
        numbers = pixels * (depth + tile.block_k + tile.block_c) + tile.block_k * (depth + tile.block_c) * stages
    size = torch.finfo(dtype).bits // 8 * numbers + 4096
    # Float32 products in three steps keep the rounded and the rest of their operands.
    return size * 3 // 2 if kind == "cuda" and dtype == torch.float32 else size


@cache
def candidates(dtype, device=None):
    """Every tile that may be chosen for `dtype` without having been measured, best first: on a `Device`, or anywhere.

    A device of no family, Triton's interpreter for one, is offered what suits NVIDIA's oldest.
    """
    sizes = _sizes(dtype)
    if device is None:
        return tuple(sizes)
    offered = [tile for tile, known in sizes.items() if (device.family or "sm_80") in known]
    return tuple(tile for tile in offered if shared_memory(tile, device, dtype) <= device.shared_memory)


def choose_tile(device, dtype, channels, spans, tuned=None, head_dim=32, heads=4, stored=True):
    """The tile for one problem.

    Args:
        device: a `Device`.
        dtype: of the products: that of query and value, float32 where they differ.
        channels: that one set of weights serves: C, or C / heads where the heads split them.
        spans: function (block_h, block_w) -> (rows, cols), the largest rectangle of keys that a tile of so many
            pixels spans; None where that is unknown (bounds that lie on an accelerator).
        tuned: measured tiles as from `load_tuned`; None means `tuned_for` this device.
        head_dim, heads: numbers of a head, and how many there are.
        stored: whether weights may be stored: they serve all channels.

    Returns:
        the nearest measured `Tile` within a factor of `NEAR`, else the first of `candidates` that fits.

    Raises:
        RuntimeError: shared memory is too small for any tile, or `why_no_kernels` has a reason.
    """
    room = device.shared_memory

    def usable(tile):
        if tile.design in ("stored", "halved") and not stored:
            return False
        return shared_memory(tile, device, dtype, head_dim, heads) <= room and tile.fits(channels, spans)

    if spans is not None:
        keys = math.prod(spans(1, 1))
        near = []
        for entry in tuned_for(device) if tuned is None else tuned:
            gap = max(abs(math.log(entry["keys"] / keys)), abs(math.log(entry["channels"] / channels)))
            if entry["dtype"] == str(dtype).removeprefix("torch.") and gap <= math.log(NEAR) and usable(entry["tile"]):
                near.append((gap, len(near), entry["tile"]))
        if near:
            return min(near)[2]
    offered = candidates(dtype, device)
    # What wider heads take is estimated from above: where that leaves nothing, the last one is the smallest.
    tile = next(filter(usable, offered), offered[-1] if offered else None)
    if tile is not None:
        return tile if spans is None else _narrowed(tile, spans)
    if reason := why_no_kernels(device, dtype):
        raise RuntimeError(f"no tile of the windowed attention for {device}: {reason}")
    raise RuntimeError(f"no tile of the windowed attention fits {device}: {room} bytes of shared memory are too few")


def _narrowed(tile, spans):
    """A looping tile with blocks of keys no wider than the rows of keys it meets."""
    if tile.design in ("window", "halved"):
        return tile
    room = 16
    while room < spans(tile.block_h, tile.block_w)[1]:
        room *= 2
    return replace(tile, block_k=min(tile.block_k, room), stats_block_k=min(tile.stats_block_k, room))


def tuned_for(device):
    """Measured tiles for a `Device`: those of its name, or else all that were measured on its family of chips."""
    return load_tuned(device.name) or _tuned_alike(device.family, TUNED)


@cache
def _tuned_alike(family, folder):
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    alike = [load_tuned(file["device"]) for file in files if family is not None and file["family"] == family]
    return [entry for entries in alike for entry in entries]


@cache
def load_tuned(name):
    """Measured tiles of the device called `name`: list of dicts dtype, keys, channels, milliseconds, tile."""
    path = tuned_path(name)
    if not name or not path.is_file():
        return []
    entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
    return [{**entry, "tile": Tile(**entry["tile"])} for entry in entries]


def forget_tuned():
    """Read the measured tiles anew when they are next asked for."""
    load_tuned.cache_clear()
    _tuned_alike.cache_clear()


def tuned_path(name):
    """Where the measured tiles of the device called `name` lie."""
    return TUNED / ("".join(c if c.isalnum() else "_" for c in name) + ".json")


def dump_tuned(device, entries):
    """JSON text for `tuned_path` of a `Device`, from entries as `load_tuned` gives them."""
    entries = [{**entry, "tile": asdict(entry["tile"])} for entry in entries]
    return json.dumps({"device": device.name, "family": device.family, "entries": entries}, indent=1) + "\n"
