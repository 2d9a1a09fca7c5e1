"""One writer per folder. The operating system releases the lock when its holder ends, however it ends."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from lorabake.base.errors import UserError


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``.

    Raises:
        UserError: somebody else holds it; the message names their process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _try_lock(descriptor):
            owner = (
                os.pread(descriptor, 32, 1).decode(errors="replace").strip()
                if hasattr(os, "pread")
                else "another process"
            )
            raise UserError(
                f"{path.parent} is in use by process {owner or 'unknown'}. Wait for it to end, or choose another folder with --into."
            )
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 1, os.SEEK_SET)  # byte 0 is the one that is locked, which on Windows bars reading it
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True
