"""Triton's interpreter without what it does again at every step: more than half of the time of tests that run in it.

Each call of a kernel's helper looks through `triton.language` for functions to replace, though the launch around it
has replaced them all, and each array's dtype comes from a table that is made for it. What is computed stays the same.
"""

import inspect
from dataclasses import replace
from functools import cache, wraps

# Types that every operation between two of them keeps, division among them.
WIDE = {"fp32", "int32", "int64"}
NOTHING_TO_RESTORE = type("NothingToRestore", (), {"restore": lambda self: None})()


def once_in_a_launch(patch_lang):
    """`_patch_lang` that leaves alone those modules which the launch that goes on has replaced."""
    replaced = set()

    @cache
    def modules(function):
        found = function.__globals__.values()
        return frozenset(m.__name__ for m in found if inspect.ismodule(m) and m.__name__.startswith("triton.language"))

    @wraps(patch_lang)
    def patch(function):
        if modules(function) and modules(function) <= replaced:
            return NOTHING_TO_RESTORE
        scope = patch_lang(function)
        restore = scope.restore

        def restore_all():
            replaced.clear()
            restore()

        scope.restore = restore_all
        replaced.update(modules(function))
        return scope

    return patch


def remembered(numpy_dtype):
    """`_get_np_dtype` that looks a type up once for each name, which says everything about it."""
    known = {}

    @wraps(numpy_dtype)
    def dtype(kind):
        if kind.name not in known:
            known[kind.name] = numpy_dtype(kind)
        return known[kind.name]

    return dtype


def told_by_the_type(make):
    """`tensor.__init__` that takes from an earlier tensor of the same type all but the handle."""
    known = {}

    @wraps(make)
    def initialize(self, handle, type):
        if type.name not in known:
            make(self, handle, type)
            known[type.name] = {name: value for name, value in vars(self).items() if name != "handle"}
        else:
            self.__dict__.update(known[type.name], handle=handle)

    return initialize


def told_by_the_shape(make):
    """`block_type.__init__` that takes everything from an earlier type of the same elements and shape."""
    known = {}

    @wraps(make)
    def initialize(self, element_ty, shape):
        key = element_ty.name, *(getattr(length, "value", length) for length in shape)
        if key not in known:
            make(self, element_ty, shape)
            known[key] = dict(vars(self))
        else:
            self.__dict__.update(known[key])

    return initialize


def sooner_equal(equal):
    """`dtype.__eq__` that looks no further where both are one object, as most are."""

    @wraps(equal)
    def same(self, other):
        return self is other or equal(self, other)

    return same


def told_by_the_types(computation_type):
    """`computation_type_impl` that looks the type of an operation up, which the names of its arguments' tell."""
    known = {}

    @wraps(computation_type)
    def kind(self, a, a_is_scalar, b, b_is_scalar, div_or_mod):
        key = a.name, a_is_scalar, b.name, b_is_scalar, div_or_mod
        if key not in known:
            known[key] = computation_type(self, a, a_is_scalar, b, b_is_scalar, div_or_mod)
        return known[key]

    return kind


def as_they_are(check, tensor):
    """`binary_op_type_checking_impl` that leaves two tensors of one shape and one wide type alone, as it would."""

    @wraps(check)
    def checked(self, lhs, rhs, *options, **named):
        if isinstance(lhs, tensor) and isinstance(rhs, tensor) and lhs.dtype.name in WIDE:
            if lhs.type.name == rhs.type.name:
                return lhs, rhs
        return check(self, lhs, rhs, *options, **named)

    return checked


def broadcast_where_shapes_differ(broadcast):
    """`broadcast_impl_value` that compares two shapes as lists of numbers first."""

    @wraps(broadcast)
    def value(self, lhs, rhs):
        a, b = lhs.type, rhs.type
        if a.is_block() and b.is_block() and a.shape.values == b.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    return value


def hasten():
    """Shortens what the interpreter of this Triton does, where it is the one that the shortcuts were made for."""
    from triton.language import core
    from triton.runtime import interpreter

    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = once_in_a_launch(interpreter._patch_lang)
        interpreter._get_np_dtype = remembered(interpreter._get_np_dtype)
        builder = interpreter.interpreter_builder
        if not builder.options.debug:  # sums are made again in 64 bits, for an assertion that debugging alone makes
            builder.options = replace(builder.options, sanitize_overflow=False)
        core.tensor.__init__ = told_by_the_type(core.tensor.__init__)
        core.block_type.__init__ = told_by_the_shape(core.block_type.__init__)
        core.dtype.__eq__ = sooner_equal(core.dtype.__eq__)
        semantic = type(interpreter.interpreter_semantic)
        semantic.computation_type_impl = told_by_the_types(semantic.computation_type_impl)
        semantic.binary_op_type_checking_impl = as_they_are(semantic.binary_op_type_checking_impl, core.tensor)
        if hasattr(core.block_type(core.int32, [2]).shape, "values"):
            semantic.broadcast_impl_value = broadcast_where_shapes_differ(semantic.broadcast_impl_value)
