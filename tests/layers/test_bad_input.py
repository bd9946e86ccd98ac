"""Bad input gets an error that says what was expected and what came, and costs nothing that was learned or
saved."""

import dataclasses
import errno
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import hope_kernels as hk
from hope_kernels import identity, state_file
from hope_kernels.cli.main import main
from hope_kernels.config import RopeScaling


def layer(**options) -> hk.SelfModifyingTitans:
    torch.manual_seed(0)
    return hk.SelfModifyingTitans(hk.TitansConfig(8, 2, chunk_memory=4, chunk_other=4, **options))


def model(seed: int = 0) -> hk.HopeForCausalLM:
    torch.manual_seed(seed)
    config = hk.HopeConfig(
        256, 8, 1, titans=hk.TitansConfig(8, chunk_memory=4, chunk_other=4), cms=hk.CMSConfig(8, (4, 8))
    )
    return hk.HopeForCausalLM(config).eval()


def values(state) -> list[torch.Tensor]:
    return [t.clone() for t in state.tensors()]


def unchanged(state, before) -> bool:
    return all(torch.equal(a, b) for a, b in zip(state.tensors(), before))


@pytest.mark.parametrize(("fields", "words"), [
    ({"d_model": 0}, "d_model is 0, expected a positive integer"),
    ({"num_heads": 3}, "expected a multiple of num_heads=3"),
    ({"chunk_memory": 6, "chunk_other": 4}, "expected one dividing the other"),
    ({"chunk_memory": -1}, "chunk_memory is -1"),
    ({"activation": "relu"}, "activation is 'relu', expected one of"),
    ({"momentum": 1.0}, "momentum is 1.0"),
    ({"alpha_bias": float("nan")}, "alpha_bias is nan"),
    ({"self_modifying": False, "adaptive_q": True}, "adaptive_q"),
    ({"q_identity": True, "adaptive_q": True}, "q_identity"),
])
def test_titans_config(fields, words):
    with pytest.raises(ValueError, match="TitansConfig: ") as error:
        hk.TitansConfig(**{"d_model": 8, **fields})
    assert words in str(error.value)


@pytest.mark.parametrize(("fields", "words"), [
    ({"chunks": (4, 6)}, "each dividing the next"), ({"chunks": (8, 4)}, "strictly increasing"),
    ({"chunks": ()}, "at least one period"),
    ({"chunks": (4, 8), "lr": (0.1,)}, "one value per level"), ({"lr": -1.0}, "lr is -1.0"),
    ({"optimizer": "adagrad"}, "expected one of"), ({"betas": 0.9}, "expected two floats"),
    ({"betas": (0.9,)}, "expected two floats"), ({"betas": (0.9, 1.0)}, "expected two floats in [0, 1)"),
    ({"precondition": 0.0}, "precondition is 0.0"), ({"precondition": "x"}, "expected a finite number"),
    ({"betas": (0.9, "x")}, "betas is 'x', expected a finite number"),
])
def test_cms_config(fields, words):
    with pytest.raises(ValueError, match="CMSConfig: ") as error:
        hk.CMSConfig(**{"d_model": 8, "chunks": (4,), **fields})
    assert words in str(error.value)


@pytest.mark.parametrize("fields", [
    {"titans": hk.TitansConfig(16)}, {"mixer": "titans", "titans": hk.TitansConfig(8)},
    {"cms": hk.CMSConfig(4, (4,))}, {"mixer": "rnn"},
    {"cms": (hk.CMSConfig(8, (4,)),) * 3}, {"cms": (hk.CMSConfig(8, (4,)), hk.CMSConfig(8, (6,)))},
    {"mixer": "attention", "num_heads": 8}, {"num_heads": 2, "num_kv_heads": 3}, {"mixer": "self_modifying",
        "titans": hk.TitansConfig.preset("titans", d_model=8)},
])
def test_hope_config(fields):
    with pytest.raises(ValueError, match="HopeConfig: "):
        hk.HopeConfig(**{"vocab_size": 16, "d_model": 8, "num_layers": 2, **fields})


VALID = {
    hk.TitansConfig: {"d_model": 8}, hk.CMSConfig: {"d_model": 8, "chunks": (4,)},
    hk.HopeConfig: {"vocab_size": 16, "d_model": 8, "num_layers": 2},
    RopeScaling: {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                  "original_max_position_embeddings": 64},
}
HOSTILE = [
    None, "", "abc", b"abc", [], {}, [[1]], [None], {"d_model": []}, {"a": 1}, math.nan, math.inf, -math.inf,
    -1, 0, True, 1, 0.5, 1e300, 10**12, 10**400, -(10**400), object(), (1, (2,)), [1e300], [10**400],
]


@pytest.mark.parametrize("cls, field", [(cls, f.name) for cls in VALID for f in dataclasses.fields(cls)],
                         ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_every_field_of_a_configuration_takes_a_value_or_refuses_it_with_a_value_error(cls, field):
    """What it takes, it has read to the end: its derived properties compute, and plain data gives it back."""
    for value in HOSTILE:
        try:
            config = cls(**VALID[cls] | {field: value})
        except ValueError as error:
            assert str(error).split(":")[0] in {c.__name__ for c in VALID}
            with pytest.raises(ValueError):
                cls.from_dict(VALID[cls] | {field: value})
            continue
        assert cls.from_dict(config.to_dict()) == config
        for name, member in vars(cls).items():
            if isinstance(member, property):
                getattr(config, name)


@pytest.mark.parametrize("cls", VALID, ids=lambda c: c.__name__)
def test_plain_data_and_presets_of_any_kind(cls):
    for data in HOSTILE:
        with pytest.raises(ValueError, match=cls.__name__):
            cls.from_dict(data)
        with pytest.raises(ValueError, match="unknown preset"):
            cls.preset(data, **VALID[cls])
    for field in VALID[cls]:
        if cls is not RopeScaling:
            with pytest.raises(ValueError, match="missing"):
                cls.from_dict({n: v for n, v in VALID[cls].items() if n != field})


@pytest.mark.parametrize("build", [
    lambda: hk.HopeConfig(10**12, 8, 1), lambda: hk.HopeConfig(16, 8, 10**12),
    lambda: hk.HopeConfig(16, 8, 1, cms=5),
    lambda: hk.HopeConfig(16, 8, 1, titans=5), lambda: hk.CMSConfig(8, (4,), expansion=1e300),
    lambda: hk.TitansConfig(8, hidden_mult=2**31 - 1),
    lambda: hk.HopeConfig(16, 8, 2, cms=(5, None)), lambda: hk.HopeConfig(16, 8, 1, rope_scaling={}),
])
def test_configurations_that_used_to_fail_later(build):
    with pytest.raises(ValueError):
        build()


def test_switches_are_bools():
    config = hk.TitansConfig(8, dgd=1.0, retention=0, in_proj=1)
    assert (config.dgd, config.retention, config.in_proj) == (True, False, True)
    assert all(isinstance(v, bool) for v in (config.dgd, config.retention, config.in_proj))


def test_unknown_preset_and_field():
    with pytest.raises(ValueError, match="unknown preset 'best', expected one of"):
        hk.TitansConfig.preset("best", d_model=8)
    with pytest.raises(ValueError, match="unknown fields"):
        hk.TitansConfig.from_dict({"d_model": 8, "speed": 2})


@pytest.mark.parametrize(("x", "words"), [
    (torch.zeros(2, 3), "argument x has shape [2, 3], expected [B, T, 8]"),
    (torch.zeros(2, 3, 9), "expected [B, T, 8]"),
    (torch.zeros(2, 3, 8, dtype=torch.float64), "has dtype torch.float64, expected torch.float32"),
])
def test_layer_input(x, words):
    with pytest.raises(ValueError) as error:
        layer()(x)
    assert words in str(error.value) and "SelfModifyingTitans" in str(error.value)


@pytest.mark.parametrize("lengths", [[3], [1, 2, 3], [4, 0], [-1, 2], torch.tensor([0.5, 1.0]), ["a", "b"]])
def test_layer_lengths(lengths):
    with pytest.raises(ValueError, match="lengths"):
        layer()(torch.zeros(2, 3, 8), lengths=lengths)


def test_layer_state_of_another_kind():
    one, x = layer(), torch.zeros(2, 3, 8)
    with pytest.raises(
        ValueError, match=r"belongs to TitansConfig\(momentum=0.5, ...\) and not to TitansConfig\(momentum=None, ...\)"
    ):
        one(x, layer(momentum=0.5).init_state(2))
    with pytest.raises(ValueError, match="has 3 rows, expected 2"):
        one(x, one.init_state(3))
    with pytest.raises(TypeError, match="is a CMSState, expected a TitansState"):
        one(x, hk.ContinuumMemory(hk.CMSConfig(8, (4,))).init_state(2))
    with pytest.raises(ValueError, match="state.to"):
        one(x, one.init_state(2, dtype=torch.float64))
    with pytest.raises(IndexError, match="row 5"):
        one.init_state(2).select([5])


def test_nan_input_is_refused_and_the_state_stays():
    one = layer()
    with torch.no_grad():
        _, state = one(torch.randn(2, 6, 8))
        before = values(state)
        x = torch.randn(2, 5, 8)
        x[1, 2, 3] = float("nan")
        with pytest.raises(ValueError, match="non-finite value in row 1; nothing was read"):
            one(x, state, check_finite=True)
        assert unchanged(state, before) and state.pos == [6, 6]
        one(x, state, lengths=[5, 2], check_finite=True)  # the NaN is padding now
    assert torch.isfinite(state.delta2).all()


def test_diverged_model_is_refused_and_the_state_stays():
    m = model()
    with torch.no_grad():
        _, state = m(torch.randint(0, 256, (1, 9)), learn="next_token")
        m.norm.weight.fill_(float("nan"))
        before = values(state)
        with pytest.raises(ValueError, match="non-finite"):
            m.generate(torch.randint(0, 256, (1, 9)), 3, state)
        assert unchanged(state, before) and state.pos == [9]


def test_unusable_backends():
    reasons = hk.available_backends()
    assert reasons["chunked"] is None and reasons["reference"] is None
    for name, reason in reasons.items():
        if reason is not None:
            with pytest.raises(ValueError) as error:
                layer()(torch.zeros(1, 2, 8), backend=name)
            assert reason in str(error.value)
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        layer()(torch.zeros(1, 2, 8), backend="fast")
    with pytest.raises(ValueError, match="has no gradient"):
        layer()(torch.zeros(1, 2, 8), backend="reference")


def test_model_input():
    m = model()
    with pytest.raises(ValueError, match=r"has token 256, expected 0 to 255"):
        m(torch.tensor([[3, 256]]))
    with pytest.raises(ValueError, match=r"has token -1"):
        m(torch.tensor([[3, -1]]))
    with pytest.raises(ValueError, match="dtype"):
        m(torch.tensor([[3.0]]))
    with pytest.raises(ValueError, match="argument learn is 'fast'"):
        m(torch.tensor([[3]]), learn="fast")


@pytest.mark.parametrize(("arguments", "words"), [
    ({"ids": torch.zeros(1, 0, dtype=torch.long)}, "empty prompt"), ({"ids": None}, "needs a state"),
    ({"max_new_tokens": 0}, "max_new_tokens"), ({"temperature": -1.0}, "temperature"), ({"top_k": 0}, "top_k"),
    ({"top_p": 0.0}, "top_p"), ({"stop": [""]}, "empty entry"),
    ({"lengths": [0]}, "empty prompt"),
])
def test_generate_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        model().generate(**{"ids": torch.zeros(1, 3, dtype=torch.long), "max_new_tokens": 2, **arguments})


def saved(tmp_path):
    m = model()
    out = m.generate(torch.randint(0, 256, (1, 21)), 5)
    path = tmp_path / "session.safetensors"
    out.state.save(path)
    return m, out.state, path


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, -1])
def test_half_written_session(tmp_path, keep):
    _, _, path = saved(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="is not a complete state file"):
        hk.load_state(path)


def test_foreign_and_newer_session_files(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="not a saved state"):
        hk.load_state(tmp_path / "foreign")
    save_file({"a": torch.zeros(2)}, tmp_path / "newer", metadata={"format": state_file.FORMAT, "version": "99"})
    with pytest.raises(ValueError, match="format version 99"):
        hk.load_state(tmp_path / "newer")
    with pytest.raises(FileNotFoundError, match="no file"):
        hk.load_state(tmp_path / "absent")


def test_session_of_another_model_names_both(tmp_path):
    m, _, path = saved(tmp_path)
    other = model(seed=1)
    with pytest.raises(ValueError) as error:
        other(torch.zeros(1, 1, dtype=torch.long), hk.load_state(path))
    assert str(identity.checksum(m)) in str(error.value) and str(identity.checksum(other)) in str(error.value)
    m(hk.load_state(path).unread, hk.load_state(path))


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch, failing):
    _, state, path = saved(tmp_path)
    old = path.read_bytes()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if failing == "write":
        real = os.fdopen

        class Full:
            def __init__(self, file):
                self.file = file

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.file.close()

            write = full

        monkeypatch.setattr(os, "fdopen", lambda *a, **k: Full(real(*a, **k)))
    else:
        monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space left"):
        state.save(path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["session.safetensors"]


def test_damaged_model_folder(tmp_path):
    model().save_pretrained(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:200])
    with pytest.raises(ValueError, match="damaged file"):
        hk.HopeForCausalLM.from_pretrained(tmp_path / "m")
    weights.write_bytes(data)
    config = (tmp_path / "m" / "config.json").read_text()
    (tmp_path / "m" / "config.json").write_text(config.replace('"num_layers": 1', '"num_layers": 2'))
    with pytest.raises(ValueError, match="does not fit its config.json"):
        hk.HopeForCausalLM.from_pretrained(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="neither a folder nor a bundled model"):
        hk.HopeForCausalLM.from_pretrained("no-such-model")


def run(*arguments, stdin: bytes = b"") -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "hope_kernels", *arguments], input=stdin, capture_output=True)


def test_command_reads_any_bytes_and_continues_its_session(tmp_path, capfdbinary):
    model().save_pretrained(tmp_path / "m")
    (tmp_path / "book").write_bytes(bytes(range(256)) * 2 + b"\xff\xfe invalid \xc3")
    common = ("generate", "--model", str(tmp_path / "m"), "--session", str(tmp_path / "s"))
    assert main([*common, "--prompt-file", str(tmp_path / "book"), "--max-new-tokens", "20"]) == 0
    first = capfdbinary.readouterr()
    assert len(first.out) >= 20 and b"wrote 20 bytes" in first.err
    second = run(*common, "--prompt-file", "-", "--max-new-tokens", "4", stdin=b"more")
    assert second.returncode == 0

    def written(*more: str) -> bytes:
        assert main(["generate", "--model", str(tmp_path / "m"), "--quiet", *more]) == 0
        return capfdbinary.readouterr().out[:-1]

    straight = written("--prompt-file", str(tmp_path / "book"), "--max-new-tokens", "24")
    begun = written(
        "--session", str(tmp_path / "t"), "--prompt-file", str(tmp_path / "book"), "--max-new-tokens", "20"
    )
    assert begun + written("--session", str(tmp_path / "t"), "--max-new-tokens", "4") == straight


def test_command_errors_are_one_line(tmp_path, capsys):
    model().save_pretrained(tmp_path / "m")
    base = ["generate", "--model", str(tmp_path / "m"), "--quiet"]
    (tmp_path / "empty").write_bytes(b"")
    for arguments, words in [
        (["--prompt-file", str(tmp_path / "empty")], "empty prompt"), ([], "empty prompt"),
        (["--prompt-file", str(tmp_path / "nowhere")], "No such file"),
        (["--prompt", "a", "--backend", "cuda"], "cannot be used"),
    ]:
        assert main(base + arguments) == 2
        printed = capsys.readouterr().err
        assert words in printed and printed.startswith("hope_kernels: ") and printed.count("\n") == 1


def test_a_file_from_before_there_was_a_counter_on_the_device(tmp_path):
    torch.manual_seed(0)
    layer, x = hk.SelfModifyingTitans(hk.TitansConfig(16)), torch.randn(2, 30, 16)
    with torch.no_grad():
        _, state = layer(x[:, :21], lengths=[21, 9])
        state.save(tmp_path / "new")
        with safe_open(tmp_path / "new", "pt") as f:
            tensors, meta = {n: f.get_tensor(n) for n in f.keys() if not n.endswith(".count")}, f.metadata()
        tree = json.loads(meta["tree"])
        del meta["sha256"]  # nor was there a hash
        del tree["fields"]["count"]
        save_file(tensors, tmp_path / "old", meta | {"tree": json.dumps(tree)})
        old = hk.load_state(tmp_path / "old")
        assert old.count.tolist() == [21, 9]
        assert torch.equal(layer(x[:, 21:], old)[0], layer(x[:, 21:], state)[0])


def test_a_file_whose_two_counters_disagree(tmp_path):
    state = hk.SelfModifyingTitans(hk.TitansConfig(16)).init_state(2)
    state.save(tmp_path / "good")
    with safe_open(tmp_path / "good", "pt") as f:
        tensors, meta = {n: f.get_tensor(n) for n in f.keys()}, f.metadata()
    del meta["sha256"]
    name = next(n for n in tensors if n.endswith(".count"))
    save_file(tensors | {name: torch.tensor([0, 5])}, tmp_path / "bad", meta)
    with pytest.raises(ValueError, match=r"TitansState with pos \[0, 0\] and count \[0, 5\]"):
        hk.load_state(tmp_path / "bad")
