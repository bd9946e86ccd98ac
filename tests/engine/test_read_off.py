"""Whole models that read with learning off on a CPU keep the streaming contract bit for bit, whether their blocks are
read in one call of C++ or one after another."""

import copy
from unittest import mock

import pytest
import torch
from native_model import CASES, built, ids, small

from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM, TitansConfig, load_state
from hope_kernels.engine import native_reading
from hope_kernels.engine.native_segment import Reader
from hope_kernels.ops.shared import cpu_library

pytestmark = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"cpp: {cpu_library.unavailable()}")

T = 37
CUTS = ((0, 1), (1, 4), (4, 18), (18, 19), (19, 37))


def memories(state):
    return [t for m in state.mixers for t in m.tensors()]


def alike(a, b) -> bool:
    return list(a.pos) == list(b.pos) and all(torch.equal(x, y) for x, y in zip(memories(a), memories(b), strict=True))


def by_blocks():
    """Models are read block by block."""
    return mock.patch.object(Reader, "serves", lambda *_: False)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_bits_do_not_depend_on_how_a_text_is_cut(name, tmp_path):
    model, text = built(name), ids(3, T)
    whole, after = model(text)
    state, parts = model.init_state(3), []
    for a, b in CUTS:
        y, state = model(text[:, a:b], state)
        parts.append(y)
    assert torch.equal(torch.cat(parts, 1), whole) and alike(state, after)

    state, parts = model.init_state(1), []
    for t in range(T):
        y, state = model(text[1:2, t : t + 1], state)
        parts.append(y)
    assert torch.equal(torch.cat(parts, 1), whole[1:2])

    y, ragged = model(text, lengths=[T, 7, 0])
    assert torch.equal(y[0], whole[0]) and torch.equal(y[1, :7], whole[1, :7]) and not y[1, 7:].any()
    ragged.select([1, 2]).save(tmp_path / "state.safetensors")
    y, _ = model(torch.stack([text[1, 7:20], text[2, :13]]), load_state(tmp_path / "state.safetensors"))
    assert torch.equal(y[0], whole[1, 7:20]) and torch.equal(y[1], whole[2, :13])


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_blocks_one_after_another_have_the_bits_of_one_call(name):
    model, text = built(name), ids(3, T)
    for lengths in ([T] * 3, [T, 11, 0]):
        reader, start = Reader(model, None), model.init_state(3)
        assert reader.serves(start)
        reading, mixers = reader.read(start, start.mixers, text, lengths, None, keep=False)
        logits = reading.head(None, logits=True)[0].logits
        ours, state = model(text, lengths=lengths)
        with by_blocks():
            theirs, other = model(text, lengths=lengths)
        assert torch.equal(ours, theirs) and alike(state, other)
        for b, n in enumerate(lengths):
            assert torch.equal(logits[b, :n], theirs[b, :n])
        found = [t for m in mixers for t in m.tensors()]
        assert all(torch.equal(x, y) for x, y in zip(found, memories(other), strict=True))


@torch.no_grad()
def test_what_rows_have_learned_is_read_alike():
    model, text = small(), ids(3, T)
    _, state = model(text[:, :9], learn="next_token", lengths=[9, 5, 0])
    _, state = model(text[:, :9], state, learn="next_token", lengths=[9, 0, 0])
    assert any(map(any, state.cms[0].own)) and not all(map(all, state.cms[0].own))
    with by_blocks():
        theirs, _ = model(text, state.clone())
    assert torch.equal(model(text, state.clone())[0], theirs)
    for row in range(3):
        alone, _ = model(text[row : row + 1], state.select([row]))
        assert torch.equal(alone[0], theirs[row])


@torch.no_grad()
def test_losses_are_those_of_the_logits():
    model, text = small(), ids(2, T)
    logits, _ = model(text)
    losses, _ = model(text, output="losses", lengths=[T, 20])
    nats = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten(), reduction="none")
    nats = nats.view(2, -1)
    torch.testing.assert_close(losses.nats[0, :-1], nats[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.nats[1, :19], nats[1, :19], rtol=1e-5, atol=1e-6)
    assert not losses.nats[0, -1] and not losses.nats[1, 19:].any()
    assert torch.equal(losses.last, torch.stack([logits[0, -1], logits[1, 19]]))


@torch.no_grad()
def test_hooks_and_changed_weights_take_effect():
    model, text = small(), ids(1, T)
    before, _ = model(text)
    other = copy.deepcopy(model)
    other.blocks[0].mixer.out_proj.register_forward_hook(lambda module, given, y: 0 * y)
    changed = copy.deepcopy(model)
    changed.blocks[0].mixer.out_proj.weight.zero_()
    hooked, rewritten = other(text)[0], changed(text)[0]
    assert not torch.equal(rewritten, before)
    torch.testing.assert_close(hooked, rewritten)


@torch.no_grad()
def test_logits_that_are_not_finite_are_refused_and_nothing_is_read():
    model, text = small(), ids(2, T)
    _, state = model(text[:, :5])
    kept = state.clone()
    model.norm.weight[0] = float("inf")
    state.adopt(model)
    with pytest.raises(ValueError, match="logits"):
        model(text[:, 5:], state, check_finite=True)
    assert alike(state, kept)


@pytest.mark.parametrize("options", [{}, {"output": "losses"}, {"learn": "next_token"},
                                     {"learn": "next_token", "output": "losses"}])
def test_no_graph_is_built_where_none_is_asked_for(options):
    """Also with more token ids than the head in C++ serves."""
    torch.manual_seed(0)
    config = HopeConfig(5000, 16, 1, titans=TitansConfig(16, 2), cms=CMSConfig(16, (4, 8), expansion=2.0, lr=0.02))
    model, text = HopeForCausalLM(config), torch.randint(0, 5000, (2, 12))
    with torch.no_grad():
        found, _ = model(text, **options)
    with torch.inference_mode():
        inside, _ = model(text, **options)
    for a, b in zip([found] if torch.is_tensor(found) else found, [inside] if torch.is_tensor(inside) else inside):
        if torch.is_tensor(a):
            assert not a.requires_grad and torch.equal(a, b)


@torch.no_grad()
def test_logits_that_are_refused_leave_no_address_behind(monkeypatch):
    model, seen = built("default"), []
    model.norm.weight.fill_(float("nan"))
    check = native_reading.Reading.refuse

    def refuse(reading, past=0):
        try:
            check(reading, past)
        finally:
            seen.append(reading.call.finite)

    monkeypatch.setattr(native_reading.Reading, "refuse", refuse)
    with pytest.raises(ValueError, match="finite"):
        model(ids(2, 100), check_finite=True)
    assert seen == [None]
