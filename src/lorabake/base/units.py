"""Units are types: a bare number never changes its meaning with another setting."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

Unit = Literal["steps", "epochs"]
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
    """A duration as text. Where a setting may also be a number, pydantic asks here for that too."""
    return str(value) if isinstance(value, Duration) else value


def Epochs(count: int) -> Duration:
    """``count`` passes over the dataset."""
    return Duration(count, "epochs")


def Steps(count: int) -> Duration:
    """``count`` optimizer steps."""
    return Duration(count, "steps")
