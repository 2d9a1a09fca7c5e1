"""Settings that every objective has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from pydantic import Field, model_validator

from lorabake.base.cards import Settings, cards
from lorabake.protocols.family import ModelFacts, Prediction
from lorabake.protocols.objective import RULES, RuleCard


class ObjectiveSettings(Settings):
    """Rules by name, what they go by, and the range of timesteps that is trained."""

    loss: str = "l2"
    """How far a prediction is from its target. See `lorabake list losses`."""
    huber_schedule: str = "snr"
    """How the losses huber and smooth-l1 change with the timestep. See `lorabake list huber_schedules`."""
    huber_c: float = Field(default=0.1, gt=0, le=1)
    """Size of error at which those losses turn from square to line, for the schedules exponential and snr that in pure noise. 0.1 is usual,
    0.01 to 0.5 safe: smaller forgives more and keeps less detail."""
    huber_scale: float = Field(default=1.0, gt=0, le=100)
    """Factor on that size at every timestep, for the schedules constant and exponential. 1 is usual."""
    weighting: str = "none"
    """How much each timestep counts. See `lorabake list weightings`."""
    learned_lr: float = Field(default=0.01, gt=0, le=1)
    """Learning rate of the weighting learned, in every step and with an AdamW of its own. 0.01 settles in about 300 steps; 0.003 to 0.03 is safe.
    With that weighting the loss that is shown compares with no other, and may go below 0."""
    noise: str = "gaussian"
    """Which noise is added. See `lorabake list noises`."""
    noise_offset: float = Field(default=0.05, gt=0, le=1)
    """Strength of the noise offset. 0.0357 (SDXL's own) to 0.1 is usual; above, pictures get too contrasty."""
    noise_offset_adaptive: float = Field(default=0.0, ge=-10, le=10)
    """Added to the strength of the noise offset: this times the absolute mean of the picture's latent channel. About as large as noise_offset
    is usual, 0 is off."""
    noise_offset_random: bool = False
    """Draw the strength of the noise offset for each picture anew, evenly between 0 and noise_offset."""
    pyramid_iterations: int = Field(default=6, ge=1, le=20)
    """Most grain sizes of pyramid noise. 6 to 10 is usual; small latents have room for fewer."""
    pyramid_discount: float = Field(default=0.3, gt=0, lt=1)
    """How strong each larger grain of pyramid noise is beside the one before. 0.1 to 0.4 is usual; 0.8 and above spoils detail."""
    input_perturbation: float = Field(default=0.0, ge=0, le=1)
    """γ of input perturbation: so much more noise is mixed in than is asked for, against errors that add up while drawing. 0 is off, 0.1 usual,
    0.05 to 0.15 safe."""
    input_perturbation_random: bool = False
    """Draw that γ for each picture anew, evenly between 0 and input_perturbation."""
    timesteps: str = "uniform"
    """How timesteps are drawn. See `lorabake list timesteps`."""
    stratified: bool = False
    """Spread what timesteps draws evenly over each batch: of n pictures one lies in each n-th of its distribution, which stays as it is. Makes steps
    more alike. Needs train.batch_size 2 or more; safe with all of them. For uniform it is what the rule stratified does."""
    sigmoid_scale: float = Field(default=1.0, gt=0, le=10)
    """Width of sigmoid and of the timestep rules that shift it: smaller is more in the middle. 1 is usual, 0.5 to 1.5 safe."""
    logit_mean: float = Field(default=0.0, ge=-10, le=10)
    """Mean of logit-normal: above 0 is more noise. -1 to 1 is usual."""
    logit_std: float = Field(default=1.0, gt=0, le=10)
    """Width of logit-normal. 1 is usual."""
    min_timestep: int = Field(default=0, ge=0, le=999)
    """Lowest timestep trained (0 is clean)."""
    max_timestep: int = Field(default=1000, ge=1, le=1000)
    """Timesteps trained are below this (999 is pure noise)."""

    @model_validator(mode="after")
    def _some_timestep_is_trained(self) -> ObjectiveSettings:
        if self.min_timestep >= self.max_timestep:
            raise ValueError(
                f"min_timestep {self.min_timestep} must be below max_timestep {self.max_timestep}: nothing lies between."
            )
        return self

    def rules(self) -> Iterator[RuleCard]:
        """Cards of the rules that are chosen and gone by. A rule that is only for another one, which is not chosen, is none of them."""
        known = {kind: cast("dict[str, RuleCard]", cards(kind)) for kind in RULES}
        inner = {name for of_kind in known.values() for card in of_kind.values() for name in card.reads}
        chosen = [found for kind in RULES if (found := known[kind].get(getattr(self, kind))) is not None]
        read = {name for card in chosen if card.kind not in inner for name in card.reads}
        return (card for card in chosen if card.kind not in inner or card.kind in read)

    def reads(self, name: str) -> bool:
        """Whether a rule that is chosen goes by this setting."""
        return any(name in card.reads for card in self.rules())

    def used(self, name: str) -> Any:
        """The value of a setting if a rule goes by it, else None."""
        return getattr(self, name) if self.reads(name) else None

    def schedule(self) -> Mapping[str, Any]:
        """What of the model's scheduler settings is otherwise while it is trained, and when pictures are drawn with what was."""
        return {}

    def derived(self, facts: ModelFacts) -> Iterator[tuple[str, Any, str]]:
        """Settings that were left open, as the model has them: name, value and why."""
        return iter(())

    def unfit(self, prediction: Prediction) -> Iterator[tuple[str, str]]:
        """Settings, by name, that models which predict this cannot be trained with, and why not."""
        return iter(())

    def doubts(self) -> Iterator[str]:
        """What is allowed and probably not meant."""
        if self.input_perturbation_random and not self.input_perturbation:
            yield "input_perturbation_random does nothing: input_perturbation is 0."

    def metadata(self) -> dict[str, Any]:
        """Loss, noise and timesteps, and weights for which other trainers have no field of their own."""
        named = {"none", "min-snr", "debiased"}
        return {
            "loss_type": self.loss.replace("-", "_"),
            "huber_schedule": self.used("huber_schedule"),
            "huber_c": self.used("huber_c"),
            "huber_scale": self.used("huber_scale"),
            "weighting_scheme": None if self.weighting in named else self.weighting,
            "noise_offset": self.used("noise_offset"),
            "noise_offset_random_strength": self.used("noise_offset_random") or False,
            "adaptive_noise_scale": self.used("noise_offset_adaptive") or None,
            "multires_noise_iterations": self.used("pyramid_iterations"),
            "multires_noise_discount": self.used("pyramid_discount"),
            "ip_noise_gamma": self.input_perturbation or None,
            "ip_noise_gamma_random_strength": self.input_perturbation_random and self.input_perturbation > 0,
            "timestep_sampling": None if self.timesteps == "uniform" else self.timesteps.replace("-", "_"),
            "sigmoid_scale": self.used("sigmoid_scale"),
            "logit_mean": self.used("logit_mean"),
            "logit_std": self.used("logit_std"),
        }
