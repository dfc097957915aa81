"""What every engine does to a picture: read it, encode and upsample it, write the answer."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..encoders import load_encoder
from ..heads import load_head
from ..image import denormalize, normalize
from ..model import AnyUp
from . import outputs
from .colours import Colours
from .settings import output_size_of
from .sources import Source, fingerprint, read_source

HEAD, PCA = "head.safetensors", "pca.safetensors"

PINNED = 1 << 30  # bytes of one tensor that are copied into pinned memory at most
STORED_IMAGE = {torch.uint8: 255, torch.uint16: 65535}


@dataclass
class Picture:
    """One source on its way through the stages.

    Attributes:
        source: what it is made of. about: the source, for the manifest. seconds: stage -> seconds spent.
        image: (3, H, W) once it is read. tensors: thing -> tensor once they are computed. files: path -> size and
        digest once they are written. error: why there is nothing; then it passes the other stages untouched.
    """

    source: Source
    about: dict
    seconds: dict = field(default_factory=dict)
    image: torch.Tensor | None = None
    tensors: dict | None = None
    shape: tuple | None = None
    files: dict | None = None
    error: str | None = None

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
        start = time.perf_counter()
        picture = Picture(source, about_source(source))
        try:
            picture.image, digest = read_source(source, self.size, self.patch)
            if digest is not None:
                picture.about["sha256"] = digest
        except (ValueError, OSError) as error:
            picture.error = " ".join(str(error).split()) or type(error).__name__
        picture.seconds["read"] = time.perf_counter() - start
        return picture


def about_source(source):
    """What the manifest says of a source before it is read."""
    about = {"path": source.path, **(fingerprint(source.path) or {})}
    return about if source.frame is None else {**about, "frame": source.frame}


class Upsampler:
    """Encodes and upsamples pictures of one size: fills in their `tensors`, on the CPU.

    Args:
        settings: of the run. folder: of the run, where head and PCA lie. device: where to compute.
        colours: whether the PCA is there, and is to be read.
    """

    def __init__(self, settings, folder, device="cpu", colours=True):
        self.settings, self.device = settings, torch.device(device)
        self.encoder = load_encoder(settings.encoder, weights=settings.encoder_weights, device=device)
        self.model = AnyUp.from_pretrained(settings.weights, device=device)
        self.head = self.colours = None
        if settings.kind in ("head", "labels"):
            self.head = load_head(Path(folder) / HEAD)
        if settings.kind == "pca" and colours:
            self.colours = Colours.load(Path(folder) / PCA)

    def __call__(self, pictures):
        start = time.perf_counter()
        readable = [picture for picture in pictures if picture.error is None]
        if readable:
            self._compute(readable)
        for picture in readable:
            picture.seconds["compute"] = (time.perf_counter() - start) / len(readable)
        return pictures

    def features(self, images):
        """Images (B, 3, H, W) on the device and their features (B, C, h, w) in float32."""
        images = _on_device(torch.stack(images), self.device)
        return images, self.encoder(images, layer=self.settings.layer).float()

    @torch.no_grad()
    def _compute(self, pictures):
        images, features = self.features([picture.image for picture in pictures])
        prepared = self.model.prepare(images, features)
        answer = getattr(self, f"_{self.settings.kind}")
        answers, finite = answer(prepared)
        for index, picture in enumerate(pictures):
            picture.image = None
            if not features[index].isfinite().all():
                picture.error = f"the encoder {self.settings.encoder} gives values that are not finite for it"
            elif not finite[index]:
                picture.error = f"its values leave the range of {self.settings.dtype}; use bfloat16 or float32"
            else:
                picture.tensors = {thing: part[index] for thing, part in answers.items()}
                picture.shape = tuple(next(iter(answers.values())).shape[1:])

    def _features(self, prepared):
        """What is kept, thing -> (B, ...), contiguous on the CPU; and for which pictures the dtype was wide enough."""
        maps, dtype, size = prepared.maps, self.settings.dtype, self._output_size(prepared)
        name = self.settings.storage[0]
        if dtype == "int8":
            full = prepared.full(size)
            scale = full.abs().amax((2, 3)) / 127
            scale = torch.where(scale > 0, scale, 1)
            quantised = full.div_(scale[..., None, None]).round_().to(torch.int8)
            return {name: _on_host(quantised), "scale": _on_host(scale)}, scale.isfinite().all(1)
        # Weighted means never leave the range of what they are means of: the low-res maps show whether they fit.
        maps = maps.to(getattr(torch, dtype))
        return {name: _on_host(prepared.showing(maps).full(size))}, maps.isfinite().flatten(1).all(1)

    def _head(self, prepared):
        return self._features(prepared.head(self.head))

    def _labels(self, prepared):
        labels = prepared.head(self.head, argmax=True).full(self._output_size(prepared))
        classes = len(self.head[0])
        dtype = torch.uint8 if classes <= 256 else torch.uint16 if classes <= 65536 else torch.int32
        return {"labels": _on_host(labels.to(dtype))}, [True] * len(labels)

    def _pca(self, prepared):
        coordinates = prepared.head(self.colours.head(prepared.channels)).full(self._output_size(prepared))
        return {"picture": _on_host(self.colours.paint(coordinates))}, [True] * len(coordinates)

    def _lowres(self, prepared):
        maps = prepared.maps.to(getattr(torch, self.settings.dtype))
        state = {name: _on_host(tensor) for name, tensor in prepared.state().items()}
        kept = {"features": _on_host(maps), **state, "image": [pack_image(image) for image in prepared.image]}
        return kept, maps.isfinite().flatten(1).all(1)

    def _output_size(self, prepared):
        return output_size_of(self.settings, prepared.output_size)


def lanes(device):
    """How many batches are in work at a time on an accelerator: on CUDA devices one computes while the other copies."""
    return 2 if torch.device(device).type == "cuda" else 1


def _on_device(tensor, device):
    """A tensor of the host on a device; to a CUDA device it is copied by the current stream, with nobody waiting."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _on_host(tensor):
    """A tensor in memory of the host, contiguous.

    From a CUDA device it is copied into pinned memory, at the speed of the bus, and only the stream of this thread is
    waited for: another one may compute meanwhile. Such memory is not to be had for anything beyond `PINNED` bytes.
    """
    tensor = tensor.contiguous()
    if tensor.device.type != "cuda" or tensor.nbytes > PINNED:
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return host


def pack_image(image):
    """An ImageNet-normalised image as uint8 (3, H, W) where that loses nothing, else as uint16."""
    image = image.float().cpu()
    for dtype, full in STORED_IMAGE.items():
        packed = (denormalize(image) * full).round().to(torch.int32).to(dtype)
        if dtype == torch.uint16 or torch.equal(unpack_image(packed), image):
            return packed


def unpack_image(packed):
    """What `pack_image` has packed, (3, H, W) float32."""
    return normalize(packed.float() / STORED_IMAGE[packed.dtype])


class Writer:
    """Writes what was computed: fills in `files`."""

    def __init__(self, settings, folder):
        self.settings, self.folder = settings, folder

    def __call__(self, picture):
        start = time.perf_counter()
        if picture.error is None:
            picture.files = outputs.save(self.folder, picture.source.name, picture.tensors, self.settings)
            picture.tensors = None
        picture.seconds["write"] = time.perf_counter() - start
        return picture
