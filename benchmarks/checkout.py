"""Makes this checkout importable as anyup_fast, kernels included, without installing it."""

import atexit
import importlib
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
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


def former(revision):
    """The package of another commit, importable beside this one: its module, under the name anyup_fast_former.

    Its operators are registered under that name too. Kernels are not taken along: it runs on CPUs.
    """
    command = ["git", "-C", str(ROOT), "archive", revision, "anyup_fast"]
    result = subprocess.run(command, capture_output=True)
    if result.returncode:
        raise SystemExit(f"--against {revision}: {result.stderr.decode().strip()}")
    folder = Path(tempfile.mkdtemp(prefix="anyup-fast-former-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "package.tar").write_bytes(result.stdout)
    with tarfile.open(folder / "package.tar") as archive:
        archive.extractall(folder, filter="data")
    package = (folder / "anyup_fast").rename(folder / "anyup_fast_former")
    for path in package.rglob("*.py"):
        path.write_text(path.read_text(encoding="utf-8").replace("anyup_fast", "anyup_fast_former"), encoding="utf-8")
    sys.path.insert(0, str(folder))
    return importlib.import_module("anyup_fast_former")


def commit():
    """Short name of the commit, with a plus sign where the tree differs from it; "unknown" outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=10"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else "unknown"
