"""The first stage of a picture: decoded from its file, then made a tensor. Only the second half needs PyTorch."""

import time
import warnings
from dataclasses import dataclass, field

from ..pixels import Pixels
from .reasons import is_device_lost, is_memory, reason_of
from .sources import Source, decode_source, fingerprint, header_of


@dataclass
class Picture:
    """One source on its way through the stages.

    Attributes:
        source: what it is made of. about: the source, for the manifest. seconds: stage -> seconds spent.
        image: the decoded `Pixels`, then (3, H, W). tensors: thing -> tensor once they are computed.
        files: path -> size and digest once they are written.
        error: why there is nothing; then it passes the other stages untouched.
        cause: of an error, where it matters to the rest: "memory", "range" (of the dtype), "room" (on the disk),
        "disk" (it can't be written at all) or "device" (it answers no more). notes: what is worth a warning.
    """

    source: Source
    about: dict
    seconds: dict = field(default_factory=dict)
    image: object = None
    tensors: dict | None = None
    shape: tuple | None = None
    files: dict | None = None
    error: str | None = None
    cause: str | None = None
    notes: list = field(default_factory=list)

    def failed(self, error):
        """Note an exception as the reason why there is nothing; returns the picture."""
        self.error, self.image, self.tensors = reason_of(error), None, None
        self.cause = "memory" if is_memory(error) else "device" if is_device_lost(error) else None
        return self

    def record(self, settings_digest):
        """Its line in the manifest."""
        status = "done" if self.error is None else "failed"
        line = {"name": self.source.name, "status": status, "settings": settings_digest, "source": self.about}
        if self.error is None:
            return {**line, "shape": list(self.shape), "files": self.files}
        return {**line, "error": self.error}


class Reader:
    """Reads a source: gives a `Picture` with an image, or with the reason why there is none."""

    def __init__(self, settings, patch):
        self.size, self.patch = settings.size, patch

    def __call__(self, source):
        return self.finish(self.decode(source))

    def decode(self, source):
        """A `Picture` whose image is `Pixels`."""
        start = time.perf_counter()
        picture = Picture(source, about_source(source))
        try:
            if source.frame is None:
                picture.about.update(header_of(source.path))
            frames = picture.about.get("frames", 1)
            if frames > 1 and source.page is None:
                picture.notes.append(f"has {frames} pages or frames, of which the first is taken; --pages takes all")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "(?s).* pages or frames, of which the first is taken")
                picture.image, digest = decode_source(source, picture.about)
            if digest is not None:
                picture.about["sha256"] = digest
        except Exception as error:  # whatever a decoder raises
            picture.failed(error)
        picture.seconds["read"] = time.perf_counter() - start
        return picture

    def finish(self, picture):
        """The same picture with its image as a tensor."""
        if not isinstance(picture.image, Pixels):
            return picture
        from ..image import from_pixels

        start = time.perf_counter()
        try:
            picture.image = from_pixels(picture.image, self.size, self.patch)
        except Exception as error:  # such as memory that is missing
            picture.failed(error)
        picture.seconds["read"] += time.perf_counter() - start
        return picture


def about_source(source):
    """What the manifest says of a source before it is read."""
    about = {"path": source.path, **(fingerprint(source.path) or {})}
    places = {"frame": source.frame, "page": source.page}
    return {**about, **{name: number for name, number in places.items() if number is not None}}
