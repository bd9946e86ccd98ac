"""Sequences that were read apart go on as one batch, and apart again, each as it would alone."""

import pytest
import torch
from numerics import relative
from small_model import V, ids, tiny

from hope_kernels import CMSConfig, ContinuumMemory, HopeConfig, SelfModifyingTitans, TitansConfig, load_state
from hope_kernels.engine import guard
from hope_kernels.kept import KeptSegments
from hope_kernels.layers.attention import CausalAttention
from hope_kernels.model_state import ModelState
from hope_kernels.state import State

CMS = CMSConfig(8, (4, 8, 16), expansion=2.0, lr=0.02)
READ = (21, 3, 16, 0)  # tokens of each row before they meet: all levels, none, a segment's end, nothing read
MORE = 20


def with_pending(model):
    for block in model.blocks:
        block.cms.pending = 8
    return model


def cms(**changes):
    return tiny(cms=CMS.replace(**changes))


MODELS = {
    "memories": lambda: tiny(), "titans": lambda: tiny("titans"), "attention": lambda: tiny("attention"),
    "window": lambda: tiny("attention", window=5), "sinks": lambda: tiny("attention", window=5, sinks=3),
    "momentum": lambda: cms(optimizer="momentum", lr=0.01), "adam": lambda: cms(optimizer="adam", lr=0.01),
    "muon": lambda: cms(optimizer="muon"), "relative": lambda: cms(relative=True, lr=0.01),
    "nested": lambda: cms(variant="nested", optimizer="momentum", expansion=1.0),
    "preconditioned": lambda: cms(precondition=10.0),
    "low rank": lambda: cms(rank=3, optimizer="adam", lr=0.01),
    "low rank, preconditioned": lambda: cms(rank=3, precondition=5.0),
    "pending factors": lambda: with_pending(cms(chunks=(4, 8))),
    "some blocks": lambda: tiny("attention", layers=3, window=(4, None, 6), sinks=(2, 0, 0),
                                learn_blocks=(1,)),
    "frozen": lambda: cms(lr=0.0),
}
named = pytest.mark.parametrize("name", MODELS)
OFF, ON, GUARDED = {"learn": "off"}, {"learn": "next_token"}, {"learn": "next_token", "guard": True}


@torch.no_grad()
def alone(model, text, calls, how):
    """(state, logits) of one row read in these calls."""
    state, parts, at = model.init_state(1), [], 0
    for n in calls:
        logits, state = model(text[:, at : at + n], state, **how)
        parts, at = [*parts, logits], at + n
    return state, torch.cat(parts, 1)


@torch.no_grad()
def together(model, states, texts, at, calls, how):
    """(state, logits of each row) of a batch of ``states`` that reads rows of ``texts`` from ``at`` on."""
    state, found = State.join(states), [[] for _ in states]
    for lengths in calls:
        part = torch.zeros(len(states), max(lengths), dtype=torch.long)
        for b, (text, a, n) in enumerate(zip(texts, at, lengths)):
            part[b, :n] = text[0, a : a + n]
        logits, state = model(part, state, lengths, **how)
        at = [a + n for a, n in zip(at, lengths)]
        for b, n in enumerate(lengths):
            found[b].append(logits[b : b + 1, :n])
    return state, [torch.cat(parts, 1) for parts in found]


def differences(a, b) -> float:
    pairs = zip(a.tensors(), b.tensors(), strict=True)
    return max([relative(x, y) for x, y in pairs if x.is_floating_point()], default=0.0)


CASES = {**{name: (name, GUARDED) for name in MODELS}, "memories, off": ("memories", OFF),
         "sinks, off": ("sinks", OFF), "memories, on": ("memories", ON), "window, on": ("window", ON)}


@pytest.mark.parametrize("name, how", CASES.values(), ids=CASES.keys())
def test_rows_go_on_as_they_would_alone(name, how, tmp_path, monkeypatch):
    """Joined, cut apart, joined in another order; some of the states come from files."""
    monkeypatch.setattr(guard, "EVEN", 1)
    monkeypatch.setattr(guard, "ERRORS", 0)
    model, texts = MODELS[name](), [ids(1, max(READ) + MORE, seed) for seed in range(4)]
    wanted, states = [], []
    for b, (text, n) in enumerate(zip(texts, READ)):
        wanted.append(alone(model, text[:, : n + MORE], (n, MORE), how)[1][:, n:])
        state, _ = alone(model, text[:, :n], (n,), how)
        if b == 1:
            state.save(tmp_path / "s")
            state = load_state(tmp_path / "s")
        states.append(state)
    calls = [(5, 1, 1, 9), (0, 4, 3, 1), (1, 0, 6, 2)]
    state, found = together(model, states, texts, list(READ), calls, how)
    done = [sum(c[b] for c in calls) for b in range(4)]
    for b in range(4):
        assert relative(found[b], wanted[b][:, : done[b]]) < 1e-10, b
    parts = state.split()
    assert [p.pos for p in parts] == [[n + d] for n, d in zip(READ, done)]
    order, rest = [2, 0, 3], [MORE - d for d in done]
    _, found = together(
        model, [parts[b] for b in order], [texts[b] for b in order], [READ[b] + done[b] for b in order],
        [[rest[b] for b in order]], how
    )
    for b, logits in zip(order, found):
        assert relative(logits, wanted[b][:, done[b] :]) < 1e-10, b
    logits, _ = model(texts[1][:, READ[1] + done[1] : READ[1] + MORE], parts[1], **how)
    assert relative(logits, wanted[1][:, done[1] :]) < 1e-10


@named
def test_a_row_taken_out_is_the_state_it_would_be_alone(name, tmp_path):
    """With the same parts: what other rows of the batch needed is left behind, and a file is no larger."""
    model, texts = MODELS[name](), [ids(1, 60, seed) for seed in range(3)]
    states = [alone(model, text, (n,), ON)[0] for text, n in zip(texts, (40, 2, 7))]
    together = State.join(states)
    together.validate("joined", torch.float64, torch.device("cpu"), values=True)
    for b, (part, state) in enumerate(zip(together.split(), states)):
        part.validate("split", torch.float64, torch.device("cpu"), values=True)
        part.save(tmp_path / "part")
        state.save(tmp_path / "state")
        assert (tmp_path / "part").stat().st_size <= (tmp_path / "state").stat().st_size
        state.split()[0].save(tmp_path / "state")  # without gradients that have been committed
        saved = [load_state(tmp_path / n) for n in ("part", "state")]
        assert len(saved[0].tensors()) == len(saved[1].tensors()), b
        assert all(x.equal(y) for x, y in zip(*(s.tensors() for s in saved))), b
        assert saved[0]._counters() == saved[1]._counters()
        assert str(saved[0].fingerprint) == str(saved[1].fingerprint)


def test_the_result_is_independent_of_what_was_joined():
    model = tiny("attention", window=5)
    first, second = (alone(model, ids(1, n, n), (n,), GUARDED)[0] for n in (9, 14))
    before, state = [s.clone() for s in (first, second)], State.join([first, second])
    with torch.no_grad():
        model(ids(2, 30), state, **GUARDED)
    for one, copy in zip((first, second), before):
        assert one.pos == copy.pos and differences(one, copy) == 0
    again, parts = State.join([first, second]), State.join([first, second]).split()
    with torch.no_grad():
        want, _ = model(ids(2, 30), State.join([first, second]), **GUARDED)
        model(ids(1, 30), first, **GUARDED)
        got, again = model(ids(2, 30), again, **GUARDED)
        model(ids(2, 5), again, **GUARDED)
    assert torch.equal(got, want) and differences(parts[0], before[0].split()[0]) == 0


def test_a_snapshot_of_attention_shares_its_storage_as_before():
    model = tiny("attention", window=5)
    states = [alone(model, ids(1, n, n), (n,), ON)[0] for n in (9, 14, 22)]
    joined = State.join(states)
    for state in (joined, *joined.split()):
        assert all(a.k.data_ptr() == b.k.data_ptr() for a, b in zip(state.mixers, state.snapshot))


@torch.no_grad()
def test_a_window_that_widened_in_an_open_segment_keeps_what_its_snapshot_needs():
    narrow, wide = tiny("attention", window=5, sinks=2), tiny("attention", window=11, sinks=2)
    for n in (6, 7, 15, 26):
        text = ids(1, n + 30, n)
        states = [alone(narrow, text, (m,), ON)[0] for m in (n, n)]
        states = [wide(text[:, n : n + 1], s, **ON)[1] for s in states]
        want, _ = wide(text[:, n + 1 :], states[0].clone(), **ON)
        got, _ = wide(text[:, n + 1 :].expand(2, -1), State.join(states), **ON)
        assert relative(got, want.expand(2, -1, -1)) < 1e-10


def test_held_activations_stay_behind_and_the_segment_is_read_again():
    model, texts = tiny(), [ids(1, 30, seed) for seed in (1, 2)]
    states = [alone(model, text, (n,), ON)[0] for text, n in zip(texts, (8, 16))]
    assert all(s._held is not None for s in states)
    joined = State.join(states)
    assert joined._held is None and all(s._held is not None for s in states)
    state, found = together(model, states, texts, [8, 16], [(9, 9)], ON)
    for b, n in enumerate((8, 16)):
        assert relative(found[b], alone(model, texts[b][:, : n + 9], (n, 9), ON)[1][:, n:]) < 1e-10


def test_unread_tokens_and_new_sequences():
    model = tiny()
    out = model.generate(ids(1, 9), 3, learn="next_token")
    state = State.join([out.state, model.init_state(2)])
    assert state.unread.flatten().tolist() == [int(out.tokens[0, -1]), -1, -1] and state.guard is not None
    new, *_ = (State.join([model.init_state(1), model.init_state(2)]),)
    assert new.unread is None and new.guard is None and new.batch == 3 and new.pos == [0, 0, 0]
    old = state.split([0])[0]
    assert torch.equal(model.generate(None, 8, old).tokens, model.generate(None, 8, out.state).tokens)
    assert state.split([-1])[0].unread is None


def test_kept_segments_go_on():
    model, texts = tiny(), [ids(1, 70, seed) for seed in (1, 2)]
    states = [model.read(text[:, :n], replay=3, seed=5).state for text, n in zip(texts, (31, 44))]
    joined = State.join(states)
    assert isinstance(joined.kept, KeptSegments) and joined.kept.pos == [s.kept.pos[0] for s in states]
    one, two = joined.split()
    more = torch.cat([text[:, n : n + 5] for text, n in zip(texts, (31, 44))])
    apart = [model.read(more[b : b + 1], s, replay=3, passes=2) for b, s in enumerate((one, two))]
    both = model.read(more, joined, replay=3, passes=2)
    assert relative(both.sleep.nats, torch.cat([a.sleep.nats for a in apart], 1)) < 1e-10
    for part, state in zip(both.state.split(), apart):
        assert torch.equal(part.kept.ids, state.state.kept.ids)
        assert differences(part, state.state.split()[0]) < 1e-10


def test_a_rollback_takes_a_row_back_to_its_own_good_weights(monkeypatch):
    """A row whose slow level had learned nothing when it was found good goes back to the model's weights
    there, whatever the others have."""
    monkeypatch.setattr(guard, "ERRORS", 0)
    model, text = tiny(cms=CMSConfig(8, (4, 16), lr=0.02, expansion=1.0)), ids(2, 40)
    early, late = (alone(model, text[b : b + 1, :n], (n,), GUARDED)[0] for b, n in enumerate((9, 40)))
    for state in (early, late):
        guard._keep(state.guard, list(zip(model.blocks, state.cms)), [0])
    assert [r for block in early.guard.held for r in block] == [[1], [0]] * 2
    assert [r for block in late.guard.held for r in block] == [[1], [1]] * 2
    for state in (State.join([early, late]), State.join([late, early])):
        b = state.pos.index(9)
        draft = [c.draft() for c in state.cms]
        guard._restore(state.guard, list(zip(model.blocks, draft)), [0, 1])
        for good, cms in zip(late.guard.good, draft):
            assert cms.own[1][b] == 0 and cms.own[1][1 - b] == 1
            for name, t in good[1].items():
                assert torch.equal(cms.weights[1][name][1 - b], t[0])


def test_levels_with_sixteen_bit_weights_join_with_those_from_files(tmp_path):
    """A file has no copies of the weights in the dtype of the model."""
    torch.manual_seed(0)
    layer = ContinuumMemory(CMSConfig(8, (2, 4), lr=0.05)).to(torch.bfloat16)
    x = torch.randn(3, 12, 8, dtype=torch.bfloat16)

    @torch.no_grad()
    def read(state, part, error):
        outs = []
        for t in range(0, part.shape[1], 2):
            y, state = layer(part[:, t : t + 2], state)
            state = layer.refresh(state, error[:, t : t + 2])
            outs.append(y)
        return torch.cat(outs, 1), state

    states = [read(None, x[b : b + 1, :n], x[b : b + 1, :n])[1] for b, n in enumerate((8, 2, 4))]
    states[0].save(tmp_path / "s")
    joined = State.join([load_state(tmp_path / "s"), states[1], layer.init_state(1), states[2]])
    joined.validate("joined", torch.bfloat16, torch.device("cpu"), values=True)
    apart = [read(s, x[b : b + 1, 8:], x[b : b + 1, 8:])[0] for b, s in enumerate(states)]
    both, _ = read(joined.select([0, 1, 3]), x[:, 8:], x[:, 8:])
    for b, want in enumerate(apart):
        assert relative(both[b : b + 1], want) < 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("kind", ["titans", "attention", "cms"])
def test_states_of_layers(kind):
    torch.manual_seed(0)
    layer = {
        "titans": lambda: SelfModifyingTitans(TitansConfig(8, 2, chunk_memory=4, chunk_other=2)),
        "attention": lambda: CausalAttention(HopeConfig(V, 8, 1, "attention", num_heads=2, window=5)),
        "cms": lambda: ContinuumMemory(CMSConfig(8, (4, 8))),
    }[kind]().double()
    x, how = torch.randn(2, 19, 8, dtype=torch.float64), {"learn": False} if kind == "cms" else {}
    with torch.no_grad():
        whole = [layer(x[b : b + 1], **how)[0] for b in range(2)]
        parts = [layer(x[b : b + 1, :n], **how)[1] for b, n in enumerate((12, 5))]
        state = type(parts[0]).join(parts)
        assert state.owner is layer and state.pos == [12, 5]
        y, _ = layer(torch.stack([x[0, 12:19], x[1, 5:12]]), state, **how)
    assert relative(y[0], whole[0][0, 12:]) < 1e-12 and relative(y[1], whole[1][0, 5:12]) < 1e-12


def joining(*states):
    return lambda: State.join(list(states))


def test_what_cannot_go_on_together_is_refused_by_name():
    model, text = tiny(), ids(1, 9)

    def read(model, how=ON):
        return alone(model, text, (9,), how)[0]

    state, guarded, one = read(model), read(model, GUARDED), "state of states\\[1\\] "
    keeps = [model.read(text, replay=k, seed=seed).state for k, seed in ((2, 0), (3, 0), (2, 1))]
    for act, kind, words in (
        (joining(), ValueError, "argument states is empty"),
        (lambda: State.join(state), TypeError, "argument states is a ModelState, expected a list"),
        (joining(state, "s"), TypeError, r"states\[1\] is a str, expected a state"),
        (joining(state, state.mixers[0]), TypeError,
         r"states\[1\] is a TitansState, and states\[0\] a ModelState"),
        (joining(state, read(tiny(cms=CMS.replace(lr=0.1)))), ValueError,
         r"states\[1\] belongs to HopeConfig\(cms\.lr="),
        (joining(state, read(tiny("titans"))), ValueError, "belongs to HopeConfig"),
        (joining(state, read(tiny(seed=1))), ValueError, one + "belongs to weights c1:"),
        (joining(state, read(tiny().float())), ValueError,
         r"states\[1\] has input dtype torch.float32, and states\[0\] torch.float64"),
        (joining(state, state.to("meta")), ValueError, r"states\[1\] has device meta, and states\[0\] cpu"),
        (joining(state, guarded), ValueError, r"states \[0\] have learned without a guard"),
        (joining(guarded, keeps[0]), ValueError, r"states \[1\] keep segments"),
        (joining(keeps[0], keeps[1]), ValueError,
         r"state.kept.ids of states\[1\] is a tensor of rows \[3, 5\]"),
        (joining(keeps[0], keeps[2]), ValueError,
         r"state.kept.seed of states\[1\] is 1, and of states\[0\] 0"),
        (lambda: state.split([1]), IndexError, "ModelState.split: row 1 does not exist in a batch of 1"),
    ):
        with pytest.raises(kind, match=words):
            act()


def test_a_row_may_be_taken_more_than_once():
    model = tiny()
    state = alone(model, ids(1, 9), (9,), ON)[0]
    assert isinstance(state, ModelState)
    both = State.join([state, state])
    with torch.no_grad():
        logits, _ = model(ids(2, 7), both, **ON)
        want, _ = model(ids(2, 7)[:1], state, **ON)
    assert relative(logits[:1], want) < 1e-10
