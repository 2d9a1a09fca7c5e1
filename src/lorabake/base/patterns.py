"""Tables by pattern: what holds for a layer is decided by the first pattern that is found in one of its names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def checked(table: Mapping[str, T] | None) -> Mapping[str, T] | None:
    """The same table.

    Raises:
        ValueError: a pattern is no regular expression.
    """
    for pattern in table or ():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"'{pattern}' is no regular expression: {error}") from error
    return table


def decide(table: Mapping[str, T] | None, names: Sequence[str]) -> T | None:
    """What the first pattern says that is found anywhere in one of ``names``; None if none is."""
    return next((value for pattern, value in (table or {}).items() if _found(pattern, names)), None)


def idle(table: Mapping[str, object] | None, layers: Iterable[Sequence[str]]) -> list[str]:
    """Patterns that are in no name of any layer."""
    every = list(layers)
    return [pattern for pattern in table or () if not any(_found(pattern, names) for names in every)]


def _found(pattern: str, names: Sequence[str]) -> bool:
    return any(re.search(pattern, name) for name in names)
