"""Vision models of Hugging Face transformers: ViTs, hierarchical and convolutional networks, towers, backbones."""

import logging
import math

import torch
from torch.nn import functional as F

from ..files import expanded
from .base import IMAGENET_MEAN, IMAGENET_STD, Encoder, saved_settings
from .families import Vision
from .layout import CHANNELS_FIRST, CHANNELS_LAST, PROBE_BATCH, TOKENS, Layout, as_map, find_layout, probe_sizes
from .opening import open_model, statistics_in_wrapper

_log = logging.getLogger("anyup_fast")
# what models raise at pictures of a size that they can't take
REFUSALS = (RuntimeError, ValueError, AssertionError, IndexError)
MOST_PREFIX = 16  # tokens of no cell in a model of one size, where counts of one size must tell them from cells


class HuggingFaceEncoder(Encoder):
    """A vision model of transformers.

    `layer=-1` is the model's output: `last_hidden_state`, with the final norm if the model applies one to it, or the
    map of its neck. The layers before are its hidden states as they are. Class and register tokens are dropped. In
    hierarchical and convolutional models layers differ in stride and channels; `patch_size` and `dim` are the last
    one's. A model of one size only gets smaller pictures padded with zeros, at the bottom and to the right, and what
    belongs to the padding is cut off.
    """

    def __init__(self, name, vision, *, numbers, layouts, sizes, native, multiple, source, mean, std):
        last = layouts[-1]
        super().__init__(
            name,
            source=source,
            patch_size=last.stride,
            dim=last.channels,
            num_layers=len(layouts),
            mean=mean,
            std=std,
        )
        self.vision = vision
        self.numbers = numbers
        self.layouts = layouts
        self.sizes = sizes  # of a model of one size: what each layer's grid covers
        self.native = native
        self.multiple = multiple

    @property
    def model(self):
        """The module of transformers."""
        return self.vision.model

    @property
    def prefix_tokens(self):
        """Class, register and other tokens in front of the last layer's."""
        return self.layouts[-1].prefix

    def features(self, image, layer):
        return self.features_of_layers(image, (layer,))[0]

    def features_of_layers(self, image, layers):
        size = tuple(image.shape[2:])
        if self.native is not None:
            full = self.native
        else:
            full = tuple(-(-n // self.multiple) * self.multiple for n in size)
        if full != size:
            image = F.pad(image, (0, full[1] - size[1], 0, full[0] - size[0]))
        try:
            states, last = self.vision(image, hidden=any(layer != self.num_layers for layer in layers))
        except REFUSALS as error:
            raise ValueError(f"image of size {size} is refused by {self.vision.kind}: {error}") from error
        found = []
        for layer in layers:
            layout = self.layouts[layer - 1]
            if isinstance(layout, str):
                raise RuntimeError(f"layer {layer} of {self.name} is no grid of features: {layout}")
            output = last if layer == self.num_layers else states[self.numbers[layer - 1]]
            covered = full if self.native is None else self.sizes[layer - 1]
            maps = as_map(output, layout, covered, batch=len(image), name=self.name)
            height, width = (-(-n // layout.stride) for n in size)
            found.append(maps[..., :height, :width].contiguous())
        return found

    def _check_image(self, image):
        super()._check_image(image)
        size, native, patch = tuple(image.shape[2:]), self.native, self.patch_size
        if native is not None and any(n > most for n, most in zip(size, native, strict=True)):
            scale = min(most / n for n, most in zip(size, native, strict=True))
            fitting = tuple(max(patch, int(n * scale) // patch * patch) for n in size)
            raise ValueError(
                f"image must have at most {native[0]} x {native[1]} pixels for {self.name}, whose model takes no other "
                f"size, got H = {size[0]}, W = {size[1]}: use load_image(..., size={fitting})"
            )


def load(name, weights="auto"):
    """Load a vision model of the Hugging Face hub or of a local folder.

    The model runs on small pictures of two sizes, or on one of its own size if it takes no other, so that strides,
    channels, layers and class tokens are what it really gives. Of a model with other parts (text, heads, masks) only
    the part that sees pictures is kept.

    Args:
        name: "owner/model", a folder with a "/" in its name, or either after "hf:".
        weights: "auto" only; the name says where they are.

    Returns:
        Encoder on the CPU, in float32.

    Raises:
        ValueError: `weights` is not "auto".
        RuntimeError: the model cannot be had, is no vision model, or its output follows no grid.
    """
    if str(weights) != "auto":
        raise ValueError(f"weights must be 'auto' for {name}, got {str(weights)!r}; the name says where they are")
    place = name.removeprefix("hf:")
    place = str(expanded(place)) if place.startswith("~") else place
    ways = f"network access or a filled local cache if {place!r} is a model of the hub, else a folder with one"
    model = open_model(place, ways)
    mean, std, note = normalisation(place)
    source = f"{type(model).__name__} weights from Hugging Face: {place} ({note})"
    return encoder_of(model, name, place, source=source, mean=mean, std=std)


def encoder_of(model, name, place, *, source, mean, std):
    """The encoder of a vision model of transformers, in float32 and eval mode, that has been loaded already.

    Args:
        name, source, mean, std: of the encoder, see `Encoder`.
        place: where the model comes from, for messages.

    Raises:
        RuntimeError: its output follows no grid.
    """
    vision = Vision(model).eval()
    return HuggingFaceEncoder(name, vision, source=source, mean=mean, std=std, **_measure(vision, place))


@torch.no_grad()
def _measure(vision, place):
    """Run `vision` and return what HuggingFaceEncoder wants to know of it."""
    name = f"{place}: {vision.kind}"
    unfit = refused = None
    for unit in _units(vision.model):
        sizes = probe_sizes(unit)[:2]
        try:
            tried = [_outputs(vision, size, unit) for size in sizes]
        except REFUSALS as error:
            refused = error
            continue
        try:
            measured = _fitted(vision, tried, sizes, unit, name)
        except RuntimeError as error:
            unfit = unfit or error
            continue
        return {**measured, "native": None, "multiple": _multiple(vision, measured, unit)}
    if unfit is not None:
        raise unfit
    native = _native(vision.model.config)
    if native is None:
        raise RuntimeError(f"{name} can't be run on a plain picture: {_line(refused)}") from refused
    unit = _patch(vision.model.config) or 16
    vision.singly = True  # such pictures are large, and two at once take twice the memory
    try:
        tried = [_outputs(vision, native, unit)]
    except REFUSALS as error:
        raise RuntimeError(f"{name} can't be run on a plain picture of its own size: {_line(error)}") from error
    vision.singly = False
    measured = _fitted(vision, tried, [native], unit, name)
    return {**measured, "native": native, "multiple": measured["layouts"][-1].stride}


def _outputs(vision, size, unit):
    """What `vision` gives for a picture and the same with one cell changed: hidden states and output."""
    picture = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).repeat(PROBE_BATCH, 1, 1, 1)
    row, column = _changed(size, unit)
    picture[1, :, row : row + unit, column : column + unit] *= -3
    try:
        states, last = vision(picture)
        if last is not None and last.ndim and len(last) == 1 and not vision.singly:
            vision.singly = True  # it packs all pictures in one row
            states, last = vision(picture)
    except TypeError as error:
        if "missing" not in str(error):
            raise
        raise RuntimeError(f"{vision.kind} takes more than pixel_values: {error}") from error
    return states, last


def _changed(size, unit):
    """(y, x) of the corner of the cell that is changed: its row is not its column, from whatever side one counts."""
    rows, columns = (n // unit for n in size)
    return (rows - 1) // 3 * unit, (columns - 1 - (columns - 1) // 4) * unit


def _fitted(vision, tried, sizes, unit, name):
    """Layouts of the layers and the indices of their states, from what was given for each of `sizes`."""
    lasts = [last for _, last in tried]
    if any(last is None or last.ndim < 3 for last in lasts):
        raise RuntimeError(f"{name} gives no last_hidden_state of tokens or maps")
    if not all(last.isfinite().all() for last in lasts):
        raise RuntimeError(f"{name} gives NaN or infinite features for a plain picture")
    states = tried[0][0]
    numbers = vision.layers(states)[:-1] if states else []
    parts = [[given[number] for given, _ in tried] for number in numbers] + [lasts]
    first = [given[0] for given, _ in tried] if states else lasts
    layouts, covered = [], []
    seen = None
    for outputs in (first, *parts):
        size = sizes[0]
        try:
            if len(sizes) > 1:
                layout = find_layout(outputs, sizes, name=name)
            else:
                layout, size = _layout_of_one_size(tuple(outputs[0].shape), size, unit, name)
            if seen is not None and (layout.kind, layout.prefix, layout.stride) != seen:
                _change(outputs[0], layout, layout.grid(size), _changed(sizes[0], unit), unit, name)
        except RuntimeError as error:
            if outputs is lasts:
                raise
            layout = str(error)
        if seen is None and isinstance(layout, Layout):
            seen = layout.kind, layout.prefix, layout.stride
            change = _change(outputs[0], layout, layout.grid(size), _changed(sizes[0], unit), unit, name)
            _held(change, layout, _changed(sizes[0], unit), unit, name)
        layouts.append(layout)
        covered.append(size)
    return {"numbers": tuple(numbers), "layouts": tuple(layouts[1:]), "sizes": tuple(covered[1:])}


def _layout_of_one_size(shape, size, patch, name):
    """The layout of a model that takes one size only, and what its grid covers: a last cell may be a partial one.

    Shapes must leave one way to read them; of tokens, that with the finest grid and the fewest tokens in front.
    """
    readings = []
    if len(shape) == 4:
        for kind, grid, channels in ((CHANNELS_FIRST, shape[2:], shape[1]), (CHANNELS_LAST, shape[1:3], shape[3])):
            for stride in {-(-size[0] // grid[0]), size[0] // grid[0]} - {0} if grid[0] else ():
                if grid in _grids(size, stride):
                    readings.append((Layout(kind, stride, channels), grid))
                    break
    elif len(shape) == 3:
        fits = [
            (stride, shape[1] - math.prod(grid), grid)
            for stride in sorted({patch * 2**k // 8 for k in range(12)} - {0})
            for grid in _grids(size, stride)
            if stride <= min(size) // 2 and 0 <= shape[1] - math.prod(grid) <= MOST_PREFIX
        ]
        readings += [(Layout(TOKENS, s, shape[2], prefix), grid) for s, prefix, grid in sorted(fits)[:1]]
    if len(readings) != 1:
        raise RuntimeError(
            f"{name} gave {shape} for {size[0]} x {size[1]} pixels, the only size that it takes: "
            f"{'more than one way fits' if readings else 'no grid fits'} to read it as a grid"
        )
    layout, grid = readings[0]
    return layout, tuple(n * layout.stride for n in grid)


def _grids(size, stride):
    """Grids (h, w) that a size may have been divided into, without and with partial last cells."""
    return dict.fromkeys([tuple(n // stride for n in size), tuple(-(-n // stride) for n in size)])


def _change(output, layout, grid, place, unit, name):
    """How much each cell (h, w) changed with the pixels of one cell.

    Args:
        place: (y, x) of the cell of `unit` pixels whose pixels change.

    Raises:
        RuntimeError: not all tokens beside those of the grid lie in front of it.
    """
    change = (output[1].double() - output[0].double()).square()
    if layout.kind != TOKENS:
        return change.sum(0 if layout.kind == CHANNELS_FIRST else 2)
    height, width = grid
    change = change.sum(1)
    there = _own(layout, place, unit)
    grids = [change[k : k + height * width].view(height, width) for k in range(layout.prefix + 1)]
    best = max(range(len(grids)), key=lambda k: grids[k][there].sum())
    if best != layout.prefix:
        raise RuntimeError(
            f"{name} gives {layout.prefix} tokens beside those of the {height} x {width} patches, of which only "
            f"{best} lie in front: no class or register tokens, so which tokens are patches is not known"
        )
    return grids[-1]


def _own(layout, place, unit):
    """Index of the cells of a grid that a cell of `unit` pixels at (y, x) has."""
    cells = max(1, unit // layout.stride)
    return tuple(slice(n // layout.stride, n // layout.stride + cells) for n in place)


def _held(change, layout, place, unit, name):
    """Hold the first layout that was found against where features change most with the pixels of one cell.

    It must be that cell, or one beside it where neighbours share pixels.

    Raises:
        RuntimeError: another place changed.
    """
    there = _own(layout, place, unit)
    if not change.any():
        raise RuntimeError(f"{name} changes no feature where pixels change: it does not see them")
    y, x = divmod(int(change.flatten().argmax()), change.shape[1])
    beside = 0 if layout.kind == TOKENS and layout.stride == unit else 1
    if not all(s.start - beside <= n < s.stop + beside for n, s in zip((y, x), there, strict=True)):
        raise RuntimeError(
            f"{name} changes most at row {y}, column {x} of a grid where the pixels at row {there[0].start}, column "
            f"{there[1].start} change: its features do not lie as the picture does"
        )


def _multiple(vision, measured, unit):
    """Pixels that sides must be multiples of for `vision`: the coarsest stride, or `unit` where that is not enough."""
    layouts = [layout for layout in measured["layouts"] if isinstance(layout, Layout)]
    least = math.lcm(*(layout.stride for layout in layouts))
    if least >= unit:
        return least
    size = (3 * least, 5 * least) if 3 * least % unit else (5 * least, 7 * least)
    try:
        states, last = vision(torch.zeros(PROBE_BATCH, 3, *size))
        outputs = [*(states[number] for number in measured["numbers"]), last]
        for output, layout in zip(outputs, measured["layouts"], strict=True):
            if isinstance(layout, Layout):
                as_map(output, layout, size)
    except REFUSALS:
        return unit
    return least


def _units(model):
    """Sides of a cell to try pictures with: the patch of a plain ViT, else what hierarchical networks end with."""
    config = model.config
    embed = getattr(getattr(model, "timm_model", None), "patch_embed", None)
    patch = _patch(config) or _side(getattr(embed, "patch_size", None))
    plain = patch is not None and patch >= 8 and not isinstance(getattr(config, "depths", None), (list, tuple))
    return list(dict.fromkeys([*([patch] if plain else []), 32, 64]))


def _patch(config):
    for part in (config, getattr(config, "backbone_config", None)):
        patch = _side(getattr(part, "patch_size", None))
        if patch is not None:
            return patch
    return None


def _native(config):
    """(H, W) that the model was made for, or None."""
    for part in (config, getattr(config, "backbone_config", None)):
        size = getattr(part, "image_size", None)
        if isinstance(size, int):
            return size, size
        if isinstance(size, (list, tuple)) and len(size) == 2:
            return tuple(size)
    return None


def _side(value):
    """An int as it is, a sequence of equal ints as one of them; else None."""
    if isinstance(value, (list, tuple)) and len(set(value)) == 1:
        value = value[0]
    return value if isinstance(value, int) else None


def _line(error):
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def normalisation(place):
    """Return mean and standard deviation for values in [0, 1], and a note on where they come from."""
    from transformers.image_processing_base import ImageProcessingMixin

    if (statistics := statistics_in_wrapper(saved_settings(place))) is not None:
        return *statistics, "mean {}, std {}".format(*map(list, statistics))
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(place)
    except OSError:
        note = "no image processor config: ImageNet mean and std assumed"
        _log.warning("%s: %s", place, note)
        return IMAGENET_MEAN, IMAGENET_STD, note
    if settings.get("rescale_offset"):
        raise RuntimeError(f"{place}: images rescaled with an offset (rescale_offset) are not supported")
    scale = 255 * settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 255
    mean, std = (0.0,) * 3, (1.0,) * 3
    if settings.get("do_normalize", True):
        if not settings.get("image_mean") or not settings.get("image_std"):
            raise RuntimeError(f"{place}: its image processor config names no image_mean and image_std")
        mean, std = settings["image_mean"], settings["image_std"]
    return [m / scale for m in mean], [s / scale for s in std], f"mean {list(mean)}, std {list(std)}"
