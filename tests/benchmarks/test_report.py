"""Goals against results, results against code, documents against results, and runs against each other."""

import json
import re
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from benchmarks import bench_titans, changes, gpu, plan, plot, records, report, sources, tables, verdicts
from benchmarks.goals import GOALS, Computed, Goal, Key, Missing, Ratio, unplanned
from benchmarks.svg import Chart, Series, draw, number, ticks
from hope_kernels import available_backends
from hope_kernels.ops.titans import cpp

OURS, THEIRS = "prefill C64 D64 N64 H32 B4 T8192 bf16 triton", "fla C64 D64 N64 H32 B4 T8192 bf16"
STAMP = {"commit": "abc", "source": "s", "quick": False, "dirty": False, "date": "2026-01-01 00:00 UTC"}


def timed(ms: float, **more) -> dict:
    return {"status": "ok", "ms": {"median": ms, "min": 0.9 * ms, "p90": 1.1 * ms, "n": 9}, **more}


def ours(ms: float, **more) -> dict:
    case = {
        "kind": "prefill", "backend": "triton", "C": 64, "D": 64, "N": 256, "H": 32, "B": 1, "T": 32768,
        "dtype": "bf16"
    }
    return timed(ms, case=case, kernel=sources.kernel_hash(case), **more)


def written(folder: Path, **sections: dict) -> Path:
    """A device's folder; "ops" etc are the cases of a file."""
    folder.mkdir(parents=True, exist_ok=True)
    for section, cases in sections.items():
        (folder / f"{section}.json").write_text(json.dumps({"stamp": STAMP, "cases": cases}))
    return folder


# -- goals ---------------------------------------------------------------------------------------------------


def test_a_verdict_says_by_what_factor():
    most, least = (Goal("a", better, 2.0, "x", Key("ops", "a")) for better in ("<=", ">="))
    assert most.verdict(2.0) == least.verdict(2.0) == "met" and most.verdict(1.0) == least.verdict(3.0) == "met"
    assert most.verdict(3.0) == "missed by 1.50x" and least.verdict(0.5) == "missed by 4.00x"
    assert replace(most, target=0.0).verdict(3.0) == "missed by 3" and replace(
        least, target=0.4, unit="%"
    ).text(0.312) == "31.2%"


def test_rows_of_a_device_that_met_missed_and_did_not_measure(tmp_path):
    goals = (
        Goal("rate", ">=", 0.4, "%", Key("ops", "prefill * triton", "of_matmul")),
        Goal("ratio", "<=", 1.5, "x", Ratio(Key("ops", OURS), Key("peers", THEIRS))),
        Goal("absent", "<=", 1.5, "x", Key("ops", "nothing")),
        Goal("refused", "<=", 1.5, "x", Key("ops", "wrong")),
    )
    wrong = {"status": "refused", "reason": "o differs"}
    written(tmp_path / "some-gpu", ops={OURS: ours(3.0, of_matmul=0.5), "wrong": wrong}, peers={THEIRS: timed(1.0)})
    found = verdicts.rows(tmp_path, goals)
    assert [(r.verdict, r.device) for r in found] == [
        ("met", "some-gpu"), ("missed by 2.00x", "some-gpu"), ("not measured", ""), ("not measured", "")]
    assert found[1].value == 3.0 and "no such case" in found[2].why and "refused, o differs" in found[3].why
    written(tmp_path / "other-gpu", ops={OURS: ours(1.0, of_matmul=0.2)})
    # other-gpu, some-gpu
    assert [r.verdict for r in verdicts.rows(tmp_path, goals[:1])] == ["missed by 2.00x", "met"]


def test_the_sides_of_a_ratio_are_of_one_run(tmp_path):
    ratio = Ratio(Key("ops", OURS), Key("peers", THEIRS))
    run = records.load(written(tmp_path / "gpu", ops={OURS: ours(3.0)}, peers={THEIRS: timed(2.0)}))
    assert ratio.find(run).value == 1.5
    for change in ({"commit": "other"}, {"source": "t"}, {"dirty": True}):
        with pytest.raises(Missing, match="different code"):
            ratio.find(run | {"peers": run["peers"] | {"stamp": STAMP | change}})


def test_every_goal_has_a_figure_a_command_and_cases_that_are_planned():
    assert len({g.what for g in GOALS}) == len(GOALS)
    planned = plan.names("cuda", False)
    for goal in GOALS:
        assert goal.better in ("<=", ">=") and goal.unit in ("%", "x", "s", "us", "") and goal.command.startswith(
            "python -m benchmarks."
        )
        assert isinstance(goal.figure, (Key, Ratio, Computed))
        with pytest.raises(Missing):
            goal.figure.find({})
    ready = [g.what for g in GOALS if g.on == "gpu" and not list(unplanned(g, planned))]
    assert len(ready) >= 12  # those of the memories; others wait for their cases


def test_goals_of_the_cpu_from_known_files(tmp_path):
    known = {goal.what: goal for goal in GOALS if goal.on == "cpu"}
    spread = lambda v: {"median": v, "min": v, "max": v}
    case = lambda d, c, ratio, share: {"dim": d, "chunk": c, "ratio": spread(ratio), "of_fma": spread(share),
                                       "of_fma_default": spread(0.7)}
    cases = [case(64, 16, 200.0, 0.1), case(256, 64, 50.0, 0.5), case(256, 16, 9.0, 0.9)]
    run = {"cpu": {"machine": {"dirty": True}, "cases": cases, "geometric_mean_drop_in": 130.0,
                   "default_chunks": {"ratio_drop_in": spread(10.0)}},
           "reading": {"cases": [{"B": 1, "how": "learning", "over off": spread(4.4), "us": spread(45.0)}]},
           "decode": {"cases": [{"B": 1, "learn": "off", "how": "greedy", "us": spread(300.0)}]},
           "train": {"cases": [{"backend": "cpp", "us": {"step": spread(120.0)}}]}}
    for name, data in run.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"machine": {"dirty": name == "cpu"}} | data))
    found = {r.goal.what: r for r in verdicts.rows(tmp_path, tuple(known.values()))}
    assert sorted((round(r.value, 6), r.verdict, r.dirty) for r in found.values()) == [
        (0.5, "missed by 1.10x", True), (4.4, "missed by 2.00x", False), (10.0, "missed by 2.00x", True),
        (45.0, "met", False), (100.0, "missed by 1.50x", True), (120.0, "met", False), (130.0, "met", True),
        (300.0, "missed by 2.00x", False)]


# -- ages ----------------------------------------------------------------------------------------------------


def test_results_older_than_their_kernel_or_of_unknown_age_are_named(tmp_path):
    stale = ours(1.0) | {"kernel": "0" * 16}
    unsaid = {k: v for k, v in ours(1.0).items() if k != "kernel"}
    written(
        tmp_path / "gpu", ops={"new": ours(1.0), "old": stale, "unsaid": unsaid},
        peers={THEIRS: timed(1.0, case={"kind": "fla"})}
    )
    machine = {"machine": {"dirty": True}}
    (tmp_path / "cpu.json").write_text(json.dumps(machine | sources.mark("layer", "cpp")))
    (tmp_path / "recall.json").write_text(
        json.dumps(machine | {"runs": [sources.mark("model"), sources.mark("model") | {"kernel": "0"}]})
    )
    (tmp_path / "learning.json").write_text(json.dumps({"a text": machine}))
    assert report.ages(tmp_path) == {
        "older": [("recall.json", "runs 1"), ("gpu/ops.json", "old")],
        "unknown": [("learning.json", ""), ("gpu/ops.json", "unsaid")]}
    assert records.dirty(tmp_path) == ["cpu.json", "learning.json", "recall.json"]


# -- documents -----------------------------------------------------------------------------------------------


def test_committed_documents_are_what_the_results_give():
    assert tables.stale(records.RESULTS) == [] and plot.stale(records.RESULTS) == []


def fresh(data):
    """Results as if today's code had given them."""
    if isinstance(data, list):
        return [fresh(v) for v in data]
    if not isinstance(data, dict):
        return data
    case = data.get("kernel_of") or (data.get("case") if "kernel" in data else None)
    return {k: fresh(v) for k, v in data.items()} | ({"kernel": todays_hash(json.dumps(case))} if case else {})


@cache
def todays_hash(case: str) -> str | None:
    return sources.kernel_hash(json.loads(case))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Results of today's code and the documents made from them."""
    folder = tmp_path_factory.mktemp("good")
    results, documents = folder / "results", folder / "documents"
    shutil.copytree(records.RESULTS, results)
    for path in results.glob("*/*.json"):
        path.write_text(json.dumps(fresh(json.loads(path.read_text()))))
    (documents / "docs").mkdir(parents=True)
    for name in (
        *tables.DOCUMENTS, *(p.relative_to(sources.ROOT).as_posix() for p in (sources.ROOT / "docs").glob("*.svg"))
    ):
        shutil.copy(sources.ROOT / name, documents / name)
    cpu = json.loads((results / "cpu.json").read_text())
    (results / "cpu.json").write_text(json.dumps(cpu | sources.mark("layer", cpu["backend"])))
    for path in results.glob("*.json"):
        path.write_text(json.dumps(fresh(json.loads(path.read_text()))))
    assert report.main(["--check", "--results", str(results), "--documents", str(documents)]) == 0
    return folder


@pytest.fixture
def copied(good, tmp_path):
    """A copy to spoil."""
    results, documents = (shutil.copytree(good / name, tmp_path / name) for name in ("results", "documents"))
    return results, documents, ["--results", str(results), "--documents", str(documents)]


def test_a_result_older_than_its_kernel_fails_the_check(copied, capsys):
    results, _, where = copied
    path = results / "cpu.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kernel": "0" * 16}))
    capsys.readouterr()
    assert report.main(["--check", *where]) == 1
    out = capsys.readouterr().out
    assert "WRONG: cpu.json: older than the code it measured" in out
    assert any(
        "nested-learning 0.2.0, geometric" in row and "older than the code" in row for row in out.splitlines()
    )
    assert report.main(where) == 0  # only told


def test_a_number_typed_over_fails_the_check_and_is_made_anew(copied, capsys):
    _, documents, where = copied
    readme, svg = documents / "README.md", documents / "docs" / "accuracy.svg"
    made, drawn = readme.read_text(), svg.read_text()
    readme.write_text(made.replace("Geometric mean of the ratios: **", "Geometric mean of the ratios: **9"))
    svg.write_text(drawn.replace("<circle", "<square", 1))
    assert readme.read_text() != made
    capsys.readouterr()
    assert report.main(
        ["--check", *where]
    ) == 1 and tables.main(["--check", *where]) == 1 and plot.main(["--check", *where]) == 1
    out = capsys.readouterr().out
    assert "WRONG: README.md: table figures is not what" in out and "WRONG: docs/accuracy.svg is not what" in out
    assert tables.main(where) == 0 and plot.main(where) == 0
    assert readme.read_text() == made and svg.read_text() == drawn and report.main(["--check", *where]) == 0


def test_a_gpu_s_results_enter_documents_and_plots(tmp_path):
    shutil.copytree(records.RESULTS, tmp_path / "results")
    rates = {"flops": 1e12, "bytes": 1e9, "TFLOP/s": 100.0, "GB/s": 200.0, "of_matmul": 0.25, "of_copy": None}
    run = {T: ours(T / 1024, **rates) for T in (2048, 32768)}
    for T, record in run.items():
        record["case"] = record["case"] | {"T": T}
    ceilings = {"copy": timed(1.0, **{"GB/s": 4000.0}), "matmul bf16": timed(1.0, **{"TFLOP/s": 700.0})}
    written(tmp_path / "results" / "some-gpu", env=ceilings,
            ops={f"prefill T{T}": r for T, r in run.items()}
            | {"bad": {"status": "refused", "reason": "o differs"}})
    assert "**No GPU figure exists.**" in tables.gpu(records.RESULTS)
    text = tables.gpu(tmp_path / "results")
    row = "| prefill T2048 | 2.0000 | 100.0 | 200.0 | 25% |  |"
    assert "**some-gpu**, commit abc" in text and row in text and "1 ops: refused" in text
    charts = plot.drawn(tmp_path / "results")
    assert {
        "throughput-some-gpu.svg", "roofline-some-gpu.svg"
    } <= set(charts) and "decode-some-gpu.svg" not in charts
    assert charts["throughput-some-gpu.svg"].series[0].points == ((2048, 1024 * 1e3), (32768, 1024 * 1e3))
    reached, ceiling = charts["roofline-some-gpu.svg"].series
    assert reached.points[0] == (1e3, 1e12 / 2 / 1e9) and ceiling.points[1] == (1e3 * 700 / 4000, 700.0)
    assert "abc, 2026-01-01" in charts["roofline-some-gpu.svg"].caption


# -- slower, wrong -------------------------------------------------------------------------------------------


def test_changes_beyond_the_spread_are_told():
    old = {"median": 1.0, "min": 0.9, "p90": 1.2, "n": 9}
    case = lambda ms: {"status": "ok", "ms": ms}
    said = lambda ms: changes.change(case(old), case(ms))
    assert said({"median": 1.5, "min": 1.1, "p90": 1.6}) == "slower by 50%"
    assert said(
        {"median": 1.15, "min": 1.1, "p90": 1.6}
    ) is None and said({"median": 1.5, "min": 0.95, "p90": 9.0}) is None
    assert said({"median": 0.5, "min": 0.4, "p90": 0.6}) == "faster by 100%" and said(old) is None
    run = lambda record: {"ops": {"stamp": {"quick": False}, "cases": {"a": record}}}
    wrong = {"status": "refused", "reason": "o differs"}
    assert list(changes.changes(run(case(old)), run(wrong))) == [("ops: a", "refused, was ok: o differs")]
    assert list(changes.changes({}, run(case(old)))) == [] and list(changes.changes(run(wrong), run(case(old)))) == []


def test_nothing_to_compare_with_is_an_error(tmp_path, capsys):
    for run in (
        lambda: report.main(["--against", str(tmp_path), str(tmp_path)]),
        lambda: gpu.main(["--against", str(tmp_path / "none")])
    ):
        with pytest.raises(SystemExit):
            run()
        assert "is not a result file and holds none" in capsys.readouterr().err


CASE = bench_titans.Case("prefill", 64, 64, 64, 2, 1, 256, "fp32", "cpp")
needs_cpp = pytest.mark.skipif(
    available_backends()["cpp"] is not None or torch.cuda.is_available(), reason="runs the C++ kernel"
)


def measured(folder: Path, *more: str, status: int = 0) -> Path:
    """The real command, for one case of the C++ kernel: its device's folder."""
    assert gpu.main(["--quick", "--only", CASE.name, "--out", str(folder), *more]) == status
    (found,) = folder.iterdir()
    return found


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    return measured(tmp_path_factory.mktemp("before"))


@needs_cpp
def test_a_slowed_kernel_is_reported_as_slower(before, tmp_path, monkeypatch, capsys):
    kernel = cpp.titans_cpp
    record = json.loads((before / "ops.json").read_text())["cases"][CASE.name]
    assert record["kernel"] == sources.kernel_hash(record["case"]) and record["status"] == "ok"
    monkeypatch.setattr(cpp, "titans_cpp", lambda *args, **kw: [kernel(*args, **kw) for _ in range(10)][-1])
    capsys.readouterr()
    after = measured(tmp_path, "--against", str(before))
    assert re.search(rf"^ops: {CASE.name}: slower by \d{{3,}}% ", capsys.readouterr().out, re.M)
    assert json.loads(
        (after / "ops.json").read_text()
    )["cases"][CASE.name]["ms"]["median"] > 3 * record["ms"]["median"]
    assert report.main(["--check", "--against", str(before), str(after)]) == 1
    assert report.main(["--check", "--against", str(after / "ops.json"), str(before / "ops.json")]) == 0
    assert re.search(rf"^ops: {CASE.name}: faster by", capsys.readouterr().out, re.M)


@needs_cpp
def test_a_wrong_kernel_gets_no_speed(before, tmp_path, monkeypatch, capsys):
    kernel = cpp.titans_cpp

    def wrong(*args, **kw):
        o, state = kernel(*args, **kw)
        return o * 1.001, state

    monkeypatch.setattr(cpp, "titans_cpp", wrong)
    capsys.readouterr()
    after = measured(tmp_path, "--against", str(before), status=1)
    record = json.loads((after / "ops.json").read_text())["cases"][CASE.name]
    assert record["status"] == "refused" and "ms" not in record and "TFLOP/s" not in record
    out = capsys.readouterr().out
    assert f"ops: {CASE.name}: refused, was ok: o differs from the fp64 chunked backend" in out
    assert report.main(["--check", "--against", str(before), str(after)]) == 1


# -- pictures ------------------------------------------------------------------------------------------------


def test_charts_are_xml_with_their_points_where_they_belong():
    from xml.etree import ElementTree

    line = Series("a < b", ((1.0, 10.0), (10.0, 100.0), (100.0, 1000.0)))
    drawn = draw(
        Chart("t & t", "x", "y", (line, Series("limit", ((1.0, 500.0), (100.0, 500.0)), dashed=True)), "a machine")
    )
    root = ElementTree.fromstring(drawn)
    texts = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"t & t", "a < b", "limit", "a machine", "100", "1k"} <= set(texts)
    dots = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter("{http://www.w3.org/2000/svg}circle")]
    # logarithmic
    assert len(dots) == 3 and all(abs(dots[1][i] - (dots[0][i] + dots[2][i]) / 2) < 0.11 for i in (0, 1))
    assert dots[0][0] < dots[2][0] and dots[0][1] > dots[2][1]  # up is more
    assert "background" not in drawn and "prefers-color-scheme:dark" in drawn
    with pytest.raises(ValueError, match="has no point"):
        draw(Chart("t", "x", "y", ()))


def test_ticks_and_numbers():
    assert ticks(0.9, 110, True) == [1, 2, 5, 10, 20, 50, 100] and ticks(0, 10, False) == [0, 2, 4, 6, 8, 10]
    assert [number(v) for v in (0, 5e-6, 0.25, 12000, 2e6)] == ["0", "5e-6", "0.25", "12k", "2M"]


