"""The recipe as an object."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from lorabake.base.cards import Settings
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
        """Where the value of a dotted setting (``optimizer.lr``) comes from."""
        return self.reasons.get(setting, "given in the recipe, or its default: see `lorabake explain " + setting + "`")

    def with_value(self, section: str, name: str, value: Any, why: str) -> Recipe:
        """A copy with one derived value and its reason."""
        attribute = "rates" if section == "optimizer" else section
        held = getattr(self, attribute)
        settings = held.settings if isinstance(held, Choice) else held
        changed = settings.model_copy(update={name: value})
        if isinstance(held, Choice):
            changed = Choice(held.name, changed)
        return replace(self, **{attribute: changed, "reasons": {**self.reasons, f"{section}.{name}": why}})

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain values by section, as in the TOML file; absent values are left out."""

        def plain(settings: Settings) -> dict[str, Any]:
            return settings.model_dump(mode="json", exclude_none=True)

        return {
            "model": plain(self.model),
            "data": plain(self.data),
            "adapter": {"name": self.adapter.name, **plain(self.start), **plain(self.adapter.settings)},
            "objective": {"name": self.objective.name, **plain(self.objective.settings)},
            "optimizer": {"name": self.optimizer.name, **plain(self.rates), **plain(self.optimizer.settings)},
            "schedule": {"name": self.schedule.name, **plain(self.schedule.settings)},
            "train": plain(self.train),
            "preservation": plain(self.preservation),
            "validation": plain(self.validation),
            "save": plain(self.save),
            "sample": plain(self.sample),
            "output": plain(self.output),
        }

    def differences(self, other: dict[str, dict[str, Any]]) -> list[tuple[str, Any, Any]]:
        """Dotted settings in which ``other`` (a ``to_dict``) differs: name, ours, theirs."""
        ours, theirs = _flat(self.to_dict()), _flat(other)
        return [
            (name, ours.get(name), theirs.get(name))
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name)
        ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat
