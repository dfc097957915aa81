"""The verbs: one picture or a batch, dtypes, devices, and what they refuse."""

import subprocess
import sys
import warnings

import pytest
import tiny
import torch

import anyup_fast
from anyup_fast import AnyUp, api, checkpoints, extract_dinov2_features, extract_features, upsample_features_with_anyup
from anyup_fast.encoders import load_encoder

VERBS = {
    "extract_dinov2_features",
    "extract_features",
    "load_image",
    "prepare",
    "upsample_features_with_anyup",
    "visualize_feature_comparison",
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    pytest.importorskip("transformers")
    return tiny.encoder_folder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("weights") / "model.safetensors")


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_public_names():
    others = "__version__ AnyUp accelerate install_as_anyup wrap_encoder fit_head prompt_head view".split()
    assert set(anyup_fast.__all__) == {*others, *VERBS}
    assert set(api.__all__) == VERBS
    assert all(getattr(anyup_fast, name) is getattr(api, name) for name in VERBS)
    assert set(anyup_fast.__all__) <= set(dir(anyup_fast))
    with pytest.raises(AttributeError, match="no attribute 'upscale'"):
        anyup_fast.upscale  # noqa: B018


@pytest.mark.parametrize("names", ["", " ".join([*sorted(VERBS), "AnyUp"])])
def test_imports_stay_light(names):
    heavy = "PIL triton transformers matplotlib onnx safetensors skimage scipy tqdm"
    script = (
        "import sys, torch, numpy; before = set(sys.modules); import anyup_fast; "
        f"[getattr(anyup_fast, name) for name in {names.split()}]; "
        f"print(*(set('{heavy}'.split()) & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_a_batch_equals_its_pictures(encoder, weights):
    batch = images(2, 3, 28, 42)
    features = extract_features(batch, encoder)
    assert features.shape == (2, 32, 2, 3)
    output = upsample_features_with_anyup(batch, features, (30, 40), weights)
    assert output.shape == (2, 32, 30, 40)
    for image, one_features, one_output in zip(batch, features, output, strict=True):
        single = extract_features(image, encoder)
        assert single.shape == (32, 2, 3)
        torch.testing.assert_close(single, one_features, rtol=1e-4, atol=1e-5)
        upsampled = upsample_features_with_anyup(image, one_features, (30, 40), weights)
        assert upsampled.shape == (32, 30, 40)
        torch.testing.assert_close(upsampled, one_output, rtol=1e-4, atol=1e-5)
    assert (output[0] - output[1]).abs().max() > 1e-3


def test_a_batch_of_one_stays_a_batch(weights):
    image, features = images(3, 20, 24), images(5, 3, 4)
    whole = upsample_features_with_anyup(image, features, weights=weights)
    assert whole.shape == (5, 20, 24)
    for pair in ((image[None], features), (image, features[None]), (image[None], features[None])):
        assert torch.equal(upsample_features_with_anyup(*pair, weights=weights), whole[None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_output_has_the_dtype_of_the_features(weights, dtype):
    image, features = images(3, 20, 24), images(5, 3, 4).to(dtype)
    output = upsample_features_with_anyup(image, features, weights=weights)
    expected = upsample_features_with_anyup(image, features.float(), weights=weights)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "float16", "float32"])
def test_what_the_model_computes_in_can_be_chosen(weights, dtype):
    image, features = images(3, 56, 56), images(32, 4, 4, seed=1)
    narrow = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    model = AnyUp.from_pretrained(weights).to(narrow)
    with torch.no_grad():
        expected = model(image[None], features[None].to(narrow))[0]
        exact = AnyUp.from_pretrained(weights)(image[None], features[None])[0]
    upsampled = anyup_fast.upsample_features_with_anyup(image, features, weights=weights, dtype=dtype)
    assert upsampled.dtype == torch.float32 and torch.equal(upsampled, expected.float())
    assert torch.equal(upsampled, exact) == (narrow == torch.float32)
    error = (upsampled - exact).norm() / exact.norm()
    assert error <= {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 0}[narrow]
    prepared = anyup_fast.prepare(image, features, weights, dtype=dtype)
    assert torch.equal(prepared.full()[0], expected) and prepared.full().dtype == narrow
    given = anyup_fast.upsample_features_with_anyup(image, features, weights=model, dtype=dtype)
    assert torch.equal(given, upsampled)


def test_a_dtype_that_cannot_be_computed_in_is_refused(weights):
    image, features, model = images(3, 56, 56), images(32, 4, 4), AnyUp.from_pretrained(weights)
    for verb in (anyup_fast.upsample_features_with_anyup, anyup_fast.prepare):
        for dtype in ("int8", "double", torch.float64, 16):
            with pytest.raises(ValueError, match="dtype: need None or one of 'float32', 'bfloat16', 'float16', got"):
                verb(image, features, weights=weights, dtype=dtype)
        with pytest.raises(ValueError, match="torch.bfloat16 is asked for, the model computes in torch.float32; give"):
            verb(image, features, weights=model, dtype="bfloat16")
        with pytest.raises(ValueError, match="features: they leave the range of float16; ask for dtype='bfloat16'"):
            verb(image, 1e6 * features, weights=weights, dtype="float16")


def test_no_graph_is_built_and_that_is_said(encoder, weights):
    image, features = images(3, 28, 28).requires_grad_(), images(4, 2, 2).requires_grad_()
    with pytest.warns(UserWarning, match=r"extract_features: image asked for gradients, .* write load_encoder\(name\)"):
        assert not extract_features(image, encoder).requires_grad
    for given, names in (((image, features), "image and features"), ((image.detach(), features), "features")):
        with pytest.warns(UserWarning, match=rf": {names} asked for gradients, .* write AnyUp.from_pretrained\(\)"):
            assert not upsample_features_with_anyup(*given, weights=tiny.model()).requires_grad
    with pytest.warns(UserWarning, match="^prepare: features asked for gradients"):
        assert not anyup_fast.prepare(image.detach(), features=features, weights=weights).full().requires_grad
    with pytest.warns(UserWarning, match="^AnyUp.prepare: image and features asked .* call the model itself"):
        assert not tiny.model().prepare(image[None], features[None]).full().requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            upsample_features_with_anyup(image, features, weights=weights)
            tiny.model().prepare(image[None], features[None])
        tiny.model().prepare(image[None].detach(), features[None].detach())
        upsample_features_with_anyup(image.detach(), features.detach(), weights=tiny.model().train())


def test_weights_may_be_a_model_a_path_or_a_url(weights):
    image, features = images(3, 20, 24), images(5, 3, 4)
    with torch.no_grad():
        expected = AnyUp.from_pretrained(weights)(image[None], features[None])[0]
    for given in (tiny.model(), weights, str(weights), weights.as_uri()):
        assert torch.equal(upsample_features_with_anyup(image, features, weights=given), expected)


def test_weights_are_read_once_and_again_when_the_file_changes(tmp_path, monkeypatch):
    path, loads = tmp_path / "model.safetensors", []
    real = checkpoints.load_checkpoint
    monkeypatch.setattr(checkpoints, "load_checkpoint", lambda *given: loads.append(given[0]) or real(*given))
    image, features = images(3, 20, 24), images(5, 3, 4)
    tiny.checkpoint(path, seed=0)
    first, again = (upsample_features_with_anyup(image, features, weights=path) for _ in range(2))
    assert torch.equal(first, again) and len(loads) == 1
    tiny.checkpoint(path, seed=1)
    other = upsample_features_with_anyup(image, features, weights=path)
    assert len(loads) == 2 and not torch.equal(first, other)
    assert torch.equal(other, upsample_features_with_anyup(image, features, weights=tiny.model(1)))


def test_encoders_may_be_loaded(encoder):
    image = images(3, 28, 28)
    assert torch.equal(extract_features(image, load_encoder(encoder)), extract_features(image, encoder))
    assert not torch.equal(extract_features(image, encoder, layer=1), extract_features(image, encoder))


def test_a_device_can_be_chosen(encoder, weights):
    image, features = images(3, 28, 28), images(4, 2, 2)
    assert torch.equal(extract_features(image, encoder, device="cpu"), extract_features(image, encoder))
    output = upsample_features_with_anyup(image, features, weights=weights, device=torch.device("cpu"))
    assert torch.equal(output, upsample_features_with_anyup(image, features, weights=weights))


def test_dinov2_goes_by_its_names(monkeypatch):
    asked = []
    monkeypatch.setattr(api, "extract_features", lambda *args, **options: asked.append((args, options)))
    extract_dinov2_features("image", "dinov2_vitb14_reg", 3, weights="hub", device="cpu")
    options = {"layer": 3, "weights": "hub", "device": "cpu", "value_range": None}
    assert asked == [(("image", "dinov2_vitb14_reg"), options)]
    for model in ("efficientnet_lite0", "vits14", None):
        with pytest.raises(ValueError, match="model: need a DINOv2 name such as"):
            extract_dinov2_features("image", model)
    assert len(asked) == 1


IMAGE, FEATURES = images(3, 28, 28), images(4, 2, 2)


def poisoned(tensor, value):
    tensor = tensor.clone()
    tensor[0, 1, 1] = value
    return tensor


@pytest.mark.parametrize(
    "image, features, options, message",
    [
        (poisoned(IMAGE, torch.nan), FEATURES, {}, "image: holds NaN or infinite values; mend them"),
        (IMAGE, poisoned(FEATURES, torch.inf), {}, "features: holds NaN or infinite values; mend them"),
        (IMAGE, FEATURES[0], {}, r"features: need the shape \(C, H, W\) or \(B, ...\), no size 0; got \(2, 2\)"),
        (IMAGE, FEATURES[None, None], {}, r"features: need the shape .*; got \(1, 1, 4, 2, 2\)"),
        (IMAGE, FEATURES[:0], {}, r"features: need the shape .* no size 0; got \(0, 2, 2\)"),
        (IMAGE, FEATURES[:, :0], {}, r"features: need the shape .* no size 0; got \(4, 0, 2\)"),
        (IMAGE[:2], FEATURES, {}, r"image: need the shape \(3, H, W\) .*; got \(2, 28, 28\)"),
        (IMAGE[:, :0], FEATURES, {}, r"image: need the shape .*; got \(3, 0, 28\)"),
        ("photo.jpg", FEATURES, {}, "image: need a floating-point tensor, got str; load_image makes one"),
        (IMAGE.int(), FEATURES, {}, "image: need a floating-point tensor, got torch.int32"),
        (IMAGE, FEATURES.numpy(), {}, "features: need a floating-point tensor, got ndarray; extract_features makes"),
        (IMAGE.expand(2, 3, 28, 28), FEATURES.expand(3, 4, 2, 2), {}, "batch size, 2 and 3: give one image"),
        (IMAGE.to("meta"), FEATURES, {}, "image is on meta, features on cpu: move one .* device="),
        (IMAGE, FEATURES.to("meta"), {}, "image is on cpu, features on meta"),
        (IMAGE, FEATURES, {"weights": tiny.model().to("meta")}, "image is on cpu, the model on meta"),
        (IMAGE, FEATURES, {"device": "toaster"}, "device: 'toaster' cannot be used here"),
        (IMAGE, FEATURES, {"device": 1.5}, "device: '1.5' cannot be used here"),
        (IMAGE, FEATURES, {"weights": "anyup_best"}, "weights: no checkpoint is called 'anyup_best'; use 'embedded'"),
        (IMAGE, FEATURES, {"weights": ["embedded"]}, "weights: need a name, a path or a URL, got list"),
        (IMAGE, FEATURES, {"output_size": (0, 4)}, r"output_size: .* positive whole numbers, got \(0, 4\)"),
        (IMAGE, FEATURES, {"output_size": (4, -4)}, r"output_size: .* positive whole numbers, got \(4, -4\)"),
        (IMAGE, FEATURES, {"output_size": (4.0, 4)}, r"output_size: .* positive whole numbers, got \(4.0, 4\)"),
        (IMAGE, FEATURES, {"output_size": (4,)}, r"output_size: need \(height, width\) or None, got \(4,\)"),
        (IMAGE, FEATURES, {"output_size": (4, 4, 4)}, r"output_size: need \(height, width\) or None"),
        (IMAGE, FEATURES, {"output_size": 28}, r"output_size: need \(height, width\) or None, got 28"),
    ],
)
def test_what_upsampling_refuses(weights, image, features, options, message):
    with pytest.raises(ValueError, match=message):
        upsample_features_with_anyup(image, features, **{"weights": weights, **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the test wants missing")
def test_a_gpu_that_is_not_there_is_named(weights, encoder):
    with pytest.raises(ValueError, match="device: 'cuda' cannot be used here .*; 'cpu' always can"):
        upsample_features_with_anyup(IMAGE, FEATURES, weights=weights, device="cuda")
    with pytest.raises(ValueError, match="device: 'cuda' cannot be used here"):
        extract_features(IMAGE, encoder, device="cuda")


def test_what_extraction_refuses(encoder):
    def refused(kind, message, image=IMAGE, encoder=encoder, **options):
        with pytest.raises(kind, match=message):
            extract_features(image, encoder, **options)

    refused(ValueError, "H and W multiples of 14 .* nearest are H = 28, W = 28", image=images(3, 28, 30))
    refused(ValueError, "image: holds NaN", image=poisoned(IMAGE, torch.nan))
    refused(ValueError, r"image: need the shape \(3, H, W\)", image=IMAGE[0])
    refused(ValueError, "unknown encoder name 'dinov3'.*Known: .*dinov2", encoder="dinov3")
    refused(TypeError, "encoder: need a name or what load_encoder returns, got NoneType", encoder=None)
    refused(ValueError, "layer must be 1..2 .* got 3", layer=3)
    refused(TypeError, "layer must be an int, got 1.5", layer=1.5)
    refused(ValueError, "weights: a loaded encoder has its own", encoder=load_encoder(encoder), weights="hub")
    refused(RuntimeError, "nowhere could not be loaded .*; it needs network access .* a folder", encoder="hf:./nowhere")


@pytest.mark.parametrize("content", [None, b"no picture", "truncated"])
def test_what_is_no_picture_is_named(tmp_path, content):
    path = tmp_path / "photo.png"
    if content == "truncated":
        tiny.photograph(path)
        content = path.read_bytes()[:500]
    if content is not None:
        path.write_bytes(content)
    kind = FileNotFoundError if content is None else ValueError
    with pytest.raises(kind, match="source: .*photo.png"):
        anyup_fast.load_image(path)
