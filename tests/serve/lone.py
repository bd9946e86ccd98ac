"""What a session is without a server, and requests to one."""

import json

import torch

from hope_kernels import Tokenizer

GREEDY = {"temperature": 0, "max_tokens": 9}


def ids_of(model, prompt, state):
    tokenizer = Tokenizer.of(model)
    return torch.tensor([tokenizer.encode(prompt, start=state is None)])


def lone(model, prompt, state=None, n=9, **how):
    """(text, state) of a turn."""
    how = {"temperature": 0.0, **how}
    out = model.generate(ids_of(model, prompt, state), n, state, unread=None if state is None else "before", **how)
    return Tokenizer.of(model).decode(out.tokens[0].tolist()), out.state


def complete(client, prompt, session=None, status=200, **more):
    """The response to a completion; one that failed: its error."""
    body = {"prompt": prompt, **GREEDY, **more} | ({} if session is None else {"session": session})
    response = client.post("/v1/completions", json=body)
    assert response.status_code == status, response.text
    return response.json() if status == 200 else response.json()["error"]


def text_of(answer):
    return answer["choices"][0]["text"]


def streamed(client, path, **body):
    """The events of a stream, but the last one, which says that it is over."""
    with client.stream("POST", path, json={"stream": True, **body}) as response:
        assert response.status_code == 200
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:]) for line in lines[:-1]]
