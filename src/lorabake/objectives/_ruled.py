"""What the objectives have in common: all that rules decide."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from lorabake.base.cards import find
from lorabake.objectives._learned import LearnedWeights
from lorabake.objectives._settings import ObjectiveSettings
from lorabake.objectives.noise import perturbed
from lorabake.protocols.objective import RuleCard, Stream

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Ruled(ABC):
    """An objective's loss, weights, noise and timesteps by the rules that its settings name; see :class:`lorabake.protocols.objective.Objective`.

    Args:
        settings: the objective's.
        device: of the losses.

    Raises:
        UserError: a rule is not there.
    """

    def __init__(self, settings: ObjectiveSettings, device: torch.device | str) -> None:
        weighting = cast(RuleCard, find("weighting", settings.weighting))
        self.learning_rate = settings.learned_lr
        self._learned = LearnedWeights(device) if weighting.learns else None
        self._weigh = weighting.load()
        self._loss = find("loss", settings.loss).load()
        self._noise = find("noise", settings.noise).load()
        self._draw = find("timesteps", settings.timesteps).load()
        self._huber = find("huber_schedule", settings.huber_schedule).load() if settings.used("huber_c") else None
        self._rules = settings

    @abstractmethod
    def levels(self, timesteps_B: Tensor) -> tuple[Tensor, Tensor]:
        """How far timesteps are into the model's range (``position_B``) and how much noise there is (``noise_share_B``); see ``losses``."""

    @abstractmethod
    def weights(self, timesteps_B: Tensor) -> Tensor:
        """``weight_B`` by the weighting rule alone."""

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """See :class:`lorabake.protocols.objective.LearningObjective`."""
        return {"weights": self._learned.a_K} if self._learned else {}

    def unlearned(self) -> Ruled:
        """See :class:`lorabake.protocols.objective.LearningObjective`."""
        same = copy.copy(self)
        same._learned = None
        return same

    def noise(self, noise_BCHW: Tensor, latents_BCHW: Tensor, stream: Stream) -> dict[str, Tensor]:
        """``noise_BCHW`` by the noise rule, and ``mixed_BCHW`` where it is perturbed."""
        made: dict[str, Tensor] = {"noise_BCHW": self._noise(noise_BCHW, latents_BCHW, self._rules, stream)}
        if self._rules.input_perturbation:
            made["mixed_BCHW"] = perturbed(made["noise_BCHW"], self._rules, stream)
        return made

    def error(self, prediction_BCHW: Tensor, target_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """How wrong every value is, ``error_BCHW``, in float32."""
        c_B111 = None
        if self._huber is not None:
            c_B111 = per_sample(self._huber(*self.levels(timesteps_B), self._rules))
        return self._loss(prediction_BCHW.float(), target_BCHW.float(), c_B111)

    def weigh(self, error_B: Tensor, timesteps_B: Tensor) -> Tensor:
        """``loss_B`` of samples whose mean error is given."""
        loss_B = error_B * self.weights(timesteps_B)
        return loss_B if self._learned is None else self._learned(loss_B, self.levels(timesteps_B)[1])


def per_sample(values_B: Tensor) -> Tensor:
    """``values_B111``."""
    return values_B[:, None, None, None]
