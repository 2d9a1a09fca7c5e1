"""Parity with diffusers' schedulers, and the algebra of one step."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lorabake.base.errors import UserError
from lorabake.families.networks.noise import betas_of
from lorabake.sampling.ddim import Leg, ddim, euler, step, timesteps

SPACINGS = ("leading", "trailing", "linspace")
BETAS_T = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32).double() ** 2
KINDS: dict[str, Any] = {"epsilon": "epsilon", "v": "v_prediction"}
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def denoiser(latents: Tensor, timestep: float) -> Tensor:
    """Something smooth and bounded that depends on all it is told."""
    return torch.sin(latents * 1.3 + timestep / 300) + 0.5 * torch.roll(latents, 1, -1).tanh()


def settings(spacing: str, offset: int, to_one: bool = False) -> dict[str, Any]:
    return {"timestep_spacing": spacing, "steps_offset": offset, "set_alpha_to_one": to_one}


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
def test_timesteps_are_diffusers(spacing: Any, offset: int) -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    theirs = DDIMScheduler(**SD, timestep_spacing=spacing, steps_offset=offset)
    for steps in [*range(1, 120), 250, 333, 500, 999]:
        theirs.set_timesteps(steps)
        # Where the division does not come out even, diffusers' arange can give one timestep too many, below zero.
        assert timesteps(steps, settings(spacing, offset)) == theirs.timesteps.tolist()[:steps]


@pytest.mark.parametrize(
    ("spacing", "prediction", "to_one", "steps"),
    [*itertools.product(SPACINGS, ("epsilon", "v"), (False, True), (1, 7, 20, 50))],
)
def test_ddim_trajectory_is_diffusers(spacing: str, prediction: Any, to_one: bool, steps: int) -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    sampler = settings(spacing, 1, to_one)
    theirs = DDIMScheduler(**SD, **sampler, clip_sample=False, prediction_type=KINDS[prediction])
    theirs.set_timesteps(steps)
    # Their table of signal levels is float32; compared in float64, its rounding (3e-8) would be most of the difference.
    theirs.alphas_cumprod = torch.cumprod(1 - BETAS_T, 0)
    theirs.final_alpha_cumprod = torch.tensor(1.0).double() if to_one else theirs.alphas_cumprod[0]
    ours_x = theirs_x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for leg, t in zip(ddim(BETAS_T, sampler, steps).legs, theirs.timesteps[:steps], strict=True):
        ours_x = step(denoiser(ours_x, leg.timestep), ours_x, leg, prediction)
        theirs_x = theirs.step(denoiser(theirs_x, int(t)), t, theirs_x).prev_sample  # type: ignore[union-attr]
        torch.testing.assert_close(ours_x, theirs_x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("spacing", "prediction"), [*itertools.product(SPACINGS, ("epsilon", "v"))])
def test_ddim_in_float32_is_untouched_diffusers(spacing: str, prediction: Any) -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    theirs = DDIMScheduler(**SD, **settings(spacing, 1), clip_sample=False, prediction_type=KINDS[prediction])
    theirs.set_timesteps(20)
    ours_x = theirs_x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for leg, t in zip(ddim(BETAS_T, settings(spacing, 1), 20).legs, theirs.timesteps, strict=True):
        ours_x = step(denoiser(ours_x, leg.timestep), ours_x, leg, prediction)
        theirs_x = theirs.step(denoiser(theirs_x, int(t)), t, theirs_x).prev_sample  # type: ignore[union-attr]
    torch.testing.assert_close(ours_x, theirs_x, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("spacing", "prediction", "steps"), [*itertools.product(SPACINGS, ("epsilon", "v"), (1, 7, 20, 50))]
)
def test_euler_trajectory_is_diffusers(spacing: str, prediction: Any, steps: int) -> None:
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

    sampler = {"timestep_spacing": spacing, "steps_offset": 1}
    theirs = EulerDiscreteScheduler(**SD, **sampler, prediction_type=KINDS[prediction])
    theirs.set_timesteps(steps)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    ours = euler(BETAS_T, sampler, steps)
    ours_x, theirs_x = noise * ours.noise_scale, noise * theirs.init_noise_sigma
    for leg, t in zip(ours.legs, theirs.timesteps[:steps], strict=True):
        assert leg.timestep == pytest.approx(float(t), abs=1e-3)
        scaled = theirs.scale_model_input(theirs_x, t)
        torch.testing.assert_close(ours_x, scaled, rtol=3e-5, atol=3e-5)
        theirs_x = theirs.step(denoiser(scaled, float(t)), t, theirs_x).prev_sample  # type: ignore[union-attr]
        ours_x = step(denoiser(ours_x, leg.timestep), ours_x, leg, prediction)
    torch.testing.assert_close(ours_x, theirs_x, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("steps", [1, 7, 20])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_with_zero_terminal_snr_it_is_diffusers(name: str, steps: int) -> None:
    """The first step starts where there is no signal at all, and divides by none."""
    import diffusers

    sampler = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    more = {"clip_sample": False} if name == "DDIMScheduler" else {}
    theirs = getattr(diffusers, name)(**SD, **sampler, **more)
    theirs.set_timesteps(steps)
    betas_T = betas_of({**SD, **sampler, "num_train_timesteps": 1000})
    ours = (ddim if name == "DDIMScheduler" else euler)(betas_T, sampler, steps)
    assert ours.legs[0].timestep == 999 and ours.legs[0].alpha_bar < 1e-7
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    ours_x, theirs_x = noise * ours.noise_scale, noise * theirs.init_noise_sigma
    for leg, t in zip(ours.legs, theirs.timesteps[:steps], strict=True):
        scaled = theirs.scale_model_input(theirs_x, t)
        theirs_x = theirs.step(denoiser(scaled, float(t)), t, theirs_x).prev_sample
        ours_x = step(denoiser(ours_x, leg.timestep), ours_x, leg, "v")
    torch.testing.assert_close(ours_x, theirs_x, rtol=1e-3, atol=1e-3)  # their σ of 4096 leaves float32 few digits
    assert bool(torch.isfinite(ours_x).all())


def test_what_settings_leave_out_is_the_schedulers_default() -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

    theirs, others = DDIMScheduler(**SD), EulerDiscreteScheduler(**SD)
    theirs.set_timesteps(20)
    others.set_timesteps(20)
    assert [leg.timestep for leg in ddim(BETAS_T, {}, 20).legs] == theirs.timesteps.tolist()
    assert ddim(BETAS_T, {}, 20).legs[-1].next_alpha_bar == 1
    assert [leg.timestep for leg in euler(BETAS_T, {}, 20).legs] == pytest.approx(others.timesteps.tolist(), abs=1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_a_perfect_denoiser_arrives_in_one_step(prediction: Any) -> None:
    clean, noise = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    here, there = 0.3, 0.8
    mixed = here**0.5 * clean + (1 - here) ** 0.5 * noise
    output = noise if prediction == "epsilon" else here**0.5 * noise - (1 - here) ** 0.5 * clean
    expected = there**0.5 * clean + (1 - there) ** 0.5 * noise
    torch.testing.assert_close(step(output, mixed, Leg(500, here, there), prediction), expected)


@pytest.mark.parametrize("sampler", [ddim, euler])
def test_signal_grows_along_every_trajectory(sampler: Any) -> None:
    for spacing, steps in itertools.product(SPACINGS, (2, 20, 500)):
        legs = sampler(BETAS_T, settings(spacing, 1), steps).legs
        assert len(legs) == steps
        assert all(leg.alpha_bar < leg.next_alpha_bar <= 1 for leg in legs[:-1])


@pytest.mark.parametrize("steps", [0, 1000, 1001])
def test_too_many_steps_are_named(steps: int) -> None:
    with pytest.raises(UserError, match=f"{steps} steps"):
        timesteps(steps, settings("leading", 1))


def test_an_unknown_spacing_is_named() -> None:
    with pytest.raises(UserError, match=r"'trialing'.*Did you mean 'trailing'"):
        timesteps(20, settings("trialing", 0))


@pytest.mark.parametrize("offset", [-1, 2])
def test_an_offset_that_leaves_the_schedule_is_named(offset: int) -> None:
    with pytest.raises(UserError, match=f"steps_offset {offset}"):
        timesteps(500, settings("leading", offset))
