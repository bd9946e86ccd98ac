"""The forgetting study: what it compares at equal gain, its baselines and its bank of deltas, and its command."""

import json
import math
import random

import pytest
import small_model
import torch
import torch.nn.functional as F

from benchmarks import bench_continual, studies
from benchmarks.continual import chain, ewc, pairs
from benchmarks.continual.bank import OWN, Bank, Member
from benchmarks.continual.equal_gain import at_gain, bracketed, share
from benchmarks.continual.reading import forgotten, segments
from benchmarks.continual.rules import RULES, Rule, levels, under
from benchmarks.continual.sessions import Gated, Pulled, Replaying, Session
from hope_kernels import HopeForCausalLM

WORDS, FIGURES = bytes(range(97, 123)) * 80, bytes(range(48, 58)) * 200


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a model of 16 channels, and two files of two kilobytes."""
    folder = small_model.saved(tmp_path_factory.mktemp("small"))
    (folder / "words").write_bytes(WORDS)
    (folder / "figures").write_bytes(FIGURES)
    return folder


@pytest.fixture
def model(small):
    return HopeForCausalLM.from_pretrained(small)


def text(data: bytes, length: int) -> torch.Tensor:
    return studies.excerpts(data, length, length, 0)


# -- equal gain ----------------------------------------------------------------------------------------------


def test_a_curve_is_read_off_where_it_first_has_the_gain():
    points = [(2.0, 3.0, 0.9), (1.0, 1.0, 0.1), (4.0, 2.0, 5.0)]
    assert at_gain(points, 1.0) == pytest.approx(0.1) and at_gain(points, 3.0) == pytest.approx(0.9)
    assert at_gain(points, 2.0) == pytest.approx(0.5)  # not 5.0, of a rate that is too large
    assert at_gain(points, 0.5) == pytest.approx(0.05)  # rate 0 gains and forgets nothing
    assert at_gain(points, 3.1) is None and at_gain([], 0.1) is None
    assert at_gain([(1.0, 1.0, 0.1), (2.0, -math.inf, math.inf)], 1.5) is None


def test_the_search_of_a_rate_encloses_the_gain_and_ends_where_more_does_not_gain_more():
    found = bracketed(lambda rate: rate, 1.0, 5.0)
    assert sorted(found) == [1, 2, 4, 8] and min(found.values()) <= 3.5 and max(found.values()) >= 5
    assert sorted(bracketed(lambda rate: min(rate, 4.0 / rate), 1.0, 5.0)) == [1, 2, 4]
    assert sorted(bracketed(lambda rate: -math.inf if rate > 2 else rate, 4.0, 1.0)) == [0.5, 1, 2, 4]
    assert sorted(bracketed(lambda rate: min(rate, 4.0 / rate), 64.0, 1.5)) == [1, 2, 4, 8, 16, 32, 64, 128]
    assert sorted(bracketed(lambda rate: min(rate, 4.0 / rate), 16.0, 5.0)) == [1, 2, 4, 8, 16, 32]


def test_a_share_is_of_all_pairs_and_its_spread_of_those_with_enough_to_forget():
    plain = {"a": 0.5, "b": 0.01, "c": 1.5, "d": None, "e": 1.0}
    assert share({"a": 0.25, "b": 0.5, "c": 0.3, "d": 1.0, "e": None}, plain) == pytest.approx((1.05 / 2.01, 0.2, 0.5))
    assert share({"b": 0.5, "e": None}, plain) is None


# -- rules ---------------------------------------------------------------------------------------------------


def test_rules_scale_the_model_s_own_rates_or_the_default_ones(model):
    assert under(model, RULES["gd"], 2.0).config.cms.learning_rates == (0.2, 0.1)
    assert under(model, RULES["momentum"], 1.0).config.cms.learning_rates == pytest.approx((0.01, 0.005))
    adam = under(model, RULES["adam"], 1.0).config.cms
    assert adam.relative and adam.learning_rates == pytest.approx((5e-4 * (8 / 256) ** 0.5, 5e-4 * (32 / 256) ** 0.5))
    faster = under(model, Rule(periods=(0.5, 16)), 1.0).config.cms
    assert faster.chunks == (4, 128) and faster.learning_rates == pytest.approx((0.2, 0.0125))


def test_levels_of_equal_state_learn_equally_many_numbers(model):
    ids, sizes = text(WORDS, 256), {}
    for name, rule in levels(model).items():
        if ", rank R" in name:
            session = Session(under(model, rule, 1.0), 3)
            session.learn(ids)
            sizes[name] = sum(t.numel() for t in ewc.weights(session.state).values())
    assert len(sizes) == 3 and len(set(sizes.values())) == 1
    one = under(model, levels(model)["1 level"], 1.0).config.cms
    assert one.learning_rates == (0.1, 0.0)


# -- sessions ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_is_measured_is_the_learned_cms_and_nothing_else(model, small):
    A, B = text(WORDS, 96)[:1], text(FIGURES, 64)[:1]
    _, state = model(A, learn="next_token")
    before = state.clone()
    found, _ = studies.bits(model, B, "off", forgotten(state, model))
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), before.tensors())) and state.pos == before.pos
    frozen = HopeForCausalLM.from_pretrained(small)  # the same by hand: the learned weights as parameters
    for level, learned in zip(frozen.blocks[0].cms.levels, model.levels(state)[0]):
        for name in ("up", "down"):
            dense = learned[name][0] if isinstance(learned[name], torch.Tensor) else learned[name].dense(1)[0]
            assert not torch.equal(level[name], dense)
            level[name].copy_(dense)
    assert found == pytest.approx(studies.bits(frozen, B, "off")[0], rel=1e-5)


def test_segment_by_segment_is_the_same_reading_and_learning(model):
    ids, state = text(WORDS, 96), model.init_state(3)
    with torch.no_grad():
        nats = sum(part.double().sum(1) for part in segments(model, state, ids))
    whole = Session(model, 3)
    assert (nats / math.log(2) / 95).tolist() == pytest.approx(whole.learn(ids), rel=1e-5)
    for place, W in ewc.weights(state).items():
        assert torch.allclose(W, ewc.weights(whole.state)[place], atol=1e-6)


def test_fisher_is_the_mean_of_squared_gradients(model):
    ids, session = text(WORDS, 64)[:1], Session(model, 1)
    session.learn(text(FIGURES, 64)[:1])
    before = [t.clone() for t in session.state.tensors()]
    with torch.no_grad():
        found = ewc.fisher(model, session.state, ids)
    assert all(map(torch.equal, before, session.state.tensors()))
    with torch.no_grad():
        for (_, l, name), W in ewc.weights(session.state).items():
            model.blocks[0].cms.levels[l][name].copy_(W[0])
    squares, state = [], None
    for at in range(0, 64, 8):  # a segment's own gradient: memories before it are constants
        last = at + 8 == 64
        logits, new = model(ids[:, at : at + 8], state)
        targets = ids[0, at + 1 : at + 9]
        loss = F.cross_entropy(logits[0, : len(targets)], targets, reduction="sum")
        W = model.blocks[0].cms.levels[0]["up"]
        squares.append(torch.autograd.grad(loss, W)[0].square())
        with torch.no_grad():
            state = model(ids[:, at : at + 8], state)[1] if not last else new
    assert torch.allclose(found[0, 0, "up"][0], torch.stack(squares).mean(0), rtol=1e-3, atol=1e-9)


def test_the_pull_of_ewc_minimises_its_objective(model):
    session = Session(model, 2)
    session.learn(text(WORDS, 96)[:2])
    held = ewc.weights(session.state)
    g = torch.Generator().manual_seed(0)
    anchor = {p: W + 0.1 * torch.randn(W.shape, generator=g) for p, W in held.items()}
    F_ = {p: torch.rand(W.shape, generator=g) for p, W in held.items()}
    before, strength = ewc.weights(session.state, copied=True), 0.7
    ewc.pull_(session.state, anchor, F_, strength)
    mean = torch.cat([f.flatten() for f in F_.values()]).mean()
    for place, W in ewc.weights(session.state).items():
        new = W.clone().requires_grad_()
        objective = (new - before[place]).square().sum() / 2 + (
            strength / 2 * (F_[place] / mean * (new - anchor[place]).square()).sum()
        )
        assert not torch.equal(W, before[place])
        assert float(torch.autograd.grad(objective, new)[0].abs().max()) < 1e-6


def test_ewc_without_strength_is_gd_and_a_strong_one_stays(model):
    A, B, ends = text(WORDS, 96), text(FIGURES, 96), {}
    for strength in (0.0, 1e6):
        session = Pulled(model, 3, strength)
        session.learn(A)
        after = ewc.weights(session.state, copied=True)
        session.learn(B)
        ends[strength] = {p: float((W - after[p]).norm()) for p, W in ewc.weights(session.state).items()}
    plain = Session(model, 3)
    plain.learn(A)
    after = ewc.weights(plain.state, copied=True)
    plain.learn(B)
    for place, moved in ends[0.0].items():
        assert moved == pytest.approx(float((ewc.weights(plain.state)[place] - after[place]).norm()), rel=1e-3)
        assert ends[1e6][place] < 0.5 * moved


def test_the_gate_learns_what_surprises_alone(model):
    ids = text(WORDS, 96)
    everything, nothing, plain = Gated(model, 3, quantile=0.0), Gated(model, 3), Session(model, 3)
    everything.surprises = lambda row, loss: True
    nothing.surprises = lambda row, loss: row == 1
    found, expected = everything.learn(ids), plain.learn(ids)
    assert found == pytest.approx(expected, rel=1e-5)
    for place, W in ewc.weights(everything.state).items():
        assert torch.allclose(W, ewc.weights(plain.state)[place], atol=1e-6)
    nothing.learn(ids)
    for l, own in enumerate(nothing.state.cms[0].own):
        assert list(own) == [0, 1, 0]
        for name, W in nothing.state.cms[0].weights[l].items():
            assert torch.allclose(W[1], plain.state.cms[0].weights[l][name][1], atol=1e-6)
    gate = Gated(model, 1, quantile=0.5, window=4)
    assert [gate.surprises(0, x) for x in (1.0, 2.0, 1.4, 1.6, 1.45)] == [True, True, False, True, False]


def test_replay_brings_the_first_text_back(model):
    A, B, lost = text(WORDS, 192), text(FIGURES, 192), {}
    for kind in (Session, Replaying):
        session = kind(model, 3)
        session.learn(A)
        before = studies.mean(session.measured(A[:, 96:]))
        other = session.forked()
        other.learn(B)
        lost[kind] = studies.mean(other.measured(A[:, 96:])) - before
        assert studies.mean(session.measured(A[:, 96:])) == before  # the fork went on apart
    assert lost[Replaying] < lost[Session]


# -- the bank ------------------------------------------------------------------------------------------------


def bank_of(model, means: list[float], now: int, limit: int = 8) -> Bank:
    bank = Bank(model, limit, 1)
    bank.members = [Member(model.init_state(1), mean, last) for last, mean in enumerate(means)]
    bank.current = now
    return bank


def flat(**means: float) -> dict[int, torch.Tensor]:
    """Losses of 64 tokens, with a little scatter, by member."""
    wave = 0.01 * torch.arange(64).remainder(2)
    return {int(m[1:]) if m != "own" else OWN: mean + wave for m, mean in means.items()}


def test_the_bank_goes_on_with_who_reads_best_and_starts_anew_where_nobody_does(model):
    assert bank_of(model, [], OWN).chosen(flat(own=3.0)) == (OWN, 0)
    assert bank_of(model, [1.0, 2.0], 1).chosen(flat(own=3.0, m0=1.1, m1=2.0)) == (0, 0)
    assert bank_of(model, [1.0, 2.0], 1).chosen(flat(own=3.0, m0=2.5, m1=2.1)) == (1, 1)
    assert bank_of(model, [1.0, 2.0], 1).chosen(flat(own=3.0, m0=2.9, m1=2.8)) == (1, 2)  # unlike both: a copy of 1
    assert bank_of(model, [1.0, 2.0], 1).chosen(flat(own=1.5, m0=2.5, m1=2.4)) == (OWN, 2)
    assert bank_of(model, [1.0, 2.0, 2.0], 2, 3).chosen(flat(own=3.0, m0=4.0, m1=4.0, m2=4.0)) == (OWN, 0)  # full
    assert bank_of(model, [1.0, 2.0], 0).chosen(flat(own=3.0, m0=math.nan, m1=2.0)) == (1, 1)


def test_a_text_as_easy_as_the_member_s_own_was_hard_is_told_by_the_gain(model):
    bank = bank_of(model, [3.2], 0)
    assert bank.chosen(flat(own=3.42, m0=3.41)) == (0, 0)
    bank.members[0].gain = 1.5
    assert bank.chosen(flat(own=3.42, m0=3.41)) == (0, 1)
    assert bank.chosen(flat(own=4.4, m0=3.41)) == (0, 0)


def test_the_bank_stays_where_a_difference_is_noise(model):
    losses = flat(own=9.0, m0=2.0, m1=2.0)
    losses[0] = 1.99 + torch.randn(64, generator=torch.Generator().manual_seed(0))
    assert bank_of(model, [2.0, 2.0], 1).chosen(losses)[0] == 1


def test_a_text_that_returns_is_read_with_the_very_state_that_was_kept():
    model = HopeForCausalLM.from_pretrained("hope-byte")
    bank, letters = Bank(model, block=4), random.Random(0)
    words = text(studies.text(studies.KJV)[:9000], 2560)[:1]
    figures = torch.tensor([[letters.choice(b"0123456789abcdef ") for _ in range(2560)]])
    assert {m for m, _ in bank.learn(words[:, :1280])} == {0}
    learned = [t.clone() for t in bank.members[0].kept.tensors()]
    for a, b in zip(learned, forgotten(bank.state, model).tensors()):
        assert torch.equal(a, b)  # of the state that has just learned
    others = {m for m, _ in bank.learn(figures[:, :1280])}
    assert others == {1}
    kept = bank.members[0].kept
    assert len(learned) == len(kept.tensors()) and all(map(torch.equal, learned, kept.tensors()))
    again = bank._with(kept)  # what the returning text is read with: memories of the stream, weights of the member
    assert list(again.pos) == [2560]
    assert all(map(torch.equal, again.mixers[0].tensors(), bank.state.mixers[0].tensors()))
    assert len(ewc.weights(kept)) == 12
    for place, W in ewc.weights(again).items():
        assert torch.equal(W, ewc.weights(kept)[place])
    assert {m for m, _ in bank.learn(words[:, 1280:])} == {0}
    assert {m for m, _ in bank.learn(figures[:, 1280:])} == {1}


# -- the command ---------------------------------------------------------------------------------------------


def test_command_measures_resumes_and_tells(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_continual, "BUNDLED", str(small))
    out = tmp_path / "continual.json"
    command = ["--text", str(small / "words"), str(small / "figures"), "--title", "words", "figures", "--rules", "adam",
               "gd, EWC 0.1", "--length", "128", "--out", str(out)]
    bench_continual.main([*command, "--parts", "pairs"])
    data = json.loads(out.read_text())
    own, gd = (pairs.points(data, "pairs", rule) for rule in ("own", "gd"))
    assert len(own) == len(gd) == 6 and all(len(of) > 1 for of in gd.values())
    record = data["cases"]["pairs own x1: words"]
    then = record["then"]["figures"]
    point = next(p for p in own["words, then figures"] if p["factor"] == 1.0)
    assert point["gain"] == studies.mean(then["before"]) - studies.mean(then["after"]) > 0
    assert point["forgotten"] == studies.mean(then["lost"]) - studies.mean(record["after"])
    assert pairs.compared(data, "pairs", "own")["words, then figures"] == pytest.approx(point["forgotten"])
    gone = data["cases"].pop("pairs gd x4: figures")
    out.write_text(json.dumps(data))
    bench_continual.main([*command, "--parts", "pairs", "chain", "bank"])
    again = json.loads(out.read_text())
    same = again["cases"]["pairs gd x4: figures"]
    assert {k: v for k, v in same.items() if k != "seconds"} == {k: v for k, v in gone.items() if k != "seconds"}
    assert {k: v for k, v in again["cases"].items() if k in data["cases"]} == data["cases"]
    made = again["cases"]["chain pairs own x1"]
    assert made["factor"] == 1.0 and list(chain.summary(made)["lost"]) == [studies.KJV_TITLE, "words"]
    assert sum(name.startswith("bank") for name in again["cases"]) == 3
    shown = capsys.readouterr().out
    bench_continual.main(["--table", "--out", str(out)])
    printed = capsys.readouterr().out
    assert shown.endswith(printed)
    row = next(line for line in printed.splitlines() if line.startswith("| gd |"))
    assert row.startswith("| gd | 1.00 (1.00 to 1.00) |") and "| 6 of 6 |" in row


def test_excerpts_read_one_by_one_are_those_read_side_by_side(model):
    texts = {"words": text(WORDS, 64), "figures": text(FIGURES, 64)}
    found = [
        studies.by_rows(lambda some: pairs.case(model, RULES["momentum"], 2.0, "words", some), texts, together)
        for together in (3, 2, 1)
    ]
    for one in found:
        assert one.pop("seconds") >= 0 and len(one["after"]) == len(one["then"]["figures"]["lost"]) == 3
    assert found[0] == found[1] == found[2]
