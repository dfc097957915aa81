"""The benchmark of linear probes: a folder of composites, from pictures to table."""

import json
from importlib.util import module_from_spec, spec_from_file_location

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tree import ROOT

from anyup_fast.encoders.base import Encoder
from anyup_fast.training.composites import is_held_out

SCRIPT = ROOT / "benchmarks" / "probing.py"
if not SCRIPT.is_file():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)
spec = spec_from_file_location("probing", SCRIPT)
probing = module_from_spec(spec)
spec.loader.exec_module(probing)


class Colours(Encoder):
    """Features that are the mean colours of patches of 14 pixels, and their squares."""

    def __init__(self):
        super().__init__("colours", source="made here", patch_size=14, dim=6, num_layers=1)

    def features(self, image, layer):
        low = torch.nn.functional.avg_pool2d(image, 14)
        return torch.cat((low, low.square()), 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Composites of two classes, one of light cut-outs and one of dark ones."""
    root = tmp_path_factory.mktemp("voc")
    kept = next(name for name in "abcdefghij" if is_held_out(f"{name}picture.png"))
    fitted = next(name for name in "abcdefghij" if not is_held_out(f"{name}picture.png"))
    (root / "scenes").mkdir()
    for seed, name in enumerate((kept, fitted)):
        tiny.photograph(root / "scenes" / f"{name}picture.png", seed=seed)
    for kind, level in (("dark", 10), ("light", 245)):
        (root / "stamps" / kind).mkdir(parents=True)
        for number in range(3):
            path = tiny.cutout(root / "stamps" / kind / f"{number}.png")
            pixels = np.array(Image.open(path))
            pixels[..., :3] = level
            Image.fromarray(pixels).save(path)
    given = "--make", root / "made", "--scenes", root / "scenes", "--stamps", root / "stamps"
    assert probing.main([str(part) for part in (*given, "--count", 6, 4, "--size", 56)]) == 0
    return root / "made"


def test_the_folder_has_the_layout_of_voc(folder):
    assert (folder / "classes.txt").read_text().split() == ["background", "dark", "light"]
    for split, count in (("train", 6), ("val", 4)):
        pairs = probing.listed(folder, split)
        assert len(pairs) == count
        for number, (picture, mask) in enumerate(pairs):
            shown = np.array(Image.open(picture).convert("L"))
            labels = np.array(Image.open(mask))
            assert set(np.unique(labels)) <= {0, number % 2 + 1} and shown.shape == labels.shape == (56, 56)
            inside = shown[labels > 0]
            assert (np.median(inside) < 60) if number % 2 == 0 else (np.median(inside) > 200)
    (folder / "ImageSets" / "Segmentation" / "odd.txt").write_text("none\n")
    with pytest.raises(FileNotFoundError, match="odd.txt names 'none'"):
        probing.listed(folder, "odd")


def test_probes_are_trained_and_judged(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(probing, "load_encoder", lambda name: Colours())
    monkeypatch.setattr(probing, "DRAWS", 20)
    weights = str(tiny.checkpoint(tmp_path / "tiny.safetensors"))
    given = str(folder), "--weights", weights, "--size", "56", "--steps", "40", "--batch", "2", "--rate", "0.1"
    assert probing.main([*given, "--json", str(tmp_path / "rows.json")]) == 0
    printed = capsys.readouterr().out
    assert (
        f"python benchmarks/probing.py {folder}" in printed and "6 pictures to train, 4 to judge, 3 classes" in printed
    )
    bilinear, ours = json.loads((tmp_path / "rows.json").read_text())
    assert (bilinear["method"], ours["method"]) == ("bilinear", weights)
    assert bilinear["miou"] > 0.6 and bilinear["miou_gain"] == bilinear["miou_error"] == 0
    assert ours["miou"] > 0.3 and ours["miou_gain"] == pytest.approx(ours["miou"] - bilinear["miou"])
    assert f"| bilinear | {bilinear['miou']:.3f} | {bilinear['edges']:.3f} |" in printed
    assert f"| {weights} | {ours['miou']:.3f} ({ours['miou_gain']:+.3f} ± {ours['miou_error']:.3f})" in printed


def test_figures_of_made_up_counts():
    perfect = np.stack([np.diag([8, 2, 0])] * 3)
    assert probing.mean_iou(perfect) == 1
    wrong = np.stack([np.array([[4, 4, 0], [0, 2, 0], [0, 0, 0]])] * 3)
    assert probing.mean_iou(wrong) == pytest.approx((4 / 8 + 2 / 6) / 2)
    assert probing.error_of_difference(perfect, wrong) == pytest.approx(0, abs=1e-12), "all pictures are equal"
    assert probing.error_of_difference(perfect, np.concatenate((wrong[:2], perfect[:1]))) > 0.01
    mask = np.zeros((12, 20), np.int64)
    mask[:, 10:] = 1
    assert np.array_equal(np.flatnonzero(probing.near_edges(mask)[0]), np.arange(10 - probing.BAND, 10 + probing.BAND))


@pytest.mark.parametrize("what", ["values", "features", "guide"])
def test_the_cost_is_told(capsys, what):
    assert probing.main(["--cost", what, "--size", "28", "--channels", "6", "--classes", "2"]) == 0
    assert f"{what}: " in (told := capsys.readouterr().out) and " s a step, " in told
