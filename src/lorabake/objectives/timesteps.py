"""Which timesteps are trained. Each rule answers a :class:`Draw` with shares: how far into the trained range each sample's timestep lies.

0 is the clean end and 1 the noisy one. For flow models over the whole range, a share is the share of noise itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from lorabake.base.lazy import lazy_module
from lorabake.protocols.objective import RuleCard

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor
else:
    torch = lazy_module("torch")

Share = TypeVar("Share", float, "Tensor")

SHIFT = 3.0
"""Shift for models that do not name theirs: what SD3 was trained and is sampled with at 1024 px (arXiv 2403.03206, section 5.3.2)."""


@dataclass(frozen=True, slots=True)
class Draw:
    """What a rule may go by."""

    count: int
    """How many shares."""
    levels: int
    """How many timesteps there are; a great many where they are not whole."""
    tokens: int
    """Patches of 2 × 2 latent cells in a picture: what a transformer sees of it."""
    sampler: Mapping[str, Any]
    """The model's scheduler settings."""
    settings: Any
    """The objective's; a rule's card names those it reads."""
    generator: Generator

    @classmethod
    def of(
        cls, shape_BCHW: Sequence[int], levels: int, sampler: Mapping[str, Any], settings: Any, generator: Generator
    ) -> Draw:
        """For latents of a shape."""
        count, _, height, width = shape_BCHW
        return cls(count, levels, (height // 2) * (width // 2), sampler, settings, generator)


def uniform(draw: Draw) -> Tensor:
    """Every timestep is as likely as any other. Shares are middles of ``draw.levels`` equal steps: never 0 or 1."""
    return (torch.randint(0, draw.levels, (draw.count,), generator=draw.generator).double() + 0.5) / draw.levels


def sigmoid(draw: Draw) -> Tensor:
    """Most in the middle: the logistic function of normal numbers times ``sigmoid_scale``. Below 1 it is narrower."""
    return (draw.settings.sigmoid_scale * _normal(draw)).sigmoid()


def logit_normal(draw: Draw) -> Tensor:
    """Logit-normal with mean ``logit_mean`` and deviation ``logit_std`` (Esser et al. 2024, arXiv 2403.03206, equation 19)."""
    return (draw.settings.logit_mean + draw.settings.logit_std * _normal(draw)).sigmoid()


def shift(draw: Draw) -> Tensor:
    """``sigmoid`` moved towards noise by ``shift``, or by the model's own shift."""
    return shifted(sigmoid(draw), draw.settings.shift or float(draw.sampler.get("shift", SHIFT)))


def flux_shift(draw: Draw) -> Tensor:
    """``sigmoid`` moved towards noise by as much as Flux is when it draws a picture of this size."""
    return shifted(sigmoid(draw), size_shift(draw.tokens, draw.sampler))


def shifted(share: Share, shift: float) -> Share:
    """s → a·s / (1 + (a − 1)·s), a the shift: the same signal-to-noise ratio in a picture of more pixels (2403.03206, equation 23).

    1 moves nothing; 0 and 1 stay where they are.
    """
    return share / (share + (1 - share) / shift)  # the same, and never a rounding beyond 1


def size_shift(tokens: int, sampler: Mapping[str, Any]) -> float:
    """Flux's shift for a picture of ``tokens``: exp(μ), μ on the line through (256, 0.5) and (4096, 1.15), which ``sampler`` may move.

    Facts of Flux's published sampling code, in diffusers' names: ``base_image_seq_len``, ``max_image_seq_len``, ``base_shift``, ``max_shift``.
    """
    low, high = sampler.get("base_image_seq_len", 256), sampler.get("max_image_seq_len", 4096)
    base, most = sampler.get("base_shift", 0.5), sampler.get("max_shift", 1.15)
    return math.exp(base + (most - base) * (tokens - low) / (high - low))


def _normal(draw: Draw) -> Tensor:
    return torch.randn(draw.count, generator=draw.generator, dtype=torch.float64)


CARDS = (
    RuleCard(
        "timesteps", "uniform", "Every timestep is as likely as any other.", "lorabake.objectives.timesteps:uniform"
    ),
    RuleCard(
        "timesteps",
        "sigmoid",
        "Mostly the middle timesteps, fewer towards picture and noise.",
        "lorabake.objectives.timesteps:sigmoid",
        predictions=("flow",),
        reads=("sigmoid_scale",),
    ),
    RuleCard(
        "timesteps",
        "shift",
        "As sigmoid, moved towards noise, where large pictures get their composition.",
        "lorabake.objectives.timesteps:shift",
        predictions=("flow",),
        reads=("sigmoid_scale", "shift"),
    ),
    RuleCard(
        "timesteps",
        "flux-shift",
        "As shift, with more shift for larger pictures, as Flux draws them.",
        "lorabake.objectives.timesteps:flux_shift",
        predictions=("flow",),
        reads=("sigmoid_scale",),
    ),
    RuleCard(
        "timesteps",
        "logit-normal",
        "As sigmoid, with a mean and a width of its own.",
        "lorabake.objectives.timesteps:logit_normal",
        predictions=("flow",),
        reads=("logit_mean", "logit_std"),
    ),
)
