"""Training in float16: gradients too small for its numbers are scaled up on their way, and down again before anybody looks at them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lorabake.base.errors import NotFinite
from lorabake.optimizers._flat import FlatGroup
from lorabake.protocols.optimizer import Optimizer
from lorabake.train.beside import Beside

FIRST = 65536.0
"""What the loss is multiplied by at first."""
PATIENCE = 2000
"""Steps without an overflow after which twice as much is tried."""


class LossScale:
    """What a loss is multiplied by, found as ``torch.amp.GradScaler`` does: halved at an overflow, doubled after :data:`PATIENCE` steps without.

    A step whose gradient overflowed is skipped. What is known is kept among the optimizer's own values of its first group, and so in
    every state.

    Args:
        optimizer: that steps.
        groups: all whose gradients are scaled.
    """

    def __init__(self, optimizer: Optimizer, groups: Sequence[FlatGroup]) -> None:
        self._optimizer, self._groups = optimizer, groups
        self.factor = torch.tensor(FIRST, device=groups[0].values.device)
        """The scale where losses are; recordings read it there."""
        self._known.update(loss_scale=FIRST, steps_without_overflow=0)

    @property
    def _known(self) -> dict[str, Any]:
        return self._optimizer.param_groups[0]

    def begin(self) -> None:
        """Before the gradients of a step are computed."""
        self.factor.fill_(self._known["loss_scale"])

    def unscale(self) -> None:
        """Make gradients what they are. A scale is a power of two, so nothing is rounded."""
        for group in self._groups:
            group.gradient.mul_(1 / self._known["loss_scale"])

    def judge(self, norm: float) -> Mapping[str, float]:
        """What to tell of a step whose gradients have this norm: its scale, and ``skipped`` where it must not be taken.

        Raises:
            NotFinite: they overflow though nothing is scaled up any more.
        """
        known, scale = self._known, self._known["loss_scale"]
        if math.isfinite(norm):
            known["steps_without_overflow"] += 1
            if known["steps_without_overflow"] >= PATIENCE:
                known.update(loss_scale=2 * scale, steps_without_overflow=0)
            return {"loss_scale": scale}
        if scale <= 1:
            raise NotFinite(
                "Gradients overflow in float16 in step after step, though they are not scaled up any more. Train with precision bf16, "
                "whose numbers reach further, or fp32; if that does not help, with a lower learning rate. The last good files are kept."
            )
        known.update(loss_scale=scale / 2, steps_without_overflow=0)
        return {"loss_scale": scale, "skipped": 1.0}


def take_step(scale: LossScale | None, norm: float, optimizer: Optimizer, beside: Beside | None) -> Mapping[str, float]:
    """Step on gradients of this norm, unless they overflowed; returns what is to be told of it.

    Raises:
        NotFinite: as for :meth:`LossScale.judge`.
    """
    told = scale.judge(norm) if scale else {}
    if "skipped" not in told:
        optimizer.step()
        if beside:
            beside.optimizer.step()
    return told
