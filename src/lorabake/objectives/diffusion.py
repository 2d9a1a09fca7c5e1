"""Denoising diffusion: what is added, what is asked for, and the loss. Ho et al. 2020, arXiv 2006.11239; v: Salimans and Ho 2022, arXiv 2202.00512."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from lorabake.base.lazy import lazy_module
from lorabake.objectives._ruled import Ruled, per_sample
from lorabake.objectives._settings import ObjectiveSettings
from lorabake.objectives.timesteps import Draw
from lorabake.protocols.family import ZERO_TERMINAL_SNR, ModelFacts, Prediction
from lorabake.protocols.objective import ObjectiveCard

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor

    from lorabake.protocols.family import Model
else:
    torch = lazy_module("torch")


class DiffusionSettings(ObjectiveSettings):
    """Settings of ``diffusion``."""

    weighting: str = "min-snr"
    """How much each timestep counts. min-snr is steadier for ε and v models; none is the plain loss, and what zero_terminal_snr takes where nothing
    is given here. See `lorabake list weightings`."""
    min_snr_gamma: float = Field(default=5.0, gt=0, le=100)
    """γ of min-snr and soft-min-snr: timesteps with a signal-to-noise ratio above it are damped. 5 is usual, 1 to 20 safe."""
    p2_gamma: float = Field(default=1.0, gt=0, le=4)
    """γ of p2: how steeply clean timesteps are damped. 0.5 and 1 are usual, up to 2 safe."""
    p2_k: float = Field(default=1.0, gt=0, le=100)
    """k of p2: the signal-to-noise ratio where damping begins. Above 1 all weights are smaller, below 1 the noisy ones larger. 1 is usual."""

    zero_terminal_snr: bool = False
    """Stretch the noise schedule until its last timestep is noise alone, for very dark and very bright pictures (arXiv 2305.08891). Only for v
    models. Pictures must be drawn on the same schedule, with trailing timesteps, as the run's samples are."""

    def schedule(self) -> Mapping[str, Any]:
        """Lin et al. 2023, arXiv 2305.08891."""
        return ZERO_TERMINAL_SNR if self.zero_terminal_snr else {}

    def derived(self, facts: ModelFacts) -> Iterator[tuple[str, Any, str]]:
        """Weights with which the timestep that is mended counts, where nobody chose others."""
        if self.zero_terminal_snr and not {"weighting", "min_snr_gamma"} & self.model_fields_set:
            yield "weighting", "none", "zero_terminal_snr is for the last timestep, which min-snr does not count"

    def unfit(self, prediction: Prediction) -> Iterator[tuple[str, str]]:
        """Noise cannot be told from noise."""
        if self.zero_terminal_snr and prediction == "epsilon":
            why = (
                "true, but the base model predicts epsilon: at the last timestep it would be asked for the very noise it sees, which says "
                "nothing of the picture. It is for models that predict v. Leave it out; for others there is noise = 'offset'."
            )
            yield "zero_terminal_snr", why

    def doubts(self) -> Iterator[str]:
        """Those of every objective, and timesteps that are mended and left out."""
        yield from super().doubts()
        if self.zero_terminal_snr and self.max_timestep < 1000:
            yield f"zero_terminal_snr is for the last timestep, and max_timestep = {self.max_timestep} leaves it out."

    def metadata(self) -> dict[str, Any]:
        """The loss and its weights, and the schedule."""
        used = {name: self.used(name) for name in ("min_snr_gamma", "p2_gamma", "p2_k")}
        own = {"debiased_estimation": self.weighting == "debiased", "zero_terminal_snr": self.zero_terminal_snr}
        return {**super().metadata(), **used, **own}


class Diffusion(Ruled):
    """The objective of ε- and v-predicting models; see :class:`lorabake.protocols.objective.Objective`.

    Args:
        settings: loss, weighting and timestep rule.
        betas_T: the model's noise schedule.
        prediction: ``epsilon`` or ``v``.
        device: where the tables live; nothing is moved between devices later.
        sampler: the model's scheduler settings, for timestep rules that go by them.
    """

    def __init__(
        self,
        settings: DiffusionSettings,
        betas_T: Tensor,
        prediction: Prediction,
        device: torch.device,
        sampler: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(settings, device)
        self.settings, self.predicts_v, self._sampler = settings, prediction == "v", sampler or {}
        alphas_cumprod_T = (1 - betas_T.double()).cumprod(0)
        snr_T = alphas_cumprod_T / (1 - alphas_cumprod_T)
        self.signal_T = alphas_cumprod_T.sqrt().float().to(device)
        self.noise_T = (1 - alphas_cumprod_T).sqrt().float().to(device)
        self.weight_T = self._weigh(snr_T, prediction, settings).float().to(device)

    def draw_timesteps(self, shape_BCHW: Sequence[int], generator: Generator) -> Tensor:
        """``timesteps_B``, int64 on the CPU."""
        high = min(self.settings.max_timestep, len(self.signal_T))
        low = min(self.settings.min_timestep, high - 1)
        shares_B = self._draw(Draw.of(shape_BCHW, high - low, self._sampler, self.settings, generator))
        return low + (shares_B * (high - low)).long().clamp(max=high - low - 1)

    def corrupt(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """x_t = √ᾱ_t x + √(1 − ᾱ_t) ε."""
        return (
            per_sample(self.signal_T[timesteps_B]) * latents_BCHW + per_sample(self.noise_T[timesteps_B]) * noise_BCHW
        )

    def target(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """ε, or v = √ᾱ_t ε − √(1 − ᾱ_t) x."""
        if not self.predicts_v:
            return noise_BCHW
        return (
            per_sample(self.signal_T[timesteps_B]) * noise_BCHW - per_sample(self.noise_T[timesteps_B]) * latents_BCHW
        )

    def levels(self, timesteps_B: Tensor) -> tuple[Tensor, Tensor]:
        """t / T, and √(1 − ᾱ_t) / (√ᾱ_t + √(1 − ᾱ_t))."""
        signal_B, noise_B = self.signal_T[timesteps_B], self.noise_T[timesteps_B]
        return timesteps_B / len(self.signal_T), noise_B / (signal_B + noise_B)

    def weights(self, timesteps_B: Tensor) -> Tensor:
        """``weight_B`` by the weighting rule alone."""
        return self.weight_T[timesteps_B]


def diffusion_for(settings: DiffusionSettings, model: Model) -> Diffusion:
    """The objective on a model's own schedule and prediction type."""
    assert model.betas_T is not None, "recipes are checked: an objective's card says which predictions it serves"
    return Diffusion(settings, model.betas_T, model.facts.prediction, model.device, model.sampler)


CARD = ObjectiveCard(
    kind="objective",
    name="diffusion",
    summary="Noise prediction (ε or v, as the base model was trained) on the model's own schedule.",
    code="lorabake.objectives.diffusion:diffusion_for",
    settings=DiffusionSettings,
    predictions=("epsilon", "v"),
)
