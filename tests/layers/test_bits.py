"""On a CPU, in fp32 and without a graph, layers keep the streaming contract bit for bit."""

import pytest
import torch

from hope_kernels import CMSConfig, ContinuumMemory, HopeConfig, SelfModifyingTitans, TitansConfig, load_state
from hope_kernels.layers.block import HopeBlock
from hope_kernels.layers.wrapped import normed
from hope_kernels.ops.linear import cpp
from hope_kernels.ops.shared import cpu_library

pytestmark = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"cpp: {cpu_library.unavailable()}")

T = 45
CUTS = ((0, 1), (1, 3), (3, 17), (17, 18), (18, 45))
CHUNKS = {"chunk_memory": 4, "chunk_other": 8}
TITANS = {
    "default": TitansConfig(48, 2, **CHUNKS),
    "widths of one strip and more": TitansConfig(136, 1, chunk_memory=16, chunk_other=16, activation="gelu"),
    "bare": TitansConfig(32, 4, gate=False, out_proj=False, out_norm=False, conv_window=None, in_proj=False, **CHUNKS),
    "static": TitansConfig.preset("titans", d_model=32, num_heads=4, momentum=None, **CHUNKS),
    "momentum": TitansConfig(32, 2, momentum=0.9, **CHUNKS),
    "static, momentum": TitansConfig.preset("titans", d_model=32, num_heads=4, **CHUNKS),
    "static, softplus": TitansConfig(32, 2, self_modifying=False, eta_activation="softplus", **CHUNKS),
    "delta": TitansConfig.preset("delta", d_model=32, num_heads=2, **CHUNKS),
    "adaptive": TitansConfig(48, 2, adaptive_q=True, scalar_skip=True, **CHUNKS),
    "linear, adaptive, momentum": TitansConfig(32, 1, memory="linear", adaptive_q=True, momentum="learned", **CHUNKS),
    "from zero": TitansConfig(32, 2, retain_to="zero", retention=False, hidden_mult=2, **CHUNKS),
}
CMS = {
    "default": CMSConfig(48, (4, 16)),
    "layernorm and biases": CMSConfig(48, (4, 16), norm="layernorm", bias=True),
    "independent": CMSConfig(40, (4, 8), variant="independent"),
}


def moved(module):
    """With every weight off its initial value."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return module


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def alike(a, b) -> bool:
    """Whether two states are the same, bit for bit."""
    a, b = list(a.tensors()), list(b.tensors())
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def streams(layer, d: int, tmp_path, **options) -> None:
    x = draw(3, T, d)
    whole, after = layer(x, **options)
    state, parts = layer.init_state(3), []
    for a, b in CUTS:
        y, state = layer(x[:, a:b], state, **options)
        parts.append(y)
    assert torch.equal(torch.cat(parts, 1), whole) and alike(state, after)

    state, parts = layer.init_state(1), []
    for t in range(T):
        y, state = layer(x[1:2, t : t + 1], state, **options)
        parts.append(y)
    assert torch.equal(torch.cat(parts, 1), whole[1:2])

    lengths = [T, 7, 0]
    padded = x.clone()
    padded[1, 7:] = padded[2] = float("nan")
    y, ragged = layer(padded, lengths=lengths, **options)
    assert torch.equal(y[0], whole[0]) and torch.equal(y[1, :7], whole[1, :7])
    path = tmp_path / "state.safetensors"
    ragged.select([1, 2]).save(path)
    rest = torch.stack([x[1, 7:29], x[2, :22]])
    y, _ = layer(rest, load_state(path), **options)
    assert torch.equal(y[0], whole[1, 7:29]) and torch.equal(y[1], whole[2, :22])

    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(layer(x, **options)[0], whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("config", TITANS.values(), ids=TITANS)
@torch.no_grad()
def test_memories(config, tmp_path):
    streams(moved(SelfModifyingTitans(config)), config.d_model, tmp_path)


@pytest.mark.parametrize("config", CMS.values(), ids=CMS)
@torch.no_grad()
def test_levels(config, tmp_path):
    streams(moved(ContinuumMemory(config)), config.d_model, tmp_path, learn=False)


@torch.no_grad()
def test_levels_that_some_rows_have_learned():
    cms, x = moved(ContinuumMemory(CMSConfig(48, (4, 16), lr=0.1))), draw(3, 60, 48)
    state = cms.init_state(3)
    for a in (0, 4):
        lengths = [4, 4 if a == 0 else 0, 0]
        _, state = cms(x[:, a : a + 4], state, lengths=lengths)
        state = cms.refresh(state, x[:, a : a + 4], lengths=lengths)
    fresh = state.clone()
    whole, _ = cms(x, state, learn=False)
    assert not torch.equal(whole[0], cms(x[:1], learn=False)[0][0])
    for row in range(3):
        alone, parts = fresh.clone().select([row]), []
        for a, b in ((0, 1), (1, 30), (30, 60)):
            y, alone = cms(x[row : row + 1, a:b], alone, learn=False)
            parts.append(y)
        assert torch.equal(torch.cat(parts, 1)[0], whole[row])


@torch.no_grad()
def test_a_block():
    config = HopeConfig(8, 48, 1, titans=TITANS["default"], cms=CMS["default"], post_norm=True)
    block, x = moved(HopeBlock(config, config.cms)), draw(2, T, 48)
    whole, _ = block(x, block.mixer.init_state(2), block.cms.init_state(2), [T, T])
    state, parts = block.mixer.init_state(2), []
    for a, b in CUTS:
        y, state = block(x[:, a:b], state, block.cms.init_state(2), [b - a] * 2)
        parts.append(y)
    assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(block(x[:1], block.mixer.init_state(1), block.cms.init_state(1), [T])[0], whole[:1])


@torch.no_grad()
def test_norms_of_another_dtype_or_width_are_pytorchs():
    norm = torch.nn.RMSNorm(16, eps=1e-6).bfloat16()
    x = torch.randn(2, 3, 16)
    assert torch.equal(normed(norm, x, cpp), norm(x))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        normed(torch.nn.RMSNorm(8, eps=1e-6), x, cpp)
