"""Which files the project consists of, in a checkout and in an unpacked sdist alike."""

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS_OWN = {
    ".git",
    ".venv",
    "__pycache__",
    ".pytest_cache",
    ".ruff_cache",
    ".benchmarks",
    "build",
    "dist",
    "demo",
}


@cache
def project_files():
    """Paths relative to ROOT of what git tracks or would add; without git, of what no tool left behind."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        names = [Path(name) for name in listing.split("\0") if name]
    else:
        names = []
        for folder, subfolders, files in os.walk(ROOT):
            subfolders[:] = [s for s in subfolders if s not in TOOLS_OWN and not s.endswith(".egg-info")]
            names += [(Path(folder) / name).relative_to(ROOT) for name in files]
    return sorted(name for name in names if (ROOT / name).is_file() and not (ROOT / name).is_symlink())
