"""One writer per folder. The operating system releases the lock when its holder ends, however it ends."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from lorabake.base.errors import UserError


@contextlib.contextmanager
def exclusive(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file ``path``.

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
    """Process that holds the lock file ``path``; None if nobody does, whatever is written there.

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


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int, wait: bool) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import fcntl

    def _try_lock(descriptor: int, wait: bool) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            return False
        return True
