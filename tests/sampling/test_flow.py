"""Drawing with flow models: diffusers' numbers, and the algebra of one step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorabake.base.errors import UserError
from lorabake.sampling.flow import FlowLeg, flow_euler, flow_step

FLUX = {"shift": 3.0, "use_dynamic_shifting": True}
SIZES: list[tuple[dict[str, Any], int]] = [
    ({}, 64),
    ({"shift": 3.0}, 64),
    ({"shift": 1.73}, 4096),
    (FLUX, 16),
    (FLUX, 256),
    (FLUX, 1024),
    (FLUX, 4096),
    (FLUX, 9216),
    ({**FLUX, "base_shift": 0.2, "max_shift": 2.0, "base_image_seq_len": 128, "max_image_seq_len": 2048}, 777),
]


def reference(sampler: dict[str, Any], steps: int, tokens: int) -> Any:
    """Diffusers' scheduler, set up as its Flux pipeline does."""
    import numpy as np
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler: Any = FlowMatchEulerDiscreteScheduler(**sampler)
    lengths = (scheduler.config.base_image_seq_len, scheduler.config.max_image_seq_len)
    mu = calculate_shift(tokens, *lengths, scheduler.config.base_shift, scheduler.config.max_shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler


def denoiser(latents: Tensor, timestep: float) -> Tensor:
    """Something smooth and bounded that depends on all it is told."""
    return torch.sin(latents * 1.3 + timestep / 300) + 0.5 * torch.roll(latents, 1, -1).tanh()


@pytest.mark.parametrize(("sampler", "tokens"), SIZES)
@pytest.mark.parametrize("steps", [1, 4, 20, 28, 50])
def test_trajectory_is_diffusers(sampler: dict[str, Any], tokens: int, steps: int) -> None:
    theirs = reference(sampler, steps, tokens)
    ours = flow_euler(sampler, steps, tokens)
    shares = [leg.share for leg in ours.legs] + [ours.legs[-1].next_share]
    assert shares == pytest.approx(theirs.sigmas.tolist(), rel=1e-6)
    assert [leg.timestep for leg in ours.legs] == pytest.approx(theirs.timesteps.tolist(), rel=1e-6)
    assert [leg.next_share for leg in ours.legs[:-1]] == [leg.share for leg in ours.legs[1:]]
    assert ours.noise_scale == 1


@pytest.mark.parametrize(("sampler", "tokens"), [({"shift": 3.0}, 64), (FLUX, 1024)])
def test_steps_are_diffusers(sampler: dict[str, Any], tokens: int) -> None:
    theirs = reference(sampler, 12, tokens)
    ours_x = theirs_x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for leg, t in zip(flow_euler(sampler, 12, tokens).legs, theirs.timesteps, strict=True):
        ours_x = flow_step(denoiser(ours_x, leg.timestep), ours_x, leg, "flow")
        theirs_x = theirs.step(denoiser(theirs_x, float(t)), t, theirs_x).prev_sample
        torch.testing.assert_close(ours_x, theirs_x, rtol=1e-5, atol=1e-5)


def test_shares_by_hand() -> None:
    """Shift 3: 1/2 becomes 1.5/2, 1/4 becomes 0.75/1.5. For Flux at 1024 px the shift is e^1.15 = 3.158."""
    assert [leg.share for leg in flow_euler({"shift": 3}, 4, 1).legs] == pytest.approx([1, 0.9, 0.75, 0.5])
    assert [leg.share for leg in flow_euler({}, 4, 1).legs] == pytest.approx([1, 0.75, 0.5, 0.25])
    factor = math.exp(1.15)
    assert flow_euler(FLUX, 2, 4096).legs[1].share == pytest.approx(factor / (1 + factor))
    factor = math.exp(0.5)
    assert flow_euler(FLUX, 2, 256).legs[1].share == pytest.approx(factor / (1 + factor))


@given(st.integers(1, 200), st.floats(0.1, 20), st.integers(1, 20000), st.booleans())
def test_noise_falls_from_all_to_nothing(steps: int, shift: float, tokens: int, dynamic: bool) -> None:
    legs = flow_euler({"shift": shift, "use_dynamic_shifting": dynamic}, steps, tokens).legs
    assert len(legs) == steps and legs[0].share == 1 and legs[-1].next_share == 0
    assert all(leg.share > leg.next_share for leg in legs)


def test_a_perfect_denoiser_arrives_in_one_step() -> None:
    clean, noise = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    mixed = 0.3 * clean + 0.7 * noise
    torch.testing.assert_close(flow_step(noise - clean, mixed, FlowLeg(700, 0.7, 0.0), "flow"), clean)
    torch.testing.assert_close(
        flow_step(noise - clean, mixed, FlowLeg(700, 0.7, 0.2), "flow"), 0.8 * clean + 0.2 * noise
    )


@pytest.mark.parametrize(
    ("setting", "value"),
    [("use_karras_sigmas", True), ("use_beta_sigmas", True), ("use_exponential_sigmas", True), ("invert_sigmas", True),
     ("shift_terminal", 0.02), ("stochastic_sampling", True), ("time_shift_type", "linear")],
)  # fmt: skip
def test_arithmetic_that_is_not_here_is_refused(setting: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"The model's {setting} {value!r} is not supported\. Allowed: "):
        flow_euler({setting: value}, 4, 64)


def test_what_is_switched_off_is_accepted() -> None:
    off = {"use_karras_sigmas": False, "invert_sigmas": False, "shift_terminal": None, "time_shift_type": "exponential"}
    assert flow_euler(off, 4, 64) == flow_euler({}, 4, 64)


def test_no_steps_are_named() -> None:
    with pytest.raises(UserError, match="0 steps"):
        flow_euler({}, 0, 64)
