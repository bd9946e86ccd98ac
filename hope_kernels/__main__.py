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

from .meter import megabytes, resident_bytes
from .session import Interrupt, Prompt, SessionFile, resume
from .state_file import load_note, load_state


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m hope_kernels", description="HOPE language models that learn while they read")
    commands = p.add_subparsers(dest="command", required=True)
    g = commands.add_parser("generate", help="read a text, then write on")
    g.add_argument("--prompt-file", help="a file of bytes; - reads standard input")
    g.add_argument("--prompt", help="text, read after the file")
    g.add_argument("--max-new-tokens", type=int, default=200)
    g.add_argument("--model", default=None, help="folder of a saved model, or a bundled name (default: the bundled one)")
    g.add_argument("--session", help="file with what the model has learned: continued if it exists, written at the end; "
                   "stopped by Ctrl-C or SIGTERM, the run is kept in it, and the same command goes on")
    g.add_argument("--save-every", type=float, default=300.0, metavar="SECONDS", help="write the session that often meanwhile; 0: never")
    g.add_argument("--no-resume", action="store_true", help="read the prompt from its start, whatever the session was doing")
    g.add_argument("--learn", choices=("next_token", "off"), default="next_token")
    g.add_argument("--backend", default=None)
    g.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    g.add_argument("--top-k", type=int)
    g.add_argument("--top-p", type=float)
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--stop", action="append", default=[], help="end after this text (may be given again)")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    g.add_argument("--quiet", action="store_true", help="no progress on standard error")
    d = commands.add_parser("demo", help="the bundled model reads a text it has not seen, with and without learning")
    d.add_argument("--bytes", type=int, default=None, help="how much of the text to read (default 105000; all of it is 227930)")
    commands.add_parser("doctor", help="versions, devices, backends, a self-check")
    return p


def load_model(name: str | None, device):
    from .model import HopeForCausalLM, bundled_models

    if name is None:
        models = bundled_models()
        if not models:
            raise FileNotFoundError("no model is bundled with this installation; pass --model FOLDER")
        name = models[0]
    return HopeForCausalLM.from_pretrained(name, device=device)


def opened_prompt(args):
    """The prompt file, standard input or nothing, as a context."""
    if args.prompt_file == "-":
        return contextlib.nullcontext(sys.stdin.buffer)
    return contextlib.nullcontext() if args.prompt_file is None else open(args.prompt_file, "rb")


def prompt_name(args) -> str:
    file = {None: [], "-": ["standard input"]}.get(args.prompt_file, [args.prompt_file])
    return " and ".join([*file, *(["--prompt"] if args.prompt else [])]) or "no prompt"


def prompt_size(args, file) -> int | None:
    """Bytes of the prompt, None where that is not known beforehand."""
    if file is None:
        return len((args.prompt or "").encode())
    status = os.fstat(file.fileno()) if args.prompt_file != "-" else None
    return status.st_size + len((args.prompt or "").encode()) if status is not None and stat.S_ISREG(status.st_mode) else None


class Progress:
    """A bar over the prompt, then over the new tokens, with speed and memory."""

    def __init__(self, total: int | None, initial: int, quiet: bool):
        self.initial, self.bar = initial, tqdm(total=total, initial=initial, unit="B", unit_scale=True, desc="reading", disable=quiet)

    def read(self, at: int) -> None:
        self.bar.n = self.initial + at
        self.bar.set_postfix(memory=megabytes(resident_bytes()))

    def close(self) -> None:
        self.bar.close()


def generate_command(args) -> int:
    if not args.save_every >= 0:
        raise ValueError(f"--save-every is {args.save_every}, expected a number of seconds, or 0 for never")
    from .model import ModelState

    model = load_model(args.model, args.device)
    if model.config.vocab_size != 256:
        raise ValueError(f"this command reads bytes; the model has {model.config.vocab_size} token ids")
    state, note = model.init_state(1), None
    if args.session and os.path.exists(args.session):
        state, note = load_state(args.session, args.device), load_note(args.session)
        if not isinstance(state, ModelState):
            raise ValueError(f"session {args.session} holds a {type(state).__name__}, expected the state of a whole model")
    elif args.session and not os.path.isdir(os.path.dirname(os.path.abspath(args.session))):
        raise FileNotFoundError(f"session {args.session}: its folder does not exist")  # rather now than after hours of reading
    unread = b"" if state.unread is None else bytes(state.unread.flatten().tolist())
    with opened_prompt(args) as file, Interrupt() if args.session else contextlib.nullcontext() as interrupt:
        prompt = Prompt(prompt_name(args), file, (args.prompt or "").encode(), unread, args.device)
        going = None if args.no_resume else resume(note, prompt, args.session)
        if going and going["written"] >= args.max_new_tokens:
            raise ValueError(f"session {args.session} stopped after writing {going['written']} tokens, of --max-new-tokens "
                             f"{args.max_new_tokens}; ask for more to go on, or pass --no-resume to read the prompt once more")
        session = SessionFile(args.session, prompt, args.save_every)
        progress = Progress(prompt_size(args, file), prompt.bytes, args.quiet)
        earlier = going["written"] if going else 0
        read = written = 0

        def on_piece(at: int, _nats: float) -> None:
            nonlocal read
            read = at
            prompt.confirm(at)
            progress.read(at)
            if prompt.more:
                session.save_if_due(state, "reading")

        def on_token(tokens: list) -> None:
            nonlocal written
            progress.close()
            sys.stdout.buffer.write(bytes(tokens))
            sys.stdout.buffer.flush()
            written += 1
            state.unread = torch.tensor([tokens], device=args.device)
            session.save_if_due(state, "writing", earlier + written)

        began = time.perf_counter()
        out = model.generate(
            None if going and going["phase"] == "writing" else prompt, args.max_new_tokens - earlier, state, learn=args.learn,
            temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed, stop=args.stop, on_token=on_token,
            on_piece=on_piece, backend=args.backend, should_stop=interrupt,
        )
        seconds = time.perf_counter() - began
        progress.close()
        if not out.finished:
            if read:
                session.save(out.state, "writing" if written else "reading", earlier + written)
            print(f"hope_kernels: stopped after reading {prompt.bytes} bytes of {prompt.name} and writing {earlier + written}; "
                  f"session in {args.session}{'' if read else ' as it was'}, the same command goes on from there", file=sys.stderr)
            return 128 + interrupt.signal
        sys.stdout.write("\n")
        if args.session:
            session.save(out.state, None)
    if not args.quiet:
        print(f"read {read} and wrote {written} bytes in {seconds:.1f} s ({(read + written) / seconds:.0f}/s), learn={args.learn}, "
              f"memory {megabytes(resident_bytes())}" + (f", session in {args.session}" if args.session else ""), file=sys.stderr)
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        if args.command == "doctor":
            from .doctor import doctor

            return doctor()
        if args.command == "demo":
            from .demo import demo

            return demo(args.bytes)
        return generate_command(args)
    except (ValueError, FileNotFoundError, OSError) as error:
        print(f"hope_kernels: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hope_kernels: interrupted; an existing session file is as it was", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
