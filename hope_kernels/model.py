"""HopeForCausalLM: embedding, blocks, head, and files. ids in, logits out; ``learn="next_token"`` lets the
CMS learn while it reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from . import pretrained
from .backend import Request, gradient
from .check import check_batch, check_index, check_lengths, check_state, check_tensor
from .config import HopeConfig
from .continued import continued
from .engine import segments
from .engine.compiling import REASON, traced
from .engine.generation import Generation, generate
from .engine.learning import Call, read_learning, read_off, with_following
from .engine.outer import check_outer
from .engine.protocol import CMSWeights
from .engine.replay import DREAMS, JOINED, KNOWN, OnSegment, ReadAndSlept, Replays, Sleep, read, sleep
from .engine.source import Source
from .engine.unread import check_read_next, left
from .guard_state import new_guard
from .identity import checksum
from .layers.autocast import in_own_dtype, without_autocast
from .layers.block import Block, HopeAttentionBlock, HopeBlock
from .layers.cms import Inner
from .layers.cms_consolidate import check_consolidation, consolidate
from .layers.embedding import ScaledEmbedding
from .layers.recording import check_recorded, check_whole
from .layers.wrapped import is_hooked, normed, placement, project, token_vectors
from .model_state import MixerState, ModelState
from .ops.cms.level import Level
from .ops.cms.state import CMSState
from .ops.linear.backends import resolve
from .session_bytes import session_bytes
from .state import Counters
from .tracing import constant_result


class Asked(NamedTuple):
    """Arguments of the model's ``forward``, where they are explained."""

    learn: str
    backend: str | None
    check_finite: bool
    wavefront: int | None
    output: str
    following: Tensor | None
    guard: bool | None
    embeds: Tensor | None
    outer: str | None = None


class HopeForCausalLM(nn.Module):
    """A HOPE language model (Nested Learning section 8.3): vocab_size -> d_model, num_layers blocks, final
    RMSNorm, head. ``text_files``: what its folder says about text (``text/files.py``), for the next folder.

    Raises ValueError from the configuration. ``HopeForCausalLM.from_pretrained(name_or_folder)`` loads saved
    weights.
    """

    holds: bool = True  # whether a segment that ends with a call keeps its activations until the next one
    # What calls a block in training, with the block and its arguments: ``torch.utils.checkpoint.checkpoint``, say
    checkpoint: Callable[..., Any] | None = None
    # What divides the model over processes, where something does (``hope_kernels.parallel``): asked before every call
    parallel: Any = None

    def __init__(self, config: HopeConfig, device=None, dtype=None):
        super().__init__()
        self.config = config
        self.text_files: dict[str, bytes] = {}
        kw: dict[str, Any] = {"device": device, "dtype": dtype}
        block = HopeAttentionBlock if config.mixer == "attention" else HopeBlock
        self.embed = (
            nn.Embedding(config.vocab_size, config.d_model, **kw) if config.embed_scale == 1
            else ScaledEmbedding(config.vocab_size, config.d_model, config.embed_scale, **kw)
        )
        blocks = nn.ModuleList(block(own, cms, **kw) for own, cms in zip(config.blocks, config.block_cms))
        self.blocks = cast("Sequence[Block]", blocks)  # which PyTorch knows as modules of any kind
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps, **kw)
        self.head = (
            None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False, **kw)
        )
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
        return self.config.learns

    @property
    def plain(self) -> bool:
        """Whether a call is what this class says: no subclass, no hooks, no ``forward`` of its own."""
        return type(self) is HopeForCausalLM and not is_hooked(self)

    @property
    def parts(self) -> int:
        """Over how many processes heads and hidden units are divided."""
        return 1 if self.parallel is None else self.parallel.parts

    def init_state(self, batch: int, device=None) -> ModelState:
        """State of ``batch`` sequences that have read nothing, in the dtype of the weights. Raises ValueError."""
        check_batch("HopeForCausalLM.init_state", batch)
        device = placement(self.embed).device if device is None else torch.device(device)
        mixers = [b.mixer.init_state(batch, device) for b in self.blocks]
        cms = [None if b.cms is None else b.cms.init_state(batch, device) for b in self.blocks]
        ids = torch.zeros(batch, self.segment if self.learns else 0, dtype=torch.long, device=device)
        zero = [0] * batch
        snapshot = [m.snapshot() for m in mixers] if self.learns else []
        state = ModelState(
            Counters(zero), self.config, mixers, cms, Counters(zero), ids, snapshot, parts=self.parts
        )
        state.owned_by(self)
        if any(m.fingerprint is not None for m in mixers):  # they hold the model's weights already
            state.fingerprint = checksum(self)
        return state

    @in_own_dtype
    def forward(
        self, ids: Tensor, state: ModelState | None = None, lengths=None, learn: str = "off",
        backend: str | None = None,
        *, check_finite: bool = False, wavefront: int | None = None, output: str = "logits",
        following: Tensor | None = None, guard: bool | None = None, embeds: Tensor | None = None,
        outer: str | None = None,
    ) -> tuple[Any, ModelState]:
        """Reads T tokens per row.

        ids: [B, T] int64. state: from ``init_state``, an earlier call or a file; None starts new sequences.
        lengths: [B], tokens of each row that count. learn: "off" reads with the CMS weights as they are;
        "next_token" refreshes every level at its period, from the model's own next-token loss. wavefront: where
        nothing learns, read with the blocks side by side over pieces of so many tokens (``engine/wavefront.py``).
        following: [B] int64, the token after each row's ids where that is known already, -1 where it is not; it
        is taken at its word. A segment that ends with ids is then learned at once. output: "losses" returns,
        in place of logits, ``Losses``: nats [B, T], fp32 (fp64 for fp64), the loss of predicting the token
        after each one (of a row's last one: ``following``; 0 where it is unknown), and last [B, vocab_size],
        the logits after each row's last token. Logits of a whole call then are never held. guard: True: what is
        learned is watched from here on, and taken back where it reads worse than the model's own weights
        (``engine/guard.py``; ``state.rollbacks`` counts); False: no more; None: as the state has it. embeds:
        [B, T, d_model], read in place of the vectors of ids where nothing learns; the values of ids then mean
        nothing. outer: in grad mode with learn="next_token", how the graph goes through what is learned:
        "first_order", "second_order" (docs/training.md); None: rows that have learned are constants of it.

        Returns logits [B, T, vocab_size] (zero where padded) and the state: under no_grad the given one,
        advanced in place; in grad mode a new one. Where the state has an ``unread`` token, ids begin with it.
        With learn="next_token" under no_grad, a segment that is read whole and ends with ids without a
        ``following`` is learned by the next call, from the activations kept beside the state until then; set
        the model's ``holds`` to False, and they are computed again.
        Under ``torch.compile``, ``engine/compiling.py`` says which calls are compiled.
        Raises ValueError for ids out of range (on a device or compiled only with check_finite: looking costs
        a sync), shapes, lengths, an unknown ``learn`` or ``output``, a wavefront that is to learn or to carry
        gradients, a state of another model, ids that do not begin with the state's ``unread`` token (not
        looked at when compiled), a given state inside an ``autograd.Function`` (reentrant activation
        checkpointing), and with check_finite for non-finite logits; the given state is then as it was.
        """
        asked = Asked(learn, backend, check_finite, wavefront, output, following, guard, embeds, outer)
        if torch.compiler.is_compiling() and (
            output != "logits" or self.parallel is not None or not traced(self, ids, state, learn, backend)
        ):
            _prepare()
            return _untraced(self, ids, state, lengths, asked)
        return self._forward(ids, state, lengths, asked)

    def _forward(
        self, ids: Tensor, state: ModelState | None, lengths: Any, asked: Asked
    ) -> tuple[Any, ModelState]:
        name, given = "HopeForCausalLM", state
        learn, backend, check_finite, wavefront, output, following, guard, embeds, outer = asked
        check_tensor(name, "ids", ids, ("B", "T"), dtype=torch.int64, device=placement(self.embed).device)
        lengths = check_lengths(name, lengths, *ids.shape)
        if guard not in (None, True, False):
            raise ValueError(f"{name}: argument guard is {guard!r}, expected True, False or None")
        if learn not in ("off", "next_token"):
            raise ValueError(f"{name}: argument learn is {learn!r}, expected 'off' or 'next_token'")
        if output not in ("logits", "losses"):
            raise ValueError(f"{name}: argument output is {output!r}, expected 'logits' or 'losses'")
        if following is not None:
            check_tensor(name, "following", following, ids.shape[:1], torch.int64, ids.device)
            self._check_tokens(name, "following", following, -1)
        if ids.numel() and (check_finite or ids.device.type == "cpu" and not torch.compiler.is_compiling()):
            self._check_tokens(name, "ids", ids, 0)
        check_recorded(name, given)
        if state is None:
            state = self.init_state(ids.shape[0])
        else:
            self._admit(name, state, ids.shape[0])
            if not torch.compiler.is_compiling():
                check_read_next(name, state.unread, ids, lengths)
        learning = learn == "next_token" and self.learns
        if wavefront is not None and learning:
            raise ValueError(f"{name}: argument wavefront is {wavefront}, expected None with learn='next_token': "
                             "a segment's loss is known after the last block has read it, and the first one may "
                             "not read on before")
        if embeds is not None:
            like = placement(self.embed)
            check_tensor(name, "embeds", embeds, (*ids.shape, self.config.d_model), like.dtype, like.device)
            if learning:
                raise ValueError(f"{name}: argument embeds is given, expected None with learn='next_token': what "
                                 "learns predicts ids")
        if outer is not None:
            check_outer(name, self, state, outer, learn, guard)
        in_place = given is not None and not torch.is_grad_enabled()
        tokens, known = with_following(ids, lengths, following)
        if self.parallel is not None:
            self.parallel.check(name, self, ids, state, lengths, known, asked)
        call = Call(ids, lengths, tokens, known, output == "losses", backend, check_finite, wavefront, embeds, outer)
        with state.reading(name, self, in_place or given is None):
            held = state.take_held(self) if in_place else None
            if given is not None and not in_place:
                state = given.apart()
            before, state = state, continued(self, state)
            held = held if before is state else None
            if guard is False and state.guard is not None:
                state = replace(state, guard=None)
            if learning:
                self._check_whole(name)
                if guard and state.guard is None:
                    state = replace(state, guard=new_guard(self.config, state.batch, ids.device))
                found, new, held = read_learning(self, call, state, held)
            else:
                found, new = read_off(self, call, state)
                held = None
            new = replace(new, unread=left(state.unread, lengths))
            if given is not None and given._told is not None:
                given._told.hear(new.pos, found)
            new = given.assign(new) if given is not None and in_place else new
            if held is not None:
                new.hold(self, held)
            return found, new

    @torch.no_grad()
    @without_autocast
    def flush(self, state: ModelState, backend: str | None = None) -> list[int]:
        """Learns the open segment of every row now, at the end of a document say, in place: how many tokens of
        each row have contributed.

        Of a segment's n tokens the losses of n - 1 are known, those that predict its other tokens; with less
        than two tokens nothing happens, nor where a token of it was read with learn="off". At a multiple of
        the segment everything is done that is due there; elsewhere the levels take a step whose period is the
        segment, and the others keep the gradient. What is read afterwards, up to the next multiple, is a
        segment of its own, and learned there. Raises as ``forward`` does; the state is then as it was.
        """
        name = "HopeForCausalLM.flush"
        check_recorded(name, state)
        self._admit(name, state, getattr(state, "batch", 0))
        if self.parallel is not None:
            self.parallel.check_flush(name, self, state)
        if not self.learns:
            return [0] * state.batch
        with state.reading(name, self):
            state.drop_held()
            self._check_whole(name)
            draft, count = segments.flush(self, segments.draft(continued(self, state)), backend)
            state.assign(segments.finished(draft))
        return count

    def _check_whole(self, name: str) -> None:
        for block in self.blocks if self.parallel is None else ():
            check_whole(name, block, "and learn='next_token' learns beside it; hope_kernels.parallel.fully_shard_hope "
                                     "shards a model that learns, or pass learn='off'")

    def _check_undivided(self, name: str, what: str) -> None:
        if self.parallel is not None:
            self.parallel.refuse(f"HopeForCausalLM.{name}", what)

    def _check_tokens(self, name: str, argument: str, ids: Tensor, least: int) -> None:
        low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (least, least)
        if low < least or high >= self.config.vocab_size:
            token, size = low if low < least else high, self.config.vocab_size
            raise ValueError(f"{name}: argument {argument} has token {token}, expected {least} to {size - 1}")

    def claim(self, op: str, state: ModelState) -> None:
        """``state`` belongs to these weights from here on. Raises TypeError or ValueError, in the name of
        ``op``, where this model may not read it."""
        self._admit(op, state, state.batch)
        self._settle(state)
        state.owned_by(self)
        state.fingerprint = checksum(self)

    def reading(self, op: str, state: ModelState) -> AbstractContextManager[None]:
        """The context in which this model advances ``state`` in place: see ``State.reading``."""
        return state.reading(op, self)

    def _admit(self, op: str, state: ModelState, batch: int) -> None:
        """Raises TypeError or ValueError, in the name of ``op``, unless this model may read ``state``."""
        check_state(op, state, ModelState, self.config, batch)
        like = placement(self.embed)
        state.admit(op, self, like.dtype, like.device)

    def _settle(self, state: ModelState) -> None:
        """An admitted ``state`` has this model's settings from here on, in place."""
        new = continued(self, state)
        if new is not state:
            state.assign(new)

    def state_bytes(self, batch: int = 1, tokens: int = 0) -> dict[str, int]:
        """Bytes of a state of ``batch`` sequences that have read ``tokens`` tokens and learned in every level,
        by what they are for: what the CMS of all blocks hold (see ``ContinuumMemory.state_bytes``), ``mixers``
        (memories, and their copy at a segment's start; keys and values, whose buffers grow ahead of need, to
        twice that at most) and the token ids of the open ``segment``. Beside that a guard keeps at most one more
        copy of what was learned, in the dtype of the weights, and ``read(replay=k)`` k (2 C + 1) numbers a row.
        Raises ValueError."""
        check_batch("HopeForCausalLM.state_bytes", batch)
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
            raise ValueError(f"HopeForCausalLM.state_bytes: argument tokens is {tokens!r}, expected an integer >= 0")
        return session_bytes(self, batch, tokens)

    @without_autocast
    def levels(self, state: ModelState) -> list[list[Level] | None]:
        """The CMS weights in force, per block."""
        return [None if c is None or b.cms is None else b.cms.effective_levels(c)
                for b, c in zip(self.blocks, state.cms)]

    def run(
        self, h: Tensor, mixers: list[MixerState], cms: Sequence[CMSWeights], lengths: list[int],
        backend: str | None = None, inner: list[Inner] | None = None,
    ) -> tuple[Tensor, list[MixerState]]:
        """All blocks over h [B, T, d_model], functionally: (h, new mixer states). mixers: their states; cms:
        the states of their CMS, or ``levels``; inner: the pass that learns, block by block. Each as a block's
        ``forward`` takes it."""
        new, checkpoint = [], None
        if torch.is_grad_enabled() and inner is None:
            checkpoint = self.checkpoint
            # A checkpointed block reads again in the backward: what it is given stays as it is until then,
            # whoever advances the results.
            mixers, cms = [m.snapshot() for m in mixers], [c.clone() if isinstance(c, CMSState) else c for c in cms]
        for block, mixer, one, part in zip(self.blocks, mixers, cms, inner or [None] * len(self.blocks)):
            arguments = h, mixer, one, lengths, backend, part
            h, mixer = block(*arguments) if checkpoint is None else checkpoint(block, *arguments)
            new.append(mixer)
        return h, new

    def logits(self, h: Tensor, lengths: list[int], backend: str | None = None) -> Tensor:
        ops = resolve(Request(self.config, h.dtype, h.device, gradient(False)), backend)
        h = normed(self.norm, h, ops)
        if self.head is None:
            logits = ops.linear(h, token_vectors(self.embed, self.config.vocab_size, self.config.embed_scale))
        else:
            logits = project(self.head, h, ops)
        T = h.shape[1]
        if min(lengths, default=T) < T:
            count = torch.tensor(lengths, dtype=torch.long, device=h.device).unsqueeze(1)
            valid = torch.arange(T, device=h.device) < count
            logits = logits * valid.unsqueeze(-1).to(logits.dtype)
        return logits

    def generate(
        self, ids: Tensor | Source | None, max_new_tokens: int, state: ModelState | None = None, **options: Any
    ) -> Generation:
        """Continues ``ids`` [B, T]; see :func:`hope_kernels.generation.generate`."""
        return generate(self, ids, max_new_tokens, state, **options)

    @without_autocast
    def read(self, ids: Tensor | Source, state: ModelState | None = None, **options: Any) -> ReadAndSlept:
        """Reads ids [B, T], and learns: ``hope_kernels.generation.read`` with learn="next_token" unless told
        otherwise, and then, if asked to, ``flush`` and ``replay``.

        ids, state, lengths, learn, backend, piece, on_piece, check_finite, last, should_stop, wavefront, unread,
        guard: as there. replay=k: each row keeps at most k of the segments it learns, of all it has learned each with
        the same probability; from then on the state has them, in files too, k (2 C + 1) numbers a row. passes=n:
        the kept segments are then learned again n - 1 times, shuffle=True: in a new order every time (see
        ``replay``). flush: whether the unfinished segment at the end is learned and kept as well; None: if
        passes > 1. seed: any int, of what is kept and of the orders. part, dreams, known, fade, rate, share, joined:
        of ``replay``.
        should_stop is also asked before every replayed segment. The same call goes on where it was stopped,
        with the rest of ids (``ids[:, reading.tokens:]``, which may be none), also in another process.

        Returns a ``Reading`` with ``sleep``, what ``replay`` returns (None without passes).
        Raises ValueError for passes without anything to keep or kept, replay with learn="off" or other than
        what the state keeps already, and what those three raise.
        """
        return read(self, ids, state, **options)

    @without_autocast
    def replay(
        self, state: ModelState, passes: int = 1, shuffle: bool = True, seed: int = 0, *,
        should_stop: Callable[[], bool] | None = None, on_segment: OnSegment | None = None,
        backend: str | None = None, part: int | None = None, dreams: int = DREAMS, known: float = KNOWN,
        fade: bool = True, rate: float = 1.0, share: float = 1.0, joined: float = JOINED,
    ) -> Sleep:
        """Learns the segments that ``state`` keeps (``read(..., replay=k)``) again, ``passes`` times, in place
        and without reading anything: ``engine/replay.py`` says what that means.

        shuffle: each pass in an order of its own, by a hash of seed and pass; else in the order of the text.
        part: a segment is cut into parts of at most so many tokens, elsewhere in every pass (None: 24, or 96 of a
        vocabulary of bytes; 0: it stays whole), so that its facts are learned apart from what surrounds them.
        joined: with that probability the parts of a replay are read one behind another, in a random order, as what
        comes after other text; else each by itself, as the beginning of a text. dreams: with each replay a text that
        the model's own weights wrote is read, and held to what they say of it (0: none), so that the model stays
        what it was elsewhere; so many are written at once, the same ones for a seed, and new ones when each has been
        read. known: a token that is likelier than that is not learned again (1: every token is). fade: the rates fall
        evenly to 0 over the ``passes``, from ``rate`` times those of reading. share: of the kept text only so much
        is replayed, the parts that surprise the model's own weights most (``engine/surprise.py``), as many of them
        at once as make up a segment.
        should_stop is asked before every segment; on_segment(replays of row 0 done, of how many) is called
        after it. A state that was stopped, also one from a file, goes on with the same arguments where it was,
        unless it has learned more text since. A replay that raises leaves the state as the last one left it.
        Where nothing is kept, nothing happens.
        Raises ValueError for arguments out of range, and as ``forward`` does.
        """
        self._admit("HopeForCausalLM.replay", state, getattr(state, "batch", 0))
        return sleep(self, state, Replays(
            passes=passes, shuffle=shuffle, seed=seed, should_stop=should_stop, on_segment=on_segment,
            backend=backend, part=part, dreams=dreams, known=known, fade=fade, rate=rate, share=share,
            joined=joined,
        ))

    def resized(self, size: int) -> None:
        """The configuration follows an embedding (and a head, where there is one) of ``size`` tokens, which the
        caller has put in place. States from before belong to the model as it was."""
        self.config = self.config.replace(vocab_size=size)
        for block, own in zip(self.blocks, self.config.blocks):
            if self.config.mixer == "attention":  # whose states know the whole configuration
                mixer: Any = block.mixer
                mixer.config = own

    @without_autocast
    def consolidate(self, state: ModelState, row: int = 0, levels: list[int] | None = None) -> None:
        """Makes what ``row`` of ``state`` has learned in the CMS levels (indices; None: all) the model's own
        weights, in place: see ``ContinuumMemory.consolidate``. Save the model afterwards; sessions saved
        before belong to the weights as they were."""
        self._check_undivided("consolidate", "consolidate")
        self._admit("HopeForCausalLM.consolidate", state, state.batch)
        check_index("HopeForCausalLM.consolidate", "row", row, state.batch)
        most = max((c.num_levels for c in self.config.block_cms if c is not None), default=0)
        for l in levels or ():
            check_index("HopeForCausalLM.consolidate", "levels", l, most)
        self._settle(state)
        # all blocks are asked before the first one is changed
        for act, block, cms in [
            (act, *of) for act in (check_consolidation, consolidate) for of in zip(self.blocks, state.cms)
        ]:
            if cms is not None:
                wanted = None if levels is None else [l for l in levels if l < cms.config.num_levels]
                act(block.cms, cms, row, wanted)
        state.adopt(self)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes ``config.json``, ``model.safetensors``, ``text_files`` and what transformers needs to read the
        folder (``hub.py``) into ``folder``, each atomically.
        Raises ValueError, and writes nothing, where submodules have been wrapped, quantized or parametrized: the
        configuration, and so ``from_pretrained``, knows nothing of that."""
        self._check_undivided("save_pretrained", "save_pretrained")
        pretrained.save(self, folder, type(self) is HopeForCausalLM)

    def with_fixed_rates(self) -> HopeForCausalLM:
        """A model of the same weights, whose learned rates (``CMSConfig(lr="learned")``) are numbers of its
        configuration, level by level and matrix by matrix; it reads states of this one after ``state.adopt``. Raises
        ValueError without a CMS, or with ``learn_blocks``."""
        return pretrained.with_fixed_rates(self)

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike, device=None, dtype: torch.dtype | None = None
    ) -> HopeForCausalLM:
        """Loads a folder written by ``save_pretrained``, or a bundled model by name (``bundled_models()``).

        Raises FileNotFoundError for an unknown name or folder, ValueError for files that do not fit together,
        are damaged, or are a model of transformers (which ``python -m hope_kernels convert`` takes).
        """
        return pretrained.load(cls, name, device, dtype)


_untraced: Any = None  # ``HopeForCausalLM._forward`` as the compiler runs it without a look inside


@constant_result
def _prepare() -> bool:
    """Makes ``_untraced``, which the compiler asks for while it traces."""
    global _untraced
    if _untraced is None:
        _untraced = torch.compiler.disable(HopeForCausalLM._forward, reason=REASON)
    return True
