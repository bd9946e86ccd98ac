"""Writing a file so that readers find the old one or the new one, never a part, and a failure leaves the old
one."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat

try:
    import fcntl
except ImportError:  # Windows: no advisory locks, so nothing can tell a dead writer's file from a living one's
    fcntl = None

_BINARY = getattr(os, "O_BINARY", 0)


def write_atomically(path: str | os.PathLike, data: bytes, mode: int = 0o666) -> None:
    """Temporary file in the same folder, fsync, rename. An existing file keeps its permissions, a new one
    gets ``mode`` less the umask; a symbolic link is followed. What killed writers of the same file have left
    behind is removed.

    Raises ValueError for a path that is there and is no regular file, OSError for what the system refuses;
    the file is then as it was. After the rename nothing is raised: the new file is in its place.
    """
    path = os.path.realpath(path)
    with contextlib.suppress(FileNotFoundError):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"cannot write {path}: it is no regular file")
        mode = stat.S_IMODE(status.st_mode)
    _sweep(path)
    handle, temporary = _temporary(path, mode)
    try:
        with os.fdopen(handle, "wb") as f:
            with contextlib.suppress(FileNotFoundError, OSError):
                os.chmod(temporary, stat.S_IMODE(os.stat(path).st_mode))  # the old file's, whatever the umask
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
            if fcntl is None:
                f.close()  # Windows renames no open file
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):  # an interrupt right after the rename
            os.unlink(temporary)
        raise
    # The name of the new file reaches the disk with its folder. Not every system lets a folder be opened or
    # synced, and by now an error would say the old file is still there.
    with contextlib.suppress(OSError):
        folder = os.open(os.path.dirname(path), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _temporary(path: str, mode: int) -> tuple[int, str]:
    """A new file beside ``path``, locked where there are locks: a living writer holds its lock. The umask is
    applied by the system."""
    while True:
        temporary = f"{path}.{secrets.token_hex(4)}.part"
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, mode)
        except FileExistsError:
            continue
        if fcntl is None:
            return handle, temporary
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            swept = not os.fstat(handle).st_nlink
        except BlockingIOError:  # by one that is about to
            swept = True
        except OSError:  # a file system without locks: nothing is swept there either
            swept = False
        if not swept:
            return handle, temporary
        os.close(handle)


def _sweep(path: str) -> None:
    """Removes the temporary files beside ``path`` that no living process holds."""
    if fcntl is None:
        return
    folder, name = os.path.split(path)
    pattern = re.compile(re.escape(name) + r"\.[0-9a-z_]{8}\.part")
    with contextlib.suppress(OSError):
        for entry in os.listdir(folder):
            if pattern.fullmatch(entry):
                with contextlib.suppress(OSError):
                    _remove_if_free(os.path.join(folder, entry))


def _remove_if_free(path: str) -> None:
    assert fcntl is not None
    handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
    finally:
        os.close(handle)
