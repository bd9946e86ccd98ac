"""The functional operators: the layers' results from plain tensors, every backend, and clear errors."""

import pytest
import torch
import torch.nn.functional as F
from numerics import random_layer, relative
from problems import problem

import hope_kernels as hk
from hope_kernels import ops
from hope_kernels.ops.linear import forward
from hope_kernels.ops.unit.forward import l2norm


def case(**options):
    bare = dict(conv_window=None, in_proj=False, out_norm=False, gate=False, out_proj=False)
    config = hk.TitansConfig(8, 2, chunk_memory=4, chunk_other=8, **bare, **options)
    layer = random_layer(config, 3)
    x = torch.randn(2, 21, 8, dtype=torch.float64)
    with torch.no_grad():
        q = None if config.adaptive_q else F.normalize(layer.q_proj(x).unflatten(-1, (2, 4)), dim=-1, eps=1e-6)
        return layer, x, layer._inputs(x, q, None, forward, l2norm)


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"self_modifying": False}, {"adaptive_q": True, "memory": "linear"}]
)
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_operator_is_what_the_layer_computes(options, backend):
    layer, x, inputs = case(**options)
    with torch.no_grad():
        y, end = layer(x, lengths=[21, 13])
        o, state = ops.titans_chunk(layer.config, layer.w_init, inputs, lengths=[21, 13], backend=backend)
    assert relative(o.flatten(2), y) < 1e-12 and not o[1, 13:].any()
    assert state.pos == [21, 13] and all(relative(a, b) < 1e-12 for a, b in zip(state.tensors(), end.tensors()))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_steps_equal_one_call_and_mixed_backends_continue_each_other(backend):
    layer, x, inputs = case()
    with torch.no_grad():
        whole, end = ops.titans_chunk(layer.config, layer.w_init, inputs)
        state, parts = ops.init_titans_state(layer.config, layer.w_init, 2, dtype=torch.float64), []
        for t in range(21):
            one = ops.TokenInputs(*(i[:, t : t + 1] if i is not None and i.dim() > 1 else i for i in inputs))
            before = [v.clone() for v in state.tensors()]
            o, new = ops.titans_step(layer.config, layer.w_init, one, state, backend=backend if t % 2 else None)
            assert all(torch.equal(a, b) for a, b in zip(before, state.tensors()))
            state = new
            parts.append(o)
    assert relative(torch.cat(parts, 1), whole) < 1e-12
    assert all(relative(a, b) < 1e-12 for a, b in zip(state.tensors(), end.tensors()))


def test_errors_name_operator_and_argument():
    layer, _, inputs = case()
    for changed, words in [
        (inputs._replace(x=inputs.x[..., :3]),
            r"titans_chunk: argument x has shape \[2, 21, 2, 3\], expected \[B, T, 2, 4\]"),
        (inputs._replace(q=inputs.q[:, :5]), "argument q has shape"),
        (inputs._replace(q=inputs.q.float()), "argument q has dtype"),
    ]:
        with pytest.raises(ValueError, match=words):
            ops.titans_chunk(layer.config, layer.w_init, changed)
    with pytest.raises(ValueError, match="argument w_init.w2 has shape"):
        ops.titans_chunk(layer.config, layer.w_init._replace(w2=layer.w2[:, :3]), inputs)
    with pytest.raises(ValueError, match="titans_step: argument x"):
        ops.titans_step(layer.config, layer.w_init, inputs, layer.init_state(2))


@pytest.mark.parametrize("missing", ["q", "eta_bias", "alpha_bias"])
def test_inputs_that_a_configuration_needs_are_asked_for(missing):
    config = hk.TitansConfig(32)
    w_init, inputs = problem(config, 1, 5)
    with torch.no_grad(), pytest.raises(ValueError, match=f"inputs.{missing} is None"):
        ops.titans_chunk(config, w_init, inputs._replace(**{missing: None}))
