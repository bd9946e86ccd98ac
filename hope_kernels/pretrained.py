"""A model's folder: what ``save_pretrained`` writes and ``from_pretrained`` reads; and a model whose learned rates
have become numbers of its configuration."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save as safetensors_bytes

from .config import HopeConfig
from .files import write_atomically
from .folders import model_folder, read_config
from .hub import config_json, files_beside, load_weights
from .layers.wrapped import placement
from .text.files import read_files, write_files


def save(model: Any, folder: str | os.PathLike, checked: bool) -> None:
    """``HopeForCausalLM.save_pretrained``. checked: whether the weights must be what the configuration says."""
    held = model.state_dict()
    if checked:
        other = sorted(held.keys() ^ type(model)(model.config, device="meta").state_dict().keys())
        if other:
            raise ValueError(f"save_pretrained: {other[0]} and {len(other) - 1} more are the model's or its "
                             "configuration's only, expected the same: merge or remove what wraps its "
                             "modules, or save its state_dict()")
    os.makedirs(folder, exist_ok=True)
    tensors = {n: t.detach().cpu().contiguous() for n, t in held.items()}
    write_atomically(
        os.path.join(folder, "model.safetensors"), safetensors_bytes(tensors, metadata={"format": "pt"})
    )
    write_files(folder, files_beside(model.text_files, model.config.vocab_size) | model.text_files)
    dtype = placement(model.embed).dtype
    write_atomically(os.path.join(folder, "config.json"), config_json(model.config, dtype))


def load(cls: Any, name: str | os.PathLike, device: Any, dtype: torch.dtype | None) -> Any:
    """``HopeForCausalLM.from_pretrained``."""
    folder = model_folder(name, "from_pretrained")
    weights = os.path.join(folder, "model.safetensors")
    try:
        config = HopeConfig.from_dict(read_config(folder))
        tensors = load_weights(folder)
    except (json.JSONDecodeError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise ValueError(f"from_pretrained: {folder} holds a damaged file ({error})") from None
    model = cls(config, device=device, dtype=next(iter(tensors.values())).dtype)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"from_pretrained: {weights} does not fit its config.json ({error})") from None
    model.text_files = read_files(folder)
    return model.to(device=device, dtype=dtype).eval()


def with_fixed_rates(model: Any) -> Any:
    """``HopeForCausalLM.with_fixed_rates``."""
    if model.config.learn_blocks is not None:
        raise ValueError(f"with_fixed_rates: argument model has learn_blocks={model.config.learn_blocks}, expected "
                         "None: the other blocks have learned no rates")
    fixed = []
    for block in model.blocks:
        cms = block.cms
        if cms is None or cms.config.lr != "learned":
            fixed.append(None if cms is None else cms.config)
            continue
        rates = tuple(tuple(cms.rates(l).values()) for l in range(cms.config.num_levels))
        fixed.append(cms.config.replace(lr=rates))
    if any(c is None for c in fixed):
        raise ValueError("with_fixed_rates: argument model has no CMS, expected one with lr='learned'")
    like = placement(model.embed)
    found = type(model)(model.config.replace(cms=tuple(fixed)), device=like.device, dtype=like.dtype)
    found.load_state_dict({n: t for n, t in model.state_dict().items() if not n.endswith(".log_rates")})
    found.text_files = dict(model.text_files)
    return found.train(model.training)
