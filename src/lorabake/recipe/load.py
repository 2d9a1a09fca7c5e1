"""From TOML, a folder or plain values to sections, with all problems at once."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from lorabake.base.cards import Settings, cards
from lorabake.base.errors import Problem, UserError, nearest
from lorabake.recipe.recipe import Choice
from lorabake.recipe.sections import PARTS, SECTIONS, RateSettings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_raw(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values of a recipe file, or of the default recipe for a dataset folder.

    Args:
        path: a ``.toml`` recipe, or a dataset folder. A relative ``data.folder`` or ``model.base`` counts from the recipe's own folder.
        overrides: ``section.name=value`` strings; values are read as TOML, bare words as text.

    Raises:
        UserError: there is no such file, or it is not TOML.
    """
    path = path.expanduser()
    if path.is_dir():
        raw: dict[str, Any] = {"data": {"folder": str(path)}}
    elif path.is_file():
        raw = _read_toml(path)
        _anchor(raw, path.parent)
    else:
        raise UserError(
            f"'{path}' does not exist. Give a recipe file (.toml) or a dataset folder. Nothing was started."
        )
    for override in overrides:
        _set(raw, override)
    return raw


def parse_sections(raw: Mapping[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """Every section that could be understood, by field of :class:`Recipe`; what could not is added to ``problems``."""
    for name in raw:
        if name not in SECTIONS and name not in PARTS:
            problems.append(Problem(name, f"not a section of a recipe. {nearest(name, [*SECTIONS, *PARTS])}"))
    values: dict[str, Any] = {
        name: _section(name, settings, raw.get(name, {}), problems) for name, settings in SECTIONS.items()
    }
    for name, default in PARTS.items():
        given = raw.get(name, {})
        if not isinstance(given, Mapping):
            problems.append(Problem(name, f"is a section, such as [{name}], not a single value."))
            continue
        given = dict(given)
        if name == "optimizer":
            rates = {key: given.pop(key) for key in RateSettings.model_fields if key in given}
            values["rates"] = _section(name, RateSettings, rates, problems)
        values[name] = _choice(name, given, default, problems)
    return {name: value for name, value in values.items() if value is not None}


def _choice(kind: str, given: dict[str, Any], default: str, problems: list[Problem]) -> Choice | None:
    name = given.pop("name", default)
    known = cards(kind)
    if name not in known:
        problems.append(Problem(f"{kind}.name", f"'{name}' is not a known {kind}. {nearest(str(name), known)}"))
        return None
    settings = _section(kind, known[name].settings, given, problems, owner=name)
    if settings is None:
        return None
    for field, value in settings:
        if field in ("loss", "weighting", "timesteps") and kind == "objective" and value not in cards(field):
            problems.append(Problem(f"{kind}.{field}", f"'{value}' is not known. {nearest(str(value), cards(field))}"))
    return Choice(name, settings)


def _section(
    where: str, model: type[Settings], given: Any, problems: list[Problem], owner: str = ""
) -> Settings | None:
    if not isinstance(given, Mapping):
        problems.append(Problem(where, f"is a section, such as [{where}], not a single value."))
        return None
    try:
        return model.model_validate(dict(given))
    except ValidationError as error:
        for item in error.errors():
            problems.append(_problem(where, model, item, owner))
        return None


def _problem(section: str, model: type[BaseModel], item: Any, owner: str) -> Problem:
    location = [str(part) for part in item["loc"] if not str(part).startswith("function-")]
    where = ".".join([section, *location])
    if item["type"] == "extra_forbidden":
        for part in location[:-1]:
            nested = model.model_fields[part].annotation
            if isinstance(nested, type) and issubclass(nested, BaseModel):
                model = nested
        names = {**model.model_fields, **(RateSettings.model_fields if section == "optimizer" else {})}
        return Problem(where, f"not a setting of '{owner or section}'. {nearest(location[-1], names)}")
    if item["type"] == "missing":
        return Problem(where, "is needed and not given.")
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return Problem(where, f"{item['input']!r}: {message}.")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text. Save it as UTF-8.") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}. Nothing was started.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def _anchor(raw: dict[str, Any], folder: Path) -> None:
    data, model = raw.get("data"), raw.get("model")
    if isinstance(data, dict) and isinstance(data.get("folder"), str):
        data["folder"] = str(folder / Path(data["folder"]).expanduser())
    if isinstance(model, dict) and isinstance(model.get("base"), str) and model["base"] != "pocket":
        model["base"] = str(folder / Path(model["base"]).expanduser())


def _set(raw: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or len(keys) < 2:
        raise UserError(f"'{override}' is not a setting. Write it as section.name=value, such as adapter.rank=32.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    target = raw
    for key in keys[:-1]:
        target = target.setdefault(key, {})
        if not isinstance(target, dict):
            raise UserError(f"'{override}': '{key}' is a value, not a section.")
    target[keys[-1]] = value
