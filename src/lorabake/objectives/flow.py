"""Flow matching: the straight way from picture to noise. Lipman et al. 2022, arXiv 2210.02747; Liu et al. 2022, arXiv 2209.03003.

s is the share of noise, 0 a clean picture and 1 noise alone; timesteps are 1000·s in float32, as these models are told them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from lorabake.objectives._ruled import Ruled, per_sample
from lorabake.objectives._settings import ObjectiveSettings
from lorabake.objectives.timesteps import SHIFT, Draw
from lorabake.protocols.family import ModelFacts
from lorabake.protocols.objective import ObjectiveCard

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor

    from lorabake.protocols.family import Model

_LEVELS = 1 << 24
"""Timesteps are not whole: as many as float32 tells apart below 1."""


class FlowSettings(ObjectiveSettings):
    """Settings of ``flow``.

    The defaults are what is common for LoRA, with the model's own shift: timesteps from a logistic normal distribution, because s near 0
    and near 1 teaches little (arXiv 2403.03206, section 3.1); moved towards noise, because a large picture is still plain to see under
    noise that would drown a small one (section 5.3.2); and no weights, because the distribution of timesteps already is one.
    """

    timesteps: str = "shift"
    """How timesteps are drawn. flux-shift and resolution-shift suit pictures of many sizes. See `lorabake list timesteps`."""
    shift: float | None = Field(default=None, gt=0, le=100)
    """How far shift and resolution-shift move timesteps towards noise; 1 is not at all. Default: that of the model's own schedule, or 3 where its files
    do not say it; the run's recipe holds the value. 1 to 6 is usual."""

    def derived(self, facts: ModelFacts) -> Iterator[tuple[str, Any, str]]:
        """The shift, where a rule goes by it."""
        if self.shift is None and self.reads("shift"):
            said = f"{facts.name}'s own schedule"
            yield (
                "shift",
                facts.shift or SHIFT,
                said if facts.shift else "what is usual: the model's files do not say theirs",
            )

    def metadata(self) -> dict[str, Any]:
        """The loss, and how timesteps are drawn, in other trainers' words."""
        names = {"uniform": "uniform", "logit-normal": "sigma"}
        known = {"timestep_sampling": names[self.timesteps]} if self.timesteps in names else {}
        own = {"discrete_flow_shift": self.used("shift"), "model_prediction_type": "raw"}
        return {**super().metadata(), **known, **own}


class Flow(Ruled):
    """The objective of flow models; see :class:`lorabake.protocols.objective.Objective`.

    Args:
        settings: loss, weighting and timestep rule.
        sampler: the model's scheduler settings; its shifts are read.
        device: of the losses.
        usual_tokens: patches of 2 × 2 latent cells in a picture of the model's own size.
    """

    def __init__(
        self,
        settings: FlowSettings,
        sampler: Mapping[str, Any],
        device: torch.device | str = "cpu",
        usual_tokens: int = 4096,
    ) -> None:
        super().__init__(settings, device)
        self.settings, self._sampler, self._usual_tokens = settings, sampler, usual_tokens

    def draw_timesteps(self, shape_BCHW: Sequence[int], generator: Generator) -> Tensor:
        """``timesteps_B``, float32 on the CPU, from ``min_timestep`` to ``max_timestep``."""
        low, high = self.settings.min_timestep, self.settings.max_timestep
        draw = Draw.of(shape_BCHW, _LEVELS, self._sampler, self.settings, generator, self._usual_tokens)
        shares_B = self._draw(draw)
        return (low + (high - low) * shares_B).float()

    def corrupt(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """x_s = (1 − s) x + s ε."""
        s_B111 = per_sample(_shares(timesteps_B))
        return (1 - s_B111) * latents_BCHW + s_B111 * noise_BCHW

    def target(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """ε − x, the same all along the way."""
        return noise_BCHW - latents_BCHW

    def levels(self, timesteps_B: Tensor) -> tuple[Tensor, Tensor]:
        """s, which is both: σ / (1 + σ) with σ = s / (1 − s)."""
        s_B = _shares(timesteps_B)
        return s_B, s_B

    def weights(self, timesteps_B: Tensor) -> Tensor:
        """``weight_B`` by the weighting rule alone."""
        s_B = _shares(timesteps_B)
        return self._weigh(((1 - s_B) / s_B).square(), "flow", self.settings)


def flow_for(settings: FlowSettings, model: Model) -> Flow:
    """The objective with a model's own shift and size."""
    side = model.facts.resolution // model.facts.latent_scale // 2
    return Flow(settings, model.sampler, model.device, side * side)


def _shares(timesteps_B: Tensor) -> Tensor:
    return timesteps_B.float() / 1000


CARD = ObjectiveCard(
    kind="objective",
    name="flow",
    summary="Flow matching: the direction from picture to noise, for Flux and its kin.",
    code="lorabake.objectives.flow:flow_for",
    settings=FlowSettings,
    predictions=("flow",),
)
