"""What accesses cost: for up to four of the CTAs that run together, scaled up to all of them."""

import numpy as np


class Counters:
    """The part of `Machine` that counts."""

    def _choose_sample(self):
        sample = np.unique(np.linspace(0, self.count - 1, min(self.count, 4)).astype(int))
        self.sample, self.sample_scale = np.isin(self.local, sample), self.count / len(sample)
        self.asked = {"global_load": [], "global_store": []}

    def _sampled(self, selected):
        """Which of the selected threads are counted, and their numbers; None where there are none."""
        if not self.counted:
            return None
        chosen = self._take(self.sample, selected)
        if not chosen.any():
            return None
        return chosen, np.flatnonzero(self.sample) if selected is None else selected[chosen]

    def _count_global(self, counter, selected, at, width):
        if (sampled := self._sampled(selected)) is None:
            return
        chosen, thread = sampled
        counter["requests"] += self.sample_scale * len(np.unique(thread // 32))
        counter["sectors"] += self.sample_scale * len(np.unique((at[chosen] // 32) * 4096 + thread // 32))
        kind = "global_load" if counter is self.report.global_load else "global_store"
        self.asked[kind].append(np.unique((at[chosen] // 32) * 65536 + self.local[thread]))
        counter["bytes"] += self.sample_scale * width * len(thread)

    def _count_shared(self, counter, selected, at, width):
        if (sampled := self._sampled(selected)) is None:
            return
        chosen, thread = sampled
        phase = thread * max(width, 4) // 128  # 128 bytes at a time
        words = (at[chosen] // 4)[:, None] + np.arange(max(1, width // 4))
        keys = np.unique((phase * (1 << 32))[:, None] + words)
        banks, each = np.unique((keys >> 32) * 32 + (keys & 31), return_counts=True)
        most = np.zeros(int(banks[-1] >> 5) + 1, int)
        np.maximum.at(most, banks >> 5, each)
        counter["requests"] += self.sample_scale * np.count_nonzero(most)
        counter["ways"] += self.sample_scale * most.sum()

    def _count_instructions(self, executed):
        """`executed`: number of a block to how many warps went through it."""
        self.report.blocks.update(executed)
        for number, (kind, found) in enumerate(self.asked.items()):
            distinct = np.unique(np.concatenate(found)) // 65536 * 32 if found else np.zeros(0, int)
            getattr(self.report, kind)["distinct"] += self.sample_scale * len(distinct)
            for key, (start, storage, _) in self.memory.storages.items():
                inside = np.count_nonzero((distinct >= start - 31) & (distinct < start + storage.nbytes()))
                self.report.used.setdefault(key, [0, 0])[number] += self.sample_scale * inside
        for number, times in executed.items():
            for kind, inside in self.program.blocks[number].kinds.items():
                self.report.instructions[kind] += inside * times
