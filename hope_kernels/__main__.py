"""python -m hope_kernels generate | demo | doctor"""

from __future__ import annotations

import argparse
import os
import sys
import time

import torch
from tqdm import tqdm

from .meter import megabytes, resident_bytes


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m hope_kernels", description="HOPE language models that learn while they read")
    commands = p.add_subparsers(dest="command", required=True)
    g = commands.add_parser("generate", help="read a text, then write on")
    g.add_argument("--prompt-file", help="a file of bytes; - reads standard input")
    g.add_argument("--prompt", help="text, read after the file")
    g.add_argument("--max-new-tokens", type=int, default=200)
    g.add_argument("--model", default=None, help="folder of a saved model, or a bundled name (default: the bundled one)")
    g.add_argument("--session", help="file with what the model has learned: continued if it exists, written at the end")
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


def prompt_bytes(args) -> bytes:
    data = b""
    if args.prompt_file == "-":
        data = sys.stdin.buffer.read()
    elif args.prompt_file is not None:
        with open(args.prompt_file, "rb") as f:
            data = f.read()
    return data + (args.prompt or "").encode()


class Progress:
    """A bar over the prompt, then over the new tokens, with speed and memory."""

    def __init__(self, total: int, quiet: bool):
        self.bar = tqdm(total=total, unit="B", unit_scale=True, desc="reading", disable=quiet)

    def read(self, at: int, _nats: float) -> None:
        self.bar.n = at
        self.bar.set_postfix(memory=megabytes(resident_bytes()))

    def close(self) -> None:
        self.bar.close()


def generate_command(args) -> int:
    from .state import load_state

    model = load_model(args.model, args.device)
    if model.config.vocab_size != 256:
        raise ValueError(f"this command reads bytes; the model has {model.config.vocab_size} token ids")
    data = prompt_bytes(args)
    state = None
    if args.session and os.path.exists(args.session):
        state = load_state(args.session, args.device)
    unread = None if state is None else state.unread
    ids = torch.tensor([list(data)], dtype=torch.long, device=args.device)
    if unread is not None:
        ids = torch.cat([unread, ids], 1)
    progress = Progress(ids.shape[1], args.quiet)

    def show(tokens: list) -> None:
        progress.close()
        sys.stdout.buffer.write(bytes(t for t in tokens if t is not None))
        sys.stdout.buffer.flush()

    began = time.perf_counter()
    out = model.generate(
        ids, args.max_new_tokens, state, learn=args.learn, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
        seed=args.seed, stop=args.stop, on_token=show, on_piece=progress.read, backend=args.backend,
    )
    seconds = time.perf_counter() - began
    sys.stdout.write("\n")
    if args.session:
        out.state.save(args.session)
    if not args.quiet:
        read, written = ids.shape[1], out.lengths[0]
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
