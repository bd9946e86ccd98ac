"""What sequences have learned, as a cache of transformers."""

from __future__ import annotations

import os
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..model_state import ModelState
from ..state_file import load_note, load_state


class HopeLayer(CacheLayerMixin):
    """The one layer of a ``HopeCache``: a state cannot be taken apart by layers."""

    supports_early_init = False

    def __init__(self, state: ModelState | None, columns: int):
        super().__init__()
        self.state, self.columns = state, columns

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def reset(self) -> None:
        self.state, self.columns = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.batch_select_indices(torch.arange(self.state.batch).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError for any number but 0."""
        if tokens_to_remove:
            raise ValueError(f"HopeCache.crop: argument tokens_to_remove is {tokens_to_remove}, expected 0: what "
                             "has been read cannot be taken out of a state; keep a copy.deepcopy of the cache")

    def update(self, *_: Any, **__: Any) -> NoReturn:
        raise ValueError("HopeCache.update: expected no keys and values; the model advances its state itself")

    lazy_initialization = update


class HopeCache(Cache):
    """A ``ModelState`` and how many columns of ``input_ids``, padding included, it stands for.

    ``HopeCache(state)`` continues a session of ours with the ids of its text; ``save`` and ``load`` are those
    of a state. A call of the model advances the cache in place, as any cache of transformers;
    ``copy.deepcopy`` makes an independent one.
    """

    def __init__(self, state: ModelState | None = None, columns: int | None = None):
        """columns: None: as many as the longest row of ``state`` has read."""
        if columns is None:
            columns = 0 if state is None else max(state.pos, default=0)
        self.layer = HopeLayer(state, columns)
        super().__init__(layers=[self.layer])

    @property
    def state(self) -> ModelState | None:
        return self.layer.state

    @property
    def batch_size(self) -> int:
        return -1 if self.state is None else self.state.batch

    def advanced(self, state: ModelState, columns: int) -> None:
        """``state`` has read ``columns`` columns more."""
        self.layer.state, self.layer.columns = state, self.layer.columns + columns

    def save(self, path: str | os.PathLike) -> None:
        """As ``State.save``. Raises ValueError for a cache that has read nothing."""
        if self.state is None:
            raise ValueError("HopeCache.save: the cache has read nothing, expected one that a model has used")
        self.state.save(path, note={"columns": self.layer.columns})

    @classmethod
    def load(cls, path: str | os.PathLike, device: torch.device | str = "cpu") -> HopeCache:
        """What ``save`` has written, or a session file of ours. Raises as ``load_state`` does."""
        state, note = load_state(path, device), load_note(path)
        if not isinstance(state, ModelState):
            raise ValueError(f"HopeCache.load: {os.fspath(path)} holds a {type(state).__name__}, expected a "
                             "ModelState")
        columns = note.get("columns") if isinstance(note, dict) else None
        return cls(state, columns if isinstance(columns, int) else None)
