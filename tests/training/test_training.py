"""Training: the terms of the loss, the cache of targets, resuming, determinism."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

from anyup_fast import AnyUp
from anyup_fast.training import TargetCache, TrainConfig, augmentations, loop, objectives, samples, train
from anyup_fast.training.targets import name_and_layer

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    scenes, stamps = tiny.picture_folders(root)
    name = tiny.encoder_folder(root / "encoder")
    return TrainConfig(
        scenes=str(scenes),
        stamps=str(stamps),
        held_out=False,
        encoders=(name,),
        pictures=4,
        size=112,
        steps=6,
        native_weight=1.0,
        batch=2,
        guide_pixels=576,
        warmup=2,
        bf16=False,
        model=tiny.CONFIG,
    )


@pytest.fixture(scope="module")
def cache(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    TargetCache(folder, config).fill()
    return folder


def weights_of(path):
    return AnyUp.from_pretrained(path).state_dict()


def test_a_run_gives_weights_and_metrics(config, cache, tmp_path):
    path = train(config, tmp_path / "run", cache=cache)
    trained, fresh = weights_of(path), tiny.model(config.seed).state_dict()
    assert trained.keys() == fresh.keys()
    assert any(not torch.equal(trained[name], fresh[name]) for name in trained)
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(config.steps))
    assert all(np.isfinite(float(row["loss"])) for row in rows)
    assert any(row["main"] for row in rows) and any(row["dense"] for row in rows)


def assert_equal_weights(one, other):
    one, other = weights_of(one), weights_of(other)
    assert all(torch.equal(one[name], other[name]) for name in other)


def interrupted_before(last):
    def progress(steps):
        for step in steps:
            if step == last:
                raise KeyboardInterrupt
            yield step

    return progress


def losses(folder):
    return [line.split(",")[:2] for line in (folder / "metrics.csv").read_text().splitlines()]


@pytest.mark.parametrize("changed", [{}, {"bf16": True}, {"optimizer": "muon"}], ids=str)
def test_an_interrupted_run_ends_like_an_undisturbed_one(config, cache, tmp_path, changed):
    config = replace(config, **changed)
    whole = train(config, tmp_path / "whole", cache=cache)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "broken", cache=cache, save_every=3, progress=interrupted_before(4))
    assert not (tmp_path / "broken" / "anyup.safetensors").exists()
    resumed = train(config, tmp_path / "broken", cache=cache)
    assert_equal_weights(resumed, whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")


def test_a_run_stops_where_it_is_told_and_goes_on(config, cache, tmp_path):
    early = weights_of(train(config, tmp_path / "run", cache=cache, until=4))
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["step"] == 4 and len(losses(tmp_path / "run")) == 5
    assert all(torch.equal(tensor, state["average"][f"module.{name}"]) for name, tensor in early.items())
    with pytest.raises(ValueError, match="until: .* is at step 4 already, got 3"):
        train(config, tmp_path / "run", cache=cache, until=3)
    train(config, tmp_path / "run", cache=cache)
    assert len(losses(tmp_path / "run")) == config.steps + 1


def test_a_step_without_a_loss_resumes_like_any_other(config, tmp_path, monkeypatch):
    """Without cut-outs a step that maps a grid to itself has no loss, but weight decay and momentum go on."""
    config = replace(config, stamps=None, steps=4)
    real = objectives.training_loss

    def no_loss_at_step_2(model, sample, rng, settings):
        loss, terms = real(model, sample, rng, settings)
        step = len(losses(tmp_path / run)) - 1
        return (torch.zeros((), requires_grad=True), {}) if step == 2 else (loss, terms)

    monkeypatch.setattr(loop, "training_loss", no_loss_at_step_2)
    run = "whole"
    whole = train(config, tmp_path / run, cache=tmp_path / "cache")
    run = "broken"
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / run, cache=tmp_path / "cache", save_every=1, progress=interrupted_before(2))
    assert_equal_weights(train(config, tmp_path / run, cache=tmp_path / "cache"), whole)


def test_a_run_that_stopped_before_its_first_save_starts_anew(config, cache, tmp_path):
    config = replace(config, steps=2)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "broken", cache=cache, progress=interrupted_before(1))
    with open(tmp_path / "broken" / "metrics.csv", "a") as file:
        file.write("1,0.2")
    train(config, tmp_path / "broken", cache=cache)
    train(config, tmp_path / "whole", cache=cache)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 3


def test_a_finished_run_is_not_repeated(config, cache, tmp_path):
    config = replace(config, steps=1)
    before = train(config, tmp_path, cache=cache).rename(tmp_path / "before.safetensors")
    metrics = (tmp_path / "metrics.csv").read_bytes()
    assert_equal_weights(train(config, tmp_path, cache=cache), before)
    assert (tmp_path / "metrics.csv").read_bytes() == metrics


def test_a_failing_write_of_the_state_leaves_the_older_one(config, cache, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, cache=cache, save_every=2, progress=interrupted_before(2))
    before = (tmp_path / "state.pt").read_bytes()

    def fail(state, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        train(config, tmp_path, cache=cache)
    assert (tmp_path / "state.pt").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"state.pt", "metrics.csv", "config.json"}


def test_training_fits_one_picture(config, tmp_path):
    config = replace(config, pictures=1, batch=1, steps=50, lr=3e-3, ema=0.9, plain_share=0.0)
    targets = TargetCache(tmp_path / "cache", config)
    targets.fill()
    trained = AnyUp.from_pretrained(train(config, tmp_path / "run", cache=tmp_path / "cache"))
    batches = [samples.draw_sample(targets, np.random.default_rng(seed)) for seed in range(100, 112)]

    @torch.no_grad()
    def loss_of(model):
        return np.mean(
            [
                objectives.training_loss(model, sample, np.random.default_rng(seed), config)[0].item()
                for seed, sample in enumerate(batches)
            ]
        )

    fresh = tiny.model(config.seed)
    assert loss_of(trained) < 0.9 * loss_of(fresh)


def test_the_smallest_pictures_train(config, tmp_path):
    config = replace(config, size=56, pictures=2, batch=1, steps=8, encoders=(f"{config.encoders[0]}:1",))
    weights = weights_of(train(config, tmp_path))
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_a_run_goes_on_from_weights(config, cache, tmp_path):
    path = tiny.checkpoint(tmp_path / "start.safetensors", seed=5)
    trained = weights_of(train(replace(config, steps=1, lr=1e-9, init=str(path)), tmp_path / "run", cache=cache))
    for name, tensor in tiny.model(5).state_dict().items():
        torch.testing.assert_close(trained[name], tensor, atol=1e-6, rtol=0)
    other = replace(config, steps=1, init=str(path), model={"qk_dim": 64})
    with pytest.raises(ValueError, match="init: .*start.safetensors holds another architecture than `model` asks for"):
        train(other, tmp_path / "other", cache=cache)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_native_steps_have_no_finer_target(config, cache, share):
    config = replace(config, native_share=share)
    targets = TargetCache(cache, config)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        sample = samples.draw_sample(targets, rng)
        assert (sample.target.shape == sample.features.shape) == bool(share)
        terms = objectives.training_loss(tiny.model(), sample, rng, config)[1]
        assert ("native" in terms, "main" in terms) == (bool(share), not share)


def test_native_losses_see_whole_cells():
    for start, stop, expected in ((0, 48, (0, 42)), (5, 53, (0, 42)), (7, 55, (7, 49)), (15, 19, (14, 21))):
        assert objectives._whole_cells(slice(start, stop), 7) == slice(*expected)


def test_folders_may_be_paths(config, cache, tmp_path):
    one = train(replace(config, steps=1), tmp_path, cache=cache)
    paths = replace(config, steps=1, scenes=Path(config.scenes), stamps=Path(config.stamps))
    assert train(paths, tmp_path, cache=cache) == one


def test_another_seed_gives_other_weights(config, cache, tmp_path):
    one = train(replace(config, steps=1), tmp_path / "one", cache=cache)
    other = train(replace(config, steps=1, seed=1), tmp_path / "other", cache=cache)
    assert any(not torch.equal(a, b) for a, b in zip(weights_of(one).values(), weights_of(other).values(), strict=True))


def test_other_draws_give_other_weights_from_the_same_pictures(config, cache, tmp_path):
    once, again = replace(config, steps=1, draws=0), replace(config, steps=1, draws=1)
    assert TargetCache(cache, once).folder == TargetCache(cache, again).folder
    one, other, same = (
        train(settings, tmp_path / name, cache=cache)
        for name, settings in (("one", once), ("other", again), ("same", again))
    )
    assert any(not torch.equal(a, b) for a, b in zip(weights_of(one).values(), weights_of(other).values(), strict=True))
    assert_equal_weights(same, other)
    with pytest.raises(ValueError, match="draws: must be 0 or more, got -1"):
        replace(config, draws=-1)


def test_other_settings_in_the_same_folder_are_refused(config, cache, tmp_path):
    train(replace(config, steps=1), tmp_path, cache=cache)
    with pytest.raises(ValueError, match="holds a run with other settings"):
        train(replace(config, steps=2), tmp_path, cache=cache)


def test_the_cache_goes_on_where_it_stopped(config, tmp_path, monkeypatch):
    targets = TargetCache(tmp_path, config)
    with pytest.raises(RuntimeError, match="stop"):
        targets.fill(lambda missing: stop_after(missing, 2))
    kept = {path: path.stat().st_mtime_ns for path in targets.folder.glob("0*.safetensors")}
    assert len(kept) == 2
    computed = []
    monkeypatch.setattr(targets, "_compute", lambda index, encoders: computed.append(index))
    targets.fill()
    assert computed == [2, 3]
    assert {path: path.stat().st_mtime_ns for path in targets.folder.glob("0*.safetensors")} == kept


def test_a_full_cache_needs_no_encoder(config, cache, monkeypatch):
    monkeypatch.setattr("anyup_fast.encoders.load_encoder", lambda name: pytest.fail("loaded an encoder"))
    TargetCache(cache, config).fill()
    with pytest.raises(pytest.fail.Exception, match="loaded an encoder"):
        TargetCache(cache, replace(config, pictures=5)).fill()


def test_a_cache_of_other_pictures_is_refused(config, tmp_path):
    scenes, _ = tiny.picture_folders(tmp_path / "pictures")
    config = replace(config, scenes=str(scenes), stamps=None, pictures=1)
    TargetCache(tmp_path, config).fill()
    TargetCache(tmp_path, config).fill()
    tiny.photograph(next(scenes.iterdir()), size=(90, 70))
    with pytest.raises(ValueError, match="cache: .* was filled from other pictures of the same names; remove it"):
        TargetCache(tmp_path, config).fill()


def stop_after(items, count):
    for index, item in enumerate(items):
        if index == count:
            raise RuntimeError("stop")
        yield item


def test_targets_are_the_encoders_features(config, cache):
    from anyup_fast.encoders import load_encoder
    from anyup_fast.image import normalize

    tensors = TargetCache(cache, config)[1]
    name = config.encoders[0]
    assert {key: tuple(value.shape) for key, value in tensors.items()} == {
        "image": (3, 112, 112),
        "instances": (112, 112),
        f"{name}/4": (32, 2, 2),
        f"{name}/2": (32, 4, 4),
        f"{name}/1": (32, 8, 8),
    }
    features = load_encoder(name)(normalize(tensors["image"][None] / 255))[0]
    torch.testing.assert_close(tensors[f"{name}/1"].float(), features, rtol=2e-3, atol=2e-3)


def test_samples_are_aligned_crops(config, cache, monkeypatch):
    """The position of a crop can be read off features that hold their own coordinates, and off the picture."""
    targets, name = TargetCache(cache, config), config.encoders[0]

    def coordinates(n):
        return (torch.arange(n) + 0.5) / n

    def picture(n):
        rows, cols = torch.meshgrid(coordinates(n), coordinates(n), indexing="ij")
        return torch.stack((rows, cols, torch.zeros_like(rows)))

    whole = {f"{name}/{shrink}": picture(8 // shrink) for shrink in (4, 2, 1)}
    whole |= {"image": picture(112) * 255, "instances": torch.zeros(112, 112)}
    monkeypatch.setattr(TargetCache, "__getitem__", lambda self, index: whole)
    shapes = set()
    for seed in range(20):
        sample = samples.draw_sample(targets, np.random.default_rng(seed))
        shapes.add((sample.features.shape[-1], sample.target.shape[-1]))
        for tensor in (sample.guide, sample.target):
            pooled = F.adaptive_avg_pool2d(tensor[:, :2], sample.features.shape[-2:])
            torch.testing.assert_close(pooled, sample.features[:, :2], atol=0.02, rtol=0)
    assert len(shapes) > 3


def test_loss_is_zero_for_equal_and_known_for_simple_features():
    target = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)
    assert objectives.feature_loss(target, target).item() == pytest.approx(0, abs=1e-6)
    # (2, 1) against (1, 3): cosine 5 / sqrt(5 * 10); differences 1 and -2 over a range of 2: (0.25 + 1) / 2.
    output = torch.tensor([2.0, 1.0]).view(1, 2, 1, 1)
    expected = 1 - 5 / 50**0.5 + 0.625
    assert objectives.feature_loss(output, target).item() == pytest.approx(expected, rel=1e-5)
    pair, weight = torch.cat((output, target), 3), torch.tensor([[[1.0, 0.0]]])
    assert objectives.feature_loss(pair, target.expand_as(pair), weight).item() == pytest.approx(expected, rel=1e-5)


def test_instance_targets_do_not_mix_instances():
    instances = torch.zeros(1, 32, 32)
    instances[:, :, 13:] = 1
    features = torch.zeros(1, 2, 4, 4)
    features[:, 0, :, 0] = 1
    features[:, 1, :, 1:] = 1
    features[:, :, :, 1] = torch.tensor([5 / 8, 3 / 8])[:, None]
    target, weight = objectives.instance_target(features, instances)
    inside = weight[0] > 0
    assert inside[:, 4:20].any() and not inside[:, -2:].any()
    left, right = target[0, :, 5, 12], target[0, :, 5, 13]
    bilinear = F.interpolate(features, (32, 32), mode="bilinear")[0, :, 5]
    assert (left[0] - right[0]) > 0.5, "the step at the boundary is kept"
    assert (bilinear[0, 12] - bilinear[0, 13]) < 0.1, "which plain interpolation blurs"


@torch.no_grad()
def test_regions_equal_the_whole():
    model = tiny.model()
    generator = torch.Generator().manual_seed(0)
    image, features = torch.randn(2, 3, 20, 24, generator=generator), torch.randn(2, 7, 5, 6, generator=generator)
    query, key = model.encoded(image, features)
    whole = model(image, features)
    for rows, cols in ((slice(0, 20), slice(0, 24)), (slice(0, 3), slice(20, 24)), (slice(7, 12), slice(5, 6))):
        part = objectives.decode_region(model, query, key, features, rows, cols)
        torch.testing.assert_close(part, whole[..., rows, cols], rtol=1e-5, atol=1e-5)


def test_photometric_changes_stay_in_range_and_are_changes():
    image = torch.rand(3, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    changed = augmentations.photometric(image, np.random.default_rng(0))
    assert changed.shape == image.shape
    assert 0 <= changed.min() and changed.max() <= 1
    assert (changed - image).abs().mean() > 0.02


def halves(size=32):
    instances = torch.zeros(size, size, dtype=torch.uint8)
    instances[:, size // 2 :] = 3
    return instances


def test_recolouring_gives_every_instance_colours_of_its_own():
    instances = halves()
    image = torch.tensor([0.7, 0.4, 0.2])[:, None, None].expand(3, 32, 32)
    apart = []
    for seed in range(20):
        changed = augmentations.recoloured(image, instances, np.random.default_rng(seed))
        for half in (changed[..., :12], changed[..., 20:]):
            # no edges inside an instance
            torch.testing.assert_close(half, half[:, :1, :1].expand_as(half), rtol=0, atol=1e-5)
        assert torch.equal(changed, augmentations.recoloured(image, instances, np.random.default_rng(seed)))
        apart.append((changed[:, 0, 0] - changed[:, 0, -1]).abs().max())
    assert sum(distance > 0.05 for distance in apart) > 10


def test_some_instances_come_near_the_colours_around_them(monkeypatch):
    image = torch.zeros(3, 32, 32)
    image[:, :, 16:] = 1
    distances = {}
    for share in (0.0, 1.0):
        monkeypatch.setattr(augmentations, "FAINT_SHARE", share)
        found = [augmentations.recoloured(image, halves(), np.random.default_rng(seed)) for seed in range(20)]
        distances[share] = torch.stack([(f[:, 0, 0] - f[:, 0, -1]).abs().max() for f in found])
    assert (distances[1.0] < 0.41 * distances[0.0] + 1e-4).all(), "at least six tenths of the way"
    assert (distances[1.0] > 0.02).any(), "seldom all of it"


def test_recoloured_outlines_are_drawn_anew():
    """What mixes at the rim of the old picture is not seen in the new one: no seam of a third colour."""
    image = torch.zeros(3, 32, 32)
    image[0, :, 16:] = 0.8
    image[2, :, :16] = 0.8
    image[:, :, 15:17] = 0.4  # the antialiased edge
    widths = set()
    for seed in range(20):
        changed = augmentations.recoloured(image, halves(), np.random.default_rng(seed))
        ends = torch.stack((changed[..., :1], changed[..., -1:]))
        low, high = ends.amin(0), ends.amax(0)
        assert (changed >= low - 1e-5).all() and (changed <= high + 1e-5).all()
        whole = (changed - changed[..., :1]).abs().amax(0)
        steps = (whole.diff(dim=1).amax(0) > 1e-3 * whole.max()).sum().item()
        widths.add(steps)
    assert min(widths) == 1 and 3 <= max(widths) <= 7


def test_thin_instances_keep_their_pixels():
    """A line of one pixel has no inside; it shows its own colour, changed, not that of the ground."""
    image = torch.full((3, 24, 24), 0.2)
    instances = torch.zeros(24, 24, dtype=torch.uint8)
    image[:, :, 12], instances[:, 12] = 0.9, 1
    for seed in range(10):
        changed = augmentations.recoloured(image, instances, np.random.default_rng(seed))
        assert torch.isfinite(changed).all()
        assert (changed[..., 12] - changed[..., 2]).abs().max() > 1e-3


def test_a_covered_instance_goes_on_under_what_covers_it():
    """Soft outlines let through what lies below: the ground's new colour, never a pixel of the old picture."""
    instances = torch.zeros(40, 40, dtype=torch.uint8)
    instances[:, 14:] = 1
    instances[:, 26:] = 2
    image = torch.stack([instances / 2] * 3)
    for seed in range(20):
        changed = augmentations.recoloured(image, instances, np.random.default_rng(seed))
        plain = [changed[:, 0, column] for column in (2, 20, 37)]
        for left, right, columns in ((0, 1, slice(6, 20)), (1, 2, slice(20, 34))):
            ends = torch.stack((plain[left], plain[right]))
            part = changed[..., columns]
            assert (part >= ends.amin(0)[:, None, None] - 1e-5).all()
            assert (part <= ends.amax(0)[:, None, None] + 1e-5).all()


def test_spots_are_few_small_and_of_one_colour():
    image = torch.tensor([0.55, 0.45, 0.4])[:, None, None].expand(3, 96, 96)
    instances = torch.zeros(96, 96, dtype=torch.uint8)
    seen = 0
    for seed in range(20):
        rng = np.random.default_rng
        assert torch.equal(augmentations.recoloured(image, instances, rng(seed), 0.0).std((1, 2)), torch.zeros(3))
        changed = augmentations.recoloured(image, instances, rng(seed), 1.0).flatten(1)
        most = changed.median(1).values[:, None]
        away = (changed - most).norm(dim=0)
        spotted = away > 0.02
        assert spotted.float().mean() < 0.25
        if spotted.any():
            seen += 1
            farthest = changed[:, away.argmax()][:, None] - most
            share = (changed - most).mul(farthest).sum(0, keepdim=True) / farthest.square().sum()
            torch.testing.assert_close(changed - most, share * farthest, rtol=0, atol=1e-4)
            assert -1e-4 < share.min() and share.max() < 1 + 1e-4
    assert seen > 15, "but for colours that happen to be near, spots are seen"
    apart = [(augmentations._spots((96, 96), rng(seed)) > 0.5).float() for seed in range(20)]
    assert all(0.005 < spots.mean() < 0.15 for spots in apart)
    inner = [-F.max_pool2d(-spots[None], 15, 1) for spots in apart]
    assert max(part.mean() for part in inner) < 0.01, "none covers 15 pixels each way"


def test_spots_have_colours_of_other_instances_or_new_ones(monkeypatch):
    """Of greys only the new colour, here green, can make others; the lowest instance knows no other's colours."""
    monkeypatch.setattr(augmentations, "_random_colour", lambda rng: torch.tensor([0.0, 1.0, 0.0])[:, None, None])
    image = torch.stack([0.2 + halves(64) / 5] * 3)
    green = {0: [], 3: []}
    for seed in range(30):
        changed = augmentations.recoloured(image, halves(64), np.random.default_rng(seed), 1.0)
        for number, part in ((0, changed[..., :24]), (3, changed[..., 40:])):
            green[number].append((part[1] - part[0]).max().item() > 0.05)
    assert all(green[0]) and 8 < sum(green[3]) < 22


def test_recolouring_keeps_greys_grey_and_the_range():
    generator = torch.Generator().manual_seed(0)
    grey = torch.rand(1, 8, 8, generator=generator).expand(3, 8, 8)
    bright = torch.rand(3, 8, 8, generator=generator).round()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        instances = torch.arange(64, dtype=torch.uint8).view(8, 8) // 24
        found = augmentations.recoloured(grey, instances, rng)
        torch.testing.assert_close(found, found[:1].expand(3, 8, 8), rtol=0, atol=1e-5)
        vivid = augmentations.recoloured(bright, instances, rng)
        assert vivid.min() >= 0 and vivid.max() <= 1 and not torch.equal(vivid, bright)


def test_a_third_of_a_turn_about_grey_swaps_the_primaries():
    turn = augmentations._turn_about_grey(2 * np.pi / 3)
    np.testing.assert_allclose(turn, [[0, 0, 1], [1, 0, 0], [0, 1, 0]], atol=1e-12)


@pytest.mark.parametrize("share", (0.0, 1.0))
def test_guides_are_recoloured_as_often_as_asked(config, cache, monkeypatch, share):
    calls = []

    def recoloured(image, instances, rng, spot_share):
        assert image.shape[1:] == instances.shape and spot_share == 0.3
        calls.append(1)
        return torch.full_like(image, 0.25)

    monkeypatch.setattr(samples, "recoloured", recoloured)
    asked = replace(config, recolour_share=share, spot_share=0.3)
    sample = samples.draw_sample(TargetCache(cache, asked), np.random.default_rng(0))
    assert len(calls) == (len(sample.guide) if share else 0)
    assert torch.allclose(sample.guide, torch.tensor(0.25)) == bool(share)


def test_degraded_pictures_stay_in_range_and_lose_detail():
    torch.manual_seed(0)
    image = torch.rand(2, 3, 24, 24)
    kinds = set()
    for seed in range(20):
        changed = augmentations.degraded(image, np.random.default_rng(seed))
        assert changed.shape == image.shape and changed.min() >= 0 and changed.max() <= 1
        assert (changed - image).abs().max() > 1e-3
        kinds.add((changed.diff().std() < image.diff().std()).item())
        assert torch.equal(changed, augmentations.degraded(image, np.random.default_rng(seed)))
    assert kinds == {True, False}, "some are blurred, some are not"


def test_blur_keeps_flat_pictures():
    flat = torch.full((1, 3, 16, 16), 0.4)
    seed = next(seed for seed in range(100) if _only_blurs(seed))
    torch.testing.assert_close(augmentations.degraded(flat, np.random.default_rng(seed)), flat)


def _only_blurs(seed):
    rng = np.random.default_rng(seed)
    chosen = rng.random(3) < 0.5
    chosen[rng.integers(3)] = True
    return chosen.tolist() == [True, False, False]


def test_noise_is_as_large_as_the_features_at_most():
    features = torch.randn(2, 8, 16, 16) * torch.linspace(0.1, 10, 8)[:, None, None]
    added = augmentations.noisy(features, np.random.default_rng(3)) - features
    relative = added.std((2, 3)) / features.std((2, 3))
    assert relative.max() < 1.2 and relative.min() > 0.8 * relative.max()
    assert added.mean().abs() < 0.1


def test_smoothness_blames_bends_on_flat_ground_and_not_at_edges():
    output = torch.zeros(1, 2, 12, 12)
    output[..., 6:] = 1
    flat, edge = torch.full((1, 3, 12, 12), 0.5), torch.zeros(1, 3, 12, 12)
    edge[..., 6:] = 1
    blamed = objectives.edge_aware_smoothness(output, flat)
    # Two of the ten second differences along a row are +-1 in both channels, the variance is 1/4 in both.
    torch.testing.assert_close(blamed, torch.tensor(2 * 2 / 10 / (2 * 0.25)), rtol=0.02, atol=0)
    assert objectives.edge_aware_smoothness(output, edge) < 1e-6
    ramp = torch.linspace(0, 1, 12).expand(1, 2, 12, 12)
    assert objectives.edge_aware_smoothness(ramp, flat) < 1e-6
    assert objectives.edge_aware_smoothness(output[..., :2, :2], flat[..., :2, :2]) == 0


def test_cells_belong_to_instances_by_their_share():
    instances = torch.zeros(1, 4, 8, dtype=torch.uint8)
    instances[:, :, 6:] = 2
    instances[:, 0, 0] = 1
    shares = objectives.instance_shares(instances, (1, 2))
    expected = [[15 / 16, 0.5], [1 / 16, 0], [0, 0.5]]
    torch.testing.assert_close(shares[0, :, 0], torch.tensor(expected))


def test_the_mask_term_falls_when_attention_stays_within_the_instance(config, cache):
    targets = TargetCache(cache, config)
    targets.fill()
    sample = samples.draw_sample(targets, np.random.default_rng(3))
    half = sample.guide.shape[-1] // 2
    sample.instances[:] = 0
    sample.instances[..., half:] = 1
    sample.guide[..., :half], sample.guide[..., half:] = 0.1, 0.9
    asked = replace(config, mask_weight=1.0, dense_weight=0.0, consistency_share=1e-9, region=64)
    torch.manual_seed(0)
    model = AnyUp(qk_dim=32, lfu_dim=16)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    found = []
    for _ in range(30):
        _, terms = objectives.training_loss(model, sample, np.random.default_rng(0), asked)
        found.append(terms["mask"])
        total, _ = objectives.training_loss(model, sample, np.random.default_rng(0), replace(asked, mask_weight=100.0))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert found[0] > 0 and found[-1] < 0.8 * found[0]
    sample.instances[:] = 0
    assert "mask" not in objectives.training_loss(model, sample, np.random.default_rng(0), asked)[1]


def pictured_halves():
    """Similarities (1, 3, 8, 8), instances and band: the right half is instance 1, instance 2 is nowhere."""
    instances = torch.zeros(1, 8, 8, dtype=torch.int64)
    instances[..., 4:] = 1
    similarities = torch.full((1, 3, 8, 8), -1.0)
    similarities[:, 0, :, :4] = similarities[:, 1, :, 4:] = 1.0
    return similarities, instances, objectives.boundary_band(instances, 2)


def test_bands_reach_as_far_as_asked():
    _, _, band = pictured_halves()
    assert band[0].sum(0).tolist() == [0, 0, 8, 8, 8, 8, 0, 0]


def test_the_segment_loss_knows_right_from_wrong():
    similarities, instances, band = pictured_halves()
    present = torch.tensor([[True, True, False]])
    right = objectives.segment_loss(similarities, instances, present, band)
    wrong = objectives.segment_loss(similarities.flip(-1), instances, present, band)
    assert right < 1e-3 and wrong > 5
    # a certain mistake over the band alone costs that half of the loss: its pixels are 1 in 2 of the whole
    at_band = torch.where(band[:, None], similarities.flip(-1), similarities)
    assert right < objectives.segment_loss(at_band, instances, present, band) < wrong
    # the one that is absent cannot win, whatever it scores
    similarities[:, 2] = 9.0
    torch.testing.assert_close(objectives.segment_loss(similarities, instances, present, band), right)


def test_the_segment_loss_needs_two_instances():
    similarities, instances, band = pictured_halves()
    similarities.requires_grad_()
    alone = torch.tensor([[True, False, False]])
    loss = objectives.segment_loss(similarities, instances, alone, band)
    assert loss == 0


def test_prototype_similarities_do_not_see_scale_nor_slivers():
    torch.manual_seed(0)
    features = torch.randn(2, 6, 4, 4)
    shares = torch.zeros(2, 3, 4, 4)
    shares[:, 0, :, :2], shares[:, 1, :, 2:] = 1.0, 1.0
    found = objectives.prototype_similarities(features, features, shares)
    torch.testing.assert_close(objectives.prototype_similarities(7 * features, 7 * features, shares), found)
    assert (found[:, 2] == 0).all() and (found[:, :2].sum(1).abs() < 1e-5).all()
    own = (found * shares).sum((1, 2, 3)) / 16
    assert (own > 0.2).all()
    torch.testing.assert_close(found[:, :2].square().mean((1, 2, 3)), torch.ones(2))


def test_the_segment_term_falls_when_it_is_trained(config, cache):
    targets = TargetCache(cache, config)
    targets.fill()
    sample = samples.draw_sample(targets, np.random.default_rng(3))
    half = sample.guide.shape[-1] // 2
    sample.instances[:] = 0
    sample.instances[..., half:] = 1
    sample.guide[..., :half], sample.guide[..., half:] = 0.1, 0.9
    asked = replace(config, segment_weight=1.0, dense_weight=0.0, main_weight=0.0, consistency_share=1e-9, region=64)
    torch.manual_seed(0)
    model = AnyUp(qk_dim=32, lfu_dim=16)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    found = []
    for _ in range(30):
        total, terms = objectives.training_loss(model, sample, np.random.default_rng(0), asked)
        found.append(terms["segment"])
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert found[0] > 0 and found[-1] < 0.8 * found[0]


def test_some_steps_show_a_quarter_of_the_pictures_in_more_pixels(config, cache):
    targets = TargetCache(cache, replace(config, batch=4, large_share=0.5))
    targets.fill()
    drawn = [samples.draw_sample(targets, np.random.default_rng(seed)).guide for seed in range(12)]
    few, many = ([guide for guide in drawn if len(guide) == count] for count in (1, 4))
    assert len(few) + len(many) == 12 and few and many
    assert max(guide[0, 0].numel() for guide in many) <= config.guide_pixels
    assert max(guide[0, 0].numel() for guide in few) <= 4 * config.guide_pixels
    assert max(guide[0, 0].numel() for guide in few) > config.guide_pixels


@pytest.mark.parametrize("seed", range(8))
def test_features_of_another_encoder_keep_what_they_tell(seed):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    low = torch.randn(2, 100, 6, 5)
    high = torch.nn.functional.interpolate(low, scale_factor=2)
    features, target = samples._as_of_another_encoder(rng, low, high)
    channels = features.shape[1]
    assert 48 <= channels <= 768 and target.shape == (2, channels, 12, 10)
    torch.testing.assert_close(target[..., ::2, ::2], features)  # each place is changed as its twin is
    shown = (features.flatten(2).mT.flatten(0, 1) - features.mean((0, 2, 3))).double()
    given = (low.flatten(2).mT.flatten(0, 1) - low.mean((0, 2, 3))).double()
    apart, before = torch.cdist(shown, shown).flatten(), torch.cdist(given, given).flatten()
    assert torch.corrcoef(torch.stack((apart, before)))[0, 1] > 0.5  # what was alike is still alike


def test_some_of_the_other_encoders_rectify():
    low = torch.randn(1, 64, 8, 8, generator=torch.Generator().manual_seed(0))
    found = [samples._as_of_another_encoder(np.random.default_rng(seed), low, low)[0] for seed in range(20)]
    rectified = [(features >= 0).all().item() for features in found]
    assert 0 < sum(rectified) < 20
    zeros = [(features == 0).float().mean().item() for features, hit in zip(found, rectified, strict=True) if hit]
    assert all(0.2 < share < 0.8 for share in zeros)


def test_an_encoder_named_twice_shares_its_targets(config, cache, tmp_path):
    again = replace(config, encoders=2 * config.encoders)
    assert TargetCache(cache, again).folder == TargetCache(cache, config).folder


def test_every_term_and_change_can_be_asked_for(config, cache, tmp_path):
    asked = replace(
        config,
        smooth_weight=1.0,
        mask_weight=1.0,
        segment_weight=0.1,
        large_share=0.5,
        variety_share=0.5,
        recolour_share=0.5,
        spot_share=0.5,
        region=40,
        degraded_share=1.0,
        noise_share=1.0,
        consistency_share=1.0,
        spread_weight=0.1,
        steps=8,
    )
    train(asked, tmp_path / "run", cache=cache)
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for term in ("mask", "segment", "smooth", "spread", "consistency", "native", "main"):
        values = [float(row[term]) for row in rows if row[term]]
        assert values and all(np.isfinite(values)) and max(values) > 0, term


def test_pictures_of_other_crops_and_shapes_have_a_cache_of_their_own(config, tmp_path):
    of_pictures = ({}, {"crop": (0.2, 1.0)}, {"shapes_share": 0.5}, {"camouflage_share": 0.5})
    folders = {
        TargetCache(tmp_path, replace(config, **change)).folder for change in (*of_pictures, {"smooth_weight": 1.0})
    }
    assert len(folders) == 4


def test_learning_rate_warms_up_and_falls():
    config = TrainConfig(scenes="x", steps=100, warmup=10, lr=1e-2)
    rates = [loop.learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(1e-3) and max(rates) == pytest.approx(1e-2)
    assert rates[-1] < 2e-4 and rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"size": 100}, "size: .* needs a multiple of 56 pixels, got 100; nearest is 112"),
        ({"size": 110}, "size: must be a multiple of 4 pixels, got 110"),
        ({"encoders": "dinov2_vits14"}, "encoders: need a tuple with at least one name, got 'dinov2_vits14'"),
        ({"encoders": ()}, "encoders: need .* at least one name"),
        ({"steps": 0}, "steps: must be at least 1, got 0"),
        ({"native_share": 1.5}, "native_share: must lie from 0 to 1, got 1.5"),
        ({"shapes_share": -1}, "shapes_share: must lie from 0 to 1, got -1"),
        ({"recolour_share": -0.1}, "recolour_share: must lie from 0 to 1, got -0.1"),
        ({"spot_share": 1.1}, "spot_share: must lie from 0 to 1, got 1.1"),
        ({"camouflage_share": 2}, "camouflage_share: must lie from 0 to 1, got 2"),
        ({"crop": (0.9, 0.2)}, "crop: need the least and the greatest share, .* got .0.9, 0.2."),
        ({"max_cells": 4}, "max_cells: must be at least 8, got 4"),
        ({"init": "anyup_best"}, "weights: no checkpoint is called 'anyup_best'"),
        ({"lr": 2.0}, "lr: must lie between 0 and 1"),
        ({"encoders": ("dinov2_vits15",)}, "unknown encoder name 'dinov2_vits15'"),
    ],
)
def test_bad_settings_are_named(config, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        train(replace(config, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "nothing was computed"


def test_more_bad_arguments_are_named(config, tmp_path):
    with pytest.raises(ValueError, match="save_every: must be at least 1, got 0"):
        train(config, tmp_path, save_every=0)
    for until in (0, config.steps + 1):
        with pytest.raises(ValueError, match=f"until: must lie between 1 and steps, 6, got {until}"):
            train(config, tmp_path, until=until)
    with pytest.raises(FileNotFoundError, match="scenes: no folder .*nowhere"):
        train(replace(config, scenes=str(tmp_path / "nowhere")), tmp_path)
    with pytest.raises(ValueError, match="encoders: .*:7 must name a layer from 1 to 2, or its negative"):
        train(replace(config, encoders=(f"{config.encoders[0]}:7",)), tmp_path)
    assert list(tmp_path.rglob("*.*")) == []


def test_a_layer_can_be_chosen_with_the_encoder():
    assert name_and_layer("dinov2_vits14") == ("dinov2_vits14", -1)
    assert name_and_layer("dinov2_vits14:9") == ("dinov2_vits14", 9)
    assert name_and_layer("hf:folder/model:-2") == ("hf:folder/model", -2)


def test_an_exploding_loss_stops_the_run(config, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(objectives, "feature_loss", lambda output, *rest: output.mean() * torch.nan)
    with pytest.raises(RuntimeError, match="step 0: the gradient is nan; lower lr"):
        train(config, tmp_path, cache=cache)


def test_square_distance_of_a_look_at_one_cell():
    """Attention on the cell (2, 4) alone, seen from every pixel of a region."""
    features, rows, cols = torch.zeros(1, 5, 4, 6), slice(3, 9), slice(10, 20)
    places, square_distance = objectives._places(features, (16, 24), rows, cols)
    seen = places[:, :, 2, 4][:, :, None, None].expand(1, 3, 6, 10)
    pixel_rows, pixel_cols = (torch.arange(3, 9) + 0.5) / 4, (torch.arange(10, 20) + 0.5) / 4
    expected = (2.5 - pixel_rows[:, None]) ** 2 + (4.5 - pixel_cols) ** 2
    torch.testing.assert_close(square_distance(seen)[0], expected)
