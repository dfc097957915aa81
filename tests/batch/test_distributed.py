"""The Ray engine on this machine: the same files as the local engine, resumed alike."""

from shutil import copytree

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


@pytest.fixture(scope="module")
def local(tmp_path_factory, given):
    """Pictures, of which four are broken, and what the local engine makes of them."""
    root = tmp_path_factory.mktemp("local")
    data = fill(root / "in", 8, broken=4)
    one_thread = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(data, root / "out", workers=0, **given)
    finally:
        torch.set_num_threads(one_thread)
    return data, root / "out"


def test_ray_goes_on_where_the_local_engine_was(tmp_path, given, local):
    data, made = local
    copytree(made, tmp_path / "ray")
    files = sorted((tmp_path / "ray").rglob("00*.safetensors"))
    assert len(files) == 8
    for path in files[1:-1]:
        path.unlink()
    summary = run(data, tmp_path / "ray", engine="ray", workers=1, writers=1, at_a_time=1, **given)
    assert (summary.done, summary.skipped, len(summary.failed)) == (6, 2, 4)
    assert contents(tmp_path / "ray") == contents(made)
    assert open_archive(tmp_path / "ray").verify() == []


@pytest.mark.slow("half a minute: two more runs, each of which starts its processes anew")
def test_ray_gives_the_same_files_and_resumes(tmp_path, given, local):
    data, made = local
    summary = run(data, tmp_path / "ray", engine="ray", **given)
    assert (summary.done, len(summary.failed)) == (8, 4)
    assert contents(tmp_path / "ray") == contents(made)
    (tmp_path / "ray" / "000.png.safetensors").unlink()
    (tmp_path / "ray" / "inner" / "005.png.safetensors").unlink()
    summary = run(data, tmp_path / "ray", engine="ray", **given)
    assert (summary.done, summary.skipped, len(summary.failed)) == (2, 6, 4)
    assert contents(tmp_path / "ray") == contents(made)
    assert open_archive(tmp_path / "ray").verify() == []
