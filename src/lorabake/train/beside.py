"""What an objective learns for itself beside the adapter."""

from __future__ import annotations

from dataclasses import dataclass

from lorabake.base.cards import find
from lorabake.optimizers._flat import FlatGroup
from lorabake.protocols.objective import LearningObjective, Objective
from lorabake.protocols.optimizer import Optimizer


@dataclass(frozen=True, slots=True)
class Beside:
    """Learned in the same backward passes, and otherwise apart: whatever the adapter's optimizer, clipping and schedule are, they are not its."""

    group: FlatGroup
    optimizer: Optimizer

    @classmethod
    def of(cls, objective: Objective) -> Beside | None:
        """What ``objective`` learns; None where that is nothing."""
        if not isinstance(objective, LearningObjective) or not (parameters := objective.parameters()):
            return None
        group = FlatGroup("objective", parameters)
        card = find("optimizer", "adamw")
        settings = card.settings.model_validate({"betas": (0.9, 0.99), "weight_decay": 0.0}).model_dump()
        return cls(group, card.load()([{"params": [group.values], "lr": objective.learning_rate}], **settings))
