"""Linear heads: what `Prepared.head` takes, and the files that hold one."""

import torch

from .files import expanded


def linear_head(linear, channels=None):
    """(weight (K, C), bias (K,) or None) of what `Prepared.head` takes; C is checked when `channels` are given."""
    if isinstance(linear, torch.nn.Linear):
        weight, bias = linear.weight, linear.bias
    elif isinstance(linear, torch.nn.Conv2d):
        if linear.kernel_size != (1, 1) or linear.groups != 1 or linear.stride != (1, 1) or linear.padding != (0, 0):
            raise ValueError(f"linear: a convolution has to be 1x1, ungrouped, without stride or padding, got {linear}")
        weight, bias = linear.weight.flatten(1), linear.bias
    elif isinstance(linear, torch.Tensor):
        weight, bias = linear, None
    elif isinstance(linear, (tuple, list)) and len(linear) == 2:
        weight, bias = linear
    else:
        kind = type(linear).__name__
        raise ValueError(f"linear: need nn.Linear, a 1x1 nn.Conv2d, a weight (K, C) or (weight, bias), got {kind}")
    fits = isinstance(weight, torch.Tensor) and weight.ndim == 2 and 0 not in weight.shape
    if not fits or channels not in (None, weight.shape[1]):
        got = tuple(weight.shape) if isinstance(weight, torch.Tensor) else type(weight).__name__
        wanted = "C" if channels is None else channels
        raise ValueError(f"linear: the weight has to be (K, {wanted}) for these features, got {got}")
    if bias is not None and tuple(bias.shape) != (len(weight),):
        raise ValueError(f"linear: the bias has to be ({len(weight)},), got {tuple(bias.shape)}")
    return weight, bias


def load_head(path):
    """(weight (K, C), bias (K,) or None) of a .safetensors file that holds tensors of these names.

    Raises:
        FileNotFoundError: no such file. ValueError: something else is in it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = expanded(path)
    if not path.is_file():
        raise FileNotFoundError(f"head: there is no file {str(path)!r}; check the path")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"head: {path} is no .safetensors file ({error})") from error
    if "weight" not in tensors or set(tensors) - {"weight", "bias"}:
        raise ValueError(f"head: {path} must hold weight (K, C) and, if there is one, bias (K,); got {sorted(tensors)}")
    return linear_head((tensors["weight"], tensors.get("bias")))
