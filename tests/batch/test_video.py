"""Frames of videos as cameras and accidents make them: all that can be decoded, in order, by number."""

import logging
from fractions import Fraction

import numpy as np
import pytest

av = pytest.importorskip("av")
from anyup_fast.batch.sources import find_sources, picture_size, read_source  # noqa: E402
from anyup_fast.batch.video import check_film, frames_of, read_frame  # noqa: E402


def clip(path, count=24, codec="libx264", options=None, container=None, times=None, noise=0):
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", format=container) as film:
        stream = film.add_stream(codec, 25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.options = options or {}
        if times:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(count):
            level = np.full((64, 96, 3), 20 + 200 * index // (count - 1))
            level = level + rng.integers(-noise, noise + 1, level.shape)
            frame = av.VideoFrame.from_ndarray(level.clip(0, 255).astype(np.uint8), format="rgb24")
            if times:
                frame.pts, frame.time_base = times[index], stream.codec_context.time_base
            film.mux(stream.encode(frame))
        film.mux(stream.encode())
    return path


def levels(path, frames):
    return [read_frame(str(path), time, number).mean() for number, time, broken in frames if broken is None]


KINDS = {
    "b-frames.mp4": {"options": {"bf": "3"}},
    "no-times.avi": {"options": {"bf": "3"}},
    "raw.mp4": {"options": {"bf": "2"}, "container": "h264"},
    "stream.mpg": {"options": {"bf": "2"}, "container": "mpegts"},
    "varying.mp4": {"times": [0, 40, 80, 400, 440, 1000, *range(1040, 2120, 60)]},
    "hidden.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16"}},
    "old.mpeg": {"codec": "mpeg2video", "options": {"bf": "2"}, "container": "mpeg"},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_in_order_and_by_number(tmp_path, name, caplog):
    try:
        path = clip(tmp_path / name, **KINDS[name])
    except (av.FFmpegError, ValueError):
        pytest.skip("this av has no such encoder")
    frames = frames_of(path)
    assert [number for number, _, _ in frames] == list(range(24)) and not any(broken for *_, broken in frames)
    found = levels(path, frames)
    assert all(b > a - 1 for a, b in zip(found, found[1:], strict=False))
    assert all(b > a + 9 for a, b in zip(found, found[3:], strict=False))
    for number in (20, 3, 11, 23, 0):  # wherever it is asked to go
        assert abs(read_frame(str(path), frames[number][1], number).mean() - found[number]) < 1.5
    assert picture_size(find_sources(path)[0]) == (64, 96) and not caplog.records


def test_a_cut_film_tells_its_missing_frames_by_number(tmp_path):
    whole = clip(tmp_path / "whole.mp4", 60, options={"bf": "2"})
    path = tmp_path / "cut.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as film, av.open(str(whole)) as source:
        stream = film.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                film.mux(packet)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 7 // 10])
    frames = frames_of(path)
    there = [number for number, _, broken in frames if broken is None]
    assert len(frames) == 60 and 10 < len(there) < 30
    found = levels(path, frames)
    assert all(b > a for a, b in zip(found, found[1:], strict=False))
    assert all("can't be decoded" in broken or "cut off" in broken for *_, broken in frames if broken)
    source = find_sources(path)[59]
    with pytest.raises(ValueError, match="cut off|can't be decoded"):
        read_source(source)


@pytest.mark.parametrize("name", ["cut.mkv", "cut.webm", "cut.flv"])
def test_a_cut_stream_tells_what_is_missing(tmp_path, name, caplog):
    codec = {"webm": "libvpx", "flv": "flv"}.get(name[4:], "libx264")
    try:
        path = clip(tmp_path / name, 60, codec, {"g": "12"}, noise=15)
    except (av.FFmpegError, ValueError):
        pytest.skip("this av has no such encoder")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 55 // 100])
    with caplog.at_level(logging.WARNING, "anyup_fast"):
        frames = frames_of(path)
    assert 10 < len(frames) < 50 and len(levels(path, frames)) == len(frames)
    assert f"frames from number {len(frames)} on are missing" in caplog.text


def test_no_video_and_nothing_of_one(tmp_path):
    (tmp_path / "text.mp4").write_text("no video" * 100)
    (tmp_path / "half.mp4").write_bytes(clip(tmp_path / "whole.mp4").read_bytes()[:900])
    (tmp_path / "empty.mkv").write_bytes(b"")
    for name in ("text.mp4", "half.mp4", "empty.mkv"):
        with pytest.raises(ValueError, match="input: .*(can't be read as a video|no frames that can be decoded)"):
            find_sources(tmp_path / name)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"path": "a.gif"}, "film: the file must end in .mp4, .mkv, .mov"),
        ({"encoder": "none"}, "film: this package av has no encoder none.*pip install --force-reinstall av"),
        ({"path": "file/a.mp4"}, "exist|directory"),
    ],
)
def test_what_a_film_lacks_is_told_before_the_work(tmp_path, monkeypatch, given, message):
    (tmp_path / "file").touch()
    monkeypatch.setattr("anyup_fast.batch.video._ENCODER", given.get("encoder", "libx264"))
    with pytest.raises((ValueError, RuntimeError, OSError), match=message):
        check_film(tmp_path / given.get("path", "a.mp4"))
