"""HopeForCausalLM: embedding, blocks, head, and files. ids in, logits out; ``learn="next_token"`` lets the CMS learn while it reads."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from .backend import resolve_cms
from .config import HopeConfig
from .generation import Generation, generate
from .layers.autocast import in_own_dtype
from .layers.block import HopeAttentionBlock, HopeBlock
from .layers.cms_consolidate import check_consolidation, consolidate
from .layers.wrapped import placement, project, token_vectors
from .learning import Inner, advance_off, read_learning, read_off
from .ops.check import check_lengths, check_state, check_tensor, check_values
from .ops.cms.chain import cms_forward, cms_learn
from .state import Counters, State, write_atomically

ASSETS = os.path.join(os.path.dirname(__file__), "assets")


@dataclass(eq=False)
class ModelState(State):
    """What a batch of sequences has learned in a whole model.

    mixers, cms: one state per block (None without a CMS). For learn="next_token" only: ``ids`` [B, C] int64, the tokens of the open
    segment of C tokens, ``seen`` how many of them (or -1: one was read with learn="off"), ``snapshot`` the mixers at its start.
    ``unread`` [B, 1]: the last token ``generate`` returned, which the state has not read; None if there is none.
    """

    mixers: list
    cms: list
    seen: Counters
    ids: Tensor
    snapshot: list
    unread: Tensor | None = None

    def bind(self, module: nn.Module, where: str) -> None:
        super().bind(module, where)
        for block, mixer, cms in zip(module.blocks, self.mixers, self.cms):
            mixer.owner = block.mixer
            if cms is not None:
                cms.owner = block.cms

    def apart(self):
        """The same state for a call in grad mode: whatever later advances what that call returns, in place or not, leaves this one as it
        is. Attention's keys are shared, which are only ever appended to."""
        mixers, snapshot = ([m.snapshot() for m in of] for of in (self.mixers, self.snapshot))
        cms = [c and c.clone() for c in self.cms]
        counters = {n: Counters(getattr(self, n)) for n in ("pos", "seen")}
        return replace(self, mixers=mixers, cms=cms, ids=self.ids.clone(), snapshot=snapshot, **counters)

    def synchronize(self):
        """As for any state. Where a replayed graph of the model has moved the mixers, the model's counters follow as with learn="off".

        Raises ValueError where the mixers do not stand at one place (attention keeps its position on the host and cannot be replayed).
        """
        super().synchronize()
        places = {tuple(m.pos) for m in self.mixers} or {tuple(self.pos)}
        if len(places) > 1:
            raise ValueError(f"ModelState: the blocks stand at different positions, {', '.join(str(list(p)) for p in sorted(places))}")
        lengths = [now - before for now, before in zip(*places, self.pos)]
        if any(lengths):
            new = advance_off(self, self.mixers, lengths)
            self.pos, self.cms, self.seen = new.pos, new.cms, new.seen
        return self


class HopeForCausalLM(nn.Module):
    """A HOPE language model (Nested Learning section 8.3): vocab_size -> d_model, num_layers blocks, final RMSNorm, head.

    Raises ValueError from the configuration. ``HopeForCausalLM.from_pretrained(name_or_folder)`` loads saved weights.
    """

    def __init__(self, config: HopeConfig, device=None, dtype=None):
        super().__init__()
        self.config = config
        kw = {"device": device, "dtype": dtype}
        block = HopeAttentionBlock if config.mixer == "attention" else HopeBlock
        self.embed = nn.Embedding(config.vocab_size, config.d_model, **kw)
        self.blocks = nn.ModuleList(block(config, cms, **kw) for cms in config.block_cms)
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps, **kw)
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False, **kw)
        nn.init.normal_(self.embed.weight, std=0.02)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.02)

    @property
    def segment(self) -> int:
        """Tokens between two boundaries of the fastest CMS level; 0 without a CMS."""
        return self.config.segment

    @property
    def learns(self) -> bool:
        """Whether reading with learn="next_token" can change anything: some level has lr > 0."""
        return any(c is not None and any(c.learning_rates) for c in self.config.block_cms)

    def init_state(self, batch: int, device=None) -> ModelState:
        """State of ``batch`` sequences that have read nothing, in the dtype of the weights."""
        device = placement(self.embed).device if device is None else torch.device(device)
        mixers = [b.mixer.init_state(batch, device) for b in self.blocks]
        cms = [None if b.cms is None else b.cms.init_state(batch, device) for b in self.blocks]
        ids = torch.zeros(batch, self.segment if self.learns else 0, dtype=torch.long, device=device)
        zero = [0] * batch
        snapshot = [m.snapshot() for m in mixers] if self.learns else []
        return ModelState(Counters(zero), self.config, mixers, cms, Counters(zero), ids, snapshot, owner=self)

    @in_own_dtype
    def forward(
        self, ids: Tensor, state: ModelState | None = None, lengths=None, learn: str = "off", backend: str | None = None,
        *, check_finite: bool = False, wavefront: int | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Reads T tokens per row.

        ids: [B, T] int64. state: from ``init_state``, an earlier call or a file; None starts new sequences. lengths: [B], tokens of
        each row that count. learn: "off" reads with the CMS weights as they are; "next_token" refreshes every level from the
        model's own next-token loss at its period. wavefront: where nothing learns, read with the blocks side by side over pieces of so many
        tokens (``wavefront.py``). Returns logits [B, T, vocab_size] (zero where padded) and the state: under
        no_grad the given one, advanced in place; in grad mode a new one.
        Raises ValueError for ids out of range (on a device or compiled only with check_finite: looking costs a sync), shapes, lengths,
        an unknown ``learn``, a wavefront that is to learn or to carry gradients, a state of another model, and with check_finite for
        non-finite logits; the given state is then as it was.
        """
        name = "HopeForCausalLM"
        check_tensor(name, "ids", ids, ("B", "T"), dtype=torch.int64, device=placement(self.embed).device)
        lengths = check_lengths(name, lengths, *ids.shape)
        if learn not in ("off", "next_token"):
            raise ValueError(f"{name}: argument learn is {learn!r}, expected 'off' or 'next_token'")
        if ids.numel() and (check_finite or ids.device.type == "cpu" and not torch.compiler.is_compiling()):
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(f"{name}: argument ids has token {low if low < 0 else high}, expected 0 to {self.config.vocab_size - 1}")
        given = state
        if state is None:
            state = self.init_state(ids.shape[0])
        check_state(name, state, ModelState, self.config, ids.shape[0])
        state.bind(self, name)
        if given is not None and torch.is_grad_enabled():
            state = given.apart()
        learning = learn == "next_token" and self.learns
        if wavefront is not None and learning:
            raise ValueError(f"{name}: argument wavefront is {wavefront}, expected None with learn='next_token': a segment's loss is known "
                             "behind the last block, before the first one may read on")
        if learning:
            logits, new = read_learning(self, ids, state, lengths, backend)
        else:
            logits, new = read_off(self, ids, state, lengths, backend, wavefront)
        if check_finite:
            check_values(name, "logits (weights, state or learning rates diverged)", logits, lengths)
        new = replace(new, unread=None)
        if given is None or torch.is_grad_enabled():
            return logits, new
        return logits, given.assign(new)

    def levels(self, state: ModelState) -> list:
        """The CMS weights in force, per block: what ``run`` takes."""
        return [None if b.cms is None else b.cms.effective_levels(c) for b, c in zip(self.blocks, state.cms)]

    def run(
        self, h: Tensor, mixers: list, levels: list, lengths: list[int], backend: str | None = None, inner: Inner | None = None
    ) -> tuple[Tensor, list]:
        """All blocks over h [B, T, d_model], functionally: (h, new mixer states). inner: the pass that learns, in which fast weights are
        constants of the graph and the CMS levels hand their factors to ``inner.sinks``."""
        new = []
        for i, (mixer, level) in enumerate(zip(mixers, levels)):
            h, mixer = self.read_block(i, h, mixer, level, lengths, backend, inner)
            new.append(mixer)
        return h, new

    def read_block(
        self, i: int, h: Tensor, mixer, level: list | None, lengths: list[int], backend: str | None = None, inner: Inner | None = None
    ) -> tuple[Tensor, object]:
        """Block i of ``run``: (h, new mixer state)."""
        block, cms = self.blocks[i], self.blocks[i].cms
        with torch.set_grad_enabled(torch.is_grad_enabled() and (h.requires_grad or inner is None)):
            y, mixer = block.mixer.scan(block.norm(h), mixer, lengths, backend=backend, constant_memory=inner is not None)
        h = h + y
        if cms is None:
            return h, mixer
        ops = resolve_cms(cms.config, h.dtype, h.device, backend, inner is not None)
        below = inner is not None and not h.requires_grad and not cms.learns  # nothing up to here learns: no graph, no backward
        if inner is None or below:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not below):
                return cms_forward(h, level, cms.config, cms.mix, cms.norm_eps, ops), mixer
        return cms_learn(h, level, cms.config, inner.sinks[i], inner.anchor, cms.mix, cms.norm_eps, ops), mixer

    def logits(self, h: Tensor, lengths: list[int]) -> Tensor:
        h = self.norm(h)
        logits = F.linear(h, token_vectors(self.embed, self.config.vocab_size)) if self.head is None else project(self.head, h)
        T = h.shape[1]
        if min(lengths, default=T) < T:
            valid = torch.arange(T, device=h.device) < torch.tensor(lengths, device=h.device).unsqueeze(1)
            logits = logits * valid.unsqueeze(-1).to(logits.dtype)
        return logits

    def generate(self, ids: Tensor | None, max_new_tokens: int, state: ModelState | None = None, **options) -> Generation:
        """Continues ``ids`` [B, T]; see :func:`hope_kernels.generation.generate`."""
        return generate(self, ids, max_new_tokens, state, **options)

    def consolidate(self, state: ModelState, row: int = 0, levels: list[int] | None = None) -> None:
        """Makes what ``row`` of ``state`` has learned in the CMS levels (indices; None: all) the model's own weights, in place: see
        ``ContinuumMemory.consolidate``. Save the model afterwards; sessions saved before belong to the weights as they were."""
        check_state("HopeForCausalLM.consolidate", state, ModelState, self.config, state.batch)
        state.bind(self, "HopeForCausalLM.consolidate")
        most = max((c.num_levels for c in self.config.block_cms if c is not None), default=0)
        for l in levels or ():
            if l not in range(most):
                raise ValueError(f"HopeForCausalLM.consolidate: argument levels has {l!r}, expected 0 to {most - 1}")
        # all blocks are asked before the first one is changed
        for act, block, cms in [(act, *of) for act in (check_consolidation, consolidate) for of in zip(self.blocks, state.cms)]:
            if cms is not None:
                wanted = None if levels is None else [l for l in levels if l < cms.config.num_levels]
                act(block.cms, cms, row, wanted)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes ``config.json`` and ``model.safetensors`` into ``folder``, each atomically. Raises ValueError, and writes nothing, where
        submodules have been wrapped, quantized or parametrized: the configuration, and so ``from_pretrained``, knows nothing of that."""
        held = self.state_dict()
        if type(self) is HopeForCausalLM:
            other = sorted(held.keys() ^ type(self)(self.config, device="meta").state_dict().keys())
            if other:
                raise ValueError(f"save_pretrained: {other[0]} and {len(other) - 1} more are the model's or its configuration's "
                                 "only, expected the same: merge or remove what wraps its modules, or save its state_dict()")
        os.makedirs(folder, exist_ok=True)
        tensors = {n: t.detach().cpu().contiguous() for n, t in held.items()}
        write_atomically(os.path.join(folder, "model.safetensors"), safetensors_bytes(tensors, metadata={"format": "pt"}))
        write_atomically(os.path.join(folder, "config.json"), (json.dumps(self.config.to_dict(), indent=1) + "\n").encode())

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, device=None, dtype: torch.dtype | None = None) -> HopeForCausalLM:
        """Loads a folder written by ``save_pretrained``, or a bundled model by name (``bundled_models()``).

        Raises FileNotFoundError for an unknown name or folder, ValueError for files that do not fit together or are damaged.
        """
        folder = os.fspath(name)
        if not os.path.isdir(folder):
            bundled = os.path.join(ASSETS, folder)
            if not os.path.isdir(bundled):
                names = ", ".join(bundled_models())
                raise FileNotFoundError(f"from_pretrained: {folder!r} is neither a folder nor a bundled model ({names})")
            folder = bundled
        weights = os.path.join(folder, "model.safetensors")
        try:
            with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
                config = HopeConfig.from_dict(json.load(f))
            tensors = load_file(weights)
        except (json.JSONDecodeError, TypeError, SafetensorError) as error:
            raise ValueError(f"from_pretrained: {folder} holds a damaged file ({error})") from None
        model = cls(config, dtype=next(iter(tensors.values())).dtype)
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"from_pretrained: {weights} does not fit its config.json ({error})") from None
        return model.to(device=device, dtype=dtype).eval()


def bundled_models() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(d for d in os.listdir(ASSETS) if os.path.exists(os.path.join(ASSETS, d, "config.json"))) if os.path.isdir(ASSETS) else []
