"""What warps do together: shuffles, ldmatrix and stmatrix, and the matrix units, mma and (sm_90) wgmma."""

import numpy as np

from .accesses import ANY_WARP, IN_FLIGHT
from .arithmetic import wide_bf16
from .syntax import SHARED_BASE


class Matrices:
    """The part of `Machine` that exchanges and multiplies what lies in several lanes."""

    def _warps_whole(self, index, mask):
        """Numbers of the warps of a mask, None for all; lanes that are left behind are a fault."""
        if mask is None:
            return None
        lanes = mask.reshape(-1, 32)
        some = lanes.any(1)
        if (some != lanes.all(1)).any():
            self._fault("divergence", index, "not all lanes of a warp take part")
        return np.flatnonzero(some)

    def shuffle(self, index, mask, how, value, lane):
        """shfl.sync."""
        self._warps_whole(index, mask)
        lane = np.asarray(lane).astype(np.int64)
        if how == "bfly":
            source = self.lane ^ lane
        elif how == "idx":
            source = lane & 31
        elif how == "up":
            source = np.where(self.lane >= lane, self.lane - lane, self.lane)
        else:
            source = np.where(self.lane + lane < 32, self.lane + lane, self.lane)
        return value[self.warp_start + source]

    def _matrix_rows(self, index, mask, base, offset, count, store):
        """(numbers of warps or None, indices of 16-byte rows (warps, matrices, 8))."""
        warps = self._warps_whole(index, mask)
        rows = mask
        if count < 4:  # only the first lanes give addresses
            rows = (self.lane < 8 * count) & (True if rows is None else rows)
        selected, at = self._shared(index, rows, base, offset, 16)
        self._check_shared(index, selected, at, 16, store)
        self._count_shared(self.report.shared_store if store else self.report.shared_load, selected, at, 16)
        return warps, (at // 16).reshape(-1, count, 8)

    def load_matrix(self, index, mask, base, offset, registers, flip):
        """ldmatrix."""
        warps, rows = self._matrix_rows(index, mask, base, offset, len(registers), False)
        data = self.shared_views["u4"].reshape(-1, 4)[rows]
        if flip:
            data = np.ascontiguousarray(data.view(np.uint16).swapaxes(2, 3)).view(np.uint32)
        for n, register in enumerate(registers):
            self._put(register, warps, data[:, n].reshape(-1, 32))

    def store_matrix(self, index, mask, base, offset, registers, flip):
        """stmatrix."""
        warps, rows = self._matrix_rows(index, mask, base, offset, len(registers), True)
        data = np.stack([self._lanes(r, warps) for r in registers], 1).reshape(-1, len(registers), 8, 4)
        if flip:
            data = np.ascontiguousarray(np.ascontiguousarray(data).view(np.uint16).swapaxes(2, 3)).view(np.uint32)
        self.shared_views["u4"].reshape(-1, 4)[rows] = data

    def _lanes(self, register, warps):
        lanes = register.reshape(-1, 32)
        return lanes if warps is None else lanes[warps]

    def _put(self, register, warps, value):
        if warps is None:
            register.reshape(-1, 32)[:] = value
        else:
            register.reshape(-1, 32)[warps] = value

    def _pairs(self, register, warps, kind):
        """Two numbers of 16 bits per lane as float32: (warps, 8, 4, 2)."""
        lanes = np.ascontiguousarray(self._lanes(register, warps))
        if kind == "f16":
            wide = lanes.view(np.float16).astype(np.float32)
        else:
            wide = (lanes.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return wide.reshape(-1, 8, 4, 2)

    def _left(self, registers, warps, kind):
        """The left operand (warps, 16, depth)."""
        if kind == "tf32":
            a = [(self._lanes(r, warps) & np.uint32(0xFFFFE000)).view(np.float32).reshape(-1, 8, 4) for r in registers]
            return np.stack((np.concatenate((a[0], a[2]), 2), np.concatenate((a[1], a[3]), 2)), 1).reshape(-1, 16, 8)
        a = [self._pairs(r, warps, kind).reshape(-1, 8, 8) for r in registers]
        return np.stack((np.concatenate((a[0], a[2]), 2), np.concatenate((a[1], a[3]), 2)), 1).reshape(-1, 16, 16)

    def _product(self, left, right, add, kind):
        """add + left @ right.T, float32 numbers in float64, each rounded once and the same wherever it stands.

        With `truncate` as tensor cores are known to do it (Fasi et al. 2021): blocks of 4 (tf32) or 8 terms, aligned
        to the largest with one bit more than float32 has, cut off, and the sum cut off to float32.
        """
        left, right = left.astype(np.float64), right.astype(np.float64)
        if not self.truncate:
            return np.matmul(left, right.swapaxes(1, 2)) + add
        block = 4 if kind == "tf32" else 8
        for first in range(0, left.shape[2], block):
            terms = left[:, :, None, first : first + block] * right[:, None, :, first : first + block]
            terms = np.concatenate((terms, add[..., None]), 3)
            unit = np.ldexp(1.0, np.frexp(np.abs(terms).max(3, keepdims=True))[1] - 25)
            add = (np.trunc(terms / unit) * unit).sum(3)
            add = (add.view(np.int64) & ~np.int64((1 << 29) - 1)).view(np.float64)
        return add

    def multiply_matrices(self, index, mask, kind, a, rest):
        """Products of one left operand (mma.sync m16n8) with several right ones."""
        warps = self._warps_whole(index, mask)
        left = self._left(a, warps, kind)
        n, deep = len(rest), left.shape[2]
        right = np.empty((len(left), n, 8, deep))
        add = np.empty((len(left), 2, 8, n, 4, 2))
        for x, (_, b, c) in enumerate(rest):
            for half, register in enumerate(b):
                if kind == "tf32":
                    lanes = (self._lanes(register, warps) & np.uint32(0xFFFFE000)).view(np.float32).reshape(-1, 8, 4)
                else:
                    lanes = self._pairs(register, warps, kind).reshape(-1, 8, 8)
                right[:, x, :, half * deep // 2 : (half + 1) * deep // 2] = lanes
            for part, register in enumerate(c):
                add[:, part // 2, :, x, :, part % 2] = self._lanes(register, warps).reshape(-1, 8, 4)
        out = self._product(left, right.reshape(len(left), n * 8, deep), add.reshape(len(left), 16, n * 8), kind)
        out = out.reshape(add.shape)
        for x, (d, _, _) in enumerate(rest):
            for part, register in enumerate(d):
                self._put(register, warps, out[:, part // 2, :, x, :, part % 2].reshape(-1, 32))

    # Warpgroups (sm_90).

    def fence_proxy(self, index, mask):
        """fence.proxy.async."""
        self.clock += 1
        warps = slice(None) if mask is None else mask.reshape(-1, 32).any(1)
        self.fenced_at.reshape(-1)[warps] = self.clock

    def wgmma_fence(self, index, mask, _):
        """wgmma.fence."""
        self._warps_whole(index, mask)

    def wgmma_commit_group(self, index, mask, _):
        """wgmma.commit_group."""
        self.product_groups[slice(None) if mask is None else np.unique(self.local[mask])] += 1

    def wgmma_wait_group(self, index, mask, pending):
        """Products are computed when issued; what they read may be written again from here and a barrier on."""
        left, active = [], np.ones(self.count, bool) if mask is None else mask.reshape(self.count, -1).any(1)
        for places, cta, group in self.reads:
            done = active[cta] & (group < self.product_groups[cta] - int(pending))
            self.tags.read[places[done]] = self.clock * 64 + ANY_WARP
            if not done.all():
                left.append((places[~done], cta[~done], group[~done]))
        self.reads = left

    def _operand(self, index, groups, descriptor, count, deep, kind, flip):
        """(groups, count, deep) float32 read from shared memory through a matrix descriptor."""
        size = 4 if kind == "tf32" else 2
        first = groups * 128
        whole = np.broadcast_to(descriptor, self.n)[first]
        start = (whole & np.uint64(0x3FFF)).astype(np.int64) * 16
        leading = (whole >> np.uint64(16) & np.uint64(0x3FFF)).astype(np.int64) * 16
        stride = (whole >> np.uint64(32) & np.uint64(0x3FFF)).astype(np.int64) * 16
        if (whole >> np.uint64(49) & np.uint64(7)).any():
            self._unsupported(index, "a base offset of a matrix descriptor")
        mode = int(whole[0] >> np.uint64(62))
        row = {0: 16, 1: 128, 2: 64, 3: 32}[mode]
        n, k = np.arange(count)[:, None], np.arange(deep)[None, :]
        lead, step = leading[:, None, None], stride[:, None, None]
        if flip:  # numbers of one depth lie next to each other
            if mode == 0:
                at = n % 8 * size + k % 8 * 16 + (n // 8) * step + (k // 8) * lead
            else:
                per_row = row // size
                at = n % per_row * size + k % 8 * row + (n // per_row) * lead + (k // 8) * step
        elif mode == 0:
            at = n % 8 * 16 + (n // 8) * step + (k * size // 16) * lead + k * size % 16
        else:
            at = n % 8 * row + (n // 8) * step + k * size
        at = at + start[:, None, None]
        if mode:
            at = at ^ ((at >> 7 & (row // 16 - 1)) << 4)
        local = self.local[first][:, None, None]
        inside = at - SHARED_BASE
        if ((inside < 0) | (inside + size > self.shared_bytes)).any():
            self._fault("out of bounds", index, f"shared bytes {inside.min()} to {inside.max()} of a matrix descriptor")
            inside = np.clip(inside, 0, self.shared_bytes - size)
        at = inside + local * self.shared_bytes
        self._check_group(index, first, at.reshape(len(first), -1), size)
        if kind == "tf32":
            return (self.shared_views["u4"][at // 4] & np.uint32(0xFFFFE000)).view(np.float32)
        raw = self.shared_views["u2"][at // 2]
        return raw.view(np.float16).astype(np.float32) if kind == "f16" else wide_bf16(raw)

    def _check_group(self, index, first, at, size):
        """Operands in shared memory: written, behind a barrier if by others, and behind a fence of the proxies."""
        places = at // self.shared_grain
        written = self.tags.written[places]
        epoch, writer = self.epoch[first][:, None], written & 63
        if (written == 0).any():
            n = int(np.argmax((written == 0).any(1)))
            self._fault(
                "uninitialised", index, f"a product reads shared memory nobody wrote, CTA {self.cta[first[n]] - 1}"
            )
        if (bad := (written > epoch) | (written >= IN_FLIGHT)).any():
            n, g = (int(x[0]) for x in np.nonzero(bad))
            self._fault("shared race", index, f"a product reads shared memory that warp {writer[n, g]} wrote, with no "
                        f"barrier between, CTA {self.cta[first[n]] - 1}")  # fmt: skip
        fence = self.fenced_at[self.local[first][:, None], np.minimum(writer, self.fenced_at.shape[1] - 1)]
        if (bad := (self.written_at[places] > fence) & (written != 0)).any():
            n, g = (int(x[0]) for x in np.nonzero(bad))
            self._fault("proxy fence", index, f"a product reads shared memory that warp {writer[n, g]} wrote with no "
                        f"fence.proxy.async since, CTA {self.cta[first[n]] - 1}")  # fmt: skip
        # Until it is waited for, whoever writes there races with it, its own warps too.
        self.tags.read[places] = IN_FLIGHT + ANY_WARP
        places = np.unique(places)
        cta = places * self.shared_grain // self.shared_bytes
        self.reads.append((places, cta, self.product_groups[cta]))

    def multiply_group(self, index, mask, kind, size, d, a, b, add, flips):
        """wgmma: 64 x size, four warps together."""
        warps = self._warps_whole(index, mask)
        groups = np.arange(self.warps // 4) if warps is None else np.unique(warps // 4)
        if warps is not None and len(groups) * 4 != len(warps):
            self._fault("divergence", index, "not all warps of a group take part")
        deep = 8 if kind == "tf32" else 16
        chosen = (groups[:, None] * 4 + np.arange(4)).reshape(-1)
        right = self._operand(index, groups, b, size, deep, kind, flips[1])
        if isinstance(a, tuple):
            left = self._left(a, chosen, kind).reshape(len(groups), 64, deep)
        else:
            left = self._operand(index, groups, a, 64, deep, kind, flips[0])
        keep = np.broadcast_to(add, self.n).reshape(-1, 32)[chosen, 0]
        before = np.zeros((len(groups), 4, 2, 8, size // 8, 4, 2))
        for n, register in enumerate(d):
            lanes = np.where(keep[:, None], register.reshape(-1, 32)[chosen], 0)
            before[:, :, n // 2 % 2, :, n // 4, :, n % 2] = lanes.reshape(-1, 4, 8, 4)
        out = self._product(left, right, before.reshape(len(groups), 64, size), kind).reshape(before.shape)
        for n, register in enumerate(d):
            register.reshape(-1, 32)[chosen] = out[:, :, n // 2 % 2, :, n // 4, :, n % 2].reshape(len(chosen), 32)
