"""Optimizers that come in packages of their own, and those of PyTorch: a row each.

Settings have the packages' own names, because guides speak of them. What is not offered is off.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from lorabake.optimizers.adamw import AdamWSettings, Decay
from lorabake.protocols.optimizer import OptimizerCard, OptimizerSettings

OpenDecay = Annotated[float, Field(gt=0, lt=1)]
"""One that averages are divided by."""


class AdaptiveSettings(OptimizerSettings):
    """What Prodigy and D-Adaptation have in common."""

    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the running mean and of the running square, each from 0 to below 1. 0.9 and 0.99 follow faster, for short runs."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(default=0.01, ge=0, le=1)
    """Pull of every weight towards zero, times the learning rate, per step."""
    decouple: bool = True
    """Apply weight decay to the weights, as AdamW does, and not to the gradient."""
    use_bias_correction: bool = True
    """Adam's correction of its first steps: the rate is found more slowly and more safely. Guides for LoRA switch it on, packages leave it off."""
    d0: float = Field(default=1e-6, gt=0, le=1)
    """Where the search for the rate begins. 1e-5 to 1e-4 if it does not get going in a short run."""
    growth_rate: float | None = Field(default=None, gt=1)
    """The rate grows at most by this factor a step; 1.02 is a warm-up of sorts. Absent: as fast as it likes."""

    def arguments(self) -> dict[str, Any]:
        """As the packages want them: no limit is infinity."""
        return {**self.model_dump(), "growth_rate": self.growth_rate or math.inf}


class ProdigySettings(AdaptiveSettings):
    """Settings of ``prodigy``."""

    beta3: Decay | None = None
    """Decay of the sums that the rate is found from. Absent: the square root of the second beta."""
    safeguard_warmup: bool = True
    """Keep a warm-up from misleading the search for the rate."""
    d_coef: float = Field(default=1.0, gt=0, le=100)
    """Multiplies the rate that is found: the dial to turn. 2 for characters, 1 for gentle changes and styles, 0.5 where it burns."""
    slice_p: int = Field(default=1, ge=1, le=1000)
    """Find the rate from every N-th weight only: 11 saves a third of the memory, at a little less precision."""


class ProdigyScheduleFreeSettings(OptimizerSettings):
    """Settings of ``prodigy-schedule-free``."""

    betas: tuple[OpenDecay, Decay] = (0.9, 0.99)
    """Pull towards the average, and decay of the running square. Guides try 0.95 to 0.98 for the first."""
    beta3: Decay | None = None
    """Decay of the sums that the rate is found from. Absent: the square root of the second beta."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """Pull of every weight towards zero, times the learning rate, per step."""
    d0: float = Field(default=1e-6, gt=0, le=1)
    """Where the search for the rate begins. 1e-5 to 1e-4 if it does not get going in a short run."""
    d_coef: float = Field(default=1.0, gt=0, le=100)
    """Multiplies the rate that is found: the dial to turn. 0.5 to 2 is usual."""
    d_limiter: bool = True
    """Let the rate grow slowly at first, while there is little to find it from."""
    split_groups: bool = True
    """Find a rate for the denoiser and one for each text encoder. False finds one for all."""
    schedulefree_c: float = Field(default=0.0, ge=0, le=1000)
    """Length of the average: 6 to 12 suits short runs, 50 to 200 long ones. 0 is the whole run."""
    factored: bool = True
    """Keep the running squares of a matrix by row and column: half the memory, at a little less precision."""
    use_stableadamw: bool = True
    """Limit each matrix's update to the size of an ordinary one."""
    use_bias_correction: bool = False
    """RAdam's correction of the first steps. The rate is found up to ten times more slowly."""
    use_speed: bool = False
    """Find the rate from how straight the way is. Less memory; an experiment, and unstable with weight decay."""


class DAdaptSettings(AdaptiveSettings):
    """Settings of ``dadapt-adam``."""


class AdafactorSettings(OptimizerSettings):
    """Settings of ``adafactor``."""

    beta2_decay: float = Field(default=-0.8, gt=-1, le=0)
    """How fast the memory of squares grows long: at step t it holds on to 1 - t^this of them."""
    clip_threshold: float = Field(default=1.0, ge=1)
    """Largest root mean square of a weight's update before the learning rate."""
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """Pull of every weight towards zero, times the learning rate, per step."""
    scale_parameter: bool = False
    """Make steps as large as the weights are, times the rate, as the paper has it: then give lr = 0.01. LoRA begins with weights of zero, for which
    that is slow; without it a rate is a rate, as for AdamW."""

    def arguments(self) -> dict[str, Any]:
        """As PyTorch wants them: steps are never scaled by less than the second epsilon, and weights of a LoRA hardly exceed 1."""
        return {
            "beta2_decay": self.beta2_decay,
            "d": self.clip_threshold,
            "weight_decay": self.weight_decay,
            "eps": (None, 1e-3 if self.scale_parameter else 1.0),
        }


class CameSettings(OptimizerSettings):
    """Settings of ``came``."""

    betas: tuple[Decay, Decay, Decay] = (0.9, 0.999, 0.9999)
    """Decay of the running update, of the running square and of the running distrust, each from 0 to below 1."""
    clip_threshold: float = Field(default=1.0, gt=0)
    """Largest root mean square of a weight's update before the learning rate."""
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """Pull of every weight towards zero, times the learning rate, per step."""


class LionSettings(OptimizerSettings):
    """Settings of ``lion``."""

    betas: tuple[Decay, Decay] = (0.9, 0.99)
    """How much of the running mean goes into a step, and its decay, each from 0 to below 1. 0.95 and 0.98 are steadier."""
    weight_decay: float = Field(default=0.0, ge=0, le=10)
    """Pull of every weight towards zero, times the learning rate, per step. The rate is smaller than AdamW's, so this is usually larger."""


class ScheduleFreeSettings(OptimizerSettings):
    """Settings of ``adamw-schedule-free``."""

    betas: tuple[OpenDecay, Decay] = (0.9, 0.999)
    """Pull towards the average, and decay of the running square. 0.95 to 0.98 for the first in long runs."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """Pull of every weight towards zero, times the learning rate, per step."""
    r: float = Field(default=0.0, ge=0, le=10)
    """Later steps count for more in the average: step t counts t^r."""
    weight_lr_power: float = Field(default=2.0, ge=0, le=10)
    """Steps of a warm-up count for less in the average: by this power of their rate."""


class MuonSettings(OptimizerSettings):
    """Settings of ``muon``."""

    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the running mean of gradients."""
    nesterov: bool = True
    """Look one step ahead with it."""
    weight_decay: float = Field(default=0.01, ge=0, le=1)
    """Pull of every weight towards zero, times the learning rate, per step."""
    ns_steps: int = Field(default=5, ge=1, le=20)
    """Rounds of the iteration that makes an update orthogonal."""
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """How large an update is: as large as AdamW's, so that its rates serve here too; or as the method was first written, for rates about 0.02."""


_EXTRA = "optimizers"
CARDS = (
    OptimizerCard(
        "optimizer",
        "adamw-8bit",
        "AdamW that keeps its moments in 8 bits: a quarter of the memory, nearly the same steps.",
        "bitsandbytes.optim:AdamW8bit",
        AdamWSettings,
        extra=_EXTRA,
    ),
    OptimizerCard(
        "optimizer",
        "prodigy",
        "Finds the learning rate itself; half as many steps as AdamW. Mishchenko and Defazio 2023.",
        "prodigyopt:Prodigy",
        ProdigySettings,
        extra=_EXTRA,
        adapts=True,
        one_rate=True,
        warmup_guard="safeguard_warmup",
    ),
    OptimizerCard(
        "optimizer",
        "prodigy-schedule-free",
        "Prodigy that needs no schedule: the LoRA is an average of the way.",
        "prodigyplus:ProdigyPlusScheduleFree",
        ProdigyScheduleFreeSettings,
        extra=_EXTRA,
        sees="tensors",
        adapts=True,
        averages=True,
        limits_updates=True,
    ),
    OptimizerCard(
        "optimizer",
        "dadapt-adam",
        "Finds the learning rate itself, more carefully than Prodigy. Defazio and Mishchenko 2023.",
        "dadaptation:DAdaptAdam",
        DAdaptSettings,
        extra=_EXTRA,
        adapts=True,
        one_rate=True,
    ),
    OptimizerCard(
        "optimizer",
        "adafactor",
        "Keeps a row and a column for each matrix: hardly any memory. Shazeer and Stern 2018.",
        "torch.optim:Adafactor",
        AdafactorSettings,
        sees="tensors",
    ),
    OptimizerCard(
        "optimizer",
        "came",
        "Adafactor with momentum that distrusts unsteady updates. Luo et al. 2023.",
        "came_pytorch:CAME",
        CameSettings,
        extra=_EXTRA,
        sees="tensors",
        of_adamw=0.1,
    ),
    OptimizerCard(
        "optimizer",
        "lion",
        "Steps of one size in the direction of the momentum; half of AdamW's memory. Chen et al. 2023.",
        "lion_pytorch:Lion",
        LionSettings,
        extra=_EXTRA,
        of_adamw=0.2,
    ),
    OptimizerCard(
        "optimizer",
        "adamw-schedule-free",
        "AdamW that needs no schedule: the LoRA is an average of the way. Defazio et al. 2024.",
        "schedulefree:AdamWScheduleFree",
        ScheduleFreeSettings,
        extra=_EXTRA,
        averages=True,
        of_adamw=3.0,
    ),
    OptimizerCard(
        "optimizer",
        "muon",
        "Orthogonal updates: every direction of a matrix moves alike. Jordan et al. 2024.",
        "torch.optim:Muon",
        MuonSettings,
        sees="matrices",
    ),
)
