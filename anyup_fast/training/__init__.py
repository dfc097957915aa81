"""Training of weights by the recipe of the paper (arXiv 2510.12764), scaled to what is at hand."""

from importlib import import_module

_HOME_OF = {
    "TargetCache": "targets",
    "TrainConfig": "config",
    "train": "loop",
}

__all__ = sorted(_HOME_OF)


def __getattr__(name):
    if name not in _HOME_OF:
        raise AttributeError(f"module 'anyup_fast.training' has no attribute {name!r}")
    return getattr(import_module(f"anyup_fast.training.{_HOME_OF[name]}"), name)
