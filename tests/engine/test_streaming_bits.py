"""On a CPU a whole model keeps the streaming contract bit for bit: one call, any split of it, token by token, by a
decoder, as a row among others, and from a file."""

import pytest
import torch
from native_learning import GATED, GATED_MEMORIES, asked, cached, model_of
from native_model import CASES, V, ids, small

from hope_kernels import load_state
from hope_kernels.engine import native_segments
from hope_kernels.engine.decoder import Decoder
from hope_kernels.engine.native_segment import Reader
from hope_kernels.ops.shared import cpu_library

pytestmark = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"cpp: {cpu_library.unavailable()}")

LEARN = ["off", "next_token"]
ATTENDING = [f"attention: {name}" for name in (
    "full", "grouped, biases", "window and sinks", "more sinks than window", "norms, a scale, wider heads", "muon",
    "nested", "mixture", "blocks of their own",
)] + list(GATED)


def decides(state) -> list[torch.Tensor]:
    """All that decides what is read next."""
    found = []
    for mixer in state.mixers:
        rows = range(mixer.batch)
        found += [t for b in rows for t in cached(mixer, b)] if hasattr(mixer, "base") else mixer.tensors()
    for cms in state.cms:
        if cms is not None:
            levels = zip(cms.weights, cms.own)
            found += [t for of, own in levels if of is not None and all(own) for t in of.values()]
    return found


def same(a, b) -> bool:
    x, y = decides(a), decides(b)
    return list(a.pos) == list(b.pos) and len(x) == len(y) and all(map(torch.equal, x, y))


def in_parts(model, text, cuts, state=None, **how):
    parts = []
    for a, b in zip([0, *cuts], [*cuts, text.shape[1]]):
        part, state = model(text[:, a:b], state, **how)
        parts.append(part)
    return torch.cat(parts, 1), state


@pytest.mark.parametrize("learn", LEARN)
@pytest.mark.parametrize("name", [*CASES, *ATTENDING])
@torch.no_grad()
def test_splits_tokens_and_a_decoder(name, learn, monkeypatch):
    monkeypatch.setattr(native_segments, "PIECE", 48)
    model, text, how = model_of(name), ids(2, 75), {"learn": learn, "backend": asked(name)}
    assert Reader(model, asked(name), learning=False).reason is None
    want, whole = model(text, **how)
    for cuts in ([33], [4, 16, 20, 64], [1, 2, 3, 40], range(1, 75)):
        logits, state = in_parts(model, text, cuts, **how)
        assert torch.equal(logits, want) and same(state, whole), cuts
    state = model.init_state(2)
    first, state = in_parts(model, text[:, :5], [2], state, **how)
    decoder = Decoder(model, state, **how)
    written = torch.cat([decoder.step(text[:, t : t + 1]) for t in range(5, 75)], 1)
    assert decoder._native is not None
    assert torch.equal(torch.cat([first, written], 1), want) and same(state, whole)


@pytest.mark.parametrize("learn", LEARN)
@pytest.mark.parametrize("name", ["default", "two clocks", "no convolution", "delta", "linear adaptive queries",
                                  *ATTENDING])
@torch.no_grad()
def test_rows_of_a_ragged_batch_and_files(name, learn, tmp_path):
    model, text, lengths = model_of(name), ids(6, 60), [60, 33, 17, 1, 0, 60]
    how = {"learn": learn, "backend": asked(name)}
    logits, state = model(text, lengths=lengths, **how)
    state.save(tmp_path / "state")
    more, after = model(text[:, :25], load_state(tmp_path / "state"), **how)
    for b, n in enumerate(lengths):
        alone, own = model(text[b : b + 1, :n], **how)
        again, own = model(text[b : b + 1, :25], own, **how)
        assert torch.equal(logits[b, :n], alone[0]) and torch.equal(more[b], again[0]), b
        mine, others = after.mixers[1].select([b]), own.mixers[1]
        if name in ATTENDING:
            assert all(map(torch.equal, cached(mine, 0), cached(others, 0))), b
        else:
            assert all(map(torch.equal, mine.tensors(), others.tensors())), b
    assert not logits[1, 33:].any()


@pytest.mark.parametrize("name", [*GATED, *GATED_MEMORIES])
@torch.no_grad()
def test_what_learns_has_the_same_bits_unasked(name):
    """Decoders included; until the first step it reads as without learning, where C++ is asked for that."""
    model, text = model_of(name), ids(2, 75)
    want, whole = model(text, learn="next_token", backend="cpp")
    logits, state = model(text[:, :40], learn="next_token")
    decoder = Decoder(model, state, "next_token")
    written = torch.cat([decoder.step(text[:, t : t + 1]) for t in range(40, 75)], 1)
    assert torch.equal(torch.cat([logits, written], 1), want) and same(state, whole)
    frozen, C = model(text, backend="cpp")[0], model.segment
    assert torch.equal(logits[:, :C], frozen[:, :C]) and not torch.equal(logits, frozen[:, :40])


@pytest.mark.parametrize("name", ["default", "low rank", "low rank, adam, layer norms and biases", "gelu of erf"])
@torch.no_grad()
def test_what_was_learned_is_read_with_the_same_bits_without_learning(name):
    """In one call, in parts, by a decoder, and block by block: two rows that have learned and one that has not."""
    model, text = model_of(name), ids(3, 75)
    _, learned = model(text[:, :40], learn="next_token", lengths=[40, 33, 1])
    want, whole = model(text, learned.clone())
    for cuts in ([33], range(1, 75)):
        logits, state = in_parts(model, text, cuts, learned.clone())
        assert torch.equal(logits, want) and same(state, whole), cuts
    decoder = Decoder(model, learned.clone(), "off")
    assert torch.equal(torch.cat([decoder.step(text[:, t : t + 1]) for t in range(75)], 1), want)
    state = learned.clone()
    h, _ = model.run(model.embed(text), state.mixers, model.levels(state), [75] * 3)
    assert torch.equal(model.logits(h, [75] * 3), want)


@torch.no_grad()
def test_rates_of_zero_read_as_without_learning():
    text, model = ids(2, 70), small(cms={"lr": 0.0})
    want, state = model(text)
    logits, other = model(text, learn="next_token")
    assert torch.equal(logits, want) and same(state, other)
    learning, _ = small()(text, learn="next_token")  # until the first step
    assert torch.equal(learning[:, :4], want[:, :4]) and not torch.equal(learning, want)


@pytest.mark.parametrize("titans", [{}, {"memory": "linear"}, {"adaptive_q": True}], ids=["mlp", "linear", "adaptive"])
@torch.no_grad()
def test_losses_threads_and_widths(titans):
    model, text = small(d=128, heads=4, chunks=(64, 128), titans=titans), ids(5, 260, 3)
    ask, before = cpu_library.library().hope_cpu_width, torch.get_num_threads()
    most, found = ask(0), []
    try:
        for bits, threads in ((most, 1), (most, 2), (256, 1)):
            ask(bits)
            torch.set_num_threads(threads)
            losses, state = model(text, output="losses")
            found.append((losses.nats, losses.last, *decides(state)))
    finally:
        ask(most)
        torch.set_num_threads(before)
    assert all(map(torch.equal, found[0] * 2, (*found[1], *found[2])))
    logits, _ = model(text)
    assert torch.equal(found[0][1], logits[:, -1])
    nats = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten(), reduction="none")
    assert (found[0][0][:, :-1].flatten() - nats).abs().max() < 1e-4


@torch.no_grad()
def test_a_logit_that_is_not_finite_is_named(monkeypatch):
    monkeypatch.setattr(native_segments, "PIECE", 32)
    model, text = small(tie_embeddings=False), ids(2, 70) % (V - 1)
    text[1, 50] = V - 1
    model.embed.weight[V - 1] = torch.inf
    for output in ("logits", "losses"):
        _, state = model(text[:, :3])
        kept = state.clone()
        with pytest.raises(ValueError, match="logits .* non-finite value"):
            model(text[:, 3:], state, check_finite=True, output=output)
        assert same(state, kept)
        model(text[:, 3:], state, lengths=[67, 40], check_finite=True, output=output)
