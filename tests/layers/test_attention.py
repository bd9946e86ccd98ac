"""Causal attention: values against a per-token softmax in NumPy, the streaming contract, and states that
share one cache."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from numerics import relative

from hope_kernels import CMSConfig, HopeConfig, load_state
from hope_kernels.layers.attention import AttentionState, CausalAttention
from hope_kernels.ops.attention import forward as attention_product

D_MODEL, TOKENS = 16, 40
TIGHT = 1e-10


def layer(seed=0, segment=None, **options) -> CausalAttention:
    """A layer in fp64 with random biases."""
    torch.manual_seed(seed)
    cms = None if segment is None else CMSConfig(D_MODEL, (segment,))
    attn = CausalAttention(
        HopeConfig(10, D_MODEL, 1, mixer="attention", cms=cms, **{"num_heads": 4, **options}), dtype=torch.float64
    )
    with torch.no_grad():
        for p in attn.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return attn


LAYERS = {
    "full": layer(),
    "grouped": layer(num_kv_heads=2, attention_bias=True),
    "one-kv-head": layer(num_kv_heads=1, rope_theta=500.0),
    "window": layer(window=7, num_kv_heads=2),
    "window-bias": layer(window=13, attention_bias=True),
    "window-1": layer(window=1),
    "window-segment": layer(window=3, segment=4),
    "sinks": layer(window=7, sinks=4, num_kv_heads=2),
    "more sinks than window": layer(window=3, sinks=9, attention_bias=True),
    "one sink": layer(window=2, sinks=1, num_kv_heads=1),
    "sinks and window beyond the text": layer(window=30, sinks=20),
    "sinks-segment": layer(window=4, sinks=2, segment=4),
    "head width, norms, scale": layer(head_dim=6, qk_norm=True, attention_scale=0.7, num_kv_heads=2),
    "norms, scale, sinks": layer(window=5, sinks=3, qk_norm=True, attention_scale=0.7, num_kv_heads=2),
}
named = pytest.mark.parametrize("attn", LAYERS.values(), ids=LAYERS.keys())


def tokens(batch: int, n: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, n, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def naive(attn: CausalAttention, x: torch.Tensor) -> np.ndarray:
    """One row x [T, d_model], token by token and head by head; RoPE as a complex product of the pairs (i, i +
    D/2)."""
    c = attn.config
    w = {n: p.detach().numpy() for n, p in attn.named_parameters()}
    D, T, x = c.head_dim or c.d_model // c.num_heads, x.shape[0], x.detach().numpy()

    def heads(name: str, count: int) -> np.ndarray:
        u = (x @ w[f"{name}_proj.weight"].T + w.get(f"{name}_proj.bias", 0.0)).reshape(T, count, D)
        gain = w.get(f"{name}_norm.weight")
        return u if gain is None else gain * u / np.sqrt((u**2).mean(-1, keepdims=True) + c.norm_eps)

    def turned(u: np.ndarray, t: int) -> np.ndarray:
        pairs = (u[: D // 2] + 1j * u[D // 2 :]) * np.exp(1j * t * c.rope_theta ** (-2 * np.arange(D // 2) / D))
        return np.concatenate([pairs.real, pairs.imag])

    q, k, v = heads("q", c.num_heads), heads("k", c.num_kv_heads), heads("v", c.num_kv_heads)
    scale = D**-0.5 if c.attention_scale is None else c.attention_scale
    y = np.zeros((T, c.num_heads * D))
    for t in range(T):
        seen = [s for s in range(t + 1) if c.window is None or s > t - c.window or s < c.sinks]
        # the position at which t stands for token s
        at = {s: t if c.window is None or s >= c.sinks else min(t, c.sinks + c.window - 1) for s in seen}
        for h in range(c.num_heads):
            g = h // (c.num_heads // c.num_kv_heads)
            score = scale * np.array([turned(q[t, h], at[s]) @ turned(k[s, g], s) for s in seen])
            p = np.exp(score - score.max())
            y[t, h * D : (h + 1) * D] = p @ v[seen, g] / p.sum()
    return y @ w["o_proj.weight"].T


def close(a, b, tolerance=TIGHT) -> bool:
    return a.shape == b.shape and relative(a, b) < tolerance


def pieces(attn, x, cuts, state=None, grad=False):
    """x read in calls that end at ``cuts``."""
    ends = [*sorted(cuts), x.shape[1]]
    with torch.set_grad_enabled(grad):
        parts = []
        for a, b in zip([0, *ends], ends):
            y, state = attn(x[:, a:b], state)
            parts.append(y)
    return torch.cat(parts, 1), state


def goes_on(attn, state, x) -> torch.Tensor:
    """What an independent copy of ``state`` answers to x."""
    with torch.no_grad():
        return attn(x, state.clone())[0]


@named
def test_equals_the_softmax_of_each_token(attn):
    x = tokens(2, TOKENS)
    y, state = attn(x)
    assert state.pos == [TOKENS] * 2
    for b in range(2):
        assert close(y[b], naive(attn, x[b]))
    with torch.no_grad():
        assert close(attn(x)[0], y)


@pytest.mark.parametrize("window, sinks", [(7, 4), (3, 9), (1, 1), (5, 0)])
def test_sinks_are_seen_as_if_what_left_the_window_had_never_been(window, sinks):
    """A query answers as one that has read the sinks and the window's tokens, and nothing else."""
    attn = layer(window=window, sinks=sinks, num_kv_heads=2)
    plain = CausalAttention(attn.config.replace(window=None, sinks=0), dtype=torch.float64)
    plain.load_state_dict(attn.state_dict())
    x = tokens(2, TOKENS)
    with torch.no_grad():
        y, _ = attn(x)
        for t in range(sinks + window, TOKENS):
            short = torch.cat([x[:, :sinks], x[:, t - window + 1 : t + 1]], 1)
            assert close(plain(short)[0][:, -1], y[:, t])


def test_blocks_of_queries_equal_one_product(monkeypatch):
    x = tokens(2, 30)
    for attn in LAYERS.values():
        with torch.no_grad():
            _, state = attn(tokens(2, 9, 5))
            whole = attn(x, state.clone())[0]
            ragged = attn(x, state.clone(), [30, 17])[0]
            fresh = attn(x)[0]
            monkeypatch.setattr(attention_product, "BLOCK", 4)
            assert close(attn(x, state.clone())[0], whole)
            assert close(attn(x, state.clone(), [30, 17])[0], ragged)
            assert close(attn(x)[0], fresh)
            monkeypatch.undo()


@named
@pytest.mark.parametrize("grad", [False, True])
@settings(max_examples=4)
@given(cuts=st.lists(st.integers(0, TOKENS), max_size=6), seed=st.integers(0, 99))
def test_any_split_equals_one_call(attn, grad, cuts, seed):
    x = tokens(2, TOKENS, seed)
    y, one = pieces(attn, x, [], grad=grad)
    z, many = pieces(attn, x, cuts, grad=grad)
    assert close(y, z) and one.pos == many.pos
    more = tokens(2, 9, seed + 1)
    assert close(goes_on(attn, one, more), goes_on(attn, many, more))


@named
@pytest.mark.parametrize("grad", [False, True])
def test_token_by_token_equals_one_call(attn, grad):
    # past a renewal of the cache
    x = tokens(2, 100)
    y, _ = pieces(attn, x, [], grad=grad)
    z, _ = pieces(attn, x, range(1, 100), grad=grad)
    assert close(y, z)


@named
@settings(max_examples=4)
@given(
    calls=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=5),
    grad=st.booleans(), seed=st.integers(0, 99),
)
def test_ragged_rows_equal_rows_alone(attn, calls, grad, seed):
    """Padding is NaN: nothing of it may arrive anywhere."""
    rows, state, alone = [tokens(1, sum(n), seed + b)[0] for b, n in enumerate(zip(*calls))], None, [None] * 3
    at = [0, 0, 0]
    with torch.set_grad_enabled(grad):
        for lengths in calls:
            x = torch.full((3, max(lengths), D_MODEL), float("nan"), dtype=torch.float64)
            for b, n in enumerate(lengths):
                x[b, :n] = rows[b][at[b] : at[b] + n]
            y, state = attn(x, state, torch.tensor(lengths))
            for b, n in enumerate(lengths):
                if n:
                    z, alone[b] = attn(x[b : b + 1, :n], alone[b])
                    assert close(y[b, :n], z[0])
                assert not y[b, n:].any()
                at[b] += n
    assert state.pos == at


@named
def test_an_empty_row_is_untouched(attn):
    with torch.no_grad():
        _, state = attn(tokens(3, 70))
        before = state.clone()
        attn(tokens(3, 5, 2), state, [5, 0, 2])
    assert state.pos == [75, 70, 72]
    x = tokens(1, 3, 3)
    assert close(goes_on(attn, state.select([1]), x), goes_on(attn, before.select([1]), x))
    y, same = attn(tokens(3, 4)[:, :0], state)
    assert y.shape == (3, 0, D_MODEL) and same.pos == state.pos
    y, _ = attn(tokens(3, 4), state, [0, 0, 0])
    assert y.shape == (3, 4, D_MODEL) and not y.any()


def test_padding_reaches_no_gradient():
    for attn in LAYERS.values():
        x = tokens(2, 6)
        x[1, 2:] = float("nan")
        with torch.no_grad():
            _, state = attn(tokens(2, 5, 2))
        for lengths in ([6, 2], [6, 0]):
            for given_state in (None, state):
                y, _ = attn(x, given_state, lengths)
                grads = torch.autograd.grad(y.sum(), list(attn.parameters()))
                assert all(g.isfinite().all() for g in grads)


@named
def test_rows_selected_and_reordered_go_on_as_they_were(attn):
    x = tokens(3, 20)
    with torch.no_grad():
        _, state = attn(x, None, [20, 5, 11])
        kept = state.clone()
        order = [2, 0, 0, -2]
        picked = state.select(torch.tensor([2, 0, 0, 1]))
        assert picked.pos == state.select(order).pos == [11, 20, 20, 5]
        more = tokens(4, 12, 7)
        y, _ = attn(more, picked)
        for row, b in enumerate([2, 0, 0, 1]):
            assert close(y[row], attn(more[row : row + 1], kept.select([b]))[0][0])
        z = tokens(3, 4, 8)
        assert close(goes_on(attn, state, z), goes_on(attn, kept, z))
    with pytest.raises(IndexError, match="row 3 does not exist"):
        state.select([3])


@named
def test_saved_and_loaded_goes_on_as_if_never_stopped(attn, tmp_path):
    x, lengths = tokens(3, 30), [30, 3, 17]
    with torch.no_grad():
        _, state = attn(x, None, lengths)
        state.save(tmp_path / "s.safetensors")
        loaded = load_state(tmp_path / "s.safetensors")
        assert isinstance(loaded, AttentionState) and loaded.pos == state.pos == lengths
        assert loaded.k.shape[1] == max(state.used()) < state.k.shape[1]
        for n in (1, 9, 1):
            more = tokens(3, n, n)
            assert close(attn(more, loaded)[0], attn(more, state)[0])
    other = layer(5, num_heads=attn.config.num_heads)
    other.config = attn.config
    if {n: p.shape for n, p in other.named_parameters()} == {n: p.shape for n, p in attn.named_parameters()}:
        with pytest.raises(ValueError, match="belongs to weights"):
            other(tokens(3, 1), load_state(tmp_path / "s.safetensors"))


def test_a_file_depends_on_the_tokens_that_count_alone(tmp_path):
    attn = LAYERS["full"]
    with torch.no_grad():
        _, a = attn(tokens(2, 9), None, [9, 4])
        b = a.snapshot()
        attn(tokens(2, 5, 2), a)
        _, c = attn(tokens(2, 9), None, [9, 4])
    for name, state in (("b", b), ("c", c)):
        state.save(tmp_path / name)
    b, c = load_state(tmp_path / "b"), load_state(tmp_path / "c")
    assert b.k.shape == (2, 9, 4, 4) and not b.k[1, 4:].any() and not b.v[1, 4:].any()
    assert all(torch.equal(s, t) for s, t in zip(b.tensors(), c.tensors())) and b.pos == c.pos == [9, 4]


FORKS = [("original", "snapshot"), ("copy", "snapshot"), ("copy", "detach")]  # one of shared memory goes first
MORE_FORKS = [("original", "detach"), ("original", "clone"), ("copy", "clone")]


@named
@pytest.mark.parametrize("first, fork", [*FORKS, *(pytest.param(*f, marks=pytest.mark.slow) for f in MORE_FORKS)])
def test_both_sides_of_a_fork_go_on(attn, fork, first):
    """Two states read different tokens in turns from one history, each as if it were alone."""
    x = tokens(2, 20)
    with torch.no_grad():
        _, state = attn(x, None, [20, 13])
        copy = getattr(state, fork)()
        if fork != "clone":
            assert copy.k.data_ptr() == state.k.data_ptr()
        sides = [(state, state.clone(), 10), (copy, state.clone(), 20)]
        for turn in range(45):
            for side, alone, seed in sides if first == "original" else sides[::-1]:
                n = [1, 3, 1, 0][turn % 4]
                more = tokens(2, n, seed + 100 * turn)
                assert close(attn(more, side)[0], attn(more, alone)[0])
    assert state.pos == copy.pos


def test_a_snapshot_stays_and_costs_no_copy():
    for attn in LAYERS.values():
        with torch.no_grad():
            _, state = attn(tokens(2, 10))
            kept, history = state.snapshot(), state.clone()
            storage = state.k.data_ptr()
            y, _ = attn(tokens(2, 4, 2), state)
            assert state.k.data_ptr() == storage == kept.k.data_ptr()
            for t in range(60):
                attn(tokens(2, 1, t), state)
            assert state.k.data_ptr() != storage and kept.pos == [10, 10] and state.pos == [74, 74]
            assert close(goes_on(attn, kept, tokens(2, 4, 2)), y)
            assert close(goes_on(attn, history, tokens(2, 4, 2)), y)


def test_a_replay_from_a_snapshot_writes_nothing():
    """constant_memory, with and without a graph: values and gradients of the tokens read before, and not one
    slot touched."""
    for attn in LAYERS.values():
        x, more = tokens(2, 10), tokens(2, 4, 2)
        with torch.no_grad():
            _, state = attn(x)
            snapshot = state.snapshot()
            y, _ = attn(more, state)
        before, versions = [t.clone() for t in state.tensors()], [t._version for t in state.tensors()]
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                z, after = attn.scan(more.clone().requires_grad_(grad), snapshot, [4, 4], constant_memory=True)
            assert close(y, z) and after.pos == [14, 14] and not after.k.requires_grad
            assert [t._version for t in state.tensors()] == versions
            assert all(torch.equal(a, b) for a, b in zip(before, state.tensors()))
            assert close(goes_on(attn, after, more), goes_on(attn, state, more))


@pytest.mark.parametrize("name", ["window-segment", "sinks-segment"])
def test_merge_takes_rows_of_one_history(name):
    """What a learning model keeps: row b of the later state, the other rows as the snapshot had them, up to a
    segment back, wherever the cache was renewed in between."""
    attn = LAYERS[name]
    x, renewed = tokens(2, 3, 9), 0
    with torch.no_grad():
        _, state = attn(tokens(2, 50), None, [50, 47])
        for segment in range(20):
            snapshot, history, storage = state.snapshot(), state.clone(), state.k.data_ptr()
            for t in range(4):
                attn(tokens(2, 1, 4 * segment + t), state)
                renewed += t < 3 and state.k.data_ptr() != storage
            merged = snapshot.merge(state, [True, False])
            assert merged.pos == [state.pos[0], snapshot.pos[1]]
            y = goes_on(attn, merged, x)
            assert close(y[0], goes_on(attn, state, x)[0]) and close(y[1], goes_on(attn, history, x)[1])
    assert renewed


def test_copies_count_their_own_slots():
    """A clone or a selection, and what it was made from, append in place in their own storage."""
    attn = LAYERS["full"]
    with torch.no_grad():
        _, state = attn(tokens(2, 5))
        sides = [state, state.clone(), state.select([1, 0]), state.select([0, 0, 1]), state.snapshot().clone()]
        storage = [s.k.data_ptr() for s in sides]
        for t in range(20):
            for s in sides:
                attn(tokens(s.batch, 1, t), s)
        assert [s.k.data_ptr() for s in sides] == storage and len(set(storage)) == len(sides)
        assert all(s.filled == s.used() == [25] * s.batch for s in sides)


def test_every_query_sees_something(monkeypatch):
    """Padding included: where softmax over nothing is NaN, it would reach gradients."""
    seen = []
    inner = attention_product.F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, **options):
        mask = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask > -torch.inf
        seen.append(mask is None or bool(mask.any(-1).all()))
        return inner(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(attention_product.F, "scaled_dot_product_attention", spy)
    for attn in LAYERS.values():
        _, state = attn(tokens(3, 9), None, [9, 0, 4])
        for lengths in ([6, 2, 0], [0, 0, 6], [1, 0, 6]):
            attn(tokens(3, 6), state, lengths)
            with torch.no_grad():
                attn(tokens(3, 6), state.clone(), lengths)
    assert len(seen) == 7 * len(LAYERS) and all(seen)


@named
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_advanced_in_place_without_a_graph(attn, mode):
    x = tokens(2, 12)
    whole = attn(x)[0]
    with mode():
        state = attn.init_state(2)
        y, same = attn(x[:, :5], state)
        assert same is state and state.pos == [5, 5]
        storage = state.k.data_ptr()
        z, _ = attn(x[:, 5:], state)
        assert state.pos == [12, 12] and state.k.data_ptr() == storage
    assert close(torch.cat([y, z], 1), whole)
    with torch.no_grad():
        more = tokens(2, 3, 4)
        y, same = attn(more, state)
        assert same is state and close(y, attn(torch.cat([x, more], 1))[0][:, 12:])


@named
def test_update_false_changes_nothing(attn):
    x = tokens(2, 6)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            _, state = attn(tokens(2, 50, 2))
            before, pos = [t.clone() for t in state.tensors()], list(state.pos)
            y, same = attn(x, state, update=False)
            assert same is state and state.pos == pos
            assert all(torch.equal(a, b) for a, b in zip(before, state.tensors()))
            assert close(y, attn(x, state)[0])


@named
def test_grad_mode_leaves_the_given_state(attn):
    with torch.no_grad():
        _, state = attn(tokens(2, 10), None, [10, 6])
    before, versions = [t.clone() for t in state.tensors()], [t._version for t in state.tensors()]
    x = tokens(2, 5, 2)
    y, new = attn(x, state, [5, 2])
    assert new is not state and state.pos == [
        10, 6
    ] and new.pos == [15, 8] and new.k.requires_grad and new.v.requires_grad
    assert [t._version for t in state.tensors()] == versions
    assert all(torch.equal(a, b) for a, b in zip(before, state.tensors()))
    nothing, empty = attn(x[:, :0], new)
    with torch.no_grad():
        attn(x, empty)
    assert new.pos == [15, 8]


def test_reading_on_without_a_graph_leaves_the_graph_alone():
    for attn in LAYERS.values():
        y, state = attn(tokens(2, 4), None, [4, 2])
        z, state = attn(tokens(2, 2, 2), state)
        expected = torch.autograd.grad(z.sum(), list(attn.parameters()), retain_graph=True)
        with torch.no_grad():
            detached = state.detach()
            for t in range(3):
                attn(tokens(2, 2, t), detached, [0, 2])
                attn(tokens(2, 2, t), state, [0, 1])
        found = torch.autograd.grad(z.sum(), list(attn.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(expected, found))


@pytest.mark.parametrize(
    "name", ["grouped", "window", "window-segment", "one sink", "sinks", "head width, norms, scale"]
)
def test_gradcheck_through_two_calls(name):
    attn = LAYERS[name]
    with torch.no_grad():
        _, state = attn(tokens(2, 3, 4))

    def two(a, b):
        y, s = attn(a, state, [2, 1])
        z, s = attn(b, s, [1, 2])
        return y, z, s.k[:, 3:6]

    inputs = [tokens(2, 2, s).requires_grad_() for s in (2, 3)]
    assert torch.autograd.gradcheck(two, inputs, fast_mode=True)


@named
def test_gradients_of_a_split_equal_those_of_one_call(attn):
    # long enough that a windowed cache is trimmed under the graph
    x = tokens(2, 150).requires_grad_()
    weight = tokens(2, 150, 2)
    wanted = [x, *attn.parameters()]
    one = torch.autograd.grad((pieces(attn, x, [], grad=True)[0] * weight).sum(), wanted)
    many = torch.autograd.grad((pieces(attn, x, range(10, 150, 10), grad=True)[0] * weight).sum(), wanted)
    assert all(close(a, b) for a, b in zip(one, many))


@named
def test_inner_gradient_is_that_of_this_call_alone(attn):
    """constant_memory on a detached state: what was read before is a constant, what this call reads is not."""
    past, x = tokens(2, 12).requires_grad_(), tokens(2, 5, 2).requires_grad_()
    _, carried = attn(past)
    y, after = attn.scan(x, carried.detach(), [5, 5], constant_memory=True)
    z, _ = attn(x, carried.detach())
    assert close(y, z) and not after.k.requires_grad and after.pos == [17, 17]
    inner, = torch.autograd.grad(y.square().sum(), x)
    assert close(inner, torch.autograd.grad(z.square().sum(), x)[0])
    y, _ = attn.scan(x, carried.detach(), [5, 5], constant_memory=True)
    assert torch.autograd.grad(y.sum(), past, allow_unused=True)[0] is None


@pytest.mark.parametrize("name", ["window-segment", "sinks-segment"])
def test_a_window_bounds_the_cache(name):
    attn, bound = LAYERS[name], 64
    x = tokens(2, 1500)
    with torch.no_grad():
        whole, state = attn(x)
        assert state.k.shape[1] <= bound
        state = None
        for a in range(0, 1500, 125):
            y, state = attn(x[:, a : a + 125], state, [125, 125])
            assert state.k.shape[1] <= bound and close(y, whole[:, a : a + 125])
    state = None
    for a in range(0, 1500, 125):
        _, state = attn(x[:, a : a + 125], state)
        state = state.detach()
        assert state.k.shape[1] <= max(bound, 125)


def test_moving_and_casting():
    attn = CausalAttention(HopeConfig(10, D_MODEL, 1, mixer="attention", num_heads=4))
    x = tokens(2, 9).float()
    with torch.no_grad():
        _, state = attn(x)
        same = state.to("cpu")
        y, _ = attn(x, same)
        assert torch.equal(attn(x, state)[0], y) and close(attn(x[:, :2], same)[0], attn(x[:, :2], state)[0], 1e-5)
        double = state.to(torch.float64)
        assert double.k.dtype == torch.float64 and double.pos == state.pos
        with pytest.raises(
            ValueError, match="CausalAttention: state.k has dtype torch.float64, expected torch.float32"
        ):
            attn(x, double)
        assert close(attn.double()(x.double(), double)[0], attn.float()(x, state)[0].double(), 1e-5)


@pytest.mark.parametrize("options", [{}, {"sinks": 3}, {"sinks": 3, "qk_norm": True, "head_dim": 8}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_near(dtype, options):
    exact = layer(window=20, num_kv_heads=2, **options)
    attn = CausalAttention(exact.config, dtype=dtype)
    attn.load_state_dict(exact.state_dict())
    x = tokens(2, TOKENS)
    with torch.no_grad():
        y, state = pieces(attn, x.to(dtype), [7, 8, 30])
    assert y.dtype == state.k.dtype == dtype
    assert relative(y.double(), exact(x)[0]) < 30 * torch.finfo(dtype).eps


def test_a_late_position_keeps_its_angle():
    """Attention depends on distances: far from the start, fp32 gives what it gives near it."""
    attn = CausalAttention(HopeConfig(10, D_MODEL, 1, mixer="attention", num_heads=4))
    x = tokens(1, 10).float()
    with torch.no_grad():
        near, _ = attn(x)
        far = attn.init_state(1)
        far.pos[0] = far.base[0] = 3_000_001
        y, _ = attn.scan(x, far, [10])  # a call would ask where the tokens before are
        assert close(y, near, 1e-5)


def test_bad_input_is_named():
    attn = LAYERS["full"]
    x = tokens(2, 3)
    _, state = attn(x)
    for bad, error, message in (
        (lambda: attn(x[..., :8]), ValueError,
            r"CausalAttention: argument x has shape \[2, 3, 8\], expected \[B, T, 16\]"),
        (lambda: attn(x[0]), ValueError, r"argument x has shape \[3, 16\]"),
        (lambda: attn(x.float()), ValueError, "argument x has dtype torch.float32, expected torch.float64"),
        (lambda: attn(x.tolist()), TypeError, "CausalAttention: argument x is a list, expected a tensor"),
        (lambda: attn(x, lengths=[3]), ValueError, "argument lengths has 1 entries, expected one per row"),
        (lambda: attn(x, lengths=[3, 4]), ValueError, "argument lengths has 4 for row 1, expected 0 to 3"),
        (lambda: attn(x[:1], state), ValueError, "argument state has 2 rows, expected 1"),
        (lambda: attn(x, "state"), TypeError, "argument state is a str, expected a AttentionState"),
        (lambda: LAYERS["window"](x, state), ValueError, "argument state belongs to"),
        (lambda: attn(x * float("inf"), check_finite=True), ValueError, "non-finite value in row 0"),
        (lambda: CausalAttention(HopeConfig(9, 8, 2, mixer="attention", window=(3, None))), ValueError,
            r"HopeConfig: window is \(3, None\), expected one value, as in the configuration of one block"),
    ):
        with pytest.raises(error, match=message):
            bad()


@pytest.mark.parametrize("change, message", [
    ({"sinks": 4}, "sinks is 4, expected 0 where nothing is cut off: window of block 0 is None"),
    ({"sinks": 4, "window": (8, None)}, "sinks is 4, expected 0 where .* window of block 1 is None"),
    ({"sinks": -1, "window": 8}, "sinks is -1, expected an integer >= 0"),
    ({"sinks": 2.0, "window": 8}, "sinks is 2.0"), ({"sinks": True, "window": 8}, "sinks is True"),
    ({"window": (8, 8, 8)}, r"window is \(8, 8, 8\), expected one value, or one per block \(2\)"),
    ({"window": (8, 0)}, "window is 0, expected a positive integer"),
    ({"rope_theta": (1e4, -1.0)}, "rope_theta is -1.0, expected a positive number"),
    ({"rope_scaling": (None, "linear")}, "rope_scaling is 'linear'"),
    ({"head_dim": 5}, "head_dim is 5, expected an even width"), ({"head_dim": 0}, "head_dim is 0"),
    ({"head_dim": 8, "mixer": "titans"}, "head_dim is 8, expected None for mixer='titans'"),
    ({"attention_scale": 0.0}, "attention_scale is 0.0, expected a positive number"),
    ({"embed_scale": -1.0}, "embed_scale is -1.0"), ({"qk_norm": 2}, "qk_norm is 2"),
    ({"post_norm": "yes"}, "post_norm is 'yes'"), ({"num_heads": 3}, "d_model is 16, expected a multiple"),
])
def test_bad_configurations_are_named(change, message):
    with pytest.raises(ValueError, match=f"HopeConfig: {message}"):
        HopeConfig(**{"vocab_size": 9, "d_model": 16, "num_layers": 2, "mixer": "attention", **change})


def test_the_configuration_of_a_block():
    config = HopeConfig(9, 16, 3, mixer="attention", num_heads=3, head_dim=4, window=[8, None, 8], sinks=[2, 0, 2],
                        rope_scaling=[None, {"rope_type": "linear", "factor": 2}, None])
    assert [c.sight for c in config.blocks] == [(8, 2), (None, 0), (8, 2)] and config.blocks[0] is config.blocks[2]
    assert [c.rope[1] and c.rope[1].factor for c in config.blocks] == [None, 2, None]
    plain = config.replace(window=8, sinks=2, rope_scaling=None)
    assert all(c is plain for c in plain.blocks)
    assert HopeConfig.from_dict(config.to_dict()) == config


def test_an_abandoned_call_leaves_no_trace():
    """A call that wrote NaN keys after what counts and was then thrown away, as a model does with diverged
    logits."""
    for attn in LAYERS.values():
        with torch.no_grad():
            _, state = attn(tokens(2, 6), None, [6, 4])
            clean = state.clone()
            attn(tokens(2, 3) * float("nan"), state.snapshot())
        x = tokens(2, 3, 2)
        for lengths in ([3, 2], [3, 0], [0, 1]):
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    y, _ = attn(x, state.snapshot(), lengths)
                    assert close(y, attn(x, clean.clone(), lengths)[0])
                    assert close(attn(x, state, lengths, update=False)[0], y)
