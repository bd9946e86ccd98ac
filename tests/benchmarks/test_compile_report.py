"""The compile report catches what it is there to catch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from benchmarks import compile_cuda, compiled, cubin  # noqa: E402  (compile_report itself turns the interpreter off: it runs in its own process)

ROOT = Path(__file__).parents[2]


def report(*args: str) -> subprocess.CompletedProcess:
    """The command line, with this folder's providers in reach."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    return subprocess.run(
        (sys.executable, "-m", "benchmarks.compile_report", *args), cwd=ROOT, env=env, capture_output=True,
        text=True
    )


def test_bad_rows_are_caught_and_good_ones_pass(tmp_path):
    out = tmp_path / "report.json"
    done = report("--check", "--fresh", "--out", str(out), "--provider", "failing_kernels", "no_such_module")
    assert done.returncode == 1, done.stderr
    assert "no_such_module: no such module" in done.stdout
    records = {(r["kernel"], r["arch"]): r for r in json.loads(out.read_text())["kernels"]}
    assert not any(r["violations"] for (kernel, _), r in records.items() if kernel == "good")
    assert records["good", 80]["mma"] and records["good", 90]["wgmma"] and records["good", 100]["tcgen05"]
    spills = records["spills", 90]
    assert spills["spill_stores"] and spills["spill_loads"] and spills["stack"]
    assert [v.split(":")[0] for v in spills["violations"]] == ["spills", "local memory"]
    assert records["no_mma", 90]["violations"] == ["no tensor-core instruction, its row wants one"]
    assert "power of 2" in records["refused", 90]["violations"][0]
    for kernel in ("spills", "no_mma", "refused"):
        assert f"{kernel} [" in done.stderr


def test_one_kernel_on_one_architecture():
    done = report("--check", "--arch", "90", "--only", "good", "--provider", "failing_kernels")
    assert done.returncode == 0, done.stderr
    assert "1 compiled kernels, 0 violations" in done.stdout


def test_shared_memory_is_held_against_the_architecture():
    fits = cubin.Usage(255, 0, 0, 0, 0, 0, 0, 0, 8, 1)
    assert not cubin.violations(fits, 90, 227 * 1024, True)
    for arch in (80, 86, 89, 120):
        assert len(cubin.violations(fits, arch, 227 * 1024, True)) == 1


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_files_are_gated(tmp_path):
    (tmp_path / "sums.cu").write_text("""
        template <int N> __device__ void sums(float* p) {  // N numbers live at once
            float x[N], s = 0;
            for (int i = 0; i < N; i++) s += x[i] = p[i * 1024 + threadIdx.x];
            for (int i = 0; i < N; i++) p[i * 1024 + threadIdx.x] = x[i] * s;
        }
        extern "C" __global__ void __launch_bounds__(1024, 1) fits(float* p) { sums<16>(p); }
        extern "C" __global__ void __launch_bounds__(1024, 1) spills(float* p) { sums<128>(p); }
    """)
    ((_, found),) = compile_cuda.report(None, None, [(tmp_path / "sums.cu", ("80",), False)])
    records = {r["kernel"]: r for r in found}
    assert set(records) == {"fits", "spills"}
    assert records["spills"]["spill_stores"] and any(
        v.startswith("spills:") for v in records["spills"]["violations"]
    )


def test_a_kernel_that_lost_a_product_is_caught():
    kernel = "hope::titans_prefill<64, hope::bf16, 0, 0, true, false>"
    assert compile_cuda.lost_products(kernel, 256) == [] and compile_cuda.lost_products("sums", 0) == []
    assert compile_cuda.lost_products(kernel, 255) == ["255 mma instructions, expected 256 or more"]


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Both places where compilations are kept, empty."""
    monkeypatch.setattr(compiled, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(compiled, "COMMITTED", tmp_path / "compiled.json")
    compiled.committed.cache_clear()
    yield tmp_path
    compiled.committed.cache_clear()


RECORD = {"kernel": "sum", "arch": 90, "registers": 40, "seconds": 0.5, "violations": []}


def test_what_is_committed_is_not_compiled_again(kept):
    compiled.commit({"b": [RECORD], "a": []})
    assert json.loads((kept / "compiled.json").read_text()) == {"a": [], "b": [RECORD]}
    assert compiled.records("b", pytest.fail) == [RECORD] and compiled.records("a", pytest.fail) == []
    assert compiled.records("c", lambda: [RECORD]) == [RECORD]  # compiled, and known from now on
    assert compiled.records("c", pytest.fail) == [RECORD]
    other = RECORD | {"registers": 41}
    assert compiled.records("b", lambda: [other], fresh=True) == [other] == compiled.known("b")[0:1]


def test_what_is_known_wrongly_is_found_when_it_is_compiled_again(kept):
    compiled.commit({"a": [RECORD | {"registers": 39}], "b": [RECORD], "c": [RECORD, RECORD]})
    slower = RECORD | {"seconds": 9.0}
    assert compiled.records("b", lambda: [slower], again=1) == [slower]
    with pytest.raises(compiled.Differs, match="sum: registers was 39 and is 40"):
        compiled.records("a", lambda: [RECORD], again=1)
    with pytest.raises(compiled.Differs, match="2 kernels were known, 1 are compiled"):
        compiled.records("c", lambda: [RECORD], again=1)
    assert compiled.known("a")[0]["registers"] == 39  # the check that found it does not hide it from the next
