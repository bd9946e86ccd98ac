"""``chat``: a conversation by the model's chat template. What was said is in the session's state: a turn
reads its own tokens, and never those before it.

The note in the session file: {"phase": "chat", "turns": how many there have been}.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch

from ..model import HopeForCausalLM
from ..model_state import ModelState
from ..text import Tokenizer
from .lock import held
from .meter import megabytes, resident_bytes
from .models import check_run, load_model, load_session, unread_ids, usable_device
from .parser import DTYPES
from .progress import bits, guarded
from .session import Interrupt, SessionFile, session_path, stopped_code
from .terminal import Output, notice, standard_input
from .writing import writer_for

HELP = """\
/save [FILE]      write the session, or a copy of it into FILE
/fork FILE        keep the session as it is, and go on in a copy of it, FILE
/reset            start anew: nothing said, nothing learned (a file is changed only when the session is saved)
/learn on|off     learn from what is read and written from here on, or not
/stats            what has been read and written, and how well it was foreseen
/help, /quit      a line that ends in \\ goes on in the next one; // sends a line that begins with /"""


class Stopped(BaseException):
    """A signal came while the chat was waiting for a line."""

    def __init__(self, number: int):
        self.number = number


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """SIGINT and SIGTERM raise Stopped."""
    def stop(number: int, _frame) -> None:
        raise Stopped(number)

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    old = {n: signal.signal(n, stop) for n in numbers}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def chat_command(args) -> int:
    check_run(args)
    if args.max_new_tokens < 1:
        raise ValueError(f"argument --max-new-tokens is {args.max_new_tokens}, expected 1 or more")
    output, device = Output(sys.stdout), usable_device(args.device)
    standard_input()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    path = None if args.session is None else session_path(args.session)
    with contextlib.ExitStack() as locks:
        if path is not None:
            locks.enter_context(held(path, str(args.session)))
        model, tokenizer = load_model(args.model, device, DTYPES.get(args.dtype))
        tokenizer.template  # noqa: B018  raises ValueError now for a model without one
        state, note = load_session(model, path, args.session, device)
        chat = Chat(args, model, tokenizer, output, state, note, path, locks)
        if not args.quiet and sys.stdin.isatty():
            notice("hope_kernels: /help lists the commands")
        return chat.run()


class Chat:
    """The loop over lines; ``locks`` holds the lock of the session at ``path``."""

    def __init__(
        self, args: Any, model: HopeForCausalLM, tokenizer: Tokenizer, output: Output, state: ModelState,
        note: dict | None, path: str | None, locks: contextlib.ExitStack,
    ):
        self.args, self.model, self.tokenizer, self.output, self.state = args, model, tokenizer, output, state
        self.name, self.file, self.locks = args.session, SessionFile(path, args.save_every), locks
        self.learn, self.terminal = args.learn, sys.stdin.isatty()
        self.turns = _turns(note)
        self.read = self.written = self.predicted = 0
        self.nats = self.seconds = 0.0

    def run(self) -> int:
        try:
            while (line := self._line()) is not None:
                if line.startswith("/") and not line.startswith("//"):
                    if not self._command(*line[1:].split(maxsplit=1)):
                        break
                elif line.strip():
                    code = self._turn(line[1:] if line.startswith("//") else line)
                    if code:
                        self._keep()
                        return code
        except Stopped as stopped:
            self._keep()
            return 128 + stopped.number
        self._keep()
        return 0

    def _line(self) -> str | None:
        """The next line, with those it goes on in; None at the end of the input."""
        found: list[str] = []
        while not found or found[-1].endswith("\\"):
            with waiting():
                try:
                    line = input("> " if not found else "| ") if self.terminal else sys.stdin.readline()
                except EOFError:
                    line = ""
            if not line and not self.terminal or not line and self.terminal and not found:
                if self.terminal:
                    return None
                return "\n".join(found) if found else None
            found.append(line.rstrip("\n"))
        return "\n".join(part.removesuffix("\\") for part in found)

    def _turn(self, text: str) -> int:
        """Reads the message, writes the answer. Returns an exit code, 0 to go on."""
        if self.turns:
            ids = self.tokenizer.next_turn(text)
        else:
            system = [] if self.args.system is None else [{"role": "system", "content": self.args.system}]
            ids = self.tokenizer.chat([*system, {"role": "user", "content": text}])
        unread = unread_ids(self.state)
        # an answer ends with the token that also begins what follows it, or in the middle
        closing = bool(unread) and unread == ids[:1] and unread[0] in self.tokenizer.eos_ids
        mode = "included" if closing else "before"
        stops = [*self.args.stop, *self.tokenizer.stop]
        writer = writer_for(self.output, self.tokenizer, stops, self.tokenizer.eos_ids, {}, lambda: ids[-8:])
        failed: OSError | None = None
        at = written = 0
        nats = 0.0

        def on_piece(now: int, loss: float) -> None:
            nonlocal at, nats
            at, nats = now, loss

        def on_token(tokens: list) -> None:
            nonlocal written, failed
            written += 1
            try:
                writer.write(tokens[0])
            except OSError as error:
                failed = error

        given = torch.tensor([ids], device=self.model.embed.weight.device)
        began = time.perf_counter()
        with Interrupt() as interrupt:
            out = self.model.generate(
                given, self.args.max_new_tokens, self.state, learn=self.learn,
                temperature=self.args.temperature, top_k=self.args.top_k, top_p=self.args.top_p,
                seed=self.args.seed, backend=self.args.backend, eos_token_id=self.tokenizer.eos_ids,
                on_token=on_token, on_piece=on_piece, unread=mode,
                guard=not self.args.no_guard,
                should_stop=lambda: bool(failed or writer.ended or interrupt()),
            )
            self.turns, self.read, self.written = self.turns + 1, self.read + at, self.written + written
            self.nats, self.predicted = self.nats + nats, self.predicted + max(at - 1, 0)
            self.seconds += time.perf_counter() - began
            if failed is None:
                try:
                    writer.close("\n")
                except OSError as error:
                    failed = error
            if failed is not None:
                notice(f"hope_kernels: standard output: {failed.strerror or failed}")
                return stopped_code(failed, None)
            self.file.save_if_due(self.state, self._note)
            if interrupt() and (interrupt.signal != signal.SIGINT or not self.terminal):
                return stopped_code(None, interrupt)
        if not (interrupt() or writer.ended) and out.lengths[0] == self.args.max_new_tokens:
            notice(f"hope_kernels: the answer was ended after {written} tokens (--max-new-tokens)")
        return 0

    def _note(self) -> dict:
        return {"phase": "chat", "turns": self.turns}

    def _keep(self) -> None:
        """Writes the session where there is one to write."""
        if self.file.path is not None:
            self.file.save(self.state, self._note())
            if not self.args.quiet:
                notice(f"hope_kernels: session in {self.name}")

    def _command(self, word: str = "", rest: str = "") -> bool:
        """Whether the chat goes on after it."""
        if word == "quit":
            return False
        acts = {"save": self._save, "fork": self._fork, "reset": self._reset, "learn": self._set_learning,
                "stats": self._stats, "help": lambda _: notice(HELP)}
        if word not in acts:
            notice(f"hope_kernels: /{word} is no command; /help lists them")
            return True
        try:
            acts[word](rest.strip())
        except (ValueError, OSError) as error:
            notice(f"hope_kernels: {error}")
        return True

    def _save(self, name: str) -> None:
        path = session_path(name) if name else self.file.path
        if path is None:
            raise ValueError("there is no session to save (--session); /save FILE writes one")
        if path == self.file.path:
            self.file.save(self.state, self._note())
        else:
            with held(path, name):
                self.state.save(path, self._note())
        notice(f"hope_kernels: session in {name or self.name}")

    def _fork(self, name: str) -> None:
        if not name:
            raise ValueError("/fork needs the name of a file")
        path = session_path(name)
        if os.path.lexists(path):
            raise ValueError(f"session {name} exists; /fork makes a new one")
        locks = contextlib.ExitStack()
        locks.enter_context(held(path, name))
        try:
            if self.file.path is not None:
                self.file.save(self.state, self._note())
            self.state.save(path, self._note())
        except BaseException:
            locks.close()
            raise
        self.locks.close()  # the original is free for others
        self.locks.push(locks.pop_all())
        before = "" if self.name is None else f"; {self.name} stays as it is"
        self.name, self.file = name, SessionFile(path, self.args.save_every)
        notice(f"hope_kernels: going on in {name}{before}")

    def _reset(self, _: str) -> None:
        self.state, self.turns = self.model.init_state(1), 0

    def _set_learning(self, word: str) -> None:
        if word not in ("on", "off", ""):
            raise ValueError(f"/learn takes on or off, not {word!r}")
        if word:
            self.learn = "next_token" if word == "on" else "off"
        notice(f"hope_kernels: learning is {'off' if self.learn == 'off' else 'on'}")

    def _stats(self, _: str) -> None:
        size = sum(t.numel() * t.element_size() for t in self.state.tensors())
        speed = (self.read + self.written) / self.seconds if self.seconds else 0.0
        loss = f" at {bits(self.nats, self.predicted):.3f} bits per token" if self.predicted else ""
        learning = "off" if self.learn == "off" else "on"
        notice(f"hope_kernels: {self.turns} turns, {self.state.pos[0]} tokens in this session; here: read "
               f"{self.read}{loss}, wrote {self.written}, {speed:.0f} tokens/s; learning {learning}; state "
               f"{megabytes(size)}, memory {megabytes(resident_bytes())}{guarded(self.state)}")


def _turns(note: dict | None) -> int:
    if isinstance(note, dict) and note.get("phase") == "chat" and type(note.get("turns")) is int:
        return max(note["turns"], 0)
    return 0
