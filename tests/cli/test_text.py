"""The commands on a model with a tokenizer: converted, prompted, stopped and taken up, talked to, taught."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from interrupted import at_call
from text_model import CORPUS, source

import hope_kernels as hk
from hope_kernels.cli.main import main
from hope_kernels.cli.parser import blocks
from hope_kernels.state_file import load_note

PROMPT = "In the beginning was the Word, naïve 日本語. "
NEW = 40


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return source(tmp_path_factory.mktemp("theirs"))


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    out = tmp_path_factory.mktemp("ours") / "model"
    assert main(["convert", str(theirs), str(out), "--chunks", "8,16", "--lr", "0.05", "--quiet"]) == 0
    return out


@pytest.fixture(scope="module")
def tokenizer(folder):
    return hk.Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def whole(folder, tokenizer):
    """What an undisturbed run writes: ids and state."""
    model = hk.HopeForCausalLM.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    return model.generate(ids, NEW, temperature=1.5, seed=2)


def arguments(folder, *more, command="generate", session=None):
    given = [command, "--model", folder, "--quiet"]
    if command == "generate":
        given += ["--prompt", PROMPT, "--temperature", 1.5, "--seed", 2, "--max-new-tokens", NEW,
                  "--ignore-eos"]
    return [*map(str, given), *(["--session", str(session)] if session else []), *map(str, more)]


def same(path, state):
    """The file holds the state: as files do, without room for more keys."""
    state.save(f"{path}.expected")
    found, state = hk.load_state(path), hk.load_state(f"{path}.expected")
    os.unlink(f"{path}.expected")
    return found.pos == state.pos and all(
        torch.equal(a, b) for a, b in zip(found.tensors(), state.tensors(), strict=True)
    )


def one_line(printed, *words):
    assert printed.startswith("hope_kernels: ") and printed.count("\n") == 1, printed
    for word in words:
        assert word in printed, printed


# -- convert -------------------------------------------------------------------------------------------------


def test_converted_is_the_same_model_with_all_that_text_needs(theirs, folder, tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    original, library = AutoModelForCausalLM.from_pretrained(theirs), AutoTokenizer.from_pretrained(theirs)
    ids = library(PROMPT).input_ids
    assert tokenizer.encode(PROMPT) == ids and tokenizer.eos_ids == (0, 2)
    model = hk.HopeForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([ids]))[0], original(torch.tensor([ids])).logits)
    assert [c.chunks for c in model.config.block_cms] == [(8,), (16,)]
    files = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "modeling_hope.py",
             "text.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(os.listdir(folder)) == files
    messages = [{"role": "user", "content": "Who?"}]
    text = library.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.chat(messages) == library(text).input_ids


def test_the_options_of_a_conversion(theirs, tmp_path):
    more = ["--window", "16", "--sinks", "2", "--chunks", "8", "--learn-blocks", "last:1", "--lr", "0.01",
            "--optimizer", "adam", "--rank", "4", "--dtype", "float16", "--quiet"]
    assert main(["convert", str(theirs), str(tmp_path / "m"), *more]) == 0
    model = hk.HopeForCausalLM.from_pretrained(tmp_path / "m")
    cms, config = model.config.block_cms, model.config
    assert (cms[0].learning_rates, cms[1].learning_rates) == ((0,), (0.01,))
    assert (cms[1].optimizer, cms[1].rank) == ("adam", 4)
    assert (config.window, config.sinks, cms[1].chunks) == (16, 2, (8,))
    assert model.embed.weight.dtype == torch.float16


def test_a_folder_of_transformers_says_what_to_do(theirs, tmp_path):
    with pytest.raises(ValueError, match=f"model_type 'llama'.*python -m hope_kernels convert {theirs}"):
        hk.HopeForCausalLM.from_pretrained(theirs)
    (tmp_path / "a model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="is a GGUF file.*convert '.*a model.gguf'"):
        hk.HopeForCausalLM.from_pretrained(tmp_path / "a model.gguf")


def test_what_cannot_be_converted_leaves_nothing(theirs, tmp_path, capfd):
    other, full, damaged = tmp_path / "other", tmp_path / "full", tmp_path / "damaged"
    for made in (other, full):
        made.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (full / "file").write_text("")
    (tmp_path / "x.gguf").write_bytes(b"no model")
    (tmp_path / "x.bin").write_bytes(b"")
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "config.json").write_text("[]")
    damaged.mkdir()
    for name in os.listdir(theirs):
        (damaged / name).write_bytes((theirs / name).read_bytes())
    (damaged / "tokenizer.json").write_text("{}")
    out = tmp_path / "out"
    for arguments, words in [
        ([tmp_path / "absent", out], "absent does not exist"),
        ([other, out], "has model_type 'gpt2', expected one of"),
        ([theirs, full], "exists and is not empty"),
        ([theirs, tmp_path / "x.gguf"], "exists and is no folder"),
        ([full, out], "has no config.json"), ([wrong, out], "config.json cannot be read"),
        ([tmp_path / "x.bin", out], "expected a folder of transformers or"),
        ([tmp_path / "x.gguf", out], "x.gguf"), ([theirs, ""], "OUT is empty"),
        ([damaged, out], "its tokenizer cannot be read"), ([theirs, out, "--lr", "-1"], "lr"),
        ([theirs, out, "--chunks", "4,6"], "argument chunks"),
    ]:
        capfd.readouterr()
        assert main(["convert", "--quiet", *map(str, arguments)]) == 2
        assert words in capfd.readouterr().err.splitlines()[-1]
        assert not out.exists() and not [n for n in os.listdir(tmp_path) if n.endswith(".part")]


def test_an_interrupted_conversion_leaves_nothing(theirs, tmp_path, monkeypatch):
    def interrupted(self, folder):
        (folder_made := os.path.join(folder, "model.safetensors")) and open(folder_made, "w").close()
        raise KeyboardInterrupt

    monkeypatch.setattr(hk.HopeForCausalLM, "save_pretrained", interrupted)
    assert main(["convert", str(theirs), str(tmp_path / "out"), "--quiet"]) == 130
    assert os.listdir(tmp_path) == []


def test_a_source_without_a_tokenizer(theirs, tmp_path, capfd):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (bare / name).write_bytes((theirs / name).read_bytes())
    (tmp_path / "out").mkdir()
    assert main(["convert", str(bare), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert "without a tokenizer" in capfd.readouterr().err
    assert hk.HopeForCausalLM.from_pretrained(tmp_path / "out").embed.weight.dtype == torch.bfloat16
    assert main(arguments(tmp_path / "out")) == 2
    one_line(capfd.readouterr().err, "has no tokenizer.json", "python -m hope_kernels convert writes it")


def test_a_damaged_tokenizer_is_one_line(folder, tmp_path, capfd):
    hk.HopeForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes()[:3000])
    for command, more in (("generate", []), ("chat", []), ("read", [folder / "config.json"])):
        assert main(arguments(tmp_path / "m", *more, command=command)) == 2
        one_line(capfd.readouterr().err, "tokenizer.json is damaged")


def test_blocks_of_a_specification():
    assert blocks("all") is None and blocks("last:3") == (-3, -2, -1)
    assert blocks("0,3,5-7,6") == (0, 3, 5, 6, 7)
    for wrong in ("", "last:", "last:0", "7-5", "a", "-1", "1,,2"):
        with pytest.raises(Exception, match="expected"):
            blocks(wrong)


# -- generate ------------------------------------------------------------------------------------------------


def test_writes_what_the_model_writes(folder, tokenizer, whole, tmp_path, capfd):
    assert main(arguments(folder, session=tmp_path / "s")) == 0
    assert capfd.readouterr().out == tokenizer.decode(whole.tokens[0].tolist()) + "\n"
    assert same(tmp_path / "s", whole.state) and load_note(tmp_path / "s") is None


def test_an_empty_stop_is_refused(folder, capfd):
    assert main(arguments(folder, "--stop", "")) == 2
    one_line(capfd.readouterr().err, "--stop is empty")


def test_a_text_longer_than_a_piece_is_read_as_one(folder, tokenizer, tmp_path):
    text = "".join(CORPUS) * 40
    (tmp_path / "book").write_text(text, newline="")
    ids = tokenizer.encode(text + PROMPT)
    assert len(ids) > 4096
    assert main(arguments(folder, "--prompt-file", tmp_path / "book", "--max-new-tokens", 0, "--learn", "off",
                          session=tmp_path / "s")) == 0
    expected = hk.generation.read(hk.HopeForCausalLM.from_pretrained(folder), torch.tensor([ids]))
    assert same(tmp_path / "s", expected.state)


def test_the_end_of_a_text_ends_it(folder, tokenizer, tmp_path, capfd):
    """A model that is certain of the token that ends a text."""
    model = hk.HopeForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.embed.weight[0] = 50 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "m")
    seeds, full = [str(s) for s in range(20)], len(tokenizer.encode(PROMPT)) + NEW - 1
    ended = []
    for seed in seeds:
        given = arguments(tmp_path / "m", "--seed", seed, session=tmp_path / seed)
        given.remove("--ignore-eos")
        assert main(given) == 0
        state = hk.load_state(tmp_path / seed)
        ended.append(state.unread.item() in tokenizer.eos_ids and state.pos[0] < full)
    assert any(ended)
    seed = seeds[ended.index(True)]
    assert main(arguments(tmp_path / "m", "--seed", seed, session=tmp_path / "all")) == 0
    assert hk.load_state(tmp_path / "all").pos[0] == full


def stops(text, parts):
    """(stop, text up to its end) for stops that begin in one token and end in a later one."""
    at, found = 0, []
    for a, b in zip(parts, parts[1:]):
        at += len(a)
        stop = text[at - 1 : at + 1]
        if a and b and "\ufffd" not in stop and text.index(stop) == at - 1:
            found.append((stop, text[: at + 1]))
    return found


def test_a_stop_across_tokens(folder, tokenizer, whole, tmp_path, monkeypatch, capfd):
    """Whole, and interrupted before every token up to it."""
    ids = whole.tokens[0].tolist()
    stream = tokenizer.stream()
    found = stops(tokenizer.decode(ids), [stream.push(i) for i in ids])
    stop, expected = found[len(found) // 2]
    given = ["--stop", stop, "--stop", "never to be found"]
    assert main(arguments(folder, *given)) == 0
    assert capfd.readouterr().out == expected + "\n"
    for call in range(2, 8):
        session = tmp_path / str(call)
        with monkeypatch.context() as patch:
            at_call(patch, call, lambda: signal.raise_signal(signal.SIGINT))
            code = main(arguments(folder, *given, session=session))
        assert code == 130 and load_note(session)["written"] == call
        assert main(arguments(folder, *given, session=session)) == 0
        assert capfd.readouterr().out == expected + "\n"
        assert load_note(session) is None


def test_characters_come_whole_whenever_it_is_stopped(folder, tokenizer, whole, tmp_path, monkeypatch, capfd):
    text = tokenizer.decode(whole.tokens[0].tolist())
    assert any(ord(c) > 127 for c in text)
    for call in range(2, NEW, 3):
        session = tmp_path / str(call)
        with monkeypatch.context() as patch:
            at_call(patch, call, lambda: signal.raise_signal(signal.SIGTERM))
            assert main(arguments(folder, session=session)) == 143
        first = capfd.readouterr().out
        assert text.startswith(first)
        assert main(arguments(folder, session=session)) == 0
        assert first + capfd.readouterr().out == text + "\n" and same(session, whole.state)


def test_an_output_that_takes_no_more_loses_nothing(folder, tokenizer, whole, tmp_path, monkeypatch, capfd):
    r, w = os.pipe()
    got = []
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", open(w, "w"))
        at_call(patch, 20, lambda: (got.append(os.read(r, 9999)), os.close(r)))
        assert main(arguments(folder, session=tmp_path / "s")) == 141
    assert load_note(tmp_path / "s")["unsent"]
    assert main(arguments(folder, session=tmp_path / "s")) == 0
    assert got[0].decode() + capfd.readouterr().out == tokenizer.decode(whole.tokens[0].tolist()) + "\n"
    assert same(tmp_path / "s", whole.state)


def test_a_run_stopped_while_reading_goes_on(folder, tmp_path, monkeypatch, capfd):
    text = "".join(CORPUS) * 40
    (tmp_path / "book").write_text(text, newline="")
    given = arguments(folder, "--prompt-file", tmp_path / "book", "--max-new-tokens", 5, "--learn", "off")
    assert main([*given, "--session", str(tmp_path / "whole")]) == 0
    expected = capfd.readouterr().out
    given += ["--session", str(tmp_path / "s")]
    with monkeypatch.context() as patch:
        at_call(patch, 1, lambda: signal.raise_signal(signal.SIGINT))
        assert main(given) == 130
    assert "stopped after reading 4096 tokens" in capfd.readouterr().err
    assert load_note(tmp_path / "s")["tokens"] == 4096
    kept = (tmp_path / "s").read_bytes()
    (tmp_path / "book").write_text(text.replace("All things", "Some things", 1), newline="")
    assert main(given) == 2
    one_line(capfd.readouterr().err, "begins otherwise", "--no-resume")
    assert (tmp_path / "s").read_bytes() == kept
    (tmp_path / "book").write_text(text, newline="")
    assert main(given) == 0
    assert capfd.readouterr().out == expected and same(tmp_path / "s", hk.load_state(tmp_path / "whole"))


@pytest.mark.parametrize("text", [{"tail": 1}, {"tail": "", "ids": [-1], "whole": 0, "given": 0}, [], "x",
                                  {"tail": "", "ids": [1], "whole": 0, "given": None}], ids=str)
def test_notes_that_no_run_has_left_are_no_notes(folder, tokenizer, tmp_path, text):
    note = {"phase": "writing", "prompt": "p", "tokens": 0, "sha256": "", "written": 1, "text": text}
    hk.HopeForCausalLM.from_pretrained(folder).init_state(1).save(tmp_path / "s", note)
    assert main(arguments(folder, "--max-new-tokens", 1, session=tmp_path / "s")) == 0
    assert hk.load_state(tmp_path / "s").pos == [len(tokenizer.encode(PROMPT))]


def test_a_session_of_another_model_is_refused(folder, theirs, tmp_path, monkeypatch, capfd):
    source(tmp_path / "theirs", seed=1)
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "m"), "--chunks", "8,16", "--lr", "0.05",
                 "--quiet"]) == 0
    assert main(arguments(tmp_path / "m", session=tmp_path / "s")) == 0
    kept = (tmp_path / "s").read_bytes()
    for command, more in (("generate", []), ("chat", []), ("read", [theirs / "config.json"])):
        capfd.readouterr()
        monkeypatch.setattr(sys, "stdin", Lines("hello\n"))
        assert main(arguments(folder, *more, command=command, session=tmp_path / "s")) == 2
        printed = capfd.readouterr()
        one_line(printed.err, f"session {tmp_path / 's'}")
        assert printed.out == "" and (tmp_path / "s").read_bytes() == kept


# -- chat ----------------------------------------------------------------------------------------------------


@pytest.fixture
def chat(folder, monkeypatch, capfd):
    """Lines in, (exit code, answers, notices) out."""
    def talk(*lines, session=None, more=()):
        capfd.readouterr()
        monkeypatch.setattr(sys, "stdin", Lines("".join(line + "\n" for line in lines)))
        more = ["--temperature", 0.8, "--max-new-tokens", 6, *more]
        given = arguments(folder, *more, command="chat", session=session)
        code = main(given)
        printed = capfd.readouterr()
        return code, printed.out, printed.err

    return talk


class Lines(io.StringIO):
    """Standard input; ``buffer`` is what its bytes would come from."""

    buffer = io.BytesIO()


def by_hand(folder, tokenizer, turns, learn="next_token"):
    """The same conversation through the model: answers and state."""
    model, state, answers = hk.HopeForCausalLM.from_pretrained(folder), None, []
    for n, text in enumerate(turns):
        ids = tokenizer.next_turn(text) if n else tokenizer.chat([{"role": "user", "content": text}])
        mode = None
        if state is not None:
            mode = "included" if state.unread.item() == ids[0] else "before"
        out = model.generate(torch.tensor([ids]), 6, state, temperature=0.8, eos_token_id=tokenizer.eos_ids,
                             learn=learn, unread=mode)
        answers.append(tokenizer.decode(out.tokens[0].tolist()))
        state = out.state
    return "".join(a + "\n" for a in answers), state


def test_a_chat_reads_only_what_is_new(folder, tokenizer, chat, tmp_path):
    code, answers, _ = chat("Who?", "", "And then?\\", "日本語", session=tmp_path / "s")
    assert code == 0
    expected, state = by_hand(folder, tokenizer, ["Who?", "And then?\n日本語"])
    assert answers == expected and same(tmp_path / "s", state)
    assert load_note(tmp_path / "s") == {"phase": "chat", "turns": 2}
    # days later
    code, answers, _ = chat("More", "/quit", "not read", session=tmp_path / "s")
    more, state = by_hand(folder, tokenizer, ["Who?", "And then?\n日本語", "More"])
    assert code == 0 and expected + answers == more and same(tmp_path / "s", state)


def test_a_fork_leaves_the_original_alone(folder, tokenizer, chat, tmp_path):
    code, answers, told = chat("Who?", f"/fork {tmp_path / 'b'}", "This", "/save", session=tmp_path / "a")
    assert code == 0 and "going on in" in told
    expected, state = by_hand(folder, tokenizer, ["Who?", "This"])
    assert answers == expected and same(tmp_path / "b", state)
    _, original = by_hand(folder, tokenizer, ["Who?"])
    assert same(tmp_path / "a", original)
    assert chat("That", session=tmp_path / "a")[0] == 0
    _, other = by_hand(folder, tokenizer, ["Who?", "That"])
    assert same(tmp_path / "a", other) and same(tmp_path / "b", state)
    _, _, told = chat(f"/fork {tmp_path / 'b'}", "/fork", "/fork absent/x", session=tmp_path / "a")
    assert "exists" in told and "needs the name" in told and "its folder does not exist" in told
    assert sorted(n for n in os.listdir(tmp_path)) == ["a", "b"]  # no locks


def test_commands_of_a_chat(folder, tokenizer, chat, tmp_path):
    code, answers, told = chat("/learn off", "Who?", f"/save {tmp_path / 'copy'}", "/stats", "/reset", "Who?",
                               "/learn maybe", "/nonsense", "/save", "/help", "//help")
    assert code == 0
    expected, state = by_hand(folder, tokenizer, ["Who?"], learn="off")
    assert answers.startswith(expected * 2) and same(tmp_path / "copy", state)
    both, _ = by_hand(folder, tokenizer, ["Who?", "/help"], learn="off")
    assert answers[len(expected) :] == both
    for words in ("learning is off", "1 turns", "bits per token", "learning off", "'maybe'",
                  "/nonsense is no command", "there is no session", "/fork FILE"):
        assert words in told


def test_the_system_message_is_told_once(folder, tokenizer, chat, tmp_path):
    chat("Who?", session=tmp_path / "s", more=["--system", "Be brief."])
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    n = len(tokenizer.chat(messages))
    assert n <= hk.load_state(tmp_path / "s").pos[0] < n + 6


def test_a_chat_with_a_model_that_cannot(capfd, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Lines("hello\n"))
    assert main(["chat", "--quiet"]) == 2
    one_line(capfd.readouterr().err, "no chat template", "generate")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_an_answer_keeps_the_session(folder, tokenizer, chat, tmp_path, monkeypatch, number):
    with monkeypatch.context() as patch:
        at_call(patch, 3, lambda: signal.raise_signal(number))
        code, answers, _ = chat("Who?", "not read", session=tmp_path / "s")
    assert code == 128 + number and load_note(tmp_path / "s")["turns"] == 1
    assert by_hand(folder, tokenizer, ["Who?"])[0].startswith(answers[:-1])
    assert chat("More", session=tmp_path / "s")[0] == 0


# -- read ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    made = tmp_path_factory.mktemp("documents")
    for n, size in enumerate((2, 40, 3)):
        (made / f"{n}.txt").write_text("".join(CORPUS[n:] + CORPUS[:n]) * size, newline="")
    return [made / f"{n}.txt" for n in range(3)]


def read(folder, documents, *more, session=None):
    given = arguments(folder, "--learn", "off", *more, command="read", session=session)
    return main([*given, *map(str, documents)])


def test_documents_are_read_one_after_another(folder, tokenizer, documents, tmp_path, capfd):
    assert read(folder, documents, session=tmp_path / "s") == 0
    printed = capfd.readouterr().out.splitlines()
    model, state = hk.HopeForCausalLM.from_pretrained(folder), None
    for line, document in zip(printed, documents, strict=True):
        ids = torch.tensor([tokenizer.encode(document.read_text())])
        reading = hk.generation.read(model, ids, state)
        bits = reading.nats[0].item() / reading.predicted[0] / torch.log(torch.tensor(2.0)).item()
        assert line == f"{document}: {ids.shape[1]} tokens, {bits:.3f} bits per token"
        state = reading.state
    assert same(tmp_path / "s", state) and load_note(tmp_path / "s") is None


PASSES = ["--learn", "next_token", "--passes", 3, "--shuffle", "--replay", 20, "--seed", 4]


def test_what_was_kept_is_learned_again(folder, tokenizer, documents, tmp_path, monkeypatch, capfd):
    """As by hand; stopped while reading, and while replaying, as without a stop."""
    two = documents[::2]
    assert read(folder, two, *PASSES, session=tmp_path / "s") == 0
    printed = capfd.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == [*map(str, two), "pass 2", "pass 3"]
    model, state = hk.HopeForCausalLM.from_pretrained(folder), None
    for document in two:
        ids = torch.tensor([tokenizer.encode(document.read_text())])
        state = model.read(ids, state, replay=20, seed=4, flush=True).state
    again = model.replay(state, 2, True, 4)
    assert same(tmp_path / "s", state)
    assert printed[2].split(", ")[0] == f"pass 2: {again.predicted[0][0]} tokens"
    assert read(folder, two, *PASSES, "--share", 0.5) == 0
    part = capfd.readouterr().out.splitlines()
    assert 0.4 < int(part[2].split()[2]) / again.predicted[0][0] < 0.7
    replays = []
    learned = hk.HopeForCausalLM.replay

    def stopped(self, *args, on_segment, **options):
        def counted(done, total):
            on_segment(done, total)
            replays.append(done)
            if len(replays) == 7:
                signal.raise_signal(signal.SIGINT)

        return learned(self, *args, on_segment=counted, **options)

    with monkeypatch.context() as patch:
        at_call(patch, 1, lambda: signal.raise_signal(signal.SIGINT))
        assert read(folder, two, *PASSES, session=tmp_path / "t") == 130
        assert "stopped after 1 of 2 documents" in capfd.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(hk.HopeForCausalLM, "replay", stopped)
        assert read(folder, two, *PASSES, session=tmp_path / "t") == 130
        assert "a part of the replays" in capfd.readouterr().err
    assert read(folder, two, *PASSES, session=tmp_path / "t") == 0
    assert same(tmp_path / "t", state) and load_note(tmp_path / "t") is None
    assert read(folder, two, "--passes", 2) == read(folder, two, "--replay", 2) == 2


@pytest.mark.parametrize("call", [1, 2, 3])
def test_reading_documents_goes_on_where_it_was(folder, documents, tmp_path, monkeypatch, capfd, call):
    assert read(folder, documents, session=tmp_path / "whole") == 0
    expected = capfd.readouterr().out.splitlines()
    with monkeypatch.context() as patch:
        at_call(patch, call, lambda: signal.raise_signal(signal.SIGINT))
        assert read(folder, documents, session=tmp_path / "s") == 130
    first = capfd.readouterr()
    assert "the same command goes on" in first.err
    assert read(folder, documents, session=tmp_path / "s") == 0
    lines = first.out.splitlines() + capfd.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == [line.split(",")[0] for line in expected]
    for a, b in zip(lines, expected):  # the first token after the interruption is not counted
        assert abs(float(a.split(", ")[1].split()[0]) - float(b.split(", ")[1].split()[0])) < 0.01
    assert same(tmp_path / "s", hk.load_state(tmp_path / "whole"))


def test_other_documents_are_refused_by_name(folder, documents, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        at_call(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        assert read(folder, documents, session=tmp_path / "s") == 130
    for others, more, words in (
        (documents[:2], [], "it was reading 3 documents, not 2"), (documents[::-1], [], "document 1 was"),
        (documents, ["--seed", "2"], "passes, shuffle, replay, share, seed"),
    ):
        capfd.readouterr()
        assert read(folder, others, *more, session=tmp_path / "s") == 2
        one_line(capfd.readouterr().err, words, "--no-resume")
    assert read(folder, documents[:1], "--no-resume", session=tmp_path / "s") == 0
    for wrong, words in ((tmp_path / "absent", "No such file"), (tmp_path, "is a folder")):
        capfd.readouterr()
        assert read(folder, [wrong]) == 2
        one_line(capfd.readouterr().err, words)
    for wrong in (["--passes", 0], ["--passes", 2, "--share", 0], ["--passes", 2, "--share", "nan"]):
        assert read(folder, documents, *wrong) == 2


def test_the_guard_is_counted(theirs, documents, tmp_path, capfd):
    """Rates that destroy a model: what was learned is taken back, and the last line says how often."""
    assert main(["convert", str(theirs), str(tmp_path / "m"), "--chunks", "8", "--lr", "3e4", "--quiet"]) == 0
    for more in ([], ["--no-guard"]):
        session = tmp_path / f"s{len(more)}"
        given = ["read", "--model", str(tmp_path / "m"), "--session", str(session), *more, str(documents[0])]
        assert main(given) == 0
        count = sum(hk.load_state(session).rollbacks)
        printed = capfd.readouterr().err
        assert f", guard: {count} rollbacks, " in printed if not more else ", guard:" not in printed
        assert (count > 0) == (not more)


def test_a_byte_model_reads_documents_too(tmp_path, capfd):
    (tmp_path / "d").write_bytes(b"In the beginning was the Word. " * 20)
    assert main(["read", "--quiet", str(tmp_path / "d")]) == 0
    assert "620 bytes, " in (out := capfd.readouterr().out) and "bits per byte" in out


# -- a process of its own -----------------------------------------------------------------------------------


def test_as_a_process(folder, tokenizer, documents, tmp_path):
    """Learned, saved, asked in a new process: none of them needs transformers."""
    blocker = tmp_path / "blocked"
    blocker.mkdir()
    (blocker / "transformers.py").write_text("raise ImportError('not at run time')")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(blocker), os.environ.get("PYTHONPATH", "")])}

    def run(*given, text=None):
        done = subprocess.run([sys.executable, "-m", "hope_kernels", *map(str, given)], input=text, env=env,
                              capture_output=True, text=True, timeout=120, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        return done

    session = tmp_path / "s"
    read = run("read", documents[0], "--model", folder, "--session", session)
    assert "bits per token" in read.stdout and "learn=next_token" in read.stderr
    talk = run("chat", "--model", folder, "--session", session, "--max-new-tokens", 4,
               text="Who?\n/stats\n日本語\n")
    assert "1 turns" in talk.stderr and load_note(session)["turns"] == 2
    assert talk.stdout.count("\n") >= 2
    more = run("generate", "--model", folder, "--session", session, "--prompt", "And", "--max-new-tokens", 3)
    assert "bits per token read" in more.stderr and load_note(session) is None
