"""Units are types: a bare number never changes its meaning with another setting."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

Unit = Literal["steps", "epochs"]
_STRETCH = re.compile(r"^\s*(?:(\d+(?:\.\d+)?)\s*%|(\d+)\s*steps?)\s*$")
_PATTERN = re.compile(r"^\s*(\d+)\s*(step|epoch)s?\s*$")


@dataclass(frozen=True, slots=True)
class Duration:
    """How long or how often, in optimizer steps or epochs. Written ``"8 epochs"`` or ``"2400 steps"``."""

    count: int
    unit: Unit

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"'{self}' is not a length: it must be at least 1")

    def __str__(self) -> str:
        return f"{self.count} {self.unit[:-1] if self.count == 1 else self.unit}"

    def steps(self, steps_per_epoch: int) -> int:
        """The same length in optimizer steps."""
        return self.count if self.unit == "steps" else self.count * steps_per_epoch

    @classmethod
    def parse(cls, value: Any) -> Duration:
        """From ``"8 epochs"`` / ``"2400 steps"``.

        Raises:
            ValueError: there is no unit, or it is not one of the two.
        """
        if isinstance(value, Duration):
            return value
        match = _PATTERN.match(value) if isinstance(value, str) else None
        if not match:
            raise ValueError(f'\'{value}\' needs a number and a unit, such as "8 epochs" or "2400 steps"')
        return cls(int(match[1]), "steps" if match[2] == "step" else "epochs")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(_plain)
        )


def _plain(value: Any) -> Any:
    """A duration as text. Where a setting may also be something else, pydantic asks here for that too."""
    return value.plain() if isinstance(value, Stretch) else str(value) if isinstance(value, Duration) else value


@dataclass(frozen=True, slots=True)
class Stretch:
    """A stretch of a run: a share of it, written ``0.05`` or ``"5 %"``, or optimizer steps, written ``"200 steps"``."""

    share: float = 0.0
    """From 0 to 1. Not looked at where ``count`` is given."""
    count: int | None = None
    """Optimizer steps."""

    def __post_init__(self) -> None:
        if self.count is None and not 0 <= self.share <= 1:
            raise ValueError(f"{self.share:g} is not a share of the run: it must be from 0 to 1")

    def __bool__(self) -> bool:
        return bool(self.share if self.count is None else self.count)

    def plain(self) -> float | str:
        """As it is written."""
        return self.share if self.count is None else f"{self.count} step{'s' * (self.count != 1)}"

    def __str__(self) -> str:
        return f"{self.plain():g}" if self.count is None else str(self.plain())

    def steps(self, total: int) -> int:
        """The same in optimizer steps of a run of ``total``."""
        return round(self.share * total) if self.count is None else self.count

    @classmethod
    def parse(cls, value: Any) -> Stretch:
        """From ``0.05``, ``"5 %"`` or ``"200 steps"``.

        Raises:
            ValueError: it is none of these.
        """
        if isinstance(value, Stretch):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return cls(float(value))
        match = _STRETCH.match(value) if isinstance(value, str) else None
        if not match:
            raise ValueError(f'{value!r} is no part of a run: give a share such as 0.05 or "5 %", or "200 steps"')
        return cls(count=int(match[2])) if match[2] else cls(float(match[1]) / 100)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(cls.plain)
        )


def Epochs(count: int) -> Duration:
    """``count`` passes over the dataset."""
    return Duration(count, "epochs")


def size(count: int) -> str:
    """Bytes as people say them."""
    amount, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while amount >= 1000 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{amount:.3g} {units[0]}"
