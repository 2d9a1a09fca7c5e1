"""What an objective offers: how clean latents become noisy ones, what the denoiser is asked for, and how wrong it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, get_args, runtime_checkable

from lorabake.base.cards import Card
from lorabake.protocols.family import Prediction

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

RULES = ("loss", "huber_schedule", "weighting", "noise", "timesteps")
"""Kinds of rules that objectives share. An objective's setting that chooses one is called as its kind is."""

Stream = Callable[[str, int], "Generator"]
"""A generator on the CPU of the stream with a name, for the sample at a place in the batch. It is the same at any place there."""


@dataclass(frozen=True)
class ObjectiveCard(Card):
    """An objective's card. ``code`` names a function ``code(settings, model)`` that makes an :class:`Objective`."""

    predictions: tuple[Prediction, ...] = ()
    """What the models predict that it trains. Among all objectives, every prediction belongs to one."""


@dataclass(frozen=True)
class RuleCard(Card):
    """The card of a loss, a weighting, a kind of noise, a timestep rule …: a formula that any objective for ``predictions`` may use."""

    predictions: tuple[Prediction, ...] = get_args(Prediction)
    """What the models predict that it is good for."""
    reads: tuple[str, ...] = ()
    """The objective's settings that it goes by. Where another rule of its kind is chosen, they do nothing. One that is itself a kind of rule
    is a formula within this one."""
    learns: bool = False
    """Of weightings: whether what it says is only where it starts, and the weights are learned from there."""
    cautions: Mapping[str, str] = field(default_factory=dict)
    """What to warn of, by what the model predicts and by the name of a setting that is on."""
    alone: str = ""
    """What to warn of where a batch is a single picture."""


class Objective(Protocol):
    """Made by the function its card names. Legend: B batch, C channels, H and W latent height and width."""

    def draw_timesteps(self, shape_BCHW: Sequence[int], generator: Generator) -> Tensor:
        """``timesteps_B`` on the CPU for latents of this shape: whole numbers, or floats in [0, 1000] for flow models."""
        ...

    def noise(self, noise_BCHW: Tensor, latents_BCHW: Tensor, stream: Stream) -> dict[str, Tensor]:
        """On the CPU, from plain noise: ``noise_BCHW`` to train with, and ``mixed_BCHW`` where something else is mixed into the latents."""
        ...

    def corrupt(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """Noisy latents."""
        ...

    def target(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """What the denoiser should answer."""
        ...

    def error(self, prediction_BCHW: Tensor, target_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """How wrong every value is, ``error_BCHW``, in float32."""
        ...

    def weigh(self, error_B: Tensor, timesteps_B: Tensor) -> Tensor:
        """``loss_B`` of samples whose mean error is given: how much each counts is a matter of its timestep."""
        ...


@runtime_checkable
class LearningObjective(Protocol):
    """An objective that may learn something for itself, as how much each timestep counts. It belongs to a run's state, and to no file."""

    learning_rate: float
    """Of AdamW, and the same in every step."""

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What is learned, by name; empty where nothing is."""
        ...

    def unlearned(self) -> Objective:
        """The same without what is learned: losses by it at different times can be compared."""
        ...
