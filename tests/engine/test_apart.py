"""A replayed segment in parts, with a dream beside it: what is descended, and what that is for."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from numerics import relative
from small_model import V, ids, tiny

from hope_kernels import CMSConfig, HopeForCausalLM
from hope_kernels.engine import replay as replays
from hope_kernels.engine import segments
from hope_kernels.engine.apart import cut, in_a_row, learn_apart
from hope_kernels.engine.dreams import WEIGHT, dream
from hope_kernels.state import Counters


def model_of(mixer: str, **options):
    chunks = (8,) if "optimizer" in options else (8, 16)
    return tiny(mixer, cms=CMSConfig(8, chunks, expansion=2.0, **{"lr": 0.02, **options}))


def consolidated(model, state):
    own, state = copy.deepcopy(model), state.clone()
    state.adopt(own)
    own.consolidate(state)
    return own


@pytest.mark.parametrize("at", [1, 3, 5, 8, 20])
@pytest.mark.parametrize("part", [1, 3, 8])
@pytest.mark.parametrize("n", [1, 2, 8])
def test_parts_are_the_segment_and_every_target_is_the_next_token(n, part, at):
    text = torch.arange(100, 101 + n)
    parts = cut(text, at, part)
    rows = [(i[:m], t[:m]) for i, t, m in zip(parts.ids, parts.targets, parts.lengths)]
    assert torch.cat([i for i, _ in rows]).tolist() == text[:-1].tolist()
    assert torch.cat([t for _, t in rows]).tolist() == text[1:].tolist()
    assert parts.lengths[0] == min(at, n) and all(m == part for m in parts.lengths[1:-1])
    assert min(parts.lengths) > 0


def test_parts_in_a_row_keep_their_own_targets():
    text = torch.arange(100, 109)
    parts = in_a_row(cut(text, 3, 4), [2, 0, 1])
    assert parts.ids.tolist() == [[107, 100, 101, 102, 103, 104, 105, 106]]
    assert parts.targets.tolist() == [[108, 101, 102, 103, 104, 105, 106, 107]] and parts.lengths == [8]


@torch.no_grad()
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_so_many_replays_join_their_parts_each_in_an_order_of_its_own(share, monkeypatch):
    """What the step is given: the same tokens with the same targets whether they are joined or not."""
    model = model_of("attention")
    state = model.read(ids(1, 81), replay=10, guard=False).state
    given: dict[float, list] = {}

    def seen(joined):
        def step(model, state, row, parts, *args, **options):
            given[joined].append(parts)
            return learn_apart(model, state, row, parts, *args, **options)

        given[joined] = []
        monkeypatch.setattr(replays, "learn_apart", step)
        model.replay(state.clone(), 20, part=2, share=share, joined=joined, seed=4, dreams=0)
        return given[joined]

    def pairs(parts):
        return [
            p for i, t, m in zip(parts.ids, parts.targets, parts.lengths) for p in zip(i[:m].tolist(), t[:m].tolist())
        ]

    apart, one_row, mixed = seen(0.0), seen(1.0), seen(0.7)
    assert all(len(p.lengths) == 4 or share == 1 for p in apart) and all(len(p.lengths) == 1 for p in one_row)
    assert all(sorted(pairs(a)) == sorted(pairs(b)) for a, b in zip(apart, one_row, strict=True))
    assert sum(pairs(a) == pairs(b) for a, b in zip(apart, one_row)) < 0.15 * len(apart)
    share_joined = sum(len(p.lengths) == 1 for p in mixed) / len(mixed)
    assert abs(share_joined - 0.7) < 0.15 and {len(p.lengths) for p in mixed} >= {1, 4}
    for a, b, m in zip(apart, one_row, mixed):
        assert torch.equal(m.ids, (b if len(m.lengths) == 1 else a).ids)


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["self_modifying", "titans", "attention"])
@pytest.mark.parametrize("order", [None, [2, 0, 1]])
@pytest.mark.parametrize("row, half", [(0, False), (1, False), (1, True)])
def test_a_step_descends_the_loss_of_the_parts_and_the_divergence_of_the_dream(mixer, row, half, order):
    """Against autograd through the model whose own weights are the learned ones. In the pass that learns the
    memories of Titans are constants, so that there only the last block's gradient is autograd's. half: of the
    tokens the half with the smaller losses is left out. order: the parts stand one behind another."""
    model = model_of(mixer)
    state = model.read(ids(2, 41), guard=False).state
    own = consolidated(model, state.select([row]))
    dreams = dream(model, 3, 6, (1,), None).some([2])
    parts = cut(ids(1, 9, 5)[0], 3, 4)
    if order is not None:
        parts = in_a_row(parts, order)
    rows = range(len(parts.lengths))
    with torch.enable_grad():
        logits, _ = own(parts.ids, lengths=parts.lengths)
        loss = torch.cat([
            F.cross_entropy(logits[i, :m], parts.targets[i, :m], reduction="none")
            for i, m in zip(rows, parts.lengths)
        ])
        now, _ = own(dreams.ids)
        was = torch.log_softmax(model(dreams.ids)[0], -1)
        drift = (was.exp() * (was - torch.log_softmax(now, -1))).sum(-1).mean()
        least = float(loss.sort().values[3:5].mean()) if half else 0.0
        total = loss[loss >= least].sum() + WEIGHT * 8 * drift
        wanted = torch.autograd.grad(total, [b.cms.levels[0].up for b in own.blocks])
    before = [c.weights[0]["up"][row].clone() for c in state.cms]
    draft = segments.draft(state)
    nats = learn_apart(model, draft, row, parts, [8, 8], None, dreams, least=least)
    assert float(drift) > 1e-4  # the dream has something to say
    found = torch.cat([nats[i, :m] for i, m in zip(rows, parts.lengths)])
    assert relative(found, loss.detach()) < 1e-10
    first = 0 if mixer == "attention" else 1
    for c, old, g in [*zip(draft.cms, before, wanted)][first:]:
        step = c.weights[0]["up"][row] - old
        assert relative(step, -c.config.learning_rates[0] * g) < 1e-8
    other = 1 - row
    assert all(torch.equal(c.weights[0]["up"][other], s.weights[0]["up"][other]) for c, s in zip(draft.cms, state.cms))


@torch.no_grad()
def test_rates_fall_evenly_over_a_sleep_and_what_is_known_is_left_out():
    model = model_of("attention")
    state = model.read(ids(1, 9), replay=3, guard=False).state
    plain = {"part": 0, "dreams": 0, "shuffle": False}
    assert state.kept.held() == [1]

    faded, by_hand = state.clone(), state.clone()
    model.replay(faded, 2, known=1, rate=3, **plain)
    model.replay(by_hand, 1, known=1, fade=False, rate=3, **plain)
    draft = segments.draft(by_hand)
    text = state.kept.ids[0, 0]
    learn_apart(model, draft, 0, cut(text, 8, 8), [16], None, rate=1.5)
    for a, b, c in zip(faded.cms, draft.cms, state.cms):
        assert relative(a.weights[0]["up"], b.weights[0]["up"]) < 1e-12
        assert relative(a.weights[0]["up"], c.weights[0]["up"]) > 1e-3

    known = state.clone()
    model.replay(known, 2, known=1e-9, **plain)
    for a, b in zip(known.cms, state.cms):
        assert all(torch.equal(a.weights[0][n], b.weights[0][n]) for n in ("up", "down"))
    model.replay(known, 2, known=1e-9, dreams=5)  # dreams alone lead back to the model's own weights
    own = [b.cms.levels[0].up for b in model.blocks]
    for a, b, w in zip(known.cms, state.cms, own):
        assert 0 < relative(a.weights[0]["up"], b.weights[0]["up"])
        assert float((a.weights[0]["up"] - w).norm()) < float((b.weights[0]["up"] - w).norm())


@torch.no_grad()
def test_a_dream_says_nothing_to_a_model_that_has_learned_nothing():
    model = model_of("attention")
    dreams, parts = dream(model, 2, 8, (0,), None), cut(ids(1, 9)[0], 4, 4)
    steps = []
    for given in (None, dreams):
        draft = segments.draft(model.init_state(1))
        learn_apart(model, draft, 0, parts, [8], None, given)
        steps.append([c.weights[0]["down"] for c in draft.cms])
    for plain, beside, block in zip(*steps, model.blocks):
        base = block.cms.levels[0].down
        assert relative(beside - base, plain - base) < 1e-8


@torch.no_grad()
def test_dreams_are_of_the_models_own_weights_and_their_seed():
    model = model_of("self_modifying")
    a, b, c = (dream(model, 5, 12, seed, None) for seed in ((3, 1), (3, 1), (3, 2)))
    assert torch.equal(a.ids, b.ids) and torch.equal(a.h, b.h) and not torch.equal(a.ids, c.ids)
    assert a.ids.shape == (5, 12) and 0 <= int(a.ids.min()) and int(a.ids.max()) < V
    # they follow the model: likelier than tokens drawn evenly
    def bits(t):
        return float(F.cross_entropy(model(t)[0][:, :-1].flatten(0, 1), t[:, 1:].flatten()))

    many = dream(model, 64, 12, (0,), None).ids
    assert bits(many) < bits(ids(64, 12)) - 0.3


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"optimizer": "adam", "lr": 0.01}], ids=["gd", "adam"])
def test_with_dreams_a_model_learns_as_much_and_drifts_less(options):
    """Divergence from the model as it was, on texts of its own that were not read beside the replays."""
    model = model_of("attention", **options)
    state = model.read(ids(1, 40), replay=9, guard=False).state
    unseen = dream(model, 40, 12, (99,), None).ids
    was = torch.log_softmax(model(unseen)[0], -1)

    def after(dreams):
        one = state.clone()
        slept = model.replay(one, 30, dreams=dreams)
        fresh = model.init_state(40)
        fresh.cms = [replace(c.select([0] * 40), pos=Counters([0] * 40)) for c in one.cms]
        now = torch.log_softmax(model(unseen, fresh)[0], -1)
        losses = slept.nats[:, 0] / torch.tensor(slept.predicted)[:, 0]
        return float(losses[0] - losses[-1]), float((was.exp() * (was - now)).sum(-1).mean())

    (gain, drift), (held_gain, held_drift) = after(0), after(50)
    assert held_drift < 0.6 * drift and held_gain > 0.9 * gain > 0.5


@torch.no_grad()
def test_backends_replay_alike():
    """The C++ kernels beside the chunked PyTorch ones, in fp32."""
    model = HopeForCausalLM.from_pretrained("hope-byte")
    text = torch.tensor([list(b"In the beginning was the Word, and the Word was with God, and the Word was God. " * 4)])
    options = {"replay": 4, "flush": True, "passes": 3, "seed": 2, "dreams": 8}
    slept = [model.read(text, backend=name, **options).sleep for name in ("chunked", "cpp")]
    losses = [s.nats[:, 0] / torch.tensor(s.predicted)[:, 0] for s in slept]
    assert relative(*losses) < 1e-4 and float(losses[0][-1]) < float(losses[0][0])
