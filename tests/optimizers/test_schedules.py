"""Learning-rate schedules: diffusers' values, and what every schedule promises."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorabake.base.cards import cards
from lorabake.optimizers.schedules import RestartSettings, ScheduleSettings, factor

NAMES = {
    "constant": "constant_with_warmup",
    "linear": "linear",
    "cosine": "cosine",
    "cosine-restarts": "cosine_with_restarts",
}
"""Ours, and diffusers' name for it."""


def settings_of(name: str, **given: Any) -> ScheduleSettings:
    return cast(ScheduleSettings, cards("schedule")[name].settings(**given))


@pytest.mark.parametrize(
    ("name", "cycles"),
    [
        ("constant", 1),
        ("linear", 1),
        ("cosine", 1),
        ("cosine-restarts", 1),
        ("cosine-restarts", 2),
        ("cosine-restarts", 5),
    ],
)
@pytest.mark.parametrize(("total", "warmup"), [(10, 0), (100, 0), (100, 10), (97, 13), (1, 0), (2, 1), (250, 249)])
def test_values_are_diffusers(name: str, cycles: int, total: int, warmup: int) -> None:
    from diffusers.optimization import get_scheduler

    settings = settings_of(name, warmup=warmup / total, **({"cycles": cycles} if name == "cosine-restarts" else {}))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    cycles_given: dict[str, Any] = {"num_cycles": cycles} if name == "cosine-restarts" else {}
    theirs = get_scheduler(NAMES[name], optimizer, num_warmup_steps=warmup, num_training_steps=total, **cycles_given)
    for step in range(total):
        ours = factor(name, settings, step, total)
        assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-12), f"step {step}"
        optimizer.step()
        theirs.step()


@given(st.sampled_from(list(cards("schedule"))), st.integers(1, 400), st.floats(0, 0.99))
def test_every_schedule_stays_between_nothing_and_the_full_rate(name: str, total: int, warmup: float) -> None:
    settings = settings_of(name, warmup=warmup)
    factors = [factor(name, settings, step, total) for step in range(total)]
    assert all(0 <= f <= 1 for f in factors)
    rising = factors[: round(warmup * total)]
    assert rising == sorted(rising)
    if len(rising) < total:
        assert factors[len(rising)] == pytest.approx(1.0)


def test_what_is_not_a_schedule_setting() -> None:
    with pytest.raises(ValueError):
        ScheduleSettings(warmup=1.0)
    with pytest.raises(ValueError):
        RestartSettings(cycles=0)
