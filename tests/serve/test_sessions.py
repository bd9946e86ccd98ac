"""Sessions are files: what is in one counts, whoever wrote it, and nothing else is reached by a name."""

import errno
import os
import threading

import pytest
import torch
from serve.lone import complete, lone, text_of

from hope_kernels import HopeForCausalLM, Tokenizer, load_state, state_file
from hope_kernels.cli.lock import held
from hope_kernels.serve.jobs import Done, Failed, Job, Text, completion
from hope_kernels.serve.rows import Batch, opened
from hope_kernels.serve.settings import Settings


@pytest.fixture
def client(model, serve):
    return serve(model)


@pytest.fixture
def sessions(tmp_path):
    return tmp_path / "sessions"


def error(response, status, code):
    assert response.status_code == status and response.json()["error"]["code"] == code, response.text
    return response.json()["error"]


def test_create_list_look_fork_reset_delete(model, client, sessions):
    made = client.post("/sessions", json={"id": "a"})
    assert made.status_code == 201 and made.json()["generation"] == 1 and made.json()["tokens"] == 0
    assert error(client.post("/sessions", json={"id": "a"}), 409, "session_exists")
    first = text_of(complete(client, "hello", "a"))
    assert client.post("/sessions/a/fork", json={"id": "b"}).status_code == 201
    more = [text_of(complete(client, "more", name)) for name in ("a", "b")]
    assert more[0] == more[1] == lone(model, "more", lone(model, "hello")[1])[0]
    assert text_of(complete(client, "other", "b")) and client.get("/sessions/a").json()["generation"] == 3
    made_up = client.post("/sessions", json={}).json()["id"]
    found = client.get("/sessions").json()
    assert [s["id"] for s in found["data"]] == sorted(["a", "b", made_up]) and not found["has_more"]
    page = client.get("/sessions?limit=1&after=a").json()
    assert [s["id"] for s in page["data"]] == ["b"] and page["has_more"]
    look = client.get("/sessions/a").json()
    assert look["file_bytes"] == (sessions / "a.safetensors").stat().st_size and look["state_bytes"] > 0
    assert client.post("/sessions/a/reset", json={}).json()["tokens"] == 0
    assert text_of(complete(client, "hello", "a")) == first
    assert client.delete("/sessions/a").json()["deleted"] and not (sessions / "a.safetensors").exists()
    for act in (client.get, client.delete):
        error(act("/sessions/a"), 404, "no_session")
    for path in ("fork", "reset"):
        error(client.post(f"/sessions/a/{path}", json={}), 404, "no_session")
    error(client.post("/sessions/b/fork", json={"id": made_up}), 409, "session_exists")
    assert not [p for p in sessions.iterdir() if p.suffix != ".safetensors"]


@pytest.mark.parametrize("name", ["..", ".", "../x", "a/b", "/etc/passwd", "a.b", "", "-a", "_a", "a" * 65, "a\n",
                                  "ä", "a\0b", "C:x"])
def test_names_do_not_lead_out_of_the_folder(client, sessions, name):
    error(client.post("/sessions", json={"id": name}), 400, "bad_session_id")
    complete(client, "x", "ok")
    error(client.post("/sessions/ok/fork", json={"id": name}), 400, "bad_session_id")
    assert complete(client, "x", name, status=400)["code"] == "bad_session_id"
    assert [p.name for p in sessions.iterdir()] == ["ok.safetensors"]


def test_links_and_foreign_files_are_left_alone(client, sessions, tmp_path):
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(b"precious")
    (sessions / "link.safetensors").symlink_to(outside)
    (sessions / "folder.safetensors").mkdir()
    (sessions / "junk.safetensors").write_bytes(b"junk")
    HopeForCausalLM(client.service.model.config).double().init_state(2).save(sessions / "two.safetensors")
    for name, code in (("link", "bad_session_file"), ("folder", "bad_session_file"),
                       ("junk", "unusable_session"), ("two", "unusable_session")):
        message = complete(client, "x", name, status=409)
        assert message["code"] == code and str(tmp_path) not in message["message"]
    assert outside.read_bytes() == b"precious" and (sessions / "junk.safetensors").read_bytes() == b"junk"


def test_sessions_of_other_weights_are_refused(client, sessions, model):
    other = HopeForCausalLM(model.config).double()
    other.generate(torch.tensor([[1, 2]]), 3).state.save(sessions / "a.safetensors")
    assert "belongs to weights" in complete(client, "x", "a", status=409)["message"]


def test_a_request_may_say_at_which_generation_the_session_must_be(client):
    assert complete(client, "x", "a", generation=0)["hope"]["generation"] == 1
    for wrong in (0, 2):
        found = complete(client, "x", "a", status=409, generation=wrong)
        assert found["code"] == "wrong_generation" and found["generation"] == 1
    assert complete(client, "x", "a", generation=1)["hope"]["generation"] == 2
    assert complete(client, "x", "new", status=409, generation=3)["generation"] == 0
    error(client.request("DELETE", "/sessions/a", json={"generation": 1}), 409, "wrong_generation")
    error(client.post("/sessions/a/reset", json={"generation": 1}), 409, "wrong_generation")
    assert client.request("DELETE", "/sessions/a", json={"generation": 2}).status_code == 200


def test_what_another_program_wrote_between_turns_is_what_counts(model, client, sessions):
    complete(client, "hello", "a")
    _, theirs = lone(model, "something else")
    theirs.save(sessions / "a.safetensors", {"phase": "chat", "turns": 3})
    assert client.get("/sessions/a").json()["turns"] == 3
    assert text_of(complete(client, "more", "a")) == lone(model, "more", theirs)[0]


class Listener:
    """Takes events; ``act`` is done once, when text comes."""

    def __init__(self, act=None):
        self.act, self.events, self.over = act, [], threading.Event()

    def __call__(self, event):
        self.events.append(event)
        if isinstance(event, Text) and self.act is not None:
            act, self.act = self.act, None
            act()
        if isinstance(event, (Done, Failed)):
            self.over.set()

    def last(self):
        assert self.over.wait(60)
        return self.events[-1]


def submit(client, prompt, session, act=None, **how):
    listener = Listener(act)
    job = Job(completion(client.service.tokenizer, prompt), listener, session, **{"temperature": 0.0, **how})
    client.service.worker.submit(job)
    return job, listener


def test_a_file_that_changes_during_a_turn_is_not_overwritten(model, client, sessions):
    complete(client, "hello", "a")
    _, theirs = lone(model, "something else")
    _, listener = submit(client, "more", "a", lambda: theirs.save(sessions / "a.safetensors"), max_tokens=20)
    assert listener.last().error.code == "stale_session"
    assert load_state(sessions / "a.safetensors").pos == theirs.pos
    assert text_of(complete(client, "more", "a")) == lone(model, "more", theirs)[0]


def test_a_session_that_another_process_has_is_refused_and_one_in_use_here_waits(client, sessions):
    complete(client, "hello", "a")
    with held(os.path.realpath(sessions / "a.safetensors"), "a"):
        assert "in use by another process" in complete(client, "x", "a", status=409)["message"]
        error(client.delete("/sessions/a"), 409, "session_in_use")
    listeners = [submit(client, "x", "a", max_tokens=5)[1] for _ in range(3)]
    assert [one.last().hope["generation"] for one in listeners] == [2, 3, 4]


@pytest.mark.parametrize("loaded", [0, 2])
def test_idle_sessions_are_not_in_memory(model, serve, loaded):
    client = serve(model, loaded=loaded)
    want = []
    for i in range(4):
        complete(client, f"text {i}", f"s{i}")
        want.append(lone(model, "more", lone(model, f"text {i}")[1])[0])
    assert client.service.store.in_memory() == [f"s{i}" for i in range(4)][4 - loaded :]
    assert client.service.worker.figures() == {"waiting": 0, "reading": 0, "writing": 0, "saving": 0}
    assert [text_of(complete(client, "more", f"s{i}")) for i in range(4)] == want


def test_a_session_that_cannot_be_saved_is_as_it_was(model, client, sessions, monkeypatch):
    complete(client, "hello", "a")
    before = (sessions / "a.safetensors").read_bytes()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(state_file, "write_atomically", full)
        found = complete(client, "more", "a", status=500)
    assert found["code"] == "not_saved" and "No space left" in found["message"]
    assert (sessions / "a.safetensors").read_bytes() == before
    assert text_of(complete(client, "more", "a")) == lone(model, "more", lone(model, "hello")[1])[0]


def test_an_answer_that_nobody_waits_for_is_kept_as_far_as_it_came(model, client, sessions):
    job, listener = submit(client, "hello", "a", lambda: job.cancelled.set(), max_tokens=1000)
    done = listener.last()
    assert done.hope["interrupted"] and 0 < done.written < 1000
    text, state = lone(model, "hello", n=done.written)
    assert done.text == text and load_state(sessions / "a.safetensors").pos == state.pos
    assert text_of(complete(client, "more", "a")) == lone(model, "more", state)[0]


def test_a_server_that_is_stopped_keeps_what_is_written_and_leaves_the_rest_as_it_was(model, serve, sessions):
    client = serve(model, batch=2, piece=8)
    complete(client, "before", "reading")
    begun = threading.Event()
    _, writing = submit(client, "hello", "writing", begun.set, max_tokens=1000)
    assert begun.wait(60)
    _, reading = submit(client, "long " * 3000, "reading")
    _, waiting = submit(client, "x", "waiting")
    client.service.close(0)
    done = writing.last()
    assert done.hope["interrupted"] and done.text == lone(model, "hello", n=done.written)[0]
    assert load_state(sessions / "writing.safetensors").pos == [5 + done.written - 1]
    assert client.get("/sessions/writing").json()["last"]["text"] == done.text
    assert {reading.last().error.code, waiting.last().error.code} == {"stopping"}
    assert client.get("/sessions/reading").json()["generation"] == 1
    assert complete(client, "x", "a", status=503)["code"] == "stopping"
    assert not (sessions / "waiting.safetensors").exists()


def test_one_that_fails_leaves_the_others_in_their_batch(model, client):
    settings, rows = Settings(), []
    for prompt in ("hello", "spoiled", "third"):
        job = Job(completion(Tokenizer.of(model), prompt), Listener(), None, max_tokens=6, temperature=0.0)
        row = opened(job, client.service.store.new(""), None, Tokenizer.of(model), settings)
        out = model.generate(torch.tensor([row.prompt.ids]), 1)
        row.state, row.written = out.state, 1
        row.token = int(out.tokens[0, 0])
        row.answer.push(row.token)
        rows.append(row)
    batch = Batch(model, settings)
    batch.add(rows)
    batch.state.mixers[0].delta2[1].fill_(float("nan"))
    (failed, error), = batch.step()
    assert failed is rows[1] and "non-finite" in str(error) and batch.rows == [rows[0], rows[2]]
    while batch.rows:
        ended = batch.step()
    assert [row for row, _ in ended] == [rows[0], rows[2]]
    for row, prompt in ((rows[0], "hello"), (rows[2], "third")):
        row.finish()
        assert row.answer.text == lone(model, prompt, n=6)[0]


def test_a_fault_of_the_server_is_an_answer_too(model, client, sessions, monkeypatch):
    complete(client, "hello", "a")
    with monkeypatch.context() as patch:
        patch.setattr(Batch, "step", lambda self: 1 / 0)
        assert "division by zero" in complete(client, "more", "a", status=500)["message"]
    assert text_of(complete(client, "more", "a")) == lone(model, "more", lone(model, "hello")[1])[0]
