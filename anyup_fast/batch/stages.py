"""What every engine does to a picture: read it, encode and upsample it, write the answer."""

import time
from pathlib import Path

import torch

from ..encoders import load_encoder
from ..heads import load_head
from ..image import denormalize, normalize
from ..model import AnyUp
from ..plain.memory import forward_memory
from ..plain.precision import settle, use_precision
from . import outputs
from .colours import Colours
from .reasons import ROOM, is_device_lost, memory_of_machine, reason_of_writing
from .settings import output_size_of
from .sources import upright

HEAD, PCA = "head.safetensors", "pca.safetensors"

PINNED = 1 << 30  # bytes of one tensor that are copied into pinned memory at most
STORED_IMAGE = {torch.uint8: 255, torch.uint16: 65535}


class Upsampler:
    """Encodes and upsamples pictures of one size: fills in their `tensors`, on the CPU.

    Args:
        settings: of the run. folder: of the run, where head and PCA lie. device: where to compute.
        colours: whether the PCA is there, and is to be read. encoder: that of the settings, if it is loaded.
    """

    def __init__(self, settings, folder, device="cpu", colours=True, encoder=None):
        self.settings, self.device = settings, torch.device(device)
        settle(settings.products)
        self.encoder = encoder or load_encoder(settings.encoder, weights=settings.encoder_weights, device=device)
        self.dtype = getattr(torch, settings.compute_dtype)
        self.model = AnyUp.from_pretrained(settings.weights, device=device).to(self.dtype)
        self.head = self.colours = None
        if settings.kind in ("head", "labels"):
            self.head = load_head(Path(folder) / HEAD)
        if settings.kind == "pca" and colours:
            self.colours = Colours.load(Path(folder) / PCA)

    def __call__(self, pictures):
        start = time.perf_counter()
        readable = [picture for picture in pictures if picture.error is None]
        with use_precision(self.settings.precision):
            self._compute(readable)
        for picture in readable:
            picture.image = None
            picture.seconds["compute"] = (time.perf_counter() - start) / len(readable)
        return pictures

    @torch.no_grad()
    def features_of(self, picture):
        """Features (C, h, w) of one picture on the CPU; None, with a reason in the picture, where there are none."""
        if picture.error is None:
            try:
                features = self.features([picture.image])[1][0].cpu()
            except Exception as error:  # whatever an encoder refuses
                picture.failed(error)
            else:
                if features.isfinite().all():
                    return features
                picture.error = f"for it the encoder {self.encoder.not_finite()}"
        return None

    def features(self, images):
        """Images (B, 3, H, W) on the device and their features (B, C, h, w) in float32."""
        images = _on_device(torch.stack(images), self.device)
        return images, self.encoder(images, layer=self.settings.layer).float()

    def _compute(self, pictures):
        """Make what can be made of pictures: together, and where that fails one by one."""
        if not pictures:
            return
        try:
            self._compute_together(pictures)
        except Exception as error:  # whatever an encoder refuses, and memory that is missing
            picture = pictures[0]
            if len(pictures) > 1 and not is_device_lost(error):
                del error
                for picture in pictures:
                    self._compute([picture])
            else:
                for picture in pictures:
                    picture.failed(error)

    @torch.no_grad()
    def _compute_together(self, pictures):
        output_size = output_size_of(self.settings, pictures[0].image.shape[1:], upright(pictures[0].about))
        self._refuse_more_than_memory(pictures[0].image.shape[1:], output_size)
        images, features = self.features([picture.image for picture in pictures])
        maps = features.to(self.dtype)
        prepared = self.model.prepare(images, maps)
        answers, finite = getattr(self, f"_{self.settings.kind}")(prepared, output_size)
        for index, picture in enumerate(pictures):
            if not features[index].isfinite().all():
                picture.error = f"for it the encoder {self.encoder.not_finite()}"
            elif not maps[index].isfinite().all():
                dtype = self.settings.compute_dtype
                picture.error = (
                    f"its features leave the range of {dtype}, in which is computed; leave compute_dtype out"
                )
            elif not finite[index]:
                picture.error = f"its values leave the range of {self.settings.dtype}; use bfloat16 or float32"
                picture.cause = "range"
            else:
                picture.tensors = {thing: part[index] for thing, part in answers.items()}
                picture.shape = tuple(next(iter(answers.values())).shape[1:])

    def _refuse_more_than_memory(self, size, output_size):
        """Raise where a CPU would be asked for more memory than the machine has: the system would end the process."""
        limit = memory_of_machine()
        if self.device.type != "cpu" or limit is None or self.settings.kind == "lowres":
            return
        grid = [max(1, n // self.encoder.patch_size) for n in size]
        dim = self.model.rope.freqs.shape[1]
        channels = (
            self.encoder.dim if self.settings.kind == "features" else 3 if self.head is None else len(self.head[0])
        )
        shapes = (1, 3, *size), (1, channels, *grid), output_size
        needed = forward_memory(*shapes, dim, torch.float32, self.device, plain=True)
        if needed > limit:
            raise MemoryError(f"tried to allocate {needed} bytes")

    def _features(self, prepared, size):
        """What is kept, thing -> (B, ...), contiguous on the CPU; and for which pictures the dtype was wide enough."""
        maps, dtype = prepared.maps, self.settings.dtype
        name = self.settings.storage[0]
        if dtype == "int8":
            full = prepared.full(size).float()
            scale = full.abs().amax((2, 3)) / 127
            scale = torch.where(scale > 0, scale, 1)
            quantised = full.div_(scale[..., None, None]).round_().to(torch.int8)
            return {name: _on_host(quantised), "scale": _on_host(scale)}, scale.isfinite().all(1)
        # Weighted means never leave the range of what they are means of: the low-res maps show whether they fit.
        maps = maps.to(getattr(torch, dtype))
        return {name: _on_host(prepared.showing(maps).full(size))}, maps.isfinite().flatten(1).all(1)

    def _head(self, prepared, size):
        return self._features(prepared.head(self.head), size)

    def _labels(self, prepared, size):
        labels = prepared.head(self.head, argmax=True).full(size)
        classes = len(self.head[0])
        dtype = torch.uint8 if classes <= 256 else torch.uint16 if classes <= 65536 else torch.int32
        return {"labels": _on_host(labels.to(dtype))}, [True] * len(labels)

    def _pca(self, prepared, size):
        coordinates = prepared.head(self.colours.head(prepared.channels)).full(size).float()
        return {"picture": _on_host(self.colours.paint(coordinates))}, [True] * len(coordinates)

    def _lowres(self, prepared, _):
        maps = prepared.maps.to(getattr(torch, self.settings.dtype))
        state = {name: _on_host(tensor) for name, tensor in prepared.state().items()}
        kept = {"features": _on_host(maps), **state, "image": [pack_image(image) for image in prepared.image]}
        return kept, maps.isfinite().flatten(1).all(1)


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
            try:
                picture.files = outputs.save(self.folder, picture.source.name, picture.tensors, self.settings)
            except OSError as error:
                self._judge(picture, error)
            except Exception as error:  # a name that can't be encoded, say
                picture.failed(error)
            picture.tensors = None
        picture.seconds["write"] = time.perf_counter() - start
        return picture

    def _judge(self, picture, error):
        """Whether a file could not be written because of its picture, or because none can."""
        if error.errno in ROOM:
            picture.error, picture.cause = f"output: {self.folder} can't be written ({error.strerror})", "room"
            return
        try:
            outputs.probe(self.folder)
        except OSError as general:
            picture.error, picture.cause = general.strerror, "room" if general.errno in ROOM else "disk"
            return
        size = sum(tensor.numel() * tensor.element_size() for tensor in picture.tensors.values())
        picture.error = reason_of_writing(error, size)
