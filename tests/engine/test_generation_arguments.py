"""Arguments of ``generate`` and ``read``: what they mean, to the token, and what is refused."""

import math

import numpy as np
import pytest
import torch

import hope_kernels as hk
from hope_kernels.engine.generation import read
from hope_kernels.engine.sampling import uniform


def model(vocab: int = 256) -> hk.HopeForCausalLM:
    torch.manual_seed(0)
    config = hk.HopeConfig(
        vocab, 16, 1, titans=hk.TitansConfig(16), cms=hk.CMSConfig(16, (8, 32), expansion=1.0, lr=0.05)
    )
    return hk.HopeForCausalLM(config).eval()


M = model()
PROMPT = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True)) and a.pos == b.pos


def first_new(text: torch.Tensor, avoid: torch.Tensor) -> torch.Tensor:
    """``text`` with a first token that is not the one to avoid, in any row."""
    text = text.clone()
    text[:, 0] = torch.tensor([next(t for t in range(256) if t not in avoid.flatten().tolist())])
    return text


# -- the token a state has not read --------------------------------------------------------------------------


@pytest.fixture
def out():
    return M.generate(PROMPT, 8, lengths=[20, 11])


@pytest.fixture
def more(out):
    return first_new(torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(1)), out.tokens[:, -1:])


def source(ids: torch.Tensor):
    at = 0

    def take(n: int) -> torch.Tensor:
        nonlocal at
        part, at = ids[:, at : at + n], at + n
        return part

    return take


def test_the_readme_and_the_specification_continue_with_the_last_token(out):
    whole = M.generate(PROMPT, 20, lengths=[20, 11])
    ways = [
        M.generate(ids, 12, out.state.clone())
        for ids in (None, out.tokens[:, -1:], source(out.tokens[:, -1:]), PROMPT[:, :0])
    ]
    for way in ways:
        assert torch.equal(way.tokens, whole.tokens[:, 8:]) and way.state.pos == whole.state.pos == [39, 30]
        assert torch.equal(way.state.unread, whole.tokens[:, -1:])


@pytest.mark.parametrize("given", ["tensor", "function"])
def test_other_ids_are_read_behind_the_last_token(out, more, given):
    """Not instead of it: 8 + 12 tokens are read, of which the state had read 7."""
    joined = torch.cat([out.tokens[:, -1:], more], 1)
    want = M.generate(joined, 5, out.state.clone(), unread="included")
    got = M.generate(more if given == "tensor" else source(more), 5, out.state.clone())
    assert torch.equal(got.tokens, want.tokens) and same(got.state, want.state) and got.state.pos == [
        20 + 8 + 12 + 4, 11 + 8 + 12 + 4
    ]
    told = []
    reading = read(M, more if given == "tensor" else source(more), out.state.clone(), piece=8, learn="next_token",
                   on_piece=lambda at, _: told.append(at))
    assert same(
        reading.state, read(M, joined, out.state.clone(), piece=8, learn="next_token", unread="included").state
    )
    assert reading.tokens == told[-1] == 12 and reading.state.unread is None and reading.predicted == [12, 12]
    half = read(M, more, out.state.clone(), piece=8, learn="next_token", should_stop=iter([False, True]).__next__)
    assert not half.finished and 0 < half.tokens < 12
    assert same(read(M, more[:, half.tokens :], half.state, piece=8, learn="next_token").state, reading.state)


def test_ragged_ids_behind_the_last_token(out, more):
    """A row without new text reads its last token and writes on; the other one as if it were alone."""
    got = M.generate(more, 5, out.state.clone(), lengths=[12, 0])
    assert got.state.pos == [20 + 8 + 12 + 4, 11 + 8 + 4]
    row = M.generate(more[:1], 5, out.state.select([0]))
    assert torch.equal(got.tokens[:1], row.tokens)
    assert torch.equal(got.tokens[1:], M.generate(None, 5, out.state.select([1])).tokens)


def test_rows_that_ended_early_have_a_last_token_of_their_own():
    free = M.generate(PROMPT, 12, temperature=1.0, seed=1)
    stop = free.tokens[0, 3:5].tolist()
    out = M.generate(PROMPT, 12, temperature=1.0, seed=1, stop=stop)
    assert out.lengths == [5, 12] and out.state.pos == [24, 31]
    assert out.state.unread.flatten().tolist() == [free.tokens[0, 4], free.tokens[1, 11]]
    more = first_new(PROMPT, out.state.unread)
    got = M.generate(more, 3, out.state.clone())
    for row, n in enumerate(out.lengths):
        text = torch.cat([PROMPT[row], free.tokens[row, :n], more[row]]).unsqueeze(0)
        assert torch.equal(got.tokens[row : row + 1], M.generate(text, 3).tokens)


@pytest.mark.parametrize("given", ["tensor", "function"])
def test_ids_that_may_or_may_not_include_it_are_refused(out, more, given):
    joined = torch.cat([out.tokens[:, -1:], more], 1)
    before = [t.clone() for t in out.state.tensors()]
    for call in (M.generate, lambda ids, _, state: read(M, ids, state)):
        with pytest.raises(ValueError, match="pass unread='included' if this is that token, or unread='before'"):
            call(joined if given == "tensor" else source(joined), 2, out.state)
    assert all(torch.equal(a, b) for a, b in zip(before, out.state.tensors(), strict=True))
    twice = read(M, joined if given == "tensor" else source(joined), out.state.clone(), unread="before")
    once = read(M, joined if given == "tensor" else source(joined), out.state.clone(), unread="included")
    assert [a - b for a, b in zip(twice.state.pos, once.state.pos)] == [1, 1]
    with pytest.raises(ValueError, match="has not read token .* ids begin with"):
        read(M, more if given == "tensor" else source(more), out.state, unread="included")


@torch.no_grad()
def test_the_model_reads_what_it_is_given_and_refuses_to_lose_a_token(out, more):
    with pytest.raises(ValueError, match="has not read token .* of row 0, the last one that generate returned"):
        M(more, out.state)
    with pytest.raises(ValueError, match="Decoder.step: argument state has not read token"):
        hk.Decoder(M, out.state.clone()).step(more[:, :1])
    _, state = M(out.state.unread, out.state.clone(), [1, 0])  # one row of two
    assert state.unread.flatten().tolist() == [-1, out.tokens[1, -1]]
    with pytest.raises(ValueError, match="some rows of argument state have an unread token and others have none"):
        read(M, more, state)
    with pytest.raises(ValueError, match="needs a state that generate returned"):
        M.generate(None, 2, state)
    assert torch.equal(
        M.generate(None, 2, state.select([1])).tokens,
        M.generate(None, 2, out.state.select([1]), learn="next_token").tokens
    )
    assert M.generate(more[:1], 2, state.select([0])).state.pos == [20 + 8 + 12 + 1]
    _, both = M(out.state.unread, state, [0, 1])
    assert read(M, more, both).state.pos == [20 + 8 + 12, 11 + 8 + 12]  # nothing is unread any more
    dropped = out.state.clone()
    dropped.unread = None
    assert M(more, dropped)[1].pos == [20 + 7 + 12, 11 + 7 + 12]


def test_a_state_goes_on_after_what_its_listener_raised():
    """The token is written down before anyone is told of it."""
    state, heard = M.init_state(1), []

    def listen(tokens):
        heard.extend(tokens)
        if len(heard) == 4:
            raise RuntimeError("listener")

    with pytest.raises(RuntimeError, match="listener"):
        M.generate(PROMPT[:1], 9, state, on_token=listen)
    rest = M.generate(None, 5, state)
    assert heard + rest.tokens[0].tolist() == M.generate(PROMPT[:1], 9).tokens[0].tolist()


# -- stop ----------------------------------------------------------------------------------------------------


def test_stop_is_text_bytes_or_token_ids():
    new = M.generate(PROMPT[:1], 40, temperature=1.0, seed=2).tokens[0].tolist()
    n = next(i for i in range(5, 30) if new[i] not in new[:i] and new[i] < 128 and new[i + 1] < 128)
    pair = new[n : n + 2]
    where = n + 2
    text = bytes(pair)
    forms = [pair, tuple(pair), [pair], [tuple(pair)], text, [text], bytearray(text), text.decode(),
             [text.decode()], np.array(pair),
             torch.tensor(pair), [torch.tensor(pair)], [[pair[1], pair[0]], pair], ["never" * 9, pair],
             iter([text])]
    for stop in forms:
        assert M.generate(PROMPT[:1], 40, temperature=1.0, seed=2, stop=stop).lengths == [where], stop
    # not at any one of its characters
    other = next(t for t in range(256) if t not in new)
    for stop in ([new[0], other], bytes([new[0], other]), [bytes([other, new[0]])], (), None, []):
        assert M.generate(PROMPT[:1], 40, temperature=1.0, seed=2, stop=stop).lengths == [40], stop
    assert M.generate(PROMPT[:1], 40, temperature=1.0, seed=2, stop=[[new[3]], [new[9]]]).lengths[0] <= 4


# -- drawing -------------------------------------------------------------------------------------------------

SEEDS = [0, 1, -1, -2, -3, 2**31, 2**61 - 1, 2**61, 2**63 - 1, 2**64, -(2**64), 2**64 + 1, 10**5000]


def test_every_seed_row_and_position_draws_its_own_number():
    numbers = [uniform(s, b, t) for s in SEEDS for b in range(12) for t in (0, 1, 11, 111, 2**40)]
    assert len(set(numbers)) == len(numbers) and all(0 <= u < 1 for u in numbers)
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.05
    assert uniform(3, 1, 4) == 0.08483729487165281  # a session draws the same on any machine and in any release
    texts = [tuple(M.generate(PROMPT[:1], 12, temperature=5.0, seed=s).tokens[0].tolist()) for s in SEEDS]
    assert len(set(texts)) == len(SEEDS)


def test_a_row_draws_what_it_draws_in_any_company():
    alone = M.generate(PROMPT[:1], 9, temperature=1.0, seed=4)
    ragged = M.generate(PROMPT, 9, lengths=[20, 3], temperature=1.0, seed=4)
    assert torch.equal(alone.tokens, ragged.tokens[:1])


# -- refusals ------------------------------------------------------------------------------------------------

ODD = [None, "a", b"a", [], {}, object(), 1.5, math.nan, -1, 10**400, True, np.float64("nan"), torch.zeros(2), 1j]


def refused(words: str, **options) -> None:
    state = M.init_state(1)
    with pytest.raises(ValueError, match=words):
        M.generate(**{"ids": PROMPT[:1, :3], "max_new_tokens": 1, "state": state, **options})
    assert state.pos == [0]


@pytest.mark.parametrize(("name", "fine"), [
    ("temperature", [1.5]), ("top_p", [None]), ("top_k", [None, 10**400]), ("max_new_tokens", [10**400]),
    ("seed", [-1, 10**400]), ("piece", [10**400]), ("learn", []), ("check_finite", [True]), ("graph", [True]),
    ("on_token", [None]),
    ("on_piece", [None]), ("should_stop", [None]), ("unread", [None]), ("lengths", [None]),
    ("stop", [None, [], {}, "a", b"a"]), ("backend", [None]),
])
def test_odd_values_are_refused_by_name(name, fine):
    for value in ODD:
        if not any(value is f or (type(value) is type(f) and value == f) for f in fine):
            refused(f"argument {name} |backend" if name == "backend" else f"argument {name} ", **{name: value})


def test_values_that_are_fine():
    options = {"temperature": [0, 1, np.float32(0.5), torch.tensor(0.5), math.inf],
               "top_k": [1, np.int64(3), torch.tensor(2), 10**30],
               "top_p": [1, 0.5, np.float64(0.3)], "seed": [np.int64(-7), -(10**30)],
               "piece": [1, 3, 10**30, np.int32(5)], "max_new_tokens": [np.int64(2), torch.tensor(2)]}
    for name, values in options.items():
        for value in values:
            given = {"max_new_tokens": 2, "temperature": 1.0, name: value}
            assert M.generate(PROMPT[:1, :9], **given).lengths == [2], (name, value)


def test_stop_is_refused():
    for stop, words in [
        ("", "empty entry"), (b"", "empty entry"), ([""], "empty entry"), ([[]], "empty entry"),
        ([[3], []], "empty entry"),
        ([256], "has token 256, expected 0 to 255"), ([[1, 10**30]], "expected 0 to 255"),
        ([-1], "argument stop is -1"), ([[1, -2]], "argument stop is -2"), ([True], "argument stop is True"),
        ([1.0], "argument stop is 1.0"), ([1, "a"], "argument stop"),
        ([["a"]], "argument stop is 'a'"), (5, "argument stop is 5"), ([[[1]]], "argument stop"),
        ([None], "argument stop"), (torch.tensor(5), "argument stop is tensor\\(5\\)"),
    ]:
        refused(words, stop=stop)
    small = model(vocab=40)
    for stop in ("a", b"a", ["a"], [b"a"]):
        with pytest.raises(ValueError, match="stop strings need a byte model"):
            small.generate(PROMPT[:1] % 40, 2, stop=stop)
    with pytest.raises(ValueError, match="has token 40, expected 0 to 39"):
        small.generate(PROMPT[:1] % 40, 2, stop=[40])


def test_ids_and_states_are_refused_by_kind():
    for ids in (5, "abc", [[1, 2]], PROMPT.numpy()):
        for call in (lambda i: M.generate(i, 2), lambda i: read(M, i)):
            with pytest.raises(TypeError, match="argument ids is a"):
                call(ids)
    for ids, words in ((PROMPT[0], "has shape"), (PROMPT.float(), "has dtype"), (PROMPT.to("meta"), "is on meta"),
                       (PROMPT + 999, "has token")):
        with pytest.raises(ValueError, match=words):
            M.generate(ids, 2)
    for state in (5, "abc", M.init_state(1).mixers[0], {}):
        with pytest.raises(TypeError, match="argument state is a"):
            M.generate(PROMPT[:1], 2, state)
        with pytest.raises(TypeError, match="argument state is a"):
            read(M, source(PROMPT[:1]), state)
    for call in (M.generate, lambda ids, _, state: read(M, ids, state)):
        with pytest.raises(ValueError, match="has 2 rows, expected 1"):
            call(PROMPT[:1], 2, M.init_state(2))
        with pytest.raises(ValueError, match="has 2 rows, expected 1|2 rows"):
            call(source(PROMPT[:1]), 2, M.init_state(2))
    for call in (lambda of: M.generate(of, 2), lambda of: read(M, of)):
        with pytest.raises(TypeError, match=r"argument ids\(n\) is a NoneType"):
            call(lambda n: None)
        with pytest.raises(ValueError, match=r"ids\(4096\) has 5000 tokens, expected at most 4096"):
            # the whole text at every call: it would be read for ever
            call(lambda n: PROMPT[:1, :1].expand(1, 5000))
    with pytest.raises(TypeError, match="argument last is a"):
        read(M, PROMPT, last=5)
    with pytest.raises(ValueError, match="argument last has shape"):
        read(M, PROMPT, last=torch.zeros(2, 9))
    with pytest.raises(ValueError, match="argument lengths"):
        M.generate(PROMPT, 2, lengths=["a", 2])
