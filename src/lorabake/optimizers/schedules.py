"""Learning-rate schedules: each maps where a run is, after its warm-up, to a factor on the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import Field, field_validator

from lorabake.base.cards import Card, Settings, find
from lorabake.base.units import Stretch


@dataclass(frozen=True)
class ScheduleCard(Card):
    """A schedule's card. ``code`` names a function of :class:`Place` and settings."""

    kohya_name: str = ""
    """``ss_lr_scheduler`` as clients know it; the name itself, left empty."""
    spans: bool = True
    """Whether its shape is laid over the length of the run, so that another length gives other rates."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run is, in optimizer steps."""

    step: int
    """Steps since the end of the warm-up."""
    steps: int
    """How many there are in all after the warm-up; at least 1."""
    warmup: int
    """Steps of the warm-up."""

    @property
    def share(self) -> float:
        """From 0 at the end of the warm-up to 1 behind the last step."""
        return self.step / self.steps


class ScheduleSettings(Settings):
    """Settings every schedule has."""

    warmup: Stretch = Stretch()
    """Over which part of the run the learning rate rises from zero: a share (0.05), or "200 steps". 0.05 calms the start of long runs."""

    @field_validator("*")
    @classmethod
    def _leaves_some_of_the_run(cls, given: Any) -> Any:
        if isinstance(given, Stretch) and given.share == 1:
            raise ValueError('1 is the whole run: a share of it must be below 1; steps are written "1 step"')
        return given


class FallingSettings(ScheduleSettings):
    """Settings of schedules that fall."""

    floor: float = Field(default=0.0, ge=0, lt=1)
    """Share of the full rate below which it never falls after the warm-up. 0.1 where the last epochs would learn nothing."""


class RestartSettings(FallingSettings):
    """Settings of ``cosine-restarts``."""

    cycles: int = Field(default=2, ge=1, le=100)
    """How many times the cosine runs from full to zero."""


class PowerSettings(FallingSettings):
    """Settings of ``polynomial``."""

    power: float = Field(default=2.0, gt=0, le=10)
    """1 falls evenly, 2 faster at first, 0.5 faster at the end."""


class RexSettings(FallingSettings):
    """Settings of ``rex``."""

    d: float = Field(default=0.9, ge=0, lt=1)
    """How long it stays high: 0 falls evenly, 0.9 keeps half of the rate until nine tenths of the way."""


class InverseSquareRootSettings(ScheduleSettings):
    """Settings of ``inverse-sqrt``."""

    timescale: Stretch | None = None
    """After this part of the run the rate has fallen to 0.71, after three times as long to a half. Absent: as long as the warm-up, without one
    a tenth of the run."""


class CycleSettings(FallingSettings):
    """Settings of schedules with warm restarts."""

    first_cycle: Stretch = Stretch(0.25)
    """Length of the first cycle: a share of the run (0.25), or "500 steps"."""
    cycle_growth: float = Field(default=1.0, ge=1, le=10)
    """Each cycle is this many times as long as the one before: 1 for equal ones, 2 is usual."""
    decay: float = Field(default=1.0, gt=0, le=1)
    """Each cycle begins at this share of the rate that the one before began at: 0.9 lets the peaks come down."""


class RexCycleSettings(CycleSettings):
    """Settings of ``rex-warm-restarts``."""

    d: float = Field(default=0.9, ge=0, lt=1)
    """How long each cycle stays high: 0 falls evenly, 0.9 keeps half of the rate until nine tenths of the way."""


def constant(place: Place, settings: ScheduleSettings) -> float:
    """Full rate throughout."""
    return 1.0


def linear(place: Place, settings: FallingSettings) -> float:
    """Straight down."""
    return _above(settings.floor, 1.0 - place.share)


def cosine(place: Place, settings: FallingSettings) -> float:
    """Half a cosine down. Loshchilov and Hutter 2016, arXiv 1608.03983, one cycle."""
    return _above(settings.floor, _cosine(place.share))


def cosine_restarts(place: Place, settings: RestartSettings) -> float:
    """The same several times over, each time back to the full rate at once."""
    return _above(settings.floor, 0.0 if place.share >= 1 else _cosine(settings.cycles * place.share % 1.0))


def polynomial(place: Place, settings: PowerSettings) -> float:
    """(1 - x)^power, x being the share of the way."""
    return _above(settings.floor, (1.0 - place.share) ** settings.power)


def rex(place: Place, settings: RexSettings) -> float:
    """(1 - x) / ((1 - d) + d·(1 - x)). Chen et al. 2021, arXiv 2107.04197, with their ½ as d."""
    return _above(settings.floor, _rex(place.share, settings.d))


def inverse_sqrt(place: Place, settings: InverseSquareRootSettings) -> float:
    """1 / sqrt(1 + step / timescale): never ends, so the length of the run does not matter. Vaswani et al. 2017, arXiv 1706.03762."""
    usual = place.warmup or round(0.1 * place.steps)
    timescale = settings.timescale.steps(place.warmup + place.steps) if settings.timescale else usual
    return 1.0 / math.sqrt(1.0 + place.step / max(1, timescale))


def cosine_warm_restarts(place: Place, settings: CycleSettings) -> float:
    """Half cosines, one after the other. Loshchilov and Hutter 2016, arXiv 1608.03983."""
    return _in_cycles(place, settings, _cosine)


def rex_warm_restarts(place: Place, settings: RexCycleSettings) -> float:
    """The falls of ``rex``, one after the other."""
    return _in_cycles(place, settings, lambda share: _rex(share, settings.d))


def factor(name: str, settings: ScheduleSettings, step: int, total_steps: int) -> float:
    """Factor on the learning rate for optimizer step ``step`` (from 0) of ``total_steps``; warm-up first, then the named shape."""
    warmup = settings.warmup.steps(total_steps)
    if step < warmup:
        return step / warmup
    return find("schedule", name).load()(Place(step - warmup, max(1, total_steps - warmup), warmup), settings)


def _above(floor: float, shape: float) -> float:
    return floor + (1.0 - floor) * shape


def _cosine(share: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * share))


def _rex(share: float, d: float) -> float:
    return (1.0 - share) / ((1.0 - d) + d * (1.0 - share))


def _in_cycles(place: Place, settings: CycleSettings, shape: Callable[[float], float]) -> float:
    """``shape`` from 1 to 0 in each cycle. Cycles are whole steps long, at least one, and the last is cut off by the end of the run."""
    start, number, length = 0, 0, _first_cycle(place, settings)
    while place.step >= start + _whole(length):
        start, number, length = start + _whole(length), number + 1, length * settings.cycle_growth
    peak = max(settings.decay**number, settings.floor)
    return settings.floor + (peak - settings.floor) * shape((place.step - start) / _whole(length))


def _first_cycle(place: Place, settings: CycleSettings) -> float:
    given = settings.first_cycle
    return given.share * place.steps if given.count is None else float(given.count)


def _whole(length: float) -> int:
    return max(1, round(length))


_HERE = "lorabake.optimizers.schedules"
CARDS = (
    ScheduleCard("schedule", "constant", "Full rate throughout.", f"{_HERE}:constant", ScheduleSettings, spans=False),
    ScheduleCard("schedule", "linear", "Straight down to zero.", f"{_HERE}:linear", FallingSettings),
    ScheduleCard(
        "schedule", "cosine", "Half a cosine down to zero; the usual choice.", f"{_HERE}:cosine", FallingSettings
    ),
    ScheduleCard(
        "schedule",
        "cosine-restarts",
        "Several cosines of one length, each from the full rate.",
        f"{_HERE}:cosine_restarts",
        RestartSettings,
        kohya_name="cosine_with_restarts",
    ),
    ScheduleCard(
        "schedule",
        "cosine-warm-restarts",
        "Cosines whose length may grow and whose peaks may come down.",
        f"{_HERE}:cosine_warm_restarts",
        CycleSettings,
        kohya_name="CosineAnnealingWarmRestarts",
    ),
    ScheduleCard(
        "schedule",
        "polynomial",
        "Down to zero along a power of the way that is left.",
        f"{_HERE}:polynomial",
        PowerSettings,
    ),
    ScheduleCard("schedule", "rex", "Stays high for long, then falls quickly.", f"{_HERE}:rex", RexSettings),
    ScheduleCard(
        "schedule",
        "rex-warm-restarts",
        "Falls like rex, whose length may grow and whose peaks may come down.",
        f"{_HERE}:rex_warm_restarts",
        RexCycleSettings,
        kohya_name="RexAnnealingWarmRestarts",
    ),
    ScheduleCard(
        "schedule",
        "inverse-sqrt",
        "Falls ever more slowly and never ends: for runs whose length is not known yet.",
        f"{_HERE}:inverse_sqrt",
        InverseSquareRootSettings,
        kohya_name="inverse_sqrt",
    ),
)
