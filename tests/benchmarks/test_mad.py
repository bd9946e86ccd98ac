"""The six tasks' answers against what the sequences say, and the study's command."""

import json
import math

import pytest
import torch

from benchmarks import bench_mad, tables
from benchmarks.synthetic import mad
from benchmarks.synthetic.arms import WITHIN, size
from benchmarks.synthetic.mad import BLANK, CHOICES, KEY, MARK, NOISE, NONE, SYMBOLS, TASKS, VOCABULARY, score


def drawn(task: str, rows: int = 100) -> list[tuple[list[int], dict[int, int]]]:
    """The ids of each row, and {place: answer} (of the last group that asks there)."""
    ids, at, answers = TASKS[task](rows, torch.Generator().manual_seed(3))
    assert ids.min() >= 0 and ids.max() < VOCABULARY and at.max() < ids.shape[1]
    return [(row, {p: a for p, a in zip(places, said) if a != NONE})
            for row, places, said in zip(ids.tolist(), at.tolist(), answers.tolist())]


@pytest.mark.parametrize("task", TASKS)
def test_chance_is_one_of_the_choices(task):
    sample = TASKS[task](300, torch.Generator().manual_seed(0))
    said = sample.answers[sample.answers != NONE] % CHOICES
    assert len(said) > 1500
    share = torch.bincount(said, minlength=CHOICES) / len(said)
    assert (share - 1 / CHOICES).abs().max() < 0.03
    loss, _ = score(torch.zeros(*sample.ids.shape, VOCABULARY), sample)
    assert float(loss) == pytest.approx(math.log(CHOICES), abs=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_logits_that_say_the_answers_score_one(task):
    sample = TASKS[task](20, torch.Generator().manual_seed(1))
    logits = torch.zeros(*sample.ids.shape, VOCABULARY)
    row, answer = (sample.answers != NONE).nonzero(as_tuple=True)
    logits[row, sample.at[row, answer], sample.answers[row, answer]] = 30.0
    loss, right = score(logits, sample)
    assert float(right) == 1 and float(loss) < 1e-6
    # what is said at one place too early is not an answer
    assert float(score(torch.roll(logits, -1, 1), sample)[1]) < 0.6


def test_compression_asks_the_mark_for_every_symbol():
    ids, at, answers = TASKS["compression"](50, torch.Generator().manual_seed(2))
    assert (ids[:, -1] == MARK).all() and (at == ids.shape[1] - 1).all()
    assert torch.equal(answers // CHOICES, torch.arange(SYMBOLS).expand(50, -1))
    assert torch.equal(answers % CHOICES, ids[:, :-1])


@pytest.mark.parametrize("task, noisy", [("in-context recall", 0.0), ("noisy recall", mad.NOISY)])
def test_a_key_is_asked_for_wherever_it_was_told_before(task, noisy):
    noise = pairs = 0
    for row, said in drawn(task):
        told: dict[int, int] = {}
        for place in range(0, len(row), 2):
            key, value = row[place], row[place + 1]
            pairs += 1
            if key >= NOISE:
                noise += 1
                assert NOISE <= value < BLANK and place not in said
                continue
            assert KEY <= key < NOISE and said.pop(place, told.get(key)) == told.get(key)
            assert told.setdefault(key, value) == value
        assert not said
    assert noise / pairs == pytest.approx(noisy, abs=0.03)


def test_fuzzy_pairs_are_found_by_reading_up_to_where_a_key_ends():
    lengths = set()
    for row, said in drawn("fuzzy recall"):
        line = [token for token in row if token != BLANK]
        assert row[len(row) - len(line) :] == line
        said = {place - (len(row) - len(line)): answer for place, answer in said.items()}
        pairs, place = [], 0
        while place < len(line):
            key = place
            while line[place] >= KEY:
                place += 1
            value = place
            while place < len(line) and line[place] < KEY:
                place += 1
            pairs.append((tuple(line[key:value]), tuple(line[value:place]), value))
        told = {key: value for key, value, _ in pairs[:mad.MOTIFS]}
        assert len(told) == mad.MOTIFS and len(pairs) == 2 * mad.MOTIFS
        assert {key for key, _, _ in pairs[mad.MOTIFS:]} == set(told)
        for key, value, first in pairs[mad.MOTIFS:]:
            assert value == told[key] == tuple(said.pop(first - 1 + i) for i in range(len(value)))
            lengths.add((len(key), len(value)))
        assert not said
    assert len(lengths) == 9


def test_copying_asks_for_the_symbols_in_their_order():
    for row, said in drawn("selective copying"):
        hay = row[: -SYMBOLS]
        assert row[-SYMBOLS:] == [MARK] * SYMBOLS
        assert [token for token in hay if token != BLANK] == [said[len(hay) + i] for i in range(SYMBOLS)]


def test_facts_are_the_same_in_every_sequence():
    seen = {}
    for row, said in drawn("memorisation", 400):
        for place, answer in said.items():
            key = (row[place - 2] - KEY, row[place - 1] - KEY)
            assert row[place] == MARK and seen.setdefault(key, answer) == answer == mad.FACTS[key]
    assert len(seen) == CHOICES * CHOICES and len(set(seen.values())) == CHOICES


def test_the_study_writes_its_cases_and_runs_none_twice(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_mad, "RATES", (1e-2,))
    monkeypatch.setattr(bench_mad, "TESTED", 4)
    monkeypatch.setattr(bench_mad, "HELD_OUT", 4)
    out = tmp_path / "mad.json"
    command = ["--tasks", "in-context recall", "--seeds", "0", "1", "--steps", "2", "--batch", "2", "--d-model", "16",
               "--out", str(out)]
    bench_mad.main(command)
    first = json.loads(out.read_text())
    sizes = {run["parameters"] for run in first["cases"].values()}
    assert max(sizes) / min(sizes) - 1 <= 2 * WITHIN
    runs = {f"run in-context recall {arm} seed {seed}" for arm in bench_mad.ARMS for seed in (0, 1)}
    assert runs < set(first["cases"])
    bench_mad.main(command)
    assert json.loads(out.read_text())["cases"] == first["cases"]
    capsys.readouterr()
    bench_mad.main([*command, "--table"])
    assert capsys.readouterr().out.count("| in-context recall |") == 1
    assert "chance 0.062" in tables.mad({"mad": first})
    assert size(bench_mad.build("hope", 0, bench_mad.argparse.Namespace(d_model=16, attention_heads=4))) in sizes
