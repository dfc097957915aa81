"""`anyup-fast view`: its options reach the page, and what it refuses is one sentence."""

import pytest
import texts
import tiny
import torch
import viewed

from anyup_fast import cli
from anyup_fast.encoders import load_encoder
from anyup_fast.heads import save_head

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with photographs, and the options that choose encoder and weights."""
    folder = tmp_path_factory.mktemp("made")
    photos = [str(tiny.photograph(folder / f"<b>{name}.png", seed=seed)) for seed, name in enumerate("ab")]
    encoder, weights = tiny.encoder_folder(folder / "encoder"), tiny.checkpoint(folder / "model.safetensors")
    return photos, ["--encoder", encoder, "--weights", str(weights), "--device", "cpu", "--size", "56"]


def test_options_reach_the_page(made, tmp_path, capsys):
    photos, options = made
    save_head(tmp_path / "head.safetensors", torch.eye(2, 32), None, ["one", "two"])
    out = tmp_path / "new" / "page.html"
    more = [
        "--directions",
        "7",
        "--attention-step",
        "0",
        "--layer",
        "1",
        "--fit",
        "pad",
        "--size",
        "50x64",
        "--compute-dtype",
        "bfloat16",
    ]
    more += ["--head", str(tmp_path / "head.safetensors"), "--out", str(out)]
    assert cli.main(["view", *photos, *options, *more]) == 0
    data = viewed.data(out.read_text(encoding="utf-8"))
    assert [picture["name"] for picture in data["pictures"]] == ["<b>a.png", "<b>b.png"]
    assert [(picture["height"], picture["width"], picture["attention"]) for picture in data["pictures"]] == [
        (50, 64, None)
    ] * 2
    assert data["directions"] == 7 and [one["name"] for one in data["classes"]] == ["one", "two"]
    assert f"-> {out}" in capsys.readouterr().out


def test_prompts_are_in_the_page_and_their_encoder_is_named(made, tmp_path, capsys):
    photos, (_, _, *options) = made
    texts.saved(tmp_path / "clip", "CLIP")
    out, encoder = tmp_path / "page.html", str(tmp_path / "clip")
    more = ["--encoder", encoder, "--prompt", "a cat", "--prompt", "a <i>dog</i>", "--out", str(out)]
    assert cli.main(["view", photos[0], *options, *more]) == 0
    data = viewed.data(out.read_text(encoding="utf-8"))
    assert data["encoder"] == f"text:{encoder}" and [one["name"] for one in data["prompts"]] == [
        "a cat",
        "a <i>dog</i>",
    ]
    basis = viewed.floats(data["basis"], data["directions"], data["channels"])
    rows = torch.stack([viewed.floats(one["weight"], data["directions"]) for one in data["prompts"]]) @ basis
    expected = load_encoder(encoder, project=True).similarity(["a cat", "a <i>dog</i>"])
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--out", "page.png"], "--out: the file must end in .html or .htm, got 'page.png'"),
        (["--max-bytes", "20000"], "pictures: 2 of 56x70 pixels with 32 directions make a page of some 0.0884 MB"),
        (["--prompt", "a cat"], "has no tower for texts; a CLIP or SigLIP model has"),
        (["--head", "nowhere.safetensors"], "head: there is no file"),
        (["--directions", "0"], "directions: need a whole number from 1 to 32, got 0"),
        (["--attention-step", "-1"], "attention_step: need a whole number from 1 on, got -1"),
    ],
)
def test_what_can_not_be_done_is_said(made, tmp_path, monkeypatch, capsys, more, complaint):
    monkeypatch.chdir(tmp_path)
    photos, options = made
    assert cli.main(["view", *photos, *options, *more]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("anyup-fast: error: ")]
    assert len(lines) == 1 and complaint in lines[0]
    assert not list(tmp_path.iterdir())
