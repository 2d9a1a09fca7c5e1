"""Learning-rate schedules of other trainers, as ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorabake.recipe.imports import _values
from lorabake.recipe.imports._reading import Reading

NAMES = {
    "constant": "constant",
    "none": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_restarts": "cosine-restarts",
    "cosine_with_hard_restarts": "cosine-restarts",
    "cosine_with_min_lr": "cosine",
    "polynomial": "polynomial",
    "inverse_sqrt": "inverse-sqrt",
    "rex": "rex",
}
"""Ours by their names."""
POLYNOMIAL_END = 1e-7
"""Rate that diffusers' polynomial schedule ends at."""
_CLASSES = {
    "cosineannealingwarmrestarts": "cosine-warm-restarts",
    "cosineannealingwarmuprestarts": "cosine-warm-restarts",
    "rexannealingwarmrestarts": "rex-warm-restarts",
    "cosineannealinglr": "cosine",
}


@dataclass(frozen=True, slots=True)
class Given:
    """What a config says of its schedule."""

    key: str
    name: str
    warmup_key: str
    warmup: float | None
    """Below 1 a share of the run, else optimizer steps."""
    steps: int | None
    """Length of the run in optimizer steps, if it is known."""
    cycles: int = 1
    power: float = 1.0
    min_ratio: float | None = None
    timescale: int | None = None
    lr: float | None = None
    """Rate that absolute rates of the schedule are parts of."""


def schedule(reading: Reading, given: Given) -> None:
    """Set the schedule and its warm-up."""
    name = given.name.strip().lower()
    ours = NAMES.get(name)
    if ours is None:
        known = "constant, linear, cosine, cosine-restarts, polynomial, rex, inverse-sqrt"
        reading.lost(given.key, f"there is no such schedule here, so the recipe has constant; choose among {known}.")
        reading.put("schedule.name", "constant", given.key, "in place of theirs")
    else:
        stated = "default" if not reading.has(given.key) else None
        reading.put("schedule.name", ours, given.key, kind=stated)
    if ours == "cosine-restarts":
        reading.put(
            "schedule.cycles",
            max(1, given.cycles),
            "lr_scheduler_num_cycles",
            kind=None if reading.has("lr_scheduler_num_cycles") else "default",
        )
    if ours == "polynomial":
        reading.put(
            "schedule.power",
            given.power,
            "lr_scheduler_power",
            kind=None if reading.has("lr_scheduler_power") else "default",
        )
        if given.lr and given.lr > POLYNOMIAL_END:
            floor = POLYNOMIAL_END / given.lr
            reading.put("schedule.floor", floor, given.key, f"it ends at a rate of 1e-7, a share of {floor:g}")
    if name == "cosine_with_min_lr" and given.min_ratio is not None:
        reading.put("schedule.floor", given.min_ratio, "lr_scheduler_min_lr_ratio")
    if ours == "inverse-sqrt" and (given.timescale or not given.warmup):
        note = "" if given.timescale else "theirs without a warm-up"
        reading.put(
            "schedule.timescale",
            _values.span(given.timescale or 10_000, "steps"),
            "lr_scheduler_timescale",
            note or "optimizer steps",
        )
    warmup(reading, given, ours)


def warmup(reading: Reading, given: Given, ours: str | None = "") -> None:
    """Set the warm-up."""
    if not given.warmup:
        if reading.has(given.warmup_key):
            reading.say("same", given.warmup_key, "schedule.warmup", None, "off")
        return
    if given.name.strip().lower() == "constant":
        reading.unused(
            given.warmup_key,
            "their schedule constant has no warm-up; constant_with_warmup has. To warm up here, set schedule.warmup.",
        )
    elif given.warmup < 1 and given.steps:
        steps = int(given.warmup * given.steps)
        note = f"{given.warmup:g} of {given.steps} steps"
        reading.put("schedule.warmup", _values.span(steps, "steps") if steps else 0.0, given.warmup_key, note)
    elif given.warmup < 1:
        reading.put("schedule.warmup", given.warmup, given.warmup_key, "a share of the run")
    else:
        reading.put("schedule.warmup", _values.span(int(given.warmup), "steps"), given.warmup_key, "optimizer steps")


def from_class(reading: Reading, key: str, name: str, arguments: Mapping[str, Any], given: Given) -> bool:
    """Set a schedule that is named by its class in place of the other; False if there is none like it."""
    short = name.rpartition(".")[2].lower()
    ours = _CLASSES.get(short)
    if ours is None:
        reading.lost(
            key,
            f"there is no such schedule here: the recipe has what {given.key} says. `lorabake list schedules` shows all.",
        )
        return False
    numbers = {argument: float(value) for argument, value in arguments.items() if isinstance(value, int | float)}
    if ours == "cosine":
        return _annealing(reading, key, numbers, given)
    reading.put("schedule.name", ours, key, f"in place of {given.key}")
    first = numbers.pop("T_0", None) or numbers.pop("first_cycle_max_steps", None)
    if first:
        reading.put("schedule.first_cycle", _values.span(int(first), "steps"), f"{key}: first cycle", "optimizer steps")
    for argument, setting in (("T_mult", "cycle_growth"), ("cycle_multiplier", "cycle_growth"), ("gamma", "decay")):
        if argument in numbers:
            reading.put(f"schedule.{setting}", numbers.pop(argument), f"{key}: {argument}")
    if "d" in numbers and ours == "rex-warm-restarts":
        reading.put("schedule.d", numbers.pop("d"), f"{key}: d")
    _floor(reading, key, numbers, given)
    if numbers.get("warmup_steps"):
        reading.lost(
            f"{key}: warmup_steps", "it warms up in every cycle; here only the run has a warm-up. Set schedule.warmup."
        )
    return True


def _annealing(reading: Reading, key: str, numbers: dict[str, float], given: Given) -> bool:
    """Half a cosine over T_max steps. Longer runs come up again with it, which no schedule here does."""
    half = numbers.pop("T_max", None)
    reading.put("schedule.name", "cosine", key, f"in place of {given.key}")
    _floor(reading, key, numbers, given)
    if half is None or given.steps is None or int(half) != given.steps:
        run = f"the run has {given.steps}" if given.steps else "the run's length in steps is not in the file"
        reading.lost(
            f"{key}: T_max",
            f"it falls for {_values.shown(half)} steps and rises again, and {run}; the recipe falls once, over the whole run.",
        )
    return True


def _floor(reading: Reading, key: str, numbers: dict[str, float], given: Given) -> None:
    lowest = numbers.pop("eta_min", 0.0) or numbers.pop("min_lr", 0.0)
    if lowest and given.lr and lowest < given.lr:
        floor = lowest / given.lr
        reading.put("schedule.floor", floor, f"{key}: lowest rate", f"{lowest:g} of {given.lr:g}")
