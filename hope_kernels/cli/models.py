"""What every command that reads begins with: a device, a model, its tokenizer, a session."""

from __future__ import annotations

import os

import torch

from ..folders import bundled_models
from ..model import HopeForCausalLM
from ..model_state import ModelState
from ..state_file import load_note, load_state
from ..text import Tokenizer


def usable_device(name: str) -> torch.device:
    """Raises ValueError for a device that is none, is not here, or holds no values."""
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float32, device=device).tolist()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"argument --device is {name!r}, which cannot be used here: {reason}") from None
    return device


def load_model(
    name: str | None, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[HopeForCausalLM, Tokenizer]:
    """The model of a folder or of a bundled name, by default the bundled one, and its tokenizer. dtype: None
    for that of its weights."""
    if name is None:
        models = bundled_models()
        if not models:
            raise FileNotFoundError("no model is bundled with this installation; pass --model FOLDER")
        name = models[0]
    model = HopeForCausalLM.from_pretrained(name, device=device, dtype=dtype)
    return model, Tokenizer.of(model, name)


def load_session(
    model: HopeForCausalLM, path: str | None, name: str | None, device: torch.device
) -> tuple[ModelState, dict | None]:
    """The state of the session at ``path`` (called ``name``) and its note; a new state where there is no
    file. Raises ValueError for a state that is another model's."""
    if path is None or not os.path.exists(path):
        return model.init_state(1), None
    state, note = load_state(path, device), load_note(path)
    if not isinstance(state, ModelState):
        kind = type(state).__name__
        raise ValueError(f"session {name} holds a {kind}, expected the state of a whole model")
    if state.batch != 1:
        raise ValueError(f"session {name} holds {state.batch} texts side by side, expected one")
    model.claim(f"session {name}", state)
    return state, note


def check_run(args) -> None:
    """Raises ValueError for numbers that the commands share."""
    if not args.save_every >= 0:
        raise ValueError(f"argument --save-every is {args.save_every}, expected a number of seconds, or 0 "
                         "for never")


def unread_ids(state: ModelState) -> list[int]:
    """The token that the state's text ends with and that it has not read, if there is one."""
    return [] if state.unread is None else [t for t in state.unread.flatten().tolist() if t >= 0]
