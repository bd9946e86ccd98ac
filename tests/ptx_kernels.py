"""PTX kernels of a few lines, and what they answer on the machine of tools/ptx."""

import struct

import numpy as np

from tools.ptx.machine import Kernel, Options, Region

NAMES = "abcefgh"  # registers of the inputs; d is the result


def kernel(body, parameters=(), shared=0, before="", name="k"):
    """A kernel of this body. parameters: bytes of each; p0, p1, ... are their names, and %p0, %p1, ... registers
    that hold them. Registers: %r0-%r99, %d0-%d99 (64 bits), %h0-%h99 (16 bits), %q0-%q99 (predicates)."""
    heads = ",\n".join(f"  .param .b{8 * size} p{k}" for k, size in enumerate(parameters))
    loads = "\n".join(
        f"  .reg .b{8 * size} %p{k};\n  ld.param.b{8 * size} %p{k}, [p{k}];" for k, size in enumerate(parameters)
    )
    dynamic = ".extern .shared .align 1024 .b8 sm[];\n" if shared else ""
    return f""".version 8.7
.target sm_90a
.address_size 64
{dynamic}{before}
.visible .entry {name}(
{heads}
)
{{
  .reg .b32 %r<100>;
  .reg .b64 %d<100>;
  .reg .b16 %h<100>;
  .reg .pred %q<100>;
{loads}
{body}
  ret;
}}
"""


def launch(body, *arguments, grid=1, threads=32, shared=0, cluster=1, before="", machine=None, **options):
    """Runs a kernel on arrays (its pointers) and ints (of 4 bytes). Returns the Kernel."""
    sizes = [8 if isinstance(a, np.ndarray) else 4 for a in arguments]
    built = machine or Kernel(kernel(body, sizes, shared, before))
    block, regions = b"", []
    for k, a in enumerate(arguments):
        if isinstance(a, np.ndarray):
            block += b"\0" * (-len(block) % 8) + struct.pack("<Q", a.ctypes.data)
            regions.append(Region(a.ctypes.data, a.nbytes, f"p{k}"))
        else:
            block += struct.pack("<I", a & 0xffffffff)
    size = (grid, 1, 1) if isinstance(grid, int) else grid
    built.launch(size, threads, block, regions, shared, cluster, Options(**options))
    return built


def evaluate(code, result, *inputs):
    """d = code(a, b, c, ...) for every element of the inputs, arrays of one length; `result` is d's dtype."""
    result = np.dtype(result)
    count = len(inputs[0]) if inputs else 32
    rows = -(-count // 32) * 32
    padded = [np.concatenate([x, np.resize(x, rows - count)]) if rows > count else x.copy() for x in inputs]
    out = np.zeros(rows, result)
    lines = [f"  .reg .b{8 * max(2, result.itemsize)} d;", "  .reg .b64 at;", "  .reg .b32 i, b0, n;"]
    lines += ["  mov.u32 b0, %ctaid.x;", "  mov.u32 n, %ntid.x;", "  mov.u32 i, %tid.x;", "  mad.lo.u32 i, b0, n, i;"]
    for k, x in enumerate(inputs):
        bits = 8 * x.itemsize
        name = NAMES[k]
        lines += [f"  .reg .b{max(16, bits)} {name};", f"  mad.wide.u32 at, i, {x.itemsize}, %p{k + 1};",
                  f"  ld.global.b{bits} {name}, [at];"]
    lines += [code, f"  mad.wide.u32 at, i, {result.itemsize}, %p0;", f"  st.global.b{8 * result.itemsize} [at], d;"]
    threads = 32 if rows % 128 else 128
    launch("\n".join(lines), out, *padded, grid=rows // threads, threads=threads)
    return out[:count]


EDGES = {
    np.dtype(np.float32): np.array([
        0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007fffff, 0x807fffff, 0x00800000, 0x80800000, 0x3f800000,
        0xbf800000, 0x3f800001, 0x3f000000, 0x40000000, 0x4b000000, 0x4b800001, 0x4f000000, 0xcf000000, 0x4f7fffff,
        0x7f7fffff, 0xff7fffff, 0x7f800000, 0xff800000, 0x7fc00000, 0xffc00001, 0x7f800001, 0x3fc00000, 0x40200000,
        0xbf000000, 0x33800000, 0x7e800001, 0x3effffff, 0x5f000000], np.uint32).view(np.float32),
}
for _kind in (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64):
    _info = np.iinfo(_kind)
    EDGES[np.dtype(_kind)] = np.array(
        sorted({_info.min, _info.max, _info.max - 1, _info.max // 2, _info.max // 2 + 1, 0, 1, 2, 3, 7, 100,
                *((-1, -2, -7, _info.min + 1) if _info.min else ())}), _kind)


def samples(kind, count, seed=0):
    """Random numbers of all sizes, edge values among them."""
    kind = np.dtype(kind)
    random = np.random.default_rng(seed)
    if kind.kind == "f":
        word = np.dtype(f"u{kind.itemsize}")
        wild = random.integers(0, np.iinfo(word).max, count, word, endpoint=True).view(kind)
        tame = (random.standard_normal(count) * 2.0 ** random.integers(-12, 12, count)).astype(kind)
        found = np.where(random.random(count) < 0.3, wild, tame)
    else:
        info = np.iinfo(kind)
        wild = random.integers(info.min, info.max, count, kind, endpoint=True)
        found = wild >> random.integers(0, 8 * kind.itemsize, count).astype(kind)
    edges = EDGES.get(kind)
    if edges is not None:
        at = random.random(count) < 0.3
        found[at] = random.choice(edges, at.sum())
    return found


def pairs(kind, count=512, seed=0):
    """Every pair of edge values, then random ones."""
    edges = EDGES[np.dtype(kind)]
    a, b = np.repeat(edges, len(edges)), np.tile(edges, len(edges))
    return np.concatenate([a, samples(kind, count, seed)]), np.concatenate([b, samples(kind, count, seed + 1)])
