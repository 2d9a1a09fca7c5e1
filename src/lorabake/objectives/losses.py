"""Element-wise losses. Each takes prediction and target of one shape and returns that shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorabake.protocols.objective import RuleCard

if TYPE_CHECKING:
    from torch import Tensor


def l2(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error. Keeps the most detail."""
    return (prediction - target).square()


CARDS = (RuleCard("loss", "l2", "Squared error; keeps the most detail.", "lorabake.objectives.losses:l2"),)
