"""The class of every PTX instruction: which part of a multiprocessor it keeps busy.

A class is a group, and for memory the bytes a lane: "shared load 16". An opcode that no rule names is an error,
so that nothing new is counted as something else.
"""

from __future__ import annotations

import re

from tools.ptx.parse import bytes_of

# what a group is, in the order of tables
GROUPS = {
    "tensor": "products of matrices",
    "float": "additions, products and comparisons of floating-point numbers",
    "special": "exponentials, roots, reciprocals, quotients",
    "convert": "between floating-point types",
    "integer": "integers of up to 32 bits, logic, permutations of bytes",
    "address": "integers of 64 bits",
    "predicate": "comparisons of integers, selections, logic of predicates",
    "move": "registers to registers (the assembler removes most of them)",
    "branch": "jumps",
    "exchange": "between lanes of a warp",
    "shared": "loads and stores of shared memory",
    "global": "loads and stores of global memory",
    "copy": "asynchronous copies from global to shared memory",
    "parameter": "loads of parameters (operands, once assembled)",
    "atomic": "atomic operations, and loads that acquire",
    "barrier": "of a block, a cluster, a warp",
    "fence": "fences, and waits for copies and products under way",
}
NO_ADDRESSES = ("tensor", "float", "special", "convert", "exchange", "shared", "global", "copy")
_FLOAT = re.compile(r"\.(?:f16|f32|f64|bf16|tf32)(?:x2)?\b")
_WORDS = {
    "mma": "tensor", "movmatrix": "exchange", "shfl": "exchange", "redux": "exchange", "vote": "exchange",
    "activemask": "exchange", "ex2": "special", "lg2": "special", "rsqrt": "special", "sqrt": "special",
    "rcp": "special", "tanh": "special", "sin": "special", "cos": "special", "fma": "float", "copysign": "float",
    "selp": "predicate", "bra": "branch", "ret": "branch", "exit": "branch", "trap": "branch", "call": "branch",
    "nanosleep": "branch", "cvta": "address", "mapa": "address", "atom": "atomic", "red": "atomic",
    "barrier": "barrier", "bar": "barrier", "fence": "fence", "membar": "fence",
}
_PLAIN = {
    "add", "sub", "mul", "mad", "div", "rem", "min", "max", "abs", "neg", "not", "and", "or", "xor", "lop3", "shl",
    "shr", "shf", "bfe", "bfi", "prmt", "popc", "clz", "brev", "sad",
}


class UnknownOpcode(Exception):
    """An opcode without a class."""


def group_of(name: str) -> str:
    """"shared" for "shared load 16"."""
    return name.split(" ")[0]


def class_of(opcode: str) -> str:
    """Raises UnknownOpcode. A load or store with a generic address has the group "generic": counts say which
    memory it went to."""
    word, *rest = opcode.split(".")
    if word in ("ld", "st", "ldu"):
        return _memory("load" if word != "st" else "store", rest)
    if word in ("ldmatrix", "stmatrix"):
        (count,) = (int(p[1:]) for p in rest if re.fullmatch(r"x[124]", p))
        return f"shared {'load' if word == 'ldmatrix' else 'store'} {4 * count}"
    if word == "cp":
        return "copy" if rest[-1] == "global" or "bulk" in rest else "fence"
    if word == "wgmma":
        return "tensor" if rest[0] == "mma_async" else "fence"
    if word == "griddepcontrol":
        return "fence"
    if word in _WORDS:
        return _WORDS[word]
    if word == "mov":
        return "move"
    if word in ("cvt", "setp", "set"):
        floating = bool(_FLOAT.search(opcode))
        if word != "cvt":
            return "float" if floating else "predicate"
        return "convert" if floating else _integer(rest[-2:])
    if word in _PLAIN:
        if rest[-1] == "pred":
            return "predicate"
        if _FLOAT.search(opcode):
            return "special" if word == "div" else "float"
        return _integer(rest)
    raise UnknownOpcode(f"{opcode}: benchmarks/budget/classes.py has no class for it")


def _integer(rest: list[str]) -> str:
    return "address" if "wide" in rest or any(p.endswith("64") for p in rest) else "integer"


def _memory(what: str, rest: list[str]) -> str:
    spaces = [p.split("::")[0] for p in rest if p.split("::")[0] in ("global", "shared", "param", "local")]
    space = spaces[0] if spaces else "generic"
    if space == "param":
        return "parameter"
    if "acquire" in rest or "release" in rest:
        return "atomic"
    count = next((int(p[1:]) for p in rest if re.fullmatch(r"v[248]", p)), 1)
    return f"{space} {what} {count * bytes_of(rest[-1])}"


def flops(opcode: str) -> int:
    """Of one warp's execution: for wgmma, of which four warps execute one, a quarter."""
    found = re.search(r"m(\d+)n(\d+)k(\d+)", opcode)
    if class_of(opcode) != "tensor" or found is None:
        return 0
    m, n, k = map(int, found.groups())
    return 2 * m * n * k // (4 if opcode.startswith("wgmma") else 1)
