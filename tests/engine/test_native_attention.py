"""Models with attention that one call of C++ reads have the bits of their layers one by one, and keep what these
keep."""

import ctypes

import attention_model
import pytest
import torch
from attention_model import D, built, ids

from hope_kernels import CMSConfig
from hope_kernels.engine import native_attention, native_segment
from hope_kernels.engine.native_attention_mixer import AttentionMixer
from hope_kernels.ops.shared import cpu_library

pytestmark = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"cpp: {cpu_library.unavailable()}")

# but for what is read layer by layer
OPTIONS = {name: options for name, options in attention_model.OPTIONS.items() if "post_norm" not in options} | {
    "heads of 6": {"num_heads": 8, "rope_scaling": {"rope_type": "linear", "factor": 2}, "tie_embeddings": False},
    "blocks of their own": {"window": (None, 9), "rope_theta": (1e4, 5e2)},
    "no CMS": {"cms": None},
    "nested": {"cms": CMSConfig(D, (4, 16), variant="nested", lr=0.02)},
}
named = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def same_cache(a, b) -> bool:
    """Of what both still keep: how much that is depends on the calls."""
    for x, y in zip(a.mixers, b.mixers):
        assert list(x.pos) == list(y.pos) and list(x.lost) == list(y.lost)
        sinks = x.config.sight[1]
        for row, (p, q) in enumerate(zip(x.base, y.base)):
            first = sinks + max(p, q)
            for s, t in ((x.k, y.k), (x.v, y.v)):
                own, other = s[row, : x.used()[row]], t[row, : y.used()[row]]
                if not torch.equal(own[:sinks], other[:sinks]) or not torch.equal(own[first - p :], other[first - q :]):
                    return False
    return True


@pytest.fixture
def layers(monkeypatch):
    """Reads layer by layer."""
    def read(model, *given, **options):
        with monkeypatch.context() as m:
            m.setattr(native_attention, "serves", lambda *_: False)
            m.setattr(native_segment, "unserved", lambda *_: "layer by layer")
            return model(*given, **options)

    return read


@named
@torch.no_grad()
def test_has_the_bits_of_the_layers(options, layers, monkeypatch):
    model, text, lengths = built(options), ids(4, 130), [130, 77, 1, 0]
    assert native_attention.serves(model, model.init_state(1), None)
    _, learned = model(ids(4, 37, 5), learn="next_token" if model.learns else "off", lengths=[37, 20, 36, 4])
    for piece in (16, 4096):
        monkeypatch.setattr(native_attention, "PIECE", piece)
        for start in (None, learned):
            ours, theirs = (None if start is None else start.clone() for _ in range(2))
            for output in ("logits", "losses", "logits"):
                a, ours = model(text, ours, lengths=lengths, output=output)
                b, theirs = layers(model, text, theirs, lengths=lengths, output=output)
                for x, y in zip(*((a, b) if output == "losses" else ([a], [b]))):
                    assert torch.equal(x, y)
                assert same_cache(ours, theirs)


@named
@torch.no_grad()
def test_a_state_goes_on_elsewhere(options, layers):
    """Read here and there in turns; and beside a copy that shares its cache."""
    model, text = built(options), ids(2, 150)
    whole, _ = layers(model, text)
    for first, second in ((model, layers), (layers, model)):
        state, parts = None, []
        for i, (a, b) in enumerate(((0, 1), (1, 40), (40, 41), (41, 97), (97, 150))):
            read = (first, second)[i % 2]
            part, state = read(text[:, a:b], state) if read is model else read(model, text[:, a:b], state)
            parts.append(part)
        assert torch.equal(torch.cat(parts, 1), whole)
    _, state = model(text[:, :50])
    mixers = [m.snapshot() for m in state.mixers]
    apart = state.clone()
    apart.mixers = mixers
    other, _ = model(ids(2, 50, 3), apart)
    assert torch.equal(model(text[:, 50:], state)[0], whole[:, 50:])
    assert torch.equal(other, layers(model, ids(2, 50, 3), layers(model, text[:, :50])[1])[0])


@torch.no_grad()
def test_a_window_keeps_its_memory_small():
    model, state = built({"window": 21}), None
    for i in range(40):
        _, state = model(ids(1, 100, i), state)
        assert state.mixers[0].k.shape[1] <= 2 * (21 + model.segment) + 64
    with torch.inference_mode():
        a, state = model(ids(1, 9), state)
    b, _ = model(ids(1, 9), state)
    assert torch.isfinite(a).all() and torch.isfinite(b).all()


@torch.no_grad()
def test_learning_goes_on_from_what_was_read_here(layers):
    model, text = built({}), ids(2, 80)
    found = []
    for read in (model, lambda *given: layers(model, *given)):
        _, state = read(text[:, :35])
        found.append(model(text[:, 35:], state, learn="next_token"))
    (a, one), (b, two) = found
    assert torch.equal(a, b) and all(torch.equal(x, y) for x, y in zip(one.cms[0].tensors(), two.cms[0].tensors()))


@torch.no_grad()
def test_a_call_that_fails_leaves_the_state_as_it_was(monkeypatch):
    model, text = built({"window": 30}), ids(2, 60)
    _, state = model(text)
    before, want = state.clone(), model(text, state.clone())[0]

    def failing(*_):
        raise MemoryError("no memory")

    with monkeypatch.context() as m, pytest.raises(MemoryError):
        m.setattr(native_attention, "_read", failing)
        model(text, state)
    assert list(state.pos) == list(before.pos) and same_cache(state, before)
    assert torch.equal(model(text, state)[0], want)


@torch.no_grad()
def test_non_finite_logits_are_refused():
    model = built({})
    model.norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match="logits .* non-finite value"):
        model(ids(1, 9), check_finite=True)


@torch.no_grad()
def test_what_is_not_served():
    model = built({})
    start = model.init_state(1)
    assert native_attention.serves(model, start, "cpp") and not native_attention.serves(model, start, "chunked")
    for other in (built({"post_norm": True}), built({}).double(), built({"cms": CMSConfig(D, (4,), mlp="swiglu")}),
                  built({"cms": CMSConfig(D, (4, 8), variant="independent")})):
        assert not native_attention.serves(other, other.init_state(1), None)
    model.blocks[1].mixer.v_proj.register_forward_hook(lambda *_: None)
    assert not native_attention.serves(model, start, None)


@torch.no_grad()
def test_the_library_refuses_what_does_not_fit(monkeypatch):
    model, calls, real = built({"window": 13, "sinks": 5, "qk_norm": True, "head_dim": 16}), [], native_attention._read

    def refusing(at):
        right = ctypes.cast(at, ctypes.POINTER(native_attention._Call)).contents
        function = cpu_library.library().hope_attention_read

        def refused(part, name, value):
            wrong = native_attention._Call.from_buffer_copy(right)
            blocks = (native_attention._Block * 2)(*[native_attention._Block.from_buffer_copy(right.block[i])
                                                     for i in range(2)])
            level = native_attention._Level.from_buffer_copy(right.block[1].level[0])
            levels = (native_attention._Level * 2)(right.block[1].level[1], level)
            wrong.block, blocks[1].level = blocks, levels
            setattr({"call": wrong, "block": blocks[1], "level": levels[1], "attention": blocks[1].attention}[part],
                    name, value)
            assert function(ctypes.byref(wrong)) == 2, (part, name, value)
            calls.append(name)

        for name, values in {"B": (-1, 2**62), "T": (-1, 2**62, 2**63 - 1), "d": (0, 12, -8), "blocks": (-1,),
                             "piece": (0, -1), "threads": (0, 2**62), "rotations": (0, 3), "len": (None,),
                             "h": (None,), "block": (None,)}.items():
            for value in values:
                refused("call", name, value)
        for name, kind in AttentionMixer._fields_:
            if kind is ctypes.c_void_p and not name.endswith("_bias"):
                refused("block", name, None)
        refused("block", "levels", -1)
        for name, values in {"B": (1,), "H": (0, 4), "Hkv": (0,), "D": (0, 7, 12), "slots": (40, -1), "threads": (0,),
                             "window": (-1, 0), "sinks": (-1,), "scale": (float("nan"),),
                             "used": (None,), "base": (None,)}.items():
            for value in values:
                refused("attention", name, value)
        for name, values in {"N": (0, 12), "gain": (None,), "up": (None,), "down": (None,)}.items():
            for value in values:
                refused("level", name, value)
        real(at)

    monkeypatch.setattr(native_attention, "_read", refusing)
    logits, _ = model(ids(2, 50))
    monkeypatch.setattr(native_attention, "_read", real)
    assert len(calls) > 40 and torch.equal(model(ids(2, 50))[0], logits)
