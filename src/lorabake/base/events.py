"""Progress is an event, not a print. Terminal, run folder, studio and tests listen to the same stream."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lorabake.base.errors import UserError

Event = dict[str, Any]
Listener = Callable[[Event], None]


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

    Raises:
        UserError: when called: the line cannot be written (the disk is full, the folder is gone).
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, event: Event) -> None:
        line = json.dumps(event, ensure_ascii=False).encode() + b"\n"
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
        """Forget what was logged after byte ``size``. A log that is shorter keeps its whole lines; returns how many bytes it lacks.

        Raises:
            UserError: it cannot be written.
        """
        if not self._path.exists():
            return size
        try:
            with self._path.open("r+b") as file:
                found = file.seek(0, os.SEEK_END)
                if found < size:
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
                    return size - found
                file.truncate(size)
                return 0
        except OSError as error:
            raise UserError(f"{self._path} could not be written: {error.strerror or error}.") from error

    def read(self) -> list[Event]:
        """Every whole line; a last line cut short by a crash is left out."""
        if not self._path.exists():
            return []
        return list(_whole_lines(self._path.read_bytes().split(b"\n")))


def _whole_lines(lines: Iterable[bytes]) -> Iterable[Event]:
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event
