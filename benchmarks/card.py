"""What a run of benchmarks.gpu on a card is made of: the chosen tests, the cases of ``plan``, the limits.

Tests are chosen so that a few processes are through in a minute or two: every shape and type that the kernels
serve against the yardstick, what a real GPU alone has (CUDA graphs, streams, runs that must repeat bit for
bit), and of the contract one case a property. ``python -m pytest -m gpu`` has the rest.
"""

from __future__ import annotations

import torch

from benchmarks.device import slug
from benchmarks.plan import parts
from benchmarks.script import Script

CUDA, TRITON = "tests/ops/titans/test_cuda.py", "tests/ops/titans/test_triton.py"
BACKWARD, CONTRACT = "tests/ops/titans/test_triton_backward.py", "TestContract"


def of(file: str, group: str, *names: str) -> tuple[str, ...]:
    return tuple("::".join(filter(None, (file, group, name))) for name in names)


def yardstick(file: str, *cases: str) -> tuple[str, ...]:
    return of(file, CONTRACT, *(f"test_meets_the_yardstick[{case}]" for case in cases))


SANITIZED = f"{CUDA}::test_small_enough_for_a_sanitizer"
CUDA_TESTS = (
    SANITIZED, f"{CUDA}::test_how_many_rows_and_heads_run_at_once",
    # widths 64 (three N) and 128 (two N), full chunks and a part
    *yardstick(CUDA, *(f"d128-C{C}-T{4 * C + 5}-bfloat16_{i}" for C in (64, 16, 32) for i in range(3))),
    *yardstick(CUDA, *(f"d256-C{C}-T{4 * C + 5}-bfloat16_{i}" for C in (64, 16, 32) for i in range(2))),
    *yardstick(CUDA, "d2048-C64-T1100_0", "d2048-C64-T1100_1", "d2048-C16-T1100_1"),
    *yardstick(CUDA, *(f"d128-C64-T261-float16_{i}" for i in range(3)), "d256-C64-T261-float16_0"),
    # dot, no retention, retained to zero, silu, the paper's preset
    *yardstick(CUDA, *(f"d64-C16-T47-float16_{i}" for i in (4, 7, 8, 11, 13))),
    *of(CUDA, CONTRACT,
        "test_one_cuda_graph_replayed_for_every_token[d128-C64-T70]",
        "test_one_cuda_graph_replayed_for_every_token[d64-C16-T70]",
        "test_the_same_bits_from_run_to_run[d512-C16-T500]",
        "test_however_a_call_is_cut[d128-C64-T69-80-1]", "test_however_a_call_is_cut[d64-C32-T69-90-1]",
        "test_token_by_token[d128-C64-T67-80]", "test_token_by_token[d128-C16-T19-90_1]",
        "test_a_nan_stays_in_its_row_and_head[d128-C16-T20]",
        "test_in_place_without_the_host[d128-C16-T21-ragged]",
        "test_correlated_and_repeated_keys[d128-C16-T47-float16-90-1_2]"),
    f"{CUDA}::test_two_streams_at_once", f"{CUDA}::test_tensors_may_lie_anywhere",
)
TRITON_TESTS = (
    # bf16 first: the interpreter cannot multiply it
    *yardstick(TRITON, "d128-C64-T261-bfloat16_2", "d128-C16-T69-bfloat16_0", "d128-C64-T261-bfloat16_0",
               "d128-C16-T69-bfloat16_2", "d256-C64-T261-bfloat16_2", "d256-C16-T69-bfloat16_0",
               "d512-C64-T1100-bfloat16_3", "d512-C16-T1100-bfloat16_1"),
    *of(BACKWARD, "", "test_full_sizes[64-4-64-dtype2]", "test_full_sizes[64-1-16-dtype2]"),
    *of(TRITON, CONTRACT, "test_the_same_bits_from_run_to_run[d512-C16-T500-bfloat16]"),
    *yardstick("tests/ops/titans/test_triton_momentum.py", "d512-C64-T1100-bfloat16_0"),
    *of("tests/ops/cms/test_triton_refresh.py", "", "test_refresh[5-True-False-dtype2]",
        "test_refresh[None-True-False-dtype2]", "test_outer_add[dtype2]"),
    *of("tests/ops/cms/test_triton.py", "", "test_values_and_factors[swiglu-True-(True, True, True)-5-17-dtype23]"),
    *of("tests/ops/conv/test_conv.py", "", "test_values[37-130-4-dtype2]"),
    *of("tests/ops/output_gate/test_output_gate.py", "", "test_values[5-3-64-dtype2]"),
    # fp32 from here on
    *of(TRITON, CONTRACT,
        "test_one_cuda_graph_replayed_for_every_token[d32-C16-T70_0]",
        "test_in_place_without_the_host[d32-C16-T21-ragged]",
        "test_however_a_call_is_cut[d64-C32-T37]", "test_a_nan_stays_in_its_row_and_head[d32-C16-T20]"),
    *of(BACKWARD, "", "test_a_captured_training_step_has_the_same_gradients"),
    "tests/ops/titans/test_triton_span_graphs.py::test_cuda_graphs_of_spans",
    "tests/layers/test_titans_triton.py::test_a_captured_decode_step_of_a_layer_goes_on_over_boundaries[16]",
    "tests/engine/test_decoder.py::test_captured_decoding_has_the_bits_of_the_model[16-next_token]",
    *of("tests/engine/test_segment_graphs.py", "",
        "test_captured_segments_have_the_bits_of_the_model[triton-False]",
        "test_captured_segments_have_the_bits_of_the_model[chunked-True]"),
)


def capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


SCRIPT = Script(
    device="cuda", folder=lambda: slug("cuda"), parts=lambda quick: parts("cuda", quick),
    tests={"cuda": CUDA_TESTS, "triton": TRITON_TESTS}, sanitized=SANITIZED, capability=capability,
)
