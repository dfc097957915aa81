"""The recipes of docs/datasets.md, run on small pictures."""

import re
import shlex

import numpy as np
import pytest
import tiny
import torch
from datasets import fill, picture
from PIL import Image
from safetensors.torch import save_file
from tree import ROOT

from anyup_fast import cli

pytest.importorskip("transformers")
PAGE = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")


def commands():
    return [shlex.split(block) for block in re.findall(r"```bash\n(.+?)\n```", PAGE)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("page")
    fill(root / "photographs", 3)
    save_file({"weight": torch.randn(5, 32, generator=torch.Generator().manual_seed(5))}, root / "head.safetensors")
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
    root = run(place, 0, monkeypatch)
    labels = np.asarray(Image.open(root / "labels" / "000.png.png"))
    assert labels.shape == (56, 70) and labels.max() < 5 and len(np.unique(labels)) > 1


def test_video_to_film(place, monkeypatch):
    pytest.importorskip("av")
    from anyup_fast.batch.video import frame_times, write_film

    write_film([np.asarray(picture(0).rotate(5 * i)) for i in range(6)], place[0] / "clip.mp4", 10)
    root = run(place, 1, monkeypatch)
    assert len(frame_times(root / "film.mp4")) == 6 and (root / "colours" / "pca.safetensors").exists()


@pytest.mark.slow("test_distributed.py has the same run without the page")
def test_data_set_on_ray_and_opened(place, monkeypatch):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        run(place, 2, monkeypatch)
    finally:
        ray.shutdown()
    (code,) = re.findall(r"```python\n(.+?)```", PAGE, re.S)
    names = {}
    exec(code, names)
    assert names["archive"][names["name"]].region(0, 0, 32, 32).shape == (32, 32, 32)
    assert names["archive"].verify() == []
