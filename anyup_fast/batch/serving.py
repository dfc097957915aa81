"""What a process does that decodes pictures. It starts without PyTorch, in a tenth of the time and of the memory."""

import os
import pickle
import signal
import struct
import sys
import warnings
from importlib import import_module
from importlib.util import find_spec

import numpy as np

from ..pixels import Pixels

READY = b"ready"
LENGTH = struct.Struct("<q")
ENORMOUS = 64_000_000  # values of a picture that is made a tensor there, where a lack of memory ends nothing else


def plugins():
    """Modules that taught Pillow further formats in this process."""
    if "PIL.Image" not in sys.modules:
        return []
    factories = [factory for factory, _ in sys.modules["PIL.Image"].OPEN.values()]
    modules = {getattr(factory, "__module__", "__main__") for factory in factories} - {"__main__"}
    return sorted(module for module in modules if not module.startswith("PIL."))


def add_plugins(modules):
    """Import what `plugins` has named in another process, as far as it can be found in this one."""
    for name in modules:
        if find_spec(name.partition(".")[0]) is not None:
            import_module(name)


def serve(modules):
    """What a process does: read sources, write pictures, until there is nothing more to read."""
    given, taken = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no picture
    if hasattr(os, "nice"):
        os.nice(10)
    if os.path.exists("/proc/self/oom_score_adj"):
        with open("/proc/self/oom_score_adj", "w") as file:  # where memory runs out, this process is the one to go
            file.write("500")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    add_plugins(modules)
    taken.write(READY)
    taken.flush()
    try:
        reader = pickle.load(given)
        while True:
            _answer(taken, reader, pickle.load(given))
    except (EOFError, BrokenPipeError):
        os._exit(0)


def _answer(stream, reader, source):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        picture = reader.decode(source)
    picture.notes += [str(warning.message) for warning in caught if str(warning.message) not in picture.notes]
    image, array = picture.image, None
    if isinstance(image, Pixels):
        if image.array.size > ENORMOUS:
            image = reader.finish(picture).image
        else:
            array, image.array = np.ascontiguousarray(image.array), None
    if image is not None and array is None:
        array, picture.image = image.numpy(), None
    content = pickle.dumps((picture, None, None) if array is None else (picture, array.shape, array.dtype))
    stream.write(LENGTH.pack(len(content)))
    stream.write(content)
    if array is not None:
        stream.write(memoryview(array.reshape(-1).view(np.uint8)))
    stream.flush()
