"""Loads, stores and asynchronous copies, and the checks of all of them."""

import numpy as np

from .memory import GLOBAL_BASE, IN_STORAGE, IN_VIEW, READ_NOW, WRITTEN_EVER, WRITTEN_NOW

ANY_WARP = 63  # in a tag: more than one warp
IN_FLIGHT = 1 << 30  # in a tag: an asynchronous copy that nobody has waited for


class NeedOwners(Exception):
    """A byte is both read and written in this launch: who did it has to be remembered from the start."""


class Accesses:
    """The part of `Machine` that reads and writes memory.

    `mask` is None where all threads take part, else an array of bool; `index` is that of the instruction.
    """

    def _selected(self, mask):
        if mask is None:
            return None
        selected = np.flatnonzero(mask)
        return None if len(selected) == self.n else selected

    def _take(self, array, selected):
        return array if selected is None else array[selected]

    def _aligned(self, index, offset, width, low, high, selected, space):
        """Offsets that may be used: all, or fewer where faults are collected."""
        wrong = (offset & width - 1) != 0
        if wrong.any():
            n = int(np.argmax(wrong))
            self._fault(
                "misaligned", index, f"{space} address {offset[n]:#x} for {width} bytes, {self._who(selected, n)}"
            )
        outside = (offset < low) | (offset + width > high)
        if outside.any():
            n = int(np.argmax(outside))
            what = self.memory.describe(int(offset[n])) if space == "global" else f"of {self.shared_bytes} bytes"
            self._fault("out of bounds", index, f"{space} byte {offset[n]} ({what}), {self._who(selected, n)}")
        return ~(wrong | outside)

    def _kept(self, selected, at, fine):
        if fine.all():
            return selected, at
        return (np.arange(self.n) if selected is None else selected)[fine], at[fine]

    def _global(self, index, mask, base, offset, width):
        """Threads that take part and their offsets into the buffer."""
        selected = self._selected(mask)
        at = self._take(base, selected).view(np.int64) - (GLOBAL_BASE - offset)
        fine = self._aligned(index, at, width, 0, len(self.memory.buffer), selected, "global")
        selected, at = self._kept(selected, at, fine)
        self.memory.touch(at, width)
        return selected, at

    def _state(self, at, width):
        """(array of the state of memory, its indices, a byte repeated over its items)."""
        size = min(width, 8)
        places = at // size
        if width == 16:
            places = np.stack((places, places + 1), 1)
        return self.state_views[size], places, int.from_bytes(b"\1" * size, "little")

    def _check_global(self, index, selected, at, width, store):
        state, places, ones = self._state(at, width)
        kind = state.dtype.type
        found = state[places]
        need = IN_VIEW if store else IN_VIEW | WRITTEN_EVER
        bad = found & kind(ones * need) != kind(ones * need)
        if bad.any():
            n = int(np.argmax(bad.reshape(len(at), -1).any(1)))
            byte = self.memory.state[at[n] : at[n] + width]
            wrong = int(np.argmax(byte & need != need))
            if byte[wrong] & IN_VIEW:
                found_out = "uninitialised"
            else:
                found_out = "outside the tensor" if byte[wrong] & IN_STORAGE else "out of bounds"
            what = self.memory.describe(int(at[n]) + wrong)
            self._fault(found_out, index, f"{'store' if store else 'load'} of {what}, {self._who(selected, n)}")
        if self.owners is None:
            if (found & kind(ones * (WRITTEN_NOW | READ_NOW if store else WRITTEN_NOW))).any():
                raise NeedOwners
            if store and self.count > 1 and self._shared_by_ctas(selected, at):
                raise NeedOwners
        else:
            self._owner_check(index, selected, at, width, store)
        state[places] = found | kind(ones * (WRITTEN_NOW | WRITTEN_EVER if store else READ_NOW))

    def _shared_by_ctas(self, selected, at):
        """Whether threads of several CTAs use one address at once."""
        order = np.argsort(at, kind="stable")
        cta, at = self._take(self.cta, selected)[order], at[order]
        return ((at[1:] == at[:-1]) & (cta[1:] != cta[:-1])).any()

    def _owner_check(self, index, selected, at, width, store):
        tags = self.owners
        places = tags.grains(at, width)
        cta = self._take(self.cta, selected)[:, None]
        writer = tags.writer[places]
        bad = (writer != 0) & (writer != cta)
        if store:
            reader = tags.reader[places]
            bad |= (reader != 0) & (reader != cta)
        self._race(index, selected, places, tags, store, "global race")
        if store:
            tags.writer[places] = cta
            bad |= tags.writer[places] != cta
            tags.writer[places[bad]] = -1
        else:
            tags.reader[places] = np.where((tags.reader[places] != 0) & (tags.reader[places] != cta), -1, cta)
            tags.reader[places[tags.reader[places] != cta]] = -1
        if bad.any():
            n = int(np.argmax(bad.any(1)))
            what = self.memory.describe(int(at[n]))
            self._fault("global race", index, f"{what} also used by another CTA, {self._who(selected, n)}")

    def _race(self, index, selected, places, tags, store, kind):
        """Compare with the last write and reads of these grains, then note this access."""
        self.clock += 1
        epoch, warp = self._take(self.epoch, selected)[:, None], self._take(self.warp, selected)[:, None]
        written, read = tags.written[places], tags.read[places]
        bad = (written > epoch) & ((written & 63) != warp) | (written >= IN_FLIGHT)
        if store:
            bad |= (read > epoch) & ((read & 63) != warp)
        if bad.any():
            n, g = (int(x[0]) for x in np.nonzero(bad))
            if written[n, g] >= IN_FLIGHT:
                how = f"an asynchronous copy of warp {written[n, g] & 63} that nobody has waited for"
            else:
                by_write = written[n, g] > epoch[n, 0] and written[n, g] & 63 != warp[n, 0]
                other = int((written if by_write else read)[n, g] & 63)
                whom = "several warps" if other == ANY_WARP else f"warp {other}"
                how = f"{'written' if by_write else 'read'} by {whom}"
            act = "store" if store else "load"
            self._fault(kind, index, f"{act} of byte {places[n, g] * tags.grain - self._base(selected, n, tags)}, "
                        f"{how}, with no barrier between, {self._who(selected, n)}")  # fmt: skip
        now = np.broadcast_to(self.clock * 64 + warp, places.shape)
        if store:
            tags.written[places] = now
        else:
            now = np.where((read > epoch) & ((read & 63) != warp), self.clock * 64 + ANY_WARP, now)
            tags.read[places] = now
            lost = tags.read[places] != now
            if lost.any():
                tags.read[places[lost]] = self.clock * 64 + ANY_WARP

    def _base(self, selected, n, tags):
        return 0 if tags.across else int(self.local[n if selected is None else selected[n]]) * self.shared_bytes

    # Global memory.

    def load_global(self, index, mask, base, offset, kind, registers):
        """ld.global, of one or several registers."""
        kind = "u" + kind[1]
        size = int(kind[1])
        width = size * len(registers)
        selected, at = self._global(index, mask, base, offset, width)
        if not len(at):
            return
        self._check_global(index, selected, at, width, False)
        self._count_global(self.report.global_load, selected, at, width)
        memory, first = self.global_views[kind], at // size
        for n, register in enumerate(registers):
            if selected is None:
                register[:] = memory[first + n] if register.dtype.kind != "i" else memory[first + n].view(f"i{size}")
            else:
                register[selected] = memory[first + n].view(f"{register.dtype.kind}{size}" if size > 1 else kind)

    def store_global(self, index, mask, base, offset, kind, registers):
        """st.global."""
        kind = "u" + kind[1]
        size = int(kind[1])
        width = size * len(registers)
        selected, at = self._global(index, mask, base, offset, width)
        if not len(at):
            return
        self._check_global(index, selected, at, width, True)
        self._count_global(self.report.global_store, selected, at, width)
        self._scatter(index, self.global_views[kind], at // size, selected, registers, "global race")

    def _scatter(self, index, memory, first, selected, registers, kind):
        for n, register in enumerate(registers):
            value = np.broadcast_to(register, self.n) if np.ndim(register) == 0 else register
            value = self._take(value, selected)
            value = value.view(memory.dtype) if value.dtype.kind == "f" else value.astype(memory.dtype, copy=False)
            order = -1 if self.first_wins else 1  # of threads that store to one address at once
            memory[(first + n)[::order]] = value[::order]
            if (lost := memory[first + n] != value).any():
                self._clash(index, kind, value, memory[first + n], lost, selected, first + n)

    def _clash(self, index, kind, value, kept, lost, selected, places):
        """Threads stored other numbers to one address at once: a race, or one number rounded in several ways."""
        k = int(np.argmax(lost))
        values = value[k : k + 1], kept[k : k + 1]
        pair = " and ".join(f"{v[0]:#x}" + (f" ({v.view('f4')[0]:.9g})" if v.itemsize == 4 else "") for v in values)
        warps = np.unique(self._take(self.warp, selected)[places == places[k]])
        whose = "of their warp" if len(warps) == 1 else "of other warps"
        if value.itemsize == 4:
            x, y = value.view(np.float32).astype(np.float64), kept.view(np.float32).astype(np.float64)
            if (np.abs(x - y)[lost] <= 1e-5 * np.abs(x[np.isfinite(x)]).max(initial=0)).all():
                kind = "unequal copies"
        text = f"{lost.sum()} threads store other numbers than others {whose} to the same address, {pair}"
        self._fault(kind, index, f"{text}, {self._who(selected, k)}")

    # Shared memory.

    def _shared(self, index, mask, base, offset, width):
        selected = self._selected(mask)
        at = np.broadcast_to(base, self.n) if np.ndim(base) == 0 else base
        at = self._take(at, selected).astype(np.int64) + offset + self._take(self.shared_offset, selected)
        low = self._take(self.local, selected) * self.shared_bytes
        fine = self._aligned(index, at, width, low, low + self.shared_bytes, selected, "shared")
        return self._kept(selected, at, fine)

    def _check_shared(self, index, selected, at, width, store):
        places = self.tags.grains(at, width)
        if not store and (never := self.tags.written[places] == 0).any():
            n = int(np.argmax(never.any(1)))
            byte = int(at[n]) - self._base(selected, n, self.tags)
            self._fault(
                "uninitialised", index, f"load of shared byte {byte} that nobody wrote, {self._who(selected, n)}"
            )
        self._race(index, selected, places, self.tags, store, "shared race")
        if store:
            self.written_at[places] = self.clock

    def load_shared(self, index, mask, base, offset, kind, registers):
        """ld.shared."""
        size = int(kind[1])
        width = size * len(registers)
        selected, at = self._shared(index, mask, base, offset, width)
        if not len(at):
            return
        self._check_shared(index, selected, at, width, False)
        self._count_shared(self.report.shared_load, selected, at, width)
        memory, first = self.shared_views[f"u{size}"], at // size
        for n, register in enumerate(registers):
            value = memory[first + n].view(kind)
            if selected is None:
                register[:] = value
            else:
                register[selected] = value

    def store_shared(self, index, mask, base, offset, kind, registers):
        """st.shared."""
        size = int(kind[1])
        width = size * len(registers)
        selected, at = self._shared(index, mask, base, offset, width)
        if not len(at):
            return
        self._check_shared(index, selected, at, width, True)
        self._count_shared(self.report.shared_store, selected, at, width)
        self._scatter(index, self.shared_views[f"u{size}"], at // size, selected, registers, "shared race")

    # Asynchronous copies: read when issued, written when waited for.

    def copy_async(self, index, mask, to, to_offset, of, of_offset, size, taken):
        """cp.async: global memory is read here, shared memory is written in `wait_copies`."""
        selected, at = self._shared(index, mask, to, to_offset, size)
        if not len(at):
            return
        data = np.zeros((len(at), size), np.uint8)
        amount = np.full(len(at), size, np.int64) if isinstance(taken, int) else self._take(
            np.broadcast_to(taken, self.n), selected).astype(np.int64)  # fmt: skip
        if ((amount != 0) & (amount != size)).any():
            self._unsupported(index, "a part of an asynchronous copy")
        reads = np.zeros(self.n, bool)
        reads[slice(None) if selected is None else selected] = amount > 0
        chosen, start = self._global(index, reads, of, of_offset, size)
        if len(start):
            self._check_global(index, chosen, start, size, False)
            self._count_global(self.report.global_load, chosen, start, size)
            threads = np.arange(self.n) if chosen is None else chosen
            inside = threads if selected is None else np.searchsorted(selected, threads)
            data[inside] = self.global_views["u4"][(start // 4)[:, None] + np.arange(size // 4)].view(np.uint8)
        self._count_shared(self.report.shared_store, selected, at, size)
        places = self.tags.grains(at, size)
        self._race(index, selected, places, self.tags, True, "shared race")
        self.tags.written[places] = IN_FLIGHT + self._take(self.warp, selected)[:, None]
        threads = np.arange(self.n) if selected is None else selected
        self.copies.append((index, threads, at, places, data, self.groups[threads].copy(), size))

    def commit_copies(self, index, mask):
        """cp.async.commit_group."""
        self.groups[slice(None) if mask is None else mask] += 1

    def wait_copies(self, index, mask, pending):
        """cp.async.wait_group: all but the last `pending` groups arrive."""
        left = []
        self.clock += 1
        for issued, threads, at, places, data, group, size in self.copies:
            done = group < self.groups[threads] - pending
            if mask is not None:
                done &= mask[threads]
            if done.any():
                words = self.shared_views["u4"]
                words[(at[done] // 4)[:, None] + np.arange(size // 4)] = data[done].view(np.uint32)
                self.tags.written[places[done]] = self.clock * 64 + self.warp[threads[done]][:, None]
                self.written_at[places[done]] = self.clock
            if not done.all():
                keep = ~done
                left.append((issued, threads[keep], at[keep], places[keep], data[keep], group[keep], size))
        self.copies = left
