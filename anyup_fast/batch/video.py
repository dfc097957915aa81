"""Frames of a video, one by one, and pictures made into a film; decoding and encoding are PyAV's (FFmpeg)."""

import os
from fractions import Fraction
from functools import lru_cache

import numpy as np

from ..files import written_aside


def _av():
    try:
        import av
    except ModuleNotFoundError as error:
        raise RuntimeError("videos need the package av: pip install 'anyup-fast[batch]'") from error
    return av


def frame_times(path):
    """Presentation times of all frames of a video, in order, in the units of its stream; nothing is decoded.

    Raises:
        ValueError: no video, or one without frames. RuntimeError: the package av is missing.
    """
    av = _av()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"input: {str(path)!r} has no video stream")
            packets = container.demux(container.streams.video[0])
            times = [packet.pts for packet in packets if packet.size and not packet.is_discard]
    except av.FFmpegError as error:
        raise ValueError(f"input: {str(path)!r} can't be read as a video ({error})") from error
    if not times or None in times:
        raise ValueError(f"input: {str(path)!r} has no frames with times; remux it (ffmpeg -i IN -c copy OUT.mkv)")
    return sorted(times)


def frame_rate(path):
    """Mean frames per second of a video, as a Fraction."""
    with _av().open(str(path)) as container:
        return Fraction(container.streams.video[0].average_rate or 25)


class _Frames:
    """An open video that goes on from where it is when the next frame asked for lies ahead, and else seeks."""

    def __init__(self, path):
        self.path = path
        self.container = _av().open(path)
        self.stream = self.container.streams.video[0]
        self.stream.thread_type = "AUTO"
        self.decoded = None
        self.time = None

    def read(self, time):
        if self.time is None or not 0 < time - self.time <= self._near():
            self.container.seek(time, stream=self.stream, backward=True)
            self.decoded = self.container.decode(self.stream)
        for frame in self.decoded:
            self.time = frame.pts
            if frame.pts == time:
                return frame
            if frame.pts is not None and frame.pts > time:
                break
        self.time = None
        raise ValueError(f"source: {self.path!r} has no frame at time {time}; the video is damaged there")

    def _near(self):
        """How far ahead a frame is reached faster by decoding than by seeking: some forty frames."""
        rate = self.stream.average_rate or 25
        return 40 / (rate * self.stream.time_base)


_open_video = lru_cache(maxsize=1)(_Frames)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_open_video.cache_clear)  # the decoder's threads would not be there in the child


def read_frame(path, time):
    """The frame of a video at a presentation time, upright, as uint8 (H, W, 3).

    The video stays open for the next call.

    Raises:
        ValueError: no such frame, or it can't be decoded.
    """
    av = _av()
    try:
        frame = _open_video(path).read(time)
        picture = frame.to_ndarray(format="rgb24")
    except av.FFmpegError as error:
        _open_video.cache_clear()
        raise ValueError(f"source: {path!r} can't be decoded at time {time} ({error})") from error
    return np.ascontiguousarray(np.rot90(picture, round(frame.rotation / 90)))


def write_film(pictures, path, rate):
    """Make a film (H.264) of pictures of one size.

    Args:
        pictures: iterable of uint8 (H, W, 3); odd sides lose their last row or column, as H.264 needs even ones.
        path: .mp4, .mkv or .mov file to write, aside first. rate: frames per second.

    Returns:
        how many pictures went into it.

    Raises:
        ValueError: no pictures, pictures of different sizes, another suffix.
    """
    av = _av()
    if not str(path).lower().endswith((".mp4", ".mkv", ".mov")):
        raise ValueError(f"film: the file must end in .mp4, .mkv or .mov, got {str(path)!r}")
    count, size = 0, None
    with written_aside(path) as aside:
        with av.open(str(aside), "w") as container:
            stream = None
            for picture in pictures:
                picture = np.ascontiguousarray(picture[: picture.shape[0] & ~1, : picture.shape[1] & ~1])
                if stream is None:
                    size = picture.shape
                    stream = container.add_stream("libx264", Fraction(rate).limit_denominator(100_000))
                    stream.height, stream.width, stream.pix_fmt = *size[:2], "yuv420p"
                    stream.options = {"crf": "16"}
                if picture.shape != size:
                    raise ValueError(f"film: pictures of different sizes, {size[:2]} and {picture.shape[:2]}")
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
                count += 1
            if stream is None:
                raise ValueError("film: there are no pictures to make it of")
            container.mux(stream.encode())
    return count
