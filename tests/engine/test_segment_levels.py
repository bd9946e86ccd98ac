"""Levels that the library refuses to read or to learn as part of a segment."""

import ctypes

import pytest
import torch
from native_learning import model_of
from native_model import ids

from hope_kernels.engine.native_level import LevelVectors
from hope_kernels.engine.native_segment import Reader
from hope_kernels.ops.cms.plan import RowStep
from hope_kernels.ops.shared import cpu_library

pytestmark = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"cpp: {cpu_library.unavailable()}")


@pytest.mark.parametrize("name", ["default", "swiglu, gd"])
@torch.no_grad()
def test_the_library_refuses_levels_that_do_not_fit(name):
    model, text = model_of(name), ids(2, 4)
    state = model.init_state(2)
    reading, _ = Reader(model, None).read(state, state.mixers, text, [4, 4], None, keep=True)
    call, library = reading.call, cpu_library.library()
    steps, marks = (RowStep * 2)(), (ctypes.c_int32 * 2)(1, 1)  # which change nothing
    call.learns = ctypes.addressof(marks)
    right = reading._levels[1]
    for level in (*reading._levels[0], *right):
        level.up_step = level.gate_step = level.down_step = ctypes.addressof(steps)
    assert library.hope_segment_learn(ctypes.byref(call)) == 0

    def outcomes(field, value):
        blocks, levels = type(reading._blocks).from_buffer_copy(reading._blocks), type(right).from_buffer_copy(right)
        wrong = type(call).from_buffer_copy(call)
        wrong.block, blocks[1].level = ctypes.addressof(blocks), ctypes.addressof(levels)
        setattr(levels[1], field, value)
        return [getattr(library, f"hope_segment_{n}")(ctypes.byref(wrong)) for n in ("read", "head", "learn")]

    gated, empty = right[1].kind != 0, (ctypes.c_void_p * 2)()
    for field, values in {
        "kind": (-1, 3, 0 if gated else 1), "N": (0, -8, 12, 2**62), "vectors": (LevelVectors(),), "up": (None,),
        "down": (None,),
        "gate": (None,) if gated else (right[1].up,),
    }.items():
        for value in values:
            assert outcomes(field, value) == [2, 2, 2], (field, value)
    for field in ("up", "down", *(["gate"] if gated else [])):
        assert outcomes(field, ctypes.addressof(empty)) == [2, 2, 2], field
        assert outcomes(f"{field}_step", None)[2] == 2, field
    bad = (RowStep * 2)(RowStep(rule=3, weight=text.data_ptr()))
    assert outcomes("gate_step", ctypes.addressof(bad))[2] == (2 if gated else 0)
