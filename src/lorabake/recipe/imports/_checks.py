"""Making an imported recipe one that loads: what a setting of ours does not allow is taken back and told."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lorabake.base.cards import cards
from lorabake.base.errors import Problem, Problems, UserError
from lorabake.base.units import Duration
from lorabake.protocols.family import Prediction
from lorabake.recipe.imports._paths import is_hub_name
from lorabake.recipe.imports._reading import Reading
from lorabake.recipe.imports._report import Imported, Kind
from lorabake.recipe.load import parse_sections
from lorabake.recipe.optimizers import optimizer_problems
from lorabake.recipe.sections import PARTS, SECTIONS

_TABLES = ("optimizer.block_lr", "adapter.block_rank", "adapter.block_alpha")
"""Settings that are tables themselves."""


def fit(reading: Reading) -> Reading:
    """Take back what the recipe cannot hold, until the rest is valid. A part whose package is missing stays, and is told."""
    if prediction_of(reading.values) == "flow" and reading.get("train.precision") == "fp16":
        del reading.values["train"]["precision"]
        _tell(reading, "train.precision", "flow models overflow in fp16: bf16 where a GPU has it, else fp32.", "left")
    for _ in range(200):
        problems = _problems(reading.values)
        fixed = [problem for problem in problems if _taken_back(reading, problem)]
        if not fixed:
            reading.warnings += [f"{problem.where}: {problem.what}" for problem in problems]
            return reading
    return reading


def _problems(values: Mapping[str, Any]) -> list[Problem]:
    found: list[Problem] = []
    parsed = parse_sections(copy.deepcopy(dict(values)), found, prediction_of(values))
    if {"optimizer", "rates"} <= parsed.keys():
        found += optimizer_problems(parsed["optimizer"], parsed["rates"], parsed.get("train"))
    return found


def prediction_of(values: Mapping[str, Any]) -> Prediction | None:
    """What the config says that the model predicts; None where it does not."""
    if values.get("objective", {}).get("name") == "flow":
        return "flow"
    return "v" if values.get("model", {}).get("prediction") == "v" else None


def _taken_back(reading: Reading, problem: Problem) -> bool:
    """Whether the setting that a problem is about was ours to give up."""
    if problem.where == "optimizer.name" and reading.get("optimizer.name") in cards("optimizer"):
        return False
    place: Any = reading.values
    *above, name = problem.where.split(".")
    for part in above:
        place = place.get(part) if isinstance(place, dict) else None
    if not isinstance(place, dict) or name not in place or problem.where == "data.folder":
        return False
    setting = problem.where
    if (
        isinstance(place[name], dict) and setting not in _TABLES
    ):  # several settings that do not go together: one that is named goes
        place = place[name]
        name = next((child for child in reversed(place) if child in problem.what), "")
        setting = f"{setting}.{name}"
        if not name or setting == "data.folder":
            return False
    del place[name]
    _tell(reading, setting, problem.what)
    return True


def _tell(reading: Reading, setting: str, why: str, kind: Kind = "lost") -> None:
    for index, line in enumerate(reading.lines):
        if line.setting == setting and line.kind in ("same", "converted", "default"):
            reading.lines[index] = replace(line, kind=kind, setting="", value=None, note=f"{setting}: {why}")


_KEPT = ("data.buckets.resolution", "data.buckets.step", "train.max_grad_norm", "train.length", "adapter.rank")
"""Settings that stay though they are our default: that may go by the model or the optimizer, or one looks for them first."""


def trimmed(values: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same without what are our defaults. The objective's depend on the model, and stay."""
    found: dict[str, dict[str, Any]] = {}
    for section, given in values.items():
        usual = SECTIONS.get(section)
        kind = given.get("name") or PARTS.get(section)
        if section in PARTS and section != "objective" and kind in cards(section):
            usual = cards(section)[str(kind)].settings
        kept = _unusual(given, usual, section) if usual else dict(given)
        if kept:
            found[section] = kept
    return found


def unusual(given: Mapping[str, Any], section: str) -> list[str]:
    """Dotted names of the settings of a section that are not our defaults."""
    usual = SECTIONS.get(section)
    kind = given.get("name") or PARTS.get(section)
    if section in PARTS and kind in cards(section):
        usual = cards(section)[str(kind)].settings
    kept = _unusual(given, usual, section) if usual else {}
    return [f"{section}.{name}" for name, value in _flat(kept) if value is not None and value != []]


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping) and name not in ("block_lr", "block_rank", "block_alpha"):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _unusual(given: Mapping[str, Any], usual: type[BaseModel], where: str) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in given.items():
        field = usual.model_fields.get(name)
        inner = field.annotation if field is not None else None
        if isinstance(value, Mapping) and isinstance(inner, type) and issubclass(inner, BaseModel):
            if deeper := _unusual(value, inner, f"{where}.{name}"):
                kept[name] = deeper
        elif field is None or f"{where}.{name}" in _KEPT or not _is_default(field, value):
            kept[name] = value
    return kept


def _is_default(field: FieldInfo, value: Any) -> bool:
    if field.is_required():
        return False
    usual = field.default
    plain = str(usual) if isinstance(usual, Duration) else list(usual) if isinstance(usual, tuple) else usual
    return (type(plain) in (type(value), float) and plain == value and not isinstance(value, bool)) or (
        isinstance(value, bool) and plain is value
    )


def remaining(found: Imported) -> Iterator[str]:
    """What the whole check says, where everything that the recipe names is there."""
    from lorabake.recipe.check import check_values

    base, folder = found.values.get("model", {}).get("base", "pocket"), found.values.get("data", {}).get("folder", "")
    folders = [folder] if isinstance(folder, str) else folder
    if (
        is_hub_name(base)
        or not (base == "pocket" or os.path.exists(base))
        or not all(os.path.isdir(one) for one in folders)
    ):
        return
    try:
        yield from check_values(copy.deepcopy({name: dict(section) for name, section in found.values.items()})).warnings
    except Problems as error:
        yield from (f"{problem.where}: {problem.what}" for problem in error.problems)
    except UserError as error:
        yield str(error)
