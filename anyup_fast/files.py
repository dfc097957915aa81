"""Writing files so that a half-written one never carries the final name."""

import errno
import logging
import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

_log = logging.getLogger("anyup_fast")

# What file systems answer that know no locks, or where none may be put.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.EINVAL}


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


def check_writable(path):
    """Make the folder of `path` and see that files can be made in it.

    Raises:
        OSError: they can't.
    """
    folder = expanded(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise type(error)(
            error.errno, f"{error.strerror}, so that {os.fspath(path)!r} can't be written", None
        ) from error


@contextmanager
def alone(path, doing):
    """Let one process at a time in, by a lock on the file `path`, which is made, and removed at the end.

    The lock goes with its process, however that ends; the file may stay then.

    Args:
        path: the lock; its folder has to be there.
        doing: what a waiting process says that it waits for.

    Yields:
        whether this process is alone; False on a file system without locks.

    Raises:
        OSError: the file cannot be made.
    """
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:
            handle = os.open(path, os.O_RDONLY)  # another user's, which may be locked all the same
        try:
            locked = _locked(handle, wait=False)
            if locked is None:
                _log.info("waiting for another process that is %s", doing)
                locked = _locked(handle, wait=True)
            if locked and not _is_open_at(handle, path):
                continue  # who had it has removed it since, and somebody else may lock the next one
            try:
                yield locked
            finally:
                with suppress(PermissionError):  # another user's, or open, which Windows does not let go
                    Path(path).unlink(missing_ok=True)
            return
        finally:
            os.close(handle)


def _is_open_at(handle, path):
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _locked(handle, wait):
    """True: a file handle is locked; None: by another process, and `wait` is not given; False: there are no locks."""
    try:
        import fcntl
    except ModuleNotFoundError:
        return _locked_on_windows(handle, wait)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _locked_on_windows(handle, wait):
    import msvcrt

    while True:
        try:
            msvcrt.locking(handle, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)  # LK_LOCK gives up after ten seconds
            return True
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EDEADLK):
                return False
            if not wait:
                return None
