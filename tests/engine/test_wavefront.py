"""Blocks side by side over the pieces of a text read what they read one after another."""

import pytest
import torch
from numerics import relative

from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM, TitansConfig
from hope_kernels.engine.generation import read
from hope_kernels.engine.wavefront import cells, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
V = 32


def tiny(mixer="self_modifying", layers=3, dtype=torch.float64, d=8, C=4, cms=(4, 8), **options) -> HopeForCausalLM:
    torch.manual_seed(0)
    if mixer == "sinks":
        mixer, options = "attention", options | {"sinks": 3}
    if mixer != "attention":
        options["titans"] = TitansConfig(d, 2 if d == 8 else 1, chunk_memory=C, chunk_other=C)
    else:
        options |= {"num_heads": 2, "num_kv_heads": 1, "window": 5}
    model = HopeForCausalLM(
        HopeConfig(V, d, layers, mixer=mixer, cms=CMSConfig(d, cms, lr=0.02, expansion=1.0), **options), dtype=dtype
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval().to(DEVICE)


def ids(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, V, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def same(a, b, equal) -> bool:
    return a.pos == b.pos and all(equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def close(a, b) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=1e-10, atol=1e-13)


def test_what_a_cell_needs_comes_before_it():
    for blocks, pieces in [(1, 1), (3, 1), (1, 4), (3, 7), (6, 2), (0, 3), (3, 0)]:
        order = list(cells(blocks, pieces))
        assert sorted(order) == [(l, c) for l in range(blocks) for c in range(pieces)]
        at = {cell: i for i, cell in enumerate(order)}
        assert all(at[need] < at[l, c] for l, c in order for need in [(l - 1, c), (l, c - 1)] if need in at)
        if pieces >= blocks > 0:  # as soon as all blocks are busy, they stay so
            assert [l for l, _ in order[blocks * (blocks - 1) // 2 :][:blocks]] == list(range(blocks))


@pytest.mark.parametrize("mixer", ["self_modifying", "attention", "sinks"])
@pytest.mark.parametrize("lengths", [None, [61, 9, 0], [3, 61, 30]])
@pytest.mark.parametrize("piece", [4, 16, 64])
@torch.no_grad()
def test_equals_the_model(mixer, lengths, piece):
    model, text = tiny(mixer), ids(3, 61)
    # rows within chunks, with CMS weights of their own
    _, start = model(text[:, :11], lengths=[11, 3, 0], learn="next_token")
    want, state = model(text, start.clone(), lengths=lengths)
    ours, after = model(text, start.clone(), lengths=lengths, wavefront=piece)
    # a cache has slots of no meaning
    assert relative(ours, want) < 1e-10 and (mixer != "self_modifying" or same(after, state, close))
    again, more = (model(text[:, :9], s, learn="next_token")[0] for s in (after, state))
    assert relative(again, more) < 1e-10


def one_after_another(model, text, state, edges: list[int], backend=None) -> tuple[torch.Tensor, list]:
    """h and the mixers after reading the same pieces with the model's own loop."""
    parts, mixers = [], state.mixers
    for a, b in zip(edges, edges[1:]):
        h, mixers = model.run(model.embed(text[:, a:b]), mixers, model.levels(state), [b - a] * len(text), backend)
        parts.append(h)
    return torch.cat(parts, 1), mixers


@torch.no_grad()
def test_bits_of_the_same_pieces_one_after_another():
    model, text = tiny(), ids(2, 45)
    state = model(text[:, :7])[1]
    want, mixers = one_after_another(model, text, state, [0, 5, 13, 21, 29, 37, 45])  # they end where chunks do
    ours, after = run(model, model.embed(text), state.mixers, model.levels(state), [45, 45], 8)
    assert torch.equal(ours, want) and all(same(a, b, torch.equal) for a, b in zip(after, mixers))
    assert state.pos == [7, 7] and state.mixers[2].pos == [7, 7]


@torch.no_grad()
def test_reading_a_text():
    model, text = tiny(), ids(2, 150)
    a = read(model, text, lengths=[150, 77], piece=64)
    b = read(model, text, lengths=[150, 77], piece=64, wavefront=16)
    assert relative(b.logits, a.logits) < 1e-10 and relative(b.nats, a.nats) < 1e-12 and same(
        a.state, b.state, close
    )


def test_errors():
    model, text = tiny(), ids(1, 9)
    with torch.no_grad():
        for piece in (0, -4, 6, 2.0, True):
            with pytest.raises(ValueError, match="multiple of the memory's chunk, 4"):
                model(text, wavefront=piece)
        with pytest.raises(ValueError, match="expected None with learn='next_token'"):
            model(text, learn="next_token", wavefront=4)
        assert model(text[:, :0], wavefront=4)[0].shape == (1, 0, V)
    with pytest.raises(ValueError, match="torch.no_grad"):
        model(text, wavefront=4)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["chunked", "triton"])
@torch.no_grad()
def test_on_streams(backend):
    """Long and wide enough that blocks overlap; again and again, on memory that earlier runs have used."""
    model, text = tiny(layers=6, dtype=torch.float32, d=128, C=16, cms=(64, 256)), ids(4, 4096)
    state = model(text[:, :100], backend=backend)[1]
    want, mixers = one_after_another(model, text, state, [0, *range(252, 4096, 256), 4096], backend)
    for _ in range(3):
        ours, after = run(model, model.embed(text), state.mixers, model.levels(state), [4096] * 4, 256, backend)
        assert torch.equal(ours, want) and all(same(a, b, torch.equal) for a, b in zip(after, mixers))
