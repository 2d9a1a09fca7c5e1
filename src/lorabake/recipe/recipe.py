"""The recipe as an object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel

from lorabake.base.cards import Settings
from lorabake.base.errors import UserError, nearest
from lorabake.recipe.sections import (
    DataSettings,
    ModelSettings,
    OutputSettings,
    PreservationSettings,
    RateSettings,
    SampleSettings,
    SaveSettings,
    StartSettings,
    TrainSettings,
    ValidationSettings,
)

SECTION_NAMES = (
    "model",
    "data",
    "adapter",
    "objective",
    "optimizer",
    "schedule",
    "train",
    "preservation",
    "validation",
    "save",
    "sample",
    "output",
)
"""In the order in which files have them."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A part by name, with its settings."""

    name: str
    settings: Settings


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides a run. Frozen; ``with_value`` makes a changed copy that can say why."""

    model: ModelSettings
    data: DataSettings
    adapter: Choice
    objective: Choice
    optimizer: Choice
    rates: RateSettings
    schedule: Choice
    train: TrainSettings
    save: SaveSettings
    sample: SampleSettings
    output: OutputSettings
    preservation: PreservationSettings = field(default_factory=PreservationSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    start: StartSettings = field(default_factory=StartSettings)
    reasons: dict[str, str] = field(default_factory=dict, compare=False)
    """Why a derived value is what it is, by dotted name."""

    def why(self, setting: str) -> str:
        """Where the value of a dotted setting (``optimizer.lr``) comes from; of a table, where each derived value in it does.

        Raises:
            UserError: the recipe has no such setting.
        """
        if setting in self.reasons:
            return self.reasons[setting]
        if setting not in (known := set(self._names())):
            raise UserError(f"The recipe has no setting '{setting}'. {nearest(setting, known)}")
        inside = {name: why for name, why in self.reasons.items() if name.startswith(f"{setting}.")}
        return "; ".join(f"{name.removeprefix(setting + '.')}: {why}" for name, why in inside.items()) or (
            f"given in the recipe, or its default: see `lorabake explain {setting}`"
        )

    def with_value(self, section: str, name: str, value: Any, why: str) -> Recipe:
        """A copy with one derived value and its reason."""
        return self.with_values(section, name, value, {f"{section}.{name}": why})

    def with_values(self, section: str, name: str, value: Any, reasons: Mapping[str, str]) -> Recipe:
        """A copy with a table in which values were derived, and the reason of each by its dotted name."""
        attribute = "rates" if section == "optimizer" else section
        held = getattr(self, attribute)
        settings = held.settings if isinstance(held, Choice) else held
        changed = settings.model_copy(update={name: value})
        if isinstance(held, Choice):
            changed = Choice(held.name, changed)
        return replace(self, **{attribute: changed, "reasons": {**self.reasons, **reasons}})

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain values by section, as in the TOML file; absent values are left out."""
        plain: dict[str, dict[str, Any]] = {}
        for section, held in self._sections().items():
            plain[section] = {}
            for item in held:
                plain[section] |= (
                    {"name": item} if isinstance(item, str) else item.model_dump(mode="json", exclude_none=True)
                )
        return plain

    def _sections(self) -> dict[str, tuple[str | Settings, ...]]:
        """What each section holds, in the order of the TOML file: the name of a chosen part, and settings."""
        return {
            "model": (self.model,),
            "data": (self.data,),
            "adapter": (self.adapter.name, self.start, self.adapter.settings),
            "objective": (self.objective.name, self.objective.settings),
            "optimizer": (self.optimizer.name, self.rates, self.optimizer.settings),
            "schedule": (self.schedule.name, self.schedule.settings),
            "train": (self.train,),
            "preservation": (self.preservation,),
            "validation": (self.validation,),
            "save": (self.save,),
            "sample": (self.sample,),
            "output": (self.output,),
        }

    def _names(self) -> Iterator[str]:
        """Every section and dotted setting, with a value or without."""
        for section, held in self._sections().items():
            yield section
            for item in held:
                yield from (f"{section}.{name}" for name in (["name"] if isinstance(item, str) else _names(item)))

    def marks(self, setting: str) -> Sequence[Any]:
        """What stands beside the type of a dotted setting; nothing where there is no such setting, or it lies in a table."""
        section, _, name = setting.partition(".")
        fields = [type(item).model_fields for item in self._sections().get(section, ()) if isinstance(item, Settings)]
        return next((of[name].metadata for of in fields if name in of), ())

    def differences(self, other: dict[str, dict[str, Any]]) -> list[tuple[str, Any, Any]]:
        """Dotted settings in which ``other`` (a ``to_dict``) differs: name, ours, theirs."""
        ours, theirs = _flat(self.to_dict()), _flat(other)
        return [
            (name, ours.get(name), theirs.get(name))
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name)
        ]


def _names(settings: BaseModel) -> Iterator[str]:
    """Every setting, those inside tables with the table's name before theirs."""
    for name in type(settings).model_fields:
        yield name
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            yield from (f"{name}.{inner}" for inner in _names(value))
        elif isinstance(value, Mapping):
            yield from (f"{name}.{key}" for key in value)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat
