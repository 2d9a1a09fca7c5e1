"""How samplers introduce themselves."""

from __future__ import annotations

from dataclasses import dataclass

from lorabake.base.cards import Card
from lorabake.protocols.family import Prediction


@dataclass(frozen=True)
class SamplerCard(Card):
    """A sampler's card. ``code`` names a :class:`lorabake.sampling.samplers.Sampler`."""

    predictions: tuple[Prediction, ...] = ()
    """What the models predict that it draws with."""
    shown: str = ""
    """Its name in generation parameters, as other tools write it."""
    usual: bool = False
    """Whether it is taken where none is asked for. Every prediction has one such sampler."""
