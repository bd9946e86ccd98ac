"""Levels that the library refuses to read or to learn as part of a segment."""

import ctypes

import pytest
import torch
from native_learning import model_of
from native_model import ids

from hope_kernels.engine.native_level import LevelLowRank, LevelVectors
from hope_kernels.engine.native_segment import Reader
from hope_kernels.ops.cms.plan import RowInverse, RowStep
from hope_kernels.ops.shared import cpu_library

pytestmark = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"cpp: {cpu_library.unavailable()}")


def low_ranks_that_do_not_fit(level, gated: bool) -> list[LevelLowRank]:
    at = level.up  # any address
    fits = {"rank": 8, "across": at, "across_down": at, "up": at, "down": at, "gate": at if gated else None}
    wrong = [{"rank": r} for r in (-8, 4, 12, 24)]  # of 16 inputs
    wrong += [{n: None} for n in ("across", "across_down", "up", "down")] + [{"gate": None if gated else at}]
    return [LevelLowRank(**{**fits, **one}) for one in wrong]


@pytest.mark.parametrize("name", ["default", "swiglu, gd", "preconditioned"])
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
        "kind": (-1, 4, *((0, 3) if gated else (1, 2))), "N": (0, -8, 12, 2**62), "vectors": (LevelVectors(),),
        "low": low_ranks_that_do_not_fit(right[1], gated), "up": (None,),
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
    P, at = torch.eye(16), text.data_ptr()

    def learned(field, *inverse):
        rows = (RowInverse * 2)(RowInverse(*inverse))
        return outcomes(field, ctypes.addressof(rows))[2]

    assert learned("inverse", 1, 0.5, P.data_ptr(), None) == (0 if name == "preconditioned" else 2)
    for wrong in ((-1, 0.5, at, at), (4, 0.5, at, at), (1, 0.0, at, at), (1, 0.5, None, at), (2, 0.5, at, None)):
        assert learned("inverse", *wrong) == learned("inverse_down", *wrong) == 2, wrong
    without_a_sum = (RowStep * 2)(RowStep(weight=at))
    right[1].up_step = ctypes.addressof(without_a_sum)
    assert learned("inverse", 3, 0.5, P.data_ptr(), P.data_ptr()) == 2
