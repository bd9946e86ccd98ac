"""A token a row through a whole model in one call of C++ equals the model, whatever came before and whatever
changes between two steps."""

import ctypes
from unittest import mock

import pytest
import torch
from native_model import CASES, V, built, ids, small
from numerics import relative
from torch import nn

from hope_kernels import HopeConfig, HopeForCausalLM, identity
from hope_kernels.engine import native, segments
from hope_kernels.engine.decoder import Decoder
from hope_kernels.engine.generation import generate
from hope_kernels.ops.shared import cpu_library

pytestmark = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"cpp: {cpu_library.unavailable()}")

def same(a, b, tolerance=2e-4) -> bool:
    """Two states: every counter, and every tensor to rounding."""
    if [list(x) for x in a._counters()] != [list(x) for x in b._counters()]:
        return False
    pairs = zip(a.tensors(), b.tensors(), strict=True)
    return all(torch.equal(x, y) if not x.is_floating_point() else relative(x, y) < tolerance for x, y in pairs)


def served(decoder: Decoder) -> bool:
    return decoder._native is not None


@pytest.mark.parametrize("learn", ["off", "next_token"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_equals_the_model(name, learn):
    model, text = built(name), ids(3, 45)
    state, plain = model.init_state(3), model.init_state(3)
    for s in (state, plain):
        model(text[:, :11], s, [11, 6, 0], learn=learn)
    decoder = Decoder(model, state, learn)
    for t in range(11, 45):
        token = text[:, t : t + 1]
        assert relative(decoder.step(token), model(token, plain, learn=learn)[0]) < 1e-4, t
        assert same(state, plain), t
    assert served(decoder)
    state.validate("test", values=True)


@torch.no_grad()
def test_memories_have_the_bits_of_a_scan():
    """Where what is around the memories rounds nothing: unit projections, and embeddings of plus and minus one,
    whose norm is one."""
    model = small(layers=1, cms=None, titans={"conv_window": None, "gate": False, "out_proj": False, "in_proj": False},
                  norm_eps=1e-12)
    model.embed.weight.copy_(torch.where(model.embed.weight > 0, 1.0, -1.0))
    model.blocks[0].mixer.q_proj.weight.copy_(torch.eye(16))
    text, state = ids(2, 50), model.init_state(2)
    decoder = Decoder(model, state)
    for t in range(50):
        decoder.step(text[:, t : t + 1])
    _, whole = model(text)
    assert served(decoder) and float(state.mixers[0].delta2.abs().max()) > 0.01
    for a, b in zip(state.mixers[0].tensors(), whole.mixers[0].tensors(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("post_norm", [False, True])
@torch.no_grad()
def test_rows_and_threads_do_not_change_a_bit(post_norm):
    model, text = small(d=256, heads=4, chunks=(8,), post_norm=post_norm), ids(24, 20, 3)
    found = []
    for threads, rows in ((1, slice(None)), (2, slice(None)), (1, slice(5, 6))):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            state = model.init_state(len(text[rows]))
            decoder = Decoder(model, state)
            logits = torch.cat([decoder.step(text[rows, t : t + 1]) for t in range(20)], 1)
        finally:
            torch.set_num_threads(before)
        found.append((logits, state.mixers[1].delta2))
    (a, x), (b, y), (c, z) = found
    assert torch.equal(a, b) and torch.equal(x, y) and torch.equal(a[5:6], c) and torch.equal(x[5:6], z)


def changes():
    def weights(model, *_):
        model.blocks[1].mixer.q_proj.weight.mul_(0.5)

    def memory(model, *_):
        model.blocks[0].mixer.w2.mul_(0.9)

    def parameter(model, *_):
        model.blocks[0].cms.levels[1]["up"] = nn.Parameter(torch.randn(32, 16))

    def module(model, *_):
        model.blocks[1].mixer.out_proj = nn.Linear(16, 16, bias=False)

    def state(model, *states):
        for s in states:
            s.mixers[0].delta1.mul_(0.5)

    def another_call(model, *states):
        for s in states:
            model(ids(2, 7, 9), s)

    def forget(model, *states):
        for s in states:
            s.mixers[1].delta2 = torch.zeros_like(s.mixers[1].delta2)

    return [weights, memory, parameter, module, state, another_call, forget]


@pytest.mark.parametrize("change", changes(), ids=lambda f: f.__name__)
@torch.no_grad()
def test_what_changes_between_two_steps_is_seen(change):
    model, text = small(), ids(2, 20)
    state = model.init_state(2)
    decoder, plain = Decoder(model, state), model.init_state(2)
    for t in range(20):
        if t == 9:
            change(model, state, plain)
        token = text[:, t : t + 1]
        assert relative(decoder.step(token), model(token, plain)[0]) < 1e-4, t
    assert served(decoder) and same(state, plain)


@pytest.mark.parametrize("at", [7, 8])  # the token that closes a chunk and a segment; the one that has it learned
@torch.no_grad()
def test_a_step_that_fails_reads_nothing(at):
    model, text = small(), ids(2, 12)
    state = model.init_state(2)
    decoder = Decoder(model, state, "next_token")
    for t in range(at):
        decoder.step(text[:, t : t + 1], check_finite=True)
    before, good = state.clone(), model.norm.weight.clone()
    model.norm.weight[3] = torch.nan
    with pytest.raises(ValueError, match="non-finite logits .* has not been read"):
        decoder.step(text[:, at : at + 1], check_finite=True)
    assert same(state, before, 1e-12)
    model.norm.weight.copy_(good)
    for t in range(at, 12):
        token = text[:, t : t + 1]
        assert relative(decoder.step(token, check_finite=True), model(token, before, learn="next_token")[0]) < 1e-4
    assert served(decoder) and same(state, before)
    model.norm.weight[3] = torch.nan
    assert not torch.isfinite(decoder.step(text[:, :1])).all()  # nobody has asked


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@torch.no_grad()
def test_learning_that_is_stopped_leaves_the_state_as_it_was(error, monkeypatch):
    model, text = small(), ids(1, 20)
    state, plain = model.init_state(1), model.init_state(1)
    decoder = Decoder(model, state, "next_token")
    for t in range(8):
        decoder.step(text[:, t : t + 1])
        model(text[:, t : t + 1], plain, learn="next_token")
    before, learn, calls = state.clone(), segments.learn_segment, []

    def stopped(*given, **named):
        calls.append(learn(*given, **named))
        raise error

    monkeypatch.setattr(segments, "learn_segment", stopped)
    with pytest.raises(error):
        decoder.step(text[:, 8:9])
    monkeypatch.undo()
    assert len(calls) == 1 and same(state, before, 1e-12)
    for t in range(8, 20):
        token = text[:, t : t + 1]
        assert relative(decoder.step(token), model(token, plain, learn="next_token")[0]) < 1e-4
    assert same(state, plain)


def test_a_state_that_is_part_of_a_graph():
    """What a state shares with the model's weights is not written, and what a graph has kept is not changed
    unnoticed."""
    model = small(titans={"retain_to": "zero"})
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for B in (1, 2):
        state = model.init_state(B)  # deviations start at the weights: views of them, with their graph
        assert state.mixers[0].delta2.requires_grad
        generate(model, ids(B, 3), 30, state)
        with torch.no_grad():
            model(torch.cat([state.unread, ids(B, 9, 1)], 1), state)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    state = small().init_state(2)
    model = small()
    with torch.no_grad():
        model(ids(2, 5), state)
        decoder = Decoder(model, state)
        decoder.step(ids(2, 1))
    kept = state.mixers[0].delta2
    weight = torch.ones_like(kept, requires_grad=True)
    loss = (weight * kept).sum()
    with torch.no_grad():
        for t in range(4):
            decoder.step(ids(2, 1, t))
    assert served(decoder)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@torch.no_grad()
def test_defaults_of_the_process_mean_nothing():
    model, text = small(), ids(2, 9)
    want, _ = model(text)
    state = model.init_state(2)
    with torch.device("meta"):
        torch.set_default_dtype(torch.float16)
        try:
            decoder = Decoder(model, state)
            found = [decoder.step(text[:, t : t + 1], check_finite=True) for t in range(9)]
        finally:
            torch.set_default_dtype(torch.float32)
    assert served(decoder) and relative(torch.cat(found, 1), want) < 1e-4


@torch.no_grad()
def test_no_rows():
    model = small()
    decoder = Decoder(model, model.init_state(0))
    assert decoder.step(torch.zeros(0, 1, dtype=torch.long)).shape == (0, 1, V) and not served(decoder)


@pytest.mark.parametrize("learn", ["off", "next_token"])
@pytest.mark.parametrize("how", [
    {}, {"temperature": 0.8, "seed": 3}, {"temperature": 1.0, "top_k": 5, "stop": [[7], [3]]}
])
def test_generation_is_what_it_is_without(how, learn, monkeypatch):
    model, prompt = small(), ids(3, 21, 5)
    found = []
    for reason in (None, "no"):
        if reason:
            monkeypatch.setattr(native, "unserved", lambda *_, reason=reason: reason)
        out = generate(model, prompt, 30, lengths=[21, 9, 1], learn=learn, **how)
        more = generate(model, None, 12, out.state, learn=learn, **how)
        found.append((out, more))
    (a, b), (c, d) = found
    assert torch.equal(a.tokens, c.tokens) and a.lengths == c.lengths
    assert torch.equal(b.tokens, d.tokens) and same(b.state, d.state)


def test_what_is_not_served_is_named():
    model = small()
    assert native.unserved(model, None, False) is None and native.unserved(model, "cpp", False) is None
    assert "chunked" in native.unserved(model, "chunked", False)
    assert "float64" in native.unserved(small().double(), None, False)
    assert "ranks that are multiples of 8, not 4" in native.unserved(small(cms={"rank": 4}), None, False)
    assert native.unserved(small(cms={"rank": 8, "optimizer": "adam", "mlp": "gelu_erf"}), None, False) is None
    gated = small(cms={"mlp": "geglu"})
    assert "geglu" in native.unserved(gated, None, False) and native.unserved(gated, None, True) is None
    scaled = small(embed_scale=2.0)
    normed = HopeForCausalLM(HopeConfig(31, 16, 2, mixer="attention", num_heads=2, post_norm=True))
    assert native.unserved(scaled, None, False) is None and native.unserved(normed, None, False) is None
    hooked = small()
    hooked.blocks[1].cms.register_forward_hook(lambda *_: None)
    assert "blocks.1.cms" in native.unserved(hooked, None, False)
    adapted = small()
    nn.utils.parametrizations.weight_norm(adapted.blocks[0].mixer.out_proj)
    assert "out_proj" in native.unserved(adapted, None, False)
    subclass = small()
    subclass.__class__ = type("Other", (HopeForCausalLM,), {"logits": lambda self, h, lengths: None})
    assert "another class" in native.unserved(subclass, None, False)
    called = small()
    called.register_forward_hook(lambda *_: None)
    assert "hooked" in native.unserved(called, None, False)
    for change in (lambda m: setattr(m.norm, "eps", 0.1), lambda m: setattr(m.blocks[0].cms, "norm_eps", 0.1)):
        other = small()
        change(other)
        assert "norm" in native.unserved(other, None, False)
    with torch.inference_mode():
        frozen = small()
    assert "plain tensor" in native.unserved(frozen, None, False)
    replaced = small()
    replaced.blocks[0].mixer.gate_proj = nn.Linear(16, 16)  # with a bias
    assert "gate_proj" in native.unserved(replaced, None, False)


@torch.no_grad()
def test_factors_that_wait_are_read_by_pytorch():
    model, text = small(cms={"optimizer": "gd"}), ids(2, 30)
    for block in model.blocks:
        block.cms.pending = 8
    state, plain = model.init_state(2), model.init_state(2)
    decoder, ways = Decoder(model, state, "next_token"), set()
    for t in range(30):
        token = text[:, t : t + 1]
        assert relative(decoder.step(token), model(token, plain, learn="next_token")[0]) < 1e-4, t
        ways.add(served(decoder))
    assert ways == {True, False} and same(state, plain)


@pytest.mark.parametrize("case", ["default", "linear adaptive queries"])
@torch.no_grad()
def test_the_library_refuses_what_does_not_fit(case):
    model, linear = built(case), "linear" in case
    state = model.init_state(2)
    decoder = Decoder(model, state)
    decoder.step(ids(2, 1))
    call, before = decoder._native._call, state.clone()
    step = cpu_library.library().hope_token_step
    bad = {
        "B": (-1, 2**62), "d": (0, 12, -8, 2**62), "W": (-1, 2**62, 2**63 - 1), "vocab": (0, -1, 2**62),
        "blocks": (-1, 2**63 - 1), "threads": (0, -1, 2**62), "ids": (None,), "embed": (None,), "gain": (None,),
        "head": (None,), "logits": (None,), "work": (None,),
    }
    for name, values in bad.items():
        for value in values:
            wrong = type(call).from_buffer_copy(call)
            setattr(wrong, name, value)
            assert step(ctypes.byref(wrong)) == 2, (name, value)
    for name, values in {"H": (0, 3), "D": (12,), "N": (8 if linear else 0, 4), "Mf": (2, 3 if linear else 4),
                         "chunk_memory": (0, 3), "delta2": (None,), "pos": (None,), "activation": (9,),
                         "s1" if linear else "base1": (ids(2, 1).data_ptr() if linear else None,),
                         "alpha_bias": (None,)}.items():
        for value in values:
            blocks = type(call.block.contents) * 2
            copied = blocks.from_buffer_copy(ctypes.cast(call.block, ctypes.POINTER(blocks)).contents)
            memories = type(copied[1].memories.contents).from_buffer_copy(copied[1].memories.contents)
            setattr(memories.titans, name, value)
            copied[1].memories = ctypes.pointer(memories)
            wrong = type(call).from_buffer_copy(call)
            wrong.block = ctypes.cast(copied, type(call.block))
            assert step(ctypes.byref(wrong)) == 2, (name, value)
    assert step(None) == 2 and same(state, before, 1e-12)


@torch.no_grad()
def test_who_decodes_alone_looks_at_the_weights_once():
    model, text = built("default"), ids(1, 6)
    state = model.init_state(1)
    decoder, looked = Decoder(model, state), []
    decoder.alone = True
    holds = identity._Known.holds
    with mock.patch.object(identity._Known, "holds", lambda known: looked.append(known) or holds(known)):
        steps = [decoder.step(token) for token in text.split(1, 1)]
        assert served(decoder) and len(looked) == 1
        decoder.alone = False
        model.embed.weight.mul_(2)
        changed = decoder.step(text[:, :1])
        assert len(looked) == 2
    doubled = model.embed.weight.clone()
    model.embed.weight.div_(2)
    expected, other = model(text, model.init_state(1))
    assert torch.equal(torch.cat(steps, 1), expected)
    model.embed.weight.copy_(doubled)
    other.adopt(model)
    assert torch.equal(changed, model(text[:, :1], other)[0]) and str(state.fingerprint) == str(other.fingerprint)


@torch.no_grad()
def test_decoders_share_what_they_keep_of_a_models_matrices():
    model, text = built("default"), ids(1, 5)
    first, second = (Decoder(model, model.init_state(1)) for _ in range(2))
    assert torch.equal(first.step(text[:, :1]), second.step(text[:, :1]))
    assert first._strips is second._strips and len(first._strips) > 8
    held = {of[2].data_ptr() for of in first._strips.values()}
    assert held == {of[2].data_ptr() for of in Decoder(model, model.init_state(1))._strips.values()}
    model.blocks[0].mixer.q_proj.weight.mul_(0.5)
    want, _ = model(text[:, 1:2], first.state.clone())
    assert all(torch.equal(decoder.step(text[:, 1:2]), want) for decoder in (first, second))
    assert first._strips is second._strips


@torch.no_grad()
def test_a_decoder_sees_steps_of_optimizers_that_move_no_version():
    model, text = built("default"), ids(1, 8)
    state = model.init_state(1)
    decoder = Decoder(model, state)
    for token in text[:, :3].split(1, 1):
        decoder.step(token)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    state.adopt(model)
    expected, _ = model(text[:, 3:4], state.clone())
    assert torch.equal(decoder.step(text[:, 3:4]), expected)


@torch.no_grad()
def test_a_decoder_follows_weights_that_rows_deviate_from():
    model, text = built("default"), ids(2, 40)
    with torch.enable_grad():
        _, state = model(text[:, :17], learn="next_token", outer="first_order")
    state = state.detach()
    decoder = Decoder(model, state)
    decoder.step(text[:, 17:18])
    model.blocks[0].cms.levels[0].up.mul_(1.1)
    expected, _ = model(text[:, 18:19], state.clone())
    assert torch.equal(decoder.step(text[:, 18:19]), expected)
