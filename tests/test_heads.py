import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from anyup_fast.heads import Head, linear_head, load_head, read_head, save_head


def test_a_head_comes_back_with_its_names(tmp_path):
    path = tmp_path / "made" / "head.safetensors"
    weight, bias = torch.randn(3, 5), torch.randn(3)
    save_head(path, weight.double(), bias, ["sky", "Straße", '<b>"x"</b>'], "dinov2_vits14", "linear")
    head = read_head(path)
    assert torch.equal(head.weight, weight) and torch.equal(head.bias, bias) and head.weight.dtype == torch.float32
    assert head.classes == ("sky", "Straße", '<b>"x"</b>') and (head.encoder, head.kind) == ("dinov2_vits14", "linear")
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["classes"]) == list(head.classes)
    loaded = load_head(path)
    assert torch.equal(loaded[0], weight) and torch.equal(loaded[1], bias) and len(loaded) == 2
    assert os.listdir(path.parent) == ["head.safetensors"], "it is written aside and renamed"


def test_a_head_without_names_is_a_file_as_before(tmp_path):
    save_head(tmp_path / "head.safetensors", torch.ones(2, 4))
    save_file({"weight": torch.ones(2, 4)}, tmp_path / "plain.safetensors")
    assert (tmp_path / "head.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()
    head = read_head(tmp_path / "plain.safetensors")
    assert (head.bias, head.classes, head.encoder, head.kind) == (None,) * 4


def test_a_head_is_taken_where_a_linear_layer_is():
    layer = nn.Linear(4, 2)
    head = Head(layer.weight, layer.bias, ("a", "b"))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(linear_head(head, 4), linear_head(layer), strict=True))


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (["one"], "got 1, 1 of them different"),
        (["a", "a", "b"], "got 3, 2 of them different"),
        (["a", "", "b"], "a different name for each of the 3"),
        ("abc", "'abc'"),
        (["a", 1, "b"], "classes"),
        (["a", "b", "c\n"], "can be shown"),
    ],
)
def test_names_that_do_not_fit_are_refused(tmp_path, classes, words):
    with pytest.raises(ValueError, match=words):
        save_head(tmp_path / "head.safetensors", torch.randn(3, 4), classes=classes)
    save_file({"weight": torch.randn(3, 4)}, tmp_path / "head.safetensors", {"classes": json.dumps(classes)})
    with pytest.raises(ValueError, match="head.safetensors has class names that do not fit it"):
        read_head(tmp_path / "head.safetensors")


@pytest.mark.parametrize("text", ["no JSON", "7", "null2"])
def test_names_that_are_no_list_are_refused(tmp_path, text):
    save_file({"weight": torch.randn(3, 4)}, tmp_path / "head.safetensors", {"classes": text})
    with pytest.raises(ValueError, match="class names that do not fit it"):
        read_head(tmp_path / "head.safetensors")


def test_what_is_no_head_is_not_written(tmp_path):
    for weight, bias, name, words in (
        (torch.randn(3), None, "head.safetensors", "weight has to be"),
        (torch.randn(3, 4), torch.randn(2), "head.safetensors", "bias has to be"),
        (torch.full((3, 4), torch.nan), None, "head.safetensors", "finite"),
        (torch.randn(3, 4), None, "head.pt", "end in .safetensors"),
    ):
        with pytest.raises(ValueError, match=words):
            save_head(tmp_path / name, weight, bias)
    assert os.listdir(tmp_path) == []


def test_a_head_of_another_encoder_is_told_by_both_names():
    head = Head(torch.randn(2, 4), encoder="dinov2_vits14")
    assert head.why_not_on("dinov2_vits14") is None and Head(head.weight).why_not_on("x") is None
    assert "'dinov2_vits14'" in head.why_not_on("timm:resnet18") and "'timm:resnet18'" in head.why_not_on(
        "timm:resnet18"
    )
