"""The choice of tile: a pure function, so that any card can be asked for on any machine."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from anyup_fast.kernels import tiling
from anyup_fast.kernels.tiling import Device, Tile, choose_tile, why_no_kernels

H100 = Device("cuda", (9, 0), 232448, "H100")
A100 = Device("cuda", (8, 0), 166912, "A100")
B200 = Device("cuda", (10, 0), 232448, "B200")
RTX3090 = Device("cuda", (8, 6), 101376, "RTX 3090")
RTX5090 = Device("cuda", (12, 0), 101376, "RTX 5090")
MI250 = Device("hip", (9, 0), 65536, "MI250", "gfx90a")
MI300 = Device("hip", (9, 4), 65536, "MI300", "gfx942")
MI350 = Device("hip", (9, 5), 65536, "MI350", "gfx950")
RX7900 = Device("hip", (11, 0), 65536, "RX 7900", "gfx1100")
RX9070 = Device("hip", (12, 0), 65536, "RX 9070", "gfx1201")
XPU = Device("xpu", (0, 0), 65536)
TINY = Device("cuda", (8, 0), 16000, "tiny")
DEVICES = [H100, A100, B200, RTX3090, RTX5090, MI250, MI300, MI350, RX7900, RX9070, XPU]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def window(rows, cols=None, pixels=14):
    """Spans of windows of so many keys where a key is `pixels` wide."""
    cols = rows if cols is None else cols
    return lambda block_h, block_w: (rows + (block_h + pixels - 2) // pixels, cols + (block_w + pixels - 2) // pixels)


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name or d.kind)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_problem_has_a_tile_that_fits(device, dtype):
    if why_no_kernels(device, dtype):
        assert tiling.candidates(dtype, device) == ()
        return
    for channels, keys in itertools.product((1, 15, 16, 40, 64, 384, 1024), (1, 7, 8, 13, 15, 27, 103)):
        spans = window(keys)
        tile = choose_tile(device, dtype, channels, spans, tuned=[])
        assert tile.fits(channels, spans)
        assert tiling.shared_memory(tile, device, dtype) <= device.shared_memory
        if tile.design == "window":
            rows, cols = spans(tile.block_h, tile.block_w)
            assert rows * cols <= tile.block_k


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name or d.kind)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "heads"), [(64, 2), (128, 1), (128, 8)])
def test_wider_heads_have_a_tile_that_fits(device, dtype, head_dim, heads):
    if why_no_kernels(device, dtype):
        return
    for keys in (6, 13, 27):
        tile = choose_tile(device, dtype, 384, window(keys), tuned=[], head_dim=head_dim, heads=heads)
        wide = tiling.shared_memory(tile, device, dtype, head_dim, heads)
        assert tiling.shared_memory(tile, device, dtype) <= wide
        if wide > device.shared_memory:
            assert head_dim * heads > 128 and tile.design == "two_pass"
            assert (tile.block_c, tile.warps) == (tiling.candidates(dtype, device)[-1].block_c, 4)


def test_families_follow_the_chip():
    cards = [H100, A100, B200, RTX3090, RTX5090, MI250, MI300, MI350, RX7900, RX9070]
    names = "sm_90 sm_80 sm_100 sm_80 sm_120 gfx9 gfx9 gfx950 gfx11 gfx12".split()
    assert [card.family for card in cards] == names
    ada, spark, mi300 = Device("cuda", (8, 9), 101376), Device("cuda", (12, 1), 101376), Device("hip", (9, 4), 65536)
    assert [card.family for card in (ada, spark, mi300)] == ["sm_80", "sm_120", "gfx9"]
    others = XPU, Device("cpu", (0, 0), 65536), Device("cuda", (11, 0), 232448), Device("hip", (9, 0), 65536)
    assert [card.family for card in others] == 4 * [None]


def test_reasons_against_the_kernels():
    assert [why_no_kernels(device, *DTYPES) for device in (*DEVICES[:8], XPU)] == 9 * [None]
    assert why_no_kernels(RX7900, torch.bfloat16, torch.float16) is None
    for card in (RX7900, RX9070):
        reason = why_no_kernels(card, torch.bfloat16, torch.float32)
        assert reason.startswith(f"needs float16 or bfloat16 on {card.arch}")
        with pytest.raises(RuntimeError, match="needs float16 or bfloat16"):
            choose_tile(card, torch.float32, 384, window(6), tuned=[])
    old = Device("hip", (10, 3), 65536, "RX 6800", "gfx1030")
    assert why_no_kernels(old, torch.bfloat16).endswith("gfx12*), got gfx1030")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_estimates_are_from_above(dtype):
    for device in DEVICES:
        for tile in tiling.candidates(dtype, device):
            assert tiling.shared_memory(tile, device, dtype) <= tiling._estimate(tile, device.kind, dtype, 32, 4)


def test_forecasts_are_the_compiled_sizes_and_grow_with_the_heads():
    tile = tiling.candidates(torch.bfloat16, H100)[0]
    sizes = [tiling.shared_memory(tile, card, torch.bfloat16) for card in (RTX3090, H100, RTX5090, MI300)]
    assert sizes == [1024 * tiling.HALF_TILES[tile][family] for family in ("sm_80", "sm_90", "sm_120", "gfx9")]
    wider = tiling.shared_memory(tile, H100, torch.bfloat16, head_dim=128)
    assert wider - sizes[1] == 2 * 96 * (tile.block_h * tile.block_w + tile.block_k)
    unlisted = replace(tile, block_c=48)
    assert tiling.shared_memory(unlisted, H100, torch.bfloat16) == tiling._estimate(
        unlisted, "cuda", torch.bfloat16, 32, 4
    )


def test_regimes():
    def design(keys, channels, dtype=torch.bfloat16):
        return choose_tile(H100, dtype, channels, window(keys), tuned=[]).design

    assert [design(keys, 384) for keys in (7, 9, 13, 27)] == ["window", "window", "window", "stored"]
    assert [design(keys, 1) for keys in (7, 27, 103)] == ["window", "heads", "heads"]
    assert design(27, 255) == design(27, 64) == "two_pass" and design(27, 63) == "heads"
    assert choose_tile(H100, torch.bfloat16, 384, window(27), tuned=[], stored=False).design == "two_pass"


def test_a_smaller_card_gets_a_smaller_tile():
    spans = window(27)
    large, small = (choose_tile(d, torch.bfloat16, 768, spans, tuned=[]) for d in (H100, A100))
    assert large.block_c == 256 and small.block_c == 128
    tight = replace(RTX3090, shared_memory=65536)
    assert [choose_tile(d, torch.bfloat16, 768, window(13), tuned=[]).block_c for d in (RTX3090, tight)] == [64, 32]
    with pytest.raises(RuntimeError, match="16000 bytes of shared memory are too few"):
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
    tiling.forget_tuned()
    card = replace(H100, name="NVIDIA H100 80GB/HBM3")
    path = tiling.tuned_path(card.name)
    assert path.name == "NVIDIA_H100_80GB_HBM3.json"
    path.write_text(tiling.dump_tuned(card, [entry()]), encoding="utf-8")
    assert tiling.load_tuned(card.name) == [entry()] == tiling.tuned_for(card)
    assert tiling.load_tuned("another") == [] == tiling.load_tuned("")
    tiling.forget_tuned()


def test_a_card_without_measured_tiles_takes_those_of_its_family(tmp_path, monkeypatch):
    monkeypatch.setattr(tiling, "TUNED", tmp_path)
    tiling.forget_tuned()
    h100, own = entry(channels=100), entry(channels=200)
    tiling.tuned_path("H100").write_text(tiling.dump_tuned(H100, [h100]), encoding="utf-8")
    tiling.tuned_path("A100").write_text(tiling.dump_tuned(A100, [own]), encoding="utf-8")
    assert tiling.tuned_for(replace(H100, name="H200")) == [h100] == tiling.tuned_for(H100)
    assert tiling.tuned_for(RTX3090) == [own]
    assert tiling.tuned_for(RTX5090) == [] == tiling.tuned_for(XPU)
    tiling.tuned_path("H200").write_text(tiling.dump_tuned(replace(H100, name="H200"), [own]), encoding="utf-8")
    tiling.forget_tuned()
    assert tiling.tuned_for(replace(H100, name="H200")) == [own]
    assert choose_tile(replace(H100, name="H800"), torch.bfloat16, 384, window(6)) == MEASURED
    tiling.forget_tuned()


def test_shipped_tuned_files_are_sound():
    for path in tiling.TUNED.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        assert tiling.tuned_path(content["device"]) == path
        assert all(e["tile"].fits(e["channels"], None) or e["keys"] for e in tiling.load_tuned(content["device"]))
