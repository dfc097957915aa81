"""Linear heads: what `Prepared.head` takes, and the files that hold one."""

import json
from dataclasses import dataclass
from unicodedata import category

import torch

from .files import expanded, written_aside


@dataclass(frozen=True, eq=False)
class Head:
    """A linear head with what is known of it; `Prepared.head` and `anyup_fast.batch.run` take it as it is.

    Attributes:
        weight: (K, C). bias: (K,) or None.
        classes: a name for each of the K outputs, or None.
        encoder: name of the encoder on whose features it was fitted, or None.
        kind: how it was made, such as "linear", "prototype" or "text", or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    classes: tuple | None = None
    encoder: str | None = None
    kind: str | None = None

    def __post_init__(self):
        linear_head((self.weight, self.bias))
        object.__setattr__(self, "classes", checked_classes(self.classes, len(self.weight)))

    def save(self, path):
        """Write it to a .safetensors file, see `save_head`."""
        save_head(path, self.weight, self.bias, self.classes, self.encoder, self.kind)

    def why_not_on(self, encoder):
        """Why its answers may mean nothing on features of the encoder of this name: one sentence, or None."""
        if self.encoder in (None, encoder):
            return None
        return (
            f"head: it was made for features of the encoder {self.encoder!r} and is applied to those of {encoder!r}; "
            "its answers mean nothing unless these are two names of one encoder"
        )


def checked_classes(classes, outputs, name="classes"):
    """Names of the outputs of a head as a tuple of strings, or None.

    Raises:
        ValueError: other things than strings, an empty or repeated name, or another number of them.
    """
    if classes is None:
        return None
    told = f"{name}: need a different name for each of the {outputs} outputs of the head"
    if isinstance(classes, str) or not all(isinstance(one, str) and one.strip() for one in classes):
        raise ValueError(f"{told}, got {classes!r}")
    if any(category(letter) in ("Cc", "Cs") for letter in "".join(classes)):
        raise ValueError(f"{told}, of letters that can be shown, got {list(classes)}")
    if len(classes) != outputs or len(set(classes)) != outputs:
        raise ValueError(f"{told}, got {len(classes)}, {len(set(classes))} of them different: {list(classes)}")
    return tuple(classes)


def linear_head(linear, channels=None):
    """(weight (K, C), bias (K,) or None) of what `Prepared.head` takes; C is checked when `channels` are given."""
    if isinstance(linear, (torch.nn.Linear, Head)):
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
        raise ValueError(f"linear: need a Head, nn.Linear, 1x1 nn.Conv2d, weight (K, C) or (weight, bias), got {kind}")
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
    head = read_head(path)
    return head.weight, head.bias


def read_head(path):
    """`Head` of a .safetensors file: what `load_head` gives, and the names that `save_head` has put beside it.

    Raises:
        FileNotFoundError: no such file. ValueError: something else is in it, or its names do not fit.
    """
    from safetensors import SafetensorError, safe_open

    path = expanded(path)
    if not path.is_file():
        raise FileNotFoundError(f"head: there is no file {str(path)!r}; check the path")
    try:
        with safe_open(path, "pt") as file:
            tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"head: {path} is no .safetensors file ({error})") from error
    if "weight" not in tensors or set(tensors) - {"weight", "bias"}:
        raise ValueError(f"head: {path} must hold weight (K, C) and, if there is one, bias (K,); got {sorted(tensors)}")
    weight, bias = linear_head((tensors["weight"], tensors.get("bias")))
    try:
        classes = json.loads(about["classes"]) if "classes" in about else None
        classes = checked_classes(classes, len(weight))
    except (ValueError, TypeError) as error:
        raise ValueError(f"head: {path} has class names that do not fit it ({error})") from error
    return Head(weight, bias, classes, about.get("encoder"), about.get("kind"))


def save_head(path, weight, bias=None, classes=None, encoder=None, kind=None):
    """Write a linear head to a .safetensors file, which `upsample --head`, `batch --head` and `read_head` take.

    The file holds `weight` and `bias` in float32, and in its metadata `classes` as a JSON list, `encoder` and `kind`,
    as far as they are given. It is written aside and renamed.

    Args:
        path: file to write, ending in .safetensors.
        weight: (K, C). bias: (K,) or None.
        classes: a name for each of the K outputs. encoder: name of the encoder. kind: see `Head`.

    Raises:
        ValueError: shapes or names that do not fit, numbers that are not finite, another suffix.
    """
    if expanded(path).suffix != ".safetensors":
        raise ValueError(f"path: the file of a head must end in .safetensors, got {str(path)!r}")
    content = encoded_head(Head(weight, bias, classes, encoder, kind))
    with written_aside(path) as aside:
        aside.write_bytes(content)


def encoded_head(head, named=True):
    """The bytes of the file of a `Head`; without its names and the rest of the metadata where it is not `named`."""
    from safetensors.torch import save

    tensors = {"weight": head.weight} if head.bias is None else {"weight": head.weight, "bias": head.bias}
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ValueError("head: its weight and bias must be finite numbers")
    about = {"encoder": head.encoder, "kind": head.kind}
    if head.classes is not None:
        about["classes"] = json.dumps(head.classes, ensure_ascii=False)
    about = {name: text for name, text in about.items() if text is not None}
    return save(tensors, about if named and about else None)
