"""The NumPy token loop as a backend: what every backend promises of a call, to fp64's rounding."""

import pytest
import torch
from contract import Backend, Case, Streaming
from problems import problem

from hope_kernels import TitansConfig
from hope_kernels.ops import titans_chunk

CONFIGS = [
    TitansConfig(6, 2, chunk_memory=4, chunk_other=8, momentum="learned"),
    TitansConfig(4, 1, chunk_memory=4, chunk_other=2, adaptive_q=True, scalar_skip=True),
    TitansConfig(4, 1, memory="linear", retain_to="zero", self_modifying=False, own_values=False, chunk_memory=4,
        chunk_other=4),
]


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's, on tokens that are NaN
class TestContract(Streaming):
    backend = Backend(
        "reference", torch.float64, tolerance=1e-12,
        cuts=[Case(c, 17, (17, 9, 0), 3, cuts=((0, 1, 4, 10, 17), (0, 8, 17))) for c in CONFIGS],
        steps=[Case(c, 17) for c in CONFIGS],
        neighbours=[Case(c, 17, (17, 9)) for c in CONFIGS],
        reads=[Case(c, 17, (7, 3)) for c in CONFIGS],
        empty=CONFIGS[0],
    )


def test_has_no_gradient():
    w_init, inputs = problem(CONFIGS[0], 1, 3)
    with pytest.raises(ValueError, match="backend 'reference' has no gradient"):
        titans_chunk(CONFIGS[0], w_init, inputs._replace(x=inputs.x.requires_grad_()), backend="reference")
