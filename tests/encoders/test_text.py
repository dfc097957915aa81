"""Features in the space of texts: what the model itself gives for a class token or a picture of one patch."""

import pytest
import tiny
import torch
from safetensors.torch import load_file
from texts import ENDS, KINDS, TEXT, TOWER, VISION, saved
from torch.nn import functional as F

import anyup_fast
from anyup_fast import cli, encoders
from anyup_fast.encoders import load_encoder
from anyup_fast.encoders.text import TextEncoder
from anyup_fast.heads import read_head

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(encoders, "_loaded", {})


def pictures(height, width):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(2))


def tensor(output):
    return output if isinstance(output, torch.Tensor) else output.pooler_output


@pytest.mark.parametrize("kind", KINDS)
def test_a_patch_is_projected_as_the_model_projects_a_picture(tmp_path, kind):
    model = saved(tmp_path, kind)
    encoder = load_encoder(str(tmp_path), project=True)
    dim = KINDS[kind].get("projection_dim", 32)
    assert isinstance(encoder, TextEncoder) and (encoder.patch_size, encoder.dim, encoder.num_layers) == (16, dim, 3)
    assert not any(p.requires_grad for p in encoder.parameters()) and "in the space of texts" in encoder.source
    image = pictures(32, 80)
    for layer in (1, 2, -1):
        features = encoder(image, layer)
        assert features.shape == (2, dim, 2, 5)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(2, 2, 5))
    assert not torch.allclose(encoder(image, 2), encoder(image), atol=1e-2)
    with torch.no_grad():
        if kind == "Siglip":  # pooling one patch is taking it
            image = pictures(16, 16)
            expected = tensor(model.get_image_features(image, interpolate_pos_encoding=True))
            torch.testing.assert_close(encoder(image)[..., 0, 0], F.normalize(expected, dim=-1), rtol=0, atol=1e-5)
        else:  # the class token goes the same way
            output = model.vision_model(image, output_hidden_states=True, interpolate_pos_encoding=True)
            tokens = output.hidden_states[-1]
            moved = torch.cat([tokens, tokens[:, :1]], 1)[:, 1:]  # the class token, where the last patch was
            moved = torch.cat([tokens[:, :1], moved[:, 1:]], 1)
            expected = tensor(model.get_image_features(image, interpolate_pos_encoding=True))
            got = encoder._projected(moved, image.shape[2:])[..., -1, -1]
            torch.testing.assert_close(got, F.normalize(expected, dim=-1), rtol=0, atol=1e-5)


def test_the_head_of_siglip_is_the_formula_of_the_docstring(tmp_path):
    model = saved(tmp_path, "Siglip")
    tower = model.vision_model
    image = pictures(48, 32)
    head, dim = tower.head, 32
    with torch.no_grad():
        x = tower(image, interpolate_pos_encoding=True).last_hidden_state  # after the final norm
        value, bias = head.attention.in_proj_weight[2 * dim :], head.attention.in_proj_bias[2 * dim :]
        y = head.attention.out_proj(x @ value.T + bias)
        expected = F.normalize(y + head.mlp(head.layernorm(y)), dim=-1).mT.reshape(2, dim, 3, 2)
    torch.testing.assert_close(load_encoder(str(tmp_path), project=True)(image), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_a_head(tmp_path, kind):
    model = saved(tmp_path, kind)
    encoder = load_encoder(str(tmp_path), project=True)
    prompts = ["a photo of a cat", "grass"]
    head = encoder.similarity(prompts)
    assert head.shape == (2, encoder.dim) and not head.requires_grad
    torch.testing.assert_close(head.norm(dim=1), torch.ones(2))
    ids = {"a photo of a cat": [2, 4, 5, 6, 4, 7, 3], "grass": [2, 9, 3]}
    for row, prompt in zip(head, prompts, strict=True):
        tokens = torch.tensor([ids[prompt]])
        if kind == "Siglip":
            tokens = F.pad(tokens, (0, 12 - tokens.shape[1]))
        with torch.no_grad():
            expected = F.normalize(tensor(model.get_text_features(input_ids=tokens)), dim=-1)[0]
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder.similarity("grass"), head[1:], rtol=0, atol=1e-5)
    several = encoder.similarity(["cat", "grass"], templates=("a photo of a {}", "{}"))
    mean = F.normalize((encoder.similarity("a photo of a cat") + encoder.similarity("cat")) / 2, dim=1)
    torch.testing.assert_close(several[:1], mean, rtol=0, atol=1e-5)
    image = pictures(32, 48)[:1]
    features = anyup_fast.extract_features(image, encoder, value_range="imagenet")
    prepared = anyup_fast.prepare(image, features, value_range="imagenet")
    torch.testing.assert_close(
        prepared.head(head).full(), torch.einsum("kc,bchw->bkhw", head, prepared.full()), rtol=0, atol=1e-4
    )


def test_prompts_that_are_none(tmp_path):
    saved(tmp_path, "CLIP")
    encoder = load_encoder(str(tmp_path), project=True)
    for prompts, message in (([], "at least one text"), ("", "no empty one"), (["cat", " "], "no empty one")):
        with pytest.raises(ValueError, match=message):
            encoder.similarity(prompts)
    with pytest.raises(TypeError, match="must be strings, got int"):
        encoder.similarity([3])
    with pytest.raises(ValueError, match=r"templates: need texts with \{\}"):
        encoder.similarity("cat", templates=("a photo",))


def test_a_folder_without_tokenizer_says_so(tmp_path):
    saved(tmp_path, "CLIP")
    for file in tmp_path.glob("token*"):
        file.unlink()
    encoder = load_encoder(str(tmp_path), project=True)
    with pytest.raises(
        RuntimeError, match="has no tokenizer for its 10 tokens .found ..; it needs the model's tokenizer"
    ):
        encoder.similarity("cat")


def test_models_without_texts_are_refused(tmp_path):
    transformers.ViTModel(transformers.ViTConfig(**VISION)).save_pretrained(tmp_path / "vit")
    with pytest.raises(RuntimeError, match=r"project: .*vit \(vit\) has no tower for texts"):
        load_encoder(str(tmp_path / "vit"), project=True)
    with pytest.raises(ValueError, match="project: dinov2_vits14 was trained without texts"):
        load_encoder("dinov2_vits14", project=True)
    naflex = transformers.Siglip2Config(
        vision_config={**TOWER, "patch_size": 16, "num_patches": 9}, text_config={**TEXT, **ENDS, "projection_size": 32}
    )
    transformers.Siglip2Model(naflex).save_pretrained(tmp_path / "naflex")
    with pytest.raises(RuntimeError, match=r"takes patches cut beforehand \(NaFlex\)"):
        load_encoder(str(tmp_path / "naflex"), project=True)


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_prompts_make_a_head_for_the_features_of_that_name(tmp_path, kind, capsys):
    saved(tmp_path / "model", kind)
    name = f"text:{tmp_path / 'model'}"
    encoder = load_encoder(name)
    assert isinstance(encoder, TextEncoder) and encoder.name == name
    assert load_encoder(name.removeprefix("text:"), project=True).name == name
    prompts = ["cat", "dog"]
    head = anyup_fast.prompt_head(name, prompts)
    torch.testing.assert_close(head.weight, encoder.similarity(prompts))
    assert (head.bias, head.classes, head.encoder, head.kind) == (None, ("cat", "dog"), name, "text")
    assert anyup_fast.prompt_head(encoder, prompts, classes=["a", "b"]).classes == ("a", "b")
    tiny.photograph(tmp_path / "photo.png", (32, 48))
    options = ["--weights", str(tiny.checkpoint(tmp_path / "anyup.safetensors")), "--device", "cpu", "--size", "32"]
    out, labels = (str(tmp_path / file) for file in ("head.safetensors", "labels.safetensors"))
    plain = name.removeprefix("text:")  # the command knows what prompts are for
    assert cli.main(["fit-head", "--out", out, "--encoder", plain, *options, "--prompts", *prompts]) == 0
    assert "2 classes of" in capsys.readouterr().out
    written = read_head(out)
    assert torch.equal(written.weight, head.weight) and (written.classes, written.encoder) == (("cat", "dog"), name)
    photo = str(tmp_path / "photo.png")
    given = ["upsample", photo, "--head", out, "--labels", "--out", labels, *options]
    assert cli.main([*given, "--encoder", name]) == 0 and "(cat, dog)" in (told := capsys.readouterr().out)
    assert "made for features" not in told
    image = anyup_fast.load_image(photo, 32, patch_multiple=16)
    prepared = anyup_fast.prepare(image, anyup_fast.extract_features(image, name), options[1])
    found = load_file(labels)["hr_features"]
    assert torch.equal(found, prepared.head(head, argmax=True).full()[0])


def test_other_encoders_make_no_head_of_prompts():
    wrapped = anyup_fast.wrap_encoder(lambda image: image[..., ::8, ::8], patch_size=8)
    with pytest.raises(ValueError, match="no features in the space of texts; load .* load_encoder.'text:NAME'"):
        anyup_fast.prompt_head(wrapped, "a cat")
    with pytest.raises(ValueError, match="was trained without texts"):
        load_encoder("text:dinov2_vits14")
