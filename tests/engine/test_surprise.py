"""Which spans of kept text are the most surprising, and a sleep that replays these alone."""

from dataclasses import replace

import pytest
import torch
from numerics import relative
from small_model import ids, tiny

from hope_kernels import CMSConfig, HopeForCausalLM, load_state
from hope_kernels.engine.surprise import measured, spans


def model(**options) -> HopeForCausalLM:
    return tiny("attention", window=5, cms=CMSConfig(8, 8, expansion=2.0, lr=0.01, optimizer="adam"), **options)


def kept(nats: torch.Tensor):
    """Of a row that has learned as many segments of 8 tokens as ``nats`` has rows, with these losses."""
    one = model()
    state = one.read(ids(1, 8 * len(nats) + 1), replay=len(nats)).state
    return replace(state.kept, nats=nats.unsqueeze(0))


@torch.no_grad()
def test_surprise_is_the_loss_of_the_models_own_weights():
    """Of the text as one, where segments follow one another; of a segment after a gap, from its beginning; asked
    for once."""
    one, text = model(), ids(2, 30)
    state = one.read(text, replay=4, flush=True).state
    assert bool((state.kept.nats == -1).all())
    kept = measured(one, state.kept, None)
    own, _ = one(text[:, :-1], following=text[:, -1], output="losses")
    assert relative(kept.nats.flatten(1)[:, :29], own.nats) < 1e-6 and not bool(kept.nats[:, 3, 5:].any())
    assert measured(one, kept, None) is kept
    gap = replace(state.kept, numbers=state.kept.numbers + torch.tensor([0, 0, 1, 1]))
    apart, _ = one(text[:, 16:29], following=text[:, 29], output="losses")
    assert relative(measured(one, gap, None).nats[:, 2:].flatten(1)[:, :13], apart.nats) < 1e-6


def test_kept_segments_from_before_there_were_losses_go_on():
    """As a file of an earlier version has them."""
    state = model().read(ids(1, 20), replay=2).state
    fields = {n: v for n, v in vars(state.kept).items() if n in ("pos", "config", "ids", "numbers", "done", "seed")}
    earlier = type(state.kept)(**fields)
    assert torch.equal(earlier.nats, state.kept.nats) and earlier.nats.shape == (1, 2, 8)
    state = replace(state, kept=earlier)
    state.validate("earlier", values=True)
    assert model().replay(state, 1, share=0.5, dreams=2).finished


def test_the_most_surprising_spans_are_taken_and_none_over_another():
    nats = torch.zeros(3, 8)
    nats[1, 2:5] = 4.0  # the one span of three that is all surprise
    nats[2, 6] = 5.0
    nats[0, 0] = 3.0
    found = spans(kept(nats), 0, 1 / 24, 3)
    assert [(s.segment, s.start) for s in found] == [(1, 2)]
    found = spans(kept(nats), 0, 9 / 24, 3)
    assert [s.segment for s in found] == [1, 2, 0] and found[1].start in (4, 5) and found[2].start == 0
    every = spans(kept(nats), 0, 1.0, 3)
    for segment in range(3):
        starts = sorted(s.start for s in every if s.segment == segment)
        assert all(b - a >= 3 for a, b in zip(starts, starts[1:]))
    broken = nats.clone()
    broken[0] = float("nan")
    assert spans(kept(broken), 0, 1 / 24, 3) == spans(kept(nats), 0, 1 / 24, 3)


@torch.no_grad()
def test_a_sleep_of_a_share_learns_that_and_goes_on_from_a_file(tmp_path):
    """As much text as was asked for in every pass, the same whether it is stopped or not; rows for themselves."""
    one = model()
    state = one.read(ids(2, 65), replay=8).state
    how = {"share": 0.25, "part": 4, "dreams": 3, "seed": 5}
    whole, stopped = state.clone(), state.clone()
    slept = one.replay(whole, 3, **how)
    assert slept.predicted == [[16, 16]] * 3 and slept.finished
    stop = iter([False, False, False, True]).__next__
    assert not one.replay(stopped, 3, should_stop=stop, **how).finished and stopped.kept.done == [3, 3]
    stopped.save(tmp_path / "s")
    back = load_state(tmp_path / "s")
    assert one.replay(back, 3, **how).finished
    for a, b in zip(whole.cms, back.cms):
        assert all(torch.equal(a.weights[0][n], b.weights[0][n]) for n in ("up", "down"))
    alone = one.replay(state.select([1]), 3, **how)
    assert relative(alone.nats[:, 0], slept.nats[:, 1]) < 1e-10


@torch.no_grad()
def test_it_is_the_surprising_text_that_is_learned():
    one = model()
    state = one.read(ids(1, 65), replay=8).state
    loud = 3  # the segment that is made to count
    nats = torch.where(torch.arange(8)[None, :, None] == loud, 9.0, torch.rand_like(state.kept.nats))
    state = replace(state, kept=replace(state.kept, nats=nats))
    before = after = None
    for passes in (0, 12):
        asleep = state.clone()
        one.replay(asleep, passes, share=1 / 8, part=8, dreams=0, known=1.0)
        fresh = one.init_state(8)
        fresh.cms = [c.select([0] * 8) for c in asleep.cms]
        for c in fresh.cms:
            c.pos[:] = [0] * 8
        found, _ = one(state.kept.ids[0, :, :8], fresh, following=state.kept.ids[0, :, 8], output="losses")
        before, after = after, found.nats.mean(1)
    gains = before - after
    assert int(gains.argmax()) == loud and float(gains[loud]) > 2 * float(gains.sum() - gains[loud]) / 7


@pytest.mark.parametrize("share", [0, -1, 1.5, float("nan"), True, "all"])
def test_a_share_is_a_number_up_to_one(share):
    one = model()
    state = one.read(ids(1, 20), replay=2).state
    with pytest.raises(ValueError, match="argument share is"):
        one.replay(state, 1, share=share)
