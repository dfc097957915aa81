"""What counts as a picture: folders, lists and globs as they really are."""

import logging
import os
import shutil
import sys
from pathlib import Path

import pytest
import tiny
from datasets import encoded, fill, picture
from PIL import Image

import anyup_fast
from anyup_fast import cli, formats
from anyup_fast.batch import listing, open_archive, outputs, run, sources
from anyup_fast.batch.settings import Settings

pytest.importorskip("transformers")
pytest.importorskip("filelock")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    weights = tiny.checkpoint(root / "anyup.safetensors")
    return {"encoder": tiny.encoder_folder(root / "encoder"), "weights": weights, "size": 56, "workers": 0}


def put(place, content=None):
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(encoded(picture(1)) if content is None else content)
    return place


def names(found):
    return [source.name for source in found]


COMPANIONS = (
    "._a.png", ".hidden.png", ".thumbnails/a.png", ".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/a.png",
    "sub/@eaDir/a.png/SYNOPHOTO_THUMB_M.png", "$RECYCLE.BIN/a.png", ".Trash-1000/files/a.png",
)  # fmt: skip


def test_companions_are_left_out(tmp_path):
    for name in ("a.png", "sub/b.png", *COMPANIONS):
        put(tmp_path / "in" / name)
    found, left = sources.survey(tmp_path / "in")
    assert names(found) == ["a.png", "sub/b.png"]
    assert sum(left.values()) >= 7 and not any(meant for meant, _ in left.lines())
    assert names(sources.find_sources(str(tmp_path / "in" / "**" / "*.png"))) == ["a.png", "sub/b.png"]
    hidden = put(tmp_path / ".cache" / "c.png").parent  # where the user names it, it is meant
    assert names(sources.find_sources(hidden)) == ["c.png"]
    assert names(sources.find_sources(tmp_path / "in" / ".hidden.png")) == [".hidden.png"]


@pytest.mark.parametrize("suffix", [".gif", ".jfif", ".jp2", ".avif", ".tga", ".ppm", ".JPG", ".ico", ".pcx"])
def test_suffixes_that_pillow_reads_are_taken(tmp_path, suffix):
    if suffix.lower() not in formats.picture_suffixes():
        pytest.skip("this Pillow is built without it")
    kind = {".jfif": "jpeg", ".jpg": "jpeg", ".jp2": "jpeg2000"}.get(suffix.lower(), suffix[1:].lower())
    put(tmp_path / f"a{suffix}", encoded(picture(2, (64, 64)), kind))
    assert names(sources.find_sources(tmp_path)) == [f"a{suffix}"]
    assert anyup_fast.load_image(tmp_path / f"a{suffix}").shape[0] == 3


def test_what_is_left_out_is_counted_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "picture_suffixes", lambda: {".png", ".jpg"})
    for name in ("a.png", "1.heic", "2.HEIC", "x.jxl", "raw.CR2", "d.svg", "m.json", "n", "v.mp4", "p.jpg.part"):
        put(tmp_path / name, b"nothing")
    found, left = sources.survey(tmp_path)
    assert names(found) == ["a.png"]
    (first, told), (second, rest) = left.lines()
    assert (first, second) == (True, False)
    for text in ("2 .heic (pip install pillow-heif)", "1 .jxl (pip install", "1 .cr2 (camera raw", "1 .svg (drawings"):
        assert text in told
    for text in ("1 .json (no picture)", "1 without suffix (no picture)", "1 .mp4 (a video: name it as the input"):
        assert text in rest
    assert "1 .part (unfinished downloads)" in told
    with pytest.raises(FileNotFoundError, match="holds no pictures.*left out: .*pillow-heif"):
        shutil.move(tmp_path / "a.png", tmp_path / "a.dat")
        sources.survey(tmp_path)


def test_heic(tmp_path, monkeypatch):
    place = put(tmp_path / "a.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500))
    if not formats.find_spec("pillow_heif"):
        with pytest.raises(ValueError, match="is HEIC, which needs a package: pip install pillow-heif"):
            anyup_fast.load_image(place)
        return
    formats.add_openers()
    picture(3).save(place, format="HEIF")
    assert names(sources.find_sources(tmp_path)) == ["a.heic"]
    assert anyup_fast.load_image(place).shape == (3, 60, 76)


def frames(path, count, **options):
    images = [picture(seed) for seed in range(count)]
    images[0].save(path, save_all=True, append_images=images[1:], **options)
    return path


def test_pages_are_told_by_number_or_taken(tmp_path, parts, caplog):
    data = tmp_path / "in"
    data.mkdir()
    kinds = {"stack.tif": 10, "moving.webp": 5, "moving.gif": 3, "moving.png": 4}
    for name, count in kinds.items():
        frames(data / name, count)
    put(data / "one.png")
    frames(data / "phone.jpg", 2, format="MPO")  # a preview beside the picture, as phones write it
    with caplog.at_level(logging.WARNING, "anyup_fast"):
        assert run(data, tmp_path / "out", **parts).complete
    told = [record.getMessage() for record in caplog.records]
    for name, count in kinds.items():
        assert f"{name}: has {count} pages or frames, of which the first is taken; --pages takes all" in told
    assert len(told) == len(kinds)
    assert open_archive(tmp_path / "out").record("stack.tif")["source"]["frames"] == 10
    summary = run(data, tmp_path / "all", pages=True, **parts)
    assert summary.done == sum(kinds.values()) + 2
    archive = open_archive(tmp_path / "all")
    assert archive.record("stack.tif/frame-00000009")["source"]["page"] == 9
    first, last = (archive[f"moving.gif/frame-0000000{n}"].full() for n in (0, 2))
    assert not first.equal(last)


@pytest.mark.filterwarnings("error")
def test_load_image_tells_of_pages_and_is_silent_otherwise(tmp_path):
    for name, count in (("a.tif", 3), ("a.gif", 2), ("a.webp", 4)):
        with pytest.warns(UserWarning, match=f"{name}' has {count} pages or frames, of which the first is taken"):
            anyup_fast.load_image(frames(tmp_path / name, count))
    for name, options in (("b.gif", {}), ("b.tif", {}), ("b.jpg", {"format": "MPO"})):
        anyup_fast.load_image(frames(tmp_path / name, 2 if options else 1, **options))
    thumbnail = Image.new("RGB", (8, 8))
    thumbnail.encoderinfo = {"tiffinfo": {254: 1}}
    picture(1).save(tmp_path / "c.tif", save_all=True, append_images=[thumbnail])
    with Image.open(tmp_path / "c.tif") as opened:
        assert opened.n_frames == 2
    anyup_fast.load_image(tmp_path / "c.tif")


LISTS = {
    "plain": b"sub/a.png\nsub/b.png\n",
    "byte order mark, CR LF": "\ufeffsub/a.png\r\nsub/b.png\r\n".encode(),
    "UTF-16": "sub/a.png\r\nsub/b.png\r\n".encode("utf-16"),
    "UTF-16 without mark": "sub/a.png\r\nsub/b.png\r\n".encode("utf-16-le"),
    "UTF-16, big end first": b"\xfe\xff" + "sub/a.png\nsub/b.png\n".encode("utf-16-be"),
    "backslashes": b"sub\\a.png\r\nsub\\b.png\r\n",
    "quotes": b'"sub\\a.png"\r\n"sub/b.png"\r\n',
    "old Mac": b"# two\rsub/a.png\r\rsub/b.png",
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_other_systems(tmp_path, kind):
    for name in ("a", "b"):
        put(tmp_path / "sub" / f"{name}.png")
    (tmp_path / "list.txt").write_bytes(LISTS[kind])
    found = sources.find_sources(tmp_path / "list.txt")
    assert names(found) == ["sub/a.png", "sub/b.png"] and all(Path(source.path).is_file() for source in found)


def test_names_in_lists_that_are_not_of_this_code_page(tmp_path):
    put(tmp_path / "für.png")
    put(tmp_path / "back\\slash.png")
    (tmp_path / "list.txt").write_bytes("für.png\r\nback\\slash.png\r\nnone\\there.png".encode("cp1252"))
    assert names(sources.find_sources(tmp_path / "list.txt")) == ["für.png", "back\\slash.png", "none\\there.png"]


def test_results_and_pictures_in_one_place(tmp_path, parts):
    data = fill(tmp_path / "in", 2)
    for given in (data, str(data / "*.png"), f"{data}/"):
        with pytest.raises(ValueError, match="output: .* is the folder of the pictures.*name another"):
            run(given, data, kind="pca", **parts)
    for _ in range(2):  # below it
        assert run(data, data / "out", kind="pca", **parts).total == 2
    assert run(data, data / "more", kind="pca", **parts).total == 2, "results of another run are no pictures"
    place = tmp_path / "up" / "in"  # above it, with names that lead back into it
    put(place / "in" / "a.png")
    put(place / "b.png")
    run(place, tmp_path / "up", kind="pca", **parts)
    assert names(sources.find_sources(place, tmp_path / "up")) == ["b.png", "in/a.png"]


def test_brackets_in_folders_are_letters(tmp_path):
    put(tmp_path / "photos [2024]" / "a.png")
    put(tmp_path / "photos [2024]" / "b.txt")
    place = tmp_path / "photos [2024]"
    for given in (place, str(place / "*.png"), str(place / "*"), place / "a.png"):
        assert names(sources.find_sources(given)) == ["a.png"]


@pytest.mark.parametrize("kind", ["features", "labels"])
def test_long_names_are_cut_and_listed(tmp_path, kind):
    long = "é" * 120 + ".png"  # 244 bytes
    settings = Settings(kind=kind, format="npy", dtype="int8")
    paths = outputs.paths_of(f"{'d' * 250}/{long}", settings, 143)
    assert all(len(os.fsencode(part)) <= 143 for path in paths for part in path.split("/"))
    assert paths[0].startswith("d" * 126 + "~") and len(set(paths)) == len(settings.storage)
    assert paths != outputs.paths_of(f"{'d' * 250}/{long[1:]}", settings, 143)
    assert outputs.paths_of("a/b.png", settings)[0] == "a/b.png.npy"
    assert outputs.paths_of("head", Settings())[0] != "head.safetensors"


@pytest.mark.parametrize("version", [2, 3])
def test_zarr_formats(tmp_path, parts, version):
    pytest.importorskip("zarr")
    data = fill(tmp_path / "in", 3)
    given = {"format": "zarr", "zarr_format": version, **parts}
    run(data, tmp_path / "out", **given)
    store = tmp_path / "out" / "store.zarr"
    assert (store / "000.png" / ".zarray").exists() == (version == 2)
    assert (store / "inner" / (".zgroup" if version == 2 else "zarr.json")).exists()
    assert open_archive(tmp_path / "out")["inner/002.webp"].full().shape[0] == 32
    assert run(data, tmp_path / "out", **given).skipped == 3
    with pytest.raises(ValueError, match="zarr_format"):
        run(data, tmp_path / "out", **{**given, "zarr_format": 5 - version})


def test_outputs_lie_on_the_picture(tmp_path, parts):
    data = tmp_path / "in"
    data.mkdir()
    picture(0, (75, 101)).save(data / "a.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(1, (75, 101)).save(data / "b.jpg", exif=turned)
    for batch_size in (1, 2):
        out = tmp_path / f"out{batch_size}"
        run(data, out, output_size=75, batch_size=batch_size, **parts)
        archive = open_archive(out)
        assert archive["a.png"].output_size == (75, 101) and archive["b.jpg"].output_size == (101, 75)
        assert archive.record("a.png")["source"]["size"] == [75, 101]
        assert "orientation" not in archive.record("a.png")["source"]
        source = archive.record("b.jpg")["source"]
        assert (source["size"], source["orientation"]) == ([75, 101], 6)


def test_a_run_of_the_former_version_goes_on_as_it_began(tmp_path, parts):
    data = fill(tmp_path / "in", 3)
    run(data, tmp_path / "out", output_size=40, aspect="resized", **parts)
    manifest = tmp_path / "out" / "manifest.jsonl"
    former = manifest.read_text().replace(', "aspect": "resized"', "")
    from anyup_fast.batch.manifest import Manifest, settings_digest

    (old,) = Manifest(tmp_path / "out").settings
    (described,) = Manifest(tmp_path / "out").settings.values()
    described.pop("aspect")
    manifest.write_text(former.replace(old, settings_digest(described)))
    assert run(data, tmp_path / "out", output_size=40, **parts).skipped == 3
    before = open_archive(tmp_path / "out")["000.png"].output_size
    (tmp_path / "out" / "000.png.safetensors").unlink()
    assert run(data, tmp_path / "out", output_size=40, **parts).done == 1
    assert open_archive(tmp_path / "out")["000.png"].output_size == before == (40, 50)
    run(data, tmp_path / "new", output_size=40, **parts)
    assert open_archive(tmp_path / "new")["000.png"].output_size == (40, 51)


def test_a_second_run_of_pca_goes_on(tmp_path, parts):
    data = fill(tmp_path / "in", 3)
    run(data, tmp_path / "out", kind="pca", **parts)
    assert run(data, tmp_path / "out", kind="pca", **parts).skipped == 3


@pytest.mark.parametrize("given", [{"output_size": 9_999_999}, {"output_size": (70_000, 70_000)}, {"size": 9_999_999}])
def test_sizes_beyond_reason_are_refused_before_the_work(tmp_path, parts, given):
    data = fill(tmp_path / "in", 1)
    with pytest.raises(ValueError, match="output_size: .* takes .*[MGT]B of memory|size: .* pixels and more"):
        run(data, tmp_path / "out", **{**parts, **given})
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes there")
@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_console_that_can_not_print_a_name(tmp_path, parts, monkeypatch, encoding):
    data = tmp_path / "in"
    for name in ("写真.png".encode(), b"caf\xe9.png"):
        put(Path(os.fsdecode(os.fsencode(data) + b"/" + name)), b"no picture")
    put(data / "a.png")
    with open(tmp_path / "printed", "w", encoding=encoding) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        command = ["batch", str(data), str(tmp_path / "out"), "--size", "56", "--workers", "0"]
        code = cli.main([*command, "--encoder", parts["encoder"], "--weights", str(parts["weights"])])
    monkeypatch.undo()
    printed = (tmp_path / "printed").read_text(encoding=encoding)
    assert code == 3 and "2 failed:" in printed and "Logging error" not in printed
    assert sorted(open_archive(tmp_path / "out").failed) == ["caf\udce9.png", "写真.png"]
