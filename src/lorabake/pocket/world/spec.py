"""What a picture shows: the axes of the world, a point in them, and how points are drawn at random."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorabake.base.errors import UserError, nearest
from lorabake.pocket.world.palette import CLOTH, EYES, HAIR, SKIN

if TYPE_CHECKING:
    from lorabake.pocket.world.canvas import Canvas
    from lorabake.pocket.world.figure import Figure

axes: dict[str, tuple[str, ...]] = {
    "hair_color": tuple(HAIR),
    "hair_style": ("short hair", "long hair", "twintails", "ponytail", "hair bun", "spiky hair"),
    "eye_color": tuple(EYES),
    "expression": ("smile", "open mouth", "frown", "closed eyes"),
    "skin": tuple(SKIN),
    "outfit": ("short dress", "long dress", "skirt", "pants", "robe", "armor"),
    "outfit_color": tuple(CLOTH),
    "bottom_color": tuple(CLOTH),
    "headgear": ("none", "witch hat", "cap", "crown", "hair bow", "cat ears", "rabbit ears"),
    "headgear_color": tuple(CLOTH),
    "glasses": ("none", "glasses"),
    "scarf": ("none", "scarf"),
    "scarf_color": tuple(CLOTH),
    "object": ("none", "sword", "book", "umbrella", "ball"),
    "pose": ("standing", "arms up", "waving", "sitting"),
    "view": ("front", "from side", "from behind"),
    "framing": ("full body", "upper body", "portrait"),
    "background": ("white background", "sky", "forest", "indoors", "night", "beach"),
    "style": ("flat color", "outline", "sepia", "monochrome", "pastel color"),
}
"""Every axis with its values, in a fixed order. All of them can be named by tags and are scored by the judge."""

_WEIGHTS: dict[str, tuple[float, ...]] = {
    "skin": (2, 1),
    "headgear": (3, 1, 1, 1, 1, 1, 1),
    "glasses": (3, 1),
    "scarf": (2.5, 1),
    "object": (3, 1.5, 1.5, 1.5, 1.5),
    "view": (6, 2, 1.3),
    "framing": (4, 3, 3),
    "background": (3, 1.2, 1.2, 1.2, 1.2, 1.2),
    "style": (4, 3, 1.2, 1.2, 1.5),
    "expression": (3, 2, 2, 1.5),
}
"""How often each value is drawn, in the order of the axis; axes left out are uniform."""

_ONLY_ON_REQUEST: dict[str, set[str]] = {}
"""Values that can be drawn but are never sampled and belong to no axis; see `allow`."""


@dataclass(frozen=True)
class Extra:
    """Something drawn on top of the ordinary world, such as an antenna or stripes.

    `layer` says when `paint(canvas, figure, part)` is called: "behind" (before the body), "outfit" (after the
    garments, before arms and scarf), "face" (after the face, before the front hair), "hair" (after all hair) or
    "top" (last of all). `part` is the id the hook must draw with, so that its visible area can be counted.
    The feature counts as visible from `pixels` pixels of a 64 x 64 picture on.
    """

    feature: str
    layer: str
    paint: Callable[[Canvas, Figure, int], None]
    pixels: float = 8.0
    headroom: float = 0.0
    """Units above the head that the camera should leave free."""


@dataclass(frozen=True)
class Spec:
    """One picture's content. The fields up to `style` are the axes; the rest is variation that no tag names."""

    hair_color: str = "brown"
    hair_style: str = "short hair"
    eye_color: str = "blue"
    expression: str = "smile"
    skin: str = "light"
    outfit: str = "short dress"
    outfit_color: str = "red"
    bottom_color: str = "blue"
    headgear: str = "none"
    headgear_color: str = "red"
    glasses: str = "none"
    scarf: str = "none"
    scarf_color: str = "red"
    object: str = "none"
    pose: str = "standing"
    view: str = "front"
    framing: str = "full body"
    background: str = "white background"
    style: str = "flat color"
    hair_length: float = 0.5
    dress_length: float = 0.5
    flip: bool = False
    extras: tuple[Extra, ...] = field(default=())

    def __post_init__(self) -> None:
        for axis, values in axes.items():
            value = getattr(self, axis)
            if value not in values and value not in _ONLY_ON_REQUEST.get(axis, ()):
                raise UserError(f"The pocket world has no {axis} {value!r}. {nearest(value, values)}")


def allow(axis: str, value: str) -> None:
    """Let `Spec` take `value` on `axis` although it is neither sampled nor scored (a held-out outfit, for example)."""
    _check_axis(axis)
    _ONLY_ON_REQUEST.setdefault(axis, set()).add(value)


def sample(rng: random.Random, hold_out: Mapping[str, Collection[str]] | None = None, **fixed: Any) -> Spec:
    """A random picture content.

    Args:
        rng: source of all randomness; the same state gives the same content.
        hold_out: values that must not occur, by axis: `{"background": {"beach"}}`.
        **fixed: fields of `Spec` that are given instead of drawn.

    Raises:
        UserError: an axis or value does not exist, or an axis has no value left.
    """
    chosen: dict[str, Any] = {}
    held = hold_out or {}
    for axis in held:
        _check_axis(axis)
    for axis, values in axes.items():
        weights = _WEIGHTS.get(axis, (1,) * len(values))
        if axis in held:
            values, weights = _remaining(axis, values, weights, held[axis])
        chosen[axis] = rng.choices(values, weights)[0]
    chosen["hair_length"] = rng.random()
    chosen["dress_length"] = rng.random()
    chosen["flip"] = rng.random() < 0.5
    for name in fixed:
        if name not in Spec.__dataclass_fields__:
            raise UserError(f"A picture has no field {name!r}. {nearest(name, Spec.__dataclass_fields__)}")
    return Spec(**{**chosen, **fixed})


def _remaining(
    axis: str, values: tuple[str, ...], weights: tuple[float, ...], held: Collection[str]
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    unknown = [value for value in held if value not in values]
    if unknown:
        raise UserError(f"{unknown[0]!r} cannot be held out of {axis}. {nearest(unknown[0], values)}")
    kept = [(value, weight) for value, weight in zip(values, weights, strict=True) if value not in held]
    if not kept:
        raise UserError(f"All values of {axis} are held out; leave at least one of: {', '.join(values)}.")
    return tuple(value for value, _ in kept), tuple(weight for _, weight in kept)


def _check_axis(axis: str) -> None:
    if axis not in axes:
        raise UserError(f"The pocket world has no axis {axis!r}. {nearest(axis, axes)}")
