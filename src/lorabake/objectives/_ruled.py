"""What the objectives have in common: all that rules decide."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorabake.base.cards import find
from lorabake.objectives._settings import ObjectiveSettings

if TYPE_CHECKING:
    from torch import Tensor


class Ruled:
    """An objective's loss, weights and timesteps by the rules that its settings name; see :class:`lorabake.protocols.objective.Objective`.

    Raises:
        UserError: a rule is not there.
    """

    def __init__(self, settings: ObjectiveSettings) -> None:
        loss = find("loss", settings.loss)
        self._loss = loss.load()
        self._weigh = find("weighting", settings.weighting).load()
        self._draw = find("timesteps", settings.timesteps).load()
        self._huber = find("huber_schedule", settings.huber_schedule).load() if settings.used("huber_c") else None
        self._rules = settings

    def levels(self, timesteps_B: Tensor) -> tuple[Tensor, Tensor]:
        """How far timesteps are into the model's range (``position_B``) and how much noise there is (``noise_share_B``); see ``losses``."""
        raise NotImplementedError

    def error(self, prediction_BCHW: Tensor, target_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """How wrong every value is, ``error_BCHW``, in float32."""
        c_B111 = None
        if self._huber is not None:
            c_B111 = per_sample(self._huber(*self.levels(timesteps_B), self._rules))
        return self._loss(prediction_BCHW.float(), target_BCHW.float(), c_B111)


def per_sample(values_B: Tensor) -> Tensor:
    """``values_B111``."""
    return values_B[:, None, None, None]
