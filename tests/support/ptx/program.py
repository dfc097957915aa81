"""PTX text -> basic blocks, and the NumPy code of each (`emitter.py`).

Registers are arrays over all threads that run at once, of several CTAs. A block becomes two Python functions: one for
all threads, one under a mask of threads. What touches memory or other lanes calls the machine.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

from .emitter import Emitter
from .syntax import BARRIERS, INSTRUCTION, NUMPY, Instruction, Unsupported, split


@dataclass
class Block:
    """Straight-line code; its end: ("fall",), ("bar",), ("exit",), ("jump", to) or ("branch", negated, p, to)."""

    instructions: list = field(default_factory=list)
    end: tuple = ("fall",)
    kinds: Counter = field(default_factory=Counter)


class Program:
    """A parsed kernel.

    Attributes:
        name, target: of the entry. params: (name, NumPy type) in order. threads: of a CTA (0 if not stated).
        globals: name to bytes of constant tables.
        registers: name to NumPy type. blocks: list of `Block`. instructions: all of them, by index.
        code, constants: what the machine executes to get the functions full_<block>; masked(block) is what defines
            masked_<block>.
    """

    def __init__(self, ptx):
        self.registers, self.instructions, self.labels, self.blocks = {}, [], {}, [Block()]
        self.params, self.constants = [], {}
        self.name = re.search(r"\.entry\s+(\w+)", ptx)[1]
        self.target = re.search(r"\.target\s+(\w+)", ptx)[1]
        self.globals = {
            name: bytes(int(x) for x in content.split(","))
            for name, content in re.findall(r"^\.global[^\n]*\.b8\s+([\w$]+)\[\d+\]\s*=\s*\{([\d, ]*)\}", ptx, re.M)
        }
        head, body = ptx.split(".entry", 1)[1].split("{", 1)
        for kind, name in re.findall(
            r"\.param\s+\.(\w+)(?:\s+\.ptr)?(?:\s+\.global)?(?:\s+\.align\s+\d+)?\s+(\w+)", head
        ):
            self.params.append((name, NUMPY[kind]))
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head)
        self.threads = int(threads[1]) if threads else 0
        self._parse(body, ptx[: len(ptx) - len(body)].count("\n") + 1)
        emitter = Emitter(self)
        self.code, self.masked = emitter.code, emitter.masked

    def where(self, index):
        """Text of where an instruction stands."""
        i = self.instructions[index]
        return f"{self.name} PTX line {i.line} ({i.source}): {i.text}"

    def _parse(self, body, line):
        scopes, depth, source, pending = [{}], 0, "?", ""
        for text in body.split("\n"):
            line += 1
            text, _, comment = text.partition("//")
            text = text.strip()
            if text.startswith(".loc"):
                inner = re.search(r"(\S+\.py:\d+)", comment)
                source = inner[1] if inner else source
                continue
            if text.startswith((".section", ".file")):
                break
            while text:
                label = re.match(r"([$\w]+):(?!:)\s*", text)
                if not pending and label:
                    self._start(label[1])
                    text = text[label.end() :]
                elif not pending and text[0] == "{":
                    scopes.append({})
                    depth += 1
                    text = text[1:].strip()
                elif not pending and text[0] == "}":
                    if not depth:
                        return self._finish()
                    scopes.pop()
                    depth -= 1
                    text = text[1:].strip()
                else:
                    statement, semicolon, text = text.partition(";")
                    pending = f"{pending} {statement}".strip()
                    text = text.strip()
                    if semicolon:
                        self._statement(pending, line, source, scopes)
                        pending = ""
        return self._finish()

    def _start(self, label):
        if self.blocks[-1].instructions or self.blocks[-1].end != ("fall",):
            self.blocks.append(Block())
        self.labels[label] = len(self.blocks) - 1

    def _finish(self):
        self.blocks.append(Block(end=("exit",)))
        for block in self.blocks:
            block.kinds = Counter(i.kind for i in block.instructions)
            if block.end[0] in ("jump", "branch"):
                block.end = (*block.end[:-1], self.labels.get(block.end[-1], len(self.blocks) - 1))

    def _statement(self, text, line, source, scopes):
        if text.startswith(".reg"):
            _, kind, names = text.split(None, 2)
            for name in names.split(","):
                name = name.strip()
                count = re.match(r"(.*)<(\d+)>", name)
                given = [f"{count[1]}{n}" for n in range(int(count[2]))] if count else [name]
                for one in given:
                    unique = one if len(scopes) == 1 else f"{one}_s{line}"
                    scopes[-1][one] = unique
                    self.registers[unique] = NUMPY[kind[1:]]
            return
        if text.startswith((".", "//")) or not text:
            return
        if len(scopes) > 1:

            def rename(match):
                return next((s[match[0]] for s in reversed(scopes) if match[0] in s), match[0])

            text = re.sub(r"%?[A-Za-z_$][\w$]*", rename, text)
        match = INSTRUCTION.match(text)
        if not match:
            raise Unsupported(f"line {line}: {text}")
        guard = (match[1] == "!", match[2]) if match[2] else None
        parts = match[3].replace("::", ":").split(".")
        instruction = Instruction(guard, parts, split(match[4]), line, " ".join(text.split()), source)
        instruction.index = len(self.instructions)
        self.instructions.append(instruction)
        block, head = self.blocks[-1], parts[0]
        block.instructions.append(instruction)
        if head == "bra":
            block.end = ("branch", *guard, instruction.operands[0]) if guard else ("jump", instruction.operands[0])
        elif head in ("ret", "exit"):
            block.end = ("branch", *guard, "exit") if guard else ("jump", "exit")
        elif match[3].startswith(BARRIERS):
            if guard or len(instruction.operands) > 1:
                raise Unsupported(f"line {line}: {text}")
            block.end = ("bar",)
        else:
            return
        self.blocks.append(Block())
