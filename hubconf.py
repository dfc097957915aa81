"""Entry points of torch.hub, with the names and arguments of the published ones.

    torch.hub.load("path/of/a/clone", "anyup_multi_backbone", source="local")

A clone suffices, nothing has to be installed: the folder kernels/ is made known as `anyup_fast.kernels`, which is where
an installation puts it.
"""

import importlib.util
import sys
from pathlib import Path

import anyup_fast
from anyup_fast.published import anyup, anyup_embedded, anyup_multi_backbone  # noqa: F401

dependencies = ["torch", "numpy"]


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
