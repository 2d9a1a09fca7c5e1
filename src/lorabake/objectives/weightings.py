"""Loss weights by timestep. Each takes the signal-to-noise ratio ``snr_B``, what the model predicts, and the objective's settings.

An error of δ in ε is one of δ / √ᾱ in v, so a v model's squared error is that of ε times (SNR + 1) / SNR. Weights that papers give for ε
are for v, where not said otherwise, the same times SNR / (SNR + 1).
"""

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

_MOST_SNR = 1000.0
"""Limit of the signal-to-noise ratio in formulas of sd-scripts: that of the first timestep, in schedules where it has one."""


def none(snr_B: Tensor, prediction: Prediction, settings: Any) -> Tensor:
    """Every timestep weighs the same."""
    return torch.ones_like(snr_B)


def min_snr(snr_B: Tensor, prediction: Prediction, settings: Any) -> Tensor:
    """min(SNR, γ) / SNR for ε, min(SNR, γ) / (SNR + 1) for v. Hang et al. 2023, arXiv 2303.09556."""
    return snr_B.clamp(max=settings.min_snr_gamma) / (snr_B + 1 if prediction == "v" else snr_B)


def soft_min_snr(snr_B: Tensor, prediction: Prediction, settings: Any) -> Tensor:
    """The same with 1 / (1 / SNR + 1 / γ) for the minimum. Crowson et al. 2024, arXiv 2401.11605."""
    gamma = settings.min_snr_gamma
    return _as_for(prediction, gamma / (snr_B + gamma), snr_B)


def p2(snr_B: Tensor, prediction: Prediction, settings: Any) -> Tensor:
    """1 / (k + SNR)^γ: less for the clean timesteps, which teach what the eye does not see. Choi et al. 2022, arXiv 2204.00227."""
    return _as_for(prediction, (settings.p2_k + snr_B).pow(-settings.p2_gamma), snr_B)


def debiased(snr_B: Tensor, prediction: Prediction, settings: Any) -> Tensor:
    """1 / √SNR for ε (Yu et al. 2023, arXiv 2310.08442), 1 / (SNR + 1) for v, as sd-scripts has it; SNR up to 1000."""
    snr_B = snr_B.clamp(max=_MOST_SNR)
    return 1 / (snr_B + 1) if prediction == "v" else snr_B.rsqrt()


def epsilon_like(snr_B: Tensor, prediction: Prediction, settings: Any) -> Tensor:
    """SNR / (SNR + 1): a v model's error as an ε model's; SNR up to 1000. ``scale_v_pred_loss_like_noise_pred`` of sd-scripts."""
    snr_B = snr_B.clamp(max=_MOST_SNR)
    return snr_B / (snr_B + 1)


def _as_for(prediction: Prediction, of_epsilon_B: Tensor, snr_B: Tensor) -> Tensor:
    """Weights for what the model predicts, given those for ε."""
    return of_epsilon_B * snr_B / (snr_B + 1) if prediction == "v" else of_epsilon_B


_ZERO_SNR = {
    "zero_terminal_snr": "it hardly counts the last timesteps, and the very last, which zero_terminal_snr is for, not at all. "
    "none and debiased do."
}
_HERE = "lorabake.objectives.weightings"
CARDS = (
    RuleCard("weighting", "none", "Every timestep weighs the same.", f"{_HERE}:none"),
    RuleCard(
        "weighting",
        "min-snr",
        "Damps the nearly clean timesteps; steadier and faster for most sets.",
        f"{_HERE}:min_snr",
        predictions=("epsilon", "v"),
        reads=("min_snr_gamma",),
        cautions=_ZERO_SNR,
    ),
    RuleCard(
        "weighting",
        "soft-min-snr",
        "As min-snr, without the kink where damping begins.",
        f"{_HERE}:soft_min_snr",
        predictions=("epsilon", "v"),
        reads=("min_snr_gamma",),
        cautions=_ZERO_SNR,
    ),
    RuleCard(
        "weighting",
        "p2",
        "Damps clean timesteps by more than min-snr: shapes and colours before fine detail.",
        f"{_HERE}:p2",
        predictions=("epsilon", "v"),
        reads=("p2_k", "p2_gamma"),
        cautions=_ZERO_SNR,
    ),
    RuleCard(
        "weighting",
        "debiased",
        "Damps clean timesteps and lifts noisy ones, so that errors of the whole picture count most.",
        f"{_HERE}:debiased",
        predictions=("epsilon", "v"),
    ),
    RuleCard(
        "weighting",
        "epsilon-like",
        "Counts the errors of a v model as if it predicted noise: less of the noisiest timesteps.",
        f"{_HERE}:epsilon_like",
        predictions=("v",),
        cautions=_ZERO_SNR,
    ),
    RuleCard(
        "weighting",
        "learned",
        "Starts as none and learns how hard each timestep is, so that all come to count alike.",
        f"{_HERE}:none",
        reads=("learned_lr",),
        learns=True,
    ),
)
