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
    usual_tokens: int = 4096
    """Patches in a picture of the size that the model was trained on."""

    @classmethod
    def of(
        cls,
        shape_BCHW: Sequence[int],
        levels: int,
        sampler: Mapping[str, Any],
        settings: Any,
        generator: Generator,
        usual_tokens: int = 4096,
    ) -> Draw:
        """For latents of a shape."""
        count, _, height, width = shape_BCHW
        return cls(count, levels, (height // 2) * (width // 2), sampler, settings, generator, usual_tokens)


def uniform(draw: Draw) -> Tensor:
    """Every timestep is as likely as any other. Shares are middles of ``draw.levels`` equal steps: never 0 or 1; spread ones lie anywhere."""
    if draw.settings.stratified:
        return stratified(draw)
    return (torch.randint(0, draw.levels, (draw.count,), generator=draw.generator).double() + 0.5) / draw.levels


def stratified(draw: Draw) -> Tensor:
    """As likely as any other, and a batch's evenly apart: (u + i / n) mod 1, with one number u for the batch.

    Kingma et al. 2021, "Variational Diffusion Models", arXiv 2107.00630, appendix on low-discrepancy sampling: the loss of a batch varies less.
    """
    start = torch.rand((), generator=draw.generator, dtype=torch.float64)
    return (start + torch.arange(draw.count, dtype=torch.float64) / draw.count) % 1


def sigmoid(draw: Draw) -> Tensor:
    """Most in the middle: the logistic function of normal numbers times ``sigmoid_scale``. Below 1 it is narrower."""
    return (draw.settings.sigmoid_scale * _normal(draw)).sigmoid()


def logit_normal(draw: Draw) -> Tensor:
    """Logit-normal with mean ``logit_mean`` and deviation ``logit_std`` (Esser et al. 2024, arXiv 2403.03206, equation 19)."""
    return (draw.settings.logit_mean + draw.settings.logit_std * _normal(draw)).sigmoid()


def shift(draw: Draw) -> Tensor:
    """``sigmoid`` moved towards noise by ``shift``, or by the model's own shift."""
    return shifted(sigmoid(draw), _shift(draw))


def resolution_shift(draw: Draw) -> Tensor:
    """As ``shift``, which is then for pictures of the model's own size, times the root of how many more pixels there are.

    Esser et al. 2024, arXiv 2403.03206, equation 23: α = √(m / n).
    """
    return shifted(sigmoid(draw), _shift(draw) * math.sqrt(draw.tokens / draw.usual_tokens))


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


def _shift(draw: Draw) -> float:
    """The shift that is set, or the model's own."""
    return draw.settings.shift or float(draw.sampler.get("shift", SHIFT))


def _normal(draw: Draw) -> Tensor:
    """Normal numbers, (count,); spread ones are quantiles of evenly spread numbers, so that one lies in each n-th of the distribution.

    Every rule that makes shares of them is monotone, so its batches are spread over its own distribution, which stays as it is.
    """
    if draw.settings.stratified:
        return torch.special.ndtri(stratified(draw))
    return torch.randn(draw.count, generator=draw.generator, dtype=torch.float64)


_HERE = "lorabake.objectives.timesteps"
CARDS = (
    RuleCard(
        "timesteps",
        "uniform",
        "Every timestep is as likely as any other.",
        f"{_HERE}:uniform",
        reads=("stratified",),
    ),
    RuleCard(
        "timesteps",
        "stratified",
        "As uniform with objective.stratified: spread evenly over each batch, which makes steps more alike.",
        f"{_HERE}:stratified",
        alone="a batch of one picture has nothing to spread, and it is as uniform. Give train.batch_size 2 or more.",
    ),
    RuleCard(
        "timesteps",
        "sigmoid",
        "Mostly the middle timesteps, fewer towards picture and noise.",
        f"{_HERE}:sigmoid",
        reads=("sigmoid_scale", "stratified"),
    ),
    RuleCard(
        "timesteps",
        "shift",
        "As sigmoid, moved towards noise, where large pictures get their composition.",
        f"{_HERE}:shift",
        predictions=("flow",),
        reads=("sigmoid_scale", "shift", "stratified"),
    ),
    RuleCard(
        "timesteps",
        "flux-shift",
        "As shift, with more shift for larger pictures, as Flux draws them.",
        f"{_HERE}:flux_shift",
        predictions=("flow",),
        reads=("sigmoid_scale", "stratified"),
    ),
    RuleCard(
        "timesteps",
        "resolution-shift",
        "As shift, with more of it for larger pictures than the model's own size, less for smaller; for SD3.",
        f"{_HERE}:resolution_shift",
        predictions=("flow",),
        reads=("sigmoid_scale", "shift", "stratified"),
    ),
    RuleCard(
        "timesteps",
        "logit-normal",
        "As sigmoid, with a mean and a width of its own.",
        f"{_HERE}:logit_normal",
        reads=("logit_mean", "logit_std", "stratified"),
    ),
)
