"""The drop-in class where the kernels serve it: fp32 against the package in fp64, held to the package's own
fp32."""

import itertools

import pytest
import torch
from drop_in import moved, oracle, pair, read_all, tensors

from hope_kernels import available_backends
from hope_kernels.compat.nested_learning import call

missing = available_backends()["cpp"]
needs_library = pytest.mark.skipif(missing is not None, reason=f"backend cpp: {missing}")
# objective, use_skip, use_rank1_precond, use_alpha, local_conv_window
SWITCHES = list(itertools.product(("l2", "dot"), (True, False), (True, False), (True, False), (4, None)))
# chunk_size_other, chunk_size_memory, T
SIZES = [(1, 1, 7), (4, 4, 21), (16, 16, 37), (4, 8, 20), (4, 8, 15), (8, 4, 20), (8, 64, 72)]


def spread(got, want) -> float:
    """rms of the error over rms of the result."""
    error, size = (t.double().square().mean().sqrt() for t in (got - want, want))
    return float(error / size.clamp_min(1e-30))


@pytest.fixture
def calls(monkeypatch):
    """What reads: a list of "kernel" and "loop", in the order of the spans."""
    seen = []

    class Loop(call.Chunked):
        def run(self):
            seen.append("loop")
            return super().run()

    def counted(*arguments, run=call.kernel_call):
        seen.append("kernel")
        return run(*arguments)

    monkeypatch.setattr(call, "Chunked", Loop)
    monkeypatch.setattr(call, "kernel_call", counted)
    return seen


@needs_library
@pytest.mark.parametrize("size", SIZES)
def test_fp32_is_no_worse_than_the_package(size, calls):
    """Outputs and final states of one call and of three: errors at most twice the package's, or 16 roundings."""
    *chunks, T = size
    for objective, skip, rank1, alpha, conv in SWITCHES[SIZES.index(size) :: 9]:
        mine, theirs = pair(
            torch.float32, dim=24, objective=objective, use_skip=skip, use_rank1_precond=rank1, use_alpha=alpha,
            local_conv_window=conv, chunk_size_other=chunks[0], chunk_size_memory=chunks[1], eta_scale=0.02,
        )
        exact = oracle.SelfModifyingTitans(theirs.config).double()
        exact.load_state_dict(theirs.state_dict())
        whole = 0.5 * torch.randn(2, T, 24)
        for xs in ([whole], list(whole.split((3, 1, T - 4), 1))):
            truth, final = read_all(exact, [x.double() for x in xs])
            (y, a), (z, b) = read_all(mine, xs), read_all(theirs, xs)
            assert moved(exact, final) > 1e-5
            assert y.dtype == z.dtype and tensors(a).keys() == tensors(b).keys()
            results = [(y, z, truth)] + [(t, tensors(b)[k], tensors(final)[k]) for k, t in tensors(a).items()]
            for got, theirs_got, want in results:
                assert got.dtype == theirs_got.dtype and got.shape == want.shape
                assert spread(got, want) <= max(2 * spread(theirs_got, want), 16 * torch.finfo(torch.float32).eps)
    assert "kernel" in calls


@needs_library
def test_which_calls_the_kernels_serve(calls):
    def spans(length, other, memory, dtype=torch.float32, **options):
        layer, _ = pair(dtype, **{"dim": 24, **options})
        calls.clear()
        x = torch.randn(1, length, 24 if "dim" not in options else options["dim"], dtype=dtype)
        layer.forward_with_updates(
            x, layer.init_fast_state(), chunk_size_other=other, chunk_size_memory=memory
        )
        return calls

    assert spans(64, 16, 16) == ["kernel"] and spans(70, 16, 16) == ["kernel", "kernel"]
    assert spans(5, 16, 16) == ["kernel"] and spans(5, 1, 1) == ["kernel"]
    assert spans(72, 8, 64) == ["kernel", "kernel"]
    assert spans(75, 8, 64) == ["kernel", "loop"]  # 11 tokens remain, which 8 does not divide
    assert spans(64, 16, 16, dtype=torch.bfloat16) == ["kernel"]
    for options in (
        {"momentum": 0.9}, {"stopgrad_vhat": False}, {"adaptive_q": True}, {"dim": 20}, {"eps": 1e-5}
    ):
        assert spans(32, 16, 16, **options) == ["loop"]
    assert spans(32, 16, 16, eps=1e-5, qk_l2_norm=False) == ["kernel"]
    assert spans(64, 4, 6) == ["loop"] and spans(64, 16, 16, dtype=torch.float64) == ["loop"]


@needs_library
@pytest.mark.parametrize("length", [32, 37])
def test_a_row_reads_the_same_alone_and_in_company(length):
    """Bit for bit."""
    mine, _ = pair(torch.float32, dim=24, chunk_size_other=4, chunk_size_memory=8)
    x = torch.randn(3, length, 24)
    x = torch.cat([x[:, :32], x[:, 32:36]], 1) if length > 32 else x
    y, state = read_all(mine, [x])
    alone, own = read_all(mine, [x[1:2]])
    assert torch.equal(alone, y[1:2])
    assert all(torch.equal(t, tensors(state)[key][1:2]) for key, t in tensors(own).items())


@needs_library
def test_tensors_of_an_earlier_state_stay_as_they_were():
    mine, _ = pair(torch.float32, dim=16, chunk_size_other=4)
    x = torch.randn(1, 16, 16)
    start = mine.init_fast_state()
    before = {key: t.clone() for key, t in tensors(start).items()}
    _, state = mine.forward_with_updates(x, start)
    assert all(torch.equal(t, before[key]) for key, t in tensors(start).items())
    held = {key: t for key, t in tensors(state).items()}
    copies = {key: t.clone() for key, t in held.items()}
    mine.forward_with_updates(x, state)
    assert all(torch.equal(t, copies[key]) for key, t in held.items())
    assert not torch.equal(state.memory.w2, held["memory", "w2"])
    for key, t in tensors(state).items():  # one may be written without another
        others = {k: o.clone() for k, o in tensors(state).items() if k != key}
        t.zero_()
        assert all(torch.equal(o, tensors(state)[k]) for k, o in others.items())


def test_hooks_of_the_convolution_run():
    mine, _ = pair(torch.float32, dim=16)
    x, seen = torch.randn(1, 6, 16), []
    y, _ = read_all(mine, [x])
    mine.local_conv.register_forward_hook(lambda *_: seen.append(1))
    z, _ = read_all(mine, [x])
    assert seen and torch.allclose(y, z, atol=1e-6)
