"""Data sets: every picture of a folder, a list or a video through an encoder and AnyUp, into files, resumably."""

from importlib import import_module

_HOME_OF = {
    "Archive": "archive",
    "Settings": "settings",
    "Summary": "runner",
    "check_film": "video",
    "make_film": "film",
    "open_archive": "archive",
    "run": "runner",
}

__all__ = sorted(_HOME_OF)


def __getattr__(name):
    if name not in _HOME_OF:
        raise AttributeError(f"module 'anyup_fast.batch' has no attribute {name!r}")
    return getattr(import_module(f"anyup_fast.batch.{_HOME_OF[name]}"), name)
