"""What a grid varies: labelled axes, and the short texts people write for them (``0.4,0.6,1`` and ``1,5-8``)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from lorabake.base.errors import UserError
from lorabake.recipe.prompts import shortened

MOST_VALUES = 200
"""Values on one axis; a typo such as ``1-10000`` shall not start a night of drawing."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One direction of a grid: its name, the label of every row or column, and where a wider gap begins a new group."""

    name: str
    values: tuple[str, ...]
    breaks: frozenset[int] = frozenset()
    """Indices of values that begin a group, such as 1 where value 0 is the base model."""


def weights(text: str) -> tuple[float, ...]:
    """LoRA weights from ``"0.4,0.6,1"``.

    Raises:
        UserError: a part is not a finite number, or there are none or too many.
    """
    found = tuple(_weight(part, text) for part in _parts(text))
    return _counted(found, text)


def seeds(text: str) -> tuple[int, ...]:
    """Seeds from ``"1,5-8"``: single ones and ranges with both ends.

    Raises:
        UserError: a part is neither, or there are none or too many.
    """
    found: list[int] = []
    for part in _parts(text):
        match = re.fullmatch(r"(\d{1,20})(?:\s*-\s*(\d{1,20}))?", part, re.ASCII)
        if not match:
            raise UserError(
                f"'{shortened(part)}' in seeds '{shortened(text)}' is not a seed. Write whole numbers and ranges, such as 1,5-8."
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(
                f"The range '{part}' in seeds '{shortened(text)}' runs backwards. Write the smaller seed first."
            )
        found += range(first, min(last, first + MOST_VALUES) + 1)
    return _counted(tuple(found), text)


def _weight(part: str, text: str) -> float:
    try:
        value = float(part)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(
            f"'{shortened(part)}' in weights '{shortened(text)}' is not a number. Write numbers with commas between, such as 0.4,0.6,1."
        )
    return value


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _counted(found: tuple, text: str) -> tuple:
    if not 0 < len(found) <= MOST_VALUES:
        count = "no values" if not found else f"more than {MOST_VALUES} values"
        raise UserError(f"'{shortened(text)}' has {count}. Give 1 to {MOST_VALUES}.")
    return found
