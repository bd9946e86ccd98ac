"""Segments that end with a call: learned at once where the next token is known, from held activations where it
comes with the next call, and read again only where neither is possible."""

import gc
import weakref

import pytest
import torch
from numerics import relative
from small_model import ids, tiny

from hope_kernels import CMSConfig, load_state
from hope_kernels.generation import read

CMS = CMSConfig(8, (4, 8, 16), expansion=2.0, lr=0.02)
MODELS = {"hope": tiny(), "attention": tiny("attention", window=5),
          "momentum": tiny(cms=CMSConfig(8, (4, 8), optimizer="momentum", lr=0.01))}
named = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


class Tokens:
    """Counts the tokens that the first block reads."""

    def __init__(self, model):
        self.read, self.hook = 0, model.blocks[0].register_forward_pre_hook(self)

    def __call__(self, module, args):
        self.read += args[0].shape[1]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.hook.remove()


def differences(a, b) -> float:
    return max(relative(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True) if x.is_floating_point())


@named
@pytest.mark.parametrize("holds", [True, False])
def test_calls_of_whole_segments_read_every_token_once(model, holds, monkeypatch):
    monkeypatch.setattr(model, "holds", holds)
    tokens = ids(2, 48)
    with torch.no_grad(), Tokens(model) as count:
        want, whole = model(tokens, learn="next_token")
        state, parts, before = None, [], count.read
        for part in tokens.split(8, 1):
            logits, state = model(part, state, learn="next_token")
            parts.append(logits)
        assert count.read - before == (48 if holds else 48 + 5 * 4)
    assert relative(torch.cat(parts, 1), want) < 1e-10 and differences(state, whole) < 1e-10


@named
@pytest.mark.parametrize("holds", [True, False])
@pytest.mark.parametrize("lengths", [(12, 8), (8, 12), (4, 12)])
def test_rows_that_end_at_different_boundaries_are_what_they_are_alone(model, holds, lengths, monkeypatch):
    monkeypatch.setattr(model, "holds", holds)
    tokens = ids(2, 20)
    with torch.no_grad():
        _, state = model(tokens[:, : max(lengths)], lengths=list(lengths), learn="next_token")
        more = torch.stack([row[n : n + 4] for row, n in zip(tokens, lengths)])
        together, _ = model(more, state, learn="next_token")
        for b, n in enumerate(lengths):
            _, alone = model(tokens[b : b + 1, :n], learn="next_token")
            want, _ = model(more[b : b + 1], alone, learn="next_token")
            assert relative(together[b], want[0]) < 1e-10, b


@named
def test_a_known_next_token_is_learned_from_at_once(model, monkeypatch):
    monkeypatch.setattr(model, "holds", False)
    tokens, state = ids(2, 48), None
    with torch.no_grad(), Tokens(model) as count:
        _, whole = model(tokens, learn="next_token")
        before = count.read
        for at in range(0, 48, 8):
            following = tokens[:, at + 8] if at < 40 else None
            _, state = model(tokens[:, at : at + 8], state, learn="next_token", following=following)
        assert count.read - before == 48
    assert differences(state, whole) < 1e-10


@named
def test_following_is_the_next_token_of_each_row_alone(model):
    """Rows that know it, rows that do not, and rows without tokens."""
    tokens, lengths = ids(3, 17), [16, 8, 0]
    with torch.no_grad():
        _, state = model(tokens[:, :16], lengths=lengths, learn="next_token", following=torch.tensor([1, -1, 5]))
        assert list(state.seen) == [0, 4, 0]
        logits, state = model(tokens, state, lengths=[17, 9, 5], learn="next_token")
        for row, second in ((0, 17), (1, 9), (2, 5)):
            alone, one = None, slice(row, row + 1)
            first = tokens[one, : lengths[row]]
            if first.shape[1]:
                known = torch.tensor([1]) if row == 0 else None
                _, alone = model(first, alone, learn="next_token", following=known)
            want, alone = model(tokens[one, :second], alone, learn="next_token")
            assert relative(logits[one, :second], want) < 1e-10 and list(alone.seen) == [state.seen[row]]


def test_read_in_pieces_reads_every_token_once():
    model = MODELS["hope"]
    tokens = ids(2, 50)
    with Tokens(model) as count:
        found = read(model, tokens, learn="next_token", piece=8, lengths=[50, 31], guard=False)
        assert count.read == 50
    want = read(model, tokens, learn="next_token", lengths=[50, 31], guard=False)
    assert differences(found.state, want.state) < 1e-10 and relative(found.nats, want.nats) < 1e-10


@named
@pytest.mark.parametrize("lengths", [[3, 3], [0, 3], [5, 0]])
def test_what_is_held_serves_the_rows_that_read_on(model, lengths):
    tokens, more, ends = ids(2, 8), ids(2, 5, 1), []
    with torch.no_grad():
        for holds in (True, False):
            model.holds, state = holds, None
            for x, n in ((tokens, [8, 8]), (more, lengths), (more, [5, 5]), (more, [2, 5])):
                _, state = model(x, state, lengths=n, learn="next_token")
            ends.append(state)
    model.holds = True
    assert differences(*ends) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_held_teaches_bit_for_bit_what_a_copy_without_it_learns(dtype):
    for model in (tiny().to(dtype), tiny("attention").to(dtype)):
        tokens, state = ids(2, 40), None
        with torch.no_grad():
            for at in range(0, 32, 8):
                _, state = model(tokens[:, at : at + 8], state, learn="next_token")
                twin = state.clone()
                a, state = model(tokens[:, at + 8 : at + 9], state, learn="next_token")
                b, twin = model(tokens[:, at + 8 : at + 9], twin, learn="next_token")
                assert torch.equal(a, b)
                assert all(torch.equal(x, y) for x, y in zip(state.tensors(), twin.tensors(), strict=True))
                state = model(tokens[:, at + 9 : at + 16], state, learn="next_token")[1]


def steps_between():
    """What may happen to a state between two calls."""
    def other_weights(model, state):
        with torch.no_grad():
            model.blocks[0].norm.weight.mul_(1.25)
        state.adopt(model)

    yield "nothing", lambda model, state: None, True
    yield "clone", lambda model, state: state.clone(), False
    yield "select", lambda model, state: state.select([1, 0]), False
    yield "edited", lambda model, state: [state.ids.add_(0)] and None, False
    yield "training", other_weights, False
    yield "no tokens", lambda model, state: model(ids(2, 0), state)[1], False


@pytest.mark.parametrize("between, same", [p[1:] for p in steps_between()], ids=[p[0] for p in steps_between()])
def test_what_is_held_belongs_to_one_state_and_one_set_of_weights(between, same):
    model, more = tiny(), ids(2, 5, 1)
    with torch.no_grad(), Tokens(model) as count:
        _, state = model(ids(2, 8), learn="next_token")
        state = between(model, state) or state
        before, twin = count.read, state.clone()
        logits, _ = model(more, state, learn="next_token")
        assert count.read - before == (5 if same else 9)
        assert relative(logits, model(more, twin, learn="next_token")[0]) < 1e-10


def test_what_is_held_is_no_part_of_the_state(tmp_path):
    model = tiny()
    with torch.no_grad():
        _, state = model(ids(2, 8), learn="next_token")
        graph = weakref.ref(state._held[0])
        model.holds = False
        _, plain = model(ids(2, 8), learn="next_token")
        assert plain._held is None and state.nbytes() == plain.nbytes()
        state.save(tmp_path / "held")
        plain.save(tmp_path / "plain")
        held, other = (load_state(tmp_path / name) for name in ("held", "plain"))
        assert (tmp_path / "held").stat().st_size == (tmp_path / "plain").stat().st_size
        assert held._held is None and differences(held, other) < 1e-10
        model(ids(2, 1), state)
        gc.collect()
        assert graph() is None


def test_a_call_that_fails_leaves_a_state_that_is_read_again():
    model = tiny()
    with torch.no_grad(), Tokens(model) as count:
        _, state = model(ids(2, 8), learn="next_token")
        twin = state.clone()
        with pytest.raises(RuntimeError, match="stop"):
            hook = model.blocks[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
            try:
                model(ids(2, 3, 1), state, learn="next_token")
            finally:
                hook.remove()
        before = count.read
        logits, _ = model(ids(2, 3, 1), state, learn="next_token")
        assert count.read - before == 4 + 3
        assert relative(logits, model(ids(2, 3, 1), twin, learn="next_token")[0]) < 1e-10


def test_inference_mode_holds_as_well():
    model, tokens = tiny(), ids(2, 24)
    with torch.no_grad():
        want, _ = model(tokens, learn="next_token")
    with torch.inference_mode(), Tokens(model) as count:
        state, parts = None, []
        for part in tokens.split(8, 1):
            logits, state = model(part, state, learn="next_token")
            parts.append(logits)
        assert count.read == 24
    assert relative(torch.cat(parts, 1), want) < 1e-10
