"""Text in pictures: Pillow's built-in font, and lines that fit their place."""

from __future__ import annotations

import functools
import re
import unicodedata
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

ELLIPSIS = "…"
_MOST_CHARACTERS = 2000
_STAND_INS = {"×": "x", "→": ">", "−": "-", "≥": ">=", "≤": "<=", "ł": "l", "Ł": "L"}


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
    """``text`` in at most ``lines`` lines, each at most ``width`` pixels wide; what does not fit ends in an ellipsis.

    Lines break where the text does, at spaces, and after commas, hyphens, underscores and slashes; a word that is wider than a line
    is cut into pieces. Where lines are scarce, every paragraph keeps at least one.
    """
    paragraphs = [paragraph for paragraph in text[:_MOST_CHARACTERS].split("\n") if paragraph.strip()][:lines]
    rows: list[str] = []
    for later, paragraph in zip(range(len(paragraphs) - 1, -1, -1), paragraphs, strict=True):
        rows += _wrapped(paragraph, style.font, width, lines - len(rows) - later)
    return rows


def _wrapped(paragraph: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    drawable = "".join(map(_drawable, " ".join(paragraph.split())))
    rows = [""]
    for word in re.findall(r"[^\s,_/\-]*[,_/\-]+\s*|[^\s,_/\-]+\s*", drawable):
        for piece in [word] if font.getlength(word.rstrip()) <= width else list(word):
            if rows[-1] and font.getlength((rows[-1] + piece).rstrip()) > width:
                rows.append("")
            rows[-1] += piece
    if len(rows) > lines:
        rows[lines - 1 :] = [_cut(rows[lines - 1] + rows[lines], font, width)]
    return [row.strip() for row in rows if row.strip()]


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
    return character == " " or _shape(character) not in (_shape("\uffff"), _shape(""))


def _shape(character: str) -> bytes:
    canvas = Image.new("L", (32, 32))
    ImageDraw.Draw(canvas).text((4, 4), character, fill=255, font=Style(16, "white").font)
    return canvas.tobytes()


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    while text and font.getlength(text.rstrip() + ELLIPSIS) > width:
        text = text[:-1]
    return text.rstrip(" ,") + ELLIPSIS
