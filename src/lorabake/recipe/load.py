"""From TOML, a folder or plain values to sections, with all problems at once."""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from lorabake.base.cards import Settings, cards
from lorabake.base.errors import Problem, UserError, nearest
from lorabake.base.places import expanded
from lorabake.protocols.family import Prediction
from lorabake.recipe.objectives import default_objective, objective_problems
from lorabake.recipe.optimizers import optimizer_card
from lorabake.recipe.recipe import Choice
from lorabake.recipe.sections import BESIDE, PARTS, SECTIONS, ModelSettings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PATHS = (
    ("data", "folder"),
    ("data", "regularisation"),
    ("validation", "folder"),
    ("model", "base"),
    ("model", "vae"),
    ("model", "text_encoders"),
    ("adapter", "start_from"),
    ("sample", "prompts_file"),
)
"""Settings that are paths, or lists of them."""
Keep = Callable[[str, str], bool]
"""Tells of a setting, dotted, and a path whether the path is to stay as it is."""


def read_raw(path: Path, overrides: Sequence[str] = (), keep: Keep | None = None) -> dict[str, Any]:
    """The plain values of a recipe file, or of the default recipe for a dataset folder.

    Args:
        path: a ``.toml`` recipe, or a dataset folder. Relative paths in a recipe (``data.folder``, ``model.base`` …) count from the
            recipe's own folder; in ``overrides`` they count from the current one.
        overrides: ``section.name=value`` strings; values are read as TOML, bare words as text.
        keep: as for :func:`anchored`.

    Raises:
        UserError: there is no such file, or it is not TOML.
    """
    path = expanded(path)
    if path.is_dir():
        raw: dict[str, Any] = {"data": {"folder": str(path)}}
    elif path.is_file():
        raw = anchored(_read_toml(path), path.parent, keep)
    else:
        raise UserError(
            f"'{path}' does not exist. Give a recipe file (.toml) or a dataset folder. Nothing was started."
        )
    for override in overrides:
        _set(raw, override)
    return _plain(raw)


def parse_toml(text: str, told: object) -> dict[str, Any]:
    """Plain values of TOML; ``told`` is what it is called.

    Raises:
        UserError: it is not TOML.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{told} is not valid TOML: {error}. Nothing was started.") from error


def changed(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of plain values by section with ``changes`` in it: of tables, also those in tables, only what is named changes.

    Raises:
        UserError: a table is to be changed that is a single value in ``raw``.
    """
    values = _plain(raw)
    for keys, value in _single_values(changes):
        _put(values, keys, value, ".".join(keys))
    return values


def anchored(raw: Mapping[str, Any], folder: Path, keep: Keep | None = None) -> dict[str, Any]:
    """The same values with relative paths made absolute, counted from ``folder``: a run's frozen recipe must mean the same everywhere.

    Args:
        raw: plain values by section.
        folder: where the recipe is.
        keep: which paths are to stay as they are.
    """

    def placed(path: Any) -> Any:
        if not isinstance(path, str | os.PathLike) or (keep and keep(f"{section}.{name}", os.fspath(path))):
            return path
        return os.path.abspath(folder / expanded(path))

    values = {name: dict(section) if isinstance(section, Mapping) else section for name, section in raw.items()}
    for section, name in _PATHS:
        given = values.get(section)
        if not isinstance(given, dict) or (section, given.get(name)) == ("model", "pocket"):
            continue
        path = given.get(name)
        if path is not None:
            given[name] = [placed(item) for item in path] if isinstance(path, list | tuple) else placed(path)
    return values


def parse_model(raw: Mapping[str, Any]) -> ModelSettings | None:
    """The model section by itself, if it can be understood: what the model predicts decides what other sections may hold."""
    return cast("ModelSettings | None", _section("model", ModelSettings, raw.get("model", {}), []))


def parse_sections(
    raw: Mapping[str, Any], problems: list[Problem], prediction: Prediction | None = None
) -> dict[str, Any]:
    """Every section that could be understood, by field of :class:`Recipe`; what could not is added to ``problems``.

    Args:
        raw: plain values by section.
        prediction: what the base model predicts, which decides the objective if it is not named. None if it is not known.
    """
    for name in raw:
        if name not in SECTIONS and name not in PARTS:
            problems.append(Problem(name, f"not a section of a recipe. {nearest(name, [*SECTIONS, *PARTS])}"))
    values: dict[str, Any] = {
        name: _section(name, settings, raw.get(name, {}), problems) for name, settings in SECTIONS.items()
    }
    reasons: dict[str, str] = {}
    for name, default in PARTS.items():
        given = raw.get(name, {})
        if not isinstance(given, Mapping):
            problems.append(Problem(name, f"is a section, such as [{name}], not a single value."))
            continue
        given = dict(given)
        if name in BESIDE:
            field, settings = BESIDE[name]
            beside = {key: given.pop(key) for key in settings.model_fields if key in given}
            values[field] = _section(name, settings, beside, problems)
        if name == "objective" and prediction and "name" not in given:
            reasons["objective.name"] = f"the base model predicts {prediction}"
        optimizer = values.get("optimizer")
        if name == "schedule" and optimizer and "name" not in given and optimizer_card(optimizer).averages:
            default = "constant"
            reasons["schedule.name"] = f"'{optimizer.name}' averages the weights instead of letting the rate decay"
        values[name] = choice = _choice(name, given, default or default_objective(prediction), problems)
        if name == "objective" and choice:
            problems.extend(objective_problems(choice, prediction))
    if reasons:
        values["reasons"] = reasons
    return {name: value for name, value in values.items() if value is not None}


def _choice(kind: str, given: dict[str, Any], default: str, problems: list[Problem]) -> Choice | None:
    name = given.pop("name", default)
    known = cards(kind)
    if name not in known:
        problems.append(Problem(f"{kind}.name", f"'{name}' is not a known {kind}. {nearest(str(name), known)}"))
        return None
    if missing := known[name].missing():
        problems.append(Problem(f"{kind}.name", missing))
    settings = _section(kind, known[name].settings, given, problems, owner=name)
    return Choice(name, settings) if settings is not None else None


def _section(
    where: str, model: type[Settings], given: Any, problems: list[Problem], owner: str = ""
) -> Settings | None:
    if not isinstance(given, Mapping):
        problems.append(Problem(where, f"is a section, such as [{where}], not a single value."))
        return None
    try:
        # Strict as JSON is: text is no number and true is not 1, but a list may be a tuple and text a path.
        return model.model_validate_json(json.dumps(dict(given), default=str), strict=True)
    except ValidationError as error:
        problems.extend(_problems(where, model, error, owner))
        return None


def _problems(section: str, model: type[BaseModel], error: ValidationError, owner: str) -> Iterator[Problem]:
    """One problem a setting: where a value may be of several types, pydantic tells what each of them wanted."""
    wrong: dict[str, list[str]] = {}
    for item in error.errors():
        names, holder = _place(model, item["loc"])
        where = ".".join([section, *names])
        if item["type"] == "extra_forbidden":
            known = dict(holder.model_fields)
            if known and section in BESIDE:
                known |= BESIDE[section][1].model_fields
            part = ".".join([section, *names[:-1]]) if len(names) > 1 else owner or section
            yield Problem(where, f"not a setting of '{part}'. {nearest(names[-1], known) or 'It has none.'}")
        elif item["type"] == "missing" and isinstance(item["loc"][-1], int):
            wrong[where] = [f"{item['input']!r}: has too few values, there must be {item['loc'][-1] + 1} or more"]
        elif item["type"] == "missing":
            yield Problem(where, "is needed and not given.")
        elif item["type"] == "json_invalid":
            yield Problem(where, "holds a name that is not valid Unicode text. Rename the file or folder.")
        elif item["type"] == "value_error":  # our own validators: they say what was given
            yield Problem(where, item["msg"].removeprefix("Value error, ").rstrip(".") + ".")
        else:
            message = item["msg"].removeprefix("Input ").replace("valid array", "list")
            told = wrong.setdefault(where, [f"{item['input']!r}: {message}"])
            told += [message.removeprefix("should be ")] if message not in told[0] else []
    for where, told in wrong.items():
        yield Problem(where, " or ".join(dict.fromkeys(told)) + ".")


def _place(model: type[BaseModel], location: Sequence[int | str]) -> tuple[list[str], type[BaseModel]]:
    """The names down to the setting that ``location`` is in, and the settings that hold it; what is inside a value is left out."""
    names: list[str] = []
    for part in location:
        names.append(str(part))
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            break
        if len(names) < len(location):
            model = field.annotation
    return names, model


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return parse_toml(path.read_text(encoding="utf-8-sig"), path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text. Save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def _set(raw: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or len(keys) < 2:
        raise UserError(f"'{override}' is not a setting. Write it as section.name=value, such as adapter.rank=32.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    _put(raw, keys, value, override)


def _put(raw: dict[str, Any], keys: Sequence[str], value: Any, told: str) -> None:
    """Put a value where ``keys`` lead, making the tables that are missing; ``told`` is what was asked for."""
    target = raw
    for key in keys[:-1]:
        target = target.setdefault(key, {})
        if not isinstance(target, dict):
            raise UserError(f"'{told}': '{key}' is a value, not a section.")
    target[keys[-1]] = value


def _single_values(values: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value that is no table, with the names that lead to it."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _single_values(value, (*above, name))
        else:
            yield (*above, name), value


def _plain(value: Any) -> Any:
    """A copy in which tables and lists are copies too, and TOML's dates and times are text: everything that JSON can hold."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, datetime.date | datetime.time) else value
