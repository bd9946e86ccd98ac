"""Models whose submodules are wrapped, hooked or parametrized, and the plain models that these amount to."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM, TitansConfig
from hope_kernels.ops.shared import cpu_library

BACKENDS = [
    None, "chunked", pytest.param("cpp", marks=pytest.mark.skipif(cpu_library.unavailable() is not None,
            reason="cpp not built"))
]
D, VOCAB = 16, 32


class LoRALinear(nn.Module):
    """As adapters are commonly written; no attribute ``weight``."""

    def __init__(self, base: nn.Linear, rank: int = 2):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(0.3 * torch.randn(rank, base.in_features))
        self.b = nn.Parameter(0.3 * torch.randn(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + x @ self.a.mT @ self.b.mT


class LoRAEmbedding(nn.Module):
    def __init__(self, base: nn.Embedding, rank: int = 2):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(0.1 * torch.randn(base.num_embeddings, rank))
        self.b = nn.Parameter(0.1 * torch.randn(rank, base.embedding_dim))

    def forward(self, ids):
        return self.base(ids) + self.a[ids] @ self.b


class LowRank(nn.Module):
    """A parametrization that adds a low-rank part; as a view with other strides, which kernels must not take
    for rows."""

    def __init__(self, shape):
        super().__init__()
        rows, cols = shape[0], shape[-1]
        self.a, self.b = nn.Parameter(0.2 * torch.randn(2, rows)), nn.Parameter(0.2 * torch.randn(2, cols))

    def forward(self, w):
        return (w + self.a.mT @ self.b).mT.contiguous().mT


class Scaled(nn.Module):
    def __init__(self, factor=1.5):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, w):
        return w * self.factor

    def right_inverse(self, w):
        return w / self.factor


class Squared(nn.Module):
    """No ``right_inverse``."""

    def forward(self, w):
        return w * w


class Forgetful(nn.Module):
    """A ``right_inverse`` that is none."""

    def forward(self, w):
        return w.clamp(-0.05, 0.05)

    def right_inverse(self, w):
        return w


class ForTheCall(nn.Module):
    """As PEFT's ``target_parameters``: a low-rank part of a parameter, there only inside this module's own call."""

    def __init__(self, base, name):
        super().__init__()
        self.base, self.name = base, name
        self.part = LowRank(self.owner().get_parameter(name).shape)

    def owner(self):
        return self.base.owner() if isinstance(self.base, ForTheCall) else self.base

    def forward(self, x, *args):
        owner = self.owner()
        parametrize.register_parametrization(owner, self.name, self.part)
        try:
            return self.base(x, *args)
        finally:
            parametrize.remove_parametrizations(owner, self.name, leave_parametrized=False)


def hooked(m, forward=None, before=None):
    if forward is not None:
        m.register_forward_hook(lambda _, args, y: forward(y))
    if before is not None:
        m.register_forward_pre_hook(lambda _, args: (before(args[0]),))
    return m


def forward_exchanged(m):
    forward = m.forward
    m.forward = lambda x: 1.5 * forward(x)
    return m


def parametrized(m):
    parametrize.register_parametrization(m, "weight", LowRank(m.weight.shape))
    return m


def old_weight_norm(m):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        m = nn.utils.weight_norm(m)
    with torch.no_grad():
        m.weight_g.mul_(1.5)
    return m


def new_weight_norm(m):
    m = parametrizations.weight_norm(m)
    with torch.no_grad():
        m.parametrizations.weight.original0.mul_(1.5)
    return m


LINEARS = {
    "lora": LoRALinear,
    "nested lora": lambda m: LoRALinear(LoRALinear(m).base, 1),
    "sequential": lambda m: nn.Sequential(m, nn.Linear(m.out_features, m.out_features, bias=False)),
    "forward hook": lambda m: hooked(m, forward=lambda y: 1.5 * y),
    "pre-hook": lambda m: hooked(m, before=lambda x: 0.6 * x),
    "forward exchanged": forward_exchanged,
    "parametrized": parametrized,
    "weight_norm": old_weight_norm,
    "weight_norm, parametrized": new_weight_norm,
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.4),
    "subclass": lambda m: Triple(m),
}


class Triple(nn.Linear):
    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = base.weight

    def forward(self, x):
        return 3 * super().forward(x)


def projections(model):
    for block in model.blocks:
        for name, m in list(block.mixer.named_children()):
            yield block.mixer, name, m


def small(mixer="hope", tie=True, seed=0, **cms) -> HopeForCausalLM:
    torch.manual_seed(seed)
    titans = None if mixer == "attention" else TitansConfig(D, 2, chunk_memory=4, chunk_other=4)
    cms = CMSConfig(D, (4, 8), expansion=2.0, **{"lr": (0.05, 0.03), **cms})
    kind = {"mixer": "attention"} if mixer == "attention" else {}
    return HopeForCausalLM(
        HopeConfig(VOCAB, D, 2, num_heads=2, titans=titans, cms=cms, tie_embeddings=tie, **kind)
    ).eval()


def ids(seed=1, T=21):
    return torch.randint(0, VOCAB, (2, T), generator=torch.Generator().manual_seed(seed))


def pair(kind, **options):
    """A model with wrapped projections, and a plain one with the weights these amount to."""
    wrapped, plain = small(**options), small(**options)
    torch.manual_seed(5)
    for owner, name, m in projections(wrapped):
        setattr(owner, name, LINEARS[kind](m))
    with torch.no_grad():
        for (_, _, m), (owner, name, _) in zip(projections(plain), projections(wrapped)):
            m.weight.copy_(getattr(owner, name)(torch.eye(D)).mT)
    return wrapped, plain


def learned(state):
    return [t for c in state.cms for part in c.weights if part is not None for t in part.values()]


def close(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape
    ours, theirs = ours.detach(), theirs.detach()
    assert float((ours - theirs).abs().max()) <= tolerance * max(1.0, float(theirs.abs().max()))


def assert_same(ours, theirs, tolerance=1e-5):
    """(logits, state) of two models."""
    assert ours[1].pos == theirs[1].pos
    close(ours[0], theirs[0], tolerance)
    mine, others = learned(ours[1]), learned(theirs[1])
    assert len(mine) == len(others)
    for a, b in zip(mine, others):
        close(a, b, tolerance)


def assert_as_exact(ours, theirs, exact):
    """(logits, state) of two models that compute in fp32 by other ways, as far from that of fp64 as each other."""
    for a, b, e in zip(*([out[0], *learned(out[1])] for out in (ours, theirs, exact)), strict=True):
        ours_off, theirs_off = (float((x.double() - e).abs().max()) for x in (a, b))
        assert ours_off <= 4 * theirs_off + 1e-6 * max(1.0, float(e.abs().max()))
