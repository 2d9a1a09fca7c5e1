"""Is a picture file as long as it says it is? A look at its structure, without decoding a pixel.

Opening a dataset must notice half-copied files but cannot decode thousands of pictures. Each container says where it
ends, so a look at a few bytes clears healthy files; only the suspicious ones need the full (slow, exact) decode that
decides.
"""

from __future__ import annotations

import os
from typing import BinaryIO

_TAIL = 65536
"""Bytes at the end of a JPEG in which the end marker is looked for; cameras append previews and maps behind it."""


def looks_whole(file: BinaryIO, format: str) -> bool:
    """False when ``file`` seems cut short. A suspicion, not a verdict: decode to be sure.

    Args:
        file: an open, seekable file.
        format: Pillow's name of the container ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF").
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if format == "PNG":
        return _png_reaches_end(file, size)
    if format == "JPEG":
        return _jpeg_reaches_end(file, size)
    if format == "AVIF":
        return _boxes_fit(file, size)
    head = file.read(8)
    if format == "WEBP":  # "RIFF", then the length of all that follows
        return int.from_bytes(head[4:8], "little") + 8 <= size
    if format == "BMP":  # "BM", then the length of the file
        return int.from_bytes(head[2:6], "little") <= size
    return False  # GIF: its one-byte end marker proves nothing


def _png_reaches_end(file: BinaryIO, size: int) -> bool:
    """Walk the chunks (length, type, data, checksum) up to IEND."""
    position = 8
    while position + 12 <= size:
        file.seek(position)
        head = file.read(8)
        if head[4:] == b"IEND":
            return True
        position += 12 + int.from_bytes(head[:4], "big")
    return False


def _jpeg_reaches_end(file: BinaryIO, size: int) -> bool:
    """Walk the segments up to the first scan, then look for the end marker behind it.

    The walk matters: an embedded thumbnail has an end marker of its own.
    """
    position = 2
    while position + 4 <= size:
        file.seek(position)
        head = file.read(4)
        if head[0] != 0xFF:
            return False
        if head[1] == 0xFF:  # a fill byte before the marker
            position += 1
            continue
        position += 2 + int.from_bytes(head[2:4], "big")
        if head[1] == 0xDA:
            file.seek(max(position, size - _TAIL))
            return b"\xff\xd9" in file.read()
    return False


def _boxes_fit(file: BinaryIO, size: int) -> bool:
    """Walk the top-level ISO-BMFF boxes (length, type, …); the last one must end inside the file."""
    position = 0
    while position + 8 <= size:
        file.seek(position)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 0:  # "up to the end of the file"
            return True
        if length == 1:  # the real length is in the next 64 bits
            length = int.from_bytes(head[8:16], "big")
        if length < 8:
            return False
        position += length
    return position == size
