"""PTX text as instructions: opcodes, operands, the labels they jump to, and where in a source they come from."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(", re.MULTILINE)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\b[^\s]*\s*(?:\.\w+\s+)*(?:\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?"
)
_SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\[(\d*)\]")
_LOCAL = re.compile(r"\.local\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\[(\d+)\]")
_GUARD = re.compile(r"@(!?)([%\w$]+)\s+")
_LABEL = re.compile(r"([\w$]+):\s*")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_FILE = re.compile(r'^[ \t]*\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?', re.MULTILINE)
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)(.*)")
BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}


def bytes_of(kind: str) -> int:
    """Of a PTX type: "f32" -> 4, "pred" -> 0, "bf16x2" -> 4."""
    if kind == "pred":
        return 0
    bits = re.search(r"(8|16|32|64|128)(x2)?$", kind)
    if bits is None:
        raise ValueError(f"PTX: no type .{kind}")
    return int(bits[1]) // 8 * (2 if bits[2] else 1)


@dataclass
class Parameter:
    """One parameter of an entry: ``bytes`` at ``offset`` of the parameter block."""

    name: str
    bytes: int
    offset: int


@dataclass
class Instruction:
    """One instruction. text: as written. line: of the PTX file. operands: as written, vectors as lists and
    addresses as ("[", base, offset). location: (file number, line) of the source, stack: the rest of its
    .loc, which names what it was inlined into."""

    line: int
    text: str
    opcode: str
    operands: list
    guard: str | None
    negated: bool
    location: tuple[int, int] | None
    stack: str


@dataclass
class Entry:
    """One kernel of a PTX file. registers: name -> bytes, 0 for predicates; families ("%r<9>") by their
    stem. labels: name -> index of the instruction it stands before. shared, local: symbol -> offset.
    static_shared: bytes before dynamic shared memory."""

    name: str
    parameters: list[Parameter]
    instructions: list[Instruction] = field(default_factory=list)
    registers: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    static_shared: int = 0
    local: dict[str, int] = field(default_factory=dict)
    local_bytes: int = 0
    files: dict[int, str] = field(default_factory=dict)


def entries(ptx: str) -> list[str]:
    """Names of the kernels of a PTX file."""
    return ENTRY.findall(ptx)


def parse(ptx: str, name: str | None = None) -> Entry:
    """One kernel of a PTX file, the only one if no name is given. Raises ValueError for what is not there."""
    found = [m for m in ENTRY.finditer(ptx) if name is None or m[1] == name]
    if len(found) != 1:
        raise ValueError(f"PTX: {len(found)} kernels {'in the file' if name is None else f'of name {name}'}")
    head = found[0]
    close = ptx.index("\n)", head.end()) if "\n)" in ptx[head.end():] else ptx.index(")", head.end())
    entry = Entry(head[1], _parameters(ptx[head.end():close]))
    start = ptx.index("{", close)
    end = _closing(ptx, start)
    for number, folder, path in _FILE.findall(ptx):
        entry.files[int(number)] = path or folder
    dynamic = _lay_out_shared(entry, ptx[:ENTRY.search(ptx).start()])
    _Body(entry).read(ptx[start + 1:end], ptx.count("\n", 0, start + 1) + 1)
    # dynamic shared memory lies behind all that has a size
    for alignment in dynamic.values():
        entry.static_shared = -(-entry.static_shared // alignment) * alignment
    entry.shared |= dict.fromkeys(dynamic, entry.static_shared)
    return entry


def _parameters(text: str) -> list[Parameter]:
    parameters, offset = [], 0
    for align, kind, name, count in _PARAMETER.findall(text):
        size = bytes_of(kind) * int(count or 1)
        alignment = int(align or bytes_of(kind))
        offset = -(-offset // alignment) * alignment
        parameters.append(Parameter(name, size, offset))
        offset += size
    return parameters


def _closing(text: str, start: int) -> int:
    """Where the brace that opens at ``start`` closes."""
    depth = 0
    for m in re.compile(r"//[^\n]*|[{}]").finditer(text, start):
        depth += {"{": 1, "}": -1}.get(m[0], 0)
        if depth == 0:
            return m.start()
    raise ValueError("PTX: a kernel's body does not end")


def _lay_out_shared(entry: Entry, text: str) -> dict[str, int]:
    """Static shared memory, each array at its alignment. Returns the dynamic arrays (no size), and their alignments."""
    dynamic = {}
    for align, kind, name, count in _SHARED.findall(text):
        alignment = int(align or bytes_of(kind))
        if not count:
            dynamic[name] = alignment
            continue
        offset = -(-entry.static_shared // alignment) * alignment
        entry.shared[name] = offset
        entry.static_shared = offset + bytes_of(kind) * int(count)
    return dynamic


class _Body:
    """Reads statements, with the scopes that inline assembly opens."""

    def __init__(self, entry: Entry):
        self.entry = entry
        self.scopes: list[dict[str, str]] = [{}]  # name -> name that is unique in the kernel
        self.opened = 0
        self.jumps: list[tuple[Instruction, list[dict[str, str]]]] = []
        self.location: tuple[int, int] | None = None
        self.stack = ""

    def read(self, body: str, line: int) -> None:
        rest, first = "", line
        for number, text in enumerate(body.split("\n"), line):
            code, _, comment = text.partition("//")
            stripped = code.strip()
            if not rest and stripped.startswith((".loc ", ".loc\t")):
                self._locate(stripped, comment.strip())
                continue
            if not stripped:
                continue
            if not rest:
                first = number
            rest = self._consume(f"{rest} {stripped}".strip(), first, last=number)
        if rest:
            raise ValueError(f"PTX: {rest!r} does not end")
        for i, scopes in self.jumps:  # a label may stand behind the jump to it
            i.operands = [_found(o, scopes) if isinstance(o, str) else o for o in i.operands]

    def _consume(self, text: str, line: int, last: int) -> str:
        """Reads what is complete of ``text`` and returns the rest."""
        while text:
            if text[0] == "{":
                self.opened += 1
                self.scopes.append({})
                text = text[1:].lstrip()
            elif text[0] == "}":
                self.scopes.pop()
                text = text[1:].lstrip()
            elif text[0] == ";":
                text = text[1:].lstrip()
            elif label := _LABEL.match(text):
                self.entry.labels[self._name(label[1], label=True)] = len(self.entry.instructions)
                text = text[label.end():]
            elif text.startswith((".reqntid", ".maxnreg", ".maxntid", ".minnctapersm", ".explicitcluster",
                                  ".reqnctapercluster", ".maxclusterrank")):
                return ""
            elif ";" not in text:
                return text
            else:
                statement, text = (part.strip() for part in text.split(";", 1))
                if statement.startswith("."):
                    self._directive(statement)
                else:
                    self._instruction(statement, line)
                line = last
        return ""

    def _locate(self, text: str, comment: str) -> None:
        found = _LOC.match(text)
        if found is None:
            raise ValueError(f"PTX: {text}")
        self.location = (int(found[1]), int(found[2]))
        self.stack = comment or found[4].strip(" ,")

    def _directive(self, text: str) -> None:
        if found := _REGISTERS.match(text):
            size = bytes_of(found[1])
            for name in (part.strip() for part in found[2].split(",")):
                family = re.fullmatch(r"([%\w$]+)<(\d+)>", name)
                if family:
                    for k in range(int(family[2])):
                        self._declare(f"{family[1]}{k}", size)
                else:
                    self._declare(name, size)
        elif shared := _SHARED.match(text):
            alignment = int(shared[1] or bytes_of(shared[2]))
            offset = -(-self.entry.static_shared // alignment) * alignment
            self.entry.shared[shared[3]] = offset
            self.entry.static_shared = offset + bytes_of(shared[2]) * int(shared[4])
        elif local := _LOCAL.match(text):
            alignment = int(local[1] or bytes_of(local[2]))
            offset = -(-self.entry.local_bytes // alignment) * alignment
            self.entry.local[local[3]] = offset
            self.entry.local_bytes = offset + bytes_of(local[2]) * int(local[4])
        elif not text.startswith((".pragma", ".file")):
            raise ValueError(f"PTX: the directive {text!r} is not understood")

    def _declare(self, name: str, size: int) -> None:
        """A register; one of inline assembly is known in its scope only."""
        unique = name
        if len(self.scopes) > 1:
            self.opened += 1
            unique = f"{name}#{self.opened}"
            self.scopes[-1][name] = unique
        self.entry.registers[unique] = size

    def _name(self, name: str, label: bool = False) -> str:
        if label and len(self.scopes) > 1:  # likewise
            self.opened += 1
            self.scopes[-1][name] = f"{name}#{self.opened}"
        return _found(name, self.scopes)

    def _instruction(self, statement: str, line: int) -> None:
        text, negated, guard = statement, False, None
        if found := _GUARD.match(statement):
            negated, guard = found[1] == "!", self._name(found[2])
            statement = statement[found.end():]
        opcode, _, rest = statement.replace("\t", " ").partition(" ")
        self.entry.instructions.append(
            Instruction(line, " ".join(text.split()), opcode, self._operands(rest), guard, negated, self.location,
                        self.stack)
        )
        if opcode.split(".")[0] == "bra":
            found = self.entry.instructions[-1]
            found.operands = [rest.strip()]
            self.jumps.append((found, self.scopes[:]))

    def _operands(self, text: str) -> list:
        found, depth, part = [], 0, ""
        for c in text:
            depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(c, 0)
            if c == "," and depth == 0:
                found.append(self._operand(part.strip()))
                part = ""
            else:
                part += c
        if part.strip():
            found.append(self._operand(part.strip()))
        return found

    def _operand(self, text: str):
        if text[0] == "{":
            return [self._operand(part.strip()) for part in text[1:-1].split(",")]
        if text[0] == "[":
            base, _, offset = text[1:-1].partition("+")
            return ("[", self._operand(base.strip()), int(offset.strip() or "0", 0))
        if "|" in text:
            return tuple(["|", *(self._operand(part.strip()) for part in text.split("|"))])
        return self._name(text)


def _found(name: str, scopes: list[dict[str, str]]) -> str:
    """The name that is unique in the kernel, of the innermost scope that has it."""
    return next((scope[name] for scope in reversed(scopes) if name in scope), name)
