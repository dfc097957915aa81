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
        instructions: executed by warps, per class.
        global_load, global_store: requests (of warps), sectors (32 bytes) and bytes (asked for by threads).
        shared_load, shared_store: requests and ways (1 per request and phase is free of conflicts).
    """

    kernel: str = ""
    ctas: int = 0
    seconds: float = 0.0
    digest: str = ""
    faults: list = field(default_factory=list)
    instructions: Counter = field(default_factory=Counter)
    global_load: Counter = field(default_factory=Counter)
    global_store: Counter = field(default_factory=Counter)
    shared_load: Counter = field(default_factory=Counter)
    shared_store: Counter = field(default_factory=Counter)
