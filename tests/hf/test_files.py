"""Folders that both libraries write and read, tokenizers, and the Auto classes."""

import json
import subprocess
import sys

import pytest
import torch
from hf_model import MIXERS, V, pair, text

import hope_kernels as hk
from hope_kernels.text import byte_level

TEXT = "In the beginning was the Word"


def auto(folder, **options):
    from transformers import AutoModelForCausalLM

    import hope_kernels.hf  # noqa: F401

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def same(a, b) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("mixer", MIXERS)
def test_both_ways(mixer, tmp_path):
    ours, theirs = pair(mixer)
    ours.save_pretrained(tmp_path / "ours")
    theirs.config.learn = "next_token"
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 1
    for folder, learn in (("ours", "off"), ("theirs", "next_token")):
        a, b = hk.HopeForCausalLM.from_pretrained(tmp_path / folder), auto(tmp_path / folder)
        assert a.config == b.model.config == ours.config and same(a, ours) and same(b.model, ours)
        assert b.config.learn == learn and not b.training
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert (config["model_type"], config["vocab_size"], config["hidden_size"]) == ("hope", V, 8)
        assert "rope_theta" not in config and config["hope"]["rope_theta"] == 10000.0
    b.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config


def test_folders_from_before_have_our_fields_alone(tmp_path):
    ours, _ = pair()
    ours.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(ours.config.to_dict()))
    assert same(hk.HopeForCausalLM.from_pretrained(tmp_path), ours)


def test_absent_weights_are_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

    ours, _ = pair()
    ours.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("blocks.1.mixer.gate.weight", None) or tensors.pop(sorted(tensors)[5])
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks model.blocks"):
        auto(tmp_path)


def test_without_the_import_trust_remote_code_finds_it(tmp_path):
    ours, _ = pair()
    ours.save_pretrained(tmp_path / "m")
    ids = text(1, 20)
    expected = ours.generate(ids, 6, learn="off").tokens[0].tolist()
    program = f"""
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "m")!r}, trust_remote_code=True)
print(model.generate(torch.tensor({ids.tolist()}), max_new_tokens=6, do_sample=False)[0, 20:].tolist())
import transformers, hope_kernels.hf
assert type(model) is transformers.HopeForCausalLM is hope_kernels.hf.HopeForCausalLM
"""
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          env=dict(__import__("os").environ, **environment))
    assert done.returncode == 0 and done.stdout.split("\n")[0] == str(expected), done.stderr


def test_bytes_have_a_fast_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    model = hk.HopeForCausalLM.from_pretrained("hope-byte")
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.is_fast and len(tokenizer) == 256 and tokenizer.padding_side == "left"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (byte_level.EOS, byte_level.EOS)
    for s in (TEXT, "naïve ÿĀ 日本語 😀\n\t\x00  x", "".join(map(chr, range(0xD800)))):
        assert tokenizer(s).input_ids == list(s.encode()) and tokenizer.decode(list(s.encode())) == s
    assert tokenizer(f"a{byte_level.EOS_TOKEN}").input_ids == [97, 255]
    # ours needs no library for the same folder, also once transformers has written the tokenizer
    tokenizer.save_pretrained(tmp_path)
    again = hk.HopeForCausalLM.from_pretrained(tmp_path)
    assert hk.Tokenizer.of(again).reads_bytes and hk.Tokenizer.from_pretrained(tmp_path).reads_bytes
    again.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").eos_token_id == byte_level.EOS


def test_pipeline_of_the_bundled_model():
    import os

    from transformers import pipeline

    import hope_kernels.hf  # noqa: F401

    folder = os.path.join(hk.folders.ASSETS, "hope-byte")
    pipe = pipeline("text-generation", model=folder)
    assert pipe.model.name_or_path == folder
    ours, prompts = hk.HopeForCausalLM.from_pretrained("hope-byte"), [TEXT, "And he said unto them, I am"]
    found = pipe(prompts, max_new_tokens=12, do_sample=False, batch_size=2, return_full_text=False)
    for prompt, row in zip(prompts, found):
        out = ours.generate(torch.tensor([list(prompt.encode())]), 12, learn="off")
        assert row[0]["generated_text"] == bytes(out.tokens[0].tolist()).decode()


def test_a_converted_model_brings_tokenizer_chat_and_ends(tmp_path):
    import text_model
    from transformers import AutoTokenizer, pipeline

    from hope_kernels.cli.main import main
    from hope_kernels.hf import HopeForCausalLM

    theirs = text_model.source(tmp_path / "theirs")
    assert main(["convert", str(theirs), str(tmp_path / "m"), "--chunks", "8", "--quiet"]) == 0
    a, b = AutoTokenizer.from_pretrained(theirs), AutoTokenizer.from_pretrained(tmp_path / "m")
    messages = [{"role": "user", "content": "Who?"}]
    assert b(TEXT).input_ids == a(TEXT).input_ids and b.eos_token_id == a.eos_token_id
    assert b.apply_chat_template(messages) == a.apply_chat_template(messages)
    model, original = auto(tmp_path / "m"), auto(theirs)
    assert model.generation_config.eos_token_id == [0, 2]
    ids = b(TEXT, return_tensors="pt").input_ids
    assert torch.equal(model(ids).logits, original(ids).logits)
    # wrapped and saved: complete again
    HopeForCausalLM.wrap(model.model).save_pretrained(tmp_path / "again")
    chat = a.apply_chat_template(messages, add_generation_prompt=True).input_ids
    assert hk.Tokenizer.from_pretrained(tmp_path / "again").chat(messages) == chat
    pipe = pipeline("text-generation", model=str(tmp_path / "again"))
    assert pipe(messages, max_new_tokens=4)[0]["generated_text"][-1]["role"] == "assistant"


def test_dtype_and_device_map(tmp_path):
    ours, _ = pair("attention")
    ours.save_pretrained(tmp_path)
    ids = text(2, 30)
    for options in ({"dtype": torch.bfloat16}, {"dtype": torch.bfloat16, "device_map": "cpu"},
                    {"dtype": torch.bfloat16, "device_map": "auto"}):
        found = auto(tmp_path, **options)
        native = hk.HopeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert same(found.model, native)
        out = found.generate(ids, max_new_tokens=9, do_sample=False, learn="next_token")
        assert torch.equal(out[:, 30:], native.generate(ids, 9).tokens)
    with pytest.raises(ValueError, match="device_map puts parts on cpu, disk, expected one device"):
        auto(tmp_path, device_map={"model.embed": "cpu", "model.norm": "cpu", "model.blocks": "disk"},
             offload_folder=tmp_path / "offload")


def test_vocabularies_grow():
    from hope_kernels.hf import HopeForCausalLM

    for options in ({}, {"tie_embeddings": False}, {"mixer": "attention", "embed_scale": 3.0}):
        ours, theirs = pair(**options)
        ids, old = text(1, 20), ours(text(1, 20))[0]
        theirs.resize_token_embeddings(V + 3)
        assert theirs.config.vocab_size == theirs.config.hope["vocab_size"] == ours.config.vocab_size == V + 3
        ids[0, 4] = V + 2
        assert ours.generate(ids, 3).tokens.shape == (1, 3)
        new = theirs(text(1, 20)).logits
        assert new.shape[-1] == V + 3 and torch.allclose(new[..., :V], old, atol=1e-6)
        assert HopeForCausalLM(theirs.config).model.config == ours.config
