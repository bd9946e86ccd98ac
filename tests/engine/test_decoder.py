"""Decoding over one set of buffers equals the model, token by token and in one call; nothing but the capture
itself needs a GPU."""

from collections import Counter

import pytest
import torch
from numerics import relative
from torch.utils._python_dispatch import TorchDispatchMode

from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM, TitansConfig, available_backends, load_state
from hope_kernels.engine.decoder import Decoder
from hope_kernels.ops.cms.state import CMSState

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
V = 32


def tiny(cms=None, titans=None, layers=2, dtype=torch.float64, d=8, **options) -> HopeForCausalLM:
    torch.manual_seed(0)
    titans = titans or TitansConfig(d, 2, chunk_memory=4, chunk_other=2)
    cms = cms or CMSConfig(d, (4, 8, 16), expansion=2.0, lr=0.02)
    model = HopeForCausalLM(HopeConfig(V, d, layers, titans=titans, cms=cms, **options), dtype=dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def variants():
    yield "hope", tiny()
    yield "titans", tiny(
        titans=TitansConfig.preset("titans", d_model=8, num_heads=2, chunk_memory=4, chunk_other=4), mixer="titans"
    )
    yield "nested-momentum", tiny(
        CMSConfig(8, (4, 8, 16), variant="nested", optimizer="momentum", lr=0.01, expansion=1.0)
    )
    yield "independent-muon", tiny(
        CMSConfig(8, (2, 6), variant="independent", optimizer="muon", mlp="swiglu", norm="layernorm")
    )
    yield "two-periods", tiny(
        (CMSConfig(8, (4,), lr=0.02, expansion=1.0), CMSConfig(8, (8, 16), lr=0.01, expansion=1.0))
    )
    yield "segments of one", tiny(CMSConfig(8, (1, 3), lr=0.02))
    yield "attention", tiny(mixer="attention", num_heads=2, window=9, sinks=2)
    yield "rate zero", tiny(CMSConfig(8, (4, 8), lr=0.0))


MODELS = dict(variants())
named = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


def ids(batch: int, tokens: int, seed: int = 0, device="cpu") -> torch.Tensor:
    return torch.randint(0, V, (batch, tokens), generator=torch.Generator().manual_seed(seed)).to(device)


def same(a, b) -> bool:
    """Two states: every counter, and every tensor to rounding."""
    counters = [list(x) for x in a._counters()] == [list(x) for x in b._counters()]
    close = all(
        torch.allclose(x.double(), y.double(), rtol=1e-9, atol=1e-12)
        for x, y in zip(a.tensors(), b.tensors(), strict=True)
    )
    return counters and close


@named
@pytest.mark.parametrize("learn", ["off", "next_token"])
def test_equals_token_by_token_and_one_call(model, learn):
    text, start = ids(2, 21), 3 if learn == "off" else 0
    with torch.no_grad():
        whole, end = model(text, learn=learn)
        state, plain = model.init_state(2), model.init_state(2)
        if start:
            for s in (state, plain):
                model(text[:, :start], s, learn=learn)
        decoder = Decoder(model, state, learn)
        for t in range(start, 21):
            logits = decoder.step(text[:, t : t + 1])
            want, _ = model(text[:, t : t + 1], plain, learn=learn)
            assert relative(logits, want) < 1e-10 and relative(logits[:, 0], whole[:, t]) < 1e-10, t
            assert same(state, plain), t
    assert decoder.captures == 0 and decoder.state is state and state.pos == end.pos == [21, 21]


@named
def test_rows_at_different_places(model):
    text = ids(3, 36, 1)
    with torch.no_grad():
        state = model.init_state(3)
        model(text[:, :17], state, lengths=[17, 4, 0], learn="next_token")
        plain = state.clone()
        decoder = Decoder(model, state, "next_token")
        for t in range(17, 36):
            logits, want = decoder.step(text[:, t : t + 1]), model(text[:, t : t + 1], plain, learn="next_token")[0]
            assert relative(logits, want) < 1e-10 and same(state, plain), t


def test_modes_change_and_others_read_between_steps():
    """A segment with a token read with learn="off" teaches nothing, whoever reads it; a decoder sees that
    others have moved its state."""
    model, text = MODELS["hope"], ids(2, 70, 2)
    with torch.no_grad():
        state, plain = model.init_state(2), model.init_state(2)
        decoders = {mode: Decoder(model, state, mode) for mode in ("off", "next_token")}
        for t in range(70):
            token = text[:, t : t + 1]
            mode = "off" if t in (13, 30, 31) or 40 <= t < 44 else "next_token"
            if t % 11 == 5:
                logits, _ = model(token, state, learn=mode)
            else:
                logits = decoders[mode].step(token)
            assert relative(logits, model(token, plain, learn=mode)[0]) < 1e-10 and same(state, plain), t


@pytest.mark.parametrize(("pending", "want"), [(None, [4, 8, 16]), (8, [4, 8, 12, 16])])
def test_buffers_stay_where_they_are(pending, want):
    """What a graph would hold: the addresses of a step change with the first refresh of a level of 4, 8 or 16
    tokens, and with its first fold where refreshes wait (the level of 4 has room for two, that of 8 for
    one)."""
    model, text, seen = tiny(), ids(2, 70), []
    for block in model.blocks:
        block.cms.pending = pending
    with torch.no_grad():
        decoder, plain = Decoder(model, model.init_state(2), "next_token"), model.init_state(2)
        decoder._whole = False  # as with the backends that a graph is made of
        for t in range(70):
            logits = decoder.step(text[:, t : t + 1])
            seen.append(repr(decoder._signature))
            assert relative(logits, model(text[:, t : t + 1], plain, learn="next_token")[0]) < 1e-10
    assert [t for t in range(1, 70) if seen[t] != seen[t - 1]] == want
    assert isinstance(decoder.state.cms[0], CMSState) and decoder.state.cms[0].private is None


def test_a_session_saved_between_steps_goes_on(tmp_path):
    model, text = MODELS["hope"], ids(1, 50)
    with torch.no_grad():
        whole, _ = model(text, learn="next_token")
        decoder = Decoder(model, model.init_state(1), "next_token")
        for t in range(30):
            decoder.step(text[:, t : t + 1])
        decoder.state.save(tmp_path / "s")
        restored = Decoder(model, load_state(tmp_path / "s"), "next_token")
        for t in range(30, 50):
            assert relative(restored.step(text[:, t : t + 1])[:, 0], whole[:, t]) < 1e-10


def test_states_from_inference_mode():
    model, text = MODELS["hope"], ids(2, 40)
    with torch.no_grad():
        whole, _ = model(text, learn="next_token")
    with torch.inference_mode():
        _, state = model(text[:, :21], learn="next_token")
    decoder = Decoder(model, state, "next_token")
    for t in range(21, 40):
        assert relative(decoder.step(text[:, t : t + 1])[:, 0], whole[:, t]) < 1e-10


@pytest.mark.parametrize("learn", ["off", "next_token"])
def test_generate_through_a_decoder(learn):
    """Rows that end leave the decoder behind; the state is the same, and goes on."""
    model, prompt = MODELS["hope"], ids(3, 19, 4)
    options = {"learn": learn, "temperature": 1.0, "seed": 5, "lengths": [19, 11, 4]}
    free = model.generate(prompt, 40, **options)
    stop = [free.tokens[0, 11:13].tolist(), free.tokens[1, 20:22].tolist()]
    outs = [model.generate(prompt, 40, stop=stop, graph=graph, **options) for graph in (True, False)]
    assert min(outs[0].lengths) < max(outs[0].lengths) and outs[0].lengths == outs[1].lengths
    assert torch.equal(outs[0].tokens, outs[1].tokens) and same(outs[0].state, outs[1].state)
    more = [
        model.generate(None, 9, out.state, learn=learn, graph=graph).tokens
        for out, graph in zip(outs, (True, False))
    ]
    assert torch.equal(*more)


def test_generate_sees_logits_that_are_not_finite():
    model = tiny()
    with torch.no_grad():
        def diverge(_) -> None:
            model.norm.weight.fill_(float("nan"))

        with pytest.raises(ValueError, match="non-finite"):
            model.generate(ids(1, 5), 5, graph=True, on_token=diverge)


def test_errors():
    model = MODELS["hope"]
    state = model.init_state(2)
    attention = HopeForCausalLM(
        HopeConfig(V, 8, 1, mixer="attention", num_heads=2, num_kv_heads=1, cms=CMSConfig(8, (4,)))
    )
    with pytest.raises(ValueError, match="capture is True, and the model has attention"):
        Decoder(attention, attention.init_state(1), capture=True)
    with pytest.raises(ValueError, match="learn is 'on'"):
        Decoder(model, state, "on")
    with pytest.raises(ValueError, match="argument state belongs to"):
        Decoder(model, MODELS["titans"].init_state(2))
    with pytest.raises(ValueError, match="capture is True, which needs a CUDA device"):
        Decoder(model, state, capture=True)
    decoder = Decoder(model, state)
    for tokens, words in [
        (torch.zeros(3, 1).long(), r"shape \[3, 1\]"), (torch.zeros(2, 1), "dtype"),
        (torch.full((2, 1), 32), "has 32")
    ]:
        with pytest.raises(ValueError, match=words):
            decoder.step(tokens)
    assert state.pos == [0, 0]


kernels = pytest.mark.skipif(
    available_backends()["triton"] is not None, reason=f"triton: {available_backends()['triton']}"
)


def for_kernels() -> HopeForCausalLM:
    return tiny(CMSConfig(32, (16, 32), lr=0.02, expansion=1.0), TitansConfig(32), 1, torch.float32, 32).to(DEVICE)


@kernels
def test_the_step_that_is_captured_has_the_bits_of_the_model_on_the_kernels():
    """The fast weights are written in place, by what the device knows; rows at different places, over
    boundaries of both."""
    model, text = for_kernels(), ids(2, 24, device=DEVICE)
    with torch.no_grad():
        state = model.init_state(2)
        model(text[:, :14], state, lengths=[14, 13], learn="next_token")
        plain = state.clone()
        decoder, places = (
            Decoder(model, state, "next_token", "triton", capture=False),
            [t.data_ptr() for t in state.mixers[0].tensors()]
        )
        for t in range(3):
            token = text[:, t : t + 1]
            want, _ = model(token, plain, learn="next_token", backend="triton")
            assert torch.equal(decoder.step(token), want), t
    assert state.pos == [17, 16] and [list(c) for c in state._counters()] == [list(c) for c in plain._counters()]
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), plain.tensors(), strict=True))
    assert places == [t.data_ptr() for t in state.mixers[0].tensors()]
    assert list(state.synchronize().pos) == [17, 16]


@kernels
def test_the_step_that_is_captured_exchanges_nothing_with_the_host():
    """No value is read back and no tensor is made from a list: a graph could not hold either. Nor is anything
    of the memory copied: what is written back of a layer is the convolution's last inputs."""
    called = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    model, text = for_kernels(), ids(2, 17, device=DEVICE)
    with torch.no_grad():
        state = model.init_state(2)
        model(text, state, learn="next_token")
        decoder = Decoder(model, state, "next_token", "triton", capture=False)
        decoder.step(text[:, :1])
        with Watch():
            decoder._step()
            step = Counter(called)
            called.clear()
            torch.tensor([1, 2])
            torch.ones(2).nonzero()[0].item()
    host = {"aten.lift_fresh.default", "aten._local_scalar_dense.default", "aten.nonzero.default"}
    assert host <= set(called)  # it would have been seen
    assert not set(step) & host and step["hope_kernels.titans_scan.default"] == 1
    assert step["aten.clone.default"] == 0 and step["aten.copy_.default"] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("learn", ["off", "next_token"])
@pytest.mark.parametrize("start", [0, 15, 16])
def test_captured_decoding_has_the_bits_of_the_model(learn, start):
    model, text = for_kernels(), ids(2, 100, device=DEVICE)
    with torch.no_grad():
        state = model.init_state(2)
        if start:
            model(text[:, :start], state, learn=learn, backend="triton")
        plain = state.clone()
        decoder = Decoder(model, state, learn, "triton")
        for t in range(start, 100):
            want, _ = model(text[:, t : t + 1], plain, learn=learn, backend="triton")
            assert torch.equal(decoder.step(text[:, t : t + 1]), want), t
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), plain.tensors(), strict=True))
    assert list(state.pos) == list(state.synchronize().pos) == [100, 100]
    # one more for each level's first refresh after it
    assert decoder.captures == (1 if learn == "off" else 2 if start == 16 else 3)
