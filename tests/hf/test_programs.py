"""Programs of others, from their command lines, with a folder of ours and nothing of ours imported by hand.

They and what they need are no part of the environment: ``make test-programs`` installs requirements-programs.txt.
"""

import json
import math
import os
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec

import pytest
import text_model
import torch

import hope_kernels as hk
from hope_kernels.cli.main import main

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def needs(module: str):
    return pytest.mark.skipif(find_spec(module) is None, reason=f"needs {module} (make test-programs)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random Llama with a chat template, converted, and with the line for trust_remote_code."""
    from hope_kernels.hf import HopeForCausalLM

    place = tmp_path_factory.mktemp("programs")
    theirs = text_model.source(place / "theirs")
    assert main(["convert", str(theirs), str(place / "ours"), "--chunks", "8", "--quiet"]) == 0
    HopeForCausalLM.from_pretrained(place / "ours").save_pretrained(place / "ours")
    return place / "ours"


def asked(port: int, path: str, body: dict | None = None) -> bytes:
    given = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", given, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read()


@needs("openai")
def test_transformers_serve_answers_as_the_model_does(folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--trust-remote-code",
               "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for _ in range(600):
            assert server.poll() is None, server.stdout.read()
            try:
                asked(port, "/health")
                break
            except OSError:
                time.sleep(0.2)
        messages = [{"role": "user", "content": "In the beginning"}]
        wanted = {"model": str(folder), "messages": messages, "max_tokens": 12, "temperature": 0.0}
        whole = json.loads(asked(port, "/v1/chat/completions", wanted))["choices"][0]["message"]["content"]
        lines = asked(port, "/v1/chat/completions", {**wanted, "stream": True}).decode().splitlines()
    finally:
        server.terminate()
        server.wait(30)
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    streamed = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
    model, tokenizer = hk.HopeForCausalLM.from_pretrained(folder), hk.Tokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer.chat(messages)])
    ends = tokenizer.eos_ids
    own = tokenizer.decode(model.generate(ids, 12, learn="off", eos_token_id=ends).tokens[0].tolist())
    assert whole == own and streamed == own and own


@needs("lm_eval")
def test_lm_eval_runs_a_local_task(folder, tmp_path):
    """Which of two endings is likelier, of a file of questions; accuracy and perplexity as our losses give them."""
    questions = [{"text": "In the beginning was", "ends": [" the Word", " a text"]},
                 {"text": "All things were made", "ends": [" by him;", " without light"]},
                 {"text": "and without him was", "ends": [" not any thing", " life"]}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({**q, "label": 0}) + "\n" for q in questions))
    (tmp_path / "endings.yaml").write_text(f"""\
task: endings
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "data.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{ends}}}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}]
""")
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args",
               f"pretrained={folder},trust_remote_code=True,dtype=float32", "--tasks", "endings", "--include_path",
               str(tmp_path), "--device", "cpu", "--output_path", str(tmp_path / "out"), "--log_samples"]
    done = subprocess.run(command, env={**ENVIRONMENT, "HF_HOME": str(tmp_path / "cache")}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-4000:]
    model, tokenizer = hk.HopeForCausalLM.from_pretrained(folder), hk.Tokenizer.from_pretrained(folder)

    def likelihood(text, end):
        ids, start = tokenizer.encode(text + end), len(tokenizer.encode(text))
        with torch.no_grad():
            nats = model(torch.tensor([ids]), output="losses")[0].nats[0]
        return -float(nats[start - 1 : -1].sum())

    own = [[likelihood(q["text"], end) for end in q["ends"]] for q in questions]
    (samples,) = (tmp_path / "out").rglob("samples_endings*.jsonl")
    found = {s["doc_id"]: [r[0] for r in s["filtered_resps"]]
             for s in map(json.loads, samples.read_text().splitlines())}
    for i, values in enumerate(own):
        assert [float(v) for v in found[i]] == pytest.approx(values, rel=1e-4)
    (results,) = (tmp_path / "out").rglob("results*.json")
    accuracy = json.loads(results.read_text())["results"]["endings"]["acc,none"]
    assert math.isclose(accuracy, sum(a > b for a, b in own) / 3)
