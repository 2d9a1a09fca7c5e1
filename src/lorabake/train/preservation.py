"""Keeping the base model's own answers where an adapter is not meant: the base, asked without the adapter, is the target.

What is kept is told to the denoiser under the names of the ordinary conditioning, with :data:`KEPT` before them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorabake.base.streams import random_stream
from lorabake.protocols.adapter import Graft
from lorabake.protocols.family import Model
from lorabake.protocols.objective import Objective
from lorabake.recipe.sections import PreservationSettings
from lorabake.train.asked import Asked
from lorabake.train.capture import Inputs
from lorabake.train.text import TextSource, conditioning_of

KEPT = "kept."
"""What the names of these inputs begin with."""
_WEIGHT = "weight_B"


class KeptInputs:
    """Gives a batch its captions without the trigger, and how much each row counts.

    Rows whose caption is the same without it count nothing: it cannot be taught and kept at once. A batch of such rows asks for nothing.

    Args:
        text: tells captions.
        settings: which captions are kept, how often and how strongly.
        seed: the run's.
    """

    def __init__(self, text: TextSource, settings: PreservationSettings, seed: int) -> None:
        self._text, self._settings, self._seed = text, settings, seed

    def __call__(self, asked: Asked) -> Inputs:
        """What is told of a batch's kept captions; nothing where it is not this batch's turn."""
        settings = self._settings
        if settings.share < 1:
            chance = random_stream(self._seed, "preservation", asked.step, asked.micro).random()
            if chance >= settings.share:
                return {}
        captions = [settings.kept_caption(caption) for caption in asked.captions]
        counts = [
            0.0 if kept == own else settings.weight / settings.share
            for kept, own in zip(captions, asked.captions, strict=True)
        ]
        if not any(counts):
            return {}
        told = self._text(captions)
        return {KEPT + _WEIGHT: torch.tensor(counts), **{KEPT + name: tensor for name, tensor in told.items()}}


def taken(told: Inputs) -> Inputs:
    """What is told of kept captions, under the ordinary names, taken out of ``told``."""
    return {name.removeprefix(KEPT): told.pop(name) for name in list(told) if name.startswith(KEPT)}


def base_answer(
    model: Model, graft: Graft | None, noisy_BCHW: Tensor, timesteps_B: Tensor, told: Mapping[str, Tensor]
) -> Tensor:
    """What the model predicts without the adapter, in the text encoder too; without a history."""
    assert graft is not None, "who asks for the base's answer gives the adapter that is to be left out"
    with torch.no_grad(), graft.off():
        return model.predict(noisy_BCHW, timesteps_B, conditioning_of(model, told))


def kept_losses(
    model: Model,
    objective: Objective,
    graft: Graft | None,
    noisy_BCHW: Tensor,
    timesteps_B: Tensor,
    told: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
) -> Tensor:
    """``loss_B`` of answering kept captions otherwise than the base does, at the same noisy latents.

    Args:
        told: what the denoiser is told of the pictures.
        kept: what it is told of the captions instead, and how much each row counts.
    """
    instead = {**told, **kept}
    weight_B = instead.pop(_WEIGHT)
    base_BCHW = base_answer(model, graft, noisy_BCHW, timesteps_B, instead)
    prediction_BCHW = model.predict(noisy_BCHW, timesteps_B, conditioning_of(model, instead))
    error_B = objective.error(prediction_BCHW, base_BCHW, timesteps_B).mean((1, 2, 3))
    return objective.weigh(error_B, timesteps_B) * weight_B
