"""What is asked in the wrong way is refused before anything is read, by name, as JSON."""

import threading

import pytest
from serve.lone import complete
from serve.test_sessions import error, submit

from hope_kernels.cli.main import main
from hope_kernels.serve.settings import Settings, api_key, is_loopback

BAD = [
    {"max_tokens": 51}, {"max_tokens": -1}, {"max_tokens": 1.5}, {"max_tokens": True}, {"temperature": -1},
    {"temperature": "hot"}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": 0}, {"seed": 2**70}, {"seed": "x"}, {"stop": ""},
    {"stop": [1]}, {"stop": ["x"] * 17}, {"n": 2}, {"logprobs": 3}, {"echo": True}, {"learn": "on"}, {"stream": 1},
    {"stream_options": 3}, {"session": 7}, {"generation": -1}, {"generation": "1"}, {"prompt": ["a"]}, {"prompt": None},
    {"sesion": "a"}, {"frequency_penalty": 0.5}, {"tools": [{}]}, {"progress": "yes"}, {"temperature": float("1e999")},
]


@pytest.fixture(scope="module")
def limited(model, tmp_path_factory):
    from fastapi.testclient import TestClient

    from hope_kernels import Tokenizer
    from hope_kernels.serve.api import Service, application

    settings = Settings(max_tokens=50, max_prompt=100, max_body=2000, api_key="secret")
    service = Service(model, Tokenizer.of(model), "m", str(tmp_path_factory.mktemp("sessions")), settings)
    service.start()
    yield TestClient(application(service, {"testserver"}), headers={"authorization": "Bearer secret"})
    service.close(0)


@pytest.mark.parametrize("body", BAD, ids=lambda b: "-".join(map(str, *b.items()))[:40])
def test_arguments(limited, body):
    content = __import__("json").dumps({"prompt": "x", **body})
    response = limited.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    found = response.json()["error"]
    name = next(iter(body))
    assert response.status_code == 400 and name in found["message"] and found.get("param") in (None, name), found
    assert limited.get("/sessions").json()["data"] == []


def test_bodies_and_paths(limited):
    post = lambda content, kind="application/json": limited.post(
        "/v1/completions", content=content, headers={"content-type": kind}
    )
    error(post(b"{"), 400, "bad_json")
    error(post(b"[1]"), 400, "bad_json")
    error(post(b'{"prompt": "x"}', "text/plain"), 415, "not_json")
    error(post(b'{"prompt": "' + b"x" * 2000 + b'"}'), 413, "too_large")
    error(post(iter([b'{"prompt": "', b"x" * 1500, b"x" * 1500])), 413, "too_large")
    error(limited.get("/nothing"), 404, "no_path")
    error(limited.put("/sessions"), 405, "no_method")
    error(limited.get("/sessions?limit=x"), 400, "bad_argument")
    assert complete(limited, "x" * 101, status=400)["code"] == "prompt_too_long"
    assert complete(limited, "", status=400)["code"] == "empty_prompt"
    assert complete(limited, "x", status=404, model="gpt")["code"] == "no_model"
    assert complete(limited, "x", max_tokens=50, model="m", user="u", n=1, stop=None)["object"] == "text_completion"
    body = {"messages": [{"role": "user", "content": "hi"}]}
    error(limited.post("/v1/chat/completions", json=body), 400, "no_chat_template")


def test_messages(talker, serve):
    client = serve(talker)
    for messages in (
        None, [], "hi", [{"role": "x", "content": "hi"}], [{"role": "user"}], [{"role": "user", "content": 3}],
        [{"role": "user", "content": [{"type": "image_url"}]}]
    ):
        response = client.post("/v1/chat/completions", json={"messages": messages})
        assert "messages" in error(response, 400, "bad_argument")["message"]
    parts = [{"type": "text", "text": "In the "}, {"type": "text", "text": "beginning"}]
    say = lambda content: client.post("/v1/chat/completions", json={
        "messages": [{"role": "system", "content": "Help."}, {"role": "user", "content": content}],
        "temperature": 0, "max_completion_tokens": 4}).json()["choices"][0]["message"]
    assert say(parts) == say("In the beginning") and say("In the beginning")["role"] == "assistant"


def test_keys_and_hosts(limited):
    bare = {"authorization": ""}
    assert error(limited.get("/sessions", headers=bare), 401, "bad_key")["type"] == "authentication_error"
    error(limited.get("/v1/models", headers={"authorization": "Bearer wrong"}), 401, "bad_key")
    assert limited.get("/health", headers=bare).json()["status"] == "ok"
    page = limited.get("/", headers=bare)
    assert page.status_code == 200 and "<title>hope_kernels</title>" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    error(limited.get("/health", headers={"host": "evil.example:8000"}), 403, "bad_host")
    assert limited.get("/v1/models").json()["data"][0]["hope"]["limits"]["max_prompt"] == 100


def test_no_more_than_so_many_wait(model, serve):
    client, begun = serve(model, batch=1, queue=1), threading.Event()
    job, first = submit(client, "x", "a", begun.set, max_tokens=1000)
    assert begun.wait(60)
    _, second = submit(client, "x", "b")
    assert complete(client, "x", status=429)["code"] == "queue_full"
    job.cancelled.set()
    assert first.last().written and second.last().hope["generation"] == 1


def test_settings_and_keys(tmp_path, monkeypatch, capsys):
    for wrong in ({"batch": 0}, {"queue": -1}, {"max_body": 0}, {"grace": float("nan")}):
        with pytest.raises(ValueError, match=f"argument --{next(iter(wrong)).replace('_', '-')} is"):
            Settings(**wrong)
    assert all(map(is_loopback, ("127.0.0.1", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "example.org")))
    monkeypatch.setenv("HOPE_KERNELS_API_KEY", "one")
    (tmp_path / "key").write_text(" two\n")
    assert api_key(None) == "one" and api_key(str(tmp_path / "key")) == "two"
    monkeypatch.setenv("HOPE_KERNELS_API_KEY", " ")
    assert main(["serve", "--sessions", str(tmp_path / "s")]) == 2 and "is empty" in capsys.readouterr().err
    monkeypatch.delenv("HOPE_KERNELS_API_KEY")
    assert main(["serve", "--sessions", str(tmp_path / "s"), "--host", "0.0.0.0"]) == 2
    assert "there is no API key" in capsys.readouterr().err and not (tmp_path / "s").exists()
