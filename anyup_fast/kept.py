"""What is made of a model's parameters once, for as long as they stay what they are.

Kernels read weights that are stacked, cast or put in another order, and tables that follow from them. They are made
with the first call and live beside the model, not in it: copies, pickles and state dicts know nothing of them. Before
every call all parameters and buffers are looked at: whether they are the same tensors, at the same place, written to by
nobody (their versions say so). That takes microseconds; what has changed is made anew.

Writing to a parameter through `.data` in place leaves no trace that could be seen: `forget(model)` says it.
"""

import threading
from contextlib import contextmanager
from contextvars import ContextVar
from operator import is_
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .ops.choice import asked, is_gpu, runs_now

_lock = threading.Lock()
_watched = WeakKeyDictionary()  # module -> _Watched
_capturing = ContextVar("anyup_fast_capturing", default=None)  # the Kept of the graph that is captured


class Kept:
    """Things made of one state of a module's parameters, by name, for one stream and one request for a back end."""

    def __init__(self):
        self._made = {}

    def of(self, name, make):
        """What is kept under a name, made by `make()` where nothing is; two threads may both make it."""
        found = self._made.get(name)
        if found is None:
            found = self._made[name] = make()
        return found


class _Watched:
    """The parameters and buffers of a module as they were, and what was made of them."""

    def __init__(self, module):
        self.kept = {}
        parts = list(module.modules())
        owners = [owner for part in parts for owner in (part._modules, part._parameters, part._buffers)]
        found = [(owner, name, one) for owner in owners for name, one in owner.items() if one is not None]
        self._owners, self._names, self._ones = zip(*found, strict=True)
        self._tensors = [one for one in self._ones if isinstance(one, torch.Tensor)]
        self.usable = all(map(_known, self._tensors)) and not any(map(_computes_tensors, parts))
        if self.usable:
            self._versions, self._pointers = self._now()
            # As long as their memory is held, nothing else can come to lie there.
            self._held = [tensor.detach() for tensor in self._tensors]

    def _now(self):
        return [tensor._version for tensor in self._tensors], [tensor.data_ptr() for tensor in self._tensors]

    def unchanged(self):
        """Whether the module has the same tensors, and they the same numbers, as when this was made."""
        if not all(map(is_, map(dict.get, self._owners, self._names), self._ones)):
            return False
        return not self.usable or self._now() == (self._versions, self._pointers)


def _known(tensor):
    """Whether versions tell that somebody has written to a tensor."""
    return type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_inference()


def _computes_tensors(module):
    """Whether a module has further tensors: replicas do, and layers with parametrizations."""
    return hasattr(module, "parametrizations") or any(isinstance(one, torch.Tensor) for one in vars(module).values())


def kept_of(module, given):
    """The `Kept` of a module for what its parameters are now, or None where nothing can be kept.

    That is on CPUs; in graphs that are traced, and in those that somebody captures, which are to see later changes of
    the parameters; and where nobody can tell whether parameters change.

    Args:
        given: a tensor that the call is for; on its device and its current stream what is kept was made.
    """
    device = given.device
    if not is_gpu(device) or not runs_now(given):
        return None
    if (own := _capturing.get()) is not None:
        return own
    stream = None
    if device.type in ("cuda", "xpu"):
        devices = torch.get_device_module(device)
        stream = devices.current_stream(device)
        if device.type == "cuda" and devices.is_current_stream_capturing():
            return None
    watched = state_of(module)
    if watched is None:
        return None
    key = stream, asked()
    found = watched.kept.get(key)
    return watched.kept.setdefault(key, Kept()) if found is None else found


def state_of(module):
    """An object that is another one as soon as a parameter of the module changes; None where nobody can tell."""
    watched = _watched.get(module)
    if watched is None or not watched.unchanged():
        with _lock:  # the first of several threads makes it
            watched = _watched.get(module)
            if watched is None or not watched.unchanged():
                watched = _watched[module] = _Watched(module)
    return watched if watched.usable else None


def forget(module):
    """Make anew, with the next call, what was made of a module's parameters."""
    _watched.pop(module, None)


@contextmanager
def captured_here(kept):
    """While entered, calls in this thread keep and read what is in `kept`, which has to outlive a graph of theirs."""
    token = _capturing.set(kept)
    try:
        yield
    finally:
        _capturing.reset(token)
