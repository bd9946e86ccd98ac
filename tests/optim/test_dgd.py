import copy

import numpy as np
import optimizer_rules as rules
import pytest
import torch
from small_model import ids, tiny
from torch import nn

from hope_kernels import CMSConfig
from hope_kernels.optim import DGD
from hope_kernels.optim.dgd import erase_


def model(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 3, bias=False)).to(dtype)


def batch(step, n=6, dtype=torch.float64):
    g = torch.Generator().manual_seed(100 + step)
    return torch.randn(n, 5, generator=g, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_without_erasing_it_is_sgd(reduction):
    ours, theirs = model(), model()
    optimizers = DGD(ours, lr=0.3, erase=0.0, reduction=reduction, weight_decay=0.0), torch.optim.SGD(
        theirs.parameters(), lr=0.3
    )
    for step in range(4):
        for m, optimizer in zip((ours, theirs), optimizers):
            optimizer.zero_grad()
            m(batch(step)).square().mean().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


@pytest.mark.parametrize("chunk", [1, 4, 256])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("erase", [1.0, 0.5])
def test_a_batch_equals_the_loop_over_its_inputs(chunk, reduction, erase):
    """One layer; the loss is linear in its outputs, so that the loop knows the gradient."""
    layer = nn.Linear(5, 7, bias=False, dtype=torch.float64)
    start = layer.weight.detach().numpy().copy()
    optimizer = DGD(layer, lr=0.4, erase=erase, reduction=reduction, chunk=chunk)
    g = torch.Generator().manual_seed(0)
    targets = torch.randn(9, 7, generator=g, dtype=torch.float64)
    for step in range(3):
        optimizer.zero_grad()
        (layer(batch(step, 9).reshape(3, 3, 5)).reshape(9, 7) * targets).sum().backward()
        optimizer.step()
    gradient = lambda w, t: (targets.T @ batch(t, 9)).numpy()
    inputs = [batch(t, 9).numpy() for t in range(3)]
    want = rules.dgd(start, gradient, inputs, 0.4, erase, reduction == "mean")
    np.testing.assert_allclose(layer.weight.detach().numpy(), want, rtol=0, atol=1e-12)


def test_one_input_is_the_step_of_equation_56():
    """The minimum of |W x - u|^2 / 2 + |W - W_t|^2 / (2 eta) with u = -dL/dy: its gradient is zero there."""
    layer = nn.Linear(5, 7, bias=False, dtype=torch.float64)
    before = layer.weight.detach().clone()
    optimizer, x, d = DGD(layer, lr=0.7), batch(0, 1), torch.randn(1, 7, dtype=torch.float64)
    (layer(x) * d).sum().backward()
    optimizer.step()
    W = layer.weight.detach()
    slope = (W @ x.T + d.T) @ x + (W - before) / 0.7
    torch.testing.assert_close(slope, torch.zeros_like(W), rtol=0, atol=1e-12)


def test_erasing_is_exact_for_any_split():
    torch.manual_seed(0)
    x, rates = torch.randn(40, 6, dtype=torch.float64), torch.rand(40, dtype=torch.float64) / 6
    whole = torch.randn(4, 6, dtype=torch.float64)
    parts = whole.clone()
    erase_(whole, x, rates)
    for a, b in ((0, 7), (7, 8), (8, 40)):
        erase_(parts, x[a:b], rates[a:b])
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-12)


def test_inputs_count_when_their_gradient_arrives():
    net = model()
    optimizer = DGD(net, lr=0.1)
    first = lambda: [len(t) for t in optimizer.state[net[0].weight].get("inputs", [])]
    with torch.no_grad():
        net(batch(0))
    loss = net(batch(1, 4)).square().sum()
    net(batch(2))  # nobody asks for its gradient
    assert first() == []
    optimizer.zero_grad()  # between forward and backward, as training loops have it
    loss.backward()
    assert first() == [4]
    net(batch(3, 2)).square().sum().backward()  # accumulated
    assert first() == [4, 2]
    optimizer.step()
    assert first() == []
    net(batch(1)).square().sum().backward()
    optimizer.zero_grad()
    assert first() == []
    optimizer.unwatch()
    net(batch(1)).square().sum().backward()
    with pytest.raises(ValueError, match="has a gradient and no input"):
        optimizer.step()


@pytest.mark.parametrize("options", [
    {}, {"learn": "next_token"}, {"learn": "next_token", "outer": "first_order"},
    {"learn": "next_token", "outer": "second_order"},
])
def test_what_a_model_learns_while_it_reads_is_no_backward_pass(options):
    model = tiny(cms=CMSConfig(8, (4, 8), lr=0.02))
    optimizer, tokens = DGD(model), ids(2, 17)
    logits, _ = model(tokens[:, :-1], **options)
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    counts = [sum(map(len, kept["inputs"])) for kept in optimizer.state.values() if "inputs" in kept]
    assert len(counts) == 8 and set(counts) == {2 * 16}


def test_a_gradient_that_is_not_kept_leaves_no_inputs():
    layer, x = nn.Linear(3, 2, bias=False), torch.randn(4, 3, requires_grad=True)
    optimizer = DGD(layer, lr=0.1)
    torch.autograd.grad(layer(x).sum(), x)
    assert "inputs" not in optimizer.state[layer.weight]
    y = layer(input=x)
    penalty = torch.autograd.grad(y.square().sum(), x, create_graph=True)[0].square().sum()
    (y.sum() + penalty).backward()
    assert sum(map(len, optimizer.state[layer.weight]["inputs"])) == 4


def test_inputs_go_with_the_gradient():
    layer, x = nn.Linear(3, 2, bias=False), torch.randn(5, 3)
    optimizer = DGD(layer, lr=0.1)
    layer(torch.randn(4, 3)).sum().backward()
    layer.zero_grad()
    layer(x).sum().backward()
    assert torch.equal(torch.cat(optimizer.state[layer.weight]["inputs"]), x)


def test_an_input_that_was_written_to_is_refused():
    layer, x = nn.Linear(3, 2, bias=False), torch.randn(4, 3)
    optimizer, before = DGD(layer, lr=0.1), layer.weight.detach().clone()
    layer(x).sum().backward()
    x.zero_()
    with pytest.raises(ValueError, match=r"an input \[4, 3\] was written to .*x.clone\(\)"):
        optimizer.step()
    assert torch.equal(layer.weight, before)
    optimizer.zero_grad()
    layer(x + 1).sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before)


def test_a_weight_of_another_in_the_layer_is_not_counted():
    layer = nn.Linear(3, 2, bias=False)
    optimizer, other = DGD(layer, lr=0.1), torch.randn(2, 3, requires_grad=True)
    torch.func.functional_call(layer, {"weight": other}, torch.randn(4, 3)).sum().backward()
    assert not optimizer.state and other.grad is not None


def test_a_call_without_rows_moves_nothing():
    """As an expert has it that no token went to: its gradient is zero, and its inputs are none."""
    layer = nn.Linear(5, 7, bias=False)
    optimizer, before = DGD(layer, lr=0.1), layer.weight.detach().clone()
    layer(torch.ones(0, 5)).sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight, before) and not optimizer.state[layer.weight]


def test_pending_inputs_are_saved():
    """Between backward and step: a copy of model and state goes on bit for bit."""
    net = model(torch.float32)
    optimizer = DGD(net, lr=0.1)
    net(batch(0, dtype=torch.float32)).square().sum().backward()
    other = copy.deepcopy(net)
    for p, q in zip(other.parameters(), net.parameters()):
        p.grad = q.grad.clone()
    again = DGD(other, lr=0.1)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(1, 3):
        for m, o in ((net, optimizer), (other, again)):
            m(batch(step, dtype=torch.float32)).square().sum().backward()
            o.step()
            o.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))


def test_failed_steps_change_nothing():
    net = model()
    optimizer = DGD([{"params": [net[0].weight]}, {"params": [net[2].weight]}]).watch(net[0])
    net(batch(0)).square().sum().backward()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match="no input"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))


def test_checkpointed_and_mixed_layers():
    """Activation checkpoints read a layer twice and count once; autocast may make inputs of bf16."""
    from torch.utils.checkpoint import checkpoint

    found = []
    for wrapped in (False, True):
        net = model(torch.float32)
        optimizer, x = DGD(net, lr=0.1), batch(0, dtype=torch.float32).requires_grad_()
        (checkpoint(net, x, use_reentrant=False) if wrapped else net(x)).square().mean().backward()
        assert [len(t) for t in optimizer.state[net[0].weight]["inputs"]] == [6]
        optimizer.step()
        found.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))
    with torch.autocast("cpu", torch.bfloat16):
        net(batch(1, dtype=torch.float32)).float().square().mean().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in net.parameters())


def test_16_bit_weights():
    """Close to what fp32 makes of the same weights: the erasure is computed in fp32, one rounding to bf16."""
    narrow = model(torch.bfloat16)
    wide = copy.deepcopy(narrow).float()
    for net in (narrow, wide):
        optimizer = DGD(net, lr=0.1)
        x = batch(0).bfloat16().to(net[0].weight.dtype)
        net(x).float().square().mean().backward()
        optimizer.step()
    for a, b in zip(narrow.parameters(), wide.parameters()):
        torch.testing.assert_close(a.float(), b, rtol=2**-7, atol=2**-8)
