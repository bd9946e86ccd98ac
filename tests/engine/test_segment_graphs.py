"""Learning segments from recorded graphs are those of the model, bit for bit. On a CPU the recorder is an
emulated one, which refuses what no capture could hold."""

import pytest
import torch
from emulated_graph import EmulatedRecorder
from small_model import V, ids, tiny

from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM, TitansConfig, available_backends
from hope_kernels.engine import generation, guard, options
from hope_kernels.engine.segment_graphs import SegmentGraphs
from hope_kernels.recorder import CudaRecorder, recorder_for

pytestmark = pytest.mark.filterwarnings("error:SegmentGraphs")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def cms(**options):
    return CMSConfig(8, (4, 8, 16), **{"expansion": 2.0, "lr": 0.02, **options})


def longer_chunks() -> HopeForCausalLM:
    """Segments that end inside chunks: a kind has a phase."""
    titans = TitansConfig(8, 2, chunk_memory=8, chunk_other=2)
    return tiny(titans=titans, cms=CMSConfig(8, (4, 8), expansion=1.0, lr=0.02))


MODELS = {
    "gd": tiny(),
    "adam": tiny(cms=cms(optimizer="adam", lr=0.01)),
    "adam, nested": tiny(cms=cms(optimizer="adam", lr=0.01, variant="nested")),
    "momentum": tiny(cms=cms(optimizer="momentum", lr=0.01)),
    "muon": tiny(cms=cms(optimizer="muon", lr=0.01)),
    "relative": tiny(cms=cms(relative=True, lr=0.01)),
    "nested": tiny(cms=cms(variant="nested")),
    "independent swiglu": tiny(cms=cms(variant="independent", mlp="swiglu")),
    "rank": tiny(cms=cms(rank=2)),
    "a level that does not learn": tiny(cms=cms(lr=(0.02, 0.0, 0.01))),
    "two periods": tiny(cms=(CMSConfig(8, (4,), expansion=1.0), CMSConfig(8, (8, 16), expansion=1.0))),
    "longer chunks": longer_chunks(),
    "titans": tiny("titans"),
    "bf16": tiny().to(torch.bfloat16),
}


QUICK = [("gd", False), ("adam", True), ("adam, nested", False), ("bf16", False), ("longer chunks", False)]


def agree(a, b) -> bool:
    """Two states, bit for bit."""
    counters = [list(x) for x in a._counters()] == [list(x) for x in b._counters()]
    return counters and all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


class Both:
    """A state that is read from graphs, and one that is read by the model."""

    def __init__(self, model, batch=1, guard=False, recorder=None, backend="chunked"):
        self.model, self.backend, self.guard, self.at = model, backend, guard, 0
        self.device = model.embed.weight.device
        self.text = ids(batch, 100 * model.segment, 3).to(self.device)
        self.state, self.plain = model.init_state(batch), model.init_state(batch)
        self.recorder = recorder or EmulatedRecorder()
        self.graphs = SegmentGraphs(model, self.state, backend, self.recorder)
        if guard:
            for state in (self.state, self.plain):
                self.by_model(state, model.segment)
            self.at = model.segment

    @torch.no_grad()
    def by_model(self, state, n: int):
        part, following = self.text[:, self.at : self.at + n], self.text[:, self.at + n]
        return self.model(
            part, state, learn="next_token", backend=self.backend, output="losses", following=following,
            guard=self.guard,
        )[0]

    def read(self, n: int) -> None:
        found = self.graphs.read(self.text[:, self.at : self.at + n], self.text[:, self.at + n], self.guard)
        want = self.by_model(self.plain, n)
        assert torch.equal(found.nats, want.nats) and torch.equal(found.last, want.last), self.at
        assert agree(self.state, self.plain), self.at
        self.at += n


@pytest.mark.parametrize("name, guard", [
    *QUICK, *(pytest.param(name, guard, marks=pytest.mark.slow) for name in MODELS for guard in (False, True)
              if (name, guard) not in QUICK),
])
def test_segments_have_the_bits_of_the_model(name, guard):
    """Levels of one, two and four segments, in calls of one segment and of several. Once all levels have
    learned there are four kinds of segments (with the phases of chunks, too)."""
    both = Both(MODELS[name], guard=guard)
    for n in (4, 12, 4, 32, 4, 56):
        both.read(n)
    assert both.graphs.recorded in (2, 4) and both.graphs.replayed >= 14


def test_rows_side_by_side_and_the_state_in_other_hands():
    """Others read on between calls; kinds whose tensors are exchanged are recorded again."""
    both = Both(MODELS["gd"], batch=3)
    for n in (32, 64):
        both.read(n)
    recorded = both.graphs.recorded
    for n in (4, 4, 2, 2, 4):  # by the model, inside a segment as well
        for state in (both.state, both.plain):
            both.by_model(state, n)
        both.at += n
    both.read(64)  # the model's own calls exchange what they write
    assert recorded == 4 and both.graphs.recorded == 8
    both.state.cms[0].weights[1] = {n: t.clone() for n, t in both.state.cms[0].weights[1].items()}
    both.read(64)
    assert both.graphs.recorded == 12


def test_a_guard_that_takes_back_what_was_learned(monkeypatch):
    """One that looks often and allows nothing: a row goes back again and again, also in segments from graphs,
    and learns at other rates each time. The bits of the model still."""
    monkeypatch.setattr(guard, "EVERY", 3)
    monkeypatch.setattr(guard, "MARGIN", 0.0)
    monkeypatch.setattr(guard, "ERRORS", 0.0)
    both, taken, back = Both(tiny(cms=CMSConfig(8, (4, 8), expansion=2.0, lr=1.0)), guard=True), 0, 0
    for _ in range(45):
        replayed, rollbacks = both.graphs.replayed, both.state.guard.rollbacks[0]
        both.read(4)
        went_back, from_graph = both.state.guard.rollbacks[0] > rollbacks, both.graphs.replayed > replayed
        taken, back = taken + from_graph, back + (went_back and from_graph)
    assert taken > 12 and back >= 1


def test_weights_that_change_are_read_as_they_are():
    model = tiny()
    both = Both(model)
    both.read(64)
    with torch.no_grad():
        model.blocks[0].mixer.out_proj.weight.mul_(0.9)
    both.state.fingerprint = both.plain.fingerprint = None  # on purpose under other weights
    both.read(64)


def test_what_is_left_to_the_model():
    model, text = MODELS["gd"], ids(2, 40)
    state = model.init_state(2)
    graphs = SegmentGraphs(model, state, "chunked", EmulatedRecorder())
    follows = text[:, -1]
    assert graphs.read(text[:, :6], follows, False) is None  # part of a segment
    assert graphs.read(text[:, :4], follows, True) is None  # a guard begins
    assert graphs.read(text[:, :0], follows, False) is None
    assert graphs.read(text[:, :4] + V, follows, False) is None  # tokens that there are not
    with torch.no_grad():
        model(text[:, :6], state, lengths=[6, 2], learn="next_token", backend="chunked")
    assert graphs.read(text[:, :4], follows, False) is None and state.pos == [6, 2]
    with pytest.raises(ValueError, match=r"ids has shape \[1, 4\]"):
        graphs.read(text[:1, :4], follows, False)
    with pytest.raises(ValueError, match="learns with precondition"):
        SegmentGraphs(tiny(cms=cms(precondition=0.1)), state, "chunked", EmulatedRecorder())
    with pytest.raises(ValueError, match="has attention"):
        SegmentGraphs(tiny("attention"), state, "chunked", EmulatedRecorder())
    with pytest.raises(ValueError, match="reads on backend 'cpp'"):
        SegmentGraphs(model, state, "cpp", EmulatedRecorder())
    hooked = tiny()
    hooked.norm.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="has hooks"):
        SegmentGraphs(hooked, state, "chunked", EmulatedRecorder())


def test_logits_that_are_not_finite_are_seen():
    model, text = tiny(), ids(1, 33)
    graphs = SegmentGraphs(model, model.init_state(1), "chunked", EmulatedRecorder())
    assert graphs.read(text[:, :32], text[:, 32], False, check_finite=True) is not None
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    graphs.state.fingerprint = None
    with pytest.raises(ValueError, match="non-finite logits"):
        graphs.read(text[:, :32], text[:, 32], False, check_finite=True)


class Wrong(EmulatedRecorder):
    """Of every recording, the last part leaves out its last steps."""

    def record(self, parts):
        first, second = super().record(parts)
        return [first, lambda: None]


class Unable:
    def record(self, parts):
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.filterwarnings("default:SegmentGraphs")
@pytest.mark.parametrize(
    ("recorder", "words"), [(Wrong(), "has other bits"), (Unable(), "cannot be recorded")]
)
def test_a_graph_that_does_something_else_is_never_believed(recorder, words):
    both = Both(MODELS["gd"], recorder=recorder)
    with pytest.warns(RuntimeWarning, match=words):
        both.read(64)
    both.read(64)
    assert both.graphs.recorder is None and both.graphs.replayed <= 1


def test_the_recorder_refuses_what_no_graph_can_hold():
    x = torch.arange(6.0)
    for work in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: torch.tensor([1, 2]), lambda: x[[0, 1]],
                 lambda: bool(x[0] > 1)):
        with pytest.raises(RuntimeError, match="while recording"):
            EmulatedRecorder().record([work])
    (again,) = EmulatedRecorder().record([lambda: x.add_(1)])
    assert torch.equal(x, torch.arange(6.0))
    again()
    assert torch.equal(x, torch.arange(6.0) + 1)
    assert recorder_for(torch.device("cpu")) is None
    assert isinstance(recorder_for(torch.device("cuda")), CudaRecorder)


@pytest.mark.parametrize("lengths", [None, [90, 70]])
def test_read_and_generate_with_graphs(monkeypatch, lengths):
    """Where the device can record: pieces of whole segments from graphs, all else by the model."""
    made = []

    def recorder(device):
        made.append(EmulatedRecorder())
        return made[-1]

    model, text = MODELS["gd"], ids(2, 90, 5)
    how = {"learn": "next_token", "lengths": lengths, "backend": "chunked", "piece": 16}
    plain = generation.read(model, text, guard=False, **how)
    monkeypatch.setattr(options, "recorder_for", recorder)
    found = generation.read(model, text, guard=False, graph=True, **how)
    assert torch.equal(found.nats, plain.nats) and torch.equal(found.logits, plain.logits)
    assert agree(found.state, plain.state) and len(made[0].parts) >= 6
    out, want = (
        model.generate(text, 5, temperature=1.0, graph=graph, guard=False, **how) for graph in (True, False)
    )
    assert torch.equal(out.tokens, want.tokens) and agree(out.state, want.state) and made[1].parts
    model.read(text, guard=False, graph=True, **(how | {"learn": "off"}))
    assert len(made) == 2
    with pytest.raises(ValueError, match="graph is 'yes'"):
        model.read(text, graph="yes")


def for_kernels(*periods: int) -> HopeForCausalLM:
    """Two blocks: the second one's memories are in the gradient."""
    torch.manual_seed(0)
    cms = CMSConfig(32, periods, lr=0.02, expansion=1.0, optimizer="adam")
    model = HopeForCausalLM(HopeConfig(V, 32, 2, titans=TitansConfig(32), cms=cms))
    return model.to(DEVICE).eval()


kernels = pytest.mark.skipif(
    available_backends()["triton"] is not None, reason=f"triton: {available_backends()['triton']}"
)


@kernels
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has graphs")
def test_segments_on_the_kernels_can_be_recorded():
    both = Both(for_kernels(16), backend="triton")
    for n in (16, 16, 32):
        both.read(n)
    assert both.graphs.recorded == 1 and both.graphs.replayed == 2
    assert any(name.startswith("launch read_adjoint") for part in both.recorder.parts for name in part)


@pytest.mark.gpu
@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_captured_segments_have_the_bits_of_the_model(backend, guard):
    both = Both(for_kernels(16, 32), guard=guard, recorder=CudaRecorder(torch.device("cuda")), backend=backend)
    for n in (16, 32, 64, 16, 128, 64):
        both.read(n)
    assert both.graphs.recorded == 2 and both.graphs.replayed >= 12
