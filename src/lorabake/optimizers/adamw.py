"""AdamW. Loshchilov and Hutter 2017, arXiv 1711.05101.

PyTorch's fused kernel, called directly: ``torch.optim`` would import PyTorch's compiler at its first step, and start every run more than a
second later. The results are those of ``torch.optim.AdamW(fused=True)`` to the last bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from lorabake.base.lazy import lazy_module
from lorabake.protocols.optimizer import OptimizerCard, OptimizerSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


Decay = Annotated[float, Field(ge=0, lt=1)]
"""How much of a running mean stays at each step."""


class AdamWSettings(OptimizerSettings):
    """Settings of ``adamw``."""

    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the running mean and of the running square, each from 0 to below 1. 0.9 and 0.99 follow faster, for short runs."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(default=0.01, ge=0, le=1)
    """Pull of every weight towards zero, times the learning rate, per step."""


class AdamW:
    """See :class:`lorabake.protocols.optimizer.Optimizer`."""

    def __init__(self, param_groups: list[dict[str, Any]], **settings: Any) -> None:
        self.param_groups = [{**settings, **group} for group in param_groups]
        self.state: dict[Tensor, dict[str, Any]] = {}

    def step(self) -> None:
        """One step of every group."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            states = [self._state_of(parameter) for parameter in parameters]
            with torch.no_grad():
                for state in states:
                    state["step"] += 1
                torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
                    parameters,
                    [parameter.grad for parameter in parameters],
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    [],
                    [state["step"] for state in states],
                    lr=group["lr"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    amsgrad=False,
                    maximize=False,
                )

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        if parameter not in self.state:
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            self.state[parameter] = {
                "step": step,
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return self.state[parameter]


CARD = OptimizerCard(
    "optimizer", "adamw", "AdamW, the default: predictable, no surprises.", f"{__name__}:AdamW", AdamWSettings
)
