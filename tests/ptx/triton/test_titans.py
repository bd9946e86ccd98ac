"""The memory's forward as PTX: every row of its table of tiles and every switch that changes its tasks, by the
contract of a backend.

``Case.setting`` is the architecture; without one it is sm_80.
"""

import pytest
import torch
from contract import Accurate, Backend, Case, Streaming
from problems import cast, part, problem, run, same
from triton.runtime import driver

from hope_kernels import TitansConfig
from hope_kernels.ops import TokenInputs, init_titans_state, titans_advance_

HALF, SINGLE = (torch.bfloat16, torch.float16), torch.float32
titans = lambda **kw: TitansConfig.preset("titans", **{"d_model": 32, "chunk_memory": 16, **kw})
SMALL = TitansConfig(32, 1)
ERASING = titans(dgd=True, momentum=None, chunk_memory=32)
CLOCKS = TitansConfig(32, 1, chunk_memory=16, chunk_other=32, target_norm=False, own_values=False, retention=False)
MOMENTUM = titans(d_model=64, num_heads=2, dgd=True)
CARRIED = TitansConfig(64, 1)  # one program a memory carries it from chunk to chunk
WIDE = TitansConfig(64, 1, hidden_mult=2)
LONG = TitansConfig(64, 1, chunk_memory=64, chunk_other=64)
EVERYTHING = TitansConfig(32, 1, adaptive_q=True, momentum="learned", chunk_memory=32, chunk_other=16)
# Switches of the write rule beside the default's; the first six as the tables offer them
RULES = {
    "nested_learning": TitansConfig.preset("nested_learning", d_model=64, chunk_memory=64, chunk_other=64),
    "two clocks": TitansConfig(64, 1, chunk_memory=16, chunk_other=64),
    "titans": TitansConfig.preset("titans", d_model=128, num_heads=2, chunk_memory=16),
    "titans, long chunks": TitansConfig.preset("titans", d_model=128, num_heads=2, chunk_memory=64),
    "momentum": TitansConfig(64, 1, chunk_memory=64, chunk_other=64, momentum="learned"),
    "adaptive_q": TitansConfig(64, 1, adaptive_q=True),
    "silu": TitansConfig(64, 2, hidden_mult=2, chunk_memory=32, chunk_other=16, activation="silu"),
    "slow others": CLOCKS,
    "dot": TitansConfig(
        32, 1, objective="dot", step_clip=False, qk_l2norm=False, scalar_skip=True, eta_scale=0.1
    ),
    "erasing": ERASING,
    "erasing, momentum": MOMENTUM,
    "drifting": titans(retain_to="zero", step_clip=False, momentum=0.6, objective="dot"),
    "everything": EVERYTHING,
}
# of memories that are carried
RULES |= {
    "carried, free": CARRIED.replace(target_norm=False, step_clip=False, activation="gelu", eta_scale=0.1),
    "carried, dot": CARRIED.replace(objective="dot", step_clip=False, qk_l2norm=False, eta_scale=0.1),
    "carried, given values": CARRIED.replace(
        own_values=False, dgd=False, activation="silu", eta_activation="softplus", eta_scale=0.1, grad_scale=2.0
    ),
}
SLOW = ("two clocks", "titans, long chunks", "silu", "momentum", "everything")
# on sm_90, what sm_80 has shown is left to the slow tests
USUAL_90 = ("titans, long chunks",)


def slowly(case):
    return pytest.param(case, marks=pytest.mark.slow)


def table(width: int, mult: int, chunk: int, dtype: torch.dtype, arch: int = 80, **changes) -> Case:
    """A chunk of one row of the table of tiles, and a bit, in two ragged rows."""
    changes = {"chunk_memory": chunk, "chunk_other": chunk, **changes}
    config = TitansConfig(width * (2 if width < 128 else 1), 2 if width < 128 else 1, hidden_mult=mult, **changes)
    tokens = max(config.chunk_memory, config.chunk_other) + 5
    return Case(config, tokens, (tokens, tokens - 8), dtype=dtype, correlation=0.5, setting=(arch,))


def rule(name: str, dtype: torch.dtype, arch: int = 80) -> Case:
    config = RULES[name]
    tokens = max(config.chunk_memory, config.chunk_other) + 7
    return Case(config, tokens, (tokens, 18), dtype=dtype, correlation=0.5, setting=(arch,))


def decaying(alpha, beta=None):
    config = ERASING if beta is None else MOMENTUM
    return Case(config, 50, rows=1, correlation=0.5, alpha=tuple(alpha * 50)[:50], beta=beta and tuple(beta * 50)[:50])


BF16, FP16 = HALF


class TestContract(Accurate, Streaming):
    def prepare(self, case):
        driver.active.arch = case.setting[0] if case.setting else 80

    backend = Backend(
        "triton", BF16,
        cuts=[
            Case(SMALL, 37, (37, 20), cuts=((0, 1, 17, 32, 37), (0, 16, 37))),
            Case(CLOCKS, 37, (37, 20), cuts=((0, 1, 17, 32, 37),)),
            Case(MOMENTUM, 37, (37, 20), cuts=((0, 1, 17, 32, 37),)),
            Case(SMALL, 37, (37, 20), cuts=((0, 1, 17, 32, 37),), setting=(90,)),
            *(Case(CARRIED, 53, (53, 20), cuts=((0, 1, 17, 32, 37, 53), (0, 16, 53)), setting=(a,)) for a in (80, 90)),
            slowly(Case(EVERYTHING, 37, (37, 20), cuts=((0, 1, 17, 32, 37),))),
            # tiles of 64 tokens, which only sm_90 and sm_100 have
            slowly(Case(LONG, 70, (70, 41), cuts=((0, 1, 40, 64, 70),), setting=(90,))),
        ],
        steps=[Case(SMALL, 19, rows=2), Case(MOMENTUM, 19, rows=1), Case(CARRIED, 19, rows=2, setting=(90,))],
        neighbours=[
            Case(SMALL, 20, (20, 9)), Case(MOMENTUM, 20, (20, 9)), Case(CARRIED, 20, (20, 9)),
            Case(TitansConfig(128, 2), 20, (20, 9), setting=(90,)),
        ],
        reads=[
            Case(SMALL, 44, (32, 32)), slowly(Case(WIDE, 44, (32, 32), setting=(90,))),
            Case(CARRIED, 44, (32, 32)), Case(CARRIED, 44, (32, 32), setting=(90,)),
            slowly(Case(EVERYTHING, 44, (32, 32))),
        ],
        empty=SMALL,
        yardstick=[
            *(table(*shape, BF16) for shape in ((32, 4, 16), (32, 1, 32), (64, 2, 16), (64, 2, 32), (128, 1, 16))),
            *(table(64, 1, 16, dtype, arch) for dtype in HALF for arch in (80, 90)),
            table(128, 1, 32, BF16), table(32, 1, 16, FP16), table(64, 1, 64, FP16, 90),
            table(32, 1, 16, SINGLE), table(64, 1, 16, SINGLE), table(128, 1, 16, SINGLE),
            table(64, 2, 16, BF16, 90), table(64, 4, 64, BF16, 90), slowly(table(32, 1, 32, SINGLE, 90)),
            slowly(table(64, 1, 32, BF16, 90)),
            table(32, 1, 64, BF16), slowly(table(64, 1, 128, BF16, 90)),  # more tokens than features
            *(slowly(table(*shape, BF16, 90)) for shape in ((32, 1, 16), (32, 1, 32), (128, 1, 16), (128, 1, 32))),
            *(slowly(table(*shape, SINGLE, 90)) for shape in ((64, 1, 16), (128, 1, 16))),
            *(slowly(table(*shape, FP16)) for shape in ((64, 1, 32), (128, 1, 16))),
            *(slowly(rule(n, BF16)) if n in SLOW else rule(n, BF16) for n in RULES),
            *(rule(n, BF16, 90) if n in USUAL_90 else slowly(rule(n, BF16, 90)) for n in RULES),
        ],
        keys=[Case(SMALL, 37, rows=1, correlation=1.0), Case(CARRIED, 37, rows=1, correlation=1.0, setting=(90,))],
        decays=[
            decaying([1e-30, 0.999]), decaying([1.0] * 20 + [0.0] + [0.999] * 29),
            decaying([1e-30, 0.999], [0.999, 0.999, 1e-30, 0.0, 1.0]),
            *(Case(CARRIED, 50, rows=1, correlation=0.5, alpha_bias=bias) for bias in (-90.0, 90.0)),
        ],
    )


def test_in_place_where_the_device_alone_knows_the_positions():
    """As a decode step in a CUDA graph: what the host thinks of positions is wrong, and not looked at."""
    w_init, inputs = (cast(t, BF16) for t in problem(SMALL, 2, 21))
    whole, end = run(SMALL, w_init, inputs, "triton", [21, 6])
    state = init_titans_state(SMALL, w_init, 2, "cpu", BF16)
    state.pos[:] = [-7, 1000]
    for t in range(21):
        one = torch.tensor([1, int(t < 6)])
        o = titans_advance_(SMALL, w_init, part(inputs, t, t + 1), state, one, backend="triton")
        rows = one.bool()
        assert torch.equal(o[rows], whole[rows, t : t + 1])
    assert same(state.synchronize(), end)


def test_a_row_reads_on_where_it_stands():
    """Both rows fill a chunk in one call, at different tokens of it."""
    w_init, inputs = (cast(t, BF16) for t in problem(SMALL, 2, 36))
    whole, end = run(SMALL, w_init, inputs, "triton", [36, 31])
    _, state = run(SMALL, w_init, part(inputs, 0, 30), "triton", [30, 25])
    later = TokenInputs(
        *(t if t is None or t.dim() == 1 else torch.stack([t[0, 30:36], t[1, 25:31]]) for t in inputs)
    )
    o, state = run(SMALL, w_init, later, "triton", state=state)
    assert torch.equal(o, torch.stack([whole[0, 30:], whole[1, 25:31]])) and same(state, end)
