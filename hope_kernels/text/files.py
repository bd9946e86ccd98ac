"""The files of a model's folder that are about text.

    tokenizer.json        text to token ids and back, as the library tokenizers writes it
    chat_template.jinja   messages to text, as transformers has it
    text.json             ``TextSettings``: ids that end a text, strings that do, names of special tokens

A folder without tokenizer.json belongs to a model that reads bytes, or token ids only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..files import write_atomically

TOKENIZER, TEMPLATE, SETTINGS = "tokenizer.json", "chat_template.jinja", "text.json"
NAMES = (TOKENIZER, TEMPLATE, SETTINGS)
FORMAT, VERSION = "hope_kernels.text", 1


def read_files(folder: str | os.PathLike) -> dict[str, bytes]:
    """Those of the files that the folder has."""
    found = {}
    for name in NAMES:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            with open(path, "rb") as f:
                found[name] = f.read()
    return found


def write_files(folder: str | os.PathLike, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        write_atomically(os.path.join(folder, name), data)


@dataclass(frozen=True)
class TextSettings:
    """What ``text.json`` says. eos_ids: tokens after which a text has ended. stop: strings that end it as
    well. special_tokens: the names by which a chat template knows special tokens ("bos_token", ...)."""

    eos_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    special_tokens: dict[str, str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> TextSettings:
        """Raises ValueError, which names ``where``."""
        try:
            content = json.loads(data)
            if content["format"] != FORMAT or content["version"] != VERSION:
                raise ValueError(f"format {content['format']!r} of version {content['version']!r}")
            ids, stop, special = content["eos_ids"], content["stop"], content["special_tokens"]
            if not _all(ids, list, int) or min(ids, default=0) < 0:
                raise ValueError(f"eos_ids is {ids!r}")
            if not _all(stop, list, str) or "" in stop:
                raise ValueError(f"stop is {stop!r}")
            if not _all(special, dict, str) or not _all(list(special.values()), list, str):
                raise ValueError(f"special_tokens is {special!r}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{where} is damaged ({type(error).__name__}: {error})"[:300]) from None
        return cls(tuple(ids), tuple(stop), dict(special))


def _all(value: Any, kind: type, item: type) -> bool:
    return isinstance(value, kind) and all(type(v) is item for v in value)
