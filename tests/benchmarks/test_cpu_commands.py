"""The commands that time a CPU run, and compare what they time with what it stands in for."""

import json

import pytest
import torch

from benchmarks import bench_decode, bench_products, bench_reading, bench_train, speed_tables
from hope_kernels.ops.shared import cpu_library

pytestmark = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"cpp: {cpu_library.unavailable()}")


@pytest.mark.parametrize("bench, sizes", [
    (bench_reading, ["--tokens", "512"]), (bench_decode, ["--tokens", "64"]), (bench_train, ["--tokens", "64"]),
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


def test_products_of_one_round(tmp_path, monkeypatch):
    """They end where a way's product is another one; the table has a row of each."""
    before, out = torch.get_num_threads(), tmp_path / "products.json"
    monkeypatch.setattr(bench_products, "SHAPES", ((5, 24, 40), (1, 8, 16)))
    monkeypatch.setattr(bench_products, "LONG", 1e-6)
    try:
        bench_products.main(["--rounds", "1", "--out", str(out)])
        made = speed_tables.products({"products": json.loads(out.read_text())})
        assert "| 5 x 24 x 40 | " in made and "| 1 x 8 x 16 | " in made
        monkeypatch.setattr(bench_products, "linear", lambda x, W: 2 * x @ W.mT)
        with pytest.raises(RuntimeError, match="5 x 24 x 40: pytorch differs"):
            bench_products.main(["--rounds", "1", "--out", str(tmp_path / "wrong.json")])
    finally:
        torch.set_num_threads(before)
    rates = [r for c in json.loads(out.read_text())["cases"] for r in c["gflops"].values()]
    assert len(rates) == 6 and min(rates) > 0 and not (tmp_path / "wrong.json").exists()
