"""What the loop needs of an optimizer, and what an optimizer says of itself. Every ``torch.optim.Optimizer`` offers the former."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from lorabake.base.cards import Card, Settings

if TYPE_CHECKING:
    from torch import Tensor

Sight = Literal["flat", "tensors", "matrices"]
"""As what an optimizer sees the weights of a group: ``flat`` all of them as one vector, ``tensors`` each weight by itself (those of
convolutions as a row for every output), ``matrices`` the same with vectors as one row."""


class OptimizerSettings(Settings):
    """Base of an optimizer's settings."""

    def arguments(self) -> dict[str, Any]:
        """What the optimizer's class is made with besides weights and rates."""
        return self.model_dump()


@dataclass(frozen=True)
class OptimizerCard(Card):
    """An optimizer's card. ``code`` names a class that takes parameter groups, a rate for those without one and the settings."""

    sees: Sight = "flat"
    """``flat`` costs a call a step, and is right for whatever treats every number by itself."""
    adapts: bool = False
    """It finds the learning rate: a group's rate is ``d`` × ``lr``, and ``lr`` only a factor, usually 1."""
    one_rate: bool = False
    """All groups must have the same ``lr``."""
    averages: bool = False
    """The LoRA is the average of the weights on the way, so that nothing need decay; see :class:`AveragingOptimizer`."""
    limits_updates: bool = False
    """It limits its own updates, and gradients that were cut before mislead it."""
    warmup_guard: str = ""
    """Its setting, a flag, with which a warm-up does not mislead its search for the learning rate; empty where it has none."""
    of_adamw: float = 1.0
    """Its usual learning rate, as a multiple of AdamW's."""

    def rate(self, group: Mapping[str, Any]) -> float:
        """The learning rate that a parameter group really has."""
        return float(group["lr"] * group["d"]) if self.adapts else group["lr"]


class Optimizer(Protocol):
    """Steps on parameter groups, one for every group of weights with a rate of its own."""

    param_groups: list[dict[str, Any]]
    """``params`` (a list of tensors, see :data:`Sight`), ``lr`` and the optimizer's own settings, and whatever else it keeps of a group."""
    state: MutableMapping[Tensor, dict[str, Any]]
    """By parameter. Together with the groups: everything that must be saved to go on to the same bytes."""

    def step(self) -> Any:
        """Change the parameters by their gradients."""
        ...


@runtime_checkable
class AveragingOptimizer(Protocol):
    """An optimizer that trains on other weights than those that are to be used: on points between the last and the average of all."""

    def train(self) -> Any:
        """Put the weights to train on into their places."""
        ...

    def eval(self) -> Any:
        """Put the average into their places."""
        ...
