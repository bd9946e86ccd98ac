"""The NumPy token loop against three things it shares no code with: autograd, the nested-learning package,
and numbers worked by hand.

``rebuilt`` is the layer once more, in torch fp64, with nothing differentiated on paper: per token s of a chunk

    e_s, d_s, g_s = dL_s/dM(k_s), dL_s/d(w2 k_s), dL_s/dw        by autograd, at the chunk-start weights, v^ detached
    L = c/2 |M(k) - v^|^2   (Nested Learning eq 93)   or   -<M(k), v^>   (eq 92)
    delta <- delta (alpha I - eta k k^T) - eta~ g                matrices multiplied out; w1: alpha delta - eta~ g

Tolerances: 1e-12, or ten times the reference's own response to input noise of 1e-15. Draws that leave 1e6, or
answer that noise with more than 1e-7, say nothing about exactness and are not counted as judged.
"""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from hope_kernels import TitansConfig
from hope_kernels.ops.titans import reference

SCALAR = ("eta", "alpha")


def random_params(config: TitansConfig, rng: np.random.Generator, scale: float = 1.0) -> dict:
    """Parameters of a layer by name, fp64, every weight non-zero. scale multiplies the initial fast weights.

    w2 [H, N, D], w1 [H, D_out, N], w_skip [H, 1, D], or w [H, D_out, D]; conv [d, W]; projections [out, in];
    biases [H].
    """
    d, H, D, N = config.d_model, config.num_heads, config.head_dim, config.hidden
    params = {"eta_bias": 0.5 * rng.standard_normal(H) + config.eta_bias}

    def matrix(name, wanted, *shape):
        if wanted:
            params[name] = rng.standard_normal(shape) / shape[-1] ** 0.5

    for m in config.memories:
        out = 1 if m in SCALAR else D
        shapes = {"w": (H, out, D)} if config.memory == "linear" else {"w2": (H, N, D), "w1": (H, out, N)}
        if config.memory == "mlp" and m in SCALAR and config.scalar_skip:
            shapes["w_skip"] = (H, 1, D)
        params |= {f"{part}.{m}": scale * rng.standard_normal(s) / s[-1] ** 0.5 for part, s in shapes.items()}
    static = not config.self_modifying
    matrix("conv", config.conv_window is not None, d, config.conv_window or 1)
    matrix("in_proj", config.uses_in_proj, d, d)
    matrix("q_proj", not config.adaptive_q, d, d)
    for name, width in (("k_proj", d), ("v_proj", d), ("eta_proj", H)):
        matrix(name, static, width, d)
    matrix("alpha_proj", static and config.retention, H, d)
    matrix("beta_proj", config.momentum == "learned", H, d)
    matrix("gate_proj", config.gate, d, d)
    matrix("out_proj", config.out_proj, d, d)
    if config.retention:
        params["alpha_bias"] = 2 + rng.standard_normal(H) if config.alpha_bias is None else np.full(
            H, config.alpha_bias
        )
    if config.momentum == "learned":
        params["beta_bias"] = 1 + rng.standard_normal(H)
    if config.out_norm:
        params["norm_gain"] = 1 + 0.3 * rng.standard_normal((H, D))
    return params


def relative(ours, theirs) -> float:
    """max |ours - theirs| by the size of theirs itself; a deviation below 1e-3 is held to 1e-3."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    if ours.size == 0:
        return 0.0
    error = abs(ours - theirs).max() / max(abs(theirs).max(), 1e-3)
    return float(error) if np.isfinite(error) else float("inf")


def learned(rows) -> dict:
    """Deviations and momentum of all rows, by (kind, memory, part): [B, H, ...]."""
    first = rows[0].heads[0]
    return {
        (kind, m, part): np.array([[getattr(head, kind)[m][part] for head in row.heads] for row in rows])
        for kind in ("delta", "momentum") for m in first.delta for part in first.delta[m]
    }


def carried(row) -> list:
    """Everything a row holds, as arrays, in a fixed order."""
    out = [np.array(row.pos), np.zeros(0) if row.tail is None else row.tail, *learned([row]).values()]
    for head in row.heads:
        for tokens in (head.memory_tokens, head.other_tokens):
            out += [
                np.array(len(tokens)),
                *(np.asarray(np.nan if part is None else part) for token in tokens for part in token)
            ]
    return out


def same(a, b) -> bool:
    """Two rows hold the same, to 1e-12."""
    a, b = carried(a), carried(b)
    return (
        len(a) == len(b) and all(x.shape == y.shape and np.allclose(x, y, rtol=1e-12, atol=1e-12,
                equal_nan=True) for x, y in zip(a, b))
    )


def bounded(y, rows) -> bool:
    return bool(max(abs(y).max(), *(abs(w).max() for w in learned(rows).values())) < 1e6)


# The layer rebuilt on autograd

SIGMA = {"gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "gelu": F.gelu, "silu": F.silu}


def memory(config, w: dict, z, scalar: bool):
    """M(z), with the pre-activation and its sigma (None for a linear memory)."""
    if config.memory == "linear":
        return w["w"] @ z, None, None
    hidden = w["w2"] @ z
    a = SIGMA[config.activation](hidden)
    skip = (w["w_skip"] @ z if config.scalar_skip else 0) if scalar else z
    return skip + w["w1"] @ a, hidden, a


def gradients(config, w: dict, k, v, scalar: bool):
    """Gradient of one token's inner objective by every weight, and m of the clip."""
    w = {part: t.detach().requires_grad_() for part, t in w.items()}
    target = v if not config.own_values and not scalar else memory(config, w, v, scalar)[0].detach()
    if config.target_norm:
        target = target.clamp(-1, 1) if scalar else F.normalize(target, dim=-1, eps=1e-6)
    out, hidden, a = memory(config, w, k, scalar)
    loss = (
        -(out * target).sum() if config.objective == "dot" else config.grad_scale / 2
        * (out - target).square().sum()
    )
    if a is None:
        g = torch.autograd.grad(loss, list(w.values()))
        m = (k.square().sum() + 1e-12).sqrt()
    else:
        e, d, *g = torch.autograd.grad(loss, [out, hidden, *w.values()])
        m = (a.detach().square().sum() + d.square().sum() / (e.square().sum() + 1e-9) + 1e-12).sqrt()
    return dict(zip(w, g)), m


def write(config, w0: dict, delta: dict, momentum: dict, chunk: list, scalar: bool) -> None:
    """One chunk into one memory of one head; w0: its weights at the chunk's start."""
    g, m = zip(*[gradients(config, w0, token.k, token.v, scalar) for token in chunk])
    c = 1.0 if config.objective == "dot" else config.grad_scale
    eye = torch.eye(config.head_dim, dtype=torch.float64)
    for t, token in enumerate(chunk):
        S = c * m[t] * sum(other.eta * m[s] * (token.k @ other.k) ** 2 for s, other in enumerate(chunk))
        size = token.eta / S.clamp_min(1) if config.step_clip else token.eta
        for part in delta:
            increment = size * g[t][part]
            if config.momentum is not None:
                increment = momentum[part] = token.beta * momentum[part] + increment
            if part == "w1":
                kept = token.alpha * delta[part]
            else:
                kept = delta[part] @ (
                    token.alpha * eye - (token.eta * torch.outer(token.k, token.k) if config.dgd else 0)
                )
            delta[part] = kept - increment


def rebuilt(config: TitansConfig, params: dict, x):
    """One sequence x [T, d] from its start: y [T, d], and deviations and momentum as ``learned`` gives them,
    with B = 1."""
    p, x = {n: torch.from_numpy(t) for n, t in params.items()}, torch.from_numpy(x)
    T, H, D, names = len(x), config.num_heads, config.head_dim, config.memories
    unit = (lambda z: F.normalize(z, dim=-1, eps=1e-6)) if config.qk_l2norm else (lambda z: z)
    # F.softplus is the identity above 20: 1e-10 wrong, and eta gets there
    gate = (
        torch.sigmoid if config.eta_activation == "sigmoid" else lambda z: torch.logaddexp(z, torch.zeros_like(z))
    )
    init = [
        {m: {n.split(".")[0]: t[h] for n, t in p.items() if n.endswith("." + m)} for m in names} for h in range(H)
    ]
    start = 1.0 if config.retain_to == "zero" else 0.0
    delta = [{m: {n: start * t for n, t in init[h][m].items()} for m in names} for h in range(H)]
    momentum = [{m: {n: 0 * t for n, t in init[h][m].items()} for m in names} for h in range(H)]

    u = x
    if config.conv_window is not None:
        padded = F.pad(x.T[None], (config.conv_window - 1, 0))
        u = F.conv1d(padded, p["conv"][:, None], groups=config.d_model)[0].T
    if config.uses_in_proj:
        u = F.linear(u, p["in_proj"])

    def split(name):
        return F.linear(u, p[name]).reshape(T, H, D)

    read = [[] for _ in range(H)]
    o = torch.zeros(T, H, D, dtype=torch.float64)
    for t, h in itertools.product(range(T), range(H)):
        w = {m: {n: delta[h][m][n] + (1 - start) * init[h][m][n] for n in delta[h][m]} for m in names}
        z = u[t].reshape(H, D)[h]
        token = SimpleNamespace(alpha=torch.ones((), dtype=torch.float64), beta=config.momentum)
        if config.self_modifying:
            token.k, token.v = unit(memory(config, w["k"], z, False)[0]), memory(config, w["v"], z, False)[0]
            token.eta = memory(config, w["eta"], z, True)[0][0]
            if config.retention:
                token.alpha = torch.sigmoid(memory(config, w["alpha"], z, True)[0][0] + p["alpha_bias"][h])
        else:
            token.k, token.v, token.eta = unit(
                split("k_proj")[t, h]
            ), split("v_proj")[t, h], u[t] @ p["eta_proj"][h]
            if config.retention:
                token.alpha = torch.sigmoid(u[t] @ p["alpha_proj"][h] + p["alpha_bias"][h])
        token.eta = config.eta_scale * gate(token.eta + p["eta_bias"][h])
        if config.momentum == "learned":
            token.beta = torch.sigmoid(u[t] @ p["beta_proj"][h] + p["beta_bias"][h])
        q = unit(memory(config, w["q"], z, False)[0] if config.adaptive_q else split("q_proj")[t, h])
        o[t, h] = memory(config, w["memory"], q, False)[0]
        read[h].append(token)
        for m in names:
            C = config.chunk_memory if m == "memory" else config.chunk_other
            if (t + 1) % C == 0:
                write(config, w[m], delta[h][m], momentum[h][m], read[h][-C:], m in SCALAR)

    if config.out_norm:
        o = F.rms_norm(o, (D,), eps=1e-6) * p["norm_gain"]
    y = o.flatten(1)
    if config.gate:
        y = y * F.silu(F.linear(x, p["gate_proj"]))
    if config.out_proj:
        y = F.linear(y, p["out_proj"])
    held = {"delta": delta, "momentum": momentum}
    return y.numpy(), {(kind, m, n): torch.stack([head[m][n] for head in held[kind]])[None].numpy()
                       for kind in held for m in names for n in delta[0][m]}


OPTIONS = dict(
    num_heads=[1, 2], hidden_mult=[1, 2], memory=["mlp", "mlp", "mlp", "linear"],
    activation=["gelu_tanh", "gelu", "silu"],
    chunks=[(1, 1), (3, 3), (4, 4), (2, 4), (6, 2), (1, 3)], self_modifying=[True, True, False],
    objective=["l2", "dot"],
    grad_scale=[1.0, 2.0], retain_to=["init", "zero"], conv_window=[4, 1, None], in_proj=[None, True, False],
    eta_activation=["sigmoid", "softplus"], eta_scale=[0.05, 0.3], alpha_bias=[None, None, -800.0, 800.0],
    adaptive_q=[False, True],
    **{flag: [True, False] for flag in ("own_values", "target_norm", "step_clip", "dgd", "retention",
            "qk_l2norm", "out_norm", "gate",
                                        "out_proj", "scalar_skip")},
)


def draw_config(rng, momentum) -> TitansConfig:
    drawn = {name: values[rng.integers(len(values))] for name, values in OPTIONS.items()}
    drawn["chunk_memory"], drawn["chunk_other"] = drawn.pop("chunks")
    drawn["adaptive_q"] &= drawn["self_modifying"]
    return TitansConfig(d_model=6, momentum=momentum, **drawn)


def noisy(x, seed=0):
    """x with noise of 1e-15: random, as a common factor would vanish where keys are normalised."""
    return x * (1 + 1e-15 * np.random.default_rng(seed).standard_normal(x.shape))


def limit(config, params, x, y, state) -> float:
    """The tolerance: 1e-12, or ten times the largest answer of outputs and states to that noise."""
    with np.errstate(all="ignore"):
        other, rows = reference.layer(config, params, noisy(x))
    changed = learned(rows)
    return max(1e-12, 10 * max(relative(other, y), *(relative(changed[key], state[key]) for key in state)))


def against_autograd(config, rng, tokens, scale=1.0) -> bool:
    """Compares one random layer on one random sequence; False if the draw cannot be judged."""
    params, x = random_params(config, rng, scale), rng.standard_normal((1, tokens, config.d_model))
    with np.errstate(all="ignore"):
        y, rows = reference.layer(config, params, x)
    if not bounded(y, rows):
        return False
    state = learned(rows)
    tolerance = limit(config, params, x, y, state)
    if tolerance > 1e-6:
        return False
    expected, expected_state = rebuilt(config, params, x[0])
    errors = {"y": relative(y[0], expected)} | {key: relative(state[key], expected_state[key]) for key in state}
    worst = max(errors, key=errors.get)
    assert errors[worst] <= tolerance, (worst, errors[worst], config)
    return True


@pytest.mark.parametrize("momentum", [None, 0.7, "learned"])
def test_equals_autograd_on_random_configurations(momentum):
    rng = np.random.default_rng(1)
    judged = sum(against_autograd(draw_config(rng, momentum), rng, int(rng.integers(7, 14))) for _ in range(20))
    assert judged >= 18


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [None, 0.0, 0.7, "learned"])
def test_equals_autograd_on_many_random_configurations(momentum):
    rng = np.random.default_rng(2)
    judged = sum(against_autograd(draw_config(rng, momentum), rng, int(rng.integers(1, 40))) for _ in range(250))
    assert judged >= 200


@pytest.mark.parametrize("preset", ["default", "paper", "nested_learning", "titans"])
def test_equals_autograd_on_presets(preset):
    config = TitansConfig.preset(
        preset, d_model=8, num_heads=1 if preset == "nested_learning" else 2, chunk_memory=4, chunk_other=2
    )
    # the paper's equations blow an MLP memory up within these 17 tokens unless its weights start small
    assert against_autograd(config, np.random.default_rng(3), 17, 0.5 if preset == "paper" else 1.0)


# The nested-learning package (version 0.2.0)

BOTH = (True, False)
# objective, use_skip, use_rank1_precond, use_alpha, adaptive_q, local_conv_window
SWITCHES = list(itertools.product(("l2", "dot"), BOTH, BOTH, BOTH, BOTH, (4, None)))
# every pair of switches takes all four combinations of its values within these eight
PAIRS = [
    SWITCHES[int("".join(map(str, (a, b, c, a ^ b, a ^ c, b ^ c))), 2)] for a, b,
    c in itertools.product((0, 1), repeat=3)
]


def against_package(chunks, switches) -> bool:
    package = pytest.importorskip("nested_learning.titan.self_modifying")
    objective, skip, rank1, alpha, adaptive, conv = switches
    D, T, B = 5, {(1, 1): 6, (4, 8): 16, (8, 64): 64}[chunks], 2
    torch.manual_seed(0)
    layer = package.SelfModifyingTitans(package.SelfModifyingTitansConfig(
        dim=D, eta_scale=0.05, chunk_size_other=chunks[0], chunk_size_memory=chunks[1], objective=objective,
        use_skip=skip,
        use_rank1_precond=rank1, use_alpha=alpha, adaptive_q=adaptive, local_conv_window=conv)).double()
    config = TitansConfig.preset(
        "nested_learning", d_model=D, eta_scale=0.05, chunk_other=chunks[0], chunk_memory=chunks[1],
        objective=objective,
        scalar_skip=skip, dgd=rank1, retention=alpha, adaptive_q=adaptive, conv_window=conv)
    weights = {n: p.detach().numpy() for n, p in layer.named_parameters()}
    params = {"eta_bias": np.zeros(1), "alpha_bias": np.zeros(1), "q_proj": weights["w_q.weight"]}
    if conv:
        params["conv"] = weights["local_conv.weight"][:, 0]
    for m in config.memories:
        params |= {
            f"{part}.{m}": weights[n][None] for part in ("w2", "w1", "w_skip")
            if (n := f"m_{m}.{part}.weight") in weights
        }
    x = torch.randn(B, T, D, dtype=torch.float64)
    expected, final = layer.forward_with_updates(x, layer.init_fast_state())
    y, rows = reference.layer(config, params, x.numpy())
    if not bounded(y, rows):
        return False
    state = learned(rows)
    tolerance = limit(config, params, x.numpy(), y, state)
    if tolerance > 1e-6:
        return False
    assert relative(y, expected.numpy()) <= tolerance
    for m in config.memories:
        parts = [part for part in ("w2", "w1", "w_skip") if getattr(getattr(final, m), part) is not None]
        assert parts == [part for kind, name, part in state if (kind, name) == ("delta", m)]
        for part in parts:
            assert relative(
                state["delta", m, part][:, 0], getattr(getattr(final, m), part).numpy()
            ) <= tolerance, (m, part)
    return True


@pytest.mark.parametrize("chunks", [(1, 1), (4, 8), (8, 64)])
def test_equals_the_nested_learning_package(chunks):
    assert sum(against_package(chunks, switches) for switches in PAIRS) >= 7


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [(1, 1), (4, 8), (8, 64)])
def test_equals_the_nested_learning_package_in_every_combination(chunks):
    assert sum(against_package(chunks, switches) for switches in SWITCHES) >= 56


# Streaming

STREAMED = [
    TitansConfig(6, 2, chunk_memory=4, chunk_other=4),
    TitansConfig(6, 1, chunk_memory=3, chunk_other=6, momentum=0.9),
    TitansConfig(6, 2, chunk_memory=8, chunk_other=2, momentum="learned", adaptive_q=True, scalar_skip=True,
        hidden_mult=2),
    TitansConfig.preset("titans", d_model=6, num_heads=2, chunk_memory=4),
    TitansConfig(6, 1, memory="linear", retain_to="zero", chunk_memory=4, chunk_other=4, eta_scale=0.1,
        conv_window=None),
]


@pytest.mark.parametrize("config", STREAMED)
@settings(max_examples=6)
@given(st.lists(st.integers(0, 21), max_size=6), st.integers(0, 10**6))
def test_any_split_equals_one_call(config, cuts, seed):
    rng = np.random.default_rng(seed)
    params, x = random_params(config, rng), rng.standard_normal((1, 21, 6))
    whole, end = reference.layer(config, params, x)
    rows, parts = None, []
    for a, b in itertools.pairwise(sorted([0, 21, *cuts])):
        before = copy.deepcopy(rows)
        y, after = reference.layer(config, params, x[:, a:b], rows)
        assert rows is None or same(rows[0], before[0])
        parts, rows = [*parts, y], after
    assert relative(np.concatenate(parts, 1), whole) <= 1e-12
    assert same(rows[0], end[0]) and end[0].pos == 21


@pytest.mark.parametrize("config", STREAMED)
def test_ragged_rows_equal_rows_alone(config):
    rng = np.random.default_rng(4)
    params, calls = random_params(config, rng), [(5, 0, 9), (0, 3, 1), (8, 7, 0)]
    streams, at, rows, outs = rng.standard_normal((3, 13, 6)), [0, 0, 0], None, [[], [], []]
    for lengths in calls:
        x = np.full((3, max(lengths), 6), np.nan)
        for b, n in enumerate(lengths):
            x[b, :n] = streams[b, at[b] : at[b] + n]
            at[b] += n
        before = rows
        y, rows = reference.layer(config, params, x, rows, lengths)
        for b, n in enumerate(lengths):
            assert not y[b, n:].any() and (n or before is None or same(rows[b], before[b]))
            outs[b].append(y[b, :n])
    for b in range(3):
        alone, end = reference.layer(config, params, streams[b : b + 1, : at[b]])
        assert relative(np.concatenate(outs[b])[None], alone) <= 1e-12
        assert same(rows[b], end[0])


@pytest.mark.parametrize("config", STREAMED)
def test_pure_read_sees_the_call_and_changes_nothing(config):
    rng = np.random.default_rng(5)
    params, x = random_params(config, rng), rng.standard_normal((1, 29, 6))
    _, rows = reference.layer(config, params, x[:, :10])
    before = copy.deepcopy(rows)
    y, same_rows = reference.layer(config, params, x[:, 10:], rows, update=False)
    assert same(rows[0], before[0]) and same(same_rows[0], before[0])
    # chunk 64: no boundary falls into what is read, so an ordinary read writes nothing either, and its
    # convolution moves on
    unhurried, open_rows = config.replace(chunk_memory=64, chunk_other=64), copy.deepcopy(rows)
    expected, _ = reference.layer(unhurried, params, x[:, 10:], open_rows)
    assert relative(y, expected) <= 1e-12


# By hand: one head, static projections, every extra rule off unless named

PLAIN = dict(self_modifying=False, own_values=False, target_norm=False, step_clip=False, dgd=False)
X, Y = np.array([1.0, 0.0]), np.array([0.0, 1.0])


def write_linear(tokens, w=((0.0, 0.0), (0.0, 0.0)), **overrides) -> np.ndarray:
    """The deviation of a linear M_memory of width 2 after tokens (k, v, eta[, alpha[, beta]])."""
    config = TitansConfig(2, memory="linear", **{"chunk_memory": 1, "chunk_other": 1, **PLAIN, **overrides})
    init = {"memory": {"w": np.array(w)}}
    head = reference.new_head(config, init)
    for t, token in enumerate(tokens):
        k, v, eta, alpha, beta = (*token, 1.0, None)[:5] if len(token) < 5 else token
        reference.step(config, init, head, t, {"q": k, "k": k, "v": v, "eta": eta, "alpha": alpha, "beta": beta})
    return head.delta["memory"]["w"]


def test_one_token_into_a_linear_memory():
    assert np.array_equal(write_linear([(X, 3 * Y, 0.25)]), [[0, 0], [0.75, 0]])  # -eta e k^T with e = 0 - v
    assert np.array_equal(write_linear([(X, 3 * Y, 0.25)], grad_scale=2.0), [[0, 0], [1.5, 0]])
    assert np.array_equal(write_linear([(X, 3 * Y, 0.25)], w=np.eye(2)), [[-0.25, 0], [0.75, 0]])  # e = k - v
    # no error term
    assert np.array_equal(write_linear([(X, 3 * Y, 0.25)], w=np.eye(2), objective="dot"), [[0, 0], [0.75, 0]])
    assert np.array_equal(write_linear([(X, 3 * Y, 0.25)], target_norm=True), [[0, 0], [0.25, 0]])
    assert np.array_equal(write_linear([(X, 3 * Y, 0.25)], w=np.eye(2), own_values=True), [[-0.25, 0], [0.75, 0]])
    # v^ = M(v)
    assert np.array_equal(write_linear([(X, 3 * Y, 0.25)], w=2 * np.eye(2), own_values=True), [[-0.5, 0], [1.5, 0]])


def test_retention_and_its_base():
    first, second = (X, Y, 0.5, 1.0), (Y, X, 0.25, 0.0)
    # alpha 0 forgets
    assert np.array_equal(write_linear([first, second]), [[0, 0.25], [-0.125, 0]] * np.array([[1, 1], [0, 0]]))
    assert np.array_equal(write_linear([first, (Y, X, 0.25, 0.5)]), [[0, 0.25], [0.25, 0]])
    # retain_to="init" forgets back to w_init, "zero" forgets w_init too
    gone = (X, Y, 0.0, 0.0)
    assert np.array_equal(write_linear([first, gone], w=np.eye(2)), np.zeros((2, 2)))
    assert np.array_equal(write_linear([(X, Y, 0.0, 0.5)], w=np.eye(2), retain_to="zero"), 0.5 * np.eye(2))


def test_delta_gradient_descent_takes_the_key_out_first():
    # delta k = v/2 after the first; then delta (I - k k^T / 2) = v/4 and -eta e = (v - v/2)/2 = v/4
    assert np.array_equal(write_linear([(X, Y, 0.5), (X, Y, 0.5)], dgd=True), [[0, 0], [0.5, 0]])
    assert np.array_equal(write_linear([(X, Y, 0.5), (X, Y, 0.5)]), [[0, 0], [0.75, 0]])
    # alpha stands beside k k^T, not before it: alpha/2 - 1/4 of v, plus the write v/4
    assert np.array_equal(write_linear([(X, Y, 0.5), (X, Y, 0.5, 0.25)], dgd=True), [[0, 0], [0.125, 0]])


def test_gradients_are_those_of_the_chunks_start():
    # both tokens see e = -v; a second chunk would see e = -v/2
    assert np.array_equal(write_linear([(X, Y, 0.5)] * 2, chunk_memory=2, chunk_other=2), [[0, 0], [1.0, 0]])
    # still open
    assert np.array_equal(write_linear([(X, Y, 0.5)], chunk_memory=2, chunk_other=2), np.zeros((2, 2)))


def test_the_delta_rule_keeps_the_order_of_a_chunk():
    """The newer of two values told for a key is all that is left of them, whatever stands beside."""
    fields = {"dgd": True, "objective": "dot", "chunk_memory": 4, "chunk_other": 4}
    tokens = [(X, Y, 1.0), (Y, X, 1.0), (X, 3 * Y, 1.0), (Y, 2 * X, 1.0)]
    assert np.array_equal(write_linear(tokens, **fields), [[0, 2], [3, 0]])
    assert np.array_equal(write_linear(tokens, **fields | {"dgd": False}), [[0, 3], [4, 0]])


def test_step_clip():
    chunks = dict(chunk_memory=4, chunk_other=4, step_clip=True)
    # |k| = m = 1: four equal keys have S = 4 eta = 2, half of each step, and together write v exactly
    assert write_linear([(X, Y, 0.5)] * 4, **chunks) == pytest.approx(np.array([[0, 0], [1.0, 0]]), abs=1e-11)
    assert write_linear(
        [(X, Y, 0.5)] * 4, **chunks, grad_scale=2.0
    ) == pytest.approx(np.array([[0, 0], [1.0, 0]]), abs=1e-11)
    # orthogonal keys, S = 2 eta = 1, are not touched; "dot" knows no grad_scale
    tokens = [(X, Y, 0.5), (Y, X, 0.5)] * 2
    assert write_linear(tokens, **chunks) == pytest.approx(np.array([[0, 1.0], [1.0, 0]]), abs=1e-11)
    assert write_linear(
        tokens, **chunks, objective="dot", grad_scale=2.0
    ) == pytest.approx(np.array([[0, 1.0], [1.0, 0]]), abs=1e-11)


def test_momentum_has_the_step_inside():
    # s: -v/2, then beta s - v/4 (e = -v/2 once half is written), with beta = 1/2: delta = v/2 + (v/4 + v/4)
    assert np.array_equal(write_linear([(X, Y, 0.5, 1.0, 0.5)] * 2, momentum=0.5), [[0, 0], [1.0, 0]])
    # eta 0 writes nothing new, but what is in motion goes on
    assert np.array_equal(
        write_linear([(X, Y, 0.5, 1.0, 0.5), (X, Y, 0.0, 1.0, 0.5)], momentum=0.5), [[0, 0], [0.75, 0]]
    )
    assert np.array_equal(write_linear([(X, Y, 0.5, 1.0, 0.0)] * 2, momentum=0.0), write_linear([(X, Y, 0.5)] * 2))


def test_one_token_into_a_two_layer_memory():
    # w2 = 0, w1 = 2, silu: z = 0, a = 0, sigma' = 1/2; k = 1, v = 3: e = k - v = -2, d = sigma' w1 e = -2;
    # only w2 moves, by -eta d k
    config = TitansConfig(1, chunk_memory=1, chunk_other=1, activation="silu", **PLAIN)
    init = {"memory": {"w2": np.zeros((1, 1)), "w1": np.full((1, 1), 2.0)}}
    head = reference.new_head(config, init)
    one = {"q": np.ones(1), "k": np.ones(1), "v": np.full(1, 3.0), "eta": 0.5}
    assert reference.step(config, init, head, 0, one) == 1.0  # what is read is the memory before its own write
    assert head.delta["memory"] == {"w2": 1.0, "w1": 0.0}
    s = 1 / (1 + np.exp(-1.0))
    assert reference.step(config, init, head, 1, one) == pytest.approx(1 + 2 * s, rel=1e-15)
    # now z = 1, a = s, e = 1 + 2 s - 3, d = 2 e s (2 - s)
    e = 2 * s - 2
    assert head.delta["memory"]["w1"] == pytest.approx(-0.5 * e * s, rel=1e-14)
    assert head.delta["memory"]["w2"] == pytest.approx(1 - 0.5 * 2 * e * s * (2 - s), rel=1e-14)


def test_targets_of_scalar_memories_are_clamped():
    config = TitansConfig(2, memory="linear", target_norm=True)
    w = {"w": np.array([[4.0, -0.5]])}
    assert reference.inner_error(config, w, 0 * X, X, True) == -1.0  # M(v) = 4, clamped to 1
    assert reference.inner_error(config, w, 0 * X, Y, True) == 0.5
    assert reference.inner_error(config.replace(target_norm=False), w, 0 * X, X, True) == -4.0


def test_activations_at_known_points():
    z = np.array([0.0, 1.0, -1.0])
    normal = np.array([0.5, 0.8413447460685429, 0.15865525393145707])  # cumulative normal distribution
    density = np.array([0.3989422804014327, 0.24197072451914337, 0.24197072451914337])
    assert reference.sigma(z, "gelu") == pytest.approx(z * normal, abs=1e-15)
    assert reference.sigma_prime(z, "gelu") == pytest.approx(normal + z * density, abs=1e-15)
    assert reference.sigma(z, "gelu_tanh") == pytest.approx(
        [0, 0.8411919906082768, -0.15880800939172324], abs=1e-15
    )
    assert reference.norm(np.zeros(3)) == pytest.approx(0) and reference.norm(
        np.full(4, 1e-7)
    ) == pytest.approx(0.1)
    assert reference.sigmoid(np.array([-800.0, 800.0])).tolist() == [0.0, 1.0]
