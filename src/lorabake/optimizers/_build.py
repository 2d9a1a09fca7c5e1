"""An optimizer on groups of weights, from its card; and its weights as they are to be used."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch

from lorabake.optimizers._flat import FlatGroup
from lorabake.protocols.optimizer import AveragingOptimizer, Optimizer, OptimizerCard, OptimizerSettings


def build(
    card: OptimizerCard, settings: OptimizerSettings, groups: Sequence[FlatGroup], rates: Sequence[float]
) -> Optimizer:
    """A new optimizer, ready to step.

    Args:
        card: which one.
        settings: its own.
        groups: of weights, in the order of its parameter groups.
        rates: learning rate of each, above 0.

    Raises:
        MissingExtra: its package is not installed.
    """
    given = [{"params": group.as_seen(card.sees), "lr": rate} for group, rate in zip(groups, rates, strict=True)]
    with contextlib.redirect_stdout(io.StringIO()):  # some packages print what they were told
        optimizer = cast(Optimizer, card.load()(given, lr=max(rates), **settings.arguments()))
    if isinstance(optimizer, AveragingOptimizer):
        optimizer.train()
    return optimizer


def rates_now(
    groups: Sequence[FlatGroup], optimizer: Optimizer, rate_of: Callable[[Mapping[str, Any]], float]
) -> dict[str, float]:
    """The learning rate of each group in its last step, by name."""
    return {group.name: rate_of(its) for group, its in zip(groups, optimizer.param_groups, strict=True)}


@contextlib.contextmanager
def finished_weights(optimizer: Optimizer, groups: Sequence[FlatGroup]) -> Iterator[None]:
    """For a while, the weights as a finished LoRA has them; afterwards those that are trained on, to the last bit.

    They differ for optimizers that average. What these do to come back is rounded, so it is done to a copy.
    """
    if not isinstance(optimizer, AveragingOptimizer):
        yield
        return
    held = [group.values.detach().clone() for group in groups]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for group, values in zip(groups, held, strict=True):
                group.values.copy_(values)
