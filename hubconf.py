"""Entry points of torch.hub, with the names and arguments of the published ones.

    torch.hub.load("path/of/a/clone", "anyup_multi_backbone", source="local")

A clone suffices, nothing has to be installed: the folder kernels/ is made known as `anyup_fast.kernels`, which is where
an installation puts it.
"""

import importlib.util
import sys
from pathlib import Path

import anyup_fast
from anyup_fast.api import checked_device

dependencies = ["torch", "numpy"]


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
    """AnyUp with the weights that lie in this repository: no download.

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
        return anyup_fast.AnyUp.from_pretrained(weights, device=device, window_rule=rule)
    return anyup_fast.AnyUp(window_rule=rule).to(device).eval()


def _make_kernels_known():
    """Where anyup_fast is that of this checkout, let `anyup_fast.kernels` be the folder kernels/ beside it.

    An editable installation of another checkout would answer with the kernels of that one.
    """
    name, root = "anyup_fast.kernels", Path(__file__).parent
    if name in sys.modules or not Path(anyup_fast.__file__).parents[1].samefile(root):
        return
    folder = root / "kernels"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[name] = anyup_fast.kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])  # a docstring: Triton is imported where a kernel is used


_make_kernels_known()
