"""Text in pictures: Pillow's built-in font, and lines that fit their place."""

from __future__ import annotations

import functools
import re
import unicodedata
from dataclasses import dataclass

from PIL import ImageDraw, ImageFont

ELLIPSIS = "…"
_MOST_CHARACTERS = 2000
_STAND_INS = {"×": "x", "→": ">", "−": "-", "≥": ">=", "≤": "<="}


@dataclass(frozen=True)
class Style:
    """A size in pixels and a colour."""

    size: int
    color: str

    @property
    def font(self) -> ImageFont.FreeTypeFont:
        """Pillow's own scalable font, so that grids look alike on every machine."""
        font = ImageFont.load_default(self.size)
        assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
        return font

    @property
    def line_height(self) -> int:
        """Distance of two base lines."""
        return round(self.size * 1.3)


def fitted(text: str, style: Style, width: int, lines: int) -> list[str]:
    """``text`` broken at spaces, and after commas, hyphens, underscores and slashes, into at most ``lines`` lines ``width`` pixels wide.

    Words that are wider than a line are cut into pieces; what does not fit at all ends in an ellipsis.
    """
    font = style.font
    text = "".join(map(_drawable, " ".join(text.split())[:_MOST_CHARACTERS]))
    words = re.findall(r"[^\s,_/\-]*[,_/\-]+\s*|[^\s,_/\-]+\s*", text)
    found = [""]
    for word in words:
        for piece in [word] if font.getlength(word.rstrip()) <= width else list(word):
            if found[-1] and font.getlength((found[-1] + piece).rstrip()) > width:
                found.append("")
            found[-1] += piece
    rows = [row.strip() for row in found]
    if len(rows) > lines:
        rows = [*rows[: lines - 1], _cut(rows[lines - 1] + " " + rows[lines], font, width)]
    return [row for row in rows if row]


def put(canvas: ImageDraw.ImageDraw, lines: list[str], x: float, y: float, style: Style, anchor: str = "l") -> None:
    """Write lines below each other; ``y`` is the top of the first, ``anchor`` says whether ``x`` is left (l), middle (m) or right (r)."""
    for number, line in enumerate(lines):
        canvas.text((x, y + number * style.line_height), line, fill=style.color, font=style.font, anchor=f"{anchor}a")


def height(lines: list[str], style: Style) -> int:
    """Pixels that the lines take."""
    return len(lines) * style.line_height


@functools.cache
def _drawable(character: str) -> str:
    """The character, or the nearest that the built-in font (Latin only) has; ``?`` where there is none."""
    if _has_glyph(character):
        return character
    plain = _STAND_INS.get(character) or "".join(c for c in unicodedata.normalize("NFKD", character) if _has_glyph(c))
    return plain or ("" if unicodedata.category(character)[0] in "MC" else "?")


@functools.cache
def _has_glyph(character: str) -> bool:
    font = Style(16, "black").font
    return character == " " or bytes(font.getmask(character)) not in (bytes(font.getmask("\uffff")), b"")


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    while text and font.getlength(text.rstrip() + ELLIPSIS) > width:
        text = text[:-1]
    return text.rstrip(" ,") + ELLIPSIS
