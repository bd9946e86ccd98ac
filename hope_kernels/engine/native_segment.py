"""A segment through a whole model, its loss, and back, in three calls of C++ (csrc/cpu/segment.h): what is read to
be learned on a CPU, and what that learns from it.

Between the calls stands what only Python knows: whether logits are to be checked, what the guard says of the losses,
and which levels are due (``ops/cms/absorb.py``). Every number is one chain of operations over its own token and row,
so what is learned does not depend on how a text is cut, on company in a batch, or on threads: not by a bit, as long as
tokens are read by such calls alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..model_state import ModelState
from ..ops.cms.plan import Plan, RowStep
from ..ops.cms.schedule import learning_levels
from ..ops.cms.state import CMSState
from ..ops.shared import cpu_library
from ..ops.shared.cpu_library import POINTER, SIZE, Function, address, row_array
from ..ops.titans.cpp import TitansCall, advanced, settings
from ..ops.titans.state import Layout, TitansState
from .head import OP, Heads, Targets, check_logits, read_head
from .native import floats, size_of, unserved
from .protocol import Model

HEAD_MOST = 4096  # tokens of a vocabulary whose head is read in C++: larger ones are PyTorch's, in pieces
_DEVIATIONS = ("delta2", "delta1", "delta1s")
_PENDING = ("pending_k", "pending_v", "pending_eta", "pending_alpha")


class _Level(ctypes.Structure):
    _fields_ = [("N", SIZE), ("learns", SIZE),
                *((n, POINTER) for n in ("gain", "up", "down", "up_step", "down_step"))]


class _Block(ctypes.Structure):
    _fields_ = [
        *((n, POINTER) for n in ("gain", "conv", "tail", "new_tail", "in_proj", "q_proj", "gate_proj", "out_proj",
                                 "out_gain")),
        ("titans", TitansCall), ("levels", SIZE), ("level", ctypes.POINTER(_Level)),
    ]


class _Call(ctypes.Structure):
    _fields_ = [
        *((n, SIZE) for n in ("B", "T", "d", "W", "vocab", "blocks", "threads")), ("keep", ctypes.c_int32),
        ("eps", ctypes.c_float), *((n, POINTER) for n in ("ids", "len", "embed", "gain", "head")),
        ("block", ctypes.POINTER(_Block)),
        *((n, POINTER) for n in ("work", "targets", "known", "logits", "nats", "last", "h", "learns", "slopes")),
    ]


_read, _head, _learn = (Function(f"hope_segment_{n}", "HopeForCausalLM", POINTER) for n in ("read", "head", "learn"))


class Reader:
    """Reads segments of ``model`` for one call, in C++ where that serves it. reason: why it does not, or None."""

    def __init__(self, model: Any, backend: str | None):
        self.model, self.reason = model, unserved(model, backend) or _cms_unserved(model)
        self.spare: Tensor | None = None  # memory of an earlier reading, which nobody needs any more
        if self.reason is None:
            self._prepare(model)

    def serves(self, state: ModelState) -> bool:
        """Whether it reads with what ``state`` has learned."""
        return self.reason is None and not any(c is not None and any(map(any, c.rank)) for c in state.cms)

    def _prepare(self, model: Any) -> None:
        """What is the same in all readings."""
        config, self._held = model.config, []
        d, V = config.d_model, config.vocab_size
        head = model.embed.weight if model.head is None else model.head.weight
        self._blocks, self.matrices, self.levels = (_Block * len(model.blocks))(), [], []
        for block, to in zip(model.blocks, self._blocks):
            self._constants(to, block, d)
        self._call = _Call(
            d=d, W=config.titans.conv_window or 0, vocab=V, blocks=len(model.blocks), threads=torch.get_num_threads(),
            eps=config.norm_eps, embed=self._at(model.embed.weight, V * d), gain=self._at(model.norm.weight, d),
            head=self._at(head, V * d),
        )

    def _at(self, t: Tensor | None, count: int) -> int | None:
        self._held.append(t)
        return address(t, count)

    def _constants(self, to: _Block, block: Any, d: int) -> None:
        mixer, c = block.mixer, block.mixer.config
        for name in ("in_proj", "q_proj", "gate_proj", "out_proj"):
            module = getattr(mixer, name)
            setattr(to, name, None if module is None else self._at(module.weight, d * d))
        to.gain, to.out_gain = self._at(block.norm.weight, d), self._at(mixer.norm_gain, d)
        to.conv = self._at(mixer.conv, (c.conv_window or 1) * d)
        where: dict[str, Any] = {"eta_bias": self._at(mixer.eta_bias, c.num_heads),
                                 "alpha_bias": self._at(mixer.alpha_bias, c.num_heads)}
        if c.retain_to == "init":
            shapes = Layout.of(c).shapes(c.num_heads)
            for name, t, shape in zip(("base2", "base1", "base1s"), mixer.w_init, shapes):
                where[name] = self._at(t, size_of(shape))
        to.titans = TitansCall(H=c.num_heads, update=1, **settings(c), **where)
        levels = [] if block.cms is None else [level.parameters_by_name() for level in block.cms.levels]
        own = (_Level * len(levels))()
        for at, tensors in zip(own, levels):
            at.N, at.gain = block.cms.config.hidden, self._at(tensors["norm_gain"], d)
        self.matrices.append([
            [(n, self._at(t[n], t[n].numel()), t[n].numel()) for n in ("up", "down")] for t in levels
        ])
        self.levels.append(own)
        to.levels = len(levels)

    def read(
        self, state: ModelState, mixers: Sequence[Any], ids: Tensor, lengths: list[int], among: list[int] | None,
        keep: bool
    ) -> tuple[Reading, list[TitansState]]:
        """Reads ``lengths`` tokens of each row of ids [B, n] from ``mixers``, which stay as they are, with what
        ``state`` has learned in the rows ``among`` (None: all): the reading, and the mixers after it. keep: its loss
        is to be learned."""
        return Reading.of(self, state, mixers, ids.contiguous(), lengths, among, keep)

    def work(self, size: int) -> Tensor:
        """Memory of a reading: that of one that is done, or new."""
        t, self.spare = self.spare, None
        return t if t is not None and t.numel() == size else torch.empty(size, dtype=torch.float32, device="cpu")


class Reading:
    """What a segment was read from and into."""

    @classmethod
    def of(
        cls, reader: Reader, state: ModelState, mixers: Sequence[Any], ids: Tensor, lengths: list[int],
        among: list[int] | None, keep: bool
    ) -> tuple[Reading, list[TitansState]]:
        self = cls()
        self.reader, self.ids, self.lengths, self.keep = reader, ids, lengths, keep
        (B, T), call = ids.shape, _Call.from_buffer_copy(reader._call)
        self.call, self.state, self.among = call, state, among
        self._blocks = type(reader._blocks).from_buffer_copy(reader._blocks)
        call.block = ctypes.cast(self._blocks, ctypes.POINTER(_Block))
        call.B, call.T, call.keep = B, T, keep
        call.ids = address(ids, B * T, "ids", torch.int64)
        counts = row_array(lengths, B)
        call.len, self._held = ctypes.addressof(counts), [counts]
        self._levels: list[Any] = []
        after = []
        for i, (mixer, cms) in enumerate(zip(mixers, state.cms)):
            after.append(self._memories(i, mixer, B, T))
            self._levels.append(self._weights(i, cms, range(B) if among is None else among, state.batch))
        self.work = reader.work(floats("hope_segment_floats", call))
        call.work = self.work.data_ptr()
        _read(ctypes.addressof(call))
        return self, after

    def head(
        self, targets: Targets | None, *, logits: bool, learners: list[bool] | None = None, check_finite: bool = False
    ) -> tuple[Heads, Tensor]:
        """What ``read_head`` makes of the reading; and what ``judged`` takes for slopes, where there are learners."""
        call, model, (B, T) = self.call, self.reader.model, self.ids.shape
        if call.vocab > HEAD_MOST:
            h = torch.zeros(B, T, call.d, dtype=torch.float32, device="cpu")
            call.h, call.targets, call.learns, call.slopes = h.data_ptr(), None, None, None
            _head(ctypes.addressof(call))
            heads = read_head(
                model, h, self.lengths, targets, logits=logits, learners=learners, check_finite=check_finite
            )
            return heads, h if heads.slopes is None else heads.slopes
        ragged = min(self.lengths, default=T) < T
        wanted = logits or check_finite
        made = (torch.zeros if ragged else torch.empty)(B, T, call.vocab, dtype=torch.float32, device="cpu") if wanted else None
        nats = last = None
        call.targets = call.nats = call.last = call.learns = call.slopes = None
        if targets is not None:
            nats, last = torch.zeros(B, T, dtype=torch.float32, device="cpu"), torch.zeros(B, call.vocab, dtype=torch.float32, device="cpu")
            given, known = targets.ids.contiguous(), row_array(targets.known, B)
            call.targets, call.known = address(given, B * T, "targets", torch.int64), ctypes.addressof(known)
            call.nats, call.last = nats.data_ptr(), last.data_ptr()
        marks = None if learners is None else (ctypes.c_int32 * B)(*learners)
        call.learns = None if marks is None else ctypes.addressof(marks)
        call.logits = None if made is None else made.data_ptr()
        _head(ctypes.addressof(call))
        if check_finite and made is not None:
            check_logits(made, self.lengths)
        return Heads(made if logits else None, nats, last, None), torch.zeros(B, 1, 1)

    def learn(self, rows: list[bool], slopes: Tensor, plans: list[dict[int, Plan]]) -> None:
        """The steps that ``plans`` has for the marked rows, by block and level. slopes: as ``head`` has them."""
        call, B, marks = self.call, len(rows), (ctypes.c_int32 * len(rows))(*rows)
        places = [(b, b if self.among is None else self.among[b]) for b in range(B) if rows[b]]
        held: list[Any] = []
        for levels, planned in zip(self._levels, plans):
            for l, plan in planned.items():
                for name in ("up", "down"):
                    steps = (RowStep * B)()
                    for here, b in places:
                        step = plan.steps.get((name, b))
                        if step is not None:
                            steps[here] = step
                    held.append(steps)
                    setattr(levels[l], name + "_step", ctypes.addressof(steps))
        call.learns = ctypes.addressof(marks)
        if call.vocab > HEAD_MOST:
            slopes = slopes.contiguous()
            call.slopes = address(slopes, B * call.T * call.d)
        _learn(ctypes.addressof(call))

    def done(self) -> None:
        """Nobody needs what was kept any more."""
        self.reader.spare = self.work

    def _memories(self, i: int, state: TitansState, B: int, T: int) -> TitansState:
        """The state after the reading, which is not written yet."""
        c, to = state.config, self._blocks[i]
        new, t = advanced(c, state, self.lengths), to.titans
        shapes = Layout.of(c).shapes(B, c.num_heads)
        slots = B * max(c.chunk_memory, c.chunk_other) * c.num_heads
        counts = [size_of(s) for s in shapes] + [slots * c.head_dim, slots * c.head_dim, slots, slots]
        for name, count in zip((*_DEVIATIONS, *_PENDING), counts):
            setattr(t, name, address(getattr(new, name), count))
        pos = row_array(state.pos, B)
        t.B, t.T, t.threads, t.len, t.pos = B, T, self.call.threads, self.call.len, ctypes.addressof(pos)
        tail = state.conv_tail
        if tail is not None:
            given, after = tail.detach().contiguous(), torch.empty_like(tail, requires_grad=False)
            to.tail, to.new_tail = address(given, after.numel()), after.data_ptr()
            self._held.append(given)
            new = replace(new, conv_tail=after)
        self._held += [pos, new]
        return new

    def _weights(self, i: int, state: CMSState | None, among: Sequence[int], batch: int) -> Any:
        """The levels of block ``i`` as ``state`` has them."""
        matrices, to, B = self.reader.matrices[i], self._blocks[i], len(among)
        if state is None or not matrices:
            return None
        levels = (_Level * len(matrices)).from_buffer_copy(self.reader.levels[i])
        to.level = ctypes.cast(levels, ctypes.POINTER(_Level))
        learns = learning_levels(state.config) if self.keep else []
        for l, (at, names) in enumerate(zip(levels, matrices)):
            held, mine, at.learns = state.weights[l], state.own[l], l in learns
            for name, shared, count in names:
                first = None if held is None else address(held[name], batch * count)
                rows = (ctypes.c_void_p * B)(*[first + 4 * count * b if first and mine[b] else shared for b in among])
                self._held += [rows, held]
                setattr(at, name, ctypes.addressof(rows))
        return levels


def _cms_unserved(model: Any) -> str | None:
    """Why what the CMS of ``model`` learn is not learned here, or None."""
    for block in model.blocks:
        if block.cms is None:
            continue
        if block.cms.config.precondition is not None:
            return "serves steps without precondition"
        if any(block.cms._slots(l) for l in range(block.cms.config.num_levels)):
            return "serves levels whose factors do not wait to be folded"
    return None
