"""Encoders that a program brings itself: modules and functions, held to what they are found to give."""

import difflib
import inspect
import re
import sys
import threading
from contextlib import ExitStack
from functools import partial
from importlib import import_module, util
from pathlib import Path

import torch
from torch import nn

from .base import IMAGENET_MEAN, IMAGENET_STD, Encoder
from .layout import PROBE_BATCH, as_map, check_order, find_layout, probe_sizes

UNITS = (16, 14, 32, 8, 28, 12, 20, 24, 64, 7, 10)  # multiples that are tried where no patch_size is given
KNOWN_KEYS = ("last_hidden_state", "x_norm_patchtokens")  # of transformers and of DINOv2: taken where they are there
OBJECT = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")  # "package.module:function"


class WrappedEncoder(Encoder):
    """A module or function behind the protocol of encoders, made by `wrap_encoder`.

    The module is the caller's own: `to` moves it, its parameters are left as they are. Gradients are recorded only
    where the image asks for some.

    Attributes:
        layouts: for each layer, how the output lies.
    """

    def __init__(self, name, function, *, patch_size, layers, outputs, layouts, device, **attributes):
        super().__init__(name, patch_size=patch_size, dim=layouts[-1].channels, num_layers=len(layouts), **attributes)
        self.call, self.layers, self.outputs, self.layouts = _Call(name, function), layers, outputs, layouts
        for buffer in ("input_scale", "input_shift"):
            setattr(self, buffer, getattr(self, buffer).to(device))

    def _on(self, device):
        return f"encoder.to({device!r})"

    def features_of_layers(self, image, layers):
        size, batch = tuple(image.shape[2:]), len(image)
        found = self.call(image, self.layers)
        return [
            as_map(
                _taken(self.name, found[number - 1], self.outputs[number - 1]),
                self.layouts[number - 1],
                size,
                batch=batch,
                name=self.name,
            )
            for number in layers
        ]

    def features(self, image, layer):
        return self.features_of_layers(image, (layer,))[0]


class _Call(nn.Module):
    """What is called with an image; where it is a module or one of its methods, that is a submodule."""

    def __init__(self, name, function):
        super().__init__()
        self.name, self.method = name, None
        owner = getattr(function, "__self__", None)
        if isinstance(owner, nn.Module) and inspect.ismethod(function):
            self.module, self.method = owner, function.__name__
        elif isinstance(function, nn.Module):
            self.module = function
        else:
            self.module, self.function = None, function

    @property
    def device(self):
        """Where the module lies; None for a function."""
        tensors = [] if self.module is None else [*self.module.parameters(), *self.module.buffers()]
        devices = sorted({str(tensor.device) for tensor in tensors})
        if len(devices) > 1:
            raise ValueError(
                f"{self.name} lies on {' and '.join(devices)}; move all of it to one of them with .to(...)"
            )
        return torch.device(devices[0]) if devices else None

    def forward(self, image, layers):
        """Return what the function gives, or, where `layers` are named, what each of them gives, as a list."""
        if self.module is not None:
            self.check_mode()
            first = next((p for p in self.module.parameters() if p.is_floating_point()), image)
            if first.device != image.device:
                raise ValueError(
                    f"{self.name} lies on {first.device}, its encoder on {image.device}; move both with encoder.to(...)"
                )
            image = image.to(first.dtype)
        function = self.module if self.method is None else getattr(self.module, self.method)
        function = self.function if self.module is None else function
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled() and image.requires_grad))
            taps = [stack.enter_context(_Tap(self.name, self.module, layer)) for layer in layers]
            result = self._run(function, image)
        return [tap.result() for tap in taps] if layers else [result]

    def check_mode(self):
        """ValueError where the module or a part of it is in training mode."""
        if self.module is not None and any(module.training for module in self.module.modules()):
            raise ValueError(f"{self.name} is in training mode, or a part of it; call .eval() first")

    def _run(self, function, image):
        try:
            return function(image)
        except RuntimeError as error:
            text = str(error)
            if "does not require grad" in text or "inference mode" in text.lower():
                raise RuntimeError(
                    f"{self.name} wants gradients, and none are recorded here: write `with torch.enable_grad():` in "
                    f"it, with image = image.clone().requires_grad_(), and give back .detach() ({_first(text)})"
                ) from error
            if "same device" in text or "device type" in text:
                raise RuntimeError(
                    f"{self.name} was given an image on {image.device}, and has tensors elsewhere ({_first(text)}); "
                    "move them, or say wrap_encoder(..., device=...)"
                ) from error
            raise


class _Tap:
    """Context in which the output of a layer is kept, of calls in this thread alone."""

    def __init__(self, name, module, layer):
        self.name, self.layer, self.found = name, layer, []
        self.module, self.thread = module.get_submodule(layer), threading.get_ident()

    def __enter__(self):
        self.handle = self.module.register_forward_hook(self._keep)
        return self

    def __exit__(self, *_):
        self.handle.remove()

    def _keep(self, module, inputs, output):
        if threading.get_ident() == self.thread:
            self.found.append(output)

    def result(self):
        if len(self.found) != 1:
            raise RuntimeError(
                f"layer {self.layer!r} of {self.name} was run {len(self.found)} times for a batch; name one that is "
                "run once"
            )
        return self.found[0]


def wrap_encoder(
    encoder,
    patch_size=None,
    *,
    mean=None,
    std=None,
    prefix_tokens="auto",
    output="auto",
    layer=None,
    name=None,
    device=None,
):
    """Make an `Encoder` of a module or function of your own.

    It is run here on noise, on pictures of three sizes that are not square; how its output lies follows from that, and
    what fits no reading, or more than one, is refused. One cell is changed, too, to see that the order is that of rows.

    Args:
        encoder: nn.Module in eval mode, or a function; called with images (B, bands, H, W), normalised by `mean` and
            `std`, gives tokens (B, N, C), maps (B, C, h, w) or (B, h, w, C), or a tuple, list, dict or ModelOutput with
            such. A module stays your own, and shared; a method of one (`model.forward_features`) counts as the module.
        patch_size: the sides of images are multiples of this number; None finds it out. Features of every so many
            pixels, as a rule; the stride may be finer.
        mean, std: per band, of images in [0, 1]; None means ImageNet's. With other than three bands the images come as
            they are, and these are in their units.
        prefix_tokens: tokens in front that belong to no cell; "auto" counts them, a number is held against the count.
        output: which part of a tuple, list, dict or ModelOutput: an index, a key, a function that takes the whole and
            gives a tensor; "auto" takes the one that fits.
        layer: name of a submodule ("blocks.9") whose output is taken in place of the module's; or several, which
            `layer=1`, `2`, ... of the encoder then choose from.
        name: for messages; None means that of the class or function.
        device: of a function, where its images are to lie; None means the CPU. A module is taken where it lies.

    Returns:
        Encoder, for `extract_features` and wherever else a loaded one is taken.

    Raises:
        TypeError: `encoder` is neither. ValueError: arguments that don't fit, a module in training mode or on several
            devices. RuntimeError: it can't be run, its output follows neither grid nor batch, or wants gradients.
    """
    if isinstance(encoder, Encoder):
        raise TypeError(f"encoder: {encoder.name} is an Encoder already; use it as it is")
    if isinstance(encoder, type) or not callable(encoder):
        kind = f"the class {encoder.__name__}" if isinstance(encoder, type) else type(encoder).__name__
        raise TypeError(f"encoder: need a module or a function that takes images, got {kind}")
    name = name or _name_of(encoder)
    mean, std = _statistics(mean, std)
    if patch_size is not None and (isinstance(patch_size, bool) or not isinstance(patch_size, int) or patch_size < 1):
        raise ValueError(f"patch_size: need a positive int, or None to find it out, got {patch_size!r}")
    prefix = None if prefix_tokens == "auto" else prefix_tokens
    if prefix is not None and (isinstance(prefix, bool) or not isinstance(prefix, int) or prefix < 0):
        raise ValueError(f"prefix_tokens: need 'auto' or a number, got {prefix_tokens!r}")
    if not (isinstance(output, (str, int)) or callable(output)) or isinstance(output, bool):
        raise ValueError(f"output: need 'auto', an index, a key or a function, got {output!r}")
    call = _Call(name, encoder)
    layers = () if layer is None else (layer,) if isinstance(layer, str) else tuple(layer)
    _check_layers(call, layers)
    call.check_mode()
    own = call.device
    if device is not None and own is not None and torch.empty(0, device=device).device != own:
        raise ValueError(f"device: {name} lies on {own}, not on {device}; move it, or leave device out")
    device = own or torch.empty(0, device="cpu" if device is None else device).device
    probe = partial(_probe, call, layers, len(mean), device, output, prefix)
    with torch.no_grad():
        patch, outputs, layouts = _measured(probe, name) if patch_size is None else (patch_size, *probe(patch_size))
        image = _noise(1, len(mean), *probe_sizes(patch)[0], device=device)
        for index, (part, layout) in enumerate(zip(outputs, layouts, strict=True)):
            check_order(lambda x, i=index, p=part: _taken(name, call(x, layers)[i], p), layout, image, name=name)
    source = f"weights as they are in {name}, which the program brought"
    wrapped = WrappedEncoder(
        name, encoder, source=source, patch_size=patch, layers=layers, outputs=outputs, layouts=layouts, device=device,
        mean=mean, std=std,
    )  # fmt: skip
    return wrapped.eval()


def load(name, weights="auto"):
    """Make an encoder of what "package.module:object" names.

    The object is an `Encoder`, a function or class without arguments that makes one (or makes what `wrap_encoder`
    takes), or itself what `wrap_encoder` takes: a module, or a function of an image. Python modules are looked for in
    the current folder too; a network is put into eval mode.

    Raises:
        ValueError: `weights` is not "auto", or the module has no such object. RuntimeError: there is no such module.
        TypeError, ValueError, RuntimeError: as `wrap_encoder`.
    """
    if str(weights) != "auto":
        raise ValueError(f"weights must be 'auto' for {name}, got {str(weights)!r}; the function says where they are")
    place, _, path = name.partition(":")
    _make_importable(name, place)
    found = import_module(place)
    for part in path.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"encoder: {place} has no {path!r}{hint}")
        found = getattr(found, part)
    if isinstance(found, type) or not isinstance(found, nn.Module) and callable(found) and _needs_nothing(found):
        found = found()
    if isinstance(found, nn.Module) and not isinstance(found, Encoder):
        found = found.eval()
    return found if isinstance(found, Encoder) else wrap_encoder(found, name=name)


def _make_importable(name, place):
    """Look for a module in the current folder, too, where it is nowhere else."""
    top = place.split(".")[0]
    if util.find_spec(top) is None:
        here = str(Path.cwd())
        if here not in sys.path:
            sys.path.append(here)
        if util.find_spec(top) is None:
            raise RuntimeError(
                f"encoder: there is no module {top!r} for {name!r}, neither installed nor in {here}; go to its folder, "
                "or name it in PYTHONPATH"
            )


def _needs_nothing(function):
    """Whether a function can be called without arguments."""
    empty = inspect.Parameter.empty
    variable = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    parameters = inspect.signature(function).parameters.values()
    return all(p.default is not empty or p.kind in variable for p in parameters)


def _name_of(encoder):
    owner = getattr(encoder, "__self__", None)
    if isinstance(owner, nn.Module) and inspect.ismethod(encoder):
        return f"{type(owner).__name__}.{encoder.__name__}"
    return getattr(encoder, "__qualname__", None) or type(encoder).__name__


def _statistics(mean, std):
    if (mean is None) != (std is None):
        raise ValueError("mean, std: give both, or neither for ImageNet's")
    if mean is None:
        return IMAGENET_MEAN, IMAGENET_STD
    mean, std = (tuple(float(x) for x in values) for values in (mean, std))
    if len(mean) != len(std) or not mean or not all(x > 0 for x in std):
        raise ValueError(f"mean, std: need as many of both, one for each band, std above 0; got {mean} and {std}")
    return mean, std


def _check_layers(call, layers):
    if layers and call.module is None:
        raise ValueError(
            f"layer: {call.name} is a function; give the module, or a function that gives the layer's output"
        )
    names = dict(call.module.named_modules()) if layers else {}
    for layer in layers:
        if not isinstance(layer, str) or layer not in names:
            close = difflib.get_close_matches(str(layer), names, n=3) or list(names)[1:4]
            raise ValueError(f"layer: {call.name} has no submodule {layer!r}; it has {', '.join(close)}, ...")


def _noise(*shape, device):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def _measured(probe, name):
    """The smallest multiple of those tried that `name` takes, and what `probe` gives for it."""
    reasons = {}
    for unit in UNITS:
        try:
            outputs, layouts = probe(unit)
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            reasons[unit] = _first(error)
            continue
        stride = max(layout.stride for layout in layouts)
        if stride < unit:  # does it take its stride's multiples, too?
            try:
                return stride, *probe(stride)
            except (RuntimeError, ValueError, AssertionError, IndexError):
                pass
        return unit, outputs, layouts
    raise RuntimeError(
        f"patch_size: {name} gives no grid for sides that are multiples of {', '.join(map(str, UNITS))}, say which; of "
        f"{UNITS[0]}: {reasons[UNITS[0]]}"
    )


def _first(error):
    return " ".join(str(error).split())[:300] or type(error).__name__


def _probe(call, layers, bands, device, output, prefix, unit):
    """Run on noise: which part of each layer's output is taken, and how it lies."""
    sizes = probe_sizes(unit)
    runs = [call(_noise(PROBE_BATCH, bands, *size, device=device), layers) for size in sizes]
    parts, layouts = [], []
    for index in range(len(runs[0])):
        results = [run[index] for run in runs]
        part = _part(call.name, results, sizes, prefix) if output == "auto" else output
        tensors = [_taken(call.name, result, part) for result in results]
        layouts.append(find_layout(tensors, sizes, name=call.name, prefix=prefix))
        parts.append(part)
    return parts, layouts


def _parts(result):
    """Index or key -> part of a tuple, list, dict or ModelOutput."""
    return dict(result.items()) if hasattr(result, "items") else dict(enumerate(result))


def _part(name, results, sizes, prefix):
    """Which part of an output is the grid: None for a tensor, else an index or key."""
    first = results[0]
    if isinstance(first, torch.Tensor):
        return None
    if not hasattr(first, "items") and not isinstance(first, (tuple, list)):
        raise RuntimeError(
            f"{name} gave {type(first).__name__}; need a tensor, or a tuple, list, dict or ModelOutput with one"
        )
    for key in KNOWN_KEYS:
        if hasattr(first, "items") and key in first:
            return key
    reasons, fitting = {}, []
    for key, part in _parts(first).items():
        if not isinstance(part, torch.Tensor):
            continue
        try:
            find_layout([_parts(result)[key] for result in results], sizes, name=f"{name}, {key!r}", prefix=prefix)
        except (RuntimeError, KeyError) as error:
            reasons[key] = _first(error)
        else:
            fitting.append(key)
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise RuntimeError(
            f"output: {name} gave several that form a grid, {fitting}; say which, such as output={fitting[-1]!r}"
        )
    why = next(iter(reasons.values()), f"it holds no tensors, but {[type(x).__name__ for x in _parts(first).values()]}")
    raise RuntimeError(f"output: nothing that {name} gave forms a grid; {why}")


def _taken(name, result, part):
    """The tensor that `part` names: None is the result itself."""
    if callable(part):
        result = part(result)
    elif part is not None:
        try:
            result = None if isinstance(result, torch.Tensor) else result[part]
        except (KeyError, IndexError, TypeError) as error:
            there = list(_parts(result)) if hasattr(result, "items") or isinstance(result, (tuple, list)) else "nothing"
            raise RuntimeError(f"output: {name} gave no {part!r}, but {there}") from error
        if result is None:
            raise RuntimeError(f"output: {name} gave a tensor or nothing where {part!r} was asked for")
    if not isinstance(result, torch.Tensor):
        raise RuntimeError(f"{name} gave {type(result).__name__}, need a tensor; say which part with output=...")
    if not result.is_floating_point():
        raise RuntimeError(f"{name} gave {result.dtype}, need floating point features")
    return result
