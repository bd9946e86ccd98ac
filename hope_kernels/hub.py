"""What makes a model's folder one that transformers reads too: files, made without that library.

    config.json             transformers' own fields, and ours under the key "hope": flat ones it would change
    modeling_hope.py        for from_pretrained(folder, trust_remote_code=True) of its Auto classes, where nobody
                            has imported hope_kernels.hf
    tokenizer_config.json   names of special tokens, from text.json
    generation_config.json  the ids that end a text, from text.json
    tokenizer.json          of a model that reads bytes; any other model brings its own
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from .config import HopeConfig
from .folders import KEY, MODEL_TYPE
from .text import byte_level
from .text.files import SETTINGS, TOKENIZER, TextSettings

CLASS = "HopeForCausalLM"
AUTO_MAP = {"AutoConfig": "modeling_hope.HopeHFConfig", "AutoModelForCausalLM": f"modeling_hope.{CLASS}"}
MODELING = b"from hope_kernels.hf import HopeForCausalLM, HopeHFConfig  # noqa: F401\n"


def common_fields(config: HopeConfig) -> dict[str, Any]:
    """What transformers, and programs around it, look for by these names."""
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.d_model, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "tie_word_embeddings": config.tie_embeddings,
    }


def config_json(config: HopeConfig, dtype: Any) -> bytes:
    """config.json of a model of ``config``, whose weights are of ``dtype``."""
    fields = {"model_type": MODEL_TYPE, "architectures": [CLASS], "auto_map": AUTO_MAP,
              "dtype": str(dtype).removeprefix("torch."), **common_fields(config), KEY: config.to_dict()}
    return _json(fields)


def load_weights(folder: str) -> dict[str, Tensor]:
    """Those of a folder that either library has written: transformers puts "model." before our names, and
    splits large models into several files. Raises OSError, SafetensorError, and JSONDecodeError, KeyError,
    TypeError or AttributeError for a damaged list of files."""
    index = os.path.join(folder, "model.safetensors.index.json")
    names = ["model.safetensors"]
    if not os.path.exists(os.path.join(folder, names[0])) and os.path.exists(index):
        with open(index, encoding="utf-8") as f:
            names = sorted({os.path.basename(name) for name in json.load(f)["weight_map"].values()})
    tensors = {n: t for name in names for n, t in load_file(os.path.join(folder, name)).items()}
    return {n.removeprefix("model."): t for n, t in tensors.items()}


def files_beside(text_files: Mapping[str, bytes], vocab_size: int) -> dict[str, bytes]:
    """The other files, by name. text_files: those of ``text/files.py`` that the folder has."""
    files, settings = {"modeling_hope.py": MODELING}, None
    own = text_files.get(TOKENIZER)
    if vocab_size == byte_level.SIZE and (own is None or byte_level.is_byte_level(own)):
        files[TOKENIZER] = byte_level.tokenizer_json()
        settings = TextSettings((byte_level.EOS,), (), {"eos_token": byte_level.EOS_TOKEN})
    elif own is None:
        return files
    elif SETTINGS in text_files:
        settings = TextSettings.from_bytes(text_files[SETTINGS], SETTINGS)
    special = {} if settings is None else dict(settings.special_tokens)
    if "eos_token" in special:
        special.setdefault("pad_token", special["eos_token"])
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
             "padding_side": "left", **special}
    files["tokenizer_config.json"] = _json(names)
    if settings is not None and settings.eos_ids:
        ends = list(settings.eos_ids)
        files["generation_config.json"] = _json({"eos_token_id": ends, "pad_token_id": ends[0]})
    return files


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
