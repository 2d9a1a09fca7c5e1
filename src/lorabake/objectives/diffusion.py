"""Denoising diffusion: what is added, what is asked for, and the loss. Ho et al. 2020, arXiv 2006.11239; v: Salimans and Ho 2022, arXiv 2202.00512."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from lorabake.base.cards import Card, Settings, find
from lorabake.base.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor

    from lorabake.protocols.family import Model
else:
    torch = lazy_module("torch")


class DiffusionSettings(Settings):
    """Settings of ``diffusion``."""

    loss: str = "l2"
    """How far a prediction is from its target. See `lorabake list losses`."""
    weighting: str = "min-snr"
    """How much each timestep counts. min-snr is steadier for ε and v models; none is the plain loss. See `lorabake list weightings`."""
    min_snr_gamma: float = Field(default=5.0, gt=0, le=100)
    """γ of min-snr: timesteps with a signal-to-noise ratio above it are damped. 5 is usual, 1 to 20 safe."""
    timesteps: str = "uniform"
    """How timesteps are drawn. See `lorabake list timesteps`."""
    min_timestep: int = Field(default=0, ge=0, le=999)
    """Lowest timestep trained (0 is clean)."""
    max_timestep: int = Field(default=1000, ge=1, le=1000)
    """Timesteps trained are below this (999 is pure noise)."""

    @model_validator(mode="after")
    def _some_timestep_is_trained(self) -> DiffusionSettings:
        if self.min_timestep >= self.max_timestep:
            raise ValueError(
                f"min_timestep {self.min_timestep} must be below max_timestep {self.max_timestep}: nothing lies between."
            )
        return self

    def metadata(self) -> dict[str, Any]:
        """γ where it is used, and the loss."""
        return {"min_snr_gamma": self.min_snr_gamma if self.weighting == "min-snr" else None, "loss_type": self.loss}


class Diffusion:
    """The objective of ε- and v-predicting models; see :class:`lorabake.protocols.objective.Objective`.

    Args:
        settings: loss, weighting and timestep rule.
        betas_T: the model's noise schedule.
        prediction: ``epsilon`` or ``v``.
        device: where the tables live; nothing is moved between devices later.
    """

    def __init__(self, settings: DiffusionSettings, betas_T: Tensor, prediction: str, device: torch.device) -> None:
        self.settings, self.predicts_v = settings, prediction == "v"
        self._loss = find("loss", settings.loss).load()
        self._weigh = find("weighting", settings.weighting).load()
        self._draw = find("timesteps", settings.timesteps).load()
        alphas_cumprod_T = (1 - betas_T.double()).cumprod(0)
        snr_T = alphas_cumprod_T / (1 - alphas_cumprod_T)
        self.signal_T = alphas_cumprod_T.sqrt().float().to(device)
        self.noise_T = (1 - alphas_cumprod_T).sqrt().float().to(device)
        self.weight_T = self._weigh(snr_T, self.predicts_v, settings).float().to(device)

    def draw_timesteps(self, count: int, generator: Generator) -> Tensor:
        """``timesteps_B``, int64 on the CPU."""
        high = min(self.settings.max_timestep, len(self.signal_T))
        return self._draw(count, min(self.settings.min_timestep, high - 1), high, generator)

    def corrupt(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """x_t = √ᾱ_t x + √(1 − ᾱ_t) ε."""
        return (
            _per_sample(self.signal_T[timesteps_B]) * latents_BCHW + _per_sample(self.noise_T[timesteps_B]) * noise_BCHW
        )

    def target(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """ε, or v = √ᾱ_t ε − √(1 − ᾱ_t) x."""
        if not self.predicts_v:
            return noise_BCHW
        return (
            _per_sample(self.signal_T[timesteps_B]) * noise_BCHW - _per_sample(self.noise_T[timesteps_B]) * latents_BCHW
        )

    def loss(self, prediction_BCHW: Tensor, target_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """Weighted loss of each sample, ``loss_B``, in float32."""
        loss_B = self._loss(prediction_BCHW.float(), target_BCHW.float()).mean((1, 2, 3))
        return loss_B * self.weight_T[timesteps_B]


def diffusion_for(settings: DiffusionSettings, model: Model) -> Diffusion:
    """The objective on a model's own schedule and prediction type."""
    return Diffusion(settings, model.betas_T, model.facts.prediction, model.device)


def _per_sample(values_B: Tensor) -> Tensor:
    return values_B[:, None, None, None]


CARD = Card(
    kind="objective",
    name="diffusion",
    summary="Noise prediction (ε or v, as the base model was trained) on the model's own schedule.",
    code="lorabake.objectives.diffusion:diffusion_for",
    settings=DiffusionSettings,
)
