"""Segments of models with attention that C++ learns: caches that several states share, what they keep, and what the
library refuses. What is learned, and its bits: test_native_segment.py and test_streaming_bits.py."""

import ctypes

import pytest
import torch
from attention_model import OPTIONS, built, ids
from native_learning import ATTENTION, GATED, learned, model_of, same_bits

from hope_kernels.engine import native_segments
from hope_kernels.engine.native_attention_mixer import AttentionMixer
from hope_kernels.engine.native_segment import Reader
from hope_kernels.ops.shared import cpu_library

pytestmark = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"cpp: {cpu_library.unavailable()}")
SINKS = {**OPTIONS["window and sinks"], "qk_norm": True, "head_dim": 16}


@pytest.mark.parametrize("options", [{}, SINKS], ids=["full", "window, sinks, norms"])
@pytest.mark.parametrize("at", [16, 19, 64])
@torch.no_grad()
def test_states_on_one_cache_go_on_apart(options, at):
    """Also while the graph of the last segment waits for its next token."""
    model, text, other = built(options), ids(2, 90), ids(2, 90, 7)
    want, whole = model(text, learn="next_token")
    first, state = model(text[:, :at], learn="next_token")
    apart = state.clone()
    apart.mixers = [m.snapshot() for m in state.mixers]
    with torch.inference_mode():
        model(other[:, at:], apart, learn="next_token")
    rest, state = model(text[:, at:], state, learn="next_token")
    assert torch.equal(torch.cat([first, rest], 1), want) and same_bits(state, whole)


@torch.no_grad()
def test_a_window_keeps_its_memory_small():
    model, state = built({"window": 21}), None
    for i in range(40):
        _, state = model(ids(1, 100, i), state, learn="next_token")
        assert state.mixers[0].k.shape[1] <= 2 * (21 + model.segment) + 64
        assert state.mixers[0].filled == state.mixers[0].used()


@torch.no_grad()
def test_slots_of_segments_that_were_not_read_are_free_again(monkeypatch):
    """A call that ends early leaves room in the cache where it was, and reads on there."""
    model, text = model_of("attention: muon"), ids(2, 193, 4) % 40
    text[0, :100] = text[0, 0]  # what comes behind it is a surprise
    done, real = [], native_segments.learn_several

    def counted(*given, **options):
        read = real(*given, **options)
        done.append(read.done < given[4])
        assert all(m.filled == m.used() for m in read.mixers)
        return read

    monkeypatch.setattr("hope_kernels.engine.learning.learn_several", counted)
    model(text, learn="next_token", guard=True)
    assert any(done)


@torch.no_grad()
def test_what_the_given_state_counts_stays():
    model, text = built(SINKS), ids(2, 80)
    _, state = model(text[:, :30], learn="next_token")
    kept = {n: t.clone() for n, t in learned(state).items()}
    given = state.clone()
    given.mixers, given.snapshot = [m.snapshot() for m in state.mixers], [m.snapshot() for m in state.snapshot]
    model(text[:, 30:], given, learn="next_token")
    assert all(torch.equal(t, kept[n]) for n, t in learned(state).items())


@torch.no_grad()
def test_until_the_first_step_it_reads_as_without_learning():
    model, text = model_of("attention: full"), ids(2, 70)
    want, _ = model(text)
    learning, _ = model(text, learn="next_token")  # until the first step
    assert torch.equal(learning[:, :4], want[:, :4]) and not torch.equal(learning, want)


@torch.no_grad()
def test_the_library_refuses_what_does_not_fit():
    model = built(SINKS)
    _, state = model(ids(2, 20), learn="next_token")
    reading, _ = Reader(model, None).read(state, state.mixers, ids(2, 4), [4, 3], None, keep=True)
    call, library = reading.call, cpu_library.library()
    marks = (ctypes.c_int32 * 2)(1, 1)
    call.learns = ctypes.addressof(marks)
    right = ctypes.cast(reading._blocks[1].attention, ctypes.POINTER(AttentionMixer)).contents
    refusals = 0

    def refused(change, name, value):
        nonlocal refusals
        wrong, blocks = (type(t).from_buffer_copy(t) for t in (call, reading._blocks))
        mixer = AttentionMixer.from_buffer_copy(right)
        wrong.block, blocks[1].attention = ctypes.addressof(blocks), ctypes.addressof(mixer)
        setattr(change(wrong, blocks, mixer), name, value)
        for function in ("read", "head", "learn"):
            assert getattr(library, f"hope_segment_{function}")(ctypes.byref(wrong)) == 2, (name, value, function)
        refusals += 1

    for name, kind in AttentionMixer._fields_:
        if kind is ctypes.c_void_p and not name.endswith("_bias") and "far" not in name:
            refused(lambda call, blocks, mixer: mixer, name, None)
    refused(lambda call, blocks, mixer: mixer, "far_cos", None if right.far_cos else right.cos)
    for name, values in {"B": (1,), "H": (0, 2), "Hkv": (0,), "D": (0, 7, 12), "slots": (18, -1), "threads": (0,),
                         "window": (-1, 0), "sinks": (-1,), "scale": (float("nan"),), "used": (None,),
                         "base": (None,)}.items():
        for value in values:
            refused(lambda call, blocks, mixer: mixer.attention, name, value)
    refused(lambda call, blocks, mixer: blocks[0], "attention", None)  # blocks of two kinds
    for value in (0, 3, -1):
        refused(lambda call, blocks, mixer: call, "rotations", value)
    assert refusals > 20


def test_who_serves():
    for name in ATTENTION:
        assert Reader(model_of(name), None).reason is None, name
    for name in GATED:
        assert Reader(model_of(name), "cpp", learning=False).reason is None
        assert "serves" in Reader(model_of(name), None, learning=False).reason
    assert "float64" in Reader(built({}).double(), None).reason
    adapted = built({})
    adapted.blocks[0].mixer.q_proj = torch.nn.Sequential(adapted.blocks[0].mixer.q_proj)
    assert "q_proj" in Reader(adapted, None).reason
