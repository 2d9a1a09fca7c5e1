"""Drawing with flow models: Euler's method along the straight way from noise to picture.

Numbers of diffusers' ``FlowMatchEulerDiscreteScheduler`` as its Flux pipeline uses it: shares of noise s fall evenly from 1 to
1/steps and are then shifted towards noise, by the scheduler's ``shift`` or, with ``use_dynamic_shifting``, by the picture's size.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorabake.base.errors import UserError
from lorabake.objectives.timesteps import shifted, size_shift
from lorabake.protocols.family import Prediction
from lorabake.sampling.ddim import Trajectory

if TYPE_CHECKING:
    from torch import Tensor

_FIXED: Mapping[str, tuple[Any, ...]] = {
    "invert_sigmas": (False,),
    "shift_terminal": (None,),
    "stochastic_sampling": (False,),
    "time_shift_type": ("exponential",),
    "use_beta_sigmas": (False,),
    "use_exponential_sigmas": (False,),
    "use_karras_sigmas": (False,),
}
"""Settings of the scheduler that would change the arithmetic, and what they may be."""


@dataclass(frozen=True, slots=True)
class FlowLeg:
    """One step: ask the denoiser at ``timestep`` = 1000 · ``share``, go from ``share`` of noise to ``next_share``."""

    timestep: float
    share: float
    next_share: float


def flow_euler(sampler: Mapping[str, Any], steps: int, tokens: int) -> Trajectory[FlowLeg]:
    """Trajectory of Euler's method.

    Args:
        sampler: the model's scheduler settings; what they leave out has diffusers' default.
        steps: how many times the denoiser is asked.
        tokens: patches of 2 × 2 latent cells in the picture.

    Raises:
        UserError: no steps, or settings that this sampler has no arithmetic for.
    """
    if steps < 1:
        raise UserError(f"{steps} steps cannot be drawn. Allowed: 1 or more; 20 to 30 are usual.")
    for name, allowed in _FIXED.items():
        if sampler.get(name) is not None and sampler[name] not in allowed:
            raise UserError(f"The model's {name} {sampler[name]!r} is not supported. Allowed: {allowed[0]!r}.")
    dynamic = sampler.get("use_dynamic_shifting", False)
    shift = size_shift(tokens, sampler) if dynamic else float(sampler.get("shift", 1.0))
    shares = [*(shifted((steps - done) / steps, shift) for done in range(steps)), 0.0]
    legs = [FlowLeg(1000 * here, here, there) for here, there in itertools.pairwise(shares)]
    return Trajectory(tuple(legs), noise_scale=1.0)


def flow_step(output_BCHW: Tensor, latents_BCHW: Tensor, leg: FlowLeg, prediction: Prediction) -> Tensor:
    """Latents after one leg: x + (s' − s)·v, v the denoiser's direction from picture to noise at ``leg.timestep``."""
    return latents_BCHW + (leg.next_share - leg.share) * output_BCHW
