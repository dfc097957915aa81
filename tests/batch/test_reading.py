"""Pictures decoded by processes: the same as decoded here, and by processes that do without PyTorch."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from anyup_fast.batch import serving
from anyup_fast.batch.decoding import Decoders
from anyup_fast.batch.reading import Reader
from anyup_fast.batch.sources import find_sources

RANDOM = np.random.default_rng(0)
EIGHT = RANDOM.integers(0, 256, (40, 60, 4), dtype=np.uint8)
SIXTEEN = RANDOM.integers(0, 65536, (40, 60), dtype=np.uint16)
PICTURES = {
    "rgb.png": (Image.fromarray(EIGHT[..., :3]), {}),
    "grey.bmp": (Image.fromarray(EIGHT[..., 0]), {}),
    "alpha.png": (Image.fromarray(EIGHT), {}),
    "palette.gif": (Image.fromarray(EIGHT[..., 0]).convert("P"), {"transparency": 7}),
    "sixteen.png": (Image.fromarray(SIXTEEN), {}),
    "see_through.png": (Image.fromarray(SIXTEEN), {"transparency": int(SIXTEEN[3, 5])}),
    "turned.jpg": (Image.fromarray(EIGHT[..., :3]), {"exif": Image.Exif()}),
    "float.tif": (Image.fromarray(RANDOM.random((40, 60), np.float32)), {}),
    "beyond.tif": (Image.fromarray(np.full((40, 60), 3, np.float32)), {}),
}
PICTURES["turned.jpg"][1]["exif"][0x0112] = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pictures")
    for name, (picture, options) in PICTURES.items():
        picture.save(place / name, **options)
    return place


@pytest.mark.parametrize("size", [None, 28])
def test_a_process_and_this_one_read_the_same(folder, size):
    sources = find_sources(folder)
    assert len(sources) == len(PICTURES)
    reader, decoders = Reader(SimpleNamespace(size=size), 14), Decoders(1)
    decoders.reader = reader
    try:
        batches = [([source], frozenset([source.name])) for source in sources]
        read = [pictures[0] for pictures, _ in decoders.batches(batches, lambda: None)]
    finally:
        decoders.close()
    for source, there in zip(sources, read, strict=True):
        here = reader(source)
        assert (there.error, there.notes, there.about) == (here.error, here.notes, here.about), source.name
        if here.error is None:
            assert torch.equal(there.image, here.image), source.name
    assert [source.path for source, picture in zip(sources, read, strict=True) if picture.error] == [
        str(folder / "beyond.tif")
    ]


@pytest.mark.parametrize("enormous", [64_000_000, 1000])
def test_an_enormous_picture_is_finished_where_it_is_decoded(folder, monkeypatch, enormous):
    monkeypatch.setattr(serving, "ENORMOUS", enormous)
    reader, sent = Reader(SimpleNamespace(size=28), 14), []
    stream = SimpleNamespace(write=lambda data: sent.append(bytes(data)), flush=lambda: None)
    [source] = find_sources(folder / "rgb.png")
    serving._answer(stream, reader, source)
    assert len(sent[-1]) == (40 * 60 * 3 if enormous > 1000 else 28 * 42 * 3 * 4)


def test_processes_that_decode_do_without_pytorch(folder):
    script = f"""if True:
        import sys
        from types import SimpleNamespace
        import anyup_fast.batch.serving
        from anyup_fast.batch.reading import Reader
        from anyup_fast.batch.sources import find_sources
        reader = Reader(SimpleNamespace(size=28), 14)
        pictures = [reader.decode(source) for source in find_sources({str(folder)!r})]
        assert len(pictures) == {len(PICTURES)} and not any(picture.error for picture in pictures)
        assert "torch" not in sys.modules
        assert reader.finish(pictures[0]).image.shape[0] == 3 and "torch" in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_threads_that_speak_to_processes_leave_pytorch_its_threads(folder):
    script = f"""if True:
        import threading
        import torch
        from types import SimpleNamespace
        from anyup_fast.batch.decoding import Decoders
        from anyup_fast.batch.reading import Reader
        from anyup_fast.batch.sources import find_sources
        [source] = find_sources({str(folder / "rgb.png")!r})
        decoders = Decoders(1)
        decoders.reader = Reader(SimpleNamespace(size=28), 14)
        [([picture], _)] = decoders.batches([([source], frozenset())], lambda: None)
        assert picture.image.shape == (3, 28, 42)
        assert torch.get_num_threads() == 2
        decoders.close()
        others = []
        thread = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert others == [2]
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
