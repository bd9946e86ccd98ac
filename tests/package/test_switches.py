"""The table of switches in docs/backends.md is what the backends say of themselves."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from hope_kernels import TitansConfig
from hope_kernels.backend import BY_ALL, NO_GRADIENT, Request
from hope_kernels.ops.shared import triton_library
from hope_kernels.ops.titans import cpp, cuda

TEXT = (Path(__file__).parents[2] / "docs" / "backends.md").read_text()
ROWS = re.findall(r"^\| (the default|`[^|]*=[^|]*`) \| (yes|no) \| (yes|no) \| (yes|no) \|$", TEXT, re.M)
OUTSIDE = {"d_model", "conv_window", "in_proj", "out_norm", "gate", "out_proj", "q_identity"}  # around the memories
NUMBERS = {"grad_scale", "eta_scale", "eta_bias", "alpha_bias"}  # and the sizes of what every kernel has


def config_of(row: str) -> TitansConfig:
    switches = {} if row == "the default" else eval(f"dict({row.strip('`')})")
    return TitansConfig(**{"d_model": 128, "num_heads": 2, **switches})


def served(reason: str | None) -> str:
    """Whether it serves the configuration, wherever that has to be."""
    return "no" if reason is not None and reason.startswith("serves") else "yes"


@pytest.mark.parametrize("row, in_cpp, in_triton, in_cuda", ROWS, ids=[r[0] for r in ROWS])
def test_what_the_table_says_is_so(row, in_cpp, in_triton, in_cuda):
    config, cpu, gpu = config_of(row), torch.device("cpu"), torch.device("cuda")
    for gradient in (NO_GRADIENT, BY_ALL):
        assert served(cpp.unserved(Request(config, torch.float32, cpu, gradient))) == in_cpp
    assert served(cuda.unserved(config, torch.bfloat16, gpu)) == in_cuda
    if triton_library.unavailable() is None:
        from hope_kernels.ops.titans.triton.operator import unserved

        assert served(unserved(config, torch.bfloat16, gpu)) == in_triton


def test_the_table_has_every_switch():
    named = set(re.findall(r"(\w+)=", " ".join(r[0] for r in ROWS)))
    assert named | OUTSIDE | NUMBERS >= {f.name for f in fields(TitansConfig)}
