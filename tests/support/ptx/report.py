"""What a launch on the machine gives back: faults, and what was executed."""

from collections import Counter
from dataclasses import dataclass, field


class Fault(RuntimeError):
    """Something a GPU would do wrong, or that a sanitizer would report.

    Attributes:
        kind: "out of bounds", "outside the tensor", "misaligned", "uninitialised", "shared race", "global race",
            "unequal copies", "proxy fence", "copies", "divergence", "barrier" or "endless".
    """

    def __init__(self, kind, message):
        super().__init__(f"{kind}: {message}")
        self.kind = kind


@dataclass
class Report:
    """What a launch did.

    Attributes:
        kernel: its name. ctas: executed. seconds: it took here. digest: of the bytes it wrote to global memory.
        faults: those found where checks collect instead of raising.
        instructions: executed by warps, per class. blocks: number of a block of the program to how many warps
            went through it.
        global_load, global_store: requests (of warps), sectors (32 bytes) and bytes (asked for by threads); distinct:
            sectors of each CTA, every one once.
        shared_load, shared_store: requests and ways (1 per request and phase is free of conflicts).
        used: storages of tensors, by their address, to the sectors of each CTA that were read, and those written.
        launched: of launches by `launcher`: CTAs of the whole grid, warps of a CTA, bytes of shared memory, `ptx` and
            `arguments`, of each tensor the address of its storage, the bytes of its elements, and what `used` says.
    """

    kernel: str = ""
    ctas: int = 0
    seconds: float = 0.0
    digest: str = ""
    faults: list = field(default_factory=list)
    instructions: Counter = field(default_factory=Counter)
    blocks: Counter = field(default_factory=Counter)
    global_load: Counter = field(default_factory=Counter)
    global_store: Counter = field(default_factory=Counter)
    shared_load: Counter = field(default_factory=Counter)
    shared_store: Counter = field(default_factory=Counter)
    used: dict = field(default_factory=dict)
    launched: dict = field(default_factory=dict)
