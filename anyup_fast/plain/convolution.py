"""Convolutions of whole images that round as matrix products do, on every device."""

import torch
import torch.nn.functional as F

ONE_PRODUCT = 1024  # numbers under a filter, at most, that are gathered for every pixel


def convolve(x, weight, padding=0):
    """`F.conv2d(x, weight, padding=padding)` for stride 1; it can be differentiated.

    cuDNN shortens the factors of a float32 convolution to ten bits (TF32) unless it is told not to, both ways. Those of
    matrix products are shortened only for who asks for it (`torch.set_float32_matmul_precision`). So accelerators
    compute float32 by these: one where few numbers lie under a filter, else one for each of its taps.

    Args:
        x: (B, in, H, W). weight: (out, in, k, k).

    Returns:
        (B, out, H', W'), as F.conv2d.
    """
    if x.device.type == "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return F.conv2d(x, weight, padding=padding)
    k = weight.shape[-1]
    taps = weight.permute(2, 3, 1, 0).flatten(0, 1)
    padded = F.pad(x, (padding,) * 4).permute(0, 2, 3, 1) if padding else x.permute(0, 2, 3, 1)
    height, width = (n - k + 1 for n in padded.shape[1:3])
    parts = [padded[:, i // k : i // k + height, i % k : i % k + width] for i in range(k * k)]
    if k > 1 and k * k * x.shape[1] <= ONE_PRODUCT:
        out = torch.cat(parts, -1) @ taps.flatten(0, 1)
    else:
        out = sum(part @ tap for part, tap in zip(parts, taps, strict=True))
    return out.permute(0, 3, 1, 2)
