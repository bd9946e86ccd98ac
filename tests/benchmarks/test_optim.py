"""The comparison of optimizers: what it tries, that it resumes, what it tells."""

import json

import pytest

from benchmarks import bench_optim as b

SMALL = ("--steps 4 --search-steps 2 --widest 1 --seeds 0 1 --d-model 16 --layers 1 --batch 2 --tokens 32 "
         "--judge-rows 2 --every 2 --optimizers m3 dgd").split()


def test_the_command_searches_compares_resumes_and_tells(tmp_path, capsys):
    out = tmp_path / "optim.json"
    b.main([*SMALL, "--out", str(out)])
    first = json.loads(out.read_text())
    cases = first["cases"]
    for name in ("m3", "dgd"):
        searched = {c["lr"]: c["bits"] for n, c in cases.items() if n.startswith(f"search {name} ")}
        runs = [cases[f"run {name} seed {seed}"] for seed in (0, 1)]
        assert len(searched) >= 2 and {r["lr"] for r in runs} == {min(searched, key=searched.get)}
        for run in runs:
            assert [step for step, _, _ in run["curve"]] == [2, 4] and 0 < run["share"] < 1
            assert 0 < run["curve"][0][1] < run["curve"][1][1] <= run["seconds"]
    m3, dgd = cases["run m3 seed 0"], cases["run dgd seed 0"]
    assert m3["state"] > 2 * m3["weights"] > dgd["state"]  # four matrices each; AdamW's two for some
    gone = cases.pop("run dgd seed 1")
    out.write_text(json.dumps(first))
    capsys.readouterr()
    b.main([*SMALL, "--out", str(out)])
    again, lines = json.loads(out.read_text()), capsys.readouterr().out.splitlines()
    assert again["cases"]["run dgd seed 1"]["bits"] == gone["bits"]  # of seed and step alone
    assert sum(line.startswith(("run", "search")) for line in lines) == 1
    b.main(["--table", "--out", str(out)])
    shown = capsys.readouterr().out
    assert shown == b.table(again) + "\n" and f"| m3 | {m3['lr']:g} |" in shown
    with pytest.raises(ValueError, match="another setting"):
        b.main([*SMALL, "--tokens", "16", "--out", str(out)])


def test_the_search_walks_to_the_best_rate(monkeypatch):
    """Past its first neighbours, and not further than it may; a rate that diverges is the worst."""
    tried = []

    def train(name, lr, base, seed, steps, text, args):
        tried.append(lr)
        return {"bits": None if lr > 0.1 else abs(lr - 0.05)}

    monkeypatch.setattr(b, "train", train)
    args = type("Args", (), {"search_steps": 1, "widest": 9})
    study = b.s.Study(None, "", {})
    first = b.OPTIMIZERS["m3"][1]
    assert b.best_rate("m3", 0.0, study, {}, args) == pytest.approx(16 * first)
    args.widest = 2
    assert b.best_rate("m3", 0.0, b.s.Study(None, "", {}), {}, args) == pytest.approx(4 * first)


def test_losses_at_a_time_lie_between_points():
    curve = [[2, 1.0, 6.0], [4, 3.0, 4.0]]
    assert b.at_time(curve, 0.5) is None and b.at_time(curve, 2.0) == pytest.approx(5.0)
    assert b.at_time(curve, 9.0) == 4.0 and b.at_time([], 1.0) is None
