"""Models and tokenizers as transformers loads them, from a folder or a GGUF file: the only place in this
package that needs transformers, and it needs it only while a model is converted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..convert import MODEL_TYPES
from ..text.extra import extra
from ..text.files import SETTINGS, TEMPLATE, TOKENIZER, TextSettings

NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class Source:
    """A folder or a GGUF file. Raises FileNotFoundError or ValueError where it is neither, or its model_type
    is none that ``convert`` takes."""

    def __init__(self, path: str, quiet: bool = False):
        self.path, self.gguf = path, os.path.isfile(path)
        if not os.path.exists(path):
            raise FileNotFoundError(f"convert: SOURCE {path} does not exist")
        if self.gguf and not path.endswith(".gguf"):
            raise ValueError(f"convert: SOURCE {path} is a file, expected a folder of transformers or a "
                             ".gguf file")
        config = os.path.join(path, "config.json")
        if not self.gguf and not os.path.isfile(config):
            raise ValueError(f"convert: SOURCE {path} has no config.json, expected a folder of transformers")
        self._transformers: Any = extra("transformers", "convert", "llama")
        if quiet:
            self._transformers.logging.disable_progress_bar()
        if self.gguf:
            for library in ("gguf", "accelerate"):
                extra(library, "convert from a GGUF file", "gguf")
            folder, name = os.path.split(path)
            self._from = {"pretrained_model_name_or_path": folder or ".", "gguf_file": name}
        else:
            self._from = {"pretrained_model_name_or_path": path, "local_files_only": True}
            with self._told("config.json"), open(config, encoding="utf-8") as f:
                kind = json.load(f).get("model_type")
            self._check(kind)
        with self._told("its configuration"):
            self.config = self._transformers.AutoConfig.from_pretrained(**self._from)
        self._check(self.config.model_type)

    def _check(self, kind: Any) -> None:
        if kind not in MODEL_TYPES:
            expected = ", ".join(map(repr, MODEL_TYPES))
            raise ValueError(
                f"convert: SOURCE {self.path} has model_type {kind!r}, expected one of {expected}"
            )

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Whatever transformers cannot read is one ValueError that names the source."""
        try:
            yield
        except (ImportError, KeyboardInterrupt):
            raise
        except Exception as error:  # foreign files: each kind of damage has an error of its own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"convert: SOURCE {self.path}: {what} cannot be read ({reason})"[:500]) from None

    def model(self, dtype: torch.dtype | None) -> torch.nn.Module:
        """dtype: of the weights; None: the source's own, bfloat16 for a GGUF file (quantized there)."""
        options: dict[str, Any] = {"dtype": "auto" if dtype is None else dtype}
        if self.gguf:
            options["dtype"] = dtype or torch.bfloat16
            options["quantization_config"] = self._transformers.GgufConfig(dequantize=True)
        with self._told("its weights"):
            return self._transformers.AutoModelForCausalLM.from_pretrained(**self._from, **options)

    def text_files(self) -> dict[str, bytes]:
        """What ``text/files.py`` keeps of its tokenizer; nothing where it has none."""
        if not self.gguf and not any(n.startswith(("tokenizer", "vocab")) for n in os.listdir(self.path)):
            return {}
        with self._told("its tokenizer"):
            tokenizer = self._transformers.AutoTokenizer.from_pretrained(**self._from)
            library = tokenizer.backend_tokenizer
            library.no_padding()
            library.no_truncation()
            content = library.to_str().encode()
        special = {n: str(getattr(tokenizer, n)) for n in NAMES if getattr(tokenizer, n, None) is not None}
        files = {TOKENIZER: content}
        template = tokenizer.chat_template
        if isinstance(template, dict):  # several by name
            template = template.get("default")
        if template:
            files[TEMPLATE] = template.encode()
        files[SETTINGS] = TextSettings(self._ends(tokenizer.eos_token_id), (), special).to_bytes()
        return files

    def _ends(self, of_tokenizer: int | None) -> tuple[int, ...]:
        """The ids that end a text, by all that says so."""
        found = [of_tokenizer, getattr(self.config, "eos_token_id", None)]
        path = os.path.join(self.path, "generation_config.json")
        if not self.gguf and os.path.isfile(path):
            with self._told("generation_config.json"), open(path, encoding="utf-8") as f:
                found.append(json.load(f).get("eos_token_id"))
        ids = [i for part in found for i in (part if isinstance(part, (list, tuple)) else [part])]
        return tuple(sorted({i for i in ids if type(i) is int and i >= 0}))
