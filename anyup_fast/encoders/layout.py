"""How the numbers of an encoder's output lie, found from what it gives for pictures of several sizes.

Shapes decide, and only where one reading fits all of them: nothing is guessed and nothing transposed.
"""

import math
from dataclasses import dataclass

from .base import tokens_to_grid

TOKENS, CHANNELS_FIRST, CHANNELS_LAST = "tokens", "channels first", "channels last"
# Cells of the pictures that an encoder is tried with, (rows, columns): no two sides alike, no two areas, and no
# size that is another one turned.
PROBE_CELLS = ((4, 6), (5, 7), (6, 3))
PROBE_BATCH = 2


@dataclass(frozen=True)
class Layout:
    """How an output lies.

    Attributes:
        kind: "tokens" (B, prefix + h * w, C) in raster order, "channels first" (B, C, h, w) or "channels last"
            (B, h, w, C).
        stride: pixels of the image per cell, along both axes.
        channels: C.
        prefix: tokens in front that belong to no cell (class token, registers).
    """

    kind: str
    stride: int
    channels: int
    prefix: int = 0

    def grid(self, image_size):
        """(h, w) for an image of a size (H, W)."""
        return tuple(side // self.stride for side in image_size)

    def shape(self, batch, image_size):
        """The shape of the output for a batch of images of a size (H, W)."""
        height, width = self.grid(image_size)
        return {
            TOKENS: (batch, self.prefix + height * width, self.channels),
            CHANNELS_FIRST: (batch, self.channels, height, width),
            CHANNELS_LAST: (batch, height, width, self.channels),
        }[self.kind]


def probe_sizes(unit):
    """Sizes (H, W) to try an encoder with whose images have sides that are multiples of `unit`."""
    return [(rows * unit, columns * unit) for rows, columns in PROBE_CELLS]


def find_layout(outputs, sizes, batch=PROBE_BATCH, *, name="the encoder", prefix=None):
    """Find the one layout that fits what an encoder gave for images of several sizes.

    Args:
        outputs: for each of `sizes` the output, a tensor or its shape.
        sizes: (H, W) of the images, at least two, none of them square, of different areas (`probe_sizes`).
        batch: how many images there were each time, at least 2.
        name: the encoder, for messages.
        prefix: number of tokens in front that belong to no cell; None finds it.

    Returns:
        Layout.

    Raises:
        ValueError: sizes that can't tell one layout from another.
        RuntimeError: no layout fits all outputs, or another number of prefix tokens than `prefix`.
    """
    sizes = [tuple(size) for size in sizes]
    areas = [height * width for height, width in sizes]
    if len(outputs) != len(sizes) or len(sizes) < 2 or len({*areas}) < 2 or any(h == w for h, w in sizes) or batch < 2:
        raise ValueError(
            f"sizes: need two that are not square, of different areas, an output for each, and a batch of at least 2; "
            f"got {sizes}, {len(outputs)} outputs, batch {batch}"
        )
    shapes = [tuple(getattr(output, "shape", output)) for output in outputs]
    given = f"{name} gave {_listed(shapes)} for {batch} images of {_listed([f'{h} x {w}' for h, w in sizes])} pixels"
    if any(shape[:1] != (batch,) for shape in shapes):
        raise RuntimeError(
            f"{given}: the first axis does not follow the batch; it must give (B, ...) for (B, bands, H, W)"
        )
    found = [layout for layout in _readings(shapes, sizes) if layout is not None]
    if len(found) != 1:
        raise RuntimeError(f"{given}: {_why_not_one(found, shapes, sizes)}")
    (layout,) = found
    if prefix is not None and prefix != layout.prefix:
        raise RuntimeError(
            f"{given}: that is {layout.prefix} tokens beside a grid of {layout.stride} pixels a cell, not "
            f"prefix_tokens={prefix}"
        )
    return layout


def as_map(output, layout, image_size, *, batch=None, name="the encoder"):
    """The output of an encoder as a map (B, C, h, w), contiguous.

    Args:
        output: tensor that lies as `layout` says.
        layout: of `find_layout`.
        image_size: (H, W) of the images.
        batch: how many images there were; None does not look.
        name: the encoder, for messages.

    Raises:
        RuntimeError: the output does not follow the grid or the batch.
    """
    shape = tuple(output.shape)
    expected = layout.shape(shape[0] if batch is None and shape else batch, image_size)
    if shape != expected or any(side % layout.stride for side in image_size):
        raise RuntimeError(
            f"{name} gave {shape} for H = {image_size[0]}, W = {image_size[1]}, not {expected}: its output does not "
            f"follow the {'grid' if shape[:1] == expected[:1] else 'batch'} (stride {layout.stride}, {layout.kind}, "
            f"{layout.prefix} tokens in front)"
        )
    if layout.kind == TOKENS:
        return tokens_to_grid(output[:, layout.prefix :], layout.grid(image_size))
    return (output.permute(0, 3, 1, 2) if layout.kind == CHANNELS_LAST else output).contiguous()


def check_order(run, layout, image, *, name="the encoder"):
    """Hold a layout against what the encoder does: a cell whose pixels change must not change another place most.

    Shapes can't tell tokens by columns from tokens by rows, nor tokens of no cell at the end from such in front, nor a
    picture that is turned inside. Here one cell of a picture is changed, and the change of its own cell compared with
    those where it would be if the tokens lay so. An encoder in which neither changes passes.

    Args:
        run: called with images, gives the output, a tensor of the layout.
        layout: to be held against it.
        image: (1, bands, H, W), not square, the layout's stride in both sides; as `run` takes it.
        name: the encoder, for messages.

    Raises:
        RuntimeError: the change is found at another place.
    """
    size = tuple(image.shape[2:])
    height, width = layout.grid(size)
    column, stride = width - 1, layout.stride
    other = image.clone()
    other[:, :, :stride, column * stride :] *= -1  # the cell in the upper right corner
    change = run(other).double() - run(image).double()
    if layout.kind == TOKENS:
        change = change.square().sum(2)[0]
    else:
        change = as_map(change, layout, size, name=name).square().sum(1).flatten()
    places = {
        "by columns, not by rows": layout.prefix + column * height,
        "upside down": layout.prefix + (height - 1) * width + column,
        "mirrored": layout.prefix,
        f"with {layout.prefix} tokens of no cell at the end, not in front": column,
    }
    own = layout.prefix + column
    for what, place in places.items():
        if place != own and change[place] == change.max() and change[place] > 2 * change[own]:
            raise RuntimeError(
                f"{name} changes another place of its output than the one whose pixels change: the output seems to lie "
                f"{what}; give it back in raster order, rows first"
            )


def _readings(shapes, sizes):
    """The layouts that fit, one entry for each way to read the axes."""
    ranks = {len(shape) for shape in shapes}
    if ranks == {3}:
        return [_tokens([shape[1] for shape in shapes], [shape[2] for shape in shapes], sizes)]
    if ranks == {4}:
        return [
            _map(CHANNELS_FIRST, [s[2:] for s in shapes], [s[1] for s in shapes], sizes),
            _map(CHANNELS_LAST, [s[1:3] for s in shapes], [s[3] for s in shapes], sizes),
        ]
    return []


def _tokens(counts, channels, sizes):
    """The layout of tokens by their counts, or None."""
    areas = [height * width for height, width in sizes]
    few, many = (pick(range(len(sizes)), key=areas.__getitem__) for pick in (min, max))
    more = counts[many] - counts[few]
    if more <= 0 or (areas[many] - areas[few]) % more or len({*channels}) > 1:
        return None
    stride = math.isqrt((areas[many] - areas[few]) // more)
    prefix = counts[few] - areas[few] // stride**2
    layout = Layout(TOKENS, stride, channels[0], prefix)
    fits = all(
        prefix >= 0 and _divides(stride, size) and math.prod(layout.grid(size)) + prefix == count
        for size, count in zip(sizes, counts, strict=True)
    )
    return layout if fits else None


def _map(kind, grids, channels, sizes):
    """The layout of maps by their grids, or None."""
    strides = {
        side // cells if cells and side % cells == 0 else None
        for size, grid in zip(sizes, grids, strict=True)
        for side, cells in zip(size, grid, strict=True)
    }
    if len(strides) > 1 or None in strides or len({*channels}) > 1:
        return None
    return Layout(kind, strides.pop(), channels[0])


def _divides(stride, size):
    return all(side % stride == 0 for side in size)


def _why_not_one(found, shapes, sizes):
    """Why no layout, or more than one, fits."""
    if found:
        return (
            f"both {' and '.join(layout.kind for layout in found)} fit; say which by a function that gives (B, C, h, w)"
        )
    if {len(shape) for shape in shapes} == {2}:
        return "that is one vector an image, not a grid; take a layer before the pooling"
    if not {len(shape) for shape in shapes} <= {3, 4}:
        return "need tokens (B, N, C) or maps (B, C, h, w) or (B, h, w, C)"
    if len({*shapes}) == 1:
        return "the grid does not follow the picture; it needs an encoder that takes pictures of several sizes"
    turned = [(width, height) for height, width in sizes]
    if any(_readings([(shape[0], *shape[:0:-1]) for shape in shapes], sizes)) and len(shapes[0]) == 3:
        return "that is (B, C, N), channels before tokens; give back x.transpose(1, 2)"
    if any(_readings(shapes, turned)) and len(shapes[0]) == 4:
        return "rows and columns are exchanged; give back (B, C, h, w)"
    return "no stride in whole pixels, alike along both axes, and no number of tokens in front fits all of them"


def _listed(things):
    return " and ".join([", ".join(map(str, things[:-1])), str(things[-1])])
