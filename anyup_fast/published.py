"""The published package's names: its entry points, and modules that code written for it imports as `anyup`."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

from .checks import checked_device
from .model import AnyUp


def anyup(use_natten=False, pretrained=True, device="cpu"):
    """AnyUp with the weights of the paper, trained on DINOv2 ViT-S/14 (`anyup_paper`, downloaded once, CC-BY-4.0).

    Args:
        use_natten: windows of the published variant on neighborhood attention (`window_rule="neighborhood"`). NATTEN
            itself is not needed.
        pretrained: with weights; otherwise random ones, and nothing is downloaded.
        device: where the model goes.

    Returns:
        anyup_fast.AnyUp: call it with (image, features, output_size=None).

    Raises:
        ValueError: a device that can't be used here.
        RuntimeError: the download failed; the message tells how to put the file in place by hand.
    """
    return _model("anyup_paper", use_natten, pretrained, device)


def anyup_multi_backbone(use_natten=False, pretrained=True, device="cpu"):
    """AnyUp trained on the features of several encoders (`anyup_multi_backbone`, downloaded once, CC-BY-4.0).

    Arguments, result and errors as for `anyup`.
    """
    return _model("anyup_multi_backbone", use_natten, pretrained, device)


def anyup_embedded(use_natten=False, pretrained=True, device="cpu"):
    """AnyUp with the weights that come with this package: no download.

    Arguments, result and errors as for `anyup`; RuntimeError too where the package safetensors, which reads the
    weights, is missing.
    """
    if pretrained:
        try:
            import safetensors  # noqa: F401
        except ModuleNotFoundError as error:
            raise RuntimeError(
                "anyup_embedded: its weights need the package safetensors: pip install safetensors"
            ) from error
    return _model("embedded", use_natten, pretrained, device)


def _model(weights, use_natten, pretrained, device):
    device = checked_device("cpu" if device is None else device)
    rule = "neighborhood" if use_natten else "ratio"
    if pretrained:
        return AnyUp.from_pretrained(weights, device=device, window_rule=rule)
    return AnyUp(window_rule=rule).to(device).eval()


def install_as_anyup():
    """Let code that imports the published package `anyup` get this one, in this process, from the call on.

    It makes two modules: `anyup` with the entry points `anyup` and `anyup_multi_backbone`, and `anyup.model` with
    `AnyUp`, the class of this package itself, so that pickles of its models load without this call. Nothing else of
    the published package is there: importing `anyup.layers` is a ModuleNotFoundError. Further calls do nothing.

    Raises:
        RuntimeError: an `anyup` is imported already, or would be found on `sys.path`. It is never hidden.
    """
    if _origin(sys.modules.get("anyup")) == __file__:
        return
    there = _other_anyup()
    if there is not None:
        raise RuntimeError(
            f"install_as_anyup: there is an anyup already, {there}, and it is not hidden: uninstall it (pip uninstall "
            "anyup), or take its folder off sys.path, and call again in a new process; or keep it, and give its models "
            "to anyup_fast.accelerate"
        )
    package, model = (_module(name) for name in ("anyup", "anyup.model"))
    package.anyup, package.anyup_multi_backbone = anyup, anyup_multi_backbone
    package.model, model.AnyUp = model, AnyUp
    sys.modules.update({"anyup": package, "anyup.model": model})


def _module(name):
    module = ModuleType(name, "Made by anyup_fast.install_as_anyup().")
    module.__spec__ = ModuleSpec(name, None, origin=__file__, is_package=name == "anyup")
    module.__package__ = "anyup"
    if name == "anyup":
        module.__path__ = []  # there are no other modules below it
    return module


def _origin(module):
    return getattr(getattr(module, "__spec__", None), "origin", None)


def _other_anyup():
    """Where an `anyup` of somebody else is, in words, or None."""
    for name in ("anyup", "anyup.model"):
        module = sys.modules.get(name)
        if module is not None:
            folders = ", ".join(getattr(module, "__path__", ()))
            return f"imported from {getattr(module, '__file__', None) or folders or module}"
    spec = find_spec("anyup")
    if spec is None:
        return None
    return f"in {spec.origin or ', '.join(spec.submodule_search_locations)}"
