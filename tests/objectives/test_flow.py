"""The formulas of flow matching, by hand and against diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorabake.base.cards import cards
from lorabake.objectives.flow import Flow, FlowSettings

SHAPE = (2000, 16, 32, 32)


def objective(sampler: dict[str, Any] | None = None, **settings: Any) -> Flow:
    return Flow(FlowSettings(**settings), sampler or {})


def sample() -> tuple[Tensor, Tensor, Tensor]:
    """x, ε, t."""
    generator = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(4, 3, 2, 2, generator=generator) for _ in range(2))
    return x, noise, torch.tensor([0.0, 250.0, 612.5, 1000.0])


def test_the_way_by_hand() -> None:
    x, noise, t = sample()
    noisy = objective().corrupt(x, noise, t)
    for i, s in enumerate((0, 0.25, 0.6125, 1)):
        torch.testing.assert_close(noisy[i], (1 - s) * x[i] + s * noise[i])
    assert torch.equal(noisy[0], x[0]) and torch.equal(noisy[3], noise[3])


def test_the_target_leads_from_picture_to_noise() -> None:
    x, noise, t = sample()
    made = objective()
    noisy, target = made.corrupt(x, noise, t), made.target(x, noise, t)
    assert torch.equal(target, noise - x)
    s = (t / 1000)[:, None, None, None]
    torch.testing.assert_close(noisy - s * target, x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(noisy + (1 - s) * target, noise, rtol=1e-5, atol=1e-5)


def test_noise_is_diffusers() -> None:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    theirs: Any = FlowMatchEulerDiscreteScheduler()
    x, noise, _ = sample()
    t = theirs.timesteps[[999, 750, 400, 0]]
    assert t.tolist() == [1, 250, 600, 1000]
    ours = objective().corrupt(x, noise, t)
    torch.testing.assert_close(ours, theirs.scale_noise(x, t, noise), rtol=1e-5, atol=1e-6)


def test_the_loss_of_a_sample_by_hand() -> None:
    prediction, target = torch.zeros(2, 1, 1, 2), torch.tensor([[[[1.0, 3.0]]], [[[0.0, 2.0]]]])
    t = torch.tensor([0.0, 900.0])
    loss = objective().weigh(objective().error(prediction, target, t).mean((1, 2, 3)), t)
    assert loss.tolist() == [5.0, 2.0], "every timestep weighs the same, the clean one too"
    assert objective().error(prediction.bfloat16(), target.bfloat16(), torch.tensor([1.0, 2.0])).dtype == torch.float32


@pytest.mark.parametrize("rule", sorted(cards("timesteps")))
@pytest.mark.parametrize(("low", "high"), [(0, 1000), (200, 210), (999, 1000)])
def test_timesteps_are_floats_within_bounds(rule: str, low: int, high: int) -> None:
    made = objective(timesteps=rule, min_timestep=low, max_timestep=high)
    drawn = made.draw_timesteps(SHAPE, torch.Generator().manual_seed(1))
    assert drawn.shape == (2000,) and drawn.dtype == torch.float32
    assert low <= float(drawn.min()) and float(drawn.max()) <= high
    assert float(drawn.max() - drawn.min()) > 0.9 * (high - low) or rule != "uniform"
    assert len(set(drawn.tolist())) > 1000


def test_timesteps_are_a_thousand_times_the_share() -> None:
    drawn = objective({"shift": 2.0}).draw_timesteps(SHAPE, torch.Generator().manual_seed(4)).double()
    s = torch.randn(2000, generator=torch.Generator().manual_seed(4), dtype=torch.float64).sigmoid()
    torch.testing.assert_close(drawn, 1000 * 2 * s / (1 + s), rtol=1e-6, atol=0)


def test_a_range_squeezes_the_shares_into_it() -> None:
    whole = objective().draw_timesteps(SHAPE, torch.Generator().manual_seed(4))
    half = objective(min_timestep=500).draw_timesteps(SHAPE, torch.Generator().manual_seed(4))
    torch.testing.assert_close(half, 500 + whole / 2)


def test_some_shifts_go_by_the_size() -> None:
    for rule, alike in (("shift", True), ("sigmoid", True), ("flux-shift", False), ("resolution-shift", False)):
        small, large = (
            objective(timesteps=rule).draw_timesteps((50, 16, side, side), torch.Generator().manual_seed(4))
            for side in (32, 128)
        )
        assert torch.equal(small, large) == alike
        assert alike or bool((large > small).all())


@pytest.mark.parametrize("wrong", [{"shift": 0.0}, {"sigmoid_scale": 0.0}, {"logit_std": -1.0}, {"min_timestep": 1000}])
def test_settings_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FlowSettings(**wrong)


def test_an_empty_range_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing lies between"):
        FlowSettings(min_timestep=500, max_timestep=500)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"timestep_sampling": "shift", "sigmoid_scale": 1.0, "discrete_flow_shift": None}),
        ({"shift": 2.5}, {"timestep_sampling": "shift", "discrete_flow_shift": 2.5}),
        ({"timesteps": "flux-shift"}, {"timestep_sampling": "flux_shift", "discrete_flow_shift": None}),
        ({"timesteps": "logit-normal", "logit_mean": 0.5}, {"timestep_sampling": "sigma", "logit_mean": 0.5}),
        ({"timesteps": "uniform"}, {"timestep_sampling": "uniform", "sigmoid_scale": None, "logit_std": None}),
        ({"timesteps": "stratified"}, {"timestep_sampling": "stratified", "sigmoid_scale": None}),
        (
            {"timesteps": "resolution-shift", "shift": 2.0},
            {"timestep_sampling": "resolution_shift", "discrete_flow_shift": 2.0},
        ),
    ],
)
def test_files_say_how_timesteps_were_drawn(settings: dict[str, Any], expected: dict[str, Any]) -> None:
    said = FlowSettings(**settings).metadata()
    assert said["loss_type"] == "l2" and said["model_prediction_type"] == "raw"
    assert {name: said[name] for name in expected} == expected
