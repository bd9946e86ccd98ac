"""The host emulator under the CUDA kernels (csrc/emulator): its arithmetic against NumPy and PyTorch, and
that it reports what a GPU would hang on or answer with garbage, whatever the order in which threads run. The
kernels are in emulator/cases.cpp."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
COMPILER = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
SEEDS = [0, 1, 2]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("emulator") / "cases"
    source, include = HERE / "cases.cpp", HERE.parents[1] / "csrc"
    subprocess.run(
        [COMPILER, "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{include}", source, "-o", path],
        check=True
    )
    return path


def execute(program, name, seed=0, resident=8, data=b""):
    return subprocess.run([program, name, str(seed), str(resident)], input=data, capture_output=True, timeout=60)


def result(program, name, data=b"", dtype=np.uint32, seed=0, resident=8):
    run = execute(program, name, seed, resident, data)
    assert run.returncode == 0, run.stderr.decode()
    return np.frombuffer(run.stdout, dtype)


def numbers_of(bits, kind):
    """uint16 patterns as fp32 values."""
    if kind == "fp16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bits_of(values, kind):
    """fp32 values rounded to uint16 patterns by NumPy or PyTorch."""
    if kind == "fp16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_mma_sums_exact_products_in_order_of_k(program, kind):
    rng = np.random.default_rng(0)
    a, b = (
        bits_of((rng.standard_normal(s) * 4.0 ** rng.integers(-3, 3, s)).astype(np.float32), kind)
        for s in [(16, 16), (16, 8)]
    )
    c = rng.standard_normal((16, 8)).astype(np.float32)
    found = result(program, f"mma_{kind}", a.tobytes() + b.tobytes() + c.tobytes(), np.float32).reshape(16, 8)
    x, y = numbers_of(a, kind), numbers_of(b, kind)
    for k in range(16):
        c = c + x[:, k : k + 1] * y[k]
    assert np.array_equal(found, c)


@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrices(program, transposed):
    rows = np.random.default_rng(1).integers(0, 2**16, (4, 8, 8), np.uint16)
    found = result(
        program, "load_matrices" + "_transposed" * transposed, rows.tobytes(), np.uint16
    ).reshape(32, 4, 2)
    matrices = rows.transpose(0, 2, 1) if transposed else rows
    for lane in range(32):
        columns = 2 * (lane % 4)
        assert np.array_equal(found[lane], matrices[:, lane // 4, columns : columns + 2])


def test_transpose8x8(program):
    matrix = np.random.default_rng(2).integers(0, 2**16, (8, 8), np.uint16)
    assert np.array_equal(result(program, "transpose8x8", matrix.tobytes(), np.uint16).reshape(8, 8), matrix.T)


def test_store_matrices(program):
    rows = np.random.default_rng(2).integers(0, 2**16, (32, 8), np.uint16)
    assert np.array_equal(result(program, "store_matrices", rows.tobytes(), np.uint16).reshape(32, 8), rows)


@pytest.mark.parametrize("form", [
    "rows_rows_64", "columns_columns_64", "registers_rows_64", "registers_columns_64", "columns_columns_32",
    "rows_columns_32"
])
def test_products_of_warpgroups_sum_in_order_of_k(program, form):
    """Whichever way a and b lie in shared memory."""
    rng, n = np.random.default_rng(4), int(form[-2:])
    a, b = (
        bits_of((rng.standard_normal(s) * 4.0 ** rng.integers(-3, 3, s)).astype(np.float32), "bf16")
        for s in [(64, 16), (n, 16)]
    )
    c = rng.standard_normal((64, n)).astype(np.float32)
    found = result(program, f"warpgroup_{form}", a.tobytes() + b.tobytes() + c.tobytes(), np.float32, seed=1)
    x, y = numbers_of(a, "bf16"), numbers_of(b, "bf16")
    for k in range(16):
        c = c + x[:, k : k + 1] * y[:, k]
    assert np.array_equal(found.reshape(64, n), c)


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_conversions(program, kind):
    every = np.arange(2**16, dtype=np.uint16)
    values = result(program, f"unpack_{kind}", every.tobytes(), np.float32)
    assert np.array_equal(values, numbers_of(every, kind), equal_nan=True)
    assert np.array_equal(np.signbit(values), every >= 2**15)

    # Random patterns of fp32; every 16-bit number, half way to the next one, and the neighbours of that.
    finite = np.sort(values[np.isfinite(values)]).astype(np.float64)
    half = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    top = np.float32([65504, 65519.996, 65520, 65536, 3.3895314e38, 3.3961775e38, 3.4028235e38, np.inf, np.nan])
    random = np.random.default_rng(3).integers(0, 2**32, 200_000, np.uint32).view(np.float32)
    near = [half, np.nextafter(half, np.float32(np.inf)), np.nextafter(half, np.float32(-np.inf))]
    many = np.concatenate([values, *near, top, -top, random])
    many = many[: len(many) // 2 * 2]
    found = result(program, f"pack_{kind}", many.tobytes(), np.uint16)
    nan = np.isnan(many)
    assert np.array_equal(found[~nan], bits_of(many, kind)[~nan])
    assert (found[nan] == 0x7FFF).all()


def test_every_order_gives_the_same(program):
    data = np.random.default_rng(4).integers(0, 2**32, (8, 256), np.uint32)
    data &= 0xBFFFBFFF  # bf16 below 2 in size
    first = result(program, "exchange", data.tobytes())
    assert first.size == 512 and len(np.unique(first)) > 100
    for seed in range(1, 7):
        assert np.array_equal(
            result(program, "exchange", data.tobytes(), seed=seed, resident=[2, 4, 16][seed % 3]), first
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_right_is_not_reported(program, seed):
    for name in [
        "neighbour", "overwrite", "lanes", "matrix_rows", "halves", "half_words", "cluster", "flag", "copy",
        "copy_for_others"
    ]:
        result(program, name, seed=seed)


LANE = r"block 0 warp 0 lane \d+"
ERRORS = {
    "neighbour_race": r"race on byte \d+ of the shared memory of block \d: "
                      r"load_shared by block \d warp \d lane \d+ at .*cases.cpp:\d+ "
                      r"and write by block \d warp \d lane \d+ at .*cases.cpp:\d+"
                      r"|race .*: store_shared by .* and read by block \d warp \d",
    "overwrite_race": rf"race on byte 0 .*: (store_shared by block 0 warp 1 lane 8 .* and read by {LANE}"
                      rf"|load_shared by {LANE} .* and write by block 0 warp 1 lane 8)",
    "lanes_race": rf"race on byte \d+ .*: load_shared by {LANE} .* and write by {LANE}",
    "matrix_rows_race": r"race on byte \d+ .*: (load_matrices .* and write|store_shared .* and read) "
                        rf"by {LANE}",
    "halves_race": r"race on byte \d+ ",
    "counts": r"sync_some\(3, \d+\) .* but block 0 warp \d waits at the same barrier for \d+ threads",
    "same_value": r"race on byte 0 .*: store_shared .* and write",
    "cluster_too_early": r"store_remote .* before a cluster barrier",
    "cluster_race": r"race on byte \d+ .*(store_remote|load_shared) by block",
    "cluster_relaxed_race": r"race on byte \d+ .*load_shared by block",
    "early_end": r"block 1 ends without a barrier after a store_remote to it by block 0 warp 0 lane"
                 r"|to block 1, which has ended",
    "deadlock": r"deadlock(.|\n)*block 0 warp 0 at sync_block .*2 of 3 warps"
                r"(.|\n)*block 0 warp 2 at sync_some .*1 of 3 warps",
    "divergent": r"other lanes of its warp wait at",
    "lane_ends": r"block 0 warp 0 lane 3: ends while other lanes of its warp wait at sync_warp"
                 r"|1 lanes of its warp have ended",
    "forever": r"deadlock: every thread that can run pauses(.|\n)*block 0 warp 0 lane 0 pauses at .*cases.cpp",
    "flag_race": r"race on byte 0 ",
    "copy_race": r"load_shared by block 0 warp 0 lane 0 .* and asynchronous copy not waited for "
                 r"by block 0 warp 0 lane 0",
    "copy_race_of_others": r"load_shared by .* and asynchronous copy not waited for by block 0 warp 0 lane 0",
    "load_outside": r"load_shared of 4 bytes at byte 128 of the block's 128 bytes",
    "load_before": r"load_shared of 4 bytes at byte -4 of",
    "load_elsewhere": r"load_shared of 4 bytes at byte",
    "load_across": r"load_shared of 16 bytes at byte 120 of",
    "load_misaligned": r"load_shared of 8 bytes at byte 4 .* misaligned",
    "store_outside": r"store_shared of 4 bytes at byte 128 of",
    "matrices_outside": r"load_matrices of 16 bytes at byte \d+ of the block's 128 bytes",
    "matrices_misaligned": r"load_matrices of 16 bytes at byte 4 .* misaligned",
    "copy_outside": r"copy_async4 of 4 bytes at byte 128 of",
    "remote_outside": r"store_remote of 4 bytes at byte 128 of",
    "remote_nowhere": r"store_remote to block 2 of a cluster of 2",
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_is_wrong_is_reported(program, name):
    for seed in SEEDS:
        run = execute(program, name, seed)
        assert run.returncode == 1, run.returncode
        assert re.search(ERRORS[name], run.stderr.decode()), run.stderr.decode()


def random_program(rng, warps=3, steps=16):
    """Steps [warps, steps] of (kind, lane, byte, bytes) as cases.cpp reads them, and whether two accesses of
    one byte, one of them a store, are ordered by nothing: by a vector clock for each of the threads, kept in
    full."""
    program = np.zeros((warps, steps, 4), np.uint32)
    used = [0] * warps
    clocks = np.eye(32 * warps, dtype=np.int64)  # what each thread knows of each
    accesses, race = [], False
    weights = rng.dirichlet([2, 0.7, 2, 0.5, 0.5])
    while max(used) < steps:
        kind, warp = rng.choice(5, p=weights), rng.integers(warps)
        if kind < 2:
            lane, size = rng.integers(3), 2 ** rng.integers(1, 4)
            start = size * rng.integers(8 // size)
            thread, among, step = 32 * warp + lane, [warp], (kind, lane, start, size)
            for other, stamp, store, first, last in accesses:
                overlap = first < start + size and start < last
                race |= overlap and (kind == 1 or store) and other != thread and clocks[thread, other] < stamp
            accesses.append((thread, clocks[thread, thread], kind == 1, start, start + size))
        else:
            absent = rng.integers(3)
            among = {2: [warp], 3: range(warps), 4: [w for w in range(warps) if w != absent]}[kind]
            step = (kind + (1 + absent if kind == 4 else 0), 0, 0, 0)
            threads = np.concatenate([np.arange(32 * w, 32 * w + 32) for w in among])
            clocks[threads] = clocks[threads].max(0)
            clocks[threads, threads] += 1
        for w in among:
            program[w, used[w]] = step
            used[w] += 1
    return program, race


def test_races_are_those_of_full_vector_clocks(program):
    rng = np.random.default_rng(5)
    programs, races = zip(*(random_program(rng) for _ in range(1500)))
    assert 0.2 < np.mean(races) < 0.8
    for seed in SEEDS:
        assert np.array_equal(result(program, "programs", np.stack(programs).tobytes(), seed=seed), races)


def test_a_cluster_must_fit(program):
    assert b"fewer resident blocks than a cluster has" in execute(program, "cluster", resident=1).stderr


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_take_tickets(program, seed):
    assert np.array_equal(result(program, "tickets", seed=seed, resident=2), np.arange(20))


def test_shared_memory_starts_as_nan(program):
    assert result(program, "fresh_memory") == 0xFFFFFFFF
