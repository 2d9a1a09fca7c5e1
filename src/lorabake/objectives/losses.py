"""Element-wise losses, and where Huber's turns from a square into a line.

A loss takes prediction and target of one shape and ``c_B111``, and returns that shape. c, of losses that read ``huber_schedule``, is the
difference at which squares turn into lines; the others are given None.

A Huber schedule takes how far each sample's timestep is into the model's range (``position_B``: 0 clean, 1 noise), how much of what the
denoiser sees is noise (``noise_share_B`` = σ / (1 + σ), σ the ratio of noise to signal), and the objective's settings; it returns ``c_B``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lorabake.base.lazy import lazy_module
from lorabake.protocols.objective import RuleCard

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


def l2(prediction: Tensor, target: Tensor, c_B111: Tensor | None) -> Tensor:
    """Squared error. Keeps the most detail."""
    return (prediction - target).square()


def l1(prediction: Tensor, target: Tensor, c_B111: Tensor | None) -> Tensor:
    """Absolute error."""
    return (prediction - target).abs()


def huber(prediction: Tensor, target: Tensor, c_B111: Tensor) -> Tensor:
    """2c (√(d² + c²) − c) of the difference d: d² far below c, 2c |d| far above it.

    Pseudo-Huber, of Charbonnier et al. 1997; in training of this kind: Song and Dhariwal 2023, arXiv 2310.14189.
    """
    return c_B111 * smooth_l1(prediction, target, c_B111)


def smooth_l1(prediction: Tensor, target: Tensor, c_B111: Tensor) -> Tensor:
    """2 (√(d² + c²) − c) of the difference d: d² / c far below c, 2 |d| far above it. Huber's without its factor c."""
    squares = (prediction - target).square()
    return 2 * squares / ((squares + c_B111.square()).sqrt() + c_B111)  # the same, without taking like from like


def constant(position_B: Tensor, noise_share_B: Tensor, settings: Any) -> Tensor:
    """c is ``huber_c`` times ``huber_scale`` at every timestep."""
    return torch.full_like(noise_share_B, settings.huber_c * settings.huber_scale)


def exponential(position_B: Tensor, noise_share_B: Tensor, settings: Any) -> Tensor:
    """c falls from ``huber_scale`` at the clean end by the same factor every timestep, to ``huber_c`` of it in pure noise.

    Khrapov et al. 2024, arXiv 2403.16728.
    """
    return (position_B * math.log(settings.huber_c)).exp() * settings.huber_scale


def snr(position_B: Tensor, noise_share_B: Tensor, settings: Any) -> Tensor:
    """c = (1 − huber_c) / (1 + σ)² + huber_c: 1 at the clean end, ``huber_c`` in pure noise.

    Khrapov et al. 2024, arXiv 2403.16728, in the form of sd-scripts. Flow models have σ = s / (1 − s), so that 1 / (1 + σ) = 1 − s.
    """
    return (1 - settings.huber_c) * (1 - noise_share_B).square() + settings.huber_c


_HERE = "lorabake.objectives.losses"
CARDS = (
    RuleCard("loss", "l2", "Squared error; keeps the most detail.", f"{_HERE}:l2"),
    RuleCard("loss", "l1", "Absolute error; forgives bad pictures, and is softest on detail.", f"{_HERE}:l1"),
    RuleCard(
        "loss",
        "huber",
        "Squared for small errors, absolute for large ones; forgives bad pictures and captions.",
        f"{_HERE}:huber",
        reads=("huber_schedule",),
    ),
    RuleCard(
        "loss",
        "smooth-l1",
        "As huber, with large errors as steep whatever huber_c is.",
        f"{_HERE}:smooth_l1",
        reads=("huber_schedule",),
    ),
    RuleCard(
        "huber_schedule",
        "constant",
        "Turns from square to line at one size of error, whatever the timestep.",
        f"{_HERE}:constant",
        reads=("huber_c", "huber_scale"),
    ),
    RuleCard(
        "huber_schedule",
        "exponential",
        "Nearly square on clean timesteps, falling evenly to huber_c in noise.",
        f"{_HERE}:exponential",
        reads=("huber_c", "huber_scale"),
    ),
    RuleCard(
        "huber_schedule",
        "snr",
        "As exponential, falling with the signal-to-noise ratio; the usual one.",
        f"{_HERE}:snr",
        reads=("huber_c",),
    ),
)
