"""Loss weights by timestep. Each takes the signal-to-noise ratio ``snr_B``, what the model predicts, and the objective's settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorabake.base.lazy import lazy_module
from lorabake.protocols.family import Prediction
from lorabake.protocols.objective import RuleCard

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


def none(snr_B: Tensor, prediction: Prediction, settings: Any) -> Tensor:
    """Every timestep weighs the same."""
    return torch.ones_like(snr_B)


def min_snr(snr_B: Tensor, prediction: Prediction, settings: Any) -> Tensor:
    """min(SNR, γ) / SNR for ε, min(SNR, γ) / (SNR + 1) for v. Hang et al. 2023, arXiv 2303.09556."""
    return snr_B.clamp(max=settings.min_snr_gamma) / (snr_B + 1 if prediction == "v" else snr_B)


CARDS = (
    RuleCard("weighting", "none", "Every timestep weighs the same.", "lorabake.objectives.weightings:none"),
    RuleCard(
        "weighting",
        "min-snr",
        "Damps the nearly clean timesteps; steadier and faster for most sets.",
        "lorabake.objectives.weightings:min_snr",
        predictions=("epsilon", "v"),
        reads=("min_snr_gamma",),
    ),
)
