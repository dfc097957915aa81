"""AnyUp feature upsampling: features of any vision encoder at pixel resolution, guided by the image.

The public names are resolved when they are first used, so that importing the package stays cheap:
it loads torch and numpy and nothing heavier.
"""

from importlib import import_module

__version__ = "0.2.0"

_HOME_OF = {
    "load_image": "api",
    "prepare": "api",
    "extract_dinov2_features": "api",
    "extract_features": "api",
    "upsample_features_with_anyup": "api",
    "visualize_feature_comparison": "api",
    "fit_head": "fitting",
    "prompt_head": "fitting",
    "wrap_encoder": "encoders",
    "AnyUp": "model",
    "accelerate": "acceleration",
    "install_as_anyup": "published",
    "open": "batch.archive",
    "view": "viewer.view",
}

# `from anyup_fast import *` must not hide the built-in open.
__all__ = ["__version__", *sorted(set(_HOME_OF) - {"open"})]


def __getattr__(name):
    if name == "batch":
        return import_module("anyup_fast.batch")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'anyup_fast' has no attribute {name!r}")
    value = getattr(import_module(f"anyup_fast.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_HOME_OF, *__all__})
