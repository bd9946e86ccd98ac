"""python -m hope_kernels generate | chat | read | serve | convert | demo | doctor"""

from __future__ import annotations

import sys

from ..text.extra import MissingExtra
from .parser import parser
from .session import BROKEN_PIPE
from .terminal import drop_unwritten, hold_descriptors, notice


def command(argv: list[str] | None) -> int:
    """A command is imported when it is asked for."""
    args = parser().parse_args(argv)
    if args.command == "generate":
        from .generate import generate_command

        return generate_command(args)
    if sys.stdout is None or sys.stdout.closed:
        raise OSError("standard output is closed")
    if args.command == "chat":
        from .chat import chat_command

        return chat_command(args)
    if args.command == "read":
        from .read import read_command

        return read_command(args)
    if args.command == "serve":
        from ..serve.server import serve_command

        return serve_command(args)
    if args.command == "convert":
        from .convert import convert_command

        return convert_command(args)
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
    except (ValueError, OSError, MissingExtra) as error:
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
