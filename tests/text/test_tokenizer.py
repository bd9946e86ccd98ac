"""Text to ids and back: equal to transformers, as a stream equal to one go, damaged files told."""

import random

import pytest
from text_model import CORPUS, TEMPLATE, library_tokenizer

import hope_kernels as hk
from hope_kernels.text.extra import extra
from hope_kernels.text.files import TextSettings
from hope_kernels.text.template import ChatTemplate

PARTS = [*CORPUS, "\n", " ", "\t", "x\n", ".\n\n", "Straße\r\n", "<|end|>", "1234"]
TEXT = "".join(random.Random(0).choices(PARTS, k=400))
WILD = "".join(random.Random(1).choices("ab \n\t.é日😀\u0301\ufffd", k=3000))


@pytest.fixture(scope="module", params=[False, True], ids=["byte-level", "metaspace"])
def tokenizer(request):
    library = library_tokenizer(request.param)
    files = {"tokenizer.json": library.to_str().encode(), "chat_template.jinja": TEMPLATE.encode(),
             "text.json": TextSettings((0,), (), {"eos_token": "<|end|>"}).to_bytes()}
    return hk.Tokenizer(files, library.get_vocab_size())


@pytest.mark.parametrize("text", [TEXT, WILD], ids=["text", "wild"])
@pytest.mark.parametrize("window, spare", [(1 << 16, 1 << 10), (900, 300), (333, 111)])
def test_ids_of_parts_are_those_of_the_whole(tokenizer, text, window, spare):
    draw, ids, at = random.Random(window), [], 0
    stream = tokenizer.id_stream(window=window, spare=spare)
    while at < len(text):
        n = draw.choice([1, 7, 500, 2000])
        ids += stream.push(text[at : at + n])
        at += n
    assert ids + stream.end() == tokenizer.encode(text)


def test_a_window_that_finds_no_line_is_cut_between_tokens(tokenizer):
    text = "made that was made. " * 400
    stream = tokenizer.id_stream(window=200, spare=60)
    assert stream.push(text) + stream.end() == tokenizer.encode(text)


@pytest.mark.parametrize("text", [TEXT, WILD], ids=["text", "wild"])
def test_a_stream_of_ids_is_the_text_in_whole_characters(tokenizer, text):
    ids, stream = tokenizer.encode(text), tokenizer.stream()
    parts = [stream.push(i) for i in ids]
    assert "".join(parts) + stream.end() == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)
    assert len([p for p in parts if p]) > len(ids) / 4  # as they come


def test_a_stream_goes_on_from_its_note(tokenizer):
    ids = tokenizer.encode("naïve 日本語 😀 the Word")
    whole = tokenizer.decode(ids)
    for cut in range(len(ids)):
        first = tokenizer.stream()
        begun = "".join(first.push(i) for i in ids[:cut])
        second = tokenizer.stream(note=first.note())
        assert begun + "".join(second.push(i) for i in ids[cut:]) + second.end() == whole


def test_what_is_no_text_streams_too(tokenizer):
    """Random ids: broken characters, special tokens."""
    draw = random.Random(3)
    for _ in range(50):
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(60)]
        stream = tokenizer.stream()
        streamed = "".join(stream.push(i) for i in ids) + stream.end()
        if tokenizer.start_ids:  # a run of byte tokens is decoded as one: what follows may undo a character
            assert streamed.replace("\ufffd", "")[:5] == tokenizer.decode(ids).replace("\ufffd", "")[:5]
        else:
            assert streamed == tokenizer.decode(ids)


def test_a_context_decides_about_a_space(tokenizer):
    ids = tokenizer.encode("the Word")
    after = tokenizer.encode("the Word was with")[len(ids) :]
    stream = tokenizer.stream(context=ids)
    assert "".join(stream.push(i) for i in after) + stream.end() == " was with"


def test_bytes_need_no_library():
    tokenizer = hk.Tokenizer.from_pretrained("hope-byte")
    assert tokenizer.unit == "bytes" and tokenizer.eos_ids == tokenizer.start_ids == ()
    ids = tokenizer.encode("日\udcff")
    assert ids == [*"日".encode(), 255]
    stream, back = tokenizer.stream(), tokenizer.id_stream(window=5, spare=2)
    assert [stream.push(i) for i in ids] == ["", "", "日", ""] and stream.end() == "\ufffd"
    assert back.push("日本語 in the beginning") + back.end() == tokenizer.encode("日本語 in the beginning")
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.chat([{"role": "user", "content": "hello"}])


def test_start_ids_are_for_the_start(tokenizer):
    start = list(tokenizer.start_ids)
    assert tokenizer.encode("the Word", start=True) == start + tokenizer.encode("the Word")
    assert start in ([], [1])


MESSAGES = [{"role": "user", "content": " Who? <b> "}, {"role": "assistant", "content": "The Word."},
            {"role": "user", "content": "日本語"}]


def test_chat_is_transformers(tokenizer):
    from transformers import PreTrainedTokenizerFast

    library = library_tokenizer(bool(tokenizer.start_ids))
    theirs = PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<|end|>")
    theirs.chat_template = TEMPLATE
    for prompt in (False, True):
        text = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
        assert tokenizer.template.render(MESSAGES, prompt) == text
        assert tokenizer.chat(MESSAGES, prompt) == theirs(text, add_special_tokens=False).input_ids


def test_the_next_turn_is_what_the_whole_chat_goes_on_with(tokenizer):
    said = tokenizer.template.render(MESSAGES[:1]) + "The Word."
    whole = tokenizer.template.render(MESSAGES)
    assert whole.startswith(said) and tokenizer.next_turn("日本語") == tokenizer.encode(whole[len(said) :])


def test_templates_are_foreign_code():
    def render(source, messages=MESSAGES):
        return ChatTemplate(source, {"bos_token": "<s>"}).render(messages)

    assert render("{{ bos_token }}{% generation %}x{% endgeneration %}{{ messages[0] | tojson }}") == (
        '<s>x{"role": "user", "content": " Who? <b> "}'
    )
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    loop = "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}"
    assert render(loop) == "user"
    for source in ("{{ raise_exception('no system') }}", "{{ ''.__class__.__mro__ }}{{ x.y.z }}",
                   "{% set _ = messages.append(1) %}", "{{ 1 // 0 }}",
                   "{{ messages[0]['content'] + messages[0] }}"):
        with pytest.raises(ValueError, match="chat: the model's template refuses"):
            render(source)
    with pytest.raises(ValueError, match="chat template: line 2"):
        ChatTemplate("\n{% if %}", {})
    for messages in ([{"content": "x"}], ["x"], [{"role": "user", "content": object()}]):
        with pytest.raises(ValueError, match="chat: argument messages"):
            render("x", messages)


@pytest.mark.parametrize("files, size, message", [
    ({"tokenizer.json": b"{"}, 500, "m/tokenizer.json is damaged"),
    ({"tokenizer.json": b"\xff"}, 500, "m/tokenizer.json is damaged"),
    ({}, 500, "m has no tokenizer.json"),
    ({"text.json": b"{}"}, 256, "m/text.json is damaged"),
    ({"text.json": TextSettings((256,)).to_bytes()}, 256, "token 256 in eos_ids"),
    ({"text.json": TextSettings((-1,)).to_bytes()}, 256, "eos_ids is"),
    ({"text.json": TextSettings((), ("",)).to_bytes()}, 256, "stop is"),
    ({"text.json": TextSettings((), (), {"a": 1}).to_bytes()}, 256, "special_tokens is"),
    ({"text.json": TextSettings().to_bytes().replace(b'"version": 1', b'"version": 2')}, 256, "version 2"),
])
def test_damaged_files_are_told(files, size, message):
    with pytest.raises(ValueError, match=message):
        hk.Tokenizer(files, size, "m")


def test_another_models_tokenizer_is_refused(tokenizer):
    with pytest.raises(ValueError, match="they do not belong together"):
        hk.Tokenizer(tokenizer.files, 100)


def test_a_missing_library_names_the_extra():
    with pytest.raises(ImportError, match=r"needs the package 'no_such_library'.*hope_kernels\[text\]"):
        extra("no_such_library", "this")


def test_the_files_travel_with_the_model(tokenizer, tmp_path):
    model = hk.HopeForCausalLM(hk.HopeConfig(tokenizer.vocab_size, 8, 1, mixer="attention", num_heads=2))
    model.text_files = tokenizer.files
    model.save_pretrained(tmp_path / "a")
    hk.HopeForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    again = hk.Tokenizer.from_pretrained(tmp_path / "b")
    assert again.files == tokenizer.files and again.eos_ids == (0,)
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    again.save_pretrained(tmp_path / "c")
    names = sorted(p.name for p in (tmp_path / "c").iterdir())
    assert names == ["chat_template.jinja", "text.json", "tokenizer.json"]
    with pytest.raises(FileNotFoundError, match="Tokenizer.from_pretrained: 'absent'"):
        hk.Tokenizer.from_pretrained("absent")
