"""Numbers as lossless greyscale pictures of 8 bits: planes of features, and where the pixels of a lattice look."""

import base64
import io

import numpy as np
import torch

CANVAS = 16384  # pixels that a side of a canvas may have in every browser
COARSE = 0.5  # of the step of the widest plane: no plane is stored more finely than this


class Levels:
    """Which numbers the 256 values of a byte stand for, plane by plane: scale * byte + offset.

    High-res features are weighted means of low-res ones, so the ranges of the low-res ones hold for both. An error of
    a narrow plane counts in a cosine as much as one of a wide plane; finer steps than half of the widest plane's would
    take more bytes and bring nothing that can be measured.
    """

    def __init__(self, low):
        """`low`: (K, h, w) low-res coordinates."""
        least, most = low.flatten(1).aminmax(dim=1)
        width = (most - least).double()
        step = torch.maximum(width, COARSE * width.max()) / 255
        self.scale = torch.where(step > 0, step, 1).float()
        self.offset = least.float()

    def stored(self, coordinates):
        """Coordinates (K, H, W) as the page's {"scale", "offset", "columns", "image"}."""
        scale, offset = (t[:, None, None].to(coordinates.device) for t in (self.scale, self.offset))
        levels = ((coordinates - offset) / scale).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        columns = plane_columns(*levels.shape)
        return {
            "scale": self.scale.tolist(),
            "offset": self.offset.tolist(),
            "columns": columns,
            "image": png(laid_out(levels, columns)),
        }


def plane_columns(count, height, width):
    """Columns of planes side by side, so that no side leaves `CANVAS`; None where there is no such number."""
    if max(height, width) > CANVAS:
        return None
    columns = -(-count // (CANVAS // height))
    return columns if columns * width <= CANVAS else None


def laid_out(planes, columns):
    """Planes (K, H, W) as one picture: plane k in row k // columns and column k % columns, the rest zeros."""
    count, height, width = planes.shape
    rows = -(-count // columns)
    padded = np.zeros((rows * columns, height, width), np.uint8)
    padded[:count] = planes
    return padded.reshape(rows, columns, height, width).swapaxes(1, 2).reshape(rows * height, columns * width)


def lattice(prepared, step):
    """Attention of every `step`-th pixel as the page's {"step", "rows", "columns", "window", "scale", "image"}.

    Cells that are `window` apart share a channel, so that a pixel's window holds each channel once: as many channels
    as a window has cells, whatever the grid.

    Raises:
        ValueError: a step that no pixel of the picture is left with, or so many that they fit on no canvas.
    """
    size, grid = prepared.output_size, tuple(prepared.maps.shape[-2:])
    if step > min(size):
        raise ValueError(f"attention_step: need at most {min(size)} for a picture of {size[0]}x{size[1]}, got {step}")
    rows, cols = (torch.arange(step // 2, n, step) for n in size)
    bounds = prepared.model.cross_decode.bounds(tuple(prepared.image.shape[2:]), grid)
    row_bounds, col_bounds = (table.cpu()[places].long() for table, places in zip(bounds, (rows, cols), strict=True))
    window = [int(table.diff(dim=1).max()) for table in (row_bounds, col_bounds)]
    sides = len(rows) * window[0], len(cols) * window[1]
    if max(sides) > CANVAS:
        raise ValueError(f"attention_step: every {step} pixels make a picture of {sides}; give {2 * step}, or None")
    residue = (torch.arange(grid[0]) % window[0])[:, None] * window[1] + torch.arange(grid[1]) % window[1]
    cells = torch.nn.functional.one_hot(residue, window[0] * window[1]).permute(2, 0, 1)[None].float()
    points = torch.cartesian_prod(rows, cols)
    weights = prepared.showing(cells.to(prepared.maps.device)).at(points)[0].cpu().unflatten(-1, window)
    down, across = (
        (table[:, :1] + torch.arange(n)) % n for table, n in zip((row_bounds, col_bounds), window, strict=True)
    )
    weights = weights.unflatten(0, (len(rows), len(cols)))
    i, j = torch.arange(len(rows))[:, None, None, None], torch.arange(len(cols))[None, :, None, None]
    blocks = weights[i, j, down[:, None, :, None], across[None, :, None, :]]
    scale = blocks.max().item() / 255
    levels = (blocks / scale).round().to(torch.uint8).permute(0, 2, 1, 3).reshape(sides).numpy()
    return {
        "step": step,
        "rows": row_bounds[:, 0].tolist(),
        "columns": col_bounds[:, 0].tolist(),
        "window": window,
        "scale": [scale],
        "image": png(levels),
    }


def png(levels):
    """A uint8 array (rows, columns) as the data URL of a greyscale PNG."""
    from PIL import Image

    return _url("png", Image.fromarray(np.ascontiguousarray(levels)), "PNG")


def photograph(picture):
    """A PIL picture as the data URL of a JPEG."""
    return _url("jpeg", picture, "JPEG", quality=90)


def _url(kind, picture, name, **options):
    file = io.BytesIO()
    picture.save(file, name, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def floats(array):
    """Numbers as base64 of float32, little-endian."""
    return base64.b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode()
