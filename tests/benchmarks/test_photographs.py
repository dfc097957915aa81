"""Photographs out of Qt resource files: files made here by the format's layout, as the package's are."""

import io
import struct
import zlib
from importlib.util import module_from_spec, spec_from_file_location

import numpy as np
import pytest
from PIL import Image
from tree import ROOT

SCRIPT = ROOT / "benchmarks" / "photographs.py"
if not SCRIPT.is_file():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)
spec = spec_from_file_location("photographs", SCRIPT)
photographs = module_from_spec(spec)
spec.loader.exec_module(photographs)


def write_resource(path, files, version=3):
    """A Qt resource file with one folder "resource" of `files` {name: (flags, bytes as they are kept)}."""
    names, data, tree = b"", b"", []
    stamp = b"" if version == 1 else bytes(8)

    def named(text):
        nonlocal names
        at = len(names)
        names += struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")
        return at

    tree.append(struct.pack(">IHII", 0, 2, 1, 1) + stamp)
    tree.append(struct.pack(">IHII", named("resource"), 2, len(files), 2) + stamp)
    for name, (flags, content) in files.items():
        tree.append(struct.pack(">IHHHI", named(name), flags, 0, 0, len(data)) + stamp)
        data += struct.pack(">I", len(content)) + content
    head = 20 if version < 3 else 24
    at = head + len(data), head, head + len(data) + len(b"".join(tree))
    path.write_bytes(b"qres" + struct.pack(">4I", version, *at) + bytes(head - 20) + data + b"".join(tree) + names)


def picture(size, kind="png", alpha=None):
    """An encoded picture of noise (width, height), opaque unless `alpha` says otherwise."""
    pixels = np.random.default_rng(0).integers(256, size=(size[1], size[0], 4), dtype=np.uint8)
    pixels[..., 3] = 255
    if alpha is not None:
        pixels[: size[1] // 2, :, 3] = alpha
    kept = Image.fromarray(pixels if alpha is not None else pixels[..., :3])
    buffer = io.BytesIO()
    kept.save(buffer, kind, **({"lossless": True} if kind == "webp" else {}))
    return buffer.getvalue()


def packed(content):
    return struct.pack(">I", len(content)) + zlib.compress(content)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_files_of_a_resource_file(tmp_path, version):
    write_resource(tmp_path / "a.rcc", {"plain.txt": (0, b"as it is"), "zipped": (1, packed(b"x" * 999))}, version)
    found = dict(photographs.resource_files(tmp_path / "a.rcc"))
    assert found == {"/resource/plain.txt": b"as it is", "/resource/zipped": b"x" * 999}


def test_refuses_what_it_cannot_read(tmp_path):
    (tmp_path / "b.rcc").write_bytes(b"RIFFsomething else")
    with pytest.raises(ValueError, match="not a Qt resource file"):
        list(photographs.resource_files(tmp_path / "b.rcc"))
    write_resource(tmp_path / "c.rcc", {"z": (4, b"?")})
    with pytest.raises(ValueError, match="/resource/z is compressed by zstd"):
        list(photographs.resource_files(tmp_path / "c.rcc"))
    write_resource(tmp_path / "d.rcc", {"zipped": (1, packed(b"x" * 999))})
    (tmp_path / "d.rcc").write_bytes((tmp_path / "d.rcc").read_bytes()[:-30])
    with pytest.raises(ValueError, match="damaged or cut off"):
        list(photographs.resource_files(tmp_path / "d.rcc"))


def test_writes_photographs_alone(tmp_path, capsys):
    package, out = tmp_path / "package", tmp_path / "out"
    package.mkdir()
    for activity in photographs.ACTIVITIES:
        write_resource(package / f"{activity}.rcc", {"text.qml": (0, b"{}")})
    kept = picture((300, 260), "webp")
    files = {
        "cow_background.webp": kept,
        "small.png": picture((300, 240)),
        "cut.png": picture((300, 300), alpha=0),
        "opaque.png": picture((300, 300), alpha=255),
    }
    write_resource(package / "erase.rcc", {name: (0, content) for name, content in files.items()})
    write_resource(package / "louis-braille.rcc", {"chart.png": (0, picture((300, 300)))})
    write_resource(package / "another.rcc", {"cow.webp": (0, kept)})
    assert photographs.main([str(package), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"2 photographs in {out}\n"
    assert sorted(path.name for path in out.iterdir()) == ["gcompris_erase_cow.jpg", "gcompris_erase_opaque.jpg"]
    assert Image.open(out / "gcompris_erase_cow.jpg").size == (300, 260)


def test_a_folder_without_the_package(tmp_path, capsys):
    assert photographs.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "unpack gcompris-qt-data" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
