"""Text for models that read token ids: tokenizer, chat template, ids that end a text. Everything comes from
files of the model's folder (``files.py``); the libraries that read them are the extra ``text``."""

from .tokenizer import Tokenizer

__all__ = ["Tokenizer"]
