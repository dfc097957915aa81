"""What every encoder has in common: its attributes, the checks of its input, the normalisation."""

import re
from importlib import import_module, metadata
from pathlib import Path

import torch
from torch import nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TRANSFORMERS = "4.48"  # the oldest that encoders can use
# kinds of models that came later, and with which
SINCE = {
    "siglip2": "4.49",
    "aimv2": "4.54",
    "dinov3_vit": "4.56",
    "dinov3_convnext": "4.56",
    "sam2": "4.56",
    "metaclip_2": "4.56",
}


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
        bands: how many channels its images have. Three are red, green and blue, ImageNet-normalised; images of
            another number come as they are, and `mean` and `std` are in their units.
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
        self.bands = len(self.mean)
        given = (IMAGENET_MEAN, IMAGENET_STD) if self.bands == 3 else ((0.0,) * self.bands, (1.0,) * self.bands)
        from_mean, from_std, to_mean, to_std = (
            torch.tensor(value, dtype=torch.float64).view(-1, 1, 1) for value in (*given, self.mean, self.std)
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
            image: (B, bands, H, W) floating point, ImageNet-normalised where bands are three, on the encoder's device;
                H and W are multiples of `patch_size`. The encoder's own mean and standard deviation are applied inside.
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
        """Features of `image`, checked and in the encoder's normalisation; `layer` counts from 1."""
        raise NotImplementedError

    def not_finite(self):
        """The beginning of a sentence that says so of features of this encoder."""
        if any(parameter.dtype == torch.float16 for parameter in self.parameters()):
            return (
                f"{self.name} gave NaN or infinite values in float16, whose range ends at 65504; compute it in "
                "bfloat16 or float32"
            )
        return f"{self.name} gave NaN or infinite values"

    def _check_image(self, image):
        if not isinstance(image, torch.Tensor):
            raise TypeError(
                f"image must be a tensor (B, {self.bands}, H, W), got {type(image).__name__}; see load_image"
            )
        if image.ndim != 4 or image.shape[1] != self.bands:
            raise ValueError(
                f"image must have the shape (B, {self.bands}, H, W), got {tuple(image.shape)}; one image is image[None]"
            )
        if not image.is_floating_point():
            raise ValueError(f"image must be float, ImageNet-normalised, got {image.dtype}; see load_image")
        if image.device != self.device:
            raise ValueError(
                f"image is on {image.device}, encoder {self.name} on {self.device}; move the image or use "
                f"{self._on(str(image.device))}"
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

    def _on(self, device):
        """What to write for this encoder on another device."""
        return f"load_encoder({self.name!r}, device={device!r})"

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
        RuntimeError: the package is not installed, or too old.
    """
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise RuntimeError(f"this encoder needs {module}: {remedy}") from error
    if module == "transformers" and _version(found.__version__) < _version(TRANSFORMERS):
        raise RuntimeError(
            f"encoders need transformers {TRANSFORMERS} or newer, {found.__version__} is installed: "
            "pip install --upgrade transformers"
        )
    return found


def _version(text):
    """Numbers of a version, comparable; what is no number ends it."""
    numbers = re.match(r"\d+(\.\d+)*", str(text))
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def read_pretrained(loader, place, ways, **arguments):
    """Call `loader.from_pretrained(place, **arguments)` of transformers.

    Raises:
        RuntimeError: nothing usable is there or can be reached; the message says what to do: accept a licence, upgrade
            transformers, install a package, or `ways`.
    """
    from safetensors import SafetensorError

    try:
        return loader.from_pretrained(place, **arguments)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise RuntimeError(_why_not_read(place, error, ways)) from error


def _why_not_read(place, error, ways):
    kinds, said = [], str(error)
    cause = error
    while cause is not None and len(kinds) < 20:
        kinds += [base.__name__ for base in type(cause).__mro__]
        said += f"\n{cause}"
        cause = cause.__cause__ or cause.__context__
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    page = f"https://huggingface.co/{place}"
    login = "`hf auth login`, or HF_TOKEN in the environment"
    if "GatedRepoError" in kinds or "gated repo" in said:
        return f"{place} is gated: accept its licence at {page} (access may have to be granted), then log in: {login}"
    if "RepositoryNotFoundError" in kinds:
        return f"{place} could not be loaded: the hub has no model of that name, or it is private; check it, or {login}"
    if "SafetensorError" in kinds:
        return (
            f"{place} could not be loaded: {_damaged(place)} is cut off or damaged ({reason}); remove it and copy or "
            "download it again"
        )
    if "LocalEntryNotFoundError" in kinds or "couldn't connect to" in said:
        return (
            f"{place} could not be loaded: it is not in the local cache, and the hub can't be reached; run "
            f"`hf download {place}` once with a network, or give a folder that holds the model"
        )
    if isinstance(error, ImportError):
        return f"{place} could not be loaded: {' '.join(said.split())[:300]}; install what is missing"
    unknown = isinstance(error, KeyError) and error.args[0] == saved_settings(place).get("model_type")
    if unknown or "does not recognize this architecture" in said or "trust_remote_code" in said:
        return _unknown_kind(place)
    return f"{place} could not be loaded ({reason}); it needs {ways}{newer(place)}"


def _damaged(place):
    """The .safetensors file of a folder that can't be opened; in words where it lies in the cache."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(Path(place).glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError:
            return file.name
    return "its .safetensors file" if Path(place).is_dir() else "its .safetensors file in the cache"


def _unknown_kind(place):
    config = saved_settings(place)
    kind, installed = config.get("model_type"), import_module("transformers").__version__
    if "auto_map" in config:
        return f"{place} could not be loaded: its kind {kind!r} comes with code of its own, which is not run"
    saved = config.get("transformers_version")
    if kind in SINCE and _version(installed) < _version(SINCE[kind]):
        return (
            f"{place} could not be loaded: its kind {kind!r} needs transformers {SINCE[kind]} or newer, {installed} is "
            "installed: pip install --upgrade transformers"
        )
    since = f"it was saved with transformers {saved}" if saved else "its config does not say which version has it"
    return (
        f"{place} could not be loaded: its kind {kind!r} is unknown to transformers {installed}, which is installed; "
        f"{since}: pip install --upgrade transformers"
    )


def newer(place):
    """What to add to a message where the model at `place` was saved with a newer transformers than is installed."""
    saved, installed = saved_settings(place).get("transformers_version"), import_module("transformers").__version__
    if saved is None or _version(saved) <= _version(installed):
        return ""
    return f"; it was saved with transformers {saved}, and {installed} is installed: pip install --upgrade transformers"


def saved_settings(place):
    """The config of a model as it lies in its file, here or in the cache; {} where there is none."""
    transformers = import_module("transformers")
    try:
        return transformers.PretrainedConfig.get_config_dict(place, local_files_only=True)[0]
    except (OSError, ValueError):  # what has been told already
        return {}


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
