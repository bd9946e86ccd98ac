"""Texts of a server are those of lone runs, in whatever company, in one piece or as they come."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from serve.lone import GREEDY, complete, lone, streamed, text_of

from hope_kernels import Tokenizer, load_state
from hope_kernels.cli.chat import _turns
from hope_kernels.generation import read
from hope_kernels.serve import rows
from hope_kernels.serve.answer import Answer
from hope_kernels.state import State
from hope_kernels.state_file import load_note


def same(a, b) -> bool:
    pairs = zip(a.tensors(), b.tensors(), strict=True)
    return a._counters() == b._counters() and all(torch.allclose(x, y, rtol=0, atol=1e-9) for x, y in pairs)


def test_turns_of_a_session_are_one_text(model, serve, tmp_path):
    client, prompts, state = serve(model), ("one, two, three, " * 6, "", "four"), None
    for n, prompt in enumerate(prompts, 1):
        if prompt:
            want, state = lone(model, prompt, state)
        else:
            out = model.generate(None, 9, state)
            want, state = Tokenizer.of(model).decode(out.tokens[0].tolist()), out.state
        answer = complete(client, prompt, "a")
        assert text_of(answer) == want and answer["choices"][0]["finish_reason"] == "length"
        assert answer["hope"]["generation"] == n and answer["hope"]["tokens"] == state.pos[0]
        assert answer["usage"]["completion_tokens"] == 9
    assert same(load_state(tmp_path / "sessions" / "a.safetensors"), state.split()[0])
    found = read(model, torch.tensor([list(prompts[0].encode())]), learn="next_token")
    first = complete(client, prompts[0])["hope"]
    assert first["bits_per_token"] == pytest.approx(float(found.nats[0]) / 0.6931471805599453 / 101)
    assert first["session"] is None and first["generation"] is None


def test_sessions_in_company_write_what_they_would_alone(model, serve, tmp_path, monkeypatch):
    joins, join = [], State.join
    monkeypatch.setattr(rows.State, "join", lambda states: joins.append(sum(s.batch for s in states)) or join(states))
    client = serve(model, batch=5, piece=16)
    turns = [[(f"{'abcdefg'[i % 7] * (3 + 5 * i)} {t}", 3 + (5 * i + 3 * t) % 11) for t in range(2)] for i in range(9)]
    how = [{"temperature": 0.8 * (i % 2), "seed": i, "learn": ("next_token", "off")[i % 4 == 3]} for i in range(9)]

    def talk(i):
        return [text_of(complete(client, p, f"s{i}", max_tokens=n, **how[i])) for p, n in turns[i]]

    with ThreadPoolExecutor(9) as pool:
        found = list(pool.map(talk, range(9)))
    for i in range(9):
        state, want = None, []
        for prompt, n in turns[i]:
            text, state = lone(model, prompt, state, n, **how[i])
            want.append(text)
        assert found[i] == want, i
        assert same(load_state(tmp_path / "sessions" / f"s{i}.safetensors"), state.split()[0]), i
    assert max(joins) > 2


def test_a_stream_is_the_answer_in_parts(model, serve):
    client, body = serve(model, piece=16), {"prompt": "abc " * 20, **GREEDY, "session": "a"}
    events = streamed(client, "/v1/completions", progress=True, stream_options={"include_usage": True}, **body)
    read = [e["hope"] for e in events if not e["choices"] and "hope" in e]
    assert [r["read"] for r in read] == [16, 32, 48, 64, 80] and {r["of"] for r in read} == {80}
    parts = [e for e in events if e["choices"]]
    assert "".join(map(text_of, parts)) == lone(model, "abc " * 20)[0]
    assert [p["choices"][0]["finish_reason"] for p in parts] == [None] * (len(parts) - 1) + ["length"]
    assert parts[-1]["hope"]["generation"] == 1 and client.get("/sessions/a").json()["generation"] == 1
    assert events[-1]["usage"] == {"prompt_tokens": 80, "completion_tokens": 9, "total_tokens": 89}
    assert len({e["id"] for e in events}) == 1


def test_an_answer_ends_before_a_stop(model, serve):
    whole = lone(model, "hello", n=40)[0]
    client, stop = serve(model), whole[7:9]
    at = whole.find(stop)
    answer = complete(client, "hello", max_tokens=40, stop=[stop, "no such text"])
    assert text_of(answer) == whole[:at] and answer["choices"][0]["finish_reason"] == "stop"
    parts = streamed(client, "/v1/completions", prompt="hello", temperature=0, max_tokens=40, stop=stop)
    assert "".join(text_of(p) for p in parts) == whole[:at]


def test_only_reading(model, serve, tmp_path):
    client = serve(model)
    answer = complete(client, "some notes. " * 9, "a", max_tokens=0)
    assert text_of(answer) == "" and answer["hope"]["tokens"] == 108
    want = read(model, torch.tensor([list(b"some notes. " * 9)]), learn="next_token").state
    assert same(load_state(tmp_path / "sessions" / "a.safetensors"), want.split()[0])


def talk(client, messages, session="a", status=200):
    body = {"messages": messages, "session": session, "temperature": 0, "max_tokens": 8}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == status, response.text
    return response.json()["choices"][0]["message"]["content"] if status == 200 else response.json()["error"]


def test_a_conversation_reads_its_own_turns_only(talker, serve, tmp_path):
    client, tokenizer = serve(talker), Tokenizer.of(talker)
    first, second = [{"role": "user", "content": "In the beginning"}], {"role": "user", "content": "and then?"}
    out = talker.generate(torch.tensor([tokenizer.chat(first)]), 8, eos_token_id=tokenizer.eos_ids)
    written = [i for i in out.tokens[0].tolist() if i not in tokenizer.eos_ids]
    answer = talk(client, first)
    assert answer == tokenizer.decode(written)
    ids = tokenizer.next_turn("and then?")
    closing = out.tokens[0, -1] == ids[0]
    out = talker.generate(torch.tensor([ids]), 8, out.state, unread="included" if closing else "before",
                          eos_token_id=tokenizer.eos_ids)
    client.post("/sessions/a/fork", json={"id": "b"})
    alone = talk(client, [second])
    history = talk(client, [*first, {"role": "assistant", "content": answer}, second], "b")
    written = [i for i in out.tokens[0].tolist() if i not in tokenizer.eos_ids]
    assert alone == history == tokenizer.decode(written)
    assert client.get("/sessions/a").json()["turns"] == 2
    assert _turns(load_note(tmp_path / "sessions" / "a.safetensors")) == 2  # the command chat goes on with it
    assert "has had 2 turns" in talk(client, [*first, second], status=400)["message"]
    parts = streamed(client, "/v1/chat/completions", messages=first, temperature=0, max_tokens=8)
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(p["choices"][0]["delta"].get("content", "") for p in parts) == answer


@pytest.mark.parametrize("stops, want", [([], "naïve é! end"), (["é!"], "naïve "), (["zz", "! e"], "naïve é"),
                                         (["d!"], "naïve é! end")])
def test_text_is_held_back_while_it_may_be_a_stop(folder, stops, want):
    tokenizer = Tokenizer.from_pretrained(folder)
    answer, parts = Answer(tokenizer, stops, [], []), []
    for token in "naïve é! end".encode():
        parts.append(answer.push(token))
        if answer.ended:
            break
    parts.append(answer.close())
    assert "".join(parts) == answer.text == want and answer.close() == ""
    assert not any("\ufffd" in p for p in parts)
