"""Foreign values as plain ones. Graphical interfaces write numbers as text, YAML reads ``1e-4`` as text, and "" means nothing.

Each raises ValueError with what is wrong, in words that fit behind the value.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from typing import Any

_NOTHING = ("", "none", "null")
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def is_nothing(value: Any) -> bool:
    """Whether a value says as much as an absent one."""
    return value is None or value in ([], {}) or (isinstance(value, str) and value.strip().lower() in _NOTHING)


def number(value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("is no number")
    try:
        found = float(value)
    except (ValueError, OverflowError):
        raise ValueError("is no number") from None
    if not math.isfinite(found):
        raise ValueError("is no finite number")
    return found


def whole(value: Any) -> int:
    """A whole number, also written as 4.0."""
    found = number(value)
    if found != int(found):
        raise ValueError("is no whole number")
    return int(found)


def flag(value: Any) -> bool:
    """True or false, also written as 1 or "true"."""
    text = str(value).strip().lower()
    if not isinstance(value, bool | int | float | str) or text not in (*_TRUE, *_FALSE, "1.0", "0.0"):
        raise ValueError("is neither true nor false")
    return text in _TRUE or text == "1.0"


def text(value: Any) -> str:
    """Text that can be written to a file."""
    if isinstance(value, bool | dict | list) or value is None:
        raise ValueError("is no text")
    found = str(value)
    if any("\ud800" <= character <= "\udfff" for character in found):
        raise ValueError("holds what is no Unicode text")
    return found


def numbers(value: Any) -> list[float]:
    """A list of numbers, also written as "1, 2" or as a single one."""
    items = value if isinstance(value, list | tuple) else str(value).strip("[]() ").replace(";", ",").split(",")
    return [number(item) for item in items if not is_nothing(item)]


def plain(value: Any) -> str | list[Any] | bool | float | int:
    """A number where ``value`` reads as one, the same value else."""
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value


def shown(value: Any) -> str:
    """A value as it is told, on one line and never endless."""
    if isinstance(value, float):
        told = f"{value:.10g}"
    elif isinstance(value, bool):
        told = str(value).lower()
    else:
        told = _as_text(value) if value != "" else '""'
    told = " ".join("".join(character if character.isprintable() else " " for character in told).split())
    return told if len(told) <= 60 else told[:57] + "..."


def _as_text(value: Any) -> str:
    """Python writes out no number of thousands of digits."""
    try:
        return str(value)
    except ValueError:
        return "a number of thousands of digits"


def tables(value: Any) -> list[Mapping[str, Any]]:
    """The tables in a list; what else is in it is left out."""
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def table(value: Any) -> Mapping[str, Any]:
    """A table; anything else is an empty one."""
    return value if isinstance(value, Mapping) else {}


def span(count: int, unit: str) -> str:
    """``"8 epochs"``; ``unit`` is in the plural."""
    return f"{count} {unit[:-1] if count == 1 else unit}"


def words(text: str) -> tuple[str, ...]:
    """The words of a text: a long list of keys reads best so."""
    return tuple(text.split())
