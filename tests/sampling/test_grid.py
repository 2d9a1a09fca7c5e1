"""Grids: every picture in its place, at every size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorabake.base.errors import UserError
from lorabake.sampling.axes import Axis
from lorabake.sampling.grid import LONGEST_SIDE, SMALLEST_CELL, compose, save_grid

COLORS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (30, 200, 200), (200, 30, 200)]


def axis(count: int, breaks: frozenset[int] = frozenset()) -> Axis:
    return Axis("name", tuple(f"value {i}" for i in range(count)), breaks)


def plain(color: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, color)


def places(sheet: Image.Image, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Box (x, y, right, bottom) of a color, ends not included."""
    ys, xs = np.nonzero((np.asarray(sheet) == color).all(-1))
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def test_pictures_stand_in_rows_and_columns_and_small_ones_grow() -> None:
    cells = {(row, column): plain(COLORS[row * 3 + column]) for row in range(2) for column in range(3)}
    sheet = compose(cells, axis(2), axis(3), title="Title", footer="footer")
    boxes = {place: places(sheet, COLORS[place[0] * 3 + place[1]]) for place in cells}
    for x, y, right, bottom in boxes.values():
        assert right - x == bottom - y >= SMALLEST_CELL
        assert (right - x) % 64 == 0
    for row in range(2):
        assert len({boxes[row, column][1] for column in range(3)}) == 1
        assert boxes[row, 0][2] < boxes[row, 1][0] < boxes[row, 2][0]
    assert boxes[0, 0][3] < boxes[1, 0][1]


def test_a_group_stands_apart() -> None:
    cells = {(row, 0): plain(COLORS[row]) for row in range(3)}
    boxes = [places(compose(cells, axis(3, frozenset({1})), axis(1)), COLORS[row]) for row in range(3)]
    assert boxes[1][1] - boxes[0][3] > 2 * (boxes[2][1] - boxes[1][3])


@pytest.mark.parametrize("size", [(160, 160), (512, 768), (1024, 64)])
def test_larger_pictures_keep_every_pixel(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(1).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    sheet = np.asarray(compose({(0, 0): Image.fromarray(noise)}, Axis("", ("",)), Axis("", ("",))))
    assert any(
        np.array_equal(sheet[y : y + size[1], x : x + size[0]], noise) for y in range(20, 40) for x in range(20, 40)
    )


def test_pictures_of_several_shapes_keep_their_shape() -> None:
    sheet = compose({(0, 0): plain(COLORS[0], (64, 128)), (0, 1): plain(COLORS[1], (128, 64))}, axis(1), axis(2))
    x, y, right, bottom = places(sheet, COLORS[0])
    assert (bottom - y) == 2 * (right - x)
    x, y, right, bottom = places(sheet, COLORS[1])
    assert (right - x) == 2 * (bottom - y)


def test_the_scale_can_be_set() -> None:
    x, y, right, bottom = places(compose({(0, 0): plain(COLORS[0])}, axis(1), axis(1), scale=0.5), COLORS[0])
    assert (right - x, bottom - y) == (32, 32)


def test_a_missing_cell_is_left_open() -> None:
    sheet = compose({(0, 0): plain(COLORS[0])}, axis(1), axis(2))
    x, y, right, bottom = places(sheet, COLORS[0])
    assert len({sheet.getpixel((place + right, bottom - 5)) for place in (10, 15, 20)}) == 1
    assert sheet.getpixel((right + 10, y + 5)) != sheet.getpixel((x, y))


def test_twelve_by_twenty_fits_into_a_webp(tmp_path: Path) -> None:
    cells = {(row, column): plain(COLORS[0], (1024, 64)) for row in range(12) for column in range(20)}
    sheet = compose(cells, axis(12), axis(20), title="many " * 40)
    assert max(sheet.size) <= LONGEST_SIDE
    save_grid(sheet, tmp_path / "grid.webp")
    with Image.open(tmp_path / "grid.webp") as found:
        assert (found.format, found.size) == ("WEBP", sheet.size)


def test_labels_do_not_touch_pictures() -> None:
    cells = {(row, column): plain(COLORS[row * 2 + column]) for row in range(2) for column in range(2)}
    long = Axis("a name that is long " * 9, ("label " * 60, "an_endless_word" * 20))
    sheet = compose(cells, long, long, title="title " * 60, footer="footer " * 90)
    boxes = [places(sheet, color) for color in COLORS[:4]]
    left, top, right, bottom = boxes[0][0], boxes[0][1], boxes[3][2], boxes[3][3]
    ink = (np.asarray(sheet) != 255).any(-1)
    assert ink[:top, left:right].any() and ink[top:bottom, :left].any() and ink[bottom + 8 :].any(), "labels are there"
    for around in (
        ink[top:bottom, left - 8 : left - 1],
        ink[top - 5 : top - 1, left:right],
        ink[bottom + 1 : bottom + 8],
    ):
        assert not around.any(), "a label comes too near"
    assert not ink[:, :20].any() and not ink[:, -20:].any() and not ink[:20].any() and not ink[-16:].any(), (
        "a free margin"
    )


def test_a_rows_label_stands_beside_its_middle() -> None:
    sheet = compose({(0, 0): plain(COLORS[0]), (1, 0): plain(COLORS[1])}, Axis("", ("epoch 1", "")), axis(1))
    x, y, _, bottom = places(sheet, COLORS[0])
    rows_with_ink = np.nonzero((np.asarray(sheet) != 255).any(-1)[:, : x - 2].any(1))[0]
    assert abs((rows_with_ink.min() + rows_with_ink.max()) / 2 - (y + bottom) / 2) <= 6


@pytest.mark.parametrize("name", ["a.png", "a.WEBP"])
def test_it_is_saved_in_the_format_of_its_suffix(tmp_path: Path, name: str) -> None:
    save_grid(plain(COLORS[0]), tmp_path / name)
    with Image.open(tmp_path / name) as found:
        assert found.format == name.partition(".")[2].upper()


def test_what_cannot_be_a_grid_is_refused(tmp_path: Path) -> None:
    one = {(0, 0): plain(COLORS[0])}
    with pytest.raises(UserError, match="at least one picture"):
        compose({}, axis(1), axis(1))
    with pytest.raises(UserError, match=r"1 rows and 1 columns.*\(0, 1\)"):
        compose({**one, (0, 1): plain(COLORS[0])}, axis(1), axis(1))
    with pytest.raises(UserError, match="scale"):
        compose(one, axis(1), axis(1), scale=0)
    with pytest.raises(UserError, match=r"Allowed endings: \.png, \.webp"):
        save_grid(plain(COLORS[0]), tmp_path / "a.jpg")
