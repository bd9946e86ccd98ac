"""``torch.set_default_device`` and ``set_default_dtype`` are about tensors that the user makes: what a model
computes does not know."""

import contextlib
import math

import pytest
import torch

import hope_kernels as hk
from hope_kernels.cli.doctor import self_checks
from hope_kernels.layers.titans import initial_alpha_bias
from hope_kernels.state_file import load_state


@contextlib.contextmanager
def default(what):
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(what) if isinstance(what, torch.dtype) else torch.set_default_device(what)
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(device if device.type != "cpu" else None)


DEFAULTS = ["meta", torch.float64, torch.float16]
everywhere = pytest.mark.parametrize("what", DEFAULTS, ids=str)
CMS = hk.CMSConfig(16, (4, 8), expansion=1.0, lr=0.05)


def titans(**options):
    return hk.TitansConfig(16, 2, chunk_memory=4, chunk_other=8, **options)


def language_model(kind: str) -> hk.HopeForCausalLM:
    torch.manual_seed(0)
    if kind == "attention":
        config = hk.HopeConfig(256, 16, 2, mixer="attention", num_heads=2, window=7, cms=CMS)
    elif kind == "pending":
        config = hk.HopeConfig(
            256, 16, 1, titans=titans(), cms=hk.CMSConfig(16, (4, 8), expansion=1.0, lr=0.05, optimizer="muon")
        )
    else:
        config = hk.HopeConfig(256, 16, 1, titans=titans(momentum="learned"), cms=CMS)
    model = hk.HopeForCausalLM(config, device="cpu", dtype=torch.float32).eval()
    if kind == "pending":
        for block in model.blocks:
            block.cms.pending = 8
    return model


def values(*found) -> list[torch.Tensor]:
    """All tensors in there, in order."""
    out = []
    for f in found:
        out += f.tensors() if isinstance(f, hk.state.State) else [f] if isinstance(f, torch.Tensor) else values(*f)
    return out


def equal_under(what, use) -> None:
    """What ``use`` gives has the same bits, dtypes and devices under the default."""
    plain = values(use())
    with default(what):
        there = values(use())
    assert len(plain) == len(there) > 0
    for a, b in zip(plain, there):
        assert a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)


IDS = torch.randint(0, 256, (3, 30), generator=torch.Generator().manual_seed(0))
LENGTHS = [30, 17, 0]


@everywhere
@pytest.mark.parametrize("kind", ["hope", "attention", "pending"])
@pytest.mark.parametrize("learn", ["off", "next_token"])
def test_models(what, kind, learn):
    model = language_model(kind)

    def use():
        with torch.no_grad():
            first, state = model(IDS, lengths=LENGTHS, learn=learn)
            second, state = model(IDS, state, lengths=[3, 0, 21], learn=learn)
            third, state = model(IDS[:2, :1], state.select([2, 0]), learn=learn)
        logits, after = model(IDS, lengths=LENGTHS, learn=learn)
        grads = torch.autograd.grad(
            logits.square().sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True
        )
        return first, second, third, state, logits.detach(), after.detach(), [g for g in grads if g is not None]

    equal_under(what, use)


@everywhere
@pytest.mark.parametrize("kind", ["hope", "attention"])
def test_generation(what, kind):
    model = language_model(kind)

    def use():
        out = model.generate(
            IDS, 9, lengths=[30, 17, 5], temperature=0.9, top_k=40, top_p=0.9, seed=-1, stop=[[3], [7, 8]]
        )
        more = model.generate(IDS[:, :4], 3, out.state, unread="before", temperature=1.0)
        return out.tokens, more.tokens, more.state

    equal_under(what, use)


@everywhere
def test_files(what, tmp_path):
    model = language_model("hope")
    model.save_pretrained(tmp_path / "m")
    with torch.no_grad():
        _, state = model(IDS, lengths=LENGTHS, learn="next_token")
    state.save(tmp_path / "s")

    def use():
        loaded = load_state(tmp_path / "s")
        again = hk.HopeForCausalLM.from_pretrained(tmp_path / "m", device="cpu")
        with torch.no_grad():
            logits, loaded = again(IDS, loaded, learn="next_token")
        return list(again.parameters()), logits, loaded

    equal_under(what, use)


@everywhere
@pytest.mark.parametrize("backend", ["chunked", "cpp", "reference"])
@pytest.mark.parametrize("static", [False, True])
def test_layers(what, backend, static):
    if hk.available_backends()[backend] is not None:
        pytest.skip(hk.available_backends()[backend])
    torch.manual_seed(0)
    config = titans(self_modifying=False, own_values=False, target_norm=False, dgd=False) if static else titans()
    layer, x = hk.SelfModifyingTitans(config, device="cpu", dtype=torch.float32), torch.randn(3, 23, 16)

    def use():
        with torch.no_grad():
            y, state = layer(x, lengths=[23, 9, 0], backend=backend)
            z, state = layer(x, state, lengths=[5, 23, 1], backend=backend)
        return y, z, state

    equal_under(what, use)
    with default(what):
        numbers = layer.diagnostics(x[:, :1])
    assert numbers["max_S"] == 0 and all(math.isfinite(v) for v in numbers["half_life"])


@everywhere
def test_cms_as_a_layer(what):
    torch.manual_seed(0)
    cms, x, error = hk.ContinuumMemory(
        CMS, device="cpu", dtype=torch.float32
    ), torch.randn(3, 4, 16), torch.randn(3, 4, 16)

    def use():
        y, state = cms(x, lengths=[4, 2, 0])
        state = cms.refresh(state.detach(), error, lengths=[4, 2, 0])
        z, state = cms(x, state, lengths=[1, 1, 4])
        return y.detach(), z.detach(), state.detach()

    equal_under(what, use)


@everywhere
def test_weights_of_a_named_device_and_dtype(what):
    def use():
        torch.manual_seed(0)
        layer = hk.SelfModifyingTitans(hk.TitansConfig(16, 4), device="cpu", dtype=torch.float64)
        assert layer.alpha_bias.tolist() == initial_alpha_bias(layer.config)
        return list(layer.parameters())

    equal_under(what, use)


@everywhere
def test_the_doctor(what):
    with default(what):
        assert all(error < tolerance for _, error, tolerance in self_checks())


def test_a_state_with_empty_tensors_loads_whatever_the_default_device(tmp_path):
    model = hk.HopeForCausalLM(hk.HopeConfig(32, 16, 1, num_heads=2))
    with torch.no_grad():
        _, state = model(torch.zeros(1, 3, dtype=torch.long))
    state.save(tmp_path / "s")
    torch.set_default_device("meta")
    try:
        loaded = load_state(tmp_path / "s")
    finally:
        torch.set_default_device(None)
    assert all(a.device == b.device and torch.equal(a, b) for a, b in zip(state.tensors(), loaded.tensors()))
