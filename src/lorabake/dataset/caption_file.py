"""Reading a caption file: UTF-8, with or without a mark, or UTF-16 with one; anything else is named, never guessed."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from pathlib import Path

from lorabake.base.errors import UserError

_MAX_BYTES = 1_000_000
"""Longest caption file that is read. Text models see some hundred tokens; a file this long is something else."""


class UnreadableCaption(UserError):
    """A caption file that is not text, and why."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{path}: {reason}")


@dataclass(frozen=True, slots=True)
class CaptionText:
    """What a caption file says."""

    text: str
    """The first line that is not blank, without spaces around it; "" in an empty file."""
    unused_lines: int
    """How many more lines are not blank. They are only used with wildcards."""
    lines: str = ""
    """Every line that is not blank, without spaces around it, with "\\n" between."""


def read_caption(path: Path) -> CaptionText:
    """The caption in ``path``.

    Raises:
        UnreadableCaption: the file cannot be opened, is too long, or is not text in UTF-8 (or UTF-16 with a byte order
        mark).
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UnreadableCaption(path, f"cannot be read: {error.strerror}.") from error
    if len(data) > _MAX_BYTES:
        raise UnreadableCaption(
            path, f"is longer than {_MAX_BYTES // 1000} kB, which no caption is. Move it out of the folder."
        )
    # Only what editors write as a line end: str.splitlines would also cut at rarer characters inside a sentence.
    lines = [line.strip() for line in re.split(r"\r\n|\n|\r", _decode(path, data))]
    lines = [line for line in lines if line]
    return CaptionText(lines[0], len(lines) - 1, "\n".join(lines)) if lines else CaptionText("", 0)


def _decode(path: Path, data: bytes) -> str:
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte 0x{data[error.start]:02x} at position {error.start}"
        raise UnreadableCaption(path, f"is not UTF-8 text ({where}). Save it as UTF-8 in a text editor.") from error
    if "\0" in text:
        reason = (
            "holds zero bytes: it is UTF-16 without a mark, UTF-32, or not text. Save it as UTF-8 in a text editor."
        )
        raise UnreadableCaption(path, reason)
    return text
