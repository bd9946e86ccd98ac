"""ModelState: what sequences have learned in a whole model, as the states of its blocks and the open segment
of a model that learns."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor, nn

from .check import check_counters, check_part
from .differences import described, differences
from .guard_state import GuardState, new_guard
from .identity import checksum
from .kept import KeptSegments
from .layers.attention import AttentionState
from .layers.block import Block
from .ops.cms.state import CMSState
from .ops.titans.state import TitansState
from .state import Counters, State

MixerState = TitansState | AttentionState
TAINTED = -1  # ``ModelState.seen`` of a row whose open segment holds a token read with learn="off"


@dataclass(eq=False)
class ModelState(State):
    """What a batch of sequences has learned in a whole model.

    mixers, cms: one state per block (None without a CMS). For learn="next_token" only: ``ids`` [B, C] int64,
    the tokens of the open segment, which began at the last multiple of C or where the one before was flushed,
    and ends at the next multiple; ``seen`` how many of them (or ``TAINTED``, -1: one was read with
    learn="off"), ``snapshot`` the mixers at its start. ``unread`` [B, 1] int64: the last token ``generate``
    returned, which the state has not read; -1 in rows that have read it since, None if all have. ``guard``: what
    ``engine/guard.py`` keeps, a GuardState (None: learning is not guarded). ``kept``: the segments that are
    kept to be replayed (None: none are).
    """

    mixers: list[MixerState]
    cms: list[CMSState | None]
    seen: Counters
    ids: Tensor
    snapshot: list[MixerState]
    unread: Tensor | None = None
    guard: GuardState | None = None
    kept: KeptSegments | None = None

    @property
    def rollbacks(self) -> list[int]:
        """How often the guard has taken each row back to its last good weights."""
        return [0] * self.batch if self.guard is None else list(self.guard.rollbacks)

    # No fields, so no copy has them: the graph of open segments that were read whole, for the next call alone; and whom
    # a call tells what it makes of its tokens before the state has read them (``engine/writing.py``)
    _held = None
    _told = None

    def hold(self, module: nn.Module, graph: Any) -> None:
        """Keeps ``graph``, which belongs to this state as it is and to ``module``'s weights as they are."""
        self._held = graph, module, checksum(module), self._marks(), os.getpid()

    def take_held(self, module: nn.Module) -> Any:
        """What ``hold`` was given, once; None where the state or the weights have changed since."""
        if torch.compiler.is_compiling():
            return None
        held, self._held = self._held, None
        if held is None:
            return None
        graph, owner, mark, marks, process = held  # a forked process has not the threads that a graph counts on
        same = owner is module and mark is not None and checksum(module) is mark and self._marks() == marks
        same = same and process == os.getpid()
        return graph if same else None

    def drop_held(self) -> None:
        """Frees what ``hold`` was given."""
        self._held = None

    def _marks(self) -> tuple:
        versions = [(id(t), -1 if t.is_inference() else t._version) for t in self.tensors()]
        return versions, list(self.pos), list(self.seen)

    def followed(self, module: Any) -> ModelState:
        """This state where rows that deviate from the model's weights (after calls with ``outer``) deviate by as much
        from these as they are now; itself where they have not moved. Raises ValueError where a guard keeps weights
        that have not."""
        if all([c is None or c.base is None for c in self.cms]):
            return self
        blocks = cast("Iterable[Block]", module.blocks)
        cms = [c if c is None or b.cms is None else b.cms.followed(c) for b, c in zip(blocks, self.cms)]
        if all(map(is_, cms, self.cms)):
            return self
        moved = any(a is not None and b is not None and a.weights is not b.weights for a, b in zip(cms, self.cms))
        if self.guard is not None and moved:
            raise ValueError("HopeForCausalLM: argument state holds deviations from weights that have moved since, and "
                             "a guard, whose good weights have not; state.guard = None forgets what it keeps")
        return replace(self, cms=cms)

    def adopt(self, module: nn.Module) -> None:
        """As for any state. Rows that hold deviations from the model's weights (after calls with ``outer``) have
        them from the weights as they are now, so that a file made next goes on with these."""
        new = self.followed(module)
        super().adopt(module)
        for cms, moved in zip(self.cms, new.cms):
            if cms is not None and moved is not None:
                cms.assign(moved)

    def merge(self, other, rows: list[bool]):
        deviates = any(c is not None and c.base is not None for c in (*self.cms, *other.cms))
        marks = {str(s.fingerprint) for s in (self, other) if s.fingerprint is not None} if deviates else {}
        if len(marks) > 1:
            raise ValueError(f"ModelState.merge: the rows deviate from other weights ({' and '.join(sorted(marks))}); "
                             "state.adopt(model) takes either of them to the model's own")
        # one side may have tensors that the other lacks, or wider ones: the parts merge as states of their own
        mine, theirs = self._alike([self, other])
        pairs = {name: zip(getattr(mine, name), getattr(theirs, name)) for name in ("mixers", "snapshot", "cms")}
        parts = {name: [a if a is None else a.merge(b, rows) for a, b in of] for name, of in pairs.items()}
        mine, theirs = (replace(s, mixers=[], snapshot=[], cms=[]) for s in (mine, theirs))
        return replace(State.merge(mine, theirs, rows), **parts)._tidied()

    def owned_by(self, module: nn.Module) -> None:
        self.owner = module
        blocks = cast("Iterable[Block]", module.blocks)  # of a model; PyTorch knows no types of submodules
        for block, mixer, cms in zip(blocks, self.mixers, self.cms):
            parts = block._modules  # a module's own access to them costs microseconds, and every token asks
            mixer.owner = parts["mixer"] if "mixer" in parts else block.mixer
            if cms is not None:
                cms.owner = parts["cms"] if "cms" in parts else block.cms

    def input_dtype(self) -> torch.dtype | None:
        return (
            self.mixers[0].input_dtype() if isinstance(self.mixers, list) and self.mixers
            and isinstance(self.mixers[0], State) else None
        )

    def _check(self, where: str, dtype: torch.dtype | None, device: torch.device, values: bool) -> None:
        c, C = self.config, self.config.segment if self.config.learns else 0
        kind = AttentionState if c.mixer == "attention" else TitansState
        snapshots = [kind] * c.num_layers if C else []
        held = {
            "mixers": [kind] * c.num_layers, "cms": [None if of is None else CMSState for of in c.block_cms],
            "snapshot": snapshots
        }
        for name, kinds in held.items():
            found = getattr(self, name)
            if not isinstance(found, list) or len(found) != len(kinds) or not all(
                isinstance(s, type(None) if kind is None else kind) for s, kind in zip(found, kinds)
            ):
                raise ValueError(
                    f"{where}: state.{name} does not hold what the {c.num_layers} blocks of its configuration need"
                )
        check_part(where, "ids", self.ids, (self.batch, C), torch.int64, device)
        if self.unread is not None:
            check_part(where, "unread", self.unread, (self.batch, 1), torch.int64, device)
        if not torch.compiler.is_compiling():
            check_counters(where, "pos", self.pos, self.batch, 0)
            check_counters(where, "seen", self.seen, self.batch, TAINTED if C else 0, C)
        if self.kept is not None:
            if not isinstance(self.kept, KeptSegments) or self.kept.batch != self.batch:
                raise ValueError(f"{where}: state.kept does not hold segments of {self.batch} rows")
            self.kept._check(f"{where}: kept", None, device, values)
        for name in held:
            for i, state in enumerate(getattr(self, name)):
                if state is not None:
                    self._check_inner(f"{where}: {name}[{i}]", i, name, state, dtype, device, values)
        if torch.compiler.is_compiling():
            return
        for b, (pos, seen) in enumerate(zip(self.pos, self.seen)):
            # it begins at a multiple of C, or where the one before was flushed
            if C and seen > min(pos, (pos - 1) % C + 1) or seen == TAINTED and not pos % C:
                raise ValueError(f"{where}: state.seen is {seen} for row {b}, which is no count of an open segment of "
                                 f"{C} tokens at {pos}")
            for s in self.snapshot if seen > 0 else ():
                if s.pos[b] != pos - seen:
                    raise ValueError(f"{where}: state.snapshot of row {b} stands at {s.pos[b]}, expected {pos - seen}, "
                                     "its segment's start")
        if self.guard is not None:
            if not isinstance(self.guard, GuardState) or not isinstance(self.guard.pos, list) or (
                self.guard.batch != self.batch
            ):
                raise ValueError(f"{where}: state.guard is not that of {self.batch} sequences")
            self.guard._check(f"{where}: guard", dtype, device, values)
        if values:
            for name, ids, low in (("ids", self.ids, 0), ("unread", self.unread, -1)):
                if ids is not None and ids.numel() and not low <= int(ids.min()) <= int(ids.max()) < c.vocab_size:
                    raise ValueError(f"{where}: state.{name} has a token outside {low} to {c.vocab_size - 1}")

    def _check_inner(
        self, where: str, i: int, name: str, state: State, dtype: torch.dtype | None, device: torch.device,
        values: bool,
    ) -> None:
        c = self.config
        wanted = c.block_cms[i] if name == "cms" else c.blocks[i] if c.mixer == "attention" else c.titans
        if state.config is not wanted and state.config != wanted:
            found = differences(state.config, wanted, every=True)
            raise ValueError(f"{where} of state {described(found, state.config, wanted)}, its model's")
        if not isinstance(state.pos, list):
            raise ValueError(f"{where} of state has pos {state.pos!r}, expected one integer per row")
        compiling = torch.compiler.is_compiling()
        if state.batch != self.batch or name != "snapshot" and not compiling and state.pos != self.pos:
            raise ValueError(f"{where} of state stands at {list(state.pos)}, and the model's state at {list(self.pos)}")
        if name == "snapshot" and isinstance(state, AttentionState):  # storage of other rows has moved on
            state._check(where, dtype, device, values, [b for b, seen in enumerate(self.seen) if seen > 0])
        else:
            state._check(where, dtype, device, values)

    def _distinct(self) -> list[Tensor]:
        # attention's snapshots share what is only ever appended to
        return replace(self, snapshot=[]).tensors() if self.config.mixer == "attention" else self.tensors()

    @classmethod
    def _alike(cls, states: list[ModelState]) -> list[ModelState]:
        """With an unread token, a guard, where one of them has any."""
        where, unread = "State.join, State.merge", any(s.unread is not None for s in states)
        if len({s.kept is None for s in states}) > 1:
            held = [i for i, s in enumerate(states) if s.kept is not None]
            raise ValueError(f"{where}: states {held} keep segments of what they learn, the others do not; "
                             "state.kept = None forgets them")
        if any(s.guard is not None for s in states):
            learned = [i for i, s in enumerate(states) if s.guard is None and s.has_learned]
            if learned:
                raise ValueError(f"{where}: states {learned} have learned without a guard, others with one; a "
                                 "call with learn='next_token' and guard=True or False gives all the same")
            like = states[0].ids.device
            states = [s if s.guard else replace(s, guard=new_guard(s.config, s.batch, like)) for s in states]
        if unread:
            states = [s if s.unread is not None else replace(s, unread=s.ids.new_full((s.batch, 1), -1))
                      for s in states]
        return states

    @property
    def has_learned(self) -> bool:
        """Whether some row has a gradient or a weight of its own in some level of a CMS."""
        levels = [level for c in self.cms if c for part in (c.own, c.rank, c.dirty) for level in part]
        return any(map(any, levels))

    def _tidied(self):
        """Attention's snapshots share the storage of its present states, as those of one call do."""
        if self.config.mixer != "attention":
            return self
        none, pairs = [False] * self.batch, list(zip(self.snapshot, self.mixers))

        def shared(old: Any, now: Any) -> Any:
            return old.caught_up(now, none) if now.holds(old, self.seen) else old

        return replace(self, snapshot=[shared(old, now) for old, now in pairs])

    def _lean(self):
        mixers, snapshot = ([m._lean() for m in of] for of in (self.mixers, self.snapshot))
        unread = None if self.unread is None or bool((self.unread < 0).all()) else self.unread
        cms, guard = [c and c._lean() for c in self.cms], self.guard and self.guard._lean()
        return replace(self, mixers=mixers, snapshot=snapshot, cms=cms, guard=guard, unread=unread)._tidied()

    def apart(self):
        """The same state for a call in grad mode: independent, like ``clone``, but what attention keeps is
        not copied."""
        mixers, snapshot = ([m.snapshot() for m in of] for of in (self.mixers, self.snapshot))
        cms, unread = [c and c.clone() for c in self.cms], None if self.unread is None else self.unread.clone()
        guard = None if self.guard is None else self.guard.clone()
        counters = {n: Counters(getattr(self, n)) for n in ("pos", "seen")}
        return replace(
            self, mixers=mixers, cms=cms, ids=self.ids.clone(), snapshot=snapshot, unread=unread, guard=guard,
            kept=None if self.kept is None else self.kept.clone(), **counters
        )

    def synchronize(self):
        """As for any state. Where a replayed graph of the model has moved the mixers, the model's counters
        follow as with learn="off".

        Raises ValueError where the mixers do not stand at one place (attention keeps its position on the host
        and cannot be replayed).
        """
        super().synchronize()
        places = {tuple(m.pos) for m in self.mixers} or {tuple(self.pos)}
        if len(places) > 1:
            found = ", ".join(str(list(p)) for p in sorted(places))
            raise ValueError(f"ModelState: the blocks stand at different positions, {found}")
        lengths = [now - before for now, before in zip(*places, self.pos)]
        if any(lengths):
            self.assign(advance_off(self, self.mixers, lengths))
        return self

    def tell(self, writing: Any) -> None:
        """From here on calls tell ``writing`` what they make of their tokens; None: nobody."""
        self._told = writing

    def _owes(self) -> bool:
        return self._told is not None or super()._owes()

    def _left(self) -> None:
        if self._told is not None:
            self._told.left(self)


def advance(state: ModelState, mixers: list[MixerState], lengths: list[int]) -> ModelState:
    """The state after ``lengths`` tokens: new mixers and all counters moved."""
    def moved(pos: Counters) -> Counters:
        return Counters([p + n for p, n in zip(pos, lengths)])

    def after(c: CMSState) -> CMSState:
        if c.private is None:
            return replace(c, pos=moved(c.pos))
        c.pos = moved(c.pos)  # a draft is its call's own
        return c

    cms = [None if c is None else after(c) for c in state.cms]
    return replace(state, mixers=mixers, cms=cms, pos=moved(state.pos))


def advance_off(state: ModelState, mixers: list[MixerState], lengths: list[int]) -> ModelState:
    """``advance`` for tokens read with frozen CMS weights: the open segment, if it holds any, contributes
    nothing."""
    new = advance(state, mixers, lengths)
    return replace(new, seen=Counters(seen_off(new, lengths)))


def seen_off(state: ModelState, lengths: list[int]) -> list[int]:
    """``seen`` of ``state``, which stands after ``lengths`` tokens that were read with frozen CMS weights."""
    segment = state.ids.shape[1]
    if not segment:  # the model cannot learn
        return list(state.seen)
    return [s if n == 0 else TAINTED if p % segment else 0 for s, n, p in zip(state.seen, lengths, state.pos)]
