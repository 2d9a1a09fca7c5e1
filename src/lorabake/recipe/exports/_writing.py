"""Writing a recipe in other words, setting by setting, so that what has no words there is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorabake.recipe.imports._report import Kind, Line

GENERIC = "sd-scripts has no such setting."


@dataclass
class Writing:
    """A recipe that is being written as a training config (``config``) and what all subsets of a dataset config share (``general``)."""

    recipe: Mapping[str, Mapping[str, Any]]
    """Plain values by section, defaults included."""
    config: dict[str, Any] = field(default_factory=dict)
    general: dict[str, Any] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)

    def get(self, setting: str) -> Any:
        """One of our settings, which then counts as accounted for; None if it is absent."""
        self.seen.add(setting)
        place: Any = self.recipe
        for name in setting.split("."):
            place = place.get(name) if isinstance(place, Mapping) else None
        return place

    def put(self, key: str, value: Any, setting: str, note: str = "", *, general: bool = False) -> None:
        """Set one of theirs, and say from what."""
        (self.general if general else self.config)[key] = value
        self.say("converted" if note else "same", setting, key, value, note)

    def say(self, kind: Kind, setting: str, key: str = "", value: Any = None, note: str = "") -> None:
        """What became of a setting."""
        self.lines.append(Line(kind, setting, self.get(setting), key, value, note))

    def lost(self, setting: str, note: str = GENERIC) -> None:
        """A setting that they have nothing for, and that changes the training."""
        self.say("lost", setting, note=note)

    def left(self, setting: str, note: str = GENERIC) -> None:
        """A setting that they have nothing for, and without which the same is learnt."""
        self.say("left", setting, note=note)
