"""The choice of tile: a pure function, so that any card can be asked for on any machine."""

import json
from dataclasses import replace

import pytest
import torch
from anyup_fast.kernels import tiling
from anyup_fast.kernels.tiling import Device, Tile, choose_tile

H100 = Device("cuda", (9, 0), 232448, "H100")
A100 = Device("cuda", (8, 0), 166912, "A100")
SMALL = Device("cuda", (8, 6), 101376, "RTX")
MI300 = Device("hip", (9, 4), 65536, "MI300")
TINY = Device("cuda", (8, 0), 20000, "tiny")


def window(rows, cols=None, pixels=14):
    """Spans of windows of so many keys where a key is `pixels` wide."""
    cols = rows if cols is None else cols
    return lambda block_h, block_w: (rows + (block_h + pixels - 2) // pixels, cols + (block_w + pixels - 2) // pixels)


@pytest.mark.parametrize("device", [H100, A100, SMALL, MI300], ids=lambda d: d.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [1, 15, 16, 40, 64, 384, 1024])
@pytest.mark.parametrize("keys", [1, 7, 8, 13, 15, 27, 103])
def test_every_problem_has_a_tile_that_fits(device, dtype, channels, keys):
    spans = window(keys)
    tile = choose_tile(device, dtype, channels, spans, tuned=[])
    assert tile.fits(channels, spans)
    assert tile.shared_memory(torch.finfo(dtype).bits // 8, device.kind) <= device.shared_memory
    if tile.design == "window":
        rows, cols = spans(tile.block_h, tile.block_w)
        assert rows * cols <= tile.block_k


def test_regimes():
    def design(keys, channels, dtype=torch.bfloat16):
        return choose_tile(H100, dtype, channels, window(keys), tuned=[]).design

    assert [design(keys, 384) for keys in (7, 9, 13, 27)] == ["window", "window", "window", "two_pass"]
    assert [design(keys, 1) for keys in (7, 27, 103)] == ["window", "heads", "heads"]
    assert design(27, 64) == "two_pass" and design(27, 63) == "heads"


def test_a_smaller_card_gets_a_smaller_tile():
    spans = window(27)
    large, small = (choose_tile(d, torch.bfloat16, 768, spans, tuned=[]) for d in (H100, A100))
    assert large.block_c == 256 and small.block_c == 128
    assert choose_tile(SMALL, torch.bfloat16, 768, window(13), tuned=[]).block_c == 32
    with pytest.raises(RuntimeError, match="20000 bytes of shared memory are too few"):
        choose_tile(TINY, torch.bfloat16, 768, spans, tuned=[])


def test_unknown_bounds_get_a_design_for_any_window():
    assert choose_tile(H100, torch.bfloat16, 384, None).design == "two_pass"
    assert choose_tile(H100, torch.bfloat16, 1, None).design == "heads"


def test_blocks_of_keys_are_no_wider_than_the_window_needs():
    assert choose_tile(H100, torch.bfloat16, 1024, window(27), tuned=[]).stats_block_k == 32
    assert choose_tile(H100, torch.bfloat16, 1, window(103), tuned=[]).block_k == 64
    assert choose_tile(H100, torch.bfloat16, 1, window(60, 9), tuned=[]).block_k == 16


MEASURED = Tile("window", 16, 16, 64, 64, 8)


def entry(**changed):
    return {"dtype": "bfloat16", "keys": 49, "channels": 384, "milliseconds": 0.08, "tile": MEASURED, **changed}


@pytest.mark.parametrize(
    ("changed", "taken"),
    [
        ({}, True),
        ({"channels": 700}, True),
        ({"channels": 1024}, False),
        ({"keys": 12}, False),
        ({"dtype": "float16"}, False),
        ({"tile": replace(MEASURED, block_k=16)}, False),
        ({"tile": replace(MEASURED, block_c=1024)}, False),
    ],
)
def test_measured_tiles_are_taken_where_they_are_near_and_fit(changed, taken):
    given = [entry(**changed)]
    tile = choose_tile(H100, torch.bfloat16, 384, window(6), tuned=given)
    assert (tile == given[0]["tile"]) == taken


def test_the_nearest_measured_tile_wins():
    other = replace(MEASURED, warps=4)
    given = [entry(channels=256), entry(channels=400, tile=other)]
    assert choose_tile(H100, torch.bfloat16, 384, window(6), tuned=given) == other


def test_tuned_files_are_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(tiling, "TUNED", tmp_path)
    tiling.load_tuned.cache_clear()
    path = tiling.tuned_path("NVIDIA H100 80GB/HBM3")
    assert path.name == "NVIDIA_H100_80GB_HBM3.json"
    path.write_text(tiling.dump_tuned("NVIDIA H100 80GB/HBM3", [entry()]), encoding="utf-8")
    assert tiling.load_tuned("NVIDIA H100 80GB/HBM3") == [entry()]
    assert tiling.load_tuned("another") == [] == tiling.load_tuned("")
    tiling.load_tuned.cache_clear()


def test_shipped_tuned_files_are_sound():
    for path in tiling.TUNED.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        assert tiling.tuned_path(content["device"]) == path
        assert all(e["tile"].fits(e["channels"], None) or e["keys"] for e in tiling.load_tuned(content["device"]))
