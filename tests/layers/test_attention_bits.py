"""Attention, and whole models with it, keep the streaming contract bit for bit on a CPU, in fp32 and without a graph:
one call, any split, token by token, a row among others, files, threads and widths of vectors."""

import pytest
import torch
from attention_model import OPTIONS, D, built, config, converted, ids, moved

from hope_kernels import load_state
from hope_kernels.layers.attention import CausalAttention
from hope_kernels.ops.shared import cpu_library

pytestmark = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"cpp: {cpu_library.unavailable()}")

T = 200  # past several renewals of a cache with a window
named = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def in_parts(read, x, cuts, state=None):
    parts = []
    for a, b in zip([0, *cuts], [*cuts, x.shape[1]]):
        part, state = read(x[:, a:b], state)
        parts.append(part)
    return torch.cat(parts, 1), state


CUTS = ([33], [1, 2, 3, 40, 130], [64, 128, 192], range(50, T, 7))


@named
@torch.no_grad()
def test_a_layer(options):
    layer, x = moved(CausalAttention(config(options))), torch.randn(3, T, D)
    whole, _ = layer(x)
    for cuts in (*CUTS, range(1, T)):
        assert torch.equal(in_parts(layer, x, cuts)[0], whole), cuts
    lengths, padded = [T, 77, 0], x.clone()
    padded[1, 77:] = padded[2] = float("nan")
    y, state = layer(padded, lengths=lengths)
    assert torch.equal(y[0], whole[0]) and torch.equal(y[1, :77], whole[1, :77]) and not y[2].any()
    y, _ = layer(torch.stack([x[2, :40], x[1, 77:117]]), state.select([2, 1]))
    assert torch.equal(y[0], whole[2, :40]) and torch.equal(y[1], whole[1, 77:117])


@named
@torch.no_grad()
def test_a_model_over_splits_and_token_by_token(options):
    model, text = built(options), ids(2, T)
    _, learned = model(ids(2, 37, 5), learn="next_token")  # levels of their own, and a cache that stands elsewhere
    for start in (model.init_state(2), learned):
        whole, _ = model(text, start.clone())
        for cuts in (*CUTS, range(1, T)):
            assert torch.equal(in_parts(model, text, cuts, start.clone())[0], whole), cuts


@named
@torch.no_grad()
def test_rows_of_a_ragged_batch_and_files(options, tmp_path):
    model, text, lengths = built(options), ids(4, 100), [100, 33, 1, 0]
    logits, state = model(text, lengths=lengths)
    state.save(tmp_path / "state")
    more, _ = model(text, load_state(tmp_path / "state"))
    for b, n in enumerate(lengths):
        alone, own = model(text[b : b + 1, :n])
        again, _ = model(text[b : b + 1], own)
        assert torch.equal(logits[b, :n], alone[0]) and torch.equal(more[b], again[0]), b
    one, two = state.select([1, 0]).split()
    both = two.join([two, one])
    assert torch.equal(model(text[:2], both)[0], model(text[:2], load_state(tmp_path / "state").select([0, 1]))[0])


@named
@torch.no_grad()
def test_threads_and_widths(options):
    model, text = built(options), ids(3, T)
    ask, before = cpu_library.library().hope_cpu_width, torch.get_num_threads()
    most, whole = ask(0), model(text)[0]
    try:
        for bits, threads in ((most, 2), (most, 5), (256, 1)):
            ask(bits)
            torch.set_num_threads(threads)
            assert torch.equal(model(text)[0], whole), (bits, threads)
    finally:
        ask(most)
        torch.set_num_threads(before)


@torch.no_grad()
def test_what_is_written_has_the_bits_of_what_is_read():
    model, prompt = built(OPTIONS["window and sinks"]), ids(2, 9)
    out = model.generate(prompt, 80, learn="off")
    logits, _ = model(torch.cat([prompt, out.tokens], 1))
    assert torch.equal(logits[:, 8:-1].argmax(-1), out.tokens)
    first = model.generate(prompt, 30, learn="off")
    rest = model.generate(None, 50, first.state, learn="off")
    assert torch.equal(torch.cat([first.tokens, rest.tokens], 1), out.tokens)


@pytest.mark.parametrize("mlp, post_norm", [("swiglu", False), ("geglu", True)])
@torch.no_grad()
def test_a_converted_model_keeps_bits_over_splits_when_asked_to(mlp, post_norm):
    """By default it has those of its original (tests/test_convert.py), as far as calls go."""
    model, text = built(converted(mlp, post_norm)), ids(2, 150)
    _, learned = model(ids(2, 21, 5), learn="next_token", backend="cpp")
    for start in (model.init_state(2), learned):
        whole, _ = model(text, start.clone(), backend="cpp")
        for cuts in ([33], range(1, 150)):
            parts, _ = in_parts(lambda x, s: model(x, s, backend="cpp"), text, cuts, start.clone())
            assert torch.equal(parts, whole)
        theirs, _ = model(text, start.clone())
        assert not torch.equal(theirs, whole)
        torch.testing.assert_close(theirs, whole, rtol=1e-3, atol=1e-3)
