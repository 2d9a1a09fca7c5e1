"""What an import found: the recipe's values, and for each foreign key what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lorabake.recipe.imports._values import shown
from lorabake.recipe.recipe import SECTION_NAMES
from lorabake.recipe.toml import values_to_toml

Kind = Literal["same", "converted", "default", "unused", "lost", "left", "unknown"]
"""What became of a key: ``same`` setting; ``converted`` from another unit; ``default``, absent there and stated here, because ours differs;
``unused``, there too; ``lost``, and that changes the training; ``left``, and that does not; ``unknown`` to the trainer itself."""

TITLES: dict[Kind, str] = {
    "same": "taken over",
    "converted": "taken over, in other units or words",
    "default": "not in the file: their defaults, stated",
    "unused": "without effect, there as here",
    "left": "not taken over; what is learnt stays the same",
    "lost": "NOT TAKEN OVER, AND THE TRAINING DIFFERS FOR IT",
    "unknown": "keys that the trainer itself does not know",
}
"""In the order in which a report has them."""


@dataclass(frozen=True, slots=True)
class Line:
    """What became of one key."""

    kind: Kind
    key: str
    given: Any
    """The foreign value; None where there was none."""
    setting: str = ""
    """Ours, dotted; "" if there is none."""
    value: Any = None
    """Ours, as it stands in the recipe; None for our default."""
    note: str = ""
    """The arithmetic, or why not and what to do instead."""

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "kind": self.kind,
            "key": self.key,
            "given": self.given,
            "setting": self.setting or None,
            "value": self.value,
            "note": self.note,
        }


@dataclass(frozen=True)
class Imported:
    """A foreign config as a recipe."""

    source: str
    """The file's name."""
    trainer: str
    """Whose config it is, and which."""
    values: Mapping[str, Mapping[str, Any]]
    """The recipe's plain values by section; paths are absolute."""
    lines: tuple[Line, ...]
    asides: tuple[str, ...]
    """Keys that say nothing about training."""
    warnings: tuple[str, ...]
    """What must be seen to before the recipe can be trained."""

    def of(self, *kinds: Kind) -> tuple[Line, ...]:
        """The lines of some kinds."""
        return tuple(line for line in self.lines if line.kind in kinds)

    def toml(self) -> str:
        """The recipe as a file: each value with the foreign key that it is from, and what is missing at the end."""
        reasons = {line.setting: _origin(line) for line in self.of("same", "converted", "default") if line.setting}
        sections = {name: self.values[name] for name in SECTION_NAMES if self.values.get(name)}
        head = f"# From {shown(self.source)}, {self.trainer}."
        tail = [f"# not taken over: {_left(line)}. {shown_note(line.note)}" for line in self.of("lost")]
        return "\n".join([head, "", values_to_toml(sections, reasons), *tail]).rstrip() + "\n"

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "source": self.source,
            "trainer": self.trainer,
            "recipe": {name: dict(section) for name, section in self.values.items()},
            "lines": [line.to_dict() for line in self.lines],
            "asides": list(self.asides),
            "warnings": list(self.warnings),
        }

    def report(self) -> str:
        """For people: a table for each kind."""
        parts = [f"{shown(self.source)} is {self.trainer}."]
        for kind, title in TITLES.items():
            if lines := self.of(kind):
                parts += ["", f"{title}:", *table(lines)]
        if self.asides:
            count = len(self.asides)
            which = ", ".join(shown(key) for key in self.asides)
            parts += ["", f"{count} key{'s' * (count != 1)} that a recipe has no use for: {which}."]
        if self.warnings:
            parts += ["", *(f"note: {warning}" for warning in self.warnings)]
        return "\n".join(parts)


def table(lines: tuple[Line, ...]) -> list[str]:
    """The lines below each other, in columns."""
    rows = [(_left(line), _right(line), shown_note(line.note)) for line in lines]
    left = min(46, max(len(row[0]) for row in rows))
    right = min(46, max(len(row[1]) for row in rows))
    told = [
        f"  {row[0]:<{left}}  {row[1]:<{right}}  {row[2]}" if right else f"  {row[0]:<{left}}  {row[2]}" for row in rows
    ]
    return [row.rstrip() for row in told]


def shown_note(note: str) -> str:
    """A note on one line."""
    return " ".join("".join(character if character.isprintable() else " " for character in note).split())


def _left(line: Line) -> str:
    return shown(line.key) if line.given is None else f"{shown(line.key)} = {shown(line.given)}"


def _right(line: Line) -> str:
    if not line.setting:
        return ""
    return f"{line.setting} = {shown(line.value)}" if line.value is not None else line.setting


def _origin(line: Line) -> str:
    told = f"their {line.key}" + ("" if line.given is None else f" = {shown(line.given)}")
    if line.kind == "default":
        told = f"their default ({line.key} is not given)"
    return f"{told}: {line.note}" if line.note and line.kind == "converted" else told
