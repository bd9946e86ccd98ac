"""What all of the optimizers keep: groups, AdamW for what is no matrix, states, schedulers, errors."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from small_model import ids, tiny
from torch import nn

from hope_kernels import optim

KINDS = {
    "M3": partial(optim.M3, f=3), "M3 paper": partial(optim.M3, f=3, accumulate="paper"),
    "delta": optim.DeltaMomentum, "delta orthogonal": partial(optim.DeltaMomentum, orthogonalize=True),
    "deep": optim.DeepMomentum, "deep linear": partial(optim.DeepMomentum, memory="linear"),
    "DGD": optim.DGD, "sgd": partial(optim.DGD, erase=0.0),
}
RATES = {"delta": 1.0, "deep linear": 0.1, "DGD": 0.2, "sgd": 0.1, "M3 paper": 0.002}
OTHERS = [kind for kind in KINDS if kind != "DGD"]


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8, dtype=dtype), nn.Linear(8, 6, dtype=dtype)
        self.scale = nn.Parameter(torch.ones(2, 3, 8, dtype=dtype))

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)) * self.scale.mean((0, 1)))


def built(kind, net, **options):
    rate = RATES.get(kind, 0.02)
    optimizer = KINDS[kind](net.parameters(), **{"lr": rate, "adamw_lr": 0.02 / rate, **options})
    return optimizer.watch(net) if kind == "DGD" else optimizer


def train(net, optimizer, steps, start=0, schedule=None):
    losses = []
    for step in range(start, start + steps):
        g = torch.Generator().manual_seed(step)
        x = torch.randn(16, 6, generator=g).to(net.first.weight.dtype)
        optimizer.zero_grad()
        loss = (net(x) - x.flip(1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if schedule is not None:
            schedule.step()
    return losses


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_losses_fall(kind):
    net = Net()
    losses = train(net, built(kind, net), 60)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_matrix_is_adamws(kind):
    """Vectors, tensors of three dimensions, and matrices in a group with adamw=True: bit for bit, at the rate
    that the group's multiple says, under weight decay."""
    found = []
    for ours in (True, False):
        net = Net()
        net.first.requires_grad_(False)
        theirs = [net.last.weight, net.last.bias, net.scale]
        if ours:
            groups = [{"params": theirs, "adamw": True, "adamw_lr": 0.5}]
            optimizer = KINDS[kind](groups, lr=0.02, weight_decay=0.1)
        else:
            optimizer = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.2)
            optimizer.param_groups[0]["weight_decay"] = 0.1
        train(net, optimizer, 5)
        found.append(net)
    assert equal(*found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_resuming_is_bit_for_bit(kind, stop):
    """Through a file that holds no pickled code, in the middle of a round of f steps as at its end."""
    net = Net()
    optimizer = built(kind, net)
    train(net, optimizer, stop)
    file = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(net, optimizer, 5, stop)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = Net()
    with torch.no_grad():
        again.first.weight.zero_()
    other = built(kind, again, lr=0.5)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(again, other, 5, stop)
    assert equal(net, again)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_go_on_alike(kind):
    """deepcopy and pickle of model and optimizer together; a DGD has to watch again."""
    net = Net()
    optimizer = built(kind, net)
    train(net, optimizer, 2)
    for other, its in (copy.deepcopy((net, optimizer)), pickle.loads(pickle.dumps((net, optimizer)))):
        if kind == "DGD":
            its.watch(other)
        mine = copy.deepcopy(net)
        mine_optimizer = built(kind, mine)
        mine_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(other, its, 3, 2)
        train(mine, mine_optimizer, 3, 2)
        assert equal(other, mine)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_have_rates_of_their_own(kind):
    """A group at rate 0 stays; a scheduler changes the rates of matrices and of the others."""
    net = Net()
    still, moving = [net.first.weight, net.first.bias], [net.last.weight, net.scale]
    optimizer = KINDS[kind]([{"params": still, "lr": 0.0}, {"params": moving}], lr=0.02)
    if kind == "DGD":
        optimizer.watch(net)
    before = copy.deepcopy(net)
    train(net, optimizer, 2)
    assert torch.equal(net.first.weight, before.first.weight)
    assert torch.equal(net.first.bias, before.first.bias)
    assert not torch.equal(net.last.weight, before.last.weight) and not torch.equal(net.scale, before.scale)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 1))
    train(net, optimizer, 1, 2, schedule)
    kept = copy.deepcopy(net)
    train(net, optimizer, 2, 3, schedule)
    assert equal(net, kept)


@pytest.mark.parametrize("kind", OTHERS)
def test_rates_as_tensors(kind):
    nets = Net(), Net()
    for net, lr in zip(nets, (0.02, torch.tensor(0.02, dtype=torch.float64))):
        train(net, built(kind, net, lr=lr), 3)
    assert equal(*nets)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_without_gradient_and_new_ones(kind):
    net = Net()
    net.first.weight.requires_grad_(False)
    optimizer = KINDS[kind]([{"params": [net.first.weight, net.last.weight]}], lr=0.02)
    if kind == "DGD":
        optimizer.watch(net)
    before = copy.deepcopy(net)
    train(net, optimizer, 2)
    assert torch.equal(net.first.weight, before.first.weight)
    assert not torch.equal(net.last.weight, before.last.weight)
    assert net.first.weight not in optimizer.state or not optimizer.state[net.first.weight]
    optimizer.add_param_group({"params": [net.scale, net.last.bias], "lr": 0.1})
    net.first.weight.requires_grad_(True)
    train(net, optimizer, 2, 2)
    for name in ("first.weight", "last.weight", "last.bias", "scale"):
        assert not torch.equal(net.get_parameter(name), before.get_parameter(name)), name


@pytest.mark.parametrize("kind", KINDS)
def test_weight_decay_is_decoupled(kind):
    """By a gradient of zero weights shrink by 1 - lr weight_decay and do not move otherwise."""
    net = Net(torch.float64)
    optimizer = KINDS[kind]([net.first.weight], lr=0.1, weight_decay=0.5)
    if kind == "DGD":
        optimizer.watch(net)
    before = net.first.weight.detach().clone()
    net.first(torch.zeros(1, 6, dtype=torch.float64)).sum().backward()
    assert not net.first.weight.grad.any()
    optimizer.step()
    torch.testing.assert_close(net.first.weight.detach(), 0.95 * before, rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_closures(kind):
    nets = Net(), Net()
    optimizers = [built(kind, net) for net in nets]
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))

    def closure():
        optimizers[0].zero_grad()
        loss = nets[0](x).square().mean()
        loss.backward()
        return loss

    loss = optimizers[0].step(closure)
    want = nets[1](x).square().mean()
    want.backward()
    assert optimizers[1].step() is None
    assert torch.equal(loss, want) and equal(*nets)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_step_is_the_step(kind):
    nets = Net(), Net()
    optimizers = [built(kind, net) for net in nets]
    compiled = torch.compile(optimizers[1].step, backend="eager")
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(4):
        for net, optimizer, step in zip(nets, optimizers, (optimizers[0].step, compiled)):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            step()
    assert equal(*nets)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters(kind, dtype):
    net = Net(dtype)
    optimizer = built(kind, net, **{"adamw_eps": 1e-4})
    losses = train(net, optimizer, 4)
    assert all(p.isfinite().all() for p in net.parameters()) and losses[-1] < 1.5 * losses[0]
    for p in (net.first.weight, net.last.weight):
        assert all(t.dtype == dtype for n, t in optimizer.state[p].items() if n != "step")


@pytest.mark.parametrize("kind", OTHERS)
def test_non_finite_gradients_are_not_looked_for(kind):
    """As in torch.optim: they reach the weights of their own matrix."""
    net = Net()
    optimizer = built(kind, net)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    net.first.weight.grad[0, 0] = float("nan")
    before = copy.deepcopy(net)
    optimizer.step()
    assert net.first.weight.isnan().any() and torch.equal(net.last.weight, before.last.weight)


def test_a_hope_model_learns():
    """The groups of a language model: embedding, gains and memories of three dimensions are AdamW's."""
    model = tiny("self_modifying")
    groups = optim.groups(model)
    assert all(p.ndim == 2 for p in groups[0]["params"])
    matrices = {id(p) for p in groups[0]["params"]}
    inside = {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if id(p) in matrices}
    assert inside == {"weight", "up", "down"}  # not the taps and the gains of every channel
    assert any(p is model.embed.weight for p in groups[1]["params"])
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    for make in (lambda: optim.M3(groups, lr=0.02), lambda: optim.DGD(model, lr=0.02)):
        optimizer, tokens, losses = make(), ids(2, 17), []
        for _ in range(8):
            optimizer.zero_grad()
            logits = model(tokens)[0][:, :-1]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]


BAD = {
    "M3": [("lr", -1.0), ("lr", float("nan")), ("betas", (0.9, 0.9)), ("betas", (0.9, 0.9, 1.0)),
           ("betas", 0.9), ("betas", (-0.1, 0.9, 0.9)), ("alpha", -0.1), ("f", 0), ("f", 1.5), ("eps", 0.0),
           ("accumulate", "sum"), ("weight_decay", -1.0), ("adjust_lr_fn", None), ("ns_dtype", torch.float16),
           ("backend", "cuda"), ("adamw_betas", (0.9, 1.0)), ("adamw_lr", -1.0), ("adamw_eps", -1.0),
           ("adamw", 1)],
    "DeltaMomentum": [("a", 1.0), ("a", -0.1), ("b", -0.1), ("b", 1.95), ("b", "x")],
    "DeepMomentum": [("memory", "cnn"), ("hidden", 0), ("power", -1.0), ("seed", 0.5), ("a", 1.0),
                     ("b", 2.0)],
    "DGD": [("erase", 1.5), ("erase", -0.1), ("reduction", "none"), ("chunk", 0), ("lr", -1.0)],
}


@pytest.mark.parametrize("name, option, value", [(n, o, v) for n, bad in BAD.items() for o, v in bad])
def test_bad_options(name, option, value):
    cls = getattr(optim, name)
    with pytest.raises(ValueError, match=rf"{name}: argument {option}"):
        cls([nn.Parameter(torch.ones(2, 2))], **{option: value})
    optimizer = cls([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(ValueError, match=rf"{name}: argument {option}"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], option: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", BAD)
def test_unknown_options(name):
    with pytest.raises(TypeError, match=f"{name}.. got an unexpected keyword argument 'momentum'"):
        getattr(optim, name)([nn.Parameter(torch.ones(2, 2))], momentum=0.9)


@pytest.mark.parametrize("name", BAD)
def test_bad_parameters_and_gradients(name):
    cls = getattr(optim, name)
    bad = (torch.ones(2, 2, dtype=torch.complex64), "complex64"), (torch.ones(0, 3), "no elements")
    for p, said in bad:
        with pytest.raises(ValueError, match=said):
            cls([nn.Parameter(p)])
    table = nn.Embedding(4, 3, sparse=True)
    bias = nn.Parameter(torch.ones(3))
    optimizer = cls([bias, table.weight])
    (table(torch.tensor([1])) * bias).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()
    assert torch.equal(bias, torch.ones(3))
