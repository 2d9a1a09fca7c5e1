"""From a `Spec` to a picture with its tags and labels."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from lorabake.base.errors import UserError
from lorabake.pocket.world.accessories import HEADGEAR, draw_object, draw_scarf
from lorabake.pocket.world.canvas import PIXELS_OF_REFERENCE, Canvas, Part
from lorabake.pocket.world.figure import SEATED_DROP, Figure
from lorabake.pocket.world.garments import draw_arm, draw_hand, draw_legs, draw_outfit
from lorabake.pocket.world.head import draw_back_hair, draw_brows, draw_face, draw_front_hair, draw_glasses, draw_skull
from lorabake.pocket.world.scenery import draw_background
from lorabake.pocket.world.spec import Spec, axes
from lorabake.pocket.world.styles import STYLES
from lorabake.pocket.world.tags import tags_of
from lorabake.pocket.world.visibility import tellable

SIZES = (64, 128)
_CANVAS_PIXELS = {64: 256, 128: 384}


@dataclass(frozen=True)
class Drawing:
    """A picture and the truth about it."""

    image: Image.Image
    """RGB, `size` x `size`."""
    tags: list[str]
    labels: dict[str, int | None]
    """Index of the value on every axis, in the order of `axes`; None where the picture does not tell it."""
    features: dict[str, bool | None]
    """Extras by name: True if visible, None if drawn but not visible enough to be told."""
    spec: Spec
    areas: npt.NDArray[np.float64]
    """Visible area of every part id in pixels of a 64 x 64 picture, float64 [256]."""


def draw(spec: Spec, rng_seed: int, size: int = 64) -> Drawing:
    """Draw one picture of `size` x `size` pixels (64 or 128).

    `rng_seed` decides what no tag names (camera shake, clouds, small differences of colour): the same spec, seed and
    size give the same pixels.

    Raises:
        UserError: `size` is not supported.
    """
    if size not in SIZES:
        raise UserError(f"Pictures of the pocket world have {SIZES[0]} or {SIZES[1]} pixels a side, not {size}.")
    rng = random.Random(rng_seed)
    style = STYLES[spec.style]
    canvas = Canvas(_CANVAS_PIXELS[size], style.ink)
    draw_background(canvas, spec.background, rng)
    figure = Figure.of(spec, rng)
    _aim(canvas, spec, rng)
    _draw_figure(canvas, figure)
    areas = canvas.seen()
    image = style.finish(canvas.image.convert("RGB"), size)
    told = tellable(spec, areas, _colourful_area(image))
    features = {
        extra.feature: True if areas[Part.EXTRA + index] >= extra.pixels else None
        for index, extra in enumerate(spec.extras)
    }
    labels = {
        axis: values.index(getattr(spec, axis)) if axis in told and getattr(spec, axis) in values else None
        for axis, values in axes.items()
    }
    tags = tags_of(spec, told, [feature for feature, visible in features.items() if visible])
    return Drawing(image, tags, labels, features, spec, areas)


def label_row(labels: Mapping[str, int | None]) -> npt.NDArray[np.int64]:
    """Labels as numbers in the order of `axes`, -1 for what is not told: int64 [axes]."""
    values = (labels[axis] for axis in axes)
    return np.array([-1 if value is None else value for value in values], np.int64)


def sheet(pictures: Sequence[Drawing | Image.Image], columns: int = 10, scale: int = 1) -> Image.Image:
    """Pictures of one size side by side, each `scale` times as large, pixels kept sharp."""
    images = [picture.image if isinstance(picture, Drawing) else picture for picture in pictures]
    if not images:
        raise UserError("A sheet needs at least one picture.")
    width, height = images[0].width * scale, images[0].height * scale
    gap = 2
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (width + gap), rows * (height + gap)), (128, 128, 128))
    for index, image in enumerate(images):
        large = image.resize((width, height), Image.Resampling.NEAREST)
        page.paste(large, ((index % columns) * (width + gap), (index // columns) * (height + gap)))
    return page


def _aim(canvas: Canvas, spec: Spec, rng: random.Random) -> None:
    """Point the camera: framing, a little shake, and room for what is worn on the head."""
    shake_x, shake_y, zoom = rng.uniform(-3.5, 3.5), rng.uniform(-2.0, 2.0), rng.uniform(0.96, 1.04)
    drop = SEATED_DROP if spec.pose == "sitting" else 0.0
    room = max([HEADGEAR[spec.headgear].headroom, *(extra.headroom for extra in spec.extras)])
    scale, centre_y = {
        "full body": (1.03, 50.0 + 0.55 * drop - 0.5 * room),
        "upper body": (1.40, 40.0 + drop - 0.7 * room),
        "portrait": (1.92, 33.0 + drop - 0.7 * room),
    }[spec.framing]
    canvas.aim(scale * zoom * (1 - 0.01 * room), (50.0, centre_y), (50.0 + shake_x, 50.0 + shake_y), spec.flip)


def _draw_figure(canvas: Canvas, figure: Figure) -> None:
    """Everything from back to front."""
    headgear = HEADGEAR[figure.spec.headgear]

    def extras(layer: str) -> None:
        for index, extra in enumerate(figure.spec.extras):
            if extra.layer == layer:
                extra.paint(canvas, figure, Part.EXTRA + index)

    extras("behind")
    if not figure.behind:
        draw_back_hair(canvas, figure)
    if figure.side:
        draw_arm(canvas, figure, holding=False)
    draw_legs(canvas, figure)
    draw_outfit(canvas, figure)
    extras("outfit")
    if not figure.side:
        draw_arm(canvas, figure, holding=False)
    draw_arm(canvas, figure, holding=True)
    draw_scarf(canvas, figure)
    if headgear.behind:
        headgear.behind(canvas, figure)
    draw_skull(canvas, figure)
    if figure.behind:
        draw_back_hair(canvas, figure)
    else:
        draw_face(canvas, figure)
        extras("face")
        draw_front_hair(canvas, figure)
        draw_brows(canvas, figure)
        draw_glasses(canvas, figure)
    extras("hair")
    if headgear.front:
        headgear.front(canvas, figure)
    if figure.spec.object != "none":
        draw_object(canvas, figure)
        draw_hand(canvas, figure, holding=True)
    extras("top")


def _colourful_area(image: Image.Image) -> float:
    """How much of the picture is not grey, in pixels of a 64 x 64 picture."""
    pixels = np.asarray(image)
    spread = pixels.max(-1).astype(np.int16) - pixels.min(-1)
    return float((spread > 24).mean() * PIXELS_OF_REFERENCE)
