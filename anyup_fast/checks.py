"""Checks of what callers hand over, each with the error that names the argument, the value and the remedy."""

import numpy as np
import torch

from .logs import warn_caller

INTEGERS = int, torch.SymInt  # sizes in graphs with dynamic shapes stay symbols
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")  # that a model may be asked to compute in


def checked_output_size(output_size, default, name="output_size"):
    """`output_size` as a pair of positive ints, `default` where it is None; ValueError for anything else."""
    if output_size is None:
        return tuple(default)
    if not isinstance(output_size, (tuple, list, torch.Size)) or len(output_size) != 2:
        raise ValueError(f"{name}: need (height, width) or None, got {output_size!r}")
    if not all(is_count(n) for n in output_size):
        raise ValueError(f"{name}: height and width must be positive whole numbers, got {output_size!r}")
    return tuple(n if isinstance(n, INTEGERS) else int(n) for n in output_size)


def is_count(n):
    """Whether `n` is a positive whole number, or a symbol for one."""
    if isinstance(n, INTEGERS):
        return not isinstance(n, bool) and n > 0
    return hasattr(n, "__index__") and int(n) > 0


def is_flag(value):
    """Whether `value` says yes or no; 0 and 1 do."""
    return isinstance(value, (bool, np.bool_)) or isinstance(value, int) and value in (0, 1)


def check_attention_options(vis_attn, q_chunk_size):
    """ValueError where one of these options of `AnyUp.forward` is what it can't be, as when both change places."""
    order = "by position, vis_attn comes before q_chunk_size"
    if not is_flag(vis_attn):
        raise ValueError(f"vis_attn: need True or False, got {vis_attn!r}; {order}")
    if isinstance(q_chunk_size, (bool, np.bool_)):
        raise ValueError(f"q_chunk_size: need a number of rows or None, got {q_chunk_size!r}; {order}")
    if q_chunk_size is not None and not is_count(q_chunk_size):
        raise ValueError(f"q_chunk_size: need a positive number of rows or None, got {q_chunk_size!r}")


def checked_box(box, size):
    """(top, left, height, width) as ints, or a ValueError where they are none or leave an output of `size`."""
    if not all(hasattr(n, "__index__") and not isinstance(n, bool) for n in box):
        raise ValueError(f"top, left, height, width: need whole numbers, got {box}")
    top, left, height, width = map(int, box)
    if height < 1 or width < 1 or top < 0 or left < 0 or top + height > size[0] or left + width > size[1]:
        raise ValueError(f"top, left, height, width: {box} is empty or leaves the output of {size[0]}x{size[1]} pixels")
    return top, left, height, width


def checked_points(points, batch, size, align):
    """Points of `Prepared.at` as pixels (batch, N, 2), int64, or a ValueError that names the one that lies outside."""
    if align not in ("pixel", "normalized"):
        raise ValueError(f"align: need 'pixel' or 'normalized', got {align!r}")
    if not isinstance(points, torch.Tensor):
        points = torch.as_tensor(np.asarray(points), device="cpu")  # numbers as numpy reads them, whatever the defaults
    if points.ndim == 2:
        points = points.expand(batch, *points.shape)
    if points.ndim != 3 or points.shape[0] != batch or points.shape[2] != 2 or points.shape[1] < 1:
        raise ValueError(f"points: need ({batch}, N, 2) or (N, 2), rows first, got {tuple(points.shape)}")
    points, limits = points.cpu(), torch.tensor(size, device="cpu")
    if align == "pixel":
        if points.is_floating_point() or points.dtype == torch.bool:
            raise ValueError(f"points: pixels are whole numbers, got {points.dtype}; for [0, 1] say align='normalized'")
        outside = (points < 0) | (points >= limits)
    else:
        if not points.is_floating_point():
            raise ValueError(f"points: normalized points are floats in [0, 1], got {points.dtype}")
        outside = ~((points >= 0) & (points <= 1))
    if outside.any():
        b, n = outside.any(-1).nonzero()[0].tolist()
        raise ValueError(f"points: {points[b, n].tolist()} (number {n} of image {b}) lies outside {tuple(size)}")
    if align == "normalized":
        points = (points.double() * limits).long().minimum(limits - 1)
    return points.long()


def checked_device(device, tensor=None):
    """`device` as a torch.device; None means that of `tensor`.

    Raises:
        ValueError: no tensor can be made there.
    """
    if device is None:
        return tensor.device
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"device: {str(device)!r} cannot be used here ({reason}); 'cpu' always can") from error


def checked_compute_dtype(dtype):
    """What a model is to compute in, as a torch.dtype; None for what it computes in anyway.

    Raises:
        ValueError: not None, the name of a dtype in `COMPUTE_DTYPES`, or that dtype.
    """
    known = {name: getattr(torch, name) for name in COMPUTE_DTYPES}
    if dtype is None or dtype in known.values():
        return dtype
    if not isinstance(dtype, str) or dtype not in known:
        raise ValueError(f"dtype: need None or one of {', '.join(map(repr, known))}, got {dtype!r}")
    return known[dtype]


def narrowed_features(features, dtype, name="features"):
    """Features, or what goes by another name, in the dtype that a model computes in.

    Raises:
        ValueError: finite numbers that float16 cannot hold.
    """
    narrowed = features.to(dtype)
    if dtype == torch.float16 and features.dtype != dtype and not narrowed.isfinite().all():
        raise ValueError(f"{name}: they leave the range of float16; ask for dtype='bfloat16', or leave dtype out")
    return narrowed


def checked_inputs(image, features, output_size, channels, device, names=("image", "features", "output_size")):
    """What `AnyUp.forward` is given, for a model on `device` whose images have so many channels.

    Args:
        names: what the caller calls the first three.

    Returns:
        output_size as (H', W').

    Raises:
        ValueError: names what does not fit.
    """
    for name, tensor in zip(names, (image, features), strict=False):
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"{name}: need a floating-point tensor, got {kind}")
        if tensor.ndim != 4:
            remedy = f"; one alone is {name}[None]" if tensor.ndim == 3 else ""
            raise ValueError(f"{name}: need 4 dimensions (B, C, H, W), got shape {tuple(tensor.shape)}{remedy}")
        if 0 in tensor.shape:
            raise ValueError(f"{name}: no dimension may be 0, got shape {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the model on {device}: move one of them with .to(...)")
    if image.shape[1] != channels:
        remedy = layout_remedy(names[0], tuple(image.shape), channels)
        raise ValueError(f"{names[0]}: need {channels} channels, got shape {tuple(image.shape)}{remedy}")
    if image.shape[0] != features.shape[0] and 1 not in (image.shape[0], features.shape[0]):
        raise ValueError(
            f"{names[0]} and {names[1]} differ in batch size, and neither is single: "
            f"{tuple(image.shape)} and {tuple(features.shape)}"
        )
    return checked_output_size(output_size, image.shape[-2:], names[2])


def checked_values(values, image, features, groups=1, read=False):
    """What is mixed in place of `features`, or these themselves where `values` is None.

    Args:
        image: (B, C, H, W). features: (B, C, h, w), both checked. groups: what the channels must be a multiple of.
        read: whether the image is a picture that is read by rows, which has no batch.

    Raises:
        ValueError: says what of `values` does not fit.
    """
    if values is None:
        return features
    grid = tuple(features.shape[-2:])
    if not isinstance(values, torch.Tensor) or not values.is_floating_point():
        kind = values.dtype if isinstance(values, torch.Tensor) else type(values).__name__
        raise ValueError(f"values: need a floating-point tensor (B, V, h, w), got {kind}")
    shape = tuple(values.shape)
    if values.ndim != 4:
        remedy = "; one alone is values[None]" if values.ndim == 3 else ""
        raise ValueError(f"values: need 4 dimensions (B, V, h, w), got shape {shape}{remedy}")
    if values.shape[-2:] != features.shape[-2:] or 0 in shape:
        raise ValueError(
            f"values: need (B, V, {grid[0]}, {grid[1]}), any V, on the grid of the features {tuple(features.shape)}, "
            f"got {shape}"
        )
    batches = image.shape[0], features.shape[0], shape[0]
    most = max(batches)  # a set would need fixed numbers in graphs with dynamic shapes
    if any(n not in (1, most) for n in batches) or read and most != 1:
        others = f"of image {image.shape[0]} and features {features.shape[0]}"
        raise ValueError(f"values: the batch of {values.shape[0]} does not fit that {others}; give as many, or one")
    if values.device != features.device:
        raise ValueError(f"values is on {values.device}, features on {features.device}: move one of them with .to(...)")
    if shape[1] % groups:
        raise ValueError(f"values: head_mode 'split' needs a multiple of the {groups} heads as channels, got {shape}")
    return values


def checked_tile(tile):
    """`tile`, a number of pixels or (height, width), as a pair of positive ints."""
    pair = tile if isinstance(tile, (tuple, list)) else (tile, tile)
    if len(pair) != 2 or not all(hasattr(n, "__index__") and int(n) > 0 for n in pair):
        raise ValueError(f"tile: need a positive number of pixels or (height, width), got {tile!r}")
    return tuple(int(n) for n in pair)


def checked_state(state, features):
    """What `Prepared.state` gave, on the device of the features (B, C, h, w) that it was made of."""
    missing = {"key", "norms"} - set(state)
    if missing:
        raise ValueError(f"state: need key and norms, as Prepared.state gives them; {sorted(missing)} missing")
    grid = len(features), *features.shape[-2:]
    if tuple(state["key"].shape[:3]) != grid or len(state["norms"]) != grid[0]:
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        raise ValueError(f"state: was made of other features, these are {tuple(features.shape)}; got {shapes}")
    return {name: state[name].to(features.device) for name in ("key", "norms")}


def check_shapes(image_shape, features_shape, values_shape=None):
    """ValueError for shapes (B, C, H, W) of image, features and values that are none or do not go together."""
    shapes = {"image_shape": image_shape, "features_shape": features_shape, "values_shape": values_shape}
    if values_shape is None:
        del shapes["values_shape"]
    for name, shape in shapes.items():
        if len(shape) != 4 or not all(is_count(n) for n in shape):
            raise ValueError(f"{name}: need four positive whole numbers (B, C, H, W), got {tuple(shape)}")
    batch = max(image_shape[0], features_shape[0])
    if not {image_shape[0], features_shape[0]} <= {1, batch}:
        raise ValueError(f"image_shape and features_shape differ in batch size: {image_shape}, {features_shape}")
    if values_shape is not None:
        if tuple(values_shape[2:]) != tuple(features_shape[2:]) or len({1, batch, values_shape[0]}) > 2:
            raise ValueError(
                f"values_shape: need the grid of features_shape {tuple(features_shape)} and its batch, or one, got "
                f"{tuple(values_shape)}"
            )


def layout_remedy(name, shape, channels):
    """What to write where `shape` is not (C, H, W) or (B, C, H, W), C being `channels` if that is given; or ""."""
    if channels is None:
        if len(shape) == 2:
            tokens = f"write {name}.T.reshape(C, h, w), without class and register tokens"
            return f"; tokens (N, C)? {tokens}; one channel? write {name}[None]"
        return f"; one batch at a time: {name}[0]" if len(shape) == 5 else ""
    if len(shape) in (3, 4) and shape[-1] == channels and 0 not in shape:
        order = "2, 0, 1" if len(shape) == 3 else "0, 3, 1, 2"
        return f"; channels last? write {name}.permute({order})"
    if len(shape) == 2 or len(shape) in (3, 4) and shape[-3] == 1:
        axes = "-1, " * (len(shape) == 4) + f"{channels}, -1, -1"
        return f"; one channel? write {name}.expand({axes}), or load_image, which makes {channels} channels of grey"
    if len(shape) in (3, 4) and shape[-3] in (2, 4):
        return f"; alpha? write {name}[..., :{shape[-3] - 1}, :, :], or load_image, which puts pictures over white"
    return f"; one batch at a time: {name}[0]" if len(shape) == 5 else ""


def judge_layout(image, features, single):
    """Refuse features (B, C, h, w) whose shape shows another order of axes; warn of one that is likely.

    Args:
        image: (B, 3, H, W). single: whether the features came as three axes.

    Raises:
        ValueError: read as they are their cells would be stretched more than twofold, and read in the other order they
            are the square cells of the image.
    """
    (height, width), (channels, h, w) = image.shape[-2:], features.shape[1:]
    shape = tuple(features.shape[1:] if single else features.shape)
    stretched = _stretch(h, w, height, width) > 2
    grids = _token_grids(h, height, width) if single and channels in (1, len(image)) else ()
    if grids and (stretched or h > min(height, width) // 2):
        sure = stretched
        (extra, rows, cols), *others = grids
        behind = "" if extra == 0 or others else f"[:, {extra}:]"
        grid = "h, w" if others else f"{rows}, {cols}"
        told = "without class and register tokens, " if others else f"{extra} class and register tokens left out, "
        advice = f"tokens (B, N, C)? {told if extra or others else ''}write "
        advice += f"features{behind}.transpose(1, 2).reshape({channels}, {w}, {grid})"
    elif stretched and _stretch(channels, h, height, width) < 1.25 and w > max(channels, h):
        sure = height * h == width * channels and height % channels == 0
        advice = f"channels last? write features.permute({'2, 0, 1' if single else '0, 3, 1, 2'})"
    else:
        return
    said = (
        f"features: {shape} are read as {channels} channels on a grid of {h}x{w} cells, for an image of "
        f"{height}x{width} pixels; {advice}"
    )
    if sure:
        raise ValueError(said)
    warn_caller(said)


def _stretch(h, w, height, width):
    ratio = h * width / (w * height)
    return max(ratio, 1 / ratio)


def _token_grids(count, height, width):
    """(class and register tokens, h, w) for each way in which `count` tokens are an image's square patches."""
    sides = (side for side in (7, 8, 14, 16, 28, 32) if height % side == 0 == width % side)
    grids = ((count - height * width // side**2, height // side, width // side) for side in sides)
    return [grid for grid in grids if grid[0] in (0, 1, 2, 5)]


def tell_of_lost_gradients(name, given, remedy):
    """Warn where tensors among `given`, a dict by argument, ask for gradients that `name` does not record."""
    asking = [key for key, t in given.items() if isinstance(t, torch.Tensor) and t.requires_grad]
    if asking and torch.is_grad_enabled():
        warn_caller(
            f"{name}: {' and '.join(asking)} asked for gradients, which end here; {remedy}; torch.no_grad() or "
            "detach() says that it is meant"
        )
