"""The loss of pictures that are not trained on, with the adapter and without it.

Each picture is always asked about at the same amounts of noise, with the same noise: what changes between two times is the adapter.
Amounts of noise are the middles of equal parts of what training draws, so few of them stand for all. Nothing here moves a random
stream, a weight or a kept tensor of training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorabake.base.streams import torch_stream
from lorabake.dataset.caption import CaptionConfig, full_caption
from lorabake.protocols.adapter import Graft
from lorabake.protocols.family import Framing, Model
from lorabake.protocols.objective import Objective
from lorabake.recipe.pictures import Pictures
from lorabake.recipe.sections import ValidationSettings
from lorabake.train.capture import Inputs
from lorabake.train.text import TextSource

_DRAWS = 4096
"""Timesteps drawn to find the middles of equal parts of their distribution."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Loss of the held-out pictures."""

    loss: float
    base: float
    """The base's alone."""
    change: float
    """Loss less the base's; below 0 the adapter helps."""
    interval: tuple[float, float] | None
    """Where the change lies with 95 % confidence, other pictures of the kind being asked about; None for a single picture."""

    def told(self) -> dict[str, Any]:
        """As fields of an event."""
        return {"loss": self.loss, "base": self.base, "change": self.change, "interval": list(self.interval) if self.interval else None}  # fmt: skip


class HeldOut:
    """Asks about held-out pictures.

    Args:
        inputs: of each picture: one row for each amount of noise.
        loss_of: mean loss of inputs on the model's device.
        model: asked.
        graft: the adapter on it.
    """

    def __init__(
        self, inputs: Sequence[Inputs], loss_of: Callable[[Inputs], Tensor], model: Model, graft: Graft
    ) -> None:
        self._inputs, self._loss_of, self._model, self._graft = inputs, loss_of, model, graft
        self._base: list[float] | None = None

    def compare(self) -> Comparison:
        """The pictures' losses now, beside the base's, which is asked once."""
        if self._base is None:
            self._base = self._losses(self._graft.off)
        own = self._losses(nullcontext)
        changes = [loss - base for loss, base in zip(own, self._base, strict=True)]
        mean = sum(changes) / len(changes)
        return Comparison(sum(own) / len(own), sum(self._base) / len(own), mean, confidence_interval(changes, mean))

    @torch.no_grad()
    def _losses(self, around: Callable[[], AbstractContextManager[None]]) -> list[float]:
        """Mean loss of each picture."""
        training, self._graft.training = self._graft.training, False
        try:
            with around():
                return torch.stack([self._loss_of(self._on_device(inputs)) for inputs in self._inputs]).tolist()
        finally:
            self._graft.training = training

    def _on_device(self, inputs: Inputs) -> Inputs:
        return {name: tensor.to(self._model.device) for name, tensor in inputs.items()}


def inputs_of(
    pictures: Pictures,
    latents: Sequence[Tensor],
    framings: Sequence[Framing],
    masks: Sequence[Tensor | None],
    model: Model,
    objective: Objective,
    text: TextSource,
    captions: CaptionConfig,
    settings: ValidationSettings,
) -> list[Inputs]:
    """What each picture is asked with: K rows, K the amounts of noise.

    Args:
        pictures: the pictures.
        latents: of each, CHW.
        framings: of each.
        masks: of each, as the loss takes them (1HW); None counts whole.
        model: whose captions.
        objective: whose timesteps.
        text: tells captions.
        captions: what is done to captions, as far as it is not by chance.
        settings: how many amounts of noise, and the seed.
    """
    found: list[Inputs] = []
    count = settings.timesteps
    any_mask = any(mask is not None for mask in masks)
    for sample, latents_CHW, framing, mask in zip(pictures.samples, latents, framings, masks, strict=True):
        rows = (count, *latents_CHW.shape)
        noise = torch_stream(settings.seed, f"validation {sample.sha256}")
        inputs: Inputs = {
            "latents_BCHW": latents_CHW.expand(rows),
            "noise_BCHW": torch.randn(rows, generator=noise),
            "timesteps_B": middles(objective, latents_CHW.shape, count),
            **text([full_caption(sample.caption, captions)] * count),
            **model.frame([framing] * count),
        }
        if any_mask:
            whole = torch.ones(1, *latents_CHW.shape[1:])
            inputs["mask_B1HW"] = (whole if mask is None else mask).expand(count, *whole.shape)
        found.append(inputs)
    return found


def middles(objective: Objective, shape_CHW: Sequence[int], count: int) -> Tensor:
    """``timesteps_B``: the middles of ``count`` equal parts of what training draws for latents of this shape."""
    drawn = objective.draw_timesteps((_DRAWS, *shape_CHW), torch_stream(0, "validation timesteps")).sort().values
    return drawn[[(2 * index + 1) * _DRAWS // (2 * count) for index in range(count)]]


def confidence_interval(values: Sequence[float], mean: float) -> tuple[float, float] | None:
    """Where the mean of more such values lies with 95 % confidence (Student's t); None for a single value."""
    count = len(values)
    if count < 2:
        return None
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    reach = student_quantile(count - 1) * deviation / math.sqrt(count)
    return mean - reach, mean + reach


def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; within 0.003 of the true one.

    The first are tabulated, the rest are its expansion about the normal quantile z (Abramowitz and Stegun 1964, 26.7.5).
    """
    known = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
    if freedom in known:
        return known[freedom]
    z = 1.959964
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
