"""The memory's CUDA C++ kernels as nvcc compiles them, run by the PTX machine: the contract of a backend for every
way a call can go, under random schedules. Races, addresses outside a tensor and deadlocks are errors there.

nvcc takes 7 to 35 s for one file of kernels and one architecture, so the quick cases keep to three of the eight;
the others are slow.
"""

from itertools import product

import cuda_in_ptx
import pytest
import torch
from contract import Accurate, Backend, Case, Streaming
from cuda_in_ptx import BF16, FP16, NAMES, config_of, image_of
from problems import cast, part, problem, run, same

from hope_kernels.ops import init_titans_state, titans_advance_
from hope_kernels.ops.shared.triton_build import SHARED_KIB
from hope_kernels.ops.titans import cuda as titans
from tools import build_cuda
from tools.ptx import cuda as ptx

GPUS = (80, 86, 90, 120)  # exchange through memory, with much shared memory and with little; clusters, likewise
QUICK = {(64, BF16, 80), (64, FP16, 90), (128, BF16, 90)}  # (width, type, architecture of the code)
gpu: ptx.Driver


@pytest.fixture(scope="module", autouse=True)
def driver():
    global gpu
    with cuda_in_ptx.driven() as gpu:
        yield


def emulate(*setting) -> None:
    cuda_in_ptx.emulate(gpu, *setting)


def marked(case: Case):
    """Slow unless its kernels are in one of the quick files."""
    width, (_, capability, *_) = case.config.head_dim, case.setting
    quick = (width, case.dtype, image_of(capability)) in QUICK
    return pytest.param(case, marks=() if quick else pytest.mark.slow)


def slow(case: Case):
    return pytest.param(case, marks=pytest.mark.slow)


WAYS = {  # (width, hidden_mult, chunk, capability) of each way that prefill can go
    "one block": (64, 1, 16, 80), "memory": (64, 4, 16, 80), "memory, weights off chip": (64, 1, 32, 86),
    "clusters": (64, 2, 16, 90), "clusters, weights off chip": (64, 2, 16, 120),
    "shards, memory": (128, 2, 16, 80), "shards, memory, weights off chip": (128, 2, 16, 86),
    "shards, clusters": (128, 2, 16, 90), "shards, clusters, weights off chip": (128, 2, 16, 120),
    "width 128": (128, 1, 16, 90), "width 128, memory": (128, 1, 16, 80),
    "width 128, weights off chip": (128, 1, 16, 86),
}
MEMORY, CLUSTERS, OFF_CHIP, SHARDS = (
    config_of(64, 4, retention=False, dgd=False), config_of(64, 2, heads=2),
    config_of(64, 1, 32, activation="silu", retain_to="zero"), config_of(128, 2),
)


def cases(dtype, of):
    """A case of each usual way."""
    served = {BF16: [(MEMORY, 80), (OFF_CHIP, 86), (SHARDS, 90)], FP16: [(CLUSTERS, 90)]}
    return [
        (marked if dtype in served and (config, capability) in served[dtype] else slow)(
            of(config, ("ptx", capability, seed), dtype)
        )
        for config, capability in [(MEMORY, 80), (OFF_CHIP, 86), (SHARDS, 90), (CLUSTERS, 90)] for seed in (1,)
    ]


def cut(config, setting, dtype):
    C = config.chunk_memory
    cuts = (0, 1, C + 1, 2 * C, 2 * C + 5)
    return Case(config, cuts[-1], (cuts[-1], C + 2), dtype=dtype, cuts=(cuts,), setting=setting)


def step(config, setting, dtype):
    return Case(config, config.chunk_memory + 3, rows=1, dtype=dtype, setting=setting)


def beside(config, setting, dtype):
    return Case(config, 20, (20, 9), dtype=dtype, setting=setting)


def read(config, setting, dtype):
    return Case(config, 39, (19, 3), dtype=dtype, setting=setting)


def whole(shape, chunk, capability, dtype):
    config = config_of(*shape, chunk)
    return Case(config, 47, (47, 30), dtype=dtype, correlation=0.5, setting=("ptx", capability, 2))


def fits(shape, chunk, capability) -> bool:
    """Whether shared memory suffices."""
    return SHARED_KIB[capability] > 99 or (chunk == 16 if shape == (128, 2) or shape == (128, 1) else
                                           chunk < 64 or shape == (64, 4))


SWITCHES = [
    {"own_values": False}, {"target_norm": False, "eta_scale": 0.05}, {"step_clip": False}, {"objective": "dot"},
    {"dgd": False}, {"retention": False}, {"retain_to": "zero"}, {"qk_l2norm": False, "eta_scale": 0.05},
    {"activation": "gelu"}, {"activation": "silu"}, {"eta_activation": "softplus", "eta_scale": 0.1},
]


def backend(dtype):
    return Backend(
        "cuda", dtype, cuts=cases(dtype, cut), steps=cases(dtype, step), neighbours=cases(dtype, beside)[:1],
        reads=cases(dtype, read), empty=MEMORY,
        yardstick=[
            *(marked(whole(shape, 16, capability, dtype)) for shape in titans.SHAPES for capability in GPUS),
            *(slow(whole(shape, chunk, capability, dtype)) for shape in titans.SHAPES for chunk in (32, 64)
              for capability in GPUS if fits(shape, chunk, capability)),
            *(marked(Case(config_of(64, 1, **change), 47, None, 1, dtype, 0.5, setting=("ptx", capability, 3)))
              for change in SWITCHES for capability in (80, 90)),
            *(slow(Case(config_of(128, 1, activation=name), 47, None, 1, dtype, 0.5, setting=("ptx", capability, 3)))
              for name in ("gelu", "silu") for capability in (80, 90)),
        ],
        keys=[marked(Case(CLUSTERS, 47, None, 2, dtype, share, setting=("ptx", 90, 1))) for share in (0.9, 1.0)],
        decays=[marked(Case(CLUSTERS, 47, None, 1, dtype, 0.5, alpha_bias=bias, setting=("ptx", 90, 1)))
                for bias in (-30.0, 30.0)],
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
    pytest.param(width, dtype, arch, marks=() if (width, dtype, arch) in QUICK else pytest.mark.slow)
    for width, dtype, arch in product((64, 128), (BF16, FP16), (80, 90))
])
def test_the_host_launches_what_nvcc_has_compiled(width, dtype, arch):
    """By the same names, and no others."""
    source = build_cuda.SOURCES / "titans" / f"{width}_{NAMES[dtype]}.cu"
    launched = [name for name in ptx.symbols(build_cuda.build_emulated()).values() if ptx.source_of(name) == source]
    assert sorted(launched) == sorted(ptx.names(build_cuda.ptx(source, arch).read_text()))
    assert len(launched) == 3 * (5 if width == 64 else 9)  # decode; prefill by exchange, room and shards


def ways():
    for name, (width, _, _, capability) in WAYS.items():
        for dtype in (BF16, FP16):
            quick = (width, dtype, image_of(capability)) in QUICK
            yield pytest.param(name, dtype, marks=() if quick else pytest.mark.slow, id=f"{name}, {NAMES[dtype]}")


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
    assert shards or any(f"titans_decode{template}" in name for name, _ in gpu.ran)


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


@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_decoding_with_other_activations(name):
    config = config_of(64, 1, activation=name)
    w_init, inputs = (cast(t, BF16) for t in problem(config, 1, 18))
    emulate(80, 1)
    whole, end = run(config, w_init, inputs, "cuda")
    o, state = run(config, w_init, part(inputs, 0, 17), "cuda")
    last, state = run(config, w_init, part(inputs, 17, 18), "cuda", state=state)
    assert torch.equal(torch.cat([o, last], 1), whole) and same(state, end)
