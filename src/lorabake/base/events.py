"""Progress is an event, not a print. Terminal, run folder, studio and tests listen to the same stream."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lorabake.base.errors import UserError

Event = dict[str, Any]
Listener = Callable[[Event], None]

_CHECK = b', "crc32": "'
"""What stands before a line's check value, its last field: the CRC-32 (hex) of all before this, as :func:`zlib.crc32` computes it."""
_VALUE_LENGTH = len(b'00000000"}')
_CHECK_LENGTH = len(_CHECK) + _VALUE_LENGTH


class Events:
    """A stream of events. An event is a flat dict with ``kind``; listeners are called in order, in the emitting thread."""

    def __init__(self, *listeners: Listener) -> None:
        self._listeners = list(listeners)

    def listen(self, listener: Listener) -> None:
        """Add a listener."""
        self._listeners.append(listener)

    def emit(self, kind: str, **fields: Any) -> None:
        """Tell every listener."""
        event = {"kind": kind, **fields}
        for listener in self._listeners:
            listener(event)


class EventLog:
    """``events.jsonl``: one event a line, appended whole lines at a time, cut back to a step when a run resumes.

    Each line ends with a field ``crc32``, by which a damaged one is told from what was written. It is no part of the event.

    Raises:
        UserError: when called: the line cannot be written (the disk is full, the folder is gone).
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, event: Event) -> None:
        line = json.dumps(event, ensure_ascii=False).encode()[: -len(b"}")]
        line += _check_of(line) + b"\n"
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                while line:  # a disk that fills up takes only a part
                    line = line[os.write(descriptor, line) :]
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UserError(f"{self._path} could not be written: {error.strerror or error}.") from error

    def sync(self) -> int:
        """Wait until everything written is on the disk; returns the log's size in bytes."""
        try:
            with self._path.open("r+b") as file:
                os.fsync(file.fileno())
                return os.fstat(file.fileno()).st_size
        except OSError as error:
            raise UserError(f"{self._path} could not be written: {error.strerror or error}.") from error

    def cut_back(self, size: int) -> int:
        """Forget what was logged after byte ``size``, the end of a line. A log that is shorter, or has no line that ends there, keeps its
        whole lines; returns how many bytes it lacks.

        Raises:
            UserError: it cannot be written.
        """
        if not self._path.exists():
            return size
        try:
            with self._path.open("r+b") as file:
                file.truncate(min(size, file.seek(0, os.SEEK_END)))
                file.seek(max(0, size - 1))
                if size and file.read(1) != b"\n":
                    file.seek(0)
                    whole = _whole_lines(file.read(), size)
                    file.truncate(len(whole))
                    file.seek(max(0, len(whole) - 1))
                    file.write(whole[-1:])
                    return size - len(whole)
                return 0
        except OSError as error:
            raise UserError(f"{self._path} could not be written: {error.strerror or error}.") from error

    def read(self, *kinds: str) -> list[Event]:
        """Every event of ``kinds``, or all; damaged lines and a last one that was cut short by a crash are left out.

        Naming the kinds that are wanted saves reading the rest: steps make up nearly all of a log.
        """
        starts = tuple(f'{{"kind": {json.dumps(kind)}, '.encode() for kind in kinds) or b""
        lines = (line for _, line, checked in self._lines() if line.startswith(starts) and _is_sound(line, checked))
        return [event for event in map(_event, lines) if event is not None]

    def damaged(self) -> list[int]:
        """Numbers, from 1, of lines that are not as they were written."""
        return [number for number, line, checked in self._lines() if not _is_sound(line, checked)]

    def _lines(self) -> Iterator[tuple[int, bytes, bool]]:
        """Each line's number, its bytes, and whether it must have a check value; without a last one that was cut short.

        Lines without one are of a log that was begun before there were any, and stand ahead of all that have one. A last line whose end
        alone is not as it was written counts with it.
        """
        if not self._path.exists():
            return
        *lines, last = self._path.read_bytes().split(b"\n")
        last = last[:-1] if _is_sound(last[:-1], checked=True) else last
        checked = False
        for number, line in enumerate([*lines, last], 1):
            checked = checked or _has_check(line)
            if number <= len(lines) or _is_sound(line, checked):
                yield number, line, checked


def _whole_lines(log: bytes, size: int) -> bytes:
    """The beginning of a log that should end a line at ``size`` and does not: with that end, if the line is whole but for it, else without the line."""
    start = log.rfind(b"\n", 0, size - 1) + 1
    line = log[start : size - 1]
    return log[:start] + line + b"\n" if len(log) == size and _is_sound(line, _has_check(line)) else log[:start]


def _check_of(line: bytes) -> bytes:
    return b'%s%08x"}' % (_CHECK, zlib.crc32(line))


def _has_check(line: bytes) -> bool:
    """Whether a line was written with a check value. Its name tells, or where that is damaged the value, which still is the right one."""
    return _CHECK in line or line[-_VALUE_LENGTH:] == _check_of(line[:-_CHECK_LENGTH])[-_VALUE_LENGTH:]


def _is_sound(line: bytes, checked: bool) -> bool:
    """Whether a line is as it was written; of one that needs no check value, whether it is an event."""
    return line[-_CHECK_LENGTH:] == _check_of(line[:-_CHECK_LENGTH]) if checked else _event(line) is not None


def _event(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or "kind" not in event:
        return None
    event.pop("crc32", None)
    return event
