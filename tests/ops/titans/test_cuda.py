"""The memory's CUDA C++ kernels, on a GPU if there is one, else on an emulated one: the contract of a backend,
and what is their own."""

import os
import re
import subprocess
import sys
from itertools import product

import pytest
import torch
from contract import Accurate, Backend, Case, OnTheDevice, Partial, Streaming
from emulated_cuda import DEVICE, emulate, kernels  # noqa: F401
from numerics import within_yardstick
from problems import cast, part, problem, run, same

from benchmarks.measure import poisoned
from hope_kernels import (
    CMSConfig,
    HopeConfig,
    HopeForCausalLM,
    SelfModifyingTitans,
    TitansConfig,
    available_backends,
)
from hope_kernels.backend import BY_ALL, Request
from hope_kernels.engine.decoder import Decoder
from hope_kernels.layers.titans import surroundings
from hope_kernels.ops import init_titans_state, titans_advance_, titans_chunk
from hope_kernels.ops.shared import cuda_library as library
from hope_kernels.ops.shared.triton_build import SHARED_KIB
from hope_kernels.ops.titans import cuda as titans
from tools import build_cuda

GPUS = (80, 86, 90)  # blocks exchange through memory, with much shared memory and with little; blocks form clusters
NARROW = 120  # clusters with little shared memory
emulated_only = pytest.mark.skipif(DEVICE == "cuda", reason="a real GPU cannot play another one")
WIDE = TitansConfig(128, 2)  # two heads of 64
CONFIGS = [
    WIDE, TitansConfig(64, hidden_mult=2, chunk_memory=32, chunk_other=32, activation="silu", retain_to="zero"),
    TitansConfig(64, hidden_mult=4, retention=False, dgd=False),
    TitansConfig(128, chunk_memory=64, chunk_other=64, own_values=False), TitansConfig(128, hidden_mult=2),
]


def by_warpgroups(mult: int = 4, **switches) -> TitansConfig:
    """What commits by warpgroups serve, in bf16 on 9.0: a memory a block (mult 4), or all in one (1)."""
    return TitansConfig(64, hidden_mult=mult, chunk_memory=64, chunk_other=64, **switches)


# (head width, hidden_mult, chunk)
TOO_MUCH_FOR_99_KB = {(64, 1, 64), (64, 2, 64), (128, 1, 32), (128, 1, 64), (128, 2, 32), (128, 2, 64)}
# 99 KB are too few for that one
SERVED = [(config, gpu) for config in CONFIGS for gpu in GPUS if (config is not CONFIGS[3]) or gpu != 86]
WARPGROUPS = (
    by_warpgroups(), by_warpgroups(1), by_warpgroups(activation="silu", retention=False),
    by_warpgroups(1, activation="silu", retention=False)
)
SERVED += [(config, 90) for config in WARPGROUPS]
# Each configuration once, and among them each way of a head's blocks to meet; the rest of the table is slow.
USUAL = [
    (CONFIGS[0], 80), (CONFIGS[0], 86), (CONFIGS[0], 90), (CONFIGS[1], 90), (CONFIGS[2], 86),
    (CONFIGS[3], 80), (CONFIGS[4], 90), (WARPGROUPS[0], 90), (WARPGROUPS[1], 90)
]


@pytest.fixture(autouse=True)
def usual_gpu(kernels):  # noqa: F811
    emulate()
    with poisoned():  # scratch starts as NaN
        yield


SWITCHES = [
    {"own_values": False}, {"target_norm": False, "eta_scale": 0.05}, {"target_norm": False, "own_values": False},
    {"step_clip": False}, {"objective": "dot"}, {"grad_scale": 2.0}, {"dgd": False}, {"retention": False},
    {"retain_to": "zero"},
    {"qk_l2norm": False, "eta_scale": 0.05}, {"activation": "gelu"}, {"activation": "silu"},
    {"eta_activation": "softplus", "eta_scale": 0.1},
]
PRESETS = [
    TitansConfig.preset(name, d_model=64, chunk_memory=16, chunk_other=16, scalar_skip=False)
    for name in ("paper", "nested_learning")
]
HALF = {torch.bfloat16: (80, NARROW), torch.float16: (86, 90)}  # which GPU plays which type; the others are slow


def case_of(width, mult, chunk, gpu, dtype, lengths):
    config = TitansConfig(width, hidden_mult=mult, chunk_memory=chunk, chunk_other=chunk)
    return Case(config, lengths[0], lengths, dtype=dtype, correlation=0.5, setting=(gpu,))


def usually(case, usual: bool):
    return pytest.param(case, marks=() if usual else pytest.mark.slow)


SHORT = [  # calls end with nearly full chunks: the error of a handful of pending numbers would be chance
    usually(case_of(*shape, 16, gpu, dtype, (47, 30)), gpu in HALF[dtype])
    for shape in titans.SHAPES for dtype in HALF for gpu in (*GPUS, NARROW)
]
LONGER = [
    usually(case_of(*shape, chunk, gpu, torch.bfloat16, (2 * chunk - 1, chunk)), gpu in usual)
    for shape in (titans.SHAPES[0], *titans.SHAPES[2:])
    for chunk, usual in zip(titans.CHUNKS[1:], ((80, 86), (86, 90)), strict=True) for gpu in GPUS
    if gpu != 86 or (*shape, chunk) not in TOO_MUCH_FOR_99_KB
]
FULL = [
    pytest.param(Case(TitansConfig(2 * D, 2, hidden_mult=mult, chunk_memory=C, chunk_other=C), 4 * C + 5,
        (4 * C + 5, C, 3), 3, dtype, 0.5), marks=pytest.mark.gpu)
    for D, mult in titans.SHAPES for C in titans.CHUNKS for dtype in HALF
]
WIDEST = [TitansConfig(2048, 32, hidden_mult=4, chunk_memory=C, chunk_other=C) for C in titans.CHUNKS]


def cut(config, gpu, seed):
    """Inside chunks, over a boundary, up to one and on from there (the usual case of a chunk of 64 leaves that
    to ``steps``); one configuration has an empty row beside."""
    C = config.chunk_memory
    cuts = (0, 1, C + 1, 2 * C, 2 * C + 5) if C < 64 or seed != 1 else (0, 1, C + 1, C + 5)
    lengths = (cuts[-1], C + 2, 0) if config is CONFIGS[1] else (cuts[-1], C + 2)
    return Case(config, cuts[-1], lengths, len(lengths), cuts=(cuts,), setting=(gpu, seed))


class TestContract(Accurate, Streaming, Partial, OnTheDevice):
    backend = Backend(
        "cuda", torch.bfloat16,
        cuts=[usually(cut(c, gpu, seed), seed == 1 and (c, gpu) in USUAL) for seed in range(4) for c, gpu in SERVED],
        steps=[usually(Case(c, c.chunk_memory + 3, rows=1, setting=(gpu,)), (c, gpu) in USUAL) for c, gpu in SERVED],
        neighbours=[Case(WIDE, 20, (20, 9))],
        reads=[
            Case(c, 19 + tokens, (19, 3)) for c in (*CONFIGS[:2], CONFIGS[4], *WARPGROUPS[:2]) for tokens in (1, 20)
        ],
        empty=WIDE,
        yardstick=[
            *SHORT, *LONGER, *FULL,
            *(Case(TitansConfig(64, **change), 47, None, 1, torch.float16, 0.5) for change in SWITCHES),
            *(Case(c, 47, None, 1, torch.float16, 0.5) for c in PRESETS),
            *(usually(Case(by_warpgroups(mult, **change), 133, None, 1, torch.bfloat16, 0.5), i < 5)
              for mult in (4, 1) for i, change in enumerate(SWITCHES)),
            *(pytest.param(Case(c, 1100, (1100, 777, 16, 0), 4, correlation=share), marks=pytest.mark.gpu)
              for c in WIDEST for share in (0.0, 0.9)),
            pytest.param(Case(TitansConfig(64), 160_000, None, 1, correlation=0.5), marks=pytest.mark.gpu),
        ],
        keys=[
            Case(c, 47, dtype=torch.float16, correlation=share, setting=(90, 1)) for c in (WIDE, CONFIGS[4])
            for share in (0.0, 0.9, 1.0)
        ] + [
            Case(c, 133, dtype=torch.bfloat16, correlation=share, setting=(90, 2)) for c in WARPGROUPS[:2]
            for share in (0.9, 1.0)
        ],
        decays=[
            *(Case(WIDE, 47, None, 1, torch.float16, 0.5, alpha_bias=bias) for bias in (-30.0, 30.0)),
            *(Case(c, 133, None, 1, torch.bfloat16, 0.5, alpha_bias=bias) for c in WARPGROUPS[:2]
              for bias in (-30.0, 30.0)),
        ],
        default=TitansConfig(64), refused=[(change, dtype, reason) for change, dtype, reason in (
            ({"memory": "linear"}, torch.bfloat16, 'serves memory="mlp", not memory="linear"'),
            ({"d_model": 32}, torch.bfloat16, "head width"), ({"hidden_mult": 8}, torch.bfloat16, "hidden_mult"),
            ({"chunk_memory": 8}, torch.bfloat16, "chunk_memory = chunk_other in"),
            ({"chunk_memory": 32}, torch.bfloat16, "chunk_memory = chunk_other in"),
            ({"momentum": 0.9}, torch.bfloat16, "without momentum"),
            ({"adaptive_q": True}, torch.bfloat16, "without adaptive_q"),
            ({"scalar_skip": True}, torch.bfloat16, "without scalar_skip"),
            ({"self_modifying": False}, torch.bfloat16, "self-modifying"),
            ({}, torch.float32, "serves torch.bfloat16, torch.float16, not torch.float32"))],
        advances=[Case(WIDE, 21, (21, 6))],
        operator=lambda: torch.ops.hope_kernels_cuda.titans_scan.default, arguments=titans.arguments,
        operands=[
            (CONFIGS[0], True), (CONFIGS[0], False), (CONFIGS[2], True),
            *(pytest.param(CONFIGS[i], update, marks=pytest.mark.slow)
              for i, update in ((1, True), (1, False), (2, False))),
        ],
        compiled=WIDE,
        models=[pytest.param(HopeConfig(50, 64, 2, titans=TitansConfig(64), cms=CMSConfig(64, chunks=(16, 32))),
            marks=pytest.mark.slow)],
        replayed=[Case(c, 70) for c in CONFIGS],
        repeated=[Case(TitansConfig(512, 8, hidden_mult=4), 500, None, 20, correlation=0.5)],
    )

    def prepare(self, case):
        emulate(*case.setting)


def played(gpu: int):
    """A GPU as a parameter: the emulator plays every one, a real GPU only the nearest to what it is."""
    if DEVICE == "cpu":
        return gpu
    own = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    nearest = max(g for g in GPUS if g <= max(own, GPUS[0]))
    return gpu if gpu == nearest else pytest.param(gpu, marks=emulated_only)


@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.get_device_capability() != (8, 6),
                    reason="this GPU has enough shared memory")
@pytest.mark.parametrize("width, mult, chunk", sorted(TOO_MUCH_FOR_99_KB))
def test_refuses_what_needs_more_shared_memory_than_there_is(width, mult, chunk):
    emulate(86)
    config = TitansConfig(width, hidden_mult=mult, chunk_memory=chunk, chunk_other=chunk)
    w_init, inputs = (cast(t, torch.bfloat16) for t in problem(config, 2, 5))
    with pytest.raises(ValueError, match="needs more shared memory a block than the device has"):
        run(config, w_init, inputs, "cuda")


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


@pytest.mark.parametrize("capability", map(played, GPUS), ids=GPUS)
def test_outputs_depend_on_no_later_token(capability):
    emulate(capability)
    w_init, inputs = (cast(t, torch.bfloat16) for t in problem(WIDE, 1, 40))
    whole, _ = run(WIDE, w_init, inputs, "cuda")
    for tokens in (1, 2, 15, 16, 17, 31, 32, 33):
        assert torch.equal(run(WIDE, w_init, part(inputs, 0, tokens), "cuda")[0], whole[:, :tokens]), tokens


@emulated_only  # a real GPU runs as many blocks as fit
@pytest.mark.parametrize("resident", [1, 2, 5])
def test_a_step_that_commits_where_few_blocks_run_at_a_time(resident):
    """Blocks of a head that run late must still find the tokens that others have committed already."""
    config = CONFIGS[2]
    w_init, inputs = (cast(t, torch.bfloat16) for t in problem(config, 3, 16))
    _, end = run(config, w_init, inputs, "cuda")
    _, state = run(config, w_init, part(inputs, 0, 15), "cuda")
    emulate(80, 1, resident)
    assert same(run(config, w_init, part(inputs, 15, 16), "cuda", state=state)[1], end)


@pytest.mark.parametrize("config, capability, resident", [
    pytest.param(config, gpu, resident, marks=() if (gpu, resident) == (90, 9) else emulated_only)
    for config, gpu, resident in (
        (CONFIGS[0], 80, 9), (CONFIGS[0], 90, 2), (CONFIGS[2], 90, 9), (CONFIGS[2], 80, 9), (CONFIGS[4], 90, 9),
        (CONFIGS[4], 80, 9), (WARPGROUPS[1], 90, 9), (WARPGROUPS[1], 90, 2)
    )
])
def test_steps_in_place_count_what_they_read(config, capability, resident):
    """In one launch and in two, over a boundary and over 2^32 tokens, whatever the host believes; a row that
    reads nothing, and one told to read more than there is."""
    emulate(capability, 3, resident)
    C = config.chunk_memory
    w_init, inputs = (cast(t, torch.bfloat16) for t in problem(config, 3, C + 1))
    _, state = run(config, w_init, part(inputs, 0, C - 1), "cuda", [C - 1, C - 1, 2])
    lengths, far = torch.tensor([1, 9, -4], device=DEVICE), 2**32 - C
    wanted, want = [], state
    for t in (C - 1, C):
        o, want = run(config, w_init, part(inputs, t, t + 1), "cuda", [1, 1, 0], want)
        wanted.append(o)
    state.count += far
    with torch.no_grad():
        for t, o in zip((C - 1, C), wanted):
            token = config, w_init, part(inputs, t, t + 1), state, lengths
            assert torch.equal(titans_advance_(*token, backend="cuda"), o)
            titans_advance_(*token, update=False, backend="cuda")
    assert state.count.tolist() == [far + C + 1, far + C + 1, far + 2]
    state.count -= far
    state.synchronize()
    assert same(state, want)


def test_a_decoder_has_the_bits_of_the_model():
    """It advances the state where it lies, without a look at the host's counters: rows at different places,
    over a boundary of both."""
    torch.manual_seed(0)
    levels = CMSConfig(64, chunks=(16, 32), expansion=1.0)
    config = HopeConfig(32, 64, 2, titans=TitansConfig(64), cms=levels)
    model = HopeForCausalLM(config, DEVICE, torch.bfloat16)
    text = torch.randint(0, 32, (2, 18), device=DEVICE)
    with torch.no_grad():
        state = model.init_state(2)
        model(text[:, :15], state, lengths=[15, 14], backend="cuda")
        plain, places = state.clone(), [t.data_ptr() for t in state.tensors()]
        decoder = Decoder(model, state, "off", "cuda", capture=False)
        for t in range(15, 18):
            want, _ = model(text[:, t : t + 1], plain, backend="cuda")
            assert torch.equal(decoder.step(text[:, t : t + 1]), want), t
    assert all(map(same, state.mixers, plain.mixers)) and places == [t.data_ptr() for t in state.tensors()]
    assert list(state.pos) == list(state.synchronize().pos) == [18, 17]


@emulated_only
@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_order_of_threads_and_kind_of_gpu_are_not_in_the_bits(config):
    w_init, inputs = (cast(t, torch.bfloat16) for t in problem(config, 2, config.chunk_memory + 7))
    found = []
    for capability, seed in product([gpu for c, gpu in SERVED if c is config], (0, 7)):
        emulate(capability, seed)
        found.append(run(config, w_init, inputs, "cuda", [config.chunk_memory + 7, 5]))
    for o, state in found[1:]:
        assert torch.equal(o, found[0][0]) and same(state, found[0][1])


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


@pytest.mark.parametrize("capability", map(played, GPUS), ids=GPUS)
def test_what_is_served_is_what_the_library_says(capability):
    emulate(capability)
    if DEVICE == "cuda":
        little = torch.cuda.get_device_properties(0).shared_memory_per_block_optin < 1024 * SHARED_KIB[80]
    else:
        little = SHARED_KIB[capability] < SHARED_KIB[80]
    for D, mult, C in product((16, 32, 64, 96, 128, 256), (1, 2, 3, 4, 8), (1, 8, 16, 32, 48, 64, 128)):
        config = TitansConfig(D, hidden_mult=mult, chunk_memory=C, chunk_other=C)
        theirs = torch.ops.hope_kernels_cuda.unserved(D, mult * D, C, 0)
        ours = titans.unserved(config, torch.bfloat16, torch.device(DEVICE))
        fits = not little or (D, mult, C) not in TOO_MUCH_FOR_99_KB
        assert (ours is None) == (theirs == "") == (
            (D, mult) in titans.SHAPES and C in titans.CHUNKS and fits
        ), (D, mult, C, theirs)


def test_how_many_rows_and_heads_run_at_once():
    device = torch.device(DEVICE)
    found = {mult: library.at_once(64, 64 * mult, 64, device) for mult in (1, 2, 4)}
    assert found[1] >= 2 * found[2] >= 4 * found[4] > 0  # of 1, 2 and 4 blocks each
    with pytest.raises(RuntimeError, match="serves chunks of 16, 32 and 64 tokens"):
        library.at_once(64, 64, 48, device)
    if DEVICE == "cpu":
        assert found == {1: 9, 2: 4, 4: 2}  # of the emulator's nine blocks
        emulate(80, resident=12)  # blocks without clusters
        assert library.at_once(128, 256, 16, device) == 1


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
    # gradients are on, and no input requires one
    w_init, inputs = (cast(t, torch.bfloat16) for t in problem(WIDE, 1, 5))
    assert torch.equal(titans_chunk(WIDE, w_init, inputs, backend="cuda")[0], run(WIDE, w_init, inputs, "cuda")[0])
    with pytest.raises(ValueError, match="argument backend is 'chunked', expected 'triton' or 'cuda'"):
        titans_advance_(WIDE, w_init, inputs, init_titans_state(WIDE, w_init, 1, DEVICE, torch.bfloat16),
                        torch.tensor([5], device=DEVICE), backend="chunked")


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
def test_the_operator_refuses_settings_that_no_configuration_has(which, bad):
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
        name.replace("Tanh", "_tanh").lower(): int(n)
        for name, n in re.findall(r"k(GeluTanh|Gelu|Silu) = (\d)", text)
    }
    assert activations == titans.ACTIVATION_CODES
    plain = TitansConfig(
        64, own_values=False, target_norm=False, step_clip=False, dgd=False, retention=False, qk_l2norm=False
    )
    assert titans.flags(plain, False, False) == 0
    every = TitansConfig(64, objective="dot", eta_activation="softplus")
    assert titans.flags(every, True, True) == 2 ** len(bits) - 1


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
    request = Request(WIDE, x.dtype, x.device, BY_ALL)
    assert surroundings(request, "cuda") == surroundings(request, None if available_backends()["triton"] else "triton")


def test_no_environment_variable_loads_a_library(tmp_path):
    """A process that never called ``emulate`` looks at the installed library alone."""
    (tmp_path / "other.so").write_bytes(b"not a library")
    code = (
        "from hope_kernels.ops.shared import cuda_library as cuda; "
        "print(cuda.emulated(), 'other.so' in str(cuda.unavailable()))"
    )
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
