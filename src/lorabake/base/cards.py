"""Cards: how parts introduce themselves.

A part (model family, network type, optimizer, schedule, loss weighting …) has one card beside its code: its name, one line about it,
its settings, and where its code is. The rooms are walked for cards, so nothing holds a second list: the same card feeds ``list``,
``explain``, the recipe, the written TOML comments and the contract tests. Plug-ins add cards through the entry-point group
``lorabake.cards`` (an entry point names a module).
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ConfigDict

from lorabake.base.errors import MissingExtra, UserError, nearest

ROOMS = {
    "family": "lorabake.families",
    "adapter": "lorabake.adapters",
    "objective": "lorabake.objectives",
    "weighting": "lorabake.objectives",
    "timesteps": "lorabake.objectives",
    "loss": "lorabake.objectives",
    "huber_schedule": "lorabake.objectives",
    "noise": "lorabake.objectives",
    "optimizer": "lorabake.optimizers",
    "schedule": "lorabake.optimizers",
    "sampler": "lorabake.sampling.samplers",
}
"""Which room, or module of one, is walked for which kind of part."""


@dataclass(frozen=True, slots=True)
class IfChanged:
    """A mark on a part's setting (in its ``Annotated`` type): what it means when a run goes on with another value than it was begun with."""

    refused: str = ""
    """Why a run cannot go on. Empty: it can."""
    meaning: str = ""
    """What becomes of what was learned so far. Empty: what its section says."""


class Settings(BaseModel):
    """Base of every group of settings: frozen, unknown keys, NaN and infinity are errors, and each field's docstring is its explanation."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    def changed(self, *names: str) -> dict[str, Any]:
        """Values that are not the default's, by name: of all settings, or of those named."""
        fields = type(self).model_fields
        defaults = {name: fields[name].get_default(call_default_factory=True) for name in names or fields}
        return {name: value for name, default in defaults.items() if (value := getattr(self, name)) != default}

    def metadata(self) -> dict[str, Any]:
        """What a trained file tells of these settings: fields of ``formats.metadata.TrainingFacts``."""
        return {}


@dataclass(frozen=True)
class Card:
    """What a part says about itself. ``code`` is ``"module:attribute"`` and is imported only when the part is used."""

    kind: str
    name: str
    summary: str
    code: str
    settings: type[Settings] = Settings
    extra: str | None = None

    def missing(self) -> str:
        """What to install before the part can be used; empty if it can. Nothing is imported."""
        package = self.code.partition(":")[0].partition(".")[0]
        if self.extra is None or package == "lorabake" or importlib.util.find_spec(package):
            return ""
        return str(MissingExtra(f"'{self.name}'", self.extra))

    def load(self) -> Any:
        """Import and return the part's code.

        Raises:
            MissingExtra: the part needs a package that is not installed; the message names the pip command.
        """
        module, _, attribute = self.code.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            if self.extra and not (error.name or "").startswith("lorabake"):
                raise MissingExtra(f"The {self.kind} '{self.name}'", self.extra) from error
            raise


@functools.cache
def cards(kind: str) -> dict[str, Card]:
    """All cards of one kind, by name, in alphabetical order."""
    met = {id(card): card for module in _modules(ROOMS[kind]) for card in _cards_in(module)}  # one may be met twice
    found = [card for card in met.values() if card.kind == kind]
    names = [card.name for card in found]
    doubles = {name for name in names if names.count(name) > 1}
    assert not doubles, f"two {kind} cards are called {doubles}"
    return {card.name: card for card in sorted(found, key=lambda card: card.name)}


def find(kind: str, name: str) -> Card:
    """One card.

    Raises:
        UserError: no part of this kind has that name; the message says what was probably meant.
    """
    known = cards(kind)
    if name not in known:
        raise UserError(f"'{name}' is not a known {kind}. {nearest(name, known)}")
    return known[name]


def _modules(room: str) -> Iterator[ModuleType]:
    package = importlib.import_module(room)
    if not hasattr(package, "__path__"):
        yield package
    for item in pkgutil.iter_modules(getattr(package, "__path__", []), room + "."):
        card_module = f"{item.name}.card"
        if item.ispkg and importlib.util.find_spec(card_module):
            yield importlib.import_module(card_module)
        elif not item.ispkg and not item.name.rpartition(".")[2].startswith("_"):
            yield importlib.import_module(item.name)
    yield from _plugins()


@functools.cache
def _plugins() -> tuple[ModuleType, ...]:
    """Modules of plug-ins. Every installed package is looked at for them (20 ms): once for all rooms."""
    found = []
    for entry in importlib.metadata.entry_points(group="lorabake.cards"):
        try:
            found.append(entry.load())
        except Exception as error:  # whatever a stranger's module does, the commands that do not need it must work
            warnings.warn(f"The plug-in '{entry.name}' ({entry.value}) cannot be loaded: {error!r}", stacklevel=2)
    return tuple(found)


def _cards_in(module: ModuleType) -> Iterator[Card]:
    for _, value in inspect.getmembers(module):
        for card in value if isinstance(value, tuple) else (value,):
            if isinstance(card, Card):
                yield card
