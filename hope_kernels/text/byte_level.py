"""The tokenizer of a model that reads bytes, as a file of the library tokenizers: a byte-level BPE without
merges.

A token's id is its byte. 0xFF occurs in no UTF-8 text, so its id, 255, marks the end of a text.
"""

from __future__ import annotations

import json

SIZE, EOS, EOS_TOKEN = 256, 255, "<|endoftext|>"


def vocabulary() -> dict[str, int]:
    """name -> id. A byte that is a printable character of Latin-1 is named by it, the n-th other one by the
    character 256 + n: the names of GPT-2's tokenizer, which all byte-level tokenizers use."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(SIZE) if b not in printable]
    names = {b: chr(b) for b in printable} | {b: chr(SIZE + n) for n, b in enumerate(others)}
    names[EOS] = EOS_TOKEN
    return {names[b]: b for b in range(SIZE)}


def tokenizer_json() -> bytes:
    """The contents of tokenizer.json."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    end = {"id": EOS, "content": EOS_TOKEN, "single_word": False, "lstrip": False, "rstrip": False,
           "normalized": False, "special": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": vocabulary(), "merges": []}
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end],
               "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
               "model": model}
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def is_byte_level(data: bytes) -> bool:
    """Whether this tokenizer.json is that of bytes, whoever has written it."""
    try:
        model = json.loads(data)["model"]
        return model["vocab"] == vocabulary() and not model["merges"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
