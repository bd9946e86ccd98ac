"""python -m hope_kernels generate | demo | doctor"""

from __future__ import annotations

import argparse
import contextlib
import os
import stat
import sys
import time

import torch
from tqdm import tqdm

from ..engine.generation import read
from ..model import HopeForCausalLM, bundled_models
from ..model_state import ModelState
from ..state_file import load_note, load_state
from .lock import held
from .meter import megabytes, resident_bytes
from .session import Interrupt, Prompt, SessionFile, resume, session_path
from .terminal import NOTICES, Output, drop_unwritten, hold_descriptors, notice, standard_input

BROKEN_PIPE = 13  # SIGPIPE, a number that Windows does not name


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m hope_kernels", description="HOPE language models that learn while they read"
    )
    commands = p.add_subparsers(dest="command", required=True)
    g = commands.add_parser("generate", help="read a text, then write on")
    g.add_argument("--prompt-file", help="a file of bytes; - reads standard input")
    g.add_argument("--prompt", help="text, read after the file")
    g.add_argument("--max-new-tokens", type=int, default=200, help="0 only reads, and keeps the session")
    g.add_argument(
        "--model", default=None, help="folder of a saved model, or a bundled name (default: the bundled one)"
    )
    g.add_argument("--session",
                   help="file with what the model has learned: continued if it exists, written at the end; "
                   "stopped by Ctrl-C or SIGTERM, the run is kept in it, and the same command goes on")
    g.add_argument(
        "--save-every", type=float, default=300.0, metavar="SECONDS",
        help="write the session that often meanwhile; 0: never"
    )
    g.add_argument(
        "--no-resume", action="store_true", help="read the prompt from its start, whatever the session was doing"
    )
    g.add_argument("--learn", choices=("next_token", "off"), default="next_token")
    g.add_argument("--backend", default=None)
    g.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    g.add_argument("--top-k", type=int)
    g.add_argument("--top-p", type=float)
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--stop", action="append", default=[], help="end after this text (may be given again)")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    g.add_argument("--quiet", action="store_true", help="no progress on standard error")
    d = commands.add_parser(
        "demo", help="the bundled model reads a text it has not seen, with and without learning"
    )
    d.add_argument(
        "--bytes", type=int, default=None, help="how much of the text to read (default 105000; all of it is 227930)"
    )
    commands.add_parser("doctor", help="versions, devices, backends, a self-check")
    return p


def load_model(name: str | None, device: torch.device) -> HopeForCausalLM:
    if name is None:
        models = bundled_models()
        if not models:
            raise FileNotFoundError("no model is bundled with this installation; pass --model FOLDER")
        name = models[0]
    return HopeForCausalLM.from_pretrained(name, device=device)


def opened_prompt(args):
    """The prompt file, standard input or nothing, as a context."""
    if args.prompt_file == "-":
        return contextlib.nullcontext(standard_input())
    return contextlib.nullcontext() if args.prompt_file is None else open(args.prompt_file, "rb")


def encoded(text: str | None) -> bytes:
    """The bytes of an argument, also where they are no text."""
    return (text or "").encode("utf-8", "surrogateescape")


def usable_device(name: str) -> torch.device:
    """Raises ValueError for a device that is none, is not here, or holds no values."""
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float32, device=device).tolist()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"argument --device is {name!r}, which cannot be used here: {reason}") from None
    return device


def prompt_name(args) -> str:
    file = {None: [], "-": ["standard input"]}.get(args.prompt_file, [args.prompt_file])
    return " and ".join([*file, *(["--prompt"] if args.prompt else [])]) or "no prompt"


def prompt_size(args, file) -> int | None:
    """Bytes of the prompt, None where that is not known beforehand."""
    if file is None:
        return len(encoded(args.prompt))
    status = os.fstat(file.fileno()) if args.prompt_file != "-" else None
    if status is None or not stat.S_ISREG(status.st_mode):
        return None
    return status.st_size + len(encoded(args.prompt))


class Progress:
    """A bar over the prompt, then over the new tokens, with speed and memory."""

    def __init__(self, total: int | None, initial: int, quiet: bool):
        self.initial = initial
        self.bar = tqdm(
            total=total, initial=initial, unit="B", unit_scale=True, desc="reading", disable=quiet, file=NOTICES
        )

    def read(self, at: int) -> None:
        self.bar.n = self.initial + at
        self.bar.set_postfix(memory=megabytes(resident_bytes()))

    def close(self) -> None:
        self.bar.close()


def generate_command(args) -> int:
    if not args.save_every >= 0:
        raise ValueError(f"argument --save-every is {args.save_every}, expected a number of seconds, or 0 for never")
    if args.max_new_tokens < 0:
        raise ValueError(f"argument --max-new-tokens is {args.max_new_tokens}, expected 0 or more")
    output = Output(sys.stdout) if args.max_new_tokens else None
    if args.session is None:
        return run(args, None, output)
    path = session_path(args.session)
    with held(path, args.session):
        return run(args, path, output)


def run(args, path: str | None, output: Output | None) -> int:
    """Reads and writes; the session at ``path`` is this process's."""
    device = usable_device(args.device)
    model = load_model(args.model, device)
    if model.config.vocab_size != 256:
        raise ValueError(f"this command reads bytes; the model has {model.config.vocab_size} token ids")
    state, note = model.init_state(1), None
    if path is not None and os.path.exists(path):
        state, note = load_state(path, device), load_note(path)
        if not isinstance(state, ModelState):
            raise ValueError(
                f"session {args.session} holds a {type(state).__name__}, expected the state of a whole model"
            )
    unread = b"" if state.unread is None else bytes(t for t in state.unread.flatten().tolist() if t >= 0)
    stops = [encoded(s) for s in args.stop]
    with opened_prompt(args) as file, Interrupt() if path else contextlib.nullcontext() as interrupt:
        prompt = Prompt(prompt_name(args), file, encoded(args.prompt), unread, device)
        going = None if args.no_resume else resume(note, prompt, args.session)
        going = going or {"phase": "reading", "written": 0}
        earlier, tail = going["written"], bytes.fromhex(going.get("tail", ""))
        if going["phase"] == "writing" and earlier >= args.max_new_tokens:
            raise ValueError(f"session {args.session} stopped after writing {earlier} tokens, of --max-new-tokens "
                             f"{args.max_new_tokens}; ask for more to go on, or pass --no-resume to read the prompt "
                             "once more")
        session = SessionFile(path, prompt, args.save_every)
        progress = Progress(prompt_size(args, file), prompt.bytes, args.quiet)
        at = written = 0
        failed: OSError | None = None
        ended = False  # a stop may have begun before this run

        def on_piece(now: int, _nats: float) -> None:
            nonlocal at
            at = now
            prompt.confirm(at)
            progress.read(at)
            if prompt.more:
                session.save_if_due(state, "reading")

        def on_token(tokens: list) -> None:
            nonlocal written, failed, ended, tail
            progress.close()
            assert output is not None
            try:
                output.write(bytes(tokens))
            except OSError as error:
                failed = error
                return
            written += 1
            tail = (tail + bytes(tokens))[-max(map(len, stops), default=0) or None :] if stops else b""
            ended = any(tail.endswith(s) for s in stops)
            session.save_if_due(state, "writing", earlier + written, tail=tail.hex())

        def stopping() -> bool:
            return failed is not None or ended or bool(interrupt and interrupt())

        began, unsent, finished = time.perf_counter(), False, False
        try:
            if not args.max_new_tokens:
                finished = read(
                    model, prompt, state, learn=args.learn, backend=args.backend, on_piece=on_piece,
                    should_stop=stopping, unread="included",
                ).finished
                if finished and not at:
                    raise ValueError("empty prompt: there is nothing to read and nothing to write")
            else:
                if going.get("unsent") and unread:
                    on_token(list(unread))
                finished = ended or earlier + written == args.max_new_tokens
                if not (finished or stopping()):
                    finished = model.generate(
                        None if going["phase"] == "writing" else prompt,
                        args.max_new_tokens - earlier - written, state, learn=args.learn,
                        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed,
                        stop=stops, on_token=on_token, on_piece=on_piece, backend=args.backend,
                        should_stop=stopping, unread="included",
                    ).finished or ended
            unsent = failed is not None
            finished = finished and not unsent
        except OSError as error:  # of the prompt: all other errors of files are handled where they occur
            failed = error
        finally:
            progress.close()
        seconds = time.perf_counter() - began
        if output is not None and not unsent:
            try:
                output.write(b"\n" if finished else b"", final=True)
            except OSError as error:
                failed = error if finished else failed
        if path is not None and (finished or at or written):
            phase = None if finished else "writing" if written or unsent else "reading"
            session.save(state, phase, earlier + written, tail=tail.hex(), unsent=unsent)
    if failed is not None or not finished:
        where = "standard output" if unsent or finished else prompt.name
        reason = f"{where}: {failed.strerror or failed}; " if failed else ""
        kept = f"; session in {args.session}{'' if finished or at or written else ' as it was'}" if path else ""
        again = ", the same command goes on from there" if path and not finished else ""
        notice(f"hope_kernels: {reason}stopped after reading {prompt.bytes} bytes of {prompt.name} and writing "
               f"{earlier + written}{kept}{again}")
        return exit_code(failed, interrupt)
    if not args.quiet:
        speed = (at + written) / seconds
        notice(f"read {at} and wrote {written} bytes in {seconds:.1f} s ({speed:.0f}/s), learn={args.learn}, "
               f"memory {megabytes(resident_bytes())}" + (f", session in {args.session}" if path else ""))
    return 0


def exit_code(failed: OSError | None, interrupt: Interrupt | None) -> int:
    """Of a run that an error or a signal has ended before its time."""
    if failed is not None:
        return 128 + BROKEN_PIPE if isinstance(failed, BrokenPipeError) else 2
    assert interrupt is not None and interrupt.signal is not None  # nothing else stops a run
    return 128 + interrupt.signal


def command(argv: list[str] | None) -> int:
    args = parser().parse_args(argv)
    if args.command == "generate":
        return generate_command(args)
    if sys.stdout is None or sys.stdout.closed:
        raise OSError("standard output is closed")
    if args.command == "doctor":
        from .doctor import doctor

        return doctor()
    from .demo import demo

    return demo(args.bytes)


def main(argv: list[str] | None = None) -> int:
    try:
        code = command(argv)
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()
        return code
    except BrokenPipeError as error:
        notice(f"hope_kernels: standard output: {error.strerror}")
        return 128 + BROKEN_PIPE
    except (ValueError, OSError) as error:
        notice(f"hope_kernels: {error}")
        return 2
    except KeyboardInterrupt:
        notice("hope_kernels: interrupted; an existing session file is as it was")
        return 130


def process() -> int:
    """``main`` for a process of its own."""
    hold_descriptors()
    try:
        return main()
    finally:
        drop_unwritten()
