"""`anyup-fast fit-head`: from pictures with masks to a head that `batch` applies."""

import json

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import anyup_fast
from anyup_fast import cli
from anyup_fast.heads import read_head, save_head
from anyup_fast.labelled import Folder, Judged, find_labelled, fit_folder, split

pytest.importorskip("transformers")


def paint(folder, masks, name, seed, size=(56, 84)):
    """A picture of two halves, and its mask: left 0, right 1, a strip between them that counts for nothing."""
    rng = np.random.default_rng(seed)
    edge = int(rng.integers(30, 54))
    picture = np.full((*size, 3), (40, 60, 160), np.uint8)
    picture[:, edge:] = (200, 180, 40)
    picture = (picture + rng.integers(-30, 31, picture.shape)).clip(0, 255).astype(np.uint8)
    mask = np.zeros(size, np.uint8)
    mask[:, edge:] = 1
    mask[:, edge - 1 : edge + 1] = 255
    for place, array in ((folder / f"{name}.png", picture), (masks / f"{name}.png", mask)):
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(place)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of five pictures and their masks, and the options that choose encoder and weights."""
    root = tmp_path_factory.mktemp("labelled")
    for number in range(5):
        paint(root / "pictures", root / "masks", f"{'ab'[number % 2]}/{number}", number)
    encoder = tiny.encoder_folder(root / "encoder")
    weights = tiny.checkpoint(root / "model.safetensors")
    return root, ["--encoder", encoder, "--weights", str(weights), "--device", "cpu", "--size", "56"]


@pytest.fixture
def fit(made, capsys, tmp_path):
    """Run the command on the pictures: exit code, standard output and standard error; the head's path."""
    root, options = made

    def call(*arguments, pictures=None, masks=None):
        given = (pictures or root / "pictures", "--masks", masks or root / "masks", *arguments)
        code = cli.main([str(part) for part in ("fit-head", *given, "--out", tmp_path / "head.safetensors", *options)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.mark.parametrize("kind", ["prototype", "linear"])
def test_a_head_is_written_judged_and_applied_by_batch(made, fit, tmp_path, kind):
    pytest.importorskip("filelock")
    if kind == "linear":
        pytest.importorskip("sklearn")
    root, options = made
    (tmp_path / "names.txt").write_text("sea\nsand\n")
    code, printed, err = fit("--kind", kind, "--held-out", "0.4", "--classes", tmp_path / "names.txt")
    assert code == 0, err
    assert "5 pictures with masks" in printed and "IoU of 2 held-out pictures, 3 were fitted:" in printed
    head = read_head(tmp_path / "head.safetensors")
    assert head.classes == ("sea", "sand") and head.kind == kind and head.encoder == options[1]
    scores = {line.split()[0]: float(line.split()[1]) for line in printed.splitlines() if line.startswith("  s")}
    assert set(scores) == {"sea", "sand"} and min(scores.values()) > 0.8
    assert f"  mean  {np.mean(list(scores.values())):.3f}"[:12] in printed
    arguments = ["batch", root / "pictures", tmp_path / "out", "--kind", "labels", "--format", "png", "--workers", "0"]
    assert cli.main([str(p) for p in (*arguments, "--head", tmp_path / "head.safetensors", *options)]) == 0
    archive = anyup_fast.open(tmp_path / "out")
    assert len(archive) == 5 and archive.classes("a/0.png") == ("sea", "sand")
    for name in archive:
        mask = torch.from_numpy(np.array(Image.open(root / "masks" / name)))
        right = (archive[name].full() == mask)[mask != 255]
        assert right.float().mean() > 0.85


def test_a_single_picture_is_judged_by_blocks_of_itself(made, fit, tmp_path):
    code, printed, err = fit("--held-out", "0.5", pictures=made[0] / "pictures" / "a", masks=made[0] / "masks" / "a")
    assert code == 0 and "held-out pictures, " in printed, err
    one = made[0] / "pictures" / "a" / "0.png"
    code, printed, err = fit("--held-out", "0.5", pictures=one, masks=made[0] / "masks" / "a")
    assert code == 0 and "on held-out blocks of 32x32 pixels of the only picture" in printed, err
    code, printed, _ = fit("--held-out", "0", pictures=one, masks=made[0] / "masks" / "a")
    assert code == 0 and "IoU" not in printed and (tmp_path / "head.safetensors").exists()


def test_held_out_pictures_are_not_fitted_to(made):
    root, _ = made
    labelled, bare = find_labelled(root / "pictures", root / "masks")
    assert [one.source.name for one in labelled] == ["a/0.png", "a/2.png", "a/4.png", "b/1.png", "b/3.png"]
    assert bare == []
    asked = []

    class Spied(Folder):
        def prepared(self, source):
            asked.append(source.name)
            return super().prepared(source)

    encoder = anyup_fast.encoders.load_encoder(made[1][1])
    folder = Spied(encoder, size=56, weights=str(root / "model.safetensors"))
    head, judged = fit_folder(labelled, folder, held_out=0.4)
    assert sorted(asked) == [one.source.name for one in labelled] and set(asked[:3]).isdisjoint(asked[3:])
    assert judged.counts.sum() == sum(
        (np.asarray(Image.open(root / "masks" / name)) != 255).sum() for name in asked[3:]
    )
    assert [len(part) for part in split(labelled, 0.01, 0)] == [4, 1] and split(labelled, 0, 0) == (labelled, [])
    assert split(labelled, 0.4, 1) != split(labelled, 0.4, 0)


def test_figures_are_told_in_lines():
    judged = Judged(np.array([[3, 1, 0], [1, 3, 0], [0, 0, 0]]), ("sea", "<b>", "c"), "of two")
    lines = ["IoU of two:", "  sea  0.600", "  <b>  0.600", "  c    not there", "  mean  0.600"]
    assert [line.split() for line in judged.lines()] == [line.split() for line in lines]
    assert judged.mean == pytest.approx(0.6)


def test_bad_masks_are_named_before_any_work(made, fit, tmp_path):
    masks = tmp_path / "masks"
    for number, (content, _) in enumerate(
        [(np.zeros((56, 84, 3), np.uint8), 0), (np.full((56, 84), 9, np.uint8), 0), (np.zeros((56, 56), np.uint8), 0)]
    ):
        place = masks / f"{'ab'[number % 2]}/{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(content).save(place)
    (masks / "b" / "3.png").write_bytes(b"no picture")
    (tmp_path / "names.json").write_text(json.dumps(["a", "b"]))
    code, _, err = fit("--classes", tmp_path / "names.json", masks=masks)
    assert code == 1 and "masks: 4 of 4 are bad" in err
    for words in (
        "0.png has the mode RGB",
        "1.png: classes are numbers from 0 to 1",
        "2.png: its 56x56 pixels",
        "3.png",
    ):
        assert words in err
    assert not (tmp_path / "head.safetensors").exists()


def test_another_size_of_a_mask_is_told(made, fit, tmp_path):
    root, _ = made
    for number in (0, 2):
        place = tmp_path / "masks" / f"{number}.png"
        place.parent.mkdir(exist_ok=True)
        Image.open(root / "masks" / "a" / f"{number}.png").resize((168, 112), Image.Resampling.NEAREST).save(place)
    code, printed, err = fit(pictures=root / "pictures" / "a", masks=tmp_path / "masks")
    assert code == 0 and "0.png has 112x168 pixels, its picture 56x84" in printed + err
    assert "2 pictures with masks; 1 without a mask are left out, such as 4.png" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--held-out", "1"], "held_out: need a share"),
        (["--classes", "none.txt"], "classes: there is no file"),
        (["--masks", "nowhere"], "masks: there is no folder"),
        (["--out", "head.pt"], "--out: the file must end in .safetensors"),
        (["--samples", "0"], "samples: need a positive number"),
        (["--prompts", "a cat", "a dog"], "has no tower for texts"),
    ],
)
def test_what_does_not_fit_is_refused(made, capsys, tmp_path, arguments, words):
    root, options = made
    given = ["fit-head", root / "pictures", "--masks", root / "masks", "--out", tmp_path / "h.safetensors", *options]
    assert cli.main([str(part) for part in (*given, *arguments)]) == 1
    assert words in capsys.readouterr().err


def test_pictures_and_masks_go_together(made, capsys, tmp_path):
    root, options = made
    out = ["--out", tmp_path / "h.safetensors", *options]
    for given, words in (
        ([root / "pictures"], "go together"),
        ([], "name PICTURES and --masks FOLDER, or --prompts"),
        ([root / "masks", "--masks", root / "masks"], "put the masks into one of their own"),
        ([root / "pictures", "--masks", root / "encoder"], "none of the 5 pictures has one"),
    ):
        assert cli.main([str(part) for part in ("fit-head", *given, *out)]) == 1
        assert words in capsys.readouterr().err


def test_a_head_of_another_encoder_is_told_by_batch(made, tmp_path, capsys):
    root, options = made
    save_head(tmp_path / "h.safetensors", torch.randn(2, 32), classes=["a", "b"], encoder="clip_vitb16")
    arguments = ["batch", root / "pictures" / "b", tmp_path / "out", "--kind", "labels", "--workers", "0"]
    assert cli.main([str(part) for part in (*arguments, "--head", tmp_path / "h.safetensors", *options)]) == 0
    assert "'clip_vitb16'" in (text := capsys.readouterr().out) and repr(options[1]) in text
