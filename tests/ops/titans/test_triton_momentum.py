"""Momentum and adaptive_q in the memory's Triton kernel: the contract of a backend, and what momentum is."""

import pytest
import torch
from contract import Accurate, Backend, Case, Streaming
from problems import DEVICE, cast, problem, run

from hope_kernels import SelfModifyingTitans, TitansConfig, available_backends
from hope_kernels.ops import init_titans_state

pytestmark = pytest.mark.skipif(
    available_backends()["triton"] is not None, reason=f"triton: {available_backends()['triton']}"
)

titans = lambda **kw: TitansConfig.preset("titans", **{"d_model": 32, "chunk_memory": 16, **kw})
CONFIGS = {
    "titans": titans(d_model=64, num_heads=2),
    "titans, erasing": titans(dgd=True, chunk_memory=32),
    "titans, drifting": titans(retain_to="zero", step_clip=False, momentum=0.6, objective="dot"),
    "learned targets": TitansConfig(32, 1, momentum="learned"),
    "two clocks, the memory faster": TitansConfig(
        32, 1, momentum=0.5, chunk_memory=16, chunk_other=32, retain_to="zero", scalar_skip=True,
        eta_scale=0.1, step_clip=False,
    ),
    "two clocks, the memory slower": TitansConfig(
        32, 1, momentum="learned", chunk_memory=32, chunk_other=16, retention=False, dgd=False,
        scalar_skip=True, eta_scale=0.1,
    ),
    "adaptive_q": TitansConfig(32, 1, adaptive_q=True, scalar_skip=True, eta_scale=0.1),
    "adaptive_q, momentum, two clocks": TitansConfig(32, 1, adaptive_q=True, momentum="learned",
        chunk_memory=32, chunk_other=16),
}
# between them every path; each of the others is slow in what is not its own
USUAL = ["titans", "adaptive_q, momentum, two clocks"]
ERASING = titans(dgd=True, chunk_memory=32)
FULL = [
    TitansConfig.preset("titans", d_model=512, num_heads=8),
    TitansConfig.preset("titans", d_model=512, num_heads=8, chunk_memory=64),
    TitansConfig(512, 8, hidden_mult=4, chunk_memory=64, chunk_other=64, momentum="learned"),
    TitansConfig(512, 8, adaptive_q=True),
]


def usually(case, usual: bool):
    return pytest.param(case, marks=() if usual else pytest.mark.slow)


def judged(name, dtype):
    return Case(CONFIGS[name], 35, (35, 18), dtype=dtype, correlation=0.5)


def decaying(alpha, beta):
    return Case(ERASING, 50, rows=1, correlation=0.5, alpha=tuple(alpha * 50)[:50], beta=tuple(beta * 50)[:50])


class TestContract(Accurate, Streaming):
    backend = Backend(
        "triton", torch.float32, costly=True,
        cuts=[usually(Case(c, 37, (37, 20), cuts=((0, 1, 17, 32, 37),)), n == USUAL[1]) for n, c in CONFIGS.items()],
        steps=[usually(Case(CONFIGS[n], 19, rows=1), n == USUAL[0]) for n in USUAL],
        neighbours=[Case(titans(), 20, (20, 9))],
        reads=[Case(CONFIGS[n], 44, (32, 32)) for n in USUAL],
        empty=titans(),
        yardstick=[
            *(judged(n, torch.float32) for n in CONFIGS),
            *(usually(judged(n, torch.float16), n in USUAL) for n in CONFIGS),
            *(pytest.param(Case(c, 1100, dtype=dtype, correlation=0.5), marks=pytest.mark.gpu)
              for c in FULL for dtype in (torch.float32, torch.float16, torch.bfloat16)),
        ],
        keys=[usually(Case(ERASING, 33, rows=1, correlation=share), share == 1.0) for share in (0.9, 1.0)],
        decays=[
            decaying([1.0], [1.0]), decaying([1e-30, 0.999], [0.999, 0.999, 1e-30, 0.0, 1.0]),
            decaying([0.999] * 20 + [0.0], [1.0] * 17 + [0.0]),
            *(usually(decaying([a], [b]), False) for a, b in ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0))),
        ],
    )


def test_no_momentum_is_momentum_zero():
    """beta = 0: s is the last increment, and the deviations are those without momentum to rounding."""
    plain, with_s = titans(dgd=True, momentum=None, chunk_memory=32), titans(dgd=True, chunk_memory=32)
    w_init, inputs = (cast(t, torch.float32) for t in problem(plain, 1, 32, 0.5))
    state = run(plain, w_init, inputs, "triton")[1]
    ours = run(with_s, w_init, inputs._replace(beta=torch.zeros_like(inputs.eta)), "triton")[1]
    for name in ("delta2", "delta1"):
        assert torch.allclose(getattr(state, name), getattr(ours, name), rtol=1e-4, atol=1e-6)
    assert torch.linalg.matrix_rank(ours.s2[0, 0], rtol=1e-4) == 1 == torch.linalg.matrix_rank(
        ours.s1[0, 0, 0], rtol=1e-4
    )


def test_a_row_without_a_commit_keeps_its_momentum():
    config = titans()
    w_init, inputs = (cast(t, torch.float32) for t in problem(config, 2, 20))
    state = init_titans_state(config, w_init, 2, DEVICE)
    for t in (state.s2, state.s1):
        t.normal_()
    _, new = run(config, w_init, inputs, "triton", [20, 9], state)
    for name in ("s2", "s1"):
        old, ours = getattr(state, name), getattr(new, name)
        assert torch.equal(ours[1], old[1]) and not torch.equal(ours[0], old[0])


@pytest.mark.parametrize("change", [{"momentum": 0.9}, {"momentum": "learned", "adaptive_q": True}])
def test_a_layer_of_it(change):
    torch.manual_seed(0)
    layer, x = SelfModifyingTitans(TitansConfig(32, **change)).to(DEVICE), torch.randn(1, 20, 32, device=DEVICE)
    with torch.no_grad():
        (y, ours), (peer, theirs) = layer(x, backend="triton"), layer(x, backend="chunked")
    torch.testing.assert_close(y, peer, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.delta2, theirs.delta2, rtol=1e-4, atol=1e-5)
