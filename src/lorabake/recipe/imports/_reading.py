"""Reading a foreign config key by key, so that each is accounted for: what it became, or why it became nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lorabake.base.errors import Problem, nearest
from lorabake.recipe.imports import _values
from lorabake.recipe.imports._report import Kind, Line

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """A foreign key that is a setting of ours, at most in another unit."""

    key: str
    setting: str
    kind: Callable[[Any], Any]
    """Reads the foreign value; one of ``_values``."""
    default: Any = None
    """Theirs, as ours would have it, to be stated where the key is absent; None where it is ours too."""
    off: tuple[Any, ...] = ()
    """Values that mean that it is not used: nothing is written."""
    to: Callable[[Any], Any] | None = None
    """From their unit to ours."""
    back: Callable[[Any], Any] | None = None
    """From our unit to theirs, for the export. Absent: the same value."""
    note: str = ""
    """The arithmetic, if there is a ``to``."""


@dataclass
class Reading:
    """A config that is being read. Sections of a file that are read apart share ``values`` and the lists."""

    given: Mapping[str, Any]
    prefix: str = ""
    """What stands in front of a key where it is told, such as ``train.``."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """How keys are called in the file, where they were renamed to be read."""
    original: Mapping[str, Any] = field(default_factory=dict)
    """The file's own values, where they were changed to be read; ``given`` else."""
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    asides: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    source: Path = Path()
    """The file. What it names may lie beside it."""

    def part(self, given: Mapping[str, Any], prefix: str) -> Reading:
        """Another part of the same file."""
        return Reading(
            given,
            prefix,
            values=self.values,
            lines=self.lines,
            problems=self.problems,
            warnings=self.warnings,
            asides=self.asides,
            source=self.source,
        )

    def called(self, key: str) -> str:
        """How the file calls a key."""
        return self.prefix + self.aliases.get(key, key)

    # ---- what is there ----

    def has(self, key: str) -> bool:
        """Whether the key is there and says something."""
        return not _values.is_nothing(self.given.get(key))

    def take(self, key: str, kind: Callable[[Any], T]) -> T | None:
        """The value of a key, which then counts as accounted for; None if it is absent, says nothing or cannot be read."""
        self.seen.add(key)
        return self.read(key, self.given.get(key), kind)

    def read(self, key: str, value: Any, kind: Callable[[Any], T]) -> T | None:
        """A value, also from deep inside a table, that is told under ``key``; None if it says nothing or cannot be read."""
        if _values.is_nothing(value):
            return None
        try:
            return kind(value)
        except ValueError as error:
            self.problems.append(Problem(self.called(key), f"{_values.shown(value)} {error}."))
            return None

    def number(self, key: str) -> float | None:
        """A finite number, if there is one."""
        return self.take(key, _values.number)

    def whole(self, key: str) -> int | None:
        """A whole number, if there is one."""
        return self.take(key, _values.whole)

    def flag(self, key: str) -> bool:
        """Whether the key is there and true."""
        return bool(self.take(key, _values.flag))

    def text(self, key: str) -> str | None:
        """Text, if there is some."""
        return self.take(key, _values.text)

    def table(self, key: str) -> Mapping[str, Any]:
        """A table, empty if it is absent or null."""
        self.seen.add(key)
        found = self.given.get(key)
        if _values.is_nothing(found):
            return {}
        if not isinstance(found, Mapping):
            self.problems.append(Problem(self.called(key), f"{_values.shown(found)} is no table of keys and values."))
            return {}
        return found

    # ---- what becomes of it ----

    def put(self, setting: str, value: Any, key: str, note: str = "", kind: Kind | None = None) -> None:
        """Set one of ours, and say from what."""
        target, *names = setting.split(".")
        place = self.values.setdefault(target, {})
        for name in names[:-1]:
            place = place.setdefault(name, {})
        place[names[-1]] = value
        self.say(kind or ("converted" if note else "same"), key, setting, value, note)

    def default(self, setting: str, value: Any, key: str, note: str = "") -> None:
        """State a default of theirs."""
        self.put(setting, value, key, note, "default")

    def get(self, setting: str) -> Any:
        """One of ours, if it was set."""
        place: Any = self.values
        for name in setting.split("."):
            place = place.get(name) if isinstance(place, dict) else None
        return place

    def say(self, kind: Kind, key: str, setting: str = "", value: Any = None, note: str = "") -> None:
        """What became of a key."""
        self.seen.add(key)
        name = self.aliases.get(key, key)
        given = (self.original or self.given).get(name)
        self.lines.append(Line(kind, self.prefix + name, plain_value(given), setting, value, note))

    def lost(self, key: str, note: str) -> None:
        """A key that we have nothing for, and that changes the training: why, and what to do instead."""
        self.say("lost", key, note=note)

    def left(self, key: str, note: str) -> None:
        """A key that we have nothing for, and without which the same is learnt."""
        self.say("left", key, note=note)

    def unused(self, key: str, note: str) -> None:
        """A key that does nothing in the trainer that it is for."""
        self.say("unused", key, note=note)

    # ---- many at once ----

    def rows(self, rows: Iterable[Row]) -> None:
        """Keys that are settings of ours."""
        for row in rows:
            value = self.take(row.key, row.kind)
            if value is None:
                if row.default is not None and not self.has(row.key):
                    self.default(row.setting, row.default, row.key)
            elif value in row.off:
                self.say("same", row.key, row.setting, None, "off")
            else:
                ours = row.to(value) if row.to else value
                self.put(row.setting, ours, row.key, row.note if row.to and ours != value else "")

    def losses(self, table: Mapping[str, tuple[tuple[Any, ...], str]], kind: Kind = "lost") -> None:
        """Keys that we have nothing for: each with the values that mean that it is not used, and what to say else."""
        for key, (idle, note) in table.items():
            self.seen.add(key)
            if self.has(key) and _values.plain(self.given[key]) not in idle:
                self.say(kind, key, note=note)
            elif key in self.given:
                self.asides.append(self.called(key))

    def rest(self, idle: Iterable[str], known: Iterable[str], swallowed: str) -> None:
        """What was not accounted for: keys without use for a recipe are counted, the others are not known.

        Args:
            idle: keys that say nothing about training.
            known: further keys that the trainer has, for guessing what was meant.
            swallowed: what the trainer does with a key that it does not know.
        """
        idle = set(idle)
        names = idle | set(known) | self.seen
        for key in self.given:
            if key in self.seen:
                continue
            if key in idle:
                self.asides.append(self.called(key))
            else:
                hint = nearest(key, names)
                meant = hint if hint.startswith("Did you mean") else "Nothing it knows is spelt like this."
                self.say("unknown", key, note=f"{swallowed} {meant}")


def plain_value(value: Any) -> Any:
    """A foreign value that JSON can hold: dates of YAML and TOML become text."""
    if isinstance(value, Mapping):
        return {str(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain_value(item) for item in value]
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)
