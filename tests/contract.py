"""What every backend of the memory's operator promises, written once.

The test file of a backend says what the backend is (``Backend``) and with which problems each promise is
held (``Case``), and inherits the promises:

    class TestContract(Accurate, Streaming):
        backend = Backend("name", torch.float32, ...)

    Streaming     a call may be cut anywhere, rows do not see each other, arguments are left alone
    Accurate      the yardstick against the closed form in fp64
    Partial       what is not served is refused by name; the default
    OnTheDevice   ``titans_advance_``, the dispatcher's operator, torch.compile, CUDA graphs
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import pytest
import torch
from numerics import relative, within_yardstick
from problems import DEVICE, WRITTEN, cast, meets_yardstick, part, problem, rows_of, run, same

from hope_kernels import HopeConfig, HopeForCausalLM, SelfModifyingTitans, TitansConfig, load_state
from hope_kernels.ops import TokenInputs, init_titans_state, titans_advance_, titans_chunk
from hope_kernels.ops.titans.backends import resolve
from hope_kernels.state import State


@dataclass(frozen=True)
class Case:
    """A problem: see ``problems.problem``. ``cuts``: where one call may be cut; ``setting``: what
    ``Contract.prepare`` makes of the machine."""

    config: TitansConfig
    tokens: int
    lengths: tuple[int, ...] | None = None
    rows: int = 2
    dtype: torch.dtype | None = None  # None: the backend's
    correlation: float = 0.0
    alpha: tuple[float, ...] | None = None
    beta: tuple[float, ...] | None = None
    alpha_bias: float | None = None
    cuts: tuple[tuple[int, ...], ...] = ()
    setting: tuple = ()

    def problem(self):
        """(w_init, inputs) in fp64."""
        of = lambda values: None if values is None else torch.tensor(values, dtype=torch.float64)
        w_init, inputs = problem(
            self.config, self.rows, self.tokens, self.correlation, alpha=of(self.alpha), beta=of(self.beta)
        )
        if self.alpha_bias is not None:
            inputs = inputs._replace(alpha_bias=torch.full_like(inputs.alpha_bias, self.alpha_bias))
        return w_init, inputs


@dataclass(frozen=True)
class Backend:
    """The facts of a backend, and the cases (or ``pytest.param``s of one) of each promise."""

    name: str
    dtype: torch.dtype  # of calls that are compared with each other
    device: str = DEVICE
    tolerance: float = 0.0  # 0: such calls have the same bits, else they are equal up to this relative error
    costly: bool = False  # a call takes seconds: nothing is compared twice

    # Streaming
    cuts: list = field(default_factory=list)  # one call, that call cut at ``case.cuts``, rows of ``case.lengths``
    steps: list = field(default_factory=list)  # one call, and token by token
    neighbours: list = field(default_factory=list)  # rows of ``case.lengths``, with NaN after them and in row 0
    reads: list = field(default_factory=list)  # rows that have read ``case.lengths`` tokens read the others
    empty: TitansConfig | None = None  # of the calls with nothing to read, and of lengths that no row can have
    # Accurate
    yardstick: list = field(default_factory=list)
    keys: list = field(default_factory=list)  # of correlated tokens
    decays: list = field(default_factory=list)  # with extreme ``case.alpha``, ``case.beta``, ``case.alpha_bias``
    # Partial
    default: TitansConfig | None = None  # a layer that is served
    is_default: bool = False  # without the backend's name too
    refused: list = field(default_factory=list)  # (changes of ``default``, dtype, reason)
    # OnTheDevice
    advances: list = field(default_factory=list)  # two rows, token by token and in place, ``case.lengths`` of each
    operator: Callable | None = None
    arguments: Callable | None = None  # (config, w_init, inputs, state, pos, lengths, update) -> what operator() takes
    operands: list = field(default_factory=list)  # (config, update)
    compiled: TitansConfig | None = None
    models: list = field(default_factory=list)  # a HopeConfig each
    replayed: list = field(default_factory=list)  # two rows, a CUDA graph of one token
    repeated: list = field(default_factory=list)  # one call again and again

    def equal(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        if not self.tolerance:
            return torch.equal(a, b)
        return a.shape == b.shape and relative(a.cpu(), b.cpu()) <= self.tolerance

    def same(self, a, b) -> bool:
        """Two states; None: both or neither."""
        if not self.tolerance:
            return same(a, b)
        pairs = [(getattr(a, n), getattr(b, n)) for n in WRITTEN]
        close = all(t is u is None or self.equal(t, u) for t, u in pairs)
        return close and list(a.pos) == list(b.pos) and torch.equal(a.count, b.count)


@lru_cache(maxsize=8)
def streamed(backend: str, dtype: torch.dtype, device: str, case: Case, lengths: tuple[int, ...] | None):
    """(w_init, inputs, o, state) of one call: what the promises of a case compare with, made once."""
    w_init, inputs = (cast(t, dtype, device) for t in case.problem())
    return w_init, inputs, *run(case.config, w_init, inputs, backend, lengths)


def of(name: str, *arguments: str):
    """A promise is held with the backend's cases ``name``, each of which is (or unpacks into) its arguments."""
    def mark(test):
        test.cases = name, arguments or ("case",)
        return test

    return mark


def named(value) -> str | None:
    """A case in the name of a test: width, chunk, tokens, type and setting."""
    if not isinstance(value, Case):
        return None
    c, kind = value.config, [] if value.dtype is None else [str(value.dtype).removeprefix("torch.")]
    return "-".join([f"d{c.d_model}", f"C{c.chunk_memory}", f"T{value.tokens}", *kind, *map(str, value.setting)])


class Contract:
    backend: Backend

    def pytest_generate_tests(self, metafunc):
        name, arguments = getattr(metafunc.function, "cases", (None, ()))
        if name is None:
            return
        cases = getattr(self.backend, name)
        assert cases, f"backend {self.backend.name} states no cases {name!r}"
        metafunc.parametrize(", ".join(arguments), cases, ids=named)

    def prepare(self, case: Case) -> None:
        """Makes the machine what ``case.setting`` says."""

    def streamed(self, case: Case, lengths=None):
        """(w_init, inputs, o, state) of the whole call, to be read only."""
        self.prepare(case)
        b = self.backend
        lengths = None if lengths is None else tuple(lengths)
        return streamed(b.name, case.dtype or b.dtype, b.device, case, lengths)

    def run(self, case: Case, w_init, inputs, lengths=None, state=None):
        return run(case.config, w_init, inputs, self.backend.name, lengths, state)


def spoiled(inputs: TokenInputs, *at) -> TokenInputs:
    """With NaN there in everything a token brings."""
    found = TokenInputs(*(t if t is None or t.dim() == 1 else t.clone() for t in inputs))
    for t in found:
        if t is not None and t.dim() > 1:
            t[at] = float("nan")
    return found


class Streaming(Contract):
    @of("cuts")
    def test_however_a_call_is_cut(self, case, tmp_path):
        """Outputs and state are those of one call, whatever the parts, in whatever company; a state goes on
        after a file."""
        b, T = self.backend, case.tokens
        w_init, inputs, whole, end = self.streamed(case)
        assert torch.isfinite(whole).all()
        for cuts in case.cuts:
            state, outputs = None, []
            for start, stop in zip(cuts, cuts[1:]):
                if state is not None:
                    state.save(tmp_path / "state")
                    state = load_state(tmp_path / "state").to(b.device)
                o, state = self.run(case, w_init, part(inputs, start, stop), state=state)
                outputs.append(o)
            assert b.equal(torch.cat(outputs, 1), whole) and b.same(state, end), cuts
        o, ragged = self.run(case, w_init, inputs, case.lengths)
        for row, n in enumerate(case.lengths):
            assert b.equal(o[row, :n], whole[row, :n]) and not o[row, n:].any(), row
            if n < T or not b.costly:
                alone, state = self.run(case, w_init, part(rows_of(inputs, [row]), 0, n))
                assert b.equal(o[row : row + 1, :n], alone) and b.same(ragged.select([row]), state), row

    @of("neighbours")
    def test_rows_in_another_order(self, case, tmp_path):
        """A choice of rows, in another order, goes on from a file."""
        w_init, inputs, whole, _ = self.streamed(case)
        at = case.lengths[-1]
        _, state = self.run(case, w_init, part(inputs, 0, at))
        rows = [case.rows - 1, 0]
        state.select(rows).save(tmp_path / "state")
        state = load_state(tmp_path / "state").to(self.backend.device)
        o, _ = self.run(case, w_init, part(rows_of(inputs, rows), at, case.tokens), state=state)
        assert self.backend.equal(o, whole[rows, at:])

    @of("neighbours")
    def test_rows_that_were_alone_go_on_together(self, case):
        """Joined where each of them stands, they end as in one call."""
        w_init, inputs, whole, end = self.streamed(case)
        alone = [self.run(case, w_init, part(rows_of(inputs, [b]), 0, n))[1] for b, n in enumerate(case.lengths)]
        left = [case.tokens - n for n in case.lengths]
        later = [torch.arange(n, n + max(left)).clamp(max=case.tokens - 1) for n in case.lengths]
        rows = [rows_of(inputs, [b]) for b in range(case.rows)]
        moved = [TokenInputs(*(t if t is None or t.dim() == 1 else t[:, at.to(t.device)] for t in row))
                 for row, at in zip(rows, later)]
        together = TokenInputs(*(t[0] if t[0] is None or t[0].dim() == 1 else torch.cat(t) for t in zip(*moved)))
        o, state = self.run(case, w_init, together, left, State.join(alone))
        for b, (n, m) in enumerate(zip(case.lengths, left)):
            assert self.backend.equal(o[b, :m], whole[b, n:]), b
        assert self.backend.same(state, end)

    @of("steps")
    def test_token_by_token(self, case):
        w_init, inputs, whole, end = self.streamed(case)
        state, outputs = None, []
        for t in range(case.tokens):
            o, state = self.run(case, w_init, part(inputs, t, t + 1), state=state)
            outputs.append(o)
        assert self.backend.equal(torch.cat(outputs, 1), whole) and self.backend.same(state, end)

    @of("neighbours")
    def test_padding_may_hold_anything(self, case):
        w_init, inputs, clean, end = self.streamed(case, case.lengths)
        for row, n in enumerate(case.lengths):
            inputs = spoiled(inputs, row, slice(n, None))
        o, state = self.run(case, w_init, inputs, case.lengths)
        assert self.backend.equal(o, clean) and self.backend.same(state, end)

    @of("neighbours")
    def test_a_nan_stays_in_its_row_and_head(self, case):
        """Where it is seen as soon as it has been written."""
        b = self.backend
        w_init, inputs, clean, end = self.streamed(case, case.lengths)
        head = case.config.num_heads - 1
        o, state = self.run(case, w_init, spoiled(inputs, 0, 3, head), case.lengths)
        C = max(case.config.chunk_memory, case.config.chunk_other)
        assert o[0, C:, head].isnan().any() and not o[0, :3].isnan().any()
        assert b.equal(o[1:], clean[1:]) and b.equal(o[0, :, :head], clean[0, :, :head])
        others = list(range(1, case.rows))
        assert b.same(state.select(others), end.select(others))
        assert b.equal(state.delta2[0, :head], end.delta2[0, :head])

    @of("reads")
    def test_a_call_leaves_its_arguments_alone_and_a_pure_read_changes_nothing(self, case):
        """A pure read sees what was learned before, as the closed form does in fp64, and up to the first
        commit what a call that learns sees."""
        b, at = self.backend, case.lengths[0]
        self.prepare(case)
        w_init, inputs = (cast(t, b.dtype, b.device) for t in case.problem())
        _, state = self.run(case, w_init, part(inputs, 0, at), case.lengths)
        given = [t for t in (*w_init, *inputs) if t is not None]
        before, kept, later = state.clone(), [t.clone() for t in given], part(inputs, at, case.tokens)
        learned, _ = self.run(case, w_init, later, state=state)
        pure = lambda w, i, state, name: titans_chunk(case.config, w, i, state, update=False, backend=name)
        with torch.no_grad():
            read, after = pure(w_init, later, state, b.name)
            peer, _ = pure(w_init, later, state, "chunked")
            wide = (cast(t, torch.float64, b.device) for t in (w_init, later))
            exact, _ = pure(*wide, state.to(dtype=torch.float64), "chunked")
        assert same(state, before) and all(torch.equal(t, u) for t, u in zip(given, kept))
        assert same(after, before)
        C = min(case.config.chunk_memory, case.config.chunk_other)
        for row, n in enumerate(case.lengths):
            assert b.equal(read[row, : C - n % C], learned[row, : C - n % C]), row
        if b.name != "chunked":
            within_yardstick(read, peer, exact, "o")

    @pytest.mark.parametrize("rows, tokens", [(0, 5), (2, 0)])
    def test_no_rows_and_no_tokens(self, rows, tokens):
        case = Case(self.backend.empty, 5, rows=1)
        w_init, inputs = (cast(t, self.backend.dtype, self.backend.device) for t in case.problem())
        o, state = self.run(case, w_init, part(rows_of(inputs, [0] * rows), 0, tokens))
        assert o.shape == (rows, tokens, case.config.num_heads, case.config.head_dim)
        assert list(state.pos) == [tokens] * rows


class Accurate(Contract):
    def judge(self, case: Case, w_init, inputs, dtype: torch.dtype) -> None:
        """Raises AssertionError where outputs or states are not as near to the exact ones as they must be."""
        meets_yardstick(case.config, w_init, inputs, dtype, case.lengths, self.backend.name, self.backend.device)

    def judged(self, case: Case) -> None:
        self.prepare(case)
        self.judge(case, *case.problem(), case.dtype or self.backend.dtype)

    @of("yardstick")
    def test_meets_the_yardstick(self, case):
        self.judged(case)

    @of("keys")
    def test_correlated_and_repeated_keys(self, case):
        self.judged(case)

    @of("decays")
    def test_extreme_retention_and_momentum(self, case):
        """Exactly 0, exactly 1, and 1e-30: no quotient of decays, no logarithm."""
        self.judged(case)


class Partial(Contract):
    def call(self, config: TitansConfig, dtype: torch.dtype, backend: str | None):
        torch.manual_seed(0)
        layer = SelfModifyingTitans(config).to(self.backend.device, dtype)
        x = torch.randn(1, 20, config.d_model, device=self.backend.device).to(dtype)
        with torch.no_grad():
            return layer(x, backend=backend)[0]

    @of("refused", "change", "dtype", "reason")
    def test_refuses_by_name_what_it_does_not_serve(self, change, dtype, reason):
        """By default another backend steps in."""
        config = self.backend.default.replace(**change)
        with pytest.raises(ValueError, match=reason):
            self.call(config, dtype, self.backend.name)
        assert torch.isfinite(self.call(config, dtype, None)).all()

    def test_whether_it_is_the_default(self):
        b = self.backend
        chosen = lambda dtype, name: resolve(b.default, dtype, torch.device(b.device), name)
        with torch.no_grad():
            assert all((chosen(d, None) is chosen(b.dtype, b.name)) == b.is_default for d in (b.dtype, torch.float32))
        y, served, chunked = (self.call(b.default, b.dtype, name) for name in (None, b.name, "chunked"))
        assert torch.equal(y, served) == b.is_default and not torch.equal(served, chunked)


class OnTheDevice(Contract):
    def init_state(self, config, w_init, rows):
        return init_titans_state(config, w_init, rows, self.backend.device, self.backend.dtype)

    def advance(self, config, w_init, inputs, state, lengths, **options):
        if not isinstance(lengths, torch.Tensor):
            lengths = torch.tensor(lengths, device=self.backend.device)
        return titans_advance_(config, w_init, inputs, state, lengths, backend=self.backend.name, **options)

    @pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
    @of("advances")
    def test_in_place_without_the_host(self, case, ragged):
        """The device alone knows where the rows stand: positions on the host are wrong here, and not looked
        at."""
        lengths = case.lengths if ragged else (case.tokens,) * case.rows
        w_init, inputs, whole, end = self.streamed(case, lengths)
        state = self.init_state(case.config, w_init, case.rows)
        state.pos[:] = [-7, 1000]
        counts = torch.tensor(lengths, device=self.backend.device)
        outputs = [
            self.advance(case.config, w_init, part(inputs, t, t + 1), state, (counts > t).long())
            for t in range(case.tokens)
        ]
        for t, o in enumerate(outputs):
            assert torch.equal(o[counts > t], whole[counts > t, t : t + 1])
        assert state.synchronize() is state
        assert same(state, end) and state.count.tolist() == list(lengths)

    @of("advances")
    def test_a_pure_read_in_place(self, case):
        w_init, inputs, _, end = self.streamed(case, case.lengths)
        state = end.clone()
        with torch.no_grad():
            want, _ = titans_chunk(case.config, w_init, inputs, end, update=False, backend=self.backend.name)
        o = self.advance(case.config, w_init, inputs, state, [case.tokens] * case.rows, update=False)
        assert torch.equal(o, want) and same(state, end)

    def test_lengths_out_of_range_stay_inside_the_row(self):
        case = Case(self.backend.empty, 5)
        w_init, inputs = (cast(t, self.backend.dtype, self.backend.device) for t in case.problem())
        _, end = self.run(case, w_init, inputs, [5, 0])
        state = self.init_state(case.config, w_init, 2)
        self.advance(case.config, w_init, inputs, state, [9, -3])
        assert torch.equal(state.pending_k, end.pending_k) and not state.pending_k[1].any()
        assert state.count.tolist() == [5, 0]

    @of("operands", "config", "update")
    def test_opcheck(self, config, update):
        w_init, inputs = (cast(t, self.backend.dtype, self.backend.device) for t in problem(config, 2, 5))
        state = self.init_state(config, w_init, 2)
        lengths = torch.tensor([5, 3], device=self.backend.device)
        given = self.backend.arguments(config, w_init, inputs, state, state.count, lengths, update)
        torch.library.opcheck(self.backend.operator(), given)

    def test_a_compiled_layer_is_one_graph_with_the_same_bits(self):
        b = self.backend
        torch.manual_seed(0)
        layer = SelfModifyingTitans(b.compiled).to(b.device, b.dtype)
        x = torch.randn(1, 18, b.compiled.d_model, device=b.device, dtype=b.dtype)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            plain, ours = (layer(x[:, :12], backend=b.name)[1] for _ in range(2))
            for t in range(12, 18):
                y, plain = layer(x[:, t : t + 1], plain, backend=b.name)
                z, ours = compiled(x[:, t : t + 1], ours, backend=b.name)
                assert torch.equal(y, z)
        # the first position as a constant, then any position without a commit, then with one
        assert same(plain, ours) and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3

    @of("models")
    def test_a_compiled_decode_step_of_a_model(self, case: HopeConfig):
        b = self.backend
        torch.manual_seed(0)
        model = HopeForCausalLM(case).to(b.device, b.dtype).eval()
        ids = torch.randint(0, case.vocab_size, (1, 18), device=b.device)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            plain, ours = model.init_state(1), model.init_state(1)
            for state, step in ((plain, model), (ours, model)):
                step(ids[:, :14], state, backend=b.name)
            for t in range(14, 18):
                want, plain = model(ids[:, t : t + 1], plain, backend=b.name)
                got, ours = compiled(ids[:, t : t + 1], ours, backend=b.name)
                assert torch.equal(want, got)
        assert list(ours.pos) == [18]

    @pytest.mark.gpu
    @of("replayed")
    def test_one_cuda_graph_replayed_for_every_token(self, case):
        """Boundaries included: what was captured decides on the device whether a chunk is full."""
        config = case.config
        w_init, inputs, whole, end = self.streamed(case)
        with torch.no_grad():
            token = TokenInputs(*(t if t is None or t.dim() == 1 else t[:, :1].clone() for t in inputs))
            one, warm = torch.ones(2, dtype=torch.int64, device=DEVICE), self.init_state(config, w_init, 2)
            self.advance(config, w_init, token, warm, one)
            state, graph = self.init_state(config, w_init, 2), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                o = self.advance(config, w_init, token, state, one)
            outputs = []
            for t in range(case.tokens):
                for mine, theirs in zip(token, part(inputs, t, t + 1)):
                    if mine is not None and mine.dim() > 1:
                        mine.copy_(theirs)
                graph.replay()
                outputs.append(o.clone())
        assert torch.equal(torch.cat(outputs, 1), whole) and same(state.synchronize(), end)

    @pytest.mark.gpu
    @of("repeated")
    def test_the_same_bits_from_run_to_run(self, case):
        w_init, inputs, o, state = self.streamed(case)
        for _ in range(20):
            again, end = self.run(case, w_init, inputs)
            assert torch.equal(again, o) and same(end, state)
