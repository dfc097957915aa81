"""A device that isn't there: tensors that say they are on "meta", the kind of device that every build of PyTorch has.

A CPU computes them, so that every branch of the package for "not a CPU" is taken with true numbers. The device refuses
what Apple's GPUs refuse: float64, tensors of two devices in one operation, and adaptive pooling between sizes that do
not divide.
"""

import contextlib
from collections import Counter
from unittest.mock import patch

import torch
from torch._dynamo.trace_rules import get_torch_obj_rule_map
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

NAME = "meta"
COPIES = {"_to_copy", "copy_", "index", "index_put", "index_put_", "_index_put_impl_"}  # between devices
POOLING = {"_adaptive_avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d_backward"}


class There(torch.Tensor):
    """A tensor of the device; `held` has its numbers."""

    @staticmethod
    def __new__(cls, held):
        """Wrap a tensor of the CPU."""
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=NAME,
        )

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"There({self.held})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function}: a tensor of {NAME} is used outside of `Elsewhere`")


class Elsewhere(TorchDispatchMode):
    """While entered, tensors can be moved to `NAME`, made and computed there.

    Args:
        refuse: whether what such a device cannot do is refused, or only counted.

    Attributes:
        counts: Counter of the operations by name. float64: Counter of those that touch float64.
    """

    def __init__(self, refuse=True):
        super().__init__()
        self.refuse, self.counts, self.float64 = refuse, Counter(), Counter()
        self._entered = []

    def __enter__(self):
        stack = contextlib.ExitStack()
        if not self._entered:  # "meta" has no autocast to ask for
            get_torch_obj_rule_map()  # torch.compile lists torch's functions once: not while some are exchanged
            stack.enter_context(patch("torch.autocast", lambda *_, **__: contextlib.nullcontext()))
            stack.enter_context(patch("torch.is_autocast_enabled", lambda *_: False))
        stack.enter_context(_Entry())
        self._entered.append(stack)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._entered.pop().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name, target = function.overloadpacket.__name__, kwargs.get("device")
        flat, spec = tree_flatten((args, kwargs))
        there = [leaf for leaf in flat if isinstance(leaf, There)]
        elsewhere = target is not None and torch.device(target).type == NAME
        if not there and not elsewhere:
            return function(*args, **kwargs)
        if function.namespace == "anyup_fast":
            with self:
                return OPDEFS[function.name()]._init_fn(*args, **kwargs)
        here = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, There) and x.dim()]
        if there and here and name not in COPIES:
            raise RuntimeError(f"{name}: tensors on {NAME} and on the CPU: {[tuple(x.shape) for x in there + here]}")
        if name in POOLING and self.refuse:
            _refuse_uneven(name, flat)
        known = {id(leaf.held): leaf for leaf in there}
        real_args, real_kwargs = tree_unflatten([x.held if isinstance(x, There) else x for x in flat], spec)
        if elsewhere:
            real_kwargs["device"] = "cpu"
        real_kwargs.pop("pin_memory", None)
        out = function(*real_args, **real_kwargs)
        if name == "_to_copy" and target is not None and not elsewhere or name == "_local_scalar_dense":
            return out  # has come home
        if name == "copy_" and not isinstance(args[0], There):
            return args[0]
        out = tree_map_only(torch.Tensor, lambda held: known[id(held)] if id(held) in known else There(held), out)
        self.counts[name] += 1
        touched = [*there, *(x for x in tree_flatten(out)[0] if isinstance(x, There))]
        if any(x.dtype in (torch.float64, torch.complex128) for x in touched):
            if self.refuse:
                raise TypeError(f"{name}: there is no float64 on {NAME}")
            self.float64[name] += 1
        return out


class _Entry(TorchFunctionMode):
    """What PyTorch would refuse, without that device, before it dispatches."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == NAME:
            device = kwargs.pop("device")
            return _moved(function(*args, **kwargs), device)
        if function is torch.Tensor.to:
            tensor, *rest = args
            device = kwargs.get("device")
            for given in rest:
                device = given.device if isinstance(given, torch.Tensor) else device
                device = torch.device(given) if isinstance(given, (str, torch.device)) else device
            dtype = kwargs.get("dtype")
            for given in rest:
                dtype = given.dtype if isinstance(given, torch.Tensor) else dtype
                dtype = given if isinstance(given, torch.dtype) else dtype
            if device is not None and torch.device(device).type == NAME and not isinstance(tensor, There):
                return _moved(tensor, device, dtype, kwargs.get("memory_format"))
        return function(*args, **kwargs)


def _moved(tensor, device, dtype=None, memory_format=None):
    return torch.ops.aten._to_copy(tensor, dtype=dtype, device=torch.device(device), memory_format=memory_format)


def _refuse_uneven(name, flat):
    sizes = [x.shape[-2:] for x in flat if isinstance(x, There)]
    sizes += [[n for n in flat if isinstance(n, int)]] if len(sizes) == 1 else []
    first, second = sorted(sizes, key=sum)
    if any(large % small for small, large in zip(first, second, strict=True)):
        raise RuntimeError(f"{name}: adaptive pooling on {NAME}: input sizes must be divisible by output sizes")
