"""Headgear, scarf and held objects."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lorabake.pocket.world.canvas import Canvas, Part, Point
from lorabake.pocket.world.figure import CENTRE_X, Figure
from lorabake.pocket.world.palette import GOLD, PAPER, WHITE, WOOD, Rgb, shade
from lorabake.pocket.world.spec import allow, axes

HAT: Rgb = (72, 50, 106)
EAR_PINK: Rgb = (250, 176, 188)
Paint = Callable[[Canvas, Figure], None]


@dataclass(frozen=True)
class Headgear:
    """`behind` is drawn before the head, `front` after all hair. `coloured` headgear takes the headgear colour."""

    behind: Paint | None = None
    front: Paint | None = None
    coloured: bool = False
    headroom: float = 0.0
    """Units above the hair that the camera leaves free for it."""


def star_points(x: float, y: float, outer: float, inner: float, points: int = 5) -> list[Point]:
    """Corners of a star around `(x, y)`, the first one pointing up."""
    corners: list[Point] = []
    for index in range(2 * points):
        radius = inner if index % 2 else outer
        angle = index * math.pi / points
        corners.append((x + radius * math.sin(angle), y - radius * math.cos(angle)))
    return corners


def heart_points(x: float, y: float, half: float) -> list[Point]:
    """Corners of a heart around `(x, y)`, `half` of its width each side."""
    right = [
        (0.0, -0.4),
        (0.25, -0.72),
        (0.55, -0.85),
        (0.88, -0.66),
        (1.0, -0.22),
        (0.8, 0.2),
        (0.45, 0.6),
        (0.0, 1.0),
    ]
    left = [(-dx, dy) for dx, dy in right[-2:0:-1]]
    return [(x + dx * half, y + dy * half) for dx, dy in right + left]


def _witch_hat(canvas: Canvas, figure: Figure) -> None:
    x, y = figure.head
    canvas.polygon(
        [(x - 14, y - 11), (x + 14, y - 11), (x + 7, y - 28), (x + 12, y - 34), (x - 1, y - 30)], HAT, Part.HEADGEAR
    )
    canvas.ellipse(x, y - 10, 25, 4.8, HAT, Part.HEADGEAR)
    band: list[Point] = [(x - 13, y - 12.6), (x + 13, y - 12.6), (x + 11.4, y - 17), (x - 10.8, y - 17)]
    canvas.polygon(band, (240, 184, 52), Part.HEADGEAR, line=False)


def _cap(canvas: Canvas, figure: Figure) -> None:
    x, y = figure.head
    canvas.chord(x, y - 6, (19.2, 15.5), (180, 360), figure.headgear, Part.HEADGEAR)
    brim = shade(figure.headgear, 0.72)
    if figure.behind:
        canvas.limb([(x - 7, y - 6.5), (x + 7, y - 6.5)], brim, Part.HEADGEAR, 2.6, line=False)
    else:
        canvas.ellipse(x - (14 if figure.side else 0), y - 6, 15, 3.4, brim, Part.HEADGEAR)
    canvas.ellipse(x, y - 21, 2.0, 1.6, brim, Part.HEADGEAR, line=False)


def _crown(canvas: Canvas, figure: Figure) -> None:
    x, y = figure.head
    y -= 13
    spikes: list[Point] = [
        (x - 12, y),
        (x - 13, y - 12),
        (x - 6.5, y - 6),
        (x, y - 13),
        (x + 6.5, y - 6),
        (x + 13, y - 12),
        (x + 12, y),
    ]
    canvas.polygon(spikes, GOLD, Part.HEADGEAR)
    canvas.ellipse(x, y - 3.6, 2.3, 2.3, (222, 44, 60), Part.HEADGEAR, line=False)


def _hair_bow(canvas: Canvas, figure: Figure) -> None:
    x, y = figure.head
    x, y = x + (4 if figure.side else 9), y - 16.5
    for side in (-1, 1):
        canvas.polygon([(x, y), (x + side * 11, y - 7.5), (x + side * 11, y + 7.0)], figure.headgear, Part.HEADGEAR)
    canvas.ellipse(x, y, 3.1, 3.3, shade(figure.headgear, 0.76), Part.HEADGEAR)


def _cat_ears(canvas: Canvas, figure: Figure) -> None:
    x, y = figure.head
    for side in (-1, 1):
        outer: list[Point] = [(x + side * 18, y - 7), (x + side * 16.5, y - 27), (x + side * 2.5, y - 15)]
        canvas.polygon(outer, shade(figure.hair, 0.9), Part.HEADGEAR)
        if not figure.behind:
            inner: list[Point] = [(x + side * 15.4, y - 12), (x + side * 14.4, y - 22), (x + side * 6.5, y - 15)]
            canvas.polygon(inner, EAR_PINK, Part.HEADGEAR, line=False)


def _rabbit_ears(canvas: Canvas, figure: Figure) -> None:
    x, y = figure.head
    for side in (-1, 1):
        canvas.ellipse(x + side * 8.5, y - 24, 5.2, 13, (250, 248, 252), Part.HEADGEAR)
        if not figure.behind:
            canvas.ellipse(x + side * 8.5, y - 23.5, 2.5, 9.5, EAR_PINK, Part.HEADGEAR, line=False)


HEADGEAR: dict[str, Headgear] = {
    "none": Headgear(),
    "witch hat": Headgear(front=_witch_hat, headroom=8.0),
    "cap": Headgear(front=_cap, coloured=True),
    "crown": Headgear(front=_crown, headroom=3.0),
    "hair bow": Headgear(front=_hair_bow, coloured=True),
    "cat ears": Headgear(behind=_cat_ears, headroom=3.0),
    "rabbit ears": Headgear(behind=_rabbit_ears, headroom=9.0),
}


def draw_scarf(canvas: Canvas, figure: Figure) -> None:
    """A scarf around the neck with one end hanging down."""
    if figure.spec.scarf == "none":
        return
    colour, drop = figure.scarf, figure.drop
    x = CENTRE_X + (3.5 if not figure.side else -1.0)
    tail: list[Point] = [(x, 51.0 + drop), (x + 6.5, 51.0 + drop), (x + 8.0, 66.0 + drop), (x + 1.0, 66.0 + drop)]
    canvas.polygon(tail, colour, Part.SCARF)
    fringe: list[Point] = [
        (x + 0.8, 63.0 + drop),
        (x + 7.6, 63.0 + drop),
        (x + 8.0, 66.0 + drop),
        (x + 1.0, 66.0 + drop),
    ]
    canvas.polygon(fringe, shade(colour, 0.7), Part.SCARF, line=False)
    half = 9.0 if not figure.side else 7.0
    canvas.limb([(CENTRE_X - half, 50.3 + drop), (CENTRE_X + half, 50.3 + drop)], colour, Part.SCARF, 7.4)


def _sword(canvas: Canvas, figure: Figure) -> None:
    x, y = figure.hand_holding
    lean = -8.0 if figure.side else 6.0
    canvas.limb([(x, y), (x + lean, y - 30)], (214, 222, 234), Part.OBJECT, 5.0)
    canvas.limb([(x, y - 5), (x + lean * 0.9, y - 28)], WHITE, Part.OBJECT, 1.2, line=False)
    canvas.limb([(x - 5.2, y - 5.6), (x + 7.0, y - 4.4)], (228, 178, 52), Part.OBJECT, 3.0)
    canvas.limb([(x, y - 3), (x - lean * 0.2, y + 5)], WOOD, Part.OBJECT, 3.0)


def _book(canvas: Canvas, figure: Figure) -> None:
    x, y = figure.hand_holding
    x, y = x + (-5 if figure.side else 2), y - 4
    cover: list[Point] = [
        (x - 11, y - 7.5),
        (x, y - 6),
        (x + 11, y - 7.5),
        (x + 11, y + 7.5),
        (x, y + 9),
        (x - 11, y + 7.5),
    ]
    canvas.polygon(cover, (160, 46, 58), Part.OBJECT)
    for side in (-1, 1):
        page: list[Point] = [
            (x + side * 9.2, y - 6),
            (x + side * 0.7, y - 4.6),
            (x + side * 0.7, y + 7),
            (x + side * 9.2, y + 5.6),
        ]
        canvas.polygon(page, PAPER, Part.OBJECT, line=False)
        for row in (-2.6, 0.6, 3.6):
            line: list[Point] = [(x + side * 2.6, y + row + 0.4), (x + side * 7.4, y + row)]
            canvas.limb(line, (150, 150, 165), Part.OBJECT, 0.9, line=False)


def _umbrella(canvas: Canvas, figure: Figure) -> None:
    x, y = figure.hand_holding
    side = -1 if figure.side else 1
    top_x, top_y = (x - 12, y - 17) if figure.side else (x + 11, y - 20)
    canvas.limb([(x - side * 1.5, y + 6), (top_x, top_y)], (96, 72, 60), Part.OBJECT, 2.2)
    canvas.chord(top_x, top_y + 1, (16.5, 15), (180, 360), (236, 74, 118), Part.OBJECT)
    canvas.crease([(top_x - 16.5, top_y + 1), (top_x + 16.5, top_y + 1)], (236, 74, 118), Part.OBJECT)
    canvas.chord(top_x, top_y + 1, (6.2, 15), (180, 360), (255, 206, 218), Part.OBJECT, line=False)
    canvas.limb([(top_x, top_y - 14), (top_x, top_y - 17)], (96, 72, 60), Part.OBJECT, 1.6, line=False)


def _ball(canvas: Canvas, figure: Figure) -> None:
    x, y = figure.hand_holding
    x, y = x + (-4 if figure.side else 4), y - 5
    canvas.ellipse(x, y, 9.8, 9.8, (250, 250, 252), Part.OBJECT)
    for start, colour in ((210, (228, 52, 54)), (330, (54, 104, 226)), (90, (250, 202, 50))):
        canvas.chord(x, y, (9.2, 9.2), (start - 48, start + 48), colour, Part.OBJECT, line=False)


OBJECTS: dict[str, Paint] = {"sword": _sword, "book": _book, "umbrella": _umbrella, "ball": _ball}


def add_object(name: str, paint: Paint) -> None:
    """Make a held object drawable by name; it stays out of `sample` and of the judged axes."""
    if name not in axes["object"]:
        allow("object", name)
    OBJECTS[name] = paint


def draw_object(canvas: Canvas, figure: Figure) -> None:
    """What the holding hand holds."""
    if figure.spec.object != "none":
        OBJECTS[figure.spec.object](canvas, figure)
