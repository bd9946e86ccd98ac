"""Sessions as files of a folder: one file each, which is the truth about it.

    DIR/ID.safetensors    the state, with a note: {"phase": "chat", "turns": n, "serve": {...}}

The note of ``serve``: ``birth``, a random name that a session keeps for life; ``generation``, one more with
every save; ``tokens`` read so far; ``last``, the answer of the last turn. So the command ``chat`` can go on
with such a session, and a server with one of ``chat``, ``read`` or ``generate``.

A session is used under a lock beside its file (``cli/lock.py``), by one process at a time. What is in memory is
a copy: before it is used, and before it is written, the file must be the one it was read from or written to.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..cli.lock import held
from ..files import write_atomically
from ..model import HopeForCausalLM
from ..model_state import ModelState
from ..state_file import load_note, load_state
from .refused import Refused

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
FORM = "1 to 64 of A-Z a-z 0-9 _ -, the first no _ or -"  # NAME in words
SUFFIX = ".safetensors"
UNBORN = "0" * 16  # of a session that no server has saved


@dataclass
class Session:
    """A session in memory. mark: the file it is a copy of; None: there is none yet."""

    id: str
    state: ModelState
    turns: int = 0
    birth: str = field(default_factory=lambda: secrets.token_hex(8))
    generation: int = 0
    last: dict[str, Any] | None = None
    mark: tuple | None = None

    def note(self) -> dict[str, Any]:
        own = {"birth": self.birth, "generation": self.generation, "tokens": self.state.pos[0], "last": self.last}
        return {"phase": "chat", "turns": self.turns, "serve": own}


class Store:
    """The sessions of ``folder``, of which the ``loaded`` last used ones stay in memory."""

    def __init__(self, folder: str, model: HopeForCausalLM, loaded: int):
        os.makedirs(folder, mode=0o700, exist_ok=True)
        self.folder, self.model, self.loaded = os.path.realpath(folder), model, loaded
        self._device = model.init_state(1).ids.device
        self._cache: OrderedDict[str, Session] = OrderedDict()
        self._guard = threading.Lock()

    def path(self, name: Any) -> str:
        """Of a session's file. Raises Refused for a name that is none, and for what is there and no file."""
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise Refused(400, "bad_session_id", f"session {name!r:.80} is no name: expected {FORM}")
        path = os.path.join(self.folder, name + SUFFIX)
        if os.path.lexists(path) and (os.path.islink(path) or not os.path.isfile(path)):
            raise Refused(409, "bad_session_file", f"session {name}: its file is no regular file")
        return path

    @contextlib.contextmanager
    def taken(self, name: str) -> Iterator[None]:
        """The session is this caller's. Raises Refused where somebody else has it."""
        path = self.path(name)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(held(path, name))
            except BlockingIOError as error:
                raise Refused(409, "session_in_use", f"{error}; try again when its turn is over") from None
            except OSError as error:
                raise Refused(500, "not_writable", str(error)) from None
            yield

    def open(self, name: str, generation: int | None = None) -> Session | None:
        """The session as its file has it, for a caller that has ``taken`` it; None where there is no file. It
        leaves the memory until it is saved: whatever goes wrong meanwhile, the file is what counts. Raises
        Refused for a file that this model cannot read, and for another generation than expected (None: any)."""
        path = self.path(name)
        mark = _mark(path)
        if generation is not None:
            self._check_generation(name, 0 if mark is None else mark[1], generation)
        with self._guard:
            kept = self._cache.pop(name, None)
        if mark is None:
            return None
        if kept is not None and kept.mark == mark:
            return kept
        session = self._loaded(name, path)
        session.mark = mark
        return session

    def _loaded(self, name: str, path: str) -> Session:
        try:
            state, note = load_state(path, self._device), _served(load_note(path))
            if not isinstance(state, ModelState) or state.batch != 1:
                raise ValueError(f"session {name} is no state of one text read by a whole model")
            self.model.claim(f"session {name}", state)
        except (ValueError, TypeError, OSError) as error:
            message = str(error).replace(self.folder + os.sep, "")
            raise Refused(409, "unusable_session", message) from None
        return Session(name, state, note["turns"], note["birth"], note["generation"], note["last"])

    def new(self, name: str) -> Session:
        """A session that has read nothing and has no file yet."""
        return Session(name, self.model.init_state(1))

    def save(self, session: Session) -> None:
        """Writes the next generation. Raises Refused where the file is not the one the session was read from,
        and where it cannot be written; the file is then as it was."""
        path = self.path(session.id)
        if _mark(path) != session.mark:
            raise Refused(409, "stale_session", f"session {session.id} was changed by another process meanwhile; "
                                                "what this server made of it is dropped")
        session.generation += 1
        if session.birth == UNBORN:
            session.birth = secrets.token_hex(8)
        try:
            session.state.save(path, session.note())
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise Refused(500, "not_saved", f"session {session.id} could not be saved and is as it was before: "
                                            f"{reason}") from None
        session.mark = _mark(path)
        self._remember(session)

    def create(self, name: str | None) -> dict[str, Any]:
        """A new session's description; a name is made up for None. Raises Refused where it exists."""
        name = f"s-{secrets.token_hex(8)}" if name is None else name
        with self.taken(name):
            self._check_free(name)
            self.save(self.new(name))
        return self.describe(name)

    def reset(self, name: str, generation: int | None = None) -> dict[str, Any]:
        """The session begins anew, with nothing read and learned."""
        with self.taken(name):
            session = self.existing(name, generation)
            fresh = self.new(name)
            fresh.birth, fresh.generation, fresh.mark = session.birth, session.generation, session.mark
            self.save(fresh)
        return self.describe(name)

    def fork(self, name: str, to: str | None) -> dict[str, Any]:
        """A copy of the session as it was saved last, under a name of its own."""
        to = f"s-{secrets.token_hex(8)}" if to is None else to
        path, target = self.path(name), self.path(to)
        if _mark(path) is None:
            raise _absent(name)
        with self.taken(to):
            self._check_free(to)
            with open(path, "rb") as f:  # a whole file, whoever writes the next one meanwhile
                write_atomically(target, f.read(), mode=0o600)
        return self.describe(to)

    def delete(self, name: str, generation: int | None = None) -> None:
        with self.taken(name):
            if generation is not None:
                self._check_generation(name, self._note(name)["generation"], generation)
            self.forget(name)
            try:
                os.unlink(self.path(name))
            except FileNotFoundError:
                raise _absent(name) from None

    def existing(self, name: str, generation: int | None = None) -> Session:
        """``open`` for a session that must exist, at this generation (None: any)."""
        if _mark(self.path(name)) is None:
            raise _absent(name)
        session = self.open(name, generation)
        assert session is not None
        return session

    def _check_generation(self, name: str, found: int, expected: int) -> None:
        if found != expected:
            raise Refused(409, "wrong_generation", f"session {name} is at generation {found}, expected "
                                                   f"{expected}", generation=found)

    def describe(self, name: str) -> dict[str, Any]:
        """What the file says, without reading its tensors."""
        path = self.path(name)
        try:
            note, status = self._note(name), os.stat(path)
        except FileNotFoundError:
            raise _absent(name) from None
        with self._guard:
            kept = self._cache.get(name)
        return {
            "id": name, "object": "session", "generation": note["generation"], "turns": note["turns"],
            "tokens": note["tokens"], "file_bytes": status.st_size, "changed": status.st_mtime,
            "state_bytes": None if kept is None else kept.state.nbytes(), "last": note["last"],
        }

    def list(self, limit: int, after: str | None) -> tuple[list[dict[str, Any]], bool]:
        """Up to ``limit`` descriptions by name, of those after ``after``, and whether there are more."""
        names = sorted(n for e in os.listdir(self.folder) if e.endswith(SUFFIX)
                       and NAME.fullmatch(n := e.removesuffix(SUFFIX)) and (after is None or n > after))
        found = []
        for name in names[:limit]:
            with contextlib.suppress(Refused):  # deleted meanwhile, or no session
                found.append({k: v for k, v in self.describe(name).items() if k != "last"})
        return found, len(names) > limit

    def forget(self, name: str) -> None:
        """The session is in memory no more."""
        with self._guard:
            self._cache.pop(name, None)

    def in_memory(self) -> list[str]:
        with self._guard:
            return list(self._cache)

    def _remember(self, session: Session) -> None:
        with self._guard:
            self._cache[session.id] = session
            self._cache.move_to_end(session.id)
            while len(self._cache) > self.loaded:
                self._cache.popitem(last=False)

    def _note(self, name: str) -> dict[str, Any]:
        try:
            return _served(load_note(self.path(name)))
        except ValueError as error:
            message = str(error).replace(self.folder + os.sep, "")
            raise Refused(409, "unusable_session", message) from None

    def _check_free(self, name: str) -> None:
        if _mark(self.path(name)) is not None:
            raise Refused(409, "session_exists", f"session {name} exists")


def _absent(name: str) -> Refused:
    return Refused(404, "no_session", f"there is no session {name}")


def _mark(path: str) -> tuple | None:
    """Of a file as it is now: every save makes another one. None: there is none."""
    try:
        status = os.stat(path, follow_symlinks=False)
        note = _served(load_note(path))
    except FileNotFoundError:
        return None
    except (ValueError, OSError):
        return None, 0, os.stat(path).st_size
    return note["birth"], note["generation"], status.st_ino, status.st_mtime_ns, status.st_size


def _served(note: Any) -> dict[str, Any]:
    """The parts of a note that a server uses; of other programs' notes what can be known."""
    note = note if isinstance(note, dict) else {}
    own = note.get("serve") if isinstance(note.get("serve"), dict) else {}

    def number(value: Any) -> int:
        return value if type(value) is int and value >= 0 else 0

    last, tokens = own.get("last"), own.get("tokens")
    return {
        "turns": number(note.get("turns")) if note.get("phase") == "chat" else 0,
        "birth": str(own.get("birth", "")) or UNBORN, "generation": number(own.get("generation")),
        "tokens": tokens if type(tokens) is int else None, "last": last if isinstance(last, dict) else None,
    }


