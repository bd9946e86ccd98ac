"""Segments that are kept while reading, and learned again afterwards."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from numerics import relative
from small_model import V, ids, tiny

from hope_kernels import CMSConfig, load_state, state_file
from hope_kernels.kept import hashed, nothing_kept, offer
from hope_kernels.state import Counters


def cms(*chunks, **options) -> CMSConfig:
    return CMSConfig(8, chunks, **{"expansion": 2.0, "lr": 0.02, **options})


OPTIONS = {
    "gd": {}, "momentum": {"optimizer": "momentum"}, "adam": {"optimizer": "adam", "lr": 0.01},
    "nested": {"variant": "nested"}, "muon": {"optimizer": "muon", "variant": "independent"},
}
MODELS = {"hope": tiny(cms=cms(4, 8)), "attention": tiny("attention", window=5, cms=cms(4, 8, optimizer="adam"))}
named = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def learned(state) -> list[torch.Tensor]:
    parts = [(c.weights, c.grads, c.moments) for c in state.cms]
    return [t for of in parts for part in of for level in part for t in (level or {}).values()]


def differences(a, b) -> float:
    return max(relative(x, y) for x, y in zip(learned(a), learned(b), strict=True))


def same_kept(a, b) -> bool:
    return torch.equal(a.kept.ids, b.kept.ids) and torch.equal(a.kept.numbers, b.kept.numbers) and (
        a.kept.pos == b.kept.pos and a.kept.done == b.kept.done)


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("part", [0, 3])
def test_a_sleep_is_a_reading_of_the_segments_from_position_0(options, shuffle, part):
    """Attention that sees only the token itself has no memory: there, segments that are replayed from empty mixers
    and a text that consists of them are the same, levels, clocks, optimizer and all, however they are cut."""
    model = tiny("attention", window=1, cms=cms(4, 8, 24, **options))
    state = model.read(ids(1, 45), replay=7, seed=3, guard=False).state
    kept, passes = state.kept, 3
    assert kept.numbers[0].unique().numel() == 7 and kept.pos == [11]
    plain = model.init_state(1)
    plain.cms = [replace(c.clone(), pos=Counters([0])) for c in state.cms]
    want = torch.zeros(passes, dtype=torch.float64)
    for p in range(passes):
        order = kept.numbers[0].argsort().tolist()
        if shuffle:
            order.sort(key=lambda s: hashed(5, p, int(kept.numbers[0, s])))
        for slot in order:
            text = kept.ids[:, slot]
            losses, plain = model(text[:, :4], plain, learn="next_token", following=text[0, 4:], output="losses")
            want[p] += losses.nats.sum()
    slept = model.replay(state, passes, shuffle, 5, part=part, dreams=0, known=1, fade=False)
    assert relative(slept.nats[:, 0], want) < 1e-10 and slept.predicted == [[28]] * 3 and slept.finished
    assert differences(state, plain) < 1e-10


@torch.no_grad()
@named
def test_a_flushed_segment_is_replayed_as_a_shorter_one(model):
    text = ids(1, 7)
    state = model.read(text, replay=4, flush=True).state
    assert state.kept.ids[0].tolist() == [text[0, :5].tolist(), [*text[0, 4:7].tolist(), -1, -1], [-1] * 5, [-1] * 5]
    plain = model.init_state(1)
    plain.cms = [replace(c.clone(), pos=Counters([0])) for c in state.cms]
    _, plain = model(text[:, :4], plain, learn="next_token", following=text[0, 4:5])
    again = model.init_state(1)
    again.cms = [replace(c, pos=Counters([0])) for c in plain.cms]
    losses, again = model(text[:, 4:], again, learn="next_token", output="losses")
    slept = model.replay(state, 1, shuffle=False, part=0, dreams=0, known=1, fade=False)
    assert slept.predicted == [[6]]
    weights = [[c.weights[0] for c in s.cms] for s in (state, again)]
    model.flush(again)  # the level whose period is the segment
    for a, b in zip(state.cms, again.cms):
        assert all(relative(a.weights[0][n], b.weights[0][n]) < 1e-10 for n in a.weights[0]), weights


@torch.no_grad()
@named
def test_what_is_kept_does_not_depend_on_calls_or_company(model):
    text, lengths = ids(3, 90), [90, 37, 0]
    whole = model.read(text, lengths=lengths, replay=5, seed=9, passes=3, shuffle=True, dreams=3)
    for cut, holds in ((1, True), (4, True), (7, False), (8, False), (33, True)):
        model.holds, state = holds, None
        for at in range(0, 90, cut):
            part, step = text[:, at : at + cut], [min(max(n - at, 0), min(cut, 90 - at)) for n in lengths]
            state = model.read(part, state, lengths=step, replay=5, seed=9).state
        model.holds = True
        model.flush(state)
        slept = model.replay(state, 2, seed=9, dreams=3)
        assert same_kept(state, whole.state) and differences(state, whole.state) < 1e-10
        assert relative(slept.nats, whole.sleep.nats) < 1e-10
    for row, n in ((0, 90), (1, 37)):
        one = slice(row, row + 1)
        alone = model.read(text[one, :n], replay=5, seed=9, passes=3, shuffle=True, dreams=3)
        assert torch.equal(alone.state.kept.ids, whole.state.kept.ids[one])
        assert relative(alone.sleep.nats, whole.sleep.nats[:, one]) < 1e-10
        assert [p[0] for p in alone.sleep.predicted] == [p[row] for p in whole.sleep.predicted]
        more = ids(1, 12, 7)
        a, b = (model(more, s, learn="next_token")[0] for s in (alone.state, whole.state.select([row])))
        assert relative(a, b) < 1e-10


@torch.no_grad()
@named
def test_reading_goes_on_where_it_was(model):
    state = model.read(ids(2, 46), replay=3).state
    before = [t.clone() for part in (state.mixers, state.snapshot) for m in part for t in m.tensors()]
    other = [list(state.pos), list(state.seen), [list(c.pos) for c in state.cms]]
    weights = [t.clone() for t in learned(state)]
    model.replay(state, 2)
    after = [t for part in (state.mixers, state.snapshot) for m in part for t in m.tensors()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert other == [list(state.pos), list(state.seen), [list(c.pos) for c in state.cms]]
    assert not all(torch.equal(a, b) for a, b in zip(weights, learned(state), strict=True))
    twin = state.clone()
    a, _ = model(ids(2, 30, 1), state, learn="next_token")
    b = [model(t, twin, learn="next_token")[0] for t in ids(2, 30, 1).split(1, 1)]
    assert relative(a, torch.cat(b, 1)) < 1e-10


class After:
    """Says stop when it is asked for the n-th time."""

    def __init__(self, n):
        self.left = n

    def __call__(self):
        self.left -= 1
        return self.left < 0


@torch.no_grad()
@named
@pytest.mark.parametrize("every", [1, 3, 4])
def test_a_reading_that_is_stopped_goes_on_where_it_was(model, every, tmp_path):
    text, options = ids(2, 45), {"passes": 3, "shuffle": True, "replay": 4, "seed": 2, "piece": 8}
    whole = model.read(text, **options)
    at, state, last, nats, sleep, calls = 0, None, None, 0, 0, 0
    while True:
        part = model.read(text[:, at:], state, should_stop=After(every), last=last, **options)
        at, state, last, nats, calls = at + part.tokens, part.state, part.logits, nats + part.nats, calls + 1
        sleep = sleep + (0 if part.sleep is None else part.sleep.nats)
        if part.finished:
            break
        state.save(tmp_path / "state")
        state = load_state(tmp_path / "state")
    assert calls >= 14 // every and at == 45
    assert relative(nats, whole.nats) < 1e-10 and relative(sleep, whole.sleep.nats) < 1e-10
    assert same_kept(state, whole.state) and differences(state, whole.state) < 1e-10


@torch.no_grad()
def test_a_sleep_that_was_stopped_ends_with_more_text():
    model = MODELS["hope"]
    state = model.read(ids(1, 30), replay=4).state
    assert not model.replay(state, 5, should_stop=After(6)).finished and state.kept.done == [6]
    with pytest.raises(ValueError, match="argument passes is 1"):
        model.replay(state, 1)
    model(ids(1, 3, 1), state, learn="next_token")
    assert state.kept.done == [0]
    seen = []
    assert model.replay(state, 2, on_segment=lambda *n: seen.append(n)).finished and state.kept.done == [0]
    assert seen == [(n, 8) for n in range(1, 9)]


def test_every_segment_is_kept_with_the_same_probability():
    config, found, n, k, draws = tiny(cms=cms(4)).config, Counter(), 12, 3, 2000
    for seed in range(draws):
        kept = nothing_kept(config, 1, k, seed, torch.device("cpu"))
        for i in range(n):
            kept = offer(kept, [0], ids(1, 4, i), ids(1, 4, i + 1), [4])
        numbers = kept.numbers[0].tolist()
        assert len(set(numbers)) == k and kept.pos == [n]
        found.update(numbers)
    expected = draws * k / n
    # chi-square with 11 degrees of freedom: 31.3 is passed once in a thousand
    assert sum((found[i] - expected) ** 2 for i in range(n)) / expected < 31.3


@torch.no_grad()
def test_replay_learns_a_text_that_was_read_long_ago_without_losing_the_next():
    """Text A, then B: what is left of A afterwards, with the weights alone."""
    model = tiny(cms=cms(8, lr=0.03), layers=2)
    a, b = (ids(1, 12, seed).repeat(1, 12) for seed in (1, 2))

    def loss(state, text):
        fresh = model.init_state(1)
        fresh.cms = [replace(c.clone(), pos=Counters([0])) for c in state.cms]
        logits, _ = model(text, fresh)
        return float(F.cross_entropy(logits[0, :-1], text[0, 1:]))

    read = model.read(a, replay=40).state
    first = loss(read, a)
    read = model.read(b, read).state
    forgotten, plain = loss(read, a), loss(read, b)
    slept = model.replay(read, 6, seed=1, part=0, dreams=0, known=1, fade=False)
    bits = slept.nats[:, 0] / torch.tensor(slept.predicted)[:, 0]
    assert float(bits[-1]) < 0.9 * float(bits[0])
    assert loss(read, a) < first < forgotten and loss(read, b) < plain


@torch.no_grad()
def test_a_replay_that_fails_leaves_the_state_as_the_last_one_left_it():
    model = MODELS["hope"]
    state = model.read(ids(2, 30), replay=4).state
    twin = state.clone()
    assert not model.replay(twin, 2, should_stop=After(3)).finished

    def broken(*_):
        if state.kept.done == [3, 3]:
            raise RuntimeError("stop")

    hook = model.blocks[1].register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="stop"):
        model.replay(state, 2)
    hook.remove()
    assert all(torch.equal(x, y) for x, y in zip(state.tensors(), twin.tensors(), strict=True))
    assert state.kept.done == [3, 3]
    assert relative(model.replay(state, 2).nats, model.replay(twin, 2).nats) == 0


@torch.no_grad()
def test_kept_segments_are_part_of_the_state(tmp_path):
    model = MODELS["hope"]
    state = model.read(ids(3, 50), replay=4, guard=False).state
    state.save(tmp_path / "state")
    loaded, clone, picked = load_state(tmp_path / "state"), state.clone(), state.select([2, 0])
    assert same_kept(loaded, state) and same_kept(clone, state)
    assert torch.equal(picked.kept.ids, state.kept.ids[[2, 0]]) and picked.kept.batch == 2
    before, size = clone.kept.ids.clone(), state.nbytes()
    model.read(ids(3, 200, 4), state, guard=False)
    assert not torch.equal(state.kept.ids, before) and torch.equal(clone.kept.ids, before)
    assert state.kept.ids.shape == before.shape and state.nbytes() == size  # however much is read
    plain = model.read(ids(3, 50)).state
    assert plain.kept is None and model.replay(plain).finished


@torch.no_grad()
@pytest.mark.parametrize("spoil", [
    lambda k: k.ids[0, 0].fill_(V), lambda k: k.ids[0, 0, 1].fill_(-1), lambda k: k.ids[0, 0].fill_(-1),
    lambda k: k.numbers[0].fill_(-1), lambda k: k.numbers[1, 1].fill_(99), lambda k: k.ids[1, 2, 3].fill_(-2),
    lambda k: setattr(k, "ids", k.ids[:, :2]), lambda k: setattr(k, "numbers", k.numbers[:, :0]),
    lambda k: setattr(k, "ids", k.ids.float()), lambda k: k.pos.__setitem__(0, 1), lambda k: k.done.pop(),
    lambda k: k.done.__setitem__(0, -1), lambda k: setattr(k, "seed", "1"), lambda k: setattr(k, "config", None),
])
def test_kept_segments_that_no_reading_leaves_are_refused(spoil, tmp_path, monkeypatch):
    model = MODELS["hope"]
    state = model.read(ids(2, 50), replay=4).state
    model(ids(2, 1, 1), state)
    spoil(state.kept)
    with pytest.raises(ValueError, match=r"kept|segments"):
        model(ids(2, 1, 1), state)
    if state.kept.config is not None:
        with pytest.raises(ValueError, match="none that could be loaded again"):
            state.save(tmp_path / "state")
        assert not (tmp_path / "state").exists()
        with monkeypatch.context() as elsewhere:  # a file that another program has made
            elsewhere.setattr(state_file, "_whole", lambda tree, tensors: None)
            state.save(tmp_path / "state")
        with pytest.raises(ValueError, match="not a complete state file"):
            load_state(tmp_path / "state")


def test_grad_mode_and_other_settings_keep_segments_too():
    model = MODELS["hope"]
    state = model.read(ids(2, 30), replay=9).state
    _, new = model(ids(2, 10, 1), state, learn="next_token")
    assert new.kept.pos == [9, 9] and state.kept.pos == [7, 7]
    other = tiny(cms=cms(4, 8, lr=0.001))
    assert other.read(ids(2, 10, 1), state, passes=2).state.kept.config == other.config


def test_arguments_that_mean_nothing_are_refused():
    model = MODELS["hope"]
    state = model.read(ids(1, 9), replay=3).state
    for call, message in (
        (lambda: model.read(ids(1, 9), passes=2), "argument passes is 2, which needs segments"),
        (lambda: model.read(ids(1, 9), passes=0, replay=2), "argument passes is 0"),
        (lambda: model.read(ids(1, 9), replay=-1), "argument replay is -1"),
        (lambda: model.read(ids(1, 9), replay=2, learn="off"), "argument replay is 2, expected 0"),
        (lambda: model.read(ids(1, 9), state, replay=2), "argument replay is 2, and argument state keeps 3"),
        (lambda: model.read(ids(1, 9), replay=2, seed=0.5), "argument seed is 0.5"),
        (lambda: model.replay(state, -1), "argument passes is -1"),
        (lambda: model.replay(state, 1, should_stop=3), "argument should_stop is 3"),
        (lambda: model.replay(state, 1, part=-1), "argument part is -1"),
        (lambda: model.replay(state, 1, dreams=-1), "argument dreams is -1"),
        (lambda: model.replay(state, 1, known=0), "argument known is 0, expected a probability"),
        (lambda: model.replay(state, 1, known=float("nan")), "argument known is nan"),
        (lambda: model.replay(state, 1, share=0), "argument share is 0"),
        (lambda: model.replay(state, 1, joined=1.5), "argument joined is 1.5, expected a probability"),
        (lambda: model.replay(state, 1, rate=-1), "argument rate is -1"),
        (lambda: model.replay(state, 1, rate=float("inf")), "argument rate is inf"),
        (lambda: model.replay(state, 1, fade=2), "argument fade is 2, expected True or False"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    frozen = tiny(cms=cms(4, lr=0.0))
    assert frozen.read(ids(1, 9), replay=3, passes=2).state.kept is None
