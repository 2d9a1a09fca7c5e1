"""Exponential moving averages of the trained weights: one flat buffer for each decay and group.

Early steps count for less than the decay alone would have it, because an average of a few steps would still be mostly what the run began
with: after t steps the decay is at most (1 + t) / (10 + t), and the first step is taken as it is, as diffusers' training scripts have it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lorabake.optimizers._flat import FlatGroup


class Averages:
    """Averages of ``groups`` for each of ``decays``; they begin with the weights as they are."""

    def __init__(self, groups: Sequence[FlatGroup], decays: Sequence[float]) -> None:
        self._groups = groups
        self._kept = {decay: [group.values.detach().clone() for group in groups] for decay in decays}

    @property
    def decays(self) -> tuple[float, ...]:
        """Of all averages."""
        return tuple(self._kept)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights in as they are after optimizer step ``step``, counted from 0."""
        for decay, kept in self._kept.items():
            weight = 1.0 - min(decay, (1 + step) / (10 + step)) if step else 1.0
            for average, group in zip(kept, self._groups, strict=True):
                average.lerp_(group.values, weight)

    @contextlib.contextmanager
    def as_weights(self, decay: float) -> Iterator[None]:
        """For a while, one of the averages in the place of the weights."""
        held = [group.values.detach().clone() for group in self._groups]
        self._put(self._kept[decay])
        try:
            yield
        finally:
            self._put(held)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for group, value in zip(self._groups, values, strict=True):
            group.values.copy_(value)

    def tensors(self) -> dict[str, Tensor]:
        """All averages, live, by decay and group."""
        return {
            f"ema{decay:g}.{group.name}": average
            for decay, kept in self._kept.items()
            for group, average in zip(self._groups, kept, strict=True)
        }
