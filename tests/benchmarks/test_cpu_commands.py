"""The commands that time a CPU run, and compare what they time with what it stands in for."""

import json

import pytest
import torch

from benchmarks import bench_decode, bench_reading, bench_train
from hope_kernels.ops.shared import cpu_library

pytestmark = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"cpp: {cpu_library.unavailable()}")


@pytest.mark.parametrize("bench, sizes", [
    (bench_reading, ["--tokens", "512"]), (bench_decode, ["--tokens", "4"]), (bench_train, ["--tokens", "64"]),
])
def test_one_round(bench, sizes, tmp_path):
    before, out = torch.get_num_threads(), tmp_path / "out.json"
    try:
        bench.main([*sizes, "--rounds", "1", "--threads", "1", "--out", str(out)])
    finally:
        torch.set_num_threads(before)
    found = json.loads(out.read_text())
    assert found["machine"]["threads"] == 1 and found["rounds"] == 1

    def times(of):
        if isinstance(of, dict):
            yield from (of["median"],) if "median" in of else (t for part in of.values() for t in times(part))
        elif isinstance(of, list):
            yield from (t for part in of for t in times(part))

    assert len(list(times(found))) > 3 and all(t > 0 for t in times(found))
