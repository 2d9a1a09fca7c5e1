"""Head: hair in all styles, and the face."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lorabake.pocket.world.canvas import Canvas, Part, Point
from lorabake.pocket.world.figure import CENTRE_X, HEAD_RX, HEAD_RY, Figure
from lorabake.pocket.world.palette import WHITE, Rgb, mix, shade

LASH: Rgb = (40, 32, 46)
LIP: Rgb = (150, 44, 54)
DARK_LIP: Rgb = (84, 18, 32)
FRAME: Rgb = (46, 40, 72)
_FRINGE: tuple[Point, ...] = (
    (-17.2, -4.6),
    (-12, -0.6),
    (-7.6, -4.2),
    (-4, -0.8),
    (0, -4.2),
    (4, -0.8),
    (7.6, -4.2),
    (12, -0.6),
    (17.2, -4.6),
)
"""The lower edge of the fringe, from the head's centre."""
EYE_RX, EYE_RY = 4.6, 5.8


@dataclass(frozen=True)
class HairStyle:
    """`back` is drawn behind the body (in front of it when seen from behind), `front` after the face."""

    back: Callable[[Canvas, Figure], None] | None = None
    front: Callable[[Canvas, Figure], None] | None = None


def _long_back(canvas: Canvas, figure: Figure) -> None:
    x, y = figure.head
    end = y + 22.0 + 22.0 * figure.spec.hair_length
    shift = 5.0 if figure.side else 0.0
    corners: list[Point] = [
        (x - 18 + 2 * shift, y - 2),
        (x + 18.5, y - 2),
        (x + 19 + 0.4 * shift, end - 4),
        (x + 14, end),
        (x - 14 + 2.6 * shift, end),
        (x - 19 + 2.6 * shift, end - 4),
    ]
    if not figure.behind:
        canvas.polygon(corners, shade(figure.hair, 0.86), Part.HAIR)
        # Beside the face it could still be short; what falls below the chin is what tells.
        chin, left = y + 16.0, x - 19 + 2.4 * shift
        below: list[Point] = [(left, chin), (x + 19 + 0.3 * shift, chin), *corners[2:]]
        canvas.polygon(below, shade(figure.hair, 0.86), Part.HAIR_TELL, line=False)
        return
    # From behind this lies over the head: no line across it, strands, and an uneven lower edge.
    locks: list[Point] = [
        (x + dx, end - (0 if index % 2 else 4)) for index, dx in enumerate((19, 12.5, 6, 0, -6, -12.5, -19))
    ]
    outline: list[Point] = [(x + 18, y - 2), *locks, (x - 18, y - 2)]
    canvas.polygon(outline, figure.hair, Part.HAIR_TELL, line=False)
    canvas.crease(outline, figure.hair, Part.HAIR_TELL)
    for dx in (-9.0, 0.0, 9.0):
        canvas.crease([(x + dx, y + 3), (x + 1.1 * dx, end - 6)], figure.hair, Part.HAIR_TELL)


def _twintails_back(canvas: Canvas, figure: Figure) -> None:
    x, y = figure.head
    fall = 12.0 + 9.0 * figure.spec.hair_length
    if figure.side:
        canvas.limb([(x + 8, y - 8), (x + 20, y + 1), (x + 22, y + fall)], figure.hair, Part.HAIR_TELL, 10.0)
        return
    for side in (-1, 1):
        canvas.limb([(x + side * 18, y - 8), (x + side * 25.5, y + fall)], figure.hair, Part.HAIR_TELL, 9.5)


def _ponytail_back(canvas: Canvas, figure: Figure) -> None:
    x, y = figure.head
    fall = 8.0 + 14.0 * figure.spec.hair_length
    if figure.behind:
        canvas.limb([(x, y - 8), (x, y + 8 + fall)], shade(figure.hair, 0.84), Part.HAIR_TELL, 10.0)
        canvas.limb([(x - 3, y - 8), (x + 3, y - 8)], (235, 80, 110), Part.HAIR_TELL, 3.0)
        return
    canvas.limb(
        [(x + 12, y - 15), (x + 24, y - 12), (x + 26.5, y + fall)], shade(figure.hair, 0.9), Part.HAIR_TELL, 10.5
    )


def _bun_back(canvas: Canvas, figure: Figure) -> None:
    x, y = figure.head
    canvas.ellipse(x + (11 if figure.side else 0), y - 19, 8.2, 7.6, shade(figure.hair, 0.9), Part.HAIR_TELL)


def _sidelocks(length: float) -> Callable[[Canvas, Figure], None]:
    def paint(canvas: Canvas, figure: Figure) -> None:
        if figure.side:
            return
        x, y = figure.head
        end = y + length
        for side in (-1, 1):
            corners: list[Point] = [
                (x + side * 18.6, y - 5),
                (x + side * 13.6, y - 5),
                (x + side * 14.6, end),
                (x + side * 18.6, end - 2),
            ]
            canvas.polygon(corners, figure.hair, Part.HAIR, line=False)

    return paint


def _spikes(canvas: Canvas, figure: Figure) -> None:
    x, y = figure.head
    first = -200 if not figure.side else -150
    for index in range(8 if not figure.side else 7):
        angle = math.radians(first + index * 31.5)
        wide, inner, outer = 0.30, 15.5, 27.0
        corners: list[Point] = [
            (x + inner * math.cos(angle - wide), y - 2 + inner * math.sin(angle - wide)),
            (x + outer * math.cos(angle), y - 2 + outer * math.sin(angle)),
            (x + inner * math.cos(angle + wide), y - 2 + inner * math.sin(angle + wide)),
        ]
        canvas.polygon(corners, figure.hair, Part.HAIR_TELL, line=True)
    cap = (-184.0, 4.0) if not figure.side else (-150.0, 10.0)
    canvas.chord(x, y - 1, (HEAD_RX + 0.4, HEAD_RY + 0.6), cap, figure.hair, Part.HAIR, line=False)


HAIR_STYLES: dict[str, HairStyle] = {
    "short hair": HairStyle(front=_sidelocks(9.0)),
    "long hair": HairStyle(back=_long_back, front=_sidelocks(12.0)),
    "twintails": HairStyle(back=_twintails_back),
    "ponytail": HairStyle(back=_ponytail_back),
    "hair bun": HairStyle(back=_bun_back, front=_sidelocks(5.0)),
    "spiky hair": HairStyle(back=_spikes),
}


def draw_back_hair(canvas: Canvas, figure: Figure) -> None:
    """What hangs or stands behind the head."""
    back = HAIR_STYLES[figure.spec.hair_style].back
    if back is not None:
        back(canvas, figure)


def draw_skull(canvas: Canvas, figure: Figure) -> None:
    """The bare head, or the back of it covered with hair."""
    x, y = figure.head
    if figure.behind:
        canvas.ellipse(x, y, HEAD_RX + 1.2, HEAD_RY + 1.2, figure.hair, Part.HAIR)
        for shift in (-9.0, 0.0, 9.0):
            strand: list[Point] = [(x + 0.8 * shift, y + 3), (x + 1.05 * shift, y + 13 - 0.35 * abs(shift))]
            canvas.crease(strand, figure.hair, Part.HAIR)
        return
    if figure.side:
        canvas.ellipse(x - HEAD_RX + 0.4, y + 6.4, 2.0, 1.6, figure.skin, Part.SKIN)
    canvas.ellipse(x, y, HEAD_RX, HEAD_RY, figure.skin, Part.SKIN)


def draw_front_hair(canvas: Canvas, figure: Figure) -> None:
    """Cap, fringe and locks beside the face."""
    x, y = figure.head
    if figure.side:
        canvas.chord(x + 1, y - 1.5, (HEAD_RX + 0.8, HEAD_RY + 1), (-168, 12), figure.hair, Part.HAIR)
        canvas.polygon([(x - 16.5, y - 5), (x - 2, y - 8), (x - 9, y - 1.5)], figure.hair, Part.HAIR, line=False)
        back: list[Point] = [(x + 1, y - 9), (x + 18.6, y - 3), (x + 17.2, y + 10), (x + 9, y + 15), (x + 4, y + 3)]
        canvas.polygon(back, figure.hair, Part.HAIR, line=False)
        canvas.ellipse(x + 3.2, y + 5, 2.9, 3.6, figure.skin, Part.SKIN, line=False)
        canvas.ellipse(x + 3.4, y + 5.2, 1.4, 2.0, shade(figure.skin, 0.86), Part.SKIN, line=False)
    else:
        canvas.chord(x, y - 1.5, (HEAD_RX + 1, HEAD_RY + 1.4), (-170, -10), figure.hair, Part.HAIR)
        zigzag: list[Point] = [(x + dx, y + dy) for dx, dy in _FRINGE]
        canvas.polygon(zigzag, figure.hair, Part.HAIR, line=False)
        canvas.crease(zigzag, figure.hair, Part.HAIR)
    front = HAIR_STYLES[figure.spec.hair_style].front
    if front is not None:
        front(canvas, figure)


def eye_centres(figure: Figure) -> list[Point]:
    """Where the eyes are: two seen from the front, one from the side."""
    x, y = figure.head
    if figure.side:
        return [(x - 9.0, y + 4.2)]
    return [(x - 7.8, y + 4.2), (x + 7.8, y + 4.2)]


def draw_face(canvas: Canvas, figure: Figure) -> None:
    """Cheeks, eyes and mouth."""
    expression = figure.spec.expression
    for x, y in eye_centres(figure):
        outward = -1 if x < CENTRE_X else 1
        _draw_cheek(canvas, figure, x + outward * (2.6 if not figure.side else -5.0), y + 7.4)
        if expression == "closed eyes":
            canvas.arc(x, y - 1.6, (4.6, 4.6), (15, 165), LASH, Part.EXPRESSION, 2.2)
        else:
            _draw_open_eye(canvas, figure, x, y)
    x, y = figure.head
    mouth: Point = (x - 8.0, y + 11.2) if figure.side else (x, y + 11.0)
    _draw_mouth(canvas, figure, mouth, LIP if figure.spec.skin == "light" else DARK_LIP)


def _draw_cheek(canvas: Canvas, figure: Figure, x: float, y: float) -> None:
    """A smile glows: at a few pixels, colour tells more than the bend of a line."""
    if figure.spec.expression == "smile":
        canvas.ellipse(x, y, 3.8, 2.5, mix(figure.skin, (255, 84, 104), 0.66), Part.EXPRESSION, line=False)
    elif figure.spec.expression == "closed eyes":
        canvas.ellipse(x, y, 2.6, 1.4, mix(figure.skin, (250, 110, 110), 0.34), Part.SKIN, line=False)


def _draw_open_eye(canvas: Canvas, figure: Figure, x: float, y: float) -> None:
    narrow = 0.82 if figure.side else 1.0
    canvas.ellipse(x, y, EYE_RX * narrow, EYE_RY, LASH, Part.EYE, line=False)
    canvas.ellipse(x, y + 0.7, (EYE_RX - 0.8) * narrow, EYE_RY - 1.1, figure.eyes, Part.IRIS, line=False)
    canvas.ellipse(x, y + 0.4, 1.4 * narrow, 2.1, (24, 20, 30), Part.EYE, line=False)
    canvas.ellipse(x - 1.5, y - 2.5, 1.5, 1.5, WHITE, Part.EYE, line=False)


def draw_brows(canvas: Canvas, figure: Figure) -> None:
    """The knitted brows of a frown. They show through the hair, as cartoons draw them."""
    if figure.spec.expression != "frown":
        return
    for x, y in eye_centres(figure):
        outward = -1 if x < CENTRE_X and not figure.side else 1
        slant: list[Point] = [(x - outward * 5.2, y - 2.4), (x + outward * 5.2, y - 7.6)]
        canvas.limb(slant, figure.skin, Part.SKIN, 5.4, line=False)
        canvas.limb(slant, LASH, Part.EXPRESSION, 3.0, line=False)


def _draw_mouth(canvas: Canvas, figure: Figure, mouth: Point, lip: Rgb) -> None:
    (x, y), expression = mouth, figure.spec.expression
    narrow = 0.8 if figure.side else 1.0
    if expression == "open mouth":
        canvas.ellipse(x, y + 0.2, 5.2 * narrow, 4.4, lip, Part.EXPRESSION, line=False)
        canvas.ellipse(x, y + 2.2, 3.4 * narrow, 1.9, (236, 112, 118), Part.EXPRESSION, line=False)
    elif expression == "frown":
        canvas.arc(x, y + 4.0, (5.0 * narrow, 4.6), (205, 335), lip, Part.EXPRESSION, 2.2)
    else:
        # With closed eyes it is the eyes that tell the expression, so that mouth counts for nothing.
        part = Part.SKIN if expression == "closed eyes" else Part.EXPRESSION
        canvas.arc(x, y - 2.6, (5.2 * narrow, 4.8), (22, 158), lip, part, 2.0)


def draw_glasses(canvas: Canvas, figure: Figure) -> None:
    """Round glasses in front of the eyes."""
    if figure.spec.glasses == "none" or figure.behind:
        return
    eyes = eye_centres(figure)
    radii: Point = (6.9 * (0.86 if figure.side else 1.0), 7.2)
    for x, y in eyes:
        canvas.arc(x, y, radii, (0, 360), FRAME, Part.GLASSES, 1.7)
    x, y = eyes[-1]
    ends: list[Point] = [(CENTRE_X - 1.2, y), (CENTRE_X + 1.2, y)]
    if figure.side:
        ends = [(x + radii[0] - 1, y), (x + radii[0] + 7, y - 1.5)]
    canvas.limb(ends, FRAME, Part.GLASSES, 1.7, line=False)
