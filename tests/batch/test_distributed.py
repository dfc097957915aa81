"""The Ray engine on this machine: the same files as the local engine, resumed alike."""

import pytest
import tiny
import torch
from datasets import contents, fill
from safetensors.torch import save_file

from anyup_fast.batch import open_archive, run

ray = pytest.importorskip("ray")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    save_file({"weight": torch.randn(5, 32, generator=torch.Generator().manual_seed(5))}, root / "head.safetensors")
    weights = tiny.checkpoint(root / "anyup.safetensors")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield {
        "encoder": tiny.encoder_folder(root / "encoder"),
        "weights": weights,
        "size": 56,
        "kind": "labels",
        "head": root / "head.safetensors",
    }
    ray.shutdown()


def test_ray_gives_the_same_files_and_resumes(tmp_path, given):
    data = fill(tmp_path / "in", 8, broken=4)
    one_thread = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(data, tmp_path / "local", workers=0, **given)
    finally:
        torch.set_num_threads(one_thread)
    summary = run(data, tmp_path / "ray", engine="ray", **given)
    assert (summary.done, len(summary.failed)) == (8, 4)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    (tmp_path / "ray" / "000.png.safetensors").unlink()
    (tmp_path / "ray" / "inner" / "005.png.safetensors").unlink()
    summary = run(data, tmp_path / "ray", engine="ray", **given)
    assert (summary.done, summary.skipped, len(summary.failed)) == (2, 6, 4)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert open_archive(tmp_path / "ray").verify() == []
