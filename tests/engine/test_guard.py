"""The guard: learning that reads worse than the model's own weights is taken back, and the contract holds."""

import math

import pytest
import torch
from numerics import relative
from small_model import V, tiny

import hope_kernels as hk
from hope_kernels import CMSConfig
from hope_kernels.cli.demo import held_out_text
from hope_kernels.engine import guard
from hope_kernels.engine.guard import EVERY, MARGIN

C = 4


def model(lr, mixer="self_modifying", optimizer="gd", **cms):
    return tiny(mixer, cms=CMSConfig(8, (C, 2 * C), lr=lr, optimizer=optimizer, expansion=1.0, **cms))


def ids(batch, tokens, seed=1):
    return torch.randint(0, V, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def losses(net, x, **options):
    found, state = net(x, learn="next_token", output="losses", **options)
    return found.nats, state


def bundled(**cms):
    """The bundled model and its weights, with other settings of its levels."""
    like = hk.HopeForCausalLM.from_pretrained("hope-byte")
    net = hk.HopeForCausalLM(like.config.replace(cms=like.config.block_cms[0].replace(**cms)))
    net.load_state_dict(like.state_dict())
    return net.eval()


def book(tokens, at=0):
    return torch.tensor([list(held_out_text()[at : at + tokens])])


@torch.no_grad()
def off(net, x):
    return net(x, output="losses")[0].nats[:, :-1].double()


@pytest.mark.parametrize("tokens, options", [
    (4096, {"lr": 2.0, "optimizer": "gd"}), (4096, {"lr": 0.3, "optimizer": "adam"}),
    (8192, {"lr": 1.0, "optimizer": "muon"}),
])
def test_rates_that_destroy_a_model_are_caught(tokens, options):
    net, x = bundled(relative=False, **options), book(tokens)
    own, last = off(net, x), slice(-1024, -1)
    wild, _ = losses(net, x)
    kept, state = losses(net, x, guard=True)
    assert not wild[0, last].mean() < 1.5 * own[0, last].mean()  # infinite too
    assert kept[0, last].mean() < own[0, last].mean() + 2 * MARGIN
    assert state.rollbacks[0] > 0
    # what a row is left with are weights that were good, and steps since: at rates that are tolerable by now
    with torch.no_grad():
        after = net(x, fresh(net, state), output="losses")[0].nats[0, :-1]
    assert after.mean() < own.mean() + 2 * MARGIN


def fresh(net, state):
    """A new sequence with the weights that ``state`` has learned."""
    new, clone = net.init_state(state.batch), state.clone()
    for a, b in zip(new.cms, clone.cms):
        a.weights, a.copies, a.own = b.weights, b.copies, b.own
    return new


def test_learning_that_helps_is_left_alone():
    net, x = bundled(), torch.cat([book(3072), book(3072, 50_000)])
    plain, a = losses(net, x)
    guarded, b = losses(net, x, guard=True)
    assert b.rollbacks == [0, 0] and plain.equal(guarded) and plain.mean() < off(net, x).mean()
    assert b.guard.pos == [47, 47] and min(b.guard.looked) >= EVERY
    for one, other in zip(a.cms, b.cms):
        assert all(one.weights[0][n].equal(other.weights[0][n]) for n in ("up", "down"))


@pytest.mark.parametrize("mixer", ["self_modifying", "attention"])
def test_the_contract_holds_under_a_guard(mixer, tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "EVEN", 1)
    monkeypatch.setattr(guard, "ERRORS", 0)  # there is more to do with segments of 4 tokens
    net, x = model(8.0, mixer), ids(3, 14 * C + 1)
    whole, end = losses(net, x, guard=True)
    assert max(end.rollbacks) > 0
    state, parts = None, []
    for i, part in enumerate(x.split([3, 2 * C, 1, 1, 4 * C + 2, C, 5 * C, 2 * C - 6], 1)):
        with torch.no_grad():
            out, state = net(part, state, learn="next_token", guard=True)
        parts.append(out)
        if i == 4:
            state.save(tmp_path / "s")
            state = hk.load_state(tmp_path / "s")
    with torch.no_grad():
        logits, _ = net(x, learn="next_token", guard=True)
    assert relative(torch.cat(parts, 1), logits) < 1e-9
    assert state.rollbacks == end.rollbacks and state.guard.pos == end.guard.pos
    alone = [losses(net, x[b : b + 1], guard=True) for b in range(3)]
    for b, (nats, one) in enumerate(alone):
        assert relative(nats[0], whole[b]) < 1e-9 and one.rollbacks[0] == end.rollbacks[b]
    lengths = [14 * C + 1, 5 * C + 2, 0]
    ragged, ended = losses(net, x, guard=True, lengths=lengths)
    assert relative(ragged[0], whole[0]) < 1e-9
    assert relative(ragged[1, : 5 * C + 1], whole[1, : 5 * C + 1]) < 1e-9
    assert ended.rollbacks[0] == end.rollbacks[0] and ended.guard.pos[2] == 0


def test_token_by_token(monkeypatch):
    monkeypatch.setattr(guard, "ERRORS", 0)
    net, x = model(8.0), ids(1, 8 * C + 1)
    whole, end = losses(net, x, guard=True)
    state = None
    for t in range(x.shape[1]):
        with torch.no_grad():
            _, state = net(x[:, t : t + 1], state, learn="next_token", guard=True)
    assert state.rollbacks == end.rollbacks and relative(state.guard.mean, end.guard.mean) < 1e-9


def test_on_and_off():
    net, x = model(0.02), ids(2, 2 * C)
    with torch.no_grad():
        _, state = net(x, learn="next_token")
        assert state.guard is None and state.rollbacks == [0, 0]
        _, state = net(x, state, learn="next_token", guard=True)
        assert state.guard is not None
        copy = state.clone()
        _, state = net(x, state, learn="next_token")
        assert state.guard is not None and copy.guard.pos != state.guard.pos
        assert copy.select([1]).guard.pos == copy.guard.pos[1:]
        _, state = net(x, state, learn="next_token", guard=False)
        assert state.guard is None
        with pytest.raises(ValueError, match="argument guard is 'yes'"):
            net(x, guard="yes")


def test_a_call_that_fails_leaves_the_guard_as_it_was():
    net, x = model(1e300), ids(1, 3 * C)
    with torch.no_grad():
        _, state = net(x[:, :C], learn="next_token", guard=True)
        before = state.clone()
        with pytest.raises(ValueError, match="non-finite"):
            net(x, state, learn="next_token", check_finite=True)
    assert state.guard.pos == before.guard.pos and state.rollbacks == before.rollbacks
    assert all(a.equal(b) for a, b in zip(state.tensors(), before.tensors()))
    assert math.isfinite(float(state.guard.mean[0]))
