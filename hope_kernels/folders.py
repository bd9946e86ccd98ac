"""Folders of models: saved ones, bundled ones by name; for those of other libraries, what to do with them."""

from __future__ import annotations

import json
import os
import shlex
from typing import Any

KEY = MODEL_TYPE = "hope"  # in a config.json
ASSETS = os.path.join(os.path.dirname(__file__), "assets")


def model_folder(name: str | os.PathLike, op: str) -> str:
    """The folder of a saved or a bundled model. Raises FileNotFoundError, ValueError for a GGUF file."""
    folder = os.fspath(name)
    if os.path.isdir(folder):
        return folder
    if folder.endswith(".gguf") and os.path.isfile(folder):
        raise ValueError(f"{op}: {folder} is a GGUF file; {_conversion(folder)}")
    bundled = os.path.join(ASSETS, folder)
    if not os.path.isdir(bundled):
        raise FileNotFoundError(
            f"{op}: {folder!r} is neither a folder nor a bundled model ({', '.join(bundled_models())})"
        )
    return bundled


def _conversion(source: str) -> str:
    return ("make a folder that this package reads with "
            f"`python -m hope_kernels convert {shlex.quote(source)} FOLDER`")


def read_config(folder: str) -> Any:
    """Our fields of the folder's config.json, which stand under ``KEY``, or alone as earlier versions wrote them.
    Raises OSError, JSONDecodeError, and ValueError for a model of transformers."""
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
        fields = json.load(f)
    if isinstance(fields, dict) and "d_model" not in fields and "model_type" in fields:
        if fields["model_type"] == MODEL_TYPE and KEY in fields:
            return fields[KEY]
        raise ValueError(f"from_pretrained: {folder} holds a model of transformers (model_type "
                         f"{fields['model_type']!r}); {_conversion(folder)}")
    return fields


def bundled_models() -> list[str]:
    """Names of the models that ship with the package."""
    return (
        sorted(d for d in os.listdir(ASSETS) if os.path.exists(os.path.join(ASSETS, d, "config.json")))
        if os.path.isdir(ASSETS) else []
    )
