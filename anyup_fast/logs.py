"""What is said once: messages that would repeat with every call."""

import logging
import sys
import warnings
from functools import cache

_log = logging.getLogger("anyup_fast.ops")


def log_once(message, level=logging.INFO):
    """Log `message`, the first time it comes up; while a graph is traced, not at all."""
    if not _traced():
        _logged(message, level)


def warn_once(message):
    """Log `message` at level WARNING, the first time it comes up; while a graph is traced, not at all."""
    if not _traced():
        _warned(message)


def warn_caller(message):
    """Warn in the name of the line outside this package and PyTorch that led here; Python shows it once for each."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("anyup_fast", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _traced():
    import torch  # processes that only decode pictures never come here

    return torch.compiler.is_compiling()


@cache
def _logged(message, level):
    _log.log(level, message)


@cache
def _warned(message):
    _log.warning(message)


log_once.cache_clear = _logged.cache_clear
warn_once.cache_clear = _warned.cache_clear
