"""Loss weights by timestep. Each takes the signal-to-noise ratio ``snr_B``, whether the model predicts v, and the objective's settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorabake.base.cards import Card
from lorabake.base.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lorabake.objectives.diffusion import DiffusionSettings
else:
    torch = lazy_module("torch")


def none(snr_B: Tensor, predicts_v: bool, settings: DiffusionSettings) -> Tensor:
    """Every timestep weighs the same."""
    return torch.ones_like(snr_B)


def min_snr(snr_B: Tensor, predicts_v: bool, settings: DiffusionSettings) -> Tensor:
    """min(SNR, γ) / SNR for ε, min(SNR, γ) / (SNR + 1) for v. Hang et al. 2023, arXiv 2303.09556."""
    return snr_B.clamp(max=settings.min_snr_gamma) / (snr_B + 1 if predicts_v else snr_B)


CARDS = (
    Card("weighting", "none", "Every timestep weighs the same.", "lorabake.objectives.weightings:none"),
    Card(
        "weighting",
        "min-snr",
        "Damps the nearly clean timesteps; steadier and faster for most sets.",
        "lorabake.objectives.weightings:min_snr",
    ),
)
