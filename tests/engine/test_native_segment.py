"""Segments that are read, judged and learned by C++ learn what PyTorch learns, and the same bits however they come to
be learned."""

import copy
import ctypes
import gc
from operator import attrgetter

import pytest
import torch
from attention_model import moved
from native_learning import GATED_MEMORIES, LEARNING, by_pytorch, cached, learned, model_of, same_bits
from native_model import V, built, ids, small
from numerics import relative, within_yardstick

from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM, load_state
from hope_kernels.engine import native_attention, native_reading, native_segments
from hope_kernels.engine.head import Targets
from hope_kernels.engine.native_mixer import MEMORY
from hope_kernels.engine.native_segment import Reader
from hope_kernels.ops.shared import cpu_library

pytestmark = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"cpp: {cpu_library.unavailable()}")

ATTENTION = [name for name in LEARNING if "attention" in name]
LOW_RANK = [name for name in LEARNING if name.startswith("low rank") and name not in GATED_MEMORIES]
PRECONDITIONED = [name for name in LEARNING if name.startswith("preconditioned")]
BOTH = pytest.mark.parametrize("name", ["default", "attention: window and sinks"])


@pytest.mark.parametrize("name", LEARNING)
@torch.no_grad()
def test_learns_what_pytorch_learns(name):
    # another text for Adam's: of a weight whose gradient is all but zero the step may be any
    model, text = model_of(name), ids(3, 26 if "24" not in name else 51, 2 if name == "attention: adam" else 0)
    assert Reader(model, None).reason is None
    found = []
    for one in (model, by_pytorch(model), copy.deepcopy(model).double()):
        losses, state = one(text, learn="next_token", output="losses", lengths=[text.shape[1], 17, 0])
        logits, state = one(text[:, :9], state, learn="next_token", lengths=[9, 2, 9])
        found.append((logits, losses.nats, losses.last, learned(state)))
    for i, part in enumerate(("logits", "nats", "last")):
        within_yardstick(found[0][i], found[1][i], found[2][i], part)
    ours, theirs, exact = (f[3] for f in found)
    assert ours.keys() == theirs.keys() == exact.keys() and any("weights" in n for n in ours)
    for n, t in ours.items():
        if t.is_floating_point():
            within_yardstick(t, theirs[n], exact[n], n)


@BOTH
def test_a_vocabulary_too_large_for_the_head_in_cpp(name, monkeypatch):
    monkeypatch.setattr(native_reading, "HEAD_MOST", V - 1)
    test_learns_what_pytorch_learns(name)


CUT = ("default", "two clocks", "no convolution", "nested", "muon", "relative", "relative momentum", "segments of 24",
       "attention: full", "attention: window and sinks", "attention: muon", "attention: segments of 24")


@pytest.mark.parametrize("name, large", [
    *((name, False) for name in (*CUT, "titans", "static", "skip rows", "learned momentum", "delta", "adaptive queries",
                                 "linear adaptive queries", "norms behind, no projection", "gelu of erf", *LOW_RANK,
                                 *PRECONDITIONED, *GATED_MEMORIES,
                                 *(name for name in ATTENTION if name not in CUT))),
    *(pytest.param(name, True, id=f"{name}, head in PyTorch") for name in CUT),
])
@torch.no_grad()
def test_bits_do_not_depend_on_how_a_text_is_cut(name, large, tmp_path, monkeypatch):
    """Nor on whether a segment is read whole, replayed, held, or continued from a file."""
    if large:
        monkeypatch.setattr(native_reading, "HEAD_MOST", V - 1)
    model, text = model_of(name), ids(1, 100, 7)
    model.holds = "nested" not in name
    want, whole = model(text, learn="next_token")
    for cuts in ([1, 2, 3, 7, 50], [33], [4, 8, 12, 16, 48, 96], [24, 48, 72], [16, 17, 97]):
        state, parts = model.init_state(1), []
        for a, b in zip([0, *cuts], [*cuts, 100]):
            following = text[:, b] if a == 4 else None
            part, state = model(text[:, a:b], state, learn="next_token", following=following)
            parts.append(part)
            if b % 3 == 0:
                state.save(tmp_path / "state")
                state = load_state(tmp_path / "state")
        if not large:  # whose product is PyTorch's, and has bits that depend on how many tokens there are
            assert torch.equal(torch.cat(parts, 1), want), cuts
            assert same_bits(state, whole), cuts
        assert relative(torch.cat(parts, 1), want) < 1e-4


@pytest.mark.parametrize("name", ["default", "muon", "relative momentum", *GATED_MEMORIES, *ATTENTION])
@torch.no_grad()
def test_bits_do_not_depend_on_company(name):
    model, text = model_of(name), ids(4, 60, 5)
    lengths = [60, 31, 16, 0]
    logits, together = model(text, learn="next_token", lengths=lengths)
    more, together = model(text, together, learn="next_token", lengths=[9, 60, 4, 20])
    for b, n in enumerate(lengths):
        row, state = text[b : b + 1], model.init_state(1)
        alone, state = model(row[:, :n], state, learn="next_token")
        again, state = model(row[:, : (9, 60, 4, 20)[b]], state, learn="next_token")
        assert torch.equal(logits[b, :n], alone[0]) and torch.equal(more[b, : again.shape[1]], again[0]), b
        mine, own = (cached(m, r) if "attention" in name else [t[r] for t in m.tensors()]
                     for m, r in ((together.mixers[1], b), (state.mixers[1], 0)))
        assert all(map(torch.equal, mine, own))
        assert all(torch.equal(t[b], s[0]) for t, s in zip(together.cms[1].tensors(), state.cms[1].tensors()))


@pytest.mark.parametrize("cms", [{}, {"optimizer": "muon"}, {"relative": True}, {"mlp": "geglu", "post_norm": True}],
                         ids=["gd", "muon", "relative", "gated"])
@torch.no_grad()
def test_bits_are_those_of_any_width_and_number_of_threads(cms):
    behind = cms.get("post_norm", False)
    model, text = small(d=128, heads=4, chunks=(64, 128), cms=cms, post_norm=behind), ids(2, 200, 3)
    same_of_any_width_and_threads(model, text)


@pytest.mark.parametrize("options, cms", [
    ({}, {}), ({"window": 70, "sinks": 4, "num_kv_heads": 2, "qk_norm": True}, {}), ({}, {"mlp": "swiglu"}),
    ({"post_norm": True}, {"mlp": "geglu", "post_norm": True, "optimizer": "muon"}),
])
@torch.no_grad()
def test_bits_with_attention_are_those_of_any_width_and_number_of_threads(options, cms):
    levels = CMSConfig(128, (64, 128), **{"lr": 0.02, **cms})
    config = HopeConfig(V, 128, 2, mixer="attention", num_heads=4, cms=levels, **options)
    same_of_any_width_and_threads(moved(HopeForCausalLM(config)), ids(2, 200, 3))


def same_of_any_width_and_threads(model, text):
    ask, before, found = cpu_library.library().hope_cpu_width, torch.get_num_threads(), []
    most = ask(0)
    try:
        for bits, threads in ((most, 1), (most, 2), (256, 1)):
            assert ask(bits) == bits
            torch.set_num_threads(threads)
            found.append(model(text, learn="next_token"))
    finally:
        ask(most)
        torch.set_num_threads(before)
    (want, state), *others = found
    assert all(torch.equal(want, logits) and same_bits(state, other) for logits, other in others)


@BOTH
@torch.no_grad()
def test_flush_has_the_bits_of_a_state_that_was_cut_elsewhere(name):
    model, text, states = model_of(name), ids(2, 30, 4), []
    for cuts in ([0, 30], [0, 1, 13, 27, 30]):
        state = None
        for a, b in zip(cuts, cuts[1:]):
            _, state = model(text[:, a:b], state, learn="next_token")
        assert model.flush(state) == [1, 1]
        states.append(model(text, state, learn="next_token")[1])
    assert same_bits(*states)


@torch.no_grad()
def test_under_a_guard():
    model, text = small(cms={"lr": 20.0}, chunks=(16, 32)), ids(2, 160, 2)
    found = [one(text, learn="next_token", guard=True) for one in (model, by_pytorch(model))]
    (a, state), (b, other) = found
    assert sum(state.rollbacks) > 0 and list(state.rollbacks) == list(other.rollbacks)
    assert relative(a, b) < 1e-3


@pytest.mark.parametrize("name, guard", [*((n, False) for n in LEARNING), ("nested", True), ("muon", True),
                                         ("attention: muon", True)])
@torch.no_grad()
def test_many_segments_a_call_are_segments_one_by_one(name, guard, monkeypatch):
    """Bits, and what counts them; also where a call ends early, as the guard wants to look at a loss that has risen."""
    model, text, done, real = model_of(name), ids(2, 193, 4), [], native_segments.learn_several
    if guard:
        text[0, :100] = text[0, 0]  # what comes behind it is a surprise

    def counted(*given, **options):
        read = real(*given, **options)
        done.append((given[4], read.done))
        return read

    monkeypatch.setattr("hope_kernels.engine.learning.learn_several", counted)
    found = [model(text, learn="next_token", guard=guard)]
    monkeypatch.setattr(native_segments, "AHEAD", 0)
    asked = len(done)
    found.append(model(text, learn="next_token", guard=guard))
    (a, state), (b, alone) = found
    assert torch.equal(a, b) and same_bits(state, alone) and len(done) == asked > 0
    # how much a cache still has depends on the calls
    mine, own = ([list(c) for part in ([s] if name not in ATTENTION else s.cms) for c in part._counters()] for s in (
        state, alone))
    assert mine == own
    assert any(n < count for count, n in done) if guard else sum(n for _, n in done) > 0.7 * 192 / model.segment


@pytest.mark.parametrize("name", ["adam", "attention: adam"])
@torch.no_grad()
def test_own_losses_are_those_of_the_models_own_weights(name, monkeypatch):
    monkeypatch.setattr(native_attention, "serves", lambda *_: False)  # whose losses are PyTorch's
    model, text = model_of(name), ids(2, 33)
    _, state = model(text, learn="next_token")
    mixers, reader = model.init_state(2).mixers, Reader(model, None)
    own = reader.own_losses(state, mixers, text[:, :15], [15, 9], Targets(text[:, 1:16], [15, 9]))
    expected = model(text[:, :16], learn="off", output="losses")[0].nats[:, :15]
    assert torch.equal(own[0], expected[0]) and torch.equal(own[1, :9], expected[1, :9]) and not own[1, 9:].any()
    reading, _ = reader.read(state, mixers, text[:, :15].contiguous(), [15, 9], None, keep=False)
    heads, _ = reading.head(Targets(text[:, 1:16], [15, 9]), logits=False)
    assert not torch.isclose(own[0], heads.nats[0], rtol=1e-4).all()  # what has been learned says something else


def test_a_look_at_the_own_weights_has_no_graph():
    """Where the head is one of PyTorch too, as with this many tokens."""
    model = HopeForCausalLM(HopeConfig(5000, 16, 1, num_heads=2, cms=CMSConfig(16, (4, 16)))).eval()
    text = ids(2, 33)
    with torch.no_grad():
        _, state = model(text, learn="next_token")
    mixers = model.init_state(2).mixers
    own = Reader(model, None).own_losses(state, mixers, text[:, :15], [15, 15], Targets(text[:, 1:16], [15, 15]))
    assert not own.requires_grad


@BOTH
@torch.no_grad()
def test_a_call_leaves_no_tensor_to_the_garbage_collector(name):
    """Or a long reading grows until that comes by."""
    model, text = model_of(name), ids(2, 90)
    model(text, learn="next_token")
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for guard in (False, True):
            _, state = model(text[:, :50], learn="next_token", guard=guard)
            model(text[:, 50:], state, learn="next_token")
        del state
        gc.collect()
        assert not any(isinstance(o, torch.Tensor) for o in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@BOTH
def test_modes_of_autograd(name):
    """What is learned while a graph is recorded, or in inference mode, is what is learned without."""
    model, text = model_of(name), ids(2, 40, 6)
    with torch.no_grad():
        want, whole = model(text, learn="next_token")
    with torch.inference_mode():
        logits, state = model(text[:, :30], learn="next_token")
    with torch.no_grad():
        more, state = model(text[:, 30:], state, learn="next_token")
    assert torch.equal(torch.cat([logits, more], 1), want) and same_bits(state, whole)
    logits, state = model(text, learn="next_token")
    assert logits.requires_grad and relative(logits, want) < 1e-4


@BOTH
@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("part", ["_read", "_head", "_learn", "_several"])
@torch.no_grad()
def test_a_call_that_fails_leaves_the_state_as_it_was(part, at, name, monkeypatch):
    several = part == "_several"
    module = native_segments if several else native_reading
    monkeypatch.setattr(native_segments, "AHEAD", 3 if several else 0)
    model, text = model_of(name), ids(2, 60, 1)
    _, state = model(text[:, :11], learn="next_token")
    _, state = model(text[:, 11:20], state, learn="next_token")  # held
    before, calls, real = state.clone(), [], getattr(module, part)

    def failing(*given):
        calls.append(given)
        if len(calls) > (at if several else 3 * at + 1):
            raise MemoryError("no memory")
        real(*given)

    with monkeypatch.context() as m, pytest.raises(MemoryError):
        m.setattr(module, part, failing)
        model(text[:, 20:], state, learn="next_token")
    assert same_bits(state, before)
    assert [list(c) for c in state._counters()] == [list(c) for c in before._counters()]
    want, _ = model(text[:, 20:], before, learn="next_token")
    assert torch.equal(model(text[:, 20:], state, learn="next_token")[0], want)


@BOTH
@torch.no_grad()
def test_logits_that_are_not_finite_are_refused_before_anything_is_learned(name):
    model, text = model_of(name), ids(2, 40)
    _, state = model(text[:, :20], learn="next_token")
    before = state.clone()
    model.norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match="logits .* non-finite value"):
        model(text[:, 20:], state, learn="next_token", check_finite=True)
    assert same_bits(state, before)


@pytest.mark.parametrize("name", ["a head of its own", "attention: blocks of their own"])
def test_a_row_that_is_not_finite_stays_alone(name):
    model, text = model_of(name), ids(2, 40)
    with torch.no_grad():
        model.embed.weight[text[0, 3]] = float("nan")
        clean = (text[1] != text[0, 3]).nonzero().flatten()
        text[1] = text[1, clean[0]]  # a text without the token
        want, alone = model(text[1:], learn="next_token")
        logits, state = model(text, learn="next_token")
    assert logits[0].isnan().any() and torch.equal(logits[1], want[0])
    assert torch.equal(state.cms[0].weights[0]["up"][1], alone.cms[0].weights[0]["up"][0])


@pytest.mark.parametrize("name", PRECONDITIONED)
@torch.no_grad()
def test_a_level_that_begins_to_learn_within_its_period(name):
    """Its first step is of one segment, and its P takes that up before it sums up the next ones."""
    model, text = model_of(name), ids(2, 96, 7)
    C = model.segment
    _, start = model(text[:, : 3 * C])
    want, whole = model(text[:, 3 * C :], start.clone(), learn="next_token")
    state, parts = start.clone(), []
    for token in text[:, 3 * C :].split(1, 1):
        part, state = model(token, state, learn="next_token")
        parts.append(part)
    assert torch.equal(torch.cat(parts, 1), want) and same_bits(state, whole)
    theirs = by_pytorch(model)
    _, other = theirs(text[:, : 3 * C])
    _, other = theirs(text[:, 3 * C :], other, learn="next_token")
    for n, t in learned(other).items():
        if t.is_floating_point():
            assert relative(learned(whole)[n], t) < 1e-4, n


def test_what_is_not_served_is_named():
    assert "chunked" in Reader(small(), "chunked").reason
    waiting = small()
    waiting.blocks[1].cms.pending = 8
    assert "wait" in Reader(waiting, None).reason
    assert "float64" in Reader(small().double(), None).reason
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in Reader(small(), None).reason


@torch.no_grad()
def test_a_state_with_factors_that_wait_is_read_by_pytorch_until_they_are_folded():
    model, text = small(), ids(1, 60)
    for block in model.blocks:
        block.cms.pending = 8
    _, state = model(text[:, :6], learn="next_token")
    for block in model.blocks:
        block.cms.pending = None
    reader, other = Reader(model, None), by_pytorch(model)
    assert reader.reason is None and not reader.serves(state)
    before = state.clone()
    logits, state = model(text[:, 6:], state, learn="next_token")
    assert reader.serves(state) and relative(logits, other(text[:, 6:], before, learn="next_token")[0]) < 1e-4


@pytest.mark.parametrize("case", ["default", "titans", "linear adaptive queries"])
@torch.no_grad()
def test_the_library_refuses_what_does_not_fit(case):
    model = built(case)
    state, text = model.init_state(2), ids(2, 4)
    reading, _ = Reader(model, None).read(state, state.mixers, text, [4, 4], None, keep=True)
    call, library = reading.call, cpu_library.library()
    marks = (ctypes.c_int32 * 2)(1, 1)
    call.learns = ctypes.addressof(marks)
    wrongs = {
        "B": (-1, 2**62), "T": (-1, 2**62, 2**63 - 1), "d": (0, 12, -8, 2**62), "W": (-1,),
        "vocab": (0, -1, 2**62), "blocks": (-1, 2**63 - 1), "threads": (0, -1, 2**62), "ids": (None,), "len": (None,),
        "embed": (None,), "gain": (None,), "head": (None,), "block": (None,), "work": (None,),
    }

    def refused(fields, functions=("read", "head", "learn")):
        wrong = type(call).from_buffer_copy(call)
        for name, value in fields.items():
            setattr(wrong, name, value)
        for name in functions:
            assert getattr(library, f"hope_segment_{name}")(ctypes.byref(wrong)) == 2, (name, fields)

    for name, values in wrongs.items():
        for value in values:
            refused({name: value})
    known, far = (ctypes.c_int64 * 2)(4, 4), (ctypes.c_int64 * 2)(4, 5)
    for bad in (-1, V):
        other = text.clone()
        other[1, 3] = bad
        refused({"ids": other.data_ptr()})
        refused({"targets": other.data_ptr(), "known": ctypes.addressof(known)}, ["head"])
    refused({"targets": text.data_ptr(), "known": ctypes.addressof(far)}, ["head"])
    refused({"targets": None}, ["head"])  # and slopes are asked for
    for fields in ({"keep": 0}, {"learns": None}, {}):  # no steps were given
        refused(fields, ["learn"])

    def refused_in_a_block(part, name, value):
        copied = type(reading._blocks).from_buffer_copy(reading._blocks)
        setattr(part(copied[1]), name, value)
        refused({"block": ctypes.addressof(copied)})

    given = ("k_proj", "v_proj", "eta_proj", "alpha_proj", "beta_bias") if case == "titans" else ()
    linear = "linear" in case
    for levels in (-1, 2**62):
        refused_in_a_block(lambda b: b, "levels", levels)
    for part in ("gain", "q_proj", "level", *given):  # one that is not there: given
        refused_in_a_block(lambda b: b, part, None if getattr(reading._blocks[1], part) else text.data_ptr())
    for part, values in {"H": (0, 3), "D": (12,), "N": (8 if linear else 0, 4), "Mf": (2,), "Ms": (1,),
                         "chunk_memory": (0, -4), "chunk_other": (0,), "pos": (None,), "len": (None,), "B": (1,),
                         "T": (3,), "self_modifying": (int(case == "titans"),), "update": (0,)}.items():
        for value in values:
            refused_in_a_block(lambda b: b.titans, part, value)
    for part in MEMORY:
        for state in ("before", "after"):
            if getattr(getattr(reading._blocks[1], state), part):
                refused_in_a_block(attrgetter(state), part, None)
    refused_in_a_block(lambda b: b, "after", reading._blocks[1].before)
