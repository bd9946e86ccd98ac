"""A state belongs to the weights it was read with: other weights of the same configuration are refused, in
memory and from files."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hope_kernels import (
    CMSConfig,
    ContinuumMemory,
    Decoder,
    HopeConfig,
    HopeForCausalLM,
    SelfModifyingTitans,
    TitansConfig,
    identity,
    load_state,
)
from hope_kernels.identity import checksum, fingerprint
from hope_kernels.layers.attention import CausalAttention
from hope_kernels.ops.shared import cpu_library

D, V = 16, 32


def made(kind: str, seed: int):
    torch.manual_seed(seed)
    if kind == "titans":
        return SelfModifyingTitans(TitansConfig(D, 2))
    if kind == "attention":
        return CausalAttention(HopeConfig(V, D, 1, "attention", num_heads=2))
    if kind == "cms":
        return ContinuumMemory(CMSConfig(D, (16,)))
    return HopeForCausalLM(HopeConfig(V, D, 1, num_heads=2, cms=CMSConfig(D, (4,))))


def given(kind: str, T: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randint(0, V, (1, T), generator=generator) if kind == "model"
        else torch.randn(1, T, D, generator=generator)
    )


KINDS = pytest.mark.parametrize("kind", ["titans", "attention", "cms", "model"])
GRAD = pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])


@KINDS
@GRAD
def test_other_weights_are_refused_and_the_same_ones_are_not(kind, grad, tmp_path):
    a, b, x = made(kind, 0), made(kind, 1), given(kind)
    with torch.set_grad_enabled(grad):
        _, state = a(x, a.init_state(1))
        before = [t.clone() for t in state.tensors()]
        with pytest.raises(ValueError, match="the state belongs to weights") as error:
            b(x, state)
        assert str(checksum(a)) in str(error.value) and str(checksum(b)) in str(error.value)
        assert state.pos == [3] and all(torch.equal(p, q) for p, q in zip(before, state.tensors()))
        state.save(tmp_path / "s")
        with pytest.raises(ValueError, match="the state belongs to weights"):
            b(x, load_state(tmp_path / "s"))
        for same in (a, copy.deepcopy(a), made(kind, 0)):
            expected, _ = a(x[:, :1], state.clone())
            assert torch.equal(same(x[:, :1], state.clone())[0], expected)
            assert torch.equal(same(x[:, :1], load_state(tmp_path / "s"))[0], expected)
        other = state.clone()
        other.adopt(b)
        b(x[:, :1], other)


@KINDS
def test_a_fresh_state_belongs_to_nobody(kind):
    a, b, x = made(kind, 0), made(kind, 1), given(kind)
    with torch.no_grad():
        expected, _ = b(x)
        assert torch.equal(b(x, a.init_state(1))[0], expected)


def test_a_fresh_state_that_holds_initial_weights_belongs_to_them():
    a, b = (SelfModifyingTitans(TitansConfig(D, 2, retain_to="zero")) for _ in range(2))
    with torch.no_grad(), pytest.raises(ValueError, match="the state belongs to weights"):
        b(torch.randn(1, 3, D), a.init_state(1))


@KINDS
def test_after_an_optimizer_step_a_file_names_the_weights_the_state_was_read_with(kind, tmp_path):
    model, x = made(kind, 0), given(kind)
    old = copy.deepcopy(model)
    y, state = model(x)
    y.square().mean().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    state.detach().save(tmp_path / "s")
    with torch.no_grad():
        old(x[:, :1], load_state(tmp_path / "s"))
        with pytest.raises(ValueError, match="the state belongs to weights"):
            model(x[:, :1], load_state(tmp_path / "s"))
        # in memory training goes on with its own state, which from then on is one of the new weights
        _, state = model(x[:, :1], state.detach())
        state.save(tmp_path / "t")
        model(x[:, :1], load_state(tmp_path / "t"))
        with pytest.raises(ValueError, match="the state belongs to weights"):
            old(x[:, :1], load_state(tmp_path / "t"))


def test_a_call_that_fails_or_reads_nothing_leaves_the_mark():
    layer, x = made("titans", 0), given("titans")
    with torch.no_grad():
        _, state = layer(x)
        mark = str(state.fingerprint)
        layer.eta_bias.add_(1)
        layer(x, state, update=False)
        with pytest.raises(ValueError, match="unknown backend"):
            layer(x, state, backend="fast")
        assert str(state.fingerprint) == mark
        layer(x, state)
        assert str(state.fingerprint) != mark


def test_every_single_change_of_the_weights_is_seen():
    layer = made("titans", 0)
    seen = {str(checksum(layer))}
    with torch.no_grad():
        for p in layer.parameters():
            p.view(-1)[-1].neg_().add_(1e-3)
            seen.add(str(checksum(layer)))
            p.neg_()
            seen.add(str(checksum(layer)))
    layer.out_proj.weight.data = layer.out_proj.weight.data.flip(0)
    seen.add(str(checksum(layer)))
    assert len(seen) == 2 + 2 * len(list(layer.parameters()))
    assert str(checksum(layer.double())) not in seen


def test_the_checksum_is_taken_once_for_one_set_of_values():
    layer = made("titans", 0)
    first = checksum(layer)
    assert checksum(layer) is first
    with torch.no_grad():
        layer.eta_bias.add_(0)
    assert checksum(layer) is not first and str(checksum(layer)) == str(first)


def test_a_decoder_refuses_other_weights():
    a, b = made("model", 0), made("model", 1)
    with torch.no_grad():
        _, state = a(given("model"))
        with pytest.raises(ValueError, match="the state belongs to weights"):
            Decoder(b, state)


def test_a_file_with_the_fingerprint_of_earlier_versions(tmp_path):
    a, b, x = made("titans", 0), made("titans", 1), given("titans")
    with torch.no_grad():
        _, state = a(x)
        state.save(tmp_path / "new")
        with safe_open(tmp_path / "new", "pt") as f:
            tensors, meta = {n: f.get_tensor(n) for n in f.keys()}, f.metadata()
        del meta["sha256"]
        save_file(
            tensors, tmp_path / "old", meta
            | {"fingerprint": fingerprint(a), "tree": json.dumps(json.loads(meta["tree"]))}
        )
        expected, _ = a(x, state.clone())
        assert torch.equal(a(x, load_state(tmp_path / "old"))[0], expected)
        with pytest.raises(
            ValueError, match=f"belongs to weights {fingerprint(a)}, these are weights {fingerprint(b)}"
        ):
            b(x, load_state(tmp_path / "old"))


def test_weights_that_nobody_can_look_at_are_no_error():
    """Under a transformation of torch.func parameters are stand-ins."""
    layer, x = made("titans", 0), given("titans")
    parameters = {n: p.detach() for n, p in layer.named_parameters()}

    def loss(p, x):
        return torch.func.functional_call(layer, p, (x.unsqueeze(0),))[0].square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x.repeat(2, 1, 1))
    layer(x)[0].square().sum().backward()
    for name, p in layer.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(each[name][1], p.grad, rtol=1e-4, atol=1e-6)


@KINDS
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_every_optimizer_step_changes_the_mark(kind, fused):
    """A fused step moves no version counter."""
    model = made(kind, 0)
    before = str(checksum(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    after = str(checksum(model))
    assert after != before and after == str(checksum(copy.deepcopy(model)))


@KINDS
def test_weights_edited_behind_pytorch_are_seen_where_a_state_changes_hands(kind, tmp_path):
    model, x = made(kind, 0), given(kind)
    with torch.no_grad():
        _, state = model(x, model.init_state(1))
        state.save(tmp_path / "s")
        for p in model.parameters():
            p.data.mul_(1.5)  # moves no version counter
        with pytest.raises(ValueError, match="the state belongs to weights"):
            model(x[:, :1], load_state(tmp_path / "s"))
        state.adopt(model)
        state.save(tmp_path / "s")
        copy.deepcopy(model)(x[:, :1], load_state(tmp_path / "s"))


@pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"cpp: {cpu_library.unavailable()}")
@pytest.mark.parametrize("size", [0, 1, 7, 8, 4 * 4095, 8 * 4096, 8 * 4096 * 3 + 13, 8 * 4096 * 2048 * 2 + 8 * 5 + 3])
def test_the_library_and_pytorch_have_one_checksum(size):
    x = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    assert int(identity.weighted_sum(x)) == int(identity._weighted_sum_chunked(x))
    apart = torch.cat([x[:1], x])[1:]  # begins where no number does
    assert int(identity.weighted_sum(apart)) == int(identity.weighted_sum(x))
    if size:
        assert int(identity.weighted_sum(x.index_fill(0, torch.tensor([size // 2]), 7) + 1)) != int(
            identity.weighted_sum(x))
