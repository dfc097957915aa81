"""Makes this checkout importable as anyup_fast, kernels included, without installing it."""

import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def use_checkout():
    """Put the checkout first on the path and its folder kernels/ under the name anyup_fast.kernels."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    import anyup_fast

    folder = ROOT / "kernels"
    found = importlib.util.find_spec("anyup_fast.kernels")
    if found and Path(found.origin).parent == folder:
        return
    spec = importlib.util.spec_from_file_location(
        "anyup_fast.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["anyup_fast.kernels"] = anyup_fast.kernels = module
    spec.loader.exec_module(module)


def commit():
    """Short name of the commit, with a plus sign where the tree differs from it; "unknown" outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=10"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else "unknown"
