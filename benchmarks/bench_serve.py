"""Sessions of a server that is killed again and again: every turn kept whole, and the texts of lone runs.

    python -m benchmarks.bench_serve [--sessions 64] [--turns 3] [--kills 6] [--out FILE]

A server with the bundled model, in fp64 so that the tokens of a row do not hang on the last bit of a batched
product. Every session has a client of its own, which sends its turns one after another, at random times; so
sessions come and go, and write together in changing company. After every so many answers, and a random moment
more, in the middle of turns and of saves, the server is killed (SIGKILL) and started anew. A client whose answer
got lost asks at which generation the session stands: one more than before, and the turn has been kept; the same,
and the client sends it again.

At the end every text and every state is compared with a run of the session alone, without a server: the same
tokens, the same counts, the same learned weights to rounding. Then, without kills, tokens per second of the
same server with 1, 4, 16 sessions at a time.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine, write_json
from benchmarks.measure import ROOT
from benchmarks.sources import mark
from hope_kernels import HopeForCausalLM, load_state
from hope_kernels.cli.demo import held_out_text

RESULT = ROOT / "benchmarks" / "results" / "serve.json"
TURN = {"temperature": 0.7, "seed": 3}


class Server:
    """A server process that can be killed and started anew."""

    def __init__(self, model: Path, folder: Path, port: int, batch: int):
        self.port = port
        self.command = [
            sys.executable, "-m", "hope_kernels", "serve", "--model", str(model), "--sessions", str(folder),
            "--port", str(port), "--batch", str(batch), "--queue", "256", "--quiet",
        ]
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, cwd=ROOT)
        while True:
            try:
                return ask(self.port, "GET", "/health")
            except OSError:
                if self.process.poll() is not None:
                    raise RuntimeError(f"the server ended with {self.process.returncode}") from None
                time.sleep(0.2)

    def end(self, number: int) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait()


class Lost(OSError):
    """The server went away before it had answered."""


def ask(port: int, method: str, path: str, body: dict | None = None) -> Any:
    """Raises OSError where nobody answers, RuntimeError for an error."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"content-type": "application/json"})
        response = connection.getresponse()
        found = json.loads(response.read())
    except (http.client.HTTPException, ValueError) as error:
        raise Lost(str(error)) from None
    finally:
        connection.close()
    if response.status != 200:
        raise Refusal(response.status, found)
    return found


class Refusal(RuntimeError):
    def __init__(self, status: int, body: dict):
        super().__init__(f"{status} {body}")
        self.status = status


def turns_of(session: int, turns: int, tokens: int) -> list[dict]:
    """What a client sends."""
    text, draw = held_out_text(), random.Random(session)
    found = []
    for _ in range(turns):
        at, n = draw.randrange(len(text) - 1000), draw.randrange(20, 200)
        prompt = text[at : at + n].decode("latin-1")
        found.append({"prompt": prompt, "max_tokens": draw.randrange(8, tokens), **TURN})
    return found


class Client:
    """One session's turns, until the server has kept all of them."""

    def __init__(self, port: int, name: str, turns: list[dict], pause: float):
        self.port, self.name, self.turns, self.pause = port, name, turns, pause
        self.texts: list[str] = []
        self.sent_again = self.answer_lost = 0

    def run(self) -> None:
        draw = random.Random(self.name)
        for n, turn in enumerate(self.turns):
            time.sleep(draw.random() * self.pause)
            self.texts.append(self._turn(n, turn))

    def _turn(self, n: int, turn: dict) -> str:
        tries = 0
        while True:
            try:
                if tries and (kept := self._kept(n)) is not None:
                    self.answer_lost += 1
                    return kept
                body = {**turn, "session": self.name, "generation": n}
                self.sent_again += tries > 0
                tries += 1
                return ask(self.port, "POST", "/v1/completions", body)["choices"][0]["text"]
            except OSError:
                time.sleep(0.3)

    def _kept(self, n: int) -> str | None:
        """The answer of turn n, if the server has it."""
        try:
            found = ask(self.port, "GET", f"/sessions/{self.name}")
        except Refusal as error:
            if error.status == 404 and n == 0:
                return None
            raise
        assert found["generation"] in (n, n + 1), found
        return found["last"]["text"] if found["generation"] == n + 1 else None


@torch.no_grad()
def alone(model: HopeForCausalLM, turns: list[dict]) -> tuple[list[str], Any]:
    """The same turns without a server: (texts, state)."""
    state, texts = None, []
    for turn in turns:
        ids = torch.tensor([list(turn["prompt"].encode())])
        out = model.generate(
            ids, turn["max_tokens"], state, unread="before", temperature=turn["temperature"],
            seed=turn["seed"],
        )
        state = out.state
        texts.append(bytes(out.tokens[0].tolist()).decode(errors="replace"))
    return texts, state


def check(model: HopeForCausalLM, folder: Path, clients: list[Client]) -> dict[str, Any]:
    """What is wrong with the sessions at the end; nothing should be."""
    names = ("missing", "unreadable", "other texts", "other counts", "left behind")
    found: dict[str, Any] = dict.fromkeys(names, 0)
    worst = 0.0
    for client in clients:
        texts, end = alone(model, client.turns)
        want = end.split()[0]
        path = folder / f"{client.name}.safetensors"
        if not path.exists():
            found["missing"] += 1
            continue
        try:
            state = load_state(path)
        except ValueError:
            found["unreadable"] += 1
            continue
        found["other texts"] += texts != client.texts
        found["other counts"] += state._counters() != want._counters()
        pairs = list(zip(state.tensors(), want.tensors()))
        worst = max(worst, *(float((a - b).abs().max() / (b.abs().max() + 1e-30)) for a, b in pairs
                             if a.is_floating_point() and a.shape == b.shape and a.numel()))
    found["left behind"] = len([p for p in folder.iterdir() if p.suffix == ".part"])
    found["largest difference of a learned tensor"] = worst
    return found


def killed(args: argparse.Namespace, model: HopeForCausalLM, folder: Path, server: Server) -> dict[str, Any]:
    draw = random.Random(args.seed)
    clients = [Client(server.port, f"s{i}", turns_of(i, args.turns, args.tokens), args.pause)
               for i in range(args.sessions)]
    server.start()
    threads = [threading.Thread(target=c.run) for c in clients]
    for thread in threads:
        thread.start()
    kills, began = 0, time.monotonic()
    while any(t.is_alive() for t in threads):
        answered = sum(len(c.texts) for c in clients)
        if kills < args.kills and answered >= (kills + 1) * args.sessions * args.turns / (args.kills + 1):
            time.sleep(draw.random() * args.moment)
            server.end(signal.SIGKILL)
            kills += 1
            print(f"kill {kills}: {answered} turns answered", flush=True)
            server.start()
        time.sleep(0.02)
    seconds = time.monotonic() - began
    code = server.end(signal.SIGTERM)
    print("comparing with lone runs", flush=True)
    return {
        "sessions": args.sessions, "turns": args.sessions * args.turns, "kills": kills, "seconds": seconds,
        "exit code after SIGTERM": code,
        "turns sent again": sum(c.sent_again for c in clients),
        "turns kept whose answer was lost": sum(c.answer_lost for c in clients),
        "faults": check(model, folder, clients),
    }


def speed(server: Server, args: argparse.Namespace) -> list[dict[str, Any]]:
    """New tokens per second of so many sessions at a time, several rounds."""
    found = []
    server.start()
    for together in args.together:
        rates = []
        for r in range(args.rounds + 1):
            body = {"prompt": "And he said unto them, ", "max_tokens": args.tokens_of_speed, **TURN}
            begun = time.monotonic()
            bodies = [{**body, "session": f"speed-{together}-{i}-{r}"} for i in range(together)]
            with ThreadPoolExecutor(together) as pool:
                answers = list(pool.map(lambda b: ask(server.port, "POST", "/v1/completions", b), bodies))
            written = sum(a["usage"]["completion_tokens"] for a in answers)
            if r:  # the first round warms up
                rates.append(written / (time.monotonic() - begun))
        found.append({"sessions": together, "tokens/s": sorted(rates)[len(rates) // 2], "all": rates})
        print(found[-1], flush=True)
    server.end(signal.SIGTERM)
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--sessions", type=int, default=64)
    p.add_argument("--turns", type=int, default=3)
    p.add_argument("--tokens", type=int, default=32, help="of an answer, at most")
    p.add_argument("--kills", type=int, default=6)
    p.add_argument("--moment", type=float, default=1.0, help="seconds before a kill, at most")
    p.add_argument("--pause", type=float, default=10.0, help="seconds before a turn of a session, at most")
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--seed", type=int, default=0, help="of the kills")
    p.add_argument("--together", type=int, nargs="*", default=[1, 4, 16],
                   help="sessions at a time, of the speeds; none: no speeds")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--tokens-of-speed", type=int, default=48)
    p.add_argument("--out", default=str(RESULT))
    args = p.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as at:
        folder = Path(at)
        model = HopeForCausalLM.from_pretrained("hope-byte").double()
        model.save_pretrained(folder / "model")
        server = Server(folder / "model", folder / "sessions", free_port(), args.batch)
        found = killed(args, model, folder / "sessions", server)
        print(json.dumps(found, indent=1), flush=True)
        result = {"what": (__doc__ or "").split("\n")[0], "machine": machine(), "batch": args.batch, **found,
                  **mark("serve", device="cpu")}
        write_json(args.out, result)
        if args.together:
            write_json(args.out, result | {"speed": speed(server, args)})
    faults = {k: v for k, v in found["faults"].items() if k != "largest difference of a learned tensor"}
    return int(any(faults.values()) or found["faults"]["largest difference of a learned tensor"] > 1e-6)


if __name__ == "__main__":
    sys.exit(main())
