"""``Tokenizer``: text to token ids and back for a model's folder, and messages of a chat to token ids."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..folders import model_folder
from . import byte_level
from .extra import extra
from .files import SETTINGS, TEMPLATE, TOKENIZER, TextSettings, read_files, write_files
from .streams import IdStream, TextStream
from .template import ChatTemplate

if TYPE_CHECKING:
    from ..model import HopeForCausalLM

BYTES = byte_level.SIZE  # vocab_size of a model that reads bytes


class Tokenizer:
    """Text and token ids of one model: ``Tokenizer.from_pretrained(folder)`` or ``Tokenizer.of(model)``.

    ``eos_ids``: the tokens after which a text has ended; ``stop``: strings that end it as well;
    ``start_ids``: what stands at the start of every text. A model of 256 tokens reads bytes, which needs no
    library, unless its ``tokenizer.json`` says otherwise; for any other ``tokenizers`` is needed, and
    ``jinja2`` for ``chat`` (the extra ``text``).

    >>> tokenizer = Tokenizer.from_pretrained("hope-byte")
    >>> tokenizer.encode("Go!"), tokenizer.decode([71, 111])
    ([71, 111, 33], 'Go')
    """

    def __init__(self, files: Mapping[str, bytes], vocab_size: int, where: str = "Tokenizer"):
        """files: contents by name, as ``files.py`` lists them. where: their folder, for messages. Raises
        ValueError for damaged files, for ids the model does not have, and where a tokenizer is missing."""
        self.files, self.vocab_size = dict(files), vocab_size
        self.reads_bytes = TOKENIZER not in self.files or (
            vocab_size == BYTES and byte_level.is_byte_level(self.files[TOKENIZER])
        )
        if self.reads_bytes and vocab_size != BYTES:
            raise ValueError(f"{where} has no {TOKENIZER}, expected one for a model of {vocab_size} token "
                             "ids; python -m hope_kernels convert writes it")
        settings = TextSettings()
        if SETTINGS in self.files:
            settings = TextSettings.from_bytes(self.files[SETTINGS], os.path.join(where, SETTINGS))
        self.eos_ids, self.stop, self._special = settings.eos_ids, settings.stop, settings.special_tokens
        self._library: Any = None
        self.start_ids: tuple[int, ...] = ()
        self._hidden: frozenset[int] = frozenset()
        if not self.reads_bytes:
            self._load(os.path.join(where, TOKENIZER))
        if max(self.eos_ids, default=0) >= vocab_size:
            raise ValueError(f"{os.path.join(where, SETTINGS)} has the token {max(self.eos_ids)} in eos_ids, "
                             f"the model has {vocab_size}")
        self._template: ChatTemplate | None = None

    def _load(self, path: str) -> None:
        library = extra("tokenizers", "the tokenizer of this model")
        try:
            self._library = loaded = library.Tokenizer.from_str(self.files[TOKENIZER].decode())
        except Exception as error:  # of the library: all faults are plain exceptions
            raise ValueError(f"{path} is damaged ({error})"[:300]) from None
        loaded.no_padding()
        loaded.no_truncation()
        highest = max(loaded.get_vocab(with_added_tokens=True).values(), default=0)
        if highest >= self.vocab_size:
            raise ValueError(f"{path} has the token {highest}, the model has {self.vocab_size}: they do not "
                             "belong together")
        # what it would put around every text is kept for the start of one; after that a text goes on
        marked, plain = (loaded.encode("a", add_special_tokens=s).ids for s in (True, False))
        begin = next((i for i in range(len(marked)) if marked[i : i + len(plain)] == plain), 0)
        self.start_ids = tuple(marked[:begin])
        loaded.post_processor = None
        added = loaded.get_added_tokens_decoder()
        self._hidden = frozenset(i for i, token in added.items() if token.special)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike) -> Tokenizer:
        """Of a model's folder or a bundled model. Raises FileNotFoundError, or ValueError as the constructor
        does."""
        folder = model_folder(name, "Tokenizer.from_pretrained")
        try:
            with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
                size = json.load(f)["vocab_size"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{os.path.join(folder, 'config.json')} is damaged ({error})") from None
        return cls(read_files(folder), size, folder)

    @classmethod
    def of(cls, model: HopeForCausalLM, where: str = "this model") -> Tokenizer:
        """Of a model that ``from_pretrained`` loaded."""
        return cls(model.text_files, model.config.vocab_size, where)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes its files into ``folder``; ``HopeForCausalLM.save_pretrained`` does so as well."""
        os.makedirs(folder, exist_ok=True)
        write_files(folder, self.files)

    @property
    def unit(self) -> str:
        """What a token is called in messages."""
        return "bytes" if self.reads_bytes else "tokens"

    @property
    def can_chat(self) -> bool:
        """Whether there is a chat template."""
        return TEMPLATE in self.files

    def encode(self, text: str, start: bool = False) -> list[int]:
        """The ids of a text. The names of special tokens in it are these tokens, as in transformers. start:
        with ``start_ids`` in front, as a text begins."""
        front = list(self.start_ids) if start else []
        if self.reads_bytes:
            return front + list(text.encode("utf-8", "surrogateescape"))
        return front + self._library.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of ids; what is no character becomes U+FFFD. special: the names of special tokens too."""
        if self.reads_bytes:
            return bytes(ids).decode(errors="replace")
        return self._library.decode(list(ids), skip_special_tokens=not special)

    def stream(self, context: Sequence[int] = (), note: dict | None = None) -> TextStream:
        """Decodes token by token; see ``TextStream``."""
        return TextStream(self.decode, context, self._hidden, note)

    def id_stream(self, **options: int) -> IdStream:
        """Encodes a text that comes in parts; see ``IdStream``."""
        return IdStream(self._with_spans, **options)

    def _with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        if self.reads_bytes:
            spans = [(i, i + 1) for i, c in enumerate(text) for _ in c.encode("utf-8", "surrogateescape")]
            return self.encode(text), spans
        found = self._library.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    @property
    def template(self) -> ChatTemplate:
        """Raises ValueError for a model without one, or a damaged one."""
        if self._template is None:
            if not self.can_chat:
                raise ValueError(f"this model has no chat template ({TEMPLATE} in its folder); it can read "
                                 "and write on, as python -m hope_kernels generate does")
            self._template = ChatTemplate(self.files[TEMPLATE].decode(errors="replace"), self._special)
        return self._template

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """The ids of messages, each {"role": ..., "content": ...}, by the model's template.
        add_generation_prompt: up to where the answer begins. Raises ValueError."""
        return self.encode(self.template.render(messages, add_generation_prompt))

    def next_turn(self, text: str) -> list[int]:
        """The ids between an answer's last word and the next answer, with ``text`` as the user's message: the
        end of the answer, the message, how an answer begins. They do not depend on what was said before."""
        mark = "\ue000answer\ue000"
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark},
                    {"role": "user", "content": text}]
        before, found, rest = self.template.render(messages).partition(mark)
        if not found or not before:
            raise ValueError("chat: the model's template leaves out what the assistant has said")
        return self.encode(rest)
