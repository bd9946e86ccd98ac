"""The formal languages' answers against words that are written out, and the study's command."""

import itertools
import json

import pytest
import torch

from benchmarks import bench_languages
from benchmarks.synthetic import paper
from benchmarks.synthetic.arms import ARMS, WITHIN, config, same_size, size
from benchmarks.synthetic.languages import BEGIN, END, FIRST, LANGUAGES
from benchmarks.synthetic.mad import TASKS
from hope_kernels import HopeForCausalLM


def balanced(word: str) -> bool:
    for opens, closes in ("ac", "bd"):
        depth = 0
        for symbol in word:
            depth += (symbol == opens) - (symbol == closes)
            if depth < 0:
                return False
        if depth:
            return False
    return True


def runs(word: str, kinds: str) -> bool:
    n = len(word) // len(kinds)
    return n > 0 and word == "".join(kind * n for kind in kinds)


# symbols; is it a word? ; the longest words that the prefixes looked at may need
MEMBERS = {
    "parity": ("ab", lambda w: w.count("b") % 2 == 0, 9),
    "(aa)*": ("a", lambda w: len(w) % 2 == 0, 9),
    "(abab)*": ("ab", lambda w: w == "abab" * (len(w) // 4), 12),
    "a^n b^n": ("ab", lambda w: runs(w, "ab"), 14),
    "a^n b^n c^n": ("abc", lambda w: runs(w, "abc"), 12),
    "shuffle-2": ("abcd", balanced, 8),
}


@pytest.mark.parametrize("name", LANGUAGES)
def test_what_may_follow_is_what_words_of_the_language_go_on_with(name):
    symbols, member, most = MEMBERS[name]
    looked = {"shuffle-2": 3, "a^n b^n c^n": 4}.get(name, 6)
    if name in ("a^n b^n", "a^n b^n c^n"):  # too few of all words are of the language to find them by trying
        words = {"".join(s * n for s in symbols) for n in range(1, most)}
    else:
        all_words = ("".join(w) for n in range(most + 1) for w in itertools.product(symbols, repeat=n))
        words = {word for word in all_words if member(word)}
    prefixes = {w[:n] for w in words for n in range(len(w) + 1)}
    language = LANGUAGES[name]
    drawn = language.words(200, 1 if name != "a^n b^n c^n" else 3, 12, torch.Generator().manual_seed(0))
    checked = 0
    for ids, legal, counted in zip(*drawn):
        assert ids[0] == BEGIN
        text = "".join(symbols[i - FIRST] for i in ids[1:].tolist())
        for place in range(min(looked, int(counted.sum()) - 1) + 1):
            prefix = text[:place]
            expected = [0.0] * language.vocabulary
            expected[END] = float(member(prefix))
            for i, symbol in enumerate(symbols):
                expected[FIRST + i] = float(prefix + symbol in prefixes)
            assert legal[place].tolist() == expected, (prefix, legal[place])
            checked += 1
    assert checked > 200


@pytest.mark.parametrize("name", LANGUAGES)
def test_words_are_as_long_as_asked_and_their_ends_are_ends(name):
    language = LANGUAGES[name]
    words = language.words(300, 21, 40, torch.Generator().manual_seed(1))
    lengths = words.counted.sum(1) - 1
    assert lengths.min() >= 21 - 2 and lengths.max() <= 40 and len(lengths.unique()) > 3
    assert words.counted.int().diff(dim=1).max() <= 0  # no gap
    if "^n" in name:
        assert (words.legal[torch.arange(300), lengths, END] == 1).all()


def test_arms_are_of_one_size():
    def make(arm, hidden):
        return config(arm, 7, 32, 1, 4 if arm == "attention" else 1, hidden)

    wanted = size(HopeForCausalLM(make("hope", 64)))
    for arm in ("titans", "attention"):
        model = HopeForCausalLM(same_size(wanted, lambda hidden, arm=arm: make(arm, hidden)))
        assert abs(size(model) / wanted - 1) <= WITHIN
    with pytest.raises(ValueError, match="same_size: argument make gives"):
        same_size(wanted // 4, lambda hidden: make("attention", hidden))


def test_the_study_writes_its_cases_and_runs_none_twice(tmp_path, capsys):
    out = tmp_path / "languages.json"
    command = ["--languages", "(aa)*", "--arms", "hope", "--seeds", "0", "1", "--steps", "4", "--batch", "4",
               "--d-model", "8", "--out", str(out)]
    bench_languages.main(command)
    first = json.loads(out.read_text())
    assert {f"run (aa)* hope seed {seed}" for seed in (0, 1)} <= set(first["cases"])
    run = first["cases"]["run (aa)* hope seed 1"]
    assert 0 <= run["right"]["8"]["words"] <= run["right"]["8"]["answers"] <= 1
    bench_languages.main(command)
    assert json.loads(out.read_text())["cases"] == first["cases"]
    bench_languages.main([*command, "--table"])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| (aa)* | hope |"))
    assert row.endswith("| 100, 100 |")


def test_the_papers_figures_are_of_these_languages_and_tasks():
    assert {language for language, _ in paper.LANGUAGES} == set(LANGUAGES)
    assert {task for task, _ in paper.MAD} < set(TASKS)
    assert {arm for _, arm in (*paper.LANGUAGES, *paper.MAD)} <= set(ARMS)
