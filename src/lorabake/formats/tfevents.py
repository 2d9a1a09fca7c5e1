"""TensorBoard's event files: records of protocol-buffer messages, appended whole.

A record is the message's length (8 bytes, little-endian), that length's checksum, the message and its checksum. Checksums are CRC-32C,
turned and shifted by a constant. Of the messages only what is written here is known: numbers and pictures by step, and the mark of
a new start, behind which TensorBoard forgets what it was told of later steps. Source: tensorflow's ``event.proto``, ``summary.proto``
and ``record_writer``.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

_DOUBLE, _BYTES, _FLOAT, _NUMBER = 1, 2, 5, 0  # wire types
_CASTAGNOLI = 0x82F63B78
_MASK = 0xA282EAD8
_START = 1


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture to show, as its file is."""

    data: bytes
    """A PNG's bytes."""
    width: int
    height: int


class EventFile:
    """One event file, written from its beginning.

    Raises:
        OSError: when called: it cannot be written.
    """

    def __init__(self, path: Path, time: float, first_step: int) -> None:
        """Begin a file in which ``first_step`` is the first that counts; what other files in the folder say from there on is forgotten."""
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        self._append(_double(1, time) + _bytes(3, b"brain.Event:2"))
        self._append(_double(1, time) + _number(2, first_step) + _bytes(7, _number(1, _START)))

    def add(
        self, step: int, time: float, numbers: Mapping[str, float], pictures: Mapping[str, Picture] | None = None
    ) -> None:
        """Values by name at a step. ``time`` is in seconds since 1970."""
        values = [_bytes(1, name.encode()) + _float(2, value) for name, value in numbers.items()]
        for name, picture in (pictures or {}).items():
            image = _number(1, picture.height) + _number(2, picture.width) + _number(3, 3) + _bytes(4, picture.data)
            values.append(_bytes(1, name.encode()) + _bytes(4, image))
        self._append(_double(1, time) + _number(2, step) + _bytes(5, b"".join(_bytes(1, value) for value in values)))

    def _append(self, message: bytes) -> None:
        length = struct.pack("<Q", len(message))
        with self._path.open("ab") as file:
            file.write(length + _checksum(length) + message + _checksum(message))


def _checksum(data: bytes) -> bytes:
    table, crc = _table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF)


@functools.cache
def _table() -> tuple[int, ...]:
    def entry(value: int) -> int:
        for _ in range(8):
            value = value >> 1 ^ (_CASTAGNOLI if value & 1 else 0)
        return value

    return tuple(map(entry, range(256)))


def _key(field: int, wire: int) -> bytes:
    return _varint(field << 3 | wire)


def _varint(value: int) -> bytes:
    def groups(rest: int) -> Iterable[int]:
        while rest > 127:
            yield rest & 127 | 128
            rest >>= 7
        yield rest

    return bytes(groups(value))


def _number(field: int, value: int) -> bytes:
    return _key(field, _NUMBER) + _varint(value)


def _double(field: int, value: float) -> bytes:
    return _key(field, _DOUBLE) + struct.pack("<d", value)


def _float(field: int, value: float) -> bytes:
    return _key(field, _FLOAT) + struct.pack("<f", value)


def _bytes(field: int, value: bytes) -> bytes:
    return _key(field, _BYTES) + _varint(len(value)) + value
