"""``read FILE...``: learns documents one after another, says how well each was foreseen, keeps the session.

The note in the session file of an unfinished run:

    phase         "documents"
    documents     [name, SHA-256] of each file
    plan          passes, shuffle, seed
    at            how many readings of documents are behind
    tokens        of the present one, from its start, that the state has read; "bytes" for a byte model
    nats, predicted          of the present document so far
    all_nats, all_predicted  of those before it
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import sys
import time
from dataclasses import dataclass
from typing import Any

from ..engine.generation import read
from .lock import held
from .meter import megabytes, resident_bytes
from .models import check_run, load_model, load_session, unread_ids, usable_device
from .progress import Progress, bits, guarded
from .prompt import prompt_for
from .session import Interrupt, SessionFile, session_path, stopped_code
from .terminal import Output, notice

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
    if args.passes < 1:
        raise ValueError(f"argument --passes is {args.passes}, expected 1 or more")
    output = Output(sys.stdout)
    documents = [[name, _hash(name)] for name in args.files]
    if args.session is None:
        return run(args, None, output, documents)
    path = session_path(args.session)
    with held(path, args.session):
        return run(args, path, output, documents)


def _hash(name: str) -> str:
    """Raises OSError for what cannot be read, ValueError for no regular file."""
    if os.path.exists(name) and not os.path.isfile(name):
        raise ValueError(f"{name} is {'a folder' if os.path.isdir(name) else 'no regular file'}, expected a document")
    with open(name, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def order(count: int, passes: int, shuffle: bool, seed: int) -> list[tuple[int, int]]:
    """(pass, document) of every reading, in turn."""
    found = []
    for p in range(passes):
        one = list(range(count))
        if shuffle:
            random.Random(f"{seed} {p}").shuffle(one)
        found += [(p, i) for i in one]
    return found


def resumed(note: Any, args, documents: list[list[str]], unit: str) -> dict | None:
    """The note, if it is one of an unfinished run of this command. Raises ValueError where the documents or
    the plan differ."""
    if not (
        isinstance(note, dict) and note.get("phase") == "documents" and isinstance(note.get("documents"), list)
        and all(type(note.get(k)) is t for k, t in (COUNTS | {unit: int}).items())
        and min(note["at"], note[unit], note["predicted"], note["all_predicted"]) >= 0
    ):
        return None
    plan = [args.passes, args.shuffle, args.seed]
    was = note["documents"]
    if was == documents and note.get("plan") == plan:
        return note
    if was == documents:
        what = f"it was reading with passes, shuffle, seed {note.get('plan')}, not {plan}"
    elif len(was) != len(documents):
        what = f"it was reading {len(was)} documents, not {len(documents)}"
    else:
        i = next(i for i, (a, b) in enumerate(zip(was, documents)) if a != b)
        old, new = was[i][0], documents[i][0]
        what = f"{new} has changed since" if old == new else f"document {i + 1} was {old}, not {new}"
    raise ValueError(f"session {args.session} stopped while it was reading documents: {what}; give the same documents "
                     "in the same order to go on, or --no-resume to read these after what was read")


def run(args, path: str | None, output: Output, documents: list[list[str]]) -> int:
    device = usable_device(args.device)
    model, tokenizer = load_model(args.model, device)
    state, note = load_session(model, path, args.session, device)
    going = None if args.no_resume else resumed(note, args, documents, tokenizer.unit)
    readings = order(len(documents), args.passes, args.shuffle, args.seed)
    at, skip = (going["at"], going[tokenizer.unit]) if going else (0, 0)
    total = Sum(going["all_nats"], going["all_predicted"]) if going else Sum()
    earlier = Sum(going["nats"], going["predicted"]) if going else Sum()
    session, count, began = SessionFile(path, args.save_every), 0, time.perf_counter()
    failed: OSError | None = None
    here, finished, prompt, touched = Sum(), True, None, False
    with Interrupt() if path else contextlib.nullcontext() as interrupt:
        def noted() -> dict:
            found = {"phase": "documents", "documents": documents, "at": at,
                     "plan": [args.passes, args.shuffle, args.seed], tokenizer.unit: prompt.count if prompt else 0}
            return found | {"nats": here.nats, "predicted": here.predicted, "all_nats": total.nats,
                            "all_predicted": total.predicted}

        while at < len(readings) and finished:
            which, document = readings[at]
            name = args.files[document]
            here = Sum(earlier.nats, earlier.predicted)
            try:
                with open(name, "rb") as file:
                    # within a document nothing stands in front of what is left of it
                    lead = unread_ids(state) + ([] if skip else list(tokenizer.start_ids))
                    prompt = prompt_for(tokenizer, name, file, b"", lead, device)
                    prompt.skip(skip)
                    bar = Progress(prompt.expected, prompt.count, tokenizer.unit, args.quiet, os.path.basename(name))

                    def on_piece(now: int, nats: float, prompt=prompt, bar=bar, earlier=earlier) -> None:
                        nonlocal touched
                        touched = True
                        prompt.confirm(now)
                        here.nats, here.predicted = earlier.nats + nats, earlier.predicted + now - 1
                        bar.read(now, prompt.expected, bits=f"{here.bits:.3f}")
                        if prompt.more:
                            session.save_if_due(state, noted)

                    try:
                        reading = read(
                            model, prompt, state, learn=args.learn, backend=args.backend, on_piece=on_piece,
                            should_stop=lambda: bool(interrupt and interrupt()), unread="included",
                        )
                    finally:
                        bar.close()
            except OSError as error:
                failed = error
                break
            count, finished = count + reading.tokens, reading.finished
            if finished:
                label = f"pass {which + 1}, {name}" if args.passes > 1 else name
                try:
                    output.write(f"{label}: {prompt.count} {tokenizer.unit}, {here.bits:.3f} bits per "
                                 f"{tokenizer.unit[:-1]}\n".encode("utf-8", "surrogateescape"))
                except OSError as error:
                    failed = error
                total.add(here)
                at, skip, earlier, here, prompt = at + 1, 0, Sum(), Sum(), None
                if failed is not None:
                    break
                if at < len(readings):
                    session.save_if_due(state, noted)
        finished = at == len(readings)
        if path is not None and (finished or touched):
            session.save(state, None if finished else noted())
    if failed is not None or not finished:
        reason = f"{failed.filename or 'standard output'}: {failed.strerror or failed}; " if failed else ""
        kept = f"; session in {args.session}{'' if finished or touched else ' as it was'}" if path else ""
        again = ", the same command goes on from there" if path and not finished else ""
        notice(f"hope_kernels: {reason}stopped after {at} of {len(readings)} readings of documents and "
               f"{prompt.count if prompt else 0} {tokenizer.unit} of the next{kept}{again}")
        return stopped_code(failed, interrupt)
    if not args.quiet:
        seconds = time.perf_counter() - began
        unit = tokenizer.unit
        notice(f"read {count} {unit} in {seconds:.1f} s ({count / seconds:.0f}/s), learn={args.learn}, "
               f"{total.bits:.3f} bits per {unit[:-1]}, memory {megabytes(resident_bytes())}{guarded(state)}"
               + (f", session in {args.session}" if path else ""))
    return 0
