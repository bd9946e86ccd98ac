"""Training through refreshes: gradients of calls with ``outer`` against plain autograd and finite differences."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from numerics import relative
from small_model import ids, tiny

from hope_kernels import CMSConfig, load_state
from hope_kernels.ops.cms.low_rank import signs

READ = {"learn": "next_token", "backend": "chunked"}


def cms(**options) -> CMSConfig:
    return CMSConfig(8, (4, 8), **{"expansion": 1.0, "lr": 0.05, **options})


def learned(model, *rates):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("log_rates"):
                p.copy_(torch.tensor(rates, dtype=torch.float64).log())
    return model


def nats(logits, tokens, lengths=None):
    """The summed loss of tokens [B, T + 1], of ``lengths`` a row."""
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(tokens[:, 1:].shape)
    counts = torch.tensor(lengths or [loss.shape[1]] * loss.shape[0])
    return (loss * (torch.arange(loss.shape[1]) < counts[:, None])).sum()


def grads(model, loss) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(model.named_parameters(), found)}


def of_call(model, tokens, outer, state=None, lengths=None):
    logits, new = model(tokens[:, :-1], state, lengths, outer=outer, **READ)
    return grads(model, nats(logits, tokens, lengths)), new


def deviation(state, l, name, base):
    if state.weights[l] is None:
        return torch.zeros_like(base)
    held = state.weights[l][name]
    delta = held - base if state.config.rank is None else held @ signs(state.config, l, name, base)
    return torch.tensor(state.own[l], dtype=base.dtype)[:, None, None] * delta


def deviations(model, tokens) -> list:
    """By segment, block, level and matrix: what rows have learned before it, [B, r, c]."""
    found, state = [], None
    for segment in tokens.split(model.segment, 1):
        with torch.no_grad():
            _, state = model(segment, state, **READ)
        found.append([[{n: deviation(c, l, n, b.cms.levels[l][n].detach()) for n in c.config.matrices}
                       for l in range(c.config.num_levels)] for b, c in zip(model.blocks, state.cms)])
    return found


def by_hand(model, tokens, deltas, scale=lambda *_: 1.0):
    """sum_j L_j(W_0 + scale Delta_j), the mixers' states carrying the graph from segment to segment."""
    state, loss = model.init_state(len(tokens)).mixers, 0.0
    for at, start in enumerate(range(0, tokens.shape[1] - 1, model.segment)):
        segment = tokens[:, start : start + model.segment + 1]
        n, levels = segment.shape[1] - 1, []
        for i, block in enumerate(model.blocks):
            levels.append([])
            for l, level in enumerate(block.cms.levels):
                held = {k: p for k, p in level.parameters_by_name().items() if k != "log_rates"}
                levels[i].append(held | {k: held[k] + scale(i, l, k) * d for k, d in deltas[at][i][l].items()})
                for k in deltas[at][i][l]:
                    levels[i][l][k] = levels[i][l][k].expand(len(tokens), -1, -1)
        h, state = model.run(model.embed(segment[:, :-1]), state, levels, [n] * len(tokens), "chunked")
        loss = loss + nats(model.logits(h, [n] * len(tokens)), segment)
    return loss


FIRST = {
    "hope": lambda: tiny(cms=cms()),
    "attention": lambda: tiny("attention", cms=cms()),
    "independent": lambda: tiny(cms=cms(variant="independent", optimizer="momentum")),
    "nested": lambda: tiny("titans", cms=cms(variant="nested", mlp="swiglu", bias=True)),
    "muon": lambda: tiny("attention", cms=cms(optimizer="muon", lr=0.02)),
    "rank": lambda: tiny("attention", cms=cms(rank=2, lr=0.2)),
    "adam": lambda: learned(tiny("attention", cms=cms(lr="learned")), 0.05, 0.02),
}


@pytest.mark.parametrize("name", FIRST)
def test_the_first_order_gradient_is_that_of_constant_deviations(name):
    model, tokens = FIRST[name](), ids(3, 19)
    ours, _ = of_call(model, tokens, "first_order")
    wanted = grads(model, by_hand(model, tokens, deviations(model, tokens[:, :-1])))
    for n in ours:
        if not n.endswith("log_rates"):
            assert relative(ours[n], wanted[n]) < 1e-10, n


def test_pending_factors_and_16_bit_weights_have_the_first_order_gradient_too():
    plain, waiting, low = (tiny("attention", cms=cms()) for _ in range(3))
    for block in waiting.blocks:
        block.cms.pending = 8
    tokens, (wanted, _) = ids(2, 27), of_call(plain, ids(2, 27), "first_order")
    ours, state = of_call(waiting, tokens, "first_order")
    assert any(state.cms[0].rank[0]) and all(state.cms[0].own[0])  # some wait, others are folded
    assert all(relative(ours[n], g) < 1e-10 for n, g in wanted.items())
    low = low.to(torch.bfloat16)
    rounded, state = of_call(low, tokens, "first_order")
    assert state.cms[0].copies[0] is not None
    unlearned = [grads(m, nats(m(tokens[:, :-1])[0], tokens)) for m in (low, plain)]
    error = lambda a, b: max(relative(a[n].double(), g) for n, g in b.items())
    assert error(rounded, wanted) < 2 * error(*unlearned) < 0.5


def scaled(place, e):
    return lambda *at: math.exp(e) if at == place else 1.0


@pytest.mark.parametrize("options", [{"optimizer": "adam"}, {"optimizer": "gd"}, {"optimizer": "adam", "rank": 2}])
def test_the_gradient_of_a_learned_rate_is_that_of_the_deviations_scale(options):
    model, tokens, eps = learned(tiny("attention", cms=cms(lr="learned", **options)), 0.06, 0.03), ids(2, 19), 1e-5
    ours, _ = of_call(model, tokens, "first_order")
    deltas = deviations(model, tokens[:, :-1])
    for i, l, k, name in ((0, 0, 0, "up"), (1, 1, 1, "down")):
        found = ours[f"blocks.{i}.cms.levels.{l}.log_rates"][k]
        a, b = (float(by_hand(model, tokens, deltas, scaled((i, l, name), e)).detach()) for e in (eps, -eps))
        assert relative(found, torch.tensor((a - b) / (2 * eps), dtype=torch.float64)) < 1e-6


SECOND = {
    "hope": lambda: tiny(layers=1, cms=cms()),
    "other": lambda: tiny(layers=1, cms=cms(lr="learned", optimizer="momentum", variant="independent", mlp="swiglu")),
    "titans": lambda: tiny("titans", layers=1, cms=cms(variant="nested", optimizer="momentum", lr=0.02)),
    "attention": lambda: tiny("attention", layers=2, window=5, cms=cms(lr=((0.05, 0.02), 0.03))),
}


@pytest.mark.parametrize("name", SECOND)
@pytest.mark.parametrize("before", [0, 6])
def test_the_second_order_gradient_is_that_of_finite_differences(name, before):
    """Over three refreshes, in a random direction of every parameter; rows of several lengths. before: tokens that the
    rows have read before the call, which leave them with deviations and an open segment."""
    model, tokens, lengths, eps = SECOND[name](), ids(3, 14 + before), [13, 6, 0], 1e-5
    if name == "other":
        model = learned(model, 0.15, 0.1, 0.2)
    _, start = model(tokens[:, :before], outer="second_order", **READ)
    start, tokens = start.detach(), tokens[:, before:]
    ours, _ = of_call(model, tokens, "second_order", start, lengths)
    straight, _ = of_call(model, tokens, "first_order", start, lengths)
    assert relative(straight["embed.weight"], ours["embed.weight"]) > 1e-3  # the two differ

    def loss() -> float:
        with torch.no_grad():
            return float(nats(model(tokens[:, :-1], start.clone(), lengths, **READ)[0], tokens, lengths))

    for seed, (n, p) in enumerate(model.named_parameters()):
        along = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=p.dtype)
        along /= along.norm()
        found = []
        for step in (eps, -2 * eps):
            with torch.no_grad():
                p.add_(along, alpha=step)
            found.append(loss())
        with torch.no_grad():
            p.add_(along, alpha=eps)
        assert abs((found[0] - found[1]) / (2 * eps) - float((ours[n] * along).sum())) < 1e-6, n


@pytest.mark.parametrize("name", ["hope", "titans"])
def test_gradcheck_over_three_segments(name):
    model, tokens = SECOND[name](), ids(1, 12)

    def loss(*_):  # gradcheck moves the parameters' data, which their versions, and learned rates, do not see
        return nats(model(tokens[:, :-1], outer="second_order", **READ)[0], tokens)

    assert torch.autograd.gradcheck(loss, list(model.parameters()), fast_mode=True)


@pytest.mark.parametrize("outer", ["first_order", "second_order"])
@pytest.mark.parametrize("mixer", ["attention", "self_modifying"])
def test_what_is_read_and_learned_is_what_other_calls_read_and_learn(mixer, outer):
    model, tokens = tiny(mixer, cms=cms()), ids(3, 23)
    ours, new = model(tokens, lengths=[23, 9, 0], outer=outer, **READ)
    graph, other = model(tokens, lengths=[23, 9, 0], **READ)
    assert torch.equal(ours, graph)
    assert all(map(torch.equal, new.tensors(), other.tensors()))
    ours, new = model(tokens, outer=outer, **READ)
    with torch.no_grad():
        plain, state = model(tokens, **READ)
    if mixer == "attention":  # a memory's products round otherwise in grad mode
        assert torch.equal(ours, plain)
        assert all(torch.equal(a, b) for x, y in zip(new.cms, state.cms) for a, b in zip(x.tensors(), y.tensors()))
    assert relative(ours, plain) < 1e-12


def test_in_cpp_what_is_learned_is_the_same_to_rounding():
    model, tokens = tiny(cms=cms()).float(), ids(2, 23)
    ours, new = model(tokens, learn="next_token", outer="first_order")
    with torch.no_grad():
        plain, state = model(tokens, learn="next_token")
    assert relative(ours, plain) < 1e-5
    assert all(relative(a, b) < 1e-5 for x, y in zip(new.cms, state.cms) for a, b in zip(x.tensors(), y.tensors()))


@pytest.mark.parametrize("outer", ["first_order", "second_order"])
def test_without_rates_it_is_plain_training(outer):
    model, tokens = tiny(cms=cms(lr=0.0)), ids(2, 19)
    ours, _ = of_call(model, tokens, outer)
    logits, _ = model(tokens[:, :-1], backend="chunked")
    assert all(torch.equal(g, ours[n]) for n, g in grads(model, nats(logits, tokens)).items())


@pytest.mark.parametrize("outer", ["first_order", "second_order"])
def test_rows_that_have_learned_get_a_gradient(outer):
    model, tokens = tiny(cms=cms()), ids(2, 20)
    with torch.no_grad():
        _, state = model(tokens[:, :17], **READ)
    name = "blocks.0.cms.levels.0.up"
    assert all(state.cms[0].own[0])
    assert not of_call(model, tokens[:, 17:], None, state)[0][name].any()
    assert of_call(model, tokens[:, 17:], outer, state)[0][name].any()


@pytest.mark.parametrize("outer", ["first_order", "second_order"])
def test_rows_of_several_lengths_have_the_gradients_they_have_alone(outer):
    model, tokens, lengths = tiny("attention", cms=cms()), ids(3, 18), [17, 0, 6]
    together, _ = of_call(model, tokens, outer, lengths=lengths)
    alone = [of_call(model, tokens[b : b + 1, : n + 1], outer)[0] for b, n in enumerate(lengths) if n]
    for n, g in together.items():
        assert relative(g, sum(a[n] for a in alone)) < 1e-10, n


@pytest.mark.parametrize("outer", ["first_order", "second_order"])
def test_two_calls_and_checkpointed_blocks_have_the_gradients_of_one_call(outer):
    model, tokens = tiny(cms=cms()), ids(2, 20)
    whole, _ = of_call(model, tokens, outer)
    first, state = model(tokens[:, :10], outer=outer, **READ)
    second, _ = model(tokens[:, 10:-1], state, outer=outer, **READ)
    parts = grads(model, nats(torch.cat([first, second], 1), tokens))
    model.checkpoint = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    again, _ = of_call(model, tokens, outer)
    for n, g in whole.items():
        assert relative(parts[n], g) < 1e-10 and relative(again[n], g) < 1e-10, n


def test_a_guard_does_not_outlive_the_weights_it_has_seen():
    model, tokens = tiny("attention", cms=cms()), ids(1, 21)
    _, state = model(tokens[:, :9], outer="first_order", **READ)
    with torch.no_grad():
        model(tokens[:, 9:], state.detach(), guard=True, **READ)  # nothing has moved
        guarded = state.detach()
        model(tokens[:, 9:], guarded, guard=True, **READ)
        model.blocks[0].cms.levels[0]["up"].add_(0.01)
        with pytest.raises(ValueError, match="state.guard = None forgets"):
            model(tokens, guarded, **READ)
        guarded.guard = None
        model(tokens, guarded, **READ)


@pytest.mark.parametrize("rank", [None, 2])
def test_deviations_are_carried_while_the_weights_move(rank, tmp_path):
    model, tokens = tiny(cms=cms(optimizer="adam", lr=0.02, rank=rank)), ids(2, 61)
    optimizer, state = torch.optim.SGD(model.parameters(), lr=1e-3), None
    layer = model.blocks[0].cms

    def moved(state):
        with torch.no_grad():
            own = layer.effective_levels(layer.continued(state.cms[0]))[0]["up"].dense(2)
            return own - model.blocks[0].cms.levels[0]["up"]

    for step in range(3):
        part = tokens[:, 20 * step : 20 * step + 21]
        logits, state = model(part[:, :-1], state, outer="first_order", **READ)
        state, before = state.detach(), None
        before = moved(state)
        assert before.abs().max() > 1e-3
        optimizer.zero_grad()
        nats(logits, part).backward()
        optimizer.step()
        assert relative(moved(state), before) < 1e-12
    state.adopt(model)
    state.save(tmp_path / "state")
    again = load_state(tmp_path / "state")
    with torch.no_grad():
        a, _ = model(tokens[:, :9], state.clone(), **READ)
        b, _ = model(tokens[:, :9], again, **READ)
    assert torch.equal(a, b)
    fresh = state.merge(model.init_state(2).detach(), [False, True])
    with torch.no_grad():
        mixed, _ = model(tokens[:, :9], fresh, **READ)
        new, _ = model(tokens[1:, :9], **READ)
    assert relative(mixed[:1], a[:1]) < 1e-12 and relative(mixed[1:], new) < 1e-12


@pytest.mark.parametrize("outer", ["first_order", "second_order"])
@pytest.mark.parametrize("part", ["log_rates", "levels.0.up", "embed.weight"])
def test_frozen_parameters_change_no_gradient_of_others(outer, part):
    tokens, found = ids(2, 20), []
    for frozen in (False, True):
        model = learned(tiny(cms=cms(lr="learned", optimizer="gd")), 0.05, 0.02)
        for name, p in model.named_parameters():
            p.requires_grad_(not frozen or name.endswith(part))
        logits, _ = model(tokens[:, :-1], outer=outer, **READ)
        nats(logits, tokens).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if name.endswith(part)})
    assert found[0] and all(relative(found[1][name], grad) < 1e-12 for name, grad in found[0].items())


@pytest.mark.parametrize("window", [None, 4])
def test_rows_with_attention_begin_anew_beside_others(window):
    model, tokens = tiny(cms=cms(), mixer="attention", window=window), ids(2, 40)
    with torch.no_grad():
        state = model(tokens[:, :17], **READ)[1]
        mixed = state.merge(model.init_state(2).detach(), [False, True])
        a, _ = model(tokens[:, 17:], mixed, **READ)
        on, _ = model(tokens[:1, 17:], state.select([0]), **READ)
        new, _ = model(tokens[1:, 17:], **READ)
    assert relative(a[:1], on) < 1e-12 and relative(a[1:], new) < 1e-12


def test_rows_merge_where_one_state_has_an_unread_token():
    model, tokens = tiny(cms=cms()), ids(2, 12)
    with torch.no_grad():
        made = model.generate(tokens[:, :7], 3, temperature=0.0, learn="off")
        state = model(tokens)[1]
    both = state.merge(made.state, [False, True])
    assert both.unread.tolist() == [[-1], made.state.unread[1].tolist()]
    on = [model.generate(None, 4, state=s, temperature=0.0, learn="off").tokens
          for s in (both.select([1]), made.state.select([1]))]
    assert torch.equal(*on)
    with torch.no_grad():
        assert torch.equal(*(model(ids(1, 5), s)[0] for s in (both.select([0]), state.select([0]))))


def test_learned_rates_become_numbers(tmp_path):
    model, tokens = learned(tiny(cms=cms(lr="learned")), 0.05, 0.02), ids(2, 23)
    fixed = model.with_fixed_rates()
    rates = fixed.config.block_cms[1].lr[0]
    assert rates == pytest.approx((0.05, 0.02), rel=1e-12)
    assert not [n for n, _ in fixed.named_parameters() if n.endswith("log_rates")]
    with torch.no_grad():
        assert torch.equal(model(tokens, **READ)[0], fixed(tokens, **READ)[0])
        fixed.save_pretrained(tmp_path)
        again = type(fixed).from_pretrained(tmp_path)
        assert torch.equal(model(tokens, **READ)[0], again(tokens, **READ)[0])
    assert CMSConfig(8, (4, 8), lr="learned").learning_rates == CMSConfig(8, (4, 8)).learning_rates


def test_what_is_not_served_says_so():
    model, tokens = tiny(cms=cms()), ids(1, 9)
    for options, message in (
        ({"outer": "third_order", "learn": "next_token"}, "expected None, 'first_order' or 'second_order'"),
        ({"outer": "first_order"}, "expected None with learn='off'"),
        ({"outer": "first_order", "learn": "next_token", "guard": True}, "expected None with a guard"),
    ):
        with pytest.raises(ValueError, match=message):
            model(tokens, **options)
    with torch.no_grad(), pytest.raises(ValueError, match="outside grad mode"):
        model(tokens, outer="first_order", **READ)
    for options, message in (
        ({"optimizer": "adam"}, "optimizer in .*'adam'"), ({"optimizer": "muon"}, "optimizer in .*'muon'"),
        ({"precondition": 0.5}, "precondition in .*0.5"), ({"rank": 2}, "rank in .*2"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(cms=cms(**options))(tokens, outer="second_order", **READ)
    with pytest.raises(ValueError, match="fp32 or fp64"):
        tiny(cms=cms()).to(torch.bfloat16)(tokens, outer="second_order", learn="next_token")
    for lr, message in (("fast", "'learned'"), (((0.1,), 0.1), "one for each of"), ((0.1, (0.1, -1.0)), ">= 0")):
        with pytest.raises(ValueError, match=message):
            CMSConfig(8, (4, 8), lr=lr)


def moved(model, by=0.05):
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.add_(by * torch.randn_like(p))


def rows_of(state, model):
    """By block: what rows have learned in level 1's ``up``, [B, r, c]."""
    return [deviation(c, 0, "up", b.cms.levels[0].up) for c, b in zip(state.cms, model.blocks)]


def test_what_rows_learn_after_a_move_is_carried_once():
    """Weights move before any row has learned; then rows learn in a call without ``outer``, and weights stay."""
    model = tiny(cms=cms())
    _, state = model(ids(2, 3), outer="first_order", **READ)
    state = state.detach()
    moved(model)
    with torch.no_grad():
        _, state = model(ids(2, 14), state, **READ)
    before = rows_of(state, model)
    with torch.no_grad():
        _, after = model(ids(2, 1), state.clone(), **READ)
    assert any(bool(t.any()) for t in before)
    for a, b in zip(rows_of(after, model), before):
        assert torch.equal(a, b)


def test_rows_that_deviate_from_other_weights_do_not_merge():
    model = tiny(cms=cms())
    _, one = model(ids(2, 12), outer="first_order", **READ)
    moved(model)
    _, two = model(ids(2, 12), outer="first_order", **READ)
    one, two = one.detach(), two.detach()
    with pytest.raises(ValueError, match="merge: the rows deviate from other weights"):
        one.merge(two, [True, False])
    kept = rows_of(two, model)
    one.adopt(model)
    both = one.merge(two, [False, True])
    for merged, mine, theirs in zip(rows_of(both, model), rows_of(one, model), kept):
        assert torch.equal(merged[0], mine[0]) and torch.equal(merged[1], theirs[1])


def test_adopt_refuses_what_a_guard_would_not_follow():
    model = tiny(cms=cms())
    _, state = model(ids(2, 12), outer="first_order", **READ)
    state = state.detach()
    with torch.no_grad():
        model(ids(2, 12), state, guard=True, **READ)
    moved(model)
    before = [t.clone() for t in state.tensors()]
    with pytest.raises(ValueError, match="guard, whose good weights have not"):
        state.adopt(model)
    assert all(map(torch.equal, before, state.tensors()))
