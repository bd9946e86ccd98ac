"""bench_real on the bundled model: every part runs, resumes, and its table says what the file says."""

import json
import pathlib

import pytest
import torch

from benchmarks import studies
from benchmarks.real import continual, control, domains, needles, tables, texts
from hope_kernels import CMSConfig, HopeForCausalLM
from hope_kernels.text import Tokenizer


@pytest.fixture(scope="module")
def parts():
    return HopeForCausalLM.from_pretrained("hope-byte"), Tokenizer.from_pretrained("hope-byte")


@pytest.fixture
def study(tmp_path):
    return studies.Study(str(tmp_path / "real.json"), "what", {})


def own(model):
    """One level a block, as a converted model has."""
    cms = CMSConfig(128, (64,), expansion=2.0)
    new = HopeForCausalLM(model.config.replace(cms=cms))
    new.load_state_dict({n: t for n, t in model.state_dict().items() if n in new.state_dict()})
    return new.eval()


def test_halves_and_excerpts_do_not_overlap(parts):
    _, tokenizer = parts
    text = "".join(chr(97 + i % 26) + str(i) for i in range(4000))
    first, second = texts.half(text, False), texts.half(text, True)
    assert first + second == text
    cut = [tokenizer.decode(texts.excerpt(tokenizer, second, 500, i, 3)[0].tolist()) for i in range(3)]
    assert len(set(cut)) == 3 and all(c in second and c not in first for c in cut)
    with pytest.raises(ValueError, match="expected at least 9000"):
        texts.excerpt(tokenizer, second, 9000, 0, 3)


def test_domains_continual_and_control(parts, study, capsys):
    model, tokenizer = own(parts[0]), parts[1]
    found = {k: v for k, v in texts.texts(None, None).items()}
    for _ in range(2):  # the second time there is nothing left to do
        domains.run(study, model, tokenizer, found, 512, 1)
        control.run(study, model, tokenizer, found, 256)
        continual.run(study, model, tokenizer, found, 256, {"adam": continual.RULES["adam"]}, None)
    assert len(capsys.readouterr().out.splitlines()) == 2 * 4 + 2 + 2
    data = json.loads(pathlib.Path(study.path).read_text())
    shown = tables.domains(data)
    python = {(c["mode"], c["learn"]): c for c in tables.cases(data, "domains") if c["domain"] == texts.PYTHON}
    assert python["full", "next_token"]["bits"] < python["full", "off"]["bits"]
    assert len(python["full", "off"]["segments"]) == 2
    assert f"| Python | 1 | {python['full', 'off']['bits']:.3f} |" in shown
    assert tables.worst(data) == pytest.approx(max(
        a - b for d in found for m in domains.MODES for a, b in zip(
            study.cases[f"domain {d} 0 {m} next_token"]["segments"], study.cases[f"domain {d} 0 {m} off"]["segments"]
        )))
    bits = study.cases["control Python, 256 tokens"]["bits"]
    assert bits["own"] < bits["none"] and f"{bits['shuffled']:.3f}" in tables.control(data)
    record = study.cases["continual adam, 256 tokens, all blocks"]
    order = list(found)
    assert record["gain"] == pytest.approx(
        sum(record["stages"]["before"][d] - record["stages"][d][d] for d in order) / 2, abs=1e-4)
    assert f"| adam | {record['gain']:.3f} | {record['forgotten']:.3f} |" in tables.continual(data)


def test_facts_are_planted_asked_and_found(parts):
    model, tokenizer = own(parts[0]), parts[1]
    known = needles.facts(3)
    assert known == needles.facts(3) and len({a for _, a in known}) == 3
    text = torch.tensor([list(texts.python_sources()[:600].encode())])
    ids = needles.planted(tokenizer, text, known)
    assert ids.shape == (1, 600)
    assert all(f"\n{q}{a}.\n" in tokenizer.decode(ids[0].tolist()) for q, a in known)

    class Knows:
        """Answers the first two facts, and the third but for its last digit."""

        config, segment = model.config, model.segment
        init_state = model.init_state

        def __call__(self, ids, state, lengths):
            logits = torch.zeros(*ids.shape, 256)
            for b, n in enumerate(lengths):
                logits[b, torch.arange(n - 1), ids[b, 1:n]] = 1.0
            logits[2, lengths[2] - 2, ids[2, lengths[2] - 1]] = -1.0
            return logits, state

    assert needles.asked(Knows(), tokenizer, known, None) == {"exact": 2, "digits": round(14 / 15, 4)}


def test_needles_ask_the_session_the_weights_and_another_process(parts, study):
    model, tokenizer = own(parts[0]), parts[1]
    found = texts.texts(None, None)
    found |= {texts.WIKI: found[texts.PYTHON], texts.PLAYS: found[texts.KJV]}
    cms = {"chunks": 64, "optimizer": "adam", "lr": 2e-3, "relative": True}
    asked = []
    original, needles.elsewhere = needles.elsewhere, lambda *given: asked.append(given) or {"session": {"exact": 0}}
    try:
        needles.run(study, "hope-byte", model, tokenizer, found, 2, 512, 3, 2, cms)
    finally:
        needles.elsewhere = original
    record = study.cases["needles 2 in 512, all blocks, 3 passes, chunks=64 optimizer=adam lr=0.002 relative=True"]
    assert list(record["after"]) == [1, 3] and record["passes"] == 3 and len(asked) == 1
    assert record["after"][3]["weights"]["digits"] >= 0 and "| 2 in 512 of WikiText-2 |" in tables.needles(study.data)
