"""The NumPy code of PTX instructions."""

import re
import struct

import numpy as np

from .syntax import COMPARE, NUMPY, SHARED_BASE, SIMPLE, SPECIAL, UNORDERED, Unsupported, register_name, split


class Emitter:
    """Writes the Python source of all blocks of a `Program`.

    Attributes:
        code: what defines the functions full_<block>(), compiled. Constants they refer to are put into the program.
    """

    def __init__(self, program):
        self.program, self.lines, self.mask = program, [], None
        for number in range(len(program.blocks)):
            self._function(number, None)
        self.code = self._compiled()
        self._masked = {}

    def masked(self, number):
        """What defines masked_<block>(mask), compiled when it is asked for: few blocks are ever run so."""
        if number not in self._masked:
            self.lines = []
            self._function(number, "mask")
            self._masked[number] = self._compiled()
        return self._masked[number]

    def _compiled(self):
        return compile("\n".join(self.lines), f"<{self.program.name}>", "exec")

    def _function(self, number, mask):
        self.lines.append(f"def masked_{number}(mask):" if mask else f"def full_{number}():")
        before = len(self.lines)
        for run in self._runs(self.program.blocks[number].instructions):
            self._instruction(run, mask)
        if len(self.lines) == before:
            self.lines.append("    pass")

    @staticmethod
    def _runs(instructions):
        """Instructions, but products (mma) with the same left operand that follow each other as one list."""
        out, run, written, read = [], [], set(), set()

        def names(operand):
            return set(re.findall(r"%?\w+", operand))

        for i in instructions:
            if i.parts[0] == "mma" and i.guard is None:
                d, a, b, c = i.operands
                if run and (run[0].operands[1] != a or run[0].parts != i.parts or names(a) & written
                            or names(b) & written or names(c) & written or names(d) & (read | written)):  # fmt: skip
                    out.append(run)
                    run, written, read = [], set(), set()
                run.append(i)
                written |= names(d)
                read |= names(a) | names(b) | names(c)
            elif (
                run
                and i.parts[0] == "mov"
                and i.guard is None
                and not (names(i.operands[0]) & (written | read) or names(i.operands[1]) & written)
            ):
                out.append([i])  # moves between the products go first
            else:
                if run:
                    out.append(run)
                    run, written, read = [], set(), set()
                out.append([i])
        return [*out, run] if run else out

    def _instruction(self, run, mask):
        i = run[0]
        self.i, self.mask = i, mask
        if i.parts[0] in ("bra", "ret", "exit", "bar", "barrier") and i.parts[:2] != ["bar", "warp"]:
            return
        if i.guard:
            negated, name = i.guard
            predicate = f"~{register_name(name, '?')}" if negated else register_name(name, "?")
            self.emit(f"m = {mask} & {predicate}" if mask else f"m = {predicate}")
            self.mask = "m"
        head = i.parts[0]
        handler = self.simple if head in SIMPLE else self.function if head in SPECIAL else None
        handler = handler or getattr(self, "op_" + head, None)
        if handler is None:
            raise Unsupported(f"line {i.line}: {i.text}")
        if i.parts[0] == "mma":
            handler(run)
        else:
            handler(i.parts[1:], *i.operands)

    # What handlers are made of.

    def emit(self, text):
        self.lines.append("    " + text)

    def constant(self, value):
        name = f"K{len(self.program.constants)}"
        self.program.constants[name] = value
        return name

    def src(self, operand, kind):
        """Expression of an operand read as a PTX type."""
        kind = NUMPY.get(kind, kind)
        if operand.startswith("%") and operand[1:].split(".")[0] in (
            "tid",
            "ctaid",
            "ntid",
            "nctaid",
            "laneid",
            "warpid",
        ):
            return f"special[{operand!r}]"
        if operand in self.program.registers:
            given = self.program.registers[operand]
            if kind == "?" or given == "?" or np.dtype(kind).itemsize == np.dtype(given).itemsize:
                return register_name(operand, kind)
            if np.dtype(kind).itemsize < np.dtype(given).itemsize:
                return f"{register_name(operand, given)}.astype('{kind}')"
            raise Unsupported(f"line {self.i.line}: {self.i.text}")
        if operand in self.program.globals:
            return f"params[{operand!r}]"
        if operand == "global_smem":
            return self.constant(np.dtype(kind).type(SHARED_BASE))
        if kind == "?":
            return self.constant(np.bool_(int(operand, 0) != 0))
        if operand[:2] in ("0f", "0F", "0d", "0D"):
            wide = operand[1] in "dD"
            bits = int(operand[2:], 16)
            value = struct.unpack("<d" if wide else "<f", struct.pack("<Q" if wide else "<I", bits))[0]
            if kind[0] != "f":
                return self.constant(np.dtype(kind).type(bits))
            return self.constant(np.dtype(kind).type(value))
        size = 8 * np.dtype(kind).itemsize
        value = int(operand.rstrip("U"), 0) & (1 << size) - 1
        if kind[0] == "f" or kind[0] == "i":
            return self.constant(np.array([value], f"u{size // 8}").view(kind)[0])
        return self.constant(np.dtype(kind).type(value))

    def dst(self, operand, kind):
        """Array of a register to be written as a PTX type (a wider register takes the extended number)."""
        kind = NUMPY.get(kind, kind)
        if operand == "_":
            return None
        given = self.program.registers[operand]
        if kind != "?" and np.dtype(kind).itemsize < np.dtype(given).itemsize:
            kind = ("i" if kind[0] == "i" else "u") + given[1]
        return register_name(operand, kind)

    def calc(self, ufunc, dst, *sources, extra=""):
        where = f", where={self.mask}" if self.mask else ""
        self.emit(f"{ufunc}({', '.join(sources)}, out={dst}{extra}{where})")

    def assign(self, dst, expression):
        where = f", where={self.mask}" if self.mask else ""
        self.emit(f"copyto({dst}, {expression}, casting='unsafe'{where})")

    def address(self, operand, kind="u64"):
        """(expression of the base, constant offset) of an operand in brackets."""
        match = re.match(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]$", operand)
        return self.src(match[1], kind), int(match[2] or "0", 0)

    def vector(self, operand):
        return split(operand.strip()[1:-1]) if operand.startswith("{") else [operand]

    # Arithmetic.

    def _typed(self, ufunc, parts, d, *sources, kind=None):
        kind = kind or parts[-1]
        if "sat" in parts or kind in ("f16", "bf16", "f16x2", "bf16x2") and ufunc not in ("bitwise_and", "bitwise_or"):
            raise Unsupported(f"line {self.i.line}: {self.i.text}")
        dst, sources = self.dst(d, kind), [self.src(s, kind) for s in sources]
        if "ftz" in parts:
            self.emit(f"t = {ufunc}({', '.join(f'ftz({s})' for s in sources)})")
            self.assign(dst, "ftz(t)")
        else:
            self.calc(ufunc, dst, *sources)

    def simple(self, parts, d, *sources):
        ufunc, floating = SIMPLE[self.i.parts[0]], parts[-1][0] == "f"
        if ufunc in ("minimum", "maximum"):
            parts = [p for p in parts if p != "ftz"]
            ufunc = "f" + ufunc[:3] if floating and "NaN" not in parts else ufunc
        if parts[-1] == "pred":
            ufunc = {"invert": "logical_not"}.get(ufunc, ufunc.replace("bitwise", "logical"))
        self._typed(ufunc, parts, d, *sources)

    def op_mul(self, parts, d, a, b):
        kind = parts[-1]
        if "wide" in parts:
            wide = f"{kind[0]}{2 * int(kind[1:])}"
            self.calc(
                "multiply", self.dst(d, wide), self.src(a, kind), self.src(b, kind), extra=f", dtype='{NUMPY[wide]}'"
            )
        elif "hi" in parts:
            if kind == "u64":
                return self.assign(self.dst(d, kind), f"high_product({self.src(a, kind)}, {self.src(b, kind)})")
            wide = f"{kind[0]}{2 * int(kind[1:])}"
            self.emit(f"t = multiply({self.src(a, kind)}, {self.src(b, kind)}, dtype='{NUMPY[wide]}')")
            self.assign(self.dst(d, kind), f"t >> {kind[1:]}")
        else:
            self._typed("multiply", parts, d, a, b)

    def op_mad(self, parts, d, a, b, c):
        kind = parts[-1]
        if kind == "f32":
            return self.op_fma(parts, d, a, b, c)
        if "wide" in parts:
            wide = f"{kind[0]}{2 * int(kind[1:])}"
            self.emit(f"t = multiply({self.src(a, kind)}, {self.src(b, kind)}, dtype='{NUMPY[wide]}')")
            return self.calc("add", self.dst(d, wide), "t", self.src(c, wide))
        if "hi" in parts:
            raise Unsupported(f"line {self.i.line}: {self.i.text}")
        self.emit(f"t = multiply({self.src(a, kind)}, {self.src(b, kind)})")
        return self.calc("add", self.dst(d, kind), "t", self.src(c, kind))

    def op_fma(self, parts, d, a, b, c):
        if parts[-1] == "f64":
            a, b, c = (self.src(x, "f64") for x in (a, b, c))
            return self.assign(self.dst(d, "f64"), f"longdouble({a}) * {b} + {c}")
        if parts[-1] != "f32":
            raise Unsupported(f"line {self.i.line}: {self.i.text}")
        a, b, c = (f"ftz({self.src(x, 'f32')})" if "ftz" in parts else self.src(x, "f32") for x in (a, b, c))
        self.emit(f"t = multiply({a}, {b}, out=T64, dtype='f8')")
        self.emit(f"add(T64, {c}, out=T64)")
        self.assign(self.dst(d, "f32"), "ftz(T64.astype('f4'))" if "ftz" in parts else "T64")

    def op_div(self, parts, d, a, b):
        kind = parts[-1]
        if kind[0] == "f":
            return self._typed("divide", [p for p in parts if p != "ftz"], d, a, b)
        return self.assign(self.dst(d, kind), f"int_divide({self.src(a, kind)}, {self.src(b, kind)})")

    def op_rem(self, parts, d, a, b):
        kind = parts[-1]
        self.emit(f"t, u = {self.src(a, kind)}, {self.src(b, kind)}")
        self.assign(self.dst(d, kind), "t - int_divide(t, u) * u")

    def op_shl(self, parts, d, a, b):
        kind = parts[-1].replace("b", "u")
        self.assign(self.dst(d, kind), f"shift_left({self.src(a, kind)}, {self.src(b, 'u32')})")

    def op_shr(self, parts, d, a, b):
        kind = parts[-1].replace("b", "u")
        self.assign(self.dst(d, kind), f"shift_right({self.src(a, kind)}, {self.src(b, 'u32')})")

    def op_bfe(self, parts, d, a, start, length):
        kind = parts[-1]
        self.assign(self.dst(d, kind), f"bit_field({self.src(a, kind)}, {int(start, 0)}, {int(length, 0)})")

    def op_bfi(self, parts, d, a, b, start, length):
        start, length = int(start, 0), int(length, 0)
        field = ((1 << length) - 1) << start
        a, b, keep = self.src(a, "u32"), self.src(b, "u32"), self.constant(np.uint32(~field & 0xFFFFFFFF))
        self.assign(self.dst(d, "b32"), f"{b} & {keep} | {a} << {start} & {self.constant(np.uint32(field))}")

    def op_prmt(self, parts, d, a, b, selector):
        a, b, selector = (self.src(x, "u32") for x in (a, b, selector))
        self.assign(self.dst(d, "b32"), f"permute_bytes({a}, {b}, {selector})")

    def op_lop3(self, parts, d, a, b, c, table):
        a, b, c = (self.src(x, "u32") for x in (a, b, c))
        self.assign(self.dst(d, "b32"), f"logic3({a}, {b}, {c}, {int(table, 0)})")

    def op_shf(self, parts, d, low, high, count):
        low, high, count = (self.src(x, "u32") for x in (low, high, count))
        self.assign(self.dst(d, "b32"), f"funnel({low}, {high}, {count}, {parts[0] == 'l'}, {parts[1] == 'wrap'})")

    def function(self, parts, d, a):
        x = self.src(a, parts[-1])
        self.emit(f"t = {SPECIAL[self.i.parts[0]]}(ftz({x}) if {'ftz' in parts} else {x})")
        self.assign(self.dst(d, parts[-1]), "ftz(t)" if "ftz" in parts else "t")

    # Moves, comparisons, conversions.

    def op_mov(self, parts, d, a):
        kind = parts[-1]
        if d.startswith("{") or a.startswith("{"):
            vector = self.vector(d if d.startswith("{") else a)
            size = int(kind[1:]) // len(vector)
            if d.startswith("{"):
                whole = self.src(a, f"u{kind[1:]}")
                for n, x in enumerate(vector):
                    if x != "_":
                        self.assign(self.dst(x, f"u{size}"), f"{whole} >> {n * size}")
            else:
                wide = NUMPY[f"u{kind[1:]}"]
                pieces = [f"({self.src(x, f'u{size}')}.astype('{wide}') << {n * size})" for n, x in enumerate(vector)]
                self.assign(self.dst(d, f"u{kind[1:]}"), " | ".join(pieces))
            return
        self.assign(self.dst(d, kind), self.src(a, kind))

    def op_selp(self, parts, d, a, b, p):
        kind = parts[-1]
        self.assign(self.dst(d, kind), f"where({self.src(p, 'pred')}, {self.src(a, kind)}, {self.src(b, kind)})")

    def op_setp(self, parts, d, a, b, other=None):
        kind, compare = parts[-1], parts[0]
        if compare in ("lo", "ls", "hi", "hs"):
            kind = kind.replace("b", "u")
        x, y = self.src(a, kind), self.src(b, kind)
        if kind in ("f16", "bf16"):
            raise Unsupported(f"line {self.i.line}: {self.i.text}")
        if compare in ("num", "nan"):
            self.emit(f"t = isnan({x}) | isnan({y})")
            value = "t" if compare == "nan" else "~t"
        elif compare in UNORDERED:
            self.emit(f"t = {COMPARE[UNORDERED[compare]]}({x}, {y})")
            value = "~t"
        elif compare == "ne" and kind[0] == "f":
            self.emit(f"t = not_equal({x}, {y}) & ~isnan({x}) & ~isnan({y})")
            value = "t"
        else:
            value = f"{COMPARE[compare]}({x}, {y})"
        both = d.split("|")
        join = next((p for p in parts if p in ("and", "or", "xor")), None)
        if join:
            value = (
                f"logical_{join}({value}, {self.src(other.lstrip('!'), 'pred')}{' ^ True' if other[0] == '!' else ''})"
            )
        self.emit(f"t = {value}")
        self.assign(self.dst(both[0], "pred"), "t")
        if len(both) > 1:
            self.assign(self.dst(both[1], "pred"), "~t")

    def op_cvt(self, parts, d, a, *more):
        to, of = [p for p in parts if p in NUMPY][-2:]
        if more:  # two numbers into one register, the first one on top
            half = to.removesuffix("x2")
            self.emit(f"t = round_{half}({self.src(a, 'f32')}).astype('u4') << 16")
            self.emit(f"t |= round_{half}({self.src(more[0], 'f32')})")
            return self.assign(self.dst(d, "b32"), "t")
        x = self.src(a, of)
        if to == "tf32":
            return self.assign(self.dst(d, "b32"), f"round_tf32({x}, {'rna' in parts})")
        if of == "bf16":
            x, of = f"wide_bf16({x})", "f32"
        if to in ("bf16", "f16") and of in ("f32", "f64"):
            if not {"rn"} & set(parts):
                raise Unsupported(f"line {self.i.line}: {self.i.text}")
            return self.assign(self.dst(d, "b16"), f"round_{to}({x})")
        if NUMPY[to][0] != "f" and NUMPY[of][0] == "f":
            how = next((p for p in parts if p in ("rzi", "rni", "rmi", "rpi")), None)
            return self.assign(self.dst(d, to), f"to_integer({x}, '{how}', '{NUMPY[to]}')")
        if any(p in ("rzi", "rni", "rmi", "rpi", "sat") for p in parts):
            raise Unsupported(f"line {self.i.line}: {self.i.text}")
        return self.assign(self.dst(d, to), x)

    def op_cvta(self, parts, d, a):
        self.assign(self.dst(d, "b64"), self.src(a, "b64"))

    # Lanes, barriers, memory: the machine's.

    def call(self, function, *arguments):
        self.emit(f"{function}({self.i.index}, {self.mask}, {', '.join(arguments)})")

    def op_shfl(self, parts, d, a, b, c, membership):
        value, _, predicate = d.partition("|")
        if predicate or int(c, 0) not in (31, 0):
            raise Unsupported(f"line {self.i.line}: {self.i.text}")
        lane = b if b.lstrip("-").isdigit() else self.src(b, "u32")
        self.emit(f"t = shuffle({self.i.index}, {self.mask}, '{parts[1]}', {self.src(a, 'b32')}, {lane})")
        self.assign(self.dst(value, "b32"), "t")

    def op_bar(self, parts, *_):
        if parts[0] != "warp":
            raise Unsupported(f"line {self.i.line}: {self.i.text}")

    def op_fence(self, parts, *_):
        if parts[0] == "proxy":
            self.call("fence_proxy")

    def op_membar(self, parts, *_):
        pass

    def _access(self, parts, registers, pointer):
        kind = parts[-1]
        registers = self.vector(registers)
        space = next((p for p in parts if p.split(":")[0] in ("global", "shared")), None)
        if space is None or kind not in NUMPY:
            raise Unsupported(f"line {self.i.line}: {self.i.text}")
        space = space.split(":")[0]
        base, offset = self.address(pointer, "u64" if space == "global" else "u32")
        return space, kind, registers, base, offset

    def op_ld(self, parts, d, pointer, *_):
        if "param" in parts:
            kind = parts[-1]
            name = re.match(r"\[\s*(\w+)", pointer)[1]
            if name not in dict(self.program.params):  # what a function gives back, see op_call
                return self.emit("pass")
            return self.assign(self.dst(d, kind), f"params[{name!r}]")
        space, kind, registers, base, offset = self._access(parts, d, pointer)
        arrays = "".join(f"{self.dst(r, kind)}, " for r in registers)
        return self.call(f"load_{space}", base, str(offset), f"'{NUMPY[kind]}'", f"({arrays})")

    def op_st(self, parts, pointer, value, *_):
        if "param" in parts:
            return self.emit("pass")
        space, kind, registers, base, offset = self._access(parts, value, pointer)
        arrays = "".join(f"{self.src(r, kind)}, " for r in registers)
        return self.call(f"store_{space}", base, str(offset), f"'{NUMPY[kind]}'", f"({arrays})")

    def op_call(self, parts, *_):
        self.call("call_function", "0")

    def op_ldmatrix(self, parts, d, pointer):
        base, offset = self.address(pointer, "u32")
        arrays = "".join(f"{self.dst(r, 'b32')}, " for r in self.vector(d))
        self.call("load_matrix", base, str(offset), f"({arrays})", str("trans" in parts))

    def op_stmatrix(self, parts, pointer, value):
        base, offset = self.address(pointer, "u32")
        arrays = "".join(f"{self.src(r, 'b32')}, " for r in self.vector(value))
        self.call("store_matrix", base, str(offset), f"({arrays})", str("trans" in parts))

    def op_cp(self, parts, *operands):
        if parts[0] != "async" or "bulk" in parts:
            raise Unsupported(f"line {self.i.line}: {self.i.text}")
        if "commit_group" in parts:
            self.call("commit_copies")
        elif "wait_group" in parts or "wait_all" in parts:
            self.call("wait_copies", operands[0] if operands else "0")
        else:
            (to, at), (of, start) = self.address(operands[0], "u32"), self.address(operands[1])
            size = str(int(operands[2], 0))
            taken = self.src(operands[3], "u32") if len(operands) > 3 else size
            self.call("copy_async", to, str(at), of, str(start), size, taken)

    def op_mma(self, run):
        kind = run[0].parts[-2]
        a = "".join(f"{self.src(r, 'b32')}, " for r in self.vector(run[0].operands[1]))
        rest = []
        for i in run:
            d, _, b, c = (self.vector(o) for o in i.operands)
            d = "".join(f"{self.dst(r, 'f32')}, " for r in d)
            b = "".join(f"{self.src(r, 'b32')}, " for r in b)
            c = "".join(f"{self.src(r, 'f32')}, " for r in c)
            rest.append(f"(({d}), ({b}), ({c}))")
        self.call("multiply_matrices", f"'{kind}'", f"({a})", f"({', '.join(rest)},)")

    def op_wgmma(self, parts, *operands):
        if parts[0] == "mma_async":
            shape, kind = next(p for p in parts if re.match(r"m64n\d+k\d+", p)), parts[-1]
            d = "".join(f"{self.dst(r, 'f32')}, " for r in self.vector(operands[0]))
            if operands[1].startswith("{"):
                a = "(" + "".join(f"{self.src(r, 'b32')}, " for r in self.vector(operands[1])) + ")"
            else:
                a = self.src(operands[1], "b64")
            add = self.src(operands[3], "pred")
            signs = [int(x, 0) for x in operands[4:6]]
            flips = [int(x, 0) for x in operands[6:]] or [0, 0]
            if operands[1].startswith("{") and len(operands) == 7:
                flips = [0, int(operands[6], 0)]
            if signs != [1, 1]:
                raise Unsupported(f"line {self.i.line}: {self.i.text}")
            size = shape[4:].partition("k")[0]
            self.call("multiply_group", f"'{kind}'", size, f"({d})", a, self.src(operands[2], "b64"), add, str(flips))
        else:
            self.call("wgmma_" + parts[0], operands[0] if operands else "0")
