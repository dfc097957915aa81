"""What the files of a run depend on, checked before anything is computed."""

import os
from dataclasses import dataclass

from ..pixels import MAX_PIXELS

KINDS = {
    "features": "every channel of every output pixel",
    "head": "the outputs of a linear head in place of the channels",
    "labels": "the index of the head's greatest output",
    "pca": "pictures of the first three principal components",
    "lowres": "the encoder's features and what answers for any pixel later",
}
DTYPES = ("float16", "bfloat16", "float32", "int8")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
FORMATS = ("safetensors", "npy", "zarr", "png")


@dataclass(frozen=True)
class Settings:
    """Settings of a run.

    Args:
        kind: "features", "head", "labels", "pca" or "lowres" (`KINDS` says what each is).
        format: "safetensors", "npy", "zarr" (one store for all) or, for labels and PCA pictures, "png"; None means png
            for PCA pictures and else safetensors. "lowres" needs safetensors.
        dtype: "float16", "bfloat16" (safetensors only), "float32", or "int8" with a float32 scale for each channel, of
            features and head outputs. Labels are uint8, uint16 or int32, PCA pictures uint8.
        encoder: name, as for `anyup_fast.encoders.load_encoder`, or "package.module:function" of your own.
        layer: of the encoder.
        encoder_weights: as for `load_encoder`.
        weights: of AnyUp, as for `AnyUp.from_pretrained`.
        size: the pictures are resized to this shorter side, or exactly to (height, width); None keeps their size. Both
            sides then go to the nearest multiple of the encoder's patch.
        output_size: None gives every pixel of the resized picture; a number the shorter side of the output, (height,
            width) exactly that.
        aspect: of outputs whose shorter side is given: "picture", as the picture had it before it was resized, or
            "resized", which runs have that were begun before there was a choice.
        zarr_format: of stores, 3, or 2 for readers that know no other.
        precision: of products of float32, "highest", "high" or "medium"; None means as
            `upsample_features_with_anyup` has it.
        compute_dtype: what AnyUp computes in, "float32", "bfloat16" or "float16"; None means float32.
        classes: of the kinds "head" and "labels", a name for each output of the head; None means those of its file.
        products: how they are done on CPUs, for the run to be finished as it was begun; None means the fastest way.

    Raises:
        ValueError: one of them is unknown, or two don't fit together.
    """

    kind: str = "features"
    format: str | None = None
    dtype: str = "float16"
    encoder: str = "dinov2_vits14"
    layer: int = -1
    encoder_weights: str = "auto"
    weights: str = "embedded"
    size: int | tuple | None = 448
    output_size: int | tuple | None = None
    aspect: str = "picture"
    zarr_format: int = 3
    precision: str | None = None
    compute_dtype: str | None = None
    products: str | None = None
    classes: tuple | None = None

    def __post_init__(self):
        from ..plain.precision import PRECISIONS, asked  # loads torch, which the command line sets up first

        if self.format is None:
            object.__setattr__(self, "format", "png" if self.kind == "pca" else "safetensors")
        if self.precision is None:
            object.__setattr__(self, "precision", asked())
        if self.compute_dtype is None:
            object.__setattr__(self, "compute_dtype", "float32")
        choices = (
            *(("kind", KINDS), ("format", FORMATS), ("dtype", DTYPES)),
            *(("precision", PRECISIONS), ("compute_dtype", COMPUTE_DTYPES)),
        )
        for name, known in choices:
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("weights", "encoder_weights"):
            object.__setattr__(self, name, os.fspath(getattr(self, name)))
        for name in ("size", "output_size"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
            values = value if isinstance(value, (tuple, list)) else (value,)
            if value is not None and not (
                len(values) in (1, 2) and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in values)
            ):
                raise ValueError(f"{name}: must be None, a positive int or (height, width), got {value!r}")
            if value is not None and name == "size" and values[0] * values[-1] > MAX_PIXELS:
                raise ValueError(
                    f"size: {value!r} makes pictures of {values[0]} x {values[-1]} pixels and more, {MAX_PIXELS:,} is "
                    "the most; ask for less"
                )
        if self.classes is not None:
            if self.kind not in ("head", "labels"):
                raise ValueError(f"classes: goes with the kinds 'head' and 'labels', got kind={self.kind!r}")
            from ..heads import checked_classes

            object.__setattr__(self, "classes", checked_classes(self.classes, len(self.classes)))
        if self.zarr_format not in (2, 3):
            raise ValueError(f"zarr_format: must be 2 or 3, got {self.zarr_format!r}")
        if self.zarr_format != 3 and self.format != "zarr":
            raise ValueError(f"zarr_format: goes with format='zarr', got format={self.format!r}")
        kind, form, dtype = self.kind, self.format, self.dtype
        if form == "png" and kind not in ("labels", "pca"):
            raise ValueError(f"format: png holds labels and PCA pictures, not {kind}; use safetensors, npy or zarr")
        if kind == "lowres" and form != "safetensors":
            raise ValueError(f"format: lowres is kept as safetensors, got {form!r}")
        if kind == "lowres" and dtype == "int8":
            raise ValueError("dtype: lowres features are float16, bfloat16 or float32, not int8")
        if kind == "lowres" and self.compute_dtype != "float32":
            raise ValueError(
                f"compute_dtype: lowres is asked in float32 later, got {self.compute_dtype!r}; leave it out"
            )
        if kind in ("features", "head") and dtype == "bfloat16" and form != "safetensors":
            raise ValueError(f"dtype: {form} has no bfloat16; use float16 or float32, or the format safetensors")

    @property
    def storage(self):
        """Names of what is kept for each picture: the first one is the answer."""
        first = {"head": "outputs", "pca": "picture"}.get(self.kind, self.kind)
        if self.kind == "lowres":
            return ("features", "key", "norms", "image")
        return (first, "scale") if self.dtype == "int8" and self.kind in ("features", "head") else (first,)


def output_size_of(settings, image_size, picture_size=None):
    """(H', W') for an image of a size (H, W), resized from a picture of another, where that is known."""
    wanted = settings.output_size
    if wanted is None:
        return tuple(image_size)
    if isinstance(wanted, tuple):
        return wanted
    size = image_size if picture_size is None or settings.aspect == "resized" else picture_size
    return tuple(max(1, round(side * wanted / min(size))) for side in size)
