"""Why a picture could not be made, in one sentence that says what is true of it."""

import errno
import os
import re
import sys

ROOM = {errno.ENOSPC, errno.EDQUOT} if hasattr(errno, "EDQUOT") else {errno.ENOSPC}
_NAMES = {errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL, errno.EISDIR, errno.ENOTDIR}

_MEMORY = ("DefaultCPUAllocator", "out of memory", "not enough memory", "allocate memory", "ALLOC_FAILED")
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+ ?(?:bytes|[KMGT]i?B))")


def reason_of(error):
    """One sentence about an exception, without line breaks."""
    if is_memory(error):
        asked = _ASKED.search(str(error))
        what = f" (it asked for {_amount(asked[1])})" if asked else ""
        return (
            f"it needs more memory than there is{what}; ask for a smaller size or output_size, or make fewer at a time"
        )
    if isinstance(error, UnicodeEncodeError):
        return f"its name can't be encoded for this file system ({error.reason})"
    text = " ".join(str(error).split())
    plain = isinstance(error, (ValueError, OSError)) and type(error).__module__ == "builtins"
    return text if text and plain else f"{type(error).__name__}: {text}" if text else type(error).__name__


def reason_of_writing(error, size=None):
    """One sentence about an `OSError` that befell the files of one picture."""
    if error.errno in _NAMES:
        return f"its name can't be written there ({error.strerror}): {error.filename!r}"
    if error.errno == errno.EFBIG:
        of = "" if size is None else f" of {size:,} bytes"
        return f"its file{of} is larger than the file system, or a limit such as `ulimit -f`, allows"
    return f"its file can't be written: {reason_of(error)}"


def is_memory(error):
    """Whether an exception says that memory is missing, on the host or on a GPU."""
    if isinstance(error, (MemoryError, *_kinds_of_torch("OutOfMemoryError"))):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _MEMORY)


def is_device_lost(error):
    """Whether a GPU answers nothing any more after an exception, so that no other picture can be made."""
    lost = isinstance(error, _kinds_of_torch("AcceleratorError"))
    text = str(error)
    return not is_memory(error) and (
        lost or isinstance(error, RuntimeError) and text.startswith(("CUDA error", "HIP error"))
    )


def _kinds_of_torch(*names):
    """Exceptions of PyTorch; none of an older one that has them not, and none where it is not imported."""
    torch = sys.modules.get("torch")
    return tuple(getattr(torch, name) for name in names if hasattr(torch, name))


def gigabytes(count):
    """Bytes for people: "25.6 GB"."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"
    return f"{count} bytes"


def _amount(text):
    number, _, unit = text.partition(" ")
    return gigabytes(int(number)) if unit == "bytes" else text


def shown(name):
    """A name as text that any encoding of Unicode can hold: bytes that are no text become a replacement character."""
    return "".join("\ufffd" if "\ud800" <= letter <= "\udfff" else letter for letter in str(name))


def memory_of_machine():
    """Bytes of memory that this process may use at most: the machine's, its control group's, its own limit."""
    limits = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if os.path.exists(path):
            with open(path) as file:
                text = file.read().strip()
            if text.isdigit():
                limits.append(int(text))
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        pass
    else:
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            limits.append(limit)
    return min((limit for limit in limits if limit > 0), default=None)
