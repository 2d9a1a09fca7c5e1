"""What the loop needs of an optimizer. Every ``torch.optim.Optimizer`` offers it."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Optimizer(Protocol):
    """Steps on flat parameters, one per parameter group."""

    param_groups: list[dict[str, Any]]
    """``params`` (a list of one flat parameter), ``lr`` and the optimizer's own settings."""
    state: MutableMapping[Tensor, dict[str, Any]]
    """By parameter: everything that must be saved to go on to the same bytes."""

    def step(self) -> Any:
        """Change the parameters by their gradients."""
        ...
