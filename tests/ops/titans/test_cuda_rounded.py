"""Rounded weights kept for one token: the bits of calls without them, whoever writes the state in between."""

import pytest
import torch
from emulated_cuda import DEVICE, emulate, kernels  # noqa: F401
from problems import cast, part, problem, run, same

from benchmarks.measure import poisoned
from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM, TitansConfig
from hope_kernels.engine.decoder import Decoder
from hope_kernels.ops import RoundedWeights, init_titans_state, titans_advance_, titans_chunk
from hope_kernels.ops.titans import cuda as titans
from hope_kernels.ops.titans.rounded import _NUMBERS
from tools import build_cuda

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def usual_gpu(kernels):  # noqa: F811
    emulate()
    with poisoned():
        yield


def config_of(width: int, mult: int, chunk: int = 16, heads: int = 1, **switches) -> TitansConfig:
    both = dict(chunk_memory=chunk, chunk_other=chunk)
    return TitansConfig(width * heads, heads, hidden_mult=mult, **both, **switches)


def step(config, w_init, inputs, t, state, lengths, rounded, update=True):
    token = part(inputs, t, t + 1)
    with torch.no_grad():
        return titans_advance_(
            config, w_init, token, state, torch.tensor(lengths, device=DEVICE), update=update, backend="cuda",
            rounded=rounded
        )


def counted(rounded: RoundedWeights) -> list[int]:
    """The marks, by row: the position of the first token of the chunk whose weights are kept, plus one."""
    marks = rounded.numbers.view(torch.int32)[..., -4]
    return [sorted(set(row.flatten().tolist())) for row in marks]


LONG = [(64, 1, 16, 90, BF16), (64, 2, 16, 80, FP16), (64, 4, 16, 90, FP16), (64, 4, 16, 86, BF16),
        (128, 1, 16, 90, BF16), (128, 1, 16, 80, FP16)]
OTHERS = [(64, 1, 64, 80, FP16), (64, 2, 64, 90, BF16), (64, 4, 64, 90, BF16), (128, 1, 64, 90, FP16)]


@pytest.mark.parametrize("width, mult, chunk, gpu, dtype", [
    *LONG, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)
])
def test_tokens_have_the_bits_of_prefill_with_a_copy_and_without(width, mult, chunk, gpu, dtype):
    """Over several chunks, two rows at different places, of which one does not always read."""
    emulate(gpu, 1)
    config = config_of(width, mult, chunk, retention=gpu != 86)
    tokens = 2 * chunk + 3
    w_init, inputs = (cast(t, dtype) for t in problem(config, 2, tokens, 0.5))
    short = tokens - 5
    whole, end = run(config, w_init, inputs, "cuda", [tokens, short])
    states = [init_titans_state(config, w_init, 2, DEVICE, dtype) for _ in range(2)]
    rounded = RoundedWeights(config, w_init, states[1])
    for t in range(tokens):
        lengths = [1, int(t < short)]
        copies = zip(states, (None, rounded))
        plain, kept = (step(config, w_init, inputs, t, s, lengths, copy) for s, copy in copies)
        assert torch.equal(plain, kept) and torch.equal(kept[0], whole[0, t : t + 1]), t
        assert not lengths[1] or torch.equal(kept[1], whole[1, t : t + 1])
        read = step(config, w_init, inputs, t, states[0], lengths, None, update=False)
        assert torch.equal(step(config, w_init, inputs, t, states[1], lengths, rounded, update=False), read)
    for state in states:
        assert same(state.synchronize(), end)


@pytest.mark.parametrize("gpu", [80, 90])
def test_a_token_that_finds_no_copy_makes_one_and_a_commit_leaves_one(gpu):
    """The same. A row that reads nothing keeps what it has. What is read is the copy: another gives other outputs."""
    emulate(gpu)
    config = config_of(64, 2, heads=2)
    w_init, inputs = (cast(t, BF16) for t in problem(config, 2, 20))
    _, state = run(config, w_init, part(inputs, 0, 14), "cuda", [14, 3])
    rounded, kept = RoundedWeights(config, w_init, state), []
    for t in range(14, 18):
        kept.append(rounded.numbers.view(torch.int32).clone())
        step(config, w_init, inputs, t, state, [1, int(t == 15)], rounded)
        kept.append(rounded.numbers.view(torch.int32).clone())
        assert counted(rounded) == [[17 if t >= 15 else 1], [1 if t >= 15 else 0]]
    changed = [not torch.equal(a, b) for a, b in zip(kept[::2], kept[1::2])]
    assert changed == [True, True, False, False]
    other = state.clone()
    fresh = RoundedWeights(config, w_init, other)
    want = step(config, w_init, inputs, 18, other, [1, 1], fresh)
    assert torch.equal(fresh.numbers.view(torch.int32), rounded.numbers.view(torch.int32))
    rounded.numbers[0, ..., :4096] *= 1.5
    found = step(config, w_init, inputs, 18, state, [1, 1], rounded)
    assert not torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])


def in_inference_mode(state) -> None:
    with torch.inference_mode():
        state.delta2.mul_(1.5)


WRITES = {
    "in inference mode": lambda s, w, c: in_inference_mode(s),
    "a deviation": lambda s, w, c: s.delta2.mul_(1.5),
    "assigned": lambda s, w, c: s.assign(c),
    "a deviation of a scalar memory": lambda s, w, c: s.delta1s.add_(0.25),
    "another tensor": lambda s, w, c: setattr(s, "delta1", s.delta1 * 1.5),
    "initial weights": lambda s, w, c: w.w1.mul_(1.5),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_what_pytorch_writes_is_noticed(write):
    config = config_of(64, 1)
    w_init, inputs = (cast(t, BF16) for t in problem(config, 1, 24, 0.5))
    _, other = run(config, w_init, part(inputs, 0, 21), "cuda")
    _, state = run(config, cast(problem(config, 1, 1, seed=5)[0], BF16), part(inputs, 0, 21), "cuda")
    rounded = RoundedWeights(config, w_init, state)

    def read(state, rounded=None) -> list[torch.Tensor]:
        o = step(config, w_init, inputs, 21, state, [1], rounded)
        return [o, state.pending_k[:, 5:7], state.pending_eta[:, 5:7], state.pending_alpha[:, 5:7]]

    before = [t.clone() for t in read(state.clone())]
    read(state, rounded)
    state.count -= 1
    write(state, w_init, other)
    want = read(state.clone())
    assert not all(map(torch.equal, want, before))
    assert all(map(torch.equal, read(state, rounded), want))


def test_what_kernels_write_is_noticed():
    """A prefill in place past a boundary, which no version counter shows; a return to a clone, and other tokens
    up to the same place."""
    config = config_of(64, 1, heads=2)
    w_init, inputs = (cast(t, BF16) for t in problem(config, 2, 40, 0.5))
    _, state = run(config, w_init, part(inputs, 0, 12), "cuda", [12, 3])
    saved, rounded = state.clone(), RoundedWeights(config, w_init, state)
    step(config, w_init, inputs, 12, state, [1, 1], rounded)
    versions = [t._version for t in (state.delta2, state.delta1, state.delta1s)]
    with torch.no_grad():
        some = torch.tensor([9, 5], device=DEVICE)
        titans_advance_(config, w_init, part(inputs, 13, 22), state, some, backend="cuda")
    assert versions == [t._version for t in (state.delta2, state.delta1, state.delta1s)]
    for t in (22, 23):
        want = step(config, w_init, inputs, t, state.clone(), [1, 1], None)
        assert torch.equal(step(config, w_init, inputs, t, state, [1, 1], rounded), want), t
    state.assign(saved)
    with torch.no_grad():
        some = torch.tensor([12, 12], device=DEVICE)
        titans_advance_(config, w_init, part(inputs, 25, 37), state, some, backend="cuda")
    want = step(config, w_init, inputs, 24, state.clone(), [1, 1], None)
    assert torch.equal(step(config, w_init, inputs, 24, state, [1, 1], rounded), want)


def test_positions_past_two_to_the_32():
    """Of which the mark has the lower half: over that boundary, which is one of a chunk, and the next."""
    config = config_of(64, 1)
    w_init, inputs = (cast(t, BF16) for t in problem(config, 1, 35, 0.5))
    whole, end = run(config, w_init, inputs, "cuda")
    state = init_titans_state(config, w_init, 1, DEVICE, BF16)
    state.count += 2**32 - 16
    rounded = RoundedWeights(config, w_init, state)
    for t in range(35):
        assert torch.equal(step(config, w_init, inputs, t, state, [1], rounded), whole[:, t : t + 1]), t
    assert counted(rounded) == [[17]] and state.count.tolist() == [2**32 + 19]
    state.count -= 2**32 - 16
    assert same(state.synchronize(), end)


def test_prefill_and_weights_of_inference_mode_read_no_copy():
    config = config_of(64, 1)
    w_init, inputs = (cast(t, BF16) for t in problem(config, 1, 9))
    state = init_titans_state(config, w_init, 1, DEVICE, BF16)
    rounded = RoundedWeights(config, w_init, state)
    with torch.no_grad():
        nine = torch.tensor([9], device=DEVICE)
        titans_advance_(config, w_init, inputs, state, nine, backend="cuda", rounded=rounded)
    assert not rounded.numbers.any()
    with torch.inference_mode():
        frozen = type(w_init)(*(t.clone() for t in w_init))
    step(config, frozen, inputs, 0, state, [1], rounded)
    assert not rounded.numbers.any()
    step(config, w_init, inputs, 0, state, [1], rounded)
    assert rounded.numbers.any()


def test_refusals():
    wide = config_of(128, 2)
    w_init, inputs = (cast(t, BF16) for t in problem(wide, 1, 1))
    state = init_titans_state(wide, w_init, 1, DEVICE, BF16)
    with pytest.raises(ValueError, match="RoundedWeights serves head width x hidden width up to 16384, not 128 x"):
        RoundedWeights(wide, w_init, state)
    given = list(titans.arguments(wide, w_init, inputs, state, state.count, state.count, True))
    given[-5] = torch.zeros(1, 1, 64, _NUMBERS, dtype=BF16, device=DEVICE)
    with pytest.raises(RuntimeError, match="argument rounded is given, but heads of width 128 with 256"):
        torch.ops.hope_kernels_cuda.titans_scan(*given)
    config = config_of(64, 1)
    w_init, inputs = (cast(t, BF16) for t in problem(config, 1, 1))
    state = init_titans_state(config, w_init, 1, DEVICE, BF16)
    rounded = RoundedWeights(config, w_init, state)
    with torch.no_grad(), pytest.raises(ValueError, match="argument rounded is for backend 'cuda', not"):
        titans_advance_(config, w_init, inputs, state, state.count, backend="triton", rounded=rounded)
    good = titans.arguments(config, w_init, inputs, state, state.count, state.count, True, rounded.numbers)
    for bad in (rounded.numbers[..., 8:], rounded.numbers.half()):
        with pytest.raises(RuntimeError, match="titans_scan: argument rounded has (shape|dtype)"):
            torch.ops.hope_kernels_cuda.titans_scan(*good[:-5], bad, *good[-4:])


@pytest.mark.parametrize("update", [True, False])
def test_opcheck(update):
    config = config_of(64, 1)
    w_init, inputs = (cast(t, BF16) for t in problem(config, 2, 1))
    state = init_titans_state(config, w_init, 2, DEVICE, BF16)
    numbers, ones = RoundedWeights(config, w_init, state).numbers, torch.tensor([1, 0], device=DEVICE)
    given = titans.arguments(config, w_init, inputs, state, state.count, ones, update, numbers)
    for operator in (torch.ops.hope_kernels_cuda.titans_scan, torch.ops.hope_kernels_cuda.titans_advance):
        torch.library.opcheck(operator.default, given)


def test_the_numbers_of_a_copy_are_those_of_the_kernels():
    text = (build_cuda.SOURCES / "launch.h").read_text()
    assert "kKeptNumbers = 4096 + 2 * 64 + 8;" in text and _NUMBERS == 4096 + 2 * 64 + 8


def test_a_decoder_reads_the_copy_and_has_the_bits_of_the_model():
    """Over boundaries of chunks and segments; other calls read on in between, and the state goes back to a clone."""
    torch.manual_seed(0)
    levels = CMSConfig(64, chunks=(8, 16), expansion=1.0, lr=0.02)
    model = HopeForCausalLM(HopeConfig(32, 64, 2, titans=TitansConfig(64), cms=levels), DEVICE, BF16)
    text = torch.randint(0, 32, (2, 60), device=DEVICE)
    with torch.no_grad():
        state = model.init_state(2)
        model(text[:, :13], state, lengths=[13, 11], backend="cuda")
        plain = state.clone()
        decoder = Decoder(model, state, "off", "cuda", capture=False)

        def both(tokens: range, reads=decoder.step) -> None:
            for t in tokens:
                want, _ = model(text[:, t : t + 1], plain, backend="cuda")
                assert torch.equal(reads(text[:, t : t + 1]), want), t

        both(range(13, 19))
        assert all(r is not None and counted(r) == [[17], [17]] for r in decoder._rounded)
        saved = state.clone()
        both(range(19, 21), lambda token: model(token, state, backend="cuda")[0])
        both(range(21, 24))
        state.assign(saved), plain.assign(saved)
        both(range(30, 33))  # other tokens, to where it has been
        with torch.no_grad():
            for s in (state, plain):
                s.mixers[0].delta2.mul_(1.5)
            for block in model.blocks:
                block.mixer.w1.mul_(1.25)
        state.adopt(model), plain.adopt(model)
        both(range(33, 36))
    assert all(map(same, state.mixers, plain.mixers))


def test_a_decoder_without_a_copy():
    """On another backend, and where a memory has two blocks."""
    for config, backend, want in (
        (config_of(64, 1), "cuda", True), (config_of(64, 1), "chunked", False),
        (config_of(128, 2), "cuda", False)
    ):
        d = config.d_model
        model = HopeForCausalLM(HopeConfig(32, d, 1, titans=config, cms=CMSConfig(d, (16,))), DEVICE, BF16)
        with torch.no_grad():
            decoder = Decoder(model, model.init_state(1), "off", backend, capture=False)
        assert [r is not None for r in decoder._rounded] == [want]


@pytest.mark.gpu
def test_a_graph_reads_the_copy():
    """Captured once; state and weights change between replays, which ``renew`` sees."""
    config = config_of(64, 4, 64, heads=2)
    w_init, inputs = (cast(t, BF16) for t in problem(config, 1, 150, 0.5))
    state = init_titans_state(config, w_init, 1, DEVICE, BF16)
    rounded, one = RoundedWeights(config, w_init, state), torch.ones(1, dtype=torch.int64, device=DEVICE)
    token = type(inputs)(*(t if t is None or t.dim() == 1 else t.clone() for t in part(inputs, 0, 1)))
    given = config, w_init, token, state, one
    titans_advance_(*given, backend="cuda", rounded=rounded)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = titans_advance_(*given, backend="cuda", rounded=rounded)
    state.assign(init_titans_state(config, w_init, 1, DEVICE, BF16))
    plain = state.clone()
    for t in range(150):
        for mine, theirs in ((token.q, inputs.q), (token.x, inputs.x)):
            mine.copy_(theirs[:, t : t + 1])
        if t in (70, 71):
            for s in (state, plain):
                s.delta1.mul_(1.5)
        rounded.renew()
        graph.replay()
        want, plain = titans_chunk(config, w_init, part(inputs, t, t + 1), plain, backend="cuda")
        assert torch.equal(o, want), t
