"""Learning-rate schedules: each maps the position after warm-up, 0 to 1, to a factor on the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import Field

from lorabake.base.cards import Card, Settings, find


@dataclass(frozen=True)
class ScheduleCard(Card):
    """A schedule's card. ``code`` names a function of position (0 to 1) and settings."""

    kohya_name: str = ""
    """``ss_lr_scheduler`` as clients know it; the name itself, left empty."""


class ScheduleSettings(Settings):
    """Settings every schedule has."""

    warmup: float = Field(default=0.0, ge=0, lt=1)
    """Share of all steps over which the learning rate rises from zero. 0.05 calms the start of long runs."""


class RestartSettings(ScheduleSettings):
    """Settings of ``cosine-restarts``."""

    cycles: int = Field(default=2, ge=1, le=100)
    """How many times the cosine runs from full to zero."""


def constant(position: float, settings: ScheduleSettings) -> float:
    """Full rate throughout."""
    return 1.0


def linear(position: float, settings: ScheduleSettings) -> float:
    """Straight down to zero."""
    return 1.0 - position


def cosine(position: float, settings: ScheduleSettings) -> float:
    """Half a cosine down to zero. Loshchilov and Hutter 2016, arXiv 1608.03983, one cycle."""
    return 0.5 * (1.0 + math.cos(math.pi * position))


def cosine_restarts(position: float, settings: RestartSettings) -> float:
    """The same several times over, each time back to the full rate at once."""
    return 0.0 if position >= 1 else cosine(settings.cycles * position % 1.0, settings)


def factor(name: str, settings: ScheduleSettings, step: int, total_steps: int) -> float:
    """Factor on the learning rate for optimizer step ``step`` (from 0) of ``total_steps``; warm-up first, then the named shape."""
    warmup_steps = round(settings.warmup * total_steps)
    if step < warmup_steps:
        return step / warmup_steps
    return find("schedule", name).load()((step - warmup_steps) / max(1, total_steps - warmup_steps), settings)


_HERE = "lorabake.optimizers.schedules"
CARDS = (
    ScheduleCard("schedule", "constant", "Full rate throughout.", f"{_HERE}:constant", ScheduleSettings),
    ScheduleCard("schedule", "linear", "Straight down to zero.", f"{_HERE}:linear", ScheduleSettings),
    ScheduleCard(
        "schedule", "cosine", "Half a cosine down to zero; the usual choice.", f"{_HERE}:cosine", ScheduleSettings
    ),
    ScheduleCard(
        "schedule",
        "cosine-restarts",
        "Several cosines, each from the full rate.",
        f"{_HERE}:cosine_restarts",
        RestartSettings,
        kohya_name="cosine_with_restarts",
    ),
)
