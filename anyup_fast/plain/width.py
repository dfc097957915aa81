"""How wide a device computes what is summed over many pixels: the one place that knows where float64 is to be had."""

import torch


def has_float64(device):
    """Whether tensors of float64 can lie on a torch.device. Apple's GPUs have none, many of Intel's neither."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type not in ("mps", "meta")  # "meta" stands for any device in tests: for the narrowest


def wide_of(device, dtype=torch.float32):
    """The dtype of statistics and tables of what is computed in `dtype` on a torch.device.

    float64 on CPUs, and for whoever computes in it. Elsewhere float32, with sums so arranged that they lose nothing by
    it: means first, then squares of what is left. That holds for every kind of device, those with float64 too: consumer
    cards are slower in it by a factor of 64, and what one device shows is true of the others.
    """
    return torch.float64 if device.type == "cpu" or dtype == torch.float64 else torch.float32
