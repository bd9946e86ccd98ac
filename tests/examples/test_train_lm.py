"""examples/train_lm.py: a run that is stopped ends with the bits of one that is not; mixed text."""

import importlib.util
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hope_kernels import HopeConfig, HopeForCausalLM

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def loaded(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield loaded
    for name in ("mixed_text", "parity", "rounded", "together"):
        sys.modules.pop(name, None)


@pytest.fixture
def texts(tmp_path):
    """A file, and a folder of which one file is no text."""
    letters = random.Random(0)
    (tmp_path / "a.txt").write_text("".join(letters.choices("abcd ", k=6000)))
    (tmp_path / "b" / "inner").mkdir(parents=True)
    (tmp_path / "b" / "one.py").write_text("x = 1\n" * 900)
    (tmp_path / "b" / "inner" / "two.py").write_text("y = 2\n" * 900)
    (tmp_path / "b" / "three.rst").write_text("z" * 5000)
    (tmp_path / "b" / "four.py").write_bytes(b"\xff\xfe" * 3000)
    return tmp_path


SMALL = ["--suffix", ".py", "--heldout-share", "0.02", "--steps", "12", "--through-refreshes", "0.6", "--d-model", "16",
         "--heads", "2", "--layers", "1", "--chunk", "4", "--cms", "8", "16", "--tokens", "24", "--restart", "0.2"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_that_is_stopped_ends_with_the_bits_of_one_that_is_not(example, texts, monkeypatch, dtype):
    """Before and after the CMS begins to learn; the second part with a state that holds deviations."""
    train_lm = example("train_lm")
    common = [str(texts / "a.txt"), f"{texts / 'b'}=0.5", *SMALL, "--batch", "3", "--dtype", dtype]
    before = torch.get_num_threads()

    def run(out, *options):
        monkeypatch.setattr(sys, "argv", ["train_lm.py", *common, "--out", str(texts / out), *options])
        train_lm.main()
        return load_file(texts / out / "checkpoint.safetensors")

    try:
        torch.set_num_threads(1)
        whole = run("whole")
        for pause in ("3", "5"):
            run("parts", "--pause", pause)
        parts = run("parts")
    finally:
        torch.set_num_threads(before)
    assert whole.keys() == parts.keys() and all(torch.equal(t, parts[n]) for n, t in whole.items())
    states = [load_file(next((texts / out).glob("state-*.safetensors"))) for out in ("whole", "parts")]
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())
    assert any(".weights." in n for n in states[0])
    model = HopeForCausalLM.from_pretrained(texts / "parts")
    assert all(p.dtype == torch.float32 for p in model.parameters())
    rates = model.config.block_cms[0].lr
    start = json.loads((texts / "whole" / "config.json").read_text())
    assert start["model_type"] and all(len(own) == 2 for own in rates) and len({*rates[0], *rates[1]}) == 4


def test_two_processes_train_as_one_does(texts):
    """On the same rows, to the rounding of a mean; and stopped and gone on with, to the bit."""
    def run(out, processes, *options):
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
             str(EXAMPLES / "train_lm.py"), str(texts / "a.txt"), f"{texts / 'b'}=0.5", *SMALL, "--batch", "4",
             "--threads", "1", "--out", str(texts / out), *options],
            check=True, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        return load_file(texts / out / "checkpoint.safetensors")

    one, two = run("one", 1), run("two", 2)
    run("parts", 2, "--pause", "7")
    parts = run("parts", 2)
    assert all(torch.equal(t, parts[n]) for n, t in two.items())
    assert len(list((texts / "parts").glob("state-12-*.safetensors"))) == 2
    for name in (n for n in one if n.startswith("model.")):
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)


def test_sources_are_drawn_by_weight_and_end_where_they_are_held_out(example, texts):
    mixed = example("mixed_text")
    found = mixed.sources([str(texts / "a.txt"), f"{texts / 'b'}=3"], 0.25, (".py",))
    assert [(s.name, s.weight, len(s.data), len(s.heldout)) for s in found] == [
        ("a.txt", 1.0, 4500, 1500), ("b", 3.0, 8100, 2700)
    ]
    assert bytes(found[1].data[:6].tolist()) == b"x = 1\n"
    streams = mixed.Streams(found, 8, 32, 0.5, seed=1)
    again, counts = mixed.Streams(found, 8, 32, 0.5, seed=1), [0, 0]
    for step in range(200):
        ids, fresh = streams.next(step)
        assert again.skip(step) == fresh and again.at == streams.at
        for b, (s, a) in enumerate(streams.at):
            assert torch.equal(ids[b], found[s].data[a - 32 : a + 1])
            counts[s] += fresh[b]
    assert 0.68 < counts[1] / sum(counts) < 0.82
    for spec, message in ((f"{texts / 'a.txt'}=no", "the weight is 'no'"), (str(texts / "b" / "four.py"), "0 bytes")):
        with pytest.raises(SystemExit, match=message):
            mixed.sources([spec], 0.0)


class Wrong(HopeForCausalLM):
    """Its own choice of backend is a hundredth off."""

    def forward(self, ids, *args, backend=None, **options):
        logits, state = super().forward(ids, *args, backend=backend, **options)
        return (1.01 * logits if backend is None else logits), state


def test_a_backend_with_wrong_gradients_is_not_trained_with(example):
    trusted = example("parity").trusted
    torch.manual_seed(0)
    config, ids = HopeConfig(40, 16, 1, num_heads=2), torch.randint(40, (2, 33))
    right, wrong = HopeForCausalLM(config), Wrong(config)
    backend, own, chunked = trusted(right, ids)
    assert backend is None and own < 1e-5 and chunked < 1e-5
    assert all(p.grad is None for p in right.parameters())
    backend, own, _ = trusted(wrong, ids)
    assert backend == "chunked" and 1e-3 < own < 0.1
    assert trusted(right, ids, "no such backend")[0] == "chunked"


def test_a_gradient_that_is_not_finite_ends_the_training_and_loses_nothing(example, texts, monkeypatch):
    train_lm, out = example("train_lm"), texts / "out"
    command = ["train_lm.py", str(texts / "a.txt"), *SMALL, "--batch", "2", "--threads", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*command, "--pause", "3"])
    train_lm.main()
    kept = {p.name: p.read_bytes() for p in out.iterdir() if p.suffix == ".safetensors"}
    (out / "state-3-0.safetensors.0123abcd.part").write_bytes(b"of a write that was killed")
    monkeypatch.setattr(sys, "argv", command)
    with monkeypatch.context() as broken, pytest.raises(SystemExit, match="step 3: the gradient's norm is nan"):
        broken.setattr(train_lm.F, "cross_entropy", lambda logits, *_: logits.sum() * math.nan)
        train_lm.main()
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.suffix == ".safetensors"} == kept
    train_lm.main()
    assert [p.name for p in out.glob("state-*")] == ["state-12-0.safetensors"]


def test_what_computes_in_16_bits_is_the_model_rounded_and_hands_its_gradients_to_it(example):
    """Steps far below what bf16 can tell apart add up in the model."""
    rounded, train_lm = example("rounded"), example("train_lm")
    torch.manual_seed(0)
    model = HopeForCausalLM(HopeConfig(32, 16, 1, num_heads=2))
    pair = rounded.Rounded(model, train_lm.DTYPES["bfloat16"])
    before = model.embed.weight.detach().clone()
    ids = torch.randint(0, 32, (2, 9))
    for _ in range(50):
        pair.computes(ids)[0].float().square().mean().backward()
        pair.take_gradients()
        assert all(p.grad is None for p in pair.computes.parameters())
        with torch.no_grad():
            model.embed.weight.sub_(1e-5 * before.sign())
        pair.round()
    assert model.embed.weight.grad.dtype == torch.float32 and model.embed.weight.grad.abs().sum() > 0
    torch.testing.assert_close(model.embed.weight, before - 5e-4 * before.sign(), rtol=0, atol=1e-6)
    for own, exact in zip(pair.computes.parameters(), model.parameters()):
        assert torch.equal(own, exact.bfloat16())
    same = rounded.Rounded(model, torch.float32)
    assert same.computes is model
