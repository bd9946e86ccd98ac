"""A reading that returns losses in place of logits, in pieces of the head: the same values and the same
learning, whatever the pieces."""

import pytest
import torch
import torch.nn.functional as F
from numerics import relative
from small_model import V, ids, tiny

from hope_kernels import CMSConfig
from hope_kernels.engine import head
from hope_kernels.generation import read

MODELS = {"hope": tiny(), "attention": tiny("attention", window=5), "untied": tiny(tie_embeddings=False)}
named = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
learning = pytest.mark.parametrize("learn", ["off", "next_token"])


def expected(logits, tokens, lengths, following):
    """nats and last, from the logits of the whole call."""
    nats = torch.zeros(tokens.shape, dtype=logits.dtype)
    last = torch.zeros(len(tokens), V, dtype=logits.dtype)
    for b, n in enumerate(lengths):
        after = tokens[b, 1:n].tolist() + ([following[b]] if n and following[b] >= 0 else [])
        if after:
            nats[b, : len(after)] = F.cross_entropy(logits[b, : len(after)], torch.tensor(after), reduction="none")
        if n:
            last[b] = logits[b, n - 1]
    return nats, last


@named
@learning
@pytest.mark.parametrize("size", [1, 5 * V * 8, 2**25])
def test_losses_are_those_of_the_logits(model, learn, size, monkeypatch):
    monkeypatch.setattr(head, "PIECE_BYTES", size)
    tokens, lengths, following = ids(3, 50), [41, 50, 0], [-1, 7, 3]
    with torch.no_grad():
        known = torch.tensor(following)
        logits, one = model(tokens, lengths=lengths, learn=learn, following=known)
        losses, two = model(tokens, lengths=lengths, learn=learn, following=known, output="losses")
        for _ in range(2):  # and so does what is read afterwards
            nats, last = expected(logits, tokens, lengths, following)
            assert relative(losses.nats, nats) < 1e-12 and relative(losses.last, last) < 1e-12
            assert torch.equal(losses.nats == 0, nats == 0)
            tokens, lengths, following = ids(3, 9, 1), [9, 9, 9], [-1, -1, -1]
            logits, one = model(tokens, one, learn=learn)
            losses, two = model(tokens, two, learn=learn, output="losses")


@named
def test_pieces_of_the_head_change_nothing_that_is_learned(model, monkeypatch):
    tokens = ids(2, 60)
    with torch.no_grad():
        want, _ = model(tokens, lengths=[60, 33], learn="next_token")
        monkeypatch.setattr(head, "PIECE_BYTES", 3 * V * 8)
        found, _ = model(tokens, lengths=[60, 33], learn="next_token")
    assert relative(found, want) < 1e-12


def test_the_gradient_in_sixteen_bits_is_that_of_autograd(monkeypatch):
    """Rounded where PyTorch's cross-entropy of 16-bit logits is."""
    model = tiny(tie_embeddings=False).bfloat16()
    h, targets = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0)).bfloat16(), ids(2, 9)
    leaf = h.clone().requires_grad_()
    loss = F.cross_entropy(model.logits(leaf, [9, 9]).flatten(0, 1).float(), targets.flatten(), reduction="none")
    (want,) = torch.autograd.grad(loss.sum(), leaf)
    found = head.read_head(model, h, [9, 9], head.Targets(targets, [9, 9]), learners=[True, True])
    assert torch.equal(found.nats.flatten(), loss.detach()) and torch.equal(found.slopes, want)
    monkeypatch.setattr(head, "PIECE_BYTES", 8 * V)  # a token at a time: products of other shapes
    pieces = head.read_head(model, h, [9, 9], head.Targets(targets, [9, 9]), learners=[True, True])
    assert relative(pieces.slopes, want) < 0.01


def test_losses_carry_a_graph_in_grad_mode():
    model = tiny()
    tokens = ids(2, 20)
    losses, _ = model(tokens, output="losses")
    logits, _ = model(tokens)
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    names = list(dict(model.named_parameters()))
    found, plain = (torch.autograd.grad(x, list(model.parameters())) for x in (losses.nats.sum(), want))
    assert all(relative(a, b) < 1e-12 for a, b in zip(found, plain)), names


@learning
def test_read_never_has_the_logits_of_a_piece(learn, monkeypatch):
    """The largest tensor of V columns that the head returns holds the bytes of a piece."""
    model = tiny(cms=CMSConfig(8, (8, 16), lr=0.02, expansion=1.0))
    largest, logits = 0, model.logits

    def noting(h, lengths, backend=None):
        nonlocal largest
        out = logits(h, lengths, backend)
        largest = max(largest, out.numel() * 8)
        return out

    tokens = ids(2, 100)
    want = read(model, tokens, learn=learn)
    monkeypatch.setattr(head, "PIECE_BYTES", 2 * 4 * V * 8)
    monkeypatch.setattr(model, "logits", noting)
    found = read(model, tokens, learn=learn)
    assert 0 < largest <= head.PIECE_BYTES
    assert relative(found.nats, want.nats) < 1e-12 and relative(found.logits, want.logits) < 1e-12


def test_bad_arguments_name_themselves():
    model, tokens = tiny(), ids(2, 5)
    with pytest.raises(ValueError, match="argument output is 'nats'"):
        model(tokens, output="nats")
    for bad, message in ((torch.tensor([V, 0]), f"token {V}, expected -1"), (torch.tensor([-2, 0]), "token -2"),
                         (torch.tensor([1.0, 2.0]), "dtype"), (torch.tensor([1]), "shape")):
        with pytest.raises(ValueError, match=f"argument following has .*{message}"):
            model(tokens, following=bad)


@learning
def test_values_that_are_not_finite_are_refused_before_the_state_changes(learn):
    model = tiny()
    with torch.no_grad():
        _, state = model(ids(2, 10), learn=learn)
        before = [t.clone() for t in state.tensors()]
        model.norm.weight[0] = torch.inf
        state.adopt(model)
        with pytest.raises(ValueError, match="non-finite"):
            model(ids(2, 30), state, learn=learn, output="losses", check_finite=True)
    assert all(torch.equal(a, b) for a, b in zip(before, state.tensors())) and state.pos == [10, 10]
