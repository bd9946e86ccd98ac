"""The memory's CUDA C++ kernels as nvcc compiles them, run by the PTX machine: the contract of a backend for
every way a call can go, under random schedules. Races, addresses outside a tensor and deadlocks are errors
there.

nvcc takes 7 to 35 s for one file of kernels and one architecture, so the quick cases keep to three of the
eight; the others are slow.
"""

from itertools import product

import cuda_in_ptx
import pytest
import torch
from contract import Accurate, Backend, Case, Streaming
from cuda_in_ptx import BF16, FP16, NAMES, config_of, image_of
from problems import cast, part, problem, run, same

from hope_kernels.ops import RoundedWeights, init_titans_state, titans_advance_
from hope_kernels.ops.shared.triton_build import SHARED_KIB
from hope_kernels.ops.titans import cuda as titans
from tools import build_cuda
from tools.ptx import cuda as ptx
from tools.ptx.machine import Options

GPUS = (80, 86, 90, 120)  # exchange through memory, with much shared memory and little; clusters, likewise
QUICK = {(64, BF16, 80), (64, FP16, 90), (128, BF16, 90)}  # (width, type, architecture of the code)
gpu: ptx.Driver


@pytest.fixture(scope="module", autouse=True)
def driver():
    global gpu
    with cuda_in_ptx.driven() as gpu:
        yield


def emulate(*setting) -> None:
    cuda_in_ptx.emulate(gpu, *setting)


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


def quick(width: int, dtype: torch.dtype, capability: int) -> bool:
    return (width, dtype, image_of(capability)) in QUICK


def marked(case: Case):
    """Slow unless its kernels are in one of the quick files."""
    return case if quick(case.config.head_dim, case.dtype, case.setting[1]) else slow(case)


WAYS = {  # (width, hidden_mult, chunk, capability) of each way that prefill can go
    "one block": (64, 1, 16, 80), "memory": (64, 4, 16, 80), "memory, weights off chip": (64, 1, 32, 86),
    "clusters": (64, 2, 16, 90), "warpgroups": (64, 4, 64, 90), "warpgroups, one block": (64, 1, 64, 90),
    "clusters, weights off chip": (64, 2, 16, 120),
    "shards, memory": (128, 2, 16, 80), "shards, memory, weights off chip": (128, 2, 16, 86),
    "shards, clusters": (128, 2, 16, 90), "shards, clusters, weights off chip": (128, 2, 16, 120),
    "width 128": (128, 1, 16, 90), "width 128, memory": (128, 1, 16, 80),
    "width 128, weights off chip": (128, 1, 16, 86),
}
MEMORY, OFF_CHIP = (
    config_of(64, 4, retention=False, dgd=False), config_of(64, 1, 32, activation="silu", retain_to="zero")
)
SHARDS, CLUSTERS = config_of(128, 2), config_of(64, 2, heads=2)
STREAMED = [(MEMORY, 80, BF16), (OFF_CHIP, 86, BF16), (SHARDS, 90, BF16), (CLUSTERS, 90, FP16)]


def streamed(dtype: torch.dtype, of) -> list:
    """of(config, dtype, setting) for each of them; slow with another type than there."""
    made = [(of(config, dtype, ("ptx", capability, 1)), usual) for config, capability, usual in STREAMED]
    return [case if dtype == usual else slow(case) for case, usual in made]


def cut(config, dtype, setting) -> Case:
    C = config.chunk_memory
    cuts = (0, 1, C + 1, 2 * C, 2 * C + 5)
    return Case(config, cuts[-1], (cuts[-1], C + 2), dtype=dtype, cuts=(cuts,), setting=setting)


def step(config, dtype, setting) -> Case:
    return Case(config, config.chunk_memory + 3, rows=1, dtype=dtype, setting=setting)


def beside(config, dtype, setting) -> Case:
    tokens = config.chunk_memory + 4
    return Case(config, tokens, (tokens, 9), dtype=dtype, setting=setting)


def read(config, dtype, setting) -> Case:
    return Case(config, 39, (19, 3), dtype=dtype, setting=setting)


def whole(shape, chunk, capability, dtype) -> Case:
    """Little is forgotten (alpha_bias), so that what earlier chunks have written weighs in."""
    return Case(
        config_of(*shape, chunk), 2 * chunk + 15, (2 * chunk + 15, chunk + 14), 2, dtype, 0.5, alpha_bias=4.0,
        setting=("ptx", capability, 2)
    )


def switched(capability, dtype, width=64, **change) -> Case:
    return Case(config_of(width, 1, **change), 47, None, 1, dtype, 0.5, setting=("ptx", capability, 3))


def fits(shape, chunk, capability) -> bool:
    """Whether shared memory suffices."""
    most = 32 if shape in ((64, 1), (64, 2)) else 64 if shape == (64, 4) else 16
    return SHARED_KIB[capability] > 99 or chunk <= most


SWITCHES = [
    {"own_values": False}, {"target_norm": False, "eta_scale": 0.05}, {"step_clip": False},
    {"objective": "dot"}, {"dgd": False}, {"retention": False}, {"retain_to": "zero"},
    {"qk_l2norm": False, "eta_scale": 0.05}, {"eta_activation": "softplus", "eta_scale": 0.1},
]
ACTIVATIONS = [{"activation": "gelu"}, {"activation": "silu"}]


def backend(dtype: torch.dtype) -> Backend:
    clusters = lambda **what: marked(Case(CLUSTERS, 47, dtype=dtype, setting=("ptx", 90, 1), **what))
    return Backend(
        "cuda", dtype, cuts=streamed(dtype, cut), steps=streamed(dtype, step), reads=streamed(dtype, read),
        neighbours=streamed(dtype, beside), empty=MEMORY,
        yardstick=[
            *(marked(whole(shape, 16, capability, dtype)) for shape in titans.SHAPES for capability in GPUS),
            *(slow(whole(shape, chunk, capability, dtype)) for shape in titans.SHAPES for chunk in (32, 64)
              for capability in GPUS if fits(shape, chunk, capability)),
            *(marked(switched(90, dtype, **change)) for change in SWITCHES),
            *(slow(switched(80, dtype, **change)) for change in SWITCHES),
            *(marked(switched(gpu, dtype, **change)) for change in ACTIVATIONS for gpu in (80, 90)),
            *(slow(switched(gpu, dtype, 128, **change)) for change in ACTIVATIONS for gpu in (80, 90)),
        ],
        keys=[clusters(correlation=share) for share in (0.9, 1.0)],
        decays=[clusters(correlation=0.5, alpha_bias=bias) for bias in (-30.0, 30.0)],
    )


class Kept(Accurate, Streaming):
    @pytest.fixture(autouse=True)
    def usual_gpu(self):
        emulate(80 if self.backend.dtype == BF16 else 90)

    def prepare(self, case):
        if case.setting:
            emulate(*case.setting[1:])


class TestBf16(Kept):
    backend = backend(BF16)


class TestFp16(Kept):
    backend = backend(FP16)


@pytest.mark.parametrize("width, dtype, arch", [
    pytest.param(width, dtype, arch, marks=() if quick(width, dtype, arch) else pytest.mark.slow)
    for width, dtype, arch in product((64, 128), (BF16, FP16), (80, 90))
])
def test_the_host_launches_what_nvcc_has_compiled(width, dtype, arch):
    """By the same names, and no others."""
    of_host = ptx.symbols(build_cuda.build_emulated()).values()
    source = build_cuda.SOURCES / "titans" / f"{width}_{NAMES[dtype]}.cu"
    launched = [name for name in of_host if ptx.source_of(name) == source]
    assert sorted(launched) == sorted(ptx.names(build_cuda.ptx(source, arch).read_text()))
    # decode; steps by exchange and room, prefill also by shards
    assert len(launched) == 3 * (9 if width == 64 else 13)


def test_commits_by_warpgroups_have_a_file_of_their_own():
    source = build_cuda.SOURCES / "titans" / "64_bf16_warpgroups.cu"
    launched = [n for n in ptx.symbols(build_cuda.build_emulated()).values() if ptx.source_of(n) == source]
    assert sorted(launched) == sorted(ptx.names(build_cuda.ptx(source, 90).read_text()))
    assert len(launched) == 2 * 2 * 2  # prefill and step of two activations, with a memory a block or all in one


def ran() -> set[str]:
    """Which kernels."""
    return {ptx.SYMBOL.fullmatch(name)[1].removeprefix("titans_") for name, _ in gpu.ran}


def swift(way: str, width: int, dtype: torch.dtype, capability: int) -> bool:
    return quick(width, dtype, capability) or (way.startswith("warpgroups") and dtype == BF16)


def ways():
    for name, (width, _, _, capability) in WAYS.items():
        for dtype in (BF16, FP16):
            marks = () if swift(name, width, dtype, capability) else pytest.mark.slow
            yield pytest.param(name, dtype, marks=marks, id=f"{name}, {NAMES[dtype]}")


@pytest.mark.parametrize("way, dtype", ways())
def test_the_same_bits_whatever_the_schedule_and_the_parts(way, dtype):
    """Of every way that a call can go; each is gone by the kernels meant for it."""
    width, mult, chunk, capability = WAYS[way]
    config, T = config_of(width, mult, chunk), chunk + 5
    w_init, inputs = (cast(t, dtype) for t in problem(config, 3, T))
    emulate(capability)
    gpu.ran.clear()
    o, end = run(config, w_init, inputs, "cuda", [T, T, 3])
    for seed, resident in ((1, 9), (2, 11), (3, 24)):
        emulate(capability, seed, resident)
        again, state = run(config, w_init, inputs, "cuda", [T, T, 3])
        assert torch.equal(again, o) and same(state, end), (seed, resident)
    mode = "Li0E" if image_of(capability) >= 90 else "Li1E"
    if way.startswith("warpgroups") and dtype == BF16:
        mode = "Li3E" if mult == 1 else "Li2E"
    on_chip, shards = "off chip" not in way, "shards" in way
    template = f"ILi{width}ENS_4{NAMES[dtype]}ELi0E"
    prefill = f"titans_prefill{template}{mode}Lb{on_chip:d}ELb{shards:d}EE"
    assert [name for name, _ in gpu.ran if prefill in name] == [name for name, _ in gpu.ran]
    emulate(capability, 4)
    first, state = run(config, w_init, part(inputs, 0, chunk - 1), "cuda", [chunk - 1, chunk - 1, 3])
    outputs = [first]
    for t in range(chunk - 1, T):  # a step that commits, and steps that do not
        step_o, state = run(config, w_init, part(inputs, t, t + 1), "cuda", [1, 1, 0], state)
        outputs.append(step_o)
    assert torch.equal(torch.cat(outputs, 1), o) and same(state, end)
    # blocks of a head meet in a cluster, or there is one
    one = mode != "Li1E" or mult * width * width == 4096
    assert ran() == ({"prefill"} if shards else {"prefill", "step"} | (set() if one else {"decode"}))


def compared():
    for name, (width, mult, chunk, capability) in WAYS.items():
        for dtype, activation in product((BF16, FP16), ("gelu_tanh", "gelu", "silu")):
            usual = activation == "gelu_tanh"
            if width == 64 or usual:
                yield pytest.param(
                    config_of(width, mult, chunk, 2, activation=activation), capability, dtype,
                    marks=() if usual and swift(name, width, dtype, capability) else pytest.mark.slow,
                    id=f"{name}, {NAMES[dtype]}, {activation}"
                )


@pytest.mark.parametrize("config, capability, dtype", compared())
def test_compiled_code_has_the_bits_of_its_source(config, capability, dtype):
    """The fibers of csrc/emulator run the C++ text itself: every rounding is where the text has it, of fp32
    and of 16 bits. Both machines have the same tanh.approx, ex2.approx, sqrt.approx and div.approx, and add
    the products of an mma in the same order; a device may have others."""
    T = 2 * config.chunk_memory + 7
    w_init, inputs = (cast(t, dtype) for t in problem(config, 2, T, 0.5))
    emulate(capability, 1)
    o, state = run(config, w_init, inputs, "cuda", [T, 9])
    with gpu.fibers():
        want, end = run(config, w_init, inputs, "cuda", [T, 9])
    assert torch.equal(o, want) and same(state, end)


@pytest.mark.parametrize("resident", [1, 2, 5])
def test_a_step_that_commits_where_few_blocks_run_at_a_time(resident):
    """Blocks of a head that run late must still find the tokens that others have committed already."""
    w_init, inputs = (cast(t, BF16) for t in problem(MEMORY, 3, 16))
    emulate(80)
    _, end = run(MEMORY, w_init, inputs, "cuda")
    _, state = run(MEMORY, w_init, part(inputs, 0, 15), "cuda")
    emulate(80, 1, resident)
    assert same(run(MEMORY, w_init, part(inputs, 15, 16), "cuda", state=state)[1], end)


def test_in_place_by_what_the_device_knows_and_with_lengths_out_of_range():
    emulate(80, 5)
    w_init, inputs = (cast(t, BF16) for t in problem(MEMORY, 2, 21))
    want, end = run(MEMORY, w_init, inputs, "cuda", [21, 6])
    state = init_titans_state(MEMORY, w_init, 2, "cpu", BF16)
    state.pos[:] = [-7, 1000]  # of the host, which nobody asks
    with torch.no_grad():
        o = titans_advance_(MEMORY, w_init, inputs, state, torch.tensor([99, 6]), backend="cuda")
        assert torch.equal(o, want) and same(state.synchronize(), end)
        titans_advance_(MEMORY, w_init, inputs, state, torch.tensor([-3, 0]), backend="cuda")
    assert same(state.synchronize(), end)


@pytest.mark.parametrize("config, capability, dtype, multiprocessors, kernels", [
    (MEMORY, 80, BF16, 9, {"decode", "step"}), (config_of(64, 1), 80, BF16, 9, {"step"}),
    (CLUSTERS, 90, FP16, 9, {"step"}), (CLUSTERS, 90, FP16, 7, {"decode", "step"}),
    *(pytest.param(*case, {"decode", "step"}, marks=pytest.mark.slow) for case in (
        (config_of(64, 2), 120, FP16, 1), (config_of(64, 1, 64), 90, BF16, 1)
    ))
])
def test_steps_count_what_they_read(config, capability, dtype, multiprocessors, kernels):
    """The last block of a row to know where it stands advances the counter, in the last launch of a call. The
    middle step commits, and a row reads nothing."""
    C = config.chunk_memory
    w_init, inputs = (cast(t, dtype) for t in problem(config, 2, C + 1))
    emulate(capability)
    want, end = run(config, w_init, inputs, "cuda", [C + 1, C - 2])
    _, state = run(config, w_init, part(inputs, 0, C - 2), "cuda")
    image, shared = image_of(capability), 1024 * SHARED_KIB[capability]
    torch.ops.hope_kernels_cuda.emulate(capability, shared, image, 0, multiprocessors, True)
    for t in (C - 2, C - 1, C):
        gpu.options, lengths = Options(seed=t, resident=5), torch.tensor([3, 0])
        gpu.ran.clear()
        with torch.no_grad():
            o = titans_advance_(config, w_init, part(inputs, t, t + 1), state, lengths, backend="cuda")
        assert torch.equal(o, want[:, t : t + 1]) and state.count.tolist() == [t + 1, C - 2]
        assert ran() == kernels
    assert same(state.synchronize(), end)


@pytest.mark.parametrize("config, capability, dtype", [
    (MEMORY, 80, BF16), (CLUSTERS, 90, FP16), (config_of(128, 1), 90, BF16),
    *(pytest.param(config_of(64, mult, 64), 90, dtype, marks=pytest.mark.slow)
      for mult in (1, 4) for dtype in (BF16, FP16)),
    pytest.param(OFF_CHIP, 120, BF16, marks=pytest.mark.slow),
    pytest.param(config_of(128, 1), 80, FP16, marks=pytest.mark.slow)
])
def test_tokens_that_read_rounded_weights(config, capability, dtype):
    """One makes the copy and others read it, before a boundary and after it; one row has nothing to read at times.
    A pure read reads the copy too."""
    C = config.chunk_memory
    w_init, inputs = (cast(t, dtype) for t in problem(config, 2, C + 2, 0.5))
    emulate(capability, 1)
    want, end = run(config, w_init, inputs, "cuda", [C + 2, C + 1])
    _, state = run(config, w_init, part(inputs, 0, C - 2), "cuda")
    rounded = RoundedWeights(config, w_init, state)
    for t in range(C - 2, C + 2):
        gpu.options, lengths = Options(seed=t, resident=5), torch.tensor([1, int(t <= C)])
        given = config, w_init, part(inputs, t, t + 1), state, lengths
        with torch.no_grad():
            read = titans_advance_(*given, update=False, backend="cuda")
            assert torch.equal(titans_advance_(*given, update=False, backend="cuda", rounded=rounded), read)
            o = titans_advance_(*given, backend="cuda", rounded=rounded)
        assert torch.equal(o[0], want[0, t : t + 1]) and (t > C or torch.equal(o[1], want[1, t : t + 1]))
    assert same(state.synchronize(), end)


@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_decoding_with_other_activations(name):
    config = config_of(64, 1, activation=name)
    w_init, inputs = (cast(t, BF16) for t in problem(config, 1, 18))
    emulate(80, 1)
    whole, end = run(config, w_init, inputs, "cuda")
    o, state = run(config, w_init, part(inputs, 0, 17), "cuda")
    last, state = run(config, w_init, part(inputs, 17, 18), "cuda", state=state)
    assert torch.equal(torch.cat([o, last], 1), whole) and same(state, end)
