"""Two replicas behind Ray Serve share three sessions: each answers as a lone run, whichever is asked."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from serve.lone import lone

httpx = pytest.importorskip("httpx")
pytest.importorskip("ray", reason="the extra ray is not installed")
pytestmark = pytest.mark.slow  # a cluster starts
EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_serve.py"
GREEDY = {"temperature": 0, "max_tokens": 5}


@pytest.fixture
def client(folder, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, str(EXAMPLE), "--model", str(folder), "--sessions", str(tmp_path / "sessions"),
               "--replicas", "2", "--cpus", "0.4", "--port", str(port)]
    paths = [str(EXAMPLE.parents[1]), *(p for p in sys.path if p)]
    with open(tmp_path / "log", "w") as log:
        environment = os.environ | {"PYTHONPATH": ":".join(paths)}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as found:
            while "replicas with the sessions" not in (tmp_path / "log").read_text():
                assert process.poll() is None, (tmp_path / "log").read_text()[-4000:]
                time.sleep(0.5)
            yield found
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(600)
    assert code == 0, (tmp_path / "log").read_text()[-4000:]  # every replica has closed its service


def turn(client, name, prompt, header):
    headers = {"serve_multiplexed_model_id": name} if header else {}
    body = {"session": name, "prompt": prompt, **GREEDY}
    response = client.post("/v1/completions", json=body, headers=headers)
    assert response.status_code == 200, response.text
    found = response.json()
    return found["choices"][0]["text"], found["hope"]["generation"], response.headers["hope-replica"]


def test_replicas_share_sessions(client, model, tmp_path):
    names, states = ("john", "anna", "mary"), {}
    served = {name: [] for name in names}
    for round_ in range(3):
        for name in names:
            prompt = f"{name} said in round {round_}, " * 2
            wanted, states[name] = lone(model, prompt, states.get(name), GREEDY["max_tokens"])
            text, generation, replica = turn(client, name, prompt, header=True)
            assert (text, generation) == (wanted, round_ + 1)
            served[name].append(replica)
    # without the header any replica may be asked, until one session has been with both
    name, count = names[0], 3
    while len(set(served[name])) < 2:
        assert count < 60, served
        wanted, states[name] = lone(model, "and", states[name], GREEDY["max_tokens"])
        text, generation, replica = turn(client, name, "and", header=False)
        count += 1
        assert (text, generation) == (wanted, count)
        served[name].append(replica)
    # it is back with the first, whose memory is older than the file by now
    for _ in range(4):
        wanted, states[name] = lone(model, "so", states[name], GREEDY["max_tokens"])
        text, generation, _ = turn(client, name, "so", header=True)
        count += 1
        assert (text, generation) == (wanted, count)
    listed = client.get("/sessions").json()["data"]
    assert {s["id"]: s["generation"] for s in listed} == {"john": count, "anna": 3, "mary": 3}
