"""Encoders of one's own in data sets and on the command line."""

import sys

import pytest
import tiny
import torch
from datasets import fill
from safetensors.torch import load_file
from torch import nn

import anyup_fast
from anyup_fast import cli, wrap_encoder
from anyup_fast.batch import run

pytest.importorskip("filelock")

MODULE = """
import torch
from anyup_fast import wrap_encoder

def features(image):
    return torch.nn.functional.avg_pool2d(image, 8)

def ten_bands():
    return wrap_encoder(features, 8, mean=[0.0] * 10, std=[1.0] * 10)
"""


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 6, 8, 8)

    def forward(self, image):
        return self.conv(image)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("weights") / "anyup.safetensors")


def test_a_wrapped_encoder_makes_a_data_set_and_goes_on_with_it(tmp_path, weights):
    data, out = fill(tmp_path / "in", 3), tmp_path / "out"
    given = {"weights": weights, "size": 56, "workers": 0, "dtype": "float32"}
    encoder = wrap_encoder(Net().eval())
    assert run(data, out, encoder=encoder, **given).done == 3
    archive = anyup_fast.open(out)
    image = anyup_fast.load_image(data / "000.png", 56, patch_multiple=8)
    features = anyup_fast.extract_features(image, encoder)
    expected = anyup_fast.upsample_features_with_anyup(image, features, weights=str(weights))
    torch.testing.assert_close(archive["000.png"].full(), expected, atol=1e-5, rtol=1e-5)
    again = run(data, out, encoder=wrap_encoder(Net().eval()), **given)
    assert (again.done, again.skipped) == (0, 3)
    with pytest.raises(ValueError, match="encoder_sha256 .* overwrite them"):
        run(data, out, encoder=wrap_encoder(Net(1).eval()), **given)


def test_what_a_data_set_does_not_take(tmp_path, weights):
    data, given = fill(tmp_path / "in", 1), {"weights": weights, "size": 56, "workers": 0}
    encoder = wrap_encoder(Net().eval())
    with pytest.raises(ValueError, match="'ray', go with a name, such as 'package.module:function'"):
        run(data, tmp_path / "out", encoder=encoder, engine="ray", **given)
    with pytest.raises(ValueError, match="Net is loaded; weights"):
        run(data, tmp_path / "out", encoder=encoder, encoder_weights="hub", **given)
    many = wrap_encoder(lambda x: nn.functional.avg_pool2d(x, 8), 8, mean=[0] * 10, std=[1] * 10, name="ten")
    with pytest.raises(ValueError, match="ten takes 10 bands, the pictures of a data set have three"):
        run(data, tmp_path / "out", encoder=many, **given)


def test_a_picture_with_overflow_is_told(tmp_path, weights):
    class Loud(Net):
        def forward(self, image):
            return self.conv(image) * 60000 * 60000

    encoder = wrap_encoder(Loud().half().eval(), name="loud")
    summary = run(fill(tmp_path / "in", 1), tmp_path / "out", encoder=encoder, weights=weights, size=56, workers=0)
    (error,) = summary.failed.values()
    assert "the encoder loud gave NaN or infinite values in float16" in error and "bfloat16 or float32" in error


def test_the_command_line_takes_a_function_of_the_folder(tmp_path, weights, monkeypatch, capsys):
    (tmp_path / "own_networks.py").write_text(MODULE)
    tiny.photograph(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def call(verb, *arguments):
        return cli.main([verb, *arguments, "--weights", str(weights), "--size", "48"])

    assert call("upsample", "photo.png", "--encoder", "own_networks:features", "--out", "out.safetensors") == 0
    found = load_file(tmp_path / "out.safetensors")
    assert found["lr_features"].shape == (3, 6, 8) and found["hr_features"].shape == (3, 48, 64)
    assert call("batch", "photo.png", "out", "--encoder", "own_networks:features", "--workers", "0") == 0
    for name, message in (("own_networks:feature", "did you mean 'features'"), ("own_networks:ten_bands", "10, H, W")):
        assert call("upsample", "photo.png", "--encoder", name, "--out", "out.safetensors")
        assert message in capsys.readouterr().err
    sys.modules.pop("own_networks")
