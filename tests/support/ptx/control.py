"""The way of threads through the blocks of a program, together or apart, and barriers."""

from collections import Counter

import numpy as np

from .accesses import ANY_WARP
from .report import Fault

EXITED = 1 << 20  # the place of threads that are done
MOST_BLOCKS = 20_000_000


class Control:
    """The part of `Machine` that executes blocks.

    Where threads part, each has its own place in the program; those at the lowest place run next, under a mask, so that
    they meet again. A barrier is waited at until all threads of the CTA that live are there.
    """

    def _control(self, full, masked, predicates):
        """Execute the program: functions of its blocks for all threads, masked(block, mask), predicates of branches."""
        blocks = self.program.blocks
        counts, at, together = Counter(), 0, True
        for _ in range(MOST_BLOCKS):
            if together:
                end = blocks[at].end
                counts[at] += self.warps
                full[at]()
                if end[0] == "exit":
                    break
                if end[0] == "branch":
                    taken = predicates[at] ^ end[1]
                    number = np.count_nonzero(taken)
                    if 0 < number < self.n:
                        position, together = np.where(taken, end[3], at + 1), False
                        waiting = np.zeros(self.n, bool)
                    else:
                        at = end[3] if number else at + 1
                else:
                    if end[0] == "bar":
                        self._barrier(slice(None))
                    at = end[1] if end[0] == "jump" else at + 1
                continue
            ready = np.where(waiting, EXITED, position)
            at = int(ready.min())
            if at >= EXITED:
                break
            mask = ready == at
            if mask.all():
                together = True
                continue
            end = blocks[at].end
            counts[at] += int(mask.reshape(-1, 32).any(1).sum())
            masked(at, mask)
            if end[0] == "exit":
                position[mask] = EXITED
            elif end[0] == "branch":
                taken = predicates[at] ^ end[1]
                position[mask] = np.where(taken[mask], end[3], at + 1)
            elif end[0] == "jump":
                position[mask] = end[1]
            else:
                position[mask] = at + 1
                if end[0] == "bar":
                    waiting |= mask
            if waiting.any():
                self._release(position, waiting, blocks[at])
        else:
            raise Fault("endless", f"{self.program.name}: {MOST_BLOCKS} blocks executed")
        if self.copies:
            self._fault("copies", self.copies[0][0], "asynchronous copies that nobody waits for")
        self._count_instructions(counts)

    def _release(self, position, waiting, block):
        """Let the threads of those CTAs go on that wait at a barrier all together."""
        arrived = (waiting | (position == EXITED)).reshape(self.count, -1).all(1)
        if arrived.any():
            released = np.repeat(arrived, self.threads) & waiting
            where = np.where(released, position, -1).reshape(self.count, -1)
            if (where.max(1) != np.where(where < 0, EXITED, where).min(1))[arrived & (where.max(1) >= 0)].any():
                self._fault("barrier", block.instructions[-1].index, "warps of a CTA wait at different barriers")
            self._barrier(released)
            waiting &= ~released

    def _barrier(self, threads):
        self.clock += 1
        self.epoch[threads] = self.clock * 64 + ANY_WARP
        self.clock += 1
