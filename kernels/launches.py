"""Launches that cost the host microseconds: what Triton works out for a kernel is worked out once for each problem.

Triton's own way to launch looks at every argument again, each time, which takes longer than many a kernel. A launcher
therefore says by a key what problem it has (everything that kernels are specialised by: dtypes, strides, alignment,
sizes), and from the second time on the compiled kernels are handed to the driver as they are.
"""

import os

import triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MOST_PROBLEMS = 512  # whose kernels are remembered; those of a size that was forgotten are found in Triton's own cache

_known = {}  # key of a problem -> its launches in order, each (kernel, compiled kernel, programs, constants)


class Launches:
    """The launches of one problem, in an order that is the same every time; call it for each of them.

    Args:
        key: hashable; two problems of one key launch the same kernels on arguments that are specialised alike.
    """

    def __init__(self, key):
        if INTERPRETED:  # there is no driver, and nothing is compiled
            self._steps = self._made = None
            return
        active = triton.runtime.driver.active
        device = active.get_current_device()
        self.stream = active.get_current_stream(device)
        self.key = (key, device)
        hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
        self._watched = any(getattr(hook, "calls", hook) for hook in hooks)  # by a profiler
        self._steps, self._made, self._place = _known.get(self.key), [], 0

    def __call__(self, kernel, programs, *arguments, **constants):
        """`kernel[(programs,)](*arguments, **constants)`, constants and options by name."""
        if self._steps is not None:
            known, ready, grid, rest = self._steps[self._place]
            self._place += 1
            if known is not kernel:
                raise RuntimeError(f"key {self.key}: launches {kernel} in the place of {known}")
            if self._watched:
                ready[grid](*arguments, *rest, stream=self.stream)
            else:  # what that does, but for what it gathers for hooks
                code = ready.function, ready.packed_metadata
                ready.run(*grid, self.stream, *code, None, None, None, *arguments, *rest)
            return
        compiled = kernel[(programs,)](*arguments, **constants)
        if compiled is None:  # in the interpreter, and where kernels are only counted
            self._made = None
        if self._made is not None:
            rest = [constants[name] for name in kernel.arg_names[len(arguments) :]]
            self._made.append((kernel, compiled, (programs, 1, 1), rest))

    def done(self):
        """Remember the launches, if they are not known: all of them went well."""
        if self._steps is None and self._made:
            if len(_known) >= MOST_PROBLEMS:
                _known.clear()
            _known[self.key] = tuple(self._made)


def launched(kernel, programs, *arguments, **constants):
    """One launch that nobody remembers, called as `Launches` are."""
    kernel[(programs,)](*arguments, **constants)


def cdiv(a, b):
    """a / b rounded up: Triton's own, which serves kernels too, takes microseconds."""
    return -(-a // b)


def side_by_side(tensor):
    """`tensor` with its numbers side by side from a multiple of 16 bytes on, itself where it is so."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def layout(tensor):
    """What kernels are specialised by of a tensor that somebody else has made, and its shape."""
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16 == 0
