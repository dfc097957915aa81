"""Global memory of the machine: copies of tensors with guards between them, and what is known of every byte."""

import hashlib
import mmap

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided

GLOBAL_BASE = 0x7F3A00000000
GUARD = 4096
POISON = 0xFFA5  # every 16 bits of memory nobody wrote: NaN as float32, bfloat16 and float16
# What is known of a byte.
IN_VIEW, WRITTEN_EVER, WRITTEN_NOW, READ_NOW, IN_STORAGE = 1, 2, 4, 8, 16
# Storages from this size on are copied page by page, as they are used.
LARGE, PAGE = 1 << 28, 1 << 14
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def blank(size, kind, large):
    """`size` zeros; `large` ones take up memory only where they are used."""
    if not large:
        return np.zeros(size, kind)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    return np.frombuffer(mmap.mmap(-1, size * np.dtype(kind).itemsize, flags=flags), kind)


def bytes_of(storage):
    """The bytes of a storage of PyTorch, as a NumPy array that shares them."""
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


def seen_by(view, first, count):
    """Which of the `count` bytes from `first` on of its storage belong to elements of `view`."""
    size = view.element_size()
    rest, _ = np.divmod(np.arange(first, first + count) - view.storage_offset() * size, size)
    inside, extent = rest >= 0, 0
    axes = sorted((stride, n) for stride, n in zip(view.stride(), view.shape, strict=True) if stride and n > 1)
    for stride, n in axes:
        if stride <= extent:
            raise NotImplementedError(f"a large tensor with strides {view.stride()}, whose elements overlap")
        extent += stride * (n - 1)
    for stride, n in reversed(axes):
        rest -= np.minimum(rest // stride, n - 1) * stride
    return inside & (rest == 0)


class History:
    """Remembers which bytes of the storages of torch.empty have been written, from launch to launch.

    What the host writes is known by its not being the poison such memory is filled with (zeros in large storages), 16
    bytes at a time: a number or two may look like poison by chance.
    """

    def __init__(self):
        self.known = {}

    def poison(self, tensor):
        """Take note of a new tensor whose content is nobody's; the tensor."""
        storage = tensor.untyped_storage()
        large = storage.nbytes() >= LARGE
        if not large:
            content = bytes_of(storage)
            content[: len(content) // 2 * 2].view(np.uint16)[:] = POISON
        self.known[storage.data_ptr()] = blank(storage.nbytes(), np.bool_, large)
        return tensor

    def unwritten(self, storage, first, content):
        """Which bytes, `content` from `first` on, nobody has written; None for memory that came with content."""
        written = self.known.get(storage.data_ptr())
        if written is None or len(written) != storage.nbytes():
            return None
        written = written[first : first + len(content)]
        pattern = np.array([0 if storage.nbytes() >= LARGE else POISON], np.uint16).view(np.uint8)
        by_host = (content != np.resize(pattern, len(content))) & ~written
        by_host[len(content) // 2 * 2 :] = False  # an odd byte at the end has no poison
        pieces = np.logical_or.reduceat(by_host, np.arange(0, len(content), 16))
        written |= np.repeat(pieces, 16)[: len(content)]
        return ~written

    def written(self, storage, first, new):
        """Take note of bytes from `first` on that a launch has written."""
        written = self.known.get(storage.data_ptr())
        if written is not None and len(written) == storage.nbytes():
            written[first : first + len(new)] |= new


class GlobalMemory:
    """The global memory of one launch.

    Attributes:
        buffer: bytes, addressed from GLOBAL_BASE on. state: what is known of each.
        large: whether a storage is copied page by page.
    """

    def __init__(self, history):
        self.history, self.storages, self.constants, self.size = history, {}, [], GUARD

    def add(self, tensor):
        """Take a tensor in; its address."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self.storages:
            start = -(-self.size // 512) * 512 + key % 64
            self.storages[key] = (start, storage, [])
            self.size = start + storage.nbytes() + GUARD
        start, _, views = self.storages[key]
        views.append(tensor)
        return GLOBAL_BASE + start + tensor.storage_offset() * tensor.element_size()

    def add_constant(self, content):
        """Take a constant table in; its address."""
        start = -(-self.size // 512) * 512
        self.constants.append((start, np.frombuffer(content, np.uint8)))
        self.size = start + len(content) + GUARD
        return GLOBAL_BASE + start

    def fill(self):
        """Copy the tensors in; large ones wait for `touch`."""
        words = -(-self.size // 16) * 2
        self.large = any(storage.nbytes() >= LARGE for _, storage, _ in self.storages.values())
        self.pages = set()
        self.buffer, self.state = (blank(words * 8, np.uint8, self.large) for _ in range(2))
        if not self.large:
            self.buffer.view(np.uint16)[:] = POISON
        for start, content in self.constants:
            self.buffer[start : start + len(content)] = content
            self.state[start : start + len(content)] = IN_VIEW | WRITTEN_EVER
        for start, storage, views in self.storages.values():
            if 0 < storage.nbytes() < LARGE:
                self._copy(start, storage, 0, storage.nbytes())
                for view in views:
                    if view.numel():
                        size = view.element_size()
                        first = self.state[start + view.storage_offset() * size :]
                        shape = [n if stride else 1 for n, stride in zip(view.shape, view.stride(), strict=True)]
                        seen = as_strided(first, (*shape, size), (*(s * size for s in view.stride()), 1))
                        seen |= IN_VIEW

    def _copy(self, start, storage, first, last):
        content = bytes_of(storage)[first:last]
        self.buffer[start + first : start + last] = content
        state = self.state[start + first : start + last]
        state[:] = IN_STORAGE | WRITTEN_EVER
        unwritten = self.history.unwritten(storage, first, content)
        if unwritten is not None:
            state[unwritten] = IN_STORAGE

    def touch(self, at, width):
        """Have the bytes that accesses at these offsets are about to use."""
        if not self.large or not len(at):
            return
        for page in np.unique(np.concatenate((at, at + width - 1)) // PAGE).tolist():
            if page in self.pages:
                continue
            self.pages.add(page)
            for start, storage, views in self.storages.values():
                first, last = max(page * PAGE - start, 0), min((page + 1) * PAGE - start, storage.nbytes())
                if storage.nbytes() >= LARGE and first < last:
                    self._copy(start, storage, first, last)
                    for view in views:
                        self.state[start + first : start + last][seen_by(view, first, last - first)] |= IN_VIEW

    def give_back(self):
        """Copy what was written out again; a digest of it."""
        digest = hashlib.sha256()
        for start, storage, _ in self.storages.values():
            pieces = [(0, storage.nbytes())]
            if storage.nbytes() >= LARGE:
                pieces = [(page * PAGE - start, (page + 1) * PAGE - start) for page in sorted(self.pages)]
            for first, last in pieces:
                first, last = max(first, 0), min(last, storage.nbytes())
                if first >= last:
                    continue
                new = self.state[start + first : start + last] & WRITTEN_NOW != 0
                if new.any():
                    written = self.buffer[start + first : start + last][new]
                    bytes_of(storage)[first:last][new] = written
                    digest.update(written)
                    self.history.written(storage, first, new)
        return digest.hexdigest()

    def describe(self, offset):
        """Text of what lies at an offset."""
        for start, storage, views in self.storages.values():
            if start - GUARD <= offset < start + storage.nbytes() + GUARD:
                shapes = {f"{tuple(v.shape)} {v.dtype}".replace("torch.", "") for v in views}
                return f"byte {offset - start} of {storage.nbytes()} of the storage of {', '.join(sorted(shapes))}"
        return "no tensor near"


class Tags:
    """Who touched every grain of bytes last: clock * 64 + warp for writes and reads, and the CTA where it matters."""

    def __init__(self, size, grain, across, large=False):
        self.grain, self.across = grain, across
        self.written, self.read = (blank(size // grain, np.int32, large) for _ in range(2))
        if across:
            self.writer, self.reader = (blank(size // grain, np.int32, large) for _ in range(2))

    def grains(self, offset, width):
        """Indices (N, k) of the grains of accesses."""
        first = offset // self.grain
        return first[:, None] + np.arange(width // self.grain) if width > self.grain else first[:, None]
