"""Pictures at which a decoder dies, raises or hangs: formats that this module teaches Pillow, in any process."""

import ctypes
import os
import signal
import time

from PIL import Image, ImageFile

MAGIC = b"CRASHING"


def die(kind):
    """What is done to a process that decodes a picture of a kind."""
    if kind == "segfault":
        ctypes.string_at(0)
    elif kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "exit":
        os._exit(7)
    elif kind == "memory":
        raise MemoryError
    elif kind == "odd":
        raise ZeroDivisionError("a decoder's own mistake")
    elif kind == "sleep":
        time.sleep(120)
    elif kind.startswith("once"):  # the first process only: a file tells that one died
        marker = kind.partition(" ")[2]
        if not os.path.exists(marker):
            open(marker, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)


class CrashingFile(ImageFile.ImageFile):
    format = "CRASHING"

    def _open(self):
        if self.fp.read(len(MAGIC)) != MAGIC:
            raise SyntaxError("not of this kind")
        self.kind = self.fp.read().decode()
        self._size, self._mode = (40, 30), "RGB"

    def load(self):
        die(self.kind)
        self.im = Image.new("RGB", (40, 30), "teal").im
        return super().load() if self.tile else Image.Image.load(self)


Image.register_open("CRASHING", CrashingFile, lambda prefix: prefix.startswith(MAGIC))
Image.register_extension("CRASHING", ".crash")


def write(path, kind):
    """A picture of a kind."""
    path.write_bytes(MAGIC + kind.encode())
    return path
