"""Deterministic samplers of diffusion models: how a trained denoiser turns noise into latents, in the numbers of diffusers' schedulers.

Both samplers solve the same equation with the same first-order step. A *trajectory* says at which timesteps the denoiser is asked
and how much signal there is at each; :func:`step` walks it.

- ``ddim``: Song et al., "Denoising Diffusion Implicit Models" (2010.02502), η = 0; parity with ``DDIMScheduler``.
- ``euler``: Karras et al., "Elucidating the Design Space" (2206.00364), without churn; parity with ``EulerDiscreteScheduler``.
  k-diffusion writes it for x/√ᾱ with σ = √((1-ᾱ)/ᾱ). Put back into our x, its step is DDIM's, and scaling the denoiser's input by
  1/√(σ²+1) disappears; what differs are the timesteps (not always whole), the clean end and the scale of the first noise.

ᾱ (``alpha_bar``) is the share of the picture's variance left at a timestep: x = √ᾱ·x0 + √(1-ᾱ)·ε.
Predictions of x0 are never clipped: they are latents, which have no fixed range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from lorabake.base.errors import UserError, nearest
from lorabake.protocols.family import Prediction

if TYPE_CHECKING:
    from torch import Tensor

SchedulerSettings = Mapping[str, object]
"""A model's ``scheduler_config.json``; what it leaves out has the default of diffusers' scheduler class."""

_LEAST_SIGNAL = 2.0**-24
"""ᾱ that Euler's method takes for none at all, as diffusers does: σ must be a number."""
SPACINGS = ("leading", "linspace", "trailing")


@dataclass(frozen=True, slots=True)
class Leg:
    """One step: ask the denoiser at ``timestep``, go from ``alpha_bar`` to ``next_alpha_bar``."""

    timestep: float
    alpha_bar: float
    next_alpha_bar: float


AnyLeg = TypeVar("AnyLeg", covariant=True)


@dataclass(frozen=True)
class Trajectory(Generic[AnyLeg]):
    """The way from noise to a picture's latents, in legs of one kind."""

    legs: tuple[AnyLeg, ...]
    noise_scale: float
    """Standard deviation of the start noise."""


def timesteps(steps: int, sampler: SchedulerSettings, train_steps: int = 1000) -> list[int]:
    """Timesteps of DDIM from noisy to clean, as ``DDIMScheduler.set_timesteps`` sets them (2305.08891, table 2).

    Args:
        steps: how many times the denoiser is asked.
        sampler: ``timestep_spacing`` (leading, trailing or linspace) and ``steps_offset`` are read.
        train_steps: length of the noise schedule of training.

    Raises:
        UserError: more steps than the schedule has, or a spacing or offset that is not known.
    """
    return [int(t) for t in np.round(_spaced(steps, sampler, train_steps, default="leading"))]


def ddim(betas_T: Tensor, sampler: SchedulerSettings, steps: int) -> Trajectory[Leg]:
    """Trajectory of DDIM. Reads ``timestep_spacing``, ``steps_offset`` and ``set_alpha_to_one`` of ``sampler``."""
    alpha_bars = _alpha_bars(betas_T)
    asked = timesteps(steps, sampler, len(alpha_bars))
    stride = len(alpha_bars) // steps
    end = 1.0 if sampler.get("set_alpha_to_one", True) else float(alpha_bars[0])
    # The next signal level lies one stride lower, not at the next timestep. For linspace and trailing spacing these can differ;
    # diffusers does so, and the same pictures are worth more here than a tidier rule.
    legs = [Leg(t, float(alpha_bars[t]), float(alpha_bars[t - stride]) if t >= stride else end) for t in asked]
    return Trajectory(tuple(legs), noise_scale=1.0)


def euler(betas_T: Tensor, sampler: SchedulerSettings, steps: int) -> Trajectory[Leg]:
    """Trajectory of Euler's method. Reads ``timestep_spacing`` and ``steps_offset`` of ``sampler``."""
    sigmas_T = np.sqrt(1 / np.maximum(_alpha_bars(betas_T), _LEAST_SIGNAL) - 1)
    asked = _spaced(steps, sampler, len(sigmas_T), default="linspace")
    alpha_bars = [*(1 / (np.interp(asked, np.arange(len(sigmas_T)), sigmas_T) ** 2 + 1)), 1.0]
    legs = [
        Leg(float(t), float(here), float(there))
        for t, here, there in zip(asked, alpha_bars, alpha_bars[1:], strict=False)
    ]
    leading = sampler.get("timestep_spacing", "linspace") == "leading"
    return Trajectory(tuple(legs), noise_scale=1.0 if leading else (1 - legs[0].alpha_bar) ** 0.5)


def step(output_BCHW: Tensor, latents_BCHW: Tensor, leg: Leg, prediction: Prediction) -> Tensor:
    """Latents after one leg: √ᾱ'·x0 + √(1-ᾱ')·ε, equation 12 of 2010.02502 with σ = 0.

    Args:
        output_BCHW: what the denoiser said at ``leg.timestep``: ε, or v = √ᾱ·ε - √(1-ᾱ)·x0 (2202.00512).
        latents_BCHW: where it was asked.
    """
    signal, noise = leg.alpha_bar**0.5, (1 - leg.alpha_bar) ** 0.5
    if prediction == "v":
        clean_BCHW = signal * latents_BCHW - noise * output_BCHW
        epsilon_BCHW = signal * output_BCHW + noise * latents_BCHW
    else:
        clean_BCHW = (latents_BCHW - noise * output_BCHW) / signal
        epsilon_BCHW = output_BCHW
    return leg.next_alpha_bar**0.5 * clean_BCHW + (1 - leg.next_alpha_bar) ** 0.5 * epsilon_BCHW


def _alpha_bars(betas_T: Tensor) -> np.ndarray:
    return np.cumprod(1 - betas_T.double().numpy())


def _spaced(steps: int, sampler: SchedulerSettings, train_steps: int, default: str) -> np.ndarray:
    """Timesteps from noisy to clean, not yet rounded where the spacing gives fractions (linspace)."""
    settings: Mapping[str, Any] = sampler
    spacing = settings.get("timestep_spacing", default)
    if spacing not in SPACINGS:
        raise UserError(f"The model's timestep_spacing '{spacing}' is not known. {nearest(str(spacing), SPACINGS)}")
    offset = int(settings.get("steps_offset", 0)) if spacing == "leading" else 0
    if offset not in (0, 1):
        raise UserError(f"The model's steps_offset {offset} is not supported. Allowed: 0 or 1.")
    # A schedule that is shifted by an offset has no room for as many steps as there are noise levels.
    most = train_steps - offset
    if not 1 <= steps <= most:
        raise UserError(
            f"{steps} steps cannot be drawn with this model's schedule. Allowed: 1 to {most}; 20 to 50 are usual."
        )
    if spacing == "linspace":
        return np.linspace(0, train_steps - 1, steps)[::-1]
    if spacing == "leading":
        return np.arange(steps)[::-1] * (train_steps // steps) + float(offset)
    return np.round(np.arange(train_steps, 0, -train_steps / steps)[:steps]) - 1  # arange can give one too many
