"""What is changed between two steps of a decoder, and around them, means to it what it means to the model."""

import attention_model
import pytest
import torch
from native_model import V, ids, small
from numerics import relative

from hope_kernels.engine.decoder import Decoder
from hope_kernels.engine.generation import generate
from hope_kernels.engine.sampling import draw
from hope_kernels.ops.shared import cpu_library

cpp = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"cpp: {cpu_library.unavailable()}")


def waiting(layers=2):
    """Whose steps are PyTorch's: factors of refreshes wait to be folded."""
    model = small(layers=layers, cms={"optimizer": "gd"})
    for block in model.blocks:
        block.cms.pending = 8
    return model


@cpp
@torch.no_grad()
def test_a_new_decoder_packs_weights_that_were_edited_unnoticed():
    model, text = small(layers=1), ids(1, 9)
    states = [model.init_state(1) for _ in range(2)]
    decoders = [Decoder(model, s) for s in states]
    for decoder in decoders:
        decoder.step(text[:, :1])
    first, second = (d._strips for d in decoders)
    assert first is second and first
    model.blocks[0].mixer.q_proj.weight.data.mul_(-3)
    plain = states[1].clone()
    newer = Decoder(model, states[1])
    assert relative(newer.step(text[:, 1:2]), model(text[:, 1:2], plain)[0]) < 1e-4
    shared = [at for at, strip in newer._strips.items() if first.get(at) is strip]
    assert len(shared) == len(first) - 1  # all others are packed once
    weight = model.blocks[0].mixer.out_proj.weight
    weight.data = weight.data + 1  # elsewhere
    plain = states[1].clone()
    assert relative(Decoder(model, states[1]).step(text[:, 2:3]), model(text[:, 2:3], plain)[0]) < 1e-4


def flushed(model, state):
    assert model.flush(state)[0]


def forgotten(model, state):
    for cms in state.cms:
        for own in cms.own:
            own[:] = [0] * state.batch


def detached(model, state):
    for block, cms in zip(model.blocks, state.cms):
        block.cms.detach_level(cms, 0)


def consolidated(model, state):
    model.consolidate(state)


def written(model, state):
    for cms in state.cms:
        for of in cms.weights:
            for t in (of or {}).values():
                t.mul_(-1.5)


def exchanged(model, state):
    for cms in state.cms:
        cms.weights[0] = {n: -t for n, t in cms.weights[0].items()}


@pytest.mark.parametrize("built", [pytest.param(lambda: small(cms={"lr": 0.2}), marks=cpp), waiting])
@pytest.mark.parametrize("act", [flushed, forgotten, detached, consolidated, written, exchanged])
@torch.no_grad()
def test_what_was_learned_changes(act, built):
    model, text = built(), ids(1, 32, 3)
    state = model.init_state(1)
    model(text[:, :22], state, learn="next_token")
    decoder, plain, apart = Decoder(model, state, "next_token"), state.clone(), state.clone()
    for t in range(22, 27):
        if t == 23:
            act(model, state)
            if act is consolidated:  # whose weights the model has now
                plain = state.clone()
            else:
                act(model, plain)
        found = decoder.step(text[:, t : t + 1])
        want, _ = model(text[:, t : t + 1], plain, learn="next_token")
        assert relative(found, want) < 1e-4, t
        if act is not consolidated:  # and what is changed means something
            means = relative(want, model(text[:, t : t + 1], apart, learn="next_token")[0]) > 1e-4
            assert means or t != 23, t


@cpp
@torch.no_grad()
def test_a_flush_while_text_is_written():
    model, prompt = small(cms={"lr": 0.2}), ids(1, 9, 2)

    def text(flushes):
        state, seen = model.init_state(1), []

        def on_token(token):
            seen.append(token)
            if len(seen) == 6 and flushes:
                model.flush(state)

        return generate(model, prompt, 14, state, on_token=on_token, temperature=1.0, seed=1).tokens

    found = text(True)
    state, tokens = model.init_state(1), []
    logits, _ = model(prompt, state, learn="next_token", guard=True)
    for n in range(14):
        token = torch.tensor(draw(logits[:, -1], 1.0, None, None, 1, state.pos))
        tokens.append(token)
        if n == 5:
            model.flush(state)
        logits, _ = model(token.unsqueeze(1), state, learn="next_token", guard=True)
    assert torch.equal(found, torch.stack(tokens, 1))
    assert not torch.equal(found, text(False))


@torch.no_grad()
def test_logits_that_are_not_finite_change_nothing():
    """In a step of PyTorch, as in one of C++."""
    model, text = waiting(1), ids(2, 9)
    state = model.init_state(2)
    model(text[:, :7], state, learn="next_token")
    decoder = Decoder(model, state, "next_token")
    decoder.step(text[:, 7:8])
    plain = state.clone()
    gain = model.norm.weight[3].clone()
    model.norm.weight[3] = torch.nan
    with pytest.raises(ValueError, match="non-finite logits .* the last token has not been read"):
        decoder.step(text[:, 8:9], check_finite=True)
    model.norm.weight[3] = gain
    assert state.pos == plain.pos and all(torch.equal(a, b) for a, b in zip(state.tensors(), plain.tensors()))
    found = decoder.step(text[:, 8:9], check_finite=True)
    assert relative(found, model(text[:, 8:9], plain, learn="next_token")[0]) < 1e-4
    assert state.pos == plain.pos == [9, 9] and state.synchronize().pos == [9, 9]


def attention():
    return attention_model.built({})


@pytest.mark.parametrize("built, size", [(lambda: small(layers=1), V), (waiting, V), (attention, attention_model.V)])
@torch.no_grad()
def test_autocast_means_nothing(built, size):
    model, text = built(), ids(2, 30) % size
    found = []
    for on in (False, True):
        state = model.init_state(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            model.read(text[:, :10], state, replay=2)
            decoder = Decoder(model, state, "next_token")
            out = [decoder.step(text[:, t : t + 1]) for t in range(10, 19)]
            model.flush(state)
            model.replay(state, dreams=1)
            out.append(model(text[:, 19:22], state, learn="next_token")[0])
            model.consolidate(state)
        found.append(torch.cat(out, 1))
        assert found[-1].dtype == torch.float32
        if not on:
            model = built()  # as it was
    assert torch.equal(*found)
