"""What PTX is made of: types, instructions, operands, and the names generated code gives them."""

import re
from dataclasses import dataclass
from functools import cache

NUMPY = {
    "pred": "?", "b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2", "f16": "f2", "bf16": "u2",
    "b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4", "b64": "u8", "u64": "u8", "s64": "i8", "f64": "f8",
    "tf32": "u4", "f16x2": "u4", "bf16x2": "u4",
}  # fmt: skip
SHARED_BASE = 1024  # where the shared memory of a CTA begins
COMPARE = {"eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal",
           "lo": "less", "ls": "less_equal", "hi": "greater", "hs": "greater_equal"}  # fmt: skip
# Unordered comparisons are the negation of the opposite ordered ones.
UNORDERED = {"equ": "ne", "neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}
SIMPLE = {"add": "add", "sub": "subtract", "neg": "negative", "abs": "absolute", "min": "minimum", "max": "maximum",
          "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "not": "invert"}  # fmt: skip
SPECIAL = {"ex2": "exp2", "lg2": "log2", "sqrt": "sqrt", "rsqrt": "reciprocal_root", "rcp": "reciprocal",
             "sin": "sin", "cos": "cos"}  # fmt: skip
INSTRUCTION = re.compile(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)
BARRIERS = ("bar.sync", "barrier.sync", "bar.cta", "barrier.cta")


class Unsupported(NotImplementedError):
    """An instruction the machine has no meaning for."""


@dataclass
class Instruction:
    """One instruction: guard (negated, predicate) or None, opcode split at its dots, operands, where it stands."""

    guard: tuple | None
    parts: list
    operands: list
    line: int
    text: str
    source: str
    index: int = 0

    @property
    def kind(self):
        """Class under which executions are counted."""
        head = self.parts[0]
        if head in ("ld", "st", "atom", "red"):
            spaces = [p.split(":")[0] for p in self.parts]
            space = next((s for s in spaces if s in ("global", "shared", "param")), "generic")
            return f"{head}.{space}"
        if head in ("mma", "wgmma", "ldmatrix", "stmatrix", "cp", "shfl", "bar", "barrier", "bra", "ret", "fence"):
            return "cp.async" if head == "cp" else {"barrier": "bar", "ret": "bra"}.get(head, head)
        if head in SPECIAL or "full" in self.parts:
            return "special"
        if head in ("mov", "selp", "cvt", "setp", "prmt"):
            return head
        return "float" if self.parts[-1] in ("f32", "f16", "bf16", "f64", "bf16x2", "f16x2") else "integer"


def split(text):
    """Operands, at commas outside of braces and brackets."""
    if "{" not in text and "[" not in text:
        parts = [part.strip() for part in text.split(",")]
        return parts if parts[-1] else parts[:-1]
    out, depth, start = [], 0, 0
    for position, c in enumerate(text):
        depth += (c in "{[") - (c in "}]")
        if c == "," and depth == 0:
            out.append(text[start:position].strip())
            start = position + 1
    last = text[start:].strip()
    return [*out, last] if last else out


@cache
def register_name(register, kind):
    """Name in generated code of a register seen as a NumPy type of the same width."""
    return "R" + re.sub(r"\W", "", register) + "_" + kind.replace("?", "p")
