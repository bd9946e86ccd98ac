"""Programs of the memory's kernel that run at once, in any order: the bits of one program alone."""

import pytest
import torch
from problems import cast, problem, results, run

from hope_kernels import TitansConfig
from hope_kernels.ops import titans_chunk
from hope_kernels.ops.titans.triton import operator
from tools.ptx.machine import Options

CONFIGS = {
    "default": TitansConfig(32, 1),
    "two clocks": TitansConfig(
        32, 1, chunk_memory=16, chunk_other=32, target_norm=False, own_values=False, retention=False
    ),
    "momentum": TitansConfig.preset("titans", d_model=64, num_heads=2, chunk_memory=16, dgd=True),
    "adaptive_q": TitansConfig(32, 1, adaptive_q=True, scalar_skip=True, eta_scale=0.1),
    "everything": TitansConfig(32, 1, adaptive_q=True, momentum="learned", chunk_memory=32, chunk_other=16),
}


@pytest.mark.parametrize(
    "name, dtype, arch", [
        ("default", torch.bfloat16, 80), ("momentum", torch.bfloat16, 80), ("adaptive_q", torch.bfloat16, 80),
        ("default", torch.float32, 80), ("default", torch.bfloat16, 90),
        *(pytest.param(name, torch.bfloat16, 80, marks=pytest.mark.slow) for name in ("two clocks", "everything")),
    ]
)
def test_any_schedule_and_number_of_programs_has_the_same_bits(name, dtype, arch, device, monkeypatch):
    device.arch, config = arch, CONFIGS[name]
    w_init, inputs = (cast(t, dtype) for t in problem(config, 2, 53))

    def once(programs: int, **options):
        monkeypatch.setattr(operator, "_programs", lambda _: programs)
        device.options = Options(**options)
        return results(*run(config, w_init, inputs, "triton", [53, 18]))

    alone = once(1, seed=0)
    assert all(torch.isfinite(t).all() for t in alone.values())
    for programs, resident, seed in ((4, 4, 0), (3, 3, 5), (8, 8, 6), (8, 2, 7), (16, 16, 8)):
        together = once(programs, seed=seed, resident=resident)
        for part, t in together.items():
            assert torch.equal(t, alone[part]), (programs, resident, seed, part)


@pytest.mark.parametrize("name", ["default", "adaptive_q"])
def test_pure_reads_wait_chunk_by_chunk(name, device, monkeypatch):
    """Queries that a memory makes pass from one task to another, even where nothing is learned."""
    config = CONFIGS[name]
    w_init, inputs = (cast(t, torch.bfloat16) for t in problem(config, 2, 53))

    def once(programs: int, seed: int):
        monkeypatch.setattr(operator, "_programs", lambda _: programs)
        device.options = Options(seed=seed)
        with torch.no_grad():
            return titans_chunk(config, w_init, inputs, None, [53, 18], update=False, backend="triton")[0]

    alone = once(1, 0)
    assert all(torch.equal(once(programs, seed), alone) for programs, seed in ((4, 0), (6, 5), (8, 6)))


@pytest.mark.parametrize("arch", [80, 90])
def test_memories_that_are_carried_meet_under_any_schedule(arch, device):
    """Programs of a (row, head) wait for each other, those of others for a place: four are enough for all."""
    device.arch, config = arch, TitansConfig(128, 2)
    w_init, inputs = (cast(t, torch.bfloat16) for t in problem(config, 2, 53))

    def once(**options):
        device.options = Options(**options)
        return results(*run(config, w_init, inputs, "triton", [53, 18]))

    before = sum(n for launch, n in device.launches.items() if launch.kernel == "carry_kernel")
    alone = once(resident=4, seed=0)
    assert all(torch.isfinite(t).all() for t in alone.values())
    for resident, seed in ((4, 3), (5, 4), (7, 5), (16, 6)):
        together = once(resident=resident, seed=seed)
        for part, t in together.items():
            assert torch.equal(t, alone[part]), (resident, seed, part)
    assert sum(n for launch, n in device.launches.items() if launch.kernel == "carry_kernel") == before + 5
