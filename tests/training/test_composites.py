"""Composites: the split, the pasting, the masks."""

import numpy as np
import pytest
import tiny
from PIL import Image

from anyup_fast.training.composites import Pictures, composite, find_pictures, is_held_out

HELD_OUT = ["grave", "tree"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return find_pictures(*tiny.picture_folders(tmp_path_factory.mktemp("pictures")))


def test_families_of_pictures_stay_on_one_side():
    for word in ("frog", "grave", "deer", "guitar", "747", "owl"):
        family = [word, f"{word}-1", f"{word}_2", f"017_{word}", word.upper(), f"{word}-a", f"folder/{word}"]
        assert len({is_held_out(f"{name}.png") for name in family}) == 1


def test_the_split_never_changes():
    names = ["frog", "owl", "grave", "cat", "boat", "747", "tree", "000000000139", "000000000785"]
    assert [name for name in names if is_held_out(f"{name}.png")] == HELD_OUT


def test_about_a_fifth_is_held_out():
    names = ["".join(chr(97 + int(d)) for d in str(n)) + "x.png" for n in range(2000)]
    assert 0.16 < np.mean([is_held_out(name) for name in names]) < 0.25


def test_the_two_sides_are_disjoint_and_complete(tmp_path):
    scenes, stamps = tiny.picture_folders(tmp_path, scenes=10, stamps=10)
    whole, kept, rest = (find_pictures(scenes, stamps, held_out=side) for side in (None, True, False))
    assert whole.scenes and not set(kept.scenes) & set(rest.scenes)
    assert sorted(kept.scenes + rest.scenes) == list(whole.scenes)
    assert sorted(kept.stamps + rest.stamps) == list(whole.stamps)


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="scenes: no folder .*nowhere"):
        find_pictures(tmp_path / "nowhere")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(FileNotFoundError, match="scenes: no pictures below"):
        find_pictures(tmp_path)
    tiny.photograph(tmp_path / "scene.JPG")
    with pytest.raises(FileNotFoundError, match="stamps: no folder"):
        find_pictures(tmp_path, tmp_path / "stamps")
    assert find_pictures(str(tmp_path)) == Pictures((tmp_path / "scene.JPG",))
    side = is_held_out("scene.JPG")
    with pytest.raises(FileNotFoundError, match="scenes: none of the pictures .*kept for evaluation"):
        find_pictures(tmp_path, held_out=not side)


def test_composites_repeat_under_a_seed(pictures):
    first, again = (composite(pictures, np.random.default_rng(7), 64) for _ in range(2))
    other = composite(pictures, np.random.default_rng(8), 64)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize("seed", range(5))
def test_the_mask_is_where_the_cutout_is_half_opaque(tmp_path, seed):
    stamp = tiny.cutout(tmp_path / "stamp.png")
    pictures = []
    for grey in (0, 255):
        Image.new("L", (90, 90), grey).save(tmp_path / f"{grey}.png")
        scene = Pictures((tmp_path / f"{grey}.png",), (stamp,))
        pictures.append(composite(scene, np.random.default_rng(seed), 100, stamps=(1, 1)))
    (on_black, instances), (on_white, again) = pictures
    assert np.array_equal(instances, again) and set(np.unique(instances)) == {0, 1}
    # Black shows through as 0, white as 255 less the opacity; each picture is rounded once.
    opacity = 255 - (on_white.astype(int) - on_black).mean(-1)
    assert opacity[instances == 1].min() > 126 and opacity[instances == 0].max() < 130
    assert opacity.max() == 255 and opacity.min() == 0


def test_the_last_cutout_covers_the_others(tmp_path, pictures):
    found = [composite(pictures, np.random.default_rng(seed), 96, stamps=(3, 3))[1] for seed in range(8)]
    assert {3} <= set(np.unique(found)) <= {0, 1, 2, 3}
    assert any(len(np.unique(instances)) == 4 for instances in found)


@pytest.mark.parametrize("seed", range(4))
def test_drawn_shapes_are_filled_from_photographs_and_masked_exactly(tmp_path, seed):
    for name, colour in (("black", 0), ("white", 255)):
        Image.new("RGB", (64, 64), (colour,) * 3).save(tmp_path / f"{name}.png")
    white = Pictures((tmp_path / "white.png",))
    picture, instances = composite(white, np.random.default_rng(seed), 64, (3, 3), shapes=1.0)
    assert instances.any() and set(np.unique(instances)) <= {0, 1, 2, 3} and (picture == 255).all()
    both = Pictures((tmp_path / "white.png", tmp_path / "black.png"))
    picture, instances = composite(both, np.random.default_rng(seed), 64, (3, 3), shapes=1.0)
    for index in np.unique(instances):
        # Away from its soft outline an instance has the colour of one photograph.
        inside = np.pad(instances, 1, mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(inside, (3, 3))
        pixels = picture[(windows == index).all((2, 3))]
        assert len(pixels) == 0 or (pixels == pixels[0]).all()


@pytest.mark.parametrize("seed", range(4))
def test_camouflage_brings_a_cutout_near_its_ground_and_keeps_its_mask(tmp_path, seed):
    stamp = np.full((40, 40, 4), 255, np.uint8)
    stamp[:, :20, :3] = 200
    stamp[0, 0, 3] = 0  # an outline
    Image.fromarray(stamp).save(tmp_path / "stamp.png")
    Image.new("RGB", (64, 64), (90, 60, 30)).save(tmp_path / "scene.png")
    pictures = Pictures((tmp_path / "scene.png",), (tmp_path / "stamp.png",))
    plain, instances = composite(pictures, np.random.default_rng(seed), 64, (1, 1))
    again, same = composite(pictures, np.random.default_rng(seed), 64, (1, 1), camouflage=1.0)
    assert (instances == same).all() and instances.any()
    assert (plain[instances == 0] == again[instances == 0]).mean() > 0.9
    ground = np.array((90, 60, 30))
    before, after = (np.abs(p[instances == 1].mean(0) - ground) for p in (plain, again))
    assert (after <= 0.55 * before).all()
    assert again[instances == 1][:, 0].std() > 5  # of 27: its own contrast stays visible


def test_no_stamps_leave_the_photograph_alone(pictures):
    picture, instances = composite(Pictures(pictures.scenes), np.random.default_rng(0), 64)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    assert not instances.any()


@pytest.mark.parametrize(
    "mode, colour, message",
    [("RGB", (1, 2, 3), "is opaque everywhere"), ("RGBA", (1, 2, 3, 0), "has no opaque part")],
)
def test_stamps_without_an_outline_are_named(tmp_path, pictures, mode, colour, message):
    Image.new(mode, (20, 20), colour).save(tmp_path / "stamp.png")
    with pytest.raises(ValueError, match=f"stamps: .*stamp.png {message}"):
        composite(Pictures(pictures.scenes, (tmp_path / "stamp.png",)), np.random.default_rng(0), 64, stamps=(1, 1))


@pytest.mark.parametrize("content", [b"", b"no picture", "truncated"])
def test_unreadable_pictures_are_named(tmp_path, pictures, content):
    whole = tiny.cutout(tmp_path / "whole.png", size=(90, 90)).read_bytes()
    path = tmp_path / "damaged.png"
    path.write_bytes(whole[: len(whole) // 2] if content == "truncated" else content)
    with pytest.raises(ValueError, match="scenes: .*damaged.png cannot be read .*; mend or remove it"):
        composite(Pictures((path,)), np.random.default_rng(0), 64)
    with pytest.raises(ValueError, match="stamps: .*damaged.png cannot be read"):
        composite(Pictures(pictures.scenes, (path,)), np.random.default_rng(0), 64, stamps=(1, 1))
