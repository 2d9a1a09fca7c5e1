"""One writer per folder. The operating system releases the lock when its holder ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from lorabake.base.errors import UserError

_HELD = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)
"""What the system answers where somebody else holds a lock."""


@contextlib.contextmanager
def exclusive(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file ``path``.

    Where the disk has no locks, nobody is kept out.

    Args:
        path: the lock file; its folder is made if absent.
        wait: wait for whoever holds it, instead of refusing.

    Raises:
        UserError: somebody else holds it (the message names their process), or there can be no file at ``path``.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"{path.parent} cannot be written to: {error.strerror or error}. Choose another folder."
        ) from error
    try:
        if not _try_lock(descriptor, wait):
            raise UserError(
                f"{path.parent} is in use by process {_owner(descriptor)}. Wait for it to end, or choose another folder."
            )
        try:
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 1, os.SEEK_SET)  # byte 0 is the one that is locked, which on Windows bars reading it
            os.write(descriptor, f"{os.getpid()}\n".encode())
        except OSError as error:
            raise UserError(f"{path} could not be written: {error.strerror or error}. Make room there.") from error
        yield
    finally:
        os.close(descriptor)


def holder(path: Path) -> str | None:
    """Process that holds the lock file ``path``; None if nobody does, whatever is written there, or if the disk has no locks.

    It is told by trying the lock for an instant: whoever takes a lock that is looked at in this way should take it with ``wait``.
    """
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        return None if _try_lock(descriptor, wait=False) else _owner(descriptor)
    finally:
        os.close(descriptor)


def _owner(descriptor: int) -> str:
    os.lseek(descriptor, 1, os.SEEK_SET)
    return os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"


def _try_lock(descriptor: int, wait: bool) -> bool:
    """False if somebody else holds it. Disks that know no locks (some network shares) refuse nobody: better to go on than never to start."""
    try:
        _lock(descriptor, wait)
    except OSError as error:
        return error.errno not in _HELD
    return True


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int, wait: bool) -> None:
        while True:
            try:
                return msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
            except OSError as error:  # LK_LOCK waits for ten seconds at most
                if not wait or error.errno not in (*_HELD, errno.EDEADLK):
                    raise
else:
    import fcntl

    def _lock(descriptor: int, wait: bool) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
