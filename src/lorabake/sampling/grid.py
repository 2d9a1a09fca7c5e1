"""One labelled picture of many: the rows and columns of a test, readable at a glance and made to be compared."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from PIL import Image, ImageDraw

from lorabake.base.errors import UserError
from lorabake.base.files import write_atomic
from lorabake.sampling.axes import Axis
from lorabake.sampling.lettering import Style, fitted, height, put

SMALLEST_CELL = 160
"""Cells with a longer side below this are enlarged, so that faces can be seen and labels have room."""
LONGEST_SIDE = 16383
"""Sides of a WebP picture; larger grids are scaled down to it."""

_PAPER, _PLACE, _HAIRLINE = "#ffffff", "#f1f1f3", "#dcdde2"
_TITLE, _NAME, _LABEL, _FOOTER = Style(26, "#17181c"), Style(14, "#8a8d96"), Style(17, "#26282e"), Style(13, "#8a8d96")
_MARGIN, _GUTTER, _GROUP_GAP, _LABEL_GAP = 28, 6, 22, 12
_ROW_LABEL_WIDTH = (40, 220)
_NARROWEST_TEXT = 320


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where everything stands, in pixels."""

    cell: tuple[int, int]
    left: int
    top: int
    xs: tuple[int, ...]
    ys: tuple[int, ...]
    size: tuple[int, int]
    title: list[str]
    footer: list[str]
    row_labels: list[list[str]]
    column_labels: list[list[str]]


def compose(
    cells: Mapping[tuple[int, int], Image.Image],
    rows: Axis,
    columns: Axis,
    *,
    title: str = "",
    footer: str = "",
    scale: float | None = None,
) -> Image.Image:
    """A grid with its labels.

    Args:
        cells: pictures by (row, column); each is fitted into the size of the largest. Places without one stay grey.
        rows, columns: labels, and where groups begin (the base model's row, say).
        scale: size of a cell relative to its picture; None enlarges small pictures by a whole factor and leaves others alone.

    Raises:
        UserError: there is no picture, no row or column, a cell outside them, or a scale that is not above 0.
    """
    _check(cells, rows, columns, scale)
    layout = _laid_out(_cell_size(cells, rows, columns, scale), rows, columns, title, footer)
    sheet = Image.new("RGB", layout.size, _PAPER)
    canvas = ImageDraw.Draw(sheet)
    _write_labels(canvas, layout, rows, columns)
    width, tall = layout.cell
    for row, y in enumerate(layout.ys):
        for column, x in enumerate(layout.xs):
            picture = cells.get((row, column))
            if picture is None:
                canvas.rectangle((x, y, x + width - 1, y + tall - 1), fill=_PLACE)
            else:
                shown = _fit(picture, layout.cell)
                sheet.paste(shown, (x + (width - shown.width) // 2, y + (tall - shown.height) // 2))
            canvas.rectangle((x - 1, y - 1, x + width, y + tall), outline=_HAIRLINE)
    if max(sheet.size) > LONGEST_SIDE:
        sheet.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return sheet


def save_grid(image: Image.Image, path: Path) -> None:
    """Write a grid, whole or not at all, in the format its suffix names.

    Raises:
        UserError: the suffix is neither ``.png`` nor ``.webp``, or the file cannot be written.
    """
    formats = {".png": ("PNG", {}), ".webp": ("WEBP", {"quality": 92, "method": 4})}
    if path.suffix.lower() not in formats:
        raise UserError(f"A grid cannot be saved as '{path.name}'. Allowed endings: {', '.join(formats)}.")
    name, options = formats[path.suffix.lower()]
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    write_atomic(path, buffer.getvalue())


def _check(cells: Mapping[tuple[int, int], Image.Image], rows: Axis, columns: Axis, scale: float | None) -> None:
    if not cells or not rows.values or not columns.values:
        raise UserError("A grid needs at least one picture, one row and one column.")
    outside = sorted(
        place for place in cells if not (0 <= place[0] < len(rows.values) and 0 <= place[1] < len(columns.values))
    )
    if outside:
        raise UserError(
            f"The grid has {len(rows.values)} rows and {len(columns.values)} columns, but a picture was given for {outside[0]}."
        )
    if scale is not None and not 0 < scale < float("inf"):
        raise UserError(f"A grid cannot be drawn at scale {scale}; it must be above 0.")


def _cell_size(
    cells: Mapping[tuple[int, int], Image.Image], rows: Axis, columns: Axis, scale: float | None
) -> tuple[int, int]:
    width, tall = max(image.width for image in cells.values()), max(image.height for image in cells.values())
    if scale is None:
        scale = max(1, -(-SMALLEST_CELL // max(width, tall)))
    # Leave room for labels below the format's limit; scaling pictures keeps the letters sharp, scaling the sheet would not.
    room = LONGEST_SIDE - 1000
    scale = min(scale, (room / len(columns.values) - _GROUP_GAP) / width, (room / len(rows.values) - _GROUP_GAP) / tall)
    return max(1, round(width * scale)), max(1, round(tall * scale))


def _laid_out(cell: tuple[int, int], rows: Axis, columns: Axis, title: str, footer: str) -> _Layout:
    narrowest, widest = _ROW_LABEL_WIDTH
    tall_lines = max(1, (cell[1] - 4) // _LABEL.line_height)
    row_labels = [fitted(value, _LABEL, widest, min(6, tall_lines)) for value in rows.values]
    longest = max((_LABEL.font.getlength(line) for lines in row_labels for line in lines), default=0)
    name_width = min(widest, _NAME.font.getlength(rows.name))
    label_width = max(narrowest, round(max(longest, name_width))) + _LABEL_GAP if longest or rows.name else 0
    left = _MARGIN + label_width
    xs = _places(left, cell[0], columns)
    right = max(xs[-1] + cell[0] + _MARGIN, 2 * _MARGIN + (_NARROWEST_TEXT if title or footer else 0))
    column_labels = [fitted(value, _LABEL, cell[0], 4) for value in columns.values]
    title_lines = fitted(title, _TITLE, right - 2 * _MARGIN, 3)
    head = _MARGIN + (height(title_lines, _TITLE) + _LABEL_GAP if title_lines else 0)
    labels_tall = max(map(len, column_labels)) * _LABEL.line_height
    top = (
        head
        + (_NAME.line_height + 4 if columns.name or rows.name else 0)
        + labels_tall
        + (_LABEL_GAP - 4 if labels_tall else 0)
    )
    ys = _places(top, cell[1], rows)
    footer_lines = fitted(footer, _FOOTER, right - 2 * _MARGIN, 6)
    bottom = ys[-1] + cell[1] + (_LABEL_GAP + 4 + height(footer_lines, _FOOTER) if footer_lines else 0) + _MARGIN
    return _Layout(cell, left, top, xs, ys, (right, bottom), title_lines, footer_lines, row_labels, column_labels)


def _places(start: int, side: int, axis: Axis) -> tuple[int, ...]:
    steps = [side + (_GROUP_GAP if index in axis.breaks else _GUTTER) for index in range(1, len(axis.values))]
    return tuple(accumulate(steps, initial=start))


def _write_labels(canvas: ImageDraw.ImageDraw, layout: _Layout, rows: Axis, columns: Axis) -> None:
    put(canvas, layout.title, _MARGIN, _MARGIN - 4, _TITLE)
    above = layout.top - _LABEL_GAP + 4
    lines = max(map(len, layout.column_labels))
    name_y = above - lines * _LABEL.line_height - _NAME.line_height - (4 if lines else 0)
    put(canvas, fitted(columns.name, _NAME, layout.size[0] - layout.left - _MARGIN, 1), layout.left, name_y, _NAME)
    put(
        canvas,
        fitted(rows.name, _NAME, layout.left - _MARGIN, 1),
        layout.left - _LABEL_GAP,
        above - _NAME.line_height,
        _NAME,
        "r",
    )
    for x, label in zip(layout.xs, layout.column_labels, strict=True):
        put(canvas, label, x + layout.cell[0] / 2, above - height(label, _LABEL), _LABEL, "m")
    for y, label in zip(layout.ys, layout.row_labels, strict=True):
        put(canvas, label, layout.left - _LABEL_GAP, y + (layout.cell[1] - height(label, _LABEL)) / 2, _LABEL, "r")
    put(canvas, layout.footer, _MARGIN, layout.ys[-1] + layout.cell[1] + _LABEL_GAP + 4, _FOOTER)


def _fit(picture: Image.Image, cell: tuple[int, int]) -> Image.Image:
    picture = picture.convert("RGB")
    factor = min(cell[0] / picture.width, cell[1] / picture.height)
    size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
    return picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)
