"""benchmarks.gpu on a machine without a GPU: what it writes, what it counts, what it refuses to time."""

import json
import math
import sys
import time
import types
from dataclasses import replace

import pytest
import torch

from benchmarks import (
    bench_cms,
    bench_cpu,
    bench_layers,
    bench_model,
    bench_titans,
    counters,
    gpu,
    gpu_library,
    peers,
    processes,
    rehearsal,
    summary,
    watch,
)
from benchmarks import measure as m
from benchmarks.plan import SECTIONS, plan
from benchmarks.records import RESULTS, Results
from benchmarks.run import measure
from hope_kernels import TitansConfig
from hope_kernels.ops import FastWeights, Layout, init_titans_state, titans_chunk

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what the command does without a CUDA device")
CASE = bench_titans.Case("prefill", C=16, D=32, N=32, H=2, B=3, T=90, dtype="fp32", backend="chunked")
STATUSES = {"ok", "refused", "skipped", "failed", "died"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    assert gpu.main(["--quick", "--out", str(out)]) == 0
    (folder,) = out.iterdir()
    return folder


def read(folder, section: str) -> dict:
    return json.loads((folder / f"{section}.json").read_text())


def check_schema(section: str, found: dict) -> None:
    """What every result file of the command promises its readers."""
    assert set(found) == {"stamp", "cases", "missing"}
    assert {"commit", "dirty", "source", "quick", "date"} <= set(found["stamp"])
    for name, record in found["cases"].items():
        assert record["status"] in STATUSES | ({"passed"} if section == "correctness" else set())
        assert record["status"] in ("ok", "passed", "died") or record["reason"]
        if section == "correctness" or record["status"] != "ok":
            continue
        assert record["seconds"] >= 0
        if section != "env":
            assert record["case"] and record.get("check", {"ok": True})["ok"]
        if "ms" in record:
            ms = record["ms"]
            assert 0 < ms["min"] <= ms["median"] <= ms["p90"] and ms["n"] >= 1, name
        for unit, counted in (("TFLOP/s", "flops"), ("GB/s", "bytes")):
            if unit in record and name != "fma fp32":  # a rate alone
                assert math.isclose(
                    record[unit] * record["ms"]["median"] * {"GB/s": 1e6, "TFLOP/s": 1e9}[unit], record[counted]
                )
        for key, unit, ceiling in (("of_copy", "GB/s", "copy"), ("of_fma", "TFLOP/s", "fma fp32")):
            if record.get(key) and "ceilings" in record:
                assert math.isclose(record[key] * record["ceilings"][ceiling], record[unit])
    assert all(isinstance(why, str) and why for why in found["missing"].values())


def test_what_it_writes(written):
    assert written.name.startswith("cpu-")
    assert sorted(p.stem for p in written.iterdir()) == sorted(SECTIONS)
    files = {s: read(written, s) for s in SECTIONS}
    for section, found in files.items():
        check_schema(section, found)
        assert found["stamp"]["source"] == m.source_hash() and found["cases"]
    assert files["correctness"]["cases"]["pytest"] == {"status": "skipped", "reason": "needs a CUDA device"}
    env = files["env"]["cases"]
    assert env["machine"]["machine"]["torch"] == torch.__version__ and env["copy"]["GB/s"] > 0
    assert set(env["machine"]["backends"]) == {"reference", "chunked", "cpp", "triton", "cuda"}
    for case in bench_titans.QUICK_CPU:
        record = files["ops"]["cases"][case.name]
        if case.backend == "cpp" and record["status"] == "skipped":
            continue  # no compiler here; the gradient
        assert record["status"] == "ok"
        if case.kind == "prefill":
            assert record["flops"] == case.T * m.flops_per_token(case.config)
        if case.kind == "step":
            counts = [record[k]["ms"]["n"] / record["layers"] for k in ("commit", "plain")]
            assert counts == [2, 30]
            assert all(record[k]["p50"] <= record[k]["p99"] for k in ("plain", "commit"))
    for section, module in (("cms", bench_cms), ("layers", bench_layers), ("model", bench_model)):
        for case in module.QUICK_CPU:
            record = files[section]["cases"][case.name]
            assert record["status"] == "ok" or case.backend == "cpp"
            assert set(record["ceilings"]) == {
                "copy", "fma fp32"
            } if record["status"] == "ok" else "cannot be used" in record["reason"]
    package = files["peers"]["cases"]["package C16 D64"]
    assert package["error"] < 1e-4 and math.isclose(
        package["ratio"], package["ms"]["median"] / package["ours_ms"]["median"]
    )


def test_it_names_what_it_could_not_measure(written):
    found = {s: read(written, s)["missing"] for s in SECTIONS}
    for section, name, *_ in plan("cuda", True):
        if name not in read(written, section)["cases"]:
            assert found[section][name] == "needs a CUDA device"
    assert found["correctness"] and "matmul bf16" in found["env"]
    lines = list(summary.told(found))
    assert sum(len(cases) for cases in found.values()) == sum(
        int(line.split(", ")[2].split(" (")[0]) for line in lines
    )
    assert all(any(name in line for line in lines) for cases in found.values() for name in cases)


def test_what_there_was_no_time_for_is_missing(tmp_path, capsys):
    assert gpu.main(["--quick", "--minutes", "0", "--out", str(tmp_path), "--only", "ops"]) == 0
    (folder,) = tmp_path.iterdir()
    missing = read(folder, "ops")["missing"]
    assert {missing[c.name] for c in bench_titans.QUICK_CPU} == {"the time was up"}
    assert {read(folder, "cms")["missing"][c.name] for c in bench_cms.QUICK_CPU} == {"not asked for"}
    assert f"not measured, ops, {len(CASE_NAMES)} (the time was up): {CASE_NAMES[0]}" in capsys.readouterr().out


@pytest.mark.parametrize("folder", sorted(p for p in RESULTS.iterdir() if p.is_dir()), ids=lambda p: p.name)
def test_committed_results_keep_the_schema(folder):
    assert sorted(p.stem for p in folder.iterdir()) == sorted(SECTIONS)
    for section in SECTIONS:
        check_schema(section, read(folder, section))


def test_resume_keeps_what_is_there_and_measures_the_rest(written):
    before = read(written, "ops")
    kept, lost = CASE_NAMES[3], CASE_NAMES[-1]
    before["cases"][kept]["mark"] = 1
    again = before["cases"].pop(lost)
    (written / "ops.json").write_text(json.dumps(before))
    env = (written / "env.json").read_bytes()
    assert gpu.main(["--quick", "--resume", "--out", str(written.parent)]) == 0
    after = read(written, "ops")
    assert after["cases"].pop(lost)["case"] == again["case"]
    assert after["cases"] == before["cases"] and after["stamp"] == before["stamp"] and (
        written / "env.json"
    ).read_bytes() == env


CASE_NAMES = [c.name for c in bench_titans.QUICK_CPU]


def test_results_of_other_code_are_not_continued(tmp_path):
    path, mark = tmp_path / "ops.json", {"commit": "a", "source": "s", "quick": False}
    store = Results(path, mark)
    store.put("one", {"status": "ok"})
    store.put("two", {"status": "started"})
    assert set(Results(path, {**mark, "source": "t"}).cases) == set()
    assert set(Results(path, mark, lambda name: name == "one").cases) == {"one"}
    assert set(Results(path, mark).cases) == {"one"}


def test_a_case_the_process_died_in_is_not_run_again(tmp_path):
    store = Results(tmp_path / "ops.json", {"commit": "a", "source": "s", "quick": False})
    store.put("one", {"status": "started"})
    watch.bury("ops", store, -11, "the log", {})
    store.put("two", {"status": "started"})
    watch.bury("ops", store, 1, "", {}, late=True)  # only the time was up
    store.reload()
    assert set(
        store.cases
    ) == {"one"} and store.cases["one"]["status"] == "died" and store.cases["one"]["log"] == "the log"


def test_counts_are_the_hand_counted_ones():
    c = TitansConfig(8, 2, hidden_mult=2, chunk_memory=3, chunk_other=3)  # H 2, D 4, N 8, C 3
    assert m.flops_per_token(c) == 2 * (2560 + 240 + 24 + 18)
    assert m.flops_per_token(replace(c, target_norm=False, retain_to="zero")) == 2 * (2240 + 240 + 24 + 18)
    assert m.flops_per_token(TitansConfig(64)) == bench_cpu.flops(64, 16, False) - 8 * 64 * 64
    shapes = Layout.of(c).shapes(2)
    state = init_titans_state(c, FastWeights(*(None if s is None else torch.zeros(s) for s in shapes)), 1)
    assert 2 * m.weights_per_head(c) == sum(t.numel() for t in state.deviation) == 544
    assert m.prefill_bytes(c, 1, 5, 2) == 3 * 5 * 8 * 2 + 544 * 2 + 2 * 544 * 4
    assert m.prefill_bytes(c, 3, 5, 2) == 3 * 3 * 5 * 8 * 2 + 544 * 2 + 3 * 2 * 544 * 4
    assert m.step_bytes(c, 1, 2, commit=False) == 544 * 2 + 544 * 4 + 5 * 8 * 2
    assert m.step_bytes(c, 1, 2, commit=True) - m.step_bytes(c, 1, 2, commit=False) == 2 * 544 * 4 + 2 * 3 * 8 * 2
    assert m.state_bytes_per_chunk(c, 2) == 2 * 8 * 2 * 8 * 4 * 10
    assert m.stats([3.0, 1.0, 2.0, 10.0]) == {"median": 2.5, "min": 1.0, "p90": 10.0, "n": 4}
    assert [m.quantile(list(range(1, 101)), q) for q in (0.5, 0.9, 0.99)] == [50, 90, 99]


def scaled(o, state):
    return o * 1.001, state


def wrong_state(o, state):
    return o, replace(state, delta1=state.delta1 * 1.001)


def unwritten(o, state):
    out = torch.empty_like(o)
    out[:, :-1] = o[:, :-1]
    return out, state


def zero_at_the_end(o, state):
    return torch.cat([o[:, :-1], torch.zeros_like(o[:, -1:])], 1) if o.shape[1] == CASE.T else o, state


def unsteady(o, state):
    return o * (1 + 1e-7 * torch.rand_like(o)), state


def wrong_when_large(o, state):
    return o * (1.001 if o.shape[1] == CASE.T else 1), state


@pytest.mark.parametrize("harm, reason", [
    (scaled, "o differs"), (wrong_state, "delta1 differs"), (unwritten, "o differs"),
    (zero_at_the_end, "unwritten, zero"),
    (unsteady, "different bits"), (wrong_when_large, "the start of the whole call"),
])
def test_a_wrong_result_gets_no_time(harm, reason):
    record = bench_titans.prefill(CASE, "cpu", {}, 0.01, op=lambda *args, **kw: harm(*titans_chunk(*args, **kw)))
    assert record["status"] == "refused" and reason in record["reason"]
    assert "ms" not in record and not record["check"]["ok"]


def test_a_right_result_gets_one():
    record = bench_titans.prefill(CASE, "cpu", {}, 0.01)
    assert record["check"]["ok"] and record["ms"]["median"] > 0 and record["of_matmul"] is None


def test_the_small_operators_are_checked_and_timed():
    pytest.importorskip("triton")
    for kind in ("conv", "gate"):  # interpreted
        record = bench_titans.elementwise(replace(CASE, kind=kind, T=5), "cpu", {"copy": 1.0}, 0.01)
        assert record["check"]["ok"] and record["bytes"] == (
            2 if kind == "conv" else 3
        ) * 3 * 5 * 64 * 4 and record["of_copy"] > 0


def test_poison_is_nan_and_ends():
    before = torch.get_deterministic_debug_mode()
    with m.poisoned():
        assert torch.empty(3).isnan().all() and torch.empty_like(torch.ones(2)).isnan().all()
    assert torch.get_deterministic_debug_mode() == before


def test_nan_and_other_dtypes_never_pass():
    t = {"o": torch.ones(3)}
    for bad in (torch.tensor([1.0, float("nan"), 1.0]), torch.ones(3).bfloat16(), torch.ones(4)):
        assert not m.compare({"o": bad}, t, {"o": torch.ones(3).double()})["ok"]
    far = {"o": 2 * torch.ones(3)}  # a peer that is wrong itself allows nothing
    assert m.compare(t, t, {"o": torch.ones(3).double()})["ok"] and not m.compare(
        far, far, {"o": torch.ones(3).double()}
    )["ok"]


PAIRED = (*peers.FLA_CASES, *peers.COMPILED_CASES, *peers.SDPA_CASES, *peers.TTT_CASES, *peers.TITANS_CASES)


def test_plans_for_a_gpu_name_every_case_once_and_pair_peers_with_ours():
    ops, others = list(bench_titans.items("cuda", False)), list(peers.items("cuda", False))
    names = [name for name, _, _ in ops]
    assert len(set(names)) == len(names) and len({name for name, _, _ in others}) == len(others)
    timed = {"status": "ok", "ms": {"median": 3.0}}
    lines = list(summary.ratios(dict.fromkeys(names, timed), {name: timed for name, _, _ in others}))
    shapes = [replace(c, kind="prefill", backend=b).name for c in PAIRED for b in ("triton", "cuda")]
    assert len(lines) == sum(name in names for name in shapes) and all(": 1.000 of" in line for line in lines)
    assert len(lines) > len(peers.FLA_CASES) + len(peers.COMPILED_CASES)
    everything = [(section, name) for section, name, *_ in plan("cuda", False)]
    assert len(set(everything)) == len(everything)
    grid = {axis: {getattr(c, axis) for c in bench_titans.GPU_CASES if c.kind == "prefill"} for axis in "CDNHBT"}
    assert grid["C"] == {16, 32, 64, 128, 256, 1024} and grid["D"] == {64, 128} and grid["N"] == {64, 128, 256, 512}
    assert {8, 64} <= grid["H"] and grid["B"] == {1, 4, 32} and {2048, 131072} <= grid["T"]


def test_the_peer_s_token_loop_recalls_what_it_was_told():
    k = torch.eye(4).view(1, 4, 1, 4)
    v, zero, one = torch.randn(1, 4, 1, 3), torch.zeros(1, 4, 1), torch.ones(1, 4, 1)
    assert torch.allclose(peers.delta_rule(k, k, v, zero, one, 1.0), v.double())
    decayed = peers.delta_rule(k[:, :1].expand(1, 4, 1, 4), k[:, :1].expand(1, 4, 1, 4), v, zero - 1, one * 0, 0.5)
    assert not decayed.any()


def test_who_is_not_served_is_skipped_and_who_fails_has_failed(tmp_path, monkeypatch):
    unserved, broken = replace(CASE, backend="cuda"), replace(CASE, T=0)
    calls = {
        c: lambda ceilings, c=c: bench_titans.measured(c, "cpu", ceilings, 0.01) for c in (CASE, unserved, broken)
    }
    monkeypatch.setitem(
        bench_titans.KINDS, "prefill", lambda case, *_, **__: {} if case.T else int("a ValueError of its own")
    )
    results = {section: Results(None, {}) for section in SECTIONS}
    items = [("ops", c.name, {}, call) for c, call in calls.items()]
    measure("cpu", results, types.SimpleNamespace(quick=True, only=[]), time.time() + 60, items)
    found = [results["ops"].cases[c.name] for c in calls]
    assert [r["status"] for r in found] == ["ok", "skipped", "failed"]
    assert "backend 'cuda' cannot be used" in found[1]["reason"]
    assert "ValueError: invalid literal" in found[2]["reason"]


def test_checks_of_the_cuda_library_say_what_kept_them(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(gpu_library.build_cuda, "LIBRARY", tmp_path / "none.so")
    soon, script = time.time() + 60, replace(rehearsal.SCRIPT, load="")
    found = gpu_library.made_usable(script, soon, soon)
    assert found["CUDA library as found"] == {"status": "skipped", "reason": "there was none"}
    assert found["CUDA library, build"] == {"status": "failed", "reason": "nvcc was not found"}
    assert not gpu_library.usable(found)
    tools = gpu_library.Sanitizers(script, {"compute-sanitizer memcheck": {"status": "ok"}}).finish(soon)
    assert tools == {
        "compute-sanitizer racecheck": {"status": "skipped", "reason": "compute-sanitizer is not on PATH"}
    }
    assert counters.counted(script, ["cuda"], soon, time.time())["reason"] == "ncu is not on PATH"


def test_a_process_is_recorded_and_ends_in_time():
    env = processes.environment()
    run = lambda code, seconds=30: gpu_library.process(sys.executable, "-c", code, seconds=seconds, env=env)
    assert run("print(1)")["status"] == "ok"
    failed = run("import sys; sys.exit('the reason')")
    assert failed["status"] == "failed" and failed["log"] == "the reason"
    assert run("import time; print('begun', flush=True); time.sleep(30)", 1.5)["status"] == "died"


def test_a_library_of_other_sources_is_not_used(monkeypatch):
    said = {"status": "ok", "log": "sm_90, sources 0123456789abcdef0123, torch 2.11.0"}
    monkeypatch.setattr(gpu_library, "process", lambda *command, **options: dict(said))
    assert gpu_library.loaded(rehearsal.SCRIPT, 0)["reason"] == "it was built from other sources"
    sources = gpu_library.build_cuda.hash_of(gpu_library.build_cuda.files())
    said["log"] = f"sm_90, sources {sources}, torch 2.11.0"
    assert gpu_library.loaded(rehearsal.SCRIPT, 0)["status"] == "ok"
