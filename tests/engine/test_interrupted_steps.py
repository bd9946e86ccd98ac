"""Whatever is raised, and wherever: a state is as it was before a call or as it is after it, and goes on."""

import attention_model
import pytest
import torch
from cut_short import CutShort, Interrupt
from native_model import ids, small

from hope_kernels import load_state
from hope_kernels.engine import native
from hope_kernels.engine.arrival import Arrival
from hope_kernels.engine.decoder import Decoder
from hope_kernels.engine.generation import generate
from hope_kernels.ops.shared import cpu_library

cpp = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"cpp: {cpu_library.unavailable()}")


def some(first: int, last: int, count: int) -> list[int]:
    """So many places, evenly; all of them, if there are no more."""
    return [*range(first, last + 1, max((last - first) // count, 1))]


def memories():
    return small(layers=1)


def attention():
    return attention_model.built({"num_heads": 3, "window": 21, "sinks": 5})


def waiting():
    """Whose steps are PyTorch's: factors of refreshes wait to be folded."""
    model = small(layers=1, cms={"optimizer": "gd"})
    for block in model.blocks:
        block.cms.pending = 8
    return model


def same(a, b) -> bool:
    """Bit for bit, but for slots of attention's storage that do not count."""
    a, b = a._lean(), b._lean()
    counters = [list(c) for c in a._counters()] == [list(c) for c in b._counters()]
    return counters and all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def cuts(monkeypatch, call, count: int) -> list[int]:
    """Where to cut ``call`` short: so often behind the library's work, and here and there before."""
    cut, returned, bound = CutShort(), [], native._step.bound()

    def step(call):
        outcome = bound(call)
        returned.append(cut.executed)
        return outcome

    with monkeypatch.context() as patched:
        patched.setattr(native._step, "_bound", step)
        assert not cut(call)
    first = returned[-1] if returned else cut.executed // 2
    return some(1, first, 12) + some(first, cut.executed, count)


@pytest.mark.parametrize("built, learn, at, count", [
    pytest.param(memories, "off", 6, 1000, marks=cpp), pytest.param(memories, "next_token", 6, 40, marks=cpp),
    pytest.param(memories, "next_token", 8, 60, marks=cpp), pytest.param(attention, "off", 6, 80, marks=cpp),
    pytest.param(attention, "next_token", 8, 40, marks=cpp), (waiting, "next_token", 8, 40),
])
@torch.no_grad()
def test_steps_of_a_decoder(built, learn, at, count, monkeypatch):
    """At 8 the step begins with learning a segment."""
    model, text, start = built(), ids(2, 12), built().init_state(2)
    model(text[:, : at - 1], start, learn=learn)

    def fresh():
        state = start.clone()
        decoder = Decoder(model, state, learn)
        decoder.step(text[:, at - 1 : at])
        return state, decoder, lambda: decoder.step(text[:, at : at + 1])

    (before, *_), (after, _, step) = fresh(), fresh()
    step()
    places, found, cut = cuts(monkeypatch, fresh()[2], count), [], CutShort()
    for place in places:
        state, decoder, step = fresh()
        if not cut(step, place):
            continue
        read = state.pos[0] - at
        found.append(read)
        assert same(state, after if read else before), place
        if place % 5 == 0:  # the same decoder goes on, with the interrupt still at hand
            if not read:
                step()
            assert same(state, after), place
    assert 0 in found and 1 in found


@pytest.mark.parametrize("learn", ["off", "next_token"])
@torch.no_grad()
def test_calls_of_a_model(learn):
    model, text = memories(), ids(2, 12)
    before = model.init_state(2)
    model(text[:, :6], before, learn=learn)
    after, cut, found = before.clone(), CutShort(), []
    cut(lambda: model(text[:, 6:10], after, learn=learn))
    for place in some(1, cut.executed, 30):
        state = before.clone()
        assert cut(lambda s=state: model(text[:, 6:10], s, learn=learn), place)
        found.append(state.pos[0])
        assert same(state, before if found[-1] == 6 else after), place
        model(text[:, found[-1] : 12], state, learn=learn)
    assert 6 in found


@torch.no_grad()
def test_assigning():
    model, text = memories(), ids(2, 9)
    before = model.init_state(2)
    model(text, before, learn="next_token")
    after, cut, found = before.clone(), CutShort(), set()
    model(text, after, learn="next_token")
    cut(lambda: before.clone().assign(after.clone()))
    for place in some(1, cut.executed, 150):
        state, new = before.clone(), after.clone()
        cut(lambda s=state, n=new: s.assign(n), place)
        found.add(state.pos[0])
        assert same(state, before if state.pos[0] == 9 else after), place
    assert found == {9, 18}


@pytest.mark.parametrize("advances", [True, False])
@torch.no_grad()
def test_a_state_in_hand_is_let_go(advances):
    """Wherever the context is left, a later call finds the state free, and of the weights it was of."""
    model, text, cut = memories(), ids(1, 3), CutShort()
    state = model.init_state(1)
    model(text, state)
    mark = state.fingerprint
    model.norm.weight.add_(1)

    def hold():
        with state.reading("here", model, advances):
            pass

    cut(hold)
    for place in range(1, cut.executed):
        state.fingerprint = mark
        cut(hold, place)
        state.settle()
        assert state._holders == [] and (state.fingerprint is mark or advances), place
        with state.reading("here", model):
            with pytest.raises(ValueError, match="in use by another call"):
                hold()
    model(text, state)


@cpp
@pytest.mark.parametrize("place", [3, 40, 80, 110])
@torch.no_grad()
def test_a_second_interrupt_is_mended_when_the_state_is_used_next(place, monkeypatch):
    model, text, write, cut = memories(), ids(2, 12), Arrival._write, CutShort()
    state = model.init_state(2)
    model(text[:, :7], state, learn="next_token")
    decoder, after, times = Decoder(model, state, "next_token"), state.clone(), []
    Decoder(model, after, "next_token").step(text[:, 7:8])

    def interrupted(self):
        times.append(0)
        if len(times) > 2 or not cut(lambda: write(self), place):
            return write(self)
        raise Interrupt

    monkeypatch.setattr(Arrival, "_write", interrupted)
    with pytest.raises(Interrupt):
        decoder.step(text[:, 7:8])
    assert len(times) >= 2
    copy = state.clone()
    assert same(copy, after) and same(state, after)
    assert torch.equal(decoder.step(text[:, 8:9]), Decoder(model, copy, "next_token").step(text[:, 8:9]))


@pytest.mark.parametrize("built, place", [pytest.param(memories, 0, marks=cpp), pytest.param(attention, 50, marks=cpp),
                                          (waiting, 70)])
@torch.no_grad()
def test_generation_goes_on_with_the_text_it_would_have_written(built, place):
    model, prompt, cut = built(), ids(2, 9), CutShort()
    how = {"learn": "next_token", "temperature": 0.7, "seed": 3}
    text = generate(model, prompt, 14, **how).tokens
    start = generate(model, prompt, 1, **how).state

    def on(state):
        return lambda: generate(model, None, 4, state, **how)

    strips = native.strips_of(model)  # held: else the garbage collector says whether a call has to make them
    on(start.clone())()
    cut(on(start.clone()))
    read = set()
    for at in some(1 + place, cut.executed, 25):
        state = start.clone()
        assert cut(on(state), at)
        n = state.pos[0] - 9  # new tokens that it has read
        read.add(n)
        assert state.unread is not None and torch.equal(state.unread[:, 0], text[:, n]), at
        assert torch.equal(on(state)().tokens, text[:, n + 1 : n + 5]), at
    assert len(read) > 3
    del strips


@torch.no_grad()
def test_a_state_that_could_not_be_loaded_is_not_saved(tmp_path):
    model, file = memories(), tmp_path / "state"
    state = model.init_state(1)
    model(ids(1, 9), state)
    state.save(file)
    state.cms[0].pos[0] += 1
    with pytest.raises(ValueError, match=r"ModelState.save: the state is none that could be loaded again .*stands at"):
        state.save(file)
    assert load_state(file).pos == [9]
