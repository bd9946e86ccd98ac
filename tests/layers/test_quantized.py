"""Dynamically quantized models and layers read and learn as with the weights they hold."""

import copy
import warnings

import pytest
import torch
from torch import nn
from wrapped_models import VOCAB, D, assert_same, close, ids, learned, small

from hope_kernels import HopeConfig, SelfModifyingTitans, TitansConfig
from hope_kernels.layers.attention import CausalAttention
from hope_kernels.layers.wrapped import project


def quantized(model, kinds=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), kinds or {nn.Linear})


def dequantized(plain, model):
    """``plain`` with the weights of the quantized ``model``."""
    plain = copy.deepcopy(plain)
    for name, m in model.named_modules():
        if callable(getattr(m, "weight", None)):
            plain.get_submodule(name).weight.data = m.weight().dequantize()
    return plain


def test_a_quantized_linear_has_the_gradient_of_its_weights():
    m = quantized(nn.Sequential(nn.Linear(D, 24)))[0]
    x = torch.randn(2, 3, D, requires_grad=True)
    y, grad = project(m, x), torch.randn(2, 3, 24)
    assert torch.equal(y, m(x.detach()))
    assert torch.equal(torch.autograd.grad(y, x, grad)[0], grad @ m.weight().dequantize())
    with pytest.raises(ValueError, match="quantized Linear inside a Sequential"):
        project(nn.Sequential(m), x)
    assert torch.equal(project(nn.Sequential(m), x.detach()), y)


class StraightThrough(nn.Module):
    """The value of a quantized Linear, the gradient of its weight."""

    def __init__(self, m):
        super().__init__()
        self.m = [m]  # no submodule
        self.weight = nn.Parameter(m.weight().dequantize())

    def forward(self, x):
        exact = nn.functional.linear(x, self.weight)
        return self.m[0](x.detach()) + (exact - exact.detach())


@pytest.mark.parametrize("mixer", ["hope", "attention"])
@pytest.mark.parametrize("tie", [True, False])
def test_a_dynamically_quantized_model_reads_and_learns(mixer, tie):
    plain = small(mixer, tie)
    model = quantized(plain)
    exact = copy.deepcopy(plain)
    for name, m in list(model.named_modules()):
        if callable(getattr(m, "weight", None)):
            exact.set_submodule(name, StraightThrough(m))
    with torch.no_grad():
        close(model(ids())[0], dequantized(plain, model)(ids())[0], 0.1)  # activations have 8 bits
        for backend in (None, "chunked"):
            got, want = (m(ids(), learn="next_token", backend=backend) for m in (model, exact))
            assert learned(got[1])
            assert_same(got, want)
        model.blocks[0].mixer(torch.randn(2, 3, D))
    assert model.init_state(2).pos == [0, 0]


@pytest.mark.parametrize("cls", [SelfModifyingTitans, CausalAttention])
def test_a_quantized_layer_by_itself(cls):
    torch.manual_seed(0)
    layer = (
        CausalAttention(HopeConfig(VOCAB, D, 1, mixer="attention", num_heads=2)) if cls is CausalAttention
        else cls(TitansConfig(D, 2))
    )
    model, x = quantized(layer), torch.randn(2, 5, D)
    y, state = model(x)
    close(y, dequantized(layer, model)(x)[0], 0.05)
    assert state.batch == 2
