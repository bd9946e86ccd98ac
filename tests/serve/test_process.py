"""The command: killed in the middle of a turn, and stopped in the middle of one."""

import http.client
import json
import os
import signal
import subprocess
import sys

from serve.lone import lone

from hope_kernels import load_state


def started(folder, sessions, *more):
    """(process, port)."""
    command = [sys.executable, "-m", "hope_kernels", "serve", "--model", str(folder), "--sessions", str(sessions),
               "--port", "0", *more]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    line = process.stderr.readline()
    assert "http://127.0.0.1:" in line, line + process.stderr.read()
    return process, int(line.rsplit(":", 1)[1].strip().rstrip("/"))


def ask(port, body=None, path="/v1/completions"):
    """The response, once it has begun."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("GET" if body is None else "POST", path, body and json.dumps(body),
                       {"content-type": "application/json"})
    return connection.getresponse()


def test_killed_and_stopped_in_the_middle_of_turns(folder, model, tmp_path):
    sessions = tmp_path / "sessions"
    process, port = started(folder, sessions)
    turn = {"prompt": "hello", "session": "a", "temperature": 0, "max_tokens": 9}
    text = json.loads(ask(port, turn).read())["choices"][0]["text"]
    assert text == lone(model, "hello")[0]
    endless = {**turn, "prompt": "more", "max_tokens": 1000, "stream": True}
    assert ask(port, endless).readline().startswith(b"data: ")
    process.kill()
    process.wait()
    assert load_state(sessions / "a.safetensors").pos == [13]
    assert {p.name for p in sessions.iterdir()} <= {"a.safetensors", "a.safetensors.lock"}

    process, port = started(folder, sessions, "--grace", "0")
    assert json.loads(ask(port, path="/sessions/a").read())["generation"] == 1
    stream = ask(port, endless)
    said = json.loads(stream.readline()[6:])["choices"][0]["text"]
    process.send_signal(signal.SIGTERM)
    parts = [json.loads(line[6:]) for line in stream.read().decode().splitlines() if line.startswith("data: {")]
    said += "".join(p["choices"][0]["text"] for p in parts)
    assert parts[-1]["hope"]["interrupted"] and parts[-1]["hope"]["generation"] == 2
    assert process.wait(60) == 0
    state = load_state(sessions / "a.safetensors")
    written = state.pos[0] - 13 - 1 - 4 + 1
    assert said == lone(model, "more", lone(model, "hello")[1], written)[0] and 0 < written < 1000
    assert [p.name for p in sessions.iterdir()] == ["a.safetensors"]
