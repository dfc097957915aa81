"""The recipes of docs/datasets.md, run on small pictures."""

import re
import shlex

import numpy as np
import pytest
import tiny
from datasets import fill, picture
from PIL import Image
from tree import ROOT

from anyup_fast import cli
from anyup_fast.batch import outputs

pytest.importorskip("transformers")
PAGE = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")


def commands():
    return [shlex.split(block) for block in re.findall(r"```bash\n(.+?)\n```", PAGE)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("page")
    fill(root / "photographs", 3)
    fill(root / "few", 3)
    for path in (path for path in (root / "few").rglob("*") if path.is_file()):
        width, height = Image.open(path).size
        stripes = np.arange(width)[None].repeat(height, 0) * 3 // width
        mask = (root / "masks" / path.relative_to(root / "few")).with_suffix(".png")
        mask.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(stripes.astype(np.uint8)).save(mask)
    (root / "names.txt").write_text("left\nmiddle\nright\n")
    small = [
        "--encoder",
        tiny.encoder_folder(root / "encoder"),
        "--weights",
        str(tiny.checkpoint(root / "a.safetensors")),
    ]
    return root, small


def run(place, index, monkeypatch):
    root, small = place
    program, *arguments = commands()[index]
    assert program == "anyup-fast"
    monkeypatch.chdir(root)
    assert cli.main(["--quiet", *("56" if word == "448" else word for word in arguments), *small]) == 0
    return root


def test_folder_to_label_maps(place, monkeypatch):
    run(place, 0, monkeypatch)
    root = run(place, 1, monkeypatch)
    found = Image.open(root / "labels" / "000.png.png")
    labels = np.asarray(found)
    assert labels.shape == (56, 70) and labels.max() < 3 and len(np.unique(labels)) > 1
    assert found.text["classes"] == '["left", "middle", "right"]'
    colours = np.unique(np.asarray(found.convert("RGB")).reshape(-1, 3), axis=0)
    assert found.mode == "P" and len(colours) == len(np.unique(labels)) and colours.max() > 150


def test_video_to_film(place, monkeypatch):
    pytest.importorskip("av")
    from anyup_fast.batch.video import frame_times, write_film

    write_film([np.asarray(picture(0).rotate(5 * i)) for i in range(6)], place[0] / "clip.mp4", 10)
    root = run(place, 2, monkeypatch)
    assert len(frame_times(root / "film.mp4")) == 6 and (root / "colours" / "pca.safetensors").exists()


@pytest.mark.slow("test_distributed.py has the same run without the page")
def test_data_set_on_ray_and_opened(place, monkeypatch):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        run(place, 3, monkeypatch)
    finally:
        ray.shutdown()
    (code,) = re.findall(r"```python\n(.+?)```", PAGE, re.S)
    names = {}
    exec(code, names)
    assert names["archive"][names["name"]].region(0, 0, 32, 32).shape == (32, 32, 32)
    assert names["archive"].verify() == []


def test_colours_of_classes_are_those_of_the_page_and_unlike():
    script = (ROOT / "anyup_fast" / "viewer" / "colours.js").read_text(encoding="utf-8")
    assert f'"{outputs.CLASS_COLOURS}"' in script
    palette = np.frombuffer(outputs._palette(), np.uint8).reshape(256, 3).astype(int)
    apart = np.abs(palette[:, None] - palette[None]).sum(-1) + 999 * np.eye(256, dtype=int)
    assert apart.min() >= 16 and apart[:40, :40].min() > 60
