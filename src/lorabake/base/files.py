"""Writing that is whole or absent: aside, fsync, rename, fsync the folder, verify. Only then is anything "saved"."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lorabake.base.errors import CorruptFile, UserError

PART = ".part"
"""Suffix of files being written. Left-overs are ignored by every reader and replaced by the next write."""
_NOT_OFFERED = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
"""What file systems that cannot flush a folder (some network shares) answer; theirs are flushed with the file."""

_SAMPLE = 64 * 1024


def write_atomic(path: Path, data: bytes) -> str:
    """Write ``data`` to ``path`` so that a crash leaves the old file or the new one, never a torn one.

    Returns the sha256 (hex) of what was read back from the disk.

    Raises:
        UserError: the folder cannot be written to (full, read-only, gone); the old file is untouched.
        CorruptFile: the bytes read back differ from the bytes written.
    """
    with replacing(path) as part:
        part.write_bytes(data)
    digest = sha256_file(path)
    if digest != hashlib.sha256(data).hexdigest():
        raise CorruptFile(f"{path}: what was read back differs from what was written. Check the disk.")
    return digest


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, aside; on leaving without an error it becomes ``path`` in one step, and else it is deleted.

    Raises:
        UserError: the system refuses to write it (an OSError inside counts).
    """
    part = path.with_name(path.name + PART)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        _fsync(part)
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise UserError(
            f"{path} could not be written: {error.strerror or error}. What was there before is untouched."
        ) from error
    try:
        _fsync_folder(path.parent)
    except OSError as error:
        raise UserError(
            f"{path} was written, but the disk does not confirm it: {error.strerror or error}. Check the disk."
        ) from error


def rename(path: Path, to: Path) -> None:
    """Give a file or folder another name in the same folder, for good.

    Raises:
        UserError: it cannot be done.
    """
    try:
        os.replace(path, to)
        _fsync_folder(to.parent)
    except OSError as error:
        raise UserError(f"{path} could not be renamed to {to.name}: {error.strerror or error}.") from error


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it.

    Raises:
        UserError: it cannot be deleted.
    """
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        raise UserError(f"{path} could not be deleted: {error.strerror or error}.") from error


def write_json(path: Path, value: Any) -> str:
    """``write_atomic`` of ``value`` as indented UTF-8 JSON."""
    return write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def sha256_file(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def quick_digest(files: Iterable[tuple[str, Path]]) -> str:
    """sha256 (hex) over what some files are called here, their sizes and samples of their bytes: tells models apart without reading gigabytes.

    Files up to 8 MiB are read whole, larger ones at 128 evenly spread places of 64 KiB, beginning and end included.
    """
    digest = hashlib.sha256()
    for name, path in files:
        size = path.stat().st_size
        digest.update(f"{name} {size}\n".encode(errors="surrogateescape"))
        with path.open("rb") as file:
            for index in range(128):
                file.seek(index * max(0, size - _SAMPLE) // 127 if size > 128 * _SAMPLE else index * _SAMPLE)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def free_space(folder: Path) -> int:
    """Bytes that may still be written where ``folder`` is or will be."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:  # some network shares do not say
        return sys.maxsize


def _fsync_folder(folder: Path) -> None:
    try:
        _fsync(folder)
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise


def _fsync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows has no handle for a folder to flush
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_new(texts: Mapping[Path, str], make: Path | None = None) -> None:
    """Write text files that must not be there yet: all of them, or none. A folder ``make`` for them is made if need be.

    Raises:
        UserError: one of them exists, or its folder does not.
    """
    for path in texts:
        if path.exists():
            raise UserError(
                f"{path} exists and is not overwritten. Give another name, or move it away. Nothing was written."
            )
        needed = path.parent.parent if path.parent == make else path.parent
        if not needed.is_dir():
            raise UserError(
                f"The folder {needed} does not exist. Make it first, or give another one. Nothing was written."
            )
    if make is not None:
        if make.exists() and not make.is_dir():
            raise UserError(f"{make} is a file, and a folder is needed. Give another name. Nothing was written.")
        make.mkdir(exist_ok=True)
    for path, text in texts.items():
        write_atomic(path, text.encode())
