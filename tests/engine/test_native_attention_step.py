"""A decoder's step in one call of C++ for models with attention: the bits of the model, whatever came before, whatever
changes between two steps, and whoever shares the cache."""

import ctypes

import pytest
import torch
from attention_model import OPTIONS, D, V, built, config, converted, ids
from torch import nn

from hope_kernels import CMSConfig, load_state
from hope_kernels.engine import native
from hope_kernels.engine.decoder import Decoder
from hope_kernels.engine.native_cache import AHEAD, AttentionBlock
from hope_kernels.engine.native_level import LevelLowRank, LevelVectors
from hope_kernels.ops.shared import cpu_library

pytestmark = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"cpp: {cpu_library.unavailable()}")

named = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
T = 170  # past renewals of caches, with a window and without, and more positions than angles are made at once


def backend_of(options) -> str | None:
    """The one that reads all of the model in C++."""
    return "cpp" if options.get("post_norm") else None


def same(a, b) -> bool:
    """Two states, bit for bit, and which slots of their caches have been written."""
    if [list(x) for x in a._counters()] != [list(x) for x in b._counters()]:
        return False
    if [m.filled for m in a.mixers] != [m.filled for m in b.mixers]:
        return False
    return all(map(torch.equal, a.tensors(), b.tensors()))


def served(decoder: Decoder) -> bool:
    return decoder._native is not None


def steps(decoder: Decoder, text: torch.Tensor) -> torch.Tensor:
    return torch.cat([decoder.step(token) for token in text.split(1, 1)], 1)


def follow(decoder: Decoder, plain, text: torch.Tensor, learn="off", backend=None) -> None:
    """The decoder and its model read ``text``, token by token, to the same bits."""
    for t, token in enumerate(text.split(1, 1)):
        want, _ = decoder.model(token, plain, learn=learn, backend=backend)
        assert torch.equal(decoder.step(token), want) and same(decoder.state, plain), t


@pytest.mark.parametrize("learn", ["off", "next_token"])
@named
@torch.no_grad()
def test_equals_the_model(options, learn):
    """Rows at different places, one of them at its beginning."""
    model, text, backend = built(options), ids(3, T), backend_of(options)
    state = model.init_state(3)
    model(text[:, :11], state, [11, 6, 0], learn=learn, backend=backend)
    plain = state.clone()
    decoder = Decoder(model, state, learn, backend)
    follow(decoder, plain, text[:, 11:], learn, backend)
    assert served(decoder) and T - 11 > AHEAD and (T > state.mixers[0].k.shape[1] or "window" not in options)
    state.validate("test", values=True)


@named
@torch.no_grad()
def test_equals_one_call_and_rows_alone(options):
    model, text, backend = built(options), ids(3, T), backend_of(options)
    decoder = Decoder(model, model.init_state(3), backend=backend)
    whole, end = model(text, backend=backend)
    assert torch.equal(steps(decoder, text), whole) and decoder.state.pos == end.pos
    alone = Decoder(model, model.init_state(1), backend=backend)
    assert torch.equal(steps(alone, text[1:2]), whole[1:2])
    after, _ = model(text[:, :9], decoder.state, backend=backend)
    assert torch.equal(after, model(text[:, :9], end, backend=backend)[0])


@pytest.mark.parametrize("learn", ["off", "next_token"])
@pytest.mark.parametrize("mlp, post_norm", [("swiglu", False), ("geglu", True)])
@torch.no_grad()
def test_a_converted_model_where_the_backend_is_asked_for(mlp, post_norm, learn):
    model, text = built(converted(mlp, post_norm)), ids(2, 150)
    for backend in ("cpp", None):
        state = model.init_state(2)
        model(text[:, :9], state, [9, 4], learn=learn, backend=backend)
        plain = state.clone()
        decoder = Decoder(model, state, learn, backend)
        follow(decoder, plain, text[:, 9 : 150 if backend else 40], learn, backend)
        assert served(decoder) == (backend == "cpp")


def per_block() -> dict:
    return {"window": (None, 9), "sinks": (0, 3), "rope_theta": (10000.0, 500.0)}


@torch.no_grad()
def test_blocks_of_several_kinds():
    model, text = built(per_block()), ids(2, 150)
    state = model.init_state(2)
    decoder = Decoder(model, state)
    follow(decoder, model.init_state(2), text)
    assert served(decoder) and torch.equal(steps(Decoder(model, model.init_state(2)), text), model(text)[0])


@torch.no_grad()
def test_numbers_that_are_denormal():
    """PyTorch flushes none, where its bias, rotation and residual are the model's."""
    model, text = built({"attention_bias": True, "tie_embeddings": False}), ids(2, 30)
    model.embed.weight[::2] = 0
    model.embed.weight[1::2] *= 1e-38
    for block in model.blocks:
        block.mixer.k_proj.bias.mul_(1e-39), block.mixer.v_proj.bias.mul_(1e-38), block.mixer.o_proj.weight.mul_(0.1)
    state, tiny = model.init_state(2), torch.finfo(torch.float32).tiny
    follow(Decoder(model, state), model.init_state(2), text)
    k, v = state.mixers[0].k[0, :30], state.mixers[0].v[0, :30]
    assert all(((t != 0) & (t.abs() < tiny)).any() for t in (k, v))


@named
@torch.no_grad()
def test_threads_and_widths(options):
    model, text, backend = built(options), ids(5, 80), backend_of(options)
    model = model if options else built(config({}).replace(cms=CMSConfig(D, (8,), expansion=64.0)))  # several threads
    ask, before = cpu_library.library().hope_cpu_width, torch.get_num_threads()
    most, found = ask(0), []
    try:
        for bits, threads in ((most, 1), (most, 2), (most, 5), (256, 1)):
            ask(bits)
            torch.set_num_threads(threads)
            decoder = Decoder(model, model.init_state(5), backend=backend)
            found.append((steps(decoder, text), decoder.state))
            assert served(decoder)
    finally:
        ask(most)
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][0], logits) and same(found[0][1], state) for logits, state in found[1:])


# where the token finds room, and where the cache has to grow for it (with a window: to be renewed)
@pytest.mark.parametrize("at", [8, 64, 128])
@pytest.mark.parametrize("options", [{}, OPTIONS["window and sinks"]], ids=["full", "window"])
@torch.no_grad()
def test_a_step_that_fails_reads_nothing(options, at):
    model, text = built(options), ids(2, at + 12)
    state = model.init_state(2)
    decoder = Decoder(model, state)
    for token in text[:, :at].split(1, 1):
        decoder.step(token, check_finite=True)
    before, shared, good = state.clone(), [m.snapshot() for m in state.mixers], model.norm.weight.clone()
    filled = [list(m.filled) for m in state.mixers]
    for part in (model.norm.weight, model.blocks[0].mixer.v_proj.weight):  # the cache would have NaN, too
        good = part.clone()
        part[3] = torch.nan
        with pytest.raises(ValueError, match="non-finite logits .* has not been read"):
            decoder.step(text[:, at : at + 1], check_finite=True)
        part.copy_(good)
        assert served(decoder) and all(map(torch.equal, state.tensors(), before.tensors()))
        assert [m.filled for m in state.mixers] == filled and state.pos == [at, at]
    follow(decoder, before.clone(), text[:, at:])
    for old, now in zip(shared, before.mixers):
        assert old.pos == now.pos and torch.equal(old.compact().k, now.compact().k)


@torch.no_grad()
def test_memory_that_runs_out_leaves_the_state_as_it_was(monkeypatch):
    model, text = built({}), ids(2, 70)
    state = model.init_state(2)
    decoder = Decoder(model, state)
    steps(decoder, text[:, :64])
    before, filled = state.clone(), [list(m.filled) for m in state.mixers]
    for kind, outcome in ((MemoryError, 1), (KeyboardInterrupt, None)):
        def failed(_, outcome=outcome):
            if outcome is None:
                raise KeyboardInterrupt
            return outcome

        with monkeypatch.context() as m, pytest.raises(kind):
            m.setattr(native._step, "_bound", failed)
            decoder.step(text[:, 64:65])
        assert all(map(torch.equal, state.tensors(), before.tensors()))
        assert [m.filled for m in state.mixers] == filled
    follow(decoder, before, text[:, 64:])


@named
@torch.no_grad()
def test_snapshots_share_the_cache(options):
    """Whoever writes on first has the storage; what the others see stays as it was."""
    model, backend = built(options), backend_of(options)
    text, other, start = ids(2, 60), ids(2, 60, 3), ids(2, 40, 4)

    def begun():
        _, state = model(start, backend=backend)
        return state

    want, _ = model(text, begun(), backend=backend)
    instead, _ = model(other, begun(), backend=backend)
    state = begun()
    apart = state.apart()  # on the same storage
    assert apart.mixers[0].k.data_ptr() == state.mixers[0].k.data_ptr()
    decoder, second = Decoder(model, state, backend=backend), Decoder(model, apart, backend=backend)
    found, others = [], []
    for token, one in zip(text.split(1, 1), other.split(1, 1)):
        found.append(decoder.step(token))
        others.append(second.step(one))
    assert torch.equal(torch.cat(found, 1), want) and torch.equal(torch.cat(others, 1), instead)
    assert apart.mixers[0].k.data_ptr() != state.mixers[0].k.data_ptr()
    # what the model reads from a snapshot, after the decoder has gone on
    state = begun()
    decoder, early = Decoder(model, state, backend=backend), state.apart()
    assert torch.equal(steps(decoder, text), want)
    assert torch.equal(model(other, early, backend=backend)[0], instead)


@named
@torch.no_grad()
def test_files_between_steps(options, tmp_path):
    model, text, backend = built(options), ids(2, 100), backend_of(options)
    whole, _ = model(text, backend=backend)
    state, found = model.init_state(2), []
    for part in text.split([30, 1, 40, 29], 1):
        decoder = Decoder(model, state, backend=backend)
        found.append(steps(decoder, part))
        decoder.state.save(tmp_path / "state")
        state = load_state(tmp_path / "state")
        assert served(decoder)
    assert torch.equal(torch.cat(found, 1), whole)


@torch.no_grad()
def test_rows_of_their_own_and_company():
    """A row that joins others, and leaves them."""
    model, text = built(OPTIONS["window and sinks"]), ids(3, 90)
    whole, _ = model(text)
    decoders = [Decoder(model, model.init_state(1)) for _ in range(3)]
    for d, row, n in zip(decoders, text, (20, 1, 33)):
        steps(d, row[None, :n])
    state = decoders[0].state.join([d.state for d in decoders])
    both, rest = Decoder(model, state), torch.stack([r[n : n + 40] for r, n in zip(text, (20, 1, 33))])
    found = steps(both, rest)
    for b, n in enumerate((20, 1, 33)):
        assert torch.equal(found[b], whole[b, n : n + 40]), b
    alone = Decoder(model, both.state.select([2]))
    assert torch.equal(steps(alone, text[2:, 73:]), whole[2:, 73:])


def changes():
    def weights(model, *_):
        model.blocks[1].mixer.q_proj.weight.mul_(0.5)

    def bias(model, *_):
        model.blocks[1].mixer.k_proj.bias = nn.Parameter(torch.randn(16 * 3))

    def module(model, *_):
        model.blocks[1].mixer.o_proj = nn.Linear(48, 48, bias=False)

    def level(model, *_):
        model.blocks[0].cms.levels[1]["up"] = nn.Parameter(torch.randn(96, 48))

    def cache(model, *states):
        for s in states:
            s.mixers[0].k.mul_(0.5)

    def another_call(model, *states):
        for s in states:
            model(ids(2, 70, 9), s)

    def ragged(model, *states):
        for s in states:
            model(ids(2, 70, 9), s, lengths=[3, 70])

    def forget(model, *states):
        for s in states:
            s.mixers[1].v = torch.zeros_like(s.mixers[1].v)

    return [weights, bias, module, level, cache, another_call, ragged, forget]


@pytest.mark.parametrize("change", changes(), ids=lambda f: f.__name__)
@torch.no_grad()
def test_what_changes_between_two_steps_is_seen(change):
    model, text = built({"attention_bias": True}), ids(2, 30)
    state, plain = model.init_state(2), model.init_state(2)
    decoder = Decoder(model, state)
    follow(decoder, plain, text[:, :9])
    torch.manual_seed(3)
    change(model, state, plain)
    follow(decoder, plain, text[:, 9:])
    assert served(decoder)


def test_inference_mode_and_graphs():
    model, text = built({}), ids(1, 150)
    with torch.no_grad():
        whole, _ = model(text)
    with torch.inference_mode():
        decoder = Decoder(model, model.init_state(1))
        found = [steps(decoder, text[:, :70])]
    found.append(steps(decoder, text[:, 70:]))  # a cache that was made in inference mode
    assert served(decoder) and torch.equal(torch.cat(found, 1), whole)
    kept = decoder.state.mixers[0].k
    loss = (torch.ones_like(kept, requires_grad=True) * kept).sum()
    decoder.step(text[:, :1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@torch.no_grad()
def test_what_c_plus_plus_does_not_serve_is_the_models_own():
    """fp64, and factors that wait, which come and go."""
    text = ids(2, 100)
    double = built({"window": 9, "sinks": 2}).double()
    decoder = Decoder(double, double.init_state(2))
    follow(decoder, double.init_state(2), text)
    assert not served(decoder)
    waiting = built(config({}).replace(cms=CMSConfig(D, (4, 16), expansion=2.0, lr=0.02, optimizer="gd")))
    for block in waiting.blocks:
        block.cms.pending = 8
    state, plain, ways = waiting.init_state(2), waiting.init_state(2), set()
    decoder = Decoder(waiting, state, "next_token")
    for token in text[:, :40].split(1, 1):
        want, _ = waiting(token, plain, learn="next_token")
        torch.testing.assert_close(decoder.step(token), want, rtol=1e-4, atol=1e-4)
        ways.add(served(decoder))
    assert ways == {True, False} and state.pos == plain.pos and state.seen == plain.seen


@pytest.mark.parametrize("learn", ["off", "next_token"])
@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "top_k": 5, "seed": 3, "stop": [[7], [3]]}])
def test_generation_is_what_it_is_without(how, learn, monkeypatch):
    model, prompt, found = built(OPTIONS["window and sinks"]), ids(3, 21, 5), []
    for reason in (None, "no"):
        if reason:
            monkeypatch.setattr(native, "unserved", lambda *_, reason=reason: reason)
        out = model.generate(prompt, 90, lengths=[21, 9, 1], learn=learn, **how)
        more = model.generate(None, 12, out.state, learn=learn, **how)
        found.append((out, more))
    (a, b), (c, d) = found
    assert torch.equal(a.tokens, c.tokens) and a.lengths == c.lengths and torch.equal(b.tokens, d.tokens)
    assert same(b.state, d.state)


def test_what_is_not_served_is_named():
    model = built({})
    assert native.unserved(model, None, False) is None and native.unserved(model, "cpp", False) is None
    norms = built({"qk_norm": True, "num_heads": 4})
    assert "multiples of 8, not 12" in native.unserved(norms, None, False)
    gated = built(converted("swiglu", False))
    assert all("bits of its original" in native.unserved(gated, None, learning) for learning in (False, True))
    assert native.unserved(gated, "cpp", False) is None
    own = built(converted("swiglu", False).replace(rope_dtype="float64"))
    assert "swiglu" in native.unserved(own, None, False) and native.unserved(own, None, True) is None
    assert native.unserved(built(converted("gelu_erf", False)), "cpp", False) is None
    added = built({})
    added.blocks[1].mixer.o_proj = nn.Linear(48, 48)
    assert "blocks.1.mixer.o_proj" in native.unserved(added, None, False)
    hooked = built({})
    hooked.blocks[0].mixer.register_forward_hook(lambda *_: None)
    assert "blocks.0.mixer" in native.unserved(hooked, None, False)


@torch.no_grad()
def test_the_library_refuses_what_does_not_fit():
    model = built(OPTIONS["window and sinks"])
    state = model.init_state(2)
    decoder = Decoder(model, state)
    steps(decoder, ids(2, 3))
    call, before = decoder._native._call, state.clone()
    step, kind = cpu_library.library().hope_token_step, type(call.block.contents) * 2
    logits = torch.empty(2, V)

    def refused(change) -> bool:
        blocks = kind.from_buffer_copy(ctypes.cast(call.block, ctypes.POINTER(kind)).contents)
        attention = AttentionBlock.from_buffer_copy(blocks[1].attention.contents)
        blocks[1].attention = ctypes.pointer(attention)
        change(blocks[1], attention)
        wrong = type(call).from_buffer_copy(call)
        wrong.block, wrong.logits = ctypes.cast(blocks, type(call.block)), logits.data_ptr()
        return step(ctypes.byref(wrong)) == 2

    for name in ("k", "v", "q_proj", "k_proj", "v_proj", "o_proj", "cos", "sin", "far_cos", "far_sin"):
        assert refused(lambda _, a, name=name: setattr(a, name, None)), name
    one = (ctypes.c_float * 64)()
    assert refused(lambda _, a: setattr(a, "q_gain", ctypes.addressof(one))) and refused(
        lambda _, a: setattr(a, "ahead", -1)
    )
    for name, values in {"B": (1, 3, -1), "T": (0, 2), "H": (0, 4, 2**40), "Hkv": (0, 2), "D": (0, 15, 2**40),
                         "slots": (0, 2, -1, 2**60), "window": (-1, 0), "sinks": (-1, 0), "scale": (float("nan"),),
                         "used": (None,), "base": (None,), "len": (None,)}.items():
        for value in values:
            assert refused(lambda _, a, name=name, value=value: setattr(a.call, name, value)), (name, value)
    for wrong in ([64, 3], [-1, 3]):
        rows = (ctypes.c_int64 * 2)(*wrong)
        assert refused(lambda _, a, rows=rows: setattr(a.call, "used", ctypes.addressof(rows))), wrong
    none = (ctypes.c_int64 * 2)(1, 0)
    assert refused(lambda _, a: setattr(a.call, "len", ctypes.addressof(none)))
    assert refused(lambda b, _: setattr(b, "attention", None)) and refused(lambda b, _: setattr(b, "gain", None))
    for name, values in {"kind": (-1, 1, 4), "N": (0, 12), "up": (None,), "vectors": (LevelVectors(),),
                         "low": (LevelLowRank(rank=8), LevelLowRank(rank=-8))}.items():
        for value in values:
            def changed(b, _, name=name, value=value):
                level = type(b.level.contents).from_buffer_copy(b.level.contents)
                setattr(level, name, value)
                b.levels, b.level = 1, ctypes.pointer(level)

            assert refused(changed), (name, value)
    assert same(state, before) and not refused(lambda *_: None)
