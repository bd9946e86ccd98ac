"""The closed form on one page equals the paper's token loop, and the chunked backend equals it."""

import pytest
import torch
from numerics import relative
from problems import problem

from hope_kernels import TitansConfig
from hope_kernels.ops import init_titans_state, titans_chunk
from hope_kernels.ops.titans import reference
from hope_kernels.ops.titans.chunk import Memory, chunk, decays
from hope_kernels.ops.titans.state import Layout


def parts(layout: Layout, w, *at) -> dict[str, Memory]:
    """name -> Memory of one (row, head) of stacked weights."""
    found = {}
    for name in layout.names:
        view = {n: t[at] for n, t in layout.views(w, name).items()}
        found[name] = Memory(view["w2"], view["w1"])
    return found


@pytest.mark.parametrize("C, D, mult", [(16, 8, 1), (5, 4, 3), (1, 6, 2)])
@pytest.mark.parametrize("correlation", [0.0, 0.99])
def test_two_chunks_equal_the_token_loop_and_the_chunked_backend(C, D, mult, correlation):
    config = TitansConfig(2 * D, 2, hidden_mult=mult, chunk_memory=C, chunk_other=C)
    w_init, inputs = problem(config, 1, 2 * C, correlation)
    layout = Layout.of(config)
    o, state = titans_chunk(config, w_init, inputs, backend="chunked")
    for h in range(2):
        base = parts(layout, w_init, h)
        delta = {m: Memory(*map(torch.zeros_like, w)) for m, w in base.items()}
        head = reference.new_head(config, {m: {n: t.numpy() for n, t in w._asdict().items()} for m, w in base.items()})
        biases = float(inputs.eta_bias[h]), float(inputs.alpha_bias[h])
        for first in (0, C):
            x, q = inputs.x[0, first : first + C, h], inputs.q[0, first : first + C, h]
            ours, delta = chunk(base, delta, x, q, *biases, config.eta_scale)
            tokens = [{"x": a.numpy(), "q": b.numpy(), "eta_bias": biases[0], "alpha_bias": biases[1]} for a, b in zip(x, q)]
            init = {m: {n: t.numpy() for n, t in w._asdict().items()} for m, w in base.items()}
            exact = [reference.step(config, init, head, first + t, token) for t, token in enumerate(tokens)]
            assert relative(ours, torch.tensor(exact)) < 1e-11
            assert relative(ours, o[0, first : first + C, h]) < 1e-11
        for name, (delta2, delta1) in delta.items():
            assert relative(delta2, torch.from_numpy(head.delta[name]["w2"])) < 1e-9
            assert relative(delta1, torch.from_numpy(head.delta[name]["w1"])) < 1e-9
        for name, (delta2, delta1) in parts(layout, state.deviation, 0, h).items():
            assert relative(delta[name].w2, delta2) < 1e-9 and relative(delta[name].w1, delta1) < 1e-9
    assert init_titans_state(config, w_init, 1, dtype=torch.float64).delta2.abs().max() == 0 < state.delta2.abs().max()


def test_decays_are_products_even_of_zero():
    alpha = torch.tensor([0.5, 0.0, 1e-30, 0.25], dtype=torch.float64)
    gamma = decays(alpha)
    for t in range(5):
        for s in range(5):
            assert gamma[t, s] == (alpha[s:t].prod() if s <= t else 0)
