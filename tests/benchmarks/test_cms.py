"""The studies and measurements of the CMS: what they choose to run, what they conclude, what they refuse to
time, and that they resume."""

import json
import math
from dataclasses import replace

import pytest
import small_model
import torch

from benchmarks import bench_cms, bench_continual, bench_model, bench_rates, studies
from benchmarks.bench_cms import Case
from benchmarks.bench_rates import Cell
from benchmarks.sources import kernel_hash
from hope_kernels import CMSConfig, HopeForCausalLM

WORDS = bytes(range(97, 123)) * 40


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a model of 16 channels, and a file with two kilobytes."""
    folder = small_model.saved(tmp_path_factory.mktemp("small"))
    (folder / "text").write_bytes(WORDS + WORDS[::-1])
    return folder


# -- texts and models ----------------------------------------------------------------------------------------


def test_excerpts_are_disjoint_and_a_shorter_one_starts_the_longer_one():
    data = bytes(i % 251 for i in range(900))
    long, short = studies.excerpts(data, 250, 250, seed=1), studies.excerpts(data, 100, 250, seed=1)
    assert torch.equal(long[:, :100], short) and not torch.equal(long, studies.excerpts(data, 250, 250, seed=2))
    for row, ids in enumerate(long):
        at = data.index(bytes(ids.tolist()), 300 * row)
        assert 300 * row <= at <= 300 * row + 50
    with pytest.raises(ValueError, match="at least 3 x 301"):
        studies.excerpts(data, 10, 301, seed=0)


def test_a_level_that_is_added_is_the_identity_until_it_learns(small):
    model = HopeForCausalLM.from_pretrained(small)
    ids = studies.excerpts(WORDS, 70, 70, 0)
    three = bench_continual.learner(model, 3)
    assert three.config.cms.chunks == (8, 32, 128) and three.config.cms.learning_rates == (0.1, 0.05, 0.0125)
    assert torch.equal(three(ids)[0], model(ids)[0]) and float(
        three.blocks[0].cms.levels[2]["up"].detach().std()
    ) > 0.2
    assert bench_continual.learner(model, 1).config.cms.learning_rates == (0.1, 0.0)
    assert not bench_continual.learner(model, 0).learns


@torch.no_grad()
def test_last_half_is_the_second_half_of_one_reading(small):
    model, ids = HopeForCausalLM.from_pretrained(small), studies.excerpts(WORDS, 128, 128, 0)
    for learn in ("off", "next_token"):
        logits, _ = model(ids, learn=learn)
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        ).view(3, -1)
        found, _ = studies.last_half(model, ids, learn)
        assert torch.allclose(torch.tensor(found), losses[:, 63:].mean(1) / math.log(2), rtol=1e-5)


def test_a_study_keeps_its_cases_and_refuses_those_of_another_setting(tmp_path):
    path = str(tmp_path / "study.json")
    studies.Study(path, "what", {"seed": 1, "texts": {"a": "b"}}).put("one", {"x": 1}, total=3)
    again = studies.Study(path, "what", {"seed": 1, "texts": {"a": "b"}})
    one = again.cases["one"]
    assert list(again.cases) == ["one"] and one["x"] == 1 and one["kernel"] == kernel_hash(one["kernel_of"])
    assert json.loads((tmp_path / "study.json").read_text())["total"] == 3
    with pytest.raises(ValueError, match=r"another setting \(seed\)"):
        studies.Study(path, "what", {"seed": 2, "texts": {"a": "b"}})


# -- rates ---------------------------------------------------------------------------------------------------


def searched(curve, optimizer="gd") -> dict[float, float]:
    found: dict[float, float] = {}
    while (k := bench_rates.next_octave(found, bench_rates.COARSE[optimizer])) is not None:
        assert k not in found
        found[k] = curve(k)
    return found


@pytest.mark.parametrize("optimum", [-7.3, -1.2, 0.0, 0.9, 5.6])
def test_the_search_finds_the_best_rate_and_the_edge(optimum):
    found = searched(lambda k: math.inf if k > optimum + 3.4 else 0.8 + 0.03 * (k - optimum) ** 2)
    best = min(found, key=found.get)
    assert abs(best - optimum) <= 0.25 and {best - 0.5, best + 0.5} <= set(found)
    worse = [k for k in sorted(found) if k > best and found[k] >= 1]
    edge = optimum + math.sqrt(0.2 / 0.03)
    assert worse[0] - 1 <= edge <= worse[0] and len(found) <= 20


def test_the_search_ends_where_there_is_nothing_to_find():
    assert min(searched(lambda k: math.inf)) == -12  # down to the end, then no edge to look for above the best
    saturated = searched(lambda k: 0.7 if k >= 1 else 0.9 - k / 100)
    assert max(saturated) <= 12 and len(saturated) < 25


def made(cell: Cell, curve: dict[float, float], off: float = 2.0) -> dict:
    size = bench_rates.length(cell.C)
    cases = {
        bench_rates.off_name(cell.text, size): {"cell": None, "octave": None, "bytes": size, "bits": [off] * 3}
    }
    for k, ratio in curve.items():
        bits = studies.finite([off * ratio] * 2 + [off * ratio])
        cases[cell.name(k)] = {"cell": vars(cell), "octave": k, "bytes": size, "lr": cell.rate(k), "bits": bits}
    return cases


def test_what_is_concluded_from_the_cases():
    gd, muon = Cell("gd", 16, "a"), Cell("muon", 256, "b")  # where the defaults are 0.5 / C and 0.03
    cases = made(gd, {-2.0: 0.95, 0.0: 0.9, 1.0: 0.88, 2.0: 0.92, 4.0: 1.1, 6.0: math.inf})
    cases |= made(muon, {-2.0: 0.9, 0.0: 0.8, 2.0: math.inf})
    first, second = bench_rates.summary(cases, [gd, muon, Cell("gd", 64, "a")])
    assert first["best_octave"] == 1
    assert first["best_lr"] == 2 * first["default_lr"] == 1 / 16 and not first["finished"]
    assert first["default_on_over_off"] == pytest.approx(0.9) and first["best_on_over_off"] == pytest.approx(0.88)
    assert first["edge_octave"] == 4 and first["edge_lr"] == 8 / 16 and not first["edge_diverged"]
    assert second["best_lr"] == 0.03 and second["edge_lr"] == 0.12 and second["edge_diverged"]
    rules = bench_rates.rules(cases, [gd, muon])
    assert rules["gd"]["best_base"] == 1 and rules["gd"]["default"]["max_excess"] == pytest.approx(0.9 / 0.88 - 1)
    assert rules["muon"]["best"]["mean_excess"] == 0
    tried = rules["gd"]["tried"]
    assert tried["1 / (8 sqrt C)"] == tried["0.5 / C"] == rules["gd"]["default"]  # the same at C = 16
    lines = bench_rates.table(bench_rates.conclusions(cases, [gd, muon])).splitlines()
    assert "| gd | 16 | a | 0.0312 | 0.900 | 0.0625 | 2 x | 0.880 | 0.5 |" in lines
    assert "| muon | 256 | b | 0.03 | 0.800 | 0.03 | 1 x | 0.800 | 0.12 (diverges) |" in lines


def test_one_rule_for_two_texts_is_between_their_best_rates():
    a, b = Cell("gd", 16, "a"), Cell("gd", 16, "b")
    cases = made(a, {k: 0.9 + 0.02 * k**2 for k in (-2.0, 0.0, 2.0)})
    cases |= made(b, {k: 0.5 + 0.02 * (k - 2) ** 2 for k in (-2.0, 0.0, 2.0, 4.0)})
    rule = bench_rates.rules(cases, [a, b])["gd"]
    assert 0 <= rule["best_octave"] <= 2 and rule["best"]["mean_excess"] <= rule["default"]["mean_excess"]
    assert bench_rates.between({0.0: 0.5, 2.0: 2.0}, 1.0) == pytest.approx(1) and math.isnan(
        bench_rates.between({0.0: 0.5}, 1.0)
    )
    assert bench_rates.between({0.0: 0.5, 2.0: math.inf}, 1.0) == math.inf
    began = made(a, {-2.0: 0.9})
    assert "| gd | 16 | a | 0.0312 | not tried | 0.00781 | 0.25 x | 0.900 | not reached |" in bench_rates.table(
        bench_rates.conclusions(began, [a]))
    assert bench_rates.rules(began, [a]) == {}
    diverged = bench_rates.rules(made(a, {-2.0: 0.9, 0.0: math.inf, 2.0: math.inf}), [a])["gd"]
    assert diverged["default"] == {"mean_excess": None, "max_excess": None} and diverged["best_base"] == 0.125


def test_rates_command_runs_resumes_and_ends(small, tmp_path, capsys):
    out = tmp_path / "rates.json"
    command = ["--text", str(small / "text"), "--title", "words", "--model", str(small), "--periods", "8",
               "--optimizers", "gd",
               "--least", "64", "--most", "64", "--jobs", "1", "--out", str(out)]
    bench_rates.main([*command, "--minutes", "0"])
    assert not out.exists()
    bench_rates.main(command)
    first = json.loads(out.read_text())
    assert {"what", "machine", "setting", "cases", "summary", "rules"} <= set(first) and len(first["summary"]) == 2
    assert all(row["finished"] and row["runs"] >= 3 for row in first["summary"])
    lost = f"gd C8 words {first['summary'][1]['best_octave']:+g}"
    kept = first["cases"].copy()
    gone = kept.pop(lost)
    out.write_text(json.dumps(first | {"cases": kept}))
    capsys.readouterr()
    bench_rates.main(command)
    again = json.loads(out.read_text())
    ran = [line for line in capsys.readouterr().out.splitlines() if "bytes/s" in line]
    assert again["cases"][lost]["bits"] == pytest.approx(gone["bits"]) and ran[0].startswith(lost) and len(ran) == 1
    assert {n: r for n, r in again["cases"].items() if n != lost} == kept
    bench_rates.main(["--table", "--out", str(out)])
    assert capsys.readouterr().out == bench_rates.table(again) + "\n"


# -- continual -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_forgetful_state_is_the_learned_cms_and_nothing_else(small):
    model = bench_continual.learner(HopeForCausalLM.from_pretrained(small), 2)
    A, B = studies.excerpts(WORDS, 96, 96, 0)[:1], studies.excerpts(WORDS[::-1], 64, 64, 0)[:1]
    _, state = model(A, learn="next_token")
    before = state.clone()
    found, _ = studies.bits(model, B, "off", bench_continual.forgotten(state, model))
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), before.tensors())) and state.pos == before.pos
    frozen = HopeForCausalLM.from_pretrained(small)  # the same by hand: the learned weights as parameters
    levels = model.levels(state)[0]
    for level, learned in zip(frozen.blocks[0].cms.levels, levels):
        for name in ("up", "down"):
            assert not torch.equal(level[name], dense(learned[name]))
            level[name].copy_(dense(learned[name]))
    assert found == pytest.approx(studies.bits(frozen, B, "off")[0], rel=1e-5)


def dense(matrix) -> torch.Tensor:
    """A single row's matrix of a level, written out."""
    return matrix[0] if isinstance(matrix, torch.Tensor) else matrix.dense(1)[0]


def test_continual_command_runs_and_resumes(small, tmp_path, capsys):
    out = tmp_path / "continual.json"
    command = ["--text", str(small / "text"), "--title", "words", "--model", str(small), "--bytes", "128",
               "--levels", "0", "2",
               "--out", str(out)]
    bench_continual.main(command)
    first = json.loads(out.read_text())
    assert len(first["cases"]) == 4
    for record in first["cases"].values():
        before = record["A"]["cms"]["before"]
        assert len(before) == 3 and record["A"]["whole"]["before"] == before
        assert sorted(before) == pytest.approx(sorted(record["A_other"]["cms"]["before"]))
        cms = [record[name]["cms"] for name in ("A", "A_other", "B")]
        same = [stages[stage] == stages["before"] for stages in cms for stage in ("after_A", "after_B")]
        assert all(same) if record["K"] == 0 else not any(same)
    learned = first["cases"]["words, then John and Acts (KJV), K 2"]
    assert studies.mean(learned["A"]["cms"]["after_A"]) < studies.mean(learned["A"]["cms"]["before"])
    written = out.read_bytes()
    capsys.readouterr()
    bench_continual.main(command)
    shown = capsys.readouterr().out
    bench_continual.main(["--table", "--out", str(out)])
    assert out.read_bytes() == written and shown == capsys.readouterr().out and len(shown.splitlines()) == 6


def test_kept_is_a_share_of_the_gain():
    stages = {"before": [2.0, 4.0], "after_A": [1.0, 1.0], "after_B": [1.5, 2.5]}
    assert bench_continual.kept(stages) == pytest.approx(0.5)
    assert bench_continual.kept(stages | {"after_A": [3.0, 3.0]}) is None
    assert bench_continual.kept(stages | {"after_B": [1.0, None]}) is None


# -- measurements --------------------------------------------------------------------------------------------


def run(case: Case, **options) -> dict:
    return bench_cms.KINDS[case.kind](case, "cpu", {}, seconds=0.01, quick=True, **options)


def test_work_is_the_hand_counted_one():
    case = Case("refresh", d=8, C=16, B=2)  # matrices [32, 8] and [8, 32]
    assert case.weights == 512 and bench_cms.refresh_work(case) == (
        2 * 2 * 512 * 16, 2 * (512 * 8 + 2 * 40 * 16 * 4)
    )
    (flops, nbytes), work = bench_cms.refresh_work(case), lambda o: bench_cms.refresh_work(
        replace(case, optimizer=o)
    )
    assert work("momentum") == (flops, nbytes + 2 * 512 * 8) and work("muon") == (
        flops + 2 * 2 * 5 * (4 * 64 * 32 + 2 * 512), nbytes
    )
    newton = run(Case("newton", 8, 16, B=2, optimizer="muon"))
    assert newton["flops"] == work("muon")[0] - flops and newton["bytes"] == 2 * 512 * 8
    c = CMSConfig(8, (16, 64), optimizer="momentum")
    assert [bench_model.level_bytes(c, l)["total"] for l in (0, 1)] == [512 * 8, 512 * 12]
    assert [bench_model.level_bytes(c.replace(optimizer="muon"), l, 2)["total"] for l in (0, 1)] == [512 * 10] * 2


def scaled(case, given):
    bench_cms.refresh_matrix_(case, given._replace(right=given.right * 1.01))


def no_momentum(case, given):
    bench_cms.refresh_matrix_(case, given._replace(moment=given.moment.clone()))


def one_row(case, given):
    bench_cms.refresh_matrix_(case, bench_cms.Given(*(None if t is None else t[:1] for t in given)))


def no_copy(case, given):
    bench_cms.refresh_matrix_(case, given._replace(copy=None))


@pytest.mark.parametrize("optimizer, dtype, harm", [
    ("gd", "fp32", scaled), ("momentum", "fp32", no_momentum), ("muon", "fp32", one_row),
    ("momentum", "bf16", scaled), ("gd", "bf16", no_copy),
])
def test_a_wrong_refresh_gets_no_time(optimizer, dtype, harm):
    case = Case("refresh", 16, 32, B=2, optimizer=optimizer, dtype=dtype)
    record = run(case, op=harm)
    assert record["status"] == "refused" and "differs from fp64" in record["reason"] and "ms" not in record
    assert run(case)["check"]["ok"]


def test_a_wrong_reading_gets_no_time():
    for rows in ("shared", "own"):
        case = Case("forward", 16, 8, K=2, B=3, rows=rows)
        assert run(
            case, op=lambda case, x, levels: 1.001 * bench_cms.read_levels(case, x, levels)
        )["status"] == "refused"
        record = run(case)
        assert record["check"]["ok"] and record["of_module"] > 0 and record["flops"] == 2 * 3 * 8 * 2 * 8 * 16 * 16


def test_a_wrong_orthogonalisation_gets_no_time():
    case = Case("newton", 16, 8, B=2, optimizer="muon")
    assert run(case)["check"]["ok"]
    record = run(case, op=lambda case, grad: 1.0001 * bench_cms.newton_schulz(case, grad))
    assert record["status"] == "refused" and "ms" not in record


def test_a_segment_and_waiting_factors_pass_their_checks():
    before = bench_cms.policy.TABLE
    record = run(Case("pending", 16, 8, B=2, T=16))
    assert record["check"]["ok"] and record["segments"] == 4 and record["of_at_once"] > 0
    assert bench_cms.policy.TABLE == before
    for optimizer in bench_cms.OPTIMIZERS:
        record = run(Case("segment", 16, 8, B=2, optimizer=optimizer))
        assert record["check"]["ok"] and record["tokens/s"] > 0


def test_a_backend_without_kernels_for_a_case_is_not_measured_under_its_name():
    for case in (
        Case("segment", 16, 8, dtype="bf16", backend="cpp"), Case("refresh", 16, 8, dtype="bf16", backend="cpp")
    ):
        with pytest.raises(bench_cms.m.Unserved, match="'cpp' does not serve d 16, bf16"):
            bench_cms.measured(case, "cpu", {}, seconds=0.01, quick=True)
    assert bench_cms.measured(
        Case("segment", 16, 8, backend="chunked"), "cpu", {}, seconds=0.01, quick=True
    )["check"]["ok"]


def test_a_segment_that_learns_something_else_is_refused(monkeypatch):
    monkeypatch.setattr(bench_cms, "orthogonal", lambda g: g)
    assert run(Case("segment", 16, 8, optimizer="muon"))["status"] == "refused"


def test_cases_have_names_of_their_own_and_cover_the_grid():
    for device in ("cpu", "cuda"):
        for quick, full in ((False, False), (False, True), (True, True)):
            names = [name for name, _, _ in bench_cms.items(device, quick, full)]
            assert len(set(names)) == len(names) >= 5
    refreshes = {(c.d, c.C, c.optimizer) for c in bench_cms.CPU_CASES if c.kind == "refresh"}
    assert refreshes == {
        (d, C, o) for d in (128, 256, 512) for C in bench_cms.PERIODS for o in bench_cms.OPTIMIZERS
    }
    assert {c.d for c in bench_cms.GPU_CASES if c.kind == "refresh"} == {1024, 2048, 4096}


def test_the_command_writes_resumes_and_tabulates(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_cms, "QUICK_CPU", (Case("refresh", 16, 16), Case("forward", 16, 8, K=2)))
    monkeypatch.setattr(bench_model, "QUICK_CPU", ())
    # the tree may change meanwhile
    monkeypatch.setattr(bench_cms, "stamp", lambda quick: {"commit": "a", "source": "s", "quick": quick})
    out = tmp_path / "cms.json"
    assert bench_cms.main(["--quick", "--out", str(out)]) == 0
    first = json.loads(out.read_text())
    assert set(first) == {"stamp", "cases"} and {"machine", "copy", "matmul fp32"} < set(first["cases"])
    record = first["cases"]["refresh d16 C16 B1 fp32 gd"]
    assert record["status"] == "ok" and record["GB/s"] > 0
    assert record["of_copy"] == pytest.approx(record["GB/s"] / record["ceilings"]["copy"])
    capsys.readouterr()
    assert bench_cms.main(["--table", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "Refresh of one level" in text and "| gd | 16 | 16 | 1 |" in text and "Models" not in text
    assert bench_cms.main(["--quick", "--out", str(out)]) == 0
    assert json.loads(out.read_text()) == first
