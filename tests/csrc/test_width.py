"""Products in vectors of sixteen numbers have the bits of products in vectors of eight."""

import platform

import pytest
import torch
from problems import problem, run, same, single

from hope_kernels import TitansConfig
from hope_kernels.ops.shared import cpu_library

pytestmark = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"cpp: {cpu_library.unavailable()}")

CONFIGS = {
    "chunks of 16": TitansConfig(64, 2), "chunks of 4": TitansConfig(16, 2, chunk_memory=4, chunk_other=4),
    "two clocks": TitansConfig(48, 2, chunk_memory=64, chunk_other=16, hidden_mult=2),
    "other rules": TitansConfig(40, 1, chunk_memory=32, chunk_other=32, target_norm=False, step_clip=False,
                                activation="silu", retain_to="zero"),
    "given keys": TitansConfig.preset("titans", d_model=32, num_heads=2, momentum=None),
}


@pytest.fixture
def width():
    ask = cpu_library.library().hope_cpu_width
    before = ask(0)
    yield ask
    ask(before)


def test_the_width_is_the_most_that_there_is_or_as_asked(width):
    most, narrow = width(0), 128 if platform.machine() in ("aarch64", "arm64") else 256
    assert most in (narrow, 512) and width(64) == most and width(narrow) == narrow and width(0) == narrow
    assert width(512) == most


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("threads", [1, 2])
def test_bits_are_those_of_any_width(config, threads, width):
    if width(0) != 512:
        pytest.skip("needs a CPU with AVX-512")
    w_init, inputs = map(single, problem(config, 2, 150))
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        for bits in (256, 512):
            assert width(bits) == bits
            found.append(run(config, w_init, inputs, "cpp"))
    finally:
        torch.set_num_threads(before)
    (o, state), (again, other) = found
    assert torch.equal(o, again) and same(state, other)
