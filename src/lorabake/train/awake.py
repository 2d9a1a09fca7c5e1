"""Weights that a run's steps do not need are out of memory; now and then something needs all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lorabake.protocols.family import Model


@contextmanager
def awake(model: Model) -> Iterator[None]:
    """The whole model in memory; what was not there before leaves it again afterwards.

    Raises:
        UserError: a file of the model has changed since it was opened.
    """
    resting = model.resting()
    model.wake(resting)
    try:
        yield
    finally:
        model.rest(resting)
