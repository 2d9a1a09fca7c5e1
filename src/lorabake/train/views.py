"""The ways each sample is seen: looks that are encoded ahead, or one made afresh whenever it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

from lorabake.base.events import Events
from lorabake.dataset.augment import USUAL_VIEWS, Box, look_at
from lorabake.dataset.buckets import Placement
from lorabake.dataset.folder import Sample
from lorabake.dataset.scan import named
from lorabake.recipe.sections import DataSettings
from lorabake.train.latents import View

_T = TypeVar("_T")
_FRESH = 1 << 31
"""Looks at a picture of which each step draws one, where none is kept: more than any run shows."""


class Lazy(Sequence[_T]):
    """A sequence whose items are made when they are asked for, and not kept."""

    def __init__(self, count: int, make: Callable[[int], _T]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> _T: ...
    @overload
    def __getitem__(self, index: slice) -> Lazy[_T]: ...
    def __getitem__(self, index: int | slice) -> _T | Lazy[_T]:
        if isinstance(index, slice):
            chosen = range(self._count)[index]
            return Lazy(len(chosen), lambda at: self._make(chosen[at]))
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._make(index)


def each_of(items: Sequence[Any], make: Callable[[int], _T]) -> Sequence[_T]:
    """What ``make`` makes of each index of ``items``: now, or where they are lazy whenever it is asked for."""
    return Lazy(len(items), make) if isinstance(items, Lazy) else [make(index) for index in range(len(items))]


def views_of(
    samples: Sequence[Sample],
    placements: Sequence[Placement],
    data: DataSettings,
    faces_of: Callable[[Sequence[Sample]], Sequence[Sequence[Box]]],
    events: Events,
) -> list[Sequence[View]]:
    """The views of each sample. Look n is mirrored or not at 2n and 2n + 1 with flip, and at n without.

    Args:
        samples: what is trained on.
        placements: of each of them when nothing is random.
        data: what may differ between views.
        faces_of: finds the faces in their pictures; asked where crops go by faces.
        events: told in which pictures no face was found.
    """
    mirrorings = (False, True) if data.flip else (False,)
    faces: Sequence[Sequence[Box]] = [()] * len(samples)
    if data.augment.face_crop is not None:
        faces = faces_of(samples)
        _tell_without(samples, faces, events)

    def of(sample: Sample, placement: Placement, found: Sequence[Box]) -> Sequence[View]:
        def view(index: int) -> View:
            number, mirrored = divmod(index, len(mirrorings))
            look = look_at(sample.size, placement, sample.sha256, number, data.augment, found)
            return View(sample, look.placement, mirrorings[mirrored], look.tint)

        if not data.augment.varies:
            return [View(sample, placement, mirrored) for mirrored in mirrorings]
        if data.augment.fresh:
            return Lazy(_FRESH * len(mirrorings), view)
        kept = data.augment.views if isinstance(data.augment.views, int) else USUAL_VIEWS
        return [view(index) for index in range(kept * len(mirrorings))]

    return [of(*each) for each in zip(samples, placements, faces, strict=True)]


def _tell_without(samples: Sequence[Sample], faces: Sequence[Sequence[Box]], events: Events) -> None:
    found = {sample.name: bool(boxes) for sample, boxes in zip(samples, faces, strict=True)}
    without = [name for name, any_face in found.items() if not any_face]
    if without:
        text = f"no face was found in {len(without)} of {len(found)} pictures, which are cropped as ever: {named(without)}."
        events.emit("note", text=f"data.augment.face_crop: {text}")
