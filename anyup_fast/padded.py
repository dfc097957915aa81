"""A picture with something below it and on its right, so that its sides are multiples of a patch."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Padded:
    """What `load_image(..., fit="pad")` gives, and what the verbs take as an image.

    The picture keeps its pixels and its proportions. It stands in the upper left corner, so that its coordinates are
    those of the image; the last row and the last column are repeated beyond it. Verbs answer for the picture: features
    of the cells that touch it, outputs of its own size.

    Attributes:
        image: (3, H, W) or (B, 3, H, W), the whole.
        size: (height, width) of the picture in it.
    """

    image: torch.Tensor
    size: tuple[int, int]

    def __post_init__(self):
        if not isinstance(self.image, torch.Tensor) or self.image.ndim not in (3, 4):
            raise ValueError(f"image: need (3, H, W) or (B, 3, H, W), got {getattr(self.image, 'shape', self.image)!r}")
        if not all(0 < n <= whole for n, whole in zip(self.size, self.image.shape[-2:], strict=True)):
            raise ValueError(f"size: {self.size} does not lie in an image of {tuple(self.image.shape[-2:])} pixels")

    @property
    def picture(self):
        """The picture alone, (..., 3, height, width)."""
        return self.image[..., : self.size[0], : self.size[1]]

    def to(self, *arguments, **options):
        """The same on another device or of another dtype, as of `torch.Tensor.to`."""
        return Padded(self.image.to(*arguments, **options), self.size)

    def cut(self, features):
        """Features (..., C, h, w) of the whole image without the cells that lie beyond the picture altogether.

        Raises:
            ValueError: the cells are no squares that the image is made of.
        """
        strides = [whole / n for whole, n in zip(self.image.shape[-2:], features.shape[-2:], strict=True)]
        if strides[0] != strides[1] or not strides[0].is_integer():
            raise ValueError(f"features: {tuple(features.shape)} are not square cells of {self._said()}")
        rows, cols = self._cells(int(strides[0]))
        return features[..., :rows, :cols]

    def covered(self, features):
        """The part of the image that features cover, (..., 3, h * stride, w * stride), and the stride.

        Args:
            features: (..., C, h, w) of the whole image, or what `cut` left of them.

        Raises:
            ValueError: their grid fits no stride, or several.
        """
        height, width = self.image.shape[-2:]
        grid = tuple(features.shape[-2:])
        divisors = [s for s in range(1, min(height, width) + 1) if height % s == 0 == width % s]
        fitting = [s for s in divisors if grid in ((height // s, width // s), self._cells(s))]
        if len(fitting) != 1:
            why = f"fits several strides, {fitting}" if fitting else "fits no stride"
            raise ValueError(f"features: a grid of {grid[0]}x{grid[1]} cells {why}, for {self._said()}")
        stride = fitting[0]
        return self.image[..., : grid[0] * stride, : grid[1] * stride], stride

    def spread(self, features):
        """Features (..., C, h, w), each cell over its pixels: (..., C, height, width) of the picture."""
        _, stride = self.covered(features)
        pixels = features.repeat_interleave(stride, -2)[..., : self.size[0], :]
        return pixels.repeat_interleave(stride, -1)[..., : self.size[1]]

    def _cells(self, stride):
        return tuple(-(-n // stride) for n in self.size)

    def _said(self):
        return f"a picture of {self.size} in an image of {tuple(self.image.shape[-2:])} pixels"


def padded(image, multiple):
    """`Padded` of an image (3, H, W) whose sides become the next multiples of `multiple`."""
    height, width = image.shape[-2:]
    below, right = -height % multiple, -width % multiple
    return Padded(F.pad(image, (0, right, 0, below), mode="replicate"), (height, width))


def whole_size(output_size, picture, image):
    """(H', W') of the whole image where its picture has `output_size`; exact to half a pixel of the output.

    Args:
        picture, image: their sizes (height, width) as they are.
    """
    return tuple(
        (2 * out * whole + part) // (2 * part) for out, part, whole in zip(output_size, picture, image, strict=True)
    )
