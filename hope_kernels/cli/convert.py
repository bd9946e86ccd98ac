"""``convert SOURCE OUT``: a model of transformers as a folder of ours, with all it needs for text. OUT is
complete or not there."""

from __future__ import annotations

import os
import shutil
import tempfile
from typing import Any

from .. import convert
from ..text import Tokenizer
from .meter import megabytes
from .parser import DTYPES
from .sources import Source
from .terminal import notice


def convert_command(args) -> int:
    _check_out(args.out)
    source = Source(args.source, args.quiet)
    options: dict[str, Any] = {"chunks": _one(args.chunks)}
    for name in ("window", "sinks", "lr", "optimizer", "precondition", "rank", "learn_blocks"):
        value = getattr(args, name)
        if value is not None:
            options[name] = _one(value) if name == "lr" else value
    files = source.text_files()
    theirs = source.model(DTYPES.get(args.dtype))
    model = convert.llama(theirs, **options)
    del theirs
    model.text_files = files
    if files:
        tokenizer = Tokenizer.of(model, args.source)  # what could not be read later is refused now
        if tokenizer.can_chat:
            tokenizer.template  # noqa: B018
    _write(model, args.out)
    if not args.quiet:
        size = sum(p.numel() for p in model.parameters())
        learning = sum(c is not None and any(c.learning_rates) for c in model.config.block_cms)
        bare = "" if files else "; without a tokenizer, since the source has none"
        notice(f"{args.out}: {size / 1e6:.1f} M parameters, {megabytes(_size(args.out))}, {learning} of "
               f"{len(model.blocks)} blocks learn{bare}")
    return 0


def _one(values: Any) -> Any:
    return values[0] if isinstance(values, tuple) and len(values) == 1 else values


def _check_out(out: str) -> None:
    if not out:
        raise ValueError("convert: OUT is empty, expected the name of a folder")
    if os.path.isdir(out):
        if os.listdir(out):
            raise ValueError(f"convert: OUT {out} exists and is not empty")
    elif os.path.lexists(out):
        raise ValueError(f"convert: OUT {out} exists and is no folder")


def _write(model: Any, out: str) -> None:
    """Into a folder beside it, which then takes its name."""
    out = os.path.abspath(out)
    os.makedirs(os.path.dirname(out), exist_ok=True)
    folder = tempfile.mkdtemp(prefix=f"{os.path.basename(out)}.", suffix=".part", dir=os.path.dirname(out))
    try:
        os.chmod(folder, 0o777 & ~_umask())
        model.save_pretrained(folder)
        if os.path.isdir(out):
            os.rmdir(out)  # raises OSError where somebody has put something there meanwhile
        os.rename(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _size(folder: str) -> int:
    return sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder))
