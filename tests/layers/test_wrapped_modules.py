"""Adapters, hooks, parametrizations and replaced submodules: the function is that of the same model with
merged, plain weights."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from hope_kernels import (
    CMSConfig,
    ContinuumMemory,
    Decoder,
    HopeConfig,
    HopeForCausalLM,
    SelfModifyingTitans,
    TitansConfig,
)
from hope_kernels.compat import nested_learning as compat
from hope_kernels.layers.attention import CausalAttention
from hope_kernels.layers.wrapped import is_plain, project
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LINEARS)
def test_wrapped_projections_read_and_learn_as_merged_weights(kind, backend):
    wrapped, plain = pair(kind)
    assert not any(
        is_plain(m) for _, _, m in projections(wrapped)
    ) and all(is_plain(m) for _, _, m in projections(plain))
    with torch.no_grad():
        still = plain(ids(), backend=backend)[0]
        close(wrapped(ids(), backend=backend)[0], still)
        want = plain(ids(), learn="next_token", backend=backend)
        assert float((want[0] - still).abs().max()) > 1e-3 and learned(want[1])
        assert_same(wrapped(ids(), learn="next_token", backend=backend), want)


@pytest.mark.parametrize("kind", LINEARS)
def test_wrapped_attention_reads_and_learns_as_merged_weights(kind):
    wrapped, plain = pair(kind, mixer="attention")
    with torch.no_grad():
        assert_same(wrapped(ids(), learn="next_token"), plain(ids(), learn="next_token"))
    layer, other = wrapped.blocks[0].mixer, plain.blocks[0].mixer
    x = torch.randn(2, 5, D)
    close(layer(x)[0], other(x)[0])
    assert layer.init_state(2).k.dtype == torch.float32


@pytest.mark.parametrize("learn", ["off", "next_token"])
@pytest.mark.parametrize("kind", LINEARS)
def test_training_through_wrapped_projections_has_the_gradient_of_merged_weights(kind, learn):
    wrapped, plain = pair(kind)

    def gradient(model):
        logits, _ = model(ids(), learn=learn)
        return torch.autograd.grad(logits.square().sum(), [model.embed.weight, model.blocks[0].norm.weight])

    for a, b in zip(gradient(wrapped), gradient(plain)):
        close(a, b)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", LINEARS)
def test_the_gradient_of_reads_passes_through_wrapped_projections(kind, static):
    """Of one layer on the C++ backend, against the graph of merged weights on the chunked one."""
    if cpu_library.unavailable() is not None:
        pytest.skip("cpp not built")
    config = TitansConfig.preset("titans", d_model=D, num_heads=2, momentum=None) if static else TitansConfig(D, 2)
    torch.manual_seed(0)
    plain = SelfModifyingTitans(config)
    wrapped = copy.deepcopy(plain)
    for name, m in list(wrapped.named_children()):
        wrapper = LINEARS[kind](m)
        setattr(wrapped, name, wrapper)
        with torch.no_grad():
            getattr(plain, name).weight.copy_(wrapper(torch.eye(D)).mT)
    x, grad = torch.randn(2, 9, D), torch.randn(2, 9, D)

    def scanned(layer, backend):
        leaf = x.clone().requires_grad_()
        y, new = layer.scan(leaf, layer.init_state(2), [9, 9], backend=backend, constant_memory=True)
        assert not any(t.requires_grad for t in new.tensors())
        return y.detach(), torch.autograd.grad(y, leaf, grad)[0]

    want = scanned(plain, "chunked")
    for ours in (scanned(wrapped, "cpp"), scanned(plain, "cpp"), scanned(wrapped, "chunked")):
        for a, b in zip(ours, want):
            close(a, b)


def test_a_projection_with_a_bias_takes_the_place_of_one_without():
    model = small()
    for owner, name, m in projections(model):
        other = nn.Linear(m.in_features, m.out_features, bias=True)
        setattr(owner, name, other)
        assert not is_plain(other)
    with torch.no_grad():
        assert_same(model(ids(), learn="next_token"), model(ids(), learn="next_token", backend="chunked"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_hooks_of_projections_fire_while_learning(backend):
    model, seen = small(), []
    handle = model.blocks[1].mixer.out_proj.register_full_backward_hook(
        lambda m, by_input, by_output: seen.append(by_output[0])
    )
    with torch.no_grad():
        model(ids(T=9), learn="next_token", backend=backend)
        assert len(seen) == 2 and seen[0].shape == (2, 4, D) and seen[0].abs().max() > 0
        handle.remove()
        model(ids(T=9), learn="next_token", backend=backend)
    assert len(seen) == 2


@pytest.mark.parametrize("kind", ["lora", "parametrized"])
def test_wrapped_models_learn_in_inference_mode(kind):
    wrapped, plain = pair(kind)
    for block, other in zip(wrapped.blocks, plain.blocks):
        parametrize.register_parametrization(block.cms.levels[0], "up", LowRank(block.cms.levels[0]["up"].shape))
        with torch.no_grad():
            other.cms.levels[0]["up"].copy_(block.cms.levels[0]["up"])
    with torch.inference_mode():
        states = [m.init_state(2) for m in (wrapped, plain)]
        for part in ids().split(6, 1):
            assert_same(*(m(part, s, learn="next_token") for m, s in zip((wrapped, plain), states)))


@pytest.mark.skipif(cpu_library.unavailable() is not None, reason="cpp not built")
def test_hooks_for_all_modules_are_seen():
    model, seen = small(), []
    with torch.no_grad():
        want = model(ids(T=9), learn="next_token", backend="chunked")
    handle = nn.modules.module.register_module_full_backward_hook(lambda m, by_input, by_output: seen.append(m))
    try:
        with torch.no_grad():
            assert_same(model(ids(T=9), learn="next_token", backend="cpp"), want)
    finally:
        handle.remove()
    assert model.blocks[1].mixer.out_proj in seen and model.blocks[1].mixer.q_proj in seen


def layer_parameters(model):
    """What is a parameter of a layer itself, not of a Linear."""
    for block in model.blocks:
        for name in ("conv", "norm_gain", "w2", "w1", "eta_bias", "alpha_bias"):
            yield block.mixer, name
        for level in block.cms.levels:
            yield from ((level, name) for name in ("up", "down", "norm_gain"))
        if block.cms.mix is not None:
            yield block.cms, "mix"
    yield model.embed, "weight"
    yield model.norm, "weight"


@pytest.mark.parametrize(
    "options", [{}, {"variant": "independent"}, {"optimizer": "momentum"}, {"mlp": "swiglu"}], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_parametrized_layers_read_and_learn_as_their_effective_weights(backend, options):
    wrapped, plain = small(**options), small(**options)
    torch.manual_seed(5)
    for (owner, name), (other, _) in zip(list(layer_parameters(wrapped)), list(layer_parameters(plain))):
        w = getattr(owner, name)
        parametrize.register_parametrization(owner, name, LowRank(w.shape) if w.dim() == 2 else Scaled())
        with torch.no_grad():
            getattr(other, name).copy_(getattr(owner, name))
    with torch.no_grad():
        want = plain(ids(), learn="next_token", backend=backend)
        got = wrapped(ids(), learn="next_token", backend=backend)
        assert learned(want[1])
        assert_same(got, want)
        # and on from there: steps at weights that have learned add up what the two ways round
        exact = copy.deepcopy(plain).double()
        _, state = exact(ids(), learn="next_token")
        assert_as_exact(
            *(m(ids(2), s, learn="next_token", backend=backend) for m, (_, s) in ((wrapped, got), (plain, want))),
            exact(ids(2), state, learn="next_token"),
        )
    assert wrapped.blocks[0].cms.state_bytes() == plain.blocks[0].cms.state_bytes()
    logits = wrapped(ids())[0]
    close(logits, plain(ids())[0])
    factor = wrapped.blocks[0].cms.levels[0].parametrizations.norm_gain[0].factor
    assert torch.autograd.grad(logits.square().sum(), factor)[0].abs() > 0


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_adapters_that_are_there_for_the_time_of_a_call(backend):
    wrapped, plain = small(), small()
    torch.manual_seed(5)
    for block, other in zip(wrapped.blocks, plain.blocks):
        level, target = block.cms.levels[0], other.cms.levels[0]
        adapted = ForTheCall(level, "up")
        with torch.no_grad():
            target["up"].copy_(adapted.part(level["up"]))
            target["down"].copy_((part := LowRank(level["down"].shape))(level["down"]))
        block.cms.levels[0] = ForTheCall(adapted, "down")
        block.cms.levels[0].part = part
    with torch.no_grad():
        got, want = (m(ids(), learn="next_token", backend=backend) for m in (wrapped, plain))
        assert_same(got, want)
        with pytest.raises(ValueError, match=r"levels\[0\]: up belongs to a ForTheCall"):
            wrapped.consolidate(got[1])
    by_a = torch.autograd.grad(wrapped(ids())[0].square().sum(), part.a)[0]
    assert by_a.abs().max() > 0
    assert wrapped.blocks[0].cms.state_bytes() == plain.blocks[0].cms.state_bytes()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_parametrized_cms_learns_as_a_layer(mode):
    config = CMSConfig(D, (4, 8), expansion=2.0, lr=(0.3, 0.2))
    torch.manual_seed(0)
    wrapped, plain = ContinuumMemory(config), ContinuumMemory(config)
    for l, level in enumerate(wrapped.levels):
        parametrize.register_parametrization(level, "up", Scaled())
        with torch.no_grad():
            for name, p in plain.levels[l].items():
                p.copy_(level[name])
    x, e = torch.randn(2, 8, D), torch.randn(2, 8, D)

    def read(layer):
        with mode():
            state = layer.init_state(2)
            for a in (0, 4):
                y, state = layer(x[:, a : a + 4], state)
                state = layer.refresh(state, e[:, a : a + 4])
            return layer(x[:, :4], state)[0], layer.detach_level(state, 0, 1), layer.detach_level(state, 1)

    (y, *levels), (want, *others) = read(wrapped), read(plain)
    close(y, want)
    for ours, theirs in zip(levels, others):
        for name in ours:
            close(ours[name], theirs[name])


def test_decoding_and_reading_side_by_side_take_effective_weights():
    model, tokens = pair("lora")[0], ids(T=9)
    for block in model.blocks:
        parametrize.register_parametrization(block.cms.levels[0], "up", Scaled())
    with torch.no_grad():
        want, state = model(tokens, learn="next_token")
        decoder = Decoder(model, model.init_state(2), learn="next_token")
        close(torch.cat([decoder.step(tokens[:, t : t + 1]) for t in range(9)], 1), want)
        close(model(tokens, wavefront=4)[0], model(tokens)[0])
        for a, b in zip(learned(decoder.state), learned(state), strict=True):
            close(a, b)


def consolidated(make):
    """A model that has learned, with ``make()`` on every matrix of its CMS; what it computes then, and its
    state."""
    model = small()
    for block in model.blocks:
        for level in block.cms.levels:
            for name in ("up", "down"):
                make(level, name)
    with torch.no_grad():
        _, state = model(ids(), learn="next_token")
        before = model(ids(3), state.clone())[0]
    return model, state, before


@pytest.mark.parametrize("make", [
    lambda level, name: parametrize.register_parametrization(level, name, Scaled()),
    lambda level, name: parametrizations.weight_norm(level, name),
], ids=["scaled", "weight_norm"])
def test_consolidate_writes_through_a_parametrization(make):
    model, state, before = consolidated(make)
    with torch.no_grad():
        now = model.blocks[0].cms.effective_levels(state.select([0]).cms[0])[0]["up"].dense(1)[0]
        model.consolidate(state, row=0)
        close(model.blocks[0].cms.levels[0]["up"], now)
        close(model(ids(3), state.clone())[0], before)


@pytest.mark.parametrize("kind", [Squared, Forgetful])
def test_consolidate_refuses_what_it_cannot_write_and_changes_nothing(kind):
    def make(level, name):
        if level is last:
            parametrize.register_parametrization(level, name, kind())

    model = small()
    last = model.blocks[1].cms.levels[1]
    for name in ("up", "down"):
        make(last, name)
    with torch.no_grad():
        _, state = model(ids(), learn="next_token")
        weights, tensors = copy.deepcopy(model.state_dict()), [t.clone() for t in state.tensors()]
        with pytest.raises(ValueError, match=r"levels\[1\]: up is parametrized and cannot be set"):
            model.consolidate(state, row=0)
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), tensors, strict=True))


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


def test_the_compatible_class_takes_effective_weights():
    torch.manual_seed(0)
    config = compat.SelfModifyingTitansConfig(dim=D, chunk_size_other=4)
    plain = compat.SelfModifyingTitans(config)
    wrapped = copy.deepcopy(plain)
    for name in ("m_k", "m_v", "m_memory", "m_eta"):
        memory, other = getattr(wrapped, name), getattr(plain, name)
        memory.w2, memory.w1 = LoRALinear(memory.w2), hooked(memory.w1, forward=lambda y: 1.5 * y)
        with torch.no_grad():
            other.w2.weight.copy_(memory.w2(torch.eye(D)).mT)
            other.w1.weight.mul_(1.5)
    wrapped.w_q, x = LoRALinear(wrapped.w_q), torch.randn(2, 9, D)
    with torch.no_grad():
        plain.w_q.weight.copy_(wrapped.w_q(torch.eye(D)).mT)
    (y, state), (want, other) = (m.forward_with_updates(x, m.init_fast_state()) for m in (wrapped, plain))
    close(y, want)
    close(state.memory.w1, other.memory.w1)
    close(wrapped(x), plain(x))
    close(wrapped.forward_with_state(x, state), plain.forward_with_state(x, other))
    before = copy.deepcopy(wrapped.state_dict())
    with pytest.raises(ValueError, match="m_k.w1 has hooks"):
        wrapped.apply_updates_inplace(x)
    assert all(torch.equal(t, before[n]) for n, t in wrapped.state_dict().items())
    wrapped.m_k.w2 = LoRALinear(nn.Linear(D, D))  # with a bias
    with pytest.raises(ValueError, match="without a bias"):
        wrapped.init_fast_state()


@pytest.mark.parametrize("change", [
    lambda m: setattr(m.blocks[0].mixer, "q_proj", LoRALinear(m.blocks[0].mixer.q_proj)),
    lambda m: parametrize.register_parametrization(m.blocks[0].cms.levels[0], "up", Scaled()),
], ids=["adapter", "parametrization"])
def test_a_file_that_could_not_be_loaded_is_not_written(change, tmp_path):
    model = small()
    change(model)
    with pytest.raises(ValueError, match="save_pretrained: blocks.0.* merge or remove"):
        model.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def randomized(model):
    """PEFT's adapters start at zero."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("targets", [
    {"target_modules": ["q_proj", "in_proj", "gate_proj", "out_proj"]},
    {"target_modules": [], "target_parameters": ["levels.0.up", "levels.0.down", "levels.1.up"]},
    {"target_modules": ["embed", "head", "q_proj"]},
], ids=["projections", "cms", "embedding and head"])
def test_peft(targets, backend):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    model = small(tie=False)
    plain = copy.deepcopy(model)
    adapted = randomized(peft.inject_adapter_in_model(peft.LoraConfig(r=2, **targets), model))
    with torch.no_grad():
        got = adapted(ids(), learn="next_token", backend=backend)
        off = adapted(ids(), backend=backend)[0]
        assert float((got[0] - plain(ids(), learn="next_token", backend=backend)[0]).abs().max()) > 0.01
        if "target_parameters" in targets:
            weights = [t.clone() for t in adapted.state_dict().values()]
            with pytest.raises(ValueError, match=r"levels\[0\]: up belongs to a ParamWrapper"):
                adapted.consolidate(got[1])
            assert all(torch.equal(a, b) for a, b in zip(adapted.state_dict().values(), weights, strict=True))
    logits = adapted(ids())[0]
    adapters = {n: p for n, p in adapted.named_parameters() if "lora_" in n}
    grads = torch.autograd.grad(logits.square().sum(), list(adapters.values()))
    assert all(g.abs().max() > 0 for g in grads)
    # merged by PEFT itself
    for module in list(adapted.modules()):
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.merge()
    bare = small(tie=False)
    state = {n.replace("base_layer.", ""): t for n, t in adapted.state_dict().items() if "lora_" not in n}
    bare.load_state_dict(state)
    with torch.no_grad():
        assert_same(got, bare(ids(), learn="next_token", backend=backend))
        close(off, bare(ids(), backend=backend)[0])
