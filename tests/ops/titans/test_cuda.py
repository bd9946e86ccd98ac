"""The memory's CUDA C++ kernels, on a GPU if there is one, else on an emulated one: against the fp64 closed
form by the yardstick, and bit for bit against themselves."""

import os
import re
import subprocess
import sys
from itertools import product

import pytest
import torch
from numerics import within_yardstick
from problems import part, problem, results, rows_of, run, same

from benchmarks.measure import poisoned
from hope_kernels import (
    CMSConfig,
    HopeConfig,
    HopeForCausalLM,
    SelfModifyingTitans,
    TitansConfig,
    available_backends,
    load_state,
)
from hope_kernels.backend import BY_ALL, Call
from hope_kernels.layers.titans import surroundings
from hope_kernels.ops import TokenInputs, init_titans_state, titans_advance_, titans_chunk
from hope_kernels.ops.shared import cuda_library as library
from hope_kernels.ops.shared.triton_build import SHARED_KIB
from hope_kernels.ops.titans import cuda as titans
from hope_kernels.ops.titans.backends import resolve
from tools import build_cuda

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPUS = (80, 86, 90)  # blocks exchange through memory, with much shared memory and with little; blocks form clusters
NARROW = 120  # clusters with little shared memory
WIDE = TitansConfig(128, 2)  # two heads of 64
CONFIGS = [
    WIDE, TitansConfig(64, hidden_mult=2, chunk_memory=32, chunk_other=32, activation="silu", retain_to="zero"),
    TitansConfig(64, hidden_mult=4, retention=False, dgd=False),
    TitansConfig(128, chunk_memory=64, chunk_other=64, own_values=False), TitansConfig(128, hidden_mult=2),
]


# (head width, hidden_mult, chunk)
TOO_MUCH_FOR_99_KB = {(64, 1, 64), (64, 2, 64), (128, 1, 32), (128, 1, 64), (128, 2, 32), (128, 2, 64)}
# 99 KB are too few for that one
SERVED = [(config, gpu) for config in CONFIGS for gpu in GPUS if (config is not CONFIGS[3]) or gpu != 86]
# Each configuration once, and among them each way of a head's blocks to meet; the rest of the table is slow.
USUAL = [
    (CONFIGS[0], 80), (CONFIGS[0], 86), (CONFIGS[0], 90), (CONFIGS[1], 90), (CONFIGS[2], 86),
    (CONFIGS[3], 80), (CONFIGS[4], 90)
]
on_every_gpu = pytest.mark.parametrize("config, capability", [
    pytest.param(c, gpu, id=f"{CONFIGS.index(c)}-{gpu}", marks=() if (c, gpu) in USUAL else pytest.mark.slow)
    for c, gpu in SERVED
])


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """The library behind backend="cuda"."""
    if DEVICE == "cuda" and not build_cuda.LIBRARY.exists():
        pytest.skip("the CUDA library was not built (python -m tools.build_cuda)")
    if DEVICE == "cpu" and build_cuda.host_compiler() is None:
        pytest.skip("needs a CUDA device or a C++ compiler")
    if DEVICE == "cpu":
        library.emulate(str(build_cuda.build_emulated()))
    assert available_backends()["cuda"] is None
    yield
    library.emulate(None)


def emulate(capability: int = 90, seed: int = 0, resident: int = 9) -> None:
    """The GPU that the next calls run on, its threads in an order that follows from ``seed``, unordered
    accesses being errors; a GPU that is there stays what it is. A number of resident blocks that is no
    multiple of what works together shows who waits for whom."""
    if DEVICE == "cpu":
        image = 80 if capability < 90 else capability
        torch.ops.hope_kernels_cuda.emulate(capability, 1024 * SHARED_KIB[capability], image, seed, resident, True)


@pytest.fixture(autouse=True)
def usual_gpu(kernels):
    emulate()
    with poisoned():  # scratch starts as NaN
        yield


def cast(found, dtype):
    return type(found)(*(None if t is None else t.to(DEVICE, dtype) for t in found))


def meets_yardstick(config, w_init, inputs, dtype, lengths=None):
    """Calls end with nearly full chunks: the error of a handful of pending numbers would be chance."""
    exact = results(*run(config, cast(w_init, torch.float64), cast(inputs, torch.float64), "chunked", lengths))
    w, i = cast(w_init, dtype), cast(inputs, dtype)
    ours, peer = (results(*run(config, w, i, backend, lengths)) for backend in ("cuda", "chunked"))
    for name, t in ours.items():
        within_yardstick(t, peer[name], exact[name], name)


@pytest.mark.parametrize("width, mult, dtype, capability", [
    pytest.param(*shape, dtype, gpu, marks=() if gpu in usual else pytest.mark.slow) for shape in titans.SHAPES
    for dtype, usual in ((torch.bfloat16, (80, NARROW)), (torch.float16, (86, 90))) for gpu in (*GPUS, NARROW)
])
def test_meets_the_yardstick(width, mult, dtype, capability):
    emulate(capability)
    config = TitansConfig(width, hidden_mult=mult)
    meets_yardstick(config, *problem(config, 2, 47, 0.5), dtype, [47, 30])


@pytest.mark.parametrize("width, mult, chunk, capability", [
    pytest.param(*shape, chunk, gpu, marks=() if gpu in usual else pytest.mark.slow)
    for shape in (titans.SHAPES[0], *titans.SHAPES[2:])
    for chunk, usual in zip(titans.CHUNKS[1:], ((80, 86), (86, 90)), strict=True) for gpu in GPUS
])
def test_longer_chunks(width, mult, chunk, capability):
    emulate(capability)
    config = TitansConfig(width, hidden_mult=mult, chunk_memory=chunk, chunk_other=chunk)
    w_init, inputs = problem(config, 2, 2 * chunk - 1, 0.5)
    if capability == 86 and (width, mult, chunk) in TOO_MUCH_FOR_99_KB:
        with pytest.raises(ValueError, match="needs more shared memory a block than the device has"):
            run(config, cast(w_init, torch.bfloat16), cast(inputs, torch.bfloat16), "cuda")
    else:
        meets_yardstick(config, w_init, inputs, torch.bfloat16, [2 * chunk - 1, chunk])


@pytest.mark.parametrize("correlation", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("config", [WIDE, CONFIGS[4]], ids=["one block", "two blocks"])
def test_correlated_and_repeated_keys(config, correlation):
    emulate(90, 1)
    meets_yardstick(config, *problem(config, 2, 47, correlation), torch.float16)


SWITCHES = [
    {"own_values": False}, {"target_norm": False, "eta_scale": 0.05}, {"target_norm": False, "own_values": False},
    {"step_clip": False}, {"objective": "dot"}, {"grad_scale": 2.0}, {"dgd": False}, {"retention": False},
    {"retain_to": "zero"},
    {"qk_l2norm": False, "eta_scale": 0.05}, {"activation": "gelu"}, {"activation": "silu"},
    {"eta_activation": "softplus", "eta_scale": 0.1},
]


@pytest.mark.parametrize("change", SWITCHES, ids=str)
def test_every_switch(change):
    config = TitansConfig(64, **change)
    meets_yardstick(config, *problem(config, 1, 47, 0.5), torch.float16)


@pytest.mark.parametrize("preset", ["paper", "nested_learning"])
def test_presets(preset):
    config = TitansConfig.preset(preset, d_model=64, chunk_memory=16, chunk_other=16, scalar_skip=False)
    meets_yardstick(config, *problem(config, 1, 47, 0.5), torch.float16)


@pytest.mark.parametrize("bias", [-30.0, 30.0])
def test_extreme_retention(bias):
    w_init, inputs = problem(WIDE, 1, 47, 0.5)
    meets_yardstick(
        WIDE, w_init, inputs._replace(alpha_bias=torch.full_like(inputs.alpha_bias, bias)), torch.float16
    )


def test_biases_in_fp32_keep_their_digits():
    w_init, inputs = (cast(t, torch.bfloat16) for t in problem(WIDE, 1, 20))
    precise = torch.tensor([0.123456, 2.345678], device=DEVICE)
    mixed = inputs._replace(eta_bias=precise, alpha_bias=precise)
    pending = run(WIDE, w_init, mixed, "cuda")[1].pending_eta
    assert torch.equal(
        run(WIDE, w_init, mixed._replace(alpha_bias=precise.double()), "cuda")[1].pending_eta, pending
    )
    rounded = run(
        WIDE, w_init, mixed._replace(eta_bias=precise.bfloat16(), alpha_bias=precise.bfloat16()), "cuda"
    )[1].pending_eta
    assert not torch.equal(rounded, pending)
    torch.testing.assert_close(rounded, pending, rtol=0.01, atol=0)


@pytest.mark.parametrize("seed", [1, *(pytest.param(s, marks=pytest.mark.slow) for s in (0, 2, 3))])
@on_every_gpu
def test_bit_identical_however_the_call_is_cut(config, capability, seed, tmp_path):
    emulate(capability, seed)
    C, T = config.chunk_memory, 2 * config.chunk_memory + 5
    w_init, inputs = (cast(t, torch.bfloat16) for t in problem(config, 2, T))
    whole, end = run(config, w_init, inputs, "cuda")
    # inside chunks, over a boundary, up to one and on from there
    cuts, state, outputs = [0, 1, C + 1, 2 * C, T], None, []
    for a, b in zip(cuts, cuts[1:]):
        if state is not None:
            state.save(tmp_path / "state")
            state = load_state(tmp_path / "state").to(DEVICE)
        o, state = run(config, w_init, part(inputs, a, b), "cuda", state=state)
        outputs.append(o)
    assert torch.equal(torch.cat(outputs, 1), whole) and same(state, end)
    lengths = [T, C + 2]
    o, ragged = run(config, w_init, inputs, "cuda", lengths)
    for row, n in enumerate(lengths):
        alone, state = run(config, w_init, part(rows_of(inputs, [row]), 0, n), "cuda")
        assert torch.equal(o[row : row + 1, :n], alone) and same(ragged.select([row]), state)
        assert not o[row, n:].any()


@pytest.mark.parametrize("capability", GPUS)
def test_outputs_depend_on_no_later_token(capability):
    emulate(capability)
    w_init, inputs = (cast(t, torch.bfloat16) for t in problem(WIDE, 1, 40))
    whole, _ = run(WIDE, w_init, inputs, "cuda")
    for tokens in (1, 2, 15, 16, 17, 31, 32, 33):
        assert torch.equal(run(WIDE, w_init, part(inputs, 0, tokens), "cuda")[0], whole[:, :tokens]), tokens


@on_every_gpu
def test_token_by_token(config, capability):
    emulate(capability)
    T = config.chunk_memory + 3
    w_init, inputs = (cast(t, torch.bfloat16) for t in problem(config, 1, T))
    whole, end = run(config, w_init, inputs, "cuda")
    state, outputs = None, []
    for t in range(T):
        o, state = run(config, w_init, part(inputs, t, t + 1), "cuda", state=state)
        outputs.append(o)
    assert torch.equal(torch.cat(outputs, 1), whole) and same(state, end)


@pytest.mark.parametrize("resident", [1, 2, 5])
def test_a_step_that_commits_where_few_blocks_run_at_a_time(resident):
    """Blocks of a head that are behind must still find the tokens that others have committed already."""
    config = CONFIGS[2]
    w_init, inputs = (cast(t, torch.bfloat16) for t in problem(config, 3, 16))
    _, end = run(config, w_init, inputs, "cuda")
    _, state = run(config, w_init, part(inputs, 0, 15), "cuda")
    emulate(80, 1, resident)
    assert same(run(config, w_init, part(inputs, 15, 16), "cuda", state=state)[1], end)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU that is there is no other one")
@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_order_of_threads_and_kind_of_gpu_are_not_in_the_bits(config):
    w_init, inputs = (cast(t, torch.bfloat16) for t in problem(config, 2, config.chunk_memory + 7))
    found = []
    for capability, seed in product([gpu for c, gpu in SERVED if c is config], (0, 7)):
        emulate(capability, seed)
        found.append(run(config, w_init, inputs, "cuda", [config.chunk_memory + 7, 5]))
    for o, state in found[1:]:
        assert torch.equal(o, found[0][0]) and same(state, found[0][1])


def test_padding_may_hold_anything():
    w_init, inputs = (cast(t, torch.bfloat16) for t in problem(WIDE, 2, 20))
    clean, end = run(WIDE, w_init, inputs, "cuda", [20, 9])
    inputs.q[1, 9:] = inputs.x[1, 9:] = float("nan")
    o, state = run(WIDE, w_init, inputs, "cuda", [20, 9])
    assert torch.equal(o, clean) and same(state, end)


def test_a_nan_stays_in_its_row_and_head():
    w_init, inputs = (cast(t, torch.bfloat16) for t in problem(WIDE, 2, 20))
    clean, end = run(WIDE, w_init, inputs, "cuda")
    inputs.x[0, 3, 1] = float("nan")
    o, state = run(WIDE, w_init, inputs, "cuda")
    assert torch.equal(o[1], clean[1]) and torch.equal(o[0, :, 0], clean[0, :, 0]) and o[0, 16:, 1].isnan().any()
    assert torch.equal(state.delta2[1], end.delta2[1]) and torch.equal(state.delta2[0, 0], end.delta2[0, 0])


@pytest.mark.parametrize("config", [*CONFIGS[:2], CONFIGS[4]], ids=[0, 1, 4])
@pytest.mark.parametrize("tokens", [1, 20])
def test_pure_reads_change_nothing_and_see_what_a_read_that_learns_sees(config, tokens):
    w_init, inputs = (cast(t, torch.bfloat16) for t in problem(config, 2, 40))
    _, state = run(config, w_init, part(inputs, 0, 19), "cuda", [19, 3])
    before, next_ = state.clone(), part(inputs, 19, 19 + tokens)
    learned, _ = run(config, w_init, next_, "cuda", state=state)
    assert same(state, before)
    with torch.no_grad():
        read, after = titans_chunk(config, w_init, next_, state, update=False, backend="cuda")
        in_place = titans_advance_(
            config, w_init, next_, state, torch.full((2,), tokens, device=DEVICE), update=False, backend="cuda"
        )
        double = state.to(dtype=torch.float64)
        exact, _ = titans_chunk(
            config, cast(w_init, torch.float64), cast(next_, torch.float64), double, update=False
        )
    assert same(after, before) and same(state, before) and torch.equal(in_place, read)
    room = config.chunk_memory - 19 % config.chunk_memory  # up to the first commit both see the same weights
    assert torch.equal(read[0, :room], learned[0, :room])
    torch.testing.assert_close(read.double(), exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))


@pytest.mark.parametrize("lengths", [[21, 21], [21, 6]])
def test_in_place_without_the_host(lengths):
    """The device alone knows where the rows stand: positions on the host are wrong here, and nobody looks at
    them."""
    w_init, inputs = (cast(t, torch.bfloat16) for t in problem(WIDE, 2, 21))
    whole, end = run(WIDE, w_init, inputs, "cuda", lengths)
    with torch.no_grad():
        state = init_titans_state(WIDE, w_init, 2, DEVICE, torch.bfloat16)
        state.pos[:] = [-7, 1000]
        real = [(torch.tensor(lengths, device=DEVICE) > t).long() for t in range(21)]
        outputs = [
            titans_advance_(WIDE, w_init, part(inputs, t, t + 1), state, n, backend="cuda") for t,
            n in enumerate(real)
        ]
    assert torch.equal(torch.cat(outputs, 1), whole)
    state.pos[:] = lengths
    assert same(state, end) and state.count.tolist() == lengths


def test_lengths_out_of_range_stay_inside_the_row():
    w_init, inputs = (cast(t, torch.bfloat16) for t in problem(WIDE, 2, 5))
    _, end = run(WIDE, w_init, inputs, "cuda", [5, 0])
    state = init_titans_state(WIDE, w_init, 2, DEVICE, torch.bfloat16)
    with torch.no_grad():
        titans_advance_(WIDE, w_init, inputs, state, torch.tensor([9, -3], device=DEVICE), backend="cuda")
    assert torch.equal(
        state.pending_k, end.pending_k
    ) and not state.pending_k[1].any() and state.count.tolist() == [5, 0]


def test_no_rows_and_no_tokens():
    for rows, tokens in ((0, 5), (2, 0)):
        w_init, inputs = (cast(t, torch.bfloat16) for t in problem(WIDE, 1, 5))
        inputs = part(rows_of(inputs, [0] * rows), 0, tokens)
        o, state = run(WIDE, w_init, inputs, "cuda")
        assert o.shape == (rows, tokens, 2, 64) and list(state.pos) == [tokens] * rows


def shifted(t):
    """The same values, in another order in memory and not at a multiple of 16 bytes."""
    whole = torch.zeros(t.numel() + 1, dtype=t.dtype, device=t.device)
    order = list(range(t.dim()))[::-1]
    view = whole[1:].view([t.shape[i] for i in order]).permute(order)
    view.copy_(t)
    return view


def test_tensors_may_lie_anywhere():
    w_init, inputs = (cast(t, torch.bfloat16) for t in problem(WIDE, 2, 20))
    want, end = run(WIDE, w_init, inputs, "cuda")
    moved = lambda found: type(found)(*(None if t is None else shifted(t) for t in found))
    o, state = run(WIDE, moved(w_init), moved(inputs), "cuda")
    assert torch.equal(o, want) and same(state, end)
    state = init_titans_state(WIDE, w_init, 2, DEVICE, torch.bfloat16)
    for name in titans._WRITTEN:
        setattr(state, name, shifted(getattr(state, name)))
    with torch.no_grad():
        o = titans_advance_(WIDE, w_init, inputs, state, torch.tensor([20, 20], device=DEVICE), backend="cuda")
    state.pos[:] = [20, 20]
    assert torch.equal(o, want) and same(state, end)


def test_what_is_served_is_what_the_library_says():
    for D, mult, C in product((16, 32, 64, 96, 128, 256), (1, 2, 3, 4, 8), (1, 8, 16, 32, 48, 64, 128)):
        config = TitansConfig(D, hidden_mult=mult, chunk_memory=C, chunk_other=C)
        for capability in GPUS:
            emulate(capability)
            theirs = torch.ops.hope_kernels_cuda.unserved(D, mult * D, C, 0)
            ours = titans.unserved(config, torch.bfloat16, torch.device(DEVICE))
            fits = capability != 86 or (D, mult, C) not in TOO_MUCH_FOR_99_KB
            assert (ours is None) == (theirs == "") == (
                (D, mult) in titans.SHAPES and C in titans.CHUNKS and fits
            ), (D, mult, C, theirs)


@pytest.mark.parametrize("change, reason", [
    ({"memory": "linear"}, 'serves memory="mlp", not memory="linear"'), ({"d_model": 32}, "head width"),
    ({"hidden_mult": 8}, "hidden_mult"), ({"chunk_memory": 8}, "chunk_memory = chunk_other in"),
    ({"chunk_memory": 32}, "chunk_memory = chunk_other in"),
    ({"momentum": 0.9}, "without momentum"), ({"adaptive_q": True}, "without adaptive_q"),
    ({"scalar_skip": True}, "without scalar_skip"), ({"self_modifying": False}, "self-modifying"),
])
def test_refuses_by_name_what_it_does_not_serve(change, reason):
    layer = SelfModifyingTitans(TitansConfig(**{"d_model": 64, **change})).to(DEVICE, torch.bfloat16)
    with torch.no_grad(), pytest.raises(ValueError, match=reason):
        layer(torch.randn(1, 20, layer.config.d_model, device=DEVICE, dtype=torch.bfloat16), backend="cuda")


def test_refuses_other_dtypes_gradients_and_statistics():
    layer = SelfModifyingTitans(TitansConfig(64)).to(DEVICE)
    x = torch.randn(1, 20, 64, device=DEVICE)
    with torch.no_grad(), pytest.raises(
        ValueError, match="serves torch.bfloat16, torch.float16, not torch.float32"
    ):
        layer(x, backend="cuda")
    layer, state = layer.bfloat16(), layer.init_state(1)
    before = state.clone()
    with pytest.raises(ValueError, match="serves inference, under torch.no_grad.*backend='triton' trains"):
        layer(x.bfloat16(), state, backend="cuda")
    assert same(state, before)
    with torch.no_grad(), pytest.raises(ValueError, match="collects no statistics"):
        layer.scan(x.bfloat16(), layer.init_state(1), [20], stats=object(), backend="cuda")
    # gradients are on, and nobody wants one
    w_init, inputs = (cast(t, torch.bfloat16) for t in problem(WIDE, 1, 5))
    assert torch.equal(titans_chunk(WIDE, w_init, inputs, backend="cuda")[0], run(WIDE, w_init, inputs, "cuda")[0])
    with pytest.raises(ValueError, match="argument backend is 'chunked', expected 'triton' or 'cuda'"):
        titans_advance_(WIDE, w_init, inputs, init_titans_state(WIDE, w_init, 1, DEVICE, torch.bfloat16),
                        torch.tensor([5], device=DEVICE), backend="chunked")


def test_never_the_default():
    config = TitansConfig(64)
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float32):
            assert resolve(config, dtype, torch.device(DEVICE)) is not titans.titans_cuda
        assert resolve(config, torch.bfloat16, torch.device(DEVICE), "cuda") is titans.titans_cuda


def operands(config=WIDE, tokens=5, update=True):
    w_init, inputs = (cast(t, torch.bfloat16) for t in problem(config, 2, tokens))
    state = init_titans_state(config, w_init, 2, DEVICE, torch.bfloat16)
    return titans.arguments(
        config, w_init, inputs, state, state.count, torch.tensor([tokens, 3], device=DEVICE), update
    )


NAMES = ("x", "q", "base2", "base1", "base1s", *titans._WRITTEN, "eta_bias", "alpha_bias", "pos", "lengths")


@pytest.mark.parametrize("name", NAMES)
def test_the_operator_checks_what_its_memory_accesses_depend_on(name):
    good, i = operands(), NAMES.index(name)
    scan = torch.ops.hope_kernels_cuda.titans_scan
    other = torch.int32 if good[i].dtype == torch.int64 else torch.float64
    with pytest.raises(RuntimeError, match=rf"titans_scan: argument {name} has dtype \w+, expected"):
        scan(*good[:i], good[i].to(other), *good[i + 1 :])
    if name == "x":  # what the others are held against
        with pytest.raises(RuntimeError, match=r"argument x has shape \[2, 5, 128\], expected \[B, T, H, D\]"):
            scan(good[0].flatten(2), *good[1:])
        return
    for bad in (good[i][..., :-1], good[i].unsqueeze(0)):
        with pytest.raises(
            RuntimeError, match=r"titans_scan: (argument \w+ has shape \[[\d, ]*\], expected \[|heads of width )"
        ):
            scan(*good[:i], bad, *good[i + 1 :])
    if name in ("base1", "base1s", "pending_alpha", "alpha_bias"):
        with pytest.raises(RuntimeError, match=f"argument {name} is missing"):
            scan(*good[:i], None, *good[i + 1 :])


@pytest.mark.parametrize("which, bad", [(-4, 3), (-4, -1), (-3, 1 << 10), (-3, 1 << 16), (-3, -1)])
def test_the_operator_takes_no_settings_that_nobody_has(which, bad):
    good = list(operands())
    good[which] = bad
    with pytest.raises(RuntimeError, match="argument (activation|flags) is"):
        torch.ops.hope_kernels_cuda.titans_scan(*good)


def test_settings_are_numbered_as_the_kernels_number_them():
    text = (build_cuda.SOURCES / "params.h").read_text()
    bits = {name: int(n) for name, n in re.findall(r"^  k(\w+) = (\d+),", text, re.M)}
    ours = {name: getattr(titans, "_" + re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).upper()) for name in bits}
    assert ours == bits and len(bits) == 10
    activations = {
        name.replace("Tanh", "_tanh").lower(): int(n) for name,
        n in re.findall(r"k(GeluTanh|Gelu|Silu) = (\d)", text)
    }
    assert activations == titans._ACTIVATIONS
    plain = TitansConfig(
        64, own_values=False, target_norm=False, step_clip=False, dgd=False, retention=False, qk_l2norm=False
    )
    assert titans.flags(plain, False, False) == 0
    every = TitansConfig(64, objective="dot", eta_activation="softplus")
    assert titans.flags(every, True, True) == 2 ** len(bits) - 1


@pytest.mark.parametrize("config, update", [
    (CONFIGS[0], True), (CONFIGS[0], False), (CONFIGS[2], True),
    *(pytest.param(*c, marks=pytest.mark.slow) for c in ((CONFIGS[1], True), (CONFIGS[1], False),
            (CONFIGS[2], False))),
], ids=range(6))
def test_opcheck(config, update):
    torch.library.opcheck(torch.ops.hope_kernels_cuda.titans_scan.default, operands(config, 5, update))


def test_compiled_layer_is_one_graph_with_the_same_bits():
    torch.manual_seed(0)
    layer, x = SelfModifyingTitans(WIDE).to(DEVICE, torch.bfloat16), torch.randn(
        1, 18, 128, device=DEVICE, dtype=torch.bfloat16
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        plain, ours = (layer(x[:, :12], backend="cuda")[1] for _ in range(2))
        for t in range(12, 18):
            y, plain = layer(x[:, t : t + 1], plain, backend="cuda")
            z, ours = compiled(x[:, t : t + 1], ours, backend="cuda")
            assert torch.equal(y, z)
    # the first position as a constant, then any position without a commit, then with one
    assert same(plain, ours) and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


@pytest.mark.slow
def test_compiled_decode_step_of_a_model():
    torch.manual_seed(0)
    model = HopeForCausalLM(
        HopeConfig(50, 64, 2, titans=TitansConfig(64), cms=CMSConfig(64, chunks=(16, 32)))
    ).to(DEVICE, torch.bfloat16)
    ids = torch.randint(0, 50, (1, 18), device=DEVICE)
    compiled = torch.compile(model.eval(), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        plain, ours = model.init_state(1), model.init_state(1)
        for state, step in ((plain, model), (ours, model)):
            step(ids[:, :14], state, backend="cuda")
        for t in range(14, 18):
            want, plain = model(ids[:, t : t + 1], plain, backend="cuda")
            got, ours = compiled(ids[:, t : t + 1], ours, backend="cuda")
            assert torch.equal(want, got)
    assert list(ours.pos) == [18]


def test_a_layer_is_what_it_is_on_the_chunked_backend():
    torch.manual_seed(0)
    layer, x = SelfModifyingTitans(WIDE).to(DEVICE, torch.bfloat16), torch.randn(
        2, 40, 128, device=DEVICE, dtype=torch.bfloat16
    )
    exact = SelfModifyingTitans(WIDE).to(DEVICE, torch.float64)
    exact.load_state_dict(layer.state_dict())
    with torch.no_grad():
        y, state = layer(x, lengths=[40, 21], backend="cuda")
        peer, _ = layer(x, lengths=[40, 21], backend="chunked")
        want, _ = exact(x.double(), lengths=[40, 21])
    within_yardstick(y, peer, want, "y")
    assert not y[1, 21:].any() and list(state.pos) == [40, 21]
    call = Call(WIDE, x.dtype, x.device, BY_ALL)
    assert surroundings(call, "cuda") == surroundings(call, None if available_backends()["triton"] else "triton")


def test_no_environment_variable_loads_a_library(tmp_path):
    """A process that never called ``emulate`` looks at the installed library alone."""
    (tmp_path / "other.so").write_bytes(b"not a library")
    code = "from hope_kernels.ops import cuda; print(cuda.emulated(), 'other.so' in str(cuda.unavailable()))"
    environment = os.environ | {"HOPE_KERNELS_EMULATED": str(tmp_path / "other.so")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["None", "False"], done.stderr


def test_says_why_it_is_absent(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "_emulated", None)
    monkeypatch.setattr(library, "LIBRARY", str(tmp_path / "none.so"))
    assert "was not built" in available_backends()["cuda"]
    layer = SelfModifyingTitans(TitansConfig(64)).bfloat16()
    with torch.no_grad(), pytest.raises(ValueError, match="'cuda' cannot be used: its library was not built"):
        layer(torch.randn(1, 20, 64).bfloat16(), backend="cuda")
    (tmp_path / "none.so").write_bytes(b"not a library")
    reason = available_backends()["cuda"]
    assert reason == "needs a CUDA device" if not torch.cuda.is_available() else "already loaded" in reason


@pytest.mark.skipif(build_cuda.nvcc() is None, reason="needs nvcc")
def test_what_pytorch_sees_compiles_for_a_gpu_too(tmp_path):
    """The kernels are the compile report's; here the half of registration.cpp that an emulated library lacks."""
    flags = [
        *build_cuda.DEVICE_FLAGS, "-DUSE_CUDA", build_cuda.STABLE_ABI, '-DHOPE_BUILD=""',
        f"-I{build_cuda.pytorch()[0] / 'include'}"
    ]
    done = subprocess.run([build_cuda.nvcc(), *flags, "-c", build_cuda.REGISTRATION, "-o", tmp_path / "registration.o"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_small_enough_for_a_sanitizer():
    """One prefill that commits, a step of decoding and a pure read; benchmarks.gpu runs this under
    compute-sanitizer."""
    w_init, inputs = (cast(t, torch.bfloat16) for t in problem(WIDE, 2, 19))
    whole, end = run(WIDE, w_init, inputs, "cuda")
    first, state = run(WIDE, w_init, part(inputs, 0, 18), "cuda")
    last, state = run(WIDE, w_init, part(inputs, 18, 19), "cuda", state=state)
    assert torch.equal(torch.cat([first, last], 1), whole) and same(state, end)
    with torch.no_grad():
        titans_chunk(WIDE, w_init, inputs, state, update=False, backend="cuda")
    assert same(state, end)


# -- a GPU that is there -------------------------------------------------------------------------------------

@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", titans.CHUNKS)
@pytest.mark.parametrize("width, mult", titans.SHAPES)
def test_every_shape(width, mult, chunk, dtype):
    config = TitansConfig(2 * width, 2, hidden_mult=mult, chunk_memory=chunk, chunk_other=chunk)
    meets_yardstick(config, *problem(config, 3, 4 * chunk + 5, 0.5), dtype, [4 * chunk + 5, chunk, 3])


@pytest.mark.gpu
@pytest.mark.parametrize("correlation", [0.0, 0.9])
@pytest.mark.parametrize("chunk", titans.CHUNKS)
def test_long_and_wide(chunk, correlation):
    config = TitansConfig(2048, 32, hidden_mult=4, chunk_memory=chunk, chunk_other=chunk)
    meets_yardstick(config, *problem(config, 4, 1100, correlation), torch.bfloat16, [1100, 777, 16, 0])


@pytest.mark.gpu
def test_ten_thousand_chunks():
    config = TitansConfig(64)
    meets_yardstick(config, *problem(config, 1, 160_000, 0.5), torch.bfloat16)


@pytest.mark.gpu
def test_bit_identical_run_to_run():
    config = TitansConfig(512, 8, hidden_mult=4)
    w_init, inputs = (cast(t, torch.bfloat16) for t in problem(config, 20, 500, 0.5))
    o, state = run(config, w_init, inputs, "cuda")
    for _ in range(20):
        again, end = run(config, w_init, inputs, "cuda")
        assert torch.equal(again, o) and same(end, state)


@pytest.mark.gpu
def test_two_streams_at_once():
    """Calls share nothing: scratch and counters are a call's own."""
    config = TitansConfig(512, 8, hidden_mult=4)
    given = [[cast(t, torch.bfloat16) for t in problem(config, 4, 300, seed=seed)] for seed in range(2)]
    want = [run(config, *g, "cuda") for g in given]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in given]
    for _ in range(5):
        found = []
        for stream, g in zip(streams, given):
            with torch.cuda.stream(stream):
                found.append(run(config, *g, "cuda"))
        torch.cuda.synchronize()
        assert all(torch.equal(a[0], b[0]) and same(a[1], b[1]) for a, b in zip(found, want))


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_one_cuda_graph_replayed_for_every_token(config):
    """Boundaries included: the captured launches decide on the device whether a chunk is full."""
    w_init, inputs = (cast(t, torch.bfloat16) for t in problem(config, 2, 70))
    whole, end = run(config, w_init, inputs, "cuda")
    with torch.no_grad():
        token = TokenInputs(*(t if t is None or t.dim() == 1 else t[:, :1].clone() for t in inputs))
        one, warm = torch.ones(2, dtype=torch.int64, device=DEVICE), init_titans_state(
            config, w_init, 2, DEVICE, torch.bfloat16
        )
        titans_advance_(config, w_init, token, warm, one, backend="cuda")
        state, graph = init_titans_state(config, w_init, 2, DEVICE, torch.bfloat16), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = titans_advance_(config, w_init, token, state, one, backend="cuda")
        outputs = []
        for t in range(70):
            for mine, theirs in zip(token, part(inputs, t, t + 1)):
                if mine is not None and mine.dim() > 1:
                    mine.copy_(theirs)
            graph.replay()
            outputs.append(o.clone())
    state.pos[:] = [70, 70]
    assert torch.equal(torch.cat(outputs, 1), whole) and same(state, end)
