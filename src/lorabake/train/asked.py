"""What those go by that add to a batch's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Asked:
    """Which batch inputs are asked for."""

    step: int
    micro: int
    """Which batch of the step."""
    views: Sequence[tuple[int, int]]
    """Sample and view of each row."""
    captions: Sequence[str]
    """Of each row, as the model is told them."""
