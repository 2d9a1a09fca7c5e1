"""Noise schedules, by hand and against diffusers."""

from __future__ import annotations

import pytest
import torch

from lorabake.base.errors import UserError
from lorabake.families.networks.noise import betas_of

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
ZERO = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


def test_zero_terminal_snr_is_diffusers() -> None:
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    expected = rescale_zero_terminal_snr(betas_of(SD).clone())
    torch.testing.assert_close(betas_of({**SD, **ZERO}), expected, rtol=1e-9, atol=1e-12)


def test_zero_terminal_snr_by_hand() -> None:
    """√ᾱ goes through the same first value to 0, as a straight line of what it was."""
    plain, ours = ((1 - betas_of(settings)).cumprod(0).sqrt() for settings in (SD, {**SD, **ZERO}))
    assert float(ours[0]) == pytest.approx(float(plain[0])) and float(ours[-1]) == 0.0
    slope = float(plain[0] / (plain[0] - plain[-1]))
    torch.testing.assert_close(ours, (plain - plain[-1]) * slope, rtol=1e-9, atol=1e-12)


def test_rescaling_twice_changes_nothing() -> None:
    once = betas_of({**SD, **ZERO})
    again = betas_of({**SD, **ZERO, "trained_betas": once.tolist()})
    torch.testing.assert_close(again, once, rtol=1e-9, atol=1e-12)


def test_noise_cannot_be_told_from_noise() -> None:
    with pytest.raises(UserError, match="its last timestep has nothing to predict"):
        betas_of({**SD, "rescale_betas_zero_snr": True, "prediction_type": "epsilon"})
