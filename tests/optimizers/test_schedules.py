"""Learning-rate schedules: diffusers' values, and what every schedule promises."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorabake.base.cards import cards
from lorabake.optimizers.schedules import ScheduleSettings, factor

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


SETTINGS = {
    "floor": st.floats(0, 0.9),
    "power": st.floats(0.1, 8),
    "d": st.floats(0, 0.99),
    "cycles": st.integers(1, 9),
    "first_cycle": st.one_of(st.floats(0, 0.99), st.integers(1, 500).map("{} steps".format)),
    "cycle_growth": st.floats(1, 4),
    "decay": st.floats(0.01, 1),
    "timescale": st.one_of(st.none(), st.floats(0, 0.99), st.integers(1, 500).map("{} steps".format)),
    "warmup": st.one_of(st.floats(0, 0.99), st.integers(0, 50).map("{} steps".format)),
}
"""Values for every setting that any schedule has."""


@given(st.data(), st.sampled_from(list(cards("schedule"))), st.integers(1, 400))
def test_every_schedule_keeps_between_its_floor_and_the_full_rate(data: st.DataObject, name: str, total: int) -> None:
    fields = cards("schedule")[name].settings.model_fields
    settings = settings_of(name, **{field: data.draw(SETTINGS[field], field) for field in fields})
    floor, warmup = getattr(settings, "floor", 0.0), settings.warmup.steps(total)
    factors = [factor(name, settings, step, total) for step in range(total)]
    assert all(0 <= f <= 1 + 1e-12 for f in factors)
    assert all(f >= floor - 1e-12 for f in factors[warmup:])
    assert factors[:warmup] == [step / warmup for step in range(warmup)][:total]
    if warmup < total:
        assert factors[warmup] == pytest.approx(1.0)
    if name in ("constant", "linear", "cosine", "polynomial", "rex", "inverse-sqrt"):
        falling = factors[warmup:]
        assert falling == sorted(falling, reverse=True)


@given(
    st.sampled_from(["linear", "cosine", "cosine-restarts", "polynomial", "rex"]),
    st.integers(1, 300),
    st.floats(0, 0.9),
)
def test_a_floor_lifts_the_same_shape(name: str, total: int, floor: float) -> None:
    for step in range(total):
        bare, lifted = (factor(name, settings_of(name, floor=f), step, total) for f in (0.0, floor))
        assert lifted == pytest.approx(floor + (1 - floor) * bare, abs=1e-12)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_polynomial_is_diffusers(power: float, floor: float) -> None:
    from diffusers.optimization import get_polynomial_decay_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_polynomial_decay_schedule_with_warmup(optimizer, 7, 50, lr_end=floor, power=power)
    settings = settings_of("polynomial", power=power, floor=floor, warmup="7 steps")
    for step in range(50):
        assert factor("polynomial", settings, step, 50) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(("warmup", "timescale"), [(10, None), (10, 25), (0, 25)])
def test_inverse_square_root_is_transformers(warmup: int, timescale: int | None) -> None:
    from transformers.optimization import get_inverse_sqrt_schedule

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_inverse_sqrt_schedule(optimizer, warmup, timescale)
    given_scale = {} if timescale is None else {"timescale": f"{timescale} steps"}
    settings = settings_of("inverse-sqrt", warmup=f"{warmup} steps", **given_scale)
    for step in range(80):
        assert factor("inverse-sqrt", settings, step, 80) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_inverse_square_root_by_hand() -> None:
    settings = settings_of("inverse-sqrt")
    assert [factor("inverse-sqrt", settings, step, 100) for step in (0, 10, 30)] == pytest.approx([1, 0.5**0.5, 0.5])
    assert factor("inverse-sqrt", settings_of("inverse-sqrt", timescale=0.2), 60, 100) == pytest.approx(0.5)


@pytest.mark.parametrize(("first", "growth"), [(10, 1), (7, 1), (5, 2), (3, 3), (200, 1)])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_warm_restarts_are_torchs(first: int, growth: int, floor: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, first, growth, eta_min=floor)
    settings = settings_of("cosine-warm-restarts", first_cycle=f"{first} steps", cycle_growth=growth, floor=floor)
    for step in range(120):
        ours = factor("cosine-warm-restarts", settings, step, 120)
        assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-12), f"step {step}"
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("name", ["cosine-warm-restarts", "rex-warm-restarts"])
def test_peaks_come_down_and_cycles_grow(name: str) -> None:
    """After a warm-up of 5 steps: cycles of 10, 15 and 22 steps (10 × 1.5²), from 1, 0.5 and 0.25."""
    settings = settings_of(name, first_cycle="10 steps", cycle_growth=1.5, decay=0.5, warmup="5 steps", floor=0.1)
    factors = [factor(name, settings, step, 60) for step in range(60)]
    assert [factors[5], factors[15], factors[30], factors[52]] == pytest.approx([1.0, 0.5, 0.25, 0.125])
    for first, last in ((5, 15), (15, 30), (30, 52), (52, 60)):
        assert factors[first:last] == sorted(factors[first:last], reverse=True)
        assert factors[last - 1] < factors[first]
    assert all(f >= 0.1 for f in factors[5:])
    low = settings_of(name, first_cycle="10 steps", decay=0.1, floor=0.3)
    assert factor(name, low, 40, 60) == 0.3, "a peak is never below the floor"


def test_the_first_cycle_as_a_share_is_one_of_what_follows_the_warm_up() -> None:
    settings = settings_of("cosine-warm-restarts", first_cycle=0.5, warmup="20 steps")
    factors = [factor("cosine-warm-restarts", settings, step, 100) for step in range(100)]
    assert [step for step in range(20, 100) if factors[step] == 1.0] == [20, 60]


def test_rex_by_hand() -> None:
    """0.5 / (0.1 + 0.9·0.5) = 10/11, and half of the rate at ten elevenths of the way."""
    settings = settings_of("rex")
    assert [factor("rex", settings, step, 110) for step in (0, 55, 100)] == pytest.approx([1.0, 10 / 11, 0.5])
    assert factor("rex", settings_of("rex", d=0.5), 50, 100) == pytest.approx(0.5 / 0.75)
    for step in range(50):
        assert factor("rex", settings_of("rex", d=0.0), step, 50) == pytest.approx(1 - step / 50)


@pytest.mark.parametrize(
    ("given_as", "steps"),
    [(0.05, 10), ("5 %", 10), ("5%", 10), ("10 steps", 10), ("1 step", 1), (0, 0), ("12.5 %", 25)],
)
def test_a_warm_up_in_every_way_to_say_it(given_as: Any, steps: int) -> None:
    settings = settings_of("cosine", warmup=given_as)
    factors = [factor("cosine", settings, step, 200) for step in range(200)]
    assert factors.index(1.0) == steps and factors[:steps] == [step / steps for step in range(steps)]


def test_a_warm_up_longer_than_the_run_only_rises() -> None:
    settings = settings_of("linear", warmup="50 steps")
    assert [factor("linear", settings, step, 10) for step in range(10)] == [step / 50 for step in range(10)]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("constant", {"warmup": 1.0}),
        ("constant", {"warmup": -0.1}),
        ("constant", {"warmup": "100 %"}),
        ("constant", {"warmup": "2 epochs"}),
        ("constant", {"warmup": True}),
        ("constant", {"floor": 0.1}),
        ("cosine", {"floor": 1.0}),
        ("cosine-restarts", {"cycles": 0}),
        ("cosine-warm-restarts", {"cycle_growth": 0.5}),
        ("cosine-warm-restarts", {"decay": 0.0}),
        ("rex", {"d": 1.0}),
        ("polynomial", {"power": 0.0}),
    ],
    ids=str,
)
def test_what_is_not_a_schedule_setting(name: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        settings_of(name, **wrong)


@pytest.mark.parametrize(
    ("name", "setting"),
    [("cosine", "warmup"), ("inverse-sqrt", "timescale"), ("rex-warm-restarts", "first_cycle")],
)
def test_one_is_neither_a_step_nor_a_share(name: str, setting: str) -> None:
    for whole in (1, 1.0, "100 %"):
        with pytest.raises(ValueError, match=r'a share of it must be below 1; steps are written "1 step"'):
            settings_of(name, **{setting: whole})
    assert getattr(settings_of(name, **{setting: "1 step"}), setting).count == 1
