"""``read FILE...``: learns documents one after another, says how well each was foreseen, keeps the session.

Each is read once, its last segment learned as it ends. What was kept of all of them (``--replay``) is then
learned again, ``--passes`` times in all, without being read.

The note in the session file of an unfinished run:

    phase         "documents"
    documents     [name, SHA-256] of each file
    plan          passes, shuffle, replay, share, seed
    at            how many documents are behind
    tokens        of the present one, from its start, that the state has read; "bytes" for a byte model
    nats, predicted          of the present document so far
    all_nats, all_predicted  of those before it
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..engine.generation import read
from .lock import held
from .meter import megabytes, resident_bytes
from .models import check_run, load_model, load_session, unread_ids, usable_device
from .parser import DTYPES
from .progress import Progress, bits, guarded
from .prompt import Prompt, prompt_for
from .session import Interrupt, SessionFile, session_path, stopped_code
from .terminal import Output, notice

KEPT = 4096  # segments, where they are to be replayed and nobody says how many
COUNTS = {"at": int, "nats": float, "predicted": int, "all_nats": float, "all_predicted": int}


@dataclass
class Sum:
    """What a reading has cost."""

    nats: float = 0.0
    predicted: int = 0

    def add(self, other: Sum) -> None:
        self.nats, self.predicted = self.nats + other.nats, self.predicted + other.predicted

    @property
    def bits(self) -> float:
        return bits(self.nats, self.predicted)


def read_command(args) -> int:
    check_run(args)
    for name, least in (("passes", 1), ("replay", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"argument --{name} is {value}, expected {least} or more")
    if not 0 < args.share <= 1:
        raise ValueError(f"argument --share is {args.share}, expected a number above 0, at most 1")
    if args.replay is None:
        args.replay = KEPT if args.passes > 1 else 0
    if args.learn == "off" and (args.passes > 1 or args.replay):
        raise ValueError("arguments --passes and --replay are about learning, expected without --learn off")
    output = Output(sys.stdout)
    documents = [[name, _hash(name)] for name in args.files]
    if args.session is None:
        return Run(args, None, output, documents).run()
    path = session_path(args.session)
    with held(path, args.session):
        return Run(args, path, output, documents).run()


def _hash(name: str) -> str:
    """Raises OSError for what cannot be read, ValueError for no regular file."""
    if os.path.exists(name) and not os.path.isfile(name):
        kind = "a folder" if os.path.isdir(name) else "no regular file"
        raise ValueError(f"{name} is {kind}, expected a document")
    with open(name, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def resumed(
    note: Any, args: Any, documents: list[list[str]], plan: list, unit: str
) -> dict | None:
    """The note, if it is one of an unfinished run of this command. Raises ValueError where the documents or
    the plan differ."""
    if not (
        isinstance(note, dict) and note.get("phase") == "documents"
        and isinstance(note.get("documents"), list)
        and all(type(note.get(k)) is t for k, t in (COUNTS | {unit: int}).items())
        and min(note["at"], note[unit], note["predicted"], note["all_predicted"]) >= 0
    ):
        return None
    was, before = note["documents"], note.get("plan")
    if isinstance(before, list) and len(before) == 4:  # from before there was a share: all
        before = [*before[:3], 1.0, before[3]]
    if was == documents and before == plan:
        return note
    if was == documents:
        what = f"it was reading with passes, shuffle, replay, share, seed {before}, not {plan}"
    elif len(was) != len(documents):
        what = f"it was reading {len(was)} documents, not {len(documents)}"
    else:
        i = next(i for i, (a, b) in enumerate(zip(was, documents)) if a != b)
        old, new = was[i][0], documents[i][0]
        what = f"{new} has changed since" if old == new else f"document {i + 1} was {old}, not {new}"
    raise ValueError(f"session {args.session} stopped while it was reading documents: {what}; give the same "
                     "documents in the same order to go on, or --no-resume to read these after what was read")


class Run:
    """The documents of one run: ``at`` are behind, of the present one ``here`` is known."""

    def __init__(self, args: Any, path: str | None, output: Output, documents: list[list[str]]):
        self.args, self.output, self.documents = args, output, documents
        self.device = usable_device(args.device)
        self.model, self.tokenizer = load_model(args.model, self.device, DTYPES.get(args.dtype))
        self.state, note = load_session(self.model, path, args.session, self.device)
        self.session, self.unit = SessionFile(path, args.save_every), self.tokenizer.unit
        self.plan = [args.passes, args.shuffle, args.replay, args.share, args.seed]
        going = None if args.no_resume else resumed(note, args, documents, self.plan, self.unit)
        self.at, self.skip, self.here, self.total = 0, 0, Sum(), Sum()
        if going:
            self.at, self.skip = going["at"], going[self.unit]
            self.here = Sum(going["nats"], going["predicted"])
            self.total = Sum(going["all_nats"], going["all_predicted"])
        self.count, self.touched = 0, False  # tokens that this run has read; whether it has learned anything
        self.prompt: Prompt | None = None

    @property
    def behind(self) -> int:
        """Tokens of the present document that have been read."""
        return self.skip if self.prompt is None else self.prompt.count

    def note(self) -> dict:
        return {"phase": "documents", "documents": self.documents, "plan": self.plan, "at": self.at,
                self.unit: self.behind, "nats": self.here.nats, "predicted": self.here.predicted,
                "all_nats": self.total.nats, "all_predicted": self.total.predicted}

    def run(self) -> int:
        began = time.perf_counter()
        failed: OSError | None = None
        with Interrupt() if self.session.path else contextlib.nullcontext() as interrupt:
            stop = interrupt or (lambda: False)
            finished = True
            try:
                while finished and self.at < len(self.documents):
                    finished = self._read(stop)
                    if finished:
                        self._report()
                finished = finished and self._replay(stop)
            except OSError as error:
                failed, finished = error, False
            if self.session.path and (finished or self.touched):
                self.session.save(self.state, None if finished else self.note())
        if failed is not None or not finished:
            self._stopped(failed, finished)
            return stopped_code(failed, interrupt)
        if not self.args.quiet:
            seconds = time.perf_counter() - began
            notice(f"read {self.count} {self.unit} in {seconds:.1f} s ({self.count / seconds:.0f}/s), "
                   f"learn={self.args.learn}, {self.total.bits:.3f} bits per {self.unit[:-1]}, memory "
                   f"{megabytes(resident_bytes())}{guarded(self.state)}"
                   + (f", session in {self.args.session}" if self.session.path else ""))
        return 0

    def _read(self, should_stop: Callable[[], bool]) -> bool:
        """The present document, from where it was left; whether to its end."""
        name = self.args.files[self.at]
        earlier, earlier_count = Sum(self.here.nats, self.here.predicted), self.count
        # within a document nothing stands in front of what is left of it
        lead = unread_ids(self.state) + ([] if self.skip else list(self.tokenizer.start_ids))
        with open(name, "rb") as file:
            self.prompt = prompt = prompt_for(self.tokenizer, name, file, b"", lead, self.device)
            prompt.skip(self.skip)
            short = os.path.basename(name)
            bar = Progress(prompt.expected, prompt.count, self.unit, self.args.quiet, short)

            def on_piece(now: int, nats: float) -> None:
                prompt.confirm(now)
                self.here = Sum(earlier.nats + nats, earlier.predicted + now - 1)
                self.count, self.touched = earlier_count + now, True
                bar.read(now, prompt.expected, bits=f"{self.here.bits:.3f}")
                if prompt.more:
                    self.session.save_if_due(self.state, self.note)

            try:
                finished = read(
                    self.model, prompt, self.state, learn=self.args.learn, backend=self.args.backend,
                    on_piece=on_piece, should_stop=should_stop, unread="included", replay=self.args.replay,
                    seed=self.args.seed, guard=not self.args.no_guard,
                ).finished
            finally:
                bar.close()
        if finished and self.args.learn != "off":
            self.model.flush(self.state, self.args.backend)
        return finished

    def _report(self) -> None:
        """The present document has been read: one line, and on to the next."""
        line = f"{self.args.files[self.at]}: {self.behind} {self.unit}, {self._bits(self.here)}\n"
        self.total.add(self.here)
        self.at, self.skip, self.here, self.prompt = self.at + 1, 0, Sum(), None
        self.output.write(line.encode("utf-8", "surrogateescape"))
        self.session.save_if_due(self.state, self.note)

    def _bits(self, of: Sum) -> str:
        return f"{of.bits:.3f} bits per {self.unit[:-1]}"

    def _replay(self, should_stop: Callable[[], bool]) -> bool:
        """Learns again what was kept; whether to the end. One line a pass, of what this run did of it."""
        if self.args.passes == 1:
            return True
        bar = Progress(None, 0, "segments", self.args.quiet, "replaying")

        def on_segment(done: int, total: int) -> None:
            self.touched = True
            bar.read(done, total)
            self.session.save_if_due(self.state, self.note)

        try:
            found = self.model.replay(
                self.state, self.args.passes - 1, self.args.shuffle, self.args.seed, should_stop=should_stop,
                on_segment=on_segment, backend=self.args.backend, share=self.args.share,
            )
        finally:
            bar.close()
        for n, (nats, predicted) in enumerate(zip(found.nats[:, 0].tolist(), found.predicted)):
            if predicted[0]:
                line = f"pass {n + 2}: {predicted[0]} {self.unit}, {self._bits(Sum(nats, predicted[0]))}\n"
                self.output.write(line.encode())
        return found.finished

    def _stopped(self, failed: OSError | None, finished: bool) -> None:
        reason = f"{failed.filename or 'standard output'}: {failed.strerror or failed}; " if failed else ""
        untouched = "" if finished or self.touched else " as it was"
        kept = f"; session in {self.args.session}{untouched}" if self.session.path else ""
        again = ", the same command goes on from there" if self.session.path and not finished else ""
        reading = self.at < len(self.documents)
        now = f"{self.behind} {self.unit} of the next" if reading else "a part of the replays"
        notice(f"hope_kernels: {reason}stopped after {self.at} of {len(self.documents)} documents and {now}"
               f"{kept}{again}")
