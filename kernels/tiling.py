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


@dataclass(frozen=True)
class Device:
    """What a tile has to fit: the kind of device ("cuda", "hip", "xpu", "cpu"), its compute capability (0, 0) where
    there is none, bytes of shared memory per block, and its name, under which tiles are tuned."""

    kind: str
    capability: tuple
    shared_memory: int
    name: str = ""

    @classmethod
    def of(cls, device):
        """The device that tensors on `device` (a torch.device) run on."""
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            kind = "cuda" if torch.version.hip is None else "hip"
            shared = getattr(properties, "shared_memory_per_block_optin", 65536) if kind == "cuda" else 65536
            return cls(kind, (properties.major, properties.minor), shared, properties.name)
        return cls(device.type, (0, 0), 65536)


@dataclass(frozen=True)
class Tile:
    """One way to run the kernels.

    Attributes:
        design: "window", "two_pass" or "heads" (see `windowed_attention.py`).
        block_h, block_w: output pixels of a program.
        block_k: keys at a time; "window" needs the whole rectangle of a tile in it.
        block_c: channels at a time.
        warps, stages: Triton's num_warps and num_stages.
        stats_block_k: keys at a time in the first of two passes.
        precision: of float32 products ("tf32x3", "tf32", "ieee"); None means the most exact that is fast.
        needs: compute capability from which its registers suffice (others have none to check).
    """

    design: str
    block_h: int
    block_w: int
    block_k: int
    block_c: int
    warps: int
    stages: int = 2
    stats_block_k: int = 64
    precision: str | None = None
    needs: tuple = (0, 0)

    def fits(self, channels, spans):
        """Whether the tile can compute windows with `spans` (see `choose_tile`) and `channels` per set of weights."""
        if self.design == "heads":
            return channels < self.block_c
        if self.design == "two_pass":
            return True
        if spans is None:
            return False
        rows, cols = spans(self.block_h, self.block_w)
        return rows * cols <= self.block_k

    def shared_memory(self, element_size, kind="cuda", head_dim=32, heads=4):
        """Bytes of shared memory it may take on a kind of device, from above (compiling every tile checks it)."""
        pixels, depth = self.block_h * self.block_w, max(16, head_dim)
        stages = max(1, self.stages)
        if self.design == "window":
            numbers = pixels * (depth + self.block_k + self.block_c) + self.block_k * (depth + self.block_c * stages)
        elif self.design == "two_pass":
            numbers = pixels * max(heads * depth + self.block_k, self.block_c)
            numbers += self.block_k * (heads * depth + self.block_c) * stages
        else:
            numbers = pixels * (depth + self.block_k + self.block_c)
            numbers += self.block_k * (depth + self.block_c) * stages
        size = element_size * numbers + 4096
        if kind == "hip":
            return size * 3 // 5 if self.design == "window" else size
        # Float32 products in three steps keep the rounded and the rest of their operands.
        return size * 3 // 2 if kind == "cuda" and element_size == 4 else size


def _window(block_h, block_w, block_k, block_c, warps, **rest):
    return Tile("window", block_h, block_w, block_k, block_c, warps, **rest)


# Best first; the first one that fits is taken.
HALF_TILES = (
    _window(8, 8, 64, 64, 4),
    _window(8, 16, 64, 64, 8),
    _window(8, 16, 128, 64, 8),
    _window(8, 8, 128, 64, 8),
    _window(8, 8, 256, 64, 8),
    _window(8, 8, 256, 32, 8),
    Tile("heads", 8, 16, 64, 16, 8),
    Tile("heads", 8, 16, 64, 32, 8),
    Tile("heads", 8, 8, 64, 64, 8),
    Tile("two_pass", 8, 16, 32, 256, 8, needs=(9, 0)),
    Tile("two_pass", 8, 16, 32, 128, 8),
    Tile("two_pass", 8, 8, 16, 64, 4, stages=1, stats_block_k=32),
)
WIDE_TILES = (
    _window(8, 8, 64, 32, 4),
    _window(8, 8, 128, 16, 8),
    Tile("heads", 8, 8, 32, 16, 4),
    Tile("heads", 8, 8, 32, 32, 4),
    Tile("heads", 8, 8, 32, 64, 8),
    Tile("two_pass", 8, 8, 16, 32, 4, stats_block_k=32),
    Tile("two_pass", 8, 8, 16, 16, 4, stages=1, stats_block_k=16),
)


def candidates(dtype):
    """Every tile that may be chosen for `dtype` without having been measured, best first."""
    return WIDE_TILES if dtype == torch.float32 else HALF_TILES


def choose_tile(device, dtype, channels, spans, tuned=None):
    """The tile for one problem.

    Args:
        device: a `Device`.
        dtype: of the products: that of query and value, float32 where they differ.
        channels: that one set of weights serves: C, or C / heads where the heads split them.
        spans: function (block_h, block_w) -> (rows, cols), the largest rectangle of keys that a tile of so many
            pixels spans; None where that is unknown (bounds that lie on an accelerator).
        tuned: measured tiles as from `load_tuned`; None means those of this device.

    Returns:
        the nearest measured `Tile` within a factor of `NEAR`, else the first of `candidates` that fits.
    """
    room = device.shared_memory
    size = torch.finfo(dtype).bits // 8

    def usable(tile):
        roomy = tile.shared_memory(size, device.kind) <= room
        return roomy and device.capability >= tuple(tile.needs) and tile.fits(channels, spans)

    if spans is not None:
        keys = math.prod(spans(1, 1))
        near = []
        for entry in load_tuned(device.name) if tuned is None else tuned:
            gap = max(abs(math.log(entry["keys"] / keys)), abs(math.log(entry["channels"] / channels)))
            if entry["dtype"] == str(dtype).removeprefix("torch.") and gap <= math.log(NEAR) and usable(entry["tile"]):
                near.append((gap, len(near), entry["tile"]))
        if near:
            return min(near)[2]
    for tile in candidates(dtype):
        if usable(tile):
            return tile if spans is None else _narrowed(tile, spans)
    raise RuntimeError(f"no tile of the windowed attention fits {device}: {room} bytes of shared memory are too few")


def _narrowed(tile, spans):
    """A looping tile with blocks of keys no wider than the rows of keys it meets."""
    if tile.design == "window":
        return tile
    room = 16
    while room < spans(tile.block_h, tile.block_w)[1]:
        room *= 2
    return replace(tile, block_k=min(tile.block_k, room), stats_block_k=min(tile.stats_block_k, room))


@cache
def load_tuned(name):
    """Measured tiles of the device called `name`: list of dicts dtype, keys, channels, milliseconds, tile."""
    path = tuned_path(name)
    if not name or not path.is_file():
        return []
    entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
    return [{**entry, "tile": Tile(**{**entry["tile"], "needs": (0, 0)})} for entry in entries]


def tuned_path(name):
    """Where the measured tiles of the device called `name` lie."""
    return TUNED / ("".join(c if c.isalnum() else "_" for c in name) + ".json")


def dump_tuned(name, entries):
    """JSON text for `tuned_path`, from entries as `load_tuned` gives them."""
    entries = [{**entry, "tile": asdict(entry["tile"])} for entry in entries]
    return json.dumps({"device": name, "entries": entries}, indent=1) + "\n"
