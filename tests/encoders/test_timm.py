import os
from importlib.util import find_spec

import pytest
import torch

import anyup_fast
from anyup_fast.encoders import load_encoder, timm_models

pytestmark = pytest.mark.skipif(find_spec("timm") is None, reason="not installed: pip install 'anyup-fast[timm]'")
# Networks by name, as small as timm has them; with the number of layers, the stride and the channels of the last.
QUICK = {
    "vit_tiny_patch16_224": (12, 16, 192),
    "vit_wee_patch16_reg1_gap_256": (14, 16, 256),
    "deit_tiny_distilled_patch16_224": (12, 16, 192),
    "eva02_tiny_patch14_224": (12, 14, 192),
    "vit_pe_spatial_tiny_patch16_512": (12, 16, 192),
    "xcit_nano_12_p16_224": (12, 16, 128),
    "swin_tiny_patch4_window7_224": (4, 32, 768),
    "swinv2_cr_tiny_224": (4, 32, 768),
    "convnext_atto": (4, 32, 320),
    "convnextv2_atto": (4, 32, 320),
    "resnet18": (5, 32, 512),
    "regnetx_002": (5, 32, 368),
    "efficientnet_b0": (5, 32, 320),
    "mobilenetv3_small_100": (5, 32, 576),
    "mobilenetv4_conv_small": (5, 32, 960),
    "pvt_v2_b0": (4, 32, 256),
    "edgenext_xx_small": (4, 32, 168),
    "efficientvit_b0": (4, 32, 128),
    "repvit_m0_9": (4, 32, 384),
    "mobilevit_xxs": (5, 32, 320),
    "ghostnet_100": (5, 32, 160),
    "hgnetv2_b0": (4, 32, 1024),
    "mambaout_femto": (4, 32, 288),
    "starnet_s1": (4, 32, 192),
    "inception_next_atto": (4, 32, 320),
}
SLOW = {
    "vit_small_patch14_dinov2": (12, 14, 384),
    "vit_small_patch14_reg4_dinov2": (12, 14, 384),
    "vit_small_patch16_dinov3": (12, 16, 384),
    "deit3_small_patch16_224": (12, 16, 384),
    "vit_base_patch16_siglip_224": (12, 16, 768),
    "vit_base_patch16_clip_224": (12, 16, 768),
    "samvit_base_patch16": (12, 16, 256),
    "naflexvit_base_patch16_gap": (12, 16, 768),
    "vitamin_small_224": (14, 16, 384),
    "sam2_hiera_tiny": (4, 32, 768),
    "swinv2_tiny_window8_256": (4, 32, 768),
    "davit_tiny": (4, 32, 768),
    "focalnet_tiny_srf": (4, 32, 768),
    "nextvit_small": (4, 32, 1024),
    "poolformer_s12": (4, 32, 512),
    "caformer_s18": (4, 32, 512),
    "fastvit_t8": (4, 32, 384),
    "mvitv2_tiny": (4, 32, 768),
    "twins_svt_small": (4, 32, 512),
    "rdnet_tiny": (4, 32, 1040),
    "resnetv2_50": (5, 32, 2048),
    "densenet121": (5, 32, 1024),
    "hrnet_w18_small": (5, 32, 1024),
    "vgg11": (6, 32, 512),
}
# Networks of pixels that see more than a small picture: theirs is twice as large.
BROAD = {
    "efficientnet_b0",
    "mobilenetv3_small_100",
    "mobilenetv4_conv_small",
    "repvit_m0_9",
    "mobilevit_xxs",
    "tiny_vit_5m_224",
}
NAMES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow("more models of kinds that QUICK has")) for name in SLOW)]


@pytest.fixture(scope="module", autouse=True)
def offline():
    """Nothing is fetched, and encoders are not kept from test to test."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    yield
    os.environ.pop("HF_HUB_OFFLINE") if before is None else os.environ.update(HF_HUB_OFFLINE=before)


def loaded(name):
    torch.manual_seed(0)
    return timm_models.load(f"timm:{name}", "random").eval()


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def misplaced(run, image, cells):
    """The oracle, which knows no layout: the pixels around a cell change, and so do features; where most of all?

    Of each of `cells`, as shares of the picture, the distance from the middle of what changes to where it should be, in
    shares of the picture (rows, columns).
    """
    before, worst = run(image), []
    rows, columns = before.shape[2:]
    height, width = image.shape[2:]
    for row, column in cells:
        y, x = int(row * height), int(column * width)
        other = image.clone()
        other[..., y : y + height // 4, x : x + width // 6] = noise(3, height // 4, width // 6, seed=5) * 3
        change = (run(other) - before).double().square().sum(1)[0]
        change = (change - change.median()).clamp(min=0)
        change = torch.where(change >= change.max() / 2, change, 0)
        middle = [
            (change.sum(1 - axis) * (torch.arange(n) + 0.5) / n).sum().item() / change.sum().item()
            for axis, n in enumerate((rows, columns))
        ]
        worst.append(max(abs(middle[0] - (row + 1 / 8)), abs(middle[1] - (column + 1 / 12))))
    return max(worst)


CELLS = ((0.0, 5 / 6), (0.75, 1 / 6), (0.25, 0.5))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_model_of_timm(name):
    """At random weights, on a picture that is not square, every layer: grid, channels, and where things are."""
    encoder = loaded(name)
    layers, stride, channels = {**QUICK, **SLOW}[name]
    assert (encoder.num_layers, encoder.patch_size, encoder.dim) == (layers, stride, channels)
    assert "RANDOM weights" in encoder.source and len(encoder.native_size) == 2
    size = [n * stride * (1 + (name in BROAD)) for n in (4, 6)]
    image = noise(1, 3, *size)
    for layer in range(1, layers + 1):
        features = encoder(image, layer=layer)
        inner = encoder.layouts[layer - 1]
        assert features.shape == (1, inner.channels, size[0] // inner.stride, size[1] // inner.stride)
        assert features.isfinite().all() and features.is_contiguous()
        off = misplaced(lambda x, layer=layer: encoder(x, layer=layer), image, CELLS)
        assert off <= 0.17, f"layer {layer}: what changes lies {off:.2f} of the picture away"
    assert encoder(noise(2, 3, 5 * stride, 2 * stride)).shape == (2, channels, 5, 2)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto"])
@torch.no_grad()
def test_the_oracle_sees_what_is_wrong(name):
    """Negative controls: the same features turned, by columns, shifted, mirrored."""
    encoder = loaded(name)
    unit = encoder.patch_size
    image = noise(1, 3, 4 * unit, 6 * unit)
    for wrong in (
        lambda x: encoder(x).flatten(2).unflatten(2, (6, 4)).transpose(2, 3),
        lambda x: encoder(x).transpose(2, 3),
        lambda x: encoder(x).flatten(2).roll(2, 2).unflatten(2, (4, 6)),
        lambda x: encoder(x).flip(3),
        lambda x: encoder(x).flip(2),
    ):
        assert misplaced(wrong, image, CELLS) > 0.25


@torch.no_grad()
def test_features_are_those_of_timm():
    encoder = loaded("vit_wee_patch16_reg1_gap_256")
    image = noise(1, 3, 64, 96)
    assert encoder.mean == (0.5,) * 3 and encoder.native_size == (256, 256)
    theirs = encoder.model.forward_features(image * encoder.input_scale + encoder.input_shift)
    ours = encoder(image).flatten(2).transpose(1, 2)
    torch.testing.assert_close(ours, theirs[:, encoder.model.num_prefix_tokens :])
    inner = encoder.model.forward_intermediates(
        image * encoder.input_scale + encoder.input_shift, indices=[4], intermediates_only=True
    )[0]
    torch.testing.assert_close(encoder(image, layer=5), inner)
    assert torch.equal(encoder.of_layers(image, (-1, 5))[1], encoder(image, layer=5))


def test_a_local_file_of_weights(tmp_path):
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    encoder = load_encoder("timm/vit_tiny_patch16_224", weights=tmp_path / "own.safetensors")
    assert torch.equal(encoder.model.blocks[3].mlp.fc1.weight, model.blocks[3].mlp.fc1.weight)
    assert "own.safetensors" in encoder.source
    features = anyup_fast.extract_features(noise(3, 64, 96), encoder)
    assert features.shape == (192, 4, 6)


@pytest.mark.parametrize(
    "name, weights, kind, message",
    [
        ("timm:vit_tinny_patch16_224", "random", ValueError, "did you mean vit_tiny_patch16_224"),
        ("timm:resnet18.no_such", "random", ValueError, "no weights 'no_such' of resnet18; it has .*a1_in1k"),
        ("timm:resnet18", "nowhere.pth", ValueError, "'auto', 'random' or an existing file"),
        ("timm:mixer_s16_224", "random", RuntimeError, r"its own size, \(3, 224, 224\), .*take a model for any size"),
        ("timm:crossvit_tiny_240", "random", RuntimeError, "crossvit_tiny_240"),
        ("timm:vit_tiny_patch16_224", "auto", RuntimeError, "network access or a filled local cache"),
    ],
)
def test_what_is_refused(name, weights, kind, message, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=message):
        load_encoder(name, weights=weights)


def test_an_old_timm_is_told(monkeypatch):
    import timm

    monkeypatch.setattr(timm, "__version__", "1.0.9")
    with pytest.raises(RuntimeError, match="needs timm 1.0.22 or newer, 1.0.9 is installed: pip install --upgrade"):
        load_encoder("timm:resnet18", weights="random")


def test_a_folder_of_the_same_name(tmp_path, monkeypatch):
    (tmp_path / "timm" / "resnet18").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="'hf:./timm/resnet18' or 'timm:resnet18'"):
        load_encoder("timm/resnet18", weights="random")
