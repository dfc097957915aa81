"""Writing files so that a half-written one never carries the final name."""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path


def expanded(path):
    """A str or path as pathlib.Path, "~" and "~name" in front of it as the home folder where there is one."""
    return Path(os.path.expanduser(os.fspath(path)))


@contextmanager
def written_aside(path):
    """Give a temporary path beside `path`; rename it to `path` when the block succeeds.

    The temporary name keeps the suffix of `path` (savers choose the format by it). When the block raises,
    the temporary file is removed and whatever `path` held before stays as it was.

    Args:
        path: file to write, "~" is the home folder; its folder is created when missing.

    Yields:
        pathlib.Path in the same folder as `path`, to be written by the caller.

    Raises:
        OSError: the folder cannot be created or written.
    """
    path = expanded(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(aside, 0o666 & ~mask)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
