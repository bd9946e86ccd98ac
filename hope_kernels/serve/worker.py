"""The worker: one thread that reads prompts and writes answers, of all sessions together.

    waiting --> reading, a piece at a time --> batch: one token of every row at a time --> saving --> done

Between two tokens of the batch, at most one piece of one prompt is read. A row that has ended leaves the batch,
its session is written by a second thread, and then the last event goes out: whoever has seen it finds the
session in its file. A request for a session that is being used here waits; one for a session that another
process has is refused.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from ..model import HopeForCausalLM
from ..text import Tokenizer
from .jobs import Event, Failed, Job
from .refused import Refused
from .rows import Batch, Row, kind, opened, read_piece
from .settings import Settings
from .store import Store

STOPPING = "the server is stopping; the session is as it was before this request"


class Worker(threading.Thread):
    """``submit`` a job, ``close`` to end: what is being written then has ``grace`` seconds to end itself."""

    def __init__(self, model: HopeForCausalLM, tokenizer: Tokenizer, store: Store, settings: Settings):
        super().__init__(name="hope_kernels-worker", daemon=True)
        self.model, self.tokenizer, self.store, self.settings = model, tokenizer, store, settings
        self._waiting: deque[Job] = deque()
        self._busy: set[str] = set()  # sessions in use here
        self._reading: deque[Row] = deque()
        self._batches: dict[tuple, Batch] = {}
        self._saving = 0
        self._deadline: float | None = None
        self._wake = threading.Condition()
        self._saver = ThreadPoolExecutor(1, "hope_kernels-saver")

    def submit(self, job: Job) -> None:
        """Raises Refused where no more may wait, or the server stops."""
        with self._wake:
            if self._deadline is not None:
                raise Refused(503, "stopping", STOPPING)
            if len(self._waiting) >= self.settings.queue + self._free():
                raise Refused(429, "queue_full", f"{len(self._waiting)} requests are waiting already (--queue); "
                                                 "try again later")
            self._waiting.append(job)
            self._wake.notify()

    def close(self, grace: float | None = None) -> None:
        """Nothing new begins. Returns at once; ``join`` waits for the end."""
        with self._wake:
            end = time.monotonic() + (self.settings.grace if grace is None else grace)
            self._deadline = end if self._deadline is None else min(self._deadline, end)
            self._wake.notify()

    def figures(self) -> dict[str, int]:
        with self._wake:
            return {"waiting": len(self._waiting), "reading": len(self._reading),
                    "writing": sum(len(b.rows) for b in self._batches.values()), "saving": self._saving}

    def run(self) -> None:
        while True:
            with self._wake:
                while not self._work() and not (self._deadline is not None and self._idle()):
                    self._wake.wait(None if self._deadline is None else 0.1)
                if self._deadline is not None and self._idle() and not self._waiting:
                    break
            try:
                self._admit()
                self._read()
                for of in list(self._batches):
                    self._write(of)
                self._end_cancelled()
            except Exception as error:  # a fault of this program: nobody waits for an answer that never comes
                self._drop_all(error)
        self._saver.shutdown(wait=True)

    def _rows(self) -> list[Row]:
        return [*self._reading, *(row for b in self._batches.values() for row in b.rows)]

    def _free(self) -> int:
        return max(self.settings.batch - len(self._rows()), 0)

    def _idle(self) -> bool:
        return not self._rows()

    def _work(self) -> bool:
        """Whether there is something to do now."""
        if self._rows() or self._deadline is not None and self._waiting:
            return True
        return any(job.session is None or job.session not in self._busy for job in self._waiting)

    def _admit(self) -> None:
        """Waiting jobs take free places, in their order but for those whose session is in use."""
        while True:
            with self._wake:
                if self._deadline is not None:
                    stopped, job = list(self._waiting), None
                    self._waiting.clear()
                else:
                    stopped, job = [], self._next() if self._free() else None
                    if job is not None:
                        self._waiting.remove(job)
                        if job.session is not None:
                            self._busy.add(job.session)
            for one in stopped:
                one.emit(Failed(Refused(503, "stopping", STOPPING)))
            if job is None:
                return
            self._open(job)

    def _next(self) -> Job | None:
        return next((j for j in self._waiting if j.session is None or j.session not in self._busy), None)

    def _open(self, job: Job) -> None:
        locks = contextlib.ExitStack()
        try:
            if job.cancelled.is_set():
                raise Refused(400, "cancelled", "the request was given up")
            if job.session is None:
                session = self.store.new("")
            else:
                locks.enter_context(self.store.taken(job.session))
                session = self.store.open(job.session, job.generation) or self.store.new(job.session)
            row = opened(job, session, locks, self.tokenizer, self.settings)
        except Exception as error:
            self._leave(job, locks)
            job.emit(Failed(_refused(error)))
            return
        with self._wake:
            self._reading.append(row)

    def _read(self) -> None:
        """One piece of the prompt that came first."""
        if not self._reading:
            return
        row = self._reading[0]
        try:
            finished = read_piece(self.model, row, self.settings)
        except Exception as error:
            self._fail(row, error)
            return
        if not finished:
            self._reading.rotate(-1)
            return
        with self._wake:
            self._reading.remove(row)
        if not row.job.max_tokens:
            row.reason = "length"
        else:
            assert row.logits is not None
            try:
                row.draw(row.logits, row.state.pos[0])
            except ValueError as error:
                self._fail(row, error)
                return
        if row.reason:
            if row.token is not None:
                row.state.unread = row.state.ids.new_full((1, 1), row.token)
            self._save(row)
            return
        with self._wake:
            of = kind(row)
            self._batches.setdefault(of, Batch(self.model, self.settings)).add([row])

    def _write(self, of: tuple) -> None:
        batch = self._batches[of]
        found = batch.step() if batch.rows else []
        if not batch.rows:
            with self._wake:
                self._batches.pop(of)
        for row, error in found:
            if error is None:
                self._save(row)
            else:
                self._fail(row, error)

    def _end_cancelled(self) -> None:
        """Rows that nobody waits for any more, and all of them once the grace is over. An answer that has
        begun is kept as far as it has come; a prompt that was not read to its end was not read."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        for row in [r for r in self._reading if late or r.job.cancelled.is_set()]:
            self._fail(row, Refused(503, "stopping", STOPPING))
        for batch in list(self._batches.values()):
            for row in batch.take([r for r in batch.rows if late or r.job.cancelled.is_set()]):
                row.interrupted = True
                self._save(row)
        with self._wake:
            self._batches = {of: batch for of, batch in self._batches.items() if batch.rows}

    def _save(self, row: Row) -> None:
        with self._wake:
            self._saving += 1
        self._saver.submit(self._saved, row)

    def _saved(self, row: Row) -> None:
        """In the second thread."""
        job, session = row.job, row.session
        event: Event
        try:
            row.finish()
            if job.session is not None:
                row.state, = row.state.split()  # without what its company needed
                session.state, session.turns = row.state, session.turns + job.chat
                session.last = {"text": row.answer.text, "finish_reason": row.reason, "written": row.written,
                                "bits_per_token": row.bits}
                self.store.save(session)
            event = row.done()
        except Exception as error:
            event = Failed(_refused(error))
        self._leave(job, row.locks, saved=True)
        job.emit(event)

    def _fail(self, row: Row, error: Exception) -> None:
        with self._wake:
            if row in self._reading:
                self._reading.remove(row)
        self._leave(row.job, row.locks)
        row.job.emit(Failed(_refused(error)))

    def _drop_all(self, error: Exception) -> None:
        rows = self._rows()
        with self._wake:
            self._reading.clear()
            self._batches.clear()
        for row in rows:
            self._fail(row, error)

    def _leave(self, job: Job, locks: contextlib.ExitStack, saved: bool = False) -> None:
        """The session is free for others."""
        with contextlib.suppress(OSError):
            locks.close()
        with self._wake:
            if job.session is not None:
                self._busy.discard(job.session)
            self._saving -= saved
            self._wake.notify()


def _refused(error: Exception) -> Refused:
    if isinstance(error, Refused):
        return error
    return Refused(500, "failed", f"{error}; the session is as it was before this request")
