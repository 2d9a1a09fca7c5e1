"""Writing recipes: TOML with the reason beside each derived value."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lorabake.recipe.recipe import Recipe


def to_toml(recipe: Recipe) -> str:
    """The recipe as a file. Reading it back gives an equal recipe."""
    return values_to_toml(recipe.to_dict(), recipe.reasons)


def values_to_toml(sections: Mapping[str, Mapping[str, Any]], reasons: Mapping[str, str]) -> str:
    """The same for plain values by section, with a comment behind the dotted settings that ``reasons`` names."""
    lines: list[str] = []
    for section, values in sections.items():
        tables = {name: value for name, value in values.items() if isinstance(value, dict)}
        lines.append(f"[{section}]")
        lines += [
            _line(reasons, f"{section}.{name}", name, value) for name, value in values.items() if name not in tables
        ]
        for name, table in tables.items():
            lines += ["", f"[{section}.{name}]" + _comment(reasons.get(f"{section}.{name}"))]
            lines += [_line(reasons, f"{section}.{name}.{key}", key, value) for key, value in table.items()]
        lines.append("")
    return "\n".join(lines)


def flat_to_toml(values: Mapping[str, Any]) -> str:
    """Plain values of one table, a line each."""
    return "".join(f"{_key(name)} = {_value(value)}\n" for name, value in values.items())


def _line(reasons: Mapping[str, str], dotted: str, name: str, value: Any) -> str:
    return f"{_key(name)} = {_value(value)}" + _comment(reasons.get(dotted))


def _key(name: str) -> str:
    """A name bare where TOML takes it so: tables by pattern have any text for a name."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _value(name)


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    # TOML's strings, numbers and booleans are written as JSON's, but for one character that JSON leaves bare.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _comment(reason: str | None) -> str:
    """The reason on one line: a folder's name in it may hold anything."""
    return "  # " + " ".join("".join(c if c.isprintable() else " " for c in reason).split()) if reason else ""
