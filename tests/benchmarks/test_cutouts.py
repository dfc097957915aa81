"""Choosing cut-outs among stamps: pictures made here, each with one property that decides."""

from importlib.util import module_from_spec, spec_from_file_location

import numpy as np
import pytest
from PIL import Image
from tree import ROOT

SCRIPT = ROOT / "benchmarks" / "cutouts.py"
if not SCRIPT.is_file():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)
spec = spec_from_file_location("cutouts", SCRIPT)
cutouts = module_from_spec(spec)
spec.loader.exec_module(cutouts)


def stamp(size=(200, 160), opaque=0.5, translucent=0.0, colours=200):
    """A picture (width, height): the upper share `opaque` of its rows noise of so many colours, `translucent` below."""
    rng = np.random.default_rng(0)
    palette = rng.integers(256, size=(colours, 3), dtype=np.uint8)
    pixels = np.zeros((size[1], size[0], 4), np.uint8)
    pixels[..., :3] = palette[rng.integers(colours, size=(size[1], size[0]))]
    first, second = (round(share * size[1]) for share in (opaque, opaque + translucent))
    pixels[:first, :, 3], pixels[first:second, :, 3] = 255, 128
    return Image.fromarray(pixels)


def test_cutout():
    assert cutouts.is_cutout(stamp())
    assert cutouts.is_cutout(stamp(translucent=0.1))


@pytest.mark.parametrize(
    "change",
    [
        {"size": (119, 119)},
        {"size": (200, 59)},
        {"opaque": 0.1},
        {"opaque": 0.95},
        {"opaque": 1.0},
        {"translucent": 0.25},
        {"colours": 5},
    ],
)
def test_no_cutout(change):
    assert not cutouts.is_cutout(stamp(**change))


def test_no_alpha_is_no_cutout():
    assert not cutouts.is_cutout(stamp().convert("RGB"))


def test_folder(tmp_path, capsys):
    stamps = tmp_path / "package" / "usr" / "stamps" / "animals"
    stamps.mkdir(parents=True)
    for name in ("frog", "frog_mirror", "owl"):
        stamp().save(stamps / f"{name}.png")
    stamp(colours=2).save(stamps / "letter.png")
    stamp().save(tmp_path / "package" / "icon.png")
    out = tmp_path / "out"
    out.mkdir()
    (out / "owl.png").write_bytes(b"mine")
    assert cutouts.main([str(tmp_path / "package"), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"1 cut-outs in {out}\n"
    assert sorted(path.name for path in out.iterdir()) == ["frog.png", "owl.png"]
    assert (out / "frog.png").read_bytes() == (stamps / "frog.png").read_bytes()
    assert (out / "owl.png").read_bytes() == b"mine"


def test_bad_packages(tmp_path, capsys):
    assert cutouts.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "unpack tuxpaint-stamps-default there" in capsys.readouterr().err
    damaged = tmp_path / "stamps" / "broken.png"
    damaged.parent.mkdir()
    damaged.write_bytes(b"not a picture")
    assert cutouts.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert str(damaged) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
