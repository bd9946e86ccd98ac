"""The tasks of recall and of needles say what they promise, and the studies of them run none of their cases twice."""

import json
import re

import pytest
import torch

from benchmarks import bench_needles, bench_recall, bench_text_needles
from benchmarks.synthetic import lessons
from benchmarks.synthetic.arms import WITHIN, size
from benchmarks.synthetic.needles import KEYS, NEEDLES, VALUES, needles
from benchmarks.synthetic.pairs import KINDS, Counts, pairs
from benchmarks.synthetic.text_needles import TOLD, hay, text_needles


def test_needles_are_told_once_and_asked_for_once():
    ids, at = needles(50, 40, 16, torch.Generator().manual_seed(0))
    assert ids.shape == (50, 40 + 16 + 2 * NEEDLES) and at.tolist() == [56, 58, 60, 62]
    assert (ids[:, 40:56] >= KEYS + VALUES).all()
    for row in ids.tolist():
        hay = row[:40]
        told = {hay[i]: hay[i + 1] for i in range(40) if hay[i] < KEYS}
        assert len(told) == NEEDLES == sum(KEYS <= token < KEYS + VALUES for token in hay)
        assert {row[i]: row[i + 1] for i in at.tolist()} == told
    with pytest.raises(ValueError, match="needles: argument T is 7, expected at least 8"):
        needles(1, 7, 16, torch.Generator())


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_pairs_say_which_tellings_of_a_key_share_a_chunk(chunk):
    ids, at, kind = pairs(64, Counts(12, 4, 4), chunk, torch.Generator().manual_seed(0))
    seen = [0] * len(KINDS)
    for row, kinds in zip(ids.tolist(), kind.tolist()):
        assert sorted(row[place] for place in at) == sorted(set(row[:56:2]))
        for place, k in zip(at.tolist(), kinds):
            told = [i for i in range(0, 56, 2) if row[i] == row[place]]
            assert row[told[-1] + 1] == row[place + 1]
            seen[k] += 1
            if k == 0:
                assert len(told) == 1
            elif k == 1:
                assert len(told) == 2 and row[told[0] + 1] == row[told[1] + 1]
            else:
                assert len(told) == 2 and (told[0] // chunk == told[1] // chunk) == (k == 3)
    assert sum(seen) == 64 * 20 and seen[0] == 64 * 12 and seen[1] == 64 * 4
    assert seen[3] == 0 if chunk == 1 else seen[3] > 5


def test_pairs_say_what_they_can_not_do():
    with pytest.raises(ValueError, match="pairs: argument chunk is 32, expected a divisor of 16"):
        pairs(1, Counts(4), 32, torch.Generator())
    with pytest.raises(ValueError, match="pairs: argument counts asks for 33 keys, expected at most 32"):
        pairs(1, Counts(30, 3), 16, torch.Generator())


class Last(torch.nn.Module):
    """Answers with what a key was told first, or last."""

    def __init__(self, last: bool):
        super().__init__()
        self.last = last

    def forward(self, ids):
        logits = torch.zeros(*ids.shape, bench_recall.VOCABULARY)
        for b, row in enumerate(ids.tolist()):
            for place in range(64, len(row), 2):
                told = [i for i in range(0, 64, 2) if row[i] == row[place]]
                logits[b, place, row[told[-1 if self.last else 0] + 1]] = 1
        return logits, None


def test_the_study_of_recall_scores_kinds_apart():
    assert bench_recall.answered(Last(True), Counts(12, 4, 4), 16, 70) == dict.fromkeys(KINDS, 1.0)
    first = bench_recall.answered(Last(False), Counts(12, 4, 4), 16, 70)
    assert first["once"] == first["repeated"] == 1 and first["updated"] < 0.1 > first["updated in a chunk"]
    assert bench_recall.answered(Last(False), Counts(32), 16, 3) == {"once": 1.0}


def test_a_stage_is_left_when_it_is_mastered(monkeypatch):
    lessons = bench_recall.Lessons(bench_recall.build(bench_recall.ARMS["delta"], 0, 32), 16, 2, 0)
    lessons(0)
    assert lessons.stage == 0 and lessons.smooth > bench_recall.MASTERED
    lessons.smooth = 0.1
    lessons(bench_recall.AT_LEAST - 1)
    assert lessons.stage == 0
    lessons.smooth = 0.1
    lessons(bench_recall.AT_LEAST)
    assert lessons.stage == 1 and lessons.smooth > bench_recall.MASTERED


def test_the_arms_of_recall_have_one_size():
    sizes = [size(bench_recall.build(arm, 0, 64)) for arm in bench_recall.ARMS.values()]
    assert max(sizes) < 70_000 and max(sizes) / min(sizes) < 1 + WITHIN


def test_the_study_of_recall_searches_rates_and_runs_no_case_twice(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_recall, "RATES", (1e-9, 4e-3))
    monkeypatch.setattr(lessons, "MOST", 3)
    out = tmp_path / "recall.json"
    command = ["--arms", "delta", "attention after lessons", "--seeds", "0", "1", "--steps", "12", "--rows", "4",
               "--sequences", "8", "--d-model", "32", "--out", str(out)]
    bench_recall.main(command)
    first = json.loads(out.read_text())
    assert set(first["cases"]) == {f"{arm} rate {case}" for arm in ("delta", "attention after lessons")
                                   for case in ("1e-09 seed 0", "0.004 seed 0", "0.004 seed 1")}
    bench_recall.main(command)
    assert json.loads(out.read_text())["cases"] == first["cases"]
    capsys.readouterr()
    bench_recall.main([*command, "--table"])
    lines = capsys.readouterr().out.splitlines()
    assert [r["lessons"] for r in first["cases"].values()] == 3 * [0] + 3 * [3]
    names = ["attention after lessons", "delta", "delta, read in chunks of 4", "delta, read in chunks of 1"]
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in names]
    assert all(line.endswith("| 2 | 0.004, stuck at 6 keys |") for line in lines[2:])


def test_a_model_of_recall_reads_in_other_chunks():
    model = bench_recall.build(bench_recall.ARMS["recall"], 0, 32)
    other = bench_recall.in_chunks(model, 4)
    direct = bench_recall.build(bench_recall.ARMS["recall, chunk 4"], 0, 32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        a, b, c = (m.eval()(ids)[0] for m in (model, other, direct))
    assert torch.equal(b, c) and not torch.allclose(a, b)


def test_the_step_size_that_training_presses_on_is_the_layers_own():
    """Of the tokens of a first chunk, whose memories are the initial ones."""
    model = bench_needles.build("recall", 0, 64, 16)
    with torch.no_grad():
        mixer = model.blocks[0].mixer
        torch.nn.init.normal_(mixer.memory_init("eta")["w1"])
        ids = torch.randint(0, 128, (2, 15), generator=torch.Generator().manual_seed(1))
        _, state = model(ids)
        logits = bench_needles.write_logits(model, ids)
    eta = state.mixers[0].pending_eta[:, :15, 0]
    torch.testing.assert_close(2 * torch.sigmoid(logits), eta, rtol=1e-5, atol=1e-6)
    assert eta.std() > 0.01


def test_the_study_of_needles_writes_its_cases_and_runs_none_twice(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_needles, "RATES", (4e-3,))
    monkeypatch.setattr(lessons, "MOST", 2)
    out = tmp_path / "needles.json"
    command = ["--arms", "unpressed", "attention", "attention_conv", "--seeds", "0", "--steps", "3", "--tokens", "64",
               "--lengths", "16", "64", "--sequences", "3", "--out", str(out)]
    bench_needles.main(command)
    first = json.loads(out.read_text())
    assert set(first["cases"]["run attention seed 0"]["found"]) == {"16", "64"}
    ran = [first["cases"][f"run {arm} seed 0"] for arm in ("unpressed", "attention", "attention_conv")]
    assert [(r["lessons"], r["curve"][-1][0]) for r in ran] == [(0, 3), (2, 18), (0, 12)]
    assert all(abs(r["parameters"] / 65_985 - 1) < 0.02 for r in ran)
    bench_needles.main(command)
    assert json.loads(out.read_text())["cases"] == first["cases"]
    assert "| unpressed | 65,985 |" in capsys.readouterr().out


def test_a_needle_is_found_however_the_hay_is_cut(monkeypatch):
    model = bench_needles.build("recall", 0, 64, 16)
    whole = bench_needles.found(model, 64, 16, 10)
    monkeypatch.setattr(bench_needles, "PIECE", 170)
    assert bench_needles.found(model, 64, 16, 10) == whole
    ids, at = needles(10, 64, 16, torch.Generator().manual_seed(64))
    with torch.no_grad():
        right = (model(ids)[0][:, at].argmax(-1) == ids[:, at + 1]).float().mean()
    assert whole == float(right)


@pytest.mark.parametrize("keys, values", [bench_needles.TOLD, TOLD])
def test_a_lesson_asks_for_every_telling_after_the_first(keys, values):
    ids, answers = lessons.lesson(50, keys, values, torch.Generator().manual_seed(0))
    width = keys.shape[1] + 1
    tellings = (t.unflatten(1, (lessons.PAIRS, width)).tolist() for t in (ids, answers))
    known = set(map(tuple, keys.tolist()))
    for row, asked in zip(*tellings):
        told: dict[tuple, int] = {}
        for (*key, value), (*nothing, answer, last) in zip(row, asked):
            assert tuple(key) in known and value in values and {*nothing, last} == {lessons.NONE}
            assert answer == lessons.NONE if tuple(key) not in told else values[answer] == told[tuple(key)] == value
            told[tuple(key)] = value
        assert len(told) <= lessons.KEYS
    drawn = ids.unflatten(1, (-1, width))[..., 0 if width == 2 else 1].unique()
    assert len(drawn) > 20  # of all keys, not only the first


def test_lessons_end_when_a_model_finds_a_value_by_its_key(monkeypatch):
    monkeypatch.setattr(lessons, "RATE", 1e-2)
    model = bench_needles.build("recall", 0, 32, 2)  # which learns in a few steps what takes attention hundreds
    keys, values = bench_needles.TOLD[0][:8], bench_needles.TOLD[1][:4]
    steps = lessons.teach(model, keys, values, 0)
    assert 20 < steps < lessons.MOST
    ids, answers = lessons.lesson(100, keys, values, torch.Generator().manual_seed(9))
    with torch.no_grad():
        said = model(ids)[0][..., values].argmax(-1)
    assert (said == answers)[answers != lessons.NONE].float().mean() > 0.9


def test_needles_in_text_are_told_once_and_asked_for_once_and_the_rest_is_text():
    text = b"In the beginning was the Word, @ and the Word was with God. " * 5
    ids, at = text_needles(hay(text), 50, 64, 16, torch.Generator().manual_seed(0))
    assert ids.shape == (50, 64 + 16 + 4 * NEEDLES) and at.tolist() == [82, 86, 90, 94]
    for row in map(bytes, ids.tolist()):
        strings = [row[i : i + 4] for i in range(len(row)) if row[i : i + 1] == b"@"]
        told, asked = strings[:NEEDLES], strings[NEEDLES:]
        assert sorted(told) == sorted(asked) and b"".join(asked) == row[80:] and len({n[:3] for n in told}) == NEEDLES
        assert all(n[1:].isalpha() and n[1:].islower() for n in told)
        assert [row[i - 2 : i + 2] for i in at.tolist()] == asked
        between = b"....".join(map(re.escape, re.split(b"@...", row[:80])))
        assert re.search(between, bytes(hay(text).tolist()))
    with pytest.raises(ValueError, match="text_needles: argument T is 15, expected at least 16"):
        text_needles(hay(text), 1, 15, 16, torch.Generator())
    with pytest.raises(ValueError, match="argument text has 60 bytes, expected at least T . close, 80"):
        text_needles(hay(text)[:60], 1, 64, 16, torch.Generator())


def test_the_study_of_needles_in_text_trains_and_tests_on_its_two_parts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_needles, "RATES", (4e-3,))
    monkeypatch.setattr(lessons, "MOST", 2)
    drawn = []
    monkeypatch.setattr(bench_text_needles, "text_needles", lambda text, *how: drawn.append(text) or text_needles(
        text, *how))
    source, out = tmp_path / "text.txt", tmp_path / "text_needles.json"
    source.write_bytes(b"a" * 1600 + b"b" * 400)
    command = ["--arms", "recall", "attention", "--seeds", "0", "--steps", "2", "--tokens", "64", "--text", str(source),
               "--lengths", "16", "64", "--sequences", "3", "--out", str(out)]
    bench_text_needles.main(command)
    first = json.loads(out.read_text())
    assert set(first["cases"]["run attention seed 0"]["found"]) == {"16", "64"}
    assert {bytes(t.unique().tolist()): len(t) for t in drawn} == {b"a": 1600, b"b": 400}
    bench_text_needles.main(command)
    assert json.loads(out.read_text())["cases"] == first["cases"]
    sizes = [first["cases"][f"run {arm} seed 0"]["parameters"] for arm in ("recall", "attention")]
    assert abs(sizes[1] / sizes[0] - 1) <= 0.02 and f"| recall | {sizes[0]:,} |" in capsys.readouterr().out
    with pytest.raises(SystemExit):  # before an arm is trained
        bench_text_needles.main([*command, "--lengths", "1024"])
    assert "of which 400 for lengths of up to 1024: expected at least 1040" in capsys.readouterr().err
