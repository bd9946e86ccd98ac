"""Adapters and hooks of embedding and head: the function is that of merged, plain weights."""

import copy

import pytest
import torch
from torch import nn
from wrapped_models import VOCAB, D, LoRAEmbedding, LoRALinear, assert_same, close, ids, small

from hope_kernels import HopeForCausalLM


@pytest.mark.parametrize("tie", [True, False])
def test_adapters_of_embedding_and_head(tie):
    wrapped, plain = small(tie=tie), small(tie=tie)
    torch.manual_seed(5)
    wrapped.embed = LoRAEmbedding(wrapped.embed)
    with torch.no_grad():
        plain.embed.weight.copy_(wrapped.embed(torch.arange(VOCAB)))
        if not tie:
            wrapped.head = LoRALinear(wrapped.head)
            plain.head.weight.copy_(wrapped.head(torch.eye(D)).mT)
        assert_same(wrapped(ids(), learn="next_token"), plain(ids(), learn="next_token"))
        empty = torch.zeros(2, 0, dtype=torch.long)
        assert wrapped(empty, learn="next_token")[0].shape == (2, 0, VOCAB)
        assert torch.equal(
            wrapped.generate(ids(T=5), 4, temperature=0).tokens, plain.generate(ids(T=5), 4, temperature=0).tokens
        )
    # of a tied one, the head's gradient reaches the adapter too
    w, p = wrapped.embed.a, plain.embed.weight
    by_a = torch.autograd.grad(wrapped(ids())[0].square().sum(), w)[0]
    close(by_a, torch.autograd.grad(plain(ids())[0].square().sum(), p)[0] @ wrapped.embed.b.detach().mT)


def test_adapters_of_a_scaled_embedding():
    """The scale is of what is read; a tied head multiplies without it."""
    plain = HopeForCausalLM(small("attention").config.replace(embed_scale=3.0)).eval()
    wrapped = copy.deepcopy(plain)
    wrapped.embed = LoRAEmbedding(wrapped.embed)
    with torch.no_grad():
        plain.embed.weight.copy_(wrapped.embed(torch.arange(VOCAB)) / 3)
        close(plain.embed(ids()), 3 * plain.embed.weight[ids()])
        assert_same(wrapped(ids(), learn="next_token"), plain(ids(), learn="next_token"))


def test_a_hook_on_the_embedding_acts_on_what_is_read_not_on_the_tied_head():
    model = small()
    with torch.no_grad():
        h = model.embed(ids())
        want = torch.nn.functional.linear(h, model.embed.weight)
        model.embed.register_forward_hook(lambda m, args, y: y + 1)
        model.norm = nn.Identity()
        close(model.logits(h, [21, 21]), want)
