"""What is said once: messages that would repeat with every call."""

import logging
from functools import cache

import torch

_log = logging.getLogger("anyup_fast.ops")


def log_once(message):
    """Log `message` at level INFO, the first time it comes up; while a graph is traced, not at all."""
    if not torch.compiler.is_compiling():
        _logged(message)


def warn_once(message):
    """Log `message` at level WARNING, the first time it comes up; while a graph is traced, not at all."""
    if not torch.compiler.is_compiling():
        _warned(message)


@cache
def _logged(message):
    _log.info(message)


@cache
def _warned(message):
    _log.warning(message)


log_once.cache_clear = _logged.cache_clear
warn_once.cache_clear = _warned.cache_clear
