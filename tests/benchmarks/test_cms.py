"""The studies and measurements of the CMS: what they choose to run, what they conclude, what they refuse to
time, and that they resume."""

import json
import math
from dataclasses import replace

import pytest
import small_model
import torch

from benchmarks import bench_cms, bench_model, bench_rates, studies
from benchmarks.bench_cms import Case
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
    three = studies.with_cms(model, model.config.cms.replace(chunks=(8, 32, 128), lr=0.1))
    torch.testing.assert_close(three(ids)[0], model(ids)[0], rtol=1e-6, atol=1e-5)
    level = {name: p.detach() for name, p in three.blocks[0].cms.levels[2].items()}
    up, down = level["up"], level["down"]
    assert float(up.std()) > 0.2 and float(down.std()) > 0.1
    assert torch.equal(up[0::2], up[1::2]) and torch.equal(down[:, 0::2], -down[:, 1::2])
    assert studies.cms_of(three) is three.config.block_cms[0] and studies.cms_of(three).chunks == (8, 32, 128)


@torch.no_grad()
def test_a_level_that_is_added_learns_at_relative_rates_too(small):
    model = HopeForCausalLM.from_pretrained(small)
    cms = model.config.cms.replace(chunks=(8, 16, 32), relative=True, lr=None)
    three, ids = studies.with_cms(model, cms), studies.excerpts(WORDS, 70, 70, 0)
    level = three.blocks[0].cms.levels[2]
    _, state = three(ids, learn="next_token")
    for name, learned in state.cms[0].weights[2].items():
        assert float((learned - level[name]).abs().max()) > 1e-6, name


@torch.no_grad()
def test_last_half_is_the_second_half_of_one_reading(small):
    model, ids = HopeForCausalLM.from_pretrained(small), studies.excerpts(WORDS, 128, 128, 0)
    for learn in ("off", "next_token"):
        logits, _ = model(ids, learn=learn)
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        ).view(3, -1)
        found, _ = studies.from_place(model, ids, ids.shape[1] // 2, learn)
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


def test_rates_command_compares_resumes_and_tells(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(bench_rates.TOKENS, bench_rates.BUNDLED, lambda C: 768)
    out = tmp_path / "rates.json"
    command = ["--periods", "64", "256", "--factors", "1", "2", "--out", str(out)]
    bench_rates.main(command)
    first = json.loads(out.read_text())
    assert len(first["cases"]) == 2 * 2 * 2 and {c["domain"] for c in first["cases"].values()} == {"KJV", "Python"}
    one = first["cases"]["hope-byte Python C64 x1"]
    assert one["tokens"] == 768 and one["change"] < 0 and one["second_half"] < one["change"] <= one["worst"]
    assert first["cases"]["hope-byte Python C64 x2"]["change"] < one["change"]  # far off, more is better
    kept = first["cases"].copy()
    gone = kept.pop("hope-byte KJV C256 x1")
    out.write_text(json.dumps(first | {"cases": kept}))
    capsys.readouterr()
    bench_rates.main(command)
    again, lines = json.loads(out.read_text()), capsys.readouterr().out.splitlines()
    assert again["cases"]["hope-byte KJV C256 x1"] == gone and sum(" C256 x" in line for line in lines) == 1
    bench_rates.main(["--table", "--out", str(out)])
    shown = capsys.readouterr().out
    assert shown == bench_rates.table(again) + "\n"
    assert f"| hope-byte | Python | {one['off']:.3f} | {one['change']:+.3f} ({one['worst']:+.3f}) |" in shown


def test_the_default_rate_is_what_is_measured():
    model = HopeForCausalLM.from_pretrained("hope-byte")
    for C in bench_rates.PERIODS:
        config = bench_rates.model_at(model, C, 1.0).config.block_cms[0]
        default = CMSConfig(128, (C,), expansion=2.0)
        assert config.learning_rates == (default.learning_rates[0], 0.0)
        assert (config.optimizer, config.relative) == (default.optimizer, default.relative)


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
    assert set(first) == {"stamp", "cases"} and {"machine", "copy", "fma fp32"} < set(first["cases"])
    record = first["cases"]["refresh d16 C16 B1 fp32 gd"]
    assert record["status"] == "ok" and record["GB/s"] > 0
    assert record["of_copy"] == pytest.approx(record["GB/s"] / record["ceilings"]["copy"])
    capsys.readouterr()
    assert bench_cms.main(["--table", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "Refresh of one level" in text and "| gd | 16 | 16 | 1 |" in text and "Models" not in text
    assert bench_cms.main(["--quick", "--out", str(out)]) == 0
    assert json.loads(out.read_text()) == first
