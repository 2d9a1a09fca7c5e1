"""AdamW as PyTorch has it. Loshchilov and Hutter 2017, arXiv 1711.05101."""

from __future__ import annotations

from pydantic import Field

from lorabake.base.cards import Card, Settings


class AdamWSettings(Settings):
    """Settings of ``adamw``."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running mean and of the running square. 0.9 and 0.99 follow faster, for short runs."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(default=0.01, ge=0, le=1)
    """Pull of every weight towards zero, times the learning rate, per step."""


CARD = Card("optimizer", "adamw", "AdamW, the default: predictable, no surprises.", "torch.optim:AdamW", AdamWSettings)
