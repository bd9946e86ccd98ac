"""Spans of a backward from recorded graphs have the gradient of spans that are launched, bit for bit. On a CPU
kernels are interpreted, and the recorder is an emulated one."""

import pytest
import torch
from emulated_graph import EmulatedRecorder
from problems import problem

from hope_kernels import TitansConfig, available_backends
from hope_kernels.ops.titans.state import init_titans_state

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    available_backends()["triton"] is not None, reason=f"triton: {available_backends()['triton']}"
)

from gradients import leaves  # noqa: E402

from hope_kernels.ops.titans.triton import span_graphs, spans  # noqa: E402
from hope_kernels.ops.titans.triton.span_graphs import SpanGraphs  # noqa: E402
from hope_kernels.ops.titans.triton.training import titans_triton_training  # noqa: E402
from hope_kernels.recorder import CudaRecorder  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = TitansConfig(32, 1)


@pytest.fixture(autouse=True)
def short_spans(monkeypatch):
    monkeypatch.setattr(spans, "CHUNKS_A_SPAN", 1)


def step(config, lengths, seed, **options):
    """Gradients of a loss of everything that a call returns."""
    w, i = (leaves(t, torch.float32) for t in problem(config, len(lengths), max(lengths), 0.5, seed=seed))
    state = init_titans_state(config, w, len(lengths), DEVICE)
    o, new = titans_triton_training(config, w, i, state, lengths, **options)
    loss = o.square().sum()
    if new.delta2.requires_grad:
        loss = loss + new.delta2.square().sum() + new.pending_k.square().sum()
    alive = [t for t in (*w, *i) if t is not None]
    return torch.autograd.grad(loss, alive, allow_unused=True)


def both(graphs, monkeypatch, *args, **options):
    """A step as it is launched, and with these graphs."""
    want = step(*args, **options)
    with monkeypatch.context() as patch:
        patch.setattr(span_graphs, "of", lambda device: graphs)
        found = step(*args, **options)
    return want, found


def same(want, found):
    assert all((a is None) == (b is None) for a, b in zip(want, found))
    pairs = [(a, b) for a, b in zip(want, found) if a is not None]
    assert pairs and all(torch.equal(a, b) for a, b in pairs) and any(a.any() for a, _ in pairs)


# kinds: a call's last span has another adjoint of the state after it, or none
@pytest.mark.parametrize("config, options, kinds", [
    (CONFIG, {}, 2), (CONFIG, {"update": False}, 2), (CONFIG, {"constant_memory": True}, 1),
    pytest.param(CONFIG.replace(chunk_memory=32), {}, 2, marks=pytest.mark.slow),
], ids=["default", "pure read", "constant memory", "two clocks"])
def test_recorded_spans_have_the_gradient_of_launched_ones(config, options, kinds, monkeypatch):
    graphs = SpanGraphs(EmulatedRecorder())
    for seed in range(2):
        same(*both(graphs, monkeypatch, config, [64], seed, **options))
    of_a_call = 64 // max(config.chunk_memory, config.chunk_other)
    assert (graphs.recorded, graphs.replayed) == (kinds, 2 * of_a_call - kinds)
    assert graphs.recorder is not None


def test_what_a_span_has_returned_is_not_written_again(monkeypatch):
    graphs = SpanGraphs(EmulatedRecorder())
    monkeypatch.setattr(span_graphs, "of", lambda device: graphs)
    found = [step(CONFIG, [16], seed) for seed in (0, 0, 0, 1, 2)]  # launched, recorded, and from the graph
    assert graphs.replayed == 4
    same(found[0], found[1])
    same(found[0], found[2])
    assert not torch.equal(found[2][0], found[3][0])


def test_ragged_rows_are_kinds_of_their_own(monkeypatch):
    graphs = SpanGraphs(EmulatedRecorder())
    for seed in range(3):
        same(*both(graphs, monkeypatch, CONFIG, [19, 13], seed))
    assert graphs.recorded == 2  # 16 and 13 tokens; 3 and none


def test_the_kinds_that_were_used_last_are_kept(monkeypatch):
    graphs = SpanGraphs(EmulatedRecorder())
    monkeypatch.setattr(span_graphs, "of", lambda device: graphs)
    monkeypatch.setattr(span_graphs, "KINDS", 1)
    for lengths in ([16], [16], [5], [5], [16]):
        step(CONFIG, lengths, 0)
    assert (graphs.recorded, graphs.replayed) == (3, 3)


class Wrong(EmulatedRecorder):
    """What it records does nothing."""

    def record(self, parts):
        super().record(parts)
        return [lambda: None for _ in parts]


class Unable(EmulatedRecorder):
    def record(self, parts):
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize("recorder, words", [(Wrong(), "has other bits"), (Unable(), "cannot be recorded")])
def test_a_graph_that_does_something_else_is_never_believed(recorder, words, monkeypatch):
    graphs = SpanGraphs(recorder)
    with pytest.warns(RuntimeWarning, match=words):
        same(*both(graphs, monkeypatch, CONFIG, [48], 0))
    assert graphs.recorder is None
    same(*both(graphs, monkeypatch, CONFIG, [48], 1))


def test_nothing_is_recorded_on_a_cpu():
    assert span_graphs.of(torch.device("cpu")) is None


@pytest.mark.gpu
def test_cuda_graphs_of_spans(monkeypatch):
    monkeypatch.setattr(spans, "CHUNKS_A_SPAN", 8)
    graphs = SpanGraphs(CudaRecorder(torch.device("cuda")))
    config = TitansConfig(128, 2, hidden_mult=4, chunk_memory=64, chunk_other=64)
    for seed in range(2):
        same(*both(graphs, monkeypatch, config, [4 * 512 + 70], seed))
    assert graphs.recorded == 2 and graphs.replayed == 9 and graphs.recorder is not None
