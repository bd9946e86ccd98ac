"""``model.flush``: an open segment learned before it ends, and the short segment after it."""

from dataclasses import replace

import pytest
import torch
from numerics import relative
from small_model import ids, tiny

from hope_kernels import CMSConfig, Decoder, load_state
from hope_kernels.state import Counters


def cms(*chunks, **options) -> CMSConfig:
    return CMSConfig(8, chunks, **{"expansion": 2.0, "lr": 0.02, **options})


OPTIONS = {
    "hope": {}, "titans": {"mixer": "titans"}, "attention": {"mixer": "attention", "window": 5},
    "momentum": {"cms": {"optimizer": "momentum"}}, "adam": {"cms": {"optimizer": "adam", "lr": 0.01}},
    "muon": {"cms": {"optimizer": "muon", "variant": "independent"}}, "nested": {"cms": {"variant": "nested"}},
}


def made(name: str, *chunks: int):
    options = dict(OPTIONS[name])
    return tiny(cms=cms(*chunks, **options.pop("cms", {})), **options)


MODELS = {name: made(name, 8, 16) for name in OPTIONS}
named = pytest.mark.parametrize("name", OPTIONS)
# every optimizer in every order of events takes a minute: one of each is enough for every day
every_day = pytest.mark.parametrize("name", [
    n if n in ("hope", "attention", "adam") else pytest.param(n, marks=pytest.mark.slow) for n in OPTIONS
])


def learned(state) -> list[torch.Tensor]:
    parts = [(c.weights, c.grads, c.moments) for c in state.cms]
    return [t for of in parts for part in of for level in part for t in (level or {}).values()]


def differences(a, b) -> float:
    return max(relative(x, y) for x, y in zip(learned(a), learned(b), strict=True))


def play(model, events, decode=False, holds=True, cut=None, path=None):
    """Events: tokens [B, n] with their lengths, or None: flush. Logits of all tokens, and the state."""
    model.holds, state, parts = holds, None, []
    for event in events:
        if event is None and state is None:
            continue
        if event is None:
            model.flush(state)
            if path is not None:
                state.save(path)
                state = load_state(path)
            continue
        tokens, lengths = event
        outs, at, T = [], 0, tokens.shape[1]
        while at < T:
            n = T if cut is None else min(cut, T - at)
            step = [min(max(m - at, 0), n) for m in lengths]
            if decode and state is not None and n == 1 and all(step):
                outs.append(Decoder(model, state, "next_token").step(tokens[:, at : at + 1]).clone())
            else:
                logits, state = model(tokens[:, at : at + n], state, lengths=step, learn="next_token")
                outs.append(logits)
            at += n
        parts.append(torch.cat(outs, 1))
    model.holds = True
    return torch.cat(parts, 1), state


def even(*lengths):
    return [None if n is None else (ids(2, n, i), [n, n]) for i, n in enumerate(lengths)]


EVENTS = {
    "inside a segment": even(6, None, 15), "at its end": even(8, None, 15), "twice": even(11, None, 3, None, 25),
    "one token": even(9, None, 20), "one after it": even(7, None, 9), "at once again": even(5, None, None, 30),
}


@torch.no_grad()
@named
def test_flush_learns_what_a_segment_of_these_tokens_would(name):
    """A model whose segments have five tokens, at its sixth token, has learned from the first five."""
    flushed, other = MODELS[name], made(name, 5, 10)
    tokens = ids(2, 6)
    _, state = flushed(tokens, learn="next_token")
    assert flushed.flush(state) == [5, 5] and list(state.seen) == [0, 0]
    _, want = other(tokens, learn="next_token")
    assert differences(state, want) < 1e-10


@torch.no_grad()
@named
def test_what_follows_is_a_segment_up_to_the_next_boundary(name):
    """Two tokens after a flush at six, as a model with segments of two learns them from the same state."""
    model, other = MODELS[name], made(name, 2, 16)
    _, state = model(ids(2, 6), learn="next_token")
    model.flush(state)
    twin = other.init_state(2)
    config = other.config.block_cms[0]
    mixers = [replace(m.clone(), config=now.config) for m, now in zip(state.mixers, twin.mixers)]
    twin = replace(
        twin, pos=Counters(state.pos), mixers=mixers, snapshot=[m.snapshot() for m in mixers],
        cms=[replace(c.clone(), config=config) for c in state.cms], fingerprint=None,
    )
    more = ids(2, 3, 1)
    out, state = model(more, state, learn="next_token")
    want, twin = other(more, twin, learn="next_token")
    assert relative(out, want) < 1e-10 and differences(state, twin) < 1e-10


@torch.no_grad()
@every_day
@pytest.mark.parametrize("events", EVENTS.values(), ids=EVENTS)
def test_splits_around_a_flush_change_nothing(name, events, tmp_path):
    want, whole = play(MODELS[name], events)
    ways = [{"cut": 1}, {"cut": 3, "holds": False}, {"cut": 8}, {"holds": False}, {"path": tmp_path / "state"}]
    if OPTIONS[name].get("mixer") != "attention":
        ways.append({"cut": 1, "decode": True})
    for way in ways:
        found, state = play(MODELS[name], events, **way)
        assert relative(found, want) < 1e-10 and differences(state, whole) < 1e-10, way


@torch.no_grad()
@named
def test_ragged_rows_flush_what_each_has_open(name):
    model, steps = MODELS[name], ([6, 9, 0, 8], [4, 2, 1, 11], [12, 3, 9, 5])
    events = [e for i, n in enumerate(steps) for e in ((ids(4, max(n), i), n), None)]
    logits, state = play(model, events)
    for row in range(4):
        own = [None if e is None else (e[0][row : row + 1, : e[1][row]], [e[1][row]]) for e in events]
        want, alone = play(model, [e for e in own if e is None or e[1][0]])
        found = torch.cat([
            logits[row, a : a + n[row]] for a, n in zip((0, max(steps[0]), max(steps[0]) + max(steps[1])), steps)
        ])
        assert relative(found, want[0]) < 1e-10
        assert list(alone.seen) == [state.seen[row]]
        more = ids(1, 20, 9)
        a, b = (model(more, s, learn="next_token")[0] for s in (alone, state.select([row])))
        assert relative(a, b) < 1e-10


@torch.no_grad()
def test_nothing_is_flushed_where_nothing_is_known():
    model = MODELS["hope"]
    for state in (model.init_state(2), model(ids(2, 9), learn="next_token")[1], model(ids(2, 5))[1]):
        before = [t.clone() for t in state.tensors()]
        seen = list(state.seen)
        assert model.flush(state) == [0, 0] and list(state.seen) == seen
        assert all(torch.equal(a, b) for a, b in zip(before, state.tensors(), strict=True))
    frozen = tiny(cms=cms(8, lr=0.0))
    assert frozen.flush(frozen(ids(2, 5), learn="next_token")[1]) == [0, 0]


@torch.no_grad()
def test_tokens_read_off_after_a_flush_spoil_the_rest_of_the_segment():
    model = MODELS["hope"]
    _, state = model(ids(1, 5), learn="next_token")
    model.flush(state)
    _, state = model(ids(1, 1, 1), state)
    assert list(state.seen) == [-1] and model.flush(state) == [0]
    before = [t.clone() for t in learned(state)]
    _, state = model(ids(1, 6, 2), state, learn="next_token")
    assert all(torch.equal(a, b) for a, b in zip(before, learned(state), strict=True)) and list(state.seen) == [4]


@torch.no_grad()
def test_a_flush_that_fails_leaves_the_state_as_it_was():
    model = MODELS["adam"]
    _, state = model(ids(2, 21), learn="next_token")
    before, twin = [t.clone() for t in state.tensors()], state.clone()
    names = iter(range(2))

    def broken(*_):
        if next(names):
            raise RuntimeError("stop")

    # the second block's levels have learned when the first one's backward comes
    hooks = [b.cms.register_forward_hook(
        lambda m, args, out: out[0].register_hook(broken) and None if out[0].requires_grad else None
    ) for b in model.blocks]
    with pytest.raises(RuntimeError, match="stop"):
        model.flush(state)
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, state.tensors(), strict=True)) and list(state.seen) == [5, 5]
    assert model.flush(state) == model.flush(twin) == [4, 4] and differences(state, twin) == 0


def test_flush_refuses_what_forward_refuses():
    model = MODELS["hope"]
    with pytest.raises(TypeError, match="HopeForCausalLM.flush"):
        model.flush(None)
    state = model.init_state(2)
    with pytest.raises(ValueError, match="in use"), state.reading("test", model):
        model.flush(state)
