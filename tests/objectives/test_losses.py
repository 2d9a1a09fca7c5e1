"""Losses by hand, and where Huber's turns from a square into a line, for every kind of model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorabake.base.cards import cards
from lorabake.objectives._settings import ObjectiveSettings
from lorabake.objectives.diffusion import Diffusion, DiffusionSettings
from lorabake.objectives.flow import Flow, FlowSettings

CPU = torch.device("cpu")
BETAS_T = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
LOSSES = sorted(cards("loss"))


def values(loss: str, differences: list[float], c: float | None = None) -> list[float]:
    """The loss of each difference."""
    prediction = torch.tensor(differences, dtype=torch.float64).view(1, 1, 1, -1)
    c_B111 = None if c is None else torch.tensor([c], dtype=torch.float64).view(1, 1, 1, 1)
    return cards("loss")[loss].load()(prediction + 5, torch.full_like(prediction, 5), c_B111).flatten().tolist()


def test_by_hand() -> None:
    """With c = 3 a difference of 4 makes √(16 + 9) − 3 = 2."""
    assert values("l2", [4, -3, 0]) == [16, 9, 0]
    assert values("l1", [4, -3, 0]) == [4, 3, 0]
    assert values("huber", [4, -4, 0], c=3) == pytest.approx([12, 12, 0])
    assert values("smooth-l1", [4, -4, 0], c=3) == pytest.approx([4, 4, 0])
    assert values("huber", [0.3], c=0.4) == pytest.approx([2 * 0.4 * (0.5 - 0.4)])


def test_near_and_far() -> None:
    assert values("huber", [1e-4], c=0.1) == pytest.approx([1e-8], rel=1e-5)
    assert values("smooth-l1", [1e-4], c=0.1) == pytest.approx([1e-7], rel=1e-5)
    assert values("huber", [1e4], c=0.1) == pytest.approx([0.2 * 1e4], rel=1e-4)
    assert values("smooth-l1", [1e4], c=0.1) == pytest.approx([2e4], rel=1e-4)


@given(st.floats(-100, 100), st.floats(0.001, 1))
def test_huber_lies_below_the_square_and_the_line(difference: float, c: float) -> None:
    difference = (difference + 5) - 5  # as it is rounded in `values`
    (huber,), (smooth,) = values("huber", [difference], c), values("smooth-l1", [difference], c)
    assert 0 <= huber <= min(difference**2, 2 * c * abs(difference)) * (1 + 1e-12)
    assert huber == pytest.approx(c * smooth)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("difference", [-2.0, -0.01, 0.0, 0.03, 5.0])
def test_gradients(loss: str, difference: float) -> None:
    """2d, the sign of d, 2cd / √(d² + c²) and 2d / √(d² + c²)."""
    c, prediction = 0.1, torch.tensor([[[[difference]]]], dtype=torch.float64, requires_grad=True)
    cards("loss")[loss].load()(
        prediction, torch.zeros_like(prediction), torch.full_like(prediction, c)
    ).sum().backward()
    root = math.hypot(difference, c)
    expected = {
        "l2": 2 * difference,
        "l1": (difference > 0) - (difference < 0),
        "huber": 2 * c * difference / root,
        "smooth-l1": 2 * difference / root,
    }
    assert prediction.grad is not None and float(prediction.grad) == pytest.approx(expected[loss])


def test_small_differences_are_not_lost_in_float32() -> None:
    """√(d² + c²) − c as it is written would be 0 here."""
    prediction, c = torch.full((1, 1, 1, 1), 1e-5), torch.ones(1, 1, 1, 1)
    assert float(cards("loss")["huber"].load()(prediction, torch.zeros_like(prediction), c)) == pytest.approx(1e-10)


# ---- where it turns


def diffusion(prediction: Any = "epsilon", **settings: Any) -> Diffusion:
    return Diffusion(DiffusionSettings(**settings), BETAS_T, prediction, CPU)


def flow(**settings: Any) -> Flow:
    return Flow(FlowSettings(**settings), {})


def turning_points(objective: Any, timesteps_B: Tensor) -> list[float]:
    """c, from the loss L of a difference of 1: with smooth-l1 (L/2 + c)² = 1 + c²."""
    one = torch.ones(len(timesteps_B), 1, 1, 1)
    loss_B = objective.error(one, torch.zeros_like(one), timesteps_B).flatten().double()
    return ((1 - loss_B.square() / 4) / loss_B).tolist()


def sigma(t: int) -> float:
    bar = float((1 - BETAS_T[: t + 1]).prod())
    return math.sqrt((1 - bar) / bar)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_schedules_of_diffusion_by_hand(prediction: str) -> None:
    t = torch.tensor([0, 250, 999])
    kind: dict[str, Any] = {"prediction": prediction, "loss": "smooth-l1", "huber_c": 0.25}
    near = 1e-6
    constant = diffusion(**kind, huber_schedule="constant", huber_scale=3.0)
    assert turning_points(constant, t) == pytest.approx([0.75] * 3, abs=near)
    exponential = diffusion(**kind, huber_schedule="exponential", huber_scale=2.0)
    assert turning_points(exponential, t) == pytest.approx([2.0, 2 * 0.25**0.25, 2 * 0.25**0.999], abs=near)
    expected = [0.75 / (1 + sigma(step)) ** 2 + 0.25 for step in t.tolist()]
    assert turning_points(diffusion(**kind, huber_schedule="snr", huber_scale=9.0), t) == pytest.approx(
        expected, abs=near
    )
    assert turning_points(diffusion(**kind), t) == pytest.approx(expected, abs=near), "snr is the usual one"


def test_known_numbers_of_the_snr_schedule() -> None:
    """σ is 0.02917 at the first timestep of SD and 14.6146 at the last."""
    made = turning_points(diffusion(loss="smooth-l1"), torch.tensor([0, 999]))
    assert made == pytest.approx([0.9 / 1.02917**2 + 0.1, 0.9 / 15.6146**2 + 0.1], abs=2e-5)


def test_schedules_of_flow_by_hand() -> None:
    """σ = s / (1 − s): at s = 3/4 it is 3, at s = 1 without end."""
    t = torch.tensor([0.0, 500.0, 750.0, 1000.0])
    kind: dict[str, Any] = {"loss": "smooth-l1", "huber_c": 0.25}
    near = 1e-6
    assert turning_points(flow(**kind), t) == pytest.approx([1.0, 0.75 / 4 + 0.25, 0.75 / 16 + 0.25, 0.25], abs=near)
    exponential = flow(**kind, huber_schedule="exponential")
    assert turning_points(exponential, t) == pytest.approx([1.0, 0.5, 0.25**0.75, 0.25], abs=near)
    assert turning_points(flow(**kind, huber_schedule="constant"), t) == pytest.approx([0.25] * 4, abs=near)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 1))
def test_more_noise_never_turns_later(one: float, other: float, c: float) -> None:
    low, high = (torch.tensor([share]) for share in sorted((one, other)))
    settings = ObjectiveSettings(huber_c=c)
    for card in cards("huber_schedule").values():
        at_low, at_high = card.load()(low, low, settings), card.load()(high, high, settings)
        assert float(at_high) <= float(at_low) + 1e-6
        assert c - 1e-6 <= float(at_high) and float(at_low) <= 1 + 1e-6


@pytest.mark.parametrize("objective", [diffusion, flow])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_sample_turns_where_its_own_timestep_says(objective: Any, loss: str) -> None:
    """Neither other samples nor the order of a batch matter."""
    generator = torch.Generator().manual_seed(1)
    prediction, target = (torch.randn(3, 4, 2, 2, generator=generator).bfloat16() for _ in range(2))
    t = torch.tensor([10, 500, 990])
    made = objective(loss=loss)
    error = made.error(prediction, target, t)
    assert error.dtype == torch.float32 and error.shape == prediction.shape
    for index in range(3):
        alone = made.error(prediction[index : index + 1], target[index : index + 1], t[index : index + 1])
        assert torch.equal(alone, error[index : index + 1])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["l2", None, None, None]),
        ({"loss": "l1", "huber_c": 0.3}, ["l1", None, None, None]),
        ({"loss": "huber"}, ["huber", "snr", 0.1, None]),
        ({"loss": "smooth-l1", "huber_schedule": "constant", "huber_scale": 2.0}, ["smooth_l1", "constant", 0.1, 2.0]),
    ],
)
@pytest.mark.parametrize("kind", [DiffusionSettings, FlowSettings])
def test_files_say_which_loss(kind: Any, settings: dict[str, Any], expected: list[Any]) -> None:
    said = kind(**settings).metadata()
    assert [said[name] for name in ("loss_type", "huber_schedule", "huber_c", "huber_scale")] == expected
