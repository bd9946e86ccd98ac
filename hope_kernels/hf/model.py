"""A HOPE model as a causal language model of transformers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..engine.generation import read
from ..engine.hidden import hidden_states
from ..folders import bundled_models, model_folder
from ..hub import files_beside
from ..layers.embedding import scaled
from ..layers.padding import Padding
from ..layers.wrapped import placement
from ..model import HopeForCausalLM as Core
from ..model_state import ModelState
from ..text.files import SETTINGS, TextSettings, read_files, write_files
from .cache import HopeCache
from .config import HopeHFConfig

NAME = "HopeForCausalLM"
LOSS = ("num_items_in_batch", "shift_labels", "ignore_index")  # what a loss of transformers takes besides


class HopeForCausalLM(PreTrainedModel, GenerationMixin):
    """``model``: our own, whose weights these are. ``wrap`` makes one of it, ``from_pretrained`` of a folder
    that either library has written, or of a bundled model by name."""

    config_class = HopeHFConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True  # nothing can be unread, so assisted decoding is refused
    _supports_sdpa = True
    _no_split_modules = ["HopeBlock", "HopeAttentionBlock"]
    gradient_checkpointing = False

    def __init__(self, config: HopeHFConfig, core: Core | None = None):
        super().__init__(config)
        self.model = Core(config.core()) if core is None else core
        self.post_init()

    @classmethod
    def wrap(cls, model: Core, learn: str = "off") -> HopeForCausalLM:
        """``model`` itself, not a copy: whatever trains one of the two trains the other. learn: see
        ``HopeHFConfig``."""
        wrapped = cls(HopeHFConfig.of(model.config, learn=learn, dtype=placement(model.embed).dtype), model)
        wrapped._take_ends()
        return wrapped.train(model.training)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first call makes a HopeCache

    def _take_ends(self) -> None:
        """What our text.json says about the ends of texts, for ``generate``."""
        files = self.model.text_files
        ends = TextSettings.from_bytes(files[SETTINGS], SETTINGS).eos_ids if SETTINGS in files else ()
        if ends and self.generation_config.eos_token_id is None:
            self.generation_config.eos_token_id, self.generation_config.pad_token_id = list(ends), ends[0]

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """As of every model of transformers. Raises ValueError where the files lack weights, and for a device map
        of several devices, too."""
        if name in bundled_models():
            name = model_folder(name, f"{NAME}.from_pretrained")
        loaded: Any = super().from_pretrained(name, *args, output_loading_info=True, **options)
        model, info = loaded
        absent = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        if absent:
            raise ValueError(f"{NAME}.from_pretrained: {name} lacks {absent[0]} and {len(absent) - 1} more "
                             "weights of its configuration, or has them in other shapes")
        places = sorted({str(d) for d in (getattr(model, "hf_device_map", None) or {}).values()})
        if len(places) > 1:
            raise ValueError(f"{NAME}.from_pretrained: device_map puts parts on {', '.join(places)}, expected one "
                             "device: a state lies on one")
        if os.path.isdir(name):
            model.model.text_files = read_files(name)
            model._take_ends()
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """As of every model of transformers, and the files that ours keeps beside the weights, but for those
        that are there already: both libraries read the folder."""
        super().save_pretrained(save_directory, *args, **options)
        if options.get("is_main_process", True) and not getattr(self, "_hf_peft_config_loaded", False):
            files = files_beside(self.model.text_files, self.model.config.vocab_size) | self.model.text_files
            there = set(os.listdir(save_directory))
            write_files(save_directory, {n: data for n, data in files.items() if n not in there})

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the layers have initialized themselves."""

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        cache: HopeCache | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, output_hidden_states: bool | None = None,
        return_dict: bool | None = None, logits_to_keep: int | Tensor = 0, learn: str | None = None,
        **options: Any,
    ) -> Any:
        """As of every causal language model of transformers, and ``learn``, by default the configuration's.

        attention_mask: padding may stand anywhere; each row reads its own tokens only. cache: a ``HopeCache``,
        advanced in place. inputs_embeds and output_hidden_states: where nothing learns. labels: the loss of a
        token that follows padding is not counted.
        Raises ValueError for what our model refuses, a cache of another kind, packed texts (position_ids that
        go back) and other tensors.
        """
        learn = str(self.config.learn if learn is None else learn)
        hidden = bool(self.config.output_hidden_states if output_hidden_states is None else output_hidden_states)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"{NAME}: expected one of input_ids and inputs_embeds")
        x: Any = inputs_embeds if input_ids is None else input_ids.long()
        loss_options = {n: options.pop(n) for n in LOSS if n in options}
        _check(options, cache, hidden and learn != "off")
        T, pad = x.shape[1], Padding.of(NAME, attention_mask, x.shape[1])
        lengths = None if pad is None else pad.lengths
        x = x if pad is None else pad.packed(x)
        state = None if cache is None else cache.state
        one = isinstance(logits_to_keep, int) and logits_to_keep == 1 and T > 1 and labels is None
        recorded = hidden_states(self.model.blocks, self.model.norm) if hidden else nullcontext(())
        with self._checkpointed(), recorded as kept:
            if one and not (hidden or torch.is_grad_enabled() or x.is_floating_point()):
                logits, state = self._read(x, state, lengths, learn)
            else:
                logits, state = self._call(x, state, lengths, learn)
                logits = logits if pad is None else pad.spread(logits)
        states = tuple(kept if pad is None else map(pad.spread, kept)) if hidden else None
        loss = None
        if labels is not None:
            labels = labels if pad is None else pad.targets(labels)
            loss = self.loss_function(logits, labels, logits.shape[-1], **loss_options)
        if isinstance(logits_to_keep, Tensor):
            logits = logits[:, logits_to_keep]
        elif logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache:
            cache = HopeCache() if cache is None else cache
            cache.advanced(state, T)
        out = CausalLMOutputWithPast(loss, logits, cache if use_cache else None, states)
        return out if return_dict in (None, True) else out.to_tuple()

    def _call(
        self, x: Tensor, state: ModelState | None, lengths: list[int] | None, learn: str
    ) -> tuple[Tensor, ModelState]:
        """Logits of all columns. x: ids [B, T], or vectors [B, T, d]."""
        embeds = x if x.is_floating_point() else None
        ids = x if embeds is None else torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
        guard = True if learn == "next_token" and not torch.is_grad_enabled() else None
        return self.model(ids, state, lengths, learn=learn, guard=guard, embeds=embeds)

    def _read(
        self, ids: Tensor, state: ModelState | None, lengths: list[int] | None, learn: str
    ) -> tuple[Tensor, ModelState]:
        """Logits [B, 1, V] after each row's last token, however long ids are, as our ``generate`` reads a
        prompt."""
        found = read(self.model, ids, state, lengths, learn=learn, unread="included")
        assert found.logits is not None
        return found.logits.unsqueeze(1), found.state

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] | None = None,
        every_n_layers: int = 1,
    ) -> None:
        self.gradient_checkpointing, self._every = enable, every_n_layers
        self._call_block = gradient_checkpointing_func or checkpoint

    @contextmanager
    def _checkpointed(self) -> Iterator[None]:
        """Every n-th block is called by what ``gradient_checkpointing_enable`` was given, in training."""
        if self.gradient_checkpointing and self.training:
            every = {id(b) for b in list(self.model.blocks)[:: self._every]}

            def call(block: nn.Module, *args: Any) -> Any:
                return self._call_block(block, *args) if id(block) in every else block(*args)

            self.model.checkpoint = call
        try:
            yield
        finally:
            self.model.checkpoint = None

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed = scaled(value, self.model.config.embed_scale)  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module | None:
        """None where the embedding is the head too."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.head = new_embeddings  # type: ignore[assignment]

    def resize_token_embeddings(self, *args: Any, **options: Any) -> nn.Embedding:
        """As of every model of transformers. States from before belong to the model as it was."""
        found = super().resize_token_embeddings(*args, **options)
        self.model.resized(found.weight.shape[0])
        self.config.set_core(self.model.config)
        return found


def _check(options: dict[str, Any], cache: Any, hidden_while_learning: bool) -> None:
    if cache is not None and not isinstance(cache, HopeCache):
        raise ValueError(f"{NAME}: argument cache is a {type(cache).__name__}, expected a HopeCache")
    if hidden_while_learning:
        raise ValueError(f"{NAME}: argument output_hidden_states is True, expected False while learning")
    positions = options.pop("position_ids", None)
    if positions is not None and bool((positions.diff(dim=-1) < 0).any()):
        raise ValueError(f"{NAME}: argument position_ids goes back, expected one text per row: packed texts "
                         "would be read as one")
    # ``generate`` hands on whatever it is given; what belongs to single tokens must not be passed over
    unknown = sorted(n for n, value in options.items() if isinstance(value, Tensor))
    if unknown:
        raise ValueError(f"{NAME}: argument {unknown[0]} means nothing here")
