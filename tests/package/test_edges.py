"""Empty calls, empty batches, one token, rows that hold NaN, beams, positions past 2^32: what holds in the
middle holds at the edges."""

import pytest
import torch

import hope_kernels as hk
from hope_kernels.layers.attention import CausalAttention
from hope_kernels.state import Counters

D, V = 16, 32
FAR = 3 * 2**32  # a multiple of every period here


def made(kind: str, dtype=torch.float32):
    torch.manual_seed(0)
    if kind == "titans":
        return hk.SelfModifyingTitans(hk.TitansConfig(D, 2, chunk_memory=4, chunk_other=8), dtype=dtype)
    if kind == "attention":
        return CausalAttention(hk.HopeConfig(V, D, 1, "attention", num_heads=2, window=6), dtype=dtype)
    if kind == "cms":
        return hk.ContinuumMemory(hk.CMSConfig(D, (4, 8), lr=0.02), dtype=dtype)
    mixer = "attention" if kind == "attention model" else "self_modifying"
    titans = None if mixer == "attention" else hk.TitansConfig(D, 2, chunk_memory=4, chunk_other=4)
    window, cms = 6 if mixer == "attention" else None, hk.CMSConfig(D, (4, 8), lr=0.05)
    config = hk.HopeConfig(V, D, 2, mixer, titans=titans, num_heads=2, window=window, cms=cms)
    return hk.HopeForCausalLM(config, dtype=dtype).eval()


def tokens(kind: str, B: int, T: int, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    if "model" in kind:
        return torch.randint(0, V, (B, T), generator=generator)
    return torch.randn(B, T, D, dtype=torch.float64, generator=generator).to(dtype)


def read(module, x, state=None, lengths=None):
    return module(x, state, lengths, **({"learn": "next_token"} if isinstance(module, hk.HopeForCausalLM) else {}))


KINDS = pytest.mark.parametrize("kind", ["titans", "attention", "cms", "model", "attention model"])
GRAD = pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])


@KINDS
@GRAD
def test_a_call_without_tokens_or_rows_changes_nothing(kind, grad):
    module = made(kind)
    with torch.set_grad_enabled(grad):
        _, state = read(module, tokens(kind, 2, 3), module.init_state(2))
        before = state.clone()
        for x, lengths in ((tokens(kind, 2, 0), None), (tokens(kind, 2, 1), [0, 0])):
            y, state = read(module, x, state, lengths)
            assert y.shape[:2] == x.shape[:2] and not y.any() and state.pos == [3, 3]
            for a, b in zip(state.tensors(), before.tensors(), strict=True):
                assert torch.equal(a, b)
        for T in (0, 1, 9 if kind != "cms" else 4):
            y, empty = read(module, tokens(kind, 0, T))
            assert y.shape[:2] == (0, T) and empty.batch == 0
            empty.validate("here", values=True)
        assert torch.equal(read(module, tokens(kind, 2, 1), state)[0], read(module, tokens(kind, 2, 1), before)[0])


@KINDS
def test_an_empty_selection_and_file(kind, tmp_path):
    module = made(kind)
    with torch.no_grad():
        _, state = read(module, tokens(kind, 2, 3))
        state.select([]).save(tmp_path / "s")
        y, again = read(module, tokens(kind, 0, 2)[:, :1], hk.load_state(tmp_path / "s"))
    assert again.batch == 0 and y.shape[0] == 0


@KINDS
def test_a_row_of_nan_leaves_its_neighbours_alone(kind):
    """Bit for bit, as the same company without it."""
    module, T = made(kind), 3 if kind == "cms" else 21
    x = tokens(kind, 3, T)
    with torch.no_grad():
        expected, _ = read(module, x)
        if "model" in kind:  # a row whose memories have diverged
            _, state = read(module, x[:, :9])
            right, _ = read(module, x[:, 9:], state.clone())
            for mixer in state.mixers:
                for t in mixer.tensors():
                    if t.is_floating_point():
                        t[1] = float("nan")
            y, after = read(module, x[:, 9:], state)
            assert not torch.isfinite(y[1]).all() and torch.equal(y[[0, 2]], right[[0, 2]])
            assert all(
                torch.isfinite(t[[0, 2]]).all() for m in after.mixers for t in m.tensors() if t.is_floating_point()
            )
            return
        x[1] = float("nan")
        y, _ = read(module, x)
    assert y[1].isnan().all() and torch.equal(y[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("kind", ["model", "attention model"])
@pytest.mark.parametrize("at", [4, 6, 9])
def test_beams_by_select_while_learning(kind, at):
    """Rows taken twice in the middle of a segment go their own ways, each as if it had been alone."""
    module = made(kind, torch.float64)
    x, more = tokens(kind, 2, at), torch.randint(0, V, (4, 13), generator=torch.Generator().manual_seed(4))
    beams = [1, 0, 1, 1]
    with torch.no_grad():
        _, state = read(module, x)
        y, state = read(module, more[:, :5], state.select(beams))
        z, _ = read(module, more[[2, 0], 5:], state.select([2, 0]))
        for row, beam in enumerate(beams):
            alone, _ = read(module, torch.cat([x[beam : beam + 1], more[row : row + 1]], 1))
            torch.testing.assert_close(y[row], alone[0, at : at + 5], rtol=1e-10, atol=1e-10)
            if row in (2, 0):
                torch.testing.assert_close(z[(2, 0).index(row)], alone[0, at + 5 :], rtol=1e-10, atol=1e-10)


def moved(state, by: int):
    """The same state as if ``by`` more tokens had been read long ago."""
    state = state.clone()
    for s in state.states():
        s.pos = Counters([p + by for p in s.pos])
        if getattr(s, "count", None) is not None:
            s.count += by
        if hasattr(s, "filled"):
            s.base = Counters([b + by for b in s.base])
    return state


@KINDS
def test_positions_past_32_bits(kind, tmp_path):
    """Nothing but the phase of RoPE, which is relative, knows where a sequence stands."""
    dtype = torch.float64
    module, T = made(kind, dtype), 3 if kind == "cms" else 21
    x = tokens(kind, 2, T + 1, dtype)
    with torch.no_grad():
        if "attention" in kind:  # keys are turned by where they were read; zeros are the same anywhere
            near = moved(module.init_state(2), 8)
            for s in near.states():
                if hasattr(s, "filled"):
                    s.base, s.filled = Counters([0, 0]), [8, 8]
                    s.k, s.v = (t.new_zeros(2, 8, *t.shape[2:]) for t in (s.k, s.v))
        else:
            _, near = read(module, x[:, :1])
        far = moved(near, FAR)
        far.save(tmp_path / "s")
        far = hk.load_state(tmp_path / "s")
        expected, after = read(module, x[:, 1:], near)
        y, far = read(module, x[:, 1:], far)
    assert far.pos == [p + FAR for p in after.pos] and min(far.pos) > 2**33
    tolerance = 1e-5 if "attention" in kind else 0  # of an angle of 1e10 radians fp64 keeps 2e-6
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


def test_positions_past_32_bits_on_the_compiled_backend():
    if hk.available_backends()["cpp"] is not None:
        pytest.skip(hk.available_backends()["cpp"])
    module, x = made("titans"), tokens("titans", 2, 40)
    with torch.no_grad():
        _, near = module(x[:, :5], backend="cpp")
        far = moved(near, FAR)
        expected, after = module(x[:, 5:], near, backend="cpp")
        y, far = module(x[:, 5:], far, backend="cpp")
    assert torch.equal(y, expected) and all(
        torch.equal(a, b) for a, b in zip(far.tensors()[:-1], after.tensors()[:-1])
    )


def test_vmap_of_grad_with_a_constant_momentum():
    torch.manual_seed(0)
    layer = hk.SelfModifyingTitans(hk.TitansConfig(8, 2, chunk_memory=4, chunk_other=4, momentum=0.9))
    x = torch.randn(3, 1, 10, 8)

    def loss(one: torch.Tensor) -> torch.Tensor:
        return layer(one, backend="chunked")[0].square().sum()

    found = torch.vmap(torch.func.grad(loss))(x)
    given = x.clone().requires_grad_()
    sum(loss(one) for one in given).backward()
    torch.testing.assert_close(found, given.grad)
