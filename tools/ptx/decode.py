"""PTX instructions as the forms of the machine (csrc/emulator/ptx): a form's name, and operands by their roles.

What a form does not say is an error that names the instruction, never a guess.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

from .parse import Entry, Instruction, bytes_of

# changes nothing that the machine knows of
_HINTS = re.compile(
    r"\.(uni|nc|L[12]::[\w:]+|level::[\w:]+|volatile|ca|cg|cs|lu|cv|wb|wt|aligned)(?=\.|$)"
)
_SPACES = {"global": 1, "shared": 2, "shared::cta": 2, "shared::cluster": 3, "local": 4}
_ORDERS = {"relaxed": 1, "acquire": 2, "release": 3, "acq_rel": 4, "volatile": 1}
_SCOPES = {"gpu": 0, "sys": 0, "cta": 1, "cluster": 2}
_TYPE = re.compile(r"(?:[subf]|bf|tf)(?:8|16|32|64)(?:x2)?$")


class UnknownInstruction(Exception):
    """An instruction, or a form of one, that the machine does not have."""


@dataclass(frozen=True)
class Register:
    name: str
    defined: bool = False
    used: bool = True


@dataclass(frozen=True)
class Predicate:
    name: str
    defined: bool = False
    used: bool = True


@dataclass(frozen=True)
class Constant:
    bits: int
    bytes: int


@dataclass
class Decoded:
    """form: its name. operands: ints as they are, and what becomes a place. target: where it may jump."""

    form: str
    operands: list = field(default_factory=list)
    target: int | None = None
    falls: bool = True


class Decoder:
    """Decodes the instructions of one kernel. addresses: symbol -> its value (shared memory, parameters)."""

    def __init__(self, entry: Entry):
        self.entry = entry
        self.parameters = {p.name: p.offset for p in entry.parameters}

    def decode(self, i: Instruction) -> Decoded:
        try:
            return self._decode(i)
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise UnknownInstruction(f"{self.entry.name}, line {i.line}: {i.text}: {error}") from error

    # --- operands --------------------------------------------------------------------------------------------
    def bytes_of(self, register: str) -> int:
        """Of a register; special ones have 4."""
        return self.entry.registers.get(register, 4)

    def source(self, operand: str, size: int, wider: bool = False) -> Register | Constant:
        """An operand of a type of ``size`` bytes. wider: its register may have more, which are not looked at."""
        if isinstance(operand, str) and (operand in self.entry.registers or operand.startswith("%")):
            has = self.bytes_of(operand)
            if has != size and not (wider and has > size and (has == 8) == (size == 8)):
                raise ValueError(f"{operand} has {has} bytes, expected {size}")
            return Register(operand)
        return Constant(self.number(operand, size), size)

    def number(self, operand: str, size: int) -> int:
        """The bits of an immediate."""
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", operand):
            bits = int(operand[2:], 16)
            if size == 8:
                bits = struct.unpack("<Q", struct.pack("<d", struct.unpack("<f", struct.pack("<I", bits))[0]))[0]
            return bits
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", operand):
            return int(operand[2:], 16)
        for symbols in (self.entry.shared, self.entry.local):
            if operand in symbols:
                return symbols[operand]
        if operand in self.parameters:
            return self.parameters[operand]
        return int(operand.rstrip("U"), 0) & ((1 << 8 * size) - 1)

    def target(self, operand: str, size: int | None = None) -> Register:
        """A result, of a type of ``size`` bytes unless None."""
        if operand == "_":
            raise ValueError("a result that nobody takes")
        if operand not in self.entry.registers:
            raise ValueError(f"no register {operand}")
        has = self.entry.registers[operand]
        if not has or (size is not None and has != size):
            raise ValueError(f"{operand} has {has} bytes, expected {size or 'a number'}")
        return Register(operand, defined=True, used=False)

    def predicate(self, operand: str, defined: bool = False) -> Predicate:
        if operand in self.entry.registers:
            if self.entry.registers[operand]:
                raise ValueError(f"{operand} is no predicate")
            return Predicate(operand, defined, not defined)
        return Predicate({"0": "false", "1": "true", "-1": "true", "false": "false", "true": "true"}[operand])

    def address(self, operand: tuple) -> tuple[int, Register | Constant, int]:
        """(whether the base has 8 bytes, base, offset)."""
        _, base, offset = operand
        if base in self.entry.registers:
            return int(self.entry.registers[base] == 8), Register(base), offset
        return 0, Constant(self.number(base, 4), 4), offset

    # --- instructions ----------------------------------------------------------------------------------------
    def _decode(self, i: Instruction) -> Decoded:
        op, *rest = i.opcode.split(".")
        special = getattr(self, f"_{op}", None) or getattr(self, f"_{op}_{rest[0] if rest else ''}", None)
        if special is not None:
            return special(i, rest)
        return self._arithmetic(i)

    def _arithmetic(self, i: Instruction) -> Decoded:
        form = i.opcode
        op, *rest = form.split(".")
        kinds = [part for part in rest if _TYPE.match(part)]
        if not kinds:
            raise ValueError("no type")
        size = bytes_of(kinds[-1])
        to, *sources = i.operands
        sizes = [size] * len(sources)
        if op in ("shl", "shr", "bfe"):
            sizes[1:] = [4] * (len(sources) - 1)
        elif op == "bfi":
            sizes[2:] = [4, 4]
        elif op == "mad" and "wide" in rest:
            sizes[2] = 2 * size
        elif op == "lop3":
            sizes[3] = 4
        result = 4 if op in ("popc", "clz") else 2 * size if "wide" in rest else size
        return Decoded(form, [self.target(to, result), *(self.source(s, n) for s, n in zip(sources, sizes))])

    def _cvt(self, i: Instruction, rest: list[str]) -> Decoded:
        to, *sources = i.operands
        of, size = bytes_of(rest[-1]), bytes_of(rest[-2])
        has = self.target(to).name and self.entry.registers[to]
        integers = rest[-1][0] in "su" and rest[-2][0] in "su"
        wide = integers and self.entry.registers.get(sources[0]) == 8
        operands = [self.target(to), *(self.source(s, 8 if wide else max(of, 2), wider=True) for s in sources)]
        if integers and (has > max(size, 2) or rest[:-2] == ["sat"] or wide and of < 8):
            return Decoded("cvt.integer", [*operands, of, int(rest[-1][0] == "s"), size, int(rest[-2][0] == "s"), has,
                                           int("sat" in rest), 8 if wide or of == 8 else 4])
        if has != max(size, 2):
            raise ValueError(f"{to} has {has} bytes, expected {size}")
        return Decoded(i.opcode, operands)

    def _mov(self, i: Instruction, rest: list[str]) -> Decoded:
        to, what = i.operands
        if rest[-1] == "pred":
            return Decoded("mov.pred", [self.predicate(to, defined=True), self.predicate(what)])
        size = bytes_of(rest[-1])
        if isinstance(what, list):
            form = {(4, 2): "pack.b32", (8, 2): "pack.b64", (8, 4): "quarters.b64"}[size, len(what)]
            return Decoded(form, [self.target(to, size), *(self.source(s, size // len(what)) for s in what)])
        if isinstance(to, list):
            parts = [r if r == "_" else self.target(r, size // len(to)) for r in to]
            whole = self.source(what, size)
            if len(to) == 4 and size == 8:
                return Decoded("split.b64", [*(-1 if r == "_" else r for r in parts), whole])
            low, high = parts
            if low == "_":
                return Decoded(f"high.b{8 * size}", [high, whole])
            return Decoded(f"low.b{8 * size}", [low, whole]) if high == "_" else Decoded(
                f"halves.b{8 * size}", [low, high, whole])
        return Decoded(f"mov.{rest[-1]}", [self.target(to, size), self.source(what, size)])

    def _setp(self, i: Instruction, rest: list[str]) -> Decoded:
        to, a, b = i.operands
        size = bytes_of(rest[-1])
        return Decoded(i.opcode, [self.predicate(to, defined=True), self.source(a, size), self.source(b, size)])

    def _selp(self, i: Instruction, rest: list[str]) -> Decoded:
        to, a, b, p = i.operands
        size = bytes_of(rest[-1])
        return Decoded(i.opcode, [self.target(to), self.source(a, size), self.source(b, size), self.predicate(p)])

    def _logic(self, i: Instruction, rest: list[str]) -> Decoded:
        if rest[-1] != "pred":
            return self._arithmetic(i)
        to, *what = i.operands
        return Decoded(i.opcode, [self.predicate(to, defined=True), *(self.predicate(p) for p in what)])

    _and = _or = _xor = _not = _logic

    def _cvta(self, i: Instruction, rest: list[str]) -> Decoded:
        to, what = i.operands
        if "shared" in rest or "local" in rest:
            return Decoded(i.opcode, [self.target(to, 8), self.source(what, 8)])
        if rest in (["global", "u64"], ["to", "global", "u64"]):
            return Decoded("mov.b64", [self.target(to), self.source(what, 8)])
        raise ValueError("a space the machine does not have")

    def _memory(self, rest: list[str]) -> tuple[list, int, int, str]:
        """(attributes up to the width of an element, elements, bytes, the type's name)."""
        kind = rest[-1]
        space, order, scope, count = 0, 0, 0, 1
        for part in rest[:-1]:
            if part in _SPACES:
                space = _SPACES[part]
            elif part in _ORDERS:
                order = _ORDERS[part]
            elif part in _SCOPES:
                scope = _SCOPES[part]
            elif re.fullmatch(r"v[248]", part):
                count = int(part[1:])
            elif not _HINTS.fullmatch("." + part):
                raise ValueError(f".{part}")
        return [space, order, scope], count, bytes_of(kind), kind

    def _ld(self, i: Instruction, rest: list[str]) -> Decoded:
        to, where = i.operands
        to = to if isinstance(to, list) else [to]
        registers = [self.target(name) for name in to]
        widths = {self.entry.registers[name] for name in to}
        if len(widths) > 1 or min(widths) < bytes_of(rest[-1]):
            raise ValueError("registers of other widths")
        if rest[0] == "param":
            kind, count = rest[-1], len(to)
            if rest[1:-1] != ([f"v{count}"] if count > 1 else []):
                raise ValueError("a form the machine does not have")
            _, base, offset = where
            common = [bytes_of(kind), count, int(kind[0] == "s"), widths.pop()]
            if base in self.entry.registers:
                return Decoded("ld.param", [*common, offset, self.source(base, 8), *registers])
            return Decoded("ld.param", [*common, self.parameters[base] + offset, -1, *registers])
        attributes, count, size, kind = self._memory(rest)
        if count != len(to) and not (count == 1 and len(to) == 1):
            raise ValueError("another number of registers than elements")
        wide, base, offset = self.address(where)
        return Decoded("ld", [*attributes, size, count, int(kind[0] == "s"), widths.pop(), *_halves(offset), wide, base,
                              *registers])

    def _st(self, i: Instruction, rest: list[str]) -> Decoded:
        where, what = i.operands
        what = what if isinstance(what, list) else [what]
        attributes, count, size, _ = self._memory(rest)
        if count != len(what):
            raise ValueError("another number of registers than elements")
        sources = [self.source(s, size, wider=True) if size == 8 or s not in self.entry.registers
                   else Register(s) for s in what]
        widths = {8 if (s.bytes if isinstance(s, Constant) else self.bytes_of(s.name)) == 8 else 4 for s in sources}
        if len(widths) > 1:
            raise ValueError("registers of other widths")
        wide, base, offset = self.address(where)
        width = widths.pop()
        return Decoded("st", [*attributes, size, count, 0, width, *_halves(offset), wide, base, *sources])

    def _atom(self, i: Instruction, rest: list[str]) -> Decoded:
        operations = [p for p in rest if p in ("add", "min", "max", "exch", "cas", "and", "or")]
        return self._atomic(i, rest, operations, *i.operands)

    def _red(self, i: Instruction, rest: list[str]) -> Decoded:
        operations = [p for p in rest if p in ("add", "min", "max", "and", "or")]
        return self._atomic(i, rest, operations, "_", *i.operands)

    def _atomic(
        self, i: Instruction, rest: list[str], operations: list[str], to: str, where: tuple, *what: str
    ) -> Decoded:
        (operation,) = operations
        attributes, count, size, kind = self._memory([p for p in rest if p != operation])
        if count != 1 or len(what) != 1 + (operation == "cas"):
            raise ValueError("a form the machine does not have")
        attributes[1] = attributes[1] or 1
        wide, base, offset = self.address(where)
        sources = [self.source(s, size) for s in what]
        return Decoded(f"atom.{operation}.{kind}", [
            *attributes, size, 1, 0, size, *_halves(offset), wide, base,
            -1 if to == "_" else self.target(to, size), sources[0], sources[1] if len(sources) > 1 else -1
        ])

    def _cp(self, i: Instruction, rest: list[str]) -> Decoded:
        if rest[:2] == ["async", "commit_group"] or rest[:2] == ["async", "wait_all"]:
            return Decoded(f"cp.async.{rest[1]}")
        if rest[:2] == ["async", "wait_group"]:
            return Decoded("cp.async.wait_group", [int(i.operands[0], 0)])
        if rest[:2] == ["async", "bulk"]:
            return self._bulk(i, rest)
        if rest[:3] == ["async", "mbarrier", "arrive"]:
            counted = "noinc" in rest
            if [p for p in rest[3:] if p != "noinc"] not in (["shared", "b64"], ["shared::cta", "b64"]):
                raise ValueError("a form the machine does not have")
            return Decoded("cp.async.mbarrier.arrive", [*self._object(i.operands[0], ["shared"]), int(counted)])
        spaces = [p for p in rest[2:] if not _HINTS.fullmatch("." + p)]
        if rest[0] != "async" or rest[1] not in ("ca", "cg") or spaces not in (
            ["shared", "global"], ["shared::cta", "global"]
        ):
            raise ValueError("a copy the machine does not have")
        to, source, size, *valid = i.operands
        if int(size, 0) not in ((4, 8, 16) if rest[1] == "ca" else (16,)) or len(valid) > 1:
            raise ValueError("a copy the machine does not have")
        wide, base, offset = self.address(to)
        source_wide, source_base, source_offset = self.address(source)
        if not source_wide:
            raise ValueError("a source address of 4 bytes")
        return Decoded("cp.async", [int(size, 0), wide, base, offset, source_base, *_halves(source_offset),
                                    self.source(valid[0], 4) if valid else -1])

    def _object(self, where: tuple, rest: list[str]) -> list:
        """Where an mbarrier is: space, and address."""
        spaces = [_SPACES[p] for p in rest if p in _SPACES]
        wide, base, offset = self.address(where)
        return [spaces[0] if spaces else 0, wide, base, offset]

    def _bulk(self, i: Instruction, rest: list[str]) -> Decoded:
        if rest[2:] not in (["shared::cluster", "global", "mbarrier::complete_tx::bytes"],
                            ["shared::cta", "global", "mbarrier::complete_tx::bytes"]):
            raise ValueError("a bulk copy the machine does not have")
        to, source, size, barrier = i.operands
        source_wide, source_base, source_offset = self.address(source)
        if not source_wide:
            raise ValueError("a source address of 4 bytes")
        return Decoded("cp.async.bulk", [*self._object(to, [rest[2]]), source_base, *_halves(source_offset),
                                         self.source(size, 4), *self._object(barrier, [rest[2]])])

    def _mbarrier(self, i: Instruction, rest: list[str]) -> Decoded:
        what, *qualifiers = rest[:-1]
        spaces = [p for p in qualifiers if p in ("shared", "shared::cta", "shared::cluster")]
        orders = [p for p in qualifiers if p in ("release", "acquire", "relaxed")]
        scopes = [p for p in qualifiers if p in ("cta", "cluster")]
        others = [p for p in qualifiers if p not in (*spaces, *orders, *scopes)]
        if rest[-1] != "b64" or max(len(spaces), len(orders), len(scopes)) > 1:
            raise ValueError("a form the machine does not have")
        scope = _SCOPES[scopes[0] if scopes else "cta"]
        if what in ("init", "expect_tx", "complete_tx", "inval") and not others:
            where, *count = i.operands
            counts = [] if what == "inval" else [self.source(*count, 4)]
            return Decoded(f"mbarrier.{what}", [*self._object(where, spaces), *counts])
        if what == "arrive" and others in ([], ["expect_tx"]) and orders != ["acquire"]:
            state = i.operands[0] if not isinstance(i.operands[0], tuple) else "_"
            where, *numbers = i.operands[1:] if not isinstance(i.operands[0], tuple) else i.operands
            bytes_ = self.source(numbers.pop(0), 4) if others else -1
            count = self.source(numbers.pop(0), 4) if numbers else -1
            if numbers or (others and count != -1):
                raise ValueError("a form the machine does not have")
            return Decoded("mbarrier.arrive", [
                *self._object(where, spaces), int(orders != ["relaxed"]), scope,
                -1 if state == "_" else self.target(state, 8), count, bytes_
            ])
        if what in ("test_wait", "try_wait") and others in ([], ["parity"]) and orders != ["release"]:
            over, where, phase, *_ = i.operands  # the last may be how long to wait at most
            return Decoded("mbarrier.wait", [
                *self._object(where, spaces), int(orders != ["relaxed"]), scope, self.predicate(over, defined=True),
                int(others == ["parity"]), self.source(phase, 4 if others else 8)
            ])
        raise ValueError("a form the machine does not have")

    def _elect(self, i: Instruction, rest: list[str]) -> Decoded:
        (_, leader, p), members = i.operands
        if rest != ["sync"]:
            raise ValueError("a form the machine does not have")
        return Decoded("elect.sync", [-1 if leader == "_" else self.target(leader, 4), self.predicate(p, defined=True),
                                      self.source(members, 4)])

    def _vote(self, i: Instruction, rest: list[str]) -> Decoded:
        to, q, members = i.operands
        negated = q.startswith("!")
        q, members = self.predicate(q.lstrip("!")), self.source(members, 4)
        if rest == ["sync", "ballot", "b32"]:
            return Decoded("vote.sync.ballot", [self.target(to, 4), q, members, int(negated)])
        if rest[0] != "sync" or rest[1] not in ("all", "any", "uni") or rest[2:] != ["pred"]:
            raise ValueError("a vote the machine does not have")
        return Decoded(f"vote.sync.{rest[1]}", [self.predicate(to, defined=True), q, members, int(negated)])

    def _activemask(self, i: Instruction, rest: list[str]) -> Decoded:
        return Decoded("activemask", [self.target(i.operands[0], 4)])

    def _setmaxnreg(self, i: Instruction, rest: list[str]) -> Decoded:
        if rest not in (["inc", "sync", "aligned", "u32"], ["dec", "sync", "aligned", "u32"]):
            raise ValueError("a form the machine does not have")
        return Decoded("setmaxnreg", [int(i.operands[0], 0)])

    def _mapa(self, i: Instruction, rest: list[str]) -> Decoded:
        to, a, rank = i.operands
        return Decoded(i.opcode, [self.target(to, 4), self.source(a, 4), self.source(rank, 4)])

    def _shfl(self, i: Instruction, rest: list[str]) -> Decoded:
        to, a, b, c, members = i.operands
        p: Predicate | int = -1
        if isinstance(to, tuple):
            p, to = self.predicate(to[2], defined=True), to[1]
        return Decoded(i.opcode, [self.target(to, 4), p, *(self.source(s, 4) for s in (a, b, c, members))])

    def _redux(self, i: Instruction, rest: list[str]) -> Decoded:
        to, a, members = i.operands
        return Decoded(i.opcode, [self.target(to), self.source(a, 4), self.source(members, 4)])

    def _matrices(self, i: Instruction, rest: list[str]) -> tuple[str, int]:
        """(".trans" or "", how many)."""
        if rest[:3] != ["sync", "aligned", "m8n8"] or rest[-1] != "b16" or not {"shared", "shared::cta"} & set(rest):
            raise ValueError("a shape the machine does not have")
        (count,) = (int(p[1]) for p in rest if re.fullmatch(r"x[124]", p))
        return ".trans" if "trans" in rest else "", count

    def _ldmatrix(self, i: Instruction, rest: list[str]) -> Decoded:
        suffix, count = self._matrices(i, rest)
        to, where = i.operands
        wide, base, offset = self.address(where)
        return Decoded(f"ldmatrix{suffix}", [count, wide, base, offset, *(self.target(r) for r in to)])

    def _stmatrix(self, i: Instruction, rest: list[str]) -> Decoded:
        suffix, count = self._matrices(i, rest)
        where, what = i.operands
        wide, base, offset = self.address(where)
        return Decoded(f"stmatrix{suffix}", [count, wide, base, offset, *(self.source(r, 4) for r in what)])

    def _movmatrix(self, i: Instruction, rest: list[str]) -> Decoded:
        to, what = i.operands
        return Decoded(i.opcode, [self.target(to), self.source(what, 4)])

    def _mma(self, i: Instruction, rest: list[str]) -> Decoded:
        to, *sources = i.operands
        return Decoded(i.opcode, [*(self.target(r) for r in to), *(self.source(r, 4) for s in sources for r in s)])

    def _wgmma(self, i: Instruction, rest: list[str]) -> Decoded:
        if rest[0] in ("fence", "commit_group"):
            return Decoded(f"wgmma.{rest[0]}")
        if rest[0] == "wait_group":
            return Decoded("wgmma.wait_group", [int(i.operands[0], 0)])
        shape, *kinds = rest[3:]
        found = re.fullmatch(r"m64n(\d+)k16", shape)
        if rest[:3] != ["mma_async", "sync", "aligned"] or not found or kinds not in (
            ["f32", "bf16", "bf16"], ["f32", "f16", "f16"]
        ):
            raise ValueError("a product the machine does not have")
        to, a, b, keep, *scales = i.operands
        n, in_registers = int(found[1]), isinstance(a, list)
        scale_a, scale_b, *transposed = (int(s, 0) for s in scales)
        transposed = [0, *transposed] if in_registers else transposed
        if len(to) != n // 2 or len(transposed) != 2 or n % 8 or not 8 <= n <= 256 or {scale_a, scale_b} - {1, -1}:
            raise ValueError("another number of operands than its shape has")
        of_a = [self.source(r, 4) for r in a] if in_registers else [self.source(a, 8)]
        return Decoded(f"wgmma.mma_async.{kinds[1]}", [
            n, int(in_registers), scale_a, scale_b, *transposed,
            *(Register(self.target(r).name, defined=True, used=True) for r in to), *of_a, self.source(b, 8),
            self.predicate(keep),
        ])

    def _fence(self, i: Instruction, rest: list[str]) -> Decoded:
        if rest[:2] == ["proxy", "async"]:
            spaces = {(): 3, ("shared::cta",): 1, ("shared::cluster",): 1, ("global",): 2}[tuple(rest[2:])]
            return Decoded("fence.proxy.async", [spaces])
        if rest == ["mbarrier_init", "release", "cluster"]:
            return Decoded("nop")
        if rest[:-1] not in (["acq_rel"], ["sc"]):
            raise ValueError("a fence the machine does not have")
        return Decoded("fence", [_SCOPES[rest[-1]]])

    def _membar(self, i: Instruction, rest: list[str]) -> Decoded:
        return Decoded("fence", [{"cta": 1, "gl": 0, "sys": 0}[rest[0]]])

    # --- control ---------------------------------------------------------------------------------------------
    def _bra(self, i: Instruction, rest: list[str]) -> Decoded:
        target = self.entry.labels[i.operands[0]]
        return Decoded("bra", [target], target, falls=i.guard is not None)

    def _ret(self, i: Instruction, rest: list[str]) -> Decoded:
        return Decoded("ret", falls=i.guard is not None)

    _exit = _ret

    def _trap(self, i: Instruction, rest: list[str]) -> Decoded:
        return Decoded("trap", falls=i.guard is not None)

    def _bar(self, i: Instruction, rest: list[str]) -> Decoded:
        if rest == ["warp", "sync"]:
            if i.operands != ["-1"] and i.operands != ["0xffffffff"]:
                raise ValueError("a member mask other than all lanes")
            return Decoded("bar.warp.sync")
        return self._barrier(i, rest)

    def _barrier(self, i: Instruction, rest: list[str]) -> Decoded:
        if rest[0] == "cluster":
            if rest[1] not in ("arrive", "wait") or "relaxed" in rest:
                raise ValueError("a barrier the machine does not have")
            return Decoded(f"barrier.cluster.{rest[1]}")
        rest = [p for p in rest if p not in ("cta", "aligned")]
        if rest not in (["sync"], ["arrive"]):
            raise ValueError("a barrier the machine does not have")
        count = self.source(i.operands[1], 4) if len(i.operands) > 1 else -1
        return Decoded("barrier", [self.source(i.operands[0], 4), count, int(rest == ["sync"])])

    def _nanosleep(self, i: Instruction, rest: list[str]) -> Decoded:
        return Decoded("nanosleep.u32")


def _halves(offset: int) -> list[int]:
    """An offset of 64 bits as two ints of 32."""
    return [_signed(offset & 0xffffffff), _signed(offset >> 32 & 0xffffffff)]


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
