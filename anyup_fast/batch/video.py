"""Frames of a video, one by one, and pictures made into a film; decoding and encoding are PyAV's (FFmpeg)."""

import logging
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from ..files import written_aside

logger = logging.getLogger("anyup_fast")


def _av():
    try:
        import av
    except ModuleNotFoundError as error:
        raise RuntimeError("videos need the package av: pip install 'anyup-fast[batch]'") from error
    return av


_EXACT = "SLICE"  # threads that lose no frame and no error beside one that can't be decoded, as others do
_HIDDEN = ("vp8", "vp9", "av1")  # codecs with packets that show nothing


def frame_times(path):
    """Presentation times of all frames of a video, in order, in the units of its stream (None where it has none).

    Raises:
        ValueError: no video, or one without frames. RuntimeError: the package av is missing.
    """
    return [time for _, time, _ in frames_of(path)]


def frames_of(path):
    """What a video holds: decodes all of it once.

    Returns:
        list of (number, presentation time or None, why it can't be had or None), in order of presentation. Frames that
        the container announces and that can't be decoded are in it, at their places; those beyond the end of a file
        that is cut come last.

    Raises:
        ValueError: no video, or one without frames. RuntimeError: the package av is missing.
    """
    av = _av()
    try:
        for threads in ("AUTO", _EXACT):
            with av.open(str(path)) as container:
                if not container.streams.video:
                    raise ValueError(f"input: {str(path)!r} has no video stream")
                found = _Census(container, path, threads)
            if len(found.decoded) >= len(found.announced):
                break
    except av.FFmpegError as error:
        raise ValueError(f"input: {str(path)!r} can't be read as a video ({error})") from error
    if not found.decoded:
        raise ValueError(f"input: {str(path)!r} has no frames that can be decoded{found.trouble()}")
    return found.frames()


class _Census:
    """Frames of an open video, those that can be decoded and those that can't."""

    def __init__(self, container, path, threads):
        av, self.path = _av(), path
        stream = container.streams.video[0]
        stream.thread_type = threads
        self.decoded, self.announced, self.errors, self.interlaced = [], [], [], False
        self.codec, self.rate, self.base = stream.codec_context.name, stream.average_rate, stream.time_base
        # Tables of samples count exactly; other containers estimate, or count frames that were dropped.
        self.count = stream.frames if "mp4" in container.format.name else 0
        self.length = container.duration / 1e6 if container.duration and len(container.streams) == 1 else None
        self.packets = 0
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except av.FFmpegError as error:  # nothing can be read beyond
                self.errors.append(str(error))
                packet = None
            if packet is not None:
                self.packets += packet.size > 0
                if packet.size and not packet.is_discard:
                    self.announced.append(packet.pts)
            try:
                for frame in _decoded(stream, packet):
                    self.decoded.append(frame.pts)
                    self.interlaced |= bool(getattr(frame, "interlaced_frame", False))
            except av.FFmpegError as error:
                self.errors.append(str(error))
            if packet is None:
                break

    def frames(self):
        """As `frames_of` gives them."""
        times = self.decoded
        if None in times or any(b <= a for a, b in zip(times, times[1:], strict=False)):
            rows = [(None, None)] * len(times)  # frames are told apart by their number alone
            missing = max(0, len(self.announced) - len(times)) if self.errors else 0
            rows += [(None, f"frame {len(times) + n} {self._lost()}") for n in range(missing)]
        else:
            there = set(times)
            rows = [(time, None) for time in times]
            if self.errors or self.codec not in _HIDDEN and not self.interlaced:
                lost = sorted({time for time in self.announced if time is not None} - there)
                rows += [(time, f"the frame at time {time} {self._lost()}") for time in lost]
            rows.sort()
        rows += [(None, "the file ends before this frame: it is cut off")] * max(0, self.count - self.packets)
        self._tell_a_cut(len(rows))
        return [(number, time, why) for number, (time, why) in enumerate(rows)]

    def _tell_a_cut(self, count):
        """Warn of a file that announces more seconds than it has, where it tells of no further frames."""
        if self.length is None or self.count or None in self.decoded or not self.rate:
            return
        end = float((max(self.decoded) - min(self.decoded)) * self.base + 1 / self.rate)
        if end < self.length - max(0.5, 3 / self.rate):
            logger.warning(
                "%s: ends at %.2f of the %.2f seconds that it announces; about %d frames from number %d on are missing",
                self.path, end, self.length, round((self.length - end) * self.rate), count,
            )  # fmt: skip

    def _lost(self):
        return f"can't be decoded{self.trouble()}"

    def trouble(self):
        """What the decoder said first, in brackets."""
        return f" ({self.errors[0]})" if self.errors else ""


@lru_cache(maxsize=16)
def frame_size(path):
    """(H, W) of the first frame of a video, upright."""
    frame = _Frames(path).read(None, 0)
    return (frame.height, frame.width) if round(frame.rotation / 90) % 2 == 0 else (frame.width, frame.height)


def _decoded(stream, packet):
    """Frames that a packet completes; of None, those that the decoder still has."""
    if packet is not None:
        return packet.decode()
    try:
        return stream.codec_context.decode(None)
    except _av().error.EOFError:  # the last packet of an unbroken file has fetched them
        return []


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
        self.time = self.number = None

    def read(self, time, number):
        """The frame at a presentation time; without one, that of a number in order."""
        if time is None:
            return self._counted(number)
        if self.time is None or not 0 < time - self.time <= self._near():
            self.decoded = self._sought(time)
        for frame in self.decoded:
            self.time = frame.pts
            if frame.pts == time:
                return frame
            if frame.pts is not None and frame.pts > time:
                break
        self.time = None
        frame = self._from_the_start(lambda _, frame: frame.pts == time)
        if frame is None:
            raise ValueError(f"source: {self.path!r} has no frame at time {time}; the video is damaged there")
        return frame

    def _sought(self, time):
        """Frames from before a time on; none where the container can't seek."""
        try:
            self.container.seek(time, stream=self.stream, backward=True)
        except _av().FFmpegError:  # the caller reads from the start
            return iter(())
        return self._frames()

    def _counted(self, number):
        if self.number is not None and number > self.number:
            for frame in self.decoded:
                self.number += 1
                if self.number == number:
                    return frame
        frame = self._from_the_start(lambda index, _: index == number)
        if frame is None:
            raise ValueError(f"source: {self.path!r} has no frame {number}; the video is damaged there")
        self.number = number
        return frame

    def _from_the_start(self, wanted):
        """The first frame that is wanted, in a video opened anew: not every container can seek, nor every thread."""
        self.container.close()
        self.container = _av().open(self.path)
        self.stream = self.container.streams.video[0]
        self.stream.thread_type = _EXACT
        self.decoded = self._frames()
        for index, frame in enumerate(self.decoded):
            if wanted(index, frame):
                self.time = frame.pts
                return frame
        self.time = self.number = None
        return None

    def _frames(self):
        """All frames from here on that can be decoded."""
        av = _av()
        packets = self.container.demux(self.stream)
        while True:
            try:
                packet = next(packets, None)
            except av.FFmpegError:  # the file ends here; `frames_of` has told so
                packet = None
            try:
                yield from _decoded(self.stream, packet)
            except av.FFmpegError:  # a damaged packet, told by `frames_of`; others follow
                pass
            if packet is None:
                return

    def _near(self):
        """How far ahead a frame is reached faster by decoding than by seeking: some forty frames."""
        rate = self.stream.average_rate or 25
        return 40 / (rate * self.stream.time_base)


_open_video = lru_cache(maxsize=1)(_Frames)


def read_frame(path, time, number=None):
    """The frame of a video at a presentation time, upright, as uint8 (H, W, 3); where it has no times, by its number.

    The video stays open for the next call.

    Raises:
        ValueError: no such frame, or it can't be decoded.
    """
    av = _av()
    try:
        frame = _open_video(path).read(time, number)
        picture = frame.to_ndarray(format="rgb24")
    except av.FFmpegError as error:
        _open_video.cache_clear()
        raise ValueError(f"source: {path!r} can't be decoded at time {time} ({error})") from error
    return np.ascontiguousarray(np.rot90(picture, round(frame.rotation / 90)))


FILMS = (".mp4", ".mkv", ".mov")
_ENCODER = "libx264"


def check_film(path):
    """Raise before the work what `write_film` would raise after it.

    Raises:
        ValueError: another suffix. RuntimeError: no package av, or none that encodes H.264. OSError: the folder can't
            be written.
    """
    av = _av()
    if not str(path).lower().endswith(FILMS):
        raise ValueError(f"film: the file must end in {', '.join(FILMS)}, got {str(path)!r}")
    try:
        av.codec.Codec(_ENCODER, "w")
    except (av.FFmpegError, ValueError) as error:
        raise RuntimeError(
            f"film: this package av has no encoder {_ENCODER} ({type(error).__name__}: {error}); install the one of "
            "PyPI (pip install --force-reinstall av), or leave --film out: the pictures are made without it"
        ) from error
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=Path(path).parent):
        pass


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
    check_film(path)
    av, count, size = _av(), 0, None
    with written_aside(path) as aside:
        with av.open(str(aside), "w") as container:
            stream = None
            for picture in pictures:
                picture = np.ascontiguousarray(picture[: picture.shape[0] & ~1, : picture.shape[1] & ~1])
                if stream is None:
                    size = picture.shape
                    stream = container.add_stream(_ENCODER, Fraction(rate).limit_denominator(100_000))
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
