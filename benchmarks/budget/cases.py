"""What is counted: calls of the package's own operators at the shapes of the goals, on few rows and heads.

A case runs twice, with ``few`` and ``more`` units of length, and the difference is what a unit costs: a chunk
of one (row, head) of the memory, or a whole call where nothing repeats. ``goal`` says at which size the goals
ask for a time, as multiples of the unit. """

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks import measure as m
from hope_kernels import CMSConfig, TitansConfig
from hope_kernels.ops import RoundedWeights, TokenInputs, init_titans_state, titans_advance_, titans_chunk
from hope_kernels.ops.cms.matrix import Matrix
from hope_kernels.ops.titans.state import FastWeights, Layout
from hope_kernels.ops.titans.triton import carried, operator, tiles
from hope_kernels.ops.titans.triton.groups import Tiles
from hope_kernels.ops.titans.triton.spans import CHUNKS_A_SPAN

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Size:
    """The call that a goal asks for. units: of the case, in the whole call, of which ``chains`` run side by
    side and the units of a chain one after the other. blocks, warps: of a chain's kernel at work at one time,
    and of a block. flops: of the call; bytes: that it cannot avoid moving to and from memory. launches: one
    after the other."""

    units: float
    chains: int
    blocks: int
    warps: int
    flops: float
    bytes: float
    launches: int = 1
    resident: int = 1  # blocks a multiprocessor, by registers
    persistent: bool = False  # any block does any work: chains need not fill the machine
    exchange: bool = False  # blocks hand to each other through L2, and other chains fill the time they wait
    memory_first: bool = False  # all bytes are requested before the first is used
    reuse: bool = False  # L1 has what is read again
    # stages of a unit that wait for one another, with the tasks that each is cut into
    tasks: tuple[tuple[str, int], ...] = ()
    barriers: int = 0  # of several blocks, or from task to task, on the way of a unit
    recorded: bool = False  # launches are those of CUDA graphs
    library: float = 0.0
    passes: float = 0.0


@dataclass(frozen=True)
class Case:
    name: str
    kind: str
    backend: str
    arch: int
    unit: str
    run: Callable[[int], Callable[[], object]]  # length -> the call
    few: int
    more: int
    per: float  # units in ``more`` - ``few``
    goal: Size | None = None
    cheap: bool = False
    tiles: tuple[int, int, int, int] | None = None  # of the memory's Triton kernel, in place of its table's
    measured_as: str = ""  # "file: name of the case" of benchmarks.gpu that measures the call of ``goal``
    together: int = 1  # programs of a Triton kernel that run at a time while it is counted

    @contextmanager
    def with_tiles(self) -> Iterator[None]:
        """What the table of tiles would have to say."""
        table = tiles.TABLE
        if self.tiles is not None:
            other = Tiles(*self.tiles)
            tiles.TABLE = tuple(
                row._replace(tiles=other) if (row.D, row.itemsize) == (64, 2) else row for row in table
            )
        operator._plan.cache_clear()
        try:
            yield
        finally:
            tiles.TABLE = table
            operator._plan.cache_clear()

    @property
    def case(self) -> dict:
        """As benchmarks/sources.py wants it."""
        return {"kind": self.kind, "backend": self.backend}


def _weights(config: TitansConfig) -> FastWeights:
    g = torch.Generator().manual_seed(0)
    return FastWeights(*(
        None if s is None else (torch.randn(s, generator=g) / s[-1] ** 0.5).to(BF16)
        for s in Layout.of(config).shapes(config.num_heads)
    ))


def _inputs(config: TitansConfig, tokens: int) -> TokenInputs:
    g, shape = torch.Generator().manual_seed(1), (1, tokens, config.num_heads, config.head_dim)
    q, x = (torch.randn(shape, generator=g) for _ in range(2))
    q, bias = q / q.norm(dim=-1, keepdim=True), torch.zeros(config.num_heads, dtype=BF16)
    return TokenInputs(q.to(BF16), x=x.to(BF16), eta_bias=bias, alpha_bias=bias + 2)


def prefill(config: TitansConfig, backend: str, chunks: int) -> Callable[[], object]:
    w, i = _weights(config), _inputs(config, chunks * config.chunk_memory)

    def call():
        with torch.no_grad():
            return titans_chunk(config, w, i, backend=backend)

    return call


def decode(config: TitansConfig, backend: str, tokens: int, rounded: bool = False) -> Callable[[], object]:
    """Some tokens, one a call, in an open chunk. rounded: after the first one they read a rounded copy."""
    w = _weights(config)
    one = torch.ones(1, dtype=torch.int64)

    def call():
        state = init_titans_state(config, w, 1, "cpu", BF16)
        more = {"rounded": RoundedWeights(config, w, state)} if rounded else {}
        for _ in range(tokens):
            titans_advance_(config, w, _inputs(config, 1), state, one, backend=backend, **more)

    return call


def grad(config: TitansConfig, chunks: int) -> Callable[[], object]:
    from hope_kernels.ops.titans.triton.training import titans_triton_training

    w, i = _weights(config), _inputs(config, chunks * config.chunk_memory)
    leaf = lambda found: type(found)(*(None if t is None else t.detach().requires_grad_() for t in found))

    def call():
        state = init_titans_state(config, w, 1, "cpu", BF16)
        o, _ = titans_triton_training(config, leaf(w), leaf(i), state, [i.x.shape[1]])
        o.float().sum().backward()

    return call


def level(d: int, tokens: int, backward: bool) -> Callable[[], object]:
    from hope_kernels.ops.cms.triton import operator as kernels

    config = CMSConfig(d, (8,))
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g).to(BF16)
    N = config.hidden
    up, down = Matrix(draw(N, d) / d**0.5), Matrix(draw(d, N) / N**0.5)
    of = {"norm_gain": 1 + 0.1 * draw(d), "up": up, "down": down}
    x, dy = draw(1, tokens, d), draw(1, tokens, d)
    _, saved = kernels.level_forward(x, of, config, 1e-6, residual=True, keep=True)

    def call():
        if backward:
            return kernels.level_backward(dy, saved, of, config, 1e-6, residual=True, need_dx=True)
        return kernels.level_forward(x, of, config, 1e-6, residual=True, keep=True)

    return call


def refresh(rows: int, columns: int, tokens: int, own: bool = False) -> Callable[[], object]:
    """own: by our kernel, however long the segment is."""
    from hope_kernels.ops.cms.triton import library
    from hope_kernels.ops.cms.triton import operator as kernels

    g = torch.Generator().manual_seed(0)
    weight, copy = torch.randn(1, rows, columns, generator=g), torch.zeros(1, rows, columns, dtype=BF16)
    left, right = (torch.randn(1, tokens, n, generator=g).to(BF16) for n in (rows, columns))

    def call():
        large = library.LARGE
        library.LARGE = 2**62 if own else large
        try:
            kernels.refresh_(weight, copy, left, right, [0], 0.1)
        finally:
            library.LARGE = large

    return call


def conv(d: int, tokens: int) -> Callable[[], object]:
    from hope_kernels.ops.conv.triton.forward import causal_conv_triton

    g = torch.Generator().manual_seed(0)
    x, tail, weight = (torch.randn(s, generator=g).to(BF16) for s in ((1, tokens, d), (1, 3, d), (d, 4)))
    return lambda: causal_conv_triton(x, tail, weight, None)


def gate(heads: int, tokens: int) -> Callable[[], object]:
    from hope_kernels.ops.output_gate.triton.forward import output_gate_triton

    g = torch.Generator().manual_seed(0)
    o, z = (torch.randn(1, tokens, heads, 64, generator=g).to(BF16) for _ in range(2))
    return lambda: output_gate_triton(o, torch.ones(heads, 64, dtype=BF16), z.flatten(2))


# -- the list
# --------------------------------------------------------------------------------------------------


def _config(mult: int, C: int, heads: int = 1) -> TitansConfig:
    return TitansConfig(64 * heads, heads, hidden_mult=mult, chunk_memory=C, chunk_other=C)


def _goal(mult: int, C: int, heads: int, rows: int, tokens: int, blocks: int, warps: int, **more) -> Size:
    config = _config(mult, C, heads)
    return Size(
        units=rows * heads * tokens / C, chains=rows * heads, blocks=blocks, warps=warps,
        flops=rows * tokens * m.flops_per_token(config), bytes=m.prefill_bytes(config, rows, tokens, 2),
        **more
    )


def _tasks(config: TitansConfig, arch: int) -> tuple[tuple[str, int], ...]:
    """Of Triton's schedule; a chunk's clock runs beside its errors."""
    tile, M = tiles.tile_row(config.head_dim, config.chunk_memory, 2, arch).tiles, len(config.memories)
    parts, cuts = config.chunk_memory // tile.WALK_CT, config.hidden // tile.TILE_NT
    return ("read", M * parts), ("errors", M * parts), ("hidden", M * cuts), ("gain", M), ("update", M * cuts)


# Of carry.py: a chunk's stages with the members that share each; the gates' commit runs beside the others'
CARRIED = (("read", 3), ("clock", 1), ("commit", 3))


def _memories() -> Iterator[Case]:
    chunk = "chunk of a (row, head)"
    for mult, C, (heads, rows, tokens), blocks in (
        (1, 16, (32, 4, 8192), 1), (1, 64, (32, 4, 8192), 1), (4, 64, (32, 1, 32768), 4)
    ):
        config, shape = _config(mult, C), f"C{C} D64 N{64 * mult}"
        name = f"ops: prefill {shape} H{heads} B{rows} T{tokens} bf16"
        for arch in (90, 80):
            size = _goal(mult, C, heads, rows, tokens, blocks, 8, barriers=(C // 16 + 1) * (blocks > 1))
            yield Case(f"prefill {shape} cuda sm_{arch}", "prefill", "cuda", arch, chunk,
                       partial(prefill, config, "cuda"), 2, 4, 2, size, arch == 90, None, f"{name} cuda")
            if carried.carried(config, 2, arch):
                size = _goal(mult, C, heads, rows, tokens, 4, carried.WARPS, tasks=CARRIED, barriers=2,
                             exchange=True, resident=65536 // (32 * carried.WARPS * carried.REGISTERS))
                yield Case(f"prefill {shape} triton sm_{arch}", "prefill", "triton", arch, chunk,
                           partial(prefill, config, "triton"), 2, 4, 2, size, arch == 90, None,
                           f"{name} triton", 4)
                continue
            size = _goal(mult, C, heads, rows, tokens, 1, 4, persistent=True, resident=3 if C == 16 else 2,
                         tasks=_tasks(config, arch), barriers=4)
            yield Case(f"prefill {shape} triton sm_{arch}", "prefill", "triton", arch, chunk,
                       partial(prefill, config, "triton"), 2, 4, 2, size, arch == 90 and C == 64, None,
                       f"{name} triton")
            # weights are loaded once for a chunk on sm_90, for 32 tokens on sm_80: the other tiles beside
            other = (64, 32, 64, 32) if arch == 90 else (64, C, 64, C)
            if C == 64:
                title = f"prefill {shape} triton sm_{arch} tiles {' '.join(map(str, other))}"
                call = partial(prefill, config, "triton")
                changed = Case(title, "prefill", "triton", arch, chunk, call, 2, 4, 2, tiles=other)
                with changed.with_tiles():
                    goal = replace(size, tasks=_tasks(config, arch))
                yield replace(changed, goal=goal)
    config = _config(4, 256)  # which CUDA C++ does not serve
    for arch in (90, 80):
        size = _goal(4, 256, 32, 4, 8192, 1, 4, persistent=True, resident=2, tasks=_tasks(config, arch), barriers=4)
        yield Case(f"prefill C256 D64 N256 triton sm_{arch}", "prefill", "triton", arch, chunk,
                   partial(prefill, config, "triton"), 2, 4, 2, size, False, None,
                   "ops: prefill C256 D64 N256 H32 B4 T8192 bf16 triton")
    config, whole = _config(4, 64), _config(4, 64, 32)
    size = Size(32, 32, 4, 8, 0.0, m.step_bytes(whole, 1, 2, commit=False), memory_first=True)
    for arch in (90, 80):
        size = replace(size, launches=1 if arch == 90 else 2)  # blocks of a head need a cluster to meet
        yield Case(f"step C64 D64 N256 cuda sm_{arch}", "step", "cuda", arch, "token of a (row, head)",
                   partial(decode, config, "cuda"), 1, 3, 2, size, arch == 90, None,
                   "ops: step graph C64 D64 N256 H32 B1 T1 bf16 cuda")
        kept = replace(size, bytes=m.step_bytes(whole, 1, 2, commit=False, rounded=True))
        yield Case(f"step C64 D64 N256 cuda sm_{arch} rounded", "step", "cuda", arch,
                   "token of a (row, head)", partial(decode, config, "cuda", rounded=True), 1, 3, 2, kept,
                   arch == 90, None, "ops: step graph rounded C64 D64 N256 H32 B1 T1 bf16 cuda")
    size = replace(size, blocks=1, warps=4, launches=1, resident=2, persistent=True)
    yield Case("step C64 D64 N256 triton sm_90", "step", "triton", 90, "token of a (row, head)",
               partial(decode, config, "triton"), 1, 3, 2, size, False, None,
               "ops: step graph C64 D64 N256 H32 B1 T1 bf16 triton")
    # PyTorch's copies of the state at every chunk, its weights in force, and of a span's graph what goes in and out
    moved = (8 + 6 + 24 / CHUNKS_A_SPAN) * sum(s.numel() for s in _weights(whole) if s is not None) * 8192 / 64
    size = _goal(4, 64, 32, 1, 8192, 1, 4, persistent=True, resident=2, recorded=True, passes=moved)
    yield Case("grad C64 D64 N256 triton sm_90", "grad", "triton", 90, chunk, partial(grad, config), 2, 4, 2,
               replace(size, flops=3 * size.flops), False, None,
               "ops: grad C64 D64 N256 H32 B1 T8192 bf16 triton")


def _others() -> Iterator[Case]:
    for d, tokens in ((256, 64), (1024, 64)):
        for arch in (90, 80):
            for backward in (False, True):
                name = "backward" if backward else "forward"
                yield Case(f"cms {name} d{d} C{tokens} sm_{arch}", "forward", "triton", arch, "call",
                           lambda n, d=d, t=tokens, b=backward: level(d, t, b), 0, 1, 1,
                           Size(1, 1, 1, 8, 16 * d * d * tokens, 2 * 8 * d * d, launches=3, resident=2,
                                persistent=True),
                           d == 256 and arch == 90)
    for d, tokens in ((256, 64), (4096, 64), (4096, 4096)):
        rows, long = min(d, 256), tokens == 4096
        moved = (8 + 2) * d * d + 2 * 2 * tokens * d
        unit, measured = f"refresh of {rows} of {d} rows", f"cms: refresh d{d} C{tokens} B1 bf16 gd"
        size = Size(d / rows, 1, 1, 4, 2 * d * d * tokens, moved, resident=2, persistent=True)
        yield Case(f"cms refresh d{d} C{tokens} sm_90" + " own kernel" * long, "refresh", "triton", 90, unit,
                   lambda n, r=rows, d=d, t=tokens: refresh(r, d, t, own=True), 0, 1, 1, size, d == 256, None,
                   "" if long else measured)
        if long:  # the master is read again and rounded
            size = replace(size, launches=2, library=size.flops, passes=(4 + 2) * d * d)
            yield Case(f"cms refresh d{d} C{tokens} sm_90", "refresh", "triton", 90, unit,
                       lambda n, r=rows, d=d, t=tokens: refresh(r, d, t), 0, 1, 1, size, False, None,
                       measured)
    size = Size(8, 1, 1, 4, 0.0, 8 * 1024 * 2048 * 4, resident=8, reuse=True, persistent=True)
    yield Case("conv d2048 sm_90", "conv", "triton", 90, "1024 tokens", lambda n: conv(2048, 512 * n), 2, 4,
               1, size, cheap=True)
    yield Case("gate H32 D64 sm_90", "gate", "triton", 90, "1024 tokens", lambda n: gate(32, 512 * n), 2, 4,
               1, replace(size, bytes=8 * 1024 * 2048 * 6), cheap=True)


def cases() -> list[Case]:
    return [*_memories(), *_others()]
