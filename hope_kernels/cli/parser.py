"""The arguments of every command."""

from __future__ import annotations

import argparse

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m hope_kernels", description="HOPE language models that learn while they read"
    )
    commands = p.add_subparsers(dest="command", required=True)
    _generate(commands.add_parser("generate", help="read a text, then write on"))
    _chat(commands.add_parser("chat", help="talk with a model that has a chat template"))
    _read(commands.add_parser("read", help="learn documents, and keep what was learned in a session"))
    _serve(commands.add_parser("serve", help="sessions over HTTP, in the form of OpenAI's API, and a page"))
    _convert(commands.add_parser("convert", help="a model of transformers or a GGUF file as one of ours"))
    d = commands.add_parser(
        "demo", help="the bundled model reads a text it has not seen, with and without learning"
    )
    d.add_argument(
        "--bytes", type=int, default=None,
        help="how much of the text to read (default 105000; all of it is 227930)"
    )
    commands.add_parser("doctor", help="versions, devices, backends, a self-check")
    return p


def _model(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--model", default=None, help="folder of a saved model, or a bundled name (default: the bundled one)"
    )
    p.add_argument("--learn", choices=("next_token", "off"), default="next_token")
    p.add_argument("--no-guard", action="store_true", help="keep what was learned also where it reads worse")
    p.add_argument("--backend", default=None)
    p.add_argument("--dtype", choices=tuple(DTYPES), help="to compute in (default: that of the weights)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--quiet", action="store_true", help="no progress on standard error")


def _session(p: argparse.ArgumentParser, required: bool = False) -> None:
    p.add_argument("--session", required=required,
                   help="file with what the model has learned: continued if it exists, written at the end; "
                   "stopped by Ctrl-C or SIGTERM, the run is kept in it, and the same command goes on")
    p.add_argument(
        "--save-every", type=float, default=300.0, metavar="SECONDS",
        help="write the session that often meanwhile; 0: never"
    )


def _sampling(p: argparse.ArgumentParser) -> None:
    p.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    p.add_argument("--top-k", type=int)
    p.add_argument("--top-p", type=float)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--stop", action="append", default=[], help="end after this text (may be given again)")


def _generate(p: argparse.ArgumentParser) -> None:
    p.add_argument("--prompt-file", help="a file of text; - reads standard input")
    p.add_argument("--prompt", help="text, read after the file")
    p.add_argument("--max-new-tokens", type=int, default=200, help="0 only reads, and keeps the session")
    p.add_argument("--ignore-eos", action="store_true", help="go on after the token that ends a text")
    p.add_argument(
        "--no-resume", action="store_true",
        help="read the prompt from its start, whatever the session was doing"
    )
    _model(p)
    _session(p)
    _sampling(p)


def _chat(p: argparse.ArgumentParser) -> None:
    p.add_argument("--system", help="what the model is told before the first turn of a session")
    p.add_argument("--max-new-tokens", type=int, default=512, help="of one answer, at most")
    _model(p)
    _session(p)
    _sampling(p)


def _read(p: argparse.ArgumentParser) -> None:
    p.add_argument("files", nargs="+", metavar="FILE", help="a document")
    p.add_argument("--passes", type=int, default=1, help="learn what was kept of them so many times in all")
    p.add_argument("--shuffle", action="store_true", help="in another order in every pass but the first")
    p.add_argument("--replay", type=int, metavar="SEGMENTS",
                   help="keep so many segments of what is learned, at most (default: 4096 with --passes)")
    p.add_argument("--share", type=float, default=1.0, metavar="S",
                   help="learn again only so much of it, what surprised most (default: 1, all)")
    p.add_argument("--seed", type=int, default=0, help="of the orders, and of what is kept")
    p.add_argument(
        "--no-resume", action="store_true", help="read all documents, whatever the session was doing"
    )
    _model(p)
    _session(p)


def _serve(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--sessions", required=True, metavar="DIR", help="the folder with a file for every session"
    )
    p.add_argument("--host", default="127.0.0.1", help="where to listen; beyond this machine with an API key only")
    p.add_argument("--port", type=int, default=8000, help="0: a free one")
    p.add_argument("--api-key-file", metavar="FILE",
                   help="what requests must bring (default: HOPE_KERNELS_API_KEY of the environment, if set)")
    p.add_argument("--batch", type=int, default=16, help="sequences that are written side by side, at most")
    p.add_argument("--queue", type=int, default=64, help="requests that may wait beside them")
    p.add_argument("--loaded", type=int, default=16, help="sessions that stay in memory between their turns")
    p.add_argument("--max-tokens", type=int, default=1024, help="of one answer, at most")
    p.add_argument("--max-prompt", type=int, default=65536, help="tokens of one prompt, at most")
    p.add_argument("--max-body", type=int, default=1 << 20, help="bytes of one request, at most")
    p.add_argument("--grace", type=float, default=10.0, metavar="SECONDS",
                   help="for which answers go on when the server is stopped; then they are cut, and kept")
    _model(p)


def _convert(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", metavar="SOURCE", help="a folder of transformers, or a GGUF file")
    p.add_argument("out", metavar="OUT", help="the folder to make; it must not exist, or be empty")
    p.add_argument("--chunks", type=numbers(int), default=(256,), metavar="N[,N...]",
                   help="tokens between two steps of a block, for equal shares of the blocks (default 256)")
    p.add_argument("--learn-blocks", type=blocks, metavar="SPEC",
                   help='which blocks learn: "all", "last:10", "0,3,5-9"')
    p.add_argument("--lr", type=numbers(float), metavar="X[,X...]", help="learning rate, or one a period")
    p.add_argument("--optimizer", help="the rule of a step, as in CMSConfig")
    p.add_argument("--precondition", type=float, metavar="RHO",
                   help="keeps what was learned before, as in CMSConfig")
    p.add_argument("--rank", type=int, help="of what a session learns of a matrix, as in CMSConfig")
    p.add_argument("--window", type=int, help="tokens that attention sees (default: what the model has)")
    p.add_argument("--sinks", type=int, help="first tokens that stay visible beside the window")
    p.add_argument("--dtype", choices=tuple(DTYPES),
                   help="of the weights (default: the source's; bfloat16 of a GGUF file)")
    p.add_argument("--quiet", action="store_true", help="say nothing")


def numbers(kind: type):
    """Numbers with commas between them."""
    def several(text: str) -> tuple:
        return tuple(kind(part) for part in text.split(","))

    several.__name__ = f"list of {kind.__name__}"  # argparse names it in messages
    return several


def blocks(text: str) -> tuple[int, ...] | None:
    """"all" is None, "last:10" the last ten blocks (negative indices), "0,3,5-9" a list.

    >>> blocks("0,3,5-7"), blocks("last:2"), blocks("all")
    ((0, 3, 5, 6, 7), (-2, -1), None)
    """
    if text == "all":
        return None
    if text.startswith("last:") and text[5:].isdigit() and int(text[5:]):
        return tuple(range(-int(text[5:]), 0))
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or dash and not last.isdigit() or dash and int(last) < int(first):
            raise argparse.ArgumentTypeError(f'{text!r}, expected "all", "last:10" or "0,3,5-9"')
        found |= set(range(int(first), int(last or first) + 1))
    return tuple(sorted(found))
