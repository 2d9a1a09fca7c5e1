"""Which timesteps are trained. Each rule draws ``count`` integers in [low, high) from a generator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorabake.base.cards import Card
from lorabake.base.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor
else:
    torch = lazy_module("torch")


def uniform(count: int, low: int, high: int, generator: Generator) -> Tensor:
    """Every timestep is as likely as any other."""
    return torch.randint(low, high, (count,), generator=generator)


CARDS = (
    Card("timesteps", "uniform", "Every timestep is as likely as any other.", "lorabake.objectives.timesteps:uniform"),
)
