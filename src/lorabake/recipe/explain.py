"""What every setting means, from the docstrings beside the settings themselves."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lorabake.base.cards import ROOMS, cards
from lorabake.base.errors import UserError, nearest
from lorabake.protocols.objective import RULES
from lorabake.recipe.sections import BESIDE, PARTS, SECTIONS


def explain(name: str) -> list[dict[str, Any]]:
    """Entries for a setting (``adapter.rank``), a section (``train``) or a part (``lora``): name, part, type, default, allowed, text.

    Raises:
        UserError: nothing has that name.
    """
    entries = list(_entries())
    found = [
        entry for entry in entries if name in (entry["name"], entry["part"]) or entry["name"].startswith(f"{name}.")
    ]
    if not found:
        known = (
            {entry["name"] for entry in entries}
            | {entry["part"] for entry in entries if entry["part"]}
            | {*SECTIONS, *PARTS}
        )
        raise UserError(f"'{name}' is not a setting, section or part. {nearest(name, known)}")
    return _told_once(found)


def _told_once(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What several parts have alike as one entry that names them all, where the first of them has it."""
    alike: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        alike.setdefault(repr({**entry, "part": ""}), []).append(entry)
    return [{**same[0], "part": ", ".join(entry["part"] for entry in same)} for same in alike.values()]


def _entries() -> Iterator[dict[str, Any]]:
    for section, settings in SECTIONS.items():
        yield from _fields(section, "", settings)
    for kind in PARTS:
        which = "Which one. See `lorabake list`." + " Default: what the base model calls for." * (PARTS[kind] is None)
        yield _entry(f"{kind}.name", "", str, PARTS[kind], which, "one of " + ", ".join(cards(kind)))
        if kind in BESIDE:
            yield from _fields(kind, "", BESIDE[kind][1])
        for name, card in cards(kind).items():
            yield from _fields(kind, name, card.settings)
    for kind in (kind for kind in ROOMS if kind not in PARTS):
        for name, card in cards(kind).items():
            yield _entry(kind, name, str, None, card.summary, "")


def _fields(prefix: str, part: str, settings: type[BaseModel]) -> Iterator[dict[str, Any]]:
    for name, field in settings.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _fields(f"{prefix}.{name}", part, annotation)
        else:
            default = None if field.is_required() or field.default is None else field.default
            rule = prefix == "objective" and name in RULES
            allowed = "one of " + ", ".join(cards(name)) if rule else _allowed(field)
            yield _entry(f"{prefix}.{name}", part, annotation, default, field.description or "", allowed)


def _entry(name: str, part: str, annotation: Any, default: Any, text: str, allowed: str) -> dict[str, Any]:
    shown = default if default is None or isinstance(default, int | float | str) else str(default)
    return {
        "name": name,
        "part": part,
        "type": _type(annotation),
        "default": shown,
        "allowed": allowed,
        "text": " ".join(text.split()),
    }


def _type(annotation: Any) -> str:
    options = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Annotated:
        return _type(options[0])
    if typing.get_origin(annotation) is dict:
        return "table"
    if typing.get_origin(annotation) is typing.Literal:
        return "whole number" if all(isinstance(option, int) for option in options) else "text"
    if options and typing.get_origin(annotation) is not tuple:
        return " or ".join(dict.fromkeys(_type(option) for option in options if option is not type(None)))
    names = {
        "int": "whole number",
        "float": "number",
        "str": "text",
        "bool": "true or false",
        "Duration": '"N epochs" or "N steps"',
        "Stretch": 'share, "N %" or "N steps"',
    }
    return names.get(getattr(annotation, "__name__", ""), "list" if typing.get_origin(annotation) is tuple else "path")


def _allowed(field: FieldInfo) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    nested = [
        getattr(limit, "metadata", ())
        for option in typing.get_args(field.annotation)
        for limit in typing.get_args(option)[1:]
    ]
    limits = [
        f"{sign} {getattr(item, name)}"
        for item in [*field.metadata, *(item for items in nested for item in items)]
        for name, sign in signs.items()
        if getattr(item, name, None) is not None
    ]
    for option in (field.annotation, *typing.get_args(field.annotation)):
        if typing.get_origin(option) is typing.Literal:
            limits.append("one of " + ", ".join(map(str, typing.get_args(option))))
    return ", ".join(limits)
