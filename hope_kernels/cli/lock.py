"""One process per session: a lock on a file beside it, held for a whole run and released by the system even
when the process is killed."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from .terminal import notice

try:
    import fcntl
except ImportError:  # Windows: no lock, the last of two runs that ends is the one that is kept
    fcntl = None

UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextlib.contextmanager
def held(path: str, name: str) -> Iterator[None]:
    """Holds the session at ``path`` (called ``name`` in messages; a real path, so that all links to it share
    one lock).

    The lock is on ``path + ".lock"``, which holds the process's number and is removed at the end. What a
    killed process leaves of it is not locked, and taken over. Raises BlockingIOError where another process
    has it, OSError where the folder cannot be written: nothing could be saved there either. Where the system
    or the file system knows no such locks, the run goes on without.
    """
    file = None if fcntl is None else _locked(path + ".lock", name)
    try:
        yield
    finally:
        if file is not None:
            with contextlib.suppress(OSError):
                # before the lock is released: a process that waits for it sees that the file is gone
                os.unlink(path + ".lock")
            os.close(file)


def _locked(path: str, name: str) -> int | None:
    """A descriptor of the locked file that is now at ``path``; None without locks."""
    assert fcntl is not None
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise OSError(error.errno, f"session {name} cannot be written there: {error.strerror}", path) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(file, path):  # another process has ended in between and removed it
                os.close(file)
                continue
            os.ftruncate(file, 0)
            os.write(file, f"{os.getpid()}\n".encode())
            return file
        except BlockingIOError:
            number = os.read(file, 32).split(b"\n")[0]
            os.close(file)
            who = f" (pid {number.decode()})" if number.isdigit() else ""
            raise BlockingIOError(f"session {name} is in use by another process{who}") from None
        except OSError as error:
            os.close(file)
            if error.errno not in UNSUPPORTED:
                raise
            with contextlib.suppress(OSError):
                os.unlink(path)
            notice(f"hope_kernels: session {name} is not locked ({error.strerror}); use it in one process at a time")
            return None


def _is_at(file: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
